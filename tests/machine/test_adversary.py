"""One requester and three compute nodes in the hands of an adversary, as a hypothesis state machine.

The adversary delivers, repeats, drops and reorders messages, ends executions well, badly and with wrong
answers, lets time pass, kills nodes between a commit and its effects, lets them stand still (so that their
timers are late and their messages pile up), suspects living nodes, and cancels.
After every step the machines check themselves, and a **referee**, which sees only rows and
effects, holds them to what the protocol promises. When the faults stop, every job must end and
every node must be left with nothing.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from bacalhau_node.errors import BugError
from bacalhau_node.ids import Execution, JobId
from bacalhau_node.messages import ErrorKind, Message, Offer, Outcome, Propose, Recall, ShardError
from bacalhau_node.protocol import events as ev
from bacalhau_node.protocol import recovery, voting, watch
from bacalhau_node.protocol.book import Book
from bacalhau_node.protocol.compute import MAX_PREFETCH, ORPHAN_GRACE, Compute, Held
from bacalhau_node.protocol.here import JobsHere
from bacalhau_node.protocol.placement import Placement
from bacalhau_node.protocol.records import Attempt, Ended, Job, Node, Shard
from bacalhau_node.protocol.requester import Requester
from bacalhau_node.spec import JobSpec, Resources
from bacalhau_node.testing.builders import a_job, a_job_id
from bacalhau_node.testing.referee import Referee
from bacalhau_node.testing.simulator import Host

REQUESTER = "n-req"
COMPUTE = ("n-old", "n-two", "n-one")
"""The first one can't run jobs with a GPU, the second one may give wrong answers. A run has the last one to three."""
JOBS = 2
MISCHIEF = 4
"""Crashes and false rumours in one run: more of them, and no work ever gets far."""
ROUNDS = 110
"""Of five seconds each: shorter than it takes to give up on a node that starts nothing, which hides other faults."""

NUMBER = st.integers(0, 1000)
NODE = st.integers(0, 3)
JOB = st.fixed_dictionaries(
    {
        "shards": st.integers(1, 5),
        "parallel": st.sampled_from((None, 1, 2)),
        "retries": st.integers(0, 1),
        "job_timeout": st.sampled_from((None, None, 40.0)),
        "resources": st.sampled_from((Resources(), Resources(gpus=1))),
        "votes": st.sampled_from(((1, 1), (1, 1), (2, 2), (3, 2))),
    }
)
HEAD = st.sampled_from(((0, 0), (0, 0), (2, 0), (3, 7)))
"""How many executions end well, and what time passes, before there is any mischief."""

HOW = ("well", "lost", "lost", "twice")
PACKED = ("well", "well", "well", "unsent", "unreadable")
KINDS: tuple[ErrorKind | None, ...] = (None, None, "exception", "signal", "node", "memory")


def refuses_gpu(_requester: str, spec: JobSpec) -> str | None:
    return "has no GPU" if spec.resources.gpus else None


class Body:
    """A host's surroundings that die with it: work, timers, and what is being stored."""

    def __init__(self) -> None:
        self.runs: dict[Execution, bool] = {}
        """Executions given to the executor, and whether their code has started."""
        self.ran: set[Execution] = set()
        self.keeps: list[Execution] = []
        self.packs: list[tuple[str, Offer]] = []
        """Offers that are made ready for another node."""
        self.kept: Counter[Execution] = Counter()
        self.seals: list[JobId] = []
        self.sealed: Counter[JobId] = Counter()
        self.timers: dict[ev.Timer, float] = {}


