"""How a node reaches others: by a socket, or within the process, and by one dial to a node at a time."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from functools import partial
from typing import Any, Protocol, cast

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

LONGEST_REASON = 200
"""Characters of a reason: it may quote what a stranger sent."""

DIAL_SECONDS, CONNECT_SECONDS = 30, 10
"""For a dial with all its addresses, hellos included, and for one address to connect and to be secured."""

KNOWN = 100_000
"""Nodes whose addresses are remembered at most."""


class Here(Protocol):
    """A host of this process, for the others in it."""

    in_process: bool
    id: ID
    host: BasicHost

    def visit(self, conn: inprocess.Conn) -> None:
        """Another host has connected; raises `NodeUnreachable` when this one is leaving."""
        ...


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
        reasons = []
        try:
            with trio.move_on_after(DIAL_SECONDS) as scope:
                for name, connect in self._ways(node, where):
                    try:
                        await self._link_up(await connect())
                    except (*BROKEN, BacalhauError) as error:
                        reasons.append(f"{name}: {innermost(error)}")
                    else:
                        return
            if scope.cancelled_caught:
                reasons.append(f"no answer within {DIAL_SECONDS} s")
            why = "; ".join(reasons) or "nobody has told where it is"
            dial.error = NodeUnreachable(f"node {node} can't be reached: {why}")
        finally:
            del self._dials[node]
            dial.over.set()

    def _ways(self, node: NodeId, where: Sequence[str]) -> Iterator[tuple[str, Callable[[], Awaitable[IMuxedConn]]]]:
        """How to connect to a node, the best way first, each with its name."""
        other = HERE.get(node)
        if other is not None and other is not self._me and self._me.in_process and other.in_process:
            yield "within this process", partial(self._inside, other)
        for address in where:
            yield address, partial(self._outside, node, address)

    async def _inside(self, other: Here) -> IMuxedConn:
        """Connect to a node of this process."""
        here, there = inprocess.connect(self._me.id, other.id)
        await admit(self._me.host, here, direction="outbound")
        other.visit(there)
        return here

    async def _outside(self, node: NodeId, address: str) -> IMuxedConn:
        """Connect by a socket."""
        named, tcp = addresses.where(address)
        if named != node:
            raise ProtocolError(f"that is the address of node {named}")
        if tcp is None:
            raise NodeUnreachable("it is not in this process")
        with trio.move_on_after(CONNECT_SECONDS):
            stream = await trio.open_tcp_stream(*tcp)
            peer = ID.from_string(node)
            conn = await secured(stream, lambda raw: self._me.host.upgrade_outbound_connection(raw, peer))
            return cast("IMuxedConn", conn.muxed_conn)
        raise NodeUnreachable(f"no answer within {CONNECT_SECONDS} s")


async def admit(host: BasicHost, conn: inprocess.Conn, *, direction: str) -> None:
    """Have a host look after its end of a connection, which is closed when it can't any more."""
    done = False
    try:
        await swarm_of(host).add_conn(conn, direction=direction)
        done = True
    except RuntimeError as error:  # of trio: its nursery is closed
        raise NodeUnreachable("it is leaving") from error
    finally:
        if not done:
            with trio.CancelScope(shield=True):
                await conn.close()


async def secured(
    stream: trio.SocketStream, upgrade: Callable[[RawConnection], Coroutine[Any, Any, Any]], *, dialled: bool = True
) -> Any:
    """What `upgrade` makes of a socket; raises `ProtocolError` when the other end fails, and closes the socket."""
    socket, done = Socket(stream), None
    try:
        done = await upgrade(RawConnection(socket, dialled))
    except Exception as error:  # bytes of anybody arrive here, and each layer of libp2p raises what it likes
        raise ProtocolError(f"the handshake failed: {innermost(error)}") from error
    finally:
        if done is None:
            await trio.aclose_forcefully(stream)
    socket.trusted()
    return done


def innermost(error: BaseException) -> str:
    """What went wrong first; the rest says that it made something else go wrong. There may be garbage in it."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error)[:LONGEST_REASON] or type(error).__name__
