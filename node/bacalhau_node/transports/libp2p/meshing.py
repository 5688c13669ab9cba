"""The streams that carry gossip between neighbours: one each way, which only its opener writes on."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable

import trio
from libp2p.abc import IMuxedConn, IMuxedStream

from bacalhau_node.errors import ProtocolError
from bacalhau_node.ids import NodeId
from bacalhau_node.transports.libp2p import gossip
from bacalhau_node.transports.libp2p.inbox import Inbox
from bacalhau_node.transports.libp2p.streams import BROKEN, propose, read

log = logging.getLogger(__name__)


class Mesh:
    """A router, and the streams to and from its neighbours."""

    def __init__(self, router: gossip.Router, inbox: Inbox, spawn: Callable[..., None]) -> None:
        self.router, self._inbox, self._spawn = router, inbox, spawn

    async def beat(self) -> None:
        """Keep the mesh in shape, for ever."""
        await trio.sleep(gossip.BEAT * random.random())  # noqa: S311 - so that a thousand hosts take turns
        while True:
            self.router.beat()
            await trio.sleep(gossip.BEAT)

    def join(self, node: NodeId, conn: IMuxedConn) -> gossip.Neighbour:
        """The neighbour on a connection, with a stream towards it."""
        known = self.router.neighbours.get(node)
        if known is not None:
            return known
        neighbour = gossip.Neighbour(node)
        self.router.add(neighbour)
        self._spawn(self._speak, neighbour, conn)
        return neighbour

    def leave(self, node: NodeId) -> None:
        """The connection to a neighbour is gone."""
        if neighbour := self.router.neighbours.get(node):
            self.router.remove(neighbour)

    async def listen(self, node: NodeId, stream: IMuxedStream) -> None:
        """Hear what a neighbour says until it ends; raises `ProtocolError` for what no honest one says."""
        neighbour = self.join(node, stream.muxed_conn)
        buffer = bytearray()
        try:
            while data := await read(stream):
                buffer += data
                for rpc in gossip.rpcs(buffer):
                    for packet in self.router.heard(neighbour, rpc):
                        await self._inbox.put(packet)
        finally:
            self.router.remove(neighbour)

    async def _speak(self, neighbour: gossip.Neighbour, conn: IMuxedConn) -> None:
        """Open the stream towards a neighbour, and write to it what the router has for it."""
        try:
            stream = await conn.open_stream()
            if not await propose(stream, gossip.PROTOCOL):
                return
            while data := await neighbour.take():
                await stream.write(data)
            await stream.close()
        except (*BROKEN, ProtocolError) as error:
            log.debug("no more gossip to %s: %s", neighbour.node, error)
        finally:
            self.router.remove(neighbour)
