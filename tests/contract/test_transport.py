"""What every transport promises: bytes between nodes, at most once, in no order; and how bad the memory hub can be."""

import asyncio
import contextlib
import hashlib
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from bacalhau_node.errors import BugError, ContentError, NodeUnreachable, SpecError
from bacalhau_node.ports import Packet, Transport, Waiting
from bacalhau_node.protocol.events import LinkDown, LinkUp
from bacalhau_node.transports.libp2p import LibP2PTransport
from bacalhau_node.transports.memory import MemoryHub, MemoryTransport

Join = Callable[[str], Awaitable[Transport]]
DEADLINE = 10


@pytest.fixture(params=["memory", "libp2p", "in-process"])
async def join(request) -> AsyncIterator[Join]:
    """Makes nodes that can reach each other, over sockets or within this process; all are closed at the end."""
    hub, made = MemoryHub(), []

    async def open_one(name: str) -> Transport:
        if request.param == "memory":
            return MemoryTransport(hub, name)
        inside = request.param == "in-process"
        listen = [] if inside else ["/ip4/127.0.0.1/tcp/0"]
        return await LibP2PTransport.open(hashlib.sha256(name.encode()).digest(), listen=listen, in_process=inside)

    async def one(name: str) -> Transport:
        new = await open_one(name)
        for other in made:
            other.learn(new.node, new.addresses())
            new.learn(other.node, other.addresses())
        made.append(new)
        return new

    yield one
    for transport in made:
        await transport.close()


async def read(transport: Transport, many: int) -> list[tuple[str, bytes]]:
    """The next `many` messages, as (author, data)."""
    messages = []
    async with asyncio.timeout(DEADLINE), contextlib.aclosing(transport.received()) as received:
        async for arrival in received:
            if isinstance(arrival, Packet):
                messages.append((arrival.author, arrival.data))
            if len(messages) == many:
                break
    return messages


async def links(transport: Transport, many: int) -> list[LinkUp | LinkDown]:
    """The next `many` news of links."""
    news = []
    async with asyncio.timeout(DEADLINE), contextlib.aclosing(transport.received()) as received:
        async for arrival in received:
            if not isinstance(arrival, Packet):
                news.append(arrival)
            if len(news) == many:
                break
    return news


async def settled() -> None:
    """Let everything run that can run now."""
    for _ in range(20):
        await asyncio.sleep(0)


# --- every transport ---


async def test_bytes_arrive_as_they_are_with_their_author(join):
    one, two = await join("n-one"), await join("n-two")
    await one.send(two.node, b"\x00\xffdata")
    assert await read(two, 1) == [(one.node, b"\x00\xffdata")]


async def test_both_directions_and_three_nodes(join):
    one, two, three = await join("n-one"), await join("n-two"), await join("n-three")
    await two.send(one.node, b"from two")
    await three.send(one.node, b"from three")
    await one.send(three.node, b"from one")
    assert sorted(await read(one, 2)) == sorted([(three.node, b"from three"), (two.node, b"from two")])
    assert await read(three, 1) == [(one.node, b"from one")]


async def test_an_empty_and_a_large_message_arrive(join):
    one, two = await join("n-one"), await join("n-two")
    large = bytes(4 * 1024 * 1024)
    await one.send(two.node, b"")
    await one.send(two.node, large)
    assert sorted(data for _, data in await read(two, 2)) == [b"", large]


async def test_each_message_arrives_at_most_once_whoever_sends_at_the_same_time(join):
    reader = await join("n-reader")
    senders = [await join(f"n-sender{number}") for number in range(5)]
    sent = [(sender, b"%d" % number) for sender in senders for number in range(100)]
    async with asyncio.TaskGroup() as group:
        for sender, data in sent:
            group.create_task(sender.send(reader.node, data))
        got = await read(reader, len(sent))
    assert Counter(got) == Counter((sender.node, data) for sender, data in sent)


async def test_what_was_sent_before_anybody_read_is_there(join):
    one, two = await join("n-one"), await join("n-two")
    await one.send(two.node, b"early")
    await settled()
    assert await read(two, 1) == [(one.node, b"early")]


async def test_reading_goes_on_where_the_last_reader_stopped(join):
    one, two = await join("n-one"), await join("n-two")
    for number in range(3):
        await one.send(two.node, b"%d" % number)
    first, rest = await read(two, 1), await read(two, 2)
    assert sorted(data for _, data in first + rest) == [b"0", b"1", b"2"]


