"""Jobs over URLs on a whole node: what fails, fails alone; what came once is there; others reach nothing inside."""

from __future__ import annotations

import asyncio
import io
import tarfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from msgspec import structs

from bacalhau_node.api.auth import Caller, own_key
from bacalhau_node.api.policy import admitted
from bacalhau_node.api.server import ApiServer, bind
from bacalhau_node.client import Client, JobView, LocalClient
from bacalhau_node.errors import ContentError
from bacalhau_node.executors.process import ProcessExecutor
from bacalhau_node.http_client import HttpClient
from bacalhau_node.node import open_node
from bacalhau_node.protocol.events import JobChanged
from bacalhau_node.selection import NO_RULES
from bacalhau_node.spec import OWNER_LABEL, InputSource, JobSpec, PythonCell, Sharding
from tests.hostile_http import Hostile, data, folder, hostile, status

SUM = "sum(int(line) for path in inputs for line in path.read_text().split())"
TAG = '"v1"'


@pytest.fixture
async def client(tmp_path: Path) -> AsyncIterator[LocalClient]:
    root = tmp_path / "data"
    client = LocalClient(await open_node(root, executors=[ProcessExecutor(root / "process", slots=2)]))
    yield client
    await client.close()


@pytest.fixture
async def server() -> AsyncIterator[Hostile]:
    async with hostile() as server:
        yield server


async def spec_of(client: Client, *sources: str, source: str = SUM, **fields: object) -> JobSpec:
    bundle = await client.put_bundle({"cell.py": source.encode()})
    inputs = tuple(InputSource(source=one) for one in sources)
    return JobSpec(task=PythonCell(bundle=bundle), inputs=inputs, **fields)


async def run(client: Client, spec: JobSpec) -> tuple[JobView, tuple[str, ...]]:
    submission = await client.submit(spec)
    async with asyncio.timeout(60):
        async for update in client.updates(submission.job):
            last = update
    assert isinstance(last, JobChanged)
    return await client.job(submission.job), submission.notes


def values(view: JobView) -> list[bytes | None]:
    return [shard.outcome.value.blob.inline if shard.outcome else None for shard in view.shards]


def problem(view: JobView, shard: int) -> str:
    outcome = view.shards[shard].outcome
    assert outcome is not None
    assert outcome.error is not None
    assert outcome.error.kind == "input"
    return outcome.error.message


async def test_of_twenty_urls_three_fail_by_themselves_and_a_rerun_downloads_nothing(client, server):
    for number in range(20):
        server.answers[f"/{number:02}.txt"] = data(f"{number}\n".encode(), ETag=TAG)
    server.answers["/03.txt"] = status(404)
    server.answers["/07.txt"] = data(b"<html>", Content_Type="text/html")
    server.answers["/11.txt"] = status(503)
    spec = await spec_of(client, *(f"{server.url}/{number:02}.txt" for number in range(20)), sharding=Sharding(n=20))
    view, notes = await run(client, spec)
    assert view.state == "Failed"
    assert [shard.state for shard in view.shards].count("kept") == 17
    assert {index for index, shard in enumerate(view.shards) if shard.state == "failed"} == {3, 7, 11}
    assert f"{server.url}/03.txt answers 404" in problem(view, 3)
    assert "07.txt answers a web page (text/html), not data" in problem(view, 7)
    assert "11.txt answers 503 Service Unavailable (3 attempts)" in problem(view, 11)
    (note,) = (note for note in notes if "3 of 20 files" in note)
    assert all(f"/{name}.txt" in note for name in ("03", "07", "11"))
    assert [value for value in values(view) if value] == [str(n).encode() for n in range(20) if n not in (3, 7, 11)]
    asked = len(server.gets("/00.txt"))
    server.answers["/03.txt"] = data(b"3\n", ETag=TAG)
    again, _ = await run(client, spec)
    assert again.shards[3].state == "kept"
    assert len(server.gets("/00.txt")) == asked == 1


async def test_urls_that_all_fail_never_become_a_job_and_all_are_named(client, server):
    spec = await spec_of(client, *(f"{server.url}/{number}.txt" for number in range(3)))
    with pytest.raises(ContentError) as caught:
        await client.submit(spec)
    assert all(f"{server.url}/{number}.txt answers 404" in str(caught.value) for number in range(3))
    assert await client.jobs() == []


async def test_what_every_shard_needs_has_to_be_there_at_once(client, server):
    server.answers["/x.txt"] = data(b"1\n", ETag=TAG)
    spec = await spec_of(client, f"{server.url}/x.txt", shared=(InputSource(source=f"{server.url}/table.csv"),))
    with pytest.raises(ContentError, match=r"table\.csv answers 404"):
        await client.submit(spec)


