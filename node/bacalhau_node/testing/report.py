"""A table of what the protocol costs on a thousand nodes: `python -m bacalhau_node.testing.report [NODES]`.

Everything happens in virtual time, by one seed: the table is the same on every machine and run. "doubled" counts
executions that came to an end and didn't count (a lost node's, a second try's); "lost" counts shards without an
outcome after an hour. The referee has watched every row and message: nothing was accepted twice.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from bacalhau_node.testing.builders import a_job, a_job_id
from bacalhau_node.testing.simulator import Simulation, Weather

JOBS: Final = 10
SHARDS: Final = 100
SEED: Final = 11
HOUR: Final = 3600.0


@dataclass(frozen=True, kw_only=True)
class Row:
    """One scenario: virtual seconds to the end of the last job, messages a shard, those of the busiest node, faults."""

    name: str
    seconds: float
    messages: float
    busiest: int
    lost: int
    doubled: int


def _churn(simulation: Simulation) -> None:
    nodes = simulation.nodes
    for n in range(len(nodes) // 10):
        simulation.crash(nodes[JOBS + 9 * n], at=1 + n * 0.02, back=HOUR)  # none that has submitted a job


def _partition(simulation: Simulation) -> None:
    nodes = simulation.nodes
    simulation.partition(nodes[len(nodes) // 2 :], at=1, until=31)


SCENARIOS: Final[tuple[tuple[str, Weather, Callable[[Simulation], None] | None], ...]] = (
    ("plain", Weather(), None),
    ("5 % lost, 5 % repeated", Weather(lost=0.05, repeated=0.05), None),
    ("a tenth of the nodes dies", Weather(), _churn),
    ("half of them out of reach for 30 s", Weather(), _partition),
)


def measure(nodes: int) -> list[Row]:
    """All scenarios with so many nodes: `JOBS` jobs of `SHARDS` shards of 0.5 to 2 s, each from a node of its own."""
    return [_run(name, nodes, weather, faults) for name, weather, faults in SCENARIOS]


def table(rows: list[Row]) -> str:
    """The rows as Markdown."""
    lines = [
        "| weather | finished (virtual s) | messages a shard | busiest node | lost | doubled |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = (row.name, f"{row.seconds:.1f}", f"{row.messages:.1f}", f"{row.busiest:,}", row.lost, row.doubled)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def _run(name: str, nodes: int, weather: Weather, faults: Callable[[Simulation], None] | None) -> Row:
    simulation = Simulation(nodes=nodes, seed=SEED, weather=weather)
    for n in range(JOBS):
        simulation.submit(simulation.nodes[n], a_job(n, shards=SHARDS), at=n * 0.1)
    if faults is not None:
        faults(simulation)
    simulation.run(until=HOUR)
    accepted = sum(simulation.referee.accepted(a_job_id(n)) for n in range(JOBS))
    return Row(
        name=name,
        seconds=max(simulation.finished.values(), default=HOUR),
        messages=simulation.messages / (JOBS * SHARDS),
        busiest=max(simulation.received.values()),
        lost=JOBS * SHARDS - accepted,
        doubled=simulation.referee.runs - accepted,
    )


if __name__ == "__main__":
    print(table(measure(int(sys.argv[1]) if len(sys.argv) > 1 else 1000)))  # noqa: T201 - it is for people
