"""A URL into the content store, beside a plain aiohttp download of the same bytes to a file."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path

import aiohttp

from bacalhau_node.content.blocks import BlockStore
from bacalhau_node.fetched import Fetched
from bacalhau_node.ports import Access
from bacalhau_node.sources.url import UrlSource
from bacalhau_node.spec import InputSource
from tests.bench.harness import Figure, at_least, in_turn

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


@asynccontextmanager
async def served(folder: Path) -> AsyncIterator[str]:
    """The URL of a web server of aiohttp, in a process of its own."""
    command = [sys.executable, "-c", SERVER, str(folder)]
    process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        yield f"http://127.0.0.1:{int(await process.stdout.readline())}"
    finally:
        process.kill()
        await process.wait()


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


async def _measured(root: Path, store: BlockStore, fetched: Fetched) -> dict[str, float]:
    web, names = root / "web", iter(range(1000))
    web.mkdir()

    def fresh() -> str:
        """Another file of other bytes, so that nothing is known of it."""
        path = web / f"{next(names)}.bin"
        path.write_bytes(os.urandom(1_000_000) * MEGABYTES)
        return path.name

    files = {kind: iter([fresh() for _ in range(TIMES)]) for kind in ("plain", "ours")}
    async with served(web) as url:
        calls = {
            "plain": lambda: asyncio.run(plain(f"{url}/{(name := next(files['plain']))}", root / name)),
            "ours": lambda: asyncio.run(ours(f"{url}/{next(files['ours'])}", store, fetched)),
        }
        return await asyncio.to_thread(in_turn, calls, times=TIMES)


def run(_: str) -> list[Figure]:
    """Medians, in turn."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        store, fetched = BlockStore(root / "store"), Fetched(root / "store")
        with closing(store), closing(fetched):
            taken = asyncio.run(_measured(root, store, fetched))
    speed = {name: MEGABYTES / seconds for name, seconds in taken.items()}
    return [
        Figure(
            what=f"a URL of {MEGABYTES} MB, downloaded, hashed and in the store",
            ours=f"{speed['ours']:.0f} MB/s",
            beside=f"aiohttp to a file {speed['plain']:.0f} MB/s",
            measured=speed["ours"] / speed["plain"],
            goal=at_least(0.8, "×"),
        )
    ]
