"""The daemon's stream is cut into chunks however its bytes arrive, and images are named as Docker names them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from bacalhau_node.executors.attach import DaemonError
from bacalhau_node.executors.containers import Daemon, split_tag

UPGRADED = b"HTTP/1.1 101 UPGRADED\r\nUpgrade: tcp\r\n\r\n"
Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Coroutine[None, None, None]]


def chunk(channel: int, data: bytes) -> bytes:
    return bytes((channel, 0, 0, 0)) + len(data).to_bytes(4, "big") + data


@asynccontextmanager
async def daemon(folder: Path, talk: Talk) -> AsyncIterator[Daemon]:
    """A client of something that listens on a socket and says what `talk` says, then closes."""
    done = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        await talk(reader, writer)
        writer.close()
        await writer.wait_closed()
        done.set()

    server = await asyncio.start_unix_server(serve, folder / "d.sock")
    client = Daemon(f"unix://{folder}/d.sock")
    yield client
    await done.wait()
    await client.close()
    server.close()
    await server.wait_closed()


@pytest.mark.parametrize("size", [1, 7, 1000])
async def test_chunks_are_whole_however_their_bytes_arrive(tmp_path: Path, size: int) -> None:
    sent = [(1, b"out"), (2, b""), (2, b"err\n"), (1, bytes(range(256)))]
    data = UPGRADED + b"".join(chunk(channel, text) for channel, text in sent)

    async def talk(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for start in range(0, len(data), size):
            writer.write(data[start : start + size])
            await writer.drain()

    received: list[tuple[int, bytes]] = []
    async with daemon(tmp_path, talk) as client:
        stream = await client.attach("x", lambda channel, text: received.append((channel, text)))
        await stream.ended.wait()
        stream.close()
    assert received == [*sent, (0, b"")]


async def test_what_is_sent_arrives_and_is_dropped_after_the_end(tmp_path: Path) -> None:
    heard: list[bytes] = []

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(UPGRADED)
        heard.append(await reader.readexactly(5))

    async with daemon(tmp_path, talk) as client:
        stream = await client.attach("x", lambda *_: None)
        stream.send(b"hello")
        await stream.drain()
        await stream.ended.wait()
        stream.send(b"late")
        await stream.drain()
    assert heard == [b"hello"]


async def test_an_attach_that_is_cancelled_leaves_no_connection(tmp_path: Path) -> None:
    asked = asyncio.Event()
    left: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    async def talk(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        asked.set()
        left.set_result(await reader.read())

    async with daemon(tmp_path, talk) as client:
        attaching = asyncio.create_task(client.attach("x", lambda *_: None))
        await asked.wait()
        attaching.cancel()
        with pytest.raises(asyncio.CancelledError):
            await attaching
        async with asyncio.timeout(10):
            assert await left == b""


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"HTTP/1.1 404 Not Found\r\n\r\nno such container", "refused to attach: no such container"),
        (b"", "ended the attach request: no answer"),
        (b"x" * 100_000, "ended the attach request"),
    ],
)
async def test_a_refusal_is_told(tmp_path: Path, answer: bytes, words: str) -> None:
    async def talk(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(answer)

    async with daemon(tmp_path, talk) as client:
        with pytest.raises(DaemonError, match=words):
            await client.attach("x", lambda *_: None)


async def test_a_pull_that_fails_tells_what_the_registry_said(tmp_path: Path) -> None:
    async def talk(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b'HTTP/1.0 200 OK\r\n\r\n{"status": "Pulling"}\n{"error": "toomanyrequests: slow down"}\n')

    async with daemon(tmp_path, talk) as client:
        with pytest.raises(DaemonError, match=r"^toomanyrequests: slow down$"):
            await client.pull("some/image")


async def test_a_pull_without_an_error_is_done(tmp_path: Path) -> None:
    async def talk(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b'HTTP/1.0 200 OK\r\n\r\n{"status": "Downloaded"}\n')

    async with daemon(tmp_path, talk) as client:
        await client.pull("some/image")


@pytest.mark.parametrize("host", ["ssh://somewhere", "npipe:////./pipe/docker"])
async def test_an_address_of_another_kind_is_told(host: str) -> None:
    client = Daemon(host)
    with pytest.raises(DaemonError, match="only unix:// and tcp:// are understood"):
        await client.ping()
    await client.close()


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("python", ("python", "latest")),
        ("python:3.12", ("python", "3.12")),
        ("host:5000/team/image", ("host:5000/team/image", "latest")),
        ("host:5000/team/image:1", ("host:5000/team/image", "1")),
        ("python@sha256:abc", ("python", "sha256:abc")),
    ],
)
def test_an_image_is_named_as_docker_names_it(name: str, parts: tuple[str, str]) -> None:
    assert split_tag(name) == parts