class World(RuleBasedStateMachine):
    """The rules are the adversary's moves."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.net: list[tuple[str, str, Message]] = []
        self.referee = Referee()
        self.hosts = {REQUESTER: Host(REQUESTER, slots=1, referee=self.referee)}
        self.lives = 0
        self.cancelled: set[JobId] = set()
        self.jobs = 0
        self.mischief = MISCHIEF
        self.still: set[str] = set()
        self.offers: set[Execution] = set()
        self.unreadable: set[Execution] = set()
        """Executions whose input was gone before they could be offered."""

    @initialize(slots=st.integers(1, 2), nodes=st.integers(1, 3), liar=st.booleans(), job=JOB, head=HEAD)
    def begin(self, slots: int, nodes: int, job: dict[str, Any], head: tuple[int, int], *, liar: bool) -> None:
        self.liar = liar
        for node in COMPUTE[3 - nodes :]:
            refuse = {"refuse": refuses_gpu} if node == "n-old" else {}
            self.hosts[node] = Host(node, slots=slots, referee=self.referee, **refuse)
        self.bodies = {node: Body() for node in self.hosts}
        for node in self.compute:
            self.feed(REQUESTER, ev.NodeSeen(node, slots))
        self.submit(job)
        if head != (0, 0):
            self.go_well(*head)

    # --- the machinery ---

    @property
    def compute(self) -> tuple[str, ...]:
        return tuple(self.hosts)[1:]

    def feed(self, node: str, event: ev.Event, *, crash: bool = False) -> None:
        """One turn of a node; with `crash` it dies after the commit, before the effects."""
        effects = self.hosts[node].step(event, self.now)
        if crash:
            self.restart(node)
            return
        self.perform(node, effects, event)

    def restart(self, node: str, *, resume: bool = True) -> None:
        self.bodies[node] = Body()
        self.still.discard(node)
        self.lives += 1
        effects = self.hosts[node].restart(self.now, resume=resume)
        self.perform(node, effects, None)
        if node == REQUESTER:
            for other in self.compute:
                self.feed(REQUESTER, ev.NodeSeen(other, self.hosts[other].compute.room))

    def perform(self, node: str, effects: list[ev.Effect], event: ev.Event | None) -> None:
        body = self.bodies[node]
        for effect in effects:
            match effect:
                case ev.Send(to=to, message=message):
                    self.referee.sent(to, message)
                    if isinstance(message, Offer):
                        self.offered(to, message, restarted=event is None)
                        body.packs.append((to, message))
                    else:
                        self.net.append((node, to, message))
                case ev.SetTimer(timer=timer, at=at):
                    body.timers[timer] = at
                case ev.Keep(execution=execution):
                    body.keeps.append(execution)
                    body.kept[execution] += 1
                    assert body.kept[execution] == 1, f"{execution} is kept twice"
                case ev.Seal():
                    self.seal(effect)
                case ev.Notify(update=update):
                    self.referee.told(update)
                case _:
                    self.work(node, effect, event)

    def offered(self, to: str, offer: Offer, *, restarted: bool) -> None:
        """Who may get a shard: nobody who tried it or was outvoted, as long as there are others.

        A requester that comes back doesn't know its votes any more, and takes their attempts for live ones.
        """
        book = self.hosts[REQUESTER].requester.book
        job = book.jobs[offer.job]
        able = [node.id for node in book.placement.nodes.values() if not node.suspect and node.id not in job.never]
        liars = {node.id for node in book.placement.nodes.values() if node.distrusted}
        trusted = [node for node in able if node not in self.referee.outvoted and node not in liars]
        for one in offer.shards:
            shard, execution = job.shards[one.shard], Execution(offer.job, one.shard, one.attempt)
            if execution in self.offers:
                continue  # the same once more
            self.offers.add(execution)
            if restarted:
                continue
            assert to not in self.referee.outvoted or not trusted, f"{to} was outvoted, and gets {one} beside {trusted}"
            tried = [node for attempt, node in shard.tried.items() if attempt != one.attempt]
            if to in tried and (len(shard.live) > 1 or shard.votes):
                others = [node for node in trusted if node not in tried]
                assert not others, f"{to} gets {one} once more beside {others}"
                assert len(shard.live) <= job.spec.replicas, f"{to} gets {one} once more to be faster"

    def work(self, node: str, effect: ev.Effect, event: ev.Event | None) -> None:
        match effect:
            case ev.Run(execution=execution):
                self.run(node, execution)
            case ev.Stop(execution=execution):
                running = self.bodies[node].runs.pop(execution)
                asked = isinstance(event, ev.Received) and isinstance(event.message, Recall)
                assert not (asked and running), f"{execution} runs, and was given back"
            case ev.Forget(execution=execution) if not isinstance(event, ev.TimerFired):  # but for the orphan grace
                self.referee.forgotten(execution)

    def seal(self, effect: ev.Seal) -> None:
        body = self.bodies[REQUESTER]
        assert effect.records == self.referee.records(effect.job)
        body.seals.append(effect.job)
        body.sealed[effect.job] += 1
        assert body.sealed[effect.job] == 1, f"{effect.job} is sealed twice"

    def run(self, node: str, execution: Execution) -> None:
        body, compute = self.bodies[node], self.hosts[node].compute
        assert execution not in body.ran, f"{node} runs {execution} twice"
        body.ran.add(execution)
        body.runs[execution] = False
        assert len(body.runs) <= compute.slots + compute.prefetch <= compute.slots + MAX_PREFETCH

    def until(self, seconds: float) -> None:
        """Let time pass; timers fire in order, and no message arrives."""
        end = self.now + seconds
        while True:
            bodies = [(node, body) for node, body in self.bodies.items() if node not in self.still]
            due = [(at, n, node, t) for node, body in bodies for n, (t, at) in enumerate(body.timers.items())]
            first = min(due, default=None, key=lambda one: one[:3])
            if first is None or first[0] > end:
                break
            at, _, node, timer = first
            self.now = max(self.now, at)
            del self.bodies[node].timers[timer]
            self.feed(node, ev.TimerFired(timer))
        self.now = end

    def finish(self, node: str, execution: Execution, kind: ErrorKind | None, seconds: float) -> None:
        del self.bodies[node].runs[execution]
        record = f"{execution} on {node} in life {self.lives}"
        error = ShardError(kind) if kind else None
        outcome = Outcome(
            ok=kind is None,
            exit_code=int(kind is not None),
            error=error,
            answer="wrong" if self.liar and node == "n-two" else "right",
            record=record,
            seconds=seconds,
        )
        self.referee.ran(execution, outcome)
        self.feed(node, ev.ExecutionEnded(execution, outcome))

    def working(self, *, started: bool | None = None) -> list[tuple[str, Execution]]:
        return [
            (node, execution)
            for node, body in self.bodies.items()
            for execution, going in body.runs.items()
            if started in (None, going)
        ]

    def quiet(self, *, store: bool = True) -> None:
        """Deliver all messages in order, and (`store`) store all that is to be stored."""
        body = self.bodies[REQUESTER]
        for _ in range(50):
            going = any(to not in self.still for _, to, _ in self.net)
            if not (going or body.packs or (store and (body.keeps or body.seals))):
                return
            while body.packs:
                self.pack("well", 0)
            net, self.net = self.net, []
            for sender, to, message in net:
                if to in self.still:
                    self.net.append((sender, to, message))
                else:
                    self.feed(to, ev.Received(sender, message))
            while store and body.keeps:
                self.feed(REQUESTER, ev.ResultKept(body.keeps.pop(0)))
            while store and body.seals:
                job = body.seals.pop(0)
                self.feed(REQUESTER, ev.JobSealed(job, f"cid-{job}"))
        raise AssertionError("the nodes talk without end")

    # --- the adversary's moves ---

    @rule(job=JOB)
    @precondition(lambda self: self.jobs < JOBS)
    def submit(self, job: dict[str, Any]) -> None:
        self.jobs += 1
        fields = {name: value for name, value in job.items() if name != "votes"}
        replicas, agree = job["votes"]
        self.feed(REQUESTER, a_job(self.jobs - 1, replicas=replicas, agree=agree, **fields))

    @rule(n=NUMBER)
    @precondition(lambda self: self.net)
    def deliver(self, n: int) -> None:
        sender, to, message = self.net.pop(n % len(self.net))
        self.feed(to, ev.Received(sender, message))

    @rule(n=NUMBER)
    @precondition(lambda self: self.net)
    def repeat(self, n: int) -> None:
        sender, to, message = self.net[n % len(self.net)]
        self.feed(to, ev.Received(sender, message))

    @rule(n=NUMBER)
    @precondition(lambda self: self.net)
    def drop(self, n: int) -> None:
        del self.net[n % len(self.net)]

    @rule(n=NUMBER)
    @precondition(lambda self: self.net)
    def deliver_and_crash(self, n: int) -> None:
        sender, to, message = self.net.pop(n % len(self.net))
        self.feed(to, ev.Received(sender, message), crash=True)

    @rule(node=NODE, resume=st.sampled_from((True, True, False)))
    @precondition(lambda self: self.mischief)
    def crash(self, node: int, *, resume: bool) -> None:
        self.mischief -= 1
        self.restart(self.named(node), resume=resume)

    @rule(node=NODE, seconds=st.sampled_from((5.0, 16.0)))
    @precondition(lambda self: self.mischief)
    def stand_still(self, node: int, seconds: float) -> None:
        """A node is alive, but hears and says nothing for a while; then its timers are late."""
        self.mischief -= 1
        self.still.add(self.named(node))
        self.quiet()
        self.until(seconds)
        self.still.clear()

    @rule(n=NUMBER)
    @precondition(lambda self: self.working(started=False))
    def start(self, n: int) -> None:
        waiting = self.working(started=False)
        node, execution = waiting[n % len(waiting)]
        self.bodies[node].runs[execution] = True
        self.feed(node, ev.ExecutionStarted(execution))

    @rule(n=NUMBER, kind=st.sampled_from(KINDS), seconds=st.sampled_from((0.001, 0.05, 1.0)), how=st.sampled_from(HOW))
    @precondition(lambda self: self.working())
    def end(self, n: int, kind: ErrorKind | None, seconds: float, how: str) -> None:
        """An execution ends; its first proposal may get lost, or be repeated."""
        working = self.working()
        node, execution = working[n % len(working)]
        before = len(self.net)
        self.finish(node, execution, kind, seconds)
        if how == "lost":
            del self.net[before:]
        elif how == "twice":
            self.net += self.net[before:]

    @rule(crash=st.booleans())
    @precondition(lambda self: self.bodies[REQUESTER].keeps)
    def keep(self, *, crash: bool) -> None:
        self.feed(REQUESTER, ev.ResultKept(self.bodies[REQUESTER].keeps.pop(0)), crash=crash)

    @rule(how=st.sampled_from(PACKED), n=NUMBER)
    @precondition(lambda self: self.bodies[REQUESTER].packs)
    def pack(self, how: str, n: int) -> None:
        """An offer is packed and sent, or its node can't be reached, or one of its shards has no input any more."""
        packs = self.bodies[REQUESTER].packs
        to, offer = packs.pop(n % len(packs))
        live = self.hosts[REQUESTER].requester.wants
        executions = [Execution(offer.job, one.shard, one.attempt) for one in offer.shards]
        shards = [one for one, execution in zip(offer.shards, executions, strict=True) if live(execution, to)]
        executions = [execution for execution in executions if live(execution, to)]
        if how == "unsent":
            self.feed(REQUESTER, ev.OfferUnsent(tuple(executions), "it is away"))
        elif how == "unreadable" and executions and self.mischief:
            self.mischief -= 1
            self.unreadable.update(executions[:1])
            self.feed(REQUESTER, ev.OfferFailed(executions[0], ShardError("input")))
            shards, executions = shards[1:], executions[1:]
        if how != "unsent" and shards:
            self.net.append((REQUESTER, to, Offer(offer.job, offer.spec, tuple(shards), offer.count)))
            self.feed(REQUESTER, ev.OfferPacked(tuple(executions)))

    @rule(n=NUMBER, lied=st.booleans())
    @precondition(lambda self: self.mischief and any(isinstance(one[2], Propose) for one in self.net))
    def lose_a_result(self, n: int, *, lied: bool) -> None:
        """The bytes of a result that was proposed don't come, or are not what they should be."""
        proposed = [one for one in self.net if isinstance(one[2], Propose)]
        sender, to, message = one = proposed[n % len(proposed)]
        if not self.hosts[to].requester.wants(message.execution, sender):
            return
        self.mischief -= 1
        self.net.remove(one)
        self.feed(to, ev.ResultComing(message.execution, sender))
        self.feed(to, ev.ResultMissing(message.execution, sender, "it did not come", lied))

    @rule(node=NODE)
    @precondition(lambda self: self.net)
    def cut(self, node: int) -> None:
        """All that is on its way to or from a node is lost."""
        self.net = [one for one in self.net if self.named(node) not in one[:2]]

    @rule(store=st.booleans())
    @precondition(lambda self: self.net)
    def settle(self, *, store: bool) -> None:
        self.quiet(store=store)

    @rule(seconds=st.sampled_from((1.0, 5.0, 5.0, 16.0, 16.0, ORPHAN_GRACE)))
    def pass_time(self, seconds: float) -> None:
        self.until(seconds)

    @rule(ends=st.integers(0, 6), seconds=st.sampled_from((0, 2, 7, 7)))
    @precondition(lambda self: self.working())
    def go_well(self, ends: int, seconds: int) -> None:
        """Everything works for a while: some executions end, the others go on."""
        self.quiet()
        for node, execution in self.working()[:ends]:
            self.begin_work()
            if execution in self.bodies[node].runs:
                self.finish(node, execution, None, 0.001)
            self.quiet()
        for _ in range(seconds):
            self.begin_work()
            self.quiet()
            self.until(1.0)

    def begin_work(self) -> None:
        """What is in a free slot starts."""
        for node, execution in self.working(started=False):
            runs = self.bodies[node].runs
            if sum(runs.values()) < self.hosts[node].compute.slots:
                runs[execution] = True
                self.feed(node, ev.ExecutionStarted(execution))

    @rule(node=NODE, gone=st.booleans(), dialled=st.booleans())
    @precondition(lambda self: self.mischief)
    def gossip(self, node: int, *, gone: bool, dialled: bool) -> None:
        """The membership view is told of a node, has dialled it in vain, or takes it for dead."""
        self.mischief -= 1
        name = self.compute[node % len(self.compute)]
        if gone:
            self.feed(REQUESTER, ev.NodeSeen(name, 0, unreached=True) if dialled else ev.NodeGone(name))
        else:
            self.announce(name)

    @rule(n=st.integers(0, JOBS - 1), crash=st.booleans())
    @precondition(lambda self: self.jobs)
    def cancel(self, n: int, *, crash: bool) -> None:
        job = self.hosts[REQUESTER].requester.book.jobs.get(a_job_id(n))
        if job is not None and job.unfinished and job.closing is None:
            self.cancelled.add(job.id)
        self.feed(REQUESTER, ev.CancelRequested(a_job_id(n)), crash=crash)

    def named(self, n: int) -> str:
        return tuple(self.hosts)[n % len(self.hosts)]

    def announce(self, node: str) -> None:
        self.feed(REQUESTER, ev.NodeSeen(node, self.hosts[node].compute.room))

    # --- what must hold ---

    @invariant()
    def machines_agree_with_themselves(self) -> None:
        for host in self.hosts.values():
            host.check()
        nodes = self.hosts[REQUESTER].requester.book.placement.nodes
        trusted = [node for node in self.referee.outvoted if node in nodes and not nodes[node].distrusted]
        assert not trusted, f"{trusted} were outvoted"

    def teardown(self) -> None:
        """The faults stop: every job ends, every node is left with nothing, and then nobody talks."""
        if len(self.hosts) == 1:
            return
        for node in self.compute:
            self.announce(node)
        requester = self.hosts[REQUESTER].requester
        for _ in range(ROUNDS):
            self.quiet()
            for node, execution in self.working():
                if execution in self.bodies[node].runs:
                    self.finish(node, execution, None, 0.05)
            self.quiet()
            if not requester.book.jobs and not any(host.compute.held for host in self.hosts.values()):
                break
            self.until(5.0)
        assert not requester.book.jobs, f"never ended: {list(requester.book.jobs)}"
        assert all(row.state in ev.FINAL_JOB for row in self.referee.jobs.values())
        assert all(self.referee.jobs[job].state == "Stopped" for job in self.cancelled)
        held = {node: list(host.compute.held) for node, host in self.hosts.items() if host.compute.held}
        assert not held, f"never given up: {held}"
        self.until(ORPHAN_GRACE)
        assert not self.net
        assert not any(body.timers for body in self.bodies.values() if body is not self.bodies[REQUESTER])


