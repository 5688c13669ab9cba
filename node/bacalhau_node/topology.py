"""The network as a picture needs it: who is linked to whom, what each node says of itself. From records only.

Records are of different ages: of two ends that tell different things, the one with the younger record is believed. A
node that is only named by others is drawn without figures. The order is that of the ids, so equal records give equal
JSON.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Final

import msgspec

from bacalhau_node.ids import NodeId
from bacalhau_node.protocol.membership import Entry

GROUP: Final = "group"
"""The label whose value groups nodes; a devstack gives each of its nodes the same one."""


class Dot(msgspec.Struct, frozen=True, kw_only=True):
    """A node of the picture. `seconds`: since its record was made; None where there is no record.

    `age`: median seconds that a message to or from a neighbour took. `state`: as the asked node knows it, "self" for
    itself.
    """

    id: NodeId
    label: str
    group: str = ""
    state: str = "unknown"
    slots: int = 0
    room: int = 0
    jobs: int = 0
    gpus: int = 0
    age: float = 0.0
    dropped: int = 0
    seconds: float | None = None
    agent: str = ""


class Degrees(msgspec.Struct, frozen=True):
    """How many links the nodes have."""

    least: int = 0
    median: int = 0
    most: int = 0


class Graph(msgspec.Struct, frozen=True, kw_only=True):
    """All of it. `parts`: the sizes of what hangs together, the largest first: one number for a whole network."""

    nodes: tuple[Dot, ...]
    links: tuple[tuple[NodeId, NodeId], ...]
    parts: tuple[int, ...]
    degrees: Degrees


def graph(entries: Iterable[Entry]) -> Graph:
    """The network that these entries (`Membership.entries`) describe."""
    known = {entry.record.node: entry for entry in entries}
    links = sorted({(min(one, other), max(one, other)) for one, other in _named(known) if one != other})
    names = sorted({*known, *(node for link in links for node in link)})
    near: dict[NodeId, list[NodeId]] = defaultdict(list)
    for one, other in links:
        near[one].append(other)
        near[other].append(one)
    counts = sorted(len(near.get(name, ())) for name in names)
    degrees = Degrees(counts[0], counts[len(counts) // 2], counts[-1]) if counts else Degrees()
    dots = tuple(_dot(name, known.get(name)) for name in names)
    return Graph(nodes=dots, links=tuple(links), parts=_parts(names, near), degrees=degrees)


def _named(known: Mapping[NodeId, Entry]) -> Iterable[tuple[NodeId, NodeId]]:
    for node, entry in known.items():
        for other in entry.record.neighbours:
            there = known.get(other)
            if there is None or entry.age <= there.age or node in there.record.neighbours:
                yield node, other


def _dot(node: NodeId, entry: Entry | None) -> Dot:
    if entry is None:
        return Dot(id=node, label=_label(node))
    record = entry.record
    return Dot(
        id=node,
        label=record.labels.get("name") or _label(node),
        group=record.labels.get(GROUP, ""),
        state=entry.state,
        slots=record.slots,
        room=0 if entry.state == "suspect" else record.room,
        jobs=record.jobs,
        gpus=max((len(engine.gpus) for engine in record.engines), default=0),
        age=record.age,
        dropped=record.dropped,
        seconds=round(max(0.0, entry.age), 1),
        agent=record.agent,
    )


def _label(node: NodeId) -> str:
    """The end of an id: its beginning is the same for all keys of a kind."""
    return node[-6:]


def _parts(names: Iterable[NodeId], near: Mapping[NodeId, list[NodeId]]) -> tuple[int, ...]:
    left, sizes = dict.fromkeys(names), []
    while left:
        edge, size = [left.popitem()[0]], 0
        while edge:
            size += 1
            for other in near.get(edge.pop(), ()):
                if other in left:
                    del left[other]
                    edge.append(other)
        sizes.append(size)
    return tuple(sorted(sizes, reverse=True))
