"""A file from a node's gateway, every block checked, beside a plain aiohttp download of it with a sha256."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path

import aiohttp

from bacalhau_node.cid import Cid
from bacalhau_node.content.blocks import BlockStore
from bacalhau_node.content.fetch import fetch
from bacalhau_node.content.incoming import Shelf
from bacalhau_node.content.providers import HttpProvider
from bacalhau_node.http_client.fetch import Memory
from tests.bench.cases.urls import served
from tests.bench.harness import Figure, at_least, in_turn

TITLE = "gateway"
EXECUTORS = ("local",)
MEGABYTES = 256
TIMES = 5
SERVE = "from bacalhau_node.cli import main; main()"


@asynccontextmanager
async def node(folder: Path) -> AsyncIterator[HttpProvider]:
    """The gateway of a node over the store in `folder`, in a process of its own."""
    command = [sys.executable, "-c", SERVE, "serve", "--api", "127.0.0.1:0", "--data", str(folder), "--json"]
    process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    try:
        ready = json.loads(await process.stdout.readline())
        token = await asyncio.to_thread(Path(ready["token"]).read_text)
        yield HttpProvider(ready["api"], token=token.strip())
    finally:
        process.terminate()
        await process.wait()


async def plain(url: str) -> None:
    """What one writes by hand."""
    digest = hashlib.sha256()
    async with aiohttp.ClientSession(read_bufsize=512 * 1024) as session, session.get(url) as response:
        async for part in response.content.iter_chunked(1 << 20):
            digest.update(part)


async def ours(provider: HttpProvider, root: Cid, shelf: Shelf) -> None:
    """All of it, onto a shelf."""
    fetched = await fetch(shelf, root, [provider])
    assert fetched.cid == str(root)


async def stored(provider: HttpProvider, root: Cid, folder: Path) -> None:
    """All of it, into a store of its own."""
    with closing(BlockStore(folder)) as store:
        await ours(provider, root, store)


def run(_: str) -> list[Figure]:
    """Medians, in turn, in megabytes per second."""
    with tempfile.TemporaryDirectory() as name:
        return asyncio.run(_measured(Path(name)))


async def _measured(folder: Path) -> list[Figure]:
    (folder / "web").mkdir()
    (folder / "web/x.bin").write_bytes(os.urandom(MEGABYTES * 1_000_000))
    with closing(BlockStore(folder / "data/store")) as store:
        root = Cid.parse(store.add_path(folder / "web/x.bin"))
    count = iter(range(1000))
    async with served(folder / "web") as url, node(folder / "data") as provider:
        calls = {
            "plain": lambda: asyncio.run(plain(f"{url}/x.bin")),
            "memory": lambda: asyncio.run(ours(provider, root, Memory())),
            "store": lambda: asyncio.run(stored(provider, root, folder / f"store-{next(count)}")),
        }
        seconds = await asyncio.to_thread(in_turn, calls, times=TIMES)
    rate = {what: MEGABYTES / taken for what, taken in seconds.items()}
    beside = f"aiohttp and one sha256 {rate['plain']:.0f} MB/s; into a store {rate['store']:.0f} MB/s"
    what = f"{MEGABYTES} MB from a gateway, every block checked"
    shown = f"{rate['memory']:.0f} MB/s"
    return [
        Figure(what=what, ours=shown, beside=beside, measured=rate["memory"], goal=at_least(400, "MB/s")),
        Figure(
            what=f"{what}, as a ratio",
            ours=shown,
            beside=beside,
            measured=rate["memory"] / rate["plain"],
            goal=at_least(0.5, "× as fast"),
        ),
    ]
