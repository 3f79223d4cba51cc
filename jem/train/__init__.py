"""The training loop, its optimizers and checkpoints, and its launch on Ray Train."""
