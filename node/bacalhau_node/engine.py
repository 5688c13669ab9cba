"""The driver: events in, one turn of the machines, one commit, then the effects.

Theory of operation. Everything that happens to a node becomes an event in one inbox. A
**turn** takes all events that are waiting, steps the requester and the compute machine,
commits every journal row and every new block of the turn in one transaction, and only then
carries out the effects: so nobody is told of a decision that a crash could undo, and a
thousand shards cost a handful of commits. A message from one of the two machines to the other
is an event of the same turn: both recover from the same journal, so neither can remember
what the other forgot. Effects that take time (running a shard, keeping a result) become
tasks whose end is the next event. This file is the only place that owns tasks and timers.

On a network there is a third machine, membership, which tells the requester of nodes that come and go. An offer
to another node is packed on its way out, and the result in a proposal is fetched on its way in, so the machines
deal in executions and never in bytes (`mail`).

A busy loop is not a dead node: a timer that fires late by more than a quarter of the lease
is armed once more for as long as it was late, so that heartbeats which queued up meanwhile
are heard before anybody is declared lost.

A disk that takes nothing stops the clock: the turn that could not be committed is **held**, its effects are
not carried out, and no further turn begins until it is committed. Watchers of jobs are told why they wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from msgspec import structs

from bacalhau_node.errors import BacalhauError, ContentError
from bacalhau_node.feed import Feed, ShardBytes, ShardText
from bacalhau_node.ids import Execution, JobId, NodeId
from bacalhau_node.inbox import ENOUGH, Inbox
from bacalhau_node.machines import Machines, for_membership
from bacalhau_node.mail import Mail
from bacalhau_node.messages import Lines, NodeRecord, Transfer
from bacalhau_node.ports import ContentStore, Journal, Transport
from bacalhau_node.protocol import events as ev
from bacalhau_node.protocol.compute import Compute
from bacalhau_node.protocol.membership import Membership
from bacalhau_node.protocol.placement import LEASE
from bacalhau_node.protocol.requester import Requester
from bacalhau_node.work import Trade, Work

log = logging.getLogger(__name__)

T = TypeVar("T")

STORE_AGAIN = 1.0
"""Seconds until what the disk did not take is tried again, doubled up to `LONGEST_WAIT` (a guess)."""
LONGEST_WAIT = 16 * STORE_AGAIN

FAREWELL = 1.0
"""Seconds that the last words of a node may take."""


@dataclass(frozen=True)
class Network:
    """What the engine of a node on a network has besides. `describe`: what the node says about itself now."""

    trade: Trade
    membership: Membership
    describe: Callable[[], NodeRecord]


class _Held:
    """A turn that the disk did not take: its effects, why, when it is tried again, and what watchers knew before."""

    def __init__(self, effects: list[ev.Effect], error: ContentError) -> None:
        self.effects, self.error = effects, error
        self.wait = STORE_AGAIN
        self.again: asyncio.TimerHandle | None = None
        self.before: list[ev.JobChanged] = []


class Engine:
    """Drives the two machines of one node over its ports. All methods on its one asyncio loop."""

    def __init__(
        self,
        *,
        requester: Requester,
        compute: Compute,
        transport: Transport,
        journal: Journal,
        content: ContentStore,
        work: Work,
        network: Network | None = None,
    ) -> None:
        self._requester, self._compute = requester, compute
        self._membership = network.membership if network is not None else None
        self._machines = Machines(requester, compute, self._membership)
        self._describe = network.describe if network is not None else None
        self._load = (-1, -1, -1)
        self._transport, self._journal, self._content = transport, journal, content
        self._work = work
        self._loop = asyncio.get_running_loop()
        self._inbox = Inbox(self._turn, patient=lambda: compute.prefetch >= ENOUGH and bool(self._runs))
        self._closing = False
        self._timers: dict[ev.Timer, asyncio.TimerHandle] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._runs: dict[Execution, asyncio.Task[None]] = {}
        self.feeds: dict[JobId, Feed] = {}
        self._held: _Held | None = None
        self._mail = Mail(
            transport,
            requester=requester,
            compute=compute,
            trade=network.trade if network is not None else None,
            spawn=self._spawn,
            post=self._hear,
            passing=self._passing,
        )
        self.tally = self._mail.links.tally

    # --- what the node calls ---

    @property
    def running(self) -> int:
        """How many executions are at work here."""
        return len(self._runs)

    @property
    def waiting(self) -> int:
        """How many events wait for the next turn."""
        return len(self._inbox)

    @property
    def lost(self) -> int:
        """How many executions of its jobs were given up since the start: their leases ended, or their nodes died."""
        return self._requester.book.lost

    def post(self, event: ev.Event) -> None:
        """Put an event into the inbox; it is handled in a turn soon."""
        self._inbox.post(event)

    def settle(self, event: ev.Submitted) -> None:
        """Handle `event` (and all before it) now: when this returns its rows are committed.

        Raises `ContentError` when the disk takes nothing: there is no such job then, or one that is stopped.
        """
        if self._held is None:
            self._content.flush()
            self._inbox.add(event)
            self._turn()
            if self._held is None:
                return
            self._inbox.add(ev.CancelRequested(event.job))  # nobody will wait for it
        raise ContentError(str(self._held.error))

    def recover(self, rows: Iterable[ev.Row], effects: Iterable[ev.Effect]) -> None:
        """Show the jobs of the journal, then carry out what the machines' recovery asks for."""
        for row in rows:
            self._record(row)
        for feed in self.feeds.values():
            feed.restore()
        first = list(self._routed(list(effects)))
        self._commit(first)
        self._carry_out(first)
        self._turn()

    async def leave(self) -> None:
        """Tell the neighbours that this node ends, and give them a moment to hear it."""
        self.post(ev.Leave())
        self._turn()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FAREWELL):
                await self._mail.links.idle.wait()

    async def close(self) -> None:
        """Stop every task and timer; what was decided is in the journal."""
        self._closing = True
        self._inbox.close()
        for handle in self._timers.values():
            handle.cancel()
        if self._held is not None and self._held.again is not None:
            self._held.again.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for feed in self.feeds.values():
            feed.end()

    # --- a turn ---

    def _turn(self) -> None:
        now = self._inbox.begin()
        if self._closing or self._held is not None:
            return
        effects: list[ev.Effect] = []
        while self._inbox or self._load_has_changed():
            effects += self._routed(self._machines.step(self._inbox.take(), now))
        try:
            self._commit(effects)
        except ContentError as error:
            self._hold(_Held(effects, error))
        else:
            self._carry_out(effects)

    def _routed(self, effects: list[ev.Effect]) -> Iterator[ev.Effect]:
        """The effects that go outside; the others go into the inbox."""
        for effect in effects:
            if isinstance(effect, ev.Send) and effect.to == self._transport.node:
                self._inbox.say(ev.Received(effect.to, effect.message))
            elif isinstance(effect, ev.NodeSeen | ev.NodeGone):
                if self._machines.placing:
                    self._inbox.say(effect)
            else:
                yield effect

    def _load_has_changed(self) -> bool:
        """Whether this node's record must say something new: then that is the next event."""
        if self._describe is None:
            return False
        dropped = self._transport.dropped + self.tally.dropped
        load = (self._compute.room, self._compute.active, dropped)
        if load == self._load:
            return False
        self._load = load
        self._inbox.add(ev.LoadChanged(structs.replace(self._describe(), dropped=dropped)))
        return True

    def _commit(self, effects: list[ev.Effect]) -> None:
        """Make what was decided durable: the blocks first, as rows name them."""
        rows = [effect.row for effect in effects if isinstance(effect, ev.Write)]
        self._content.flush()
        if rows:
            self._journal.commit(rows)

    def _carry_out(self, effects: list[ev.Effect]) -> None:
        for effect in effects:
            if isinstance(effect, ev.Write):
                self._record(effect.row)
        for effect in effects:
            self._perform(effect)

    # --- a turn that the disk did not take ---

    def _hold(self, held: _Held) -> None:
        log.error("the node waits: %s", held.error)
        self._held = held
        held.again = self._loop.call_later(held.wait, self._try_again, held)
        for feed in self.feeds.values():
            if not feed.ended:
                held.before.append(feed.job)
                feed.publish(structs.replace(feed.job, reason=f"the node waits: {held.error}"))

    def _try_again(self, held: _Held) -> None:
        try:
            self._commit(held.effects)
        except ContentError as error:
            held.error, held.wait = error, min(2 * held.wait, LONGEST_WAIT)
            held.again = self._loop.call_later(held.wait, self._try_again, held)
            return
        self._held = None
        log.info("the node goes on")
        for update in held.before:
            self._publish(update)
        self._carry_out(held.effects)
        self._turn()

    def _record(self, row: ev.Row) -> None:
        if not isinstance(row, ev.ComputeRow):
            feed = self.feeds.get(row.job) or self.feeds.setdefault(row.job, Feed(row.job))
            feed.record(row)

    def _perform(self, effect: ev.Effect) -> None:  # noqa: C901 - one arm per effect, each a line or two
        match effect:
            case ev.Write():
                pass  # committed before
            case ev.Send(to, message):
                self._mail.send(to, message)
            case ev.Publish() | ev.Dial() | ev.HangUp() | ev.Complain() | ev.Learn():
                self._mail.links.perform(effect)
            case ev.SetTimer(timer, at):
                self._set_timer(timer, at)
            case ev.Notify(update):
                self._publish(update)
            case ev.Run():
                self._runs[effect.execution] = self._spawn(self._run(effect))
            case ev.Stop(execution):
                if task := self._runs.pop(execution, None):
                    task.cancel()
            case ev.Keep():
                self._keep(effect)
            case ev.Seal():
                self._spawn(self._sealed(effect))
            case ev.ReleaseJob(job):
                self._spawn(self._released(job))
            case ev.Forget(execution):
                self._work.settled(execution)

    def _publish(self, update: ev.ShardChanged | ev.JobChanged) -> None:
        if isinstance(update, ev.JobChanged) and update.state in ev.FINAL_JOB:
            self._work.ended(update.job)
        if feed := self.feeds.get(update.job):
            feed.publish(update)

    # --- messages ---

    def _hear(self, event: ev.Event) -> None:
        """An event of the network; without membership nobody cares for links."""
        if self._membership is not None or not for_membership(event):
            self.post(event)

    def _passing(self, sender: NodeId, news: Lines | Transfer) -> None:
        """Pass what is only for people on to the job's watchers, if it comes from an execution that is wanted."""
        e = news.execution
        feed = self.feeds.get(e.job)
        if feed is None or not self._requester.live(e, sender):
            return
        if isinstance(news, Lines):
            feed.text(ShardText(e.job, e.shard, e.attempt, news.stream, news.text))
        else:
            feed.transfer(ShardBytes(e.job, e.shard, e.attempt, news.name, news.done, news.total, news.cid))

    # --- timers ---

    def _set_timer(self, timer: ev.Timer, at: float) -> None:
        if old := self._timers.pop(timer, None):
            old.cancel()
        self._timers[timer] = self._loop.call_at(at, self._fire, timer, at)

    def _fire(self, timer: ev.Timer, at: float) -> None:
        late = self._loop.time() - at
        deaf = late > LEASE / 4 or self._held is not None
        if deaf and isinstance(timer, ev.LeaseTimer):
            self._set_timer(timer, self._loop.time() + max(late, LEASE / 4))
            return
        self._timers.pop(timer, None)
        self.post(ev.TimerFired(timer))

    # --- tasks: each ends in an event ---

    def _spawn(self, work: Coroutine[object, object, None]) -> asyncio.Task[None]:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[None]) -> None:
        """The task boundary: whatever was not foreseen is told once, with its traceback."""
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            log.error("a task of the node failed: %s", error, exc_info=error)

    async def _run(self, run: ev.Run) -> None:
        try:
            outcome = await self._work.execute(run, self._progress)
        finally:
            self._runs.pop(run.execution, None)
        self.post(ev.ExecutionEnded(run.execution, outcome))

    def _progress(self, news: ev.Event | Lines | Transfer) -> None:
        if isinstance(news, Lines | Transfer):
            to = self._compute.requester(news.execution)
            if to == self._transport.node:
                self._passing(to, news)
            elif to is not None:
                self._mail.send(to, news)
        else:
            self.post(news)

    def _keep(self, keep: ev.Keep) -> None:
        """Keep a result; a task only where the store does not take it at once."""
        try:
            self._work.keep(keep)
        except (ContentError, OSError):
            self._spawn(self._kept(keep))
        else:
            self.post(ev.ResultKept(keep.execution))

    async def _kept(self, keep: ev.Keep) -> None:
        await self._stored(lambda: asyncio.to_thread(self._work.keep, keep))
        self.post(ev.ResultKept(keep.execution))

    async def _sealed(self, seal: ev.Seal) -> None:
        self.post(await self._stored(lambda: self._work.seal(seal)))

    async def _stored(self, attempt: Callable[[], Awaitable[T]]) -> T:
        """Store something that was decided: a full disk delays it, and is told, but can't undo it."""
        wait = STORE_AGAIN
        while True:
            try:
                return await attempt()
            except (ContentError, OSError):
                log.exception("a result can't be stored; trying again in %.0f s", wait)
                await asyncio.sleep(wait)
                wait = min(2 * wait, LONGEST_WAIT)

    async def _released(self, job: JobId) -> None:
        try:
            await self._work.release(job)
        except BacalhauError:
            log.exception("job %s was not released cleanly", job)
