"""Many nodes in one process, measured: what it costs to open them, what a job costs through them, what a death costs.

    python -m tests.devstack.thousand --nodes 1000 --kill 100

Shards only wait (the fake executor), so that everything measured is the network's. Nothing may be lost or accepted
twice: the journal of node 0 is read while a job runs and after it, by the rules of `storm`; at the end it must hold an
outcome for every shard of every job, and no node that lives may still owe a result.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import resource
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import cast

from bacalhau_node.client import JobView, LocalClient
from bacalhau_node.devstack import Devstack, TransportName, open_devstack
from bacalhau_node.executors.fake import FakeExecutor
from bacalhau_node.journal import SqliteJournal
from bacalhau_node.ports import ShardTask
from bacalhau_node.protocol.events import ComputeRow
from bacalhau_node.spec import Command, JobSpec, Sharding
from tests.devstack.storm import Ledger, Report

ONE_SHARD_JOBS = 10
JOBS = 20
LONGEST = 240.0


def memory() -> float:
    """MB that this process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def open_files() -> int:
    """Files and sockets that this process has open."""
    return len(list(Path("/proc/self/fd").iterdir()))


@dataclass
class Found:
    """What was measured; seconds, MB, counts."""

    nodes: int
    transport: str
    opened: float = 0.0
    all_known: float = 0.0
    least: int = 0
    memory: float = 0.0
    files: int = 0
    threads: int = 0
    idle: float = 0.0
    one_shard: list[float] = field(default_factory=list)
    jobs: float = 0.0
    wide: float = 0.0
    wide_nodes: int = 0
    killed: int = 0
    after_kill: float = 0.0
    again: int = 0
    after_memory: float = 0.0
    lost: list[str] = field(default_factory=list)
    doubled: list[str] = field(default_factory=list)
    owed: int = 0

    def table(self) -> str:
        """For people."""
        rows = {
            "nodes": f"{self.nodes} ({self.transport})",
            "open, node 0 knows all": f"{self.opened:.1f} s",
            "every node knows": f"{self.least} others at least, after {self.all_known:.1f} s",
            "memory": f"{self.memory:.0f} MB, {self.after_memory:.0f} MB after the jobs",
            "open files, threads": f"{self.files}, {self.threads}",
            "idle": f"{100 * self.idle:.1f} % of a core",
            "a one-shard job": f"median {1000 * statistics.median(self.one_shard):.0f} ms,"
            f" worst {1000 * max(self.one_shard):.0f} ms of {len(self.one_shard)}",
            f"{JOBS} jobs of {min(50, self.nodes)} shards at once": f"{self.jobs:.1f} s",
            f"{self.nodes} shards": f"{self.wide:.1f} s on {self.wide_nodes} nodes",
            f"the same, {self.killed} nodes killed": f"{self.after_kill:.1f} s, {self.again} shards tried again",
            "lost": str(len(self.lost)),
            "accepted twice": str(len(self.doubled)),
            "still owed": str(self.owed),
        }
        return "\n".join([*(f"{name:<34} {what}" for name, what in rows.items()), *(self.lost + self.doubled)[:20]])


class Waiting:
    """What shards do: wait for as long as they are told to."""

    seconds = 0.0
    ran: Counter[str]

    def __init__(self) -> None:
        self.ran = Counter()

    async def __call__(self, task: ShardTask, _emit: object) -> int:
        """One shard."""
        self.ran[f"{task.execution.job}/{task.execution.shard}"] += 1
        if self.seconds:
            await asyncio.sleep(self.seconds)
        return task.execution.shard


