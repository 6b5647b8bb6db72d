"""The commit protocol without ranks: what is on disk after each act, and who may act."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mamba_trainer.checkpoint import fence
from mamba_trainer.checkpoint.commit import REASON_FILE, CheckpointDirectory, candidates, expired
from mamba_trainer.checkpoint.files import write_bytes
from mamba_trainer.checkpoint.layout import list_names
from mamba_trainer.checkpoint.manifest import FileEntry, Manifest
from mamba_trainer.checkpoint.space import check_directory, shortage
from mamba_trainer.checkpoint.verify import BadCheckpoint, verify
from mamba_trainer.contract import Fenced, UserError


def opened(path: Path, attempt: int = 1) -> CheckpointDirectory:
    directory = CheckpointDirectory(path, attempt)
    directory.open()
    return directory


def fill(folder: Path, step: int, content: bytes = b"weights") -> Manifest:
    written = write_bytes(folder / "a.pt", content)
    entry = FileEntry(path="a.pt", size=written.size, sha256=written.sha256, rank=0)
    return Manifest(step=step, attempt=1, world_size=1, zero_stage=1, data_position=0, config_hash="", files=(entry,))


def save(directory: CheckpointDirectory, step: int, final: bool = False, content: bytes = b"weights") -> Path:
    folder = directory.begin(step, final)
    return directory.commit(folder, fill(folder, step, content), final)


def names(directory: CheckpointDirectory) -> list[str]:
    return [folder.name for folder in candidates(directory.path)]


def test_a_checkpoint_exists_from_its_commit_on_and_not_before(tmp_path: Path) -> None:
    directory = opened(tmp_path)
    folder = directory.begin(5)
    manifest = fill(folder, 5)
    assert names(directory) == []
    assert directory.commit(folder, manifest) == tmp_path / "step_5"
    assert verify(tmp_path / "step_5") == manifest
    assert list_names(tmp_path) == ["step_5"]
    assert (tmp_path / "latest").read_text() == "step_5"


def test_a_checkpoint_is_not_committed_while_a_file_is_missing_or_short(tmp_path: Path) -> None:
    directory = opened(tmp_path)
    for damage in (Path.unlink, lambda path: os.truncate(path, 1)):
        folder = directory.begin(5)
        manifest = fill(folder, 5)
        damage(folder / "a.pt")
        with pytest.raises(OSError, match=r"a\.pt"):
            directory.commit(folder, manifest)
        assert names(directory) == []


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    directory = opened(tmp_path)
    save(directory, 5, content=b"old")
    save(directory, 5, content=b"new")
    assert list_names(tmp_path) == ["step_5"]
    assert (tmp_path / "step_5/a.pt").read_bytes() == b"new"


def test_a_kill_between_the_two_renames_of_a_replacement_loses_nothing(tmp_path: Path) -> None:
    save(opened(tmp_path), 5)
    (tmp_path / "step_5").rename(tmp_path / "step_5.replaced-1")
    (tmp_path / "step_5.tmp-1").mkdir()
    opened(tmp_path, attempt=2)
    assert list_names(tmp_path) == ["step_5"]
    verify(tmp_path / "step_5")


def test_leftovers_of_older_attempts_are_cleared_and_those_of_newer_ones_are_not(tmp_path: Path) -> None:
    for name in ("step_7.tmp-1", "step_6.deleted-2", "final.tmp-2", "step_8.tmp-3", "notes"):
        (tmp_path / name).mkdir()
    opened(tmp_path, attempt=2)
    assert list_names(tmp_path) == ["notes", "step_8.tmp-3"]


def test_candidates_are_ordered_by_step_as_a_number_and_final_stands_at_its_own(tmp_path: Path) -> None:
    directory = opened(tmp_path)
    for step in (9, 100, 20):
        save(directory, step)
    save(directory, 20, final=True)
    (tmp_path / "step_300").write_text("a file is no checkpoint")
    (tmp_path / "step_0100").mkdir()
    assert names(directory) == ["step_100", "final", "step_20", "step_9"]
    (tmp_path / "final/manifest.json").write_text("garbage")
    assert names(directory)[0] == "final"


def test_an_older_attempt_can_change_nothing_once_a_newer_one_has_started(tmp_path: Path) -> None:
    old = opened(tmp_path, attempt=1)
    for step in (1, 2, 3):
        save(old, step)
    folder = old.begin(4)
    manifest = fill(folder, 4)
    new = opened(tmp_path, attempt=2)
    for act in (
        lambda: old.begin(4),
        lambda: old.quarantine(tmp_path / "step_1", "x"),
        lambda: old.retain(1, tmp_path / "step_3"),
        old.open,
    ):
        with pytest.raises(Fenced, match="attempt 2"):
            act()
    with pytest.raises((Fenced, OSError)):
        old.commit(folder, manifest)  # the newer attempt has removed its folder
    assert list_names(tmp_path) == ["step_1", "step_2", "step_3"]
    assert save(new, 4).name == "step_4"


def test_an_older_attempt_does_not_commit_what_it_had_ready(tmp_path: Path) -> None:
    old = opened(tmp_path, attempt=1)
    folder = old.begin(4)
    manifest = fill(folder, 4)
    fence.take(tmp_path, fence.new_owner(2))
    with pytest.raises(Fenced):
        old.commit(folder, manifest)
    assert names(old) == []


def test_of_two_runs_with_the_same_attempt_the_later_one_owns_the_directory(tmp_path: Path) -> None:
    first = opened(tmp_path)
    second = opened(tmp_path)
    with pytest.raises(Fenced, match="started later"):
        first.begin(1)
    save(second, 1)


@pytest.mark.parametrize("garbage", [b"", b"\xff\xfe", b"x y", b"1"])
def test_a_fence_that_nobody_could_have_written_stops_nobody(tmp_path: Path, garbage: bytes) -> None:
    directory = opened(tmp_path)
    (tmp_path / "fence").write_bytes(garbage)
    save(directory, 1)


def test_quarantine_keeps_the_data_says_why_and_finds_a_free_name(tmp_path: Path) -> None:
    directory = opened(tmp_path)
    for expected in ("step_5.quarantine", "step_5.quarantine-1", "step_5.quarantine-2"):
        assert directory.quarantine(save(directory, 5), "bit rot").name == expected
    assert names(directory) == []
    assert (tmp_path / "step_5.quarantine-2/a.pt").exists()
    assert (tmp_path / "step_5.quarantine-2" / REASON_FILE).read_text() == "bit rot\n"


@pytest.mark.parametrize(
    ("newest_first", "keep", "committed", "deleted"),
    [
        (["step_3", "step_2", "step_1"], 3, "step_3", []),
        (["step_3", "step_2", "step_1"], 1, "step_3", ["step_2", "step_1"]),
        (["final", "step_3", "step_2"], 1, "final", ["step_2"]),
        (["step_9", "step_3", "step_2"], 1, "step_3", ["step_2"]),
        (["step_9", "final", "step_2"], 1, "final", ["step_2"]),
    ],
)
def test_retention_keeps_the_newest_and_always_the_one_just_committed(
    newest_first: list[str], keep: int, committed: str, deleted: list[str]
) -> None:
    assert expired(newest_first, keep, committed) == deleted


def test_retention_removes_folders_from_disk(tmp_path: Path) -> None:
    directory = opened(tmp_path)
    committed = [save(directory, step) for step in (1, 2, 3)][-1]
    assert directory.retain(2, committed) == ["step_1"]
    assert list_names(tmp_path) == ["step_2", "step_3"]


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


DAMAGES = {
    "a flipped bit": lambda folder: flip(folder / "a.pt"),
    "a truncated file": lambda folder: os.truncate(folder / "a.pt", 3),
    "an empty file": lambda folder: os.truncate(folder / "a.pt", 0),
    "a file that grew": lambda folder: os.truncate(folder / "a.pt", 9),
    "zeros of the same size": lambda folder: (folder / "a.pt").write_bytes(bytes(7)),
    "a missing file": lambda folder: (folder / "a.pt").unlink(),
    "a pipe in place of a file": lambda folder: ((folder / "a.pt").unlink(), os.mkfifo(folder / "a.pt")),
    "a link out of the folder": lambda folder: (
        (folder / "a.pt").rename(folder.parent / "b"),
        (folder / "a.pt").symlink_to("../b"),
    ),
    "a folder in place of a file": lambda folder: ((folder / "a.pt").unlink(), (folder / "a.pt").mkdir()),
    "no manifest": lambda folder: (folder / "manifest.json").unlink(),
    "an empty manifest": lambda folder: os.truncate(folder / "manifest.json", 0),
    "a truncated manifest": lambda folder: os.truncate(folder / "manifest.json", 50),
    "a huge manifest": lambda folder: os.truncate(folder / "manifest.json", 2**30),
    "a manifest that is a folder": lambda folder: (
        (folder / "manifest.json").unlink(),
        (folder / "manifest.json").mkdir(),
    ),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_damage_is_found_and_described_in_one_line(tmp_path: Path, damage: object) -> None:
    folder = save(opened(tmp_path), 5)
    verify(folder)
    damage(folder)
    with pytest.raises(BadCheckpoint) as found:
        verify(folder)
    assert "\n" not in str(found.value)


def test_a_folder_renamed_to_another_step_does_not_verify(tmp_path: Path) -> None:
    with pytest.raises(BadCheckpoint, match="step 5"):
        verify(save(opened(tmp_path), 5).rename(tmp_path / "step_50"))


def test_files_that_the_manifest_does_not_list_do_not_matter(tmp_path: Path) -> None:
    folder = save(opened(tmp_path), 5)
    (folder / "notes.txt").write_text("mine")
    verify(folder)


def test_lack_of_space_is_told_with_both_numbers(tmp_path: Path) -> None:
    assert shortage(tmp_path, 0) is None
    problem = shortage(tmp_path, 10**18)
    assert problem is not None and "1000000000.0 GB" in problem and str(tmp_path) in problem


def test_a_directory_that_cannot_be_used_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path, needed in (
        (tmp_path / "file", 0),
        (tmp_path / "file/x", 0),
        (tmp_path / "a[1]", 0),
        (tmp_path, 10**18),
    ):
        with pytest.raises(UserError):
            check_directory(path, needed)
    check_directory(tmp_path / "new/folder", 1000)
