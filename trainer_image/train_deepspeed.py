#!/usr/bin/env python3
"""The guide's entry point: the options of `mamba-train run`.

Started alone it launches and supervises all ranks; started by `deepspeed` or `torchrun` it is one rank.
"""

from mamba_trainer.cli import train_deepspeed

if __name__ == "__main__":
    train_deepspeed()
