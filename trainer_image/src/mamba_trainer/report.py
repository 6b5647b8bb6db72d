"""How a rank tells its launcher what it is doing, through memory that both map.

It exists so that a rank stuck in a collective, or killed, is still seen: reading needs nothing of the rank.
A board is one file with one slot for each local rank; only that rank writes its slot. A slot holds two
copies, written in turn, each with a sequence number and a checksum: the reader takes the newest copy that
is whole, so a rank that dies in the middle of a write leaves the copy before it.
"""

from __future__ import annotations

import faulthandler
import math
import mmap
import os
import signal
import struct
import threading
import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from .contract import Env, Phase

#: The launcher sends it to a rank that hangs; see `install_stack_dump`.
STACK_DUMP_SIGNAL = signal.SIGUSR1

BEAT_SECONDS = 1.0
MAX_REASON_BYTES = 64
MAX_MESSAGE_BYTES = 2048

_PHASES = tuple(Phase)


@dataclass(frozen=True)
class RankRecord:
    """What one rank last said. None: nothing to say yet. Times are Unix seconds."""

    rank: int
    local_rank: int
    pid: int | None = None
    phase: Phase = Phase.STARTING
    step: int = 0
    max_steps: int = 0
    #: 0 is a fresh start.
    resumed_from_step: int | None = None
    loss: float | None = None
    learning_rate: float | None = None
    gradient_norm: float | None = None
    tokens_total: int | None = None
    tokens_per_second: float | None = None
    mfu: float | None = None
    skipped_steps: int | None = None
    eval_loss: float | None = None
    eval_bits_per_byte: float | None = None
    last_checkpoint_step: int | None = None
    checkpoint_save_seconds: float | None = None
    quarantined_checkpoints: int | None = None
    peak_memory_bytes: int = 0
    heartbeat: float | None = None
    last_step_time: float | None = None
    error_reason: str = ""
    error_message: str = ""

    @property
    def has_stepped(self) -> bool:
        return self.step > (self.resumed_from_step or 0)


class Snapshot(NamedTuple):
    """All local ranks of one attempt."""

    attempt: int
    ranks: list[RankRecord]


#: The struct code of each annotation: integers use -1 and floats NaN for None.
_CODES = {"int": "q", "int | None": "q", "float | None": "d", "Phase": "B"}
_TEXT_BYTES = {"error_reason": MAX_REASON_BYTES, "error_message": MAX_MESSAGE_BYTES}
_FIELDS = fields(RankRecord)
_PAYLOAD = struct.Struct(
    "<" + "".join(f"{_TEXT_BYTES[f.name]}s" if f.name in _TEXT_BYTES else _CODES[str(f.type)] for f in _FIELDS)
)
_SEAL = struct.Struct("<QI")  # sequence number, CRC-32 of number and payload
_COPY_BYTES = _SEAL.size + _PAYLOAD.size
_SLOT_BYTES = 2 * _COPY_BYTES
_READ_TRIES = 100


def _encode(record: RankRecord) -> bytes:
    return _PAYLOAD.pack(*(_to_wire(f.name, str(f.type), getattr(record, f.name)) for f in _FIELDS))


def _to_wire(name: str, kind: str, value: object) -> object:
    if name in _TEXT_BYTES:
        # The end of an error says most; a character cut in half is dropped when it is read.
        return str(value).encode()[-_TEXT_BYTES[name] :]
    if kind == "Phase":
        return _PHASES.index(Phase(str(value)))
    if value is None:
        return math.nan if kind.startswith("float") else -1
    return value


def _decode(payload: bytes) -> RankRecord:
    values = zip(_FIELDS, _PAYLOAD.unpack(payload), strict=True)
    decoded: dict[str, Any] = {f.name: _from_wire(f.name, str(f.type), value) for f, value in values}
    return RankRecord(**decoded)


def _from_wire(name: str, kind: str, value: bytes | int | float) -> object:
    if isinstance(value, bytes):
        return value.rstrip(b"\0").decode(errors="ignore")
    if kind == "Phase":
        return _PHASES[int(value)]
    missing = value == -1 if kind == "int | None" else math.isnan(value)
    return None if missing else value


def _seal(sequence: int, payload: bytes) -> bytes:
    return _SEAL.pack(sequence, zlib.crc32(payload, sequence & 0xFFFFFFFF)) + payload


def _unseal(copy: bytes) -> tuple[int, bytes] | None:
    sequence, _ = _SEAL.unpack_from(copy)
    payload = copy[_SEAL.size :]
    return (sequence, payload) if copy == _seal(sequence, payload) else None


