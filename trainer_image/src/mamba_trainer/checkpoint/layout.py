"""Names inside a checkpoint directory. Pure: nothing here touches the disk but `list_names`.

step_120/                 a checkpoint (it holds a manifest)
final/                    the checkpoint of a finished run
step_130.tmp-3/           being written by attempt 3
step_100.deleted-3/       being deleted by attempt 3
step_110.replaced-3/      superseded by attempt 3, until its successor has the name
step_110.quarantine-1/    did not verify, or was abandoned; a file in it says why
fence, latest             the owning attempt; a hint for people
"""

from __future__ import annotations

import re
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

FINAL = "final"
FENCE = "fence"
LATEST = "latest"

_CHECKPOINT = re.compile(r"step_(0|[1-9][0-9]{0,17})|final")
_TRANSIENT = re.compile(r"(step_[0-9]+|final)\.(tmp|deleted|replaced)-([0-9]{1,18})")
_QUARANTINED = re.compile(r"(step_[0-9]+|final)\.quarantine(-[0-9]+)?")


class Transience(StrEnum):
    """Why a folder has a name that no resume looks at."""

    TMP = "tmp"
    DELETED = "deleted"
    REPLACED = "replaced"


class Transient(NamedTuple):
    checkpoint: str
    why: Transience
    attempt: int


def checkpoint_name(step: int, final: bool) -> str:
    return FINAL if final else f"step_{step}"


def transient_name(checkpoint: str, why: Transience, attempt: int) -> str:
    return f"{checkpoint}.{why}-{attempt}"


def is_checkpoint(name: str) -> bool:
    return _CHECKPOINT.fullmatch(name) is not None


def is_quarantined(name: str) -> bool:
    return _QUARANTINED.fullmatch(name) is not None


def step_of(name: str) -> int | None:
    """The step that a name states; None for `final`, whose manifest states it."""
    return None if name == FINAL else int(name.removeprefix("step_"))


def parse_transient(name: str) -> Transient | None:
    match = _TRANSIENT.fullmatch(name)
    return Transient(match[1], Transience(match[2]), int(match[3])) if match else None


def list_names(directory: Path) -> list[str]:
    """Names of the folders in `directory`; none if it does not exist."""
    if not directory.is_dir():
        return []
    return sorted(entry.name for entry in directory.iterdir() if entry.is_dir() and not entry.is_symlink())


def rng_file_name(rank: int) -> str:
    return f"rng_rank_{rank}.pt"
