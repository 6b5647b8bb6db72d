"""Initial weights, tensor by tensor: each is a function of (seed, name, shape) alone.

So a ZeRO-3 rank that builds block by block, and ranks of any world size, start from the same model. The
distributions are mamba_ssm's (`mixer_seq_simple._init_weights`, `mamba_simple.Mamba.__init__`).
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

from mamba_trainer.config import ModelConfig

_DT_MIN, _DT_MAX, _DT_FLOOR = 1e-3, 0.1, 1e-4


def initial_value(name: str, config: ModelConfig, seed: int, device: torch.device) -> Tensor:
    """The fp32 start of the parameter called `name` (full name, as in the state dict), on `device`.

    CPU and CUDA generators differ, so the same seed gives another model on another kind of device.
    """
    shape = config.parameter_shapes()[name] if "layers" not in name else config.block_shapes()[name.split(".", 3)[3]]
    generator = torch.Generator(device=device).manual_seed(_seed_of(seed, name))

    def uniform(bound: float) -> Tensor:
        return torch.empty(shape, device=device).uniform_(-bound, bound, generator=generator)

    match name.rsplit(".", 2)[-2:]:
        case [_, "A_log"]:
            return torch.arange(1.0, shape[1] + 1, device=device).log().repeat(shape[0], 1)
        case [_, "D"] | ["norm" | "norm_f", "weight"]:
            return torch.ones(shape, device=device)
        case ["embedding" | "lm_head", "weight"]:
            return torch.empty(shape, device=device).normal_(std=0.02, generator=generator)
        case ["dt_proj", "bias"]:
            log_uniform = torch.rand(shape, generator=generator, device=device)
            dt = torch.exp(log_uniform * math.log(_DT_MAX / _DT_MIN) + math.log(_DT_MIN)).clamp_min(_DT_FLOOR)
            return dt + torch.log(-torch.expm1(-dt))  # inverse of softplus
        case ["dt_proj", "weight"]:
            return uniform(config.resolved_dt_rank**-0.5)
        case ["conv1d", _]:
            return uniform(config.d_conv**-0.5)
        case ["out_proj", "weight"]:
            # One residual branch per layer: scaled so that the stream's variance does not grow with depth.
            return uniform((shape[1] * config.n_layer) ** -0.5)
        case _:
            return uniform(shape[1] ** -0.5)


def _seed_of(seed: int, name: str) -> int:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
