"""DeepSpeed's own tools read what the trainer commits."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.checkpoint import ds_to_universal
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

from faults.tiny_engine import Run
from ranks import run_ranks


def train(_rank: int, directory: Path, stage: int) -> dict[str, Any]:
    run = Run(directory, stage=stage)
    run.train(2)
    run.save()
    with deepspeed.zero.GatheredParameters(list(run.engine.module.parameters())):
        return {name: weight.detach().clone() for name, weight in run.engine.module.state_dict().items()}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_to_fp32_and_ds_to_universal_read_a_committed_folder(tmp_path: Path, stage: int) -> None:
    weights = run_ranks(train, 2, tmp_path, stage)[0]
    read = get_fp32_state_dict_from_zero_checkpoint(str(tmp_path), tag="step_2")
    assert set(read) == set(weights)
    for name, weight in weights.items():
        assert torch.equal(read[name], weight), name

    universal = tmp_path / "universal"
    ds_to_universal.main(
        Namespace(
            input_folder=str(tmp_path / "step_2"), output_folder=str(universal), num_extract_workers=1,
            num_merge_workers=1, keep_temp_folder=False, strict=True, inject_missing_state=True,
        )
    )  # fmt: skip
    stored = torch.load(universal / "zero/first.weight/fp32.pt", weights_only=False)
    parameter = stored["param"] if isinstance(stored, dict) else stored  # the tool writes both kinds
    assert torch.equal(parameter.view_as(weights["first.weight"]), weights["first.weight"])
