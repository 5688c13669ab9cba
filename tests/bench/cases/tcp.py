"""A hundred libp2p hosts over TCP and noise, and what goes over one stream between two of them."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator

from bacalhau_node.ports import Packet
from tests.bench.cases.hosts import grown, network, opened
from tests.bench.harness import Figure, at_least, percentile

TITLE = "libp2p over TCP"
EXECUTORS = ("plain",)
ROUND_TRIPS, ANSWER_MB = 300, 128


async def streams() -> tuple[float, float]:
    """(MB/s of an answer, median ms of a message there and back) between two hosts over TCP and noise, one process."""
    one, two = await opened(1, tcp=True), await opened(2, tcp=True)

    async def handler(_author: str, _question: bytes) -> AsyncIterator[bytes]:
        part = os.urandom(1 << 20)
        for _ in range(ANSWER_MB):
            yield part

    async def echo() -> None:
        async for arrival in two.received():
            if isinstance(arrival, Packet):
                await two.send(arrival.author, arrival.data)

    two.serve(handler)
    await one.dial(two.addresses()[0])
    start = time.perf_counter()
    got = 0
    async for part in one.request(two.node, b"all of it"):
        got += len(part)
    speed = got / 1e6 / (time.perf_counter() - start)
    echoing, back, taken = asyncio.create_task(echo()), one.received(), []
    await anext(back)  # the news of the link
    for _ in range(ROUND_TRIPS):
        start = time.perf_counter()
        await one.send(two.node, bytes(100))
        await anext(back)
        taken.append(1000 * (time.perf_counter() - start))
    await one.close()
    await two.close()
    await echoing
    return speed, percentile(taken, 0.5)


def run(_: str) -> list[Figure]:
    """The network, then the stream."""
    figures = network(asyncio.run(grown(100, tcp=True)), 100, "over TCP and noise", 8)
    speed, back = asyncio.run(streams())
    return [
        *figures,
        Figure(
            what="content over a stream between two hosts, TCP and noise, both in one process",
            ours=f"{speed:.0f} MB/s",
            beside=f"a message of 100 bytes there and back: {back:.2f} ms",
            measured=speed,
            goal=at_least(20, "MB/s"),
        ),
    ]
