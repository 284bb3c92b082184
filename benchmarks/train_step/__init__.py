"""The cost of a training step, method by method."""
