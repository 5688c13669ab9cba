"""The protocol and membership on 1,000 and 10,000 nodes in virtual time: what loss, churn and a partition cost.

A network of 10,000 is one that no view holds. Its trial takes a core for minutes, and everything else another one.
"""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from bacalhau_node.testing import mesh_report, report
from tests.bench.harness import Figure, at_most

TITLE = "thousands of nodes, simulated"
EXECUTORS = ("plain",)
NODES, MANY = 1000, 10_000
FEW_KNOWN = 256
"""Of ten thousand nodes each knows a fortieth."""

CALM = 40.0
SECONDS = 600
"""Half of that is enough on a quiet machine; a busy one has one core for both trials."""


JOINING = 300
"""In fifteen seconds each of a thousand fills its view."""


def run(_: str) -> list[Figure]:
    """What jobs cost, in each kind of weather; then membership, in each phase of a network's life."""
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        many = pool.submit(_membership, MANY, view=FEW_KNOWN, calm=CALM)
        rest = [pool.submit(_jobs, NODES), pool.submit(_jobs, MANY), pool.submit(_membership, NODES)]
        return [figure for one in (*rest, many) for figure in one.result()]


def _jobs(nodes: int) -> list[Figure]:
    rows = report.measure(nodes)
    what = f"{nodes:,} nodes, {report.JOBS} jobs of {report.SHARDS} shards"
    slowest, busiest = max(row.seconds for row in rows), max(row.busiest for row in rows)
    costs = [
        Figure(
            what=f"{what}: {row.name}",
            ours=f"{row.seconds:.1f} virtual s; {row.lost} lost, {row.doubled} run for nothing",
            beside=f"busiest node: {row.busiest:,} messages",
            measured=row.messages,
            goal=at_most(15, "messages a shard"),
        )
        for row in rows
    ]
    return [
        *costs,
        Figure(
            what=f"{what}: the last one ends, in the worst weather",
            ours=f"{slowest:.1f} virtual s",
            beside=f"all in good weather: {rows[0].seconds:.1f} s",
            measured=slowest,
            goal=at_most(60, "virtual s"),
        ),
        Figure(
            what=f"{what}: messages to the busiest node, in the worst weather",
            ours=f"{busiest:,}",
            beside=f"the requester of {report.SHARDS} shards is that, always",
            measured=busiest,
            goal=at_most(10 * report.SHARDS, "messages"),
        ),
        Figure(
            what=f"{what}: shards lost, in all weathers (one accepted twice would end the run)",
            ours=str(sum(row.lost for row in rows)),
            beside="",
            measured=sum(row.lost for row in rows),
            goal=at_most(0, "shards"),
        ),
    ]


def _membership(nodes: int, *, view: int = 1024, calm: float = mesh_report.CALM) -> list[Figure]:
    trial = mesh_report.Trial(nodes, view=view, calm=calm)
    phases = [trial.join, trial.settle, trial.churn, trial.cut, trial.lose]
    if nodes <= view:
        phases.insert(2, trial.news)
    rows = [phase() for phase in phases]
    return [
        Figure(
            what=f"{nodes:,} nodes that know {view:,} each: {row.name}",
            ours=f"{row.seconds:.0f} virtual s; {row.parts} part, least known {row.known:.0%}",
            beside=f"busiest node: {row.busiest:,} messages, {row.busiest_kilobytes:,.0f} kB",
            measured=row.messages,
            goal=at_most(JOINING if row is rows[0] else 30, "messages a node and minute"),
        )
        for row in rows
    ]
