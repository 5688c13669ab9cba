"""The protocol and membership on a thousand nodes and more in virtual time: what loss, churn and a partition cost."""

from __future__ import annotations

from bacalhau_node.testing import mesh_report
from bacalhau_node.testing.report import measure
from tests.bench.harness import Figure, at_most

TITLE = "a thousand nodes, simulated"
EXECUTORS = ("plain",)
NODES = 1000
MANY, FEW_KNOWN = 10_000, 256
"""A network that no view holds: each node knows a fortieth of it."""


def run(_: str) -> list[Figure]:
    """One figure for each kind of weather, and for each phase of a network's life."""
    return [*_jobs(), *_membership(NODES, view=1024), *_membership(MANY, view=FEW_KNOWN)]


def _membership(nodes: int, *, view: int) -> list[Figure]:
    trial = mesh_report.Trial(nodes, view=view)
    phases = [trial.join, trial.settle, trial.churn, trial.cut] if nodes > NODES else None
    rows = [phase() for phase in phases] if phases else mesh_report.measure(nodes, view=view)
    return [
        Figure(
            what=f"{nodes:,} nodes that know {view:,} each: {row.name}",
            ours=f"{row.seconds:.0f} virtual s; {row.parts} part, least known {row.known:.0%}",
            beside=f"busiest node: {row.busiest:,} messages, {row.busiest_kilobytes:,.0f} kB",
            measured=row.messages,
            goal=at_most(30 if row.seconds > 60 else 300, "messages a node and minute"),
        )
        for row in rows
    ]


def _jobs() -> list[Figure]:
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
