"""Two processes with a link between them that breaks, and processes that die, freeze or are strangers.

By the journal of the requester: every shard of every job has one accepted outcome, and keeps it.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from bacalhau_node.identity import read_identity
from bacalhau_node.topology import Graph
from tests.devstack.linked import LEASE
from tests.devstack.storm import Ledger, Report
from tests.wire import Wire

ROOT = Path(__file__).resolve().parent.parent.parent
SHARDS = 100
SECONDS = 60.0
LONGEST_LINE = 2**24
"""Bytes: a thousand nodes as a graph in one line are well within."""


class Process:
    """A node in a process (`linked`), below `folder`. `through`: the command that runs its command."""

    def __init__(self, folder: Path, *words: str, through: tuple[str, ...] = ()) -> None:
        self.folder, self._words, self._through = folder, words, through
        self.log = folder.with_suffix(".log")
        self.id, self.address, self.journal = "", "", Path()
        self.nodes: set[str] = set()
        self.known = 0
        self.ended: dict[str, dict[str, Any]] = {}
        self.errors: list[str] = []
        self._submitted: asyncio.Queue[str] = asyncio.Queue()
        self._graphs: asyncio.Queue[Graph] = asyncio.Queue()
        self._news = asyncio.Event()
        self._process: asyncio.subprocess.Process | None = None
        self._hearing: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Start it; returns when it is on the network, or has failed."""
        paths = os.pathsep.join([str(ROOT), str(ROOT / "node"), os.environ.get("PYTHONPATH", "")])
        with self.log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *self._through, sys.executable, "-m", "tests.devstack.linked", str(self.folder), *self._words,
                env=os.environ | {"PYTHONPATH": paths}, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
                stderr=log, limit=LONGEST_LINE,
            )  # fmt: skip
        assert self._process.stdout is not None
        self._hear(await self._process.stdout.readline())
        self._hearing = asyncio.create_task(self._listen(self._process.stdout))

    async def submit(self, shards: int) -> str:
        """Start a job; its id."""
        self._say(str(shards))
        return await self._submitted.get()

    async def knows(self, count: int) -> None:
        """Wait until it knows so many others."""
        while self.known < count:
            self._say("")
            await asyncio.sleep(0.1)

    async def graph(self) -> Graph:
        """The network as it sees it."""
        self._say("graph")
        return await self._graphs.get()

    async def end_of(self, job: str, *, seconds: float = SECONDS) -> dict[str, Any]:
        """How the job ended."""
        async with asyncio.timeout(seconds):
            while job not in self.ended:
                self._news.clear()
                await self._news.wait()
        return self.ended[job]

    def _say(self, line: str) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n".encode())

    def take_identity(self) -> str:
        """Be somebody, before it is started; its id."""
        folder = self.folder / "nodes" / "n-0000000000000001"
        folder.mkdir(parents=True)
        return read_identity(folder / "identity").node

    def take_identity_of(self, other: Process) -> None:
        """Be somebody else, before it is started."""
        folder = self.folder / "nodes" / "n-0000000000000001"
        folder.mkdir(parents=True)
        shutil.copy(other.journal / "identity", folder)

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        assert self._process is not None
        self._process.send_signal(number)

    async def kill(self) -> None:
        """End it without a word."""
        assert self._process is not None
        if self._process.returncode is None:
            self._process.kill()
        await self._process.wait()
        if self._hearing is not None:
            await self._hearing

    async def _listen(self, stream: asyncio.StreamReader) -> None:
        while line := await stream.readline():
            self._hear(line)

    def _hear(self, line: bytes) -> None:
        match json.loads(line or b"{}"):
            case {"ready": node, "folder": folder, "nodes": nodes, "address": address}:
                self.id, self.journal, self.nodes, self.address = node, Path(folder), set(nodes), address
            case {"known": known}:
                self.known = known
            case {"job": job}:
                self._submitted.put_nowait(job)
            case {"graph": graph}:
                self._graphs.put_nowait(msgspec.convert(graph, Graph))
            case {"ended": job} as end:
                self.ended[job] = end
            case {"error": error}:
                self.errors.append(error)
        self._news.set()

    def logged(self, words: str) -> int:
        """In how many lines of its log these words are."""
        return sum(words in line for line in self.log.read_text().splitlines())


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


class Pair:
    """A requester with one slot, and a compute node with four that it can reach by `wire` only.

    `words`: for both. Either may be a devstack.
    """

    def __init__(self, folder: Path, *words: str) -> None:
        self._folder, self.port, self._words = folder, free_port(), words
        self.wire = Wire(self.port)
        self.ledger = Ledger(Report())

    async def start(self) -> None:
        there = f"/ip4/127.0.0.1/tcp/{await self.wire.start()}"
        listen = f"/ip4/127.0.0.1/tcp/{self.port}"
        self.compute = Process(
            self._folder / "b", "--listen", listen, "--announce", there, "--slots", "4", *self._words
        )
        peer = f"{there}/p2p/{await asyncio.to_thread(self.compute.take_identity)}"
        self.requester = Process(self._folder / "a", "--peer", peer, "--slots", "1", *self._words)
        await asyncio.gather(self.compute.start(), self.requester.start())
        await self.requester.knows(1)

    async def throw(self, data: bytes) -> None:
        """Send the compute node some bytes, past the wire."""
        _, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(data)
        await writer.drain()
        writer.close()

    @property
    def address(self) -> str:
        """The compute node's, past the wire."""
        return f"/ip4/127.0.0.1/tcp/{self.port}/p2p/{self.compute.id}"

    async def a_job(self) -> str:
        """A job that has begun on both."""
        job = await self.requester.submit(SHARDS)
        await asyncio.sleep(0.3)
        return job

    async def judge(self, job: str, what: str) -> dict[str, Any]:
        """Wait for the end of a job; every shard counts once, and so do those of all jobs before."""
        end = await self.requester.end_of(job)
        assert end["state"] == "Completed", (what, end)
        await asyncio.to_thread(self.ledger.read, self.requester.journal)
        mine = {shard for name, shard in self.ledger.outcomes if name == job}
        assert mine == set(range(SHARDS)), what
        assert not self.ledger.report.lost, what
        assert not self.ledger.report.doubled, what
        return end

    async def close(self) -> None:
        for process in (self.requester, self.compute):
            await process.kill()
        await self.wire.close()


