"""The launchers of one job watch each other, so that a dead node ends all others within a minute.

Launcher 0 hosts the store through which the ranks meet, and every launcher beats in it. All calls to the
store are made in one thread, because they may block for as long as a dead node stays silent; the launcher's
loop only reads what that thread last saw. With one node there is no store and torch is never imported.
"""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Protocol

from ..contract import PeerLost, TrainerError
from .inbox import SignalInbox
from .spec import LaunchSpec
from .verdict import GOOD, grace_after, name_of

if TYPE_CHECKING:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

#: Of one try to connect.
_CONNECT_SECONDS = 2.0
#: For the thread to end: left inside torch it may abort the interpreter at exit, and the exit code is lost.
_LEAVE_SECONDS = 5.0
_LOG_LEVEL = "TORCH_CPP_LOG_LEVEL"


class Peers(Protocol):
    #: This launcher is seen by the others. No rank starts before, so whoever trains is watched.
    joined: bool

    def loss(self, now: float) -> str | None:
        """Why this node must end although its own ranks live, as a sentence."""

    def finish(self, code: int, inbox: SignalInbox) -> None:
        """Tell the others how this node ended; whoever hosts the store stays until they know."""


class NoPeers:
    joined = True

    def loss(self, now: float) -> str | None:
        return None

    def finish(self, code: int, inbox: SignalInbox) -> None:
        return


@dataclass
class _Node:
    """What this launcher knows of another one."""

    beats: int = 0
    changed_at: float = 0.0
    #: None while it runs.
    exit_code: int | None = None


class StorePeers:
    def __init__(self, spec: LaunchSpec, attempt: int) -> None:
        self._spec = spec
        self._attempt = attempt
        self._started_at = self._exchanged_at = time.monotonic()
        self._nodes = {node: _Node() for node in range(spec.nnodes) if node != spec.node_rank}
        self.joined = False
        self._broken = ""
        self._exit_code: int | None = None
        self._told = threading.Event()
        self._leaving = threading.Event()
        self._wake = threading.Event()
        # Hosted from here on, so that a busy port is known before any rank starts.
        store = _host(spec, attempt) if spec.node_rank == 0 else None
        self._thread = threading.Thread(target=self._run, args=[store], name="peers", daemon=True)
        self._thread.start()

    def loss(self, now: float) -> str | None:
        for node, known in self._nodes.items():
            if known.exit_code is not None and known.exit_code not in GOOD:
                return f"Node {node} ended with {name_of(known.exit_code)}."
        if 0 in self._nodes and self._nodes[0].exit_code is not None:
            return None  # The job is ending well, and the store with it.
        return self._broken or self._silence(now)

    def _silence(self, now: float) -> str | None:
        limits = self._spec.limits
        if not self.joined:
            return _late(f"Node 0 ({self._spec.master_addr}) did not answer", now - self._started_at, limits.join)
        waits = [("The store on node 0 did not answer", now - self._exchanged_at, limits.peer_silence)]
        waits += [
            (
                f"Node {node} was silent",
                now - known.changed_at,
                limits.peer_silence if known.beats else limits.join,
            )
            for node, known in self._nodes.items()
            if known.exit_code is None
        ]
        return next((late for wait in waits if (late := _late(*wait)) is not None), None)

    def finish(self, code: int, inbox: SignalInbox) -> None:
        self._exit_code = code
        self._wake.set()
        deadline = time.monotonic() + grace_after(code, self._spec.limits)
        while not self._may_leave() and time.monotonic() < deadline and not inbox.interrupted:
            inbox.wait(0.1)
        self._leaving.set()
        self._wake.set()
        self._thread.join(_LEAVE_SECONDS)

    def _may_leave(self) -> bool:
        if self._broken or not self.joined:
            return True
        now, silence = time.monotonic(), self._spec.limits.peer_silence
        if self._spec.node_rank != 0:
            return self._told.is_set()
        return all(n.exit_code is not None or now - n.changed_at > silence for n in self._nodes.values())

    def _run(self, store: TCPStore | None) -> None:
        try:
            store = store or self._join()
            for known in self._nodes.values():
                known.changed_at = time.monotonic()
            while not self._leaving.is_set():
                self._exchange(store)
                self.joined = True
                self._wake.wait(self._spec.limits.peer_beat)
                self._wake.clear()
        except PeerLost as error:
            self._broken = str(error)
        except Exception as error:
            # torch's errors carry a C++ stack; its first line is the sentence.
            self._broken = f"The store on node 0 is gone: {str(error).splitlines()[0]}"

    def _join(self) -> TCPStore:
        deadline = self._started_at + self._spec.limits.join
        while True:
            try:
                store = _store(self._spec, is_master=False)
                break
            except Exception:
                # Its pod may not run yet, nor its name resolve.
                if time.monotonic() > deadline or self._leaving.wait(1.0):
                    raise
        while not (theirs := store.add("launcher/attempt", 0)):
            time.sleep(0.1)
        if theirs - 1 != self._attempt:
            raise PeerLost(f"Node 0 runs attempt {theirs - 1} and this node attempt {self._attempt}.")
        return store

    def _exchange(self, store: TCPStore) -> None:
        me = self._spec.node_rank
        # Only `add`: unlike `get` it never waits for a key that nobody has set.
        store.add(f"launcher/{me}/beat", 1)
        if self._exit_code is not None and not self._told.is_set():
            store.add(f"launcher/{me}/end", self._exit_code + 1)
            self._told.set()
        for node, known in self._nodes.items():
            beats, end = store.add(f"launcher/{node}/beat", 0), store.add(f"launcher/{node}/end", 0)
            self._exchanged_at = time.monotonic()
            if beats != known.beats:
                known.beats, known.changed_at = beats, self._exchanged_at
            known.exit_code = end - 1 if end else None


def _late(what: str, seconds: float, limit: float) -> str | None:
    return f"{what} for {seconds:.0f} s (limit {limit:.0f} s)." if seconds > limit else None


def _host(spec: LaunchSpec, attempt: int) -> TCPStore:
    try:
        store = _store(spec, is_master=True)
    except Exception as error:
        raise TrainerError(
            f"Node 0 cannot serve the rendezvous on port {spec.master_port}: {str(error).splitlines()[0]}\n"
            "Choose another master port, the same on all nodes."
        ) from error
    store.add("launcher/attempt", attempt + 1)
    return store


def _store(spec: LaunchSpec, is_master: bool) -> TCPStore:
    _import_torch_quietly()
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    assert spec.master_port is not None
    store = TCPStore(
        spec.master_addr,
        spec.master_port,
        is_master=is_master,
        timeout=timedelta(seconds=_CONNECT_SECONDS),
        wait_for_workers=False,
    )
    store.set_timeout(timedelta(seconds=spec.limits.peer_silence))
    return store


def _import_torch_quietly() -> None:
    """A lost node is reported in one line of ours; torch would add a C++ stack trace to it."""
    before = os.environ.get(_LOG_LEVEL)
    os.environ.setdefault(_LOG_LEVEL, "ERROR")
    import torch.distributed  # noqa: F401

    # Read once, at import; the ranks keep their own level.
    if before is None:
        del os.environ[_LOG_LEVEL]
