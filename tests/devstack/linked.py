"""One node on a network, or a devstack, in a process of its own, for tests that break what is between processes.

    python -m tests.devstack.linked FOLDER [--listen MULTIADDR] [--announce MULTIADDR] [--peer MULTIADDR] [--slots N]

It says what happens as JSON lines: `{"ready": ID, …}`, then for each line `N` on its standard input `{"job": ID}` for a
new job of N shards, and `{"ended": ID, "state": …}`, also for jobs of an earlier life; a shard only waits. An empty
line is answered by `{"known": N}`, the nodes that are known, and `graph` by `{"graph": …}`, the network as they see it.
With `--hurry` all times after which something counts as lost are a tenth of what they are, or so. It tells its log on
stderr.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec

from bacalhau_node import devstack, engine
from bacalhau_node.client import LocalClient
from bacalhau_node.errors import BacalhauError
from bacalhau_node.executors.fake import FakeExecutor
from bacalhau_node.ids import JobId
from bacalhau_node.network import NetworkSettings, over_libp2p
from bacalhau_node.node import Node, open_node
from bacalhau_node.ports import ShardTask
from bacalhau_node.protocol import circle, compute, doors, placement, watch
from bacalhau_node.protocol.events import FINAL_JOB
from bacalhau_node.serve import start_logging
from bacalhau_node.spec import Command, JobSpec, Sharding
from bacalhau_node.transports.libp2p import LibP2PTransport

LEASE = 1.5


def hurry() -> None:
    """Lose patience ten times as fast."""
    for module in (engine, placement, watch, compute):
        module.LEASE = LEASE  # type: ignore[attr-defined]
    watch.LEASE_CHECK = compute.HEARTBEAT = LEASE / 3  # type: ignore[misc]
    circle.PATIENCE, circle.UNDIALABLE = 1.0, 12.0  # type: ignore[misc]
    doors.FIRST, doors.LAST_ALONE = 0.3, 1.5  # type: ignore[misc]


def tell(**what: object) -> None:
    """Say what has happened."""
    print(json.dumps(what), flush=True)


async def opened(asked: argparse.Namespace, executor: FakeExecutor) -> list[Node]:
    """The nodes of this process."""
    if asked.announce:  # a proxy in front of it: nobody should find the way around
        real = LibP2PTransport.open

        async def behind(seed: bytes, **more: Any) -> LibP2PTransport:
            transport = await real(seed, **more)
            transport._addresses = (f"{asked.announce}/p2p/{transport.node}",)
            return transport

        LibP2PTransport.open = behind  # type: ignore[method-assign]
    if asked.nodes > 1:
        if asked.listen:
            devstack.LISTEN = asked.listen[0]  # type: ignore[misc]
        stack = await devstack.open_devstack(asked.nodes, root=asked.folder, work=executor, peers=asked.peer)
        return stack.nodes
    network = NetworkSettings(
        open=over_libp2p(listen=tuple(asked.listen), network_key=asked.network_key, in_process=False),
        peers=tuple(asked.peer),
    )
    return [await open_node(asked.folder, executors=[executor], network=network)]


async def run(asked: argparse.Namespace) -> None:
    """Be a node until stdin ends."""

    async def wait(_task: ShardTask, _emit: object) -> str:
        await asyncio.sleep(asked.seconds)
        return "done"

    executor = FakeExecutor(wait, slots=asked.slots, isolation="sandbox") if asked.slots else FakeExecutor(refusal="no")
    stack = await opened(asked, executor)
    node = stack[0]
    client = LocalClient(node)
    tell(
        ready=node.id,
        folder=str(node.folder.path),
        nodes=[one.id for one in stack],
        address=next(iter(node.addresses()), ""),
    )

    async def watched(job: JobId) -> None:
        async for _ in client.updates(job):
            pass
        view = await client.job(job)
        nodes = sorted({shard.node or "" for shard in view.shards})
        tell(ended=job, state=view.state, reason=view.reason, nodes=nodes)

    async with asyncio.TaskGroup() as group:
        for line in await client.jobs():
            if line.state not in FINAL_JOB:
                group.create_task(watched(line.job))
        async for count in _lines():
            if not count:
                tell(known=len(node.membership or ()))
                continue
            if count == "graph":
                tell(graph=msgspec.to_builtins(await client.network()))
                continue
            spec = JobSpec(task=Command(argv=("true",)), sharding=Sharding(n=int(count)))
            job = (await client.submit(spec)).job
            tell(job=job)
            group.create_task(watched(job))
    for one in stack:
        await one.close()


async def _lines() -> AsyncIterator[str]:
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := await reader.readline():
        yield line.decode().strip()


def main() -> int:
    """Run it from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--listen", action="append", default=[])
    parser.add_argument("--announce", default="")
    parser.add_argument("--peer", action="append", default=[])
    parser.add_argument("--network-key", default="")
    parser.add_argument("--slots", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=0.05)
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--hurry", action="store_true")
    asked = parser.parse_args()
    start_logging(as_json=False)
    if asked.hurry:
        hurry()
    try:
        asyncio.run(run(asked))
    except BacalhauError as error:
        tell(error=str(error))
        return 1
    return 0


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
