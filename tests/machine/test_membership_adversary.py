"""A small network in the hands of an adversary, as a hypothesis state machine over `Mesh`.

The adversary kills, restarts (with clocks that are slow), freezes and cuts nodes off, breaks links, loses messages,
makes nodes leave, and speaks itself: it forges, replays and floods. After every step the machines check themselves, and
the test holds them to what membership promises. When the faults stop, every view must hold just who is there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
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

from bacalhau_node.errors import BugError, ProtocolError
from bacalhau_node.messages import Copy, Digest, Message, NodeRecord, PeersWanted, Records, Signed
from bacalhau_node.protocol import circle
from bacalhau_node.protocol import events as ev
from bacalhau_node.protocol.archive import MAX_RECORD, Archive, Held
from bacalhau_node.protocol.circle import Circle
from bacalhau_node.protocol.doors import Doors
from bacalhau_node.protocol.membership import Membership, Settings
from bacalhau_node.protocol.own import OwnRecord, noticeable
from bacalhau_node.protocol.view import STALE, View
from bacalhau_node.testing.mesh import EPOCH, Mesh, sign_as

NAMES = tuple(f"n-{n}" for n in range(7))
EVIL = "n-evil"
FEW = Settings(low=2, target=3, high=4, view=64)
"""So few neighbours that not all who are known are near, in a network of seven, which two cliques can not fill."""

NUMBER = st.integers(0, 1000)
FAULTS = 5
CONVERGED = 240.0
"""Seconds after the last fault: two failed knocks, a renewal, and a few comparisons."""


def a_record(node: str, version: int, **fields: Any) -> bytes:
    return msgspec.msgpack.encode(NodeRecord(node=node, version=version, **fields))


def signed(node: str, data: bytes) -> Copy:
    return Copy(Signed(data, sign_as(node, data)), 0)


class World(RuleBasedStateMachine):
    """The rules are the adversary's moves."""

    def __init__(self) -> None:
        super().__init__()
        self.faults = FAULTS
        self.gone: dict[str, float] = {}
        """Who is dead or has left, and since when."""
        self.newest: dict[tuple[str, int, str], tuple[int, float]] = {}
        """What (a node, in one life) knew of another: the version, and until when it must remember that."""
        self.blamed = 0
        self.away = False

    @initialize(seed=NUMBER, nodes=st.integers(3, 7), lost=st.sampled_from((0.0, 0.05, 0.3)))
    def begin(self, seed: int, nodes: int, lost: float) -> None:
        self.mesh = Mesh(seed=seed, settings=FEW, weigh=False, checked=True)
        self.names = NAMES[:nodes]
        for n, node in enumerate(self.names):
            self.mesh.start(node, NAMES[:1] if n else (), at=n * 0.5)
        self.mesh.run(until=20.0)  # who knows only one other node is lost with that one, whatever we do
        self.mesh.lost = lost

    # --- the adversary's moves ---

    @rule(seconds=st.sampled_from((0.1, 2.0, 15.0, 60.0)))
    def wait(self, seconds: float) -> None:
        self.pass_time(seconds)

    @rule(n=NUMBER)
    @precondition(lambda self: self.faults and len(self.mesh.alive) > 2)
    def kill(self, n: int) -> None:
        node = self.one(n)
        self.fault()
        self.mesh.kill([node], at=self.mesh.now)
        self.pass_time(0.01)
        self.gone[node] = self.mesh.now

    @rule(n=NUMBER)
    @precondition(lambda self: self.faults and len(self.mesh.alive) > 2)
    def leave(self, n: int) -> None:
        node = self.one(n)
        self.fault()
        self.mesh.leave(node, at=self.mesh.now)
        self.pass_time(0.6)
        self.gone[node] = self.mesh.now

    @rule(n=NUMBER, through=NUMBER, slow=st.sampled_from((0.0, 0.0, 3600.0)))
    @precondition(lambda self: self.gone)
    def restart(self, n: int, through: int, slow: float) -> None:
        node = sorted(self.gone)[n % len(self.gone)]
        del self.gone[node]
        others = [one for one in self.names if one != node]
        self.mesh.start(node, [self.one(through)], at=self.mesh.now, slow=slow, remembered=others)
        self.pass_time(0.01)

    @rule(n=NUMBER, seconds=st.sampled_from((5.0, 40.0, 120.0)))
    @precondition(lambda self: self.faults)
    def freeze(self, n: int, seconds: float) -> None:
        self.fault()
        self.mesh.freeze(self.one(n), until=self.mesh.now + seconds)
        self.pass_time(seconds)

    @rule(part=st.sets(st.sampled_from(NAMES), min_size=1, max_size=3), seconds=st.sampled_from((30.0, 30.0, 900.0)))
    @precondition(lambda self: self.faults)
    def cut_off(self, part: set[str], seconds: float) -> None:
        self.fault()
        self.away = True
        self.mesh.partition(part, at=self.mesh.now, until=self.mesh.now + seconds)
        self.pass_time(seconds + 0.01)
        self.away = False

    @rule(n=NUMBER, other=NUMBER)
    def cut(self, n: int, other: int) -> None:
        one, two = self.one(n), self.one(other)
        self.mesh.cut(one, two)

    @rule(n=NUMBER, room=st.integers(0, 4))
    def change(self, n: int, room: int) -> None:
        node = self.one(n)
        record = NodeRecord(node=node, version=0, addresses=(f"/memory/{node}",), slots=4, room=room)
        self.mesh.feed(node, ev.LoadChanged(record))

    @rule(n=NUMBER, of=NUMBER, lie=st.booleans())
    def replay(self, n: int, of: int, *, lie: bool) -> None:
        """An old record, by somebody who is honest; a lie makes it younger, which can bring back only the dead."""
        (node, _), (old, born) = list(self.mesh.made.items())[of % len(self.mesh.made)]
        age = 0 if lie and node not in self.gone else int(self.mesh.now - born)
        self.hear(self.one(n), Records((Copy(old, age),)), honest=True)

    @rule(n=NUMBER, of=NUMBER, how=st.integers(0, 5))
    def forge(self, n: int, of: int, how: int) -> None:
        """Something that no honest node sends: whoever sends it is hung up on."""
        victim, now = self.one(n), EPOCH + int(self.mesh.now * 1e9)
        name = self.names[of % len(self.names)]
        wrong: tuple[Message, ...] = (
            Records((signed(EVIL, a_record(name, now + 10**9, addresses=("/memory/n-evil",))),)),
            Records((signed(EVIL, a_record(EVIL, now + 2 * 86400 * 10**9)),)),
            Records((signed(EVIL, a_record(EVIL, now, agent="x" * MAX_RECORD)),)),
            Records((signed(EVIL, a_record(EVIL, now, addresses=("/memory/n-evil",) * 17)),)),
            Records((signed(EVIL, b"\x93garbage"),)),
            Digest(b"seven b"),
        )
        self.hear(victim, wrong[how], honest=False)

    @rule(n=NUMBER)
    def flood(self, n: int) -> None:
        victim = self.one(n)
        if not self.mesh.members[victim].frozen:
            for _ in range(65):
                self.mesh.feed(victim, ev.Received(f"{EVIL}-f", PeersWanted(1)))
            assert any(who == victim and of == f"{EVIL}-f" for who, of, _ in self.mesh.complaints)

    # --- the machinery ---

    def one(self, n: int) -> str:
        alive = self.mesh.alive
        return alive[n % len(alive)]

    def fault(self) -> None:
        self.faults -= 1

    def pass_time(self, seconds: float) -> None:
        """In steps, so that little is overlooked."""
        end = self.mesh.now + seconds
        while self.mesh.now < end:
            self.mesh.run(until=min(end, self.mesh.now + max(5.0, seconds / 20)))
            self.look()

    def hear(self, victim: str, message: Message, *, honest: bool) -> None:
        sender = "n-honest" if honest else EVIL
        banned = self.mesh.machine(victim)._others.is_banned(sender, self.mesh.now)
        before = len(self.mesh.complaints)
        self.mesh.feed(victim, ev.Received(sender, message))
        found = [of for who, of, _ in self.mesh.complaints[before:] if who != of]
        if honest:
            assert not found, f"{victim} blames who handed on an old record: {self.mesh.complaints[before:]}"
        else:
            assert banned or found == [EVIL], f"{victim} did not notice {message}"

    # --- what must hold at all times ---

    @invariant()
    def look(self) -> None:
        if not hasattr(self, "mesh"):
            return
        for node, member in self.mesh.members.items():
            if member.up:
                self.look_at(node, member.machine, member.life)
        for who, of, reason in self.mesh.complaints:
            honest = of in self.names and "did not answer" not in reason and who != of
            assert not honest, f"{who} blames {of}: {reason}"

    def look_at(self, node: str, machine: Membership, life: int) -> None:
        view = machine.view
        told = self.mesh.told[node]
        assert told.keys() == view.held.keys(), f"{node} told of {sorted(told)}, and knows {sorted(view.held)}"
        for entry in machine.entries(self.mesh.now):
            record = entry.record
            if entry.state == "self":
                continue
            held = view.held[record.node]
            assert (record.node, held.signed.record) in self.mesh.made, f"{node} believes a record that nobody made"
            before, until = self.newest.get((node, life, record.node), (0, 0.0))
            back = record.version < before and self.mesh.now < until
            assert not back, f"{node} went back to an older record of {record.node}"
            self.newest[node, life, record.node] = record.version, view.born[record.node] + STALE
            assert told[record.node] == (0 if entry.state == "suspect" else record.room), (
                f"{node} offers {record.node} work"
            )
            dead = self.mesh.now - self.gone.get(record.node, self.mesh.now)
            assert dead < STALE + 90, f"{node} still knows {record.node}, which ended {dead:.0f} s ago"
            assert entry.state != "neighbour" or dead < 300, f"{record.node} ended {dead:.0f} s ago, beside {node}"
            since = self.mesh.now - machine._others.peers[record.node].since if entry.state == "suspect" else 0.0
            assert min(since, dead) < 300, f"{record.node} ended {dead:.0f} s ago, and {node} still suspects it"

    def teardown(self) -> None:
        if not hasattr(self, "mesh"):
            return
        self.mesh.lost = 0.0
        self.pass_time(CONVERGED)
        alive = self.mesh.alive
        assert self.mesh.parts() == [len(alive)], f"in parts: {self.mesh.parts()}"
        for node in alive:
            own = self.mesh.machine(node).view.own.record
            assert not noticeable(own, self.mesh.machine(node)._own._description), f"{node} keeps its news to itself"
            for other in alive:
                self.converged(other, node)
        self.pass_time(STALE + 90)

    def converged(self, viewer: str, node: str) -> None:
        """The viewer knows what the node has said half a minute ago or earlier."""
        machine, there = self.mesh.machine(viewer), self.mesh.machine(node)
        if viewer == node:
            return
        assert node in machine.view.held, f"{viewer} does not know {node}"
        assert not machine._circle.is_suspect(node), f"{viewer} suspects {node}"
        if self.mesh.now - there.view.made > 100:
            assert machine.view.held[node] is there.view.own, f"{viewer} does not know the newest record of {node}"


