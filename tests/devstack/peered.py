"""Two devstacks in two processes that one `--peer` joins: a job of one runs on nodes of both.

    python -m tests.devstack.peered [--nodes 100] [--picture FILE.png]

The picture is drawn from what node 0 of the second knows when the job is over.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from bacalhau_node.topology import Graph
from tests.devstack.pictures import save
from tests.devstack.storm import Ledger, Report
from tests.devstack.test_links import Process

SHARDS = 1000
PATIENCE = 240.0


@dataclass
class Found:
    """What was measured. `own`, `other`: nodes of either devstack that ran shards."""

    nodes: int
    opened: float
    known: float
    took: float
    state: str
    own: int
    other: int
    kept: int
    wrong: int
    graph: Graph

    def __str__(self) -> str:
        """For people."""
        return (
            f"two devstacks of {self.nodes} open after {self.opened:.1f} s, node 0 of the second knows all after"
            f" {self.known:.1f} s\n{SHARDS} shards: {self.state} after {self.took:.1f} s on {self.own} nodes of its own"
            f" devstack and {self.other} of the other; {self.kept} kept, {self.wrong} lost or accepted twice"
        )


async def measure(folder: Path, nodes: int) -> Found:
    """Open both, and run one job."""
    words = ("--nodes", str(nodes), "--slots", str(nodes), "--seconds", "1.0")
    began = time.monotonic()
    first = Process(folder / "first", *words)
    await first.start()
    second = Process(folder / "second", *words, "--peer", first.address)
    await second.start()
    opened = time.monotonic() - began
    try:
        await second.knows(2 * nodes - 1)
        known = time.monotonic() - began
        started = time.monotonic()
        job = await second.submit(SHARDS)
        end = await second.end_of(job, seconds=PATIENCE)
        took = time.monotonic() - started
        used = set(end["nodes"])
        graph = await second.graph()
    finally:
        for process in (second, first):
            await process.kill()
    ledger = Ledger(Report())
    ledger.read(second.journal)
    kept = sum(name == job for name, _ in ledger.outcomes)
    wrong = SHARDS - kept + len(ledger.report.doubled)
    own, other = len(used & second.nodes), len(used & first.nodes)
    return Found(nodes, opened, known, took, end["state"], own, other, kept, wrong, graph)


def main() -> None:
    """Measure from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--nodes", type=int, default=100)
    parser.add_argument("--picture", type=Path)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="peered-") as folder:
        found = asyncio.run(measure(Path(folder), asked.nodes))
    print(found)
    if asked.picture:
        save(asked.picture, f"two devstacks of {asked.nodes} in two processes, joined by one --peer", found.graph)


if __name__ == "__main__":
    main()
