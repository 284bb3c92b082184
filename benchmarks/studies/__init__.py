"""Studies of theory and robustness, and their figures."""
