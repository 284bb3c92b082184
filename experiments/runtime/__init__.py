"""Files, signals and processes."""
