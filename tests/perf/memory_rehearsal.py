"""Planned against measured peak memory of one rank of N, for a list of modes, on one GPU of any size.

    python tests/perf/memory_rehearsal.py --out OUT [--only 7b_mamba:4:3:cpu]

Each rehearsal is a process of its own: the memory cap and the fake process group stay until a process ends.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import os
import time
import traceback
from pathlib import Path
from typing import Any, NamedTuple

os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # asking for devices must not create a CUDA context before the fork
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

import deepspeed  # noqa: F401 imported before the forks

from mamba_trainer.config import parse_config
from mamba_trainer.contract import TrainerError
from mamba_trainer.plan import Hardware, plan_training
from mamba_trainer.rehearse import rehearse


class Case(NamedTuple):
    preset: str
    gpus: int
    zero_stage: int
    offload: str
    master: str
    residual_in_fp32: bool
    cap_gb: float


CASES = [
    Case("7b_mamba", 4, 3, "cpu", "fp32", True, 24.5),
    Case("7b_mamba", 4, 3, "cpu", "fp32", True, 23.0),
    Case("7b_mamba", 8, 3, "none", "fp32", True, 24.5),
    Case("7b_mamba", 8, 3, "none", "fp32", True, 23.0),
    Case("7b_mamba", 6, 3, "none", "bf16", True, 24.5),
    Case("7b_mamba", 6, 3, "none", "bf16", True, 23.0),
    Case("7b_mamba", 4, 2, "cpu", "fp32", True, 24.5),
    Case("7b_mamba", 4, 2, "cpu", "fp32", True, 23.0),
    Case("7b_mamba", 4, 3, "none", "bf16", True, 24.5),
]


def run_case(case: Case, results: Any) -> None:
    os.environ["LOCAL_RANK"] = "0"
    try:
        config = parse_config({
            "preset": case.preset,
            "model": {"residual_in_fp32": case.residual_in_fp32},
            "parallelism": {"num_gpus": case.gpus, "zero_stage": case.zero_stage, "offload_optimizer": case.offload,
                            "offload_parameters": "none", "master_dtype": case.master, "precision": "bf16"},
            "training": {"micro_batch_size": 1, "recompute": "all", "global_batch_size": 2 * case.gpus},
        })  # fmt: skip
        # Planned as if the card were large, so that the plan's figure is seen even where it says no.
        plan = plan_training(config, Hardware(gpus=case.gpus, name="rehearsal", gpu_bytes=10**12))
        measured = rehearse(config, plan.model_copy(update={"gpu_budget": int(case.cap_gb * 1e9)}))
        results.put({**measured.__dict__, "planned": plan.gpu_allocated, "terms": dict(plan.gpu_memory.items())})
    except TrainerError as error:
        results.put({"failed": str(error)})
    except BaseException:
        results.put({"failed": traceback.format_exc()[-1500:]})
    results.close()
    results.join_thread()
    os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", help="PRESET:GPUS:STAGE:OFFLOAD, as many as wanted")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for case in CASES:
        if options.only and f"{case.preset}:{case.gpus}:{case.zero_stage}:{case.offload}" not in options.only:
            continue
        started = time.perf_counter()
        context = mp.get_context("fork")
        results = context.Queue()
        child = context.Process(target=run_case, args=(case, results))
        child.start()
        row = results.get()
        child.join()
        rows.append({**case._asdict(), **row})
        (options.out / "rehearsal.json").write_text(json.dumps(rows))
        name = f"{case.preset} 1 of {case.gpus} ZeRO-{case.zero_stage}, offload {case.offload}, master {case.master}"
        name += f", cap {case.cap_gb} GB"
        if "failed" in row:
            print(f"{name}: FAILED {row['failed']}", flush=True)
            continue
        figures = {key: row[key] / 1e9 for key in ("after_start", "peak_allocated", "planned", "peak_reserved")}
        print(
            f"{name}: after start {figures['after_start']:.2f} GB, peak {figures['peak_allocated']:.2f} (planned "
            f"{figures['planned']:.2f}), reserved {figures['peak_reserved']:.2f}; "
            f"last step {row['step_seconds']:.2f} s, losses {row['losses']}, {time.perf_counter() - started:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
