"""One home for all ways to start training: `run(LaunchSpec(...))`.

It starts the ranks of this machine or pod, forwards signals, waits, and ends with the exit code of the first
rank that failed. It exists because torchrun does not do that: it turns 70 and 75 into 1 and cuts a save off
after 30 seconds. On one machine it also supervises by `mamba_trainer.restart`; in a pod the operator does.
"""

from .spec import LaunchSpec, Limits
from .supervise import run
from .termination import error_message, write_termination

__all__ = ["LaunchSpec", "Limits", "error_message", "run", "write_termination"]
