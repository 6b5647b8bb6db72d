"""Trains Mamba-1 language models with DeepSpeed.

The modules `config`, `presets`, `plan`, `contract` and `restart` are free of torch: they are what the
operator shares with the trainer, and import-linter keeps them so.
"""

__version__ = "0.1.0"