class _Slot:
    """One rank's place in a mapped board."""

    def __init__(self, memory: mmap.mmap, local_rank: int) -> None:
        self._memory = memory
        self._start = local_rank * _SLOT_BYTES

    def write(self, sequence: int, record: RankRecord) -> None:
        at = self._start + (sequence % 2) * _COPY_BYTES
        self._memory[at : at + _COPY_BYTES] = _seal(sequence, _encode(record))

    def read(self) -> tuple[int, RankRecord] | None:
        start = self._start
        copies = (self._memory[at : at + _COPY_BYTES] for at in (start, start + _COPY_BYTES))
        whole = [copy for copy in map(_unseal, copies) if copy is not None]
        if not whole:
            return None
        sequence, payload = max(whole)
        return sequence, _decode(payload)


class ReportBoard:
    """The launcher's side: creates the file and reads it."""

    def __init__(self, path: Path, memory: mmap.mmap, ranks: int, first_rank: int) -> None:
        self.path = path
        self.ranks = ranks
        self._memory = memory
        self._first_rank = first_rank
        self._latest: dict[int, RankRecord] = {}
        self._slots = [_Slot(memory, local_rank) for local_rank in range(ranks)]

    @classmethod
    def create(cls, path: Path, ranks: int, first_rank: int = 0) -> ReportBoard:
        """A board for local ranks 0.. of which the first is `first_rank` in the job."""
        path.write_bytes(b"\0" * (ranks * _SLOT_BYTES))
        board = cls(path, _map(path), ranks, first_rank)
        board.reset()
        return board

    def reset(self) -> None:
        """Forget an attempt whose ranks are gone."""
        self._memory[:] = b"\0" * len(self._memory)
        for local_rank, slot in enumerate(self._slots):
            self._latest[local_rank] = RankRecord(self._first_rank + local_rank, local_rank)
            slot.write(0, self._latest[local_rank])

    def read(self, local_rank: int) -> RankRecord:
        # The rank writes one copy at a time, so the other is whole; only a reader that was held up between
        # the two meets both while they change.
        for _ in range(_READ_TRIES):
            if (found := self._slots[local_rank].read()) is not None:
                self._latest[local_rank] = found[1]
                break
        return self._latest[local_rank]

    def read_all(self) -> list[RankRecord]:
        return [self.read(local_rank) for local_rank in range(self.ranks)]

    def close(self) -> None:
        self._memory.close()
        self.path.unlink(missing_ok=True)


class RankReporter:
    """The rank's side. Without a launcher every call does nothing."""

    def __init__(self, slot: _Slot | None, record: RankRecord, sequence: int = 0) -> None:
        self._slot = slot
        self._record = record
        self._sequence = sequence
        # Reentrant, as a signal handler may report while the main thread does.
        self._lock = threading.RLock()
        self._stopped = threading.Event()
        if slot is not None:
            self.update(pid=os.getpid())
            threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> RankReporter:
        environ = os.environ if environ is None else environ
        record = RankRecord(int(environ.get("RANK", 0)), int(environ.get("LOCAL_RANK", 0)))
        if not (path := environ.get(Env.REPORT_BOARD)):
            return cls(None, record)
        slot = _Slot(_map(Path(path)), record.local_rank)
        found = slot.read()
        return cls(slot, record, sequence=found[0] if found else 0)

    def update(self, **changes: int | float | str | None) -> None:
        """Set fields of `RankRecord`, for instance `update(phase=Phase.TRAINING, step=7, loss=2.1)`."""
        now = time.time()
        with self._lock:
            record = replace(self._record, **changes, heartbeat=now)  # type: ignore[arg-type]
            if record.step != self._record.step:
                record = replace(record, last_step_time=now)
            self._record = record
            self._sequence += 1
            if self._slot is not None:
                self._slot.write(self._sequence, record)

    def fail(self, reason: str, message: str) -> None:
        """Leave the cause for the termination message; the exit code alone cannot carry it."""
        self.update(error_reason=reason, error_message=message)

    def close(self) -> None:
        """Stop beating."""
        self._stopped.set()

    def __enter__(self) -> RankReporter:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _beat(self) -> None:
        while not self._stopped.wait(BEAT_SECONDS):
            self.update()


def install_stack_dump() -> None:
    """Let the launcher ask this rank for the stacks of all its threads, also while it is stuck in C code."""
    faulthandler.register(STACK_DUMP_SIGNAL, file=2, all_threads=True, chain=False)


def _map(path: Path) -> mmap.mmap:
    with path.open("r+b") as file:
        return mmap.mmap(file.fileno(), 0)
