"""The manager with the real DeepSpeed engine on two ranks: exact resumes, damage found, errors shared."""

from __future__ import annotations

import errno
import os
import pickle
import random
import shutil
import signal
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from faults.engine_trials import peers_may_die
from faults.gang import Gang, Phase, Rank, has_ended
from faults.tiny_engine import Run
from mamba_trainer.checkpoint import fence, files, space
from mamba_trainer.checkpoint.layout import list_names
from mamba_trainer.checkpoint.manager import SaveFailed
from mamba_trainer.checkpoint.verify import verify
from mamba_trainer.contract import Fenced, NoValidCheckpoint, UserError
from ranks import run_ranks

RANKS = 2


def train_and_save(_rank: int, directory: Path, steps: int, settings: dict[str, Any]) -> tuple[str, list[float]]:
    """Saves after each step; the fingerprint at the last save, and the three losses that follow."""
    run = Run(directory, **settings)
    run.resume()
    for _ in range(steps):
        run.train(1)
        run.save()
    return run.digest(), run.train(3)


def resume(_rank: int, directory: Path, settings: dict[str, Any], requested: Any = "auto") -> SimpleNamespace:
    """What a resume gave on this rank, or its error: exceptions of other processes cannot be caught."""
    try:
        run = Run(directory, attempt=1, **settings)
        state = run.resume(requested)
    except (UserError, NoValidCheckpoint, Fenced) as error:
        return SimpleNamespace(error=type(error), message=str(error))
    digest = run.digest()
    return SimpleNamespace(
        error=None,
        state=state,
        digest=digest,
        losses=run.train(3) if state is None or not state.finished else [],
        messages=run.messages,
        quarantined=run.manager.quarantined,
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[str, list[float]]]]:
    """A ZeRO-2 run with checkpoints of steps 1, 2 and 3; never changed, only copied."""
    directory = tmp_path_factory.mktemp("trained")
    return directory, run_ranks(train_and_save, RANKS, directory, 3, {})


@pytest.fixture
def checkpoints(tmp_path: Path, trained: tuple[Path, Any]) -> Path:
    return shutil.copytree(trained[0], tmp_path / "checkpoints")


@pytest.mark.parametrize(
    ("stage", "dtype"),
    [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (0, "bf16"), (2, "bf16"), (3, "bf16")],
)
def test_a_resumed_run_goes_on_bit_for_bit_like_the_one_that_was_never_stopped(
    tmp_path: Path, stage: int, dtype: str
) -> None:
    settings = {"stage": stage, "dtype": dtype}
    before = run_ranks(train_and_save, RANKS, tmp_path, 2, settings)
    after = run_ranks(resume, RANKS, tmp_path, settings)
    assert [(rank.digest, rank.losses) for rank in after] == before
    state = after[0].state
    assert (state.step, state.client_state, state.finished) == (2, {"step": 2}, False)
    assert state.data_position == 2 * 2 * RANKS


def test_an_empty_directory_is_a_fresh_start(tmp_path: Path) -> None:
    assert [rank.state for rank in run_ranks(resume, RANKS, tmp_path, {})] == [None, None]


