"""Ranks that train a hash chain: with the trainer's commit code, and as a writer without a manifest would.

The state of a step is known in advance, so a resume is right or wrong without doubt. Most of their time
goes into saving.
"""

from __future__ import annotations

import functools
import hashlib
import os
import time
from pathlib import Path

from faults.gang import Phase, Rank
from mamba_trainer.checkpoint import files
from mamba_trainer.checkpoint.commit import CheckpointDirectory, candidates
from mamba_trainer.checkpoint.manifest import FileEntry, Manifest
from mamba_trainer.checkpoint.verify import BadCheckpoint, verify

SHARD_BYTES = 96 * 1024
SHARDS_PER_RANK = 2
STEPS_PER_SAVE = 2
KEEP = 2


class WrongState(Exception):
    """What was resumed is not the state of the step it claims to be."""


@functools.cache
def seed_of(step: int, rank: int) -> bytes:
    return hashlib.sha256(seed_of(step - 1, rank) if step else rank.to_bytes(8, "little")).digest()


def shard(seed: bytes, number: int) -> bytes:
    return seed + hashlib.shake_128(seed + bytes([number])).digest(SHARD_BYTES)


def name(rank: int, number: int) -> str:
    return f"rank_{rank}_{number}.bin"


def load(folder: Path, step: int, rank: int) -> bytes:
    """The state of `rank` in `folder`, which must be that of `step`."""
    shards = [(folder / name(rank, number)).read_bytes() for number in range(SHARDS_PER_RANK)]
    seed = shards[0][:32]
    if seed != seed_of(step, rank) or shards != [shard(seed, n) for n in range(SHARDS_PER_RANK)]:
        raise WrongState(folder)
    return seed


def train(rank: Rank, seed: bytes) -> bytes:
    for _ in range(STEPS_PER_SAVE):
        seed = hashlib.sha256(seed).digest()
        rank.step += 1
        rank.announce(Phase.TRAINING)
        time.sleep(0.001)
        rank.gather()
    return seed


def careful(rank: Rank) -> None:
    """The trainer's own protocol."""
    rank.announce_writes()
    directory = CheckpointDirectory(rank.directory, rank.attempt)
    step = -1
    if rank.rank == 0:
        directory.open()
        step = newest(directory)
    rank.step = int(rank.gather(b"%d" % step)[0])
    if rank.step < 0:
        rank.step, seed = 0, seed_of(0, rank.rank)
    else:
        seed = load(rank.directory / f"step_{rank.step}", rank.step, rank.rank)
    rank.announce(Phase.RESUMED)
    while True:
        seed = train(rank, seed)
        careful_save(rank, directory, seed)


def newest(directory: CheckpointDirectory) -> int:
    for folder in candidates(directory.path):
        try:
            return verify(folder).step
        except BadCheckpoint as error:
            directory.quarantine(folder, str(error))
            raise  # after a kill alone there must be no bad one
    return -1


def careful_save(rank: Rank, directory: CheckpointDirectory, seed: bytes) -> None:
    folder = Path(os.fsdecode(rank.gather(os.fsencode(directory.begin(rank.step)) if rank.rank == 0 else b"-")[0]))
    entries = []
    for number in range(SHARDS_PER_RANK):
        path = folder / name(rank.rank, number)
        written = files.write_file(path, lambda sink, number=number: sink.write(shard(seed, number)))
        entries.append(FileEntry(path=path.name, size=written.size, sha256=written.sha256, rank=rank.rank))
    files.sync_directory(folder)
    reports = rank.gather(b"\t".join(entry.model_dump_json().encode() for entry in entries))
    if rank.rank == 0:
        listed = [FileEntry.model_validate_json(raw) for report in reports for raw in report.split(b"\t")]
        content = Manifest(
            step=rank.step, attempt=rank.attempt, world_size=rank.world_size, zero_stage=1,
            data_position=rank.step, config_hash="", files=tuple(listed),
        )  # fmt: skip
        committed = directory.commit(folder, content)
        rank.announce(Phase.ACKNOWLEDGED)
        directory.retain(KEEP, committed)
    rank.gather()


def naive(rank: Rank) -> None:
    """Final names, no manifest, and `latest` written by rank 0 when its own shards are written."""
    step = int((rank.directory / "latest").read_text()) if (rank.directory / "latest").exists() else -1
    rank.step = max(step, 0)
    seed = load(rank.directory / f"step_{step}", step, rank.rank) if step >= 0 else seed_of(0, rank.rank)
    rank.announce(Phase.RESUMED)
    while True:
        seed = train(rank, seed)
        folder = rank.directory / f"step_{rank.step}"
        folder.mkdir(exist_ok=True)
        rank.announce(Phase.SHARDS)
        for number in range(SHARDS_PER_RANK):
            with (folder / name(rank.rank, number)).open("wb") as file:
                content = shard(seed, number)
                for start in range(0, len(content), 4096):
                    file.write(content[start : start + 4096])
        if rank.rank == 0:
            (rank.directory / "latest").write_text(str(rank.step))
            rank.announce(Phase.COMMITTED)
            rank.announce(Phase.ACKNOWLEDGED)
        rank.gather()
