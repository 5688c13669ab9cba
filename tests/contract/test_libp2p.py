"""Nodes on libp2p: whom they refuse and what they say, what survives a hostile peer, and what is left behind."""

import asyncio
import contextlib
import functools
import hashlib
import itertools
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
import trio
from libp2p.utils.varint import encode_varint_prefixed

from bacalhau_node.errors import BugError, NodeUnreachable, ProtocolError, SpecError
from bacalhau_node.identity import Identity
from bacalhau_node.ports import Arrival, Packet, Waiting
from bacalhau_node.protocol.events import LinkDown, LinkUp
from bacalhau_node.transports.libp2p import LibP2PTransport, dialling, gossip, host, link, streams, thread
from bacalhau_node.wire import MAX_MESSAGE

DEADLINE = 10
HERE = "/ip4/127.0.0.1/tcp/0"

Open = Callable[..., Awaitable[LibP2PTransport]]


@pytest.fixture
async def node() -> AsyncIterator[Open]:
    """Opens nodes that listen on this machine; all are closed at the end."""
    opened = []

    async def one(name: str, **how: object) -> LibP2PTransport:
        how = {"listen": [HERE], "in_process": False} | how
        opened.append(await LibP2PTransport.open(hashlib.sha256(name.encode()).digest(), **how))
        return opened[-1]

    yield one
    for transport in opened:
        await transport.close()


async def until(transport: LibP2PTransport, wanted: Arrival) -> None:
    """Read until something comes."""
    async with asyncio.timeout(DEADLINE), contextlib.aclosing(transport.received()) as received:
        async for arrival in received:
            if arrival == wanted:
                return
    raise AssertionError(f"{wanted} never came")


async def still_good(one: LibP2PTransport, other: LibP2PTransport) -> None:
    """See that two nodes exchange messages of all kinds."""
    await one.send(other.node, b"still there?")
    await until(other, Packet(one.node, b"still there?"))
    await other.publish(b"still here")
    await until(one, Packet(other.node, b"still here"))


async def becomes(condition: Callable[[], bool]) -> None:
    """Wait until something is so."""
    async with asyncio.timeout(DEADLINE):
        while not condition():  # noqa: ASYNC110 - it happens on another thread
            await asyncio.sleep(0.01)


def warnings(caplog) -> list[str]:
    return [record.message for record in caplog.records if record.levelno >= logging.WARNING]


# --- who is who ---


async def test_a_node_is_called_by_the_peer_id_of_its_identity(node):
    one = await node("one")
    assert one.node == Identity(hashlib.sha256(b"one").digest()).node
    assert all(address.endswith(f"/p2p/{one.node}") for address in one.addresses())


async def test_one_identity_is_on_the_network_once(node):
    await node("one")
    with pytest.raises(SpecError, match="two nodes need two identities"):
        await node("one")


async def test_an_identity_is_free_again_when_its_node_has_left(node):
    await (await node("one")).close()
    await node("one")


async def test_another_process_with_this_identity_is_refused_and_told(node, caplog, monkeypatch):
    one = await node("one")
    monkeypatch.setattr(host, "HERE", {})  # another process has an account of its own
    other = await node("one")
    muxed = await opened(other, other._host.dialler._outside, one.node, one.addresses()[0])
    with pytest.raises((ProtocolError, *streams.BROKEN)):
        await opened(other, other._host._link_up, muxed)
    await becomes(lambda: "the identity of this very node" in " ".join(warnings(caplog)))


async def test_of_two_processes_with_one_identity_each_hears_its_own_answers(node, monkeypatch):
    """Else only one of them would ever find out that there is another."""
    third, one = await node("third"), await node("one")
    await one.dial(third.addresses()[0])
    monkeypatch.setattr(host, "HERE", {})
    twin = await node("one")
    await twin.dial(third.addresses()[0])
    for number, speaker in enumerate((one, twin, one, twin)):
        question, answer = b"question %d" % number, b"answer %d" % number
        await speaker.send(third.node, question)
        await until(third, Packet(one.node, question))
        await third.send(one.node, answer)
        await until(speaker, Packet(third.node, answer))


async def test_who_answers_with_another_key_is_not_the_node_that_was_meant(node):
    one, two = await node("one"), await node("two")
    stranger = Identity(bytes(32)).node
    with pytest.raises(NodeUnreachable, match=f"node {stranger} can't be reached.*peer id"):
        await one.dial(two.addresses()[0].replace(two.node, stranger))
    await still_good_after_dial(one, two)