CALM = settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=350,
    stateful_step_count=50,
    suppress_health_check=list(HealthCheck),
)


def test_the_protocol_holds_against_the_adversary() -> None:
    """Hundreds of runs of up to fifty moves, the same ones every time."""
    run_state_machine_as_test(World, settings=CALM)


# --- bugs put in on purpose: the adversary must find each of them ---


def accepts_a_second_result(patch: pytest.MonkeyPatch) -> None:
    """The requester forgets that the shard has its result."""
    real = Book.verdict

    def verdict(self: Book, sender: str, execution: Execution) -> object:
        found = real(self, sender, execution)
        return "late" if found == "another execution's result counts" else found

    patch.setattr(Book, "verdict", verdict)


def runs_a_repeated_offer(patch: pytest.MonkeyPatch) -> None:
    """The compute node does not remember what it has run."""
    patch.setattr(JobsHere, "is_new", lambda _self, _execution, _requester: True)


def takes_more_than_it_has_room_for(patch: pytest.MonkeyPatch) -> None:
    """The compute node forgets what is at work."""
    patch.setattr(Compute, "room", property(lambda self: self.slots + self.prefetch))


def counts_attempts_anew_after_a_restart(patch: pytest.MonkeyPatch) -> None:
    """Two executions get the same name."""
    real = recovery._restore

    def restore(job: Job, row: ev.ShardRow) -> None:
        if row.outcome is not None:
            real(job, row)

    patch.setattr(recovery, "_restore", restore)


