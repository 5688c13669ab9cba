"""A storm: random SIGKILLs over jobs of many shards, behind a connection that is cut every second.

    python -m tests.devstack.storm [--kills 200] [--shards 200] [--seed 1] [--executor process|sandbox|docker]

One `bacalhau-node serve` runs jobs that a client elsewhere sends and follows through a `Cutter`. Meanwhile SIGKILL
hits, at random moments, the server (which is started again at once, and goes on with its jobs) and whatever it
started: agents, and the sandboxes or containers around them. Jobs follow each other until the kills are used up.

What is shown comes from the journals: after each death of the server, before its next life, and at the end, its
journal is read. A shard that had an outcome once must have the same one, of the same attempt, in every later
reading (else it was *lost* or *accepted twice*), and each value is compared with the one that it must be.
A shard that was itself hit twice fails by the rule of DESIGN section 5: such shards are counted apart, by their error.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import docker

from bacalhau_node.api.server import bind
from bacalhau_node.client import JobView
from bacalhau_node.http_client import HttpClient
from bacalhau_node.ids import JobId
from bacalhau_node.journal import SqliteJournal
from bacalhau_node.protocol.events import JobRow, ShardRow
from bacalhau_node.spec import JobSpec, PythonCell, Sharding
from tests.cutter import Cutter

SERVE = "import sys; sys.argv[0] = 'bacalhau-node'; from bacalhau_node.cli import main; main()"
CELL = "import time\ntime.sleep(0.02 + 0.004 * (shard.index * 7 % 11))\nshard.index * 2_654_435_761 % 1_000_003"
"""A shard of 20 to 60 milliseconds whose value follows from its index."""

LONGEST_JOB = 300.0
LEFT_SECONDS = 30.0


def value(index: int) -> bytes:
    """What shard `index` must give."""
    return str(index * 2_654_435_761 % 1_000_003).encode()


@dataclass
class Report:
    """What a storm did and what came of it."""

    kills: Counter[str] = field(default_factory=Counter)
    jobs: int = 0
    shards: int = 0
    attempts: int = 0
    readings: int = 0
    cuts: int = 0
    hit_twice: int = 0
    lost: list[str] = field(default_factory=list)
    doubled: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def clean(self) -> bool:
        """Whether nothing was lost, doubled, wrong or left."""
        return not (self.lost or self.doubled or self.wrong or self.left)

    def table(self) -> str:
        """The report for people."""
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(self.kills.items()))
        rows = {
            "kills": f"{self.kills.total()} ({kinds})",
            "connections cut": self.cuts,
            "jobs": self.jobs,
            "shards": self.shards,
            "attempts": self.attempts,
            "failed: hit twice": self.hit_twice,
            "journals read": self.readings,
            "lost": len(self.lost),
            "accepted twice": len(self.doubled),
            "wrong values": len(self.wrong),
            "left behind": len(self.left),
            "seconds": f"{self.seconds:.1f}",
        }
        details = [*self.lost, *self.doubled, *self.wrong, *self.left][:20]
        return "\n".join([*(f"{name:<18} {what}" for name, what in rows.items()), *details])


class Ledger:
    """What the journals of one node said so far."""

    def __init__(self, report: Report) -> None:
        self.report = report
        self.outcomes: dict[tuple[JobId, int], tuple[int, str]] = {}
        self.attempts: dict[tuple[JobId, int], int] = {}
        self.states: dict[JobId, str] = {}

    def read(self, folder: Path) -> None:
        """Read a copy of the journal in a node's folder, whether its process lives or has died."""
        with tempfile.TemporaryDirectory() as name:
            copied = None
            while copied != (copied := _stamps(folder)):  # a node that lives may have written meanwhile
                for path in folder.glob("journal.sqlite*"):
                    shutil.copy(path, name)
            journal = SqliteJournal(Path(name) / "journal.sqlite")
            rows = journal.load()
            journal.close()
        self.report.readings += 1
        found = {}
        for row in rows:
            if isinstance(row, JobRow):
                self.states[row.job] = row.state
            elif isinstance(row, ShardRow):
                self.attempts[row.job, row.shard] = row.attempts
                if row.outcome is not None:
                    found[row.job, row.shard] = (row.attempt, row.outcome.record)
        for key, before in self.outcomes.items():
            if key not in found:
                self.report.lost.append(f"{key} had the outcome {before}, and has none")
            elif found[key] != before:
                self.report.doubled.append(f"{key} had the outcome {before}, and has {found[key]}")
        self.outcomes |= found


