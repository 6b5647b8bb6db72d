from pathlib import Path

import pytest

from mamba_trainer import presets
from mamba_trainer.config import parse_config, read_yaml
from mamba_trainer.contract import UserError

CONFIGS = Path(__file__).parents[2] / "trainer_image" / "configs"


@pytest.mark.parametrize("name", ["7b_mamba", "3b_mamba", "1b_mamba"])
def test_the_file_of_a_preset_describes_the_same_run(name: str) -> None:
    from_file = parse_config(read_yaml(CONFIGS / f"config_{name}.yaml"))
    preset = parse_config({"preset": name, "parallelism": {"num_gpus": from_file.parallelism.num_gpus}})
    assert from_file.model == preset.model
    # The guide's file fixes the micro-batch; the preset leaves it to the plan. The step is the same.
    hardware = {"micro_batch_size"}
    assert from_file.training.model_dump(exclude=hardware) == preset.training.model_dump(exclude=hardware)
    assert from_file.fingerprint() == preset.fingerprint()


def test_every_file_belongs_to_a_preset() -> None:
    assert {path.stem.removeprefix("config_") for path in CONFIGS.glob("*.yaml")} <= set(presets.names())


@pytest.mark.parametrize("name", presets.names())
def test_a_preset_is_complete(name: str) -> None:
    config = parse_config({"preset": name})
    assert config.model.parameter_count() > 0
    assert config.training.global_batch_size == 8


@pytest.mark.parametrize("gpus", [1, 4, 6, 8])
def test_a_large_preset_takes_eight_sequences_a_gpu(gpus: int) -> None:
    config = parse_config({"preset": "7b_mamba", "parallelism": {"num_gpus": gpus}})
    assert config.training.global_batch_size == 8 * gpus


def test_an_unknown_preset_is_answered_with_all_that_exist() -> None:
    with pytest.raises(UserError, match="Presets: 7b_mamba, 3b_mamba, 1b_mamba, tiny"):
        presets.get("zzz")
