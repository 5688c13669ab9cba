"""Jobs over several nodes of one process: what each fetches, and what happens when nodes die, lie or do nothing."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from bacalhau_node import selection
from bacalhau_node.api import metrics
from bacalhau_node.client import JobView, LocalClient, ShardBytes, Update
from bacalhau_node.errors import SpecError
from bacalhau_node.executors.fake import FakeExecutor
from bacalhau_node.executors.process import ProcessExecutor
from bacalhau_node.ids import NodeId
from bacalhau_node.messages import Offer, Outcome, Propose, ShardOffer
from bacalhau_node.network import NetworkSettings, new_archive, over_memory
from bacalhau_node.node import Node, open_node
from bacalhau_node.ports import RawOutcome, RawValue, ShardTask
from bacalhau_node.protocol import events as ev
from bacalhau_node.protocol import watch
from bacalhau_node.protocol.placement import LEASE
from bacalhau_node.selection import Selection
from bacalhau_node.spec import Command, InputSource, JobSpec, PythonCell, Resources, Sharding
from bacalhau_node.testing.builders import a_job_id
from bacalhau_node.transports.memory import MemoryHub

PLAIN = Selection(isolation="none")
SIZE = 20_000

Join = Callable[..., Awaitable[Node]]


class Net:
    """A network of this test. `join` opens a node below `tmp_path`; a node of the same name is the same one again."""

    def __init__(self, root: Path) -> None:
        self.root, self.hub, self.archive = root, MemoryHub(), new_archive()
        self.nodes: dict[str, Node] = {}

    async def join(self, name: str, executor: Any = None, **settings: Any) -> Node:
        folder = self.root / name
        executor = executor or ProcessExecutor(folder / "process", slots=2)
        known = [address for node in self.nodes.values() for address in node.addresses()]
        network = NetworkSettings(
            **{
                "open": over_memory(self.hub),
                "peers": tuple(known),
                "archive": self.archive,
                "rules": PLAIN,
                **settings,
            }
        )
        self.nodes[name] = await open_node(folder, executors=[executor], network=network)
        for node in self.nodes.values():
            await until(lambda node=node: len(_membership(node)) >= len(self.nodes) - 1)
        return self.nodes[name]

    async def leave(self, name: str, *, farewell: bool = False) -> None:
        await self.nodes.pop(name).close(farewell=farewell)


def _membership(node: Node) -> Any:
    assert node.membership is not None
    return node.membership


@pytest.fixture
async def net(tmp_path: Path) -> AsyncIterator[Net]:
    net = Net(tmp_path)
    yield net
    for node in net.nodes.values():
        await node.close(farewell=False)


async def until(condition: Callable[[], Any], *, seconds: float = 60) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - it looks at machines, which wake nobody
            await asyncio.sleep(0.01)


async def run(node: Node, spec: JobSpec, **more: Any) -> tuple[JobView, list[Update]]:
    client = LocalClient(node)
    submission = await client.submit(spec, **more)
    async with asyncio.timeout(90):
        updates = [update async for update in client.updates(submission.job)]
    return await client.job(submission.job), updates


async def a_cell(node: Node, source: str, **fields: Any) -> JobSpec:
    bundle = await LocalClient(node).put_bundle({"cell.py": source.encode()})
    return JobSpec(task=PythonCell(bundle=bundle), **fields)


def a_command(**fields: Any) -> JobSpec:
    return JobSpec(task=Command(argv=("true",)), **fields)


def values(view: JobView) -> list[bytes | None]:
    return [shard.outcome.value.blob.inline if shard.outcome else None for shard in view.shards]


def of_bytes(folder: Path, count: int) -> Path:
    folder.mkdir()
    for number in range(count):
        (folder / f"{number:03}.txt").write_bytes(bytes([number]) * SIZE)
    return folder


# --- content ---

TOTAL = "print('shard', shard.index)\nimport time\ntime.sleep(0.3)\nsum(len(path.read_bytes()) for path in inputs)"


@pytest.mark.parametrize("by", ["path", "cid"])
async def test_each_node_fetches_only_the_bytes_of_its_own_shards(net: Net, tmp_path: Path, by: str) -> None:
    """A folder of 100 files in 10 shards on three nodes; none of it is copied first on the requester's machine."""
    first = await net.join("a")
    for name in ("b", "c"):
        await net.join(name)
    source = str(of_bytes(tmp_path / "data", 100))
    if by == "cid":
        source = f"ipfs://{first.content.add_path(Path(source))}"
    spec = await a_cell(first, TOTAL, inputs=(InputSource(source=source),), sharding=Sharding(n=10))
    view, updates = await run(first, spec)
    assert view.state == "Completed"
    assert values(view) == [str(10 * SIZE).encode()] * 10
    ran = {shard.index: shard.node for shard in view.shards}
    assert set(ran.values()) == {node.id for node in net.nodes.values()}, "all of them work"
    fetched: dict[NodeId, set[str]] = defaultdict(set)
    amount: dict[NodeId, int] = defaultdict(int)
    for update in updates:
        if isinstance(update, ShardBytes) and update.cid:
            node = ran[update.shard]
            assert node is not None
            fetched[node].add(update.name)
            amount[node] += update.done
    for node in net.nodes.values():
        mine = {path for shard in view.shards if shard.node == node.id for path in shard.inputs}
        assert fetched[node.id] == (set() if node is first else mine)
        assert amount[node.id] == (0 if node is first else len(mine) * SIZE)