def _stamps(folder: Path) -> list[tuple[str, int, int]]:
    """What changes with every write to a journal."""
    found = [(path.name, path.stat()) for path in sorted(folder.glob("journal.sqlite*"))]
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in found]


class Server:
    """`bacalhau-node serve`, started again whenever it dies, and what it started."""

    def __init__(self, folder: Path, ledger: Ledger, *, executor: str, docker_host: str | None) -> None:
        self.folder, self.port = folder, _free_port()
        self._ledger = ledger
        hidden = {"PATH": str(Path(sys.executable).parent)} if executor == "process" else {}
        self._docker = docker_host if executor == "docker" else None
        self._environment = {
            **os.environ,
            **hidden,
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "BACALHAU_DIR": str(folder / "data"),
            "TMPDIR": str(folder / "tmp"),
            "DOCKER_HOST": self._docker or f"unix://{folder}/no-daemon",
        }
        (folder / "tmp").mkdir()
        self._executor = executor
        self._process: asyncio.subprocess.Process | None = None
        self.node, self.token = "", ""
        self.up = asyncio.Event()

    async def start(self) -> None:
        """Start it, and wait until it serves."""
        with (self.folder / "log").open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, "-c", SERVE, "serve", "--json", "--api", f"127.0.0.1:{self.port}",
                env=self._environment, stdout=asyncio.subprocess.PIPE, stderr=log,
            )  # fmt: skip
        assert self._process.stdout is not None
        line = await self._process.stdout.readline()
        if line:
            ready = json.loads(line)
            assert ready["executor"].startswith(self._executor), ready
            self.node, self.token = ready["node"], await asyncio.to_thread(Path(ready["token"]).read_text)
            self.up.set()

    async def keep_up(self) -> None:
        """Start it again whenever it has died, after a look at its journal."""
        while True:
            assert self._process is not None
            await self._process.wait()
            self.up.clear()
            if self.node:
                self._ledger.read(self.folder / "data" / "nodes" / self.node)
            await self.start()

    async def stop(self) -> None:
        """End it in peace, and look at its journal once more."""
        assert self._process is not None
        self._process.send_signal(signal.SIGINT)
        await self._process.wait()
        self._ledger.read(self.folder / "data" / "nodes" / self.node)

    def kill(self) -> None:
        """End it, if it still lives."""
        if self._process is not None and self._process.returncode is None:
            self._process.kill()

    def victims(self) -> dict[str, list[int]]:
        """What runs now and may be killed, by kind."""
        assert self._process is not None
        found: dict[str, list[int]] = {"server": [self._process.pid]}
        parents = _parents()
        containers = [pid for pid in self._containers() if pid in parents]
        for pid in _below({self._process.pid, *containers}, parents):
            found.setdefault("sandbox" if _name(pid) == "bwrap" else "agent", []).append(pid)
        return found | ({"container": containers} if containers else {})

    def _containers(self) -> list[int]:
        """The first process of each running container of this node."""
        if self._docker is None or not self.node:
            return []
        with contextlib.closing(docker.APIClient(base_url=self._docker)) as api:
            own = api.containers(filters={"label": f"io.bacalhau-jupyter.node={self.node}"})
            pids = []
            for one in own:
                with contextlib.suppress(docker.errors.NotFound):
                    pids.append(int(api.inspect_container(one["Id"])["State"]["Pid"]))
        return [pid for pid in pids if pid]

    def left_for_good(self) -> list[str]:
        """What is still there once it has had time to go."""
        deadline = time.monotonic() + LEFT_SECONDS
        while (left := list(self._left())) and time.monotonic() < deadline:
            time.sleep(0.1)
        return left

    def _left(self) -> Iterator[str]:
        """What is still there, but for its records, after its end."""
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if str(self.folder).encode() in (process / "environ").read_bytes():
                    yield f"process {process.name} {(process / 'cmdline').read_bytes()[:60]!r}"
        if self._docker is not None:
            with contextlib.closing(docker.APIClient(base_url=self._docker)) as api:
                own = api.containers(all=True, filters={"label": f"io.bacalhau-jupyter.node={self.node}"})
                yield from (f"container {one['Names'][0]}" for one in own)
        yield from (f"mount {line}" for line in _lines("/proc/mounts") if str(self.folder) in line)
        for path in (self.folder / "tmp", self.folder / "data" / "store" / "tmp"):
            yield from (f"file {one}" for one in path.glob("*"))


