"""Two devstacks in two processes that one `--peer` joins: a job of one runs on nodes of both."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path

from tests.bench.harness import Figure, at_least, at_most
from tests.devstack import peered

TITLE = "two networks become one"
EXECUTORS = ("plain",)
NODES = 100


def run(_: str) -> list[Figure]:
    """Two hundred nodes in two processes."""
    with tempfile.TemporaryDirectory(prefix="peered-") as folder:
        two = asyncio.run(peered.measure(Path(folder), NODES))
    what = f"two devstacks of {NODES} in two processes, one --peer"
    return [
        Figure(
            what=f"{what}: nodes of the other that ran shards",
            ours=f"{two.other} of {NODES}, {two.own} of its own; {peered.SHARDS:,} shards of 1 s in {two.took:.1f} s",
            beside=f"opened in {two.opened:.1f} s, all known after {two.known:.1f} s",
            measured=two.other,
            goal=at_least(NODES / 2, "nodes"),
        ),
        Figure(
            what=f"{what}: shards lost or accepted twice",
            ours=f"{two.wrong}, {two.kept:,} kept",
            beside="",
            measured=two.wrong,
            goal=at_most(0, "shards"),
        ),
    ]