async def test_a_reader_that_is_cancelled_loses_nothing(join):
    one, two = await join("n-one"), await join("n-two")
    reading = asyncio.create_task(read(two, 1))
    await settled()
    reading.cancel()
    await asyncio.wait([reading])
    await one.send(two.node, b"later")
    assert await read(two, 1) == [(one.node, b"later")]


async def test_the_reader_ends_when_its_transport_is_closed(join):
    one = await join("n-one")

    async def all_of_it() -> list[tuple[str, bytes]]:
        return [message async for message in one.received()]

    reading = asyncio.create_task(all_of_it())
    await settled()
    await one.close()
    assert await asyncio.wait_for(reading, DEADLINE) == []


async def test_peers_are_those_to_whom_there_is_a_link_sorted(join):
    two, one, three = await join("n-two"), await join("n-one"), await join("n-three")
    assert list(two.peers()) == []
    assert await three.dial(two.addresses()[0]) == two.node
    assert await two.dial(one.addresses()[0]) == one.node
    assert await two.dial(one.addresses()[0]) == one.node  # once more changes nothing
    assert await links(two, 2) == [LinkUp(three.node, inbound=True), LinkUp(one.node, inbound=False)]
    assert list(two.peers()) == sorted((one.node, three.node))
    await one.close()
    assert await links(two, 1) == [LinkDown(one.node)]
    assert list(two.peers()) == [three.node]
    assert list(one.peers()) == []


async def test_both_ends_of_a_link_know_from_where_it_is(join, request):
    one, two = await join("n-one"), await join("n-two")
    assert one.host_of(two.node) == ""
    await one.dial(two.addresses()[0])
    await links(two, 1)
    host = "127.0.0.1" if request.node.callspec.params["join"] == "libp2p" else ""
    assert (one.host_of(two.node), two.host_of(one.node)) == (host, host)
    await two.hang_up(one.node)
    await links(one, 2)
    assert one.host_of(two.node) == ""


async def test_both_ends_are_told_of_a_link_that_one_closes(join):
    one, two = await join("n-one"), await join("n-two")
    await one.dial(two.addresses()[0])
    await two.hang_up(one.node)
    assert await links(one, 2) == [LinkUp(two.node, inbound=False), LinkDown(two.node)]
    assert await links(two, 2) == [LinkUp(one.node, inbound=True), LinkDown(one.node)]
    await two.hang_up(one.node)  # nothing is left to close
    assert list(two.peers()) == []


async def test_what_is_no_address_of_the_network_is_refused(join):
    one = await join("n-one")
    with pytest.raises(SpecError, match="/dns4x/nowhere"):
        await one.dial("/dns4x/nowhere")


async def test_what_is_published_reaches_everybody_else_once_with_its_author(join):
    one, two, three = await join("n-one"), await join("n-two"), await join("n-three")
    await one.dial(two.addresses()[0])
    await two.dial(three.addresses()[0])
    await one.publish(b"to all")
    assert await read(two, 1) == [(one.node, b"to all")]
    assert await read(three, 1) == [(one.node, b"to all")]


async def test_a_request_gets_the_answer_of_the_others_handler(join):
    one, two = await join("n-one"), await join("n-two")

    async def handler(author: str, question: bytes) -> AsyncIterator[bytes]:
        yield author.encode()
        yield question * 2

    two.serve(handler)
    one.learn(two.node, two.addresses())
    assert b"".join([part async for part in one.request(two.node, b"what?")]) == one.node.encode() + b"what?what?"


async def test_an_answer_that_breaks_off_is_told(join):
    one, two = await join("n-one"), await join("n-two")

    async def handler(_author: str, _question: bytes) -> AsyncIterator[bytes]:
        yield b"a part"
        raise ContentError("the rest is gone")

    two.serve(handler)
    one.learn(two.node, two.addresses())
    got = []
    with pytest.raises(NodeUnreachable, match=two.node):  # noqa: PT012 - it comes between two parts
        async for part in one.request(two.node, b""):
            got.append(part)  # noqa: PERF401 - so a comprehension would lose the first
    assert got == [b"a part"]


