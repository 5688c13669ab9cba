"""The owner's probe, asked by a node that serves: it accepts, refuses, hangs, is broken."""

from __future__ import annotations

import asyncio
import contextlib
import os
import stat
from collections.abc import AsyncIterator, Awaitable, Callable
from hashlib import sha256
from pathlib import Path

import msgspec
import pytest

from bacalhau_node.api.auth import Caller, own_key
from bacalhau_node.api.server import ApiServer, bind
from bacalhau_node.client import LocalClient
from bacalhau_node.errors import NoCapacity
from bacalhau_node.executors.process import ProcessExecutor
from bacalhau_node.http_client import HttpClient
from bacalhau_node.node import open_node
from bacalhau_node.selection import Selection
from bacalhau_node.spec import Command, JobSpec

SPEC = JobSpec(task=Command(shell="echo done"), secrets=("API_KEY",))
SECRETS = {"API_KEY": "not for the probe"}

Serve = Callable[..., Awaitable[HttpClient]]


@pytest.fixture
async def serve(tmp_path: Path) -> AsyncIterator[Serve]:
    async with contextlib.AsyncExitStack() as stack:

        async def start(script: str, *, key: str = "ann", seconds: float = 20.0) -> HttpClient:
            program = tmp_path / "probe"
            program.write_text(f"#!/bin/sh\n{script}\n")
            program.chmod(stat.S_IRWXU)
            rules = Selection(isolation="none", probe=(str(program),), probe_seconds=seconds)
            local = LocalClient(await open_node(tmp_path, executors=[ProcessExecutor(tmp_path / "p", slots=1)]))
            keys = [(sha256(b"ann").digest(), Caller("ann", "submit")), own_key("owner")]
            server = ApiServer(local, keys, rules=rules)
            stack.push_async_callback(server.close)
            stack.push_async_callback(local.close)
            await server.start(bind("127.0.0.1", 0))
            client = HttpClient(server.url, token=key, folder=tmp_path / "client", patience=5)
            stack.push_async_callback(client.close)
            return client

        yield start


async def test_a_probe_that_ends_well_takes_the_job_and_saw_it_without_its_secrets(serve, tmp_path):
    client = await serve(f"cat > {tmp_path}/seen")
    submission = await client.submit(SPEC, secrets=SECRETS)
    seen = msgspec.json.decode((tmp_path / "seen").read_bytes())
    assert (seen["job"], seen["requester"]) == (submission.job, "ann")
    assert seen["spec"]["task"] == {"type": "command", "argv": [], "shell": "echo done"}
    assert SECRETS["API_KEY"].encode() not in (tmp_path / "seen").read_bytes()


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("echo 'only on weekends, ann'; echo more; exit 1", "this node does not take the job: only on weekends, ann"),
        ("exit 3", "its owner refuses it, without a reason"),
        ("kill -9 $$", "its owner refuses it, without a reason"),
    ],
)
async def test_a_refusal_is_told_to_the_jobs_user_and_makes_no_job(serve, script, says):
    client = await serve(script)
    with pytest.raises(NoCapacity, match=says):
        await client.submit(SPEC, secrets=SECRETS)
    assert await client.jobs() == []


async def test_a_probe_that_hangs_refuses_and_is_ended_with_what_it_started(serve, tmp_path):
    client = await serve(f"sleep 1000 & echo $! > {tmp_path}/child; wait", seconds=0.5)
    with pytest.raises(NoCapacity, match=r"gave no answer in 0\.5 s"):
        await client.submit(SPEC, secrets=SECRETS)
    child = int((tmp_path / "child").read_text())
    async with asyncio.timeout(10):
        while _runs(child):  # noqa: ASYNC110 - of another process
            await asyncio.sleep(0.02)


async def test_a_probe_that_cannot_be_started_refuses(serve, tmp_path):
    client = await serve("exit 0")
    (tmp_path / "probe").unlink()
    with pytest.raises(NoCapacity, match="can't be started"):
        await client.submit(SPEC, secrets=SECRETS)


async def test_the_owner_is_not_asked_about_their_own_jobs(serve):
    client = await serve("exit 1", key="owner")
    assert (await client.submit(SPEC, secrets=SECRETS)).count == 1


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (ProcessLookupError, FileNotFoundError):
        return False
