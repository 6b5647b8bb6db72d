"""`--profile N`: traces N steps with torch.profiler, from the third on, when caches and allocator are warm."""

from __future__ import annotations

from pathlib import Path

import torch

from mamba_trainer.loop import Callback, StepResult, Trainer

_FIRST = 2


class Profile(Callback):
    """Writes `profile/rank0.json` (for chrome://tracing or Perfetto) beside the checkpoints, and prints the top ten."""

    def __init__(self, steps: int, directory: Path) -> None:
        self._steps, self._directory = steps, directory
        self._done = 0
        self._profiler: torch.profiler.profile | None = None

    def on_step_end(self, trainer: Trainer, result: StepResult) -> None:
        self._done += 1
        if self._done == _FIRST:
            self._profiler = torch.profiler.profile()
            self._profiler.start()
        elif self._profiler is not None and self._done == _FIRST + self._steps:
            self._finish()

    def close(self) -> None:
        self._finish()

    def _finish(self) -> None:
        if self._profiler is None:
            return
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        self._directory.mkdir(parents=True, exist_ok=True)
        path = self._directory / "rank0.json"
        profiler.export_chrome_trace(str(path))
        by = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        print(profiler.key_averages().table(sort_by=by, row_limit=10), flush=True)
        print(f"profile of {self._steps} steps: {path}", flush=True)