async def storm(folder: Path, *, kills: int, shards: int, seed: int, executor: str, docker_host: str | None) -> Report:
    """Run jobs and kill until `kills` are used up and the last job has ended."""
    report, began = Report(), time.monotonic()
    ledger = Ledger(report)
    server = Server(folder, ledger, executor=executor, docker_host=docker_host)
    await server.start()
    try:
        jobs, report.cuts = await _stormed(server, report, kills=kills, shards=shards, seed=seed)
        await server.stop()
    finally:
        server.kill()
    report.attempts = sum(ledger.attempts.values())
    report.lost += [f"{job} is not in the journal" for job in jobs if job not in ledger.states]
    report.left = await asyncio.to_thread(server.left_for_good)
    report.seconds = time.monotonic() - began
    return report


async def _stormed(server: Server, report: Report, *, kills: int, shards: int, seed: int) -> tuple[list[JobId], int]:
    """(the jobs that were run, how many connections were cut)."""
    cutter = Cutter(server.port, seconds=1)
    client = HttpClient(await cutter.start(), token=server.token, folder=server.folder / "mine")
    keeping = asyncio.create_task(server.keep_up())
    killing = asyncio.create_task(_kill(server, report, kills=kills, chance=random.Random(seed)))
    jobs = []
    try:
        while not killing.done():
            jobs.append(await _one_job(client, shards))
            _judge(await client.job(jobs[-1]), report)
        await killing
        await server.up.wait()
    finally:
        for task in (keeping, killing):
            task.cancel()
        await client.close()
        await cutter.close()
    return jobs, cutter.cut


async def _one_job(client: HttpClient, shards: int) -> JobId:
    bundle = await client.put_bundle({"cell.py": CELL.encode()})
    submission = await client.submit(JobSpec(task=PythonCell(bundle=bundle), sharding=Sharding(n=shards)))
    async with asyncio.timeout(LONGEST_JOB):
        async for _ in client.updates(submission.job):
            pass
    return submission.job


def _judge(view: JobView, report: Report) -> None:
    """Compare every value of an ended job with what it must be."""
    report.jobs += 1
    report.shards += len(view.shards)
    before = report.hit_twice
    for shard in view.shards:
        outcome = shard.outcome
        if outcome is None:
            report.lost.append(f"{view.job} shard {shard.index} is {shard.state}: {view.reason}")
        elif outcome.error is not None and outcome.error.kind in ("signal", "node"):
            report.hit_twice += 1
        elif outcome.value.blob.inline != value(shard.index):
            report.wrong.append(f"{view.job} shard {shard.index}: {outcome.value.blob.inline!r}, {outcome.error}")
    if view.state != ("Completed" if report.hit_twice == before else "Failed"):
        report.wrong.append(f"{view.job} is {view.state}: {view.reason}")


async def _kill(server: Server, report: Report, *, kills: int, chance: random.Random) -> None:
    """Kill something that runs, at random moments, `kills` times."""
    while report.kills.total() < kills:
        if chance.random() < 0.9:  # else it may be hit while it starts
            await server.up.wait()
        await asyncio.sleep(chance.uniform(0.05, 1.0))
        victims = await asyncio.to_thread(server.victims)
        kind = chance.choice(sorted(victims))
        with contextlib.suppress(ProcessLookupError):
            os.kill(chance.choice(victims[kind]), signal.SIGKILL)
            report.kills[kind] += 1


# --- processes ---


def _parents() -> dict[int, int]:
    """The parent of every process that runs."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state, parent, *_ = (process / "stat").read_text().rpartition(")")[2].split()
            if state != "Z":
                found[int(process.name)] = int(parent)
    return found


def _below(roots: set[int], parents: dict[int, int]) -> list[int]:
    found = set(roots)
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return sorted(found - roots)


def _name(pid: int) -> str:
    return next(iter(_lines(f"/proc/{pid}/comm")), "")


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def _free_port() -> int:
    with bind("127.0.0.1", 0) as bound:
        port: int = bound.getsockname()[1]
        return port


def main() -> None:
    """Run a storm from the command line and print its table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--shards", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--executor", choices=("process", "sandbox", "docker"), default="process")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="storm-") as name:
        Path(name).chmod(0o755)
        report = asyncio.run(storm(Path(name), **vars(asked), docker_host=os.environ.get("DOCKER_HOST")))
        print(report.table())
        if not report.clean:
            print((Path(name) / "log").read_text()[-5000:])
    sys.exit(0 if report.clean else 1)


if __name__ == "__main__":
    main()
