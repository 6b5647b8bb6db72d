"""Presets, files and options lie over one another; each option counts once, under whichever of its names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mamba_trainer.config import TrainerConfig
from mamba_trainer.contract import UserError
from mamba_trainer.plan.cards import named
from mamba_trainer.resolve import Request, read_setting, resolve

CARDS = named("H200", 8)


def config_of(tmp_path: Path, text: str = "", **request: Any) -> TrainerConfig:
    path = tmp_path / "config.yaml"
    path.write_text(text or "{}")
    return resolve(Request(**{"config": path if text else None, "hardware": CARDS, **request})).config


def test_the_guides_name_of_an_option_replaces_the_presets_value_of_it(tmp_path: Path) -> None:
    text = "preset: 1b_mamba\nmodel: {n_layers: 3, max_seq_length: 128}\ntraining: {batch_size: 2}\nnum_gpus: 4\n"
    config = config_of(tmp_path, text)
    assert (config.model.n_layer, config.training.sequence_length) == (3, 128)
    assert (config.training.micro_batch_size, config.parallelism.num_gpus) == (2, 4)


def test_an_option_of_the_command_line_replaces_the_guides_name_of_it_in_a_file(tmp_path: Path) -> None:
    text = "model: {d_model: 64, n_layers: 3, max_seq_length: 128}\nnum_gpus: 4\n"
    settings = ["model.n_layer=5", "training.sequence_length=256"]
    config = config_of(tmp_path, text, settings=settings, num_gpus=2)
    assert (config.model.n_layer, config.training.sequence_length) == (5, 256)
    assert config.parallelism.num_gpus == 2
    assert config_of(tmp_path, text, settings=["model.n_layers=7"]).model.n_layer == 7


def test_two_names_of_one_option_in_the_same_file_must_agree(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model.n_layers \(3\) and model.n_layer \(4\) mean the same and differ"):
        config_of(tmp_path, "model: {d_model: 64, n_layers: 3, n_layer: 4}\n")
    assert config_of(tmp_path, "model: {d_model: 64, n_layers: 3, n_layer: 3}\n").model.n_layer == 3


def test_the_last_of_several_settings_counts_and_beats_file_and_preset(tmp_path: Path) -> None:
    text = "preset: 1b_mamba\ntraining: {learning_rate: 1.0e-3, weight_decay: 0.2}\n"
    config = config_of(tmp_path, text, settings=["training.learning_rate=1e-5", "training.learning_rate=2e-5"])
    assert config.training.learning_rate == 2e-5
    assert config.training.weight_decay == 0.2
    assert config.training.warmup_steps == 1_000


def test_all_gpus_are_used_unless_a_number_is_given_or_the_batch_does_not_divide(tmp_path: Path) -> None:
    assert config_of(tmp_path, preset="1b_mamba").parallelism.num_gpus == 8
    assert config_of(tmp_path, preset="1b_mamba", num_gpus=2).parallelism.num_gpus == 2
    settings = ["training.global_batch_size=12"]
    assert config_of(tmp_path, preset="1b_mamba", settings=settings).parallelism.num_gpus == 6


def test_own_data_take_the_place_of_the_presets_built_in_text(tmp_path: Path) -> None:
    config = config_of(tmp_path, preset="tiny", data=Path("mine"))
    assert (config.data.path, config.data.builtin) == (Path("mine"), None)


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("a.b=1e-4", {"a": {"b": "1e-4"}}),
        ("a.b=[1, 2]", {"a": {"b": [1, 2]}}),
        ("a=null", {"a": None}),
        ("deepspeed.tensorboard.job_name=x=y", {"deepspeed": {"tensorboard": {"job_name": "x=y"}}}),
    ],
)
def test_a_setting_is_read_as_yaml(text: str, read: dict[str, Any]) -> None:
    assert read_setting(text) == read
