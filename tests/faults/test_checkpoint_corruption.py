"""Random damage to committed checkpoints: every one is detected and the newest undamaged one is found."""

from __future__ import annotations

import os
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest

from faults.test_checkpoint_power_cut import save
from mamba_trainer.checkpoint.commit import CheckpointDirectory, candidates
from mamba_trainer.checkpoint.verify import BadCheckpoint, verify

KINDS = ("truncation", "zeros", "bit flip", "missing", "swapped", "random bytes")


def damage(folder: Path, kind: str, rng: random.Random) -> None:
    """Damages one file of `folder` so that its content certainly changes."""
    path = rng.choice(sorted(folder.iterdir()))
    raw = bytearray(path.read_bytes())
    at = rng.randrange(len(raw))
    if kind == "truncation":
        os.truncate(path, at)
    elif kind == "zeros":
        raw[at : at + 512] = bytes(len(raw[at : at + 512])) if any(raw[at : at + 512]) else b"\x01"
        path.write_bytes(raw)
    elif kind == "bit flip":
        if path.name == "manifest.json":  # where many a bit stands for something that no resume depends on
            at = raw.index(b'"sha256"') + rng.randrange(12, 70)
            raw[at] ^= 1 << rng.randrange(4)
        else:
            raw[at] ^= 1 << rng.randrange(8)
        path.write_bytes(raw)
    elif kind == "missing":
        path.unlink()
    elif kind == "swapped":
        other = rng.choice([other for other in folder.iterdir() if other != path])
        path.write_bytes(other.read_bytes())
    else:
        raw[at : at + 64] = bytes(byte ^ 0xFF for byte in raw[at : at + 64])
        path.write_bytes(raw)


def detect(base: Path, count: int, seed: int) -> Counter[str]:
    """Damages the newest checkpoints of a directory; how many of each kind were found out."""
    rng = random.Random(seed)
    directory = CheckpointDirectory(base / "original", attempt=1)
    directory.open()
    for step in (1, 2, 3):
        save(directory, step)
    detected: Counter[str] = Counter()
    for number in range(count):
        copy = shutil.copytree(base / "original", base / "copy")
        kind = KINDS[number % len(KINDS)]
        bad = rng.choice([(3,), (3, 2)])
        for step in bad:
            damage(copy / f"step_{step}", kind, rng)
        found = next(folder for folder in candidates(copy) if is_good(folder))
        detected[kind] += found.name == f"step_{3 - len(bad)}"
        shutil.rmtree(copy)
    return detected


def is_good(folder: Path) -> bool:
    try:
        verify(folder)
    except BadCheckpoint:
        return False
    return True


def test_random_damage_is_always_detected(tmp_path: Path) -> None:
    assert detect(tmp_path, 300, seed=1) == dict.fromkeys(KINDS, 50)


@pytest.mark.many
def test_much_random_damage_is_always_detected(tmp_path: Path) -> None:
    detected = detect(tmp_path, 3000, seed=2)
    print(detected)
    assert detected == dict.fromkeys(KINDS, 500)
