"""What becomes of the fp32 values: in training under 16-bit weights, through a checkpoint, and in an export.

A_log, D and the dt bias have a resolution of 1/128 and coarser in bf16: steps of 1e-4 would never reach the
forward. Real engines on two ranks, saved and resumed by the checkpoint manager.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from deepspeed import zero
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from torch import Tensor

from builders import CPU, make_config, make_model
from engine_modes import DTYPES, Mode, batch, create_engine, full_parameters, masters
from mamba_trainer import convert
from mamba_trainer import engine as engines
from mamba_trainer.checkpoint import manifest
from mamba_trainer.checkpoint.manager import CheckpointManager
from mamba_trainer.contract import UserError
from mamba_trainer.generate import load_for_generation
from mamba_trainer.model import FP32_PARAMETERS
from ranks import run_ranks

STEPS, RATE = 4, 1e-4
TRAINING = {"learning_rate": RATE}

SIXTEEN_BIT = [
    Mode(0, "bf16"),
    Mode(1, "bf16"),
    Mode(2, "bf16", recompute_every=1, offload_optimizer=True),
    Mode(3, "bf16"),
    Mode(3, "bf16", offload_optimizer=True, offload_parameters=True),
    Mode(2, "fp16"),
    Mode(0, "fp16"),
    Mode(1, "bf16", master_dtype="bf16"),
    Mode(2, "bf16", master_dtype="bf16"),
    Mode(3, "bf16", master_dtype="bf16"),
]
MODES = [*SIXTEEN_BIT, Mode(0, "fp32"), Mode(2, "fp32"), Mode(3, "fp32")]


class Trained(NamedTuple):
    """Values of one rank."""

    read: dict[str, Tensor]  # what the forward reads of FP32_PARAMETERS after STEPS
    narrow: dict[str, Tensor]  # the 16-bit parameters beside them
    saved: dict[str, Tensor]  # all fp32 values
    resumed: dict[str, Tensor]  # the same in a new engine that has loaded the checkpoint
    resumed_masters: dict[str, Tensor]  # as its optimizer holds them
    went_on: dict[str, Tensor]  # after one more step of the first engine
    resumed_went_on: dict[str, Tensor]  # and of the new one


def train_save_and_resume(rank: int, mode: Mode, directory: Path) -> Trained:
    control = engines.initialize_distributed(CPU)
    engine = create_engine(mode, TRAINING)
    for step in range(STEPS):
        take_step(engine, rank, step)
    read, narrow, saved = fp32_values(engine), sixteen_bit_values(engine), full_parameters(engine)
    manager_of(engine, directory, control).save(STEPS, 8 * STEPS, {})
    take_step(engine, rank, STEPS)
    went_on = full_parameters(engine)

    resumed = create_engine(mode, TRAINING)
    assert manager_of(resumed, directory, control).resume() is not None
    resumed.loaded()
    loaded, loaded_masters = full_parameters(resumed), masters(resumed)
    take_step(resumed, rank, STEPS)
    return Trained(read, narrow, saved, loaded, loaded_masters, went_on, full_parameters(resumed))


def manager_of(engine: engines.Engine, directory: Path, control: object) -> CheckpointManager:
    return CheckpointManager(
        directory, engine.deepspeed, control_group=control, attempt=0, keep=2, config_hash="", log=print
    )  # fmt: skip


def take_step(engine: engines.Engine, rank: int, step: int) -> None:
    for micro in range(2):
        engine.micro_step(*batch(step, rank, micro))
        applied = engine.step(RATE)
    assert applied


def fp32_values(engine: engines.Engine) -> dict[str, Tensor]:
    return {
        f"backbone.layers.{layer}.mixer.{name}": value.clone()
        for layer, mixer in enumerate(engine.model.mixers())
        for name, value in mixer.fp32_values.items()
    }


def sixteen_bit_values(engine: engines.Engine) -> dict[str, Tensor]:
    partitioned = engine.deepspeed.zero_optimization_stage() == 3
    named = {n: p for n, p in engine.model.named_parameters() if n.split("mixer.")[-1] in FP32_PARAMETERS}
    with zero.GatheredParameters(list(named.values()), enabled=partitioned):
        return {name: parameter.detach().clone() for name, parameter in named.items()}


@functools.cache
def fp32_training() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Start and end of the same run in plain PyTorch."""
    config = make_config({"training": TRAINING})
    model = make_model(config.model)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    groups = engines.parameter_groups(model.named_parameters(), config.training.weight_decay, elements=2_000)
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.95), eps=1e-8)
    for step in range(STEPS):
        for rank in range(2):
            for micro in range(2):
                (model(*batch(step, rank, micro)) / 4).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return start, {name: p.detach() for name, p in model.named_parameters()}


