"""The trustless gateway over HTTP: raw blocks and CAR archives by CID, for whoever may have them and checks them.

What is asked and answered is the trustless gateway specification's, so other programs of IPFS can read here what is
public. Beyond it, `root=CID` names the root that a block lies below, for those who hold a capability for that root. A
capability is sent where a key would be (`Authorization: Bearer …`); the keys of this API open everything.
"""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass
from hashlib import sha256
from typing import Final, Literal
from urllib.parse import quote, unquote_to_bytes

from aiohttp import web
from multidict import CIMultiDict

from bacalhau_node.api.answers import TRAFFIC, Refused, Stream
from bacalhau_node.api.auth import Keys, bearer
from bacalhau_node.cid import Cid
from bacalhau_node.content.gateway import Gateway, in_threads
from bacalhau_node.content.walk import Span, Want, resolved, steps_of
from bacalhau_node.errors import ContentError, NodeUnreachable, SpecError
from bacalhau_node.ports import ContentStore, Scope

_TYPES: Final[dict[str, str]] = {
    "raw": "application/vnd.ipld.raw",
    "car": "application/vnd.ipld.car; version=1; order=dfs; dups=n",
}
_SPAN = re.compile(r"(-?[0-9]{1,18}):(\*|-?[0-9]{1,18})")
_RANGE = re.compile(r"bytes=([0-9]{0,18})-([0-9]{0,18})")


@dataclass(frozen=True)
class _Asked:
    """A request, read."""

    form: Literal["raw", "car"]
    want: Want
    path: str
    root: Cid | None

    @property
    def etag(self) -> str:
        """Names the bytes of the answer."""
        if self.form == "raw":
            return f'"{self.want.cid}.raw"'
        below = f".{sha256(self.path.encode('utf-8', 'surrogateescape')).hexdigest()[:32]}" if self.path else ""
        span = "" if self.want.span is None else ".{}-{}".format(*self.want.span)
        return f'"{self.want.cid}{below}.car.{self.want.scope}{span}"'


class GatewayRoutes:
    """The handlers over a node's gateway."""

    def __init__(self, gateway: Gateway, store: ContentStore, keys: Keys) -> None:
        self._gateway, self._store, self._keys = gateway, store, keys

    def routes(self) -> list[web.RouteDef]:
        """What is answered here."""
        return [web.get("/ipfs/{cid}", self.give), web.get("/ipfs/{cid}/{path:.*}", self.give)]

    async def give(self, request: web.Request) -> web.StreamResponse:
        """A block, or an archive."""
        asked = _read(request)
        await self._check_rights(request, asked)
        if not await asyncio.to_thread(self._store.holds, asked.want.cid):
            only = "only-if-cached" in request.headers.get("Cache-Control", "").lower()
            raise Refused(412 if only else 404, ContentError(f"{asked.want.cid} is not on this node"))
        headers = _headers(request, asked)
        if _is_known(request, asked.etag):
            return web.Response(status=304, headers=headers)
        if asked.form == "raw":
            return await self._block(request, asked, headers)
        return await self._archive(request, asked, headers)

    async def _check_rights(self, request: web.Request, asked: _Asked) -> None:
        """Refuse who may not have it, in the same words whether it is here or not."""
        authorization = request.headers.get("Authorization")
        if self._keys.caller(authorization) is not None:
            return
        token, cid = bearer(authorization) or None, asked.want.cid
        if not await asyncio.to_thread(lambda: self._gateway.allows(token, cid, root=asked.root)):
            error = NodeUnreachable(f"{cid} is not here, or not for you: a key or a capability is needed")
            raise Refused(401, error, **{"WWW-Authenticate": "Bearer"})

    async def _block(self, request: web.Request, asked: _Asked, headers: CIMultiDict[str]) -> web.Response:
        block = await asyncio.to_thread(self._store.block, asked.want.cid)
        status, headers["Accept-Ranges"] = 200, "bytes"
        if (part := _range(request, asked.etag, len(block))) is not None:
            first, stop = part
            if first >= stop:
                error = ContentError(f"the block has {len(block)} bytes")
                raise Refused(416, error, **{"Content-Range": f"bytes */{len(block)}"})
            status, headers["Content-Range"] = 206, f"bytes {first}-{stop - 1}/{len(block)}"
            block = block[first:stop]
        request.app[TRAFFIC].sent += len(block)
        return web.Response(body=block, status=status, headers=headers)

    async def _archive(self, request: web.Request, asked: _Asked, headers: CIMultiDict[str]) -> web.StreamResponse:
        roots = await asyncio.to_thread(self._roots, asked.want)
        headers["X-Ipfs-Roots"] = ",".join(map(str, roots))
        headers["Accept-Ranges"] = "none"
        parts = self._gateway.archive(asked.want)
        async with Stream(request, headers=headers) as stream:
            if request.method != "HEAD":
                async for part in in_threads(parts):
                    await stream.send(part)
        return stream.response

    def _roots(self, want: Want) -> list[Cid]:
        """The CIDs on the path; only the first where a block is missing, which ends the archive early."""
        try:
            return resolved(self._store.block, want)[0]
        except ContentError:
            return [want.cid]


