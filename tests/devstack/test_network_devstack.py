"""Devstacks: many nodes in one process; killed ones, hostile ones, two devstacks that peer."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from bacalhau_node.client import JobView, LocalClient
from bacalhau_node.devstack import BAD, Devstack, open_devstack
from bacalhau_node.errors import SpecError
from bacalhau_node.journal import SqliteJournal
from bacalhau_node.protocol import watch
from bacalhau_node.protocol.events import JobRow, Row, ShardRow
from bacalhau_node.spec import Command, JobSpec, PythonCell, Sharding


def a_command(**fields: Any) -> JobSpec:
    return JobSpec(task=Command(argv=("true",)), **fields)


async def run(stack: Devstack, spec: JobSpec) -> JobView:
    client = LocalClient(stack.first)
    submission = await client.submit(spec)
    async with asyncio.timeout(90):
        async for _ in client.updates(submission.job):
            pass
    return await client.job(submission.job)


@asynccontextmanager
async def devstack(nodes: int, root: Path, **more: Any) -> AsyncIterator[Devstack]:
    stack = await open_devstack(nodes, root=root, **{"transport": "memory", "work": "fake", **more})
    try:
        yield stack
    finally:
        await stack.close()


async def test_a_cell_runs_on_every_node_of_a_devstack_with_the_machines_own_executors(tmp_path: Path) -> None:
    """The executors are shared; each node has an identity, a store and a journal of its own."""
    async with devstack(3, tmp_path, work="real") as stack:
        bundle = await LocalClient(stack.first).put_bundle({"cell.py": b"import time\ntime.sleep(0.2)\nshard.index"})
        view = await run(stack, JobSpec(task=PythonCell(bundle=bundle), sharding=Sharding(n=9)))
        assert view.state == "Completed"
        assert [shard.outcome.value.blob.inline for shard in view.shards if shard.outcome] == [
            str(index).encode() for index in range(9)
        ]
        assert {shard.node for shard in view.shards} == {node.id for node in stack.nodes}
        graph = await LocalClient(stack.first).network()
        assert {dot.id for dot in graph.nodes} == {node.id for node in stack.nodes}
        assert len(await LocalClient(stack.first).nodes()) == 3


async def test_shards_of_killed_nodes_are_neither_lost_nor_doubled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the journals of all nodes, those of the dead ones included."""
    monkeypatch.setattr(watch, "LEASE", 6.0)
    async with devstack(8, tmp_path) as stack:
        client = LocalClient(stack.first)
        jobs = [(await client.submit(a_command(sharding=Sharding(n=60)))).job for _ in range(3)]
        for _ in range(2):
            await stack.kill(len(stack.nodes) - 1)
        jobs.append((await client.submit(a_command(sharding=Sharding(n=60)))).job)
        async with asyncio.timeout(90):
            for job in jobs:
                async for _ in client.updates(job):
                    pass
        assert {(await client.job(job)).state for job in jobs} == {"Completed"}
    rows = await asyncio.to_thread(_journaled, tmp_path)
    accepted = Counter((row.job, row.shard) for row in rows if isinstance(row, ShardRow) and row.state == "kept")
    assert accepted == Counter({(job, shard): 1 for job in jobs for shard in range(60)})
    assert all(row.state == "Completed" for row in rows if isinstance(row, JobRow))


def _journaled(root: Path) -> list[Row]:
    """The rows of all journals below `root`."""
    rows: list[Row] = []
    for path in sorted(root.glob("0*/nodes/*/journal.sqlite")):
        journal = SqliteJournal(path)
        rows += journal.load()
        journal.close()
    return rows


async def test_bad_actors_of_a_devstack_are_outvoted(tmp_path: Path) -> None:
    """The first kind answers wrongly; it is labelled, named and avoided."""
    async with devstack(4, tmp_path, bad_actors=1) as stack:
        bad = stack.nodes[3]
        membership = stack.first.membership
        assert membership is not None
        labels = {entry.record.node: entry.record.labels for entry in membership.entries(0.0)}
        assert labels[bad.id][BAD] == "answers wrongly"
        named: set[str] = set()
        for _ in range(20):  # a wrong answer that comes after two good ones is not looked at
            view = await run(stack, a_command(replicas=3, agree=2, sharding=Sharding(n=12)))
            assert view.state == "Completed"
            named = {node for shard in view.shards for node in shard.disagreed}
            if named:
                break
        assert named == {bad.id}
        assert not any(shard.outcome and shard.outcome.value.blob.inline for shard in view.shards)


