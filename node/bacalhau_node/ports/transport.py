"""Bytes between nodes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from typing import Protocol

import msgspec

from bacalhau_node.ids import NodeId
from bacalhau_node.protocol.events import LinkDown, LinkUp


class Packet(msgspec.Struct, frozen=True):
    """A message of `author`: the key of the connection, or (for what was published) the one that signed it."""

    author: NodeId
    data: bytes


class Waiting(msgspec.Struct, frozen=True):
    """How much waits to be sent: in all, and to the one node to which most of it goes."""

    total: int = 0
    most: int = 0


Answering = Callable[[NodeId, bytes], AsyncIterator[bytes]]
"""Answers a question (bytes) of the node that asks, in parts of at most a MiB."""

Arrival = Packet | LinkUp | LinkDown
"""What a transport tells. Links come and go in this very order; packets have none."""


class Transport(Protocol):
    """Bytes between nodes, at most once, in no order: nothing above may assume more."""

    @property
    def node(self) -> NodeId:
        """The node that speaks through this transport."""
        ...

    def addresses(self) -> Sequence[str]:
        """Multiaddrs by which others can dial this node, its id included; none where nobody can."""
        ...

    @property
    def dropped(self) -> int:
        """How many messages were refused, or could not be passed on, since the start. Quick."""
        ...

    @property
    def waiting(self) -> Waiting:
        """Bytes that wait to be sent, published messages included. Quick."""
        ...

    async def send(self, to: NodeId, data: bytes) -> None:
        """Hand `data` to the network, over a link that is opened if need be; returning does not mean that it arrived.

        Waits while the other takes nothing; raises `NodeUnreachable` when it can't be reached.
        """
        ...

    async def publish(self, data: bytes) -> None:
        """Hand `data` to every node of the network, signed by this one."""
        ...

    def received(self) -> AsyncIterator[Arrival]:
        """What comes, as it comes; ends when the transport is closed."""
        ...

    def peers(self) -> Sequence[NodeId]:
        """Nodes to which there is a link now, sorted."""
        ...

    def host_of(self, node: NodeId) -> str:
        """The IP address at the other end of the link to a node; "" without a link, or where it needs no address."""
        ...

    async def dial(self, address: str) -> NodeId:
        """Open a link to a multiaddr and say who is there; raises `NodeUnreachable`, `SpecError` for no multiaddr."""
        ...

    def learn(self, node: NodeId, addresses: Sequence[str]) -> None:
        """Remember where `node` can be dialled, in place of what was known; quick."""
        ...

    async def hang_up(self, node: NodeId) -> None:
        """Close the links to `node`; nothing happens when there are none."""
        ...

    def serve(self, handler: Answering) -> None:
        """Answer the requests of others by `handler`, from now on."""
        ...

    def request(self, to: NodeId, question: bytes) -> AsyncIterator[bytes]:
        """The answer of another node's `handler`, as it comes, slowly if need be; `NodeUnreachable` when it breaks off.

        A question has at most 64 KiB. A handler that raises ends the answer like a broken connection.
        """
        ...

    async def close(self) -> None:
        """Leave the network; `received` ends."""
        ...
