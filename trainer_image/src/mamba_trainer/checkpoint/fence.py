"""Which run owns a checkpoint directory.

A pod on a cut-off node may live on after its successor has started, and on one machine a second run may be
started into the same directory. The later start wins: it writes itself into `<dir>/fence`, and the earlier
one finds that out before it commits, deletes or renames anything.
"""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import NamedTuple

from mamba_trainer.checkpoint import layout
from mamba_trainer.checkpoint.files import write_bytes
from mamba_trainer.contract import Fenced


class Owner(NamedTuple):
    """First and second line of the file. The token tells apart two runs that have the same attempt."""

    attempt: int
    token: str


def new_owner(attempt: int) -> Owner:
    return Owner(attempt, secrets.token_hex(8))


def read(directory: Path) -> Owner | None:
    """The owner written in `directory`; None where there is none, or no run wrote what is there."""
    try:
        attempt, token, *_ = (directory / layout.FENCE).read_text(encoding="ascii").split()
        return Owner(int(attempt), token)
    except (FileNotFoundError, ValueError):
        return None


def take(directory: Path, owner: Owner) -> None:
    """Makes `owner` the owner.

    Raises:
        Fenced: a newer attempt is it already.
    """
    current = read(directory)
    if current is not None and current.attempt > owner.attempt:
        raise _fenced(directory, owner, current)
    write_bytes(directory / layout.FENCE, f"{owner.attempt}\n{owner.token}\n".encode())


def check(directory: Path, owner: Owner) -> None:
    """To be called right before each step that others could see.

    Raises:
        Fenced: another run has taken the directory since.
    """
    current = read(directory)
    if current is not None and current != owner and current.attempt >= owner.attempt:
        raise _fenced(directory, owner, current)


def _fenced(directory: Path, owner: Owner, current: Owner) -> Fenced:
    which = f"attempt {current.attempt}" if current.attempt > owner.attempt else "a run that was started later"
    return Fenced(
        f"{directory} now belongs to {which}; this run (attempt {owner.attempt}) stops without writing "
        "to it. Give each run a checkpoint directory of its own."
    )
