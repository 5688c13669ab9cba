"""Secrets of a job, from the submission to what is left on the disk: which is nothing."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from bacalhau_node.api.auth import own_key
from bacalhau_node.api.server import ApiServer, bind
from bacalhau_node.client import Client, JobView, LocalClient, ShardText
from bacalhau_node.errors import SpecError
from bacalhau_node.executors.process import ProcessExecutor
from bacalhau_node.http_client import HttpClient
from bacalhau_node.node import open_node
from bacalhau_node.spec import Command, JobSpec, PythonCell, Sharding

TOKEN = "hunter2-correct-horse"

CELL = """
import os, sys, time
key = os.environ["API_KEY"]
print("the key is", key)
for letter in key:
    print(letter, end="", flush=True)
    time.sleep(0.02)
print(flush=True)
print(key, file=sys.stderr)
assert len(key) == 21
if shard.index == 1:
    raise ValueError(f"refused: {key}")
type("Odd", (), {"__repr__": lambda self: f"<odd {key}>"})()
"""


async def _local(root: Path) -> LocalClient:
    return LocalClient(await open_node(root, executors=[ProcessExecutor(root / "process", slots=2)], serving="x:1"))


@pytest.fixture(params=["local", "http"])
async def client(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Client]:
    local = await _local(tmp_path / "node")
    if request.param == "local":
        yield local
        await local.close()
        return
    server = ApiServer(local, [own_key("of the owner")])
    await server.start(bind("127.0.0.1", 0))
    remote = HttpClient(server.url, token="of the owner", folder=tmp_path / "node", patience=10)
    yield remote
    await remote.close()
    await local.close()
    await server.close()


async def _spec(client: Client, source: str, **fields: object) -> JobSpec:
    bundle = await client.put_bundle({"cell.py": source.encode()})
    return JobSpec(task=PythonCell(bundle=bundle), secrets=("API_KEY",), **fields)  # type: ignore[arg-type]


async def _followed(client: Client, job: str) -> tuple[str, JobView]:
    """The text that a watcher saw, and the job after its end."""
    text = "".join([update.text async for update in client.updates(job) if isinstance(update, ShardText)])
    return text, await client.job(job)


def _holding(folder: Path, data: bytes) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and data in path.read_bytes()]


async def test_a_secret_reaches_the_shard_and_is_nowhere_afterwards(client, tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    spec = await _spec(client, CELL, sharding=Sharding(n=2))
    text, view = await _followed(client, (await client.submit(spec, secrets={"API_KEY": TOKEN})).job)
    good, bad = (shard.outcome for shard in view.shards)
    assert good is not None
    assert bad is not None
    assert bad.error is not None
    assert good.stdout.inline == b"the key is ***\n***\n"
    assert good.stderr.inline == b"***\n"
    assert good.value.blob.inline is not None
    assert b"<odd ***>" in good.value.blob.inline
    assert (bad.error.name, bad.error.message) == ("ValueError", "refused: ***")
    assert text.count("***") == 6
    assert TOKEN not in text
    assert TOKEN.encode() not in repr(view).encode()
    assert TOKEN not in caplog.text
    assert _holding(tmp_path, b"API_KEY"), "the names are kept, so the look is worth something"
    assert not _holding(tmp_path, TOKEN.encode())


async def test_while_a_job_runs_its_secrets_are_on_no_disk(client, tmp_path):
    spec = await _spec(client, "print('on', flush=True)\nwhile True: pass")
    submission = await client.submit(spec, secrets={"API_KEY": TOKEN})
    async for update in client.updates(submission.job):
        if isinstance(update, ShardText):
            break
    assert not _holding(tmp_path, TOKEN.encode())
    await client.cancel(submission.job)
    await _followed(client, submission.job)


async def test_a_program_that_is_no_cell_has_its_secrets_too(client):
    spec = JobSpec(task=Command(shell='echo "<$API_KEY> ${#API_KEY}"'), secrets=("API_KEY",))
    _, view = await _followed(client, (await client.submit(spec, secrets={"API_KEY": TOKEN})).job)
    assert view.shards[0].outcome is not None
    assert view.shards[0].outcome.stdout.inline == b"<***> 21\n"


@pytest.mark.parametrize("given", [{}, {"OTHER": TOKEN}, {"API_KEY": TOKEN, "OTHER": TOKEN}])
async def test_names_and_values_have_to_fit(client, given):
    spec = await _spec(client, "1")
    with pytest.raises(SpecError, match="are named, and values for"):
        await client.submit(spec, secrets=given)


async def test_a_job_that_a_restarted_node_goes_on_with_says_that_its_secrets_are_gone(tmp_path):
    first = await _local(tmp_path)
    submission = await first.submit(
        await _spec(first, "print('on', flush=True)\nwhile True: pass"), secrets={"API_KEY": TOKEN}
    )
    async for update in first.updates(submission.job):
        if isinstance(update, ShardText):
            break
    await first.close()
    second = await _local(tmp_path)
    _, view = await _followed(second, submission.job)
    assert view.state == "Failed"
    assert view.shards[0].outcome is not None
    error = view.shards[0].outcome.error
    assert error is not None
    assert error.message == "its secrets (API_KEY) are gone with the node's memory: submit it again"
    await second.close()


async def test_secrets_never_go_over_a_connection_that_others_can_read(tmp_path):
    with pytest.raises(SpecError, match="could be read on the way"):
        HttpClient("http://node.example:1234", token="x", folder=tmp_path)


def test_a_secret_cannot_be_a_plain_variable_too():
    with pytest.raises(SpecError, match="--secret A: --env sets it too"):
        JobSpec(task=Command(), secrets=("A",), env={"A": "1"})