# --- requests ---


def _read(request: web.Request) -> _Asked:
    """What is asked for; raises `SpecError` for what can't be."""
    form, query = _form(request), request.query
    cid = Cid.parse(request.match_info["cid"])
    path = _path(request)
    if form == "raw" and path:
        raise SpecError("a raw block has no path: name it by its own CID, or ask for a CAR (format=car)")
    root = Cid.parse(query["root"]) if "root" in query else None
    scope, span = _scope(query.get("dag-scope", "all")), None
    if form == "car" and "entity-bytes" in query:
        scope, span = "entity", _span(query["entity-bytes"])
    return _Asked(form, Want(cid, steps_of(path), scope, span), path, root)


def _form(request: web.Request) -> Literal["raw", "car"]:
    """The format of the answer: of the query, else the first one of `Accept` that is known here."""
    version = request.query.get("car-version", "1")
    form = request.query.get("format")
    for accepted in [] if form else request.headers.get("Accept", "").lower().split(","):
        kind, *parameters = (item.strip() for item in accepted.split(";"))
        if kind in {"application/vnd.ipld.raw", "application/vnd.ipld.car"}:
            form = kind.rpartition(".")[2]
            version = next((item[8:] for item in parameters if item.startswith("version=")), version)
            break
    match form:
        case "raw":
            return "raw"
        case "car" if version == "1":
            return "car"
        case "car":
            raise SpecError(f"CAR version {version[:20]!r}: only version 1 is sent here")
        case _:
            raise SpecError("only what can be checked is sent here: ask for ?format=car or ?format=raw")


def _path(request: web.Request) -> str:
    """The path below the CID, decoded level by level: an encoded "/" is no level, and no name."""
    levels = [unquote_to_bytes(level) for level in request.rel_url.raw_path.split("/")[3:]]
    if any(b"/" in level for level in levels):
        raise SpecError("a name in the path holds a '/'")
    return b"/".join(levels).decode("utf-8", "surrogateescape").strip("/")


def _scope(text: str) -> Scope:
    match text:
        case "block" | "entity" | "all":
            return text
        case _:
            raise SpecError(f"dag-scope={text[:20]}: it is block, entity or all")


def _span(text: str) -> Span:
    """`from:to`, both included, `*` for the end, negative ones from the end."""
    match = _SPAN.fullmatch(text)
    if match is None:
        raise SpecError(f"entity-bytes={text[:50]}: it is FROM:TO, numbers of bytes, with * for the end")
    last = -1 if match[2] == "*" else int(match[2])
    return int(match[1]), None if last == -1 else last + 1


def _range(request: web.Request, etag: str, size: int) -> tuple[int, int] | None:
    """(first, behind the last) of one range; anything else is as if there were none, as HTTP allows."""
    match = _RANGE.fullmatch(request.headers.get("Range", ""))
    if match is None or not (match[1] or match[2]) or request.headers.get("If-Range", etag) != etag:
        return None
    if not match[1]:
        return max(0, size - int(match[2])), size
    return int(match[1]), min(size, int(match[2]) + 1 if match[2] else size)


def _is_known(request: web.Request, etag: str) -> bool:
    """Whether the client has these very bytes."""
    known = {item.strip().removeprefix("W/") for item in request.headers.get("If-None-Match", "").split(",")}
    return bool(known & {etag, "*"})


# --- answers ---


def _headers(request: web.Request, asked: _Asked) -> CIMultiDict[str]:
    """What is said of every answer; all of it holds forever, since a CID names the same bytes forever."""
    cid, path = asked.want.cid, f"/{quote(asked.path, errors='surrogateescape')}" if asked.path else ""
    kept_by = "private" if "Authorization" in request.headers else "public"
    ending = "bin" if asked.form == "raw" else "car"
    headers = CIMultiDict(
        {
            "Content-Type": _TYPES[asked.form],
            "Content-Disposition": f'attachment; filename="{cid}.{ending}"',
            "X-Content-Type-Options": "nosniff",
            "Cache-Control": f"{kept_by}, max-age=29030400, immutable",
            "Etag": asked.etag,
            "Vary": "Accept, Authorization",
            "X-Ipfs-Path": f"/ipfs/{cid}{path}",
            "X-Ipfs-Roots": str(cid),
        }
    )
    if "format" not in request.query:
        query = f"{request.rel_url.raw_query_string}&" if request.rel_url.raw_query_string else ""
        headers["Content-Location"] = f"/ipfs/{cid}{path}?{query}format={asked.form}"
    return headers
