"""The requester's book: its records, and every change of them with the effects that go with it.

`requester.py` decides what an event means; here each decision (offer, give back, lose, accept,
keep, close, end) changes the records, journals the row that recovery needs, tells the clients,
and leaves the queues and counters right. The effects of a step are collected until `drain`:
rows to journal come first, then offers (so that a node which just finished a shard gets its
next one before it is told to forget the old one), then everything else.
"""

from __future__ import annotations

from typing import Final

from bacalhau_node.ids import Execution, JobId, NodeId
from bacalhau_node.messages import Accept, Cancel, Kept, Message, Offer, Outcome, ShardError, ShardOffer
from bacalhau_node.protocol.events import (
    Effect,
    JobChanged,
    JobState,
    Keep,
    Notify,
    Seal,
    Send,
    SetTimer,
    ShardChanged,
    Timer,
    Write,
)
from bacalhau_node.protocol.placement import Placement
from bacalhau_node.protocol.records import LIVE, Accepted, Attempt, Job, Node, Shard

MAX_LOST: Final = 3
"""Attempts that may be lost with their nodes before the shard fails (DESIGN section 5)."""


class Book:
    """Jobs, nodes, and the effects of the present step. `now` is the time of that step."""

    def __init__(self) -> None:
        self.now = 0.0
        self.jobs: dict[JobId, Job] = {}
        self.placement = Placement()
        self.touched: dict[JobId, Job] = {}
        """Jobs that this step has changed."""
        self._rows: list[Effect] = []
        self._out: list[Effect] = []
        self._batches: dict[tuple[NodeId, JobId], list[ShardOffer]] = {}

    # --- effects ---

    def send(self, to: NodeId, message: Message) -> None:
        """Send a message at the end of the step."""
        self._out.append(Send(to, message))

    def timer(self, timer: Timer, *, after: float) -> None:
        """Ask for a timer, `after` seconds from now."""
        self._out.append(SetTimer(timer, self.now + after))

    def drain(self) -> list[Effect]:
        """The effects of the step, which is over."""
        offers: list[Effect] = []
        for (node, job_id), batch in self._batches.items():
            if (job := self.jobs.get(job_id)) is not None:
                offers.append(Send(node, Offer(job_id, job.spec, tuple(batch), len(job.shards))))
        effects = self._rows + offers + self._out
        self._rows, self._out, self._batches = [], [], {}
        return effects

    # --- what is known ---

    def verdict(self, sender: NodeId, execution: Execution) -> Attempt | Accepted | str:
        """What an execution is to us: live (its attempt), the one that counts, "late", or why it is unwanted."""
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
        return "the shard was stopped" if shard.state == "stopped" else "late"

    def stored(self, accepted: Accepted) -> bool:
        """Whether an outcome that counts is stored, so that its node may forget it."""
        execution = accepted.execution
        return self.jobs[execution.job].shards[execution.shard].state in ("kept", "failed")

    # --- attempts ---

    def offer(self, node: Node, job: Job, shard: Shard) -> None:
        """Make the shard's next attempt on this node."""
        shard.authors.append(node.id)
        execution = Execution(job.id, shard.index, shard.attempts)
        attempt = Attempt(execution, job, shard, node, heard=self.now, offered=self.now)
        job.live[execution] = node.live[execution] = shard.live[execution.attempt] = attempt
        node.unanswered += 1
        self.move(job, shard, "offer", node.id, written=True)
        self.send_offer(attempt)

    def send_offer(self, attempt: Attempt) -> None:
        """Put the attempt into this step's offer of its job to its node."""
        execution = attempt.execution
        attempt.offered = self.now
        offer = ShardOffer(execution.shard, execution.attempt, attempt.shard.block)
        self._batches.setdefault((attempt.node.id, execution.job), []).append(offer)

    def answered(self, attempt: Attempt) -> None:
        """The node knows of the offer."""
        if not attempt.answered:
            attempt.answered = True
            attempt.node.unanswered -= 1

    def give_back(self, attempt: Attempt, why: str) -> None:
        """The attempt is over, and its shard waits again."""
        job, shard = attempt.job, attempt.shard
        self._detach(attempt)
        self.move(job, shard, "return", why)
        shard.since = self.now
        if shard.avoid:
            job.again.append(shard)
        else:
            job.fresh.appendleft(shard)

    def lose(self, attempt: Attempt, why: str) -> None:
        """The attempt's node is silent, or gone."""
        shard, node = attempt.shard, attempt.node
        node.suspect = True
        node.room = 0
        shard.lost += 1
        shard.avoid = (*shard.avoid, node.id)
        if shard.lost < MAX_LOST:
            self.give_back(attempt, why)
            return
        self._detach(attempt)
        error = ShardError("node", message=f"{shard.lost} attempts were lost, the last one because {why}")
        shard.accepted = Accepted(attempt.execution, node.id, Outcome(ok=False, exit_code=-1, error=error))
        self.move(attempt.job, shard, "fail", written=True)

    def _detach(self, attempt: Attempt) -> None:
        self.answered(attempt)
        del attempt.job.live[attempt.execution]
        del attempt.node.live[attempt.execution]
        del attempt.shard.live[attempt.execution.attempt]

    # --- outcomes ---

    def accept(self, job: Job, accepted: Accepted) -> None:
        """This outcome counts; an attempt that runs in its place is cancelled."""
        shard = job.shards[accepted.execution.shard]
        for attempt in list(shard.live.values()):
            self._detach(attempt)
            if attempt.execution != accepted.execution:
                self.send(attempt.node.id, Cancel((attempt.execution,)))
        shard.accepted = accepted
        self.move(job, shard, "accept", accepted.node, written=True)
        self.send(accepted.node, Accept(accepted.execution))
        self.keep(accepted)

    def keep(self, accepted: Accepted) -> None:
        """Ask for an outcome that counts to be stored."""
        self._out.append(Keep(accepted.execution, accepted.node, accepted.outcome))

    def kept(self, job: Job, shard: Shard, accepted: Accepted) -> None:
        """The outcome is stored: the shard is final, and the node may forget."""
        self.move(job, shard, "keep" if accepted.outcome.ok else "fail", written=True)
        self.send(accepted.node, Kept(accepted.execution))

    # --- jobs ---

    def add(self, job: Job) -> None:
        """A new job, with all its shards waiting."""
        job.counts["waiting"] = len(job.shards)
        job.fresh.extend(job.shards)
        self.jobs[job.id] = job
        self._rows.append(Write(job.row()))
        self._out.append(Notify(JobChanged(job.id, job.state)))
        self.touch(job)

    def touch(self, job: Job) -> None:
        """Something about the job has changed: see to it at the end of the step."""
        self.touched[job.id] = job
        if job.offerable:
            self.placement.ready(job)

    def become(self, job: Job, state: JobState, reason: str = "") -> None:
        """The unfinished job's state is this now; nothing happens if it was so before."""
        if (job.state, job.reason) == (state, reason):
            return
        if job.state != state:
            job.state, job.reason = state, reason
            self._rows.append(Write(job.row()))
        job.reason = reason
        self._out.append(Notify(JobChanged(job.id, state, reason)))

    def close(self, job: Job, state: JobState, reason: str) -> None:
        """Decide how the job ends; what has no outcome yet is stopped. Too late when all have one."""
        if job.closing is not None or not job.unfinished:
            return
        job.closing = (state, reason)
        self._rows.append(Write(job.row()))
        orders: dict[NodeId, list[Execution]] = {}
        for attempt in list(job.live.values()):
            orders.setdefault(attempt.node.id, []).append(attempt.execution)
            self._detach(attempt)
        for to, executions in orders.items():
            self.send(to, Cancel(tuple(executions)))
        for shard in job.shards:
            if shard.state == "waiting" or shard.state in LIVE:
                self.move(job, shard, "stop", written=True)
        job.fresh.clear()
        job.again.clear()

    def finish(self, job: Job) -> None:
        """All shards are final: seal the job over what was kept, or end it with nothing."""
        if not job.counts["kept"]:
            self.end(job, cid="")
            return
        job.sealing = True
        kept = [shard.accepted for shard in job.shards if shard.state == "kept" and shard.accepted is not None]
        self._out.append(Seal(job.id, tuple((one.execution.shard, one.outcome.record) for one in kept)))

    def end(self, job: Job, *, cid: str) -> None:
        """The job is over; nothing about it is remembered here."""
        failed, count = job.counts["failed"], len(job.shards)
        ending: tuple[JobState, str] = ("Failed", f"{failed} of {count} shards failed") if failed else ("Completed", "")
        job.closing = job.closing or ending
        self._rows.append(Write(job.row(cid=cid)))
        self._out.append(Notify(JobChanged(job.id, *job.closing, cid)))
        del self.jobs[job.id]
        self.touched.pop(job.id, None)

    def move(self, job: Job, shard: Shard, verb: str, detail: str = "", *, written: bool = False) -> None:
        """Change a shard's state by `verb` and tell it; `written`: recovery needs to know."""
        job.move(shard, verb, self.now, detail)
        if written:
            self._rows.append(Write(job.shard_row(shard)))
        accepted = shard.accepted
        if accepted is not None:
            node, attempt, error = accepted.node, accepted.execution.attempt, accepted.outcome.error
            change = ShardChanged(job.id, shard.index, shard.state, node, attempt, error)
        else:
            last = shard.authors[-1] if shard.authors else None
            change = ShardChanged(job.id, shard.index, shard.state, last, shard.attempts)
        self._out.append(Notify(change))
        self.touch(job)
