"""The nodes that a node knows: bounded, compared with those of others, and without the dead.

Theory of operation. A view holds the newest record of each node that it knows, and when that record was made. That is
reckoned by monotonic clocks only: a record is handed on with its **age**, whoever takes it reckons back from its own
`now`, and so all views agree on when it was made whatever the wall clocks say. A record that is older than `STALE`
is dropped; one older than `PASSABLE` is neither handed on nor taken, so that nobody gives back what others have just
dropped. A node that is known to be dead or gone before its last record is stale gets a **grave**, which keeps that
record from coming back until it is stale.

Two views are compared by digests, of 16 bytes a node. A view that is full takes few new nodes at a time, each in the
place of one that is drawn by lot: so every view of a large network stays a random part of it.

Memory: a thousand views of a thousand nodes share their records (`Archive`) and the whole seconds of their ages, so
an entry costs its places in two dictionaries, some 75 bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from struct import iter_unpack
from typing import Final

from bacalhau_node.errors import ProtocolError
from bacalhau_node.ids import NodeId
from bacalhau_node.messages import Copy, Digest, Records
from bacalhau_node.protocol.archive import Held
from bacalhau_node.protocol.chance import Chance

LIFE: Final = 300.0
"""Seconds after which a node makes a new record though nothing has changed."""

PASSABLE: Final = 2 * LIFE
"""A record has a second life to spread."""

STALE: Final = PASSABLE + 60.0
"""Ages are whole seconds, rounded down at every hop: the minute is for what that adds up to."""

DOUBT: Final = 10.0
"""So many seconds the time at which a record was made may be wrong, for the same reason."""

MAX_DIGEST: Final = 2048
"""Nodes named in one digest: 32 KiB."""

BATCH: Final = 256
"""New nodes that are taken from one exchange: what a joining node asks of another is bounded."""

MIX: Final = 16
"""The same for a view that is full."""

MAX_RECORDS: Final = 128
"""Records of one message: at most 1 MiB."""

_ITEM: Final = 16


@lru_cache(maxsize=4096)
def _shared(second: int) -> int:
    """The one object for a number of seconds: a million entries have a few hundred different ones."""
    return second


@dataclass(slots=True, frozen=True, eq=False)
class Grave:
    """A node that is dead since `since`, or has left, until `end`. The last record of one that left is still told."""

    held: Held
    left: bool
    since: float
    end: float


class View:
    """The records that a node holds: those of others in `held`, and `own`.

    `born`: the second of `now` in which each was made.
    """

    def __init__(self, own: Held, now: float, *, bound: int, chance: Chance) -> None:
        self.bound, self._chance = bound, chance
        self.held: dict[NodeId, Held] = {}
        self.born: dict[NodeId, int] = {}
        self.graves: dict[NodeId, Grave] = {}
        self.renew(own, now)

    def renew(self, own: Held, now: float) -> None:
        """This node has a new record."""
        self.own, self.made = own, now

    def age(self, node: NodeId, now: float) -> float:
        """Seconds since the record of a known node was made."""
        return now - self.born[node]

    # --- what is known ---

    def outdated(self, held: Held) -> bool:
        """Whether a record says nothing new."""
        grave = self.graves.get(held.node)
        old = grave.held if grave else self.held.get(held.node)
        return old is not None and not held.beats(old)

    def put(self, held: Held, age: float, now: float) -> Held | None:
        """Hold a record; returns the one in whose place it is."""
        self.graves.pop(held.node, None)
        old = self.held.get(held.node)
        self.held[held.node] = held
        self.born[held.node] = _shared(int(now - age))
        return old

    def drop(self, node: NodeId) -> None:
        """Forget a node."""
        self.held.pop(node, None)
        self.born.pop(node, None)

    def bury(self, held: Held, *, born: float, since: float) -> None:
        """Forget a node, and keep its record from coming back."""
        self.graves.pop(held.node, None)
        self.drop(held.node)
        self.graves[held.node] = Grave(held, held.record.leaving, since, born + STALE)
        while len(self.graves) > self.bound:
            del self.graves[next(iter(self.graves))]

    def expired(self, now: float) -> list[NodeId]:
        """The graves that are not needed any more."""
        return [node for node, grave in self.graves.items() if grave.end <= now]

    def older(self, age: float, now: float) -> list[NodeId]:
        """Known nodes whose record is older than this."""
        limit = now - age
        return [node for node, born in self.born.items() if born < limit]

    @property
    def full(self) -> bool:
        """Whether one has to go for one that comes."""
        return len(self.held) >= self.bound

    def room(self) -> int:
        """How many new nodes it takes from one exchange."""
        return max(MIX, min(BATCH, self.bound - len(self.held)))

    def lot(self, spared: Callable[[NodeId], bool]) -> NodeId | None:
        """A known node by lot, to be forgotten; None when all that were drawn are spared."""
        nodes = list(self.held)
        drawn = (self._chance.pick(nodes) for _ in range(4 if nodes else 0))
        return next((node for node in drawn if not spared(node)), None)

    def dialable(self, count: int, spared: Callable[[NodeId], bool]) -> list[Held]:
        """Records of up to so many other nodes that can be dialled, by lot."""
        found = [one for one in self.held.values() if one.record.addresses and not spared(one.node)]
        return self._chance.sample(found, count)

    # --- comparing ---

    def digest(self) -> Digest:
        """What this view holds, by lot where that is too much."""
        mine = [held.packed for held in self._told()]
        complete = len(mine) <= MAX_DIGEST
        if not complete:
            mine = self._chance.sample(mine, MAX_DIGEST)
        return Digest(b"".join(mine), complete=complete, room=self.room())

    def compare(self, digest: Digest, latest: bytes) -> tuple[list[Held], bytes]:
        """(records that the other lacks, keys of the nodes of which it has newer ones, none after `latest`)."""
        told = self._told()
        named = {item for (item,) in iter_unpack(f"{_ITEM}s", checked(digest).known)}
        theirs = {item[:8]: item[8:] for item in named.difference([held.packed for held in told])}
        differing = [(held, theirs.get(held.key, b"")) for held in told if held.packed not in named]
        newer = [held for held, stamp in differing if b"" < stamp < held.stamp]
        wanted = [held.key for held, stamp in differing if held.stamp < stamp <= latest]
        mine = {held.key for held in told} if theirs else set()
        mine.update(
            grave.held.key for grave in self.graves.values() if theirs.get(grave.held.key, b"") <= grave.held.stamp
        )
        strange = sorted(key for key, stamp in theirs.items() if key not in mine and stamp <= latest)
        wanted += self._chance.sample(strange, self.room())
        if digest.complete:
            unknown = [held for held, stamp in differing if not stamp and not held.record.leaving]
            newer += self._chance.sample(unknown, min(digest.room, BATCH))
        return newer, b"".join(wanted)

    def wanted(self, keys: bytes) -> list[Held]:
        """The records that the other asked for."""
        if len(keys) % 8 or len(keys) > 8 * MAX_DIGEST:
            raise ProtocolError(f"a list of {len(keys)} bytes of wanted nodes")
        asked = {keys[at : at + 8] for at in range(0, len(keys), 8)}
        return [held for held in self._told() if held.key in asked]

    def letters(self, records: Iterable[Held], now: float, *, wanted: bytes = b"") -> list[Records]:
        """Messages with these records, as far as they may be handed on; one at least."""
        copies = (self._copy(held, now) for held in records)
        passed = iter([copy for copy in copies if copy.age <= PASSABLE])
        letters = [Records(tuple(islice(passed, MAX_RECORDS)), wanted)]
        while more := tuple(islice(passed, MAX_RECORDS)):
            letters.append(Records(more))
        return letters

    def _copy(self, held: Held, now: float) -> Copy:
        if held is self.own:
            born = self.made
        elif (grave := self.graves.get(held.node)) is not None:
            born = grave.end - STALE
        else:
            born = self.born.get(held.node, now)
        return Copy(held.signed, max(0, int(now - born)))

    def _told(self) -> list[Held]:
        """All that is told to others: this node's record, those of known nodes, the last ones of those that left."""
        return [self.own, *self.held.values(), *(grave.held for grave in self.graves.values() if grave.left)]


def checked(digest: Digest) -> Digest:
    """The digest, if it can be one; raises `ProtocolError`."""
    if len(digest.known) % _ITEM or len(digest.known) > _ITEM * MAX_DIGEST:
        raise ProtocolError(f"a digest of {len(digest.known)} bytes")
    return digest
