"""Runs one launch as its own process: `launcher_driver.py '<JSON>'`, as the command line does."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from mamba_trainer.contract import TrainerError
from mamba_trainer.launch import LaunchSpec, Limits, run
from mamba_trainer.restart import RestartPolicy


def main(settings: dict[str, Any]) -> int:
    limits = Limits(**settings.pop("limits", {}))
    policy = RestartPolicy(**settings.pop("restart_policy", {}))
    plans = settings.pop("smaller_plans", [])
    settings["termination_log"] = Path(settings["termination_log"])
    try:
        return run(
            LaunchSpec(
                limits=limits,
                restart_policy=policy,
                on_replan=lambda: plans.pop(0) if plans else None,
                **settings,
            )
        )
    except TrainerError as error:
        print(error, file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
