"""What a rank finds when it starts: environment, master port; and what PID 1 owes to its container."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from launcher_harness import Launch, eventually
from mamba_trainer.contract import UserError
from mamba_trainer.launch import LaunchSpec, run

DUMP = """
import json, os, sys
from pathlib import Path
Path(sys.argv[1], os.environ["RANK"]).write_text(json.dumps(dict(os.environ)))
"""


def environments(tmp_path: Path, **spec: object) -> list[dict[str, str]]:
    command = [sys.executable, "-c", DUMP, str(tmp_path)]
    assert run(LaunchSpec(command, termination_log=None, **spec)) == 0  # type: ignore[arg-type]
    return [json.loads(path.read_text()) for path in sorted(tmp_path.iterdir())]


def test_ranks_find_what_torch_and_the_trainer_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("RANK", "99")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    ranks = environments(tmp_path, nproc_per_node=2, attempt=4, env={"OF_THE_USER": "yes"})
    for rank, env in enumerate(ranks):
        assert (env["RANK"], env["LOCAL_RANK"], env["GROUP_RANK"]) == (str(rank), str(rank), "0")
        assert (env["WORLD_SIZE"], env["LOCAL_WORLD_SIZE"]) == ("2", "2")
        assert (env["MAMBA_ATTEMPT"], env["OF_THE_USER"]) == ("4", "yes")
        assert env["TORCHELASTIC_USE_AGENT_STORE"] == "False", "on one node rank 0 hosts the store"
        assert 1 <= int(env["OMP_NUM_THREADS"]) <= max(1, (psutil.cpu_count() or 1) // 2)
    assert ranks[0]["MASTER_PORT"] == ranks[1]["MASTER_PORT"]


def test_omp_num_threads_of_the_user_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert environments(tmp_path)[0]["OMP_NUM_THREADS"] == "7"


def test_a_busy_master_port_is_replaced_and_it_says_so(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as busy:
        wanted = busy.getsockname()[1]
        port = environments(tmp_path, master_port=wanted)[0]["MASTER_PORT"]
    assert port != str(wanted)
    assert f"port {wanted} is in use; using {port} instead" in capfd.readouterr().err


def test_a_free_master_port_is_kept_in_silence(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        wanted = probe.getsockname()[1]
    assert environments(tmp_path, master_port=wanted)[0]["MASTER_PORT"] == str(wanted)
    assert capfd.readouterr().err == ""


def test_a_pod_is_described_by_the_environment_of_the_contract() -> None:
    spec = LaunchSpec.in_pod(
        ["train"],
        {
            "MAMBA_NNODES": "4",
            "MAMBA_NODE_RANK": "3",
            "MAMBA_NPROC_PER_NODE": "8",
            "MAMBA_MASTER_ADDR": "job-0.job",
            "MAMBA_MASTER_PORT": "29501",
            "MAMBA_ATTEMPT": "2",
        },
    )
    assert (spec.nnodes, spec.first_rank, spec.world_size, spec.attempt) == (4, 24, 32, 2)
    assert (spec.master_addr, spec.master_port, spec.supervise) == ("job-0.job", 29501, False)


@pytest.mark.parametrize("environ", [{"MAMBA_NNODES": "two"}, {"MAMBA_NODE_RANK": "1"}, {"MAMBA_NNODES": "0"}])
def test_a_broken_description_of_a_pod_is_a_user_error(environ: dict[str, str]) -> None:
    with pytest.raises(UserError):
        LaunchSpec.in_pod(["train"], environ)


def test_several_nodes_are_never_supervised_here() -> None:
    with pytest.raises(UserError, match="operator"):
        LaunchSpec(["train"], nnodes=2, master_port=1, supervise=True)


UNSHARE = [shutil.which("unshare") or "", "--pid", "--fork", "--kill-child"]


def can_unshare() -> bool:
    return bool(UNSHARE[0]) and subprocess.run([*UNSHARE, "true"], capture_output=True).returncode == 0


@pytest.mark.skipif(not can_unshare(), reason="no right to create a PID namespace")
def test_as_pid_1_it_reaps_orphans_and_still_knows_how_its_rank_ended(tmp_path: Path) -> None:
    """The rank leaves ten orphans behind, in sessions of their own, and goes on."""
    orphan = f"(setsid sh -c 'touch {tmp_path}/orphan.'$i' &' &)"
    script = f"for i in 0 1 2 3 4 5 6 7 8 9; do {orphan}; done; sleep 2; touch {tmp_path}/over; exit 70"
    launch = Launch(tmp_path, ["sh", "-c", script], under=UNSHARE, nproc_per_node=1)

    def zombies() -> int:
        processes = psutil.process_iter(["status", "ppid"])
        launchers = {process.pid for process in launch.family()}
        return sum(
            p.info["status"] == psutil.STATUS_ZOMBIE and (p.pid in launchers or p.info["ppid"] in launchers)
            for p in processes
        )

    eventually(lambda: len(list(tmp_path.glob("orphan.*"))) == 10, "the orphans ran")
    eventually(lambda: zombies() == 0, "the orphans are reaped", 1.5)
    assert not (tmp_path / "over").exists()
    assert launch.wait() == 70
