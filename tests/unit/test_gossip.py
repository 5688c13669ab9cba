"""The router of gossip: what is passed on to whom, what is believed, how the mesh stays in shape."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.keys import KeyPair
from libp2p.crypto.rsa import create_new_key_pair as create_rsa
from libp2p.peer.id import ID
from libp2p.pubsub.pb import rpc_pb2
from libp2p.pubsub.validators import PUBSUB_SIGNING_PREFIX, signature_validator
from libp2p.utils.varint import encode_varint_prefixed

from bacalhau_node.errors import ProtocolError
from bacalhau_node.ports import Packet
from bacalhau_node.transports.libp2p import gossip
from bacalhau_node.transports.libp2p.gossip import BACK_OFF, DEGREE, FEWEST, MOST, TOPIC, Neighbour, Router, rpcs
from bacalhau_node.transports.libp2p.limits import ENVELOPE, LARGEST_PUBLISHED

KEYS = [create_new_key_pair(bytes([number]) * 32) for number in range(20)]
NAMES = [ID.from_pubkey(keys.public_key).to_base58() for keys in KEYS]


class Table:
    """A router with neighbours whose queues can be looked at, and a clock."""

    def __init__(self, neighbours: int, *, number: int = 0) -> None:
        self.time = 1000.0
        self.router = Router(KEYS[number].private_key, TOPIC, chance=random.Random(1), now=lambda: self.time)
        self.neighbours = [Neighbour(name) for name in NAMES[1 : neighbours + 1]]
        for neighbour in self.neighbours:
            self.router.add(neighbour)
        for neighbour in self.neighbours:
            self.heard(neighbour, rpc_pb2.RPC(subscriptions=[rpc_pb2.RPC.SubOpts(subscribe=True, topicid=TOPIC)]))
        self.said()

    def heard(self, neighbour: Neighbour, rpc: rpc_pb2.RPC) -> list[Packet]:
        return self.router.heard(neighbour, rpc.SerializeToString())

    def said(self) -> dict[str, list[rpc_pb2.RPC]]:
        """What was said since the last look, to whom."""
        found = {}
        for neighbour in self.neighbours:
            queued = bytearray(b"".join(neighbour._queue))
            neighbour._queue.clear()
            neighbour.queued = 0
            if queued:
                found[neighbour.node] = [rpc_pb2.RPC.FromString(raw) for raw in rpcs(queued)]
        return found

    def published(self) -> dict[str, list[bytes]]:
        """The data of messages that were sent since the last look, to whom."""
        data = {node: [message.data for rpc in said for message in rpc.publish] for node, said in self.said().items()}
        return {node: found for node, found in data.items() if found}

    def control(self, neighbour: Neighbour, **what: object) -> None:
        self.heard(neighbour, rpc_pb2.RPC(control=rpc_pb2.ControlMessage(**what)))


def signed(keys: KeyPair, data: bytes, number: int = 1, topic: str = TOPIC) -> rpc_pb2.Message:
    """A message as another implementation makes it."""
    message = rpc_pb2.Message(
        data=data,
        topicIDs=[topic],
        from_id=ID.from_pubkey(keys.public_key).to_bytes(),
        seqno=number.to_bytes(8, "big"),
    )
    message.signature = keys.private_key.sign(PUBSUB_SIGNING_PREFIX.encode() + message.SerializeToString())
    message.key = keys.public_key.serialize()
    return message


def carrying(*messages: rpc_pb2.Message) -> rpc_pb2.RPC:
    return rpc_pb2.RPC(publish=messages)


def test_a_neighbour_is_told_what_is_wanted_first():
    table = Table(0)
    table.neighbours = [Neighbour(NAMES[1])]
    table.router.add(table.neighbours[0])
    [rpc] = table.said()[NAMES[1]]
    assert [(one.subscribe, one.topicid) for one in rpc.subscriptions] == [(True, TOPIC)]


def test_what_is_published_goes_signed_to_every_neighbour_once():
    table = Table(15)
    table.router.publish(b"news")
    said = table.said()
    assert set(said) == set(NAMES[1:16])
    for [rpc] in said.values():
        [message] = rpc.publish
        assert signature_validator(message)
        assert (message.data, ID(message.from_id).to_base58()) == (b"news", NAMES[0])


def test_numbers_grow_even_for_a_node_that_starts_again():
    numbers = []
    for _ in range(2):
        table = Table(1)
        table.router.publish(b"one")
        table.router.publish(b"two")
        numbers += [int.from_bytes(rpc.publish[0].seqno, "big") for rpc in table.said()[NAMES[1]]]
    assert numbers == sorted(set(numbers))


def test_a_new_message_is_passed_on_to_the_mesh_but_not_back_nor_to_its_author():
    table = Table(15)
    mesh = list(table.router.mesh.values())
    relay, author = mesh[0], mesh[1]
    message = signed(KEYS[NAMES.index(author.node)], b"news")
    assert table.heard(relay, carrying(message)) == [Packet(author.node, b"news")]
    assert set(table.published()) == {one.node for one in mesh[2:]}


def test_a_message_is_heard_once_whoever_relays_it():
    table = Table(3)
    message = signed(KEYS[9], b"news")
    assert table.heard(table.neighbours[0], carrying(message, message)) == [Packet(NAMES[9], b"news")]
    assert table.heard(table.neighbours[1], carrying(message)) == []


def test_ones_own_message_that_comes_back_is_not_heard():
    table = Table(2)
    table.router.publish(b"mine")
    [rpc] = table.said()[NAMES[1]]
    assert table.heard(table.neighbours[1], rpc) == []
    assert table.heard(table.neighbours[1], carrying(signed(KEYS[0], b"of an earlier life", 7))) == []


def test_the_message_of_another_topic_is_passed_over():
    table = Table(2)
    assert table.heard(table.neighbours[0], carrying(signed(KEYS[9], b"x", topic="other"))) == []
    assert table.published() == {}


def test_an_author_with_a_key_beside_its_id_is_believed():
    keys = create_rsa(bits=2048)
    table = Table(2)
    [packet] = table.heard(table.neighbours[0], carrying(signed(keys, b"from kubo")))
    assert packet == Packet(ID.from_pubkey(keys.public_key).to_base58(), b"from kubo")


def broken(how: str) -> rpc_pb2.Message:
    """A message that no honest node passes on."""
    message = signed(KEYS[9], b"data")
    match how:
        case "unsigned":
            message.ClearField("signature")
        case "changed":
            message.data = b"other data"
        case "renumbered":
            message.seqno = bytes(8)
        case "another's name":
            message.from_id = ID.from_pubkey(KEYS[10].public_key).to_bytes()
        case "no name":
            message.from_id = b""
        case "a name of garbage":
            message.from_id, message.key = b"\xff\xff\xff", b"zz"
        case "a key of garbage":
            message.from_id = ID.from_pubkey(create_rsa(bits=2048).public_key).to_bytes()
            message.key = b"\x08\x63\x12\x01\x00"
        case "a signature of garbage":
            message.signature = b"junk"
    return message


@pytest.mark.parametrize(
    "how",
    [
        "unsigned",
        "changed",
        "renumbered",
        "another's name",
        "no name",
        "a name of garbage",
        "a key of garbage",
        "a signature of garbage",
    ],
)
def test_whoever_relays_what_its_author_did_not_sign_is_at_fault(how):
    table = Table(3)
    with pytest.raises(ProtocolError, match="signature"):
        table.heard(table.neighbours[0], carrying(broken(how)))
    assert table.published() == {}
    good = signed(KEYS[9], b"data")
    assert table.heard(table.neighbours[1], carrying(good)) == [Packet(NAMES[9], b"data")]  # and may still be heard


@given(st.binary(max_size=200))
def test_bytes_of_any_kind_are_a_fault_at_most(raw):
    table = Table(1)
    try:
        table.router.heard(table.neighbours[0], raw)
    except ProtocolError:
        return


# --- the mesh ---


@pytest.mark.parametrize("neighbours", [1, 3, DEGREE, 19])
def test_the_mesh_is_as_large_as_it_should_be(neighbours):
    table = Table(neighbours)
    assert len(table.router.mesh) == min(neighbours, DEGREE)


def test_whoever_is_taken_into_the_mesh_is_told():
    table = Table(0)
    table.neighbours = [Neighbour(NAMES[1])]
    table.router.add(table.neighbours[0])
    table.heard(table.neighbours[0], rpc_pb2.RPC(subscriptions=[rpc_pb2.RPC.SubOpts(subscribe=True, topicid=TOPIC)]))
    assert [graft.topicID for rpc in table.said()[NAMES[1]] for graft in rpc.control.graft] == [TOPIC]


def test_a_mesh_that_loses_neighbours_takes_others():
    table = Table(15)
    for _ in range(3):
        table.router.remove(next(iter(table.router.mesh.values())))
    assert len(table.router.mesh) >= FEWEST


def test_nobody_is_taken_who_does_not_subscribe():
    table = Table(3)
    for neighbour in table.neighbours:
        table.heard(neighbour, rpc_pb2.RPC(subscriptions=[rpc_pb2.RPC.SubOpts(subscribe=False, topicid=TOPIC)]))
    table.router.beat()
    table.router.publish(b"news")
    assert table.router.mesh == {}
    assert table.published() == {}


def grafting(table: Table, neighbour: Neighbour) -> list[rpc_pb2.ControlPrune]:
    """Let a neighbour ask to be in the mesh; how it was refused, if it was."""
    table.said()
    table.control(neighbour, graft=[rpc_pb2.ControlGraft(topicID=TOPIC)])
    return [prune for rpc in table.said().get(neighbour.node, []) for prune in rpc.control.prune]


def test_a_full_mesh_refuses_and_says_for_how_long():
    table = Table(19)
    refused = [prune for neighbour in table.neighbours for prune in grafting(table, neighbour)]
    assert len(table.router.mesh) == MOST
    assert len(refused) == 19 - MOST
    assert {prune.backoff for prune in refused} == {int(BACK_OFF)}


def test_a_neighbour_that_was_refused_may_come_again_later_not_sooner():
    table = Table(1)
    [neighbour] = table.neighbours
    table.router._prune(neighbour)
    assert grafting(table, neighbour)
    table.time += BACK_OFF + 1
    assert not grafting(table, neighbour)
    assert NAMES[1] in table.router.mesh


def test_a_neighbour_that_pruned_us_is_left_alone_until_its_time_and_still_hears_what_we_publish():
    table = Table(1)
    [neighbour] = table.neighbours
    table.control(neighbour, prune=[rpc_pb2.ControlPrune(topicID=TOPIC, backoff=60)])
    table.router.beat()
    assert table.router.mesh == {}
    table.router.publish(b"news")
    assert table.published() == {NAMES[1]: [b"news"]}
    table.time += 61
    table.router.beat()
    assert NAMES[1] in table.router.mesh


def test_a_mesh_that_grew_too_large_shrinks():
    table = Table(19)
    for neighbour in table.neighbours:
        table.router.mesh[neighbour.node] = neighbour
    table.router.beat()
    assert len(table.router.mesh) == MOST


# --- repair ---


def told(table: Table) -> dict[str, list[bytes]]:
    """Who was told of which messages."""
    return {
        node: [key for rpc in said for have in rpc.control.ihave for key in have.messageIDs]
        for node, said in table.said().items()
        if any(rpc.control.ihave for rpc in said)
    }


def test_neighbours_outside_the_mesh_are_told_of_messages_and_get_what_they_ask_for():
    table = Table(15)
    message = signed(KEYS[18], b"news")
    table.heard(table.neighbours[0], carrying(message))
    table.said()
    table.router.beat()
    others = told(table)
    assert others
    assert not set(others) & set(table.router.mesh)
    node, keys = next(iter(others.items()))
    asker = table.router.neighbours[node]
    table.control(asker, iwant=[rpc_pb2.ControlIWant(messageIDs=keys)])
    assert table.published() == {node: [b"news"]}


def test_what_is_lacking_is_asked_for_and_what_is_here_is_not():
    table = Table(2)
    known, unknown = signed(KEYS[9], b"known"), signed(KEYS[9], b"unknown", 2)
    table.heard(table.neighbours[0], carrying(known))
    table.said()
    ids = [message.from_id + message.seqno for message in (known, unknown)]
    table.control(table.neighbours[1], ihave=[rpc_pb2.ControlIHave(topicID=TOPIC, messageIDs=ids)])
    [rpc] = table.said()[table.neighbours[1].node]
    assert [list(want.messageIDs) for want in rpc.control.iwant] == [[ids[1]]]


def test_a_neighbour_that_comes_late_is_told_at_once_of_what_was_published_lately():
    table = Table(0)
    table.router.publish(b"before")
    table.neighbours = [Neighbour(NAMES[1])]
    table.router.add(table.neighbours[0])
    table.heard(table.neighbours[0], rpc_pb2.RPC(subscriptions=[rpc_pb2.RPC.SubOpts(subscribe=True, topicid=TOPIC)]))
    assert len(told(table)[NAMES[1]]) == 1


def test_old_messages_are_neither_told_of_nor_kept():
    table = Table(15)
    table.heard(table.neighbours[0], carrying(signed(KEYS[18], b"news")))
    for _ in range(gossip.LATELY + 1):
        table.router.beat()
    table.said()
    table.router.beat()
    assert told(table) == {}
    assert not any(table.router._lately)


def test_ids_are_forgotten_in_time():
    table = Table(1)
    table.heard(table.neighbours[0], carrying(signed(KEYS[9], b"news")))
    table.router.beat()
    assert table.router._seen
    table.time += gossip.REMEMBERED + 1
    table.router.beat()
    assert not table.router._seen


def test_a_neighbour_that_takes_nothing_loses_messages_and_that_is_told_once(caplog):
    table = Table(1)
    for _ in range(gossip.QUEUE // LARGEST_PUBLISHED + 3):
        table.router.publish(bytes(LARGEST_PUBLISHED))
    assert table.router.dropped >= 2
    assert [NAMES[1] in record.message for record in caplog.records] == [True]


def test_what_one_author_has_others_pass_on_is_bounded_and_told_once(caplog):
    """A minute later there is room again; nobody else's messages suffer, and who relays is not at fault."""
    table = Table(3)
    flood = [signed(KEYS[9], bytes(LARGEST_PUBLISHED), number) for number in range(1, 40)]
    passed = sum(len(table.heard(table.neighbours[0], carrying(one))) for one in flood)
    assert 10 <= passed <= gossip.ALLOWED // LARGEST_PUBLISHED
    assert table.router.dropped == len(flood) - passed
    assert len(table.heard(table.neighbours[0], carrying(signed(KEYS[8], b"news")))) == 1
    assert [NAMES[9] in record.message for record in caplog.records] == [True]
    assert table.heard(table.neighbours[1], carrying(flood[-1])) == [], "it is known, and not looked at again"
    table.time += 60
    assert len(table.heard(table.neighbours[0], carrying(signed(KEYS[9], b"later", 99)))) == 1