async def still_good_after_dial(one: LibP2PTransport, two: LibP2PTransport) -> None:
    await one.dial(two.addresses()[0])
    await still_good(one, two)


# --- addresses ---


@pytest.mark.parametrize(
    "address",
    [
        "",
        "nonsense",
        "/ip4/127.0.0.1/tcp/4001",
        "/ip4/127.0.0.1/tcp/4001/p2p/me",
        "/ip4/300.0.0.1/tcp/1/p2p/12D3KooWMbbPVGsZYh3ChQjue712NHHGNybRRXwnuSpezYjGbCDS",
        "/ip4/127.0.0.1/udp/4001/quic-v1/p2p/12D3KooWMbbPVGsZYh3ChQjue712NHHGNybRRXwnuSpezYjGbCDS",
        "/p2p/12D3KooWMbbPVGsZYh3ChQjue712NHHGNybRRXwnuSpezYjGbCDS",
    ],
)
async def test_what_can_not_be_dialled_is_refused_by_name(node, address):
    one = await node("one")
    with pytest.raises(SpecError) as refused:
        await one.dial(address)
    assert address in str(refused.value)


async def test_a_node_does_not_dial_itself(node):
    one = await node("one")
    with pytest.raises(SpecError, match="is this node itself"):
        await one.dial(one.addresses()[0])


async def test_a_port_that_is_in_use_is_told_and_not_shared(node):
    one = await node("one")
    address = one.addresses()[0].split("/p2p/")[0]
    with pytest.raises(SpecError, match=rf"{address}: the port is in use"):
        await node("two", listen=[HERE, address])
    await node("two")  # nothing was kept of the first try


@pytest.mark.parametrize(
    "listen", ["nonsense", "/dns4/localhost/tcp/0", "/ip4/127.0.0.1/udp/0", "/ip4/192.0.2.7/tcp/0"]
)
async def test_where_nobody_can_listen_is_told(node, listen):
    with pytest.raises(SpecError, match=listen):
        await node("one", listen=[listen])


async def test_a_node_that_listens_on_every_interface_says_where_it_is(node):
    one, two = await node("one", listen=["/ip4/0.0.0.0/tcp/0"]), await node("two")
    assert not any("0.0.0.0" in address for address in one.addresses())
    await two.dial(next(address for address in one.addresses() if "127.0.0.1" in address))
    assert two.peers() == [one.node]


async def test_a_node_without_a_socket_dials_others_and_is_found_in_its_process_alone(node):
    one, inside = await node("one", in_process=True), await node("inside", listen=[], in_process=True)
    outside = await node("outside")
    assert inside.addresses() == [f"/memory/0/p2p/{inside.node}"]
    await inside.dial(outside.addresses()[0])
    await one.dial(inside.addresses()[0])
    assert inside.peers() == sorted([one.node, outside.node])
    await outside.hang_up(inside.node)
    with pytest.raises(NodeUnreachable, match="it is not in this process"):
        await outside.dial(inside.addresses()[0])


async def test_nobody_at_an_address_is_told_with_the_address(node):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    one, other = await node("one"), Identity(bytes(32)).node
    with pytest.raises(NodeUnreachable, match=f"{other} can't be reached: /ip4/127.0.0.1/tcp/{port}"):
        await one.dial(f"/ip4/127.0.0.1/tcp/{port}/p2p/{other}")


async def test_what_was_learnt_last_is_where_a_node_is_dialled(node):
    one, two = await node("one"), await node("two")
    one.learn(two.node, ["/ip4/127.0.0.1/tcp/1"])
    with pytest.raises(NodeUnreachable, match="/tcp/1:"):
        await one.send(two.node, b"")
    one.learn(two.node, ["/ip4/127.0.0.1/tcp/1", *two.addresses()])
    await one.send(two.node, b"found")
    await until(two, Packet(one.node, b"found"))


# --- links ---


