"""A thousand libp2p hosts in one process: connecting, memory, a message to all."""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import resource
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

from bacalhau_node.ports import Packet
from bacalhau_node.transports.libp2p import LibP2PTransport
from tests.bench.harness import Figure, at_most

TITLE = "libp2p hosts"
EXECUTORS = ("plain",)
HERE = "/ip4/127.0.0.1/tcp/0"
NEIGHBOURS, AT_ONCE = 6, 20
MESSAGES, BYTES = 5, 200
SETTLED, PATIENCE = 5.0, 30.0
GO = "the Go system, 1,000 nodes on such a machine: 110 s, 1,700–2,000 MB"


@dataclass(frozen=True, kw_only=True)
class Grown:
    """What one network took: seconds, MB of memory beyond an empty process with libp2p, seconds of each message."""

    opened: float
    connected: float
    megabytes: float
    files: int
    idle: float
    spread: tuple[float, ...]


def memory() -> float:
    """MB that this process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def open_files() -> int:
    """How many files and sockets this process has open."""
    return len(list(Path("/proc/self/fd").iterdir()))


def pairs(hosts: int) -> list[tuple[int, int]]:
    """Who dials whom: three rings at random, so that everybody has about six neighbours."""
    chance = random.Random(7)
    found = set()
    for _ in range(NEIGHBOURS // 2):
        ring = chance.sample(range(hosts), hosts)
        found |= {(min(a, b), max(a, b)) for a, b in zip(ring, ring[1:] + ring[:1], strict=True)}
    return sorted(found, key=lambda _: chance.random())


async def opened(number: int, *, tcp: bool) -> LibP2PTransport:
    """One host, which listens where others find it."""
    seed = hashlib.sha256(b"bench %d" % number).digest()
    return await LibP2PTransport.open(seed, listen=[HERE] if tcp else [], in_process=not tcp)


async def dialled(hosts: list[LibP2PTransport]) -> None:
    """Connect them all, some at once."""
    room = asyncio.Semaphore(AT_ONCE)

    async def dial(one: int, other: int) -> None:
        async with room:
            await hosts[one].dial(hosts[other].addresses()[0])

    await asyncio.gather(*(dial(one, other) for one, other in pairs(len(hosts))))


async def spread(hosts: list[LibP2PTransport]) -> list[float]:
    """Seconds until the last host has each of a few messages."""
    left: dict[bytes, int] = {}
    done = asyncio.Event()

    async def hear(host: LibP2PTransport) -> None:
        async for arrival in host.received():
            if isinstance(arrival, Packet):
                left[arrival.data] -= 1
                if not left[arrival.data]:
                    done.set()

    listening = [asyncio.create_task(hear(host)) for host in hosts]
    taken = []
    for number in range(MESSAGES):
        data = b"%d" % number + os.urandom(BYTES)
        left[data] = len(hosts) - 1
        done.clear()
        start = time.perf_counter()
        await hosts[number * 7].publish(data)
        async with asyncio.timeout(PATIENCE):
            await done.wait()
        taken.append(time.perf_counter() - start)
    for task in listening:
        task.cancel()
    return taken


async def grown(count: int, *, tcp: bool) -> Grown:
    """Open, connect, and use so many hosts."""
    first = await opened(-1, tcp=tcp)  # what libp2p itself takes is not counted
    empty, start = memory(), time.perf_counter()
    hosts = [await opened(number, tcp=tcp) for number in range(count)]
    there = time.perf_counter()
    await dialled(hosts)
    joined = time.perf_counter()
    await asyncio.sleep(SETTLED)
    busy = time.process_time()
    await asyncio.sleep(SETTLED)
    idle = (time.process_time() - busy) / SETTLED
    result = Grown(
        opened=there - start,
        connected=joined - start,
        megabytes=memory() - empty,
        files=open_files(),
        idle=idle,
        spread=tuple(await spread(hosts)),
    )
    for host in (*hosts, first):
        await host.close()
    return result


def network(found: Grown, count: int, how: str, seconds: float) -> list[Figure]:
    """The figures of one network."""
    return [
        Figure(
            what=f"{count:,} libp2p hosts in one process, {how}: opened and connected",
            ours=f"{found.connected:.1f} s, {found.opened:.1f} s of it opening; {found.files:,} open files",
            beside=GO if count == 1000 else "",
            measured=found.connected,
            goal=at_most(seconds, "s"),
        ),
        Figure(
            what=f"{count:,} libp2p hosts, {how}: a message to all",
            ours=f"{max(found.spread):.2f} s, median {statistics.median(found.spread):.2f} s of {MESSAGES}",
            beside=f"idle: {100 * found.idle:.1f} % of a core",
            measured=max(found.spread),
            goal=at_most(1.5, "s"),
        ),
        Figure(
            what=f"{count:,} libp2p hosts, {how}: memory",
            ours=f"{1000 * found.megabytes / count:.0f} kB each",
            beside="",
            measured=found.megabytes,
            goal=at_most(600, "MB"),
        ),
    ]


def run(_: str) -> list[Figure]:
    """A thousand hosts without sockets."""
    return network(asyncio.run(grown(1000, tcp=False)), 1000, "without sockets", 60)
