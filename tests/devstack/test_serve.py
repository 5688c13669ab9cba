"""A served node from outside: real processes and signals, connections that are cut, and clients that go on."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from bacalhau_node.api.auth import own_key
from bacalhau_node.api.server import ApiServer, bind, url_of
from bacalhau_node.client import JobView, LocalClient, ShardText, Update
from bacalhau_node.errors import ContentError, NodeUnreachable, ProtocolError
from bacalhau_node.executors.process import ProcessExecutor
from bacalhau_node.http_client import HttpClient, connection
from bacalhau_node.node import open_node
from bacalhau_node.protocol.events import ShardChanged
from bacalhau_node.selection import NO_RULES
from bacalhau_node.serve import Settings, _PlainLines, network_of
from bacalhau_node.spec import InputSource, JobSpec, PythonCell, Sharding
from tests.certificate import CERTIFICATE, KEY
from tests.cutter import Cutter

MAIN = "import sys; sys.argv[0] = 'bacalhau-node'; from bacalhau_node.cli import main; main()"
SECONDS = 60


def _token(ready: dict[str, Any]) -> str:
    return Path(ready["token"]).read_text()


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    hidden = {"PATH": str(Path(sys.executable).parent)}  # no bubblewrap: shards see the files that tests wait with
    return {
        **os.environ,
        **hidden,
        "BACALHAU_DIR": str(tmp_path / "data"),
        "DOCKER_HOST": f"unix://{tmp_path}/no-daemon",
    }


def _command(*words: str) -> list[str]:
    return [sys.executable, "-c", MAIN, *words]


def _run(environment: dict[str, str], folder: Path, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        _command(*words), cwd=folder, env=environment | more, capture_output=True, text=True, timeout=120, check=False
    )


@contextlib.contextmanager
def _served(environment: dict[str, str], *words: str) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    process = subprocess.Popen(
        _command("serve", "--json", *words), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    with process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line, process.stderr.read() if process.stderr else ""
            yield process, json.loads(line)
        finally:
            process.kill()


async def _spec(client: HttpClient, source: str, *inputs: Path, **fields: Any) -> JobSpec:
    bundle = await client.put_bundle({"cell.py": source.encode()})
    return JobSpec(
        task=PythonCell(bundle=bundle), inputs=tuple(InputSource(source=str(path)) for path in inputs), **fields
    )


async def _followed(client: HttpClient, job: str) -> tuple[list[Update], JobView]:
    async with asyncio.timeout(SECONDS):
        return [update async for update in client.updates(job)], await client.job(job)


def _values(view: JobView) -> list[bytes | None]:
    return [shard.outcome.value.blob.inline if shard.outcome else None for shard in view.shards]


# --- processes ---


def test_the_command_line_finds_the_node_that_this_user_serves(environment, tmp_path):
    (tmp_path / "job.py").write_text("print('hello')\n(outputs / 'n.txt').write_text('5')\nshard.index")
    with _served(environment, "--api", "127.0.0.1:0") as (process, ready):
        token = Path(ready["token"])
        assert stat.S_IMODE(token.stat().st_mode) == 0o600
        done = _run(environment, tmp_path, "run", "job.py", "--shards", "2", "--json")
        assert done.returncode == 0, done.stderr
        job = json.loads(done.stdout.splitlines()[-1])
        assert ready["api"] in done.stderr
        assert {shard["node"] for shard in job["shards"]} == {ready["node"]}
        (line,) = json.loads(_run(environment, tmp_path, "list", "--json").stdout)
        assert (line["job"], line["state"], line["count"]) == (job["id"], "Completed", 2)
        assert "shard     1  kept" in _run(environment, tmp_path, "describe", job["id"][:12]).stdout
        assert _run(environment, tmp_path, "logs", job["id"][:12]).stdout == "[shard 0] hello\n[shard 1] hello\n"
        assert _run(environment, tmp_path, "logs", job["id"], "--shard", "1").stdout == "hello\n"
        got = _run(environment, tmp_path, "get", job["id"], "--output", "out", "--raw")
        assert got.stdout == "2 of 2 shards in out\n"
        assert (tmp_path / "out" / "shards" / "1" / "outputs" / "n.txt").read_text() == "5"
        assert not (tmp_path / "out" / "combined").exists()
        assert ready["node"] in _run(environment, tmp_path, "nodes", "--node", ready["api"]).stdout
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 0
    after = _run(environment, tmp_path, "list")
    assert "in this process" in after.stderr


def test_without_a_server_jobs_of_the_data_folder_can_be_asked_for(environment, tmp_path):
    (tmp_path / "job.py").write_text("print('hello')")
    done = _run(environment, tmp_path, "run", "job.py", "--json")
    job = json.loads(done.stdout.splitlines()[-1])["id"]
    assert job[:10] in _run(environment, tmp_path, "list").stdout
    assert _run(environment, tmp_path, "logs", job).stdout == "hello\n"
    assert _run(environment, tmp_path, "cancel", job).returncode == 0
    unknown = _run(environment, tmp_path, "describe", "j-ffff")
    assert (unknown.returncode, "no job" in unknown.stderr) == (2, True)


@pytest.mark.parametrize("more", [{}, {"BACALHAU_API_HOST": "127.0.0.1", "BACALHAU_API_PORT": "9"}])
def test_a_node_that_is_not_there_is_exit_code_3(environment, tmp_path, more):
    words = ("list",) if more else ("list", "--node", "http://127.0.0.1:9")
    done = _run(environment, tmp_path, *words, **more)
    assert done.returncode == 3
    assert "http://127.0.0.1:9 does not answer" in done.stderr or "127.0.0.1:9 does not answer" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("url", ["ftp://x", "http://", "http://x:y", "http://example.org:1234", "https://u:p@x"])
def test_an_address_that_is_none_is_wrong_usage(environment, tmp_path, url):
    done = _run(environment, tmp_path, "list", "--node", url)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr


def test_a_port_that_is_taken_starts_nothing(environment, tmp_path):
    with _served(environment, "--api", "127.0.0.1:0") as (_, ready):
        nodes = sorted((tmp_path / "data" / "nodes").iterdir())
        second = _run(environment, tmp_path, "serve", "--api", f"127.0.0.1:{urlsplit(ready['api']).port}")
        assert second.returncode == 2
        assert "another program listens there" in second.stderr
        assert "Traceback" not in second.stderr
        assert sorted((tmp_path / "data" / "nodes").iterdir()) == nodes


def test_beyond_loopback_keys_and_tls_are_needed(environment, tmp_path):
    for name, text in (("cert", CERTIFICATE), ("key", KEY), ("keys", f"admin {sha256(b'sesame').hexdigest()} root\n")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o600)
    keys = ("--keys", str(tmp_path / "keys"))
    tls = ("--tls-cert", str(tmp_path / "cert"), "--tls-key", str(tmp_path / "key"))
    for words in ((), keys, tls, (*keys, *tls[:2])):
        refused = _run(environment, tmp_path, "serve", "--api", "0.0.0.0:0", *words)
        assert refused.returncode == 2
        assert "--tls-" in refused.stderr
    with _served(environment, "--api", "0.0.0.0:0", *keys, *tls) as (_, ready):
        url = f"https://127.0.0.1:{urlsplit(ready['api']).port}"
        told = {"BACALHAU_API_KEY": "sesame", "SSL_CERT_FILE": str(tmp_path / "cert")}
        done = _run(environment, tmp_path, "nodes", "--node", url, **told)
        assert (done.returncode, ready["node"] in done.stdout) == (0, True), done.stderr
        done = _run(environment, tmp_path, "nodes", "--node", url, BACALHAU_API_KEY="sesame")
        assert (done.returncode, "certificate" in done.stderr) == (3, True)
        done = _run(environment, tmp_path, "nodes", "--node", url, **{**told, "BACALHAU_API_KEY": "simsalabim"})
        assert (done.returncode, "key" in done.stderr) == (3, True)


def test_what_strangers_send_looks_like_no_line_of_the_log():
    error = ValueError("\n2026-11-26 ERROR forged")
    record = logging.LogRecord("x", logging.ERROR, "", 0, "%s", ("/a\nb\x1b[31m\u202e",), (ValueError, error, None))
    record.peer = "x\r\ny"
    first, *rest = _PlainLines().format(record).split("\n")
    assert first.endswith("ERROR /a")
    assert rest == ["  b\\x1b[31m\\u202e peer=x\\r", "  y", "  ValueError: ", "  2026-11-26 ERROR forged"]


def test_other_nodes_are_told_a_gateway_only_where_they_reach_it():
    for host, name in (("127.0.0.1", "127.0.0.1"), ("0.0.0.0", socket.gethostname())):
        with bind(host, 0) as bound:
            assert url_of(bound, secure=True) == f"https://{name}:{bound.getsockname()[1]}"
    listening = Settings(listen=("/ip4/127.0.0.1/tcp/0",))
    for gateway in ("", "https://node.example:1234"):
        network = network_of(listening, NO_RULES, gateway)
        assert network is not None
        assert network.gateway == gateway


async def test_sigterm_lets_jobs_end_and_takes_no_more(environment, tmp_path):
    with _served(environment, "--api", "127.0.0.1:0", "--log-json") as (process, ready):
        client = HttpClient(ready["api"], token=_token(ready), folder=tmp_path / "mine")
        go = tmp_path / "go"
        spec = await _spec(
            client, f"print('on', flush=True)\nimport os\nwhile not os.path.exists({str(go)!r}): pass\n7"
        )
        submission = await client.submit(spec)
        async for update in client.updates(submission.job):
            if isinstance(update, ShardText):
                process.send_signal(signal.SIGTERM)
                assert process.stderr is not None
                while "draining" not in await asyncio.to_thread(process.stderr.readline):
                    pass
                with pytest.raises(NodeUnreachable, match="shutting down"):
                    await client.submit(spec)
                go.touch()
        assert _values(await client.job(submission.job)) == [b"7"]
        assert await asyncio.to_thread(process.wait, 30) == 0
        for line in (await asyncio.to_thread(process.stderr.read)).splitlines():
            assert json.loads(line)["level"] == "info"
        await client.close()


async def test_a_node_that_is_killed_and_started_again_ends_the_job_that_its_client_waits_for(environment, tmp_path):
    port = _free_port()
    words = ("--api", f"127.0.0.1:{port}")
    wait = f"while shard.index and not os.path.exists({str(tmp_path / 'go')!r}): pass"
    source = f"import os\nprint('on', flush=True)\n{wait}\n"
    with _served(environment, *words) as (process, ready):
        client = HttpClient(ready["api"], token=_token(ready), folder=tmp_path / "mine")
        submission = await client.submit(await _spec(client, f"{source}shard.index", sharding=Sharding(n=3)))
        watching = asyncio.create_task(_followed(client, submission.job))
        async for update in client.updates(submission.job):
            if isinstance(update, ShardChanged) and update.state == "kept":
                break
        process.kill()
        await asyncio.to_thread(process.wait, 30)
    (tmp_path / "go").touch()
    with _served(environment, *words) as (_, again):
        assert (again["node"], _token(again)) == (ready["node"], _token(ready))
        updates, view = await watching
        assert view.state == "Completed"
        assert _values(view) == [b"0", b"1", b"2"]
        assert view.shards[0].attempts == 1
        assert [line.job for line in await client.jobs()] == [submission.job]
        kept = [update.shard for update in updates if isinstance(update, ShardChanged) and update.state == "kept"]
        assert set(kept) == {0, 1, 2}
        await client.close()


def _free_port() -> int:
    with bind("127.0.0.1", 0) as bound:
        port: int = bound.getsockname()[1]
        return port


async def test_a_node_that_does_not_come_back_is_named(environment, tmp_path):
    with _served(environment, "--api", "127.0.0.1:0") as (process, ready):
        token = _token(ready)
        client = HttpClient(ready["api"], token=token, folder=tmp_path / "mine", patience=0.5)
        submission = await client.submit(await _spec(client, "print('on', flush=True)\nwhile True: pass"))
        watching = asyncio.create_task(_followed(client, submission.job))
        async for update in client.updates(submission.job):
            if isinstance(update, ShardText):
                process.kill()
                break
        with pytest.raises(NodeUnreachable, match=ready["api"]):
            await watching
        with pytest.raises(NodeUnreachable, match=ready["api"]):
            await client.jobs()
        await client.close()


# --- connections that break ---


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[tuple[LocalClient, int]]:
    root = tmp_path / "node"
    local = LocalClient(await open_node(root, executors=[ProcessExecutor(root / "process", slots=2)]))
    server = ApiServer(local, [own_key("secret")])
    await server.start(bind("127.0.0.1", 0))
    yield local, urlsplit(server.url).port or 0
    await local.close()
    await server.close()


@contextlib.asynccontextmanager
async def _behind(cutter: Cutter, folder: Path) -> AsyncIterator[tuple[HttpClient, Cutter]]:
    client = HttpClient(await cutter.start(), token="secret", folder=folder)
    try:
        yield client, cutter
    finally:
        await client.close()
        await cutter.close()


async def test_text_and_states_survive_a_connection_that_is_cut_every_second(node, tmp_path):
    local, port = node
    source = (
        "import time\nfor n in range(60):\n    time.sleep(0.03)\n    print(shard.index, n, flush=True)\nshard.index"
    )
    async with _behind(Cutter(port, seconds=1), tmp_path / "mine") as (client, cutter):
        submission = await client.submit(await _spec(client, source, sharding=Sharding(n=4)))
        updates, view = await _followed(client, submission.job)
        assert cutter.cut >= 3
    assert view.state == "Completed"
    assert _values(view) == [b"0", b"1", b"2", b"3"]
    assert [shard.attempts for shard in view.shards] == [1, 1, 1, 1]
    for index in range(4):
        text = "".join(one.text for one in updates if isinstance(one, ShardText) and one.shard == index)
        assert text == "".join(f"{index} {n}\n" for n in range(60))
    assert [line.job for line in await local.jobs()] == [submission.job]


async def test_inputs_and_results_arrive_whole_over_a_connection_that_is_cut_again_and_again(node, tmp_path):
    local, port = node
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.bin").write_bytes(os.urandom(1_300_000))
    told: list[tuple[int, int]] = []
    source = "import pathlib\n(outputs / 'all.bin').write_bytes(b''.join(path.read_bytes() for path in inputs))"
    async with _behind(Cutter(port, limit=900_000), tmp_path / "mine") as (client, cutter):
        client._progress = lambda sent, total: told.append((sent, total))
        submission = await client.submit(await _spec(client, source, folder))
        _, view = await _followed(client, submission.job)
        assert view.shards[0].outcome is not None
        await client.download(view.shards[0].outcome.outputs or "", tmp_path / "out")
        assert cutter.cut >= 8
    data = b"".join((folder / f"{number}.bin").read_bytes() for number in range(3))
    assert (tmp_path / "out" / "all.bin").read_bytes() == data
    assert told[-1][0] == told[-1][1] >= len(data)
    assert [sent for sent, _ in told] == sorted(sent for sent, _ in told)
    assert len(await local.jobs()) == 1


async def test_only_what_the_node_lacks_is_sent(node, tmp_path):
    local, port = node
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.bin").write_bytes(os.urandom(500_000))
    client = HttpClient(f"http://127.0.0.1:{port}", token="secret", folder=tmp_path / "mine")
    spec = await _spec(client, "sum(len(path.read_bytes()) for path in inputs)", folder)
    first = await client.submit(spec)
    assert "3 local files (1,500,000 bytes): 1,50" in first.notes[0]
    again = await client.submit(spec)
    assert "all of it is on the node already" in again.notes[0]
    (folder / "3.bin").write_bytes(os.urandom(100_000))
    third = await client.submit(spec)
    assert "4 local files (1,600,000 bytes): 100," in third.notes[0]
    fresh = HttpClient(f"http://127.0.0.1:{port}", token="secret", folder=tmp_path / "other")
    assert "all of it is on the node already" in (await fresh.submit(spec)).notes[0]
    for submission, size in ((first, 1_500_000), (again, 1_500_000), (third, 1_600_000)):
        _, view = await _followed(client, submission.job)
        assert _values(view) == [str(size).encode()]
    assert not list((tmp_path / "mine").rglob("*.bin"))
    await client.close()
    await fresh.close()
    assert len(await local.jobs()) == 4


async def test_hidden_files_that_nobody_named_stay_here(node, tmp_path):
    local, port = node
    folder = tmp_path / "in"
    (folder / ".git").mkdir(parents=True)
    (folder / ".env").write_text("PASSWORD=secret")
    (folder / ".git" / "config").write_text("more secrets")
    (folder / "a.txt").write_text("1")
    (folder / "b.csv").write_text("2")
    client = HttpClient(f"http://127.0.0.1:{port}", token="secret", folder=tmp_path / "mine")
    submission = await client.submit(await _spec(client, "[path.name for path in inputs]", folder, globs=("*.txt",)))
    _, view = await _followed(client, submission.job)
    await client.close()
    assert _values(view) == [b'["a.txt"]']
    sent = view.spec.inputs[0].source.removeprefix("ipfs://")
    assert [name for name, _, _ in local.node.content.list(sent)] == ["a.txt"]


async def test_a_file_that_changes_while_it_is_sent_is_an_error(node, tmp_path, monkeypatch):
    _, port = node
    (tmp_path / "a.bin").write_bytes(bytes(1_000_000))
    client = HttpClient(f"http://127.0.0.1:{port}", token="secret", folder=tmp_path / "mine")
    spec = await _spec(client, "1", tmp_path / "a.bin")
    ask = client._connection.ask

    async def meanwhile(method: str, path: str, *more: Any, **fields: Any) -> Any:
        (tmp_path / "a.bin").write_bytes(b"\1" * 1_000_000)
        return await ask(method, path, *more, **fields)

    monkeypatch.setattr(client._connection, "ask", meanwhile)
    with pytest.raises(ContentError, match=r"a\.bin changed"):
        await client.submit(spec)
    await client.close()


async def test_a_submission_that_nobody_waits_for_any_more_leaves_no_job_that_runs(node, tmp_path, monkeypatch):
    local, port = node
    asked, go, submit = asyncio.Event(), asyncio.Event(), local.submit

    async def slowly(spec: JobSpec, **more: Any) -> Any:
        asked.set()
        await go.wait()
        return await submit(spec, **more)

    monkeypatch.setattr(local, "submit", slowly)
    client = HttpClient(f"http://127.0.0.1:{port}", token="secret", folder=tmp_path / "mine")
    submitting = asyncio.create_task(client.submit(await _spec(client, "while True: pass")))
    await asked.wait()
    submitting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await submitting
    go.set()
    async with asyncio.timeout(SECONDS):
        while not (lines := await client.jobs()):  # noqa: ASYNC110 - of another process, as far as the client knows
            await asyncio.sleep(0)
        _, view = await _followed(client, lines[0].job)
    assert view.state == "Stopped"
    await client.close()


# --- who answers ---


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi",
        b"HTTP/1.1 404 No\r\nContent-Length: 2\r\n\r\n{}",
        b"SSH-2.0-x\r\n",
    ],
)
async def test_what_answers_and_is_no_node_is_said_to_be_none(answer, tmp_path):
    async def odd(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(odd, "127.0.0.1", 0)
    client = HttpClient(f"127.0.0.1:{server.sockets[0].getsockname()[1]}", token="x", folder=tmp_path, patience=1)
    with pytest.raises((NodeUnreachable, ProtocolError), match=r"not a node|can't be read"):
        await client.nodes()
    await client.close()
    server.close()
    await server.wait_closed()


@pytest.mark.parametrize("status", [200, 400])
async def test_an_answer_without_end_is_not_read_to_its_end(status, tmp_path, monkeypatch):
    """Nor one that grows while it is unpacked: nobody asks for packed ones."""
    monkeypatch.setattr(connection, "LARGEST_ANSWER", 100_000)
    monkeypatch.setattr(connection, "LARGEST_ERROR", 100_000)

    async def endless(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 %d OK\r\nContent-Type: application/json\r\nContent-Encoding: gzip\r\n\r\n" % status)
        with contextlib.suppress(ConnectionError):
            while True:
                writer.write(b"[" * 10_000)
                await writer.drain()
        writer.close()

    server = await asyncio.start_server(endless, "127.0.0.1", 0)
    client = HttpClient(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", token="t", folder=tmp_path)
    async with asyncio.timeout(SECONDS):
        with pytest.raises(ProtocolError, match="an answer of over 100000 bytes"):
            await client.jobs()
    await client.close()
    server.close()
    await server.wait_closed()
