"""The guide's ways to start, as a person uses them: from any directory, with any option, without a GPU."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from mamba_trainer.data.prepare import prepare

TRAINER_IMAGE = Path(__file__).parents[2] / "trainer_image"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The scripts in a checkout of their own, whose path has a space."""
    folder = tmp_path / "my checkout" / "trainer_image"
    folder.mkdir(parents=True)
    for name in ("launch_deepspeed.sh", "train_deepspeed.py", "deepspeed_config.json"):
        shutil.copy(TRAINER_IMAGE / name, folder)
    return folder


def launch(checkout: Path, directory: Path, *options: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key not in ("VIRTUAL_ENV", "PYTHONPATH")}
    return subprocess.run(
        [checkout / "launch_deepspeed.sh", *options], cwd=directory,
        env={**environment, "VIRTUAL_ENV": sys.prefix, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **variables},
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A directory to start from, with `my data` in it."""
    directory = tmp_path / "some where else"
    directory.mkdir()
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"line {number} of a text" for number in range(4000)))
    prepare(text, directory / "my data", tokenizer="byte", validation_fraction=0, workers=1)
    return directory


SHORT_RUN = [
    "--num_gpus=2", "--preset=tiny", "--max_steps=2", "--data=my data", "--checkpoint_dir=my runs",
    *(f"--set={setting}" for setting in (
        "model.vocab_size=257", "model.d_model=16", "model.n_layer=1", "training.sequence_length=32",
        "training.warmup_steps=0", "training.global_batch_size=2", "training.eval_interval=0",
    )),
]  # fmt: skip


def trained(ended: subprocess.CompletedProcess[str], directory: Path) -> None:
    assert ended.returncode == 0, ended.stdout + ended.stderr
    manifest = json.loads((directory / "my runs" / "final" / "manifest.json").read_text())
    assert (manifest["step"], manifest["worldSize"]) == (2, 2)


def test_it_trains_on_cpu_processes_and_says_so_where_there_is_no_gpu(checkout: Path, elsewhere: Path):
    ended = launch(checkout, elsewhere, *SHORT_RUN)
    trained(ended, elsewhere)
    (said,) = [line for line in ended.stdout.splitlines() if "2 CPU processes" in line]
    assert "no GPU" in said


@pytest.mark.parametrize(("program", "count"), [("torchrun", "--nproc_per_node=2"), ("deepspeed", "--num_gpus=2")])
def test_other_launchers_can_start_the_same_script(program: str, count: str, checkout: Path, elsewhere: Path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    start = [Path(sys.executable).with_name(program), count, f"--master_port={port}"]
    ended = subprocess.run(
        [*start, checkout / "train_deepspeed.py", *SHORT_RUN],
        cwd=elsewhere, env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    trained(ended, elsewhere)


def test_options_reach_the_trainer_and_its_exit_code_comes_back(checkout: Path, tmp_path: Path):
    ended = launch(checkout, tmp_path, "--preset", "9b mamba")
    assert ended.returncode == 64
    assert "There is no preset '9b mamba'" in ended.stderr


def test_without_a_preset_on_a_machine_without_a_gpu_it_names_the_tiny_one(checkout: Path, tmp_path: Path):
    ended = launch(checkout, tmp_path)
    assert ended.returncode == 64
    assert "--preset tiny" in ended.stderr


def test_where_no_python_has_the_trainer_it_says_how_to_install_it(checkout: Path, tmp_path: Path):
    bare = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", bare], check=True)
    # With all but the trainer, and standing in its sources: that must not count as having it.
    site_packages = next(bare.glob("lib/python*/site-packages"))
    for package in ("torch", "deepspeed", "typer"):
        (site_packages / package).mkdir()
    ended = launch(
        checkout, TRAINER_IMAGE / "src", "--preset", "tiny", "--dry_run",
        VIRTUAL_ENV=str(bare), PATH=f"{bare / 'bin'}:/usr/bin:/bin",
    )  # fmt: skip
    assert ended.returncode == 64
    assert "install_deepspeed.sh" in ended.stderr
    assert str(bare) in ended.stderr
    assert not ended.stdout


def test_the_guides_deepspeed_file_leaves_every_choice_to_the_plan(checkout: Path, tmp_path: Path):
    plain = ["--preset", "7b_mamba", "--num_gpus", "4", "--dry_run", "--gpu", "RTX 4090"]
    with_file = [*plain, "--deepspeed_config", str(checkout / "deepspeed_config.json")]
    expected, ended = launch(checkout, tmp_path, *plain), launch(checkout, tmp_path, *with_file)
    assert ended.returncode == 0, ended.stderr
    assert "4 x RTX 4090" in expected.stdout
    assert ended.stdout.endswith(expected.stdout)  # before it, a line of DeepSpeed's own
    assert "your DeepSpeed configuration" not in ended.stdout