@pytest.mark.parametrize(("nodes", "how"), [(3, "boasts of slots"), (5, "takes and never runs")])
async def test_a_node_that_lies_about_its_capacity_or_never_runs_costs_time_and_no_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nodes: int, how: str
) -> None:
    """The last node of the devstack; what it sits on is tried elsewhere, and each shard counts once."""
    monkeypatch.setattr(watch, "LATE_START", 1.0)
    async with devstack(nodes, tmp_path, bad_actors=1) as stack:
        assert stack.first.membership is not None
        labels = {entry.record.node: entry.record.labels for entry in stack.first.membership.entries(0.0)}
        assert labels[stack.nodes[-1].id][BAD] == how
        view = await run(stack, a_command(sharding=Sharding(n=60)))
        assert view.state == "Completed"
    rows = await asyncio.to_thread(_journaled, tmp_path)
    accepted = Counter(row.shard for row in rows if isinstance(row, ShardRow) and row.state == "kept")
    assert accepted == Counter(range(60))


@pytest.mark.parametrize(("nodes", "bad"), [(0, 0), (2, 2), (10_001, 0)])
async def test_a_devstack_that_cannot_be_is_refused(tmp_path: Path, nodes: int, bad: int) -> None:
    with pytest.raises(SpecError, match="node 0 is a good one"):
        await open_devstack(nodes, root=tmp_path, transport="memory", bad_actors=bad)


MAIN = "import sys; sys.argv[0] = 'bacalhau-node'; from bacalhau_node.cli import main; main()"


class Program:
    """`bacalhau-node` in a process of its own."""

    def __init__(self, folder: Path) -> None:
        self.environment = {**os.environ, "BACALHAU_DIR": str(folder), "PYTHONPATH": os.pathsep.join(sys.path)}

    async def start(self, *arguments: str) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", MAIN, *arguments),
            env=self.environment,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )

    async def ask(self, *arguments: str) -> Any:
        process = await self.start(*arguments)
        out, err = await process.communicate()
        assert process.returncode == 0, err.decode()
        return json.loads(out.decode().splitlines()[-1])


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


async def test_two_devstacks_peer_and_a_job_of_one_runs_on_nodes_of_both(tmp_path: Path) -> None:
    """Over libp2p, TCP and noise, by one --peer; SIGTERM ends them cleanly."""
    one, two = Program(tmp_path / "one"), Program(tmp_path / "two")
    network = tmp_path / "key"
    network.write_text("only for this test")
    common = ("devstack", "--nodes", "3", "--simulate", "--json", "--network-key", str(network))
    async with asyncio.timeout(120):
        first = await one.start(*common, "--api", f"127.0.0.1:{_free_port()}")
        ready = json.loads(await first.stdout.readline())  # type: ignore[union-attr]
        assert set(ready) == {"api", "peer", "nodes", "seconds"}
        second = await two.start(*common, "--api", f"127.0.0.1:{_free_port()}", "--peer", ready["peer"])
        json.loads(await second.stdout.readline())  # type: ignore[union-attr]
        while len(await two.ask("nodes", "--json")) < 6:
            pass
        (tmp_path / "cell.py").write_text("1")
        job = await two.ask("run", str(tmp_path / "cell.py"), "--shards", "60", "--json")
        assert job["state"] == "Completed"
        here = {dot["id"] for dot in (await two.ask("network", "--json"))["nodes"]}
        used = {shard["node"] for shard in job["shards"]}
        assert used <= here
        assert len(used) > 3, "nodes of both work"
        for process in (second, first):
            process.send_signal(signal.SIGTERM)
            _, err = await process.communicate()
            assert process.returncode == 0, err.decode()
            assert b"Traceback" not in err
