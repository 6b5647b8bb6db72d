"""What an attempt leaves behind: the termination message for the operator, one line for the person."""

from __future__ import annotations

from pathlib import Path

from ..contract import TerminationMessage, TrainerError
from .output import say
from .verdict import GOOD, name_of


def write_termination(path: Path | None, message: TerminationMessage) -> None:
    """Written in place: in a pod the file is a mount of its own and cannot be replaced."""
    if path is None:
        return
    try:
        path.write_bytes(message.encode())
    except OSError as error:
        say(f"cannot write the termination message to {path}: {error.strerror}")


def error_message(error: TrainerError) -> TerminationMessage:
    """For an end before any rank ran."""
    return TerminationMessage(reason=error.reason, exit_code=error.exit_code, message=str(error))


def summary(message: TerminationMessage) -> str | None:
    """One line on a failed attempt. The message's last line is where an error stands."""
    if message.exit_code in GOOD:
        return None
    who = "this node" if message.rank is None else f"rank {message.rank}"
    last = message.message.rstrip().rpartition("\n")[2].strip()
    return f"{who} ended with {name_of(message.exit_code)} at step {message.step}: {last or message.reason}"
