"""What single options do to a run, from the command line to what stands on disk."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from mamba_trainer import cli
from mamba_trainer.checkpoint.manifest import FILE_NAME
from trainer_harness import Training, checkpoints, last_step, options, prepared, same_weights, steps, trained


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    trained(folder)
    return folder


def test_a_dry_run_checks_all_writes_nothing_and_fits_a_screen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for words in (options(tmp_path), ["--preset", "7b_mamba", "--gpu", "RTX 4090", "--num_gpus", "4"]):
        with pytest.raises(SystemExit) as ended:
            cli.train_deepspeed([*words, "--dry_run"])
        shown = capfd.readouterr()
        assert (ended.value.code, shown.err) == (0, "")
        assert "Mode" in shown.out and "Memory per" in shown.out
        assert len(shown.out.splitlines()) <= 40
        assert max(map(len, shown.out.splitlines())) <= 80
    assert list(tmp_path.iterdir()) == []


def test_check_memory_lists_modes_for_a_card(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.train_deepspeed(["--preset", "7b_mamba", "--check_memory", "--gpu", "RTX 4090"])
    shown = capfd.readouterr().out
    assert ended.value.code == 0
    assert "ZeRO-3" in shown and "RTX 4090" in shown and "*" in shown


def test_a_checkpoint_asked_for_by_name_is_where_training_goes_on(whole: Path, tmp_path: Path) -> None:
    step_4 = whole / "checkpoints/step_4"
    run = Training(tmp_path, [*options(tmp_path), "--load_checkpoint", str(step_4)])
    assert run.wait() == 0, run.text()
    assert f"resumed from {step_4} at step 4\n" in run.text()
    assert [row["step"] for row in steps(tmp_path)] == list(range(5, 13))
    assert same_weights(tmp_path / "checkpoints/final", whole / "checkpoints/final")


def test_training_afresh_over_old_checkpoints_is_refused(whole: Path, tmp_path: Path) -> None:
    run = Training(tmp_path, [*options(whole), "--load_checkpoint", "none"])
    assert run.wait() == 64, run.text()
    assert "a fresh start would mix two runs" in run.text() and "--checkpoint_dir" in run.text()
    assert len(steps(whole)) == 12


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    trained(tmp_path, steps=10, checkpoint__interval=2, checkpoint__keep=2)
    assert checkpoints(tmp_path) == ["final", "step_6", "step_8"]


def test_held_out_text_is_evaluated_as_often_as_asked_and_at_the_end(tmp_path: Path) -> None:
    run = trained(tmp_path, steps=7, training__eval_interval=3)
    lines = [line.split()[0] for line in run.text().splitlines() if line.startswith(("step ", "held-out"))]
    assert lines == [*["step"] * 3, "held-out", *["step"] * 3, "held-out", "step", "held-out"]


def test_data_without_a_held_out_split_train_without_an_evaluation(tmp_path: Path) -> None:
    data = prepared(tmp_path, documents=20, validation_fraction=0)
    assert "held-out" not in trained(tmp_path, steps=3, data=data).text()


def test_initial_weights_are_where_training_starts(whole: Path, tmp_path: Path) -> None:
    from mamba_trainer import convert

    convert.export(whole / "checkpoints/final", tmp_path / "weights", "ours")
    trained(tmp_path, steps=2, checkpoint__initial_weights=tmp_path / "weights")
    assert steps(tmp_path)[0]["loss"] < steps(whole)[0]["loss"] - 1


def test_a_profile_is_written_and_its_top_printed(tmp_path: Path) -> None:
    run = Training(tmp_path, [*options(tmp_path, steps=6), "--profile", "2"])
    assert run.wait() == 0, run.text()
    trace = json.loads((tmp_path / "checkpoints/profile/rank0.json").read_text())
    assert len(trace["traceEvents"]) > 100
    assert "profile of 2 steps" in run.text() and "CPU total" in run.text()
    assert [row["step"] for row in steps(tmp_path)] == list(range(1, 7))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    mounted = tmp_path / "disk"
    mounted.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2400k", "none", mounted], capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    yield mounted
    subprocess.run(["umount", "--lazy", mounted], check=True)


def test_a_disk_that_fills_up_costs_a_checkpoint_and_not_the_run(tmp_path: Path, small_disk: Path) -> None:
    arguments = [*options(tmp_path, checkpoint__keep=10), "--checkpoint_dir", str(small_disk / "checkpoints")]
    (small_disk / "other").write_bytes(bytes(600_000))
    run = Training(tmp_path, arguments)
    assert run.wait() == 64  # the last save fails too, and the next attempt sees at once that it would again
    assert "checkpoint NOT saved, training goes on: Step 8 is not saved" in run.text()
    assert last_step(tmp_path) == 12
    assert run.text().rstrip().endswith("Next start: step 4.")
    assert (small_disk / "checkpoints/step_4" / FILE_NAME).is_file()
    assert "Traceback" not in run.text()


def test_a_pod_trains_what_its_environment_describes(tmp_path: Path) -> None:
    trained(tmp_path / "first", steps=2)
    run_file = tmp_path / "first/checkpoints/run.json"
    run = json.loads(run_file.read_text())
    run["config"]["training"]["max_steps"] = 3
    run["config"]["checkpoint"]["directory"] = str(tmp_path / "checkpoints")
    run["config"]["reporting"]["jsonl"] = str(tmp_path / "steps.jsonl")
    (tmp_path / "run.json").write_text(json.dumps(run))
    environ = {"MAMBA_NPROC_PER_NODE": "2", "MAMBA_CONFIG": str(tmp_path / "run.json"), "MAMBA_ATTEMPT": "7"}
    pod = Training(tmp_path, ["pod"], environ=environ, command=cli.main)
    assert pod.wait() == 0, pod.text()
    assert [row["step"] for row in steps(tmp_path)] == [1, 2, 3]
    assert json.loads((tmp_path / "checkpoints/final" / FILE_NAME).read_text())["attempt"] == 7
    assert pod.message()["reason"] == "Done" and pod.message()["step"] == 3