def lets_go_of_results_that_are_not_stored(patch: pytest.MonkeyPatch) -> None:
    """`Kept` goes out where `Accept` should."""
    patch.setattr(Book, "stored", lambda _self, _accepted: True)


def accepts_without_journaling(patch: pytest.MonkeyPatch) -> None:
    """The decision is told before it is durable."""
    real = Book.move

    def move(self: Book, job: Job, shard: Shard, verb: str, detail: str = "", *, written: bool = False) -> None:
        real(self, job, shard, verb, detail, written=written and verb != "accept")

    patch.setattr(Book, "move", move)


def proposes_only_once(patch: pytest.MonkeyPatch) -> None:
    """A lost proposal is never repeated."""
    real = Compute._propose

    def propose(self: Compute, held: Held) -> None:
        real(self, held)
        held.due = math.inf

    patch.setattr(Compute, "_propose", propose)


def loses_a_lost_shard(patch: pytest.MonkeyPatch) -> None:
    """A shard that avoids a node is not queued again."""
    real = Book.lose

    def lose(self: Book, attempt: Attempt, why: str) -> None:
        real(self, attempt, why)
        attempt.job.again.clear()

    patch.setattr(Book, "lose", lose)


def forgets_parallel(patch: pytest.MonkeyPatch) -> None:
    """--parallel is not looked at."""
    patch.setattr(Job, "offerable", property(lambda self: self.wanting > 0))


