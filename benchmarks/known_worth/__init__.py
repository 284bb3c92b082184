"""What methods win of what can be won, where the right weights are known."""
