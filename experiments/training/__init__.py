"""Training loops, sweeps, resumption."""
