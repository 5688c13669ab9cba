"""A proxy on loopback that breaks the connections which go through it."""

from __future__ import annotations

import asyncio
import contextlib


class Cutter:
    """Cuts every connection to `port` after so many bytes in either direction, or so many seconds."""

    def __init__(self, port: int, *, limit: int = 10**12, seconds: float = 60) -> None:
        self._port, self._limit, self._seconds = port, limit, seconds
        self.cut = 0
        self._server: asyncio.Server | None = None

    async def start(self) -> str:
        """Listen; returns the URL to use in place of that of the port."""
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def close(self) -> None:
        """Listen no more."""
        assert self._server is not None
        self._server.close()
        await self._server.wait_closed()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            inner, outer = await asyncio.open_connection("127.0.0.1", self._port)
        except OSError:  # nobody listens there now
            writer.transport.abort()
            return
        left = [self._limit]
        pumps = [asyncio.create_task(self._pump(*pair, left)) for pair in ((reader, outer), (inner, writer))]
        ended, _ = await asyncio.wait(pumps, timeout=self._seconds, return_when=asyncio.FIRST_COMPLETED)
        self.cut += not ended
        for pump in pumps:
            pump.cancel()
        for end in (writer, outer):
            end.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, left: list[int]) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(min(65_536, left[0])):
                left[0] -= len(data)
                writer.write(data)
                await writer.drain()
                if left[0] <= 0:
                    self.cut += 1
                    return
