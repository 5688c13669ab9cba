"""Protocol, engine and journal alone: a thousand shards over an executor that does nothing."""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from bacalhau_node.client import JobChanged, LocalClient
from bacalhau_node.ids import JobId
from bacalhau_node.node import open_node
from bacalhau_node.ports import Capabilities, ExecutorEvent, RawOutcome, RawValue, ShardStarted, ShardTask
from bacalhau_node.spec import Command, JobSpec, Sharding
from tests.bench.harness import WORKERS, Figure, at_most

TITLE = "protocol, engine, journal"
EXECUTORS = ("local",)
COUNT = 1000
TIMES = 5


class Instant:
    """An executor whose shards are over as soon as they have started."""

    async def probe(self) -> Capabilities:
        """Always there."""
        return Capabilities(
            executor="instant", isolation="none", slots=WORKERS, memory_per_slot=2**30, python="", versions={}
        )

    def check(self, _: JobSpec) -> str | None:
        """Anything may run."""
        return None

    async def run(self, task: ShardTask, emit: Callable[[ExecutorEvent], None]) -> RawOutcome:
        """The shard's number, at once."""
        emit(ShardStarted())
        return RawOutcome(ok=True, value=RawValue(kind="json", type="int", data=b"%d" % task.execution.shard))

    async def release(self, job: JobId) -> None:
        """Nothing is held."""

    async def close(self) -> None:
        """Nothing was started."""


async def thousand(client: LocalClient) -> float:
    """Seconds from submission until the client has heard that all is kept."""
    spec = JobSpec(task=Command(argv=("true",)), sharding=Sharding(by="count", n=COUNT))
    start = time.perf_counter()
    submission = await client.submit(spec)
    last = [update async for update in client.updates(submission.job)][-1]
    seconds = time.perf_counter() - start
    assert isinstance(last, JobChanged), last
    assert last.state == "Completed", last
    return seconds


async def measure() -> float:
    """The median of a few jobs on one node, with its store and journal on disk."""
    with tempfile.TemporaryDirectory() as folder:
        client = LocalClient(await open_node(Path(folder), executors=[Instant()]))
        try:
            return statistics.median([await thousand(client) for _ in range(TIMES)])
        finally:
            await client.close()


def run(_: str) -> list[Figure]:
    """One figure."""
    milliseconds = 1000 * asyncio.run(measure())
    return [
        Figure(
            what="protocol, engine, journal: 1,000 shards that do nothing",
            ours=f"{milliseconds:.0f} ms",
            beside="",
            measured=milliseconds,
            goal=at_most(250, "ms"),
        )
    ]
