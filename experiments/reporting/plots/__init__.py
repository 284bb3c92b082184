"""Figures of comparisons and sweeps."""
