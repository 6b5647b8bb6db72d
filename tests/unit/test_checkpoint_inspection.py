"""`mamba-train verify`: what it says must agree with what a resume would do."""

from __future__ import annotations

from pathlib import Path

import pytest

from mamba_trainer.checkpoint.commit import REASON_FILE
from mamba_trainer.checkpoint.inspection import inspect
from mamba_trainer.contract import UserError


def set_aside(directory: Path, name: str) -> None:
    (directory / f"{name}.quarantine").mkdir(parents=True)
    (directory / f"{name}.quarantine" / REASON_FILE).write_text("a shard was damaged")


def test_only_quarantined_checkpoints_are_not_sound_as_a_resume_ends_with_72_there(tmp_path: Path) -> None:
    set_aside(tmp_path, "step_1")
    (finding,) = inspect(tmp_path)
    assert not finding.sound
    assert "a shard was damaged" in str(finding)


def test_an_empty_folder_has_no_checkpoint_to_verify(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no checkpoint"):
        list(inspect(tmp_path))
