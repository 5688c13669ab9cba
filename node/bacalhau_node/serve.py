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
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import msgspec

from bacalhau_node.api.auth import Caller, own_key, read_keys
from bacalhau_node.api.door import Door
from bacalhau_node.api.server import ApiServer, bind, url_of
from bacalhau_node.client import LocalClient
from bacalhau_node.errors import SpecError
from bacalhau_node.folders import Address, NodeFolder, data_folder
from bacalhau_node.literals import inert, is_loopback
from bacalhau_node.network import NetworkSettings, over_libp2p
from bacalhau_node.node import Node, open_node
from bacalhau_node.selection import Selection, read_selection

log = logging.getLogger(__name__)

GRACE: Final = 25.0
"""Seconds that jobs may go on after SIGTERM: under the 30 s after which supervisors kill."""

DEFAULT_API: Final = "127.0.0.1:1234"

_LOOK = 0.2


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What `serve` was asked for. `api`: `HOST:PORT`. Without `listen` and `peers`, multiaddrs, there is no network."""

    api: str = DEFAULT_API
    data: Path | None = None
    keys: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    listen: tuple[str, ...] = ()
    peers: tuple[str, ...] = ()
    network_key: Path | None = None


class Ready(msgspec.Struct, frozen=True):
    """The one line that says that the node can be asked. `token`: the file with its key, "" beyond loopback.

    `peer`: the multiaddr for `--peer` of another node, "" on no network.
    """

    api: str
    node: str
    executor: str
    data: str
    token: str
    peer: str = ""


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
        gateway = "" if is_loopback(host) else url_of(bound, secure=tls is not None)
        network = await asyncio.to_thread(network_of, settings, rules, gateway)
        node = await open_node(settings.data, serving=settings.api, network=network)
    except BaseException:
        bound.close()
        raise
    server = ApiServer(LocalClient(node), [*others, *own_keys(node.folder, host)], tls=tls, rules=rules)
    told = partial(_tell, ready, node, server, host)
    await attend(node, node.folder, server, bound, ready=told, close=node.close)


async def attend(
    node: Node,
    door: NodeFolder,
    server: ApiServer,
    bound: Door,
    *,
    ready: Callable[[], None],
    close: Callable[[], Awaitable[None]],
) -> None:
    """Answer at `bound` until a signal ends it; then `close` ends the node. `door`: the folder that says where."""
    stopping = _Stopping(server.drain)
    try:
        await server.start(bound)
        door.announce(Address(door.asked, server.url))
        ready()
        log.info("serving", extra={"url": server.url, "node": node.id})
        await stopping.wait(node)
    finally:
        door.announce(Address(door.asked))
        await close()
        await server.close()
        log.info("stopped", extra={"node": node.id})


def network_of(settings: Settings, rules: Selection, gateway: str = "") -> NetworkSettings | None:
    """The network to join; raises `SpecError` for a key file that can't be read.

    `gateway`: where others get content over HTTP, which is faster than a stream; "" where only this machine can.
    """
    if not settings.listen and not settings.peers:
        if settings.network_key is not None:
            raise SpecError("--network-key belongs to a network: give --listen or --peer, too")
        return None
    key = read_network_key(settings.network_key)
    opener = over_libp2p(listen=settings.listen, network_key=key)
    return NetworkSettings(open=opener, peers=settings.peers, rules=rules, gateway=gateway)


def read_network_key(file: Path | None) -> str:
    """The secret of a closed network: the text of a file, so that it is in no list of processes."""
    if file is None:
        return ""
    try:
        key = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"--network-key {file}: {error}") from error
    if not key:
        raise SpecError(f"--network-key {file}: it is empty; write any long secret into it")
    return key


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


def own_keys(door: NodeFolder, host: str) -> list[tuple[bytes, Caller]]:
    """The key of this user's own programs, on loopback."""
    return [own_key(door.token())] if is_loopback(host) else []


def _tell(ready: Callable[[Ready], None], node: Node, server: ApiServer, host: str) -> None:
    token = str(node.folder.path / "token") if is_loopback(host) else ""
    peer = next(iter(node.addresses()), "") if node.membership is not None else ""
    executor = node.facilities.capabilities.executor
    ready(Ready(server.url, node.id, executor, str(node.folder.root), token, peer))


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
    """Time, level, message, and what belongs to it.

    What strangers sent may be quoted in it: no line of theirs looks like one of the log, and no character acts on a
    terminal.
    """

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        return "\n  ".join(map(inert, super().format(record).split("\n")))

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - the name that logging calls
        extra = "".join(f" {name}={value}" for name, value in _extra(record).items())
        return super().formatMessage(record) + extra
