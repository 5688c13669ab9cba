"""Over the RPC of an IPFS daemon: what goes in keeps the CID that we gave it, what comes out is believed by nobody."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from bacalhau_node import doctor
from bacalhau_node.cid import Cid
from bacalhau_node.content import elsewhere, kubo
from bacalhau_node.content.blocks import BlockStore
from bacalhau_node.content.elsewhere import Elsewhere
from bacalhau_node.content.fetch import fetch
from bacalhau_node.content.gateway import Gateway
from bacalhau_node.content.grants import Grants
from bacalhau_node.content.kubo import Kubo
from bacalhau_node.content.walk import Want
from bacalhau_node.errors import ContentError, NodeUnreachable, SpecError
from tests import rpc_daemon
from tests.rpc_daemon import Daemon, Simulated

FILES = {"a.csv": b"1\n", "year/01.csv": b"22\n", "year/02.csv": os.urandom(700_000), ".hidden": b"h", "sp ace": b""}
NOWHERE = "bafkreigh2akiscaildcqabsyg3dfr6chu3fgpregiymsck7e7aqa4s52zy"


@pytest.fixture(params=rpc_daemon.KINDS)
def daemon(request, tmp_path) -> Iterator[Daemon]:
    with rpc_daemon.daemon(request.param, tmp_path / "daemon") as one:
        yield one


@pytest.fixture
def simulated() -> Iterator[Simulated]:
    with rpc_daemon.simulated() as one:
        yield one


@pytest.fixture
def store(tmp_path) -> Iterator[BlockStore]:
    with contextlib.closing(BlockStore(tmp_path / "store")) as store:
        yield store


@pytest.fixture
def other(tmp_path) -> Iterator[BlockStore]:
    with contextlib.closing(BlockStore(tmp_path / "other")) as store:
        yield store


def add(store: BlockStore, folder: Path) -> Cid:
    for name, data in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return Cid.parse(store.add_path(folder))


async def archive(store: BlockStore, root: Cid) -> AsyncIterator[bytes]:
    for part in Gateway(store, Grants()).archive(Want(root)):
        yield part


async def test_it_says_who_it_is(daemon):
    client = Kubo(daemon.address)
    assert (await client.version()).startswith("0.")
    assert await client.id()
    assert client.name == f"kubo at {daemon.address}"


async def test_what_goes_in_keeps_its_cid_is_pinned_and_comes_out_again(daemon, store, other, tmp_path):
    client, root = Kubo(daemon.address), add(store, tmp_path / "in")
    for _ in range(2):
        await client.take(root, archive(store, root))
        await client.pin(root, name="bacalhau j-1")
    assert daemon.pins()[str(root)] == "bacalhau j-1"
    fetched = await fetch(other, root, [client])
    assert fetched.sources == {client.name: fetched.sources[client.name]}
    assert {path: other.read(cid) for path, cid, _ in other.list(str(root))} == FILES


async def test_a_file_of_a_folder_comes_alone(daemon, store, other, tmp_path):
    client, root = Kubo(daemon.address), add(store, tmp_path / "in")
    await client.take(root, archive(store, root))
    fetched = await fetch(other, root, [client], path="year/02.csv", scope="entity")
    assert other.read(fetched.cid) == FILES["year/02.csv"]
    assert not other.holds(root)


async def test_what_it_does_not_have_is_an_error_in_its_own_words(daemon, store):
    with pytest.raises(ContentError, match=rf"{NOWHERE} could not be fetched.*kubo at .*could not find"):
        await fetch(store, Cid.parse(NOWHERE), [Kubo(daemon.address)])


async def test_an_archive_that_lacks_something_is_not_taken_for_whole(daemon, store, tmp_path):
    root = add(store, tmp_path / "in")
    whole = b"".join([part async for part in archive(store, root)])

    async def half() -> AsyncIterator[bytes]:
        yield whole[: -len(store.block(Cid.parse(store.list(str(root))[-1][1]))) - 100]

    with pytest.raises((ContentError, NodeUnreachable)):
        await Kubo(daemon.address).take(root, half())
    assert str(root) not in daemon.pins()


async def test_nobody_at_the_address_is_told_with_the_reason(store):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
        for call in (Kubo(f"127.0.0.1:{port}").version, Kubo(f"127.0.0.1:{port}").id):
            with pytest.raises(NodeUnreachable, match="answer"):
                await call()
        with pytest.raises(ContentError, match=rf"Asked: kubo at 127.0.0.1:{port} \(.*\): it does not answer"):
            await fetch(store, Cid.parse(NOWHERE), [Kubo(f"127.0.0.1:{port}")])


async def test_what_is_no_daemon_is_told(store):
    async def page(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 405 Method Not Allowed\r\nContent-Length: 4\r\nConnection: close\r\n\r\nnope")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(page, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(ContentError, match="405, so it may be no IPFS daemon's RPC"):
            await fetch(store, Cid.parse(NOWHERE), [Kubo(f"127.0.0.1:{port}")])


async def test_a_daemon_that_searches_without_an_end_is_given_up(simulated, store):
    simulated.searches = True
    with pytest.raises(ContentError, match=r"kubo at .* \(0\.[2-9] s\): nothing came for 0.2 s"):
        await fetch(store, Cid.parse(NOWHERE), [Kubo(simulated.address)], patience=0.2)


async def test_a_daemon_that_lies_is_not_believed(simulated, store):
    simulated.blocks[Cid.parse(NOWHERE).digest] = b"something else"
    with pytest.raises(ContentError, match="it is not to be trusted"):
        await fetch(store, Cid.parse(NOWHERE), [Kubo(simulated.address)])


async def test_no_block_of_any_size_is_read_into_memory(simulated, store):
    simulated.blocks[Cid.parse(NOWHERE).digest] = bytes(50_000_000)
    assert len(await Kubo(simulated.address).block(Cid.parse(NOWHERE), root=Cid.parse(NOWHERE))) < 3_000_000


async def test_nothing_stays_open_when_nothing_is_asked(simulated):
    client = Kubo(simulated.address)
    await asyncio.gather(*(client.version() for _ in range(5)))
    assert client._client is None


@pytest.mark.parametrize(
    ("address", "where"),
    [
        ("/ip4/127.0.0.1/tcp/5001", ("http", "127.0.0.1", 5001)),
        ("/ip6/::1/tcp/5002/http", ("http", "::1", 5002)),
        ("/dns4/ipfs.example.org/tcp/443/https", ("https", "ipfs.example.org", 443)),
        (f"/ip4/10.0.0.1/tcp/5001/p2p/{rpc_daemon._PEER}", ("http", "10.0.0.1", 5001)),
        ("localhost", ("http", "localhost", 5001)),
        ("localhost:99", ("http", "localhost", 99)),
        ("[::1]:5001", ("http", "::1", 5001)),
        ("https://ipfs.example.org:5001/", ("https", "ipfs.example.org", 5001)),
    ],
)
def test_addresses_are_read_as_people_write_them(address, where):
    assert kubo._parsed(address) == where


@pytest.mark.parametrize(
    "address",
    [
        "/ip4/127.0.0.1/udp/5001",
        "/ip4/127.0.0.1/tcp/99999",
        "host:99999",
        "host:http",
        "ftp://host",
        "http://u:p@h",
        "h/x",
    ],
)
def test_what_is_no_address_is_refused_with_the_name_of_the_variable(address, monkeypatch):
    monkeypatch.setenv("BACALHAU_IPFS_CONNECT", address)
    with pytest.raises(SpecError, match=r"BACALHAU_IPFS_CONNECT=.* is not the address"):
        elsewhere.named()


def test_without_the_library_it_is_said_what_to_install(monkeypatch, store):
    monkeypatch.setenv("BACALHAU_IPFS_CONNECT", "127.0.0.1")
    monkeypatch.setitem(__import__("sys").modules, "aioipfs", None)
    with pytest.raises(SpecError, match=r"pip install 'bacalhau-jupyter\[ipfs\]'"):
        Elsewhere(store).listing(NOWHERE, "")


async def test_the_doctor_asks_the_daemon(simulated, monkeypatch):
    assert (await doctor._ipfs()).detail.startswith("none named by BACALHAU_IPFS_CONNECT")
    monkeypatch.setenv("BACALHAU_IPFS_CONNECT", simulated.address)
    assert (await doctor._ipfs()).detail == f"kubo at {simulated.address}, version 0.42.0"
    monkeypatch.setenv("BACALHAU_IPFS_CONNECT", "127.0.0.1:1")
    found = await doctor._ipfs()
    assert (found.state, found.detail) == ("warning", "kubo at 127.0.0.1:1: nobody answers there")