CALM = settings(
    max_examples=30,
    stateful_step_count=25,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)


def test_membership_survives_the_adversary() -> None:
    run_state_machine_as_test(World, settings=CALM)


# --- bugs that the adversary must find ---


def takes_older_records(patch: pytest.MonkeyPatch) -> None:
    """A replay takes the place of what is newer."""
    patch.setattr(View, "outdated", lambda _self, _held: False)


def believes_what_is_not_signed(patch: pytest.MonkeyPatch) -> None:
    """Anybody can speak for anybody."""
    real = Archive.__init__
    patch.setattr(Archive, "__init__", lambda self, _verify: real(self, lambda *_: True))


def never_gives_up(patch: pytest.MonkeyPatch) -> None:
    """A suspect stays one for ever."""
    patch.setattr(circle, "PATIENCE", float("inf"))


def has_no_limit(patch: pytest.MonkeyPatch) -> None:
    """A hub takes everybody as its neighbour."""
    patch.setattr(Circle, "full", property(lambda _self: False))


def goes_on_below_its_own_version(patch: pytest.MonkeyPatch) -> None:
    """After a restart with a slow clock nobody takes its records."""
    patch.setattr(OwnRecord, "met", lambda _self, _other, _born: False)


def does_not_knock(patch: pytest.MonkeyPatch) -> None:
    """After a long partition nobody looks for the others."""
    patch.setattr(Doors, "lose", lambda _self, *_: None)
    patch.setattr(Doors, "due", lambda _self, *_, **__: [])


