"""Methods on a problem with two parameters."""
