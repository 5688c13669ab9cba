"""What no node expects: random kills, a full disk, many nodes on one data folder, journals of other versions."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from bacalhau_node.client import JobView, LocalClient
from bacalhau_node.errors import ContentError
from bacalhau_node.executors.process import ProcessExecutor
from bacalhau_node.folders import take_folder
from bacalhau_node.http_client import HttpClient
from bacalhau_node.ids import JobId
from bacalhau_node.journal import VERSION
from bacalhau_node.node import open_node
from bacalhau_node.protocol.events import JobChanged, ShardChanged
from bacalhau_node.spec import JobSpec, PythonCell, Sharding
from tests.devstack.storm import Ledger, Report, Server, storm

SECONDS = 60


@contextlib.asynccontextmanager
async def _node(root: Path, work: Path) -> AsyncIterator[LocalClient]:
    client = LocalClient(await open_node(root, executors=[ProcessExecutor(work, slots=2)]))
    try:
        yield client
    finally:
        await client.close()


async def _submitted(client: LocalClient | HttpClient, source: str, shards: int) -> JobId:
    bundle = await client.put_bundle({"cell.py": source.encode()})
    submission = await client.submit(JobSpec(task=PythonCell(bundle=bundle), sharding=Sharding(n=shards)))
    return submission.job


async def _ended(client: LocalClient | HttpClient, job: JobId) -> JobView:
    async with asyncio.timeout(SECONDS):
        async for _ in client.updates(job):
            pass
    return await client.job(job)


def _values(view: JobView) -> list[bytes | None]:
    return [shard.outcome.value.blob.inline if shard.outcome else None for shard in view.shards]


def _expected(count: int) -> list[bytes]:
    return [str(index).encode() for index in range(count)]


@pytest.mark.slow
async def test_in_a_small_storm_nothing_is_lost_doubled_wrong_or_left(tmp_path):
    report = await storm(tmp_path, kills=10, shards=60, seed=1, executor="process", docker_host=None)
    assert report.clean, f"{report.table()}\n{(tmp_path / 'log').read_text()}"
    assert report.kills["server"]
    assert report.kills["agent"]
    assert report.readings > report.kills["server"]
    assert report.shards == 60 * report.jobs


async def test_a_ledger_tells_of_outcomes_that_go_or_change(tmp_path):
    async with _node(tmp_path / "data", tmp_path / "work") as client:
        job = await _submitted(client, "shard.index", 2)
        await _ended(client, job)
        folder = client.node.folder.path
    report = Report()
    ledger = Ledger(report)
    ledger.outcomes = {(job, 0): (1, "another"), (job, 2): (1, "more")}
    ledger.read(folder)
    assert (len(report.doubled), len(report.lost), report.clean) == (1, 1, False)
    report = Report()
    ledger = Ledger(report)
    ledger.read(folder)
    ledger.read(folder)
    assert report.clean
    assert ledger.states == {job: "Completed"}


async def test_two_notebooks_and_a_server_share_a_data_folder_and_leave_each_other_alone(tmp_path):
    root, ledger = tmp_path / "data", Ledger(Report())
    server = Server(tmp_path, ledger, executor="process", docker_host=None)
    source = "import time\ntime.sleep(0.05)\nshard.index"
    await server.start()
    async with _node(root, tmp_path / "one") as one, _node(root, tmp_path / "two") as two:
        elsewhere = HttpClient(f"http://127.0.0.1:{server.port}", token=server.token, folder=root)
        clients = (one, two, elsewhere)
        for _ in range(3):
            jobs = [await _submitted(client, source, 12) for client in clients]
            views = await asyncio.gather(*map(_ended, clients, jobs))
            assert [view.state for view in views] == ["Completed"] * 3
            assert [_values(view) for view in views] == [_expected(12)] * 3
            assert {shard.attempts for view in views for shard in view.shards} == {1}
        running = await _submitted(one, "import time\ntime.sleep(2 * shard.index)\nshard.index", 2)
        async for update in one.updates(running):
            if isinstance(update, ShardChanged) and update.state == "kept":
                break
        async with _node(root, tmp_path / "three") as three:  # opens and closes while the others work
            assert three.interrupted == ()
            assert len({three.node.id, one.node.id, two.node.id, server.node}) == 4
        view = await _ended(one, running)
        assert (view.state, [shard.attempts for shard in view.shards]) == ("Completed", [1, 1])
        assert [len(await client.jobs()) for client in clients] == [4, 3, 3]
        await elsewhere.close()
    await server.stop()
    assert set(ledger.states.values()) == {"Completed"}


@contextlib.contextmanager
def _small_disk(folder: Path) -> Iterator[Path]:
    """A disk of 8 MiB at `folder`."""
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "none", folder], capture_output=True, text=True, check=False
    )
    if made.returncode != 0:
        pytest.skip(f"a small disk can't be mounted here: {made.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def _fill(path: Path) -> None:
    """Take all room that is left."""
    with path.open("ab", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(512)):
            pass


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small disk")
async def test_on_a_full_disk_a_job_waits_and_says_why_and_room_lets_it_go_on(tmp_path):
    source = "import pathlib, time\nwhile not pathlib.Path({go!r}).exists(): time.sleep(0.01)\nshard.index"
    with _small_disk(tmp_path / "disk") as disk:
        async with _node(disk / "data", tmp_path / "work") as client:
            job = await _submitted(client, source.format(go=str(tmp_path / "go")), 6)
            async with asyncio.timeout(SECONDS):
                async for update in client.updates(job):
                    if isinstance(update, ShardChanged) and update.state == "running":
                        break
            _fill(disk / "filler")
            (tmp_path / "go").touch()
            async with asyncio.timeout(SECONDS):
                async for update in client.updates(job):
                    if isinstance(update, JobChanged) and "the node waits" in update.reason:
                        assert "check that its disk has room" in update.reason
                        break
            with pytest.raises(ContentError, match="room"):
                await _submitted(client, "1", 1)
            assert not any(shard.state == "kept" for shard in (await client.job(job)).shards)
            (disk / "filler").unlink()
            view = await _ended(client, job)
            assert (view.state, view.reason, _values(view)) == ("Completed", "", _expected(6))
            assert _values(await _ended(client, await _submitted(client, "shard.index", 3))) == _expected(3)
        async with _node(disk / "data", tmp_path / "work") as client:
            assert client.interrupted == ()
            assert {line.state for line in await client.jobs()} == {"Completed"}


# --- whose journal it is ---


def test_a_node_folder_belongs_to_one_process(tmp_path):
    held = take_folder(tmp_path)
    script = "import sys; from pathlib import Path; from bacalhau_node.folders import take_folder\n"
    script += "folder = take_folder(Path(sys.argv[1])); print(folder.node, folder.is_alive(sys.argv[2]))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", script, str(tmp_path), held.node]
    other = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS, check=True)
    node, alive = other.stdout.split()
    assert (node != held.node, alive) == (True, "True")
    again = take_folder(tmp_path)
    assert again.node == node
    again.close()
    held.close()


@pytest.mark.parametrize("attempt", ["first", "second"])
async def test_a_journal_of_a_newer_version_is_refused_by_name_and_kept_and_the_next_try_says_it_again(
    tmp_path, attempt
):
    async with _node(tmp_path / "data", tmp_path / "work") as client:
        await _ended(client, await _submitted(client, "1", 1))
        path = client.node.folder.path / "journal.sqlite"
    with sqlite3.connect(path) as db:
        db.execute(f"PRAGMA user_version = {VERSION + 1}")
    db.close()
    kept = path.read_bytes()
    for _ in range(1 if attempt == "first" else 2):
        with pytest.raises(ContentError, match=f"has format {VERSION + 1}, .* knows {VERSION}") as refusal:
            await open_node(tmp_path / "data", executors=[ProcessExecutor(tmp_path / "work", slots=2)])
        assert str(path) in str(refusal.value)
    assert path.read_bytes() == kept
    assert len(list((tmp_path / "data" / "nodes").iterdir())) == 1
