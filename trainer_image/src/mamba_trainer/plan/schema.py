"""What goes into a plan and what comes out: the machine, the memory terms, the plan itself.

Plain frozen data, JSON-able, so that launcher, ranks and operator read one plan and nobody plans twice.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, computed_field

from mamba_trainer.config import Device, Precision

#: Raised when the same job on the same machine would be planned differently.
PLANNER_VERSION = 1

ALL_PRECISIONS = (Precision.BF16, Precision.FP16, Precision.FP32)


class _Data(BaseModel):
    # A plan written by a newer version must stay readable: unknown keys are left out, not refused.
    model_config = ConfigDict(frozen=True, extra="ignore")


class Hardware(_Data):
    """A machine, found (`plan.hardware.detect`) or named (`plan.named`). Counts and bytes of one node."""

    gpus: int = Field(ge=0, description="GPUs of a node; 0: ranks are CPU processes.")
    nodes: int = Field(default=1, ge=1)
    name: str = Field(default="CPU", description="Product name of the card, or CPU.")
    gpu_bytes: int | None = Field(default=None, ge=0, description="Usable by us on each GPU, CUDA context included.")
    peak_flops: float | None = Field(default=None, description="Dense 16-bit FLOP/s of a GPU; None: unknown.")
    memory_bandwidth: float | None = Field(default=None, description="Bytes per second of a GPU's memory.")
    host_bytes: int | None = Field(default=None, ge=0, description="Host memory we may use; None: not checked.")
    disk_bytes: int | None = Field(
        default=None, ge=0, description="Free in the checkpoint folder; None: not looked at."
    )
    cpu_count: int = Field(default=1, ge=1)
    precisions: tuple[Precision, ...] = ALL_PRECISIONS
    fused_scan: bool = Field(default=True, description="Whether the fused kernels of mamba-ssm are installed.")

    @property
    def device(self) -> Literal["cuda", "cpu"]:
        return "cuda" if self.gpus else "cpu"


class Term(StrEnum):
    """One part of a rank's memory, in the order in which a table shows them."""

    WEIGHTS = "weights"
    GRADIENTS = "gradients"
    OPTIMIZER = "master and moments"
    BUCKETS = "buckets"
    STEP = "step transients"
    GATHERED = "gathered layers"
    KEPT = "kept activations"
    LAYER = "layer peak"
    LOSS = "loss"
    CONTEXT = "context and communication"
    FRAGMENTATION = "fragmentation"


class HostTerm(StrEnum):
    """One part of a node's host memory."""

    OPTIMIZER = "offloaded master and moments"
    GRADIENTS = "offloaded gradients"
    PARAMETERS = "offloaded parameters"
    BUFFERS = "transfer buffers"
    PROCESSES = "processes"


class Sizes(_Data):
    """DeepSpeed's buffer sizes, in elements. Functions of the model alone, as checkpoints depend on some."""

    reduce_bucket_elements: int
    allgather_bucket_elements: int
    prefetch_elements: int
    sub_group_elements: int
    persistence_threshold: int
    max_live_parameters: int
    param_group_elements: int


class TrainingPlan(_Data):
    """Every choice resolved, with the numbers it rests on. All bytes are estimates until measured."""

    planner_version: int = PLANNER_VERSION
    device: Literal["cuda", "cpu"]
    parameters: int
    world_size: int
    ranks_per_node: int
    micro_batch_size: int
    accumulation_steps: int
    tokens_per_step: int
    zero_stage: Literal[0, 1, 2, 3]
    offload_optimizer: Device
    offload_parameters: Device
    precision: Precision
    recompute_every: int = Field(ge=0, description="0: no recompute; k: one boundary every k blocks.")
    scan_backend: Literal["torch", "mamba_ssm"] = Field(description="The backend that the numbers assume.")
    sizes: Sizes
    gpu_budget: int | None = Field(description="Usable bytes of a GPU; None for CPU processes.")
    gpu_memory: dict[Term, int] = Field(description="Of one GPU, or CPU process, at its peak; sums to the peak.")
    peak_phase: str = Field(description="When that peak is reached.")
    host_budget: int | None
    host_memory: dict[HostTerm, int] = Field(description="Of one node.")
    checkpoint_bytes: int
    disk_bytes: int = Field(description="Checkpoints that can exist at one time, the one being written included.")
    reasons: tuple[str, ...]

    @computed_field  # type: ignore[prop-decorator]
    @property
    def gpu_total(self) -> int:
        return sum(self.gpu_memory.values())

    @computed_field  # type: ignore[prop-decorator]
    @property
    def gpu_allocated(self) -> int:
        """What `torch.cuda.max_memory_allocated` should show: without context and fragmentation."""
        return self.gpu_total - self.gpu_memory[Term.CONTEXT] - self.gpu_memory[Term.FRAGMENTATION]

    @computed_field  # type: ignore[prop-decorator]
    @property
    def host_total(self) -> int:
        return sum(self.host_memory.values())

    @property
    def mode(self) -> str:
        """In words: `ZeRO-2, optimizer on the host, recompute every 3 blocks`."""
        way = way_words(self.zero_stage, self.offload_optimizer is Device.CPU, self.offload_parameters is Device.CPU)
        return f"{way}, {recompute_words(self.recompute_every)}"


def way_words(stage: int, optimizer_on_host: bool, parameters_on_host: bool) -> str:
    """How the states are split, in words."""
    on_host = [
        *(["optimizer"] if optimizer_on_host else []),
        *(["parameters"] if parameters_on_host else []),
    ]
    return f"ZeRO-{stage}" + (f", {' and '.join(on_host)} on the host" if on_host else "")


def recompute_words(every: int) -> str:
    match every:
        case 0:
            return "no recompute"
        case 1:
            return "recompute of every block"
        case _:
            return f"recompute every {every} blocks"


def gigabytes(amount: float) -> str:
    """Bytes for a person, decimal as on a data sheet: `24.5 GB`, `180 MB`."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if amount >= size:
            value = amount / size
            return f"{value:.0f} {unit}" if value >= 100 or unit == "MB" else f"{value:.1f} {unit}"
    return f"{amount / 1e3:.0f} kB"
