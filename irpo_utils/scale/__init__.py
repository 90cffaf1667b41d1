"""More than one process, as `torchrun` starts them."""
