"""The requester of a job: offers its shards, watches over them, and decides which results count.

Theory of operation. `step` takes one event and returns the effects; the records and what follows
from changing them are in `book.py`, the choice of nodes in `placement.py`. Nothing here waits, and
no event but the first and the last of a job walks over all its shards.

**Attempts.** Every offer of a shard is a new attempt and is journaled before it is sent, so an
attempt's number never means two things, restarts included. An attempt is *live* from its offer
until it is refused, lost, ended or cancelled; a shard has at most as many live attempts as the job has
replicas, one more while a slow one is tried elsewhere, and at most one accepted outcome. A message about an
attempt that is not live changes nothing, with one exception: the end of a *lost* attempt counts
while its shard still wants one.

**Ends.** What ended and is not repeated is a vote; `voting.py` says which votes decide. Proposals that wait for
others are not answered: their nodes propose them again, now and then, so a requester that was
restarted hears of them once more. What a node is told, and what the clients see, is only what was decided.

**Leases.** A live attempt must be heard of (take, started, heartbeat) within a lease. An offer that is not answered is
sent again; nodes answer a repeated offer alike. The node of a lost attempt, or one that was dialled in vain, is
suspected: it gets no offer while there are others, until it is heard again. See `watch.py`.

**How a node hears the requester.** Each heartbeat is answered by one `Cancel` that names what
this requester does not want; an empty one only says "I am here", and keeps the node from giving
up the work of a silent requester. For what has been kept already the answer is `Kept` again.

**Other nodes.** An offer to another node is packed outside of this machine: until `OfferPacked` its lease does not
run, and nothing can be heard of it. A result of another node is fetched before its proposal comes here, so what is
accepted is here: no death of a node takes it away. What does not come (`ResultMissing`) is a lost attempt.

**Kept.** An outcome that counts, a result or the final failure of a shard, is accepted (journaled), then
kept (stored), then its node may forget it. What ends a shard is told by `voting.repeats`; failures of
some shards never stop the others. When every shard is final, the job is sealed over what was
kept and ends. A job that is cancelled, or runs out of its time, or that no node can run, decides
so at once (journaled as its state), stops what has no outcome yet, and ends in the same way.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Final

from bacalhau_node.errors import BugError
from bacalhau_node.ids import Execution, JobId, NodeId
from bacalhau_node.messages import (
    Accept,
    Bid,
    Cancel,
    Heartbeat,
    Kept,
    Lines,
    Message,
    Outcome,
    Propose,
    Refuse,
    Reject,
    Started,
    Take,
)
from bacalhau_node.protocol import announcing, invariants, moving, recovery, voting, watch
from bacalhau_node.protocol.book import Book
from bacalhau_node.protocol.events import (
    AnnounceTimer,
    CancelRequested,
    Effect,
    Event,
    JobDeadline,
    JobSealed,
    LeaseTimer,
    NodeGone,
    NodeSeen,
    Received,
    ResultKept,
    RetryTimer,
    Row,
    Submitted,
    TimerFired,
    WatchTimer,
)
from bacalhau_node.protocol.records import Attempt, Ended, Job, Shard

FIRST_PATIENCE: Final = 1.0
LONGEST_PATIENCE: Final = 15.0
"""Seconds until nodes without room are tried again; doubled from first to longest while they stay so (a guess)."""


class Requester:
    """The machine of one node's own jobs. `step` is the only way in; the book is for the checks."""

    def __init__(self, node: NodeId) -> None:
        self.node = node
        self.book = Book(node)

    # --- the way in ---

    def step(self, event: Event, now: float) -> list[Effect]:
        """What to do after `event`; `now` is monotonic, in seconds."""
        self.book.now = now
        match event:
            case Received():
                self._received(event.sender, event.message)
            case ResultKept():
                self._kept(event.execution)
            case TimerFired():
                self._fired(event)
            case NodeSeen():
                self._seen(event)
            case NodeGone():
                self._gone(event.node)
            case _ if isinstance(event, moving.Moved):
                moving.step(self.book, event)
            case _:
                self._told(event)
        return self._settled()

    def _told(self, event: Event) -> None:
        match event:
            case Submitted():
                self._submitted(event)
            case CancelRequested():
                if (job := self.book.jobs.get(event.job)) is not None:
                    self.book.close(job, "Stopped", "cancelled")
            case JobSealed():
                if (job := self.book.jobs.get(event.job)) is not None:
                    self.book.end(job, cid=event.cid, published=event.published, problem=event.problem)
            case _:
                raise BugError(f"a requester was given {type(event).__name__}")

    @classmethod
    def recover(
        cls,
        node: NodeId,
        rows: Iterable[Row],
        now: float,
        *,
        resume: bool,
        blocks: Mapping[JobId, tuple[str, ...]] = MappingProxyType({}),
    ) -> tuple[Requester, list[Effect]]:
        """A requester with the unfinished jobs of a journal, and what to do first.

        With `resume` the jobs go on; `blocks` holds the plan's blocks of each. Their live attempts
        get new leases and are offered again: nodes answer alike, and those that have ended propose
        again. Without, unfinished jobs are stopped, and keep what they had. Either way, accepted
        results that were not stored yet are asked to be kept again.
        """
        self = cls(node)
        self.book.now = now
        rows = list(rows)
        for name in recovery.distrusted(rows):
            self.book.placement.distrust(name)
        for job in recovery.jobs(rows, blocks=blocks, now=now, know=self.book.placement.know):
            self.book.adopt(job)
            if not resume:
                self.book.close(job, "Stopped", "the node stopped before the job had ended")
            elif job.unfinished:
                self._set_deadline(job)
                for attempt in job.live.values():
                    attempt.packing = attempt.node.id != node
                    self.book.send_offer(attempt)
        return self, self._settled()

    def live(self, execution: Execution, sender: NodeId) -> bool:
        """Whether its lines, sent by `sender`, are for the job's clients: of several live attempts only the first's."""
        match self.book.verdict(sender, execution):
            case Attempt() as attempt:
                return next(iter(attempt.shard.live)) == execution.attempt
            case Ended():
                return True
            case _:
                return False

    def wants(self, execution: Execution, sender: NodeId) -> bool:
        """Whether a result of this execution, proposed by `sender`, may still count."""
        verdict = self.book.verdict(sender, execution)
        return isinstance(verdict, Attempt) or verdict == "late"

    def check(self) -> None:
        """Raise `BugError` if the records contradict each other or break a rule of the protocol."""
        invariants.check_requester(self.book.jobs.values(), self.book.placement.nodes)

    # --- jobs and nodes ---

    def _submitted(self, event: Submitted) -> None:
        if not event.blocks:
            raise BugError(f"job {event.job} was submitted without shards")
        if event.job in self.book.jobs:
            raise BugError(f"job {event.job} was submitted twice")
        shards = [Shard(index, block) for index, block in enumerate(event.blocks)]
        job = Job(event.job, event.spec, event.plan, event.created, shards)
        self.book.add(job)
        self._set_deadline(job)

    def _set_deadline(self, job: Job) -> None:
        if job.spec.job_timeout is not None:
            self.book.timer(JobDeadline(job.id), after=job.spec.job_timeout)

    def _seen(self, event: NodeSeen) -> None:
        node = self.book.placement.know(event.node)
        node.suspect = False
        if event.record is not None:
            self.book.placement.record(node, event.record, self.book.jobs.values())
        if event.unreached:
            watch.unreached(self.book, node)
        elif event.record is None or not node.live:  # else it tells its room itself, and sooner
            self.book.placement.room(node, event.room, self.book.now)

    def _gone(self, node_id: NodeId) -> None:
        node = self.book.placement.nodes.get(node_id)
        if node is None:
            return
        self.book.placement.forget(node)
        for attempt in list(node.live.values()):
            self.book.lose(attempt, f"node {node_id} is gone")
        for job in self.book.jobs.values():
            self.book.touch(job)

    # --- messages ---

    def _received(self, sender: NodeId, message: Message) -> None:
        node = self.book.placement.nodes.get(sender)
        if node is not None:
            node.suspect = False
        match message:
            case Propose():
                self._proposed(sender, message)
            case Take():
                self._taken(sender, message)
            case Started():
                self._started(sender, message.execution)
            case Heartbeat():
                self._heartbeat(sender, message)
            case Refuse():
                self._refused(sender, message)
            case Bid():
                announcing.bid(self.book, sender, message)
                return
            case Lines():
                pass  # for the clients; the engine passes them on
            case _:
                raise BugError(f"a requester was given the message {type(message).__name__}")
        if node is not None and not isinstance(message, Started | Lines):
            self.book.placement.room(node, message.room, self.book.now)

    def _taken(self, sender: NodeId, message: Take) -> None:
        if unwanted := self._alive(sender, message.executions):
            self.book.send(sender, Cancel(unwanted))

    def _started(self, sender: NodeId, execution: Execution) -> None:
        self._alive(sender, (execution,))
        attempt = self.book.verdict(sender, execution)
        if isinstance(attempt, Attempt) and attempt.phase == "taken":
            self.book.advance(attempt, "start", "running")

    def _heartbeat(self, sender: NodeId, message: Heartbeat) -> None:
        unwanted = self._alive(sender, message.executions)
        for execution in message.running:
            self._started(sender, execution)
        self.book.send(sender, Cancel(unwanted))
        for execution in message.executions:
            accepted = self.book.verdict(sender, execution)
            if isinstance(accepted, Ended) and self.book.stored(accepted):
                self.book.send(sender, Kept(execution))

    def _alive(self, sender: NodeId, executions: tuple[Execution, ...]) -> tuple[Execution, ...]:
        """Renew the leases of these executions; returns those that are unwanted."""
        unwanted = []
        for execution in executions:
            match self.book.verdict(sender, execution):
                case Attempt() as attempt:
                    attempt.heard = self.book.now
                    if attempt.phase == "offered":
                        self.book.advance(attempt, "take", "taken")
                        self._at_work(attempt.job)
                case Ended() | "held" | "late":
                    pass
                case _:
                    unwanted.append(execution)
        return tuple(unwanted)

    def _at_work(self, job: Job) -> None:
        job.patience = FIRST_PATIENCE
        usable = sum(not job.excludes(node) for node in self.book.placement.nodes)
        few = f"{job.spec.replicas} replicas, {usable} node{'s' * (usable != 1)}: some run a shard more than once"
        self.book.become(job, "Running", few if usable < job.spec.replicas else "")

    def _refused(self, sender: NodeId, message: Refuse) -> None:
        for execution in message.executions:
            attempt = self.book.verdict(sender, execution)
            if not isinstance(attempt, Attempt):
                continue
            recalled = message.kind == "busy" and attempt.recalled is not None
            if message.kind == "never":
                attempt.job.never[sender] = message.reason
            elif not recalled:
                attempt.job.busy = f"{sender}: {message.reason}"
            attempt.shard.extra = False  # if this was its second try, that was none
            self.book.give_back(attempt, f"refused by {sender}: {message.reason}", forget=not recalled)

    def _proposed(self, sender: NodeId, message: Propose) -> None:
        execution, outcome = message.execution, message.outcome
        match self.book.verdict(sender, execution):
            case Attempt() as attempt:
                self._judge(attempt, outcome)
            case Ended() as accepted:
                self.book.send(sender, Kept(execution) if self.book.stored(accepted) else Accept(execution))
            case "held":
                pass  # others have to agree first
            case "late" if outcome.ok:
                job = self.book.jobs[execution.job]
                self.book.vote(job, job.shards[execution.shard], Ended(execution, sender, outcome))
            case "late":
                self.book.send(sender, Reject(execution, "the attempt was given up"))
            case str() as reason:
                self.book.send(sender, Reject(execution, reason))

    # --- outcomes ---

    def _judge(self, attempt: Attempt, outcome: Outcome) -> None:
        """A live attempt has ended: its outcome is a vote, or the shard is repeated."""
        job, sender = attempt.job, attempt.node.id
        self._at_work(job)
        theirs = outcome.error is not None and outcome.error.kind == "node"
        if outcome.ok:
            job.seconds.append(outcome.seconds)
            attempt.node.faults = 0
        elif outcome.error is not None and theirs:
            self.book.placement.fault(attempt.node, job, outcome.error.message, now=self.book.now)
        if outcome.ok or not voting.repeats(attempt.shard, outcome, job.spec):
            self.book.vote(job, attempt.shard, Ended(attempt.execution, sender, outcome))
        else:
            self.book.send(sender, Reject(attempt.execution, "the shard is repeated"))
            self.book.give_back(attempt, "to be repeated", forget=not theirs)

    def _kept(self, execution: Execution) -> None:
        job = self.book.jobs.get(execution.job)
        if job is None:
            return
        shard = job.shards[execution.shard]
        if shard.state == "accepted" and shard.accepted is not None:
            self.book.kept(job, shard, shard.accepted)

    # --- time ---

    def _fired(self, event: TimerFired) -> None:
        timer = event.timer
        if not isinstance(timer, LeaseTimer | RetryTimer | WatchTimer | JobDeadline | AnnounceTimer):
            raise BugError(f"a requester was given the timer {type(timer).__name__}")
        job = self.book.jobs.get(timer.job)
        if job is None:
            return
        self.book.touch(job)
        match timer:
            case LeaseTimer():
                job.lease_armed = False
                watch.check_leases(self.book, job)
            case WatchTimer():
                job.watch_armed = False
                watch.watch(self.book, job)
            case RetryTimer():
                job.retry_armed = False
                job.patience = min(2 * (job.patience or FIRST_PATIENCE), LONGEST_PATIENCE)
                self.book.placement.probe(job, self.book.now)
            case AnnounceTimer():
                announcing.over(self.book, job)
            case JobDeadline():
                self.book.close(job, "Failed", f"it ran longer than its --job-timeout of {job.spec.job_timeout:g} s")

    # --- the end of a step ---

    def _settled(self) -> list[Effect]:
        book = self.book
        if book.placement.changed:
            for node, job, shard in book.placement.pairs(book.now):
                book.offer(node, job, shard)
        while book.touched:
            _, job = book.touched.popitem()
            self._settle(job)
        return book.drain()

    def _settle(self, job: Job) -> None:
        """Bring the job's own state and timers up to date after a step that touched it."""
        if job.final:
            if not job.sealing:
                self.book.finish(job)
            return
        stuck = bool(job.counts["waiting"]) and not job.live
        announcing.look(self.book, job, stuck=stuck)
        if stuck:
            announcing.explain(self.book, job)
        if job.live and not job.lease_armed:
            job.lease_armed = True
            self.book.timer(LeaseTimer(job.id), after=watch.LEASE_CHECK)
        if watch.needed(self.book, job) and not job.watch_armed:
            job.watch_armed = True
            self.book.timer(WatchTimer(job.id), after=watch.WATCH)
        if job.wanting and not job.retry_armed:
            job.retry_armed = True
            self.book.timer(RetryTimer(job.id), after=job.patience or FIRST_PATIENCE)
