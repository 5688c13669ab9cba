"""py-libp2p as a peer that gives out blocks by bitswap: `python bitswap.py CAR`, until its stdin ends.

It says `{"address": …}` when it is ready. Its server, as it comes, can't serve kubo: it answers on the stream of the
question, where Go reads nothing, and calls a block of CIDv0 by no prefix at all. Both are mended here, for tests.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import trio
from libp2p import new_host
from libp2p.bitswap.client import BitswapClient
from libp2p.bitswap.config import BITSWAP_PROTOCOLS
from multiaddr import Multiaddr

from bacalhau_node.content.car import CarReader

V0 = b"\x00\x70\x12\x20"
"""What stands before the digest of a CIDv0, as kubo wants it: version, codec, hash, length."""


class Server(BitswapClient):
    """Answers in the way that others understand."""

    async def _send_wantlist_responses_inline(  # type: ignore[override]
        self, _stream: object, peer: Any, v0: list[bytes], v1: list[tuple[bytes, bytes]], presences: list[Any]
    ) -> None:
        stream = await self.host.new_stream(peer, list(BITSWAP_PROTOCOLS))
        try:
            named = [(prefix or V0, block) for prefix, block in v1]
            await super()._send_wantlist_responses_inline(stream, peer, v0, named, presences)
        finally:
            await stream.close()


async def main(archive: bytes) -> None:
    """Serve the blocks of an archive."""
    host = new_host()
    server = Server(host)
    async with host.run([Multiaddr("/ip4/127.0.0.1/tcp/0")]), trio.open_nursery() as nursery:
        server.set_nursery(nursery)
        await server.start()
        for cid, block in CarReader().feed(archive):
            await server.add_block(cid.binary, block)
        print(json.dumps({"address": str(host.get_addrs()[0])}), flush=True)
        async for _ in trio.wrap_file(sys.stdin):
            pass
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    trio.run(main, Path(sys.argv[1]).read_bytes())
