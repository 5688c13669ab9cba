"""Addresses to dial: those that a person named, those of the dead, and dials under way.

A **door** that leads nowhere is tried again after a time that doubles, from `FIRST` to `LAST` or `LAST_LOST`. The doors
of the dead are what heals a partition, however long it lasted: each side knocks at the other until somebody opens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

from bacalhau_node.ids import NodeId
from bacalhau_node.protocol.chance import Chance
from bacalhau_node.protocol.events import Dial

FIRST: Final = 2.0
LAST: Final = 300.0
LAST_LOST: Final = 1800.0
LAST_ALONE: Final = 30.0
"""The longest wait of a node that has no neighbour at all."""

MAX_LOST: Final = 50
"""Doors of the dead; the oldest make room."""

OVERDUE: Final = 120.0
"""Seconds after which a dial without an answer counts as failed."""


@dataclass(slots=True, eq=False)
class Door:
    """An address. `named`: by a person, so it is never forgotten; `met`: somebody has opened."""

    address: str
    node: NodeId | None
    named: bool
    due: float
    wait: float = FIRST
    met: bool = False


@dataclass(slots=True, eq=False)
class Attempt:
    """A dial under way, and the other addresses of the same node."""

    node: NodeId | None
    rest: tuple[str, ...]
    since: float


class Doors:
    """All doors of a node, and its dials under way by their addresses."""

    def __init__(self, chance: Chance) -> None:
        self._chance = chance
        self.doors: dict[str, Door] = {}
        self.dials: dict[str, Attempt] = {}

    def name(self, addresses: Iterable[str], now: float) -> None:
        """A person wants a link to each of these."""
        for address in addresses:
            self.doors[address] = Door(address, None, named=True, due=now)

    def lose(self, address: str, node: NodeId | None, now: float) -> None:
        """Nobody opens at this address any more."""
        if address not in self.doors:
            lost = [one for one in self.doors.values() if not one.named]
            if len(lost) >= MAX_LOST:
                del self.doors[lost[0].address]
            self.doors[address] = Door(address, node, named=False, due=now + self._chance.between(0, FIRST))

    def found(self, node: NodeId) -> None:
        """The node is here: nobody need knock at its door."""
        for address in [one.address for one in self.doors.values() if one.node == node and not one.named]:
            del self.doors[address]

    def hasten(self, now: float) -> None:
        """The last neighbour is lost: every door counts."""
        for door in self.doors.values():
            door.wait = FIRST
            door.due = min(door.due, now + self._chance.between(0, FIRST))

    def due(self, now: float, *, alone: bool, here: Callable[[NodeId], bool]) -> list[Dial]:
        """Knock where it is time: at doors whose node is not `here`, and, when alone, at all."""
        dials = []
        for door in self.doors.values():
            inside = door.met and door.node is not None and here(door.node)
            if door.due > now:
                continue
            if inside and not alone:
                door.due = now + LAST
                continue
            door.wait = min(2 * door.wait, LAST_ALONE if alone else LAST if door.named else LAST_LOST)
            door.due = now + door.wait * self._chance.between(0.75, 1.25)
            if dial := self.dial((door.address,), door.node, now):
                dials.append(dial)
        return dials

    def dial(self, addresses: tuple[str, ...], node: NodeId | None, now: float) -> Dial | None:
        """Try the addresses of a node one after the other; None when the first one is being tried."""
        if addresses[0] in self.dials:
            return None
        self.dials[addresses[0]] = Attempt(node, addresses[1:], now)
        return Dial(addresses[0], node)

    def dialling(self, node: NodeId) -> bool:
        """Whether the node is being dialled."""
        return any(one.node == node for one in self.dials.values())

    def opened(self, address: str, node: NodeId) -> Attempt | None:
        """Somebody has opened; returns the dial that this ends."""
        if (door := self.doors.get(address)) is not None:
            door.met, door.node, door.wait = True, node, FIRST
            if not door.named:
                del self.doors[address]
        return self.dials.pop(address, None)

    def overdue(self, now: float) -> list[str]:
        """Dials that were never answered."""
        return [address for address, one in self.dials.items() if now - one.since > OVERDUE]

    def next(self) -> float:
        """When to look again, at the latest."""
        return min((one.due for one in self.doors.values()), default=float("inf"))
