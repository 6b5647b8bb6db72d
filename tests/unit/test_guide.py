import copy
from pathlib import Path
from typing import Any

import pytest

from mamba_trainer.config import parse_config, read_yaml
from mamba_trainer.contract import UserError

GUIDE = """
model_type: mamba
num_gpus: 4
model: {
  vocab_size: 50257, max_seq_length: 4096, d_model: 4864, n_layers: 45, d_state: 16, d_conv: 4, expand: 2
}
training: {batch_size: 1, gradient_accumulation_steps: 8, learning_rate: 1e-4, max_steps: 200000}
"""


def test_the_yaml_of_the_guide_loads_unchanged(tmp_path: Path) -> None:
    path = tmp_path / "config_7b_mamba.yaml"
    path.write_text(GUIDE)
    config = parse_config(read_yaml(path))
    assert config.model.parameter_count() == 6_922_736_640
    assert (config.model.n_layer, config.model.padded_vocab_size) == (45, 50_264)
    assert config.training.sequence_length == 4096
    assert config.training.learning_rate == 1e-4
    assert config.training.max_steps == 200_000
    assert config.parallelism.num_gpus == 4
    assert config.training.global_batch_size == 1 * 8 * 4
    assert config.tokens_per_step == 131_072


def test_reading_does_not_change_the_raw_configuration() -> None:
    raw = {
        "model_type": "mamba",
        "num_gpus": 2,
        "model": {"d_model": 8, "n_layers": 1},
        "training": {"batch_size": 4},
    }
    before = copy.deepcopy(raw)
    parse_config(raw)
    assert raw == before


def test_both_spellings_may_stand_together_when_they_agree() -> None:
    model = {"d_model": 8, "n_layers": 2, "n_layer": 2}
    assert parse_config({"model": model}).model.n_layer == 2
    with pytest.raises(UserError, match="mean the same and differ"):
        parse_config({"model": model | {"n_layer": 3}})


@pytest.mark.parametrize(
    ("group", "option", "value", "reason"),
    [
        (None, "pipeline_parallel_size", 4, "pipeline parallelism is not built yet: use ZeRO-3"),
        ("parallelism", "tensor_parallel_size", 2, "tensor parallelism is not built yet: use ZeRO-3"),
        ("training", "gradient_compression", "1bit", "gradient compression is not built yet"),
        ("parallelism", "gradient_compression", True, "DeepSpeed has removed its 1-bit optimizers"),
    ],
)
def test_a_mode_that_is_not_built_is_refused_with_the_reason(
    group: str | None, option: str, value: Any, reason: str
) -> None:
    raw: dict[str, Any] = {"preset": "tiny"}
    (raw if group is None else raw.setdefault(group, {}))[option] = value
    with pytest.raises(UserError) as refusal:
        parse_config(raw)
    assert option in str(refusal.value)
    assert reason in str(refusal.value)


@pytest.mark.parametrize("off", [1, False, None, "none"])
@pytest.mark.parametrize("group", [None, "parallelism", "training"])
def test_a_mode_that_is_switched_off_may_be_named(group: str | None, off: Any) -> None:
    raw: dict[str, Any] = {"preset": "tiny"}
    (raw if group is None else raw.setdefault(group, {}))["pipeline_parallel_size"] = off
    assert parse_config(raw) == parse_config({"preset": "tiny"})


@pytest.mark.parametrize(
    ("training", "said"),
    [
        ({"batch_size": "two", "gradient_accumulation_steps": 8}, "must be whole numbers"),
        ({"batch_size": 1, "gradient_accumulation_steps": 8, "global_batch_size": 9}, "remove one of them"),
    ],
)
def test_a_batch_that_does_not_add_up_is_refused(training: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse_config({"model": {"d_model": 8, "n_layer": 1}, "training": training})
