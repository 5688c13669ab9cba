"""Each rule of membership on its own: one machine, a few events, partial matching on the effects."""

from __future__ import annotations

import sys
from typing import Any

import msgspec
import pytest
from msgspec import structs

from bacalhau_node.errors import BugError, ProtocolError
from bacalhau_node.messages import Copy, Digest, Engine, Message, NodeRecord, PeersWanted, Records, Signed
from bacalhau_node.protocol import events as ev
from bacalhau_node.protocol.archive import MAX_RECORD, Archive, key, stamp
from bacalhau_node.protocol.chance import Chance
from bacalhau_node.protocol.circle import PATIENCE, UNDIALABLE
from bacalhau_node.protocol.membership import OFFERED, STRIKES, Membership, Settings
from bacalhau_node.protocol.neighbours import BANNED, FLOOD
from bacalhau_node.protocol.own import GAP, RATE
from bacalhau_node.protocol.view import BATCH, LIFE, MAX_DIGEST, MIX, PASSABLE, STALE, View
from bacalhau_node.testing.builders import matching, sent
from bacalhau_node.testing.mesh import EPOCH, address_of, sign_as, verify

A_DAY = 24 * 3600 * 10**9


def a_record(node: str, version: int = EPOCH, **fields: Any) -> NodeRecord:
    usual = {"addresses": (address_of(node),), "slots": 4, "room": 4}
    return NodeRecord(node=node, version=version, **(usual | fields))


def signed(record: NodeRecord, *, by: str | None = None) -> Signed:
    data = msgspec.msgpack.encode(record)
    return Signed(data, sign_as(by or record.node, data))


def copy_of(node: str, version: int = EPOCH, *, age: int = 0, **fields: Any) -> Copy:
    return Copy(signed(a_record(node, version, **fields)), age)


class Desk:
    """A machine under test: keeps the clock and checks the invariants."""

    def __init__(self, *, now: float = 100.0, epoch: int = EPOCH, **settings: Any) -> None:
        self.now = now
        self.archive = Archive(verify)
        self.machine = Membership(
            a_record("n-me", 0),
            archive=self.archive,
            sign=lambda data: sign_as("n-me", data),
            seed=1,
            epoch_ns=epoch,
            now=now,
            settings=Settings(**settings),
        )
        self(ev.Join())

    def __call__(self, event: ev.Event) -> list[ev.Effect]:
        effects = self.machine.step(event, self.now)
        self.machine.check()
        return effects

    def hear(self, sender: str, message: Message) -> list[ev.Effect]:
        return self(ev.Received(sender, message))

    def know(self, *nodes: str, **fields: Any) -> list[ev.Effect]:
        return self.hear("n-some", Records(tuple(copy_of(node, **fields) for node in nodes)))

    def befriend(self, *nodes: str) -> None:
        for node in nodes:
            self(ev.LinkUp(node, inbound=True))
            self.hear(node, self.digest())
            self.know(node)

    def later(self, seconds: float) -> list[ev.Effect]:
        """Let time pass; the timer fires every second, and dials are not answered."""
        effects, end = [], self.now + seconds
        while self.now < end:
            self.now = min(end, self.now + 1.0)
            effects += self(ev.TimerFired(ev.ExchangeTimer()))
        return effects

    def digest(self, *known: tuple[str, int], **fields: Any) -> Digest:
        return Digest(b"".join(key(node) + stamp(version) for node, version in known), **fields)

    def state(self, node: str) -> str | None:
        return next((one.state for one in self.machine.entries(self.now) if one.record.node == node), None)


def told(effects: list[ev.Effect]) -> list[tuple[str, int]]:
    return [(record.node, copy.age) for record, copy in records(effects)]


def records(effects: list[ev.Effect]) -> list[tuple[NodeRecord, Copy]]:
    copies = [copy for letter in sent(effects, Records) for copy in letter.records]
    return [(msgspec.msgpack.decode(copy.signed.record, type=NodeRecord), copy) for copy in copies]


