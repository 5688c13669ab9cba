"""Whole nodes beside a hostile one: what it offers ends, costs little, and reads nothing that is not its own."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from bacalhau_node import dagjson, exchange, plan
from bacalhau_node.cid import RAW, Cid
from bacalhau_node.client import LocalClient
from bacalhau_node.content import car
from bacalhau_node.content.records import encode_outcome
from bacalhau_node.errors import ContentError, NodeUnreachable, ProtocolError
from bacalhau_node.executors.fake import FakeExecutor
from bacalhau_node.executors.link import ValueHead
from bacalhau_node.executors.process import ProcessExecutor
from bacalhau_node.executors.slot import _Pending
from bacalhau_node.ids import NodeId
from bacalhau_node.mail import LONGEST_REASON
from bacalhau_node.masking import NO_SECRETS
from bacalhau_node.messages import (
    Blob,
    Cancel,
    Grant,
    JobMessage,
    Offer,
    Outcome,
    Propose,
    Refuse,
    ShardError,
    ShardOffer,
)
from bacalhau_node.network import NetworkSettings, new_archive, over_memory
from bacalhau_node.node import Node, open_node
from bacalhau_node.outcomes import Telling
from bacalhau_node.plan import store_shard
from bacalhau_node.ports import RawOutcome, ShardStarted, ShardTask
from bacalhau_node.protocol import events as ev
from bacalhau_node.selection import Selection
from bacalhau_node.sharding import ContentRef, Entry, LocalStamp
from bacalhau_node.spec import Command, InputSource, JobSpec, PythonCell, Resources
from bacalhau_node.testing.builders import a_job_id, an_execution
from bacalhau_node.transports.memory import MemoryHub
from tests.hostile_http import hostile

SOME = InputSource(source="ipfs://bafkreihdwdcefgh4dqkjv67uzcmw7ojee6xedzdetojuzjevtenxquvyku/x")
MB = 1_000_000


class Mallory:
    """A node that offers what it likes to another one, and hears how that ended."""

    def __init__(self, node: Node, victim: Node) -> None:
        self.node, self.victim, self.jobs = node, victim, 0
        self.heard: asyncio.Queue[Any] = asyncio.Queue()
        real = victim.engine._mail.links.send

        def send(to: NodeId, message: Any) -> None:
            if to != node.id or not isinstance(message, JobMessage):
                real(to, message)
            elif isinstance(message, Propose | Refuse):
                self.heard.put_nowait(message)

        victim.engine._mail.links.send = send  # type: ignore[method-assign]

    def let_through(self) -> None:
        """Let the nodes talk."""
        del self.victim.engine._mail.links.send

    def offer(self, spec: JobSpec, block: str, *, roots: tuple[str, ...] = (), **more: Any) -> None:
        token = "t" * 43
        self.node.content.flush()
        self.node.grants.open(token, (block, *roots))
        self.jobs += 1
        offer = Offer(a_job_id(self.jobs), spec, (ShardOffer(0, 1, block),), 1, Grant(token), **more)
        self.node.engine._mail.links.send(self.victim.id, offer)

    async def answer(self) -> Any:
        async with asyncio.timeout(20):
            return await self.heard.get()

    async def outcome(self, spec: JobSpec, block: str, **more: Any) -> Outcome:
        self.offer(spec, block, **more)
        outcome = (await self.answer()).outcome
        assert isinstance(outcome, Outcome)
        self.node.engine._mail.links.send(self.victim.id, Cancel((an_execution(job=self.jobs),)))
        async with asyncio.timeout(10):
            while self.victim.engine._compute.held:  # noqa: ASYNC110 - it looks at a machine, which wakes nobody
                await asyncio.sleep(0.01)
        assert self.victim.engine._compute.active == 0, "its slot came back"
        return outcome

    def put(self, data: dict[str, Any]) -> str:
        return self.node.content.put(dagjson.encode(data), codec="dag-json")


Meet = Callable[..., Any]


@pytest.fixture
async def meet(tmp_path: Path) -> AsyncIterator[Meet]:
    hub, archive, nodes = MemoryHub(), new_archive(), []

    async def join(name: str, executor: Any) -> Node:
        settings = NetworkSettings(
            open=over_memory(hub),
            peers=tuple(address for node in nodes for address in node.addresses()),
            archive=archive,
            rules=Selection(isolation="none"),
        )
        nodes.append(await open_node(tmp_path / name, executors=[executor], network=settings))
        return nodes[-1]

    async def met(executor: Any = None) -> Mallory:
        victim = await join("victim", executor or ProcessExecutor(tmp_path / "victim" / "process", slots=2))
        mallory = await join("mallory", FakeExecutor(refusal="it never works"))
        async with asyncio.timeout(20):
            while not (victim.membership and mallory.id in victim.membership.neighbours):  # noqa: ASYNC110 - as above
                await asyncio.sleep(0.01)
        return Mallory(mallory, victim)

    yield met
    for node in nodes:
        await node.close(farewell=False)


def a_script(text: str = "true", **fields: Any) -> JobSpec:
    return JobSpec(task=Command(shell=text), **fields)


# --- what ends ---


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (["a", 7, 1, "bafkreihdwdcefgh4dqkjv67uzcmw7ojee6xedzdetojuzjevtenxquvyku"], "that the job does not have"),
        (["../../a", 0, 1, "bafkreihdwdcefgh4dqkjv67uzcmw7ojee6xedzdetojuzjevtenxquvyku"], "not a path of an entry"),
        (["a", 0, 1, "no cid"], "no source of this node"),
        ({"a": 1}, "not an entry of a plan"),
    ],
)
async def test_a_plan_that_is_none_ends_its_execution(meet: Meet, row: Any, says: str) -> None:
    mallory = await meet()
    outcome = await mallory.outcome(a_script(inputs=(SOME,)), mallory.put({"entries": [row]}))
    assert not outcome.ok
    assert outcome.error is not None
    assert says in outcome.error.message or "CID" in outcome.error.message


async def test_whatever_an_execution_stumbles_over_it_ends(meet: Meet) -> None:
    """A fault that nobody foresaw costs the shard, and not the slot for ever."""

    async def run(_task: ShardTask, _emit: object) -> RawOutcome:
        raise ValueError("nobody foresaw this")

    executor = FakeExecutor(slots=2, isolation="sandbox")
    executor.run = run  # type: ignore[method-assign, assignment]
    mallory = await meet(executor)
    outcome = await mallory.outcome(a_script(), mallory.put({"entries": []}))
    assert outcome.error is not None
    assert (outcome.error.kind, outcome.error.message) == ("node", "nobody foresaw this")


def test_a_shard_that_says_twice_that_it_has_started_has_started_once() -> None:
    told: list[Any] = []
    telling = Telling(an_execution(), told.append, NO_SECRETS)
    telling(ShardStarted())
    telling(ShardStarted())
    assert told == [ev.ExecutionStarted(an_execution())]


# --- what is read ---


async def test_no_file_of_this_machine_is_an_input_of_another_nodes_job(meet: Meet, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("42")
    stat = secret.stat()
    stamp = LocalStamp(str(secret), stat.st_size, stat.st_mtime_ns, stat.st_ino, stat.st_dev)
    mallory = await meet()
    for source in ("ipfs://bafkreihdwdcefgh4dqkjv67uzcmw7ojee6xedzdetojuzjevtenxquvyku/x", "https://example.org/x"):
        block = store_shard((Entry("x", stamp, 2),), [], mallory.node.content)
        spec = a_script("cat /inputs/*; cat inputs/*", inputs=(InputSource(source=source),))
        outcome = await mallory.outcome(spec, block)
        assert outcome.error is not None
        assert "names a file of its own machine" in outcome.error.message
    for place in (str(secret), f"file://{secret}", f"local:{secret}", "s3://bucket/key"):
        mallory.offer(a_script(inputs=(InputSource(source=place),)), block)
        assert "names a place of another machine" in (await mallory.answer()).reason


async def test_an_offer_brings_the_secrets_that_its_spec_names_and_no_others(meet: Meet) -> None:
    mallory = await meet()
    block = mallory.put({"entries": []})
    outcome = await mallory.outcome(a_script(), block, secrets={"LD_PRELOAD": "/tmp/x.so"})
    assert outcome.error is not None
    assert outcome.error.kind == "environment"
    assert "LD_PRELOAD" in outcome.error.message


async def test_two_requesters_never_share_what_is_here_for_a_job(meet: Meet) -> None:
    """Mallory knows the id of a job; its executions are none of that job."""
    mallory = await meet(FakeExecutor(lambda *_: asyncio.sleep(30), slots=2, isolation="sandbox"))
    runner, block = mallory.victim._runner, mallory.victim.content.put(dagjson.encode({"entries": []}))
    own = ev.Run(an_execution(), a_script(), block, 1, mallory.victim.id)
    working = asyncio.create_task(runner.execute(own, lambda _news: None))
    while an_execution().job not in runner._jobs:  # noqa: ASYNC110 - nobody tells of it
        await asyncio.sleep(0.01)
    outcome = await runner.execute(ev.Run(an_execution(1), a_script(), block, 1, mallory.node.id), lambda _news: None)
    assert outcome.error is not None
    assert outcome.error.message == "a job of another node has this id, and is being put away here"
    working.cancel()
    await asyncio.wait([working])


# --- what it costs ---


async def test_a_cells_folder_that_grows_is_not_unpacked(meet: Meet, tmp_path: Path) -> None:
    """A few blocks, named again and again, are as many files as their sender likes."""
    mallory = await meet()
    folder = tmp_path / "bundle"
    folder.mkdir()
    for number in range(30):
        (folder / f"{number}").write_bytes(b"x" * 100_000)
    (folder / "cell.py").write_text("1")
    bundle = mallory.node.content.add_path(folder)
    spec = JobSpec(task=PythonCell(bundle=bundle), resources=Resources(disk=MB))
    outcome = await mallory.outcome(spec, mallory.put({"entries": []}), roots=(bundle,))
    assert outcome.error is not None
    assert "1,000,000 bytes" in outcome.error.message


async def test_the_files_of_a_shard_have_no_more_bytes_than_its_disk(meet: Meet) -> None:
    mallory = await meet()
    cid = mallory.node.content.add_bytes(b"x")
    entries = tuple(Entry(f"{number}", ContentRef(cid), MB // 2) for number in range(3))
    block = store_shard(entries, [], mallory.node.content)
    spec = a_script(inputs=(SOME,), resources=Resources(disk=MB))
    outcome = await mallory.outcome(spec, block, roots=(cid,))
    assert outcome.error is not None
    assert outcome.error.message.startswith(
        "the files of the shard have 1.5 MB, and on another node it has a disk of 1 MB"
    )


async def test_a_block_of_a_plan_that_is_named_again_and_again_is_read_to_a_limit(
    meet: Meet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "MAX_ENTRIES", 1_000)
    mallory = await meet()
    content = mallory.node.content
    (link,) = plan.store_entries(tuple(Entry(f"{number}", ContentRef("c"), 1) for number in range(100)), content)
    with pytest.raises(ContentError, match="more than 1,000 files"):
        plan.read_shard(content, mallory.put({"entries": [], "more": [link] * 5_000}))


async def test_what_a_stranger_left_can_not_be_written_to_when_it_is_stored(meet: Meet) -> None:
    """Not by a process that outlived its shard with the file open, and that puts its time back."""
    held: list[tuple[int, os.stat_result]] = []

    def leave(task: ShardTask, _emit: object) -> RawOutcome:
        outputs = task.scratch / "outputs"
        outputs.mkdir(parents=True)
        path = outputs / "x"
        path.write_bytes(b"a" * MB)
        held.append((os.open(path, os.O_WRONLY), path.stat()))
        return RawOutcome(ok=True, outputs=outputs)

    mallory = await meet(FakeExecutor(leave, slots=2, isolation="sandbox"))
    outcome = await mallory.outcome(a_script(), mallory.put({"entries": []}))
    ((handle, status),) = held
    os.pwrite(handle, b"evil", 0)
    os.utime(handle, ns=(status.st_atime_ns, status.st_mtime_ns))
    os.close(handle)
    content = mallory.victim.content
    assert outcome.outputs is not None
    ((_, cid, _),) = content.list(outcome.outputs)
    path = content.file(cid)
    assert path is not None
    assert path.read_bytes() == b"a" * MB


# --- what a node believes of results, and for how long it gives content away ---


def _vague(outcome: Outcome) -> Outcome:
    return structs.replace(outcome, stdout=Blob(0, None, None))


def _large(outcome: Outcome) -> Outcome:
    return structs.replace(outcome, error=ShardError("exception", message="x" * 2 * MB))


def _endless(outcome: Outcome) -> Outcome:
    return structs.replace(outcome, seconds=float("inf"))


@pytest.mark.parametrize("change", [_vague, _large, _endless])
async def test_an_outcome_that_no_node_makes_is_a_lie_and_never_waited_for(
    meet: Meet, change: Callable[[Outcome], Outcome]
) -> None:
    mallory = await meet()
    trade = mallory.victim._exchange
    good = encode_outcome(mallory.node.content, Outcome(ok=True))
    proposal = Propose(an_execution(), good, 0)
    assert await trade.collect(mallory.node.id, proposal) is None
    missing = await trade.collect(mallory.node.id, structs.replace(proposal, outcome=change(good)))
    assert missing is not None
    assert missing.lied


async def test_an_offer_whose_packing_fails_for_any_reason_does_not_wait_for_ever(meet: Meet) -> None:
    mallory = await meet(FakeExecutor(slots=2, isolation="sandbox"))
    requester = mallory.node

    async def pack(_block: str) -> None:
        raise ValueError("nobody foresaw this")

    requester._exchange._packing.pack = pack  # type: ignore[union-attr, method-assign, assignment]
    mallory.let_through()
    client = LocalClient(requester)
    submission = await client.submit(a_script())
    async with asyncio.timeout(20):
        _ = [update async for update in client.updates(submission.job)]
    (shard,) = (await client.job(submission.job)).shards
    assert shard.outcome is not None
    assert shard.outcome.error is not None
    assert "could not be offered" in shard.outcome.error.message


async def test_what_is_packed_when_its_job_has_ended_opens_nothing(meet: Meet) -> None:
    mallory = await meet()
    trade, content = mallory.victim._exchange, mallory.victim.content
    block = content.put(dagjson.encode({"entries": []}), codec="dag-json")
    offer = Offer(a_job_id(), a_script(), (ShardOffer(0, 1, block),), 1)
    packing = asyncio.create_task(trade.pack(mallory.node.id, offer))
    while a_job_id() not in trade._blocks:  # noqa: ASYNC110 - nobody tells of it
        await asyncio.sleep(0)
    trade.ended(a_job_id())
    ready, failed = await packing
    assert (ready.shards, failed) == ((), [])
    token = trade._token(a_job_id(), mallory.node.id)
    assert not mallory.victim.grants.allows(token, Cid.parse(block))


@pytest.mark.parametrize(
    ("url", "asked"),
    [
        ("http://192.0.2.1:8080", True),
        ("https://node.example.org/", True),
        ("http://192.0.2.1/admin/delete", False),
        ("http://192.0.2.1/?x=", False),
        ("http://user:word@192.0.2.1", False),
        ("ftp://192.0.2.1", False),
        ("http://192.0.2.1:99999", False),
        ("http://[::1", False),
    ],
)
async def test_the_gateway_that_a_requester_names_is_a_server_and_no_page_of_it(
    meet: Meet, url: str, asked: bool
) -> None:
    mallory = await meet()
    run = ev.Run(an_execution(), a_script(), "block", 1, mallory.node.id, Grant("t", (url,)))
    assert len(mallory.victim._exchange.providers(run)) == 1 + asked


@pytest.mark.parametrize(("linked_from", "asked"), [("", 0), ("10.0.0.5", 0), ("127.0.0.1", 1)])
async def test_a_gateway_that_only_this_machine_reaches_is_asked_for_nodes_on_it(
    meet: Meet, monkeypatch: pytest.MonkeyPatch, linked_from: str, asked: int
) -> None:
    """What a stranger names may be the printer next door; who is linked over loopback is here, too."""
    mallory = await meet()
    root = mallory.node.content.put(b"wanted")
    mallory.node.content.flush()
    mallory.node.grants.open("t", [root])
    monkeypatch.setattr(mallory.victim._exchange._transport, "host_of", lambda _node: linked_from)
    async with hostile() as printer:
        run = ev.Run(an_execution(), a_script(), "block", 1, mallory.node.id, Grant("t", (printer.url,)))
        exchange = mallory.victim._exchange
        await exchange.bring(root, exchange.providers(run), limit=MB)
    assert mallory.victim.content.has(root), "its requester sent it over a stream"
    assert len(printer.asked) == asked


class _Drip:
    """Sends an archive a byte at a time, never to its end."""

    name = "node drip"

    async def car(self, root: Cid, **_: Any) -> AsyncIterator[bytes]:
        data = car.header([root])
        for at in range(len(data)):
            await asyncio.sleep(0.01)
            yield data[at : at + 1]
        while True:
            await asyncio.sleep(0.01)
            yield b""

    async def block(self, cid: Cid, *, root: Cid) -> bytes:
        raise ContentError(f"no {cid} of {root}")


async def test_who_sends_a_byte_now_and_then_is_given_up(meet: Meet, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nobody else waits for it: another node may give the same content meanwhile."""
    monkeypatch.setattr(exchange, "SLOWEST", 1.0)
    mallory = await meet()
    root = Cid.of(b"wanted", codec=RAW)
    one = asyncio.create_task(mallory.victim._exchange.bring(str(root), [_Drip()], limit=MB))
    await asyncio.sleep(0)
    mallory.node.content.put(b"wanted")
    mallory.node.content.flush()
    mallory.node.grants.open("t", [str(root)])
    run = ev.Run(an_execution(), a_script(), "block", 1, mallory.node.id, Grant("t"))
    async with asyncio.timeout(10):
        await mallory.victim._exchange.bring(str(root), mallory.victim._exchange.providers(run), limit=MB)
    with pytest.raises(NodeUnreachable, match=r"comes too slowly from node drip"):
        await one


