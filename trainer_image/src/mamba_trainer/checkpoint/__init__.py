"""Checkpoints that survive a kill at any instant: written whole or not at all, read only after they verify.

`manager.CheckpointManager` is what a training loop uses; `verify.verify` checks a folder without torch. All
modules but `rng`, `control`, `deepspeed_engine`, `resume` and `manager` are free of torch. This package
imports none of them by itself.
"""
