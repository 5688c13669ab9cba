"""Streams over one connection, by yamux and in process: flow control, half-closing, cancelling, and hostile ends."""

import struct
from collections.abc import Awaitable, Callable

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from libp2p.io.exceptions import ConnectionClosedError
from libp2p.peer.id import ID
from libp2p.stream_muxer.exceptions import MuxedConnUnavailable, MuxedStreamClosed, MuxedStreamEOF, MuxedStreamReset
from libp2p.stream_muxer.yamux.yamux import Yamux
from trio.testing import memory_stream_pair

from bacalhau_node.errors import ProtocolError
from bacalhau_node.transports.libp2p import inprocess
from bacalhau_node.transports.libp2p.yamux import (
    ACK,
    BACKLOG,
    CREDIT,
    DATA,
    GO_AWAY,
    HEADER,
    PATIENCE,
    PING,
    RST,
    STREAMS,
    SYN,
    WINDOW,
    Conn,
)

DEADLINE = 10
PIECE = 16 * 1024
AnyConn = Conn | inprocess.Conn
LEFT, RIGHT = ID(b"left"), ID(b"right")


class Secured:
    """A secured connection, as far as a muxer needs one."""

    def __init__(self, stream: trio.StapledStream, *, initiator: bool) -> None:
        self.stream, self.is_initiator = stream, initiator

    async def read(self, n: int | None = None) -> bytes:
        try:
            return bytes(await self.stream.receive_some(n))
        except trio.ClosedResourceError as error:
            raise ConnectionClosedError("closed") from error

    async def write(self, data: bytes) -> None:
        await self.stream.send_all(data)

    async def close(self) -> None:
        await self.stream.aclose()


def ends(kind: str) -> tuple[AnyConn, AnyConn]:
    """Both ends of a connection, the dialler's first."""
    if kind == "in-process":
        return inprocess.connect(LEFT, RIGHT)
    here, there = memory_stream_pair()
    return Conn(Secured(here, initiator=True), RIGHT), Conn(Secured(there, initiator=False), LEFT)


def connected(kind: str, body: Callable[[AnyConn, AnyConn], Awaitable[None]]) -> None:
    """Run `body` with both ends of a connection, and see that both end cleanly."""

    async def run() -> None:
        left, right = ends(kind)
        with trio.fail_after(DEADLINE):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(left.start)
                nursery.start_soon(right.start)
                await body(left, right)
                await left.close()

    trio.run(run)


def over_a_connection(body: Callable[[AnyConn, AnyConn], Awaitable[None]]) -> Callable[[str], None]:
    """Make a test of an async function of both ends."""

    @pytest.mark.parametrize("kind", ["yamux", "in-process"])
    def test(kind: str) -> None:
        connected(kind, body)

    test.__name__ = body.__name__
    return test


