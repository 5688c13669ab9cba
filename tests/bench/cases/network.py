"""Whole nodes by the thousand in one process: opening, memory, what jobs and deaths cost."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from typing import Any

from tests.bench.harness import Figure, at_most

TITLE = "a network of nodes"
EXECUTORS = ("plain",)
SECONDS = 600
"""A thousand nodes open, get to know each other and lose a tenth: three minutes on a quiet machine."""

GO = "the Go system at 1,000 nodes: 110 s, 1,700–2,000 MB"
GO_JOB = "the Go system: 0.15–0.35 s at 3 nodes, 0.6–2.3 s at 1,000"


def measured(nodes: int, *, kill: int = 0) -> dict[str, Any]:
    """A devstack of so many nodes, in a process of its own."""
    command = [sys.executable, "-m", "tests.devstack.thousand", "--nodes", str(nodes), "--kill", str(kill), "--json"]
    ended = subprocess.run(command, stdout=subprocess.PIPE, check=False)
    if not ended.stdout:
        raise RuntimeError(f"{nodes} nodes could not be measured: exit code {ended.returncode}, see above")
    found: dict[str, Any] = json.loads(ended.stdout)
    return found


def run(_: str) -> list[Figure]:
    """From three nodes to a thousand."""
    few, some, many = measured(3), measured(100), measured(1000, kill=100)
    jobs = [statistics.median(one["one_shard"]) for one in (few, some, many)]
    wrong = sum(len(one["lost"]) + len(one["doubled"]) for one in (few, some, many))
    return [
        Figure(
            what="1,000 whole nodes in one process: open, node 0 knows all",
            ours=f"{many['opened']:.1f} s, {many['files']:,} open files, {many['threads']} threads",
            beside=GO,
            measured=many["opened"],
            goal=at_most(60, "s"),
        ),
        Figure(
            what="1,000 whole nodes in one process: memory",
            ours=f"{many['memory']:.0f} MB, {many['after_memory']:.0f} MB after jobs on all; idle {many['idle']:.0%}",
            beside=GO,
            measured=many["memory"],
            goal=at_most(600, "MB"),
        ),
        Figure(
            what="a one-shard job over its executor, 3, 100 and 1,000 nodes",
            ours=", ".join(f"{1000 * one:.0f} ms" for one in jobs),
            beside=GO_JOB,
            measured=max(jobs),
            goal=at_most(0.1, "s"),
        ),
        Figure(
            what="1,000 shards over 1,000 nodes",
            ours=f"{many['wide']:.1f} s on {many['wide_nodes']} nodes; 20 jobs of 50 before: {many['jobs']:.1f} s",
            beside="the Go system: 100 containers over 100 nodes in 26–33 s",
            measured=many["wide"],
            goal=at_most(15, "s"),
        ),
        Figure(
            what="the same with 100 nodes killed: shards lost or accepted twice",
            ours=f"{wrong}; {many['after_kill']:.1f} s, {many['again']} shards tried again",
            beside="",
            measured=wrong,
            goal=at_most(0, "shards"),
        ),
    ]
