"""`/status`, `/metrics` and the probes, over real HTTP, for a board that ranks write."""

from __future__ import annotations

import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from launcher_harness import Launch, eventually, stub
from mamba_trainer.contract import METRICS, Env, Phase, StatusReport
from mamba_trainer.exporter import StatusServer
from mamba_trainer.report import RankReporter, ReportBoard, Snapshot


@pytest.fixture
def board(tmp_path: Path) -> Iterator[ReportBoard]:
    board = ReportBoard.create(tmp_path / "board", ranks=2, first_rank=2)
    yield board
    board.close()


@pytest.fixture
def server(board: ReportBoard, monkeypatch: pytest.MonkeyPatch) -> Iterator[StatusServer]:
    for name, value in {Env.JOB_NAME: "my-job", Env.JOB_NAMESPACE: "team", Env.JOB_UID: "u-1"}.items():
        monkeypatch.setenv(name, value)
    with StatusServer(0, lambda: Snapshot(3, board.read_all())) as server:
        yield server


def reporter(board: ReportBoard, local_rank: int) -> RankReporter:
    return RankReporter.from_env(
        {"RANK": str(2 + local_rank), "LOCAL_RANK": str(local_rank), Env.REPORT_BOARD: str(board.path)}
    )


def get(port: int, path: str, host: str = "127.0.0.1") -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://{host}:{port}{path}", timeout=5) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def samples(port: int) -> Samples:
    families = text_string_to_metric_families(get(port, "/metrics")[1])
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


def of(**labels: str) -> tuple[tuple[str, str], ...]:
    return tuple(sorted({"training_job": "my-job", "training_namespace": "team", **labels}.items()))


def test_status_says_what_the_contract_promises(board: ReportBoard, server: StatusServer) -> None:
    with reporter(board, 0) as first, reporter(board, 1) as second:
        first.update(phase=Phase.TRAINING, step=7, max_steps=100, loss=2.5, tokens_per_second=1e4, peak_memory_bytes=5)
        first.update(last_checkpoint_step=5)
        second.update(phase=Phase.SAVING, step=6, peak_memory_bytes=9)
        status = StatusReport.model_validate_json(get(server.port, "/status")[1])
    assert (status.job_uid, status.attempt, status.phase) == ("u-1", 3, Phase.TRAINING)
    assert (status.step, status.max_steps, status.loss, status.last_checkpoint_step) == (7, 100, 2.5, 5)
    assert (status.tokens_per_second, status.peak_memory_bytes) == (1e4, 9)
    assert [(r.rank, r.local_rank, r.phase, r.step) for r in status.ranks] == [
        (2, 0, Phase.TRAINING, 7),
        (3, 1, Phase.SAVING, 6),
    ]
    assert status.ranks[0].heartbeat_unix_seconds == pytest.approx(time.time(), abs=5)


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_leaves_status_readable(loss: float, board: ReportBoard, server: StatusServer) -> None:
    with reporter(board, 0) as first:
        first.update(loss=loss)
        assert StatusReport.model_validate_json(get(server.port, "/status")[1]).loss is None


def test_every_metric_of_the_table_is_served_with_its_type_and_labels(board: ReportBoard, server: StatusServer) -> None:
    numbers = {
        "step": 7,
        "max_steps": 100,
        "loss": 2.5,
        "learning_rate": 1e-4,
        "gradient_norm": 0.5,
        "tokens_total": 4096,
        "tokens_per_second": 10.0,
        "mfu": 0.4,
        "skipped_steps": 1,
        "eval_loss": 2.0,
        "eval_bits_per_byte": 1.5,
        "last_checkpoint_step": 5,
        "checkpoint_save_seconds": 3.0,
        "quarantined_checkpoints": 2,
        "peak_memory_bytes": 11,
    }
    with reporter(board, 0) as first:
        first.update(phase=Phase.TRAINING, **numbers)
        families = {f.name: f for f in text_string_to_metric_families(get(server.port, "/metrics")[1])}
        served = samples(server.port)
    for metric in METRICS:
        family = families[metric.name.removesuffix("_total") if metric.type == "counter" else metric.name]
        assert (family.type, family.documentation) == (metric.type, metric.help)
        assert family.samples, metric.name
        for sample in family.samples:
            assert sample.name == metric.name
            assert set(sample.labels) == set(metric.labels)
    assert len(families) == len(METRICS)
    assert served["mamba_training_loss", of()] == 2.5
    assert served["mamba_training_tokens_total", of()] == 4096
    assert served["mamba_training_phase", of(rank="2", local_rank="0", phase="Training")] == 1
    assert served["mamba_training_phase", of(rank="2", local_rank="0", phase="Saving")] == 0
    assert served["mamba_training_memory_peak_bytes", of(rank="2", local_rank="0")] == 11
    assert 0 <= served["mamba_training_heartbeat_age_seconds", of(rank="2", local_rank="0")] < 5


def test_what_no_rank_knows_yet_is_absent_and_not_zero(server: StatusServer) -> None:
    served = {name for name, _ in samples(server.port)}
    assert "mamba_training_loss" not in served
    assert "mamba_training_heartbeat_age_seconds" not in served
    assert "mamba_training_step" in served


def test_ready_means_that_all_local_ranks_have_stepped_since_they_resumed(
    board: ReportBoard, server: StatusServer
) -> None:
    with reporter(board, 0) as first, reporter(board, 1) as second:
        first.update(step=501, resumed_from_step=500)
        second.update(step=500, resumed_from_step=500)
        assert get(server.port, "/readyz") == (503, "no step yet from rank 3\n")
        assert get(server.port, "/healthz") == (200, "ok\n")
        second.update(step=501)
        assert get(server.port, "/readyz") == (200, "ok\n")


def test_an_unknown_path_is_not_found(server: StatusServer) -> None:
    assert get(server.port, "/admin")[0] == 404


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="no IPv6 here")
def test_it_answers_on_both_address_families(server: StatusServer) -> None:
    assert get(server.port, "/healthz", "[::1]")[0] == get(server.port, "/healthz")[0] == 200


def test_a_client_that_says_nothing_does_not_keep_others_waiting(server: StatusServer) -> None:
    with socket.create_connection(("127.0.0.1", server.port)):
        assert get(server.port, "/healthz")[0] == 200


def free_port() -> int:
    with socket.create_server(("", 0)) as probe:
        port: int = probe.getsockname()[1]
    return port


def test_the_launcher_serves_the_port_while_a_rank_is_stuck_and_gives_it_back(tmp_path: Path) -> None:
    port = free_port()
    command = stub(tmp_path, steps=1000, trouble="hang", rank=1, at_step=3, stuck_without_it=True)
    launch = Launch(tmp_path, command, status_port=port, attempt=2)
    launch.ranks_train()
    eventually(lambda: get(port, "/readyz")[0] == 200, "both ranks step")
    eventually(lambda: '"step":3' in get(port, "/status")[1], "rank 1 hangs")
    assert StatusReport.model_validate_json(get(port, "/status")[1]).attempt == 2
    launch.process.terminate()
    launch.process.terminate()
    launch.process.send_signal(2)
    time.sleep(0.2)
    launch.process.send_signal(2)
    assert launch.wait() == 130
    with socket.create_server(("", port)):
        pass


def test_a_busy_status_port_costs_a_warning_and_never_the_training(tmp_path: Path) -> None:
    with socket.create_server(("", 0)) as busy:
        port = busy.getsockname()[1]
        launch = Launch(tmp_path, stub(tmp_path), status_port=port)
        assert launch.wait() == 0
    assert f"/status and /metrics are not served: port {port}: Address already in use" in launch.text()
