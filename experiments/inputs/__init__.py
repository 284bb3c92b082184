"""How batches reach the training step."""
