"""A run, resolved: the configuration and the plan that every rank works from, and how it travels to them.

The launcher (or the operator) resolves once and writes one file; ranks read it and never plan again.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from mamba_trainer.config import TrainerConfig
from mamba_trainer.contract import UserError
from mamba_trainer.plan import Hardware, TrainingPlan


class Run(BaseModel):
    model_config = ConfigDict(frozen=True)

    schema_version: int = 1
    config: TrainerConfig
    plan: TrainingPlan
    hardware: Hardware

    def shard_layout(self) -> dict[str, Any]:
        """What decides how DeepSpeed cuts a state into shards, beyond world size and ZeRO stage."""
        return {
            "precision": self.plan.precision.value,
            "masterDtype": self.config.parallelism.master_dtype,
            "parameterGroupElements": self.plan.sizes.param_group_elements,
            "subGroupElements": self.plan.sizes.sub_group_elements,
        }

    def write(self, path: Path) -> None:
        """Atomically: a rank must never read half a file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}")
        partial.write_text(self.model_dump_json(indent=1), encoding="utf-8")
        partial.replace(path)

    @classmethod
    def read(cls, path: Path) -> Run:
        """
        Raises:
            UserError: missing, or written by another version of the trainer.
        """
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"Cannot read the resolved run {path}: {error.strerror}.") from None
        except ValidationError as error:
            raise UserError(
                f"{path} was not written by this version of the trainer: {error.errors()[0]['msg']}"
            ) from None
