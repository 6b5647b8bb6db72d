"""Which mode a job runs in: the fastest that fits, within what the user has fixed.

The order of preference is stated as data below. `auto` never changes arithmetic (16-bit masters, residual or
states) and never the global batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

from mamba_trainer.config import Device, ParallelismConfig, Precision, TrainerConfig
from mamba_trainer.plan import activations
from mamba_trainer.plan.memory import Footprint, Job, Mode, ScanName, Stage, footprint, make_job
from mamba_trainer.plan.schema import Hardware

#: What an automatic choice leaves free, as a share of the card: estimates are not measurements.
HEADROOM = 0.05

#: More tokens in a micro-batch no longer make a GPU faster; on a CPU they leave the cache.
_ENOUGH_TOKENS = {"cuda": 8_192, "cpu": 1_024}

#: ZeRO stage, optimizer on the host, parameters on the host.
Way = tuple[Stage, bool, bool]

#: Fastest first. With several ranks ZeRO-2 moves the least data that leaves room for a model; ZeRO-3 gathers
#: the weights twice or three times per micro-batch; offload waits for the host, and ZeRO-2 less than ZeRO-3.
#: ZeRO-1 and 0 need more memory than 2 and are here for who asks, and for models so small that buckets
#: outweigh them.
_SEVERAL_RANKS: tuple[Way, ...] = (
    (2, False, False), (3, False, False), (2, True, False), (3, True, False), (3, True, True),
    (3, False, True), (1, False, False), (1, True, False), (0, False, False),
)  # fmt: skip
#: A single rank has nothing to partition: ZeRO-0 is plain data parallelism without buckets and copies. ZeRO-1
#: converts gradients group by group, which saves 6 bytes per parameter in the optimizer step.
_ONE_RANK: tuple[Way, ...] = (
    (0, False, False), (1, False, False), (2, False, False), (3, False, False), (2, True, False),
    (3, True, False), (3, True, True), (3, False, True), (1, True, False),
)  # fmt: skip


class Candidate(NamedTuple):
    mode: Mode
    footprint: Footprint


class Search(NamedTuple):
    """What was tried, in order of preference, up to and including the first that fits."""

    job: Job
    tried: tuple[Candidate, ...]
    chosen: Candidate | None


def resolve_precision(parallelism: ParallelismConfig, hardware: Hardware) -> Precision:
    if parallelism.precision != "auto":
        return parallelism.precision
    if parallelism.master_dtype == "bf16":
        return Precision.BF16
    if hardware.device == "cpu":
        return Precision.FP32
    return Precision.BF16 if Precision.BF16 in hardware.precisions else Precision.FP16


def resolve_scan(config: TrainerConfig, hardware: Hardware) -> ScanName:
    """The backend that the ranks will find: `scan.choose` decides there by the same rule."""
    if config.training.scan_backend != "auto":
        return config.training.scan_backend
    fused = hardware.device == "cuda" and hardware.fused_scan and 2 <= config.model.d_conv <= 4
    return "mamba_ssm" if fused else "torch"


def job_for(config: TrainerConfig, hardware: Hardware) -> Job:
    return make_job(config, hardware, resolve_precision(config.parallelism, hardware), resolve_scan(config, hardware))


def search(config: TrainerConfig, hardware: Hardware) -> Search:
    """Walks through the modes until one fits."""
    job = job_for(config, hardware)
    tried = []
    for mode in modes(job, hardware):
        candidate = Candidate(mode, footprint(job, mode))
        tried.append(candidate)
        if fits(candidate, config, hardware):
            return Search(job, tuple(tried), candidate)
    return Search(job, tuple(tried), None)


def fits(candidate: Candidate, config: TrainerConfig, hardware: Hardware) -> bool:
    """A mode that the user has fixed completely may use the whole card; an automatic one leaves headroom."""
    share = 1.0 if _all_fixed(config) else 1 - HEADROOM
    on_gpu = hardware.gpu_bytes is None or candidate.footprint.gpu_total <= share * hardware.gpu_bytes
    return on_gpu and host_fits(candidate.footprint, hardware)


def host_fits(memory: Footprint, hardware: Hardware) -> bool:
    return hardware.host_bytes is None or memory.host_total <= hardware.host_bytes


def _all_fixed(config: TrainerConfig) -> bool:
    parallelism, training = config.parallelism, config.training
    offload_fixed = parallelism.offload_optimizer != "auto" and parallelism.offload_parameters != "auto"
    return (
        offload_fixed
        and parallelism.zero_stage != "auto"
        and training.recompute != "auto"
        and training.micro_batch_size != "auto"
    )


def modes(job: Job, hardware: Hardware) -> Iterator[Mode]:
    """All modes that agree with the user's wishes, in order of preference."""
    parallelism = job.config.parallelism
    for stage, optimizer, parameters in _ONE_RANK if job.world == 1 else _SEVERAL_RANKS:
        if not (
            parallelism.zero_stage in ("auto", stage)
            and _agrees(parallelism.offload_optimizer, optimizer, hardware)
            and _agrees(parallelism.offload_parameters, parameters, hardware)
            and (stage > 0 or parallelism.master_dtype == "fp32")
        ):
            continue
        for every in _recompute_options(job, stage):
            for micro in _micro_batches(job, hardware):
                yield Mode(stage, optimizer, parameters, every, micro)


def _agrees(wish: Device | Literal["auto"], offloaded: bool, hardware: Hardware) -> bool:
    if wish == "auto":
        return not offloaded or hardware.device == "cuda"  # a CPU process gains nothing by it
    return (wish is Device.CPU) == offloaded


def _recompute_options(job: Job, stage: int) -> tuple[int, ...]:
    wish, layers = job.config.training.recompute, job.config.model.n_layer
    match wish:
        case "none":
            return (0,)
        case "all":
            return (1,)
        case "auto":
            # Any interval costs one more forward, so the one that needs least memory is best; but under
            # ZeRO-3 an interval above one gathers most blocks once more.
            smallest = smallest_recompute(job)
            return (0, 1, smallest) if stage == 3 and smallest != 1 else (0, smallest)
        case _:
            return (min(wish, layers),)


def smallest_recompute(job: Job) -> int:
    """Blocks per boundary at which boundaries and one segment's activations together are smallest."""
    model, length = job.config.model, job.config.training.sequence_length
    saved = activations.saved_by_block(model, job.backend, 1, length, job.width)
    boundary = activations.boundary(model, length, job.width)
    return min(range(1, model.n_layer + 1), key=lambda k: -(-model.n_layer // k) * boundary + k * saved)


def _micro_batches(job: Job, hardware: Hardware) -> Iterator[int]:
    """Powers of two that divide a rank's share of the batch, largest useful first."""
    training = job.config.training
    if training.micro_batch_size != "auto":
        yield training.micro_batch_size
        return
    enough = max(1, _ENOUGH_TOKENS[hardware.device] // training.sequence_length)
    power = 1 << (enough.bit_length() - 1)
    while power:
        if job.batch_per_rank % power == 0:
            yield power
        power >>= 1
