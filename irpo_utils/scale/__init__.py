"""More than one process: `torchrun`, split models, a vLLM server."""
