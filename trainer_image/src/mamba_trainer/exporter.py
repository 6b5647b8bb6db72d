"""`/status` and `/metrics` of all ranks of this pod, served by the launcher on one port.

It exists beside the ranks, not in them, so that a rank stuck in a collective is still seen. It only reads the
report board: no request can block or end training.
"""

from __future__ import annotations

import os
import socket
import socketserver
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.registry import Collector, CollectorRegistry

from . import contract
from .contract import Env, Phase, RankStatus, StatusReport
from .report import RankRecord, Snapshot

Source = Callable[[], Snapshot]
Sample = tuple[Sequence[str], float]

_REQUEST_SECONDS = 5.0
_SHUTDOWN_POLL_SECONDS = 0.1

#: Metrics of the job as a whole: the field of `RankRecord` behind each.
_JOB_FIELDS = {
    "mamba_training_step": "step",
    "mamba_training_max_steps": "max_steps",
    "mamba_training_loss": "loss",
    "mamba_training_learning_rate": "learning_rate",
    "mamba_training_gradient_norm": "gradient_norm",
    "mamba_training_tokens_total": "tokens_total",
    "mamba_training_tokens_per_second": "tokens_per_second",
    "mamba_training_mfu_ratio": "mfu",
    "mamba_training_skipped_steps_total": "skipped_steps",
    "mamba_training_eval_loss": "eval_loss",
    "mamba_training_eval_bits_per_byte": "eval_bits_per_byte",
    "mamba_training_last_checkpoint_step": "last_checkpoint_step",
    "mamba_training_checkpoint_save_seconds": "checkpoint_save_seconds",
    "mamba_training_quarantined_checkpoints_total": "quarantined_checkpoints",
}


def _phases(record: RankRecord) -> list[Sample]:
    return [((phase,), float(phase is record.phase)) for phase in Phase]


def _step(record: RankRecord) -> list[Sample]:
    return [((), record.step)]


def _heartbeat_age(record: RankRecord) -> list[Sample]:
    # A rank that never beat has no age; its phase says Starting.
    return [] if record.heartbeat is None else [((), max(0.0, time.time() - record.heartbeat))]


def _peak_memory(record: RankRecord) -> list[Sample]:
    return [((), record.peak_memory_bytes)]


#: Metrics of each rank: the samples (values of further labels, value).
_RANK_SAMPLES: dict[str, Callable[[RankRecord], list[Sample]]] = {
    "mamba_training_phase": _phases,
    "mamba_training_rank_step": _step,
    "mamba_training_heartbeat_age_seconds": _heartbeat_age,
    "mamba_training_memory_peak_bytes": _peak_memory,
}


def status_report(snapshot: Snapshot) -> StatusReport:
    """The answer of `/status`; numbers of the job come from the first local rank that knows them."""
    ranks = snapshot.ranks
    return StatusReport(
        job_uid=os.environ.get(Env.JOB_UID, ""),
        attempt=snapshot.attempt,
        phase=ranks[0].phase,
        step=ranks[0].step,
        max_steps=ranks[0].max_steps,
        loss=_first_known(ranks, "loss"),
        tokens_per_second=_first_known(ranks, "tokens_per_second"),
        peak_memory_bytes=max(rank.peak_memory_bytes for rank in ranks),
        last_checkpoint_step=_first_known(ranks, "last_checkpoint_step"),
        ranks=[
            RankStatus(
                rank=rank.rank,
                local_rank=rank.local_rank,
                phase=rank.phase,
                step=rank.step,
                heartbeat_unix_seconds=rank.heartbeat or 0.0,
                peak_memory_bytes=rank.peak_memory_bytes,
            )
            for rank in ranks
        ],
    )


