"""The memory table of `--check_memory`: what fits where, and why the guide's table cannot be right."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import BaseModel, ConfigDict

from mamba_trainer.config import Device, TrainerConfig
from mamba_trainer.plan.choice import search
from mamba_trainer.plan.schema import Hardware, gigabytes

GPU_COUNTS = (1, 2, 4, 6, 8)

#: The 7b preset, whose numbers the guide states.
_GUIDE_PARAMETERS = 6_922_736_640

#: (name, ZeRO stage, optimizer, parameters): rows of the table.
_WAYS = (
    ("ZeRO-0 (data parallel)", 0, Device.NONE, Device.NONE),
    ("ZeRO-1", 1, Device.NONE, Device.NONE),
    ("ZeRO-2", 2, Device.NONE, Device.NONE),
    ("ZeRO-3", 3, Device.NONE, Device.NONE),
    ("ZeRO-2 + optimizer on host", 2, Device.CPU, Device.NONE),
    ("ZeRO-3 + optimizer on host", 3, Device.CPU, Device.NONE),
    ("ZeRO-3 + all on host", 3, Device.CPU, Device.CPU),
)


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True)


class Cell(_Data):
    gpus: int
    gpu_bytes: int
    host_bytes: int
    recompute_every: int
    fits: bool


class Row(_Data):
    mode: str
    cells: tuple[Cell, ...]


class MemoryTable(_Data):
    """Estimated need of every mode at micro-batch 1, with recompute where nothing else fits."""

    preset: str | None
    parameters: int
    card: str
    usable_bytes: int | None
    host_bytes: int | None
    rows: tuple[Row, ...]
    notes: tuple[str, ...]


def memory_table(config: TrainerConfig, hardware: Hardware) -> MemoryTable:
    """Modes x GPU counts for this model on this card, the batch per GPU as configured."""
    parameters = config.model.parameter_count()
    rows = tuple(
        Row(mode=name, cells=tuple(_cell(config, hardware, count, stage, *offload) for count in GPU_COUNTS))
        for name, stage, *offload in _WAYS
        if stage or config.parallelism.master_dtype == "fp32"
    )
    return MemoryTable(
        preset=config.preset,
        parameters=parameters,
        card=hardware.name,
        usable_bytes=hardware.gpu_bytes,
        host_bytes=hardware.host_bytes,
        rows=rows,
        notes=tuple(_notes(parameters)),
    )


def _cell(
    config: TrainerConfig, hardware: Hardware, gpus: int, stage: int, optimizer: Device, parameters: Device
) -> Cell:
    wishes = {
        "num_gpus": gpus,
        "zero_stage": stage,
        "offload_optimizer": optimizer,
        "offload_parameters": parameters,
    }
    per_gpu = config.training.global_batch_size // config.parallelism.num_gpus
    training = {"micro_batch_size": 1, "global_batch_size": per_gpu * gpus}
    asked = config.model_copy(
        update={
            "parallelism": config.parallelism.model_copy(update=wishes),
            "training": config.training.model_copy(update=training),
        }
    )
    found = search(asked, hardware.model_copy(update={"nodes": 1}))
    shown = found.chosen or min(found.tried, key=lambda candidate: candidate.footprint.gpu_total)
    return Cell(
        gpus=gpus,
        gpu_bytes=shown.footprint.gpu_total,
        host_bytes=shown.footprint.host_total,
        recompute_every=shown.mode.recompute_every,
        fits=found.chosen is not None,
    )


def _notes(parameters: int) -> Iterator[str]:
    weights = gigabytes(2 * parameters)
    yield "Estimates until measured: the peak of a step, micro-batch 1, CUDA context and allocator included."
    yield f"ZeRO-1 and -2 hold all 16-bit weights on every GPU: {weights} here, whatever the number of GPUs."
    if parameters == _GUIDE_PARAMETERS:
        yield (
            "The guide's 23.1 / 16.1 / 12.6 GB for ZeRO-2 on 4 / 6 / 8 GPUs are 2.1 + 84 / N: the fp32 "
            f"optimizer states alone, without the {weights} of weights, gradients and activations."
        )