async def test_a_folder_of_a_server_is_split_by_a_glob_and_a_shared_file_comes_once(client, server, tmp_path):
    for number in range(6):
        (tmp_path / f"web/{number % 2}/deep").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"web/{number % 2}/deep/{number}.txt").write_text(f"{number}\n")
        (tmp_path / f"web/{number % 2}/{number}.csv").write_text("no\n")
    server.default = folder(tmp_path)
    server.answers["/table.bin"] = data(bytes(3_000_000), ETag=TAG)
    spec = await spec_of(
        client,
        f"{server.url}/web/",
        globs=("**/*.txt",),
        sharding=Sharding(n=3),
        shared=(InputSource(source=f"{server.url}/table.bin"),),
    )
    view, _ = await run(client, spec)
    assert view.state == "Completed"
    assert [shard.inputs for shard in view.shards] == [
        ("0/deep/0.txt", "0/deep/2.txt"),
        ("0/deep/4.txt", "1/deep/1.txt"),
        ("1/deep/3.txt", "1/deep/5.txt"),
    ]
    assert values(view) == [b"2", b"5", b"8"]
    assert len(server.gets("/table.bin")) == 1


async def test_a_file_that_changes_after_the_plan_fails_its_shard_alone(client, server):
    asked: list[str] = []

    async def answer(request, writer):
        asked.append(request.method)
        await data(b"1\n", ETag=f'"v{len(asked)}"')(request, writer)

    server.answers["/moving.txt"] = answer
    server.answers["/still.txt"] = data(b"2\n", ETag=TAG)
    spec = await spec_of(client, f"{server.url}/moving.txt", f"{server.url}/still.txt", sharding=Sharding(n=2))
    view, _ = await run(client, spec)
    assert [shard.state for shard in view.shards] == ["failed", "kept"]
    assert "changed since the job was planned" in problem(view, 0)


def packed(count: int) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for number in range(count):
            info = tarfile.TarInfo(f"years/{number}.txt")
            info.size = 2
            tar.addfile(info, io.BytesIO(f"{number}\n".encode()))
    return out.getvalue()


async def test_an_archive_is_a_folder_of_what_is_in_it(client, server, tmp_path):
    server.answers["/years.tgz"] = data(packed(4), ETag=TAG)
    (tmp_path / "years.tgz").write_bytes(packed(4))
    for source in (f"{server.url}/years.tgz", str(tmp_path / "years.tgz")):
        spec = await spec_of(client, globs=("**/*.txt",), sharding=Sharding(n=2))
        view, _ = await run(client, structs.replace(spec, inputs=(InputSource(source=source, unpack=True),)))
        assert view.state == "Completed"
        assert [shard.inputs for shard in view.shards] == [
            ("years/0.txt", "years/1.txt"),
            ("years/2.txt", "years/3.txt"),
        ]
        assert values(view) == [b"1", b"5"]


async def test_archives_and_lists_of_this_machine_are_read_by_a_remote_node(client, server, tmp_path):
    (tmp_path / "years.tgz").write_bytes(packed(4))
    (tmp_path / "more.urls").write_text(f"{server.url}/7.txt\n{server.url}/8.txt\n")
    server.answers["/7.txt"] = server.answers["/8.txt"] = data(b"7\n", ETag=TAG)
    api = ApiServer(client, [own_key("secret")])
    await api.start(bind("127.0.0.1", 0))
    remote = HttpClient(api.url, token="secret", folder=tmp_path / "mine")
    try:
        spec = await spec_of(remote, str(tmp_path / "more.urls"), globs=("**/*.txt",), sharding=Sharding(n=6))
        archive = InputSource(source=str(tmp_path / "years.tgz"), unpack=True)
        spec = structs.replace(spec, inputs=(archive, *spec.inputs))
        plan = await remote.plan(spec)
        assert [entry.path for shard in plan.shards for entry in shard.entries][3:] == ["years/3.txt", "7.txt", "8.txt"]
        view, _ = await run(remote, spec)
        assert values(view) == [b"0", b"1", b"2", b"3", b"7", b"7"]
    finally:
        await remote.close()
        await api.close()


async def test_a_job_of_somebody_else_reaches_nothing_inside_neither_when_it_is_planned_nor_when_it_runs(
    client, server
):
    server.answers["/secret.txt"] = data(b"42\n", ETag=TAG)
    spec = await spec_of(client, f"{server.url}/secret.txt")
    theirs = admitted(spec, Caller("ann", "submit"), NO_RULES, usual_memory=1 << 30)
    assert theirs.labels[OWNER_LABEL] == "ann"
    with pytest.raises(ContentError, match=r"127\.0\.0\.1 is not an address of the public internet"):
        await client.plan(theirs)
    assert server.asked == []
    mine, _ = await run(client, spec)
    assert values(mine) == [b"42"]
