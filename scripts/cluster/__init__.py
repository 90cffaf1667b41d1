"""Several GPUs and machines: how processes share a run, and the files that start them."""
