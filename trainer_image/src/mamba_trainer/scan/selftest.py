"""A start-up check of the chosen scan kernel against the reference, on random data.

Kernels built for another CUDA or PyTorch can run and give wrong numbers (causal-conv1d#119): better to refuse in
the first second than to find out from a loss curve.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mamba_trainer.contract import UserError
from mamba_trainer.scan import MixerWeights, ScanBackend
from mamba_trainer.scan.torch_scan import TorchScan

#: Relative error (2-norm) of 16-bit results against fp32 arithmetic on the same inputs. Rounding gives 2e-3 to
#: 6e-3 on correct kernels; a wrong one is off by far more.
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 3e-2, torch.float16: 1e-2}


def check(backend: ScanBackend, device: torch.device, dtype: torch.dtype, d_state: int, d_conv: int) -> None:
    """Compares output and every gradient of `backend` with fp32 arithmetic of the reference.

    Raises:
        UserError: a result is off; names it, the error, and the fix.
    """
    ours = _run(backend, device, dtype, d_state, d_conv)
    reference = _run(TorchScan(), device, torch.float32, d_state, d_conv)
    for name, expected in reference.items():
        error = float((ours[name].float() - expected).norm() / expected.norm())
        if not error <= _TOLERANCE[dtype]:
            raise UserError(
                f"The {backend.name} scan kernel gives wrong numbers on {_describe(device)}: relative error of "
                f"{name} is {error:.1e}, allowed {_TOLERANCE[dtype]:.0e} in {dtype}.\n"
                f"It was probably built for another CUDA or PyTorch than torch {torch.__version__} "
                f"(CUDA {torch.version.cuda}). Rebuild mamba-ssm and causal-conv1d against this torch "
                "(./install_deepspeed.sh prints the commands), or set training.scan_backend: torch."
            )


def _run(
    backend: ScanBackend, device: torch.device, dtype: torch.dtype, d_state: int, d_conv: int
) -> dict[str, Tensor]:
    batch, d_model, channels, rank, length = 2, 32, 64, 4, 128
    generator = torch.Generator().manual_seed(1)

    def leaf(*shape: int, scale: float = 1.0, keep_fp32: bool = False) -> Tensor:
        value = (torch.randn(*shape, generator=generator) * scale).to(dtype)
        return value.to(device, torch.float32 if keep_fp32 else dtype).requires_grad_()

    xz = leaf(batch, 2 * channels, length)
    weights = MixerWeights(
        conv_weight=leaf(channels, 1, d_conv, scale=0.5),
        conv_bias=leaf(channels),
        x_proj=leaf(rank + 2 * d_state, channels, scale=channels**-0.5),
        dt_proj=leaf(channels, rank, scale=rank**-0.5),
        out_proj=leaf(d_model, channels, scale=channels**-0.5),
        A=(-torch.arange(1.0, d_state + 1).repeat(channels, 1)).to(device).requires_grad_(),
        D=leaf(channels, keep_fp32=True),
        dt_bias=leaf(channels, keep_fp32=True),
    )
    out = backend.inner(xz, weights)
    upstream = torch.randn(out.shape, generator=generator).to(dtype).to(device, dtype)
    gradients = torch.autograd.grad(out, [xz, *weights], upstream)
    names = ["xz", *MixerWeights._fields]
    return {"output": out.detach()} | {f"gradient of {n}": g for n, g in zip(names, gradients, strict=True)}


def _describe(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "this CPU"
