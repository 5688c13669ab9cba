"""What a node forgets of jobs that ended: those beyond a number and an age, in memory and on the disk."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from bacalhau_node import retention
from bacalhau_node.client import JobView, LocalClient, ShardText
from bacalhau_node.content.blocks import BlockStore
from bacalhau_node.errors import ContentError, SpecError
from bacalhau_node.executors.process import ProcessExecutor
from bacalhau_node.node import open_node
from bacalhau_node.spec import Command, InputSource, JobSpec, PythonCell, Sharding


async def _open(root: Path) -> LocalClient:
    return LocalClient(await open_node(root, executors=[ProcessExecutor(root / "process", slots=2)], serving="x:1"))


@pytest.fixture
async def client(tmp_path: Path) -> AsyncIterator[LocalClient]:
    client = await _open(tmp_path)
    yield client
    await client.close()


async def _ended(client: LocalClient, shell: str) -> JobView:
    submission = await client.submit(JobSpec(task=Command(shell=shell), sharding=Sharding(n=2)))
    async for _ in client.updates(submission.job):
        pass
    return await client.job(submission.job)


async def _text(client: LocalClient, job: str) -> str:
    return "".join([update.text async for update in client.updates(job) if isinstance(update, ShardText)])


def _pins(client: LocalClient, view: JobView) -> list[int]:
    records = [shard.outcome.record for shard in view.shards if shard.outcome]
    return [client.node.content.pins(cid) for cid in (view.cid, *records)]


async def test_only_so_many_ended_jobs_are_remembered(tmp_path, monkeypatch):
    monkeypatch.setattr(retention, "KEPT_JOBS", 2)
    client = await _open(tmp_path)
    views = [await _ended(client, f"echo {number}; exit $BACALHAU_PARTITION_INDEX") for number in range(4)]
    latest = views[-1]
    assert [line.job for line in await client.jobs()] == [view.job for view in reversed(views[1:])]
    with pytest.raises(SpecError, match="knows no job"):
        await client.job(views[0].job)
    assert (_pins(client, views[0]), _pins(client, latest)) == ([0, 0, 0], [1, 1, 1])
    await client.close()
    client = await _open(tmp_path)
    assert [line.job for line in await client.jobs()] == [view.job for view in reversed(views[2:])]
    assert await client.job(latest.job) == latest
    await client.close()


async def test_ended_jobs_are_forgotten_with_age_and_running_ones_never(client):
    old = await _ended(client, "echo old")
    running = await client.submit(JobSpec(task=Command(shell="echo on; sleep 1000")))
    await client.node.forget_old_jobs(time.time() + retention.KEPT_SECONDS - 60)
    assert len(await client.jobs()) == 2
    await client.node.forget_old_jobs(time.time() + retention.KEPT_SECONDS + 60)
    assert [line.job for line in await client.jobs()] == [running.job]
    assert _pins(client, old) == [0, 0, 0]
    await client.cancel(running.job)


async def test_the_text_of_older_jobs_is_in_their_records_only(client, monkeypatch):
    monkeypatch.setattr(retention, "KEPT_TEXTS", 1)
    first, second = [await _ended(client, f"echo text {number}") for number in range(2)]
    await client.node.forget_old_jobs(time.time())
    assert await _text(client, first.job) == ""
    assert await _text(client, second.job) == "text 1\n" * 2
    assert first.shards[0].outcome is not None
    assert first.shards[0].outcome.stdout.inline == b"text 0\n"


# --- what jobs keep in the content store ---


def _collect(client: LocalClient) -> None:
    """As if hours had passed since anything was used, and the store were full."""
    content = client.node.content
    assert isinstance(content, BlockStore)
    content.flush()
    with contextlib.closing(sqlite3.connect(content.folder / "index.sqlite", timeout=20)) as database, database:
        database.execute("UPDATE block SET used = used - 100000")
    content.collect()


async def _running(client: LocalClient, spec: JobSpec) -> str:
    """A job whose first shard has printed something."""
    submission = await client.submit(spec)
    async for update in client.updates(submission.job):
        if isinstance(update, ShardText):
            break
    return submission.job


async def test_a_job_keeps_its_plan_bundle_inputs_and_results_through_collections(client, tmp_path):
    for name in ("a", "b"):
        (tmp_path / "in" / name).mkdir(parents=True)
        (tmp_path / "in" / name / "data").write_bytes(name.encode() * 10_000)
    content, go = client.node.content, tmp_path / "go"
    cid, other = (content.add_path(tmp_path / "in" / name) for name in ("a", "b"))
    shell = f"echo started; until [ -e {go} ]; do sleep 0.01; done; echo over"
    spec = JobSpec(
        task=Command(shell=shell), inputs=(InputSource(source=f"ipfs://{cid}"),), sharding=Sharding(n=1), retries=0
    )
    job = await _running(client, spec)
    plan = client.node.engine.feeds[job].row.plan
    await asyncio.to_thread(_collect, client)
    assert (content.has(plan), content.has(cid), content.has(other)) == (True, True, False)
    go.touch()
    async for _ in client.updates(job):
        pass
    view = await client.job(job)
    assert view.state == "Completed"
    await asyncio.to_thread(_collect, client)
    assert (content.has(plan), content.has(cid)) == (True, False)
    assert content.has(view.cid)
    assert content.has(view.shards[0].outcome.record)
    await client.node.forget_old_jobs(time.time() + retention.KEPT_SECONDS + 60)
    await asyncio.to_thread(_collect, client)
    assert not any(map(content.has, (plan, view.cid, view.shards[0].outcome.record)))
    assert content.owners() == []


async def test_a_cell_and_inputs_that_were_pinned_stay_until_the_job_is_forgotten(client, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/data").write_bytes(b"pinned" * 5000)
    content, bundle = client.node.content, await client.put_bundle({"cell.py": b"1 + 1"})
    spec = JobSpec(task=PythonCell(bundle=bundle), inputs=(InputSource(source=str(tmp_path / "in")),), pin=True)
    job = (await client.submit(spec)).job
    async for _ in client.updates(job):
        pass
    cid = client.node.engine.feeds[job].row.spec.inputs[0].source.removeprefix("ipfs://")
    await asyncio.to_thread(_collect, client)
    assert (content.has(bundle), content.has(cid)) == (True, True)
    await client.node.forget_old_jobs(time.time() + retention.KEPT_SECONDS + 60)
    await asyncio.to_thread(_collect, client)
    assert (content.has(bundle), content.has(cid)) == (False, False)


async def test_pins_that_stand_for_nothing_are_taken_back_when_the_node_opens(tmp_path):
    client = await _open(tmp_path)
    view, node, content = await _ended(client, "echo kept"), client.node.folder.node, client.node.content
    cid = content.put(b"left")
    for owner in (f"node/{node}/j-unknown", f"node/{node}/{view.job}/0.1", "node/n-gone/j-1", "somebody"):
        content.pin(cid, owner=owner)
    (tmp_path / "nodes/n-other").mkdir()
    content.pin(cid, owner="node/n-other/j-1")
    await client.close()
    client = await _open(tmp_path)
    assert client.node.content.owners() == [f"node/{node}/{view.job}", "node/n-other/j-1", "somebody"]
    assert _pins(client, view) == [1, 1, 1]
    await client.close()


async def test_a_job_that_the_disk_did_not_take_leaves_no_pins(client, monkeypatch):
    def full(_rows: object) -> None:
        raise ContentError("no room")

    monkeypatch.setattr(client.node._journal, "commit", full)
    with pytest.raises(ContentError, match="no room"):
        await client.submit(JobSpec(task=Command(shell="true")))
    monkeypatch.undo()
    client.node.content.flush()
    assert client.node.content.owners() == []
