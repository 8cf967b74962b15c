"""The optimizers, one a file: `step` reads as the paper's algorithm."""
