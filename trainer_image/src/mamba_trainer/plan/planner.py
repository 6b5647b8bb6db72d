"""`plan_training`: configuration and machine in, one resolved plan out, or a refusal with numbers."""

from __future__ import annotations

from collections.abc import Iterator

from mamba_trainer.config import Device, Precision, TrainerConfig
from mamba_trainer.contract import UserError
from mamba_trainer.plan.choice import HEADROOM, Candidate, Search, Way, fits, job_for, modes, search
from mamba_trainer.plan.memory import Job, Mode, checkpoint_bytes, footprint
from mamba_trainer.plan.refusal import refuse
from mamba_trainer.plan.schema import Hardware, TrainingPlan, gigabytes, way_words


def plan_training(config: TrainerConfig, hardware: Hardware) -> TrainingPlan:
    """Resolves every `auto` to the fastest setting that fits, keeping what the user has fixed.

    Takes 0.1 to 1.2 ms on one core of a server (all presets, 1 to 8 GPUs, three cards); a refusal, which
    searches for what would fit, 5 to 40 ms.

    Raises:
        UserError: wrong world size, a precision that the machine lacks, a full disk, or nothing fits. The
            message holds the numbers, the term that is too big and the nearest settings that fit, or says
            that none does.
    """
    _check_ranks(config, hardware)
    found = search(config, hardware)
    _check_precision(found.job.precision, hardware)
    if found.chosen is None:
        raise refuse(config, hardware, found)
    size = checkpoint_bytes(found.job, found.chosen.mode)
    _check_disk(config, hardware, size)
    return _plan(found.job, found.chosen, hardware, size, tuple(_reasons(found, found.chosen, hardware, size)))


def smaller_plan(config: TrainerConfig, hardware: Hardware, plan: TrainingPlan) -> TrainingPlan | None:
    """The next plan to try after `plan` ran out of device memory; None: the settings allow none.

    Same global batch, ZeRO stage and offload, so that checkpoints stay loadable: a smaller micro-batch or
    more recompute, whichever of the allowed comes next below.
    """
    job, failed = job_for(config, hardware), plan.gpu_total
    for mode in modes(job, hardware):
        candidate = Candidate(mode, footprint(job, mode))
        offloads = _device(mode.offload_optimizer), _device(mode.offload_parameters)
        same_states = (mode.zero_stage, *offloads) == (
            plan.zero_stage, plan.offload_optimizer, plan.offload_parameters,
        )  # fmt: skip
        if same_states and candidate.footprint.gpu_total < failed and fits(candidate, config, hardware):
            reason = f"The plan before ({gigabytes(failed)} estimated) ran out of device memory."
            return _plan(job, candidate, hardware, plan.checkpoint_bytes, (reason,))
    return None


def _plan(job: Job, chosen: Candidate, hardware: Hardware, size: int, reasons: tuple[str, ...]) -> TrainingPlan:
    mode, memory = chosen
    keep = job.config.checkpoint.keep
    return TrainingPlan(
        device=hardware.device,
        parameters=job.elements,
        world_size=job.world,
        ranks_per_node=job.ranks_per_node,
        micro_batch_size=mode.micro_batch,
        accumulation_steps=job.batch_per_rank // mode.micro_batch,
        tokens_per_step=job.config.tokens_per_step,
        zero_stage=mode.zero_stage,
        offload_optimizer=_device(mode.offload_optimizer),
        offload_parameters=_device(mode.offload_parameters),
        precision=job.precision,
        recompute_every=mode.recompute_every,
        scan_backend=job.backend,
        sizes=job.sizes,
        gpu_budget=hardware.gpu_bytes,
        gpu_memory=memory.gpu,
        peak_phase=memory.phase,
        host_budget=hardware.host_bytes,
        host_memory=memory.host,
        checkpoint_bytes=size,
        disk_bytes=size * (keep + 1),
        reasons=reasons,
    )


def _device(offloaded: bool) -> Device:
    return Device.CPU if offloaded else Device.NONE


def _check_ranks(config: TrainerConfig, hardware: Hardware) -> None:
    asked, present = config.parallelism.num_gpus, hardware.gpus * hardware.nodes
    if hardware.gpus and asked > present:
        machine = f"{hardware.gpus} x {hardware.name}" + (f" on {hardware.nodes} nodes" if hardware.nodes > 1 else "")
        raise UserError(f"{asked} GPUs are asked for, but there are {present} ({machine}): use --num_gpus {present}.")


def _check_precision(precision: Precision, hardware: Hardware) -> None:
    if precision not in hardware.precisions:
        able = ", ".join(hardware.precisions)
        raise UserError(f"{hardware.name} cannot compute in {precision}: set parallelism.precision to one of {able}.")


def _check_disk(config: TrainerConfig, hardware: Hardware, size: int) -> None:
    saves = config.checkpoint.interval > 0 or config.checkpoint.save_final
    if saves and hardware.disk_bytes is not None and hardware.disk_bytes < size:
        raise UserError(
            f"A checkpoint takes {gigabytes(size)}, but {config.checkpoint.directory} has "
            f"{gigabytes(hardware.disk_bytes)} free. Free some space, or set checkpoint.directory to a "
            "larger disk."
        )


def _reasons(found: Search, chosen: Candidate, hardware: Hardware, size: int) -> Iterator[str]:
    """Why this mode, in sentences; only what was chosen for the user or should worry them."""
    config, (mode, memory) = found.job.config, chosen
    if config.parallelism.precision == "auto":
        yield {
            Precision.FP32: "Precision fp32: CPUs are slow in 16 bit.",
            Precision.BF16: "Precision bf16: it has the range of fp32, so the loss needs no scaling.",
            Precision.FP16: f"Precision fp16: {hardware.name} has no bf16.",
        }[found.job.precision]
    yield from _passed_over(found, mode)
    if hardware.gpu_bytes is not None and memory.gpu_total > (1 - HEADROOM) * hardware.gpu_bytes:
        yield (
            f"Warning: your settings leave less than {HEADROOM:.0%} of the GPU free, and the estimate may be "
            "off by more."
        )
    if (mode.offload_optimizer or mode.offload_parameters) and hardware.host_bytes is None:
        yield f"Offload needs {gigabytes(memory.host_total)} of host memory per node; it was not checked."
    needed = size * (config.checkpoint.keep + 1)
    if hardware.disk_bytes is not None and hardware.disk_bytes < needed:
        yield (
            f"Warning: {config.checkpoint.keep} checkpoints and the next one take {gigabytes(needed)}, and "
            f"{gigabytes(hardware.disk_bytes)} are free: lower checkpoint.keep."
        )


def _passed_over(found: Search, mode: Mode) -> Iterator[str]:
    """The faster ways to split the states, with the least that each needs."""
    least: dict[Way, Candidate] = {}
    for candidate in found.tried[:-1]:
        way = candidate.mode[:3]
        if way != mode[:3] and (way not in least or candidate.footprint.gpu_total < least[way].footprint.gpu_total):
            least[way] = candidate
    if not least:
        return
    needs = []
    for way, candidate in least.items():
        memory = candidate.footprint
        host = f" and {gigabytes(memory.host_total)} of host memory" if way[1] or way[2] else ""
        needs.append(f"{way_words(*way)} ({gigabytes(memory.gpu_total)} per GPU{host})")
    yield f"Faster, but does not fit: {'; '.join(needs)}."
