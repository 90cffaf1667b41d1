"""More than one process: `torchrun` and split models."""