async def test_a_refusal_is_cut_and_is_one_line(meet: Meet) -> None:
    mallory = await meet()
    heard: list[Any] = []
    mallory.victim.engine._mail._post = heard.append  # type: ignore[method-assign]
    mallory.victim.engine._mail._heard(mallory.node.id, Refuse((), "never", "x" * MB))
    mallory.victim.engine._mail._heard(mallory.node.id, Refuse((), "never", "\x1b[2J\nnode n-1: all is well"))
    assert [len(event.message.reason) for event in heard[:1]] == [LONGEST_REASON]
    assert heard[1].message.reason == "\\x1b[2J\\nnode n-1: all is well", "it acts on no terminal"


async def test_a_cell_whose_unpacking_was_cancelled_is_unpacked_again(
    meet: Meet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread goes on; what it leaves is in nobody's way."""
    mallory = await meet(FakeExecutor(slots=2, isolation="sandbox"))
    runner, content = mallory.victim._runner, mallory.victim.content
    bundle = await LocalClient(mallory.victim).put_bundle({"cell.py": b"1"})
    block = content.put(dagjson.encode({"entries": []}), codec="dag-json")
    spec = JobSpec(task=PythonCell(bundle=bundle))
    began, go, real = threading.Event(), threading.Event(), content.export

    def export(cid: str, target: Path) -> None:
        began.set()
        go.wait(10)
        real(cid, target)

    monkeypatch.setattr(content, "export", export)
    first = asyncio.create_task(runner.execute(ev.Run(an_execution(0), spec, block, 2, mallory.victim.id), print))
    await asyncio.to_thread(began.wait, 10)
    first.cancel()
    go.set()
    await asyncio.wait([first])
    second = await runner.execute(ev.Run(an_execution(1), spec, block, 2, mallory.victim.id), lambda _news: None)
    assert second.ok, second.error


@pytest.mark.parametrize("name", ["..", "../../etc/passwd", "/etc/passwd", "a/b"])
def test_a_value_lies_in_the_shards_own_folder(tmp_path: Path, name: str) -> None:
    """The agent is in the same box as the cell, which may speak in its place."""
    pending = object.__new__(_Pending)
    pending.scratch = tmp_path
    with pytest.raises(ProtocolError, match="scratch folder"):
        pending._value(ValueHead(kind="bytes", type="bytes", file=name), b"")
