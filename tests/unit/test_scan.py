from typing import Any

import pytest
import torch
from torch import Tensor

from builders import CPU, make_model_config
from mamba_trainer import scan
from mamba_trainer.contract import UserError
from mamba_trainer.scan import MixerWeights, selftest, torch_scan
from mamba_trainer.scan.torch_scan import SelectiveScan, TorchScan


def recurrence(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """Equations 2 and 3 of the paper, written down step by step and left to autograd."""
    state = u.new_zeros(u.shape[1], u.shape[2], A.shape[1])
    outputs = []
    for t in range(u.shape[0]):
        decay = torch.exp(dt[t].unsqueeze(-1) * A)
        state = decay * state + (dt[t] * u[t]).unsqueeze(-1) * B[t].unsqueeze(1)
        outputs.append((state * C[t].unsqueeze(1)).sum(-1))
    return torch.stack(outputs)


def scan_inputs(
    batch: int, length: int, channels: int, n: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    dt = normal(length, batch, channels).exp() * 0.3
    A = -normal(channels, n).exp()
    tensors = (normal(length, batch, channels), dt, A, normal(length, batch, n), normal(length, batch, n))
    return tuple(t.requires_grad_() for t in tensors)


@pytest.mark.parametrize("chunk", [1, 3, 4, 8, 100])
def test_the_scan_is_the_recurrence_wherever_its_chunks_end(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_scan, "_chunk_length", lambda elements, length: min(chunk, length))
    inputs = scan_inputs(batch=2, length=8, channels=3, n=4)
    got, expected = SelectiveScan.apply(*inputs), recurrence(*inputs)
    torch.testing.assert_close(got, expected)
    upstream = torch.randn(expected.shape, dtype=expected.dtype, generator=torch.Generator().manual_seed(1))
    for ours, theirs in zip(
        torch.autograd.grad(got, inputs, upstream),
        torch.autograd.grad(expected, inputs, upstream),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_the_gradients_of_the_scan_are_its_derivatives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_scan, "_chunk_length", lambda elements, length: 2)
    assert torch.autograd.gradcheck(SelectiveScan.apply, scan_inputs(batch=2, length=5, channels=2, n=3))


def test_a_chunk_fits_its_work_tensor_but_is_never_empty_or_longer_than_the_sequence() -> None:
    assert torch_scan._chunk_length(2**12, 4096) * 2**12 == torch_scan._CHUNK_ELEMENTS
    assert torch_scan._chunk_length(2**40, 4096) == 8
    assert torch_scan._chunk_length(1, 100) == 100
    assert torch_scan._chunk_length(2**40, 3) == 3


class Faulty(TorchScan):
    """The reference with one mistake, as a kernel built for another CUDA might make."""

    name = "faulty"

    def __init__(self, mistake: str) -> None:
        self.mistake = mistake

    def inner(self, xz: Tensor, weights: MixerWeights) -> Tensor:
        match self.mistake:
            case "sign of D":
                return super().inner(xz, weights._replace(D=-weights.D))
            case "gradient of A":
                return super().inner(xz, weights._replace(A=_TwiceTheGradient.apply(weights.A)))
            case "no dt bias":
                return super().inner(xz, weights._replace(dt_bias=weights.dt_bias * 0))
            case "last token not finite":
                out = super().inner(xz, weights).clone()
                out[:, -1] = float("nan")
                return out
            case _:
                return super().inner(xz, weights)


class _TwiceTheGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        return grad_outputs[0] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("d_state", "d_conv"), [(16, 4), (8, 2), (64, 3), (1, 1)])
def test_the_self_test_passes_a_correct_kernel(dtype: torch.dtype, d_state: int, d_conv: int) -> None:
    selftest.check(Faulty("none"), CPU, dtype, d_state, d_conv)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("mistake", "where"),
    [
        ("sign of D", "output"),
        ("no dt bias", "output"),
        ("last token not finite", "output"),
        ("gradient of A", "gradient of A"),
    ],
)
def test_the_self_test_refuses_a_wrong_kernel_and_says_the_fix(mistake: str, where: str, dtype: torch.dtype) -> None:
    with pytest.raises(UserError) as refusal:
        selftest.check(Faulty(mistake), CPU, dtype, 16, 4)
    message = str(refusal.value)
    assert f"relative error of {where} is" in message
    assert "training.scan_backend: torch" in message


def test_on_a_cpu_auto_is_the_reference_and_the_fused_kernels_are_refused() -> None:
    config = make_model_config()
    assert scan.choose("auto", config, CPU).name == "torch"
    with pytest.raises(UserError, match="need a CUDA device; use scan_backend: torch"):
        scan.choose("mamba_ssm", config, CPU)


def test_the_fused_convolution_is_refused_for_taps_it_does_not_have() -> None:
    with pytest.raises(UserError, match="supports d_conv 2 to 4, not 5"):
        scan.choose("mamba_ssm", make_model_config(d_conv=5), torch.device("cuda"))