async def flood(stream) -> None:
    """Write more than anything holds."""
    for _ in range(2 * WINDOW // PIECE):
        await stream.write(bytes(PIECE))


async def everything(stream) -> bytes:
    """All that comes until the end."""
    found = b""
    while True:
        try:
            found += await stream.read(100_000)
        except MuxedStreamEOF:
            return found


async def pair(left: AnyConn, right: AnyConn):
    """Both ends of a new stream."""
    return await left.open_stream(), await right.accept_stream()


# --- two good ends ---


@over_a_connection
async def test_bytes_arrive_in_order_on_each_of_many_streams(left, right):
    async def send(number: int) -> None:
        stream = await left.open_stream()
        for part in range(20):
            await stream.write(b"%d:%d;" % (number, part))
        await stream.close()

    found = []

    async def receive(stream) -> None:
        found.append(await everything(stream))

    async with trio.open_nursery() as nursery:
        for number in range(50):
            nursery.start_soon(send, number)
        for _ in range(50):
            nursery.start_soon(receive, await right.accept_stream())
    assert sorted(found) == sorted(b"".join(b"%d:%d;" % (n, part) for part in range(20)) for n in range(50))


@over_a_connection
async def test_more_than_a_window_arrives_both_ways_at_once(left, right):
    one, other = await pair(left, right)
    data, found = bytes(range(256)) * 8_000, {}

    async def both_ways(name: str, stream) -> None:
        async with trio.open_nursery() as nursery:

            async def write() -> None:
                await stream.write(data)
                await stream.close()

            nursery.start_soon(write)
            found[name] = await everything(stream)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(both_ways, "one", one)
        nursery.start_soon(both_ways, "other", other)
    assert found == {"one": data, "other": data}


@over_a_connection
async def test_a_writer_waits_for_a_reader_and_holds_up_no_other_stream(left, right):
    slow, _slow_end = await pair(left, right)
    with trio.move_on_after(0.2) as scope:
        await flood(slow)
    assert scope.cancelled_caught
    quick, quick_end = await pair(left, right)
    await quick.write(b"hello")
    assert await quick_end.read(100) == b"hello"


@over_a_connection
async def test_an_unread_stream_holds_one_window(left, right):
    one, other = await pair(left, right)
    with trio.move_on_after(0.2):
        await flood(one)
    await one.close()
    assert len(await everything(other)) == WINDOW


@over_a_connection
async def test_a_half_closed_stream_still_goes_the_other_way(left, right):
    one, other = await pair(left, right)
    await one.write(b"question")
    await one.close()
    assert await everything(other) == b"question"
    with pytest.raises(MuxedStreamClosed):
        await one.write(b"more")
    await other.write(b"answer")
    await other.close()
    assert await everything(one) == b"answer"


@over_a_connection
async def test_a_stream_that_both_closed_is_forgotten(left, right):
    for _ in range(2 * STREAMS):
        one, other = await pair(left, right)
        await one.close()
        await other.close()
        await everything(one)
        await everything(other)
    assert not left.is_closed


@pytest.mark.parametrize("by_opener", [True, False])
@pytest.mark.parametrize("kind", ["yamux", "in-process"])
def test_a_reset_ends_both_directions_on_both_ends(kind, by_opener):
    async def body(left: AnyConn, right: AnyConn) -> None:
        one, other = await pair(left, right)
        await one.write(b"x")
        await other.read(1)
        await (one if by_opener else other).reset()
        for end in (one, other):
            with pytest.raises(MuxedStreamReset):
                await end.read(1)
            with pytest.raises(MuxedStreamReset):
                await end.write(b"x")

    connected(kind, body)


@over_a_connection
async def test_a_reset_lets_a_writer_go_that_waits_for_credit(left, right):
    one, other = await pair(left, right)

    async def write() -> None:
        with pytest.raises(MuxedStreamReset):
            await flood(one)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(write)
        await trio.testing.wait_all_tasks_blocked()
        await other.reset()


@over_a_connection
async def test_a_reader_that_is_cancelled_loses_nothing(left, right):
    one, other = await pair(left, right)
    with trio.move_on_after(0.05):
        await other.read(10)
    await one.write(b"later")
    assert await other.read(10) == b"later"


@over_a_connection
async def test_a_writer_that_is_cancelled_leaves_the_connection_whole(left, right):
    one, other = await pair(left, right)
    with trio.move_on_after(0.05):
        await flood(one)
    with trio.move_on_after(0.05):
        await one.write(b"never")
    await one.reset()
    with pytest.raises(MuxedStreamReset):
        await everything(other)
    again, end = await pair(left, right)
    await again.write(b"still good")
    assert await end.read(100) == b"still good"


@over_a_connection
async def test_closing_the_connection_ends_streams_and_acceptors(left, right):
    one, other = await pair(left, right)
    ended = []

    async def wait(name: str, call) -> None:
        with pytest.raises((MuxedStreamReset, MuxedConnUnavailable)):
            await call
        ended.append(name)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait, "reader", one.read(1))
        nursery.start_soon(wait, "acceptor", right.accept_stream())
        nursery.start_soon(wait, "other", other.read(1))
        await trio.testing.wait_all_tasks_blocked()
        await left.close()
    assert sorted(ended) == ["acceptor", "other", "reader"]


# --- with libp2p's own class on the other end ---