def asks_those_who_said_never(patch: pytest.MonkeyPatch) -> None:
    """A node that can't run the job is asked again and again."""
    real = Placement._pick

    def pick(self: Placement, job: Job, node: Node, now: float) -> Shard | None:
        never, job.never = job.never, {}
        shard = real(self, job, node, now)
        job.never = never
        return shard

    patch.setattr(Placement, "_pick", pick)
    patch.setattr(Placement, "hopeless", lambda _self, _job: False)


def does_not_journal_a_cancel(patch: pytest.MonkeyPatch) -> None:
    """After a restart the job goes on."""
    real = Job.row

    def row(self: Job, **ending: Any) -> ev.JobRow:
        closing, self.closing = self.closing, None
        made = real(self, **ending)
        self.closing = closing
        return made

    patch.setattr(Job, "row", row)


def does_not_keep_again_after_a_restart(patch: pytest.MonkeyPatch) -> None:
    """An accepted result is never stored when the node died in between."""
    real = recovery._restore

    def restore(job: Job, row: ev.ShardRow) -> None:
        real(job, row)
        shard = job.shards[row.shard]
        if shard.state == "accepted":
            shard.state = "kept"

    patch.setattr(recovery, "_restore", restore)


def cancels_what_it_has_accepted(patch: pytest.MonkeyPatch) -> None:
    """A heartbeat of a result that waits to be stored is answered with a cancel."""
    real = Requester._alive

    def alive(self: Requester, sender: str, executions: tuple[Execution, ...]) -> tuple[Execution, ...]:
        accepted = [one for one in executions if isinstance(self.book.verdict(sender, one), Ended)]
        return (*real(self, sender, executions), *accepted)

    patch.setattr(Requester, "_alive", alive)