async def test_two_that_dial_each_other_at_once_have_one_link_as_far_as_anybody_is_told(node):
    one, two = await node("one"), await node("two")
    await asyncio.gather(*(a.dial(b.addresses()[0]) for a, b in [(one, two), (two, one)] * 5))
    await still_good(one, two)
    for a, b in ((one, two), (two, one)):
        await a.send(b.node, b"end")
    ups = []
    for a, b in ((one, two), (two, one)):
        async with asyncio.timeout(DEADLINE):
            async for arrival in a.received():
                ups += [arrival] if isinstance(arrival, LinkUp | LinkDown) else []
                if arrival == Packet(b.node, b"end"):
                    break
    assert ups == []  # the news of each link was read before, and there was no other
    await one.hang_up(two.node)
    await until(two, LinkDown(one.node))
    assert (one.peers(), two.peers()) == ([], [])


async def test_what_was_sent_before_a_node_left_arrives(node):
    one, two = await node("one"), await node("two")
    await one.dial(two.addresses()[0])
    for number in range(100):
        await one.send(two.node, b"%d" % number + bytes(10_000))
    reading = asyncio.create_task(everything(two, LinkDown(one.node)))
    await one.close()
    assert len([arrival for arrival in await reading if isinstance(arrival, Packet)]) == 100


async def everything(transport: LibP2PTransport, end: Arrival) -> list[Arrival]:
    """All that comes until `end`."""
    found = []
    async with asyncio.timeout(DEADLINE):
        async for arrival in transport.received():
            if arrival == end:
                return found
            found.append(arrival)
    raise AssertionError(f"{end} never came")


async def test_what_is_too_large_is_a_bug_of_who_sends_it(node):
    one, two = await node("one"), await node("two")
    await one.dial(two.addresses()[0])
    with pytest.raises(BugError, match=str(MAX_MESSAGE)):
        await one.send(two.node, bytes(MAX_MESSAGE + 1))
    with pytest.raises(BugError, match="publish"):
        await one.publish(bytes(1024 * 1024))
    with pytest.raises(BugError, match="question"):
        async for _ in one.request(two.node, bytes(65_537)):
            pass
    await still_good(one, two)


async def test_what_waits_for_a_node_that_takes_nothing_is_told(node):
    one, two = await node("one"), await node("two")
    await one.dial(two.addresses()[0])
    flood = [asyncio.create_task(one.send(two.node, bytes(100_000))) for _ in range(400)]
    await becomes(lambda: one.waiting.most >= link.QUEUE)
    assert one.waiting.total == one.waiting.most
    await two.close()
    await asyncio.gather(*flood, return_exceptions=True)
    await becomes(lambda: one.waiting == Waiting())


async def test_a_node_writes_to_itself_and_asks_itself(node):
    one = await node("one")

    async def handler(author: str, question: bytes) -> AsyncIterator[bytes]:
        yield author.encode() + question

    one.serve(handler)
    await one.send(one.node, b"note")
    await until(one, Packet(one.node, b"note"))
    assert [part async for part in one.request(one.node, b"?")] == [one.node.encode() + b"?"]


async def test_an_answer_that_nobody_reads_on_is_given_up(node):
    one, two = await node("one"), await node("two")
    ended = asyncio.Event()

    async def handler(_author: str, _question: bytes) -> AsyncIterator[bytes]:
        try:
            while True:
                yield bytes(100_000)
        finally:
            ended.set()

    two.serve(handler)
    await one.dial(two.addresses()[0])
    async with contextlib.aclosing(one.request(two.node, b"")) as parts:
        await anext(parts)
    await asyncio.wait_for(ended.wait(), DEADLINE)
    await still_good(one, two)


async def test_an_answer_waits_for_who_reads_it(node):
    one, two, given = await node("one"), await node("two"), 0

    async def handler(_author: str, _question: bytes) -> AsyncIterator[bytes]:
        nonlocal given
        for _ in range(200):
            given += 1
            yield bytes(100_000)

    two.serve(handler)
    await one.dial(two.addresses()[0])
    got = 0
    async with contextlib.aclosing(one.request(two.node, b"")) as parts:
        got += len(await anext(parts))
        await still_good(one, two)
        assert given < 100
        async for part in parts:
            got += len(part)
    assert got == 200 * 100_000


async def test_a_bug_in_a_handler_ends_its_answer_and_is_told(node, caplog):
    one, two = await node("one"), await node("two")

    async def handler(_author: str, _question: bytes) -> AsyncIterator[bytes]:
        raise ZeroDivisionError
        yield b""

    two.serve(handler)
    await one.dial(two.addresses()[0])
    with pytest.raises(NodeUnreachable, match="a fault of its own"):
        async for _ in one.request(two.node, b""):
            pass
    assert len(warnings(caplog)) == 1
    await still_good(one, two)