def blames_the_messenger(patch: pytest.MonkeyPatch) -> None:
    """Whoever hands on an old record is hung up on."""
    real = View.outdated

    def outdated(self: View, held: Held) -> bool:
        if real(self, held) and held is not self.held.get(held.node):
            raise ProtocolError("an old record")
        return real(self, held)

    patch.setattr(View, "outdated", outdated)


def does_not_bury(patch: pytest.MonkeyPatch) -> None:
    """Those who left come back through others."""
    patch.setattr(View, "bury", lambda self, held, **_: self.drop(held.node))
    patch.setattr(Membership, "_bid_farewell", lambda _self, _held: None)


def forgets_to_tell_the_requester(patch: pytest.MonkeyPatch) -> None:
    """A dead node is still offered work."""
    real = Circle._die

    def die(self: Circle, peer: Any) -> None:
        before = len(self.out)
        real(self, peer)
        self.out[before:] = [effect for effect in self.out[before:] if not isinstance(effect, ev.NodeGone)]

    patch.setattr(Circle, "_die", die)


BUGS = (
    takes_older_records,
    believes_what_is_not_signed,
    never_gives_up,
    has_no_limit,
    goes_on_below_its_own_version,
    does_not_knock,
    blames_the_messenger,
    does_not_bury,
    forgets_to_tell_the_requester,
)


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.__name__)
def test_the_adversary_finds_a_seeded_bug(bug: Callable[[pytest.MonkeyPatch], None]) -> None:
    """A test of the test: what it can't find it doesn't guard against."""
    once = settings(CALM, max_examples=300, phases=[Phase.generate], report_multiple_bugs=False)
    with pytest.MonkeyPatch.context() as patch:
        bug(patch)
        with pytest.raises((BugError, AssertionError, KeyError)):
            run_state_machine_as_test(World, settings=once)
