"""What a node says about itself: when it makes a new record, and with which version.

Versions are nanoseconds of the wall clock, so they grow over restarts; where the clock is behind the last record (it
was set back, or another life of this node had a faster one) they go on by one. A new record is due `LIFE` seconds after
the last one at the latest, as a sign of life; when it says something that others should know, after `GAP` seconds, or
more in a large network, so that nobody hears more than `RATE` records a second.
"""

from __future__ import annotations

from collections import deque
from typing import Final

from msgspec import structs

from bacalhau_node.ids import NodeId
from bacalhau_node.messages import NodeRecord
from bacalhau_node.protocol.archive import Archive, Held, Sign, stamp
from bacalhau_node.protocol.chance import Chance
from bacalhau_node.protocol.view import DOUBT, LIFE

GAP: Final = 2.0
RATE: Final = 8.0
"""A guess: at 10 µs each, less than one thousandth of a processor for every node of a process."""

FUTURE: Final = 24 * 3600 * 10**9
"""Nanoseconds: a clock that is wrong by a time zone is still believed."""


AGES: Final = 15
"""Messages whose ages count: those of a few minutes."""


class OwnRecord:
    """The record of this node, from `description`: version and neighbours are set here.

    `changed`: it says too little by now. `clashes`: how often a newer one was met that was made in this life, by its
    age or by its clock. `ages`: of the latest messages.
    """

    def __init__(
        self, description: NodeRecord, *, archive: Archive, sign: Sign, chance: Chance, epoch_ns: int, now: float
    ) -> None:
        self._archive, self._sign, self._chance = archive, sign, chance
        self._epoch, self._start, self._begun = epoch_ns, now, now
        self._description, self._floor = description, 0
        self.changed, self.clashes = False, 0
        self.ages: deque[float] = deque(maxlen=AGES)
        self.held = self.make((), now)
        self._first = self._floor

    def make(self, neighbours: tuple[NodeId, ...], now: float, *, leaving: bool = False) -> Held:
        """A new record."""
        version = max(1, self._floor + 1, self._wall(now))
        record = structs.replace(
            self._description, version=version, neighbours=neighbours, leaving=leaving, age=self.age
        )
        self._floor, self.made = version, now
        self.changed, self._life = False, LIFE * self._chance.between(0.8, 1.0)
        self.held = self._archive.own(record, self._sign)
        return self.held

    @property
    def age(self) -> float:
        """Median seconds that a message took; 0: there was none yet."""
        return round(sorted(self.ages)[len(self.ages) // 2], 4) if self.ages else 0.0

    def due(self, known: int) -> float:
        """When the next record is due, in a network of which so many nodes are known."""
        if self.changed:
            return self.made + max(GAP, known / RATE)
        return self.made + self._life

    def describe(self, description: NodeRecord, now: float) -> None:
        """This node is different now; `description.version` is the wall clock, 0 for the old one."""
        if description.version:
            self._epoch, self._start = description.version, now
        self.changed = self.changed or noticeable(self.held.record, description)
        self._description = description

    def met(self, other: Held, born: float) -> bool:
        """Whether this record of this very node, which was made at `born`, is newer than the last one made here."""
        if not other.beats(self.held):
            return False
        self._floor, self.changed = max(self._floor, other.record.version), True
        self.clashes += born > self._begun + DOUBT or other.record.version > self._first
        return True

    def latest(self, now: float) -> bytes:
        """The newest version of others that is believed."""
        return stamp(self._wall(now) + FUTURE)

    def _wall(self, now: float) -> int:
        return self._epoch + int((now - self._start) * 1e9)


def noticeable(old: NodeRecord, new: NodeRecord) -> bool:
    """Whether a record says something that others should know before long: more than a little change of load."""
    if (old.room == 0) != (new.room == 0) or 4 * abs(old.room - new.room) > max(1, new.slots):
        return True
    return lasting(old) != lasting(new)


def lasting(record: NodeRecord) -> tuple[object, ...]:
    """What a record says, but for load and neighbours."""
    one = record
    return one.addresses, one.agent, one.slots, one.engines, one.images, one.labels, one.gateway, one.leaving