async def test_large_results_and_outputs_come_back_whole(net: Net) -> None:
    first = await net.join("a", FakeExecutor(refusal="not here"))
    await net.join("b")
    spec = await a_cell(first, "(outputs / 'a.bin').write_bytes(b'x' * 300_000)\nprint('y' * 100_000)\nb'z' * 200_000")
    view, _ = await run(first, spec)
    (shard,) = view.shards
    assert shard.node == net.nodes["b"].id
    outcome = shard.outcome
    assert outcome is not None
    assert outcome.value.blob.cid is not None
    assert outcome.outputs is not None
    assert outcome.stdout.cid is not None
    assert first.content.read(outcome.value.blob.cid) == b"z" * 200_000
    assert first.content.list(outcome.outputs)[0][0] == "a.bin"
    await until(lambda: not net.nodes["b"].engine.running)
    await net.leave("b")
    assert first.content.read(outcome.stdout.cid) == b"y" * 100_000 + b"\n", "it does not need the other node any more"


async def test_a_file_that_changed_before_it_was_offered_fails_its_shard(net: Net, tmp_path: Path) -> None:
    first = await net.join("a", FakeExecutor(refusal="not here"))
    folder = of_bytes(tmp_path / "data", 2)
    spec = await a_cell(first, TOTAL, inputs=(InputSource(source=str(folder)),), sharding=Sharding(n=2))
    client = LocalClient(first)
    submission = await client.submit(spec)
    (folder / "001.txt").write_text("something else")
    await net.join("b")
    async with asyncio.timeout(60):
        _ = [update async for update in client.updates(submission.job)]
    view = await client.job(submission.job)
    assert [shard.state for shard in view.shards] == ["kept", "failed"]
    assert view.shards[1].outcome is not None
    error = view.shards[1].outcome.error
    assert error is not None
    assert error.kind == "input"
    assert "001.txt" in error.message
    assert "changed" in error.message


# --- secrets ---


async def test_secrets_reach_the_shard_of_another_node_and_no_file(net: Net, tmp_path: Path) -> None:
    first = await net.join("a", FakeExecutor(refusal="not here"))
    await net.join("b")
    secret = "sesame-4711-open"
    spec = await a_cell(first, "import os\nos.environ['KEY'][::-1]", secrets=("KEY",))
    view, _ = await run(first, spec, secrets={"KEY": secret})
    assert values(view) == [f'"{secret[::-1]}"'.encode()]
    for name in list(net.nodes):
        await net.leave(name)
    assert await asyncio.to_thread(_files_with, tmp_path, secret.encode()) == []


def _files_with(folder: Path, data: bytes) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and data in path.read_bytes()]


# --- other people's jobs ---


