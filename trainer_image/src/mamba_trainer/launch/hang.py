"""When a rank counts as hung. Pure: fed with what the board says and the launcher's clock.

Times are measured between changes that the launcher saw, never from a rank's own clock, so a clock that jumps
or a machine that slept is not taken for a hang.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from ..contract import Phase
from ..report import RankRecord
from .spec import Limits

#: Few enough that one slow step is forgotten, many enough to span a slow batch now and then.
_RECENT_STEPS = 32
_STEPS_TO_LEARN = 3
_ENDING = (Phase.SAVING, Phase.STOPPING)


@dataclass(frozen=True)
class Hang:
    local_rank: int
    message: str


@dataclass
class _Pulse:
    """What one rank last changed, and when."""

    record: RankRecord
    beat_at: float
    moved_at: float
    durations: deque[float] = field(default_factory=lambda: deque(maxlen=_RECENT_STEPS))
    #: The first interval in a phase holds compilation and warm-up and teaches nothing.
    stepped_in_phase: bool = False

    def observe(self, record: RankRecord, now: float) -> None:
        previous, self.record = self.record, record
        if record.heartbeat != previous.heartbeat:
            self.beat_at = now
        if record.phase != previous.phase:
            self.moved_at = now
            self.stepped_in_phase = False
        elif record.step != previous.step:
            if self.stepped_in_phase and record.phase is Phase.TRAINING:
                self.durations.append(now - self.moved_at)
            self.stepped_in_phase = True
            self.moved_at = now


class HangDetector:
    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._pulses: dict[int, _Pulse] = {}

    def observe(self, records: Iterable[RankRecord], now: float, stopping: bool = False) -> Hang | None:
        """Look at the ranks alive; returns the one to blame when the gang is stuck.

        `stopping`: a stop was requested, and the save that follows may take as long as it takes.
        """
        pulses = [self._follow(record, now) for record in records]
        for pulse in pulses:
            if (finding := self._finding(pulse, now, stopping)) is not None:
                return self._blame(pulses, pulse, finding, now)
        return None

    def _blame(self, pulses: Iterable[_Pulse], late: _Pulse, finding: str, now: float) -> Hang:
        """In a stuck collective all wait for one rank: a silent one, else the one furthest behind."""
        worst = min(pulses, key=lambda p: (not self._silent(p, now), p.record.step, p.moved_at))
        message = f"Rank {late.record.rank} {finding}."
        if worst is not late:
            at = f"{worst.record.phase}, step {worst.record.step}"
            message += f" Furthest behind is rank {worst.record.rank}: {at}."
        return Hang(worst.record.local_rank, message)

    def _follow(self, record: RankRecord, now: float) -> _Pulse:
        pulse = self._pulses.setdefault(record.local_rank, _Pulse(record, now, now))
        pulse.observe(record, now)
        return pulse

    def _silent(self, pulse: _Pulse, now: float) -> bool:
        return pulse.record.heartbeat is not None and now - pulse.beat_at > self._limits.heartbeat

    def _finding(self, pulse: _Pulse, now: float, stopping: bool) -> str | None:
        record, limit, still = pulse.record, self._limit(pulse), now - pulse.moved_at
        if self._silent(pulse, now):
            silence = now - pulse.beat_at
            return f"has not beaten for {silence:.0f} s (it was {record.phase} at step {record.step})"
        if still <= limit or (stopping and record.phase in _ENDING):
            return None
        return f"beats but has been {record.phase} at step {record.step} for {still:.0f} s (limit {limit:.0f} s)"

    def _limit(self, pulse: _Pulse) -> float:
        if pulse.record.phase is Phase.STARTING:
            return self._limits.first_steps
        if pulse.record.phase is not Phase.TRAINING:
            return self._limits.other_phase
        if len(pulse.durations) < _STEPS_TO_LEARN:
            return self._limits.first_steps
        return max(self._limits.step_floor, self._limits.step_factor * max(pulse.durations))