def test_a_message_that_no_node_would_make_is_not_passed_on():
    table = Table(3)
    large = signed(KEYS[9], bytes(LARGEST_PUBLISHED + ENVELOPE))
    assert table.heard(table.neighbours[0], carrying(large)) == []
    assert table.published() == {}
    assert table.neighbours[0].node in table.router.neighbours


def test_many_small_messages_of_one_author_are_passed_on():
    table = Table(3)
    each = (table.heard(table.neighbours[0], carrying(signed(KEYS[9], b"x" * 500, n))) for n in range(1, 501))
    assert all(len(found) == 1 for found in each)


def test_of_many_authors_only_so_many_are_remembered(monkeypatch):
    monkeypatch.setattr(gossip, "AUTHORS", 5)
    allowances = gossip.Allowances()
    assert all(allowances.spend(b"%d" % number, 100, 0.0) for number in range(20))
    assert len(allowances._left) == 5


# --- frames ---


def test_rpcs_are_cut_out_wherever_the_bytes_were_split():
    whole = b"".join(encode_varint_prefixed(bytes([n]) * n * 50) for n in range(1, 6))
    for cut in range(1, 40):
        buffer, found = bytearray(), []
        for at in range(0, len(whole), cut):
            buffer += whole[at : at + cut]
            found += rpcs(buffer)
        assert found == [bytes([n]) * n * 50 for n in range(1, 6)]
        assert not buffer


@pytest.mark.parametrize("raw", [b"\xff\xff\xff\xff\x0f", b"\x81\x80\x40", b"\xff" * 5])
def test_an_rpc_that_is_too_large_is_a_fault_before_it_is_here(raw):
    with pytest.raises(ProtocolError, match="gossip"):
        rpcs(bytearray(raw))


def test_what_can_be_asked_for_again_takes_a_bounded_place(monkeypatch):
    """A flood is passed on, but not kept."""
    monkeypatch.setattr(gossip, "QUEUE", 10_000)
    table = Table(2)
    for _ in range(50):
        table.router.publish(b"x" * 1_000)
        table.said()
    assert sum(len(rpc) for beat in table.router._lately for rpc in beat.values()) <= 10_000
    table.router.beat()
    table.router.publish(b"y")
    assert len(table.router._lately[0]) == 1
