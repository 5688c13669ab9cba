"""Whole jobs over a bucket, on a real S3 server: from a prefix and a glob to results, and to a bucket again."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from bacalhau_node.client import JobView, LocalClient, ShardText
from bacalhau_node.errors import SpecError
from bacalhau_node.executors.process import ProcessExecutor
from bacalhau_node.node import open_node
from bacalhau_node.spec import InputSource, JobSpec, PythonCell, Sharding
from tests.object_store import Bucket

SUM = "print(*(path.name for path in inputs))\nsum(int(path.read_text()) for path in inputs)"


@pytest.fixture
async def client(tmp_path: Path) -> AsyncIterator[LocalClient]:
    root = tmp_path / "data"
    client = LocalClient(await open_node(root, executors=[ProcessExecutor(root / "process", slots=2)]))
    yield client
    await client.close()


async def _run(client: LocalClient, source: str, text: str, **fields: Any) -> JobView:
    spec = JobSpec(
        task=PythonCell(bundle=await client.put_bundle({"cell.py": source.encode()})),
        inputs=(InputSource(source=text),),
        **fields,
    )
    submission = await client.submit(spec)
    async with asyncio.timeout(60):
        async for _ in client.updates(submission.job):
            pass
    return await client.job(submission.job)


def _values(view: JobView) -> list[bytes | None]:
    return [shard.outcome.value.blob.inline if shard.outcome else None for shard in view.shards]


async def test_a_prefix_with_a_glob_is_split_and_computed(client: LocalClient, bucket: Bucket) -> None:
    bucket.put({f"in/{number}.txt": str(number).encode() for number in range(6)} | {"in/sub/9.txt": b"9", "in/x": b""})
    view = await _run(client, SUM, f"s3://{bucket.name}/in/", globs=("*.txt",), sharding=Sharding(n=3))
    assert view.state == "Completed", view
    assert _values(view) == [b"1", b"5", b"9"]
    assert [shard.inputs for shard in view.shards] == [("0.txt", "1.txt"), ("2.txt", "3.txt"), ("4.txt", "5.txt")]


async def test_a_single_object_keeps_its_name(client: LocalClient, bucket: Bucket) -> None:
    bucket.put({"in/7.txt": b"7"})
    view = await _run(client, f"{SUM}, inputs[0].name", f"s3://{bucket.name}/in/7.txt")
    assert _values(view) == [b'[7, "7.txt"]']


async def test_an_object_that_vanished_after_the_plan_fails_its_shard_only(
    client: LocalClient, bucket: Bucket, tmp_path: Path
) -> None:
    bucket.put({f"in/{number}": str(number).encode() for number in range(4)})
    gate = tmp_path / "gate"
    wait = f"import pathlib\nwhile not pathlib.Path({str(gate)!r}).exists(): pass"
    source = f"print('here', flush=True)\n{wait}\nint(inputs[0].read_text())"
    spec = JobSpec(
        task=PythonCell(bundle=await client.put_bundle({"cell.py": source.encode()})),
        inputs=(InputSource(source=f"s3://{bucket.name}/in"),),
        sharding=Sharding(n=4),
        parallel=1,
    )
    submission = await client.submit(spec)
    async with asyncio.timeout(60):
        async for update in client.updates(submission.job):
            if isinstance(update, ShardText) and update.shard == 0:
                bucket.delete("in/3")
                gate.touch()
    view = await client.job(submission.job)
    assert [shard.state for shard in view.shards] == ["kept", "kept", "kept", "failed"]
    outcome = view.shards[3].outcome
    assert outcome is not None
    assert outcome.error is not None
    assert outcome.error.kind == "input"
    assert outcome.error.message == f"s3://{bucket.name}/in/3 is gone: it was removed after the job was planned"


async def test_a_bucket_that_can_not_be_read_never_becomes_a_job(
    client: LocalClient, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SpecError, match="there is no bucket 'nowhere'"):
        await _run(client, SUM, "s3://nowhere/in")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(SpecError, match="refuses this machine's credentials"):
        await _run(client, SUM, f"s3://{bucket.name}/in")
    assert await client.jobs() == []


async def test_a_result_is_published_and_read_back_by_another_tool(client: LocalClient, bucket: Bucket) -> None:
    bucket.put({f"in/{number}.txt": str(number).encode() for number in range(4)})
    source = f"(outputs / 'x').mkdir()\n(outputs / 'x' / 'y.txt').write_text(str(shard.index))\n{SUM}"
    target = f"s3://{bucket.name}/out"
    view = await _run(client, source, f"s3://{bucket.name}/in", sharding=Sharding(n=2), publish=target)
    assert view.state == "Completed"
    there = {key: data for key, data in bucket.read().items() if key.startswith("out/")}
    manifest = json.loads(there.pop(f"out/{view.job}/manifest.json"))
    assert {path.removeprefix(f"out/{view.job}/"): data for path, data in there.items()} == {
        "shards/0/exit_code": b"0\n",
        "shards/0/stderr": b"",
        "shards/0/stdout": b"0.txt 1.txt\n",
        "shards/0/value.json": b"1",
        "shards/0/outputs/x/y.txt": b"0",
        "shards/1/exit_code": b"0\n",
        "shards/1/stderr": b"",
        "shards/1/stdout": b"2.txt 3.txt\n",
        "shards/1/value.json": b"5",
        "shards/1/outputs/x/y.txt": b"1",
    }
    assert manifest["root"] == view.cid
    base = f"s3://{bucket.name}/out/{view.job}"
    assert view.published == (f"{base}/", f"{base}/manifest.json")
    for one in manifest["files"]:
        assert there[f"out/{view.job}/{one['path']}"] == client.node.content.read(one["cid"])


async def test_a_target_that_can_not_be_written_never_becomes_a_job(client: LocalClient, bucket: Bucket) -> None:
    bucket.put({"in/1": b"1"})
    with pytest.raises(SpecError, match="there is no bucket 'nowhere-at-all'"):
        await _run(client, SUM, f"s3://{bucket.name}/in", publish="s3://nowhere-at-all/out")
    assert await client.jobs() == []