Run = Callable[[Mode], tuple[Path, list[Trained]]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A mode's checkpoint and what its ranks say; each mode is trained once."""

    @functools.cache
    def trained(mode: Mode) -> tuple[Path, list[Trained]]:
        directory = tmp_path_factory.mktemp("checkpoints")
        results = run_ranks(train_save_and_resume, 2, mode, directory)
        checkpoint = directory / f"step_{STEPS}"
        record_model(checkpoint)
        return checkpoint, results

    return trained


def record_model(checkpoint: Path) -> None:
    """As the trainer does when it saves."""
    path = checkpoint / manifest.FILE_NAME
    found = manifest.parse(path.read_bytes())
    extra = found.extra | {"model": make_config().model.model_dump(mode="json")}
    path.write_bytes(found.model_copy(update={"extra": extra}).encode())


@pytest.mark.parametrize("mode", SIXTEEN_BIT, ids=str)
def test_the_forward_reads_the_masters_and_not_their_rounding(mode: Mode, run: Run) -> None:
    _, ranks = run(mode)
    for result in ranks:
        assert {name.split("mixer.")[-1] for name in result.read} == set(FP32_PARAMETERS)
        for name, value in result.read.items():
            assert torch.equal(value, result.saved[name])
            assert torch.equal(value, ranks[0].read[name]), "all ranks read the same"
            assert not torch.equal(value, value.to(DTYPES[mode.precision]).float()), name


@pytest.mark.parametrize("mode", SIXTEEN_BIT, ids=str)
def test_tiny_steps_move_the_recurrence_as_in_fp32_training_where_sixteen_bits_stand_still(
    mode: Mode, run: Run
) -> None:
    start, end = fp32_training()
    _, ranks = run(mode)
    for name, value in ranks[0].read.items():
        moved, expected = (value - start[name]).flatten(), (end[name] - start[name]).flatten()
        assert torch.cosine_similarity(moved, expected, dim=0) > 0.97, name
        assert float(moved.norm() / expected.norm()) == pytest.approx(1, rel=0.1), name
        if name.endswith("A_log") and mode.precision == "bf16":
            coarse = start[name] > 1  # where a step of 1e-4 is far below half a unit of the last place
            assert bool((moved.view_as(value)[coarse] != 0).all())
            narrow = ranks[0].narrow[name]
            assert torch.equal(narrow[coarse], start[name].bfloat16()[coarse])


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_a_resumed_engine_holds_what_was_saved_and_goes_on_as_if_it_had_not_stopped(mode: Mode, run: Run) -> None:
    _, ranks = run(mode)
    for result in ranks:
        for name, value in result.saved.items():
            assert torch.equal(result.resumed[name], value), name
            assert torch.equal(result.resumed_went_on[name], result.went_on[name]), name
            if mode.master_dtype == "fp32":  # which resolves every step, and is gathered as it is
                assert not torch.equal(result.went_on[name], value), f"{name}: the step must matter"
                assert torch.equal(result.resumed_masters[name], value), name


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_an_export_is_what_the_optimizer_held_and_what_zero_to_fp32_gives(mode: Mode, run: Run, tmp_path: Path) -> None:
    checkpoint, ranks = run(mode)
    convert.export(checkpoint, tmp_path / "ours", "ours")
    config, weights = convert.open_model(tmp_path / "ours")
    assert config == make_config().model
    assert set(weights.shapes) == set(ranks[0].saved)
    for name, value in ranks[0].saved.items():
        assert torch.equal(weights.read(name), value), name
    if mode.zero_stage:
        theirs = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint.parent), checkpoint.name)
        for name in weights.shapes:
            assert torch.equal(weights.read(name), theirs[name].float()), name


def test_a_checkpoint_generates_as_its_export_does(run: Run, tmp_path: Path) -> None:
    checkpoint, _ = run(Mode(3, "bf16"))
    convert.export(checkpoint, tmp_path / "hf", "hf")
    tokens, _ = batch(0, 0, 0)
    logits = [load_for_generation(source, CPU, torch.float32)(tokens) for source in (checkpoint, tmp_path / "hf")]
    assert torch.equal(*logits)


@pytest.mark.parametrize("damage", ["flipped bit", "cut", "foreign shard", "no manifest", "no model"])
def test_a_checkpoint_that_is_not_what_was_committed_is_never_unpickled(
    damage: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = tmp_path / f"step_{STEPS}"
    original, _ = run(Mode(2, "fp32"))
    checkpoint.mkdir()
    for path in original.iterdir():
        (checkpoint / path.name).write_bytes(path.read_bytes())
    shard = next(checkpoint.glob("*_optim_states.pt"))
    raw = bytearray(shard.read_bytes())
    match damage:
        case "flipped bit":
            raw[len(raw) // 2] ^= 1
            shard.write_bytes(raw)
        case "cut":
            shard.write_bytes(raw[:-1])
        case "foreign shard":
            (checkpoint / "zero_pp_rank_9_mp_rank_00_optim_states.pt").write_bytes(raw)
        case "no manifest":
            (checkpoint / manifest.FILE_NAME).unlink()
        case _:
            path = checkpoint / manifest.FILE_NAME
            path.write_bytes(manifest.parse(path.read_bytes()).model_copy(update={"extra": {}}).encode())
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("something was unpickled"))
    with pytest.raises(UserError, match=r"committed checkpoint|does not record the model"):
        convert.export(checkpoint, tmp_path / "out", "hf")
    assert not (tmp_path / "out").exists()