@pytest.fixture
async def pair(tmp_path: Path) -> AsyncIterator[Pair]:
    pair = Pair(tmp_path, "--hurry")
    await pair.start()
    yield pair
    await pair.close()


# --- what may happen to a link ---


async def cut(pair: Pair) -> None:
    pair.wire.cut()
    await asyncio.sleep(1.5 * LEASE)


async def cut_for_a_moment(pair: Pair) -> None:
    pair.wire.cut()
    await asyncio.sleep(0.2)


async def hold_what_comes(pair: Pair) -> None:
    pair.wire.hold("back")
    await asyncio.sleep(1.5 * LEASE)


async def hold_what_goes(pair: Pair) -> None:
    pair.wire.hold("there")
    await asyncio.sleep(1.5 * LEASE)


async def flap(pair: Pair) -> None:
    for _ in range(4):
        pair.wire.cut()
        await asyncio.sleep(0.5)
        pair.wire.heal()
        await asyncio.sleep(0.5)


async def slow_down(pair: Pair) -> None:
    pair.wire.delay = 0.2
    await asyncio.sleep(2.0)


async def freeze_the_compute_node(pair: Pair) -> None:
    pair.compute.signal(signal.SIGSTOP)
    await asyncio.sleep(1.5 * LEASE)
    pair.compute.signal(signal.SIGCONT)


async def freeze_the_requester(pair: Pair) -> None:
    pair.requester.signal(signal.SIGSTOP)
    await asyncio.sleep(1.5 * LEASE)
    pair.requester.signal(signal.SIGCONT)


FAULTS: tuple[Callable[[Pair], Awaitable[None]], ...] = (
    cut,
    cut_for_a_moment,
    hold_what_comes,
    hold_what_goes,
    flap,
    slow_down,
    freeze_the_compute_node,
    freeze_the_requester,
)


async def test_whatever_a_link_does_each_shard_counts_once_and_the_other_node_is_used_again(pair: Pair) -> None:
    for fault in FAULTS:
        began = time.monotonic()
        job = await pair.a_job()
        await fault(pair)
        pair.wire.heal()
        end = await pair.judge(job, fault.__name__)
        print(f"{fault.__name__}: {time.monotonic() - began:.1f} s, {len(end['nodes'])} nodes")
    for _ in range(20):
        end = await pair.judge(await pair.a_job(), "after all faults")
        if end["nodes"] == sorted([pair.requester.id, pair.compute.id]):
            break
    else:
        pytest.fail(f"the compute node is not used again: {end}")


# --- processes that die ---


async def test_processes_that_are_killed_and_started_again_cost_no_shard(pair: Pair) -> None:
    job = await pair.a_job()
    await pair.compute.kill()
    await asyncio.sleep(0.5)
    await pair.compute.start()
    await pair.judge(job, "the compute node was killed")
    job = await pair.a_job()
    for _ in range(2):
        await pair.requester.kill()
        await asyncio.to_thread(pair.ledger.read, pair.requester.journal)
        await pair.requester.start()
    await pair.judge(job, "the requester was killed twice")


# --- strangers ---


async def test_strangers_are_told_once_each_and_change_nothing(pair: Pair, tmp_path: Path) -> None:
    """Garbage, a node of another network, one with this node's identity, one that wants its port, one that is lost."""
    job = await pair.a_job()
    for data in (os.urandom(5_000), b"GET / HTTP/1.1\r\n\r\n", b"\x13/multistream/1.0.0\n" + b"\xff" * 300):
        await pair.throw(data)
    nowhere = f"/ip4/127.0.0.1/tcp/{free_port()}/p2p/{pair.compute.id}"
    other = Process(tmp_path / "other", "--peer", pair.address, "--network-key", "another", "--slots", "1", "--hurry")
    twin = Process(tmp_path / "twin", "--peer", pair.address, "--slots", "1", "--hurry")
    lost = Process(tmp_path / "lost", "--peer", nowhere, "--slots", "1", "--hurry")
    thief = Process(tmp_path / "thief", "--listen", pair.address.partition("/p2p/")[0])
    await asyncio.to_thread(twin.take_identity_of, pair.compute)
    await asyncio.gather(*(process.start() for process in (other, twin, lost, thief)))
    assert twin.id == pair.compute.id
    assert [f"tcp/{pair.port}" in error for error in thief.errors] == [True]
    for process in (other, twin, lost):
        assert (await process.end_of(await process.submit(2)))["state"] == "Completed"
    await pair.judge(job, "strangers came")
    await asyncio.sleep(3)  # they try again
    for process in (other, twin, lost, thief):
        await process.kill()
    assert pair.compute.logged("127.0.0.1 is disconnected: the handshake failed") == 1
    assert pair.compute.logged(f"node {other.id} is disconnected: it belongs to another network") == 1
    assert other.logged("its network key is not ours") == 1
    assert twin.logged("is this node itself") == 1
    assert lost.logged(f"{nowhere} can't be joined, and is tried again") == 1
