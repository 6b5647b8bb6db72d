"""Two launchers on loopback, as two nodes: they meet, watch each other, and end together."""

from __future__ import annotations

import signal
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from launcher_harness import Launch, all_gone, eventually, stub

PEERS = {"peer_beat": 0.2, "peer_silence": 5.0, "finish_grace": 20.0}

COLLECTIVE = """
import torch
import torch.distributed as dist
dist.init_process_group("gloo")
total = torch.ones(1) * (dist.get_rank() + 1)
dist.all_reduce(total)
print("sum", int(total), flush=True)
dist.destroy_process_group()
"""


@dataclass
class Pair:
    folder: Path
    nodes: tuple[Launch, Launch]

    def train(self) -> None:
        eventually(lambda: len(list(self.folder.glob("pid.*"))) == 2, "both nodes train", 90)

    def wait(self) -> tuple[int, int]:
        first, second = self.nodes
        return first.wait(90), second.wait(90)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
    return port


def node(folder: Path, rank: int, port: int, command: list[str], attempt: int = 0) -> Launch:
    folder.mkdir()
    settings = {"nproc_per_node": 1, "nnodes": 2, "node_rank": rank, "master_port": port, "attempt": attempt}
    return Launch(folder, command, limits=PEERS, **settings)


def start(folder: Path, command: list[str], attempts: tuple[int, int] = (0, 0)) -> Pair:
    folder.mkdir()
    port = free_port()
    # The second first: it has to wait for the store.
    second, first = (node(folder / str(rank), rank, port, command, attempts[rank]) for rank in (1, 0))
    return Pair(folder, (first, second))


@pytest.fixture(scope="module", autouse=True)
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Pair]]:
    """All of them start at once, as most of the time goes into the import of torch."""
    root = tmp_path_factory.mktemp("pairs")
    endless = {name: stub(root / name, steps=100_000) for name in ("kill 0", "kill 1", "stop")}
    yield {
        "meet": start(root / "meet", [sys.executable, "-c", COLLECTIVE]),
        "stale": start(root / "stale", ["sleep", "100"], attempts=(4, 3)),
        "fail": start(root / "fail", stub(root / "fail", steps=100_000, trouble="exit:70", rank=1, at_step=20)),
        **{name: start(root / name, command) for name, command in endless.items()},
    }


def test_ranks_of_two_nodes_meet_through_the_store_of_launcher_0(pairs: dict[str, Pair]) -> None:
    assert pairs["meet"].wait() == (0, 0)
    first, second = pairs["meet"].nodes
    assert "sum 3" in first.text()
    assert "[rank 1] sum 3" in second.text()


def test_when_a_rank_fails_its_node_has_the_code_and_the_other_lost_a_peer(pairs: dict[str, Pair]) -> None:
    assert pairs["fail"].wait() == (76, 70)
    message = pairs["fail"].nodes[0].message()
    assert (message["reason"], message["message"]) == ("PeerLost", "Node 1 ended with 70 (OUT_OF_MEMORY).")


@pytest.mark.parametrize(("victim", "message"), [(1, "Node 1 was silent"), (0, "The store on node 0 is gone")])
def test_when_a_launcher_is_killed_the_other_node_ends_with_76(
    victim: int, message: str, pairs: dict[str, Pair]
) -> None:
    pair = pairs[f"kill {victim}"]
    pair.train()
    family = [process for launch in pair.nodes for process in launch.family()]
    pair.nodes[victim].send(signal.SIGKILL)
    survivor = pair.nodes[1 - victim]
    assert survivor.wait() == 76
    assert message in survivor.message()["message"]
    assert all_gone(family)


def test_a_stop_of_one_node_is_agreed_by_the_ranks_and_both_end_with_75(pairs: dict[str, Pair]) -> None:
    pairs["stop"].train()
    pairs["stop"].nodes[1].send(signal.SIGTERM)
    assert pairs["stop"].wait() == (75, 75)


def test_a_launcher_of_an_older_attempt_is_not_let_in(pairs: dict[str, Pair]) -> None:
    first, stale = pairs["stale"].nodes
    assert stale.wait(90) == 76
    assert stale.message()["message"] == "Node 0 runs attempt 4 and this node attempt 3."
    assert first.process.poll() is None
    first.send(signal.SIGTERM)
    assert first.wait() == 75


def test_a_busy_port_of_several_nodes_fails_and_says_what_to_do(tmp_path: Path) -> None:
    with socket.create_server(("", 0)) as busy:
        launch = node(tmp_path / "0", 0, busy.getsockname()[1], ["sleep", "100"])
        assert launch.wait(60) == 1
    assert "Choose another master port, the same on all nodes." in launch.text()
    assert launch.message()["exitCode"] == 1
