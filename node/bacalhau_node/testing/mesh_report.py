"""A table of what membership costs: `python -m bacalhau_node.testing.mesh_report [NODES] [VIEW] [CALM]`.

One network in virtual time, by one seed, in phases that follow each other: all join through one node, a hundred a
second; they settle for `CALM` seconds; one node says something new; the node they joined through and a tenth of the
others are killed; half of them are out of reach for thirty seconds; a twentieth of all messages is lost, for as long.
The table is the same on every machine and run. Dead nodes are noticed at once by those who deal with them, by all
others when their records are stale.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from bacalhau_node.ids import NodeId
from bacalhau_node.messages import NodeRecord
from bacalhau_node.protocol import events as ev
from bacalhau_node.protocol.membership import Settings
from bacalhau_node.testing.mesh import Mesh, address_of

SEED: Final = 12
JOINS: Final = 100
"""Nodes that join in a second."""

CALM: Final = 300.0
CHURNED: Final = 40.0
CUT: Final = 30.0
STEP: Final = 5.0
PATIENCE: Final = 900.0
"""Seconds after which a phase is over in any case."""

SHARE: Final = 0.999


@dataclass(frozen=True, kw_only=True)
class Phase:
    """What a phase took: virtual seconds, what each node got in a minute, and what the busiest one got in all.

    `parts`: how many pieces the neighbours form at its end. `known`: the share of living nodes (or of the bound) that
    the poorest view holds. `dead`: how many dead ones the average view still holds.
    """

    name: str
    seconds: float
    messages: float
    kilobytes: float
    busiest: int
    busiest_kilobytes: float
    parts: int
    known: float
    dead: float


class Trial:
    """A network and its phases. `calm`: seconds of those in which nothing new happens. `rows`: those that are over."""

    def __init__(self, nodes: int, *, view: int = 1024, calm: float = CALM) -> None:
        self.mesh = Mesh(seed=SEED, settings=Settings(view=view))
        self.names: list[NodeId] = [f"n-{n:05d}" for n in range(nodes)]
        self.rows: list[Phase] = []
        self._bound, self._calm = view, calm
        self._dead: set[NodeId] = set()
        for n, node in enumerate(self.names):
            self.mesh.start(node, self.names[:1] if n else (), at=n / JOINS)

    def join(self) -> Phase:
        """All of them join; over when the mesh is one and each view holds half of what it can."""
        least = len(self.names) / JOINS
        return self._phase("all join through one", least, lambda: self._known() > 0.5 and self._whole())

    def settle(self) -> Phase:
        """Nothing happens."""
        return self._phase("nothing happens", self._calm)

    def news(self) -> Phase:
        """One node has no room any more; over when every view that holds the node knows."""
        node = self.names[len(self.names) // 2]
        record = NodeRecord(node=node, version=0, addresses=(address_of(node),), agent="mesh", slots=4, room=0)
        before = self.mesh.machine(node).view.own.record.version
        self.mesh.feed(node, ev.LoadChanged(record))
        version: list[int] = []

        def spread() -> bool:
            now = self.mesh.machine(node).view.own.record.version
            version.extend([now] if now > before and not version else [])
            return bool(version) and self._knowing(node, version[0]) >= SHARE

        return self._phase("one says something new", 0, spread)

    def churn(self) -> Phase:
        """The first node and a tenth of the others die."""
        dead = [self.names[0], *self.names[5::10]]
        self._dead.update(dead)
        self.mesh.kill(dead, at=self.mesh.now)
        return self._phase("the first and a tenth die", CHURNED)

    def cut(self) -> Phase:
        """Half of them are out of reach; over when the mesh is one again, and nobody thinks ill of the living."""
        self.mesh.partition(self.names[: len(self.names) // 2], at=self.mesh.now, until=self.mesh.now + CUT)
        name = "half out of reach for 30 s"
        return self._phase(name, CUT + STEP, lambda: self._whole() and self._trusting() >= SHARE)

    def lose(self) -> Phase:
        """A twentieth of the messages is lost."""
        self.mesh.lost = 0.05
        row = self._phase("5 % lost", self._calm)
        self.mesh.lost = 0.0
        return row

    # --- what is looked at ---

    def _whole(self) -> bool:
        return len(self.mesh.parts()) == 1

    def _known(self) -> float:
        most = min(self._bound, len(self.mesh.alive) - 1)
        return min(self._living(node) for node in self.mesh.alive) / max(1, most)

    def _living(self, node: NodeId) -> int:
        held = self.mesh.machine(node).view.held.keys()
        return len(held) - len(held & self._dead)

    def _knowing(self, node: NodeId, version: int) -> float:
        views = [self.mesh.machine(other).view.held.get(node) for other in self.mesh.alive if other != node]
        held = [one for one in views if one is not None]
        return sum(one.record.version >= version for one in held) / max(1, len(held))

    def _trusting(self) -> float:
        """The share of what was told to requesters of living nodes that says that they have room."""
        told = [self.mesh.told[node] for node in self.mesh.alive]
        living = [(node, room) for one in told for node, room in one.items() if node not in self._dead]
        most = len(told) * min(self._bound - 64, len(told) - 1)
        return min(1.0, sum(room > 0 or node == self.names[len(self.names) // 2] for node, room in living) / most)

    def _phase(self, name: str, least: float, over: Callable[[], bool] = lambda: True) -> Phase:
        mesh, begin = self.mesh, self.mesh.now
        messages, volumes = mesh.messages.copy(), mesh.bytes.copy()
        mesh.run(until=begin + least)
        while not over() and mesh.now < begin + least + PATIENCE:
            mesh.run(until=mesh.now + STEP)
        seconds = mesh.now - begin
        messages, volumes = mesh.messages - messages, mesh.bytes - volumes
        alive = mesh.alive
        each = len(alive) * max(seconds, 1.0) / 60
        row = Phase(
            name=name,
            seconds=seconds,
            messages=sum(messages.values()) / each,
            kilobytes=sum(volumes.values()) / 1000 / each,
            busiest=max(messages.values(), default=0),
            busiest_kilobytes=max(volumes.values(), default=0) / 1000,
            parts=len(mesh.parts()),
            known=self._known(),
            dead=sum(len(mesh.machine(node)) - self._living(node) for node in alive) / len(alive),
        )
        self.rows.append(row)
        return row


def measure(nodes: int, *, view: int = 1024, calm: float = CALM) -> list[Phase]:
    """All phases with so many nodes, whose views hold at most `view` others."""
    trial = Trial(nodes, view=view, calm=calm)
    return [phase() for phase in (trial.join, trial.settle, trial.news, trial.churn, trial.cut, trial.lose)]


def table(rows: list[Phase]) -> str:
    """The rows as Markdown."""
    lines = [
        "| phase | virtual s | messages a node and minute | kB | busiest: messages | kB | parts | least known | dead |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = (
            row.name,
            f"{row.seconds:.0f}",
            f"{row.messages:.1f}",
            f"{row.kilobytes:.1f}",
            f"{row.busiest:,}",
            f"{row.busiest_kilobytes:,.0f}",
            row.parts,
            f"{row.known:.0%}",
            f"{row.dead:.1f}",
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    size, bound, still = (int(argument) for argument in [*sys.argv[1:], *("1000", "1024", "300")[len(sys.argv) - 1 :]])
    print(table(measure(size, view=bound, calm=still)))  # noqa: T201 - it is for people
