"""The requester's book: its records, and every change of them with the effects that go with it.

`requester.py` decides what an event means; here each decision (offer, give back, lose, accept,
fail, keep, close, end) changes the records, journals the row that recovery needs, tells the clients,
and leaves the queues and counters right. The effects of a step are collected until `drain`:
rows to journal come first, then offers (so that a node which just finished a shard gets its
next one before it is told to forget the old one), then everything else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from bacalhau_node.ids import Execution, JobId, NodeId
from bacalhau_node.messages import Accept, Cancel, Kept, Message, Offer, Outcome, Reject, ShardError, ShardOffer
from bacalhau_node.protocol import voting
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
from bacalhau_node.protocol.records import LIVE, PHASES, Attempt, Ended, Job, Node, Shard
from bacalhau_node.protocol.voting import MAX_LOST

_TO_PHASE: Final[Mapping[str, tuple[str, ...]]] = {
    "waiting": (),
    "offered": ("offer",),
    "taken": ("offer", "take"),
    "running": ("offer", "take", "start"),
}
"""How a shard comes into the phase of its most advanced attempt, from "waiting"."""


class Book:
    """Jobs, nodes, and the effects of the present step. `now` is the time of that step.

    `addresses`: where others can dial this node, None when it is on no network. `network`: how many nodes that has.
    `lost`: how many executions were given up so far.
    """

    def __init__(self, node: NodeId) -> None:
        self.node = node
        self.now = 0.0
        self.addresses: tuple[str, ...] | None = None
        self.network = 1
        self.jobs: dict[JobId, Job] = {}
        self.placement = Placement()
        self.touched: dict[JobId, Job] = {}
        """Jobs that this step has changed."""
        self._rows: list[Effect] = []
        self.lost = 0
        self._out: list[Effect] = []
        self._batches: dict[tuple[NodeId, JobId], list[ShardOffer]] = {}

    # --- effects ---

    def send(self, to: NodeId, message: Message) -> None:
        """Send a message at the end of the step."""
        self._out.append(Send(to, message))

    def emit(self, effect: Effect) -> None:
        """Carry this out at the end of the step."""
        self._out.append(effect)

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

    def verdict(self, sender: NodeId, execution: Execution) -> Attempt | Ended | str:
        """What an execution is to us.

        Live (its attempt), the one that counts (its end), "held" (a vote), "late" (lost, but still of
        use), or why it is unwanted.
        """
        job = self.jobs.get(execution.job)
        if job is None:
            return "the job has ended"
        if not (0 <= execution.shard < len(job.shards)):
            return "no such shard"
        shard = job.shards[execution.shard]
        if shard.tried.get(execution.attempt) != sender:
            return "no such attempt"
        return shard.live.get(execution.attempt) or _verdict(shard, execution)

    def stored(self, accepted: Ended) -> bool:
        """Whether an outcome that counts is stored, so that its node may forget it."""
        execution = accepted.execution
        return self.jobs[execution.job].shards[execution.shard].state in ("kept", "failed")

    # --- attempts ---

    def offer(self, node: Node, job: Job, shard: Shard) -> None:
        """Make the shard's next attempt on this node."""
        shard.attempts += 1
        shard.tried[shard.attempts] = node.id
        execution = Execution(job.id, shard.index, shard.attempts)
        attempt = Attempt(execution, job, shard, node, heard=self.now, offered=self.now, since=self.now)
        self.track(attempt)
        node.unanswered += 1
        self._rate(job, shard)
        if shard.state == "waiting":
            self.move(job, shard, "offer", node.id, written=True)
        else:
            self._rows.append(Write(job.shard_row(shard)))
        self._queue(job, shard)
        self.send_offer(attempt)

    def track(self, attempt: Attempt) -> None:
        """List a live attempt with its job, its shard and its node; its offer is still to be sent."""
        execution = attempt.execution
        attempt.packing = attempt.node.id != self.node
        attempt.job.live[execution] = attempt.node.live[execution] = attempt
        attempt.shard.live[execution.attempt] = attempt

    def send_offer(self, attempt: Attempt) -> None:
        """Put the attempt into this step's offer of its job to its node."""
        execution = attempt.execution
        attempt.offered = self.now
        offer = ShardOffer(execution.shard, execution.attempt, attempt.shard.block)
        self._batches.setdefault((attempt.node.id, execution.job), []).append(offer)

    def advance(self, attempt: Attempt, verb: str, phase: str) -> None:
        """The attempt has been taken, or has started; so has its shard, if it was not so far yet."""
        if attempt.phase == "offered":
            attempt.node.unanswered -= 1
        attempt.phase, attempt.since = phase, self.now
        if attempt.shard.state in LIVE and PHASES.index(attempt.shard.state) < PHASES.index(phase):
            self.move(attempt.job, attempt.shard, verb)

    def give_back(self, attempt: Attempt, why: str, *, forget: bool = True) -> None:
        """The attempt is over, and its shard may want another one. `forget`: no result of it can come any more."""
        job, shard = attempt.job, attempt.shard
        self._detach(attempt)
        if forget:
            del shard.tried[attempt.execution.attempt]
        shard.forget_old()
        shard.since = self.now
        if not shard.live and shard.lost >= MAX_LOST * job.spec.replicas:
            self.fail(job, shard, Ended(attempt.execution, attempt.node.id, _lost(shard, why)))
            return
        self._fall_back(attempt.execution, attempt.node.id, why)

    def lose(self, attempt: Attempt, why: str) -> None:
        """The attempt's node is silent, or gone, or does not do what it took."""
        if attempt.job.live.get(attempt.execution) is not attempt:
            return  # it went with another one of its shard
        attempt.node.suspect = True
        attempt.node.room = 0
        if attempt.phase != "offered" or not self.placement.anybody_for(attempt.job):
            attempt.shard.lost += 1  # an offer that nobody answered says nothing about the shard
        self.lost += 1
        self.give_back(attempt, why, forget=False)

    def unsent(self, attempt: Attempt, reason: str) -> None:
        """The attempt's node could not be reached: it is tried again when there is no other, and nothing is spent."""
        attempt.node.suspect, attempt.node.room = True, 0
        attempt.shard.extra = False  # see `Requester._refused`
        attempt.job.busy = f"{attempt.node.id} can't be reached: {reason}"
        self.give_back(attempt, attempt.job.busy, forget=False)

    def _fall_back(self, last: Execution, node: NodeId, why: str) -> None:
        """The shard is as far as what is left of its live attempts; undecided if `last` was all that it may have."""
        job = self.jobs[last.job]
        shard = job.shards[last.shard]
        self._rate(job, shard)
        if not shard.live and not shard.wants:
            error = voting.undecided(shard.votes, job.spec)
            self.fail(job, shard, Ended(last, node, Outcome(ok=False, exit_code=-1, error=error)))
            return
        if (reached := shard.reached) != shard.state:
            job.move(shard, "return", self.now, why)
            for verb in _TO_PHASE[reached]:
                job.move(shard, verb, self.now)
            self._tell(job, shard)
        self._rows.append(Write(job.shard_row(shard)))
        self._queue(job, shard)
        self.touch(job)

    def _rate(self, job: Job, shard: Shard) -> None:
        wants = 0
        if shard.accepted is None and shard.lost < MAX_LOST * job.spec.replicas:
            wants = max(0, voting.missing(shard.votes, job.spec) - len(shard.live))
        job.rate(shard, wants)

    def _queue(self, job: Job, shard: Shard) -> None:
        """Put a shard that wants an attempt into a queue, if it isn't in one."""
        if shard.wants and not shard.queued:
            shard.queued = True
            if shard.tried:
                job.again.append(shard)
            else:
                job.fresh.appendleft(shard)

    def _detach(self, attempt: Attempt) -> None:
        if attempt.phase == "offered":
            attempt.node.unanswered -= 1
        del attempt.job.live[attempt.execution]
        del attempt.node.live[attempt.execution]
        del attempt.shard.live[attempt.execution.attempt]

    # --- outcomes ---

    def vote(self, job: Job, shard: Shard, ended: Ended) -> None:
        """An execution has ended, and is not repeated: decide, or wait for others that agree."""
        if (attempt := shard.live.get(ended.execution.attempt)) is not None:
            self._detach(attempt)
        shard.votes = (*shard.votes, ended)
        if (chosen := voting.winner(shard.votes, agree=job.spec.agree)) is not None:
            self._accept(job, shard, chosen)
            return
        self._fall_back(ended.execution, ended.node, "voted")

    def _accept(self, job: Job, shard: Shard, accepted: Ended) -> None:
        """This outcome counts; what else there is of the shard is dismissed."""
        shard.disagreed = voting.disagreed(shard.votes, accepted)
        for node in shard.disagreed:
            self.placement.distrust(node)
        self._dismiss(job, shard, accepted)
        self.move(job, shard, "accept", accepted.node, written=True)
        self.send(accepted.node, Accept(accepted.execution))
        self.keep(accepted)

    def fail(self, job: Job, shard: Shard, ended: Ended) -> None:
        """The shard has failed by no outcome of an execution: there is nothing to keep."""
        self._dismiss(job, shard, ended)
        self.move(job, shard, "fail", written=True)

    def _discard(self, shard: Shard) -> None:
        """No vote is wanted any more."""
        for vote in shard.votes:
            self.send(vote.node, Reject(vote.execution, "the shard was stopped"))
        shard.votes = ()

    def _dismiss(self, job: Job, shard: Shard, decided: Ended) -> None:
        """Nothing but `decided` is wanted of the shard."""
        for attempt in list(shard.live.values()):
            self._detach(attempt)
            self.send(attempt.node.id, Cancel((attempt.execution,)))
        for vote in shard.votes:
            if vote is not decided:
                self.send(vote.node, Reject(vote.execution, "another execution's result counts"))
        shard.votes = ()
        shard.accepted = decided
        job.rate(shard, 0)

    def keep(self, accepted: Ended) -> None:
        """Ask for an outcome that counts to be stored."""
        self._out.append(Keep(accepted.execution, accepted.node, accepted.outcome))

    def kept(self, job: Job, shard: Shard, accepted: Ended) -> None:
        """The outcome is stored: the shard is final, and the node may forget."""
        self.move(job, shard, "keep" if accepted.outcome.ok else "fail", written=True)
        self.send(accepted.node, Kept(accepted.execution))

    # --- jobs ---

    def add(self, job: Job) -> None:
        """A new job, with all its shards waiting."""
        job.counts["waiting"] = len(job.shards)
        for shard in job.shards:
            shard.queued = True
            self._rate(job, shard)
        job.fresh.extend(job.shards)
        self.placement.rate(job)
        job.few = self.placement.usable(job) < job.spec.replicas
        self.placement.house(job)
        self.jobs[job.id] = job
        self._rows.append(Write(job.row()))
        self._out.append(Notify(JobChanged(job.id, job.state)))
        self.touch(job)

    def adopt(self, job: Job) -> None:
        """A job from the journal, with its live attempts."""
        self.placement.rate(job)
        self.jobs[job.id] = job
        for shard in reversed(job.shards):
            if shard.state == "accepted" and shard.accepted is not None:
                self.keep(shard.accepted)
            elif shard.state == "waiting" or shard.state in LIVE:
                self._rate(job, shard)
                self._queue(job, shard)
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
            job.rate(shard, 0)
            if shard.state == "waiting" or shard.state in LIVE:
                self._discard(shard)
                self.move(job, shard, "stop", written=True)
        job.fresh.clear()
        job.again.clear()
        job.homes.clear()

    def finish(self, job: Job) -> None:
        """All shards are final: seal the job over what was kept, or end it with nothing.

        What was stopped is published nowhere: who stopped it waits for nothing more.
        """
        if not job.counts["kept"]:
            self.end(job, cid="")
            return
        job.sealing = True
        kept = [shard.accepted for shard in job.shards if shard.state == "kept" and shard.accepted is not None]
        target = "store" if job.closing is not None and job.closing[0] == "Stopped" else job.spec.publish
        if target != "store":
            self.become(job, job.state, f"publishing to {target}")
        self._out.append(Seal(job.id, tuple((one.execution.shard, one.outcome.record) for one in kept), target))

    def end(self, job: Job, *, cid: str, published: tuple[str, ...] = (), problem: str = "") -> None:
        """The job is over; nothing about it is remembered here."""
        failed, count = job.counts["failed"], len(job.shards)
        ending: tuple[JobState, str] = ("Failed", f"{failed} of {count} shards failed") if failed else ("Completed", "")
        state, why = job.closing or ending
        job.closing = (state, "; ".join(filter(None, (why, problem))))
        self._rows.append(Write(job.row(cid=cid, published=published)))
        self._out.append(Notify(JobChanged(job.id, *job.closing, cid, published)))
        del self.jobs[job.id]
        self.touched.pop(job.id, None)

    def move(self, job: Job, shard: Shard, verb: str, detail: str = "", *, written: bool = False) -> None:
        """Change a shard's state by `verb` and tell it; `written`: recovery needs to know."""
        job.move(shard, verb, self.now, detail)
        if written:
            self._rows.append(Write(job.shard_row(shard)))
        self._tell(job, shard)

    def _tell(self, job: Job, shard: Shard) -> None:
        """Tell the clients of a shard: of what counts, else of its first live attempt."""
        if (accepted := shard.accepted) is not None:
            node, attempt, error = accepted.node, accepted.execution.attempt, accepted.outcome.error
            change = ShardChanged(job.id, shard.index, shard.state, node, attempt, error)
        else:
            number = next(iter(shard.live), shard.attempts)
            change = ShardChanged(job.id, shard.index, shard.state, shard.tried.get(number), number)
        self._out.append(Notify(change))
        self.touch(job)


def _verdict(shard: Shard, execution: Execution) -> Ended | str:
    """What an attempt is that isn't live any more."""
    if shard.accepted is not None:
        return shard.accepted if shard.accepted.execution == execution else "another execution's result counts"
    if shard.state == "stopped":
        return "the shard was stopped"
    return "held" if any(vote.execution == execution for vote in shard.votes) else "late"


def _lost(shard: Shard, why: str) -> Outcome:
    error = ShardError("node", message=f"{shard.lost} attempts were lost, the last one because {why}")
    return Outcome(ok=False, exit_code=-1, error=error)
