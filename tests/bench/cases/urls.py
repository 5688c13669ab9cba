"""A URL into the content store, beside a plain aiohttp download of the same bytes to a file."""

from __future__ import annotations

import asyncio
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import aiohttp

from bacalhau_node.content.blocks import BlockStore
from bacalhau_node.fetched import Fetched
from bacalhau_node.ports import Access
from bacalhau_node.sources.url import UrlSource
from bacalhau_node.spec import InputSource
from tests.bench.harness import Figure, at_least, seconds_of

TITLE = "urls"
EXECUTORS = ("local",)
MEGABYTES = 300
TIMES = 5
SERVER = """\
import asyncio, sys
from aiohttp import web

async def main():
    app = web.Application()
    app.router.add_static("/", sys.argv[1])
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    print(runner.addresses[0][1], flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The URL of a web server of aiohttp, in a process of its own."""
    with subprocess.Popen([sys.executable, "-c", SERVER, str(folder)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.kill()


async def plain(url: str, target: Path) -> None:
    """What one writes by hand."""
    async with aiohttp.ClientSession() as session, session.get(url) as response:
        with target.open("wb") as file:
            async for part in response.content.iter_chunked(1 << 16):
                file.write(part)


async def ours(url: str, store: BlockStore, fetched: Fetched) -> None:
    """List, fetch, import: into the store of a node that is open."""
    source = UrlSource(store, fetched=fetched)
    entries = await asyncio.to_thread(source.list, InputSource(source=url), index=0)
    await source.fetch(entries, access=Access(), told=lambda *_: None)


def by_aiohttp(url: str, folder: Path) -> float:
    """The seconds of a plain download."""
    return seconds_of(lambda: asyncio.run(plain(url, folder / "file")))


def by_us(url: str, folder: Path) -> float:
    """The seconds of ours."""
    with closing(BlockStore(folder)) as store, closing(Fetched(folder)) as fetched:
        return seconds_of(lambda: asyncio.run(ours(url, store, fetched)))


def once(way: Callable[[str, Path], float]) -> float:
    """The seconds of one way to download a file of new bytes.

    All is removed again, so that the next file finds memory that was in use before: memory that is new to a virtual
    machine may take longer to get than the file.
    """
    with tempfile.TemporaryDirectory() as name:
        web, folder = Path(name, "web"), Path(name, "folder")
        web.mkdir()
        folder.mkdir()
        (web / "file.bin").write_bytes(os.urandom(1_000_000) * MEGABYTES)
        with served(web) as url:
            return way(f"{url}/file.bin", folder)


def run(_: str) -> list[Figure]:
    """Medians, in turn."""
    ways = {"plain": by_aiohttp, "ours": by_us}
    taken = [{name: once(way) for name, way in ways.items()} for _ in range(TIMES)]
    seconds = {name: statistics.median(one[name] for one in taken) for name in ways}
    speed = {name: MEGABYTES / took for name, took in seconds.items()}
    return [
        Figure(
            what=f"a URL of {MEGABYTES} MB, downloaded, hashed and in the store",
            ours=f"{speed['ours']:.0f} MB/s",
            beside=f"aiohttp to a file {speed['plain']:.0f} MB/s",
            measured=speed["ours"] / speed["plain"],
            goal=at_least(0.8, "×"),
        )
    ]