class Measuring:
    """One devstack under measurement."""

    def __init__(self, found: Found, folder: Path) -> None:
        self.found, self.folder = found, folder
        self.waiting = Waiting()
        self.ledger = Ledger(Report())
        self.views: list[JobView] = []

    async def run(self, *, kill: int) -> None:
        """Open, measure, close, look at the journals."""
        found = self.found
        executor = FakeExecutor(self.waiting, slots=2 * found.nodes, isolation="sandbox")
        began = time.monotonic()
        transport = cast("TransportName", found.transport)
        stack = await open_devstack(found.nodes, root=self.folder, transport=transport, work=executor)
        found.opened = time.monotonic() - began
        say("open", found.opened)
        try:
            await self._settled(stack, began)
            await self._jobs(stack)
            await self._wide(stack, kill)
            found.after_memory = memory()
            await until(lambda: not any(node.engine.running for node in stack.nodes))
            await asyncio.sleep(1)  # the last `Kept` travels
        finally:
            journals = [node.folder.path for node in stack.nodes]
            await stack.close()
        self._judge(journals)

    async def _settled(self, stack: Devstack, began: float) -> None:
        found = self.found
        others = found.nodes - 1
        await until(lambda: all(len(node.membership or ()) >= others for node in stack.nodes), seconds=45)
        found.all_known = time.monotonic() - began
        found.least = min(len(node.membership or ()) for node in stack.nodes)
        found.memory, found.files, found.threads = memory(), open_files(), threading.active_count()
        say("all know all", found.all_known)
        await asyncio.sleep(5)
        busy = time.process_time()
        await asyncio.sleep(5)
        found.idle = (time.process_time() - busy) / 5

    async def _jobs(self, stack: Devstack) -> None:
        client = LocalClient(stack.first)
        for _ in range(ONE_SHARD_JOBS):
            self.found.one_shard.append(await self._job(client, 1))
        say("a one-shard job", statistics.median(self.found.one_shard))
        began = time.monotonic()
        self.waiting.seconds = 0.05
        await asyncio.gather(*(self._job(client, min(50, self.found.nodes)) for _ in range(JOBS)))
        self.found.jobs = time.monotonic() - began
        say(f"{JOBS} jobs", self.found.jobs)

    async def _wide(self, stack: Devstack, kill: int) -> None:
        client, found = LocalClient(stack.first), self.found
        self.waiting.seconds = 0.5
        found.wide = await self._job(client, found.nodes)
        found.wide_nodes = len({shard.node for shard in self.views[-1].shards})
        say(f"{found.nodes} shards", found.wide)
        if not kill:
            return
        self.waiting.seconds = 2.0
        killing = asyncio.create_task(self._kill(stack, kill))
        found.after_kill = await self._job(client, found.nodes)
        found.killed = await killing
        found.again = sum(shard.attempts > 1 for shard in self.views[-1].shards)
        say(f"{found.nodes} shards, {found.killed} nodes killed", found.after_kill)

    async def _kill(self, stack: Devstack, count: int) -> int:
        """End so many nodes at once that have something to do."""

        def busy() -> list[int]:
            return [at for at, node in enumerate(stack.nodes) if at and node.engine.running]

        await until(lambda: len(busy()) >= count)
        chosen = sorted(random.Random(count).sample(busy(), count), reverse=True)  # an index is good until it is used
        await asyncio.gather(*(stack.kill(at) for at in chosen))
        return len(chosen)

    async def _job(self, client: LocalClient, shards: int) -> float:
        """Run one job; the seconds that it took."""
        began = time.monotonic()
        submission = await client.submit(JobSpec(task=Command(argv=("true",)), sharding=Sharding(n=shards)))
        async with asyncio.timeout(LONGEST):
            async for _ in client.updates(submission.job):
                pass
        took = time.monotonic() - began
        self.views.append(await client.job(submission.job))
        self.ledger.read(client.node.folder.path)
        return took

    def _judge(self, journals: list[Path]) -> None:
        found = self.found
        self.ledger.read(journals[0])
        report = self.ledger.report
        found.lost, found.doubled = list(report.lost), list(report.doubled)
        for view in self.views:
            if self.ledger.states.get(view.job) != "Completed":
                found.lost.append(f"{view.job} is {self.ledger.states.get(view.job)}: {view.reason}")
            for shard in view.shards:
                if (view.job, shard.index) not in self.ledger.outcomes:
                    found.lost.append(f"{view.job} shard {shard.index} has no outcome")
        for folder in journals:
            if (folder / "journal.sqlite").exists():
                journal = SqliteJournal(folder / "journal.sqlite")
                found.owed += sum(isinstance(row, ComputeRow) for row in journal.load())
                journal.close()


async def until(condition: Callable[[], object], *, seconds: float = 60) -> None:
    """Wait for it, or for so long."""
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            while not condition():  # noqa: ASYNC110 - it looks at machines, which wake nobody
                await asyncio.sleep(0.05)


def say(what: str, seconds: float) -> None:
    """How far it is."""
    print(
        f"  {what}: {seconds:.2f} s, {memory():.0f} MB, {time.process_time():.1f} s of CPU", file=sys.stderr, flush=True
    )


def measure(nodes: int, *, transport: str = "libp2p", kill: int = 0) -> Found:
    """Measure a devstack of so many nodes in this process."""
    found = Found(nodes, transport)
    with tempfile.TemporaryDirectory(prefix="thousand-") as folder:
        asyncio.run(Measuring(found, Path(folder)).run(kill=kill))
    return found


def main() -> None:
    """Measure from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--nodes", type=int, default=1000)
    parser.add_argument("--kill", type=int, default=0)
    parser.add_argument("--transport", choices=("libp2p", "memory"), default="libp2p")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    print(f"load {os.getloadavg()[0]:.1f}", file=sys.stderr)
    found = measure(asked.nodes, transport=asked.transport, kill=asked.kill)
    print(json.dumps(asdict(found)) if asked.json else found.table())
    sys.exit(bool(found.lost or found.doubled))


if __name__ == "__main__":
    main()
