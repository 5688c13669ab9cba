"""Content that is not here, from whom this node's owner names: an IPFS daemon, and public gateways.

Both are settings of the node, in its environment, and read when they are needed: what a notebook sets in one cell
counts for the next. Other nodes are asked only where a job names them (its requester, with the job's capability):
without one they would open what is public and nothing else, and every question would tell a stranger what is read.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import Final
from weakref import WeakValueDictionary

from bacalhau_node.cid import Cid
from bacalhau_node.content.fetch import fetch, listing
from bacalhau_node.content.kubo import CONNECT, connected
from bacalhau_node.content.providers import HttpProvider
from bacalhau_node.content.reader import MAX_BLOCK
from bacalhau_node.errors import ContentError, SpecError
from bacalhau_node.ports import ContentStore, Provider

GATEWAYS: Final = "BACALHAU_IPFS_GATEWAYS"
"""The environment variable with the URLs of trustless gateways, in the order in which they are asked."""

PATIENCE: Final = 30.0
"""Seconds without a byte after which a provider is given up: a daemon that has to find others first needs some."""


def named() -> tuple[Provider, ...]:
    """Whom the environment names, for one loop; raises `SpecError` for settings that can't be."""
    urls = [url.strip() for url in os.environ.get(GATEWAYS, "").split(",") if url.strip()]
    if urls and importlib.util.find_spec("aiohttp") is None:
        raise SpecError(f"asking the gateways of {GATEWAYS} needs aiohttp: pip install 'bacalhau-jupyter[http]'")
    daemon = connected()
    return (*([daemon] if daemon is not None else []), *map(HttpProvider, urls))


class Elsewhere:
    """Brings content into `store`."""

    def __init__(self, store: ContentStore) -> None:
        self._store = store
        self._settings: tuple[str | None, ...] = ()
        self._named: tuple[Provider, ...] = ()
        self._coming: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    def listing(self, cid: str, path: str) -> list[tuple[str, str, int]]:
        """What `ports.ContentStore.list` says of the folder or file at `path` below `cid`, of which little comes here.

        Blocks: call it from a thread. Raises `ContentError` that says who was asked.
        """
        others = named()
        if not others:
            raise _nobody(cid)
        return asyncio.run(listing(self._store, Cid.parse(cid), others, path=path, patience=PATIENCE))

    async def bring(self, cid: str, *, size: int, first: Sequence[Provider], told: Callable[[int], None]) -> None:
        """Have all of `cid` here, from `first` or whom the environment names; `size`: its files have so many bytes.

        Who asks for what is on its way already waits for it. Raises `ContentError` that says who was asked.
        """
        providers = (*first, *self._again())
        if not providers:
            raise _nobody(cid)
        asked = first[-1].name if first else ""  # nobody waits for what another job's requester sends
        lock = self._coming.setdefault(f"{cid} {asked}", asyncio.Lock())
        async with lock:
            root, limit = Cid.parse(cid), size + MAX_BLOCK  # a folder may tell the size of a small file wrongly
            await fetch(self._store, root, providers, limit=limit, told=told, patience=PATIENCE)

    async def get(self, cid: str, path: str = "", *, told: Callable[[int], None] | None = None) -> str:
        """Have all of what `path` below `cid` leads to here, from whom the environment names; returns its CID.

        `told` hears how many bytes came. Raises `ContentError` that says who was asked, and for how long.
        """
        if not (providers := self._again()):
            raise _nobody(cid)
        return (await fetch(self._store, Cid.parse(cid), providers, path=path, told=told, patience=PATIENCE)).cid

    def _again(self) -> tuple[Provider, ...]:
        """Whom the environment names, the same ones as long as it does: files that come together share connections."""
        settings = (os.environ.get(CONNECT), os.environ.get(GATEWAYS))
        if settings != self._settings:
            self._named, self._settings = named(), settings
        return self._named


def _nobody(cid: str) -> ContentError:
    return ContentError(
        f"{cid} is not in this node's content store, and nobody is known who has it: name an IPFS daemon"
        f" ({CONNECT}=127.0.0.1:5001) or gateways ({GATEWAYS}=https://HOST,…)"
    )
