"""Kills training with SIGKILL at random instants, again and again, and counts what the next resume finds.

    python tests/faults/kill_harness.py --kills 2000 --engine-kills 200 [--state counts.json]

Two things must never happen: a *bad* resume (a state that is not that of the step it claims) and a *lost*
commit (a resume older than the last checkpoint that had been acknowledged). Half of the kills fall between
the first shard opened and the commit. With --naive the same harness judges a writer without a manifest,
which it must find wanting.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from faults.gang import Event, Gang, Phase, RankFunction

_SAVING = (Phase.SHARDS, Phase.MANIFEST)


@dataclass
class Tally:
    """Counts of one kind of trial; they add up over runs."""

    kills: int = 0
    resumes: int = 0
    bad: int = 0
    lost: int = 0
    phases: Counter[str] = field(default_factory=Counter)

    @property
    def inside(self) -> int:
        """Kills between the first shard opened and the commit."""
        return sum(self.phases[phase.name] for phase in _SAVING)

    def __str__(self) -> str:
        width = max(self.phases.values(), default=1)
        bars = [
            f"    {phase.name.lower():<13}{count:>6}  {'#' * round(40 * count / width)}"
            for phase in Phase
            if (count := self.phases[phase.name])
        ]
        share = 100 * self.inside / max(self.kills, 1)
        return "\n".join(
            [
                f"  {self.kills} kills, {self.resumes} resumes judged: {self.bad} bad, {self.lost} lost",
                f"  {self.inside} of them ({share:.0f} %) between the first shard opened and the commit",
                *bars,
            ]
        )


def phase_of(events: list[Event]) -> Phase:
    """What the gang was doing: saving, if any rank had opened a shard that was not committed yet."""
    committed = max((event.step for event in events if event.phase == Phase.COMMITTED), default=-1)
    saving = [event.phase for event in events if event.phase in _SAVING and event.step > committed]
    if saving:
        return max(saving)
    return next((event.phase for event in reversed(events) if event.rank == 0), Phase.STARTING)


def saves_started(events: list[Event]) -> dict[int, float]:
    """When the first shard of each step was opened."""
    return {event.step: event.at for event in reversed(events) if event.phase == Phase.SHARDS}


class Trials:
    """A sequence of gangs on one directory after another, each resuming what the killed one left."""

    def __init__(
        self,
        function: RankFunction,
        base: Path,
        tally: Tally,
        rng: random.Random,
        last_step: int,
        world_size: int = 2,
    ) -> None:
        self._function = function
        self._base = base
        self._tally = tally
        self._rng = rng
        self._last_step = last_step
        self._world_size = world_size
        self._save_seconds = 0.02
        self._start_seconds = 0.05
        self._fresh_directory()

    def run(self, kills: int) -> None:
        """Kills `kills` times, then lets one more gang judge what the last kill left."""
        for _ in range(kills):
            self._trial()
        gang = self._start()
        gang.wait_for(self._all_resumed_or_bad)
        gang.kill(self._rng)
        self._judge(gang.events)

    def _trial(self) -> None:
        started = time.monotonic()
        gang = self._start()
        if 2 * self._tally.inside <= self._tally.kills:
            self._aim_inside_a_save(gang)
        elif self._rng.random() < 0.2:
            time.sleep(self._rng.uniform(0, self._start_seconds))
        else:
            gang.wait_for(self._all_resumed_or_bad)
            self._start_seconds = time.monotonic() - started
            time.sleep(self._rng.uniform(0, 4 * self._save_seconds))
        gang.kill(self._rng, self._rng.choice([0, self._rng.uniform(0, self._save_seconds)]))
        self._tally.kills += 1
        self._tally.phases[phase_of(gang.events).name] += 1
        self._judge(gang.events)

    def _aim_inside_a_save(self, gang: Gang) -> None:
        saves = self._rng.randint(1, 3)
        gang.wait_for(lambda events: len(saves_started(events)) >= saves or self._is_bad(events))
        time.sleep(self._rng.uniform(0, self._save_seconds))

    def _start(self) -> Gang:
        self._attempt += 1
        return Gang.start(self._function, self._world_size, self._directory, self._attempt)

    def _judge(self, events: list[Event]) -> None:
        """Judges how this gang resumed, and notes what it acknowledged before it was killed."""
        resumed = [event.step for event in events if event.phase == Phase.RESUMED]
        bad = self._is_bad(events)
        if resumed or bad:
            self._tally.resumes += 1
        self._tally.bad += bad
        self._tally.lost += not bad and any(step < self._acknowledged for step in resumed)
        started = saves_started(events)
        for event in events:
            if event.phase == Phase.COMMITTED:
                self._save_seconds += 0.2 * (event.at - started[event.step] - self._save_seconds)
        acknowledged = [event.step for event in events if event.phase == Phase.ACKNOWLEDGED]
        self._acknowledged = max([self._acknowledged, *acknowledged])
        if bad or self._acknowledged >= self._last_step:
            self._fresh_directory()

    def _fresh_directory(self) -> None:
        if self._base.exists():
            shutil.rmtree(self._base)
        self._base.mkdir(parents=True)
        self._directory = self._base
        self._attempt = 0
        self._acknowledged = 0

    @staticmethod
    def _is_bad(events: list[Event]) -> bool:
        return any(event.phase == Phase.BAD for event in events)

    def _all_resumed_or_bad(self, events: list[Event]) -> bool:
        resumed = {event.rank for event in events if event.phase == Phase.RESUMED}
        return len(resumed) == self._world_size or self._is_bad(events)


def kill_commit_code(kills: int, base: Path, seed: int, *, naive: bool = False, tally: Tally | None = None) -> Tally:
    from faults import commit_trials

    tally = tally or Tally()
    function = commit_trials.naive if naive else commit_trials.careful
    Trials(function, base, tally, random.Random(seed), last_step=400).run(kills)
    return tally


def kill_engine(kills: int, base: Path, seed: int, *, tally: Tally | None = None) -> Tally:
    from faults import engine_trials

    tally = tally or Tally()
    truth = engine_trials.reference(base / "reference", 2)
    function = engine_trials.training(truth)
    # Ten steps of room: a gang must not reach the end of the reference while a kill is on its way.
    Trials(function, base / "killed", tally, random.Random(seed), engine_trials.LAST_STEP - 10).run(kills)
    return tally


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=2000, help="all kills, those of the engine included")
    parser.add_argument("--engine-kills", type=int, default=200, help="kills of training under DeepSpeed")
    parser.add_argument("--naive", action="store_true", help="judge the writer without a manifest instead")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--state", type=Path, help="JSON file in which counts add up over runs")
    options = parser.parse_args(arguments)
    state = json.loads(options.state.read_text()) if options.state and options.state.exists() else {}
    tallies = {kind: Tally(**{**saved, "phases": Counter(saved["phases"])}) for kind, saved in state.items()}
    print(f"seed {options.seed}")
    with tempfile.TemporaryDirectory() as base:
        if options.naive:
            tallies["naive"] = kill_commit_code(
                options.kills, Path(base, "naive"), options.seed, naive=True, tally=tallies.get("naive")
            )
        else:
            tallies["commit code"] = kill_commit_code(
                options.kills - options.engine_kills,
                Path(base, "commit"),
                options.seed,
                tally=tallies.get("commit code"),
            )
            if options.engine_kills:
                tallies["DeepSpeed engine"] = kill_engine(
                    options.engine_kills,
                    Path(base, "engine"),
                    options.seed,
                    tally=tallies.get("DeepSpeed engine"),
                )
    if options.state:
        options.state.write_text(json.dumps({kind: vars(tally) for kind, tally in tallies.items()}, indent=1))
    for kind, tally in tallies.items():
        print(f"{kind}\n{tally}")
    wrong = sum(tally.bad + tally.lost for kind, tally in tallies.items() if kind != "naive")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
