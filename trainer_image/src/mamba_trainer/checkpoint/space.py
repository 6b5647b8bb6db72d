"""Whether a checkpoint fits, asked before its first byte is written."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from mamba_trainer.contract import UserError

#: Manifest, `latest` and rounding of the file system.
_SLACK_BYTES = 2**20


def check_directory(directory: Path, needed_bytes: int) -> None:
    """Refuses a directory that cannot be used, before anything is computed for it.

    Raises:
        UserError: it cannot be created or written, or has no room for one checkpoint.
    """
    if any(character in str(directory.absolute()) for character in "*?["):
        raise UserError(f"DeepSpeed cannot load from a path with one of the characters * ? [ in it: {directory}")
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"Cannot create the checkpoint directory {directory}: {error.strerror}.") from None
    if not os.access(directory, os.W_OK | os.X_OK):
        raise UserError(f"No right to write to the checkpoint directory {directory}.")
    if problem := shortage(directory, needed_bytes):
        raise UserError(problem)


def shortage(directory: Path, needed_bytes: int) -> str | None:
    """What to tell a person when `needed_bytes` do not fit, else None."""
    free = shutil.disk_usage(directory).free
    needed_bytes += _SLACK_BYTES
    if needed_bytes <= free:
        return None
    return (
        f"A checkpoint needs {size_text(needed_bytes)}, and {directory} has {size_text(free)} free. "
        "Free some space, lower checkpoint.keep, or choose another checkpoint.directory."
    )


def size_text(size: int) -> str:
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size} bytes"
