"""Guards of the directory that `prepare` writes to: whose files lie there, who writes now, is there space."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from mamba_trainer.contract import UserError
from mamba_trainer.data.tokenfile import DATA_FILES, Meta, Parameters, read_meta

#: Held for the time of a preparation and left behind: it marks files of an interrupted one as ours.
LOCK_FILE = ".prepare.lock"

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def prepared_before(directory: Path, wanted: Parameters) -> Meta | None:
    """The dataset that `directory` holds already, if it is the one that is wanted."""
    meta = read_meta(directory)
    if meta is None:
        return None
    if difference := meta.parameters.difference(wanted):
        raise UserError(
            f"{directory} holds a dataset prepared in another way:\n  "
            + "\n  ".join(difference)
            + f"\nName another directory, or remove that one first: rm -r {directory}"
        )
    return meta


def refuse_foreign_files(directory: Path) -> None:
    if (directory / LOCK_FILE).exists():
        return
    if foreign := [name for name in DATA_FILES if (directory / name).exists()]:
        raise UserError(
            f"{directory} holds {', '.join(foreign)}, which `mamba-train prepare` did not make and would "
            "overwrite: name another directory"
        )


@contextlib.contextmanager
def locked(directory: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """One preparation a directory at a time. The lock ends with its process, however that ends."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = (directory / LOCK_FILE).open("wb")
    except OSError as error:
        raise UserError(f"cannot write to {directory}: {error.strerror}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def require_space(directory: Path, needed: int) -> None:
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise UserError(
            f"the tokens need about {needed / 1e9:.1f} GB, but {directory} has {free / 1e9:.1f} GB free: "
            "free some space, or name a directory on another disk"
        )


@contextlib.contextmanager
def full_disk_explained(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_FULL:
            raise
        raise UserError(
            f"no space left while writing to {directory} ({error.strerror}): what was written has been "
            "removed. Free some space, or name a directory on another disk."
        ) from error
