"""What launcher, ranks, operator and dashboards have agreed on.

This module exists so that both sides of every boundary read one definition: exit codes, the environment of a
pod, the `/status` answer, the termination message, the metric table. It must import nothing heavier than
pydantic and must do no I/O.
"""

from __future__ import annotations

from enum import IntEnum, StrEnum
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel


class ExitCode(IntEnum):
    """How a trainer process ends. `restart.decide` maps each code to what follows."""

    DONE = 0
    FAILURE = 1
    USER_ERROR = 64
    OUT_OF_MEMORY = 70
    NUMERICAL_INSTABILITY = 71
    NO_VALID_CHECKPOINT = 72
    HANG = 73
    SAVED_AND_STOPPED = 75
    PEER_LOST = 76
    DO_NOT_REQUEUE = 93


class TrainerError(Exception):
    """An end with a known cause. The message is for a person and says what to do next."""

    exit_code: ExitCode = ExitCode.FAILURE
    reason: str = "Failure"


class UserError(TrainerError):
    """The configuration, the data or the machine cannot work as asked: no retry helps."""

    exit_code = ExitCode.USER_ERROR
    reason = "UserError"


class DeviceOutOfMemory(TrainerError):
    exit_code = ExitCode.OUT_OF_MEMORY
    reason = "OutOfMemory"


class NumericalInstability(TrainerError):
    exit_code = ExitCode.NUMERICAL_INSTABILITY
    reason = "NumericalInstability"


class NoValidCheckpoint(TrainerError):
    exit_code = ExitCode.NO_VALID_CHECKPOINT
    reason = "NoValidCheckpoint"


class SavedAndStopped(TrainerError):
    """Not a failure: a stop was requested and one complete checkpoint was committed."""

    exit_code = ExitCode.SAVED_AND_STOPPED
    reason = "SavedAndStopped"


class PeerLost(TrainerError):
    exit_code = ExitCode.PEER_LOST
    reason = "PeerLost"


class Fenced(TrainerError):
    """A newer attempt owns the checkpoint directory; this one must write nothing more."""

    exit_code = ExitCode.DO_NOT_REQUEUE
    reason = "Fenced"


class Env:
    """Names of the environment. A backend sets the first group and the launcher reads nothing else."""

    JOB_NAME = "MAMBA_JOB_NAME"
    JOB_NAMESPACE = "MAMBA_JOB_NAMESPACE"
    JOB_UID = "MAMBA_JOB_UID"
    ATTEMPT = "MAMBA_ATTEMPT"
    NNODES = "MAMBA_NNODES"
    NODE_RANK = "MAMBA_NODE_RANK"
    NPROC_PER_NODE = "MAMBA_NPROC_PER_NODE"
    MASTER_ADDR = "MAMBA_MASTER_ADDR"
    MASTER_PORT = "MAMBA_MASTER_PORT"
    CONFIG = "MAMBA_CONFIG"
    TERMINATION_LOG = "MAMBA_TERMINATION_LOG"

    #: From launcher to rank: the shared-memory file the rank reports into (see `report.py`).
    REPORT_BOARD = "MAMBA_REPORT_BOARD"


class Phase(StrEnum):
    """What a rank is doing. A hang is judged only in TRAINING: the other phases have no steady pace."""

    STARTING = "Starting"
    LOADING = "Loading"
    TRAINING = "Training"
    EVALUATING = "Evaluating"
    SAVING = "Saving"
    STOPPING = "Stopping"
    DONE = "Done"


class _Wire(BaseModel):
    """JSON on the wire is camelCase; unknown keys are ignored so that an older reader survives a newer writer."""

    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, frozen=True, extra="ignore")


class RankStatus(_Wire):
    rank: int = Field(ge=0)
    local_rank: int = Field(ge=0)
    phase: Phase = Phase.STARTING
    step: int = Field(0, ge=0)
    heartbeat_unix_seconds: float = 0.0
    peak_memory_bytes: int = Field(0, ge=0)