async def test_a_node_that_is_not_there_is_told(join):
    one, two = await join("n-one"), await join("n-two")
    with pytest.raises(NodeUnreachable, match="n-nobody"):
        await one.send("n-nobody", b"")
    await two.close()
    with pytest.raises(NodeUnreachable, match=two.node):
        await one.send(two.node, b"")


async def test_a_closed_transport_sends_nothing_and_closes_twice(join):
    one, two = await join("n-one"), await join("n-two")
    await one.close()
    await one.close()
    with pytest.raises(NodeUnreachable, match=one.node):
        await one.send(two.node, b"")
    assert [arrival async for arrival in one.received()] == []


async def test_a_slow_reader_makes_its_senders_wait_and_loses_nothing(join):
    one, two, many = await join("n-one"), await join("n-two"), 2_500

    async def flood() -> None:
        for number in range(many):
            await one.send(two.node, number.to_bytes(2, "big") + bytes(20_000))

    flooding = asyncio.create_task(flood())
    done, _ = await asyncio.wait([flooding], timeout=0.5)
    assert not done
    assert one.waiting.most == one.waiting.total <= 4 * 1024 * 1024
    got = await read(two, many)
    await asyncio.wait_for(flooding, DEADLINE)
    assert one.waiting == Waiting()
    assert {int.from_bytes(data[:2], "big") for _, data in got} == set(range(many))


async def test_closing_a_full_inbox_lets_every_sender_go(join):
    one, two = await join("n-one"), await join("n-two")
    waiting = [asyncio.create_task(one.send(two.node, bytes(20_000))) for _ in range(2_500)]
    await asyncio.wait(waiting, timeout=0.3)
    await two.close()
    done, still = await asyncio.wait(waiting, timeout=DEADLINE)
    assert not still
    assert all(task.exception() is None or isinstance(task.exception(), NodeUnreachable) for task in done)


# --- the memory hub ---


async def test_a_good_hub_keeps_the_order():
    hub = MemoryHub()
    one, two = MemoryTransport(hub, "n-one"), MemoryTransport(hub, "n-two")
    for number in range(200):
        await one.send("n-two", b"%d" % number)
    assert [int(data) for _, data in await read(two, 200)] == list(range(200))


async def test_two_nodes_of_one_name_are_a_bug():
    hub = MemoryHub()
    MemoryTransport(hub, "n-one")
    with pytest.raises(BugError, match="n-one"):
        MemoryTransport(hub, "n-one")


async def test_a_name_is_free_again_after_its_node_left():
    hub = MemoryHub()
    await MemoryTransport(hub, "n-one").close()
    assert MemoryTransport(hub, "n-one").peers() == []


async def through_a_bad_hub(seed: int, **faults: float) -> list[int]:
    """What is left of 500 numbers."""
    hub = MemoryHub(seed, **faults)
    one, two = MemoryTransport(hub, "n-one"), MemoryTransport(hub, "n-two")
    for number in range(500):
        await one.send("n-two", b"%d" % number)
    reading = asyncio.create_task(gathered(two))
    await settled()
    await two.close()
    return await asyncio.wait_for(reading, DEADLINE)


async def gathered(transport: Transport) -> list[int]:
    return [int(arrival.data) async for arrival in transport.received() if isinstance(arrival, Packet)]


async def test_a_hub_that_drops_loses_about_that_share():
    got = await through_a_bad_hub(1, drop=0.3)
    assert 300 <= len(got) <= 400
    assert got == sorted(set(got))


async def test_a_hub_that_repeats_delivers_about_that_share_twice():
    got = Counter(await through_a_bad_hub(1, repeat=0.3))
    assert set(got) == set(range(500))
    assert set(got.values()) == {1, 2}
    assert 100 <= sum(1 for times in got.values() if times == 2) <= 200


async def test_a_hub_that_reorders_loses_and_repeats_nothing():
    got = await through_a_bad_hub(1, reorder=0.5)
    assert got != sorted(got)
    assert sorted(got) == list(range(500))


async def test_the_same_seed_is_the_same_bad_luck():
    faults = {"drop": 0.1, "repeat": 0.1, "reorder": 0.3}
    assert await through_a_bad_hub(7, **faults) == await through_a_bad_hub(7, **faults)
    assert await through_a_bad_hub(7, **faults) != await through_a_bad_hub(8, **faults)