def never_gives_up_on_a_silent_node(patch: pytest.MonkeyPatch) -> None:
    """Leases do not end."""
    patch.setattr(watch, "LEASE", float("inf"))


def keeps_the_slot_of_what_was_cancelled(patch: pytest.MonkeyPatch) -> None:
    """Capacity leaks with each cancel."""
    real = Compute._drop

    def drop(self: Compute, held: Held) -> None:
        real(self, held)
        self.active += held.outcome is None

    patch.setattr(Compute, "_drop", drop)


def counts_a_vote_as_the_decision(patch: pytest.MonkeyPatch) -> None:
    """--agree is not looked at."""
    real = voting.winner
    patch.setattr(voting, "winner", lambda votes, **_: real(votes, agree=1))


def accepts_what_it_only_holds(patch: pytest.MonkeyPatch) -> None:
    """A proposal that waits for others is answered as if it counted."""
    real = Book.verdict

    def verdict(self: Book, sender: str, execution: Execution) -> object:
        found = real(self, sender, execution)
        if found != "held":
            return found
        return next(vote for vote in self.jobs[execution.job].shards[execution.shard].votes)

    patch.setattr(Book, "verdict", verdict)


def trusts_who_was_outvoted(patch: pytest.MonkeyPatch) -> None:
    """A node that gave a wrong answer is asked like any other."""
    patch.setattr(Placement, "distrust", lambda _self, _node: None)