# --- records ---


def test_a_record_is_verified_once_for_all_nodes_of_a_process() -> None:
    asked: list[str] = []
    archive = Archive(lambda node, *_: asked.append(node) is None)
    one = signed(a_record("n-one"))
    again = Signed(bytes(bytearray(one.record)), one.signature)
    assert archive.open(one) is archive.open(again)
    assert asked == ["n-one"]


def test_a_record_that_nobody_holds_is_forgotten() -> None:
    archive = Archive(verify)
    held = archive.open(signed(a_record("n-one")))
    assert len(archive) == 1
    del held
    assert len(archive) == 0


WRONG = {
    "another's key": (signed(a_record("n-one"), by="n-evil"), "its key did not sign"),
    "too long": (signed(a_record("n-one", agent="x" * MAX_RECORD)), "at most 8192"),
    "too many addresses": (signed(a_record("n-one", addresses=("/memory/n",) * 17)), "17 addresses"),
    "too long an address": (signed(a_record("n-one", addresses=("/" * 257,))), "too long"),
    "no version": (signed(a_record("n-one", version=0)), "the version 0"),
    "a version that is no 63 bits": (signed(a_record("n-one", version=2**63)), "the version 9223372036854775808"),
    "no id": (signed(a_record("!")), "can't be read"),
    "garbage": (Signed(b"\xc1", b""), "can't be read"),
    "too deep": (Signed(b"\x91" * 8000, b""), "can't be read"),
    "no Unicode": (Signed(b"\x82\xa4node\xa2\xff\xff\xa7version\x01", b""), "can't be read"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_whoever_sends_a_bad_record_is_hung_up_on(wrong: str) -> None:
    """For a while nothing more is heard of it, and its links are closed."""
    record, reason = WRONG[wrong]
    desk = Desk()
    desk.befriend("n-evil")
    effects = desk.hear("n-evil", Records((Copy(record, 0),)))
    assert [one.node for one in matching(effects, ev.HangUp) if reason in one.reason] == ["n-evil"]
    assert "n-evil" not in desk.machine.neighbours
    assert desk.hear("n-evil", desk.digest()) == []
    assert matching(desk(ev.LinkUp("n-evil", inbound=True)), ev.HangUp, node="n-evil", reason="")
    desk.later(BANNED + 1)
    assert sent(desk.hear("n-evil", desk.digest()), Records)


MALFORMED = (Digest(b"x"), Digest(b"x" * 16 * (MAX_DIGEST + 1)), Records((copy_of("n-x"),) * 129))


@pytest.mark.parametrize("message", MALFORMED)
def test_whoever_sends_a_malformed_message_is_hung_up_on(message: Message) -> None:
    assert matching(Desk().hear("n-evil", message), ev.HangUp, node="n-evil")


def test_whoever_floods_is_hung_up_on() -> None:
    desk = Desk()
    for _ in range(FLOOD):
        assert not matching(desk.hear("n-evil", PeersWanted(1)), ev.HangUp)
    assert matching(desk.hear("n-evil", PeersWanted(1)), ev.HangUp, node="n-evil")


def test_the_newest_record_wins_and_an_old_one_changes_nothing() -> None:
    desk = Desk()
    desk.know("n-one", version=EPOCH + 2, room=1)
    assert matching(desk.know("n-one", version=EPOCH + 1, room=3), ev.NodeSeen) == []
    assert [one.room for one in desk.machine.nodes()] == [1]
    assert [one.room for one in matching(desk.know("n-one", version=EPOCH + 3, room=2), ev.NodeSeen)] == [2]


def test_of_two_records_with_one_version_everybody_keeps_the_same() -> None:
    kept = []
    for order in ((1, 3), (3, 1)):
        desk = Desk()
        for room in order:
            desk.know("n-one", room=room)
        kept.append([one.room for one in desk.machine.nodes()])
    assert kept[0] == kept[1]


def test_a_record_from_the_future_is_not_taken_and_only_its_own_node_is_at_fault() -> None:
    desk = Desk()
    future = copy_of("n-fast", EPOCH + 2 * A_DAY)
    assert desk.hear("n-relay", Records((future,))) == []
    assert matching(desk.hear("n-fast", Records((future,))), ev.HangUp, node="n-fast")
    assert desk.state("n-fast") is None


def test_a_machine_that_slept_believes_records_again_when_it_knows_the_time() -> None:
    desk = Desk()
    desk(ev.LoadChanged(a_record("n-me", EPOCH + 2 * A_DAY)))
    desk.know("n-one", version=EPOCH + 2 * A_DAY)
    assert desk.state("n-one") == "known"


def test_records_are_handed_on_with_their_age_and_not_for_ever() -> None:
    """Else the dead would be passed around; everybody drops a record at about the same time."""
    desk = Desk()
    desk.know("n-one", age=int(PASSABLE) - 20)
    desk.now += 10
    assert ("n-one", PASSABLE - 10) in told(desk.hear("n-new", desk.digest(room=9)))
    desk.now += 11
    assert "n-one" not in dict(told(desk.hear("n-new", desk.digest(room=9))))
    assert desk.state("n-one") == "known"
    gone = matching(desk.later(STALE - PASSABLE + 70), ev.NodeGone)
    assert [one.node for one in gone] == ["n-one"]
    desk.know("n-old", age=int(PASSABLE) + 1)
    assert desk.state("n-old") is None


# --- this node's own record ---


def own(desk: Desk) -> NodeRecord:
    return desk.machine.view.own.record


def test_a_change_is_told_after_a_while_and_a_small_one_with_the_next_record() -> None:
    desk = Desk()
    first = own(desk)
    desk(ev.LoadChanged(a_record("n-me", 0, room=3)))
    desk.later(GAP + 1)
    assert own(desk) == first
    desk(ev.LoadChanged(a_record("n-me", 0, room=1)))
    assert own(desk).room == 1
    assert own(desk).version > first.version
    desk(ev.LoadChanged(a_record("n-me", 0, room=0)))
    assert own(desk).room == 1
    desk.later(GAP)
    assert own(desk).room == 0
    desk.later(LIFE)
    assert own(desk).version > first.version + (LIFE + GAP) * 0.7e9


def test_in_a_large_network_a_node_speaks_more_seldom() -> None:
    desk = Desk()
    desk.know(*(f"n-{n:03d}" for n in range(120)))
    desk.know(*(f"n-{n:03d}" for n in range(120, 240)))
    first = own(desk)
    desk.later(GAP)
    desk(ev.LoadChanged(a_record("n-me", 0, room=0)))
    desk.later(240 / RATE - GAP - 2)
    assert own(desk) == first
    desk.later(3)
    assert own(desk).room == 0


def test_versions_grow_though_the_clock_was_set_back() -> None:
    desk = Desk(epoch=EPOCH + A_DAY)
    before = own(desk).version
    desk(ev.LoadChanged(a_record("n-me", EPOCH, room=0)))
    desk.later(GAP)
    assert own(desk).version == before + 1


def test_a_record_of_an_earlier_life_is_outdone() -> None:
    desk = Desk()
    desk.know("n-me", version=EPOCH + 3600 * 10**9, age=20, room=1)
    assert own(desk).version == EPOCH + 3600 * 10**9 + 1
    assert own(desk).room == 4
    assert desk.state("n-me") == "self"


def test_two_processes_with_one_identity_are_told_of_once() -> None:
    desk = Desk()
    effects = []
    for n in range(1, 6):
        desk.later(30)
        effects += desk.know("n-me", version=EPOCH + n * 3600 * 10**9)
    assert [one.node for one in matching(effects, ev.Complain)] == ["n-me"]


def test_two_processes_that_start_together_find_out_in_seconds_and_one_that_was_restarted_tells_nothing() -> None:
    """By their clocks, as ages are whole seconds; each outdoes the other at once, and tells it soon."""
    desk = Desk(low=0)
    desk.befriend("n-both")
    effects = []
    for _ in range(STRIKES):
        desk.later(1)
        effects += desk.hear("n-both", Records((copy_of("n-me", own(desk).version + 10**8),)))
    assert [one.node for one in matching(effects, ev.Complain)] == ["n-me"]
    again = Desk()
    for n in range(2 * STRIKES):
        assert not matching(again.know("n-me", version=EPOCH - (9 - n) * 10**8, age=n), ev.Complain)


def test_a_record_that_would_be_too_long_goes_without_images_or_labels() -> None:
    archive = Archive(verify)
    images = tuple(f"registry.example/image-{n}" for n in range(1000))
    short = archive.own(a_record("n-me", images=images, labels={"a": "b"}), lambda _: b"")
    assert len(short.signed.record) <= MAX_RECORD
    assert 0 < len(short.record.images) < 1000
    assert msgspec.msgpack.decode(short.signed.record, type=NodeRecord) == short.record
    bare = archive.own(a_record("n-me", labels={"a": "b" * MAX_RECORD}), lambda _: b"")
    assert bare.record.labels == {}


# --- comparing views ---


def test_a_digest_is_answered_with_what_is_newer_and_asks_for_what_is_newer_there() -> None:
    desk = Desk()
    desk.know("n-mine", "n-both")
    desk.know("n-newer", version=EPOCH + 5)
    desk.know("n-older", version=EPOCH + 1)
    known = [("n-both", EPOCH), ("n-newer", EPOCH + 4), ("n-older", EPOCH + 2), ("n-theirs", EPOCH)]
    effects = desk.hear("n-other", desk.digest(*known, room=9))
    assert set(dict(told(effects))) == {"n-me", "n-mine", "n-newer"}
    wanted = b"".join(letter.wanted for letter in sent(effects, Records))
    assert wanted == key("n-older") + key("n-theirs")


def test_nobody_is_sent_more_new_nodes_than_it_has_room_for() -> None:
    desk = Desk()
    desk.know(*(f"n-{n:03d}" for n in range(100)))
    assert len(told(desk.hear("n-other", desk.digest(room=7)))) == 7
    desk.now += 1
    incomplete = desk.hear("n-other", desk.digest(complete=False, room=7))
    assert told(incomplete) == []


def test_a_record_says_how_long_messages_took() -> None:
    desk = Desk()
    for number, seconds in enumerate((0.2, 4.0, 0.4)):
        node = f"n-{number}"
        desk(ev.LinkUp(node, inbound=False))
        desk(ev.Dialled(address_of(node), node))
        desk.now += seconds
        desk.hear(node, Records(()))
        desk.hear(node, Records((copy_of(node),)))  # answers no question
    desk(ev.LoadChanged(a_record("n-me", room=0)))
    desk.later(200)
    assert next(iter(desk.machine.entries(desk.now))).record.age == pytest.approx(0.2)


def test_what_was_asked_for_is_sent_once_and_only_to_who_was_asked() -> None:
    desk = Desk()
    desk.know("n-one")
    assert sent(desk.hear("n-thief", Records((), wanted=key("n-one"))), Records) == []
    asked = desk(ev.Dialled(address_of("n-two"), "n-two"))
    assert len(sent(asked, Digest, to="n-two")) == 1
    assert dict(told(desk.hear("n-two", Records((), wanted=key("n-one"))))) == {"n-one": 0}
    assert sent(desk.hear("n-two", Records((), wanted=key("n-one"))), Records) == []


def test_a_full_view_takes_few_new_nodes_and_forgets_as_many_but_no_neighbour() -> None:
    desk = Desk(view=50)
    desk.befriend("n-near")
    desk.know(*(f"n-{n:03d}" for n in range(49)))
    assert len(desk.machine) == 50
    effects = desk.know(*(f"n-{n:03d}" for n in range(100, 200)))
    assert len(desk.machine) == 50
    assert len(matching(effects, ev.NodeGone)) == len(matching(effects, ev.NodeSeen)) == MIX
    assert desk.state("n-near") == "neighbour"


def test_a_view_that_is_too_large_is_told_in_part() -> None:
    desk = Desk(view=10_000)
    for n in range(0, 2200, 100):
        desk.know(*(f"n-{n + more:04d}" for more in range(100)))
    digest = desk.machine.view.digest()
    assert not digest.complete
    assert len(digest.known) == 16 * MAX_DIGEST
    assert digest.room == BATCH


def test_a_node_that_learns_much_compares_soon_again() -> None:
    desk = Desk()
    desk.befriend("n-near")
    gaps: list[float] = []
    last = desk.now

    def compare(*, times: int) -> None:
        nonlocal last
        for _ in range(times):
            while not sent(desk.later(1), Digest):
                pass
            gaps.append(desk.now - last)
            last = desk.now
            desk.hear("n-near", Records(()))

    compare(times=10)
    assert gaps[0] <= 3
    assert 18 <= gaps[-1] <= 34
    desk.know(*(f"n-{n:03d}" for n in range(100)))
    compare(times=1)
    assert gaps[-1] <= 3


# --- neighbours ---


def test_a_node_with_neighbours_enough_gives_others_to_dial_and_says_so() -> None:
    desk = Desk(high=3)
    desk.befriend("n-1aa", "n-2aa", "n-3aa")
    desk.know(*(f"n-{n:03d}" for n in range(60)))
    desk(ev.LinkUp("n-late", inbound=True))
    effects = desk.hear("n-late", desk.digest(room=99))
    assert all(letter.parting for letter in sent(effects, Records))
    assert len(told(effects)) == OFFERED + 1
    assert "n-late" not in desk.machine.neighbours
    assert matching(desk.later(10), ev.HangUp, node="n-late", reason="")


def test_who_was_turned_away_dials_others() -> None:
    desk = Desk()
    desk(ev.LinkUp("n-hub", inbound=False))
    desk(ev.Dialled(address_of("n-hub"), "n-hub"))
    offered = tuple(copy_of(f"n-{n:03d}") for n in range(32))
    effects = desk.hear("n-hub", Records(offered, parting=True))
    assert len(matching(effects, ev.Dial)) == 3
    assert desk.machine.neighbours == ()
    assert matching(desk.later(6), ev.HangUp, node="n-hub", reason="")


def test_a_link_alone_makes_no_neighbour() -> None:
    """A job's messages open links as well."""
    desk = Desk()
    assert not sent(desk(ev.LinkUp("n-one", inbound=True)), Digest)
    assert desk.machine.neighbours == ()


def test_a_node_alone_knocks_at_the_doors_it_was_told_of_until_they_open() -> None:
    desk = Desk()
    assert matching(desk(ev.Join(("/memory/n-hub",))), ev.Dial, address="/memory/n-hub")
    knocks = 0
    for _ in range(100):
        effects = desk(ev.DialFailed("/memory/n-hub", None, "refused"))
        knocks += len(matching([*effects, *desk.later(3)], ev.Dial))
    assert 8 <= knocks <= 20
    desk(ev.LinkUp("n-hub", inbound=False))
    effects = desk(ev.Dialled("/memory/n-hub", "n-hub"))
    assert sent(effects, Digest, to="n-hub")
    assert not matching(desk.later(1), ev.Dial)


def test_its_own_address_among_the_doors_is_ignored() -> None:
    desk = Desk()
    desk(ev.Join(("/memory/n-me",)))
    assert desk(ev.Dialled("/memory/n-me", "n-me")) == []
    assert not matching(desk.later(120), ev.Dial)


def test_neighbours_of_an_earlier_life_are_tried_two_at_a_time() -> None:
    desk = Desk()
    effects = desk(ev.Join((), remembered=("/memory/n-1", "/memory/n-2", "/memory/n-3")))
    assert [one.address for one in matching(effects, ev.Dial)] == ["/memory/n-1", "/memory/n-2"]
    desk(ev.DialFailed("/memory/n-1", None, "refused"))
    effects = desk(ev.DialFailed("/memory/n-2", None, "refused"))
    assert [one.address for one in matching(effects, ev.Dial)] == ["/memory/n-3"]


def test_each_address_of_a_node_is_tried() -> None:
    desk = Desk()
    effects = desk.know("n-one", addresses=("/memory/a", "/memory/b"))
    assert matching(effects, ev.Dial, address="/memory/a", node="n-one")
    effects = desk(ev.DialFailed("/memory/a", None, "refused"))
    assert matching(effects, ev.Dial, address="/memory/b", node="n-one")
    assert desk.state("n-one") == "known"
    desk(ev.DialFailed("/memory/b", None, "refused"))
    assert desk.state("n-one") == "suspect"


def test_somebody_else_behind_an_address_is_not_the_node_that_was_dialled() -> None:
    desk = Desk()
    desk.know("n-one")
    desk(ev.Dialled(address_of("n-one"), "n-two"))
    assert desk.state("n-one") == "suspect"
    assert desk.machine.neighbours == ("n-two",)


def test_its_neighbours_addresses_are_remembered_first() -> None:
    desk = Desk()
    desk.know(*(f"n-{n:03d}" for n in range(100)))
    desk.befriend("n-near")
    assert desk.machine.peers()[0] == address_of("n-near")
    assert len(desk.machine.peers()) == 50


# --- death ---


def test_a_neighbour_whose_link_breaks_has_no_room_and_is_dead_when_nobody_opens() -> None:
    desk = Desk()
    desk.befriend("n-one")
    effects = desk(ev.LinkDown("n-one"))
    assert [one.room for one in matching(effects, ev.NodeSeen, node="n-one")] == [0]
    dead: list[ev.Effect] = []
    began = desk.now
    while not matching(dead, ev.NodeGone):
        for one in matching(desk.later(1), ev.Dial):
            dead += desk(ev.DialFailed(one.address, None, "refused"))
        assert desk.now < began + 20
    assert desk.now >= began + PATIENCE
    assert desk.state("n-one") is None
    desk.hear("n-other", Records((copy_of("n-one"),)))
    assert desk.state("n-one") is None, "its old record does not bring it back"
    desk.hear("n-other", Records((copy_of("n-one", EPOCH + 1, age=60),)))
    assert desk.state("n-one") == "suspect", "a newer one of that time is looked into"
    desk.now += 30
    desk.hear("n-other", Records((copy_of("n-one", EPOCH + 2, age=2),)))
    assert desk.state("n-one") == "known", "a newer one of now proves that it lives"


def test_a_dead_node_that_links_lives() -> None:
    desk = Desk()
    desk.befriend("n-one")
    desk(ev.LinkDown("n-one"))
    desk.now += PATIENCE
    for _ in range(3):
        desk(ev.DialFailed("", "n-one", "refused"))
    assert desk.state("n-one") is None
    effects = desk(ev.LinkUp("n-one", inbound=True))
    assert [one.room for one in matching(effects, ev.NodeSeen)] == [4]


def test_a_restart_is_believed_at_once() -> None:
    desk = Desk()
    desk.befriend("n-one")
    desk(ev.LinkDown("n-one"))
    desk(ev.LinkUp("n-one", inbound=True))
    assert desk.state("n-one") == "known"
    desk.hear("n-one", desk.digest())
    assert desk.state("n-one") == "neighbour"


def test_a_node_that_can_not_be_reached_is_a_suspect_unless_it_has_a_link() -> None:
    desk = Desk()
    desk.know("n-one", "n-two")
    desk(ev.LinkUp("n-two", inbound=False))
    for node in ("n-one", "n-two", "n-nobody"):
        desk(ev.DialFailed("", node, "no route"))
    assert (desk.state("n-one"), desk.state("n-two")) == ("suspect", "known")


def unreached(effects: list[ev.Effect]) -> list[str]:
    return [one.node for one in matching(effects, ev.NodeSeen) if one.unreached]


@pytest.mark.parametrize("near", [True, False])
def test_a_node_at_work_whose_link_breaks_is_dialled_at_once_and_doubted_when_nobody_opens(near: bool) -> None:
    desk = Desk(low=0)
    desk.machine.look_after(lambda node: node == "n-one")
    if near:
        desk.befriend("n-one")
    else:
        desk.know("n-one")
        desk(ev.LinkUp("n-one", inbound=False))
    effects = desk(ev.LinkDown("n-one"))
    (dial,) = matching(effects, ev.Dial, node="n-one")
    assert not unreached(effects), "links break for a moment"
    effects = desk(ev.DialFailed(dial.address, "n-one", "refused"))
    assert unreached(effects) == ["n-one"]
    assert desk.state("n-one") == "suspect"
    effects = desk(ev.LinkUp("n-one", inbound=True))
    assert [(one.room, one.unreached) for one in matching(effects, ev.NodeSeen)] == [(4, False)]


def test_a_link_to_a_node_at_work_is_not_closed_for_want_of_a_use() -> None:
    desk = Desk()
    at_work = {"n-one"}
    desk.machine.look_after(at_work.__contains__)
    for node in ("n-one", "n-two"):
        desk.befriend(node)
        desk.hear(node, Records((), parting=True))
    assert [one.node for one in matching(desk.later(10), ev.HangUp)] == ["n-two"]


def test_nobody_can_have_a_node_shunned() -> None:
    """Whatever a bad actor says of a node that it does not like: only this node's own link and dial count."""
    desk = Desk()
    desk.machine.look_after(lambda node: node == "n-one")
    desk.know("n-one", version=EPOCH + 5)
    desk(ev.LinkUp("n-one", inbound=False))
    said = (
        copy_of("n-one", EPOCH + 4, room=0, addresses=()),
        copy_of("n-one", EPOCH + 5, age=int(PASSABLE)),
        copy_of("n-evil", neighbours=()),
        Copy(signed(a_record("n-one", EPOCH + 9, leaving=True), by="n-evil"), 0),
    )
    effects = [desk.hear("n-evil", Records((one,))) for one in said]
    effects.append(desk(ev.LinkDown("n-evil")))
    effects.append(desk(ev.DialFailed("", "n-evil", "refused")))
    assert all(one.node != "n-one" for each in effects for one in matching(each, ev.NodeSeen))
    assert not [one for each in effects for one in matching(each, ev.NodeGone)]
    assert desk.state("n-one") == "known"


def test_a_suspect_that_can_not_be_dialled_is_waited_for() -> None:
    desk = Desk()
    desk(ev.LinkUp("n-one", inbound=True))
    desk.hear("n-one", desk.digest())
    desk.know("n-one", addresses=())
    desk(ev.LinkDown("n-one"))
    assert not matching(desk.later(UNDIALABLE - 2), ev.NodeGone)
    assert matching(desk.later(4), ev.NodeGone, node="n-one")


def test_a_neighbour_that_answers_nothing_is_given_up() -> None:
    desk = Desk()
    desk(ev.LinkUp("n-one", inbound=False))
    desk(ev.Dialled(address_of("n-one"), "n-one"))
    desk.know("n-one")
    effects = desk.later(120)
    assert [one.node for one in matching(effects, ev.HangUp) if f"{STRIKES} questions" in one.reason] == ["n-one"]
    assert 2 <= len(sent(effects, Digest, to="n-one")) <= STRIKES
    assert desk.state("n-one") == "suspect"


def test_the_doors_of_the_dead_are_knocked_at_ever_more_seldom() -> None:
    desk = Desk()
    desk.befriend("n-one")
    desk(ev.LinkDown("n-one"))
    dials = []
    for _ in range(2000):
        knocks = matching(desk.later(1), ev.Dial)
        dials += [desk.now for _ in knocks]
        for one in knocks:
            desk(ev.DialFailed(one.address, None, "refused"))
    assert 60 < len(dials) < 120, "alone, it never waits for more than half a minute"


def test_leaving_is_told_to_neighbours_and_by_them_to_others() -> None:
    desk = Desk()
    desk.befriend("n-one")
    effects = desk.know("n-one", version=EPOCH + 1, leaving=True)
    assert matching(effects, ev.NodeGone, node="n-one")
    assert desk.state("n-one") is None
    assert dict(told(desk.hear("n-other", desk.digest(("n-one", EPOCH)))))["n-one"] == 0
    desk.know("n-one", version=EPOCH)
    assert desk.state("n-one") is None
    desk.know("n-one", version=EPOCH + 2)
    assert desk.state("n-one") == "known"


def test_a_node_that_leaves_says_so_and_does_nothing_more() -> None:
    desk = Desk()
    desk.befriend("n-one", "n-two")
    effects = desk(ev.Leave())
    assert [(record.node, record.leaving) for record, _ in records(effects)] == [("n-me", True)] * 2
    assert desk.hear("n-one", desk.digest()) == []


def test_an_impossible_change_is_a_bug_with_a_story() -> None:
    desk = Desk()
    desk.befriend("n-one")
    with pytest.raises(BugError, match=r"node n-one is neighbour: 'expire' can't happen to it\n.* link"):
        desk.machine._circle.move("n-one", "expire")


def test_an_entry_of_a_view_takes_little_memory() -> None:
    """A thousand views of a thousand nodes have a million entries: records and ages are shared, two places are not."""
    archive, chance = Archive(verify), Chance(1)
    records = [archive.open(signed(a_record(f"n-{n:04d}"))) for n in range(1001)]
    views = [View(records[0], 5000.0, bound=1024, chance=chance) for _ in range(2)]
    for view in views:
        for held in records[1:]:
            view.put(held, 100.7, 5000.0 + view.bound)
    one, other = (view.born["n-0500"] for view in views)
    assert one is other
    assert (sys.getsizeof(views[0].held) + sys.getsizeof(views[0].born)) / 1000 < 90


# --- chance ---


def test_chance_repeats_and_is_even() -> None:
    assert [Chance(7).draw() for _ in range(2)] == [Chance(7).draw()] * 2
    chance = Chance(1)
    counts = [0] * 10
    for _ in range(10_000):
        counts[chance.below(10)] += 1
    assert 850 < min(counts) <= max(counts) < 1150
    assert all(20 <= chance.between(20, 30) < 30 for _ in range(1000))
    assert sorted(chance.sample(range(10), 20)) == list(range(10))
    assert len(set(chance.sample(range(1000), 30))) == 30


def test_small_records_stay_small() -> None:
    """What the bound on a message rests on."""
    engine = Engine("docker", "container", "3.12.4", 2**33, (2**36,) * 8)
    record = a_record("12D3KooW" + "x" * 44, EPOCH, engines=(engine,) * 3, neighbours=("12D3KooW" + "y" * 44,) * 12)
    held = Archive(verify).own(structs.replace(record, images=("python:3.12-slim",) * 20), lambda _: b"s" * 64)
    assert len(held.signed.record) < 2048


def test_a_wrong_record_is_a_protocol_error_of_its_sender() -> None:
    with pytest.raises(ProtocolError, match="did not sign"):
        Archive(verify).open(signed(a_record("n-one"), by="n-evil"))
