"""The protocol on a thousand nodes in virtual time: what loss, churn and a partition cost."""

from __future__ import annotations

from bacalhau_node.testing.report import measure
from tests.bench.harness import Figure, at_most

TITLE = "a thousand nodes, simulated"
EXECUTORS = ("plain",)
NODES = 1000


def run(_: str) -> list[Figure]:
    """One figure for each kind of weather."""
    return [
        Figure(
            what=f"1,000 nodes, 10 jobs of 100 shards: {row.name}",
            ours=f"{row.seconds:.1f} virtual s; {row.lost} lost, {row.doubled} run for nothing",
            beside=f"busiest node: {row.busiest:,} messages",
            measured=row.messages,
            goal=at_most(15, "messages a shard"),
        )
        for row in measure(NODES)
    ]
