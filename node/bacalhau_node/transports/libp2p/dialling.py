"""How a node reaches others: by a socket, or within the process, and by one dial to a node at a time."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, Protocol

import trio
from libp2p.abc import IMuxedConn
from libp2p.host.basic_host import BasicHost
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.peer.id import ID

from bacalhau_node.errors import BacalhauError, NodeUnreachable, ProtocolError, SpecError
from bacalhau_node.ids import NodeId
from bacalhau_node.transports.libp2p import addresses, inprocess
from bacalhau_node.transports.libp2p.lean import swarm_of
from bacalhau_node.transports.libp2p.link import Link
from bacalhau_node.transports.libp2p.streams import BROKEN, Socket

DIAL_SECONDS = 15
"""For a dial with all its addresses, handshakes and hellos included."""

KNOWN = 100_000
"""Nodes whose addresses are remembered at most."""


class Here(Protocol):
    """A host of this process, for the others in it."""

    in_process: bool
    id: ID
    host: BasicHost


HERE: dict[NodeId, Here] = {}
"""The hosts of this process. Touched on the network's thread only."""


class _Dial:
    """One attempt to reach a node, for everybody who wants to."""

    def __init__(self) -> None:
        self.over = trio.Event()
        self.error: NodeUnreachable | None = None


class Dialler:
    """Opens connections for `me`. `link` says which link there is, `link_up` makes one on a new connection."""

    def __init__(
        self,
        me: Here,
        *,
        link: Callable[[NodeId], Link | None],
        link_up: Callable[[IMuxedConn], Awaitable[None]],
        spawn: Callable[..., None],
    ) -> None:
        self._me, self._link, self._link_up, self._spawn = me, link, link_up, spawn
        self._known: dict[NodeId, tuple[str, ...]] = {}
        self._dials: dict[NodeId, _Dial] = {}

    def learn(self, node: NodeId, where: Sequence[str]) -> None:
        """Remember where a node can be dialled."""
        self._known.pop(node, None)
        self._known[node] = tuple(where)
        if len(self._known) > KNOWN:
            del self._known[next(iter(self._known))]

    async def dial(self, address: str) -> NodeId:
        """Have a link to whoever an address names."""
        node = addresses.where(address).node
        if node == self._me.id.to_base58():
            raise SpecError(f"{address} is this node itself")
        await self.reach(node, (address,))
        return node

    async def reach(self, node: NodeId, where: Sequence[str] | None = None) -> Link:
        """A link to a node, dialled if need be; raises `NodeUnreachable`."""
        one = self._link(node)
        if one is not None:
            return one
        dial = self._dials.get(node)
        if dial is None:
            dial = self._dials[node] = _Dial()
            self._spawn(self._dial, node, self._known.get(node, ()) if where is None else where, dial)
        await dial.over.wait()
        one = self._link(node)
        if one is None:
            raise NodeUnreachable(str(dial.error or f"node {node} closed the connection at once"))
        return one

    async def _dial(self, node: NodeId, where: Sequence[str], dial: _Dial) -> None:
        reasons = [] if where else ["nobody has told where it is"]
        try:
            with trio.move_on_after(DIAL_SECONDS) as scope:
                if await self._inside(node):
                    return
                for address in where:
                    try:
                        await self._outside(node, address)
                    except (*BROKEN, BacalhauError) as error:
                        reasons.append(f"{address}: {error or type(error).__name__}")
                    else:
                        return
            if scope.cancelled_caught:
                reasons.append(f"no answer within {DIAL_SECONDS} s")
            dial.error = NodeUnreachable(f"node {node} can't be reached: {'; '.join(reasons)}")
        finally:
            del self._dials[node]
            dial.over.set()

    async def _inside(self, node: NodeId) -> bool:
        """Connect to a node of this process; whether it is one that wants to be reached so."""
        other = HERE.get(node)
        if other is None or other is self._me or not (self._me.in_process and other.in_process):
            return False
        here, there = inprocess.connect(self._me.id, other.id)
        try:
            await swarm_of(self._me.host).add_conn(here, direction="outbound")
            await swarm_of(other.host).add_conn(there, direction="inbound")
            await self._link_up(here)
        except (*BROKEN, ProtocolError):  # it refuses, or leaves at this moment
            return False
        return True

    async def _outside(self, node: NodeId, address: str) -> None:
        """Connect by a socket."""
        named, tcp = addresses.where(address)
        if named != node:
            raise ProtocolError(f"that is the address of node {named}")
        if tcp is None:
            raise NodeUnreachable("it is not in this process")
        stream = await trio.open_tcp_stream(*tcp)
        conn = await secured(stream, lambda raw: self._me.host.upgrade_outbound_connection(raw, ID.from_string(node)))
        await self._link_up(conn.muxed_conn)


async def secured(
    stream: trio.SocketStream, upgrade: Callable[[RawConnection], Coroutine[Any, Any, Any]], *, dialled: bool = True
) -> Any:
    """What `upgrade` makes of a socket; raises `ProtocolError` when the other end fails, and closes the socket."""
    socket, done = Socket(stream), None
    try:
        done = await upgrade(RawConnection(socket, dialled))
    except Exception as error:  # bytes of anybody arrive here, and each layer of libp2p raises what it likes
        cause = error.__cause__ or error
        raise ProtocolError(f"the handshake failed: {cause or type(cause).__name__}") from error
    finally:
        if done is None:
            await trio.aclose_forcefully(stream)
    socket.trusted()
    return done
