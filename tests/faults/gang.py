"""Ranks as processes that say what they are doing, so that a kill can be aimed and afterwards be judged.

A rank writes one small record into a pipe before each act. The kernel holds it even after SIGKILL, so a
checkpoint counts as acknowledged exactly if its record is in the pipe.
"""

from __future__ import annotations

import os
import random
import select
import signal
import socket
import struct
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from mamba_trainer.checkpoint import files, layout, manifest
from mamba_trainer.contract import PeerLost
from ranks import free_port

_RECORD = struct.Struct("<BBqd")


class Phase(IntEnum):
    STARTING = 0
    RESUMED = 1
    TRAINING = 2
    SHARDS = 3
    MANIFEST = 4
    COMMITTED = 5
    ACKNOWLEDGED = 6
    BAD = 7


class Event(NamedTuple):
    rank: int
    phase: Phase
    step: int
    at: float


#: What a rank raises when another one is gone.
PEER_ERRORS = (ConnectionError, PeerLost, dist.DistError, dist.DistNetworkError)


@dataclass
class Rank:
    """What a rank's function gets."""

    rank: int
    world_size: int
    directory: Path
    attempt: int
    port: int
    peers: list[socket.socket]
    _pipe: int
    step: int = 0

    def join(self) -> None:
        """Sets the environment in which torch.distributed finds the other ranks."""
        os.environ |= {
            "RANK": str(self.rank),
            "LOCAL_RANK": str(self.rank),
            "WORLD_SIZE": str(self.world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self.port),
        }
        torch.set_num_threads(1)

    def announce(self, phase: Phase) -> None:
        os.write(self._pipe, _RECORD.pack(self.rank, phase, self.step, time.monotonic()))

    def announce_writes(self) -> None:
        """From now on, each file that the trainer writes announces its phase first."""
        write_file = files.write_file
        phases = {manifest.FILE_NAME: Phase.MANIFEST, layout.LATEST: Phase.COMMITTED}

        def announced(path: Path, produce: Callable[[files.Sink], object]) -> files.Written:
            if path.name != layout.FENCE:
                self.announce(phases.get(path.name, Phase.SHARDS))
            return write_file(path, produce)

        files.write_file = announced

    def gather(self, value: bytes = b"-") -> list[bytes]:
        """Short messages of all ranks, on all ranks."""
        if self.rank == 0:
            values = [value, *(self._receive(peer) for peer in self.peers)]
            for peer in self.peers:
                peer.sendall(b"\n".join(values) + b"\0")
            return values
        self.peers[0].sendall(value + b"\0")
        return self._receive(self.peers[0]).split(b"\n")

    def _receive(self, peer: socket.socket) -> bytes:
        message = b""
        while not message.endswith(b"\0"):
            part = peer.recv(1 << 16)
            if not part:
                raise ConnectionResetError
            message += part
        return message[:-1]


RankFunction = Callable[[Rank], None]


@dataclass
class Gang:
    """The running ranks, and what they have said so far."""

    pids: list[int]
    events: list[Event] = field(default_factory=list)
    _pipe: int = -1

    @classmethod
    def start(cls, function: RankFunction, world_size: int, directory: Path, attempt: int) -> Gang:
        reader, writer = os.pipe()
        port = free_port()
        pairs = [socket.socketpair() for _ in range(1, world_size)]
        pids = []
        for rank in range(world_size):
            peers = [ours for ours, _ in pairs] if rank == 0 else [pairs[rank - 1][1]]
            pid = os.fork()
            if pid == 0:
                os.close(reader)
                for end in {end for pair in pairs for end in pair}.difference(peers):
                    end.close()
                _run(function, Rank(rank, world_size, directory, attempt, port, peers, writer))
            pids.append(pid)
        os.close(writer)
        for pair in pairs:
            for end in pair:
                end.close()
        os.set_blocking(reader, False)
        return cls(pids, _pipe=reader)

    def wait_for(self, condition: Callable[[list[Event]], bool], timeout: float = 120) -> None:
        """Until the events satisfy `condition` or the ranks have ended."""
        deadline = time.monotonic() + timeout
        while not condition(self.events):
            if time.monotonic() > deadline:
                self.kill(random.Random(0))
                raise AssertionError(f"no progress within {timeout} s; last events: {self.events[-5:]}")
            select.select([self._pipe], [], [], 1.0)
            if not self._read():
                return

    def kill(self, rng: random.Random, stagger: float = 0.0) -> None:
        """SIGKILL for all, in random order, the first one `stagger` seconds before the others.

        A rank that had ended by itself is an event too: training stops when it is killed and not before.
        """
        ended = [rank for rank, pid in enumerate(self.pids) if has_ended(pid)]
        for pid in rng.sample(self.pids, len(self.pids)):
            os.kill(pid, signal.SIGKILL)
            time.sleep(stagger)
            stagger = 0.0
        for pid in self.pids:
            os.waitpid(pid, 0)
        while self._read():
            pass
        os.close(self._pipe)
        self.events += [Event(rank, Phase.BAD, -1, time.monotonic()) for rank in ended]

    def _read(self) -> bool:
        try:
            raw = os.read(self._pipe, _RECORD.size * 1000)
        except BlockingIOError:
            return True
        self.events += [Event(rank, Phase(phase), *rest) for rank, phase, *rest in _RECORD.iter_unpack(raw)]
        return bool(raw)


def has_ended(pid: int) -> bool:
    """Whether a child has ended; it can still be waited for."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _run(function: RankFunction, rank: Rank) -> None:
    try:
        function(rank)
    except PEER_ERRORS:
        pass  # killed first; had nobody been killed, the harness would find this process ended
    except BaseException:
        rank.announce(Phase.BAD)
        traceback.print_exc(file=sys.stderr)
    finally:
        os._exit(0)
