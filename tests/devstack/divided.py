"""Nodes of four processes, and a partition between two and two of them while jobs of both sides run.

    python -m tests.devstack.divided [--nodes 25] [--seconds 30]

Each process is a devstack of so many nodes in a network namespace of its own, which all have a cable to one of two
bridges. The **trunk** is the cable between the bridges: while it is pulled, whatever is sent to the other side
vanishes, and nobody is told. So nodes find it out as they do in a network: nothing is answered any more.

Before, during and after it node 0 of each process is given jobs of 100 shards that wait for a second each. What is
shown comes from the journals of these four, which are read again and again, by the rules of `storm`: no shard may lose
the outcome that it had, get another one, or have none at the end, and no node may still owe a result. It needs root on
Linux, and leaves nothing behind: the namespaces and mounts are its own.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from bacalhau_node.ids import JobId, NodeId
from bacalhau_node.journal import SqliteJournal
from bacalhau_node.protocol.events import ComputeRow
from tests.devstack.storm import Ledger, Report
from tests.devstack.test_links import Process

SHARDS: Final = 100
SIDES: Final = (0, 0, 1, 1)
"""On which side of the trunk each process is."""

EVERY: Final = 5.0
"""Seconds between two rounds of jobs, one for each process."""

PATIENCE: Final = 600.0
INSIDE: Final = "--inside"


class Cables:
    """Namespaces, bridges and the cables between them, in a network and mount namespace that is this process's own."""

    def __init__(self) -> None:
        _run("mount -t tmpfs none /run")  # `ip netns` writes there
        for side in (0, 1):
            _run(f"ip link add side{side} type bridge", f"ip link set side{side} up")
        _run("ip link add trunk0 type veth peer name trunk1", "ip link set trunk0 up", "ip link set trunk1 up")
        for number, side in enumerate(SIDES):
            space = f"p{number}"
            _run(
                f"ip netns add {space}",
                f"ip link add {space} type veth peer name eth0 netns {space}",
                f"ip link set {space} master side{side} up",
                f"ip -n {space} addr add {self.address(number)}/24 dev eth0",
                f"ip -n {space} link set eth0 up",
                f"ip -n {space} link set lo up",
            )
        self.join()

    def address(self, number: int) -> str:
        """The address of a process."""
        return f"10.11.12.{number + 1}"

    def into(self, number: int) -> tuple[str, ...]:
        """The beginning of a command that runs in the namespace of a process."""
        return "ip", "netns", "exec", f"p{number}"

    def divide(self) -> None:
        """Pull the trunk out of both bridges: frames for the other side go nowhere."""
        for side in (0, 1):
            _run(f"ip link set trunk{side} nomaster")

    def join(self) -> None:
        """Put it back."""
        for side in (0, 1):
            _run(f"ip link set trunk{side} master side{side}")


def _run(*commands: str) -> None:
    for command in commands:
        subprocess.run(command.split(), check=True)


@dataclass
class Job:
    """A job: who asked for it, when (seconds since the partition began), and what came of it."""

    asker: int
    id: JobId
    at: float
    state: str = ""
    took: float = 0.0
    nodes: set[NodeId] = field(default_factory=set)


@dataclass
class Found:
    """What was measured; seconds and counts."""

    nodes: int
    divided: float
    opened: float = 0.0
    whole_again: float = 0.0
    jobs: list[Job] = field(default_factory=list)
    offers: int = 0
    readings: int = 0
    both_before: int = 0
    both_after: int = 0
    lost: list[str] = field(default_factory=list)
    doubled: list[str] = field(default_factory=list)
    owed: int = 0

    @property
    def clean(self) -> bool:
        """Whether nothing was lost, doubled or left."""
        return not (self.lost or self.doubled or self.owed)

    def table(self) -> str:
        """For people."""
        before = [job for job in self.jobs if job.at < 0]
        during = [job for job in self.jobs if 0 <= job.at < self.divided]
        after = [job for job in self.jobs if job.at >= self.divided]
        shards = SHARDS * len(self.jobs)
        rows = {
            "nodes": f"{self.nodes} in {len(SIDES)} processes, two on each side; all known after {self.opened:.1f} s",
            "partition": f"{self.divided:.0f} s; all know all again {self.whole_again:.1f} s after its end",
            f"jobs of {SHARDS} shards": f"{len(before)} running when it began, {len(during)} begun meanwhile,"
            f" {len(after)} after it; {sum(job.state == 'Completed' for job in self.jobs)} completed",
            "longest job": ", ".join(
                f"{name} {max(job.took for job in some):.1f} s"
                for name, some in (("before", before), ("meanwhile", during), ("after", after))
                if some
            ),
            "nodes of both sides used": f"by {self.both_before} jobs before, {self.both_after} after",
            "shards, offers": f"{shards:,}, {self.offers:,}",
            "journals read": str(self.readings),
            "lost": str(len(self.lost)),
            "accepted twice": str(len(self.doubled)),
            "still owed": str(self.owed),
        }
        return "\n".join([*(f"{name:<26} {what}" for name, what in rows.items()), *(self.lost + self.doubled)[:20]])


