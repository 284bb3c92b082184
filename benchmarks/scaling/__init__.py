"""The cost of a step on many devices."""
