"""The requester of a job: offers its shards, watches over them, and decides which results count.

Theory of operation. `step` takes one event and returns the effects; rows to journal come first,
offers next (so that a node which just finished a shard gets its next one before it is told to
forget the old one), then everything else. Nothing here waits, and no event but the first and
the last of a job walks over all its shards.

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
kept (stored), then its node may forget it. What ends a shard is told by `_retry`; failures of
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
    Offer,
    Outcome,
    Propose,
    Refuse,
    Reject,
    ShardError,
    ShardOffer,
    Started,
    Take,
)
from bacalhau_node.protocol import invariants, recovery
from bacalhau_node.protocol.events import (
    CancelRequested,
    Effect,
    Event,
    JobChanged,
    JobDeadline,
    JobSealed,
    JobState,
    Keep,
    LeaseTimer,
    NodeGone,
    NodeSeen,
    Notify,
    Received,
    ResultKept,
    RetryTimer,
    Row,
    Seal,
    Send,
    SetTimer,
    ShardChanged,
    Submitted,
    TimerFired,
    Write,
)
from bacalhau_node.protocol.placement import LEASE, Placement
from bacalhau_node.protocol.records import Accepted, Attempt, Job, Node, Shard

LEASE_CHECK: Final = LEASE / 3
"""How often leases are looked at, and after how long an unanswered offer is sent again."""

MAX_LOST: Final = 3
"""Attempts that may be lost with their nodes before the shard fails (DESIGN section 5)."""

MAX_KILLED: Final = 2
"""Attempts that a signal may kill before the shard fails: one repeat (DESIGN section 5)."""

FIRST_PATIENCE: Final = 1.0
LONGEST_PATIENCE: Final = 15.0
"""Seconds until nodes without room are tried again; doubled from first to longest while they stay so (a guess)."""


class Requester:
    """The machine of one node's own jobs. `step` is the only way in; records are for the checks."""

    def __init__(self, node: NodeId) -> None:
        self.node = node
        self.jobs: dict[JobId, Job] = {}
        self.placement = Placement()
        self._now = 0.0
        self._rows: list[Effect] = []
        self._out: list[Effect] = []
        self._batches: dict[tuple[NodeId, JobId], list[ShardOffer]] = {}
        self._touched: dict[JobId, Job] = {}

    # --- the way in ---

    def step(self, event: Event, now: float) -> list[Effect]:
        """What to do after `event`; `now` is monotonic, in seconds."""
        self._now = now
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
            case CancelRequested() if event.job in self.jobs:
                self._close(self.jobs[event.job], "Stopped", "cancelled")
            case JobSealed() if event.job in self.jobs:
                self._end(self.jobs[event.job], cid=event.cid)
            case CancelRequested() | JobSealed():
                pass  # the job has ended meanwhile
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
        self._now = now
        for job in recovery.jobs(rows, blocks=blocks):
            self.jobs[job.id] = job
            for shard in job.shards:
                if shard.state == "accepted" and shard.accepted is not None:
                    self._keep(shard.accepted)
            if not resume:
                self._close(job, "Stopped", "the node stopped before the job had ended")
            elif job.unfinished:
                self._deadline(job)
            self._touch(job)
        return self, self._settled()

    def live(self, execution: Execution, sender: NodeId) -> bool:
        """Whether `sender` may speak for this execution now, and its lines are still of interest."""
        return isinstance(self._verdict(sender, execution), Attempt | Accepted)

    def check(self) -> None:
        """Raise `BugError` if the records contradict each other or break a rule of the protocol."""
        invariants.check_requester(self.jobs.values(), self.placement.nodes)

    # --- jobs ---

    def _submitted(self, event: Submitted) -> None:
        if not event.blocks:
            raise BugError(f"job {event.job} was submitted without shards")
        if event.job in self.jobs:
            raise BugError(f"job {event.job} was submitted twice")
        if event.spec.replicas != 1:
            raise BugError(f"job {event.job} wants {event.spec.replicas} replicas: this version runs one")
        shards = [Shard(index, block) for index, block in enumerate(event.blocks)]
        job = Job(event.job, event.spec, event.plan, event.created, shards)
        job.counts["waiting"] = len(shards)
        job.fresh.extend(shards)
        self.jobs[job.id] = job
        self._rows.append(Write(job.row()))
        self._out.append(Notify(JobChanged(job.id, job.state)))
        self._deadline(job)
        self._touch(job)

    def _deadline(self, job: Job) -> None:
        if job.spec.job_timeout is not None:
            self._out.append(SetTimer(JobDeadline(job.id), self._now + job.spec.job_timeout))

    def _become(self, job: Job, state: JobState, reason: str) -> None:
        if (job.state, job.reason) == (state, reason):
            return
        written = job.state != state
        job.state, job.reason = state, reason
        if written:
            self._rows.append(Write(job.row()))
        self._out.append(Notify(JobChanged(job.id, state, reason)))

    def _close(self, job: Job, state: JobState, reason: str) -> None:
        """Decide how the job ends; what has no outcome yet is stopped."""
        if job.closing is not None or not job.unfinished:
            return
        job.closing = (state, reason)
        self._rows.append(Write(job.row()))
        orders: dict[NodeId, list[Execution]] = {}
        for attempt in list(job.live.values()):
            orders.setdefault(attempt.node.id, []).append(attempt.execution)
            self._detach(attempt)
        self._out.extend(Send(to, Cancel(tuple(executions))) for to, executions in orders.items())
        for shard in job.shards:
            if shard.state in ("waiting", "offered", "taken", "running"):
                self._move(job, shard, "stop", written=True)
        job.fresh.clear()
        job.again.clear()

    def _finish(self, job: Job) -> None:
        if job.count("kept") == 0:
            self._end(job, cid="")
            return
        job.sealing = True
        kept = [shard.accepted for shard in job.shards if shard.state == "kept" and shard.accepted is not None]
        self._out.append(Seal(job.id, tuple((one.execution.shard, one.outcome.record) for one in kept)))

    def _end(self, job: Job, *, cid: str) -> None:
        failed, count = job.count("failed"), len(job.shards)
        ending: tuple[JobState, str] = ("Failed", f"{failed} of {count} shards failed") if failed else ("Completed", "")
        job.state, job.reason = job.closing = job.closing or ending
        self._rows.append(Write(job.row(cid=cid)))
        self._out.append(Notify(JobChanged(job.id, job.state, job.reason, cid)))
        del self.jobs[job.id]
        self._touched.pop(job.id, None)

    # --- nodes ---

    def _seen(self, event: NodeSeen) -> None:
        node = self.placement.nodes.setdefault(event.node, Node(event.node))
        node.suspect = False
        self.placement.room(node, event.room)

    def _gone(self, node_id: NodeId) -> None:
        node = self.placement.nodes.get(node_id)
        if node is None:
            return
        self.placement.forget(node)
        for attempt in list(node.live.values()):
            self._lose(attempt, f"node {node_id} is gone")
        for job in self.jobs.values():
            self._touch(job)

    # --- messages ---

    def _received(self, sender: NodeId, message: Message) -> None:
        node = self.placement.nodes.get(sender)
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
                return
            case _:
                raise BugError(f"a requester was given the message {type(message).__name__}")
        if node is not None and not isinstance(message, Started):
            self.placement.room(node, message.room)

    def _verdict(self, sender: NodeId, execution: Execution) -> Attempt | Accepted | str:
        """What an execution is to us: live (its attempt), the accepted one, "late", or why it is unwanted."""
        job = self.jobs.get(execution.job)
        if job is None:
            return "the job has ended"
        if not (0 <= execution.shard < len(job.shards)):
            return "no such shard"
        shard = job.shards[execution.shard]
        if not (1 <= execution.attempt <= shard.attempts) or shard.authors[execution.attempt - 1] != sender:
            return "no such attempt"
        if (attempt := shard.live.get(execution.attempt)) is not None:
            return attempt
        if shard.accepted is not None:
            return shard.accepted if shard.accepted.execution == execution else "another attempt's result counts"
        return "late" if shard.state in ("waiting", "offered", "taken", "running") else f"the shard is {shard.state}"

    def _taken(self, sender: NodeId, message: Take) -> None:
        self._disown(sender, self._alive(sender, message.executions))

    def _started(self, sender: NodeId, execution: Execution) -> None:
        self._alive(sender, (execution,))
        attempt = self._verdict(sender, execution)
        if isinstance(attempt, Attempt) and attempt.shard.state == "taken":
            self._move(attempt.job, attempt.shard, "start")

    def _heartbeat(self, sender: NodeId, message: Heartbeat) -> None:
        unwanted = self._alive(sender, message.executions)
        for execution in message.running:
            self._started(sender, execution)
        self._out.append(Send(sender, Cancel(tuple(unwanted))))
        for execution in message.executions:
            accepted = self._verdict(sender, execution)
            if isinstance(accepted, Accepted) and self._stored(accepted):
                self._out.append(Send(sender, Kept(execution)))

    def _alive(self, sender: NodeId, executions: tuple[Execution, ...]) -> list[Execution]:
        """Renew the leases of these executions; returns those that are unwanted."""
        unwanted = []
        for execution in executions:
            match self._verdict(sender, execution):
                case Attempt() as attempt:
                    attempt.heard = self._now
                    if not attempt.answered:
                        self._answered(attempt)
                        self._move(attempt.job, attempt.shard, "take")
                        self._at_work(attempt.job)
                case Accepted() | "late":
                    pass
                case _:
                    unwanted.append(execution)
        return unwanted

    def _disown(self, node: NodeId, executions: list[Execution]) -> None:
        if executions:
            self._out.append(Send(node, Cancel(tuple(executions))))

    def _at_work(self, job: Job) -> None:
        job.patience = FIRST_PATIENCE
        self._become(job, "Running", "")

    def _refused(self, sender: NodeId, message: Refuse) -> None:
        for execution in message.executions:
            attempt = self._verdict(sender, execution)
            if not isinstance(attempt, Attempt):
                continue
            job = attempt.job
            if message.kind == "never":
                job.never[sender] = message.reason
            else:
                job.busy = f"{sender}: {message.reason}"
            self._return(attempt, f"refused by {sender}: {message.reason}")

    def _proposed(self, sender: NodeId, message: Propose) -> None:
        execution, outcome = message.execution, message.outcome
        match self._verdict(sender, execution):
            case Attempt() as attempt:
                self._judge(attempt, outcome)
            case Accepted() as accepted:
                self._out.append(Send(sender, Kept(execution) if self._stored(accepted) else Accept(execution)))
            case "late" if outcome.ok:
                job = self.jobs[execution.job]
                self._accept(job, job.shards[execution.shard], Accepted(execution, sender, outcome))
            case "late":
                self._out.append(Send(sender, Reject(execution, "the attempt was given up")))
            case str() as reason:
                self._out.append(Send(sender, Reject(execution, reason)))

    # --- shards ---

    def _judge(self, attempt: Attempt, outcome: Outcome) -> None:
        """A live attempt has ended: accept its outcome, or repeat the shard."""
        job, shard, sender = attempt.job, attempt.shard, attempt.node.id
        self._at_work(job)
        if outcome.ok or not self._retry(attempt, outcome):
            self._accept(job, shard, Accepted(attempt.execution, sender, outcome))
        else:
            self._out.append(Send(sender, Reject(attempt.execution, "the shard is repeated")))

    def _retry(self, attempt: Attempt, outcome: Outcome) -> bool:
        """Whether a failed attempt is repeated; counts it by the kind of its error (DESIGN section 5)."""
        shard, kind = attempt.shard, outcome.error.kind if outcome.error else "exit"
        if kind == "node":
            shard.lost += 1
            again = shard.lost < MAX_LOST
            shard.avoid = (*shard.avoid, attempt.node.id)
        elif kind == "signal":
            shard.killed += 1
            again = shard.killed < MAX_KILLED
        else:
            shard.failed += 1
            again = kind != "memory" and shard.failed <= attempt.job.spec.retries
        if again:
            self._return(attempt, f"to be repeated: {kind}")
        return again

    def _lose(self, attempt: Attempt, why: str) -> None:
        """The attempt's node is silent, or gone."""
        shard, node = attempt.shard, attempt.node
        node.suspect = True
        node.room = 0
        shard.lost += 1
        shard.avoid = (*shard.avoid, node.id)
        if shard.lost < MAX_LOST:
            self._return(attempt, why)
            return
        self._detach(attempt)
        error = ShardError("node", message=f"{shard.lost} attempts were lost, the last one because {why}")
        shard.accepted = Accepted(attempt.execution, node.id, Outcome(ok=False, exit_code=-1, error=error))
        self._move(attempt.job, shard, "fail", written=True)

    def _return(self, attempt: Attempt, why: str) -> None:
        """The shard waits again."""
        job, shard = attempt.job, attempt.shard
        self._detach(attempt)
        self._move(job, shard, "return", why)
        shard.since = self._now
        if shard.avoid:
            job.again.append(shard)
        else:
            job.fresh.appendleft(shard)

    def _accept(self, job: Job, shard: Shard, accepted: Accepted) -> None:
        for attempt in list(shard.live.values()):
            self._detach(attempt)
            if attempt.execution != accepted.execution:
                self._out.append(Send(attempt.node.id, Cancel((attempt.execution,))))
        shard.accepted = accepted
        self._move(job, shard, "accept", str(accepted.execution), written=True)
        self._out.append(Send(accepted.node, Accept(accepted.execution)))
        self._keep(accepted)

    def _keep(self, accepted: Accepted) -> None:
        self._out.append(Keep(accepted.execution, accepted.node, accepted.outcome))

    def _kept(self, execution: Execution) -> None:
        job = self.jobs.get(execution.job)
        shard = job.shards[execution.shard] if job is not None else None
        if job is None or shard is None or shard.state != "accepted" or shard.accepted is None:
            return
        self._move(job, shard, "keep" if shard.accepted.outcome.ok else "fail", written=True)
        self._out.append(Send(shard.accepted.node, Kept(shard.accepted.execution)))

    def _stored(self, accepted: Accepted) -> bool:
        execution = accepted.execution
        return self.jobs[execution.job].shards[execution.shard].state in ("kept", "failed")

    def _offer(self, node: Node, job: Job, shard: Shard) -> None:
        shard.authors.append(node.id)
        execution = Execution(job.id, shard.index, shard.attempts)
        attempt = Attempt(execution, job, shard, node, heard=self._now, offered=self._now)
        job.live[execution] = node.live[execution] = shard.live[execution.attempt] = attempt
        node.unanswered += 1
        self._move(job, shard, "offer", node.id, written=True)
        self._batch(attempt)

    def _batch(self, attempt: Attempt) -> None:
        execution = attempt.execution
        offer = ShardOffer(execution.shard, execution.attempt, attempt.shard.block)
        self._batches.setdefault((attempt.node.id, execution.job), []).append(offer)

    def _answered(self, attempt: Attempt) -> None:
        if not attempt.answered:
            attempt.answered = True
            attempt.node.unanswered -= 1

    def _detach(self, attempt: Attempt) -> None:
        """The attempt is not live any more."""
        self._answered(attempt)
        del attempt.job.live[attempt.execution]
        del attempt.node.live[attempt.execution]
        del attempt.shard.live[attempt.execution.attempt]

    def _move(self, job: Job, shard: Shard, verb: str, detail: str = "", *, written: bool = False) -> None:
        job.move(shard, verb, self._now, detail)
        if written:
            self._rows.append(Write(job.shard_row(shard)))
        accepted = shard.accepted
        node = accepted.node if accepted else shard.authors[-1] if shard.authors else None
        attempt = accepted.execution.attempt if accepted else shard.attempts
        error = accepted.outcome.error if accepted else None
        self._out.append(Notify(ShardChanged(job.id, shard.index, shard.state, node, attempt, error)))
        self._touch(job)

    # --- time ---

    def _fired(self, event: TimerFired) -> None:
        timer = event.timer
        if not isinstance(timer, LeaseTimer | RetryTimer | JobDeadline):
            raise BugError(f"a requester was given the timer {type(timer).__name__}")
        job = self.jobs.get(timer.job)
        if job is None:
            return
        self._touch(job)
        match timer:
            case LeaseTimer():
                job.lease_armed = False
                self._check_leases(job)
            case RetryTimer():
                job.retry_armed = False
                job.patience = min(2 * (job.patience or FIRST_PATIENCE), LONGEST_PATIENCE)
                self.placement.probe(job)
            case JobDeadline():
                self._close(job, "Failed", f"the job ran longer than its {job.spec.job_timeout:g} seconds")

    def _check_leases(self, job: Job) -> None:
        for attempt in list(job.live.values()):
            if self._now - attempt.heard >= LEASE:
                self._lose(attempt, f"node {attempt.node.id} was silent for {LEASE:g} seconds")
            elif not attempt.answered and self._now - attempt.offered >= LEASE_CHECK:
                attempt.offered = self._now
                self._batch(attempt)

    # --- the end of a step ---

    def _touch(self, job: Job) -> None:
        self._touched[job.id] = job
        if job.offerable:
            self.placement.ready(job)

    def _settled(self) -> list[Effect]:
        for node, job, shard in self.placement.pairs(self._now):
            self._offer(node, job, shard)
        while self._touched:
            _, job = self._touched.popitem()
            self._settle(job)
        offers: list[Effect] = [
            Send(node, Offer(job, self.jobs[job].spec, tuple(batch), len(self.jobs[job].shards)))
            for (node, job), batch in self._batches.items()
            if job in self.jobs
        ]
        effects = self._rows + offers + self._out
        self._rows, self._out, self._batches = [], [], {}
        return effects

    def _settle(self, job: Job) -> None:
        """Bring the job's own state and timers up to date after a step that touched it."""
        final = job.count("kept", "failed", "stopped") == len(job.shards)
        if final and not job.sealing:
            self._finish(job)
        if final:
            return
        waiting = bool(job.counts.get("waiting"))
        if waiting and not job.live:
            self._idle(job)
        if job.live and not job.lease_armed:
            job.lease_armed = True
            self._out.append(SetTimer(LeaseTimer(job.id), self._now + LEASE_CHECK))
        if waiting and not job.retry_armed and job.closing is None:
            job.retry_armed = True
            self._out.append(SetTimer(RetryTimer(job.id), self._now + (job.patience or FIRST_PATIENCE)))

    def _idle(self, job: Job) -> None:
        """Shards wait and none is at work: say why, or give up when no node can ever run them."""
        nodes = self.placement.nodes
        if self.placement.hopeless(job):
            reasons = "; ".join(f"{node}: {job.never[node]}" for node in nodes)
            self._close(job, "Failed", f"NoCapacity: no known node can run this job ({reasons})")
        elif not nodes:
            self._become(job, "Queued", "no node is known yet")
        else:
            self._become(job, "Queued", job.busy or "every known node is busy")
