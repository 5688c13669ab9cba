"""Which shard goes to which node next.

Theory of operation. Nodes say how much **room** they have; the requester offers no more than
that. Jobs that want attempts stand in a **ring** and nodes with room in a queue; each pair
takes one node from the queue and one shard from the next job of the ring, so jobs share slots
evenly and nodes fill evenly.

Each shard has a **home** (with replicas: as many as those), the nodes that rank highest for its data
(`ranking.py`); they are found once, when the job comes. A node takes the shards at home with it
first, then any other; one whose home has room now goes to its home. So a rerun finds its data
where it was, and no node idles for that. No node is home to more than its share, which is larger for one that has
the job's image.

A node that refused a job for good gets none of its shards. A node that has **tried** a shard (it lost it,
gave it back, or runs it as another replica) gets it again only when no other can be had; without
replicas also when it has waited a lease for them. A **distrusted** node, whose answer was outvoted, gets
something only when all others are out of the question.

Nodes that were **suspected** (silent for a lease, or dialled in vain) or full have no room; `probe` lets one shard
try them again when a job's patience is over. A node where executions fail by its own fault **rests**, longer each time,
so that a daemon which is away for a moment does not burn the attempts of a job.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict, deque
from collections.abc import Iterable, Iterator
from typing import Final

from bacalhau_node.ids import NodeId
from bacalhau_node.messages import NodeRecord
from bacalhau_node.protocol import ranking
from bacalhau_node.protocol.fitness import unfit
from bacalhau_node.protocol.records import Job, Node, Shard

LEASE: Final = 15.0
"""Seconds of silence after which an execution counts as lost (DESIGN section 5)."""

MAX_OFFER: Final = 256
"""Shards in one offer: about 30 kB, so that the first ones start before the last are sent (a guess)."""

MAX_FAULTS: Final = 3
"""Faults of its own in a row, with rests between them, after which a node gets no more of a job (a guess: 9 s)."""

FIRST_REST: Final = 3.0
LONGEST_REST: Final = 60.0
"""Seconds that a node gets nothing after a fault of its own, doubled with each in a row (a guess: a daemon starts)."""

IMAGE_HERE: Final = 4.0
"""How many times more shards are at home with a node that need not pull their image (a guess: a pull takes minutes)."""

SCAN: Final = 16
"""How many shards that were tried before are looked at for one node: bounds the work of an event (a guess)."""


class Placement:
    """The known nodes and the jobs that want attempts."""

    def __init__(self) -> None:
        self.nodes: dict[NodeId, Node] = {}
        self.changed = False
        """Whether there may be a pair to offer."""
        self._distrusted: set[NodeId] = set()  # asked, never iterated
        self._order = ranking.Ring()
        self._ring: deque[Job] = deque()
        self._open: OrderedDict[NodeId, Node] = OrderedDict()

    # --- nodes ---

    def know(self, node_id: NodeId) -> Node:
        """The record of a node, made if it is new."""
        node = self.nodes.get(node_id)
        if node is None:
            node = self.nodes[node_id] = Node(node_id, distrusted=node_id in self._distrusted)
            self._order.add(node_id)
        return node

    def record(self, node: Node, record: NodeRecord, jobs: Iterable[Job]) -> None:
        """The node says this about itself: it may run other ones of the `jobs` now."""
        before, node.record = node.record, record
        if before is None or _lasting(before) != _lasting(record):
            for job in jobs:
                self._rate(job, node)

    def _rate(self, job: Job, node: Node) -> None:
        if node.record is not None and (why := unfit(job.spec, node.record)):
            job.unfit[node.id] = why
        else:
            job.unfit.pop(node.id, None)

    def fault(self, node: Node, job: Job, why: str, *, now: float) -> None:
        """An execution has failed by the node's own fault: it rests. Others that ran beside it fail of the same.

        After some faults in a row it gets no more of the job.
        """
        if now >= node.rest:
            node.rest = now + min(FIRST_REST * 2**node.faults, LONGEST_REST)
            node.faults += 1
        node.room = 0
        if node.faults >= MAX_FAULTS:
            job.never[node.id] = why

    def room(self, node: Node, reported: int, now: float) -> None:
        """The node says it has room for `reported` more; offers on their way to it are not counted in that."""
        node.room = max(0, reported - node.unanswered) if now >= node.rest else 0
        if node.room and self.nodes.get(node.id) is node:
            self._open[node.id] = node
            self.changed = True

    def distrust(self, node_id: NodeId) -> None:
        """The node was outvoted; it stays distrusted though it should go and come back."""
        self._distrusted.add(node_id)
        if node_id in self.nodes:
            self.nodes[node_id].distrusted = True

    def forget(self, node: Node) -> None:
        """The node is gone."""
        node.room = 0
        self.nodes.pop(node.id, None)
        self._order.remove(node.id)
        self._open.pop(node.id, None)

    def works(self, node_id: NodeId) -> bool:
        """Whether the node has an execution that may still end well."""
        node = self.nodes.get(node_id)
        return node is not None and bool(node.live)

    def idle(self) -> list[Node]:
        """The nodes that have room, in the order of the queue."""
        return [node for node in self._open.values() if node.room]

    def anybody_for(self, job: Job) -> bool:
        """Whether there is a node for it that is not suspected."""
        return any(not (node.suspect or job.excludes(node.id)) for node in self.nodes.values())

    # --- jobs ---

    def ready(self, job: Job) -> None:
        """The job may have something to offer."""
        self.changed = True
        if not job.ringed:
            job.ringed = True
            self._ring.append(job)

    def rate(self, job: Job) -> None:
        """Find the nodes that can't run a new job."""
        for node in self.nodes.values():
            self._rate(job, node)

    def house(self, job: Job) -> None:
        """Find the homes of a new job's shards; equal blocks (shards without input) get different ones."""
        if len(self.nodes) < 2:
            return
        left = self._shares(job)
        seen: Counter[str] = Counter()
        for shard in job.shards:
            again = seen[shard.block]
            seen[shard.block] += 1
            name = ranking.key(f"{shard.block} {again}" if again else shard.block)
            for node in self._order.best(name, count=job.spec.replicas, weight=left.__getitem__):
                left[node] -= 1
                job.homes.setdefault(node, deque()).append(shard)
                shard.home = shard.home or node

    def _shares(self, job: Job) -> dict[NodeId, float]:
        """How many of a job's executions each node should be home to: by its room, and none of a doubtful one."""
        able = [node for node in self.nodes.values() if not job.excludes(node.id)]
        weights = dict.fromkeys(self.nodes, 0.0)
        weights.update((node.id, self._weight(node) * _by_image(job.spec.image, node.record)) for node in able)
        each = len(job.shards) * job.spec.replicas / (sum(weights.values()) or 1.0)
        return {node: math.ceil(weight * each) for node, weight in weights.items()}

    def pairs(self, now: float) -> Iterator[tuple[Node, Job, Shard]]:
        """Pairs to offer now, one by one; the caller makes each offer before it asks for the next."""
        given: Counter[NodeId] = Counter()
        misses = 0
        while self._ring and misses < len(self._open):
            _, node = self._open.popitem(last=False)
            if not node.room:
                continue
            self._open[node.id] = node
            found = self._match(node, now) if given[node.id] < MAX_OFFER else None
            if found is None:
                misses += 1
                continue
            misses = 0
            job, shard = found
            if given[shard.home or ""] < MAX_OFFER:
                node = self._at_home(job, shard, now) or node
            node.room -= 1
            given[node.id] += 1
            yield node, job, shard
        self.changed = False

    def hopeless(self, job: Job) -> bool:
        """Whether every known node has refused the job for good, or can't run it."""
        return bool(self.nodes) and all(job.excludes(node) for node in self.nodes)

    def usable(self, job: Job) -> int:
        """How many known nodes may run shards of the job."""
        return sum(not (node.distrusted or job.excludes(node.id)) for node in self.nodes.values())

    def probe(self, job: Job, now: float) -> None:
        """Let one shard try each idle node that had no room; suspects only when there is no other."""
        able = [node for node in self.nodes.values() if not job.excludes(node.id)]
        for node in [node for node in able if not node.suspect] or able:
            if not node.room and not node.live:
                self.room(node, 1, now)
        self.ready(job)

    # --- who gets what ---

    def suits(self, job: Job, shard: Shard, node: Node, now: float) -> bool:
        """Whether the shard's next attempt may go to this node."""
        if job.excludes(node.id) or (node.distrusted and self._other(job, None)):
            return False
        if not shard.had(node.id):
            return True
        return (job.spec.replicas == 1 and now - shard.since >= LEASE) or not self._other(job, shard)

    def _other(self, job: Job, shard: Shard | None) -> bool:
        """Whether there is a node that answers, can run the job, is trusted, and has not tried the shard."""
        return any(
            not (node.suspect or node.distrusted or job.excludes(node.id) or (shard is not None and shard.had(node.id)))
            for node in self.nodes.values()
        )

    def _weight(self, node: Node) -> float:
        return 0.0 if node.suspect or node.distrusted else node.room + 1.0  # a full one has room later

    def _at_home(self, job: Job, shard: Shard, now: float) -> Node | None:
        """The shard's home, if it has room for it."""
        home = self.nodes.get(shard.home) if shard.home is not None else None
        return home if home is not None and home.room and self.suits(job, shard, home, now) else None

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
        if job.excludes(node.id) or (node.distrusted and self._other(job, None)):
            return None
        for _ in range(min(len(job.again), SCAN)):
            shard = job.again.popleft()
            if self._takes(job, shard, node, now):
                return shard
        if (own := self._own(job, node, now)) is not None:
            return own
        while job.fresh:
            shard = job.fresh.popleft()
            if self._takes(job, shard, node, now):
                return shard
        return None

    def _takes(self, job: Job, shard: Shard, node: Node, now: float) -> bool:
        """Whether a shard that left its queue goes to this node; else it is queued again, if it still wants one."""
        shard.queued = False
        if not shard.wants:
            return False
        if self.suits(job, shard, node, now):
            return True
        shard.queued = True
        job.again.append(shard)
        return False

    def _own(self, job: Job, node: Node, now: float) -> Shard | None:
        """The next shard at home with this node."""
        homes = job.homes.get(node.id)
        while homes:
            shard = homes.popleft()
            if shard.wants and self.suits(job, shard, node, now):
                return shard
        return None


def _by_image(image: str | None, record: NodeRecord | None) -> float:
    """What a node is the better for having an image, which one of whom nothing is known may have."""
    if image is None:
        return 1.0
    here = record is None or not {image, f"{image}:latest"}.isdisjoint(record.images)
    return IMAGE_HERE if here else 1.0


def _lasting(record: NodeRecord) -> tuple[object, ...]:
    """What decides which jobs a node can run."""
    return record.leaving, record.labels, record.engines
