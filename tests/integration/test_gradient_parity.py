"""A step in every mode of DeepSpeed is the step that plain PyTorch makes.

Real engines over gloo on two ranks, with what has broken them before: tied embeddings, accumulation,
recompute, a chunked loss. The reference is one process, torch's AdamW and `clip_grad_norm_`.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import pytest
import torch
from deepspeed.utils import safe_get_full_grad
from torch import Tensor

from builders import make_config, make_model
from engine_modes import DTYPES, Mode, batch, create_engine, full_parameters
from mamba_trainer import engine as engines
from mamba_trainer import loss as losses
from mamba_trainer.model import FP32_PARAMETERS, LMHead
from ranks import run_ranks

RANKS, ACCUMULATION, STEPS, RATE = 2, 2, 3, 1e-2
#: Adam divides by the root of the second moment: with a tiny epsilon it would turn rounding into whole steps.
TRAINING = {"adam_epsilon": 1e-3}
#: Relative error (2-norm) of each tensor, by the type in which gradients are computed.
TOLERANCE = {"fp32": 1e-4, "bf16": 6e-2, "fp16": 1e-2}


MODES = [
    Mode(0, "fp32"),
    Mode(1, "fp32", recompute_every=1),
    Mode(2, "fp32", recompute_every=2),
    Mode(3, "fp32", recompute_every=2),
    Mode(1, "fp32", offload_optimizer=True),
    Mode(2, "fp32", offload_optimizer=True, recompute_every=1),
    Mode(3, "fp32", offload_optimizer=True),
    Mode(3, "fp32", offload_optimizer=True, offload_parameters=True, recompute_every=1),
    Mode(0, "bf16", recompute_every=1),
    Mode(1, "bf16"),
    Mode(2, "bf16", recompute_every=1),
    Mode(3, "bf16", recompute_every=2),
    Mode(2, "bf16", offload_optimizer=True, recompute_every=1),
    Mode(3, "bf16", offload_optimizer=True, offload_parameters=True, recompute_every=2),
    Mode(0, "fp16"),
    Mode(2, "fp16", recompute_every=1),
    Mode(3, "fp16"),
    Mode(1, "bf16", master_dtype="bf16"),
    Mode(2, "bf16", recompute_every=1, master_dtype="bf16"),
    Mode(3, "bf16", recompute_every=1, master_dtype="bf16"),
]

#: Clipping computes a norm over all gradients, which would find a bad one by the way.
UNCLIPPED = [Mode(stage, "fp32", clipping=0.0) for stage in range(4)] + [Mode(2, "bf16", clipping=0.0)]


class Trained(NamedTuple):
    """What a rank, or the reference, has to say about its steps."""

    losses: list[float]
    norms: list[float]
    applied: list[bool]
    gradients: dict[str, Tensor]  # of the first step, before clipping
    parameters: dict[str, Tensor]  # after STEPS
    after_bad_step: dict[str, Tensor]
    bad_step_applied: bool


def train_on_rank(rank: int, mode: Mode, bug: str | None) -> Trained:
    losses.CHUNK_BYTES = 5 * 4 * 56  # five of 24 rows at a time
    if bug == "one use of the tied weight":
        loses_the_gradient_of_its_weight(LMHead)
    engine = create_engine(mode, TRAINING | {"gradient_clipping": mode.clipping})
    means, norms, applied, gradients = [], [], [], {}
    for step in range(STEPS):
        total = 0.0
        for micro in range(ACCUMULATION):
            weight = 0.0 if bug == "all but the last micro-batch" and micro == 0 else 1.0
            weight *= 0.0 if bug == "one rank" and rank == 1 else 1.0
            total += float(micro_step(engine, *batch(step, rank, micro), weight))
            if step == 0 and micro == ACCUMULATION - 1:
                gradients = full_gradients(engine)
            changed = engine.step(RATE)
        means.append(total / ACCUMULATION)
        norms.append(engine.gradient_norm())
        applied.append(changed)
    parameters = full_parameters(engine)
    for micro in range(ACCUMULATION):  # a gradient that one rank alone sees break
        micro_step(engine, *batch(9, rank, micro), float("inf") if rank == 1 else 1.0)
        bad_step_applied = engine.step(RATE)
    return Trained(means, norms, applied, gradients, parameters, full_parameters(engine), bad_step_applied)


def micro_step(engine: engines.Engine, tokens: Tensor, targets: Tensor, weight: float) -> Tensor:
    """`Engine.micro_step` with the loss multiplied on its way into the backward."""
    if weight == 1.0:
        return engine.micro_step(tokens, targets)
    loss: Tensor = engine.deepspeed(tokens, targets)
    engine.backward(loss * weight)
    return loss.detach()


def loses_the_gradient_of_its_weight(head: type[LMHead]) -> None:
    """As DeepSpeed#8224: of a weight that is used twice, the gradient of one use is lost silently."""

    def forward(self: LMHead, hidden: Tensor, targets: Tensor) -> Tensor:
        return losses.linear_cross_entropy(hidden.flatten(0, 1), self.weight.detach(), targets.flatten())

    head.forward = forward  # type: ignore[assignment]