async def test_who_answers_nothing_says_so(node):
    one, two = await node("one"), await node("two")
    await one.dial(two.addresses()[0])
    with pytest.raises(NodeUnreachable, match="answers no requests"):
        async for _ in one.request(two.node, b""):
            pass


# --- published messages ---


async def hears(transport: LibP2PTransport, wanted: Packet) -> LibP2PTransport:
    await until(transport, wanted)
    return transport


async def test_a_leaf_of_a_star_reaches_every_other_leaf(node):
    """More leaves than a hub takes into its mesh."""
    hub, *leaves = [await node(f"node {number}", listen=[], in_process=True) for number in range(31)]
    for leaf in leaves:
        await leaf.dial(hub.addresses()[0])
    await leaves[7].publish(b"from a leaf")
    others = [one for one in (hub, *leaves) if one is not leaves[7]]
    heard = await asyncio.gather(*(hears(one, Packet(leaves[7].node, b"from a leaf")) for one in others))
    assert len(heard) == 30


async def test_a_message_crosses_a_line_of_nodes_and_is_its_authors(node):
    line = [await node(f"node {number}", listen=[], in_process=True) for number in range(6)]
    for one, other in itertools.pairwise(line):
        await one.dial(other.addresses()[0])
    await line[0].publish(b"pass it on")
    await asyncio.gather(*(hears(one, Packet(line[0].node, b"pass it on")) for one in line[1:]))


async def test_a_node_that_starts_again_is_heard_again(node):
    one, again = await node("one"), await node("two")
    for life in range(3):
        await again.dial(one.addresses()[0])
        await again.publish(b"life %d" % life)
        await until(one, Packet(again.node, b"life %d" % life))
        await again.close()
        again = await node("two")


# --- another network ---


@pytest.mark.parametrize(("key", "other"), [("ours", "theirs"), ("ours", ""), ("", "theirs")])
@pytest.mark.parametrize("in_process", [True, False])
async def test_nodes_with_another_network_key_are_refused_and_that_is_said_once(node, caplog, key, other, in_process):
    how = {"in_process": in_process}
    one, stranger = await node("one", network_key=key, **how), await node("two", network_key=other, **how)
    for _ in range(3):
        with pytest.raises(NodeUnreachable, match="another network"):
            await stranger.dial(one.addresses()[0])
    assert (one.peers(), stranger.peers()) == ([], [])
    await becomes(lambda: one.dropped >= 3)
    assert [(stranger.node in line, "another network" in line) for line in warnings(caplog)] == [(True, True)]


async def test_nodes_with_one_network_key_speak_and_publish(node):
    one, two, three = [await node(name, network_key="ours") for name in ("one", "two", "three")]
    await one.dial(two.addresses()[0])
    await three.dial(two.addresses()[0])
    await one.publish(b"to all of us")
    await until(three, Packet(one.node, b"to all of us"))


# --- hostile peers ---


async def opened(transport: LibP2PTransport, work, *args):
    """Do something on the network's thread with what is inside of a node."""
    return await asyncio.wait_for(transport._thread.call(functools.partial(work, *args)), DEADLINE)


async def new_stream(bad: LibP2PTransport, victim: LibP2PTransport, protocol: str | None):
    """A stream from a node that will not behave."""
    conn = bad._host._links[victim.node][-1].conn
    stream = await conn.open_stream()
    if protocol is not None:
        assert await streams.propose(stream, protocol)
    return stream


async def on_a_stream(bad: LibP2PTransport, victim: LibP2PTransport, protocol: str | None, data: bytes) -> None:
    async def write() -> None:
        stream = await new_stream(bad, victim, protocol)
        await stream.write(data)
        await stream.close()

    await opened(bad, write)


async def on_the_link(bad: LibP2PTransport, victim: LibP2PTransport, data: bytes) -> None:
    async def write() -> None:
        stream = bad._host._links[victim.node][-1]._stream
        await stream.write(data)
        await stream.close()

    await opened(bad, write)


async def on_the_connection(bad: LibP2PTransport, victim: LibP2PTransport, data: bytes) -> None:
    async def write() -> None:
        await bad._host._links[victim.node][-1].conn.send(data)

    await opened(bad, write)


