"""Training runs with exact checkpoints, and fair comparisons of optimizers."""
