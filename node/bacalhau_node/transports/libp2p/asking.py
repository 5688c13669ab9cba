"""Requests and their answers, each on a stream of its own beside the link.

The question is one frame; the answer is frames that begin with `PART`, and then one that begins with `END`, or with
`FAULT` and a reason. A stream that ends without is an answer that broke off. Whoever reads slowly makes the other
wait: a stream takes its window, and the next part is asked of the handler only when the last one is on its way.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import trio
from libp2p.abc import IMuxedConn, IMuxedStream

from bacalhau_node.errors import NodeUnreachable, ProtocolError
from bacalhau_node.ids import NodeId
from bacalhau_node.transports.libp2p.limits import LARGEST_QUESTION
from bacalhau_node.transports.libp2p.streams import BROKEN, Frames, frame, propose

PROTOCOL = "/bacalhau-jupyter/ask/1"
PART_BYTES = 1024 * 1024
QUESTION_SECONDS = 30
PART, END, FAULT = b"+", b".", b"!"


class Asked:
    """A question that `node` answers, on a stream that `begin` is given. May be made on any thread."""

    def __init__(self, node: NodeId) -> None:
        self._node = node
        self._stream: IMuxedStream | None = None

    async def begin(self, conn: IMuxedConn, question: bytes) -> None:
        """Open the stream, choose the protocol and send the question."""
        try:
            self._stream = stream = await conn.open_stream()
            self._frames = Frames(stream, limit=PART_BYTES + 1)
            if not await propose(stream, PROTOCOL):
                raise NodeUnreachable(f"node {self._node} answers no requests")
            await stream.write(frame(question))
        except (*BROKEN, ProtocolError) as error:
            raise self._broken(error) from error

    async def next(self) -> bytes | None:
        """The next part; None at the end. Raises `NodeUnreachable` when there is no more, but not an end."""
        try:
            got = await self._frames.next()
        except (*BROKEN, ProtocolError) as error:
            raise self._broken(error) from error
        if got is None:
            raise NodeUnreachable(f"node {self._node} broke its answer off")
        if got[:1] == PART:
            return got[1:]
        if got == END:
            return None
        reason = got[1:].decode("utf-8", "replace")
        raise NodeUnreachable(f"node {self._node} broke its answer off: {reason}")

    async def close(self) -> None:
        """Want no more of it."""
        if self._stream is not None:
            await self._stream.reset()

    def _broken(self, error: Exception) -> NodeUnreachable:
        return NodeUnreachable(f"node {self._node} broke its answer off: {str(error) or type(error).__name__}")


class Answer:
    """An answer on its way to `node`. `gone` is set when nobody wants it any more, or it has ended."""

    def __init__(self, node: NodeId, stream: IMuxedStream) -> None:
        self.node, self._stream = node, stream
        self.gone = trio.Event()
        self._watching = trio.CancelScope()

    async def part(self, data: bytes) -> None:
        """Send a part of any size; raises `NodeUnreachable` when nobody listens."""
        for at in range(0, len(data), PART_BYTES):
            await self._write(PART + data[at : at + PART_BYTES])

    async def end(self) -> None:
        """It is complete."""
        await self._write(END)
        await self._over()

    async def fail(self, reason: str) -> None:
        """It breaks off here."""
        await self._write(FAULT + reason.encode()[:1000])
        await self._over()

    async def watch(self) -> None:
        """Wait until the other end wants no more of it, or it has ended."""
        with self._watching, contextlib.suppress(*BROKEN, EOFError):
            await self._stream.read(1)
        self.gone.set()

    async def until_gone(self, told: Callable[[], None]) -> None:
        """Tell when `gone` is set."""
        await self.gone.wait()
        told()

    async def _over(self) -> None:
        await self._stream.close()
        self._watching.cancel()

    async def _write(self, data: bytes) -> None:
        try:
            await self._stream.write(frame(data))
        except BROKEN as error:
            self._watching.cancel()
            raise NodeUnreachable(f"node {self.node} does not listen to its answer any more") from error


async def question(stream: IMuxedStream) -> bytes:
    """The question on a stream that another node opened."""
    with trio.fail_after(QUESTION_SECONDS):
        data = await Frames(stream, limit=LARGEST_QUESTION).next()
    if data is None:
        raise ProtocolError("a request without a question")
    return data
