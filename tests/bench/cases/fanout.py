"""A thousand trivial shards, each a fresh process, over a bare loop of forks."""

from __future__ import annotations

import subprocess
import sys

from bacalhau_node.executors.program import AGENT
from tests.bench import fork_loop, ours
from tests.bench.harness import Figure, at_most, in_turn
from tests.bench.peers import started
from tests.bench.work import trivial

TITLE = "1,000 trivial shards"
EXECUTORS = ("local",)
COUNT = 1000
TIMES = 3


def forks() -> None:
    """The bare loop, in a process of the size of the node's agent."""
    command = [sys.executable, fork_loop.__file__, str(COUNT), str(AGENT)]
    subprocess.run(command, check=True, capture_output=True)


def answers() -> None:
    """Our thousand shards, with all of their values at the caller."""
    values = ours.run_job("shard.index", shards=COUNT).result().values()
    assert list(values) == list(range(COUNT)), values


def run(_: str) -> list[Figure]:
    """Ours and the loop in turn; then the pools, whose workers run a thousand calls in one process."""
    ours.warm()
    taken = in_turn({"ours": answers, "forks": forks}, times=TIMES)
    with started("multiprocessing", "joblib", "dask", "ipyparallel") as peers:
        for peer in peers.values():
            peer.map(trivial, range(8))
        pools = in_turn({name: lambda one=one: one.map(trivial, range(COUNT)) for name, one in peers.items()}, times=2)
    beside = ", ".join(f"{name} {1000 * seconds:.0f} ms" for name, seconds in pools.items())
    return [
        Figure(
            what="1,000 trivial shards, each a process",
            ours=f"{1000 * taken['ours']:.0f} ms",
            beside=f"fork loop {1000 * taken['forks']:.0f} ms; without a process each: {beside}",
            measured=taken["ours"] / taken["forks"],
            goal=at_most(1.5, "× the fork loop"),
        )
    ]