def full_gradients(engine: engines.Engine) -> dict[str, Tensor]:
    scale = engine.deepspeed.optimizer.loss_scale if engine.deepspeed.fp16_enabled() else 1.0
    named = engine.model.named_parameters()
    return {name: safe_get_full_grad(parameter).float().cpu().clone() / scale for name, parameter in named}


@functools.cache
def reference() -> Trained:
    config = make_config({"training": TRAINING})
    model = make_model(config.model)
    groups = engines.parameter_groups(model.named_parameters(), config.training.weight_decay, elements=2_000)
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.95), eps=TRAINING["adam_epsilon"])
    means, norms, gradients = [], [], {}
    for step in range(STEPS):
        total = 0.0
        for rank in range(RANKS):
            for micro in range(ACCUMULATION):
                loss = model(*batch(step, rank, micro)) / (RANKS * ACCUMULATION)
                loss.backward()
                total += loss.item()
        gradients = gradients or {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        means.append(total)
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
        optimizer.step()
        optimizer.zero_grad()
    parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
    return Trained(means, norms, [True] * STEPS, gradients, parameters, parameters, False)


@functools.cache
def trained(mode: Mode, bug: str | None = None) -> list[Trained]:
    return run_ranks(train_on_rank, RANKS, mode, bug)


def relative_error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


def assert_same_gradients(ranks: list[Trained], tolerance: float) -> None:
    expected = reference().gradients
    for result in ranks:
        assert result.gradients.keys() == expected.keys()
        errors = {name: relative_error(result.gradients[name], expected[name]) for name in expected}
        worst = max(errors, key=lambda name: errors[name])
        assert errors[worst] <= tolerance, f"gradient of {worst} is off by {errors[worst]:.2g}"


def assert_same_steps(ranks: list[Trained], mode: Mode) -> None:
    """How far each parameter has gone from its start, which is little against the parameter itself."""
    ours, theirs = starts(DTYPES[mode.precision]), starts(torch.float32)
    for result in ranks:
        for name, parameter in reference().parameters.items():
            expected = parameter - theirs[name]
            allowed = 2 * TOLERANCE[mode.precision] * float(expected.norm())
            if mode.master_dtype == "bf16" and name.split("mixer.")[-1] not in FP32_PARAMETERS:
                # A step is rounded to the 8 bits of a master, which may swallow it: the price of that mode.
                allowed += STEPS * 2**-9 * float(parameter.norm())
            error = float((result.parameters[name] - ours[name] - expected).norm())
            assert error <= allowed, f"the steps of {name} are off by {error:.2g}, allowed {allowed:.2g}"


def starts(dtype: torch.dtype) -> dict[str, Tensor]:
    """DeepSpeed's fp32 masters start from weights in `dtype`, except those that `Fp32Values` sets."""
    return {
        name: p.detach() if name.split("mixer.")[-1] in FP32_PARAMETERS else p.detach().to(dtype).float()
        for name, p in make_model(make_config().model).named_parameters()
    }


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_gradients_are_those_of_plain_pytorch(mode: Mode) -> None:
    assert_same_gradients(trained(mode), TOLERANCE[mode.precision])


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_losses_and_gradient_norms_are_those_of_plain_pytorch(mode: Mode) -> None:
    ranks, expected = trained(mode), reference()
    over_ranks = [sum(pair) / RANKS for pair in zip(*(result.losses for result in ranks), strict=True)]
    assert over_ranks == pytest.approx(expected.losses, rel=TOLERANCE[mode.precision] / 10)
    for result in ranks:
        assert result.norms == pytest.approx(expected.norms, rel=TOLERANCE[mode.precision])
        assert result.applied == [True] * STEPS


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_three_steps_are_those_of_adamw_after_clipping(mode: Mode) -> None:
    assert_same_steps(trained(mode), mode)


@pytest.mark.parametrize("mode", [*MODES, *UNCLIPPED], ids=str)
def test_a_gradient_that_is_not_finite_on_one_rank_is_skipped_on_all(mode: Mode) -> None:
    for result in trained(mode):
        assert result.applied == [True] * STEPS
        assert not result.bad_step_applied
        for name, before in result.parameters.items():
            assert torch.equal(result.after_bad_step[name], before), name


BUGS = {
    "one use of the tied weight": "backbone.embedding.weight",
    "all but the last micro-batch": "is off by",
    "one rank": "is off by",
}


@pytest.mark.parametrize("bug", BUGS)
@pytest.mark.parametrize("mode", [Mode(2, "bf16", recompute_every=1), Mode(3, "fp32")], ids=str)
def test_the_comparison_would_catch_a_mode_that_loses_the_gradient_of(bug: str, mode: Mode) -> None:
    ranks: list[Any] = trained(mode, bug)
    with pytest.raises(AssertionError, match=BUGS[bug]):
        assert_same_gradients(ranks, TOLERANCE[mode.precision])
    with pytest.raises(AssertionError, match="the steps of"):
        assert_same_steps(ranks, mode)
