"""What a launch is asked to do, checked before anything is started."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..contract import Env, UserError
from ..restart import RestartPolicy


@dataclass(frozen=True)
class Limits:
    """Times in seconds. The defaults keep the promise that a lost rank never holds the others for 60 s."""

    #: How often the launcher looks at the board; exits and signals wake it at once.
    poll: float = 0.5
    #: After a failure whose cause is known, for the other ranks to end by themselves.
    failure_grace: float = 5.0
    #: After a 76, for the rank that is the cause to end too.
    peer_lost_grace: float = 15.0
    #: After a rank ended with 0 or 75: all have saved by then.
    finish_grace: float = 60.0
    #: Between asking for stacks and killing.
    stack_dump: float = 2.0
    #: A rank that survives SIGKILL this long is stuck in the kernel; the launcher ends without it.
    kill: float = 20.0

    #: A rank that does not beat.
    heartbeat: float = 60.0
    #: Training but not stepping: the floor, and the multiple of the slowest recent step.
    step_floor: float = 60.0
    step_factor: float = 10.0
    #: Until a pace is known: start, compilation, the first steps.
    first_steps: float = 1800.0
    #: Loading, evaluating, saving. A save after a requested stop has no limit at all.
    other_phase: float = 7200.0

    #: Launchers of one job: time to find each other, pace of beats, silence taken for death.
    join: float = 900.0
    peer_beat: float = 2.0
    peer_silence: float = 25.0


def _termination_log_from_env() -> Path | None:
    path = os.environ.get(Env.TERMINATION_LOG)
    return Path(path) if path else None


@dataclass(frozen=True)
class LaunchSpec:
    #: What every rank runs, for instance [sys.executable, "-m", "mamba_trainer.main", ...].
    command: Sequence[str]
    nproc_per_node: int = 1
    nnodes: int = 1
    node_rank: int = 0
    master_addr: str = "127.0.0.1"
    #: None: any free port. On one machine a busy one is replaced.
    master_port: int | None = None
    #: Added to the environment of the ranks.
    env: Mapping[str, str] = field(default_factory=dict)
    #: Restart failed attempts here. Never in a pod: the operator restarts the whole gang at once.
    supervise: bool = False
    attempt: int = 0
    termination_log: Path | None = field(default_factory=_termination_log_from_env)
    #: Serve /status and /metrics there; None serves nothing.
    status_port: int | None = None
    #: Called after an out-of-memory end: the rank command of a smaller plan, or None if there is none.
    on_replan: Callable[[], Sequence[str] | None] = lambda: None
    restart_policy: RestartPolicy = field(default_factory=RestartPolicy)
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        for broken, message in (
            (not self.command, "There is no command to run."),
            (self.nproc_per_node < 1, f"{self.nproc_per_node} processes per node: at least 1 is needed."),
            (not 0 <= self.node_rank < self.nnodes, f"Node rank {self.node_rank} of {self.nnodes} nodes."),
            (self.nnodes > 1 and self.master_port is None, "Several nodes need a master port that all know."),
            (
                self.nnodes > 1 and self.supervise,
                "Restarting several nodes is the operator's part, not ours.",
            ),
        ):
            if broken:
                raise UserError(message)

    @classmethod
    def in_pod(cls, command: Sequence[str], environ: Mapping[str, str] | None = None, **settings: Any) -> LaunchSpec:
        """The launch that a backend describes by `contract.Env`, the same names for every backend."""
        environ = os.environ if environ is None else environ

        def number(name: str, default: int) -> int:
            text = environ.get(name, "").strip() or str(default)
            if not text.isdecimal():
                raise UserError(f"The environment has {name}={text!r}, which is not a whole number.")
            return int(text)

        return cls(
            command,
            nproc_per_node=number(Env.NPROC_PER_NODE, 1),
            nnodes=number(Env.NNODES, 1),
            node_rank=number(Env.NODE_RANK, 0),
            master_addr=environ.get(Env.MASTER_ADDR) or "127.0.0.1",
            master_port=number(Env.MASTER_PORT, 29500),
            attempt=number(Env.ATTEMPT, 0),
            **settings,
        )

    @property
    def world_size(self) -> int:
        return self.nnodes * self.nproc_per_node

    @property
    def first_rank(self) -> int:
        return self.node_rank * self.nproc_per_node
