"""A sandboxed compile runtime for PyTorch."""
