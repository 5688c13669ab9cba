"""The transport as the node sees it, on its asyncio loop: every call goes to the network's thread and comes back."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import TYPE_CHECKING, cast

from bacalhau_node.errors import BacalhauError, BugError, NodeUnreachable, SpecError
from bacalhau_node.ids import NodeId
from bacalhau_node.ports import Answering, Arrival, Waiting
from bacalhau_node.transports.libp2p.limits import LARGEST_PUBLISHED, LARGEST_QUESTION
from bacalhau_node.wire import MAX_MESSAGE

if TYPE_CHECKING:
    from bacalhau_node.transports.libp2p.asking import Answer
    from bacalhau_node.transports.libp2p.host import Host
    from bacalhau_node.transports.libp2p.inbox import Inbox
    from bacalhau_node.transports.libp2p.thread import NetworkThread

log = logging.getLogger(__name__)

MISSING = "a network of nodes needs libp2p, which is not installed: pip install 'bacalhau-jupyter[network]'"


class LibP2PTransport:
    """One node on a libp2p network, from `open` to `close`."""

    def __init__(self, thread: NetworkThread, host: Host, inbox: Inbox) -> None:
        self._thread, self._host, self._inbox = thread, host, inbox
        self._node, self._addresses = host.node, tuple(host.addresses())
        self._handler: Answering | None = None
        self._answering: set[asyncio.Task[None]] = set()
        self._shore = thread.shore()
        host.on_question = lambda answer, question: self._shore.post(self._answer, answer, question)

    @classmethod
    async def open(
        cls, seed: bytes, *, listen: Sequence[str] = (), network_key: str = "", in_process: bool = True
    ) -> LibP2PTransport:
        """Join a network as the node whose Ed25519 key grows out of `seed` (32 bytes).

        `listen`: multiaddrs (`/ip4/0.0.0.0/tcp/4001`; port 0 for any); none: only this process can dial the node, and
        it can dial others. `network_key`: nodes with another one are refused. `in_process`: reach nodes of this process
        without sockets. Raises `SpecError` when libp2p is missing, an address can't be listened on, or the identity is
        in use in this process.
        """
        try:
            thread = await asyncio.to_thread(_borrow)
        except ImportError as error:
            raise SpecError(f"{MISSING} ({error})") from error
        try:
            return await cls._open(thread, seed, listen, network_key, in_process=in_process)
        except BaseException:
            await asyncio.to_thread(thread.give_back)
            raise

    @classmethod
    async def _open(
        cls, thread: NetworkThread, seed: bytes, listen: Sequence[str], network_key: str, *, in_process: bool
    ) -> LibP2PTransport:
        from bacalhau_node.transports.libp2p import host, inbox  # noqa: PLC0415 - libp2p: late, and there by now

        box = inbox.Inbox(thread)
        joined = await thread.call(
            lambda: host.join(thread, seed, listen, inbox=box, network_key=network_key, in_process=in_process)
        )
        return cls(thread, joined, box)

    @property
    def node(self) -> NodeId:
        """The peer id of this node's key."""
        return self._node

    def addresses(self) -> Sequence[str]:
        """Where it listens, one for each interface; `/memory/0` for one that only this process can dial."""
        return [] if self._inbox.closed else list(self._addresses)

    @property
    def dropped(self) -> int:
        """What was refused (with who sent it) or could not be passed on (to who was too slow), since the start."""
        return self._host.complaints.count + self._host.mesh.router.dropped

    @property
    def waiting(self) -> Waiting:
        """Bytes that wait for links to take them, and for neighbours to take gossip."""
        return self._host.waiting()

    async def send(self, to: NodeId, data: bytes) -> None:
        """Queue `data` on the link to a node, dialled if need be, once there is room."""
        self._check_open()
        if len(data) > MAX_MESSAGE:
            raise BugError(f"a message of {len(data)} bytes to {to}, where {MAX_MESSAGE} are allowed")
        await self._thread.call(self._host.send, to, data)

    async def publish(self, data: bytes) -> None:
        """Sign `data` and give it to all neighbours."""
        self._check_open()
        if len(data) > LARGEST_PUBLISHED:
            raise BugError(f"{len(data)} bytes to publish, where {LARGEST_PUBLISHED} are allowed")
        await self._thread.call(self._host.publish, data)

    async def received(self) -> AsyncIterator[Arrival]:
        """What comes, until `close`."""
        while (arrival := await self._inbox.get()) is not None:
            yield arrival

    def peers(self) -> Sequence[NodeId]:
        """Nodes to which there is a link, sorted."""
        return [] if self._inbox.closed else sorted(self._host.peers())

    def host_of(self, node: NodeId) -> str:
        """The IP address at the other end of the socket to a node."""
        return "" if self._inbox.closed else self._host.host_of(node)

    async def dial(self, address: str) -> NodeId:
        """Open a link to `/ip4/…/tcp/…/p2p/NODE`, or to `/memory/0/p2p/NODE` in this process."""
        self._check_open()
        return cast("NodeId", await self._thread.call(self._host.dialler.dial, address))

    def learn(self, node: NodeId, addresses: Sequence[str]) -> None:
        """Remember where `node` can be dialled."""
        self._thread.post(self._host.dialler.learn, node, tuple(addresses))

    async def hang_up(self, node: NodeId) -> None:
        """Close the links to `node`."""
        if not self._inbox.closed:
            await self._thread.call(self._host.hang_up, node)

    def serve(self, handler: Answering) -> None:
        """Answer requests by `handler`."""
        self._handler = handler

    async def request(self, to: NodeId, question: bytes) -> AsyncIterator[bytes]:
        """The answer of the other's handler, in the parts that it came in."""
        self._check_open()
        if len(question) > LARGEST_QUESTION:
            raise BugError(f"a question of {len(question)} bytes to {to}, where {LARGEST_QUESTION} are allowed")
        if to == self._node:
            async for part in self._own_answer(question):
                yield part
            return
        from bacalhau_node.transports.libp2p.asking import Asked  # noqa: PLC0415 - libp2p: late, and there by now

        asked = Asked(to)
        try:
            await self._thread.call(self._host.ask, asked, to, question)
            while (part := await self._thread.call(asked.next)) is not None:
                yield part
        finally:
            self._thread.post(self._host.drop, asked)

    async def close(self) -> None:
        """Leave the network; closing twice is closing once."""
        if self._inbox.closed:
            return
        self._inbox.close()
        for task in self._answering:
            task.cancel()
        try:
            with contextlib.suppress(NodeUnreachable):  # the thread broke down, and has told so
                await self._thread.call(self._host.stop)
        finally:
            await asyncio.to_thread(self._thread.give_back)

    def _check_open(self) -> None:
        if self._inbox.closed:
            raise NodeUnreachable(f"this node, {self._node}, has left the network")

    # --- answers ---

    async def _own_answer(self, question: bytes) -> AsyncIterator[bytes]:
        if self._handler is None:
            raise NodeUnreachable(f"node {self._node} answers no requests")
        try:
            async for part in self._handler(self._node, question):
                yield part
        except BacalhauError as error:
            raise NodeUnreachable(f"node {self._node} broke its answer off: {error}") from error

    def _answer(self, answer: Answer, question: bytes) -> None:
        """Start answering, unless this node has left meanwhile."""
        if self._inbox.closed:
            return
        task = asyncio.get_running_loop().create_task(self._give(answer, question))
        self._answering.add(task)
        task.add_done_callback(self._answering.discard)
        self._thread.post(self._host.watch, answer, lambda: self._shore.post(task.cancel))

    async def _give(self, answer: Answer, question: bytes) -> None:
        """The task boundary of an answer: a bug in the handler ends the answer, and is told."""
        reason = "it answers no requests"
        try:
            if self._handler is not None:
                parts = cast("AsyncGenerator[bytes, None]", self._handler(answer.node, question))
                async with contextlib.aclosing(parts):
                    async for part in parts:
                        await self._thread.call(answer.part, part)
                await self._thread.call(answer.end)
                return
        except NodeUnreachable as error:
            log.debug("an answer ended early: %s", error)
            reason = str(error)
        except BacalhauError as error:
            reason = str(error)
        except Exception:  # see above
            log.exception("an answer to %s failed", answer.node)
            reason = "it has a fault of its own"
        with contextlib.suppress(NodeUnreachable):
            await self._thread.call(answer.fail, reason)


def _borrow() -> NetworkThread:
    from bacalhau_node.transports.libp2p.thread import NetworkThread  # noqa: PLC0415 - trio: late

    return NetworkThread.borrow()
