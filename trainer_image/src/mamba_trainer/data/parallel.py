"""Runs a function over many items in worker processes and yields the results in order.

Order and a bounded number of items under way are what `prepare` needs beyond `ProcessPoolExecutor`, and that
no worker outlives its parent, however it ends. Workers are spawned, not forked: the caller may have threads.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from mamba_trainer.contract import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")


def available_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ordered_map(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int
) -> Generator[Result, None, None]:
    """`map(function, items)` by `workers` processes; with one worker, in this process."""
    if workers == 1:
        yield from map(function, items)
        return
    executor = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(function,),
    )
    try:
        pending: deque[Future[Result]] = deque()
        for item in items:
            pending.append(executor.submit(_apply, item))
            # Enough to keep all busy behind one slow item, and a bound on what waits in memory.
            if len(pending) > 4 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process was killed, most often for lack of memory: run again with fewer --workers"
        ) from error
    finally:
        executor.shutdown(cancel_futures=True)


def _start_worker(function: Callable[[Item], Result]) -> None:
    global _function
    _function = function
    # Ctrl-C reaches the whole process group; the parent alone decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # One process a core already: threads of the tokenizer would only compete.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


_function: Callable[[Any], Any]


def _apply(item: Any) -> Any:
    return _function(item)
