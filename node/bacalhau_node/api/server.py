"""The API of one node, put together: who may ask, what is answered, how it listens and how it stops.

Limits, so that no client can take more than its share: connections are counted (`door`), and unfinished jobs (`jobs`);
requests' JSON, bundles and archives have sizes (`shapes`), a connection that sends nothing is closed after
`KEEPALIVE`, one that stops in the middle of a body or takes nothing of an answer after `answers.IDLE_SECONDS`, one
whose body drips after `answers.SLOWEST`, and nobody has a queue (`feed`). Bodies that say they are compressed
are refused: how large they get would be up to their sender.
"""

from __future__ import annotations

import errno
import ipaddress
import logging
import socket
import ssl
from collections.abc import Iterable
from typing import Final

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from bacalhau_node import __version__
from bacalhau_node.api import metrics, shapes
from bacalhau_node.api.answers import TRAFFIC, Handler, Refused, answer, errors
from bacalhau_node.api.auth import Caller, Keys, foreign
from bacalhau_node.api.content import Content
from bacalhau_node.api.door import Door
from bacalhau_node.api.gateway import GatewayRoutes
from bacalhau_node.api.jobs import CALLER, Jobs
from bacalhau_node.api.piece import Pieces
from bacalhau_node.client import LocalClient
from bacalhau_node.errors import NodeUnreachable, SpecError
from bacalhau_node.literals import is_loopback
from bacalhau_node.selection import NO_RULES, Selection

KEEPALIVE: Final = 30.0
"""Seconds that a connection may be idle, or take to send its first request's head."""

BACKLOG: Final = 128

OPEN: Final = frozenset(("/health", "/ready", "/ipfs/{cid}", "/ipfs/{cid}/{path}", "/piece/{cid}"))
"""Routes that need no key. Those of the gateway look at rights themselves; pieces are there to be pulled by anybody."""

FULL: Final = "this node has as many connections as it takes, in all or from your address: try again in a moment"

_CLOSE_SECONDS = 2.0


def _is_ours(record: logging.LogRecord) -> bool:
    """Whether an error is told in the log: whoever sends garbage would fill it with tracebacks."""
    return record.exc_info is None or not isinstance(record.exc_info[1], HttpProcessingError)


http_log = logging.getLogger(f"{__name__}.http")
http_log.addFilter(_is_ours)