class BoardCollector(Collector):
    """The board as metric families, generated from `contract.METRICS`."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._job = (os.environ.get(Env.JOB_NAME, "local"), os.environ.get(Env.JOB_NAMESPACE, ""))

    def collect(self) -> Iterator[Metric]:
        ranks = self._source().ranks
        for metric in contract.METRICS:
            family = _FAMILIES[metric.type](metric.name, metric.help, labels=metric.labels)
            for labels, value in self._samples(metric.name, ranks):
                family.add_metric([*self._job, *labels], value)
            yield family

    def _samples(self, name: str, ranks: Sequence[RankRecord]) -> list[Sample]:
        if name in _JOB_FIELDS:
            value = _first_known(ranks, _JOB_FIELDS[name])
            return [] if value is None else [((), value)]
        return [
            ((str(rank.rank), str(rank.local_rank), *labels), value)
            for rank in ranks
            for labels, value in _RANK_SAMPLES[name](rank)
        ]


_FAMILIES: dict[str, Callable[..., CounterMetricFamily | GaugeMetricFamily]] = {
    "counter": CounterMetricFamily,
    "gauge": GaugeMetricFamily,
}


def _first_known(ranks: Sequence[RankRecord], field: str) -> Any:
    values = (getattr(rank, field) for rank in ranks)
    return next((value for value in values if value is not None), None)


class StatusServer:
    """Serves in threads of its own inside a `with`; port 0 takes a free one, a busy one is an `OSError`."""

    def __init__(self, port: int, source: Source) -> None:
        registry = CollectorRegistry(auto_describe=False)
        registry.register(BoardCollector(source))
        self._server = _Server(port, source, registry)
        self.port: int = self._server.server_address[1]

    def __enter__(self) -> StatusServer:
        threading.Thread(
            target=self._server.serve_forever, args=[_SHUTDOWN_POLL_SECONDS], name="status", daemon=True
        ).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Server(socketserver.ThreadingTCPServer):
    # Not http.server's HTTPServer, which looks the host's name up first; that may take seconds.
    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False

    def __init__(self, port: int, source: Source, registry: CollectorRegistry) -> None:
        self.source = source
        self.registry = registry
        # Both families where the machine has both: the pods of a cluster may have either.
        self._dual = socket.has_dualstack_ipv6()
        self.address_family = socket.AF_INET6 if self._dual else socket.AF_INET
        super().__init__(("", port), _Handler)

    def server_bind(self) -> None:
        if self._dual:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        super().server_bind()

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that goes away in the middle of an answer is no concern of ours."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = _REQUEST_SECONDS

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        answer = _ROUTES.get(path)
        if answer is None:
            self._reply(HTTPStatus.NOT_FOUND, "text/plain", b"not found\n")
        else:
            self._reply(*answer(self.server))

    def log_message(self, format: str, *args: object) -> None:
        """A scrape every few seconds is no news."""

    def _reply(self, status: HTTPStatus, content_type: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


Reply = tuple[HTTPStatus, str, bytes]


def _status(server: _Server) -> Reply:
    body = status_report(server.source()).model_dump_json(by_alias=True)
    return HTTPStatus.OK, "application/json", body.encode()


def _metrics(server: _Server) -> Reply:
    return HTTPStatus.OK, CONTENT_TYPE_PLAIN_0_0_4, generate_latest(server.registry)


def _healthz(server: _Server) -> Reply:
    return HTTPStatus.OK, "text/plain", b"ok\n"


def _readyz(server: _Server) -> Reply:
    """Running means that all local ranks have stepped in this attempt."""
    waiting = [str(rank.rank) for rank in server.source().ranks if not rank.has_stepped]
    if waiting:
        text = f"no step yet from rank {', '.join(waiting)}\n"
        return HTTPStatus.SERVICE_UNAVAILABLE, "text/plain", text.encode()
    return HTTPStatus.OK, "text/plain", b"ok\n"


_ROUTES: dict[str, Callable[[_Server], Reply]] = {
    "/status": _status,
    "/metrics": _metrics,
    "/healthz": _healthz,
    "/readyz": _readyz,
}
