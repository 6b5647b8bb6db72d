"""The selective scan behind one small interface, so that kernels can be exchanged without touching the model.

A backend computes everything of a Mamba-1 mixer between its two large projections' inputs and outputs:
convolution, SiLU, the data-dependent dt, B and C, the scan, the gate and the output projection. That is the unit
which the official fused kernel offers, and a narrower one would forbid its memory savings.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from mamba_trainer.config import ModelConfig
from mamba_trainer.contract import UserError


class MixerWeights(NamedTuple):
    """What a mixer hands to its backend. E = d_inner, N = d_state, R = dt_rank, D = d_model, K = d_conv."""

    conv_weight: Tensor  # (E, 1, K)
    conv_bias: Tensor  # (E)
    x_proj: Tensor  # (R + 2 N, E)
    dt_proj: Tensor  # (E, R)
    out_proj: Tensor  # (D, E)
    A: Tensor  # (E, N) fp32, negative
    D: Tensor  # (E) fp32
    dt_bias: Tensor  # (E) fp32


class ScanBackend(Protocol):
    """One implementation of the mixer's inner part."""

    name: str

    def unsupported(self, model: ModelConfig, device: torch.device) -> str | None:
        """Why this backend cannot serve, with the fix, or None."""

    def inner(self, xz: Tensor, weights: MixerWeights) -> Tensor:
        """xz (batch, 2 E, length): x above z -> (batch, length, D), in the dtype of xz."""


def _backends() -> dict[str, ScanBackend]:
    from mamba_trainer.scan.mamba_ssm_scan import MambaSsmScan
    from mamba_trainer.scan.torch_scan import TorchScan

    return {"mamba_ssm": MambaSsmScan(), "torch": TorchScan()}


def choose(name: str, model: ModelConfig, device: torch.device) -> ScanBackend:
    """The backend called `name`; `auto` is the first, fastest first, that can serve.

    Raises:
        UserError: the named backend cannot serve; says why and what to do.
    """
    backends = _backends()
    if name == "auto":
        return next(b for b in backends.values() if b.unsupported(model, device) is None)
    backend = backends[name]
    if (reason := backend.unsupported(model, device)) is not None:
        raise UserError(f"Scan backend {name!r} cannot be used: {reason}")
    return backend
