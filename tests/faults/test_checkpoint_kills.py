"""kill -9 at any instant: no bad resume, no lost commit; and a writer without a manifest is found out."""

from __future__ import annotations

from pathlib import Path

import pytest

from faults.kill_harness import kill_commit_code, kill_engine, main


def test_no_kill_of_the_commit_code_costs_or_corrupts_a_checkpoint(tmp_path: Path) -> None:
    tally = kill_commit_code(100, tmp_path / "run", seed=1)
    print(f"\n{tally}")
    assert (tally.kills, tally.bad, tally.lost) == (100, 0, 0)
    assert tally.inside >= 40
    assert tally.resumes >= 60


def test_no_kill_of_training_under_deepspeed_costs_or_corrupts_a_checkpoint(tmp_path: Path) -> None:
    tally = kill_engine(6, tmp_path, seed=1)
    print(f"\n{tally}")
    assert (tally.kills, tally.bad, tally.lost) == (6, 0, 0)


def test_the_harness_finds_bad_resumes_in_a_writer_without_a_manifest(tmp_path: Path) -> None:
    tally = kill_commit_code(60, tmp_path / "run", seed=1, naive=True)
    assert tally.bad >= 3, tally


def test_counts_add_up_over_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for total in (3, 6):
        assert main(["--kills", "3", "--engine-kills", "0", "--state", str(tmp_path / "counts.json")]) == 0
        assert f"{total} kills" in capsys.readouterr().out


@pytest.mark.many
def test_many_kills(tmp_path: Path) -> None:
    for tally in (
        kill_commit_code(1800, tmp_path / "run", seed=2),
        kill_engine(200, tmp_path / "engine", seed=2),
    ):
        print(f"\n{tally}")
        assert (tally.bad, tally.lost) == (0, 0)