async def test_a_job_of_another_node_is_isolated_or_refused_with_the_reason(net: Net) -> None:
    """No plain process for a stranger; the requester's user reads why, for each node."""
    first = await net.join("a", FakeExecutor(refusal="it has no hands"))
    other = await net.join("b", FakeExecutor(), rules=Selection())
    view, _ = await run(first, a_command())
    assert view.state == "Failed"
    assert f"{first.id}: it has no hands" in view.reason
    assert other.id in view.reason


async def test_the_owners_rules_hold_for_other_nodes(net: Net) -> None:
    first = await net.join("a", FakeExecutor(refusal="it has no hands"))
    seen: list[JobSpec] = []

    def behave(task: ShardTask, _emit: object) -> int:
        seen.append(task.spec)
        return 1

    rules = Selection(cpu=2, timeout=60.0, packages=("numpy",))
    await net.join("b", FakeExecutor(behave, isolation="sandbox"), rules=rules)
    view, _ = await run(first, a_command(resources=Resources(cpu=8)))
    assert "gives a shard at most 2 cores, and --cpu asks for 8" in view.reason
    view, _ = await run(first, a_command(network="full"))
    assert "gives jobs of others no network" in view.reason
    task = PythonCell(bundle=first.content.put(b""), requires=("evil",))
    view, _ = await run(first, JobSpec(task=task))
    assert "installs no evil" in view.reason
    view, _ = await run(first, a_command())
    assert view.state == "Completed"
    assert (seen[-1].isolation, seen[-1].timeout) == ("sandbox", 60.0)


async def test_the_owners_probe_is_asked_once_for_each_job(net: Net, tmp_path: Path) -> None:
    first = await net.join("a", FakeExecutor(refusal="it has no hands"))
    program = tmp_path / "probe"
    program.write_text(f"#!/bin/sh\necho asked >> {tmp_path}/log\necho not on a Thursday\nexit 1\n")
    program.chmod(0o700)
    await net.join("b", FakeExecutor(isolation="sandbox"), rules=Selection(probe=(str(program),)))
    view, _ = await run(first, a_command(sharding=Sharding(n=3)))
    assert "not on a Thursday" in view.reason
    assert (tmp_path / "log").read_text() == "asked\n"


async def test_while_the_owners_probe_thinks_few_jobs_wait_and_all_of_them_run(
    net: Net, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selection, "MOST_OF_ONE", 2)
    first = await net.join("a", FakeExecutor(refusal="it has no hands"))
    program = tmp_path / "probe"
    program.write_text(f"#!/bin/sh\nwhile ! test -e {tmp_path}/go; do sleep 0.02; done\n")
    program.chmod(0o700)
    rules = Selection(probe=(str(program),), probe_seconds=60.0)
    second = await net.join("b", FakeExecutor(slots=8, isolation="sandbox"), rules=rules)
    running = [asyncio.create_task(run(first, a_command(labels={"n": str(n)}))) for n in range(6)]
    guests = second._exchange.guests  # type: ignore[union-attr]
    await until(lambda: any("about many jobs" in feed.job.reason for feed in first.engine.feeds.values()))
    assert guests._waiting == {first.id: 2}
    (tmp_path / "go").touch()
    assert [view.state for view, _ in await asyncio.gather(*running)] == ["Completed"] * 6
    assert not guests._waiting


async def test_a_constraint_chooses_nodes_by_their_labels(net: Net) -> None:
    first = await net.join("a", FakeExecutor(refusal="it has no hands"))
    await net.join("b", FakeExecutor(isolation="sandbox"), labels={"zone": "us"})
    west = await net.join("c", FakeExecutor(isolation="sandbox"), labels={"zone": "eu"})
    view, _ = await run(first, a_command(constraint="zone=eu", sharding=Sharding(n=4)))
    assert {shard.node for shard in view.shards} == {west.id}
    with pytest.raises(SpecError, match="--constraint"):
        await LocalClient(first).submit(a_command(constraint="zone >"))


# --- nodes that die ---


