"""The gateway over HTTP: the specification's words, who may have what, and our own reader at its other end."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web
from yarl import URL

from bacalhau_node.api.auth import Caller, own_key
from bacalhau_node.api.server import ApiServer, bind
from bacalhau_node.cid import RAW, Cid
from bacalhau_node.client import LocalClient
from bacalhau_node.content import car
from bacalhau_node.content.blocks import BlockStore
from bacalhau_node.content.fetch import fetch, listing
from bacalhau_node.content.providers import HttpProvider
from bacalhau_node.content.walk import Want, selected, steps_of
from bacalhau_node.errors import ContentError, NodeUnreachable, SpecError
from bacalhau_node.executors.process import ProcessExecutor
from bacalhau_node.node import open_node

NOWHERE = "bafkreigh2akiscaildcqabsyg3dfr6chu3fgpregiymsck7e7aqa4s52zy"
CAR, RAW_TYPE = "application/vnd.ipld.car", "application/vnd.ipld.raw"
FILES = {
    "small.csv": b"a,b\n1,2\n",
    "large.bin": bytes(range(256)) * 4_000,
    "deep/er/x.csv": b"x\n",
    "sp ace/ü%2F?#&+.csv": b"strange\n",
}


@dataclass
class Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes


@dataclass
class Node:
    """A node with its server, and `root`: a folder with `FILES`, which nobody may have without a key."""

    server: ApiServer
    local: LocalClient
    session: aiohttp.ClientSession
    root: Cid

    @property
    def store(self) -> BlockStore:
        assert isinstance(self.local.node.content, BlockStore)
        return self.local.node.content

    async def ask(
        self, path: str, *, key: str | None = "root", method: str = "GET", headers: Mapping[str, str] | None = None
    ) -> Answer:
        sent = dict(headers or {}) | ({"Authorization": f"Bearer {key}"} if key else {})
        url = URL(self.server.url + path, encoded=True)
        async with self.session.request(method, url, headers=sent) as response:
            return Answer(response.status, response.headers, await response.read())

    def archive(self, path: str = "", *, scope: str = "all", span: tuple[int, int | None] | None = None) -> bytes:
        want = Want(self.root, steps_of(path), scope, span)  # type: ignore[arg-type]  # it is one of the three
        return car.header([self.root]) + b"".join(car.section(*pair) for pair in selected(self.store.block, want))


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[Node]:
    local = LocalClient(await open_node(tmp_path / "data", executors=[ProcessExecutor(tmp_path / "process", slots=1)]))
    server = ApiServer(local, [(sha256(b"root").digest(), Caller("root", "admin")), own_key("token")])
    await server.start(bind("127.0.0.1", 0))
    for name, data in FILES.items():
        (tmp_path / "files" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "files" / name).write_bytes(data)
    root = await asyncio.to_thread(local.node.content.add_path, tmp_path / "files")
    async with aiohttp.ClientSession() as session:
        yield Node(server, local, session, Cid.parse(root))
    await local.close()
    await server.close()


@pytest.fixture
def store(tmp_path: Path):
    opened = BlockStore(tmp_path / "other")
    yield opened
    opened.close()


# --- the specification ---


@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_a_raw_block_comes_with_the_headers_of_the_specification(node, method):
    block = node.store.block(node.root)
    answer = await node.ask(f"/ipfs/{node.root}?format=raw", method=method)
    assert answer.status == 200
    assert answer.body == (block if method == "GET" else b"")
    wanted = {
        "Content-Type": RAW_TYPE,
        "Content-Length": str(len(block)),
        "X-Content-Type-Options": "nosniff",
        "Cache-Control": "private, max-age=29030400, immutable",
        "Content-Disposition": f'attachment; filename="{node.root}.bin"',
        "X-Ipfs-Path": f"/ipfs/{node.root}",
        "X-Ipfs-Roots": str(node.root),
        "Etag": f'"{node.root}.raw"',
        "Accept-Ranges": "bytes",
    }
    assert {name: answer.headers.get(name) for name in wanted} == wanted


@pytest.mark.parametrize("scope", ["block", "entity", "all"])
async def test_an_archive_has_the_way_and_what_the_scope_says(node, scope):
    for path in ("", "small.csv", "large.bin", "deep/er", "deep/er/x.csv"):
        for method in ("GET", "HEAD"):
            answer = await node.ask(f"/ipfs/{node.root}/{path}?format=car&dag-scope={scope}", method=method)
            assert answer.status == 200
            assert answer.body == (node.archive(path, scope=scope) if method == "GET" else b"")
            assert answer.headers["Content-Type"] == f"{CAR}; version=1; order=dfs; dups=n"
            assert answer.headers["X-Content-Type-Options"] == "nosniff"
            assert answer.headers["Content-Disposition"] == f'attachment; filename="{node.root}.car"'
            roots = answer.headers["X-Ipfs-Roots"].split(",")
            assert roots[0] == str(node.root)
            assert len(roots) == 1 + len(steps_of(path))


async def test_every_format_path_scope_and_range_has_an_etag_of_its_own(node):
    asked = ["?format=raw", "?format=car", "?format=car&dag-scope=entity", "?format=car&dag-scope=block"]
    asked += ["?format=car&entity-bytes=0:5", "?format=car&entity-bytes=0:*", "/deep?format=car", "/deep/er?format=car"]
    etags = [(await node.ask(f"/ipfs/{node.root}{one}", method="HEAD")).headers["Etag"] for one in asked]
    assert len(set(etags)) == len(asked)
    for one, etag in zip(asked, etags, strict=True):
        for known in (etag, f'"x", W/{etag}', "*"):
            answer = await node.ask(f"/ipfs/{node.root}{one}", headers={"If-None-Match": known})
            assert (answer.status, answer.body) == (304, b"")
        assert (await node.ask(f"/ipfs/{node.root}{one}", headers={"If-None-Match": '"x"'})).status == 200


async def test_the_format_is_asked_for_by_the_query_or_by_accept(node):
    where = f"/ipfs/{node.root}"
    for accept, kind in (
        (RAW_TYPE, RAW_TYPE),
        (CAR, CAR),
        (f"text/html, {CAR}; version=1; order=dfs;q=0.5", CAR),
        (f"{RAW_TYPE.upper()}", RAW_TYPE),
    ):
        answer = await node.ask(where, headers={"Accept": accept})
        assert (answer.status, answer.headers["Content-Type"].partition(";")[0]) == (200, kind)
        assert answer.headers["Content-Location"].endswith(f"?format={kind.rpartition('.')[2]}")
    assert (await node.ask(f"{where}?format=raw", headers={"Accept": CAR})).headers["Content-Type"] == RAW_TYPE


BAD = [
    "",
    "?format=html",
    "?format=ipns-record",
    "/small.csv?format=raw",
    "?format=car&dag-scope=everything",
    "?format=car&entity-bytes=1",
    "?format=car&entity-bytes=a:b",
    "?format=car&car-version=2",
    "?format=raw&root=nonsense",
    "/..?format=car",
    "/a/../b?format=car",
    "/a%2Fb?format=car",
    "/a%00b?format=car",
]


async def test_what_can_not_be_meant_is_refused(node):
    for query in BAD:
        assert (await node.ask(f"/ipfs/{node.root}{query}", headers={"Accept": "*/*"})).status == 400, query
    assert (await node.ask("/ipfs/nonsense?format=raw")).status == 400


async def test_a_range_of_an_entity_brings_its_blocks(node):
    asked = {"0:0": (0, 1), "300000:400000": (300_000, 400_001), "-5:*": (-5, None), "5:-1": (5, None), "9:3": (9, 4)}
    for text, span in asked.items():
        answer = await node.ask(f"/ipfs/{node.root}/large.bin?format=car&entity-bytes={text}")
        assert answer.body == node.archive("large.bin", scope="entity", span=span)


async def test_ranges_of_raw_blocks(node):
    block = node.store.block(node.root)
    where, size = f"/ipfs/{node.root}?format=raw", len(block)
    for asked, part in (("0-4", block[:5]), ("10-", block[10:]), ("-7", block[-7:]), (f"5-{size + 9}", block[5:])):
        answer = await node.ask(where, headers={"Range": f"bytes={asked}"})
        assert (answer.status, answer.body) == (206, part)
        assert answer.headers["Content-Range"].endswith(f"/{size}")
    for asked in ("0-1,3-4", "x-", "-"):
        assert (await node.ask(where, headers={"Range": f"bytes={asked}"})).status == 200
    answer = await node.ask(where, headers={"Range": f"bytes={size}-"})
    assert (answer.status, answer.headers["Content-Range"]) == (416, f"bytes */{size}")
    assert (await node.ask(where, headers={"Range": "bytes=0-1", "If-Range": '"other"'})).status == 200
    assert (await node.ask(where, headers={"Range": "bytes=0-1", "If-Range": f'"{node.root}.raw"'})).status == 206


async def test_only_a_missing_root_is_not_found(node):
    for query in ("?format=raw", "?format=car", "/x?format=car"):
        assert (await node.ask(f"/ipfs/{NOWHERE}{query}")).status == 404
        only = {"Cache-Control": "only-if-cached"}
        assert (await node.ask(f"/ipfs/{NOWHERE}{query}", headers=only)).status == 412
    answer = await node.ask(f"/ipfs/{node.root}/deep/nothing?format=car")
    assert (answer.status, answer.body) == (200, node.archive("deep/nothing"))
    assert len(answer.headers["X-Ipfs-Roots"].split(",")) == 2


# --- rights ---


async def test_without_a_key_there_is_the_same_answer_for_what_is_here_and_what_is_not(node):
    node.local.node.grants.open("grant", [NOWHERE])
    answers = []
    for cid in (node.root, Cid.of(b"nowhere", codec=RAW)):
        for key in (None, "wrong", "grant"):
            answer = await node.ask(f"/ipfs/{cid}?format=raw", key=key)
            answers.append((answer.status, answer.body.replace(str(cid).encode(), b"CID")))
    assert len(set(answers)) == 1
    assert answers[0][0] == 401
    assert (await node.ask(f"/ipfs/{NOWHERE}?format=raw", key="grant")).status == 404


async def test_a_capability_opens_its_root_and_the_blocks_below_it_and_nothing_else(node):
    grants = node.local.node.grants
    grants.open("grant", [str(node.root)])
    leaf = car.links(node.root, node.store.block(node.root))[0]
    hidden = node.store.add_bytes(b"hidden")
    for path in (f"/ipfs/{node.root}?format=car", f"/ipfs/{leaf}?format=raw&root={node.root}"):
        assert (await node.ask(path, key="grant")).status == 200
    for path in (
        f"/ipfs/{hidden}?format=raw",
        f"/ipfs/{hidden}?format=raw&root={node.root}",
        f"/ipfs/{hidden}?format=raw&root={hidden}",
        f"/ipfs/{leaf}?format=raw",
        f"/ipfs/{leaf}?format=raw&root={hidden}",
        f"/v0/content/{node.root}",
        "/v0/jobs",
        "/metrics",
        "/ipfs/../v0/jobs",
        "/ipfs/..%2fv0/jobs",
        "//ipfs/x/../../v0/jobs",
        "/ipfs",
        "/ipfs/",
    ):
        assert (await node.ask(path, key="grant")).status in {400, 401}, path
    assert (await node.ask(f"/ipfs/{node.root}?format=car", key="grant", method="POST")).status in {401, 405}
    assert (
        await node.ask(f"/ipfs/{node.root}?format=car", key="grant", headers={"Host": "evil.example"})
    ).status == 403
    page = {"Origin": "http://localhost"}
    assert (await node.ask(f"/ipfs/{node.root}?format=car", key="grant", headers=page)).status == 403
    grants.close("grant")
    assert (await node.ask(f"/ipfs/{node.root}?format=car", key="grant")).status == 401


async def test_what_is_public_is_for_everybody_block_by_block_too(node):
    node.local.node.grants.publish(str(node.root))
    leaf = car.links(node.root, node.store.block(node.root))[0]
    for path in (f"/ipfs/{node.root.v1()}?format=car", f"/ipfs/{leaf}?format=raw"):
        answer = await node.ask(path, key=None)
        assert answer.status == 200
        assert answer.headers["Cache-Control"].startswith("public, ")
    node.local.node.grants.withdraw(str(node.root))
    assert (await node.ask(f"/ipfs/{leaf}?format=raw", key=None)).status == 401


# --- our own reader ---


async def test_a_folder_is_fetched_with_a_capability_and_is_the_same(node, store, tmp_path):
    node.local.node.grants.open("grant", [str(node.root)])
    provider = HttpProvider(node.server.url, token="grant")
    fetched = await fetch(store, node.root, [provider])
    assert fetched.sources == {node.server.url: len(node.archive())}
    store.export(fetched.cid, tmp_path / "out")
    found = {str(path.relative_to(tmp_path / "out")): path for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert {name: path.read_bytes() for name, path in found.items()} == FILES


async def test_single_files_are_fetched_by_path_whatever_they_are_called(node, store):
    provider = HttpProvider(node.server.url, token="root")
    assert await listing(store, node.root, [provider]) == node.store.list(str(node.root))
    for name, data in FILES.items():
        fetched = await fetch(store, node.root, [provider], path=name, scope="entity")
        assert store.read(fetched.cid) == data
    assert not store.holds(node.root)
    with pytest.raises(ContentError, match="there is no nothing in"):
        await fetch(store, node.root, [provider], path="deep/nothing")


async def test_single_blocks_complete_what_was_here_before(node, store):
    node.local.node.grants.open("grant", [str(node.root)])
    for cid, block in selected(node.store.block, Want(node.root)):
        if not car.links(cid, block) and len(block) > 1000:
            store.keep(cid, block)
    fetched = await fetch(store, node.root, [HttpProvider(node.server.url, token="grant")])
    assert 0 < fetched.bytes < 10_000
    assert store.holds(node.root)


async def test_a_bit_that_no_time_tells_of_is_found_by_who_gets_it(node, store):
    data = FILES["large.bin"]
    root = Cid.parse(node.store.add_bytes(data))
    path = node.store.file(str(root))
    times = path.stat()
    path.chmod(0o644)
    path.write_bytes(data[:-1] + bytes((data[-1] ^ 1,)))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(ContentError, match=r"damaged, or its sender lies.*not to be trusted"):
        await fetch(store, root, [HttpProvider(node.server.url, token="root")])
    assert not store.holds(root)


async def test_an_answer_that_a_missing_block_cuts_off_is_no_whole_one(node, store, tmp_path):
    whole = BlockStore(tmp_path / "whole")
    data = b"".join(bytes((number,)) * 300_000 for number in range(20))
    root = Cid.parse(whole.add_bytes(data))
    lost = car.links(root, whole.block(root))[15]
    node.store._pending[root.digest] = (root.codec, whole.block(root))  # damaged by whom ever: a root without a leaf
    for leaf in car.links(root, whole.block(root)):
        if leaf != lost:
            node.store._pending[leaf.digest] = (leaf.codec, whole.block(leaf))
    with pytest.raises(aiohttp.ClientPayloadError):
        await node.ask(f"/ipfs/{root}?format=car")
    provider = HttpProvider(node.server.url, token="root")
    with pytest.raises(ContentError, match=r"at least 1 block did not.*it answers 404"):
        await fetch(store, root, [provider])
    assert not store.holds(root)
    others = _Blocks(whole)
    fetched = await fetch(store, root, [provider, others])
    assert fetched.bytes == len(whole.block(lost)) + len(whole.block(root))
    assert store.read(fetched.cid) == data
    whole.close()


class _Blocks:
    """A provider of single blocks."""

    name = "others"

    def __init__(self, store: BlockStore) -> None:
        self._store = store

    async def car(self, root: Cid, *, path: str = "", scope: str = "all") -> AsyncIterator[bytes]:
        raise NodeUnreachable("no archives here")
        yield b""

    async def block(self, cid: Cid, *, root: Cid) -> bytes:
        return self._store.block(cid)


@pytest.fixture
async def stranger():
    """A web server that is no gateway: it answers what a test puts into it."""
    replies: list[web.Response] = []

    async def answer(_: web.Request) -> web.Response:
        return replies[0]

    app = web.Application()
    app.router.add_get("/{path:.*}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    bound = bind("127.0.0.1", 0)
    await web.SockSite(runner, bound).start()
    yield f"http://127.0.0.1:{bound.getsockname()[1]}", replies
    await runner.cleanup()


@pytest.mark.parametrize(
    ("status", "kind", "why"),
    [
        (200, "text/html", "answers with text/html, so it is no trustless gateway"),
        (200, CAR, "not a CAR archive.*it is not to be trusted"),
        (404, "text/plain", "it answers 404"),
        (401, "text/plain", "it answers 401"),
        (500, "text/plain", "it answers 500"),
        (504, "text/plain", "it answers 504"),
    ],
)
async def test_what_others_answer_is_told(stranger, store, status, kind, why):
    url, replies = stranger
    replies.append(web.Response(status=status, body=b"\0", content_type=kind))
    with pytest.raises(ContentError, match=why):
        await fetch(store, Cid.parse(NOWHERE), [HttpProvider(url)])


async def test_where_nobody_listens_is_said_and_bad_addresses_are_refused(store):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://user:secret@127.0.0.1:{closed.getsockname()[1]}"
    with pytest.raises(ContentError, match=r"does not answer") as caught:
        await fetch(store, Cid.parse(NOWHERE), [HttpProvider(url)])
    assert "secret" not in str(caught.value)
    for bad in ("ftp://host", "host:80", "http://", "/ip4/127.0.0.1/tcp/1"):
        with pytest.raises(SpecError, match="not the address of a gateway"):
            HttpProvider(bad)


async def test_addresses_that_are_not_to_be_dialled_are_not(node, store):
    asked = []

    def refuse(info):
        asked.append(info[4][0])
        raise OSError(f"{info[4][0]} is not asked")

    with pytest.raises(ContentError, match=r"127\.0\.0\.1 is not asked"):
        await fetch(store, node.root, [HttpProvider(node.server.url, token="root", sockets=refuse)])
    assert asked == ["127.0.0.1"]
