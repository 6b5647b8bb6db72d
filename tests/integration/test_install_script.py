"""`install_deepspeed.sh` in a bare virtual environment, with drivers and toolkits of every kind on its PATH."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "trainer_image" / "install_deepspeed.sh"


def install(environment: Path, *options: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs the script as if `environment` were active."""
    kept = {key: value for key, value in os.environ.items() if key not in ("CUDA_HOME", "PYTHONPATH")}
    return subprocess.run(
        [SCRIPT, *options], env={**kept, "VIRTUAL_ENV": str(environment), **variables},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    environment = tmp_path_factory.mktemp("bare") / "an environment"
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    return environment


@pytest.fixture
def machine(tmp_path: Path, bare: Path):
    """Builds a machine: a driver, a toolkit and a torch, each of some CUDA version; None: not there."""

    site_packages = next(bare.glob("lib/python*/site-packages"))
    torch = site_packages / "torch"

    def build(driver: str | None, toolkit: str | None, torch_cuda: str | None) -> dict[str, str]:
        _script(tmp_path / "bin" / "nvidia-smi", _nvidia_smi(driver))
        if toolkit is not None:
            _script(
                tmp_path / "cuda" / "bin" / "nvcc", f"echo 'Cuda compilation tools, release {toolkit}, V{toolkit}.1'"
            )
        if torch_cuda is not None:
            torch.mkdir(exist_ok=True)
            (torch / "__init__.py").touch()
            (torch / "version.py").write_text(f"cuda = {None if torch_cuda == 'cpu' else torch_cuda!r}\n")
        return {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "CUDA_HOME": str(tmp_path / "cuda")}

    yield build
    for file in torch.glob("*.py"):
        file.unlink()


def _script(path: Path, body: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


def _nvidia_smi(driver: str | None) -> str:
    if driver is None:
        return "echo 'NVIDIA-SMI has failed: the driver is not loaded'; exit 9"
    number, cuda = driver.split("/")
    return f"echo '| NVIDIA-SMI {number}     Driver Version: {number}     CUDA Version: {cuda}     |'"


def contents(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if "__pycache__" not in str(path)}


def test_a_dry_run_in_a_bare_environment_prints_every_command_and_changes_nothing(bare: Path, machine):
    variables = machine("580.159/13.0", "13.0", None)
    before = contents(bare)
    ended = install(bare, "--dry_run", **variables)
    assert ended.returncode == 0, ended.stderr
    assert contents(bare) == before
    commands = [line for line in ended.stdout.splitlines() if line.startswith("+ ")]
    assert len(commands) == 3
    assert "constraints.txt" in commands[0] and "trainer_image\\[train\\]" in commands[0]
    assert "MAMBA_KEEP_CUDA_BUILD=TRUE" in commands[2] and "--no-build-isolation" in commands[2]
    assert f"CUDA_HOME={variables['CUDA_HOME']}" in commands[2]
    assert "causal-conv1d==" in commands[2] and "mamba-ssm==" in commands[2]
    assert "PROBLEM" not in ended.stdout
    assert "CUDA 13.0 (not installed yet)" in ended.stdout


@pytest.mark.parametrize(
    ("driver", "toolkit", "torch_cuda", "problem", "fix"),
    [
        ("535.1/12.2", "13.0", "13.0", "Driver 535.1 runs CUDA up to 12.2", "update the driver to 580 or newer"),
        (None, "13.0", "13.0", "the driver is not loaded", "restart the machine"),
        ("580.1/13.0", "12.8", "13.0", "toolkit 12.8 cannot build", "CUDA_HOME=/usr/local/cuda-13.0"),
        ("580.1/13.0", "13.0", "cpu", "built without CUDA", "--force-reinstall"),
        ("580.1/13.0", None, "13.0", "no bin/nvcc in it", "set it to a CUDA toolkit 13.x"),
    ],
    ids=["old driver", "broken driver", "other toolkit", "torch without CUDA", "CUDA_HOME without nvcc"],
)
def test_a_mismatch_of_driver_toolkit_and_torch_is_named_with_its_fix(
    bare: Path, machine, driver: str | None, toolkit: str | None, torch_cuda: str, problem: str, fix: str
):
    ended = install(bare, "--dry_run", **machine(driver, toolkit, torch_cuda))
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("PROBLEM") == 1
    said, advice = ended.stdout.split("PROBLEM: ")[1].splitlines()[:2]
    assert problem in said
    assert fix in advice


@pytest.mark.parametrize(
    ("driver", "toolkit", "torch_cuda"), [("580.1/13.1", "13.0", "13.0"), ("595.2/13.2", "12.4", "12.8")]
)
def test_versions_of_one_cuda_major_or_a_newer_driver_fit(bare: Path, machine, driver, toolkit, torch_cuda):
    ended = install(bare, "--dry_run", **machine(driver, toolkit, torch_cuda))
    assert "PROBLEM" not in ended.stdout
    assert f"Building the fused kernels with CUDA toolkit {toolkit}" in ended.stdout


def test_kernels_are_left_out_on_request(bare: Path, machine):
    ended = install(bare, "--dry_run", "--without_kernels", **machine("580.1/13.0", "13.0", "13.0"))
    assert "mamba-ssm" not in ended.stdout


def test_without_a_matching_toolkit_the_kernels_are_only_offered(bare: Path, machine):
    ended = install(bare, "--dry_run", **machine("580.1/13.0", "12.8", "13.0"))
    offered = ended.stdout.split("The commands for later:")[1]
    assert "MAMBA_KEEP_CUDA_BUILD=TRUE" in offered
    assert "CUDA_HOME=/usr/local/cuda-13.0" in offered


def test_a_missing_environment_would_be_made(tmp_path: Path):
    ended = install(tmp_path / "new", "--dry_run", PYTHON=sys.executable)
    assert ended.returncode == 0, ended.stderr
    assert f"+ {sys.executable} -m venv {tmp_path / 'new'}" in ended.stdout
    assert not (tmp_path / "new").exists()


def test_an_unknown_option_is_refused_with_those_that_exist(bare: Path):
    ended = install(bare, "--dryrun")
    assert ended.returncode == 64
    assert "--dryrun" in ended.stderr and "--dry_run" in ended.stderr


def test_where_all_is_installed_a_real_run_changes_nothing():
    environment = Path(sys.prefix)
    site_packages = next(environment.glob("lib/python*/site-packages"))
    before = {path.name: path.stat().st_mtime_ns for path in site_packages.glob("*.dist-info")}
    # No index: were anything missing, pip would fail instead of changing the environment that runs this test.
    ended = install(environment, "--without_kernels", PIP_NO_INDEX="1", PIP_CONFIG_FILE=os.devnull)
    assert ended.returncode == 0, ended.stderr
    assert "The trainer is installed" in ended.stdout
    assert "+ " not in ended.stdout
    assert {path.name: path.stat().st_mtime_ns for path in site_packages.glob("*.dist-info")} == before


def test_the_cuda_version_that_a_dry_run_assumes_is_that_of_the_pinned_torch():
    torch = pytest.importorskip("torch")
    pinned = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch=="))
    if torch.__version__.partition("+")[0] != pinned.removeprefix("torch==") or torch.version.cuda is None:
        pytest.skip(f"this environment has torch {torch.__version__}, not the pinned build")
    assert f"PINNED_TORCH_CUDA={torch.version.cuda} " in SCRIPT.read_text()