async def test_the_shards_of_a_node_that_dies_are_done_by_others_before_its_leases_end(net: Net) -> None:
    """Without a word, in the middle of its work: its link breaks, and nobody opens to a dial."""
    first = await net.join("a", FakeExecutor(lambda *_: 1, slots=1))
    started = asyncio.Event()

    async def hang(_task: ShardTask, _emit: object) -> int:
        started.set()
        await asyncio.Event().wait()
        return 2

    await net.join("b", FakeExecutor(hang, isolation="sandbox"))
    client = LocalClient(first)
    submission = await client.submit(a_command(sharding=Sharding(n=6)))
    async with asyncio.timeout(60):
        await started.wait()
        await net.leave("b")
        died = time.monotonic()
        _ = [update async for update in client.updates(submission.job)]
    assert time.monotonic() - died < LEASE
    view = await client.job(submission.job)
    assert view.state == "Completed"
    assert values(view) == [b"1"] * 6
    assert any(shard.attempts > 1 for shard in view.shards)


async def test_a_requester_that_is_restarted_goes_on_where_it_was(net: Net) -> None:
    """What runs elsewhere goes on meanwhile; nothing is run twice, nothing is lost."""
    go, ran = asyncio.Event(), []

    async def work(task: ShardTask, _emit: object) -> RawOutcome:
        ran.append(task.execution.shard)
        await go.wait()
        return RawOutcome(ok=True, value=RawValue("bytes", "bytes", b"x" * 100_000))

    await net.join("a", FakeExecutor(refusal="it has no hands"))
    await net.join("b", FakeExecutor(work, slots=4, isolation="sandbox"))
    client = LocalClient(net.nodes["a"])
    submission = await client.submit(a_command(sharding=Sharding(n=4)))
    await until(lambda: len(ran) == 4)
    await net.leave("a")
    go.set()
    again = LocalClient(await net.join("a", FakeExecutor(refusal="it has no hands")))
    async with asyncio.timeout(60):
        _ = [update async for update in again.updates(submission.job)]
    view = await again.job(submission.job)
    assert view.state == "Completed"
    assert sorted(ran) == [0, 1, 2, 3]


async def test_a_compute_node_that_is_restarted_gives_out_what_it_owes(net: Net) -> None:
    """The capability for its results survives with them."""
    first = await net.join("a", FakeExecutor(refusal="it has no hands"))
    big = RawOutcome(ok=True, value=RawValue("bytes", "bytes", b"x" * 100_000))
    other = await net.join("b", FakeExecutor(lambda *_: big, isolation="sandbox"))
    proposals = _without_proposals(other)
    client = LocalClient(first)
    submission = await client.submit(a_command())
    await until(lambda: proposals)
    await net.leave("b")
    await net.join("b", FakeExecutor(refusal="it is tired"))
    async with asyncio.timeout(60):
        _ = [update async for update in client.updates(submission.job)]
    assert (await client.job(submission.job)).state == "Completed"


def _without_proposals(node: Node) -> list[Propose]:
    """Let a node send no proposals; those that it would have sent."""
    links, kept = node.engine._mail.links, []
    real = links.send

    def send(to: NodeId, message: Any) -> None:
        if isinstance(message, Propose):
            kept.append(message)
        else:
            real(to, message)

    links.send = send  # type: ignore[method-assign]
    return kept


# --- nodes that lie, or do nothing ---


class _Liar:
    """Changes the proposals of a node on their way out."""

    def __init__(self, node: Node, change: Callable[[Outcome], Outcome]) -> None:
        self._send, self._change = node.engine._mail.links.send, change
        node.engine._mail.links.send = self  # type: ignore[method-assign, assignment]

    def __call__(self, to: NodeId, message: Any) -> None:
        if isinstance(message, Propose):
            message = Propose(message.execution, self._change(message.outcome), message.room)
        self._send(to, message)


def _another_cid(outcome: Outcome) -> Outcome:
    return structs.replace(outcome, record="bafyreigh2akiscaildcqabsyg3dfr6chu3fgpregiymsck7e7aqa4s52zy")


def _another_value(outcome: Outcome) -> Outcome:
    return structs.replace(outcome, exit_code=7)


