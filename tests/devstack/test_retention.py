"""What a node forgets of jobs that ended: those beyond a number and an age, in memory and on the disk."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from bacalhau_node import retention
from bacalhau_node.client import JobView, LocalClient, ShardText
from bacalhau_node.errors import SpecError
from bacalhau_node.executors.process import ProcessExecutor
from bacalhau_node.node import open_node
from bacalhau_node.spec import Command, JobSpec, Sharding


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
