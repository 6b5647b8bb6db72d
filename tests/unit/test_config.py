import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from builders import make_config
from mamba_trainer import presets
from mamba_trainer.config import ModelConfig, Precision, lay_over, parse_config, read_yaml
from mamba_trainer.contract import UserError
from mamba_trainer.model import MambaLM


def shapes_of_module(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in MambaLM(config).named_parameters()}


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        # What the guide calls 6.89B, 2.84B and its test model.
        ({"d_model": 4864, "n_layer": 45}, 6_922_736_640),
        ({"d_model": 2560, "n_layer": 64}, 2_768_304_640),
        ({"d_model": 2048, "n_layer": 48}, 1_372_145_664),
        # Published models: mamba-130m, and the shape of Falcon Mamba 7B.
        ({"d_model": 768, "n_layer": 24, "vocab_size": 50_280}, 129_135_360),
        ({"d_model": 4096, "n_layer": 64, "vocab_size": 65_024, "tie_embeddings": False}, 7_272_665_088),
    ],
)
def test_parameter_counts_are_the_published_ones(shape: dict[str, Any], expected: int) -> None:
    assert ModelConfig(**shape).parameter_count() == expected


@pytest.mark.parametrize("name", presets.names())
def test_the_shapes_of_a_preset_are_those_of_the_module_that_trains(name: str) -> None:
    config = parse_config({"preset": name}).model
    assert config.parameter_shapes() == shapes_of_module(config)


model_shapes = st.fixed_dictionaries(
    {
        "d_model": st.integers(1, 70),
        "n_layer": st.integers(1, 3),
        "vocab_size": st.integers(2, 90),
        "d_state": st.integers(1, 70),
        "d_conv": st.integers(1, 6),
        "expand": st.integers(1, 4),
        "dt_rank": st.one_of(st.just("auto"), st.integers(1, 9)),
        "pad_vocab_size_multiple": st.integers(1, 20),
        "tie_embeddings": st.booleans(),
    }
).map(ModelConfig.model_validate)


@settings(max_examples=60, deadline=None)
@given(model_shapes)
def test_the_shapes_of_any_legal_model_are_those_of_the_module(config: ModelConfig) -> None:
    assert config.parameter_shapes() == shapes_of_module(config)
    assert config.parameter_count() == sum(math.prod(s) for s in shapes_of_module(config).values())


