"""One real rank of N on any one device: true peak memory of a world that is not there.

torch's `fake` process group answers every collective at once, so partitions, buckets and transients are those of N
ranks while the numbers that flow are meaningless. Under a memory cap everything that asks for free memory must see
the cap: torch's allocator obeys its fraction, but DeepSpeed sizes its start by the free memory of the whole card.
"""

from __future__ import annotations

import os
import resource
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from pydantic import ByteSize, TypeAdapter, ValidationError

from mamba_trainer import engine as engines
from mamba_trainer.config import TrainerConfig
from mamba_trainer.contract import DeviceOutOfMemory, UserError
from mamba_trainer.plan import Hardware, Term, TrainingPlan
from mamba_trainer.plan.hardware import detect
from mamba_trainer.schedule import learning_rate


@dataclass(frozen=True)
class Rehearsal:
    """Bytes on this rank; on CPUs the process's peak resident memory stands for both peaks."""

    after_start: int
    peak_allocated: int
    peak_reserved: int
    step_seconds: float  # compute and host work only: the fake group communicates nothing
    losses: list[float]


def machine(gpus: int, gpu_memory: str) -> Hardware:
    """A machine of `gpus` devices like the one at hand, each with `gpu_memory` usable bytes, as `24.5GB`.

    Raises:
        UserError: no size of memory.
    """
    try:
        size = TypeAdapter(ByteSize).validate_python(gpu_memory)
    except ValidationError:
        raise UserError(f"--gpu-memory takes a size such as 24.5GB or 22.8GiB, not {gpu_memory!r}.") from None
    here = detect(Path.cwd())
    if not here.gpus:
        return here.model_copy(update={"name": "CPU process", "host_bytes": None})
    return here.model_copy(update={"gpus": gpus, "gpu_bytes": int(size), "name": f"a card of {gpu_memory}"})


def rehearse(config: TrainerConfig, plan: TrainingPlan, steps: int = 2) -> Rehearsal:
    """Builds rank 0 of `plan.world_size` and takes `steps` optimizer steps on random tokens, in what memory the
    plan has, the CUDA context taken off.

    Must be called once, in a process of its own: the fake group and the cap stay.

    Raises:
        DeviceOutOfMemory: it does not fit.
    """
    _join_fake_world(plan.world_size)
    device = engines.local_device()
    on_gpu = device.type == "cuda"
    if on_gpu and plan.gpu_budget is not None:
        _cap_memory(device, plan.gpu_budget - plan.gpu_memory[Term.CONTEXT])
    try:
        return _steps(config, plan, device, steps)
    except torch.OutOfMemoryError as error:
        raise DeviceOutOfMemory(f"It does not fit.\n{engines.memory_of_failure(error)}") from error


def _steps(config: TrainerConfig, plan: TrainingPlan, device: torch.device, steps: int) -> Rehearsal:
    on_gpu = device.type == "cuda"
    engine = engines.create(config, plan, device)
    after_start = torch.cuda.memory_allocated() if on_gpu else _resident()
    engine.deepspeed.train()
    generator = torch.Generator(device=device).manual_seed(0)
    shape = (plan.micro_batch_size, config.training.sequence_length + 1)
    losses, started = [], time.perf_counter()
    for step in range(steps):
        if step == steps - 1:
            started = time.perf_counter()
        for _ in range(plan.accumulation_steps):
            window = torch.randint(config.model.vocab_size, shape, generator=generator, device=device)
            loss = engine.micro_step(window[:, :-1], window[:, 1:])
            engine.step(learning_rate(step, config.training))
        losses.append(float(loss))
    return Rehearsal(
        after_start=after_start,
        peak_allocated=torch.cuda.max_memory_allocated() if on_gpu else _resident(),
        peak_reserved=torch.cuda.max_memory_reserved() if on_gpu else _resident(),
        step_seconds=time.perf_counter() - started,
        losses=losses,
    )


def _join_fake_world(size: int) -> None:
    # Else DeepSpeed looks for an accelerator itself and warns where it finds none.
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    import deepspeed
    from torch.testing._internal.distributed.fake_pg import FakeStore

    engines.prepare_deepspeed()
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(size)}
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    deepspeed.init_distributed(dist_backend="fake", auto_mpi_discovery=False)


def _cap_memory(device: torch.device, cap: int) -> None:
    from deepspeed.accelerator import get_accelerator

    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, cap / total), device)
    accelerator = get_accelerator()
    accelerator.total_memory = lambda *_: cap
    accelerator.available_memory = lambda *_: cap - torch.cuda.memory_allocated(device)


def _resident() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
