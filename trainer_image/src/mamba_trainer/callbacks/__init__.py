"""Behaviours beside the training loop, one a file."""
