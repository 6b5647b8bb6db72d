"""The official fused kernels of mamba-ssm and causal-conv1d, where they are installed and work.

`mamba_inner_fn` is called rather than its parts because it recomputes the convolution and dt in its backward.
"""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from mamba_trainer.config import ModelConfig
from mamba_trainer.scan import MixerWeights

_INSTALL = (
    "MAMBA_KEEP_CUDA_BUILD=TRUE pip install --no-build-isolation causal-conv1d mamba-ssm "
    "(without that variable mamba-ssm 2.3 leaves the Mamba-1 kernel out)"
)


class MambaSsmScan:
    name = "mamba_ssm"

    def unsupported(self, model: ModelConfig, device: torch.device) -> str | None:
        if device.type != "cuda":
            return "its kernels need a CUDA device; use scan_backend: torch"
        if not 2 <= model.d_conv <= 4:
            return f"causal-conv1d supports d_conv 2 to 4, not {model.d_conv}; use scan_backend: torch"
        for module in ("selective_scan_cuda", "causal_conv1d_cuda"):
            try:
                importlib.import_module(module)
            except ImportError as error:
                return f"{module} cannot be imported ({error}). Install with: {_INSTALL}"
        return None

    def inner(self, xz: Tensor, weights: MixerWeights) -> Tensor:
        from mamba_ssm.ops.selective_scan_interface import mamba_inner_fn

        out: Tensor = mamba_inner_fn(
            xz,
            weights.conv_weight,
            weights.conv_bias,
            weights.x_proj,
            weights.dt_proj,
            weights.out_proj,
            None,
            weights.A,
            None,
            None,
            weights.D,
            delta_bias=weights.dt_bias,
            delta_softplus=True,
        )
        return out
