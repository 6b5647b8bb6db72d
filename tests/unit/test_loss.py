import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mamba_trainer import loss
from mamba_trainer.loss import linear_cross_entropy

TOKENS, WIDTH, VOCABULARY = 13, 6, 11


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(VOCABULARY, (TOKENS,), generator=generator)
    targets[[0, 5]] = -100
    return hidden, weight, targets


def rows_per_chunk(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setattr(loss, "CHUNK_BYTES", rows * 4 * VOCABULARY)


@pytest.mark.parametrize("rows", [1, 4, 12, 13, 14, 10_000])
def test_loss_and_gradients_are_those_of_cross_entropy_wherever_the_chunks_end(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows_per_chunk(monkeypatch, rows)
    hidden, weight, targets = inputs()
    expected = F.cross_entropy(hidden @ weight.t(), targets)
    got = linear_cross_entropy(hidden, weight, targets)
    torch.testing.assert_close(got, expected)
    # A factor other than 1, as a loss scale or an accumulation puts in front.
    for ours, theirs in zip(
        torch.autograd.grad(got * 3, [hidden, weight]),
        torch.autograd.grad(expected * 3, [hidden, weight]),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_sixteen_bit_gradients_keep_their_type_and_its_precision(
    dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows_per_chunk(monkeypatch, 4)
    hidden, weight, targets = inputs(dtype)
    exact_hidden, exact_weight = (t.detach().float().requires_grad_() for t in (hidden, weight))
    got = linear_cross_entropy(hidden, weight, targets)
    expected = F.cross_entropy(exact_hidden @ exact_weight.t(), targets)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=0)
    got.backward()
    expected.backward()
    for ours, theirs in ((hidden, exact_hidden), (weight, exact_weight)):
        assert ours.grad is not None and theirs.grad is not None
        assert ours.grad.dtype == dtype
        assert (ours.grad.float() - theirs.grad).norm() <= tolerance * theirs.grad.norm()


def test_a_sum_that_fp16_cannot_hold_does_not_spoil_the_mean() -> None:
    """70,000 tokens push a weight the same way by 0.5 x 4: their sum is beyond 65,504, their mean is not."""
    count = 70_000
    hidden = torch.full((count, 1), 4.0, dtype=torch.float16, requires_grad=True)
    weight = torch.zeros(2, 1, dtype=torch.float16, requires_grad=True)
    scale = 2.0**10
    (linear_cross_entropy(hidden, weight, torch.zeros(count, dtype=torch.int64)) * scale).backward()
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad.float(), torch.tensor([[-2.0], [2.0]]) * scale)


def test_without_any_target_the_loss_is_zero_and_so_are_the_gradients() -> None:
    hidden, weight, targets = inputs()
    value = linear_cross_entropy(hidden, weight, torch.full_like(targets, -100))
    value.backward()
    assert value == 0
    assert hidden.grad is not None and weight.grad is not None
    assert hidden.grad.abs().sum() == weight.grad.abs().sum() == 0


def test_evaluation_keeps_nothing_for_a_backward() -> None:
    hidden, weight, targets = inputs()
    with torch.no_grad():
        value = linear_cross_entropy(hidden, weight, targets)
    assert not value.requires_grad
    torch.testing.assert_close(value, F.cross_entropy(hidden @ weight.t(), targets).detach())