def runs_all_replicas_on_one_node(patch: pytest.MonkeyPatch) -> None:
    """It agrees with itself."""
    patch.setattr(Shard, "had", lambda _self, _node: False)


def tries_a_slow_shard_where_it_is_slow(patch: pytest.MonkeyPatch) -> None:
    """The second try goes to the same node."""

    def second(book: Book, job: Job, attempt: Attempt, _room: dict[str, int]) -> None:
        attempt.shard.extra = True
        book.offer(attempt.node, job, attempt.shard)

    patch.setattr(watch, "_second", second)


BUGS = (
    accepts_a_second_result,
    runs_a_repeated_offer,
    takes_more_than_it_has_room_for,
    counts_attempts_anew_after_a_restart,
    lets_go_of_results_that_are_not_stored,
    accepts_without_journaling,
    proposes_only_once,
    loses_a_lost_shard,
    forgets_parallel,
    asks_those_who_said_never,
    does_not_journal_a_cancel,
    does_not_keep_again_after_a_restart,
    cancels_what_it_has_accepted,
    never_gives_up_on_a_silent_node,
    keeps_the_slot_of_what_was_cancelled,
    counts_a_vote_as_the_decision,
    accepts_what_it_only_holds,
    trusts_who_was_outvoted,
    runs_all_replicas_on_one_node,
    tries_a_slow_shard_where_it_is_slow,
)


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.__name__)
def test_the_adversary_finds_a_seeded_bug(bug: Callable[[pytest.MonkeyPatch], None]) -> None:
    """A test of the test: what it can't find it doesn't guard against."""
    once = settings(CALM, max_examples=1000, phases=[Phase.generate], report_multiple_bugs=False)
    with pytest.MonkeyPatch.context() as patch:
        bug(patch)
        with pytest.raises((BugError, AssertionError, KeyError)):
            run_state_machine_as_test(World, settings=once)


if __name__ == "__main__":  # the long run by hand: `PYTHONPATH=node python tests/machine/test_adversary.py 6000`
    runs = int(sys.argv[1])
    run_state_machine_as_test(World, settings=settings(CALM, derandomize=False, max_examples=runs))
