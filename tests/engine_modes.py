"""Engines of every DeepSpeed mode on two forked ranks, and what they hold, whole."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor

from builders import CPU, make_config, make_plan
from mamba_trainer import engine as engines
from mamba_trainer.config import TrainerConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Mode(NamedTuple):
    zero_stage: int
    precision: str
    recompute_every: int = 0
    offload_optimizer: bool = False
    offload_parameters: bool = False
    master_dtype: str = "fp32"
    clipping: float = 1.0

    def __str__(self) -> str:
        words = [f"zero-{self.zero_stage}", self.precision]
        words += [f"recompute-{self.recompute_every}"] * bool(self.recompute_every)
        words += ["offload-optimizer"] * self.offload_optimizer + ["offload-parameters"] * self.offload_parameters
        words += ["unclipped"] * (not self.clipping) + ["16-bit-masters"] * (self.master_dtype != "fp32")
        return " ".join(words)

    def config(self, training: Mapping[str, Any]) -> TrainerConfig:
        names = ("zero_stage", "precision", "master_dtype")
        # The usual first loss scale of 2**16 overflows: steps skipped by design would shift all others.
        scale = {"fp16": {"initial_scale_power": 8}} if self.precision == "fp16" else {}
        parallelism = {name: getattr(self, name) for name in names}
        return make_config({"training": training, "parallelism": parallelism, "deepspeed": scale})


def create_engine(mode: Mode, training: Mapping[str, Any]) -> engines.Engine:
    if not dist.is_initialized():
        engines.initialize_distributed(CPU)
    # DeepSpeed refuses fp16 on CPUs that have no fast instructions for it.
    get_accelerator().is_fp16_supported = lambda: True
    plan = make_plan(
        mode.zero_stage, mode.precision, recompute_every=mode.recompute_every,
        offload_optimizer=mode.offload_optimizer, offload_parameters=mode.offload_parameters,
    )  # fmt: skip
    return engines.create(mode.config(training), plan, CPU)


def batch(step: int, rank: int, micro: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step * 100 + rank * 10 + micro)
    tokens = torch.randint(50, (2, 13), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]


def full_parameters(engine: engines.Engine) -> dict[str, Tensor]:
    """The fp32 values that the optimizer steps, whole, on every rank."""
    values = masters(engine)
    for layer, mixer in enumerate(engine.model.mixers()):
        # DeepSpeed's own function would gather these in the type of the other masters.
        exact = {f"backbone.layers.{layer}.mixer.{name}": v.clone() for name, v in mixer.fp32_values.items()}
        values |= exact
    return values


def masters(engine: engines.Engine) -> dict[str, Tensor]:
    named = dict(engine.model.named_parameters())
    if engine.deepspeed.zero_optimization_stage() > 0:
        return {name: safe_get_full_fp32_param(parameter).float().clone() for name, parameter in named.items()}
    optimizer = engine.deepspeed.optimizer
    exact: dict[int, Tensor] = {}
    if hasattr(optimizer, "fp32_groups"):
        for narrow, wide in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            exact |= {id(p): master for p, master in zip(narrow, wide, strict=True)}
    return {name: exact.get(id(p), p).detach().float().clone() for name, p in named.items()}
