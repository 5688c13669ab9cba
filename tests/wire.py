"""A link between two processes that can be broken in every way in which links break: a proxy on loopback."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Literal

Way = Literal["there", "back"]


class Wire:
    """Carries connections to `port`. `delay`: seconds that each piece of data takes longer."""

    def __init__(self, port: int) -> None:
        self._port = port
        self.delay = 0.0
        self.connections = 0
        self._whole = True
        self._flows: dict[Way, asyncio.Event] = {"there": asyncio.Event(), "back": asyncio.Event()}
        self._ends: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None
        self.heal()

    async def start(self) -> int:
        """Listen; returns the port to use in place of the other."""
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    async def close(self) -> None:
        """Listen no more, and end what is open."""
        self.cut()
        if self._server is not None:
            self._server.close()
            await self._server.wait_closed()

    def cut(self) -> None:
        """End every connection, and let none open."""
        self._whole = False
        for end in self._ends:
            end.transport.abort()

    def hold(self, *ways: Way) -> None:
        """Let nothing pass in this direction, or these; neither end can tell why. What is held comes in the end."""
        for way in ways:
            self._flows[way].clear()

    def heal(self) -> None:
        """Be whole again."""
        self._whole, self.delay = True, 0.0
        for flow in self._flows.values():
            flow.set()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not self._whole:
            writer.transport.abort()
            return
        try:
            inner, outer = await asyncio.open_connection("127.0.0.1", self._port)
        except OSError:  # nobody listens there now
            writer.transport.abort()
            return
        self.connections += 1
        self._ends |= {writer, outer}
        pumps = [
            asyncio.create_task(self._pump(reader, outer, "there")),
            asyncio.create_task(self._pump(inner, writer, "back")),
        ]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in pumps:
                pump.cancel()
            for end in (writer, outer):
                self._ends.discard(end)
                end.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, way: Way) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65_536):
                await self._flows[way].wait()
                if self.delay:
                    await asyncio.sleep(self.delay)
                writer.write(data)
                await writer.drain()
