"""`bacalhau-node serve`: a node with its API, from the first line to a quiet end.

The address is bound before the node is opened: a port that is taken starts no job. SIGTERM drains: no new
jobs, those that are here go on for `GRACE` seconds, then the node stops; SIGINT, or a second SIGTERM, stops at once.
What is unfinished then goes on when the node is served again with the same `--data` and `--api`.

Beyond loopback a node that runs other people's programs must know who asks, and keys must not be read on the
way: `--keys` and TLS are needed there, without an exception. A proxy that ends TLS itself belongs
on the same machine, in front of a node on loopback, and sends `Host: localhost`.
"""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import ssl
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec

from bacalhau_node.api.auth import Caller, own_key, read_keys
from bacalhau_node.api.server import ApiServer, bind
from bacalhau_node.client import LocalClient
from bacalhau_node.errors import SpecError
from bacalhau_node.folders import Address, data_folder
from bacalhau_node.literals import is_loopback
from bacalhau_node.node import Node, open_node
from bacalhau_node.selection import read_selection

log = logging.getLogger(__name__)

GRACE: Final = 25.0
"""Seconds that jobs may go on after SIGTERM: under the 30 s after which supervisors kill."""

DEFAULT_API: Final = "127.0.0.1:1234"

_LOOK = 0.2


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What `serve` was asked for. `api`: `HOST:PORT`."""

    api: str = DEFAULT_API
    data: Path | None = None
    keys: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None


class Ready(msgspec.Struct, frozen=True):
    """The one line that says that the node can be asked. `token`: the file with its key, "" beyond loopback."""

    api: str
    node: str
    executor: str
    data: str
    token: str


def address(text: str) -> tuple[str, int]:
    """(host, port) of `HOST:PORT`; raises `SpecError`."""
    host, colon, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not host or not port.isdecimal() or int(port) > 65_535:
        raise SpecError(f"--api {text}: write HOST:PORT, as in {DEFAULT_API}")
    return host, int(port)


async def serve(settings: Settings, ready: Callable[[Ready], None]) -> None:
    """Serve until a signal ends it; raises `SpecError` for settings that can't be."""
    host, port = address(settings.api)
    others, tls = _checked(settings, loopback=is_loopback(host))
    rules = await asyncio.to_thread(lambda: read_selection(settings.data or data_folder()))
    bound = bind(host, port)
    try:
        node = await open_node(settings.data, serving=settings.api)
    except BaseException:
        bound.close()
        raise
    client = LocalClient(node)
    server = ApiServer(client, [*others, *_own(node, loopback=is_loopback(host))], tls=tls, rules=rules)
    stopping = _Stopping(server.drain)
    try:
        await server.start(bound)
        node.folder.announce(Address(settings.api, server.url))
        ready(_ready(node, server.url, loopback=is_loopback(host)))
        log.info("serving", extra={"url": server.url, "node": node.id})
        await stopping.wait(node)
    finally:
        node.folder.announce(Address(settings.api))
        await client.close()
        await server.close()
        log.info("stopped", extra={"node": node.id})


def _checked(settings: Settings, *, loopback: bool) -> tuple[list[tuple[bytes, Caller]], ssl.SSLContext | None]:
    """The keys of others, and TLS; raises `SpecError` where they are needed and not there."""
    if not loopback and (settings.keys is None or settings.tls_cert is None):
        raise SpecError(
            f"--api {settings.api} is reached from other machines: it needs --keys FILE and --tls-cert FILE with"
            " --tls-key FILE. For yourself alone: --api 127.0.0.1:1234, and `ssh -L 1234:127.0.0.1:1234` to it"
        )
    if (settings.tls_cert is None) != (settings.tls_key is None):
        raise SpecError("--tls-cert and --tls-key belong together: give both")
    others = [] if settings.keys is None else read_keys(settings.keys)
    if settings.tls_cert is None or settings.tls_key is None:
        return others, None
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        tls.load_cert_chain(settings.tls_cert, settings.tls_key)
    except (OSError, ssl.SSLError) as error:
        raise SpecError(f"--tls-cert {settings.tls_cert} with --tls-key {settings.tls_key}: {error}") from error
    return others, tls


def _own(node: Node, *, loopback: bool) -> list[tuple[bytes, Caller]]:
    return [own_key(node.folder.token())] if loopback else []


def _ready(node: Node, url: str, *, loopback: bool) -> Ready:
    token = str(node.folder.path / "token") if loopback else ""
    return Ready(url, node.id, node.facilities.capabilities.executor, str(node.folder.root), token)


class _Stopping:
    """Waits for the signals that end a server."""

    def __init__(self, drain: Callable[[], None]) -> None:
        self._drain = drain
        self._asked = asyncio.Event()
        self._now = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._terminate)
        loop.add_signal_handler(signal.SIGINT, self._interrupt)

    def _terminate(self) -> None:
        if self._asked.is_set():
            self._now.set()
        self._asked.set()

    def _interrupt(self) -> None:
        self._asked.set()
        self._now.set()

    async def wait(self, node: Node) -> None:
        """Until a signal came and what runs has ended, or `GRACE` is over."""
        await self._asked.wait()
        self._drain()
        log.info("draining", extra={"running": node.engine.running, "seconds": GRACE})
        deadline = time.monotonic() + GRACE
        quiet = 0
        while quiet < 2 and time.monotonic() < deadline and not self._now.is_set():
            quiet = 0 if node.engine.running else quiet + 1  # between two shards nothing runs for a moment
            try:
                async with asyncio.timeout(_LOOK):
                    await self._now.wait()
            except TimeoutError:
                continue


# --- logs ---


def start_logging(*, as_json: bool) -> None:
    """Send what the node tells to stderr, a line each."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonLines() if as_json else _PlainLines())
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    logging.getLogger("bacalhau_node").setLevel(logging.INFO)


_USUAL = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def _extra(record: logging.LogRecord) -> dict[str, Any]:
    return {name: value for name, value in vars(record).items() if name not in _USUAL}


class _JsonLines(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        fields = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_extra(record),
        }
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return json.dumps(fields, default=str)


class _PlainLines(logging.Formatter):
    """Time, level, message, and what belongs to it."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - the name that logging calls
        extra = "".join(f" {name}={value}" for name, value in _extra(record).items())
        return super().formatMessage(record) + extra