@pytest.mark.parametrize("ours_dials", [True, False])
def test_libp2ps_own_yamux_is_understood_and_understands(ours_dials):
    data = bytes(range(256)) * 3_000

    async def echo(conn) -> None:
        stream = await conn.accept_stream()
        got = b""
        while len(got) < len(data):
            got += await stream.read(min(65536, len(data) - len(got)))
        await stream.write(got)
        await stream.close()

    async def run() -> None:
        here, there = memory_stream_pair()
        ours = Conn(Secured(here, initiator=ours_dials), RIGHT)
        stock = Yamux(Secured(there, initiator=not ours_dials), LEFT, is_initiator=not ours_dials)
        dialler, listener = (ours, stock) if ours_dials else (stock, ours)
        with trio.fail_after(DEADLINE):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(ours.start)
                nursery.start_soon(stock.start)
                nursery.start_soon(echo, listener)
                stream = await dialler.open_stream()
                nursery.start_soon(stream.write, data)
                got = b""
                while len(got) < len(data):
                    got += await stream.read(65536)
                assert got == data
                await ours.close()
                nursery.cancel_scope.cancel()

    trio.run(run)


# --- a hostile end ---


def frame(kind: int, flags: int, number: int, length: int, body: bytes = b"", *, version: int = 0) -> bytes:
    return HEADER.pack(version, kind, flags, number, length) + body


def under_attack(data: bytes, *, then_close: bool = False) -> list[ProtocolError]:
    """Send `data` as whoever dialled; which faults were found before the connection ended."""
    faults: list[ProtocolError] = []

    async def run() -> None:
        bad, good = memory_stream_pair()
        conn = Conn(Secured(good, initiator=False), LEFT, blame=lambda _, fault: faults.append(fault))
        with trio.fail_after(DEADLINE):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(conn.start)
                await bad.send_all(data)
                if then_close:
                    await bad.aclose()
                await conn.over()

    trio.run(run)
    return faults


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (frame(DATA, 0, 1, 0, version=1), "version 1"),
        (frame(9, 0, 1, 0), "type 9"),
        (frame(DATA, SYN, 1, WINDOW + 1), str(WINDOW + 1)),
        (frame(DATA, SYN, 1, 0xFFFFFFFF), "4294967295"),
        (frame(CREDIT, SYN, 2, 0), "stream 2"),
        (frame(CREDIT, SYN, 0, 0), "stream 0"),
        (frame(CREDIT, SYN, 1, 0) * 2, "stream 1"),
        (b"".join(frame(CREDIT, SYN, 2 * n + 1, 0) for n in range(STREAMS + 1)), "streams at once"),
        (frame(CREDIT, SYN, 1, 0) + frame(DATA, 0, 1, 65536, bytes(65536)) * 5, "credit"),
        (frame(PING, SYN, 0, 7) * (PATIENCE * BACKLOG // 12 + 2), "takes none"),
    ],
    ids=["version", "type", "long", "longest", "parity", "zero", "twice", "streams", "credit", "pings"],
)
def test_an_end_that_breaks_the_rules_is_blamed_once_and_cut_off(data, fault):
    faults = under_attack(data)
    assert len(faults) == 1
    assert fault in str(faults[0])


@pytest.mark.parametrize("data", [b"", b"\0" * 5, frame(DATA, SYN, 1, 100, b"not all")], ids=["none", "header", "body"])
def test_a_connection_that_ends_within_a_frame_is_just_over(data):
    assert under_attack(data, then_close=True) == []


def test_going_away_ends_the_connection():
    assert under_attack(frame(GO_AWAY, 0, 0, 0)) == []


@pytest.mark.parametrize("flags", [0, ACK, RST], ids=["data", "ack", "reset"])
def test_frames_of_a_stream_that_is_gone_are_passed_over(flags):
    assert under_attack(frame(DATA, flags, 77, 3, b"abc") + frame(GO_AWAY, 0, 0, 0)) == []


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 15), st.integers(0, 6), st.binary(max_size=40)), max_size=30)
)
def test_no_frames_make_it_raise(frames):
    data = b"".join(frame(kind, flags, number, len(body), body) for kind, flags, number, body in frames)
    assert len(under_attack(data, then_close=True)) <= 1


@settings(max_examples=60)
@given(st.binary(max_size=300))
def test_no_bytes_make_it_raise(data):
    assert len(under_attack(data, then_close=True)) <= 1


def test_the_header_is_the_one_of_the_specification():
    assert HEADER.size == 12
    assert struct.unpack("!BBHII", frame(CREDIT, SYN, 3, 9)) == (0, 1, 1, 3, 9)