def test_flops_per_token_are_close_to_six_per_parameter() -> None:
    config = parse_config({"preset": "7b_mamba"}).model
    assert config.flops_per_token() == pytest.approx(6 * config.parameter_count(), rel=0.02)


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ({"preset": "7b_mambo"}, "Did you mean 7b_mamba?"),
        ({"preset": "tiny", "model": {"n_heads": 8}}, "model.n_heads: unknown option"),
        ({"preset": "tiny", "trainning": {}}, "trainning: unknown option"),
        ({"preset": "tiny", "model": {"d_model": "wide"}}, "model.d_model: Input should be a valid integer"),
        ({"preset": "tiny", "model": {"d_model": 0}}, "greater than or equal to 1 (given: 0)"),
        ({"preset": "tiny", "model": {"d_state": 257}}, "model.d_state"),
        ({"preset": "tiny", "training": {"learning_rate": -1}}, "training.learning_rate"),
        (
            {"preset": "tiny", "training": {"warmup_steps": 301, "max_steps": 300}},
            "warmup_steps (301) is larger than max_steps (300)",
        ),
        ({"preset": "tiny", "training": []}, "training"),
        ({}, "model: Field required"),
        (
            {"preset": "tiny", "parallelism": {"num_gpus": 3}, "training": {"micro_batch_size": "auto"}},
            "use 6 or 9",
        ),
        (
            {"preset": "tiny", "parallelism": {"num_gpus": 4}, "training": {"micro_batch_size": 4}},
            "cannot be split over 4 ranks with micro-batches of 4: use 16",
        ),
        ({"preset": "tiny", "parallelism": {"zero_stage": 4}}, "parallelism.zero_stage"),
        (
            {"preset": "tiny", "parallelism": {"zero_stage": 2, "offload_parameters": "cpu"}},
            "needs ZeRO stage 3",
        ),
        (
            {"preset": "tiny", "parallelism": {"zero_stage": 0, "offload_optimizer": "cpu"}},
            "needs ZeRO stage 1, 2",
        ),
        (
            {"preset": "tiny", "parallelism": {"master_dtype": "bf16", "precision": "fp16"}},
            "needs precision bf16",
        ),
        ({"preset": "tiny", "data": {"path": "a", "builtin": "python-stdlib"}}, "not both"),
    ],
)
def test_bad_input_is_answered_with_the_option_and_what_to_do(raw: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as refusal:
        parse_config(raw)
    message = str(refusal.value)
    assert said in message
    assert message.count("\n") < 24, "must fit one screen"


def test_all_mistakes_are_named_at_once() -> None:
    with pytest.raises(UserError) as refusal:
        parse_config({"preset": "tiny", "model": {"d_model": -1, "n_layer": "x"}, "training": {"seed": -1}})
    assert all(name in str(refusal.value) for name in ("model.d_model", "model.n_layer", "training.seed"))


@pytest.mark.parametrize(
    ("content", "said"),
    [("model: [unclosed", "not valid YAML"), ("- a list", "must hold a mapping"), ("\x00", "not valid YAML")],
)
def test_a_broken_yaml_file_is_a_user_error_that_names_it(tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match=said) as refusal:
        read_yaml(path)
    assert "broken.yaml" in str(refusal.value)


def test_a_missing_yaml_file_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        read_yaml(tmp_path / "none.yaml")


def test_an_option_of_the_user_removes_its_rival_from_the_preset() -> None:
    config = parse_config({"preset": "tiny", "data": {"path": "/data/books"}})
    assert config.data.path == Path("/data/books")
    assert config.data.builtin is None
    batch = parse_config({"preset": "7b_mamba", "training": {"global_batch_size": 24}}).training.global_batch_size
    assert batch == 24


def test_laying_over_changes_neither_side() -> None:
    base, over = {"data": {"builtin": "python-stdlib"}}, {"data": {"path": "p"}}
    lay_over(base, over)
    assert (base, over) == ({"data": {"builtin": "python-stdlib"}}, {"data": {"path": "p"}})


def test_the_fingerprint_is_that_of_the_problem_not_of_the_machine() -> None:
    config = make_config()
    moved = make_config(
        {
            "parallelism": {"num_gpus": 1, "zero_stage": 3, "precision": "bf16"},
            "training": {"micro_batch_size": 4, "recompute": "all"},
            "checkpoint": {"directory": "/elsewhere"},
        }
    )
    assert moved.fingerprint() == config.fingerprint()
    for other in (
        {"training": {"learning_rate": 2e-2}},
        {"training": {"seed": 1}},
        {"model": {"d_state": 5}},
        {"data": {"seed": 1}},
    ):
        assert make_config(other).fingerprint() != config.fingerprint(), other


def test_a_configuration_survives_json() -> None:
    config = parse_config({"preset": "3b_mamba", "parallelism": {"num_gpus": 4, "precision": "bf16"}})
    assert parse_config(json.loads(config.model_dump_json())) == config
    assert config.parallelism.precision is Precision.BF16


def test_a_preset_cut_to_a_few_steps_warms_up_for_a_tenth_of_them_unless_told_otherwise() -> None:
    assert parse_config({"preset": "tiny", "training": {"max_steps": 10}}).training.warmup_steps == 1
    assert parse_config({"preset": "tiny", "training": {"max_steps": 400}}).training.warmup_steps == 20
    with pytest.raises(UserError, match=r"warmup_steps \(15\)"):
        parse_config({"preset": "tiny", "training": {"max_steps": 10, "warmup_steps": 15}})