RPC = functools.partial(on_a_stream, protocol=gossip.PROTOCOL)
ATTACKS = {
    "link: a frame that is too large": lambda bad, good: on_the_link(bad, good, b"\xff\xff\xff\xff"),
    "link: a frame that ends early": lambda bad, good: on_the_link(bad, good, streams.frame(bytes(100))[:50]),
    "link: a length that ends early": lambda bad, good: on_the_link(bad, good, b"\0\0"),
    "hello: garbage": lambda bad, good: on_a_stream(bad, good, link.PROTOCOL, streams.frame(b"let me in")),
    "hello: too large": lambda bad, good: on_a_stream(bad, good, link.PROTOCOL, b"\x7f\xff\xff\xff"),
    "gossip: garbage": lambda bad, good: RPC(bad, good, data=encode_varint_prefixed(b"\xff" * 30)),
    "gossip: too large": lambda bad, good: RPC(bad, good, data=b"\xff\xff\xff\x7f"),
    "gossip: a length without end": lambda bad, good: RPC(bad, good, data=b"\xff" * 20),
    "stream: not multistream": lambda bad, good: on_a_stream(bad, good, None, b"\x05GET /"),
    "stream: a name without end": lambda bad, good: on_a_stream(bad, good, None, b"\xff" * 20),
    "stream: proposals without end": lambda bad, good: on_a_stream(
        bad, good, None, b"\x13/multistream/1.0.0\n" + b"\x04/no\n" * 1000
    ),
    "ask: a question that is too large": lambda bad, good: on_a_stream(
        bad, good, "/bacalhau-jupyter/ask/1", b"\x00\xff\xff\xff"
    ),
    "yamux: garbage": lambda bad, good: on_the_connection(bad, good, b"\xee" * 100),
}


@pytest.mark.parametrize("attack", ATTACKS)
async def test_who_sends_garbage_is_disconnected_told_once_and_nobody_else_notices(node, caplog, attack):
    good, bystander, bad = await node("good"), await node("bystander"), await node("bad")
    await bystander.dial(good.addresses()[0])
    for _ in range(2):
        await bad.dial(good.addresses()[0])
        await until(good, LinkUp(bad.node, inbound=True))
        await ATTACKS[attack](bad, good)
        await until(good, LinkDown(bad.node))
        await until(bad, LinkDown(good.node))
    await becomes(lambda: good.dropped >= 2)
    assert [bad.node in line for line in warnings(caplog)] == [True]
    await still_good(good, bystander)


@pytest.mark.parametrize(
    "data", [b"", b"GET / HTTP/1.1\r\n\r\n", b"\x13/multistream/1.0.0\n\x07/noise\n" + b"\0\x10garbage", b"\xff" * 100]
)
async def test_a_stranger_that_is_no_peer_at_all_ends_nothing(node, caplog, data):
    good, bystander = await node("good"), await node("bystander")
    port = int(good.addresses()[0].split("/")[4])
    for _ in range(2):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(data)
        writer.write_eof()
        async with asyncio.timeout(DEADLINE):
            while await reader.read(1000):
                pass
        writer.close()
        await writer.wait_closed()
    await still_good_after_dial(bystander, good)
    await becomes(lambda: good.dropped == 2)
    told = warnings(caplog)
    assert len(told) == 1
    assert "127.0.0.1" in told[0]


async def test_a_stranger_may_send_only_so_much_before_it_says_who_it_is(node):
    good = await node("good")
    port = int(good.addresses()[0].split("/")[4])
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"\xff\xff\xff\x7f")
    writer.write(bytes(2 * streams.HANDSHAKE_BYTES))
    async with asyncio.timeout(DEADLINE):
        with contextlib.suppress(ConnectionError):
            while await reader.read(1000):
                pass
    await becomes(lambda: good.dropped == 1)
    writer.close()


