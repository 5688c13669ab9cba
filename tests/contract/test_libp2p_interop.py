"""One gossip topic with peers of other makes: py-libp2p as it is shipped, and kubo (go-libp2p), each in its process."""

import asyncio
import contextlib
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

import tests.peers
from bacalhau_node.ports import Packet
from bacalhau_node.transports.libp2p import LibP2PTransport, gossip

PEERS = Path(tests.peers.__file__).parent
DEADLINE = 30
AGAIN = 1.0


class Peer:
    """A peer of another make."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.id = ""
        self.heard: set[tuple[str, str]] = set()
        self._changed = asyncio.Event()

    async def listen(self) -> None:
        """Take in what it says."""
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            if not line.startswith(b"{"):
                continue  # libraries print what they like
            said = json.loads(line)
            self.id = said.get("id", self.id)
            if "data" in said:
                self.heard.add((said["from"], said["data"]))
            self._changed.set()

    async def becomes(self, condition) -> None:
        """Wait until what was heard makes something true."""
        async with asyncio.timeout(DEADLINE):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    async def tell(self, command: str) -> None:
        """Give a command."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{command}\n".encode())
        await self._process.stdin.drain()


@contextlib.asynccontextmanager
async def peer(make: str, folder: Path) -> AsyncIterator[Peer]:
    """A peer, from when it is ready until its process has ended."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(PEERS / f"{make}.py"),
        str(folder / make),
        gossip.TOPIC,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    one = Peer(process)
    listening = asyncio.create_task(one.listen())
    try:
        await one.becomes(lambda: one.id)
        yield one
    finally:
        process.kill()
        await process.wait()
        await listening


@pytest.fixture
async def node() -> AsyncIterator[LibP2PTransport]:
    transport = await LibP2PTransport.open(bytes(32), listen=["/ip4/127.0.0.1/tcp/0"])
    yield transport
    await transport.close()


async def repeated(publish, heard: asyncio.Future | asyncio.Task) -> None:
    """Publish again and again until it was heard: nobody knows when a subscription has arrived over there."""
    async with asyncio.timeout(DEADLINE):
        while not heard.done():
            await publish()
            await asyncio.wait([heard], timeout=AGAIN)
    await heard


async def comes(transport: LibP2PTransport, wanted: Packet) -> None:
    async with contextlib.aclosing(transport.received()) as received:
        async for arrival in received:
            if arrival == wanted:
                return


@pytest.mark.parametrize("make", ["stock", "kubo"])
async def test_messages_go_both_ways_in_one_topic(node, tmp_path, make):
    async with peer(make, tmp_path) as other:
        await other.tell(f"connect {node.addresses()[0]}")
        ours = (node.node, "from a node")
        heard = asyncio.create_task(other.becomes(lambda: ours in other.heard))
        await repeated(lambda: node.publish(b"from a node"), heard)
        heard = asyncio.create_task(comes(node, Packet(other.id, b"from a peer")))
        await repeated(lambda: other.tell("publish from a peer"), heard)
        assert node.dropped == 0
        assert node.peers() == []  # they are peers in gossip, and no nodes


async def test_a_node_passes_messages_on_between_peers_of_different_makes(node, tmp_path):
    async with peer("stock", tmp_path) as stock, peer("kubo", tmp_path) as kubo:
        for one in (stock, kubo):
            await one.tell(f"connect {node.addresses()[0]}")
        for one, other in ((stock, kubo), (kubo, stock)):
            theirs = (one.id, "pass it on")
            heard = asyncio.create_task(other.becomes(lambda theirs=theirs, other=other: theirs in other.heard))
            await repeated(lambda one=one: one.tell("publish pass it on"), heard)
