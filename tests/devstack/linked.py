"""One node on a network in a process of its own, for tests that break what is between processes.

    python -m tests.devstack.linked FOLDER [--listen MULTIADDR] [--announce MULTIADDR] [--peer MULTIADDR] [--slots N]

It says what happens as JSON lines: `{"ready": ID, "addresses": […]}`, then for each line `N` on its standard input
`{"job": ID}` for a new job of N shards, and `{"ended": ID, "state": …}`, also for jobs of an earlier life. A shard only
waits. All times after which something counts as lost are a seventh of what they are, or so. It tells its log on stderr.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path

from bacalhau_node import engine
from bacalhau_node.client import LocalClient
from bacalhau_node.errors import BacalhauError
from bacalhau_node.executors.fake import FakeExecutor
from bacalhau_node.identity import Identity
from bacalhau_node.ids import JobId
from bacalhau_node.network import NetworkSettings
from bacalhau_node.node import open_node
from bacalhau_node.ports import ShardTask, Transport
from bacalhau_node.protocol import circle, compute, doors, placement, watch
from bacalhau_node.protocol.events import FINAL_JOB
from bacalhau_node.serve import start_logging
from bacalhau_node.spec import Command, JobSpec, Sharding
from bacalhau_node.transports.libp2p import LibP2PTransport

LEASE = 2.0


def hurry() -> None:
    """Lose patience seven times as fast."""
    for module in (engine, placement, watch, compute):
        module.LEASE = LEASE  # type: ignore[attr-defined]
    watch.LEASE_CHECK = compute.HEARTBEAT = LEASE / 3  # type: ignore[misc]
    circle.PATIENCE, circle.UNDIALABLE = 1.5, 20.0  # type: ignore[misc]
    doors.FIRST, doors.LAST_ALONE = 0.4, 2.0  # type: ignore[misc]


def tell(**what: object) -> None:
    """Say what has happened."""
    print(json.dumps(what), flush=True)


async def run(asked: argparse.Namespace) -> None:
    """Be a node until stdin ends."""

    async def opened(identity: Identity) -> Transport:
        transport = await LibP2PTransport.open(
            identity.seed, listen=asked.listen, network_key=asked.network_key, in_process=False
        )
        if asked.announce:  # a proxy in front of it: nobody should find the way around
            transport._addresses = (f"{asked.announce}/p2p/{identity.node}",)
        return transport

    async def wait(_task: ShardTask, _emit: object) -> str:
        await asyncio.sleep(asked.seconds)
        return "done"

    executor = FakeExecutor(wait, slots=asked.slots, isolation="sandbox") if asked.slots else FakeExecutor(refusal="no")
    network = NetworkSettings(open=opened, peers=tuple(asked.peer))
    node = await open_node(asked.folder, executors=[executor], network=network)
    client = LocalClient(node)
    tell(ready=node.id, addresses=list(node.addresses()), folder=str(node.folder.path))

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
            spec = JobSpec(task=Command(argv=("true",)), sharding=Sharding(n=int(count)))
            job = (await client.submit(spec)).job
            tell(job=job)
            group.create_task(watched(job))
    await client.close()


async def _lines() -> AsyncIterator[str]:
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := (await reader.readline()).decode().strip():
        yield line


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
    start_logging(as_json=False)
    hurry()
    try:
        asyncio.run(run(parser.parse_args()))
    except BacalhauError as error:
        tell(error=str(error))
        return 1
    return 0


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
