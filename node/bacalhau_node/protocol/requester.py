"""The requester of a job: offers its shards, watches over them, and decides which results count.

Theory of operation. `step` takes one event and returns the effects; the records and what follows
from changing them are in `book.py`, the choice of nodes in `placement.py`. Nothing here waits, and
no event but the first and the last of a job walks over all its shards.

**Attempts.** Every offer of a shard is a new attempt and is journaled before it is sent, so an
attempt's number never means two things, restarts included. An attempt is *live* from its offer
until it is refused, lost, ended or cancelled; a shard has at most one live attempt and at most
one accepted outcome (`JobSpec.replicas` is 1 in this version). A message about an attempt that
is not live changes nothing, with one exception: the good result of a *lost* attempt is accepted
while its shard still wants one, and the attempt that runs in its place is cancelled.

**Leases.** A live attempt must be heard of (take, started, heartbeat) within a lease. An offer that
is not answered is sent again; nodes answer a repeated offer alike. The node of a lost attempt is
suspected: it gets no offer while there are others, until it is heard again.

**How a node hears the requester.** Each heartbeat is answered by one `Cancel` that names what
this requester does not want; an empty one only says "I am here", and keeps the node from giving
up the work of a silent requester. For what has been kept already the answer is `Kept` again.

**Ends.** An outcome that counts, a result or the final failure of a shard, is accepted (journaled), then
kept (stored), then its node may forget it. What ends a shard is told by `_repeats`; failures of
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
from bacalhau_node.protocol import invariants, recovery
from bacalhau_node.protocol.book import MAX_LOST, Book
from bacalhau_node.protocol.events import (
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
)
from bacalhau_node.protocol.placement import LEASE
from bacalhau_node.protocol.records import Accepted, Attempt, Job, Node, Shard

LEASE_CHECK: Final = LEASE / 3
"""How often leases are looked at, and after how long an unanswered offer is sent again."""

MAX_KILLED: Final = 2
"""Attempts that a signal may kill before the shard fails: one repeat (DESIGN section 5)."""

FIRST_PATIENCE: Final = 1.0
LONGEST_PATIENCE: Final = 15.0
"""Seconds until nodes without room are tried again; doubled from first to longest while they stay so (a guess)."""


class Requester:
    """The machine of one node's own jobs. `step` is the only way in; the book is for the checks."""

    def __init__(self, node: NodeId) -> None:
        self.node = node
        self.book = Book()

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
                    self.book.end(job, cid=event.cid)
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

        With `resume` shards without an outcome wait again; `blocks` holds the plan's blocks of each
        such job. Without, unfinished jobs are stopped, and keep what they had. Either way, accepted
        results that were not stored yet are asked to be kept again.
        """
        self = cls(node)
        self.book.now = now
        for job in recovery.jobs(rows, blocks=blocks):
            self.book.jobs[job.id] = job
            for shard in job.shards:
                if shard.state == "accepted" and shard.accepted is not None:
                    self.book.keep(shard.accepted)
            if not resume:
                self.book.close(job, "Stopped", "the node stopped before the job had ended")
            elif job.unfinished:
                self._set_deadline(job)
            self.book.touch(job)
        return self, self._settled()

    def live(self, execution: Execution, sender: NodeId) -> bool:
        """Whether `sender` may speak for this execution now, and its lines are still of interest."""
        return isinstance(self.book.verdict(sender, execution), Attempt | Accepted)

    def check(self) -> None:
        """Raise `BugError` if the records contradict each other or break a rule of the protocol."""
        invariants.check_requester(self.book.jobs.values(), self.book.placement.nodes)

    # --- jobs and nodes ---

    def _submitted(self, event: Submitted) -> None:
        if not event.blocks:
            raise BugError(f"job {event.job} was submitted without shards")
        if event.job in self.book.jobs:
            raise BugError(f"job {event.job} was submitted twice")
        if event.spec.replicas != 1:
            raise BugError(f"job {event.job} wants {event.spec.replicas} replicas: this version runs one")
        shards = [Shard(index, block) for index, block in enumerate(event.blocks)]
        job = Job(event.job, event.spec, event.plan, event.created, shards)
        self.book.add(job)
        self._set_deadline(job)

    def _set_deadline(self, job: Job) -> None:
        if job.spec.job_timeout is not None:
            self.book.timer(JobDeadline(job.id), after=job.spec.job_timeout)

    def _seen(self, event: NodeSeen) -> None:
        node = self.book.placement.nodes.setdefault(event.node, Node(event.node))
        node.suspect = False
        self.book.placement.room(node, event.room)

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
            case Lines():
                pass  # for the clients; the engine passes them on
            case _:
                raise BugError(f"a requester was given the message {type(message).__name__}")
        if node is not None and not isinstance(message, Started | Lines):
            self.book.placement.room(node, message.room)

    def _taken(self, sender: NodeId, message: Take) -> None:
        if unwanted := self._alive(sender, message.executions):
            self.book.send(sender, Cancel(unwanted))

    def _started(self, sender: NodeId, execution: Execution) -> None:
        self._alive(sender, (execution,))
        attempt = self.book.verdict(sender, execution)
        if isinstance(attempt, Attempt) and attempt.shard.state == "taken":
            self.book.move(attempt.job, attempt.shard, "start")

    def _heartbeat(self, sender: NodeId, message: Heartbeat) -> None:
        unwanted = self._alive(sender, message.executions)
        for execution in message.running:
            self._started(sender, execution)
        self.book.send(sender, Cancel(unwanted))
        for execution in message.executions:
            accepted = self.book.verdict(sender, execution)
            if isinstance(accepted, Accepted) and self.book.stored(accepted):
                self.book.send(sender, Kept(execution))

    def _alive(self, sender: NodeId, executions: tuple[Execution, ...]) -> tuple[Execution, ...]:
        """Renew the leases of these executions; returns those that are unwanted."""
        unwanted = []
        for execution in executions:
            match self.book.verdict(sender, execution):
                case Attempt() as attempt:
                    attempt.heard = self.book.now
                    if not attempt.answered:
                        self.book.answered(attempt)
                        self.book.move(attempt.job, attempt.shard, "take")
                        self._at_work(attempt.job)
                case Accepted() | "late":
                    pass
                case _:
                    unwanted.append(execution)
        return tuple(unwanted)

    def _at_work(self, job: Job) -> None:
        job.patience = FIRST_PATIENCE
        self.book.become(job, "Running")

    def _refused(self, sender: NodeId, message: Refuse) -> None:
        for execution in message.executions:
            attempt = self.book.verdict(sender, execution)
            if not isinstance(attempt, Attempt):
                continue
            if message.kind == "never":
                attempt.job.never[sender] = message.reason
            else:
                attempt.job.busy = f"{sender}: {message.reason}"
            self.book.give_back(attempt, f"refused by {sender}: {message.reason}")

    def _proposed(self, sender: NodeId, message: Propose) -> None:
        execution, outcome = message.execution, message.outcome
        match self.book.verdict(sender, execution):
            case Attempt() as attempt:
                self._judge(attempt, outcome)
            case Accepted() as accepted:
                self.book.send(sender, Kept(execution) if self.book.stored(accepted) else Accept(execution))
            case "late" if outcome.ok:
                self.book.accept(self.book.jobs[execution.job], Accepted(execution, sender, outcome))
            case "late":
                self.book.send(sender, Reject(execution, "the attempt was given up"))
            case str() as reason:
                self.book.send(sender, Reject(execution, reason))

    # --- outcomes ---

    def _judge(self, attempt: Attempt, outcome: Outcome) -> None:
        """A live attempt has ended: accept its outcome, or repeat the shard."""
        self._at_work(attempt.job)
        if outcome.ok or not self._repeats(attempt, outcome):
            self.book.accept(attempt.job, Accepted(attempt.execution, attempt.node.id, outcome))
        else:
            self.book.send(attempt.node.id, Reject(attempt.execution, "the shard is repeated"))
            self.book.give_back(attempt, "to be repeated")

    def _repeats(self, attempt: Attempt, outcome: Outcome) -> bool:
        """Whether a failed attempt is repeated; counts it by the kind of its error (DESIGN section 5)."""
        shard, kind = attempt.shard, outcome.error.kind if outcome.error else "exit"
        if kind == "node":
            shard.lost += 1
            shard.avoid = (*shard.avoid, attempt.node.id)
            return shard.lost < MAX_LOST
        if kind == "signal":
            shard.killed += 1
            return shard.killed < MAX_KILLED
        shard.failed += 1
        return kind != "memory" and shard.failed <= attempt.job.spec.retries

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
        if not isinstance(timer, LeaseTimer | RetryTimer | JobDeadline):
            raise BugError(f"a requester was given the timer {type(timer).__name__}")
        job = self.book.jobs.get(timer.job)
        if job is None:
            return
        self.book.touch(job)
        match timer:
            case LeaseTimer():
                job.lease_armed = False
                self._check_leases(job)
            case RetryTimer():
                job.retry_armed = False
                job.patience = min(2 * (job.patience or FIRST_PATIENCE), LONGEST_PATIENCE)
                self.book.placement.probe(job)
            case JobDeadline():
                self.book.close(job, "Failed", f"it ran longer than its --job-timeout of {job.spec.job_timeout:g} s")

    def _check_leases(self, job: Job) -> None:
        now = self.book.now
        for attempt in list(job.live.values()):
            if now - attempt.heard >= LEASE:
                self.book.lose(attempt, f"node {attempt.node.id} was silent for {LEASE:g} seconds")
            elif not attempt.answered and now - attempt.offered >= LEASE_CHECK:
                self.book.send_offer(attempt)

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
        if job.counts["waiting"] and not job.live:
            self._explain(job)
        if job.live and not job.lease_armed:
            job.lease_armed = True
            self.book.timer(LeaseTimer(job.id), after=LEASE_CHECK)
        if job.counts["waiting"] and not job.retry_armed:
            job.retry_armed = True
            self.book.timer(RetryTimer(job.id), after=job.patience or FIRST_PATIENCE)

    def _explain(self, job: Job) -> None:
        """Shards wait and none is at work: say why, or give up when no node can ever run them."""
        nodes = self.book.placement.nodes
        if self.book.placement.hopeless(job):
            # One node needs no name: mostly it is that of the notebook.
            why = [f"{node}: {job.never[node]}" if len(nodes) > 1 else job.never[node] for node in nodes]
            self.book.close(job, "Failed", f"no node can run it: {'; '.join(why)}")
        elif not nodes:
            self.book.become(job, "Queued", "no node is known yet")
        else:
            self.book.become(job, "Queued", job.busy or "every known node is busy")