def bad_bit(folder: Path, shard: str) -> None:
    raw = bytearray((folder / shard).read_bytes())
    raw[len(raw) // 3] ^= 0x10
    (folder / shard).write_bytes(raw)


def optimizer_shard(rank: int) -> str:
    return f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "a flipped bit in the shard of rank 1": lambda folder: bad_bit(folder, optimizer_shard(1)),
    "a truncated shard": lambda folder: os.truncate(folder / optimizer_shard(0), 1000),
    "a missing shard": lambda folder: (folder / optimizer_shard(1)).unlink(),
    "a missing random state": lambda folder: (folder / "rng_rank_1.pt").unlink(),
    "zeros instead of model states": lambda folder: (folder / "mp_rank_00_model_states.pt").write_bytes(bytes(5000)),
    "a garbage manifest": lambda folder: (folder / "manifest.json").write_bytes(b"\x00\xff{"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_the_newest_good_checkpoint_is_used_and_the_bad_one_reported(checkpoints: Path, damage: Any) -> None:
    damage(checkpoints / "step_3")
    after = run_ranks(resume, RANKS, checkpoints, {})
    assert [rank.state.step for rank in after] == [2, 2]
    assert after[0].quarantined == 1
    assert "step_3 does not verify" in after[0].messages[0]
    assert list_names(checkpoints) == ["step_1", "step_2", "step_3.quarantine"]


@pytest.mark.parametrize("content", [b"", b"step_999", b"\xff\x00", None])
def test_what_latest_says_does_not_matter(checkpoints: Path, trained: Any, content: bytes | None) -> None:
    (checkpoints / "latest").unlink()
    if content is not None:
        (checkpoints / "latest").write_bytes(content)
    after = run_ranks(resume, RANKS, checkpoints, {})
    assert [(rank.digest, rank.losses) for rank in after] == trained[1]


def test_only_bad_checkpoints_are_an_error_at_every_further_start_too(checkpoints: Path) -> None:
    for step in (1, 2, 3):
        bad_bit(checkpoints / f"step_{step}", optimizer_shard(0))
    for _ in range(2):
        after = run_ranks(resume, RANKS, checkpoints, {})
        assert [rank.error for rank in after] == [NoValidCheckpoint] * RANKS
        assert "3 in quarantine" in after[0].message


class Payload:
    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self._marker,)


def test_a_pickle_that_does_not_match_its_hash_executes_nothing(checkpoints: Path, tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    raw = pickle.dumps(Payload(marker))
    for name in ("mp_rank_00_model_states.pt", optimizer_shard(1), "rng_rank_0.pt"):
        original = (checkpoints / "step_3" / name).read_bytes()
        (checkpoints / "step_3" / name).write_bytes(raw + bytes(max(0, len(original) - len(raw))))
    after = run_ranks(resume, RANKS, checkpoints, {})
    assert [rank.state.step for rank in after] == [2, 2]
    assert not marker.exists()


def test_a_shard_that_the_manifest_does_not_list_is_ignored(checkpoints: Path, tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    # DeepSpeed takes every file that matches mp_rank_*_model_states.pt for a part of the model.
    torch.save(Payload(marker), checkpoints / "step_3/mp_rank_01_model_states.pt")
    after = run_ranks(resume, RANKS, checkpoints, {})
    assert [rank.state.step for rank in after] == [3, 3]
    assert not marker.exists()


@pytest.mark.parametrize(
    ("ranks", "settings", "advice"),
    [
        (1, {}, "Start it with 2 ranks"),
        (2, {"stage": 1}, "Set parallelism.zero_stage to 2"),
        (2, {"config_hash": "another"}, "another configuration"),
        (2, {"shard_layout": {"sub_group_size": 7}}, "sub_group_size"),
        (2, {"expected_bytes": 10**18}, "free"),
    ],
)
def test_a_checkpoint_of_another_kind_of_run_is_refused_with_advice(
    checkpoints: Path, ranks: int, settings: dict[str, Any], advice: str
) -> None:
    after = run_ranks(resume, ranks, checkpoints, settings)
    assert [rank.error for rank in after] == [UserError] * ranks
    assert advice in after[0].message
    assert list_names(checkpoints) == ["step_1", "step_2", "step_3"]


def test_an_explicit_checkpoint_is_loaded_and_newer_ones_cannot_come_back(checkpoints: Path) -> None:
    after = run_ranks(resume, RANKS, checkpoints, {}, checkpoints / "step_1")
    assert [rank.state.step for rank in after] == [1, 1]
    assert list_names(checkpoints) == ["step_1", "step_2.quarantine", "step_3.quarantine"]


def test_a_run_started_from_a_checkpoint_goes_on_from_its_own_when_started_the_same_way_again(
    checkpoints: Path, tmp_path: Path
) -> None:
    for expected in (3, 4):
        after = run_ranks(resume_and_save, RANKS, tmp_path / "new", checkpoints / "step_3", 1)
        assert after == [expected, expected]
    assert list_names(tmp_path / "new") == ["step_4", "step_5"]


def test_a_third_configuration_starts_from_what_is_asked_for_again_not_from_the_second_ones_work(
    checkpoints: Path,
) -> None:
    """As when a run is extended twice from the same checkpoint, by other and other numbers of steps."""
    for configuration in ("longer", "longer still"):
        after = run_ranks(resume_and_save, RANKS, checkpoints, checkpoints / "step_3", 1, configuration)
        assert after == [3, 3]


def resume_and_save(_rank: int, directory: Path, requested: Path, steps: int, config_hash: str = "another") -> int:
    run = Run(directory, config_hash=config_hash)
    state = run.resume(requested)
    run.train(steps)
    run.save()
    return state.step


def test_a_bad_explicit_checkpoint_is_an_error_and_stays_where_it_is(checkpoints: Path) -> None:
    bad_bit(checkpoints / "step_2", optimizer_shard(1))
    after = run_ranks(resume, RANKS, checkpoints, {}, checkpoints / "step_2")
    assert [rank.error for rank in after] == [NoValidCheckpoint] * RANKS
    assert list_names(checkpoints) == ["step_1", "step_2", "step_3"]


def test_an_explicit_checkpoint_that_is_not_there_is_a_user_error(checkpoints: Path) -> None:
    after = run_ranks(resume, RANKS, checkpoints, {}, checkpoints / "step_10000")
    assert [rank.error for rank in after] == [UserError] * RANKS


def finish(_rank: int, directory: Path) -> None:
    run = Run(directory, keep=1)
    for _ in range(3):
        run.train(1)
        run.save()
    run.save(final=True)


def test_a_finished_run_is_reported_and_its_checkpoint_outlives_retention(tmp_path: Path) -> None:
    run_ranks(finish, RANKS, tmp_path)
    assert list_names(tmp_path) == ["final", "step_3"]
    after = run_ranks(resume, RANKS, tmp_path, {})
    assert [(rank.state.step, rank.state.finished) for rank in after] == [(3, True)] * RANKS


def save_with_full_disk(rank: int, directory: Path, failing_rank: int, what: str) -> tuple[str, list[str], int]:
    """One good save, one during which the disk of one rank is full, and one more good save."""
    run = Run(directory)
    run.train(1)
    run.save()
    run.train(1)
    good_fsync = os.fsync

    def full(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode) == (what == "files"):
            return
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if rank == failing_rank:
        files.os.fsync = full
    try:
        run.save()
        message = ""
    except SaveFailed as error:
        message = str(error)
    finally:
        files.os.fsync = good_fsync
    between = list_names(directory)
    run.train(1)
    return message, between, run.save().step


@pytest.mark.parametrize(("failing_rank", "what"), [(0, "files"), (1, "files"), (0, "directories"), (1, "directories")])
def test_a_full_disk_aborts_the_save_on_all_ranks_and_training_can_go_on(
    tmp_path: Path, failing_rank: int, what: str
) -> None:
    for message, between, last in run_ranks(save_with_full_disk, RANKS, tmp_path, failing_rank, what):
        assert "No space left on device" in message
        assert between == ["step_1"]
        assert last == 3
    verify(tmp_path / "step_3")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system with room for a few checkpoints of the tiny model."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs the right to mount a file system")
    yield disk
    subprocess.run(["umount", disk], check=True)


def save_until_full(_rank: int, directory: Path) -> tuple[int, str]:
    space._SLACK_BYTES = -(10**9)  # as if somebody else took the space between check and write
    run = Run(directory, keep=100)
    while True:
        run.train(1)
        try:
            run.save()
        except SaveFailed as error:
            return run.step, str(error)


def test_a_disk_that_really_fills_up_leaves_all_older_checkpoints_good(small_disk: Path) -> None:
    (failed, message), _ = run_ranks(save_until_full, RANKS, small_disk)
    assert "No space left on device" in message
    assert failed > 2
    assert set(list_names(small_disk)) == {f"step_{step}" for step in range(1, failed)}
    for name in list_names(small_disk):
        verify(small_disk / name)


def save_beyond_free_space(_rank: int, directory: Path) -> str:
    run = Run(directory)
    run.train(1)
    run.manager._expected_bytes = 10**18
    with pytest.raises(SaveFailed) as failed:
        run.save()
    return str(failed.value)


def test_a_checkpoint_that_cannot_fit_is_not_begun(tmp_path: Path) -> None:
    messages = run_ranks(save_beyond_free_space, RANKS, tmp_path)
    assert all("1000000000.0 GB" in message for message in messages)
    assert list_names(tmp_path) == []


def save_after_being_fenced(rank: int, directory: Path) -> str:
    run = Run(directory)
    run.train(1)
    run.save()
    if rank == 0:
        fence.take(directory, fence.new_owner(1))
    run.train(1)
    with pytest.raises(Fenced) as fenced:
        run.save()
    return str(fenced.value)


def test_all_ranks_of_an_old_attempt_learn_that_they_are_fenced(tmp_path: Path) -> None:
    assert all("attempt 1" in message for message in run_ranks(save_after_being_fenced, RANKS, tmp_path))
    assert list_names(tmp_path) == ["step_1"]


def train_apart(rank: int, directory: Path) -> type:
    try:
        Run(directory / str(rank))
    except UserError as error:
        return type(error)
    return type(None)


def test_ranks_that_do_not_share_the_directory_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mamba_trainer.checkpoint.manager._VISIBLE_SECONDS", 0.5)
    assert run_ranks(train_apart, RANKS, tmp_path) == [UserError, UserError]


def test_when_a_rank_dies_in_the_middle_of_a_save_the_others_do_not_hang(tmp_path: Path) -> None:
    gang = Gang.start(save_until_killed, RANKS, tmp_path, attempt=0)
    gang.wait_for(lambda events: any(event.phase == Phase.SHARDS and event.rank == 1 for event in events))
    os.kill(gang.pids[1], signal.SIGKILL)
    deadline = time.monotonic() + 30
    while not has_ended(gang.pids[0]):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    gang.kill(random.Random(0))


def save_until_killed(rank: Rank) -> None:
    rank.join()
    rank.announce_writes()
    run = Run(rank.directory)
    while True:
        with peers_may_die():
            run.train(1)
            run.save()