async def test_strangers_do_not_take_all_the_files_that_the_process_may_open(node, caplog, monkeypatch):
    """Who is one too many is closed at once, and there is room again when another has left."""
    monkeypatch.setattr(host, "most_visitors", lambda: 2)
    good = await node("good")
    port = int(good.addresses()[0].split("/")[4])
    first, second = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2)]
    await becomes(lambda: good._host._visitors == 2)
    reader, third = await asyncio.open_connection("127.0.0.1", port)
    with contextlib.suppress(ConnectionError):
        async with asyncio.timeout(DEADLINE):
            assert not await reader.read()
    assert "ulimit -n" in warnings(caplog)[0]
    first[1].close()
    await becomes(lambda: good._host._visitors == 1)
    await still_good_after_dial(await node("other"), good)
    for writer in (second[1], third):
        writer.close()


# --- what is left behind, and what need not be there ---


def test_the_network_needs_libp2p_only_when_it_is_used_and_says_so():
    code = """if True:
        import asyncio, sys
        from bacalhau_node.errors import SpecError
        from bacalhau_node.transports.libp2p import LibP2PTransport
        assert "trio" not in sys.modules and "libp2p" not in sys.modules
        sys.modules["libp2p"] = None
        try:
            asyncio.run(LibP2PTransport.open(bytes(32)))
        except SpecError as error:
            print(error)
    """
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": "node"},
    )
    assert "pip install 'bacalhau-jupyter[network]'" in run.stdout


def threads() -> set[str]:
    return {one.name for one in threading.enumerate()}


def sockets() -> int:
    """How many sockets this process has open."""
    found = 0
    for path in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            found += str(path.readlink()).startswith("socket:")
    return found


async def test_the_thread_lives_as_long_as_any_node_and_nothing_is_left_after_the_last():
    before = sockets()
    one = await LibP2PTransport.open(bytes(32), listen=[HERE])
    two = await LibP2PTransport.open(bytes([1]) * 32, listen=[HERE], in_process=False)
    await two.dial(one.addresses()[0])
    await one.close()
    assert thread.NAME in threads()
    await two.close()
    assert thread.NAME not in threads()
    assert sockets() == before
    assert dialling.HERE == {}


@pytest.mark.parametrize("in_process", [True, False])
async def test_connections_that_come_and_go_leave_no_task_and_no_stream_behind(node, in_process):
    one, two = await node("one", in_process=in_process), await node("two", in_process=in_process)

    async def handler(_author: str, question: bytes) -> AsyncIterator[bytes]:
        yield question

    async def tasks() -> int:
        return (await opened(one, trio.lowlevel.current_statistics)).tasks_living

    two.serve(handler)
    before = await tasks()
    for _ in range(5):
        await one.dial(two.addresses()[0])
        await one.publish(b"news")
        assert [part async for part in one.request(two.node, b"?")] == [b"?"]
        await one.hang_up(two.node)
        await until(two, LinkDown(one.node))
    async with asyncio.timeout(DEADLINE):
        while await tasks() > before:  # noqa: ASYNC110 - they end on another thread
            await asyncio.sleep(0.02)


async def test_what_waits_when_a_node_leaves_is_let_go(node):
    one, two = await node("one"), await node("two")
    await one.dial(two.addresses()[0])

    async def handler(_author: str, _question: bytes) -> AsyncIterator[bytes]:
        await asyncio.Event().wait()
        yield b""

    two.serve(handler)

    async def ask() -> None:
        async for _ in one.request(two.node, b""):
            pass

    waiting = [asyncio.create_task(ask()), asyncio.create_task(one.send(Identity(bytes(32)).node, b""))]
    await asyncio.wait(waiting, timeout=0.1)
    await one.close()
    done, _ = await asyncio.wait(waiting, timeout=DEADLINE)
    assert [type(task.exception()) for task in waiting if task in done] == [NodeUnreachable] * 2


def test_an_interrupt_of_the_kernel_leaves_the_network_alone():
    """The main thread is interrupted while it computes; the node answers afterwards."""

    async def opened_nodes() -> tuple[LibP2PTransport, LibP2PTransport]:
        one = await LibP2PTransport.open(bytes(32), listen=[HERE], in_process=False)
        two = await LibP2PTransport.open(bytes([1]) * 32, listen=[HERE], in_process=False)
        await one.dial(two.addresses()[0])
        return one, two

    async def afterwards(one: LibP2PTransport, two: LibP2PTransport) -> None:
        await still_good(one, two)
        await one.close()
        await two.close()

    loop = asyncio.new_event_loop()
    try:
        nodes = loop.run_until_complete(opened_nodes())
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        loop.run_until_complete(afterwards(*nodes))
    finally:
        loop.close()
