"""Runs a function on N ranks, each a process forked from this one: torch and DeepSpeed are imported only once."""

from __future__ import annotations

import gc
import multiprocessing as mp
import os
import pickle
import queue
import socket
import traceback
from collections.abc import Callable
from typing import Any

# A rank would import these when it builds its first engine: five seconds each time.
import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
import torch


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 180) -> list[Any]:
    """`function(rank, *args)` on every rank of a gloo world; the results in rank order.

    A rank that raises makes this raise with its traceback; a rank that does not end in time is killed.
    """
    context = mp.get_context("fork")
    results: Any = context.Queue()
    port = free_port()
    processes = [
        context.Process(target=_rank, args=(function, rank, world_size, port, results, args), daemon=True)
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    collected: dict[int, Any] = {}
    try:
        while len(collected) < world_size:
            rank, value, error = results.get(timeout=timeout)
            if error:
                raise AssertionError(f"rank {rank} failed:\n{error}")
            collected[rank] = pickle.loads(value)
    except queue.Empty:
        raise AssertionError(f"only ranks {sorted(collected)} of {world_size} answered within {timeout} s") from None
    finally:
        for process in processes:
            process.join(timeout=10)
            if process.is_alive():
                process.kill()
    return [collected[rank] for rank in range(world_size)]


def _rank(
    function: Callable[..., Any], rank: int, world_size: int, port: int, results: Any, args: tuple[Any, ...]
) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    torch.set_num_threads(1)
    gc.freeze()  # what was inherited is no garbage: DeepSpeed collects often, over all of it
    try:
        # Pickled here: the queue's own pickler would hand tensors over as file descriptors of a process that ends.
        results.put((rank, pickle.dumps(function(rank, *args)), None))
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
    results.close()
    results.join_thread()
    os._exit(0)
