"""Train, validate and test a PyTorch model from one command line."""

__version__ = "0.1.0"
