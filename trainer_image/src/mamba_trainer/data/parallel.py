"""Runs a function over many items in worker processes and yields the results in order.

`ProcessPoolExecutor` cannot serve here: its workers share one pipe for their results, so a worker killed
while it writes a large one (as for lack of memory) leaves the parent waiting for ever. Here each worker has a
pipe of its own, whose end tells either side that the other is gone: the parent never waits for a dead worker,
and no worker outlives its parent, however that ends. Workers are spawned, as the caller may have threads.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any, TypeVar

from mamba_trainer.contract import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class _Failure:
    error: Exception


def available_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ordered_map(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int
) -> Generator[Result, None, None]:
    """`map(function, items)` by `workers` processes; with one worker, in this process."""
    if workers == 1:
        yield from map(function, items)
        return
    with _crew(function, workers) as idle:
        yield from _in_order(idle, enumerate(items), most_ahead=4 * workers)


def _in_order(
    idle: list[Connection], numbered: Iterator[tuple[int, Any]], most_ahead: int
) -> Generator[Any, None, None]:
    """Hands items to idle workers; keeps at most `most_ahead` results behind a slow one."""
    running: dict[Connection, int] = {}
    finished: dict[int, Any] = {}
    following = 0
    upcoming = next(numbered, None)
    while upcoming or running:
        while upcoming and idle and upcoming[0] < following + most_ahead:
            number, item = upcoming
            worker = idle.pop()
            running[worker] = number
            with contextlib.suppress(ConnectionError):  # found dead when its result is asked for
                worker.send(item)
            upcoming = next(numbered, None)
        ready = wait(running)
        for worker in [each for each in running if each in ready]:
            finished[running.pop(worker)] = _receive(worker)
            idle.append(worker)
        while following in finished:
            yield finished.pop(following)
            following += 1


def _receive(worker: Connection) -> Any:
    try:
        result = worker.recv()
    except (EOFError, OSError) as error:  # dead before, or in the midst of writing, its result
        raise UserError(
            "a worker process was killed, most often for lack of memory: run again with fewer --workers"
        ) from error
    if isinstance(result, _Failure):
        raise result.error
    return result


@contextlib.contextmanager
def _crew(function: Callable[[Any], Any], workers: int) -> Iterator[list[Connection]]:
    context = multiprocessing.get_context("spawn")
    processes: list[SpawnProcess] = []
    connections: list[Connection] = []
    try:
        with _interrupts_held_back():
            for _ in range(workers):
                ours, theirs = context.Pipe()
                process = context.Process(target=_work, args=(function, theirs), daemon=True)
                process.start()
                theirs.close()
                processes.append(process)
                connections.append(ours)
        yield list(connections)
    finally:
        for connection in connections:
            connection.close()
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()


@contextlib.contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Processes started here never see a Ctrl-C, which reaches the whole group: their parent ends them."""
    resource_tracker.ensure_running()  # starting it within would lift the block
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _work(function: Callable[[Any], Any], parent: Connection) -> None:
    # One process a core already: threads of the tokenizer would only compete.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            item = parent.recv()
            try:
                result = function(item)
            except Exception as error:
                error.add_note("in a worker process:\n" + traceback.format_exc())
                result = _Failure(error)
            parent.send(result)