class Division:
    """Four devstacks, and what happens to them."""

    def __init__(self, folder: Path, nodes: int, seconds: float) -> None:
        self.cables = Cables()
        self.found = Found(nodes * len(SIDES), seconds)
        self._nodes, self._folder = nodes, folder
        self._ledgers = [Ledger(Report()) for _ in SIDES]
        self._processes: list[Process] = []
        self._began = 0.0

    async def run(self) -> Found:
        """Open, divide, join, judge."""
        began = time.monotonic()
        try:
            await self._open()
            self.found.opened = time.monotonic() - began
            await self._divided()
        finally:
            for process in self._processes:
                await process.kill()
        await asyncio.to_thread(self._judge)
        return self.found

    async def _open(self) -> None:
        for number in range(len(SIDES)):
            listen = f"/ip4/{self.cables.address(number)}/tcp/0"
            words = ("--nodes", str(self._nodes), "--slots", str(self._nodes), "--seconds", "1.0", "--listen", listen)
            peer = ("--peer", self._processes[0].address) if self._processes else ()
            process = Process(self._folder / f"{number}", *words, *peer, through=self.cables.into(number))
            self._processes.append(process)
            await process.start()
        await self._all_known()

    async def _all_known(self) -> None:
        others = self.found.nodes - 1
        async with asyncio.timeout(PATIENCE):
            await asyncio.gather(*(process.knows(others) for process in self._processes))

    async def _divided(self) -> None:
        """Jobs before, during and after it."""
        seconds = self.found.divided
        reading = asyncio.create_task(self._read_on())
        async with asyncio.TaskGroup() as jobs:
            self._began = time.monotonic() + EVERY
            await self._round(jobs)
            await self._until(0)
            self.cables.divide()
            say("divided")
            while self._now() < seconds - EVERY / 2:
                await self._round(jobs)
                await self._until(min(seconds, self._now() + EVERY))
            self.cables.join()
            say("whole")
        say("all jobs over")
        await self._all_known()
        self.found.whole_again = self._now() - seconds
        async with asyncio.TaskGroup() as jobs:
            await self._round(jobs)
        reading.cancel()
        await asyncio.sleep(EVERY)  # the last `Kept` travels

    async def _round(self, jobs: asyncio.TaskGroup) -> None:
        """A job for each process."""
        for number in range(len(SIDES)):
            at = self._now()
            job = Job(number, await self._processes[number].submit(SHARDS), at)
            self.found.jobs.append(job)
            jobs.create_task(self._end(job))

    async def _end(self, job: Job) -> None:
        end = await self._processes[job.asker].end_of(job.id, seconds=PATIENCE)
        job.state, job.took, job.nodes = end["state"], self._now() - job.at, set(end["nodes"])

    async def _read_on(self) -> None:
        while True:
            await asyncio.sleep(EVERY / 2)
            await asyncio.to_thread(self._read)

    def _read(self) -> None:
        for ledger, process in zip(self._ledgers, self._processes, strict=True):
            ledger.read(process.journal)

    def _now(self) -> float:
        return time.monotonic() - self._began

    async def _until(self, moment: float) -> None:
        await asyncio.sleep(max(0.0, moment - self._now()))

    def _judge(self) -> None:
        found = self.found
        self._read()
        for ledger in self._ledgers:
            found.lost += ledger.report.lost
            found.doubled += ledger.report.doubled
            found.readings += ledger.report.readings
            found.offers += sum(ledger.attempts.values())
        sides = [
            set().union(*(one.nodes for one, at in zip(self._processes, SIDES, strict=True) if at == side))
            for side in (0, 1)
        ]
        for job in found.jobs:
            outcomes = self._ledgers[job.asker].outcomes
            missing = [shard for shard in range(SHARDS) if (job.id, shard) not in outcomes]
            found.lost += [f"{job.id} is {job.state}"] if job.state != "Completed" else []
            found.lost += [f"{job.id} shard {shard} has no outcome" for shard in missing]
            both = all(job.nodes & side for side in sides)
            found.both_before += both and job.at < 0
            found.both_after += both and job.at >= found.divided
        found.owed = sum(map(_owed, self._folder.glob("*/*/nodes/*/journal.sqlite")))


def _owed(path: Path) -> int:
    journal = SqliteJournal(path)
    rows = journal.load()
    journal.close()
    return sum(isinstance(row, ComputeRow) for row in rows)


def say(what: str) -> None:
    """How far it is."""
    print(f"  {time.strftime('%X')} {what}", file=sys.stderr, flush=True)


def measure(nodes: int, seconds: float) -> Found:
    """Divide four devstacks of so many nodes for so long; in namespaces of this process's own."""
    with tempfile.TemporaryDirectory(prefix="divided-") as folder:
        return asyncio.run(Division(Path(folder), nodes, seconds).run())


def main() -> None:
    """Divide from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--nodes", type=int, default=25)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument(INSIDE, action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if not asked.inside:
        own = (sys.executable, "-m", "tests.devstack.divided", *sys.argv[1:], INSIDE)
        os.execvp("unshare", ("unshare", "--net", "--mount", *own))
    with suppress(KeyboardInterrupt):
        found = measure(asked.nodes, asked.seconds)
        print(found.table())
        sys.exit(not found.clean)


if __name__ == "__main__":
    main()
