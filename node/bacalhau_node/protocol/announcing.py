"""Finding nodes that the view does not hold: one announcement to everybody, and bids that come a few at a time.

Theory of operation. A requester places shards by its view of the network and asks nobody. Only when that has fewer
nodes that could run a job than the job has replicas, or none at all, is the job **announced**: what it requires,
never its data. A node that could run it **bids** (it says how much room it has) and is answered by an
offer, like any node of the view.

A thousand nodes must not bid at once. Each has a **rank** for the job, a hash of the two between 0 and 1, and waits

    first * 2 ** (round - 1) * log2(1 + rank * nodes / (SLACK * wanted))

seconds: in each `first` seconds twice as many bid as in those before, and about `wanted` of them in the first.
A bid costs its requester up to 20 ms (a new connection), so `first` is at least as long as the first ones take. When
everything is placed, an announcement of nothing (`wanted` 0) stops those that still wait. After `window` everybody
has had a turn: a job that nobody bid for, and that no known node can run, has no chance; one that found too few is
announced again, up to `ROUNDS` times, each round with twice the time.
"""

from __future__ import annotations

import math
from typing import Final

from bacalhau_node.ids import JobId, NodeId
from bacalhau_node.messages import Announce, Bid
from bacalhau_node.protocol import ranking
from bacalhau_node.protocol.book import Book
from bacalhau_node.protocol.events import AnnounceTimer, BidTimer, Effect, Learn, Publish, Send, SetTimer
from bacalhau_node.protocol.fitness import requirements_only
from bacalhau_node.protocol.records import Job

SLACK: Final = 1.5
"""Bids that are wanted at first for each execution: some nodes are full by the time (a guess)."""

FIRST: Final = 0.5
A_BID: Final = 0.02
"""Seconds of the first turn, at least, and the seconds that a bid costs its requester (measured: 13 to 20 ms)."""

TRAVEL: Final = 1.0
"""Seconds that an announcement takes to everybody, and a bid back (measured: 0.7 to 1 s among 1,000 nodes)."""

ROUNDS: Final = 3
"""Announcements of one job at most (a guess)."""

REMEMBERED: Final = 256
"""Announced jobs that a node remembers, so that it bids once (a guess)."""

MAX_BIDS: Final = 10_000
"""Bids that one announcement brings at most: each makes a node known, and identities cost nothing."""

QUIET: Final = 32
"""In a network of no more nodes the bidders need not be told that all is placed."""


def delay(job: JobId, node: NodeId, *, nodes: int, wanted: int, turn: int) -> float:
    """How long a node waits before it bids, in seconds; `turn` is the round, from 1."""
    return _ladder(ranking.key(f"{job} {node}") / 2**64, nodes=nodes, wanted=wanted, turn=turn)


def window(*, nodes: int, wanted: int, turn: int) -> float:
    """The seconds after which everybody has had a turn."""
    return TRAVEL + _ladder(1.0, nodes=nodes, wanted=wanted, turn=turn)


def _ladder(rank: float, *, nodes: int, wanted: int, turn: int) -> float:
    bids = SLACK * wanted
    return float(max(FIRST, A_BID * bids) * 2 ** (turn - 1) * math.log2(1 + rank * nodes / bids))


# --- the requester's half ---


def look(book: Book, job: Job, *, stuck: bool) -> None:
    """Announce the job if too few nodes are known for it; `stuck`: its shards wait and none is at work."""
    if book.addresses is None:
        return
    if job.announce_armed:
        if not job.wanting:
            job.announce_armed = False
            if book.network > QUIET:
                _publish(book, job, wanted=0)
    elif job.wanting and job.announced < ROUNDS and (job.few or (stuck and book.placement.hopeless(job))):
        job.announced += 1
        job.announce_armed, job.bids = True, 0
        _publish(book, job, wanted=job.wanting)
        wait = window(nodes=book.network, wanted=job.wanting, turn=job.announced)
        book.timer(AnnounceTimer(job.id), after=wait)


def over(book: Book, job: Job) -> None:
    """Everybody has had a turn."""
    job.announce_armed = False
    job.few = book.placement.usable(job) < job.spec.replicas
    if not job.bids:
        job.announced = ROUNDS


def hopeless(book: Book, job: Job) -> bool:
    """Whether no node can run the job: none that is known, and none that heard of it."""
    asked = book.addresses is None or (job.announced >= ROUNDS and not job.announce_armed)
    return asked and book.placement.hopeless(job)


def bid(book: Book, sender: NodeId, message: Bid) -> None:
    """A node could run the job: it is one more that is known, whatever was known of it before."""
    job = book.jobs.get(message.job)
    if job is None or not job.unfinished or job.bids >= MAX_BIDS:
        return
    job.bids += 1
    job.unfit.pop(sender, None)
    book.placement.room(book.placement.know(sender), message.room, book.now)
    book.touch(job)


def explain(book: Book, job: Job) -> None:
    """Shards wait and none is at work: say why, or give up when no node can ever run them."""
    nodes = book.placement.nodes
    if hopeless(book, job):
        # One node needs no name: mostly it is that of the notebook.
        why = [f"{node}: {job.excludes(node)}" if len(nodes) > 1 else job.excludes(node) for node in nodes]
        book.close(job, "Failed", f"no node can run it: {'; '.join(why)}")
    elif not nodes:
        book.become(job, "Queued", "no node is known yet")
    elif job.announce_armed:
        book.become(job, "Queued", "no known node can run it: all others are asked")
    else:
        book.become(job, "Queued", job.busy or "every known node is busy")


# --- the compute node's half ---


class Bidder:
    """The announcements that one node has heard, of the last `REMEMBERED` jobs."""

    def __init__(self, node: NodeId) -> None:
        self._node = node
        self._heard: dict[JobId, Announce] = {}

    def hear(self, author: NodeId, news: Announce, *, nodes: int, now: float) -> list[Effect]:
        """Somebody announced a job that this node could run; returns when its turn to bid is."""
        before = self._heard.get(news.job)
        stale = before is not None and (before.requester != author or news.round < before.round)
        if stale or news.requester != author or author == self._node:
            return []
        self._heard.pop(news.job, None)
        self._heard[news.job] = news
        if len(self._heard) > REMEMBERED:
            del self._heard[next(iter(self._heard))]
        if not news.wanted or (before is not None and news.round == before.round):
            return []  # all is placed, or it was heard before: no second bid in a round
        wait = delay(news.job, self._node, nodes=nodes, wanted=news.wanted, turn=max(1, news.round))
        return [SetTimer(BidTimer(news.job), now + wait)]

    def bid(self, job: JobId, room: int) -> list[Effect]:
        """This node's turn has come."""
        news = self._heard.get(job)
        if news is None or not news.wanted or not room:
            return []
        return [Learn(news.requester, news.addresses), Send(news.requester, Bid(job, room))]


def _publish(book: Book, job: Job, *, wanted: int) -> None:
    spec = requirements_only(job.spec)
    book.emit(Publish(Announce(job.id, book.node, book.addresses or (), spec, wanted, job.announced)))
