"""`mamba-train rehearse`: one real rank of N, here on a CPU."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest


def rehearse(directory: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from mamba_trainer.cli import main; main()", "rehearse", *options]
    return subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("stage", [2, 3])
def test_one_rank_of_eight_steps_and_its_peak_is_shown(tmp_path: Path, stage: int) -> None:
    done = rehearse(
        tmp_path,
        "--preset",
        "tiny",
        "--num-gpus",
        "8",
        "--gpu-memory",
        "1GB",
        "--set",
        f"parallelism.zero_stage={stage}",
    )
    assert done.returncode == 0, done.stderr
    assert f"ZeRO-{stage}" in done.stdout and "8 ranks" in done.stdout
    measured = re.search(r"Measured   ([\d.]+) ([MG]B) resident", done.stdout)
    assert measured is not None
    assert 1e8 < float(measured[1]) * {"MB": 1e6, "GB": 1e9}[measured[2]] < 5e9
    assert not (tmp_path / "checkpoints").exists(), "a rehearsal leaves nothing behind"


def test_a_size_that_is_none_is_refused(tmp_path: Path) -> None:
    done = rehearse(tmp_path, "--preset", "tiny", "--num-gpus", "8", "--gpu-memory", "much")
    assert done.returncode == 64
    assert "24.5GB" in done.stderr and "Traceback" not in done.stderr
