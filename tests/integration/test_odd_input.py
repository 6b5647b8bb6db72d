"""What a user may do that nobody planned for: the run goes on, or the answer says what to do."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

from trainer_harness import Training, checkpoints, options, paced


def _killed_once(rank: int, attempt: int) -> None:
    paced(rank, attempt)
    if rank == 1 and attempt == 0:
        threading.Timer(0.6, os.kill, (os.getpid(), signal.SIGKILL)).start()


def test_a_run_that_was_restarted_and_then_stopped_resumes_when_it_is_started_again(tmp_path: Path) -> None:
    words = options(tmp_path, steps=60, checkpoint__interval=5)
    first = Training(tmp_path, words, before=_killed_once)
    first.reaches(40)
    first.interrupt()
    assert first.wait() == 75, first.text()
    assert "attempt 1 in" in first.text()

    again = Training(tmp_path, words)
    assert again.wait() == 0, again.text()
    assert "final" in checkpoints(tmp_path)
    assert "resumed from" in again.text().rpartition("stopped on request")[2]