@pytest.mark.parametrize("lie", [_another_cid, _another_value])
@pytest.mark.parametrize("size", [10, 100_000])
async def test_a_result_whose_cid_lies_never_counts(net: Net, lie: Callable[[Outcome], Outcome], size: int) -> None:
    """The honest node's does, however large it is."""
    raw = RawOutcome(ok=True, value=RawValue("bytes", "bytes", b"x" * size))
    first = await net.join("a", FakeExecutor(refusal="it has no hands"))
    liar = await net.join("b", FakeExecutor(lambda *_: raw, isolation="sandbox"))
    _Liar(liar, lie)
    client = LocalClient(first)
    submission = await client.submit(a_command())
    job = first.engine._requester.book.jobs[submission.job]
    await until(lambda: job.shards[0].lost)
    honest = await net.join("c", FakeExecutor(lambda *_: raw, isolation="sandbox"))
    async with asyncio.timeout(60):
        _ = [update async for update in client.updates(submission.job)]
    view = await client.job(submission.job)
    assert view.state == "Completed"
    assert view.shards[0].node == honest.id
    assert first.engine._requester.book.placement.nodes[liar.id].distrusted


async def test_what_a_node_takes_and_never_runs_is_tried_elsewhere(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "LATE_START", 0.5)
    first = await net.join("a", FakeExecutor(refusal="it has no hands"))
    lazy = FakeExecutor(slots=1, isolation="sandbox")
    lazy.run = lambda *_: asyncio.Event().wait()  # type: ignore[method-assign, assignment, misc]
    await net.join("b", lazy)
    client = LocalClient(first)
    submission = await client.submit(a_command())
    await until(lambda: net.nodes["b"].engine.running)
    good = await net.join("c", FakeExecutor(isolation="sandbox"))
    async with asyncio.timeout(60):
        _ = [update async for update in client.updates(submission.job)]
    view = await client.job(submission.job)
    assert (view.state, view.shards[0].node) == ("Completed", good.id)
    figures = metrics.text(first, metrics.Traffic()).splitlines()
    assert {"bacalhau_network_nodes 2", "bacalhau_messages_dropped_total 0"} <= {*figures}
    assert 'bacalhau_messages_total{way="out",kind="offer"} 2' in figures
    assert 'bacalhau_messages_total{way="in",kind="propose"} 1' in figures
    assert 'bacalhau_outgoing_messages{of="all"} 0' in figures


async def test_a_bad_actor_is_found_by_replicas_that_have_to_agree(net: Net) -> None:
    first = await net.join("a", FakeExecutor(lambda *_: "right", slots=1))
    await net.join("b", FakeExecutor(lambda *_: "right", slots=1, isolation="sandbox"))
    bad = await net.join("c", FakeExecutor(lambda *_: "wrong", slots=1, isolation="sandbox"))
    view, _ = await run(first, a_command(replicas=3, agree=2, sharding=Sharding(n=4)))
    assert view.state == "Completed"
    assert values(view) == [b'"right"'] * 4
    assert {node for shard in view.shards for node in shard.disagreed} <= {bad.id}
    view, _ = await run(first, a_command(sharding=Sharding(n=4)))
    assert bad.id not in {shard.node for shard in view.shards}


async def test_an_offer_of_a_stranger_to_a_node_that_is_on_no_network_is_refused(tmp_path: Path) -> None:
    node = await open_node(tmp_path, executors=[FakeExecutor()])
    try:
        offer = Offer(a_job_id(), a_command(), (ShardOffer(0, 1, "b"),), 1)
        assert node._refuse("n-stranger", offer.spec) == "this node takes only its own jobs"
        assert node.membership is None
    finally:
        await node.close()


# --- nodes that nobody knows ---


async def test_a_node_that_is_not_in_the_view_bids_for_a_job_that_no_known_node_can_run(net: Net) -> None:
    first = await net.join("a", FakeExecutor(refusal="it has no hands"))
    client = LocalClient(first)
    other = await net.join("b", FakeExecutor(isolation="sandbox"))
    first.engine.post(ev.NodeGone(other.id))
    submission = await client.submit(a_command())
    async with asyncio.timeout(60):
        _ = [update async for update in client.updates(submission.job)]
    view = await client.job(submission.job)
    assert (view.state, view.shards[0].node) == ("Completed", other.id)