class StatusReport(_Wire):
    """The answer of `GET /status` on port 9400: one per pod, for all its ranks."""

    job_uid: str = Field("", max_length=64)
    attempt: int = Field(0, ge=0)
    phase: Phase = Phase.STARTING
    step: int = Field(0, ge=0)
    max_steps: int = Field(0, ge=0)
    loss: float | None = None
    tokens_per_second: float | None = None
    peak_memory_bytes: int = Field(0, ge=0)
    last_checkpoint_step: int | None = None
    ranks: list[RankStatus] = Field(default_factory=list, max_length=64)


class TerminationMessage(_Wire):
    """What a pod leaves behind for the operator: at most 4 KiB of JSON (the kubelet cuts the rest)."""

    reason: str = Field(max_length=64)
    exit_code: int
    rank: int | None = None
    step: int = 0
    resumed_from_step: int | None = None
    last_checkpoint_step: int | None = None
    peak_memory_bytes: int = 0
    message: str = ""

    def encode(self) -> bytes:
        """JSON of at most 4096 bytes; the tail of `message` survives a cut, as the error stands at its end."""
        message = self
        while len(raw := message.model_dump_json(by_alias=True).encode()) > MAX_TERMINATION_BYTES:
            excess = len(raw) - MAX_TERMINATION_BYTES
            message = message.model_copy(update={"message": message.message[max(1, excess // 6) :]})
        return raw


#: The kubelet keeps no more of a termination log.
MAX_TERMINATION_BYTES = 4096

MetricType = Literal["counter", "gauge", "histogram"]


class Metric(NamedTuple):
    """One row of the metric table, from which exporter, dashboards, alerts and docs are generated."""

    name: str
    type: MetricType
    unit: str
    labels: tuple[str, ...]
    help: str


_JOB = ("training_job", "training_namespace")
_RANK = (*_JOB, "rank", "local_rank")

#: Metrics of the trainer. Base units; `_total` only on counters; no label that a scrape adds by itself.
METRICS: tuple[Metric, ...] = (
    Metric("mamba_training_step", "gauge", "", _JOB, "Optimizer steps completed."),
    Metric("mamba_training_max_steps", "gauge", "", _JOB, "Optimizer steps at which the run ends."),
    Metric("mamba_training_loss", "gauge", "nats", _JOB, "Training loss of the latest step, nats per token."),
    Metric("mamba_training_learning_rate", "gauge", "", _JOB, "Learning rate of the latest step."),
    Metric("mamba_training_gradient_norm", "gauge", "", _JOB, "Global gradient norm before clipping."),
    Metric("mamba_training_tokens_total", "counter", "tokens", _JOB, "Tokens trained on, over all ranks."),
    Metric("mamba_training_tokens_per_second", "gauge", "", _JOB, "Tokens per second over all ranks, latest steps."),
    Metric("mamba_training_mfu_ratio", "gauge", "", _JOB, "Model FLOP utilisation, 0 to 1, without recompute."),
    Metric("mamba_training_skipped_steps_total", "counter", "steps", _JOB, "Steps skipped for non-finite gradients."),
    Metric("mamba_training_eval_loss", "gauge", "nats", _JOB, "Held-out loss, nats per token."),
    Metric("mamba_training_eval_bits_per_byte", "gauge", "", _JOB, "Held-out bits per byte of text."),
    Metric("mamba_training_last_checkpoint_step", "gauge", "", _JOB, "Step of the newest committed checkpoint."),
    Metric("mamba_training_checkpoint_save_seconds", "gauge", "seconds", _JOB, "Duration of the latest save."),
    Metric("mamba_training_quarantined_checkpoints_total", "counter", "", _JOB, "Checkpoints that failed to verify."),
    Metric("mamba_training_phase", "gauge", "", (*_RANK, "phase"), "1 for the phase the rank is in."),
    Metric("mamba_training_rank_step", "gauge", "", _RANK, "Optimizer steps completed by this rank."),
    Metric("mamba_training_heartbeat_age_seconds", "gauge", "seconds", _RANK, "Seconds since this rank last beat."),
    Metric("mamba_training_memory_peak_bytes", "gauge", "bytes", _RANK, "Peak device memory allocated by this rank."),
)
