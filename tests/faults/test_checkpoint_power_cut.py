"""Power fails before each system call of one save: whatever the disk kept, the resume is right."""

from __future__ import annotations

import os
import stat
from collections import Counter
from pathlib import Path

import pytest

from faults.commit_trials import load, name, newest, seed_of, shard
from faults.power_cut import Disk, Model
from mamba_trainer.checkpoint import files
from mamba_trainer.checkpoint.commit import CheckpointDirectory
from mamba_trainer.checkpoint.manifest import FileEntry, Manifest
from mamba_trainer.checkpoint.verify import BadCheckpoint

SHARDS = 2


def save(directory: CheckpointDirectory, step: int) -> Path:
    folder = directory.begin(step)
    entries = []
    for number in range(SHARDS):
        path = folder / name(0, number)
        content = shard(seed_of(step, 0), number)
        written = files.write_file(path, lambda sink, content=content: sink.write(content))
        entries.append(FileEntry(path=path.name, size=written.size, sha256=written.sha256, rank=0))
    files.sync_directory(folder)
    content = Manifest(
        step=step,
        attempt=1,
        world_size=1,
        zero_stage=1,
        data_position=0,
        config_hash="",
        files=tuple(entries),
    )
    return directory.commit(folder, content)


def power_cuts(base: Path) -> Disk:
    """Step 1 is committed for good; then every instant of saving step 2 and deleting step 1 is tried."""
    directory = CheckpointDirectory(base / "disk", attempt=1)
    directory.open()
    save(directory, 1)
    disk = Disk(base / "disk", base / "copies")
    with disk.watching():
        committed = save(directory, 2)
        disk.acknowledged = True
        directory.retain(1, committed)
    return disk


def judge(disk: Disk) -> Counter[tuple[Model, str]]:
    verdicts: Counter[tuple[Model, str]] = Counter()
    for model, copy, acknowledged in disk.snapshots:
        directory = CheckpointDirectory(copy, attempt=2)
        try:
            directory.open()
            step = newest(directory)
            load(copy / f"step_{step}", step, rank=0)
            verdict = "good" if step >= (2 if acknowledged else 1) else "lost"
        except BadCheckpoint:
            verdict = "bad"
        verdicts[model, verdict] += 1
    return verdicts


def test_no_instant_of_a_save_is_a_bad_one_for_a_power_cut(tmp_path: Path) -> None:
    verdicts = judge(power_cuts(tmp_path))
    print(verdicts)
    assert set(verdicts) == {(model, "good") for model in Model}
    assert min(verdicts.values()) >= 25


@pytest.mark.parametrize(
    ("is_forgotten", "harm"),
    [(stat.S_ISREG, (Model.DATA_LOST, "bad")), (stat.S_ISDIR, (Model.ALL_LOST, "lost"))],
    ids=["files", "directories"],
)
def test_the_simulation_finds_a_writer_that_forgets_to_sync(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_forgotten: object, harm: tuple[Model, str]
) -> None:
    class Forgetful:
        def __getattr__(self, name: str) -> object:
            return getattr(os, name)

        def fsync(self, descriptor: int) -> None:
            if not is_forgotten(os.fstat(descriptor).st_mode):
                os.fsync(descriptor)

    monkeypatch.setattr(files, "os", Forgetful())
    assert judge(power_cuts(tmp_path))[harm] > 0