class ApiServer:
    """A listening API. `url` is where it is reached once `start` has returned."""

    def __init__(
        self,
        client: LocalClient,
        entries: Iterable[tuple[bytes, Caller]],
        *,
        tls: ssl.SSLContext | None = None,
        rules: Selection = NO_RULES,
    ) -> None:
        self.url = ""
        self._client, self._keys, self._tls = client, Keys(entries), tls
        self._jobs = Jobs(client, rules)
        self._loopback = True
        self._door: Door | None = None
        app = web.Application(middlewares=[_counted, errors, self._guarded])
        app[TRAFFIC] = self._traffic = metrics.Traffic()
        gateway = GatewayRoutes(client.node.gateway, client.node.content, self._keys)
        pieces = Pieces(client.node.folder.store / "pieces")
        for part in (self._jobs, Content(client), gateway, pieces):
            app.add_routes(part.routes())
        app.add_routes(self._routes())
        self._runner = web.AppRunner(
            app,
            access_log=None,
            logger=http_log,
            handler_cancellation=True,
            keepalive_timeout=KEEPALIVE,
            lingering_time=_CLOSE_SECONDS,
            auto_decompress=False,
            shutdown_timeout=_CLOSE_SECONDS,
        )

    async def start(self, bound: Door) -> None:
        """Answer at an address that `bind` got."""
        self._door = bound
        self._loopback = is_loopback(bound.getsockname()[0])
        await self._runner.setup()
        await web.SockSite(self._runner, bound, ssl_context=self._tls).start()
        self.url = url_of(bound, secure=self._tls is not None)

    def drain(self) -> None:
        """Take no more jobs."""
        self._jobs.draining = True

    async def close(self) -> None:
        """Stop listening, and end what is left of connections. To be called after the node is closed."""
        await self._runner.cleanup()

    def _routes(self) -> list[web.RouteDef]:
        return [
            web.get("/v0/nodes", self._nodes, allow_head=False),
            web.get("/v0/network", self._network, allow_head=False),
            web.get("/v0/version", self._version, allow_head=False),
            web.get("/metrics", self._metrics, allow_head=False),
            web.get("/health", _health),
            web.get("/ready", self._ready),
        ]

    @web.middleware
    async def _guarded(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Who asks, from where, in which form: before anything of the request is read."""
        if self._door is not None and self._door.seats.is_surplus(request.get_extra_info("peername")):
            raise Refused(503, NodeUnreachable(FULL), **{"Retry-After": "5", "Connection": "close"})
        if (why := foreign(request.headers, loopback=self._loopback)) is not None:
            raise Refused(403, SpecError(why))
        route = request.match_info.route.resource
        if route is not None and route.canonical in OPEN:
            return await handler(request)
        caller = self._keys.caller(request.headers.get("Authorization"))
        if caller is None:
            what = "the key is not one of this node's" if "Authorization" in request.headers else "a key is needed"
            raise Refused(
                401, NodeUnreachable(f"{what}; give one by BACALHAU_API_KEY"), **{"WWW-Authenticate": "Bearer"}
            )
        if "Content-Encoding" in request.headers:
            raise Refused(415, SpecError("compressed bodies are not taken: send it as it is"))
        request[CALLER] = caller
        return await handler(request)

    async def _nodes(self, _request: web.Request) -> web.Response:
        return answer(await self._client.nodes())

    async def _network(self, _request: web.Request) -> web.Response:
        return answer(await self._client.network())

    async def _version(self, _request: web.Request) -> web.Response:
        return answer(shapes.Version(__version__, shapes.API_VERSION, self._client.node.id))

    async def _metrics(self, request: web.Request) -> web.Response:
        if request[CALLER].role != "admin":
            raise Refused(403, SpecError("metrics are for the owner of the node"))
        text = metrics.text(self._client.node, self._traffic)
        return web.Response(text=text, headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})

    async def _ready(self, _request: web.Request) -> web.Response:
        return answer({"ready": not self._jobs.draining}, status=503 if self._jobs.draining else 200)


async def _health(_request: web.Request) -> web.Response:
    return answer({"alive": True})


@web.middleware
async def _counted(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Count the answer by its route, which has no names in it, so that strangers can't make up more of them."""
    route = request.match_info.route.resource
    name = f"{request.method} {route.canonical}" if route else "other"
    status = 0  # cut off
    try:
        response = await handler(request)
        status = response.status
    finally:
        request.app[TRAFFIC].requests[name, status] += 1
    return response


def url_of(bound: socket.socket, *, secure: bool) -> str:
    """The base URL of what answers at an address that `bind` got; at all of them: by this machine's name."""
    host, port = bound.getsockname()[:2]
    host = socket.gethostname() if ipaddress.ip_address(host).is_unspecified else host
    name = f"[{host}]" if ":" in host else host
    return f"{'https' if secure else 'http'}://{name}:{port}"


def bind(host: str, port: int) -> Door:
    """A socket at this address, port 0 for any free one; raises `SpecError` when it can't be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = Door(family, kind, protocol)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
            bound.listen(BACKLOG)
        except OSError:
            bound.close()
            raise
    except OSError as error:
        raise SpecError(_not_had(host, port, error)) from error
    return bound


def _not_had(host: str, port: int, error: OSError) -> str:
    where = f"{host}:{port}"
    if error.errno == errno.EADDRINUSE:
        return f"--api {where}: another program listens there; end it, or choose another port (0: any free one)"
    if error.errno in {errno.EACCES, errno.EPERM}:
        return f"--api {where}: this user may not listen there; choose a port from 1024 up"
    return f"--api {where}: {error.strerror or error}"
