"""Which shard goes to which node next.

Theory of operation. Nodes say how much **room** they have; the requester offers no more than
that. Jobs with waiting shards stand in a **ring** and nodes with room in a queue; each pair
takes one node from the queue and one shard from the next job of the ring, so jobs share slots
evenly and nodes fill evenly. A node that refused a job for good gets none of its shards. A
shard that a node lost goes to other nodes first: to the same one only when no other can be
had, or when it has waited a lease for them.

Nodes that were **suspected** (silent for a lease) or full have no room; `probe` lets one shard
try them again when a job's patience is over.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator
from typing import Final

from bacalhau_node.ids import NodeId
from bacalhau_node.protocol.records import Job, Node, Shard

LEASE: Final = 15.0
"""Seconds of silence after which an execution counts as lost (DESIGN section 5)."""

MAX_OFFER: Final = 256
"""Shards in one offer: about 30 kB, so that the first ones start before the last are sent (a guess)."""

SCAN: Final = 16
"""How many returned shards are looked at for one node: bounds the work of an event (a guess)."""


class Placement:
    """The known nodes and the jobs with waiting shards."""

    def __init__(self) -> None:
        self.nodes: dict[NodeId, Node] = {}
        self._ring: deque[Job] = deque()
        self.changed = False
        """Whether there may be a pair to offer."""
        self._open: OrderedDict[NodeId, Node] = OrderedDict()

    def room(self, node: Node, reported: int) -> None:
        """The node says it has room for `reported` more; offers on their way to it are not counted in that."""
        node.room = max(0, reported - node.unanswered)
        if node.room and self.nodes.get(node.id) is node:
            self._open[node.id] = node
            self.changed = True

    def ready(self, job: Job) -> None:
        """The job may have something to offer."""
        self.changed = True
        if not job.ringed:
            job.ringed = True
            self._ring.append(job)

    def forget(self, node: Node) -> None:
        """The node is gone."""
        node.room = 0
        self.nodes.pop(node.id, None)
        self._open.pop(node.id, None)

    def pairs(self, now: float) -> Iterator[tuple[Node, Job, Shard]]:
        """Pairs to offer now, one by one; the caller makes each offer before it asks for the next."""
        given: dict[NodeId, int] = {}
        misses = 0
        while self._ring and misses < len(self._open):
            _, node = self._open.popitem(last=False)
            if not node.room:
                continue
            self._open[node.id] = node
            found = self._match(node, now) if given.get(node.id, 0) < MAX_OFFER else None
            if found is None:
                misses += 1
                continue
            misses = 0
            node.room -= 1
            given[node.id] = given.get(node.id, 0) + 1
            yield node, *found
        self.changed = False

    def hopeless(self, job: Job) -> bool:
        """Whether every known node has refused the job for good."""
        return bool(self.nodes) and all(node in job.never for node in self.nodes)

    def probe(self, job: Job) -> None:
        """Let one shard try each idle node that had no room; suspects only when there is no other."""
        able = [node for node in self.nodes.values() if node.id not in job.never]
        for node in [node for node in able if not node.suspect] or able:
            if not node.room and not node.live:
                self.room(node, 1)
        self.ready(job)

    def _match(self, node: Node, now: float) -> tuple[Job, Shard] | None:
        for _ in range(len(self._ring)):
            job = self._ring.popleft()
            job.ringed = job.offerable
            if not job.ringed:
                continue
            self._ring.append(job)
            if (shard := self._pick(job, node, now)) is not None:
                return job, shard
        return None

    def _pick(self, job: Job, node: Node, now: float) -> Shard | None:
        if node.id in job.never:
            return None
        for _ in range(min(len(job.again), SCAN)):
            shard = job.again.popleft()
            if shard.state != "waiting":
                continue
            if self._suits(job, shard, node, now):
                return shard
            job.again.append(shard)
        while job.fresh:
            shard = job.fresh.popleft()
            if shard.state == "waiting":
                return shard
        return None

    def _suits(self, job: Job, shard: Shard, node: Node, now: float) -> bool:
        if node.id not in shard.avoid or now - shard.since >= LEASE:
            return True
        return not any(
            not (other.suspect or other.id in job.never or other.id in shard.avoid) for other in self.nodes.values()
        )
