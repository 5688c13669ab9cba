"""Who submits jobs and reads results: one Protocol, over a node in this process or a remote one."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

import msgspec

from bacalhau_node.cid import Cid
from bacalhau_node.content.blocks import BlockStore
from bacalhau_node.content.folders import store_folder
from bacalhau_node.content.gateway import in_threads
from bacalhau_node.content.reader import Reader
from bacalhau_node.content.unixfs import PROFILES
from bacalhau_node.errors import SpecError
from bacalhau_node.feed import Feed
from bacalhau_node.feed import ShardBytes as ShardBytes
from bacalhau_node.feed import ShardText as ShardText
from bacalhau_node.feed import Update as Update
from bacalhau_node.ids import JobId, short
from bacalhau_node.network import NetworkSettings, over_libp2p
from bacalhau_node.node import PROFILE, Node, open_node
from bacalhau_node.plan import JobPlan as JobPlan
from bacalhau_node.plan import PlannedShard as PlannedShard
from bacalhau_node.plan import read_blocks, read_shard
from bacalhau_node.ports import Capabilities, ContentStore
from bacalhau_node.protocol.events import CancelRequested, JobRow, NodeSeen
from bacalhau_node.protocol.events import JobChanged as JobChanged
from bacalhau_node.protocol.events import ShardChanged as ShardChanged
from bacalhau_node.results import file_parts
from bacalhau_node.selection import Selection
from bacalhau_node.sharding import Entry
from bacalhau_node.spec import JobSpec
from bacalhau_node.topology import Graph as Graph
from bacalhau_node.topology import graph
from bacalhau_node.views import JobLine as JobLine
from bacalhau_node.views import JobView as JobView
from bacalhau_node.views import NodeView as NodeView
from bacalhau_node.views import ShardView as ShardView
from bacalhau_node.views import Stored as Stored
from bacalhau_node.views import Submission as Submission

NONE: Mapping[str, str] = MappingProxyType({})

PUT = "put"
"""In whose name the store keeps what somebody put there by hand."""


class Client(Protocol):
    """All calls on one asyncio loop. An unknown job raises `SpecError`, a node that is gone `NodeUnreachable`."""

    async def put_bundle(self, files: Mapping[str, bytes]) -> str:
        """Store a cell's folder (relative path -> bytes) and return its CID, for `PythonCell.bundle`."""
        ...

    async def plan(self, spec: JobSpec) -> JobPlan:
        """List the inputs and split them, without a job; raises `SpecError` or `ContentError`."""
        ...

    async def submit(self, spec: JobSpec, *, secrets: Mapping[str, str] = NONE) -> Submission:
        """List, plan, journal, start; the job exists when this returns. `secrets`: a value for each of `spec.secrets`.

        The node holds them in memory until the job ends, and shards find them in their environment.
        """
        ...

    def updates(self, job: JobId) -> AsyncIterator[Update]:
        """The present state, then what changes, in order; ends after a `JobChanged` to a final state.

        The present state is one `JobChanged`, a `ShardChanged` for each shard that was ever offered, the text so
        far. Who reads slowly gets the latest state of a shard in place of every step on the way.
        """
        ...

    async def cancel(self, job: JobId) -> None:
        """Ask for the end; returns at once. What is finished is kept."""
        ...

    async def job(self, job: JobId) -> JobView:
        """The job with all its shards."""
        ...

    async def jobs(self) -> Sequence[JobLine]:
        """All jobs that the node knows, newest first."""
        ...

    async def find(self, prefix: str) -> JobId:
        """The one job whose id starts with `prefix`; raises `SpecError` for none or several."""
        ...

    async def put(self, path: Path, *, profile: str = PROFILE) -> Stored:
        """Import a file or folder, hidden names included, and keep it; raises `SpecError` for an unknown profile."""
        ...

    async def read(self, cid: str) -> bytes:
        """A whole file of the content store, verified."""
        ...

    def cat(self, cid: str, path: str = "") -> AsyncIterator[bytes]:
        """The bytes of a file, part by part, verified: of `cid` itself, or at `path` below that folder or result.

        What the node does not have comes from whom the environment here names: an IPFS daemon, gateways.
        """
        ...

    async def file(self, cid: str) -> Path | None:
        """A local file with exactly these bytes, to be mapped in place of reading; None when there is none."""
        ...

    async def download(self, cid: str, target: Path) -> None:
        """Write a file or folder to `target`, which must not exist; it comes from where `cat` has it from."""
        ...

    async def nodes(self) -> Sequence[NodeView]:
        """The nodes known, this one first."""
        ...

    async def network(self) -> Graph:
        """Who is connected to whom, and what each node says of itself, as far as this node knows."""
        ...

    async def close(self) -> None:
        """Let go of the node; one in this process is closed with it."""
        ...


class LocalClient:
    """A `Client` of a node in this process. `received` is told how many bytes came of content from elsewhere."""

    def __init__(self, node: Node, *, received: Callable[[int], None] | None = None) -> None:
        self._node, self._received = node, received
        self._inputs: dict[JobId, tuple[tuple[str, ...], ...]] = {}
        self._warned: set[str] = set()

    @property
    def node(self) -> Node:
        """The node, for whoever serves it to others."""
        return self._node

    @property
    def interrupted(self) -> tuple[JobId, ...]:
        """Jobs that an earlier process of this node left unfinished: they are stopped, what they finished is kept."""
        return self._node.interrupted

    async def put_bundle(self, files: Mapping[str, bytes]) -> str:
        """See `Client`."""
        return await asyncio.to_thread(_import_files, self._node.content, files)

    async def plan(self, spec: JobSpec) -> JobPlan:
        """See `Client`."""
        plan = await self._node.plan(spec)
        few = self._node.facilities.gpu_notes(spec, len(plan.shards))
        return msgspec.structs.replace(plan, notes=(*plan.notes, *few, *await self._node.facilities.environment(spec)))

    async def submit(self, spec: JobSpec, *, secrets: Mapping[str, str] = NONE, job: JobId | None = None) -> Submission:
        """See `Client`. `job`: an id that the caller made up."""
        started = await self._node.submit(spec, created=time.time(), secrets=secrets, job=job)
        job, plan = started.job, started.plan
        for gone in self._inputs.keys() - self._node.engine.feeds.keys():
            del self._inputs[gone]
        self._inputs[job] = tuple(_logical(shard.entries) for shard in plan.shards)
        few = self._node.facilities.gpu_notes(spec, len(plan.shards))
        name, executor = self._node.id, self._node.facilities.capabilities.executor
        if started.reused:
            return Submission(job, len(plan.shards), name, executor, started.notes, reused=True)
        notes = (*plan.notes, *few, *self._warning(), *await self._node.facilities.preparations(spec), *started.notes)
        return Submission(job, len(plan.shards), name, executor, notes)

    def _warning(self) -> tuple[str, ...]:
        """Once for each reason: that jobs run without isolation, and why."""
        if self._node.facilities.capabilities.isolation != "none":
            return ()
        why = "; ".join(self._node.facilities.problems())
        if why in self._warned:
            return ()
        self._warned.add(why)
        return (f"shards run as plain processes, not isolated from this machine: {why}",)

    async def updates(self, job: JobId) -> AsyncIterator[Update]:
        """See `Client`."""
        async for update in self._feed(job).follow():
            yield update

    async def cancel(self, job: JobId) -> None:
        """See `Client`."""
        self._feed(job)
        self._node.engine.post(CancelRequested(job))

    async def job(self, job: JobId) -> JobView:
        """See `Client`."""
        feed = self._feed(job)
        row = feed.row
        assert row is not None  # a feed is made by its first row
        inputs = await self._shard_inputs(row)
        shards = tuple(_shard_view(feed, index, inputs[index]) for index in range(row.count))
        state = feed.job
        return JobView(job, state.state, state.reason, state.cid, row.created, row.spec, state.published, shards)

    async def jobs(self) -> Sequence[JobLine]:
        """See `Client`."""
        rows = [(feed.row, feed.job) for feed in self._node.engine.feeds.values() if feed.row]
        lines = [JobLine(row.job, state.state, row.created, row.count, state.reason, state.cid) for row, state in rows]
        return sorted(lines, key=lambda line: line.created, reverse=True)

    async def find(self, prefix: str) -> JobId:
        """See `Client`."""
        return the_one(prefix, self._node.engine.feeds)

    async def put(self, path: Path, *, profile: str = PROFILE) -> Stored:
        """See `Client`."""
        return await asyncio.to_thread(_put, self._node.folder.store, path, profile)

    async def cat(self, cid: str, path: str = "") -> AsyncIterator[bytes]:
        """See `Client`."""
        if not await asyncio.to_thread(self._node.content.has, cid):
            cid, path = await self._node.elsewhere.get(cid, path, told=self._received), ""
        async for part in in_parts(self._node.content, cid, path):
            yield part

    async def read(self, cid: str) -> bytes:
        """See `Client`."""
        return await asyncio.to_thread(self._node.content.read, cid)

    async def file(self, cid: str) -> Path | None:
        """See `Client`."""
        return await asyncio.to_thread(self._node.content.file, cid)

    async def download(self, cid: str, target: Path) -> None:
        """See `Client`."""
        if not await asyncio.to_thread(self._node.content.has, cid):
            await self._node.elsewhere.get(cid, told=self._received)
        await asyncio.to_thread(self._node.content.export, cid, target)

    async def nodes(self) -> Sequence[NodeView]:
        """See `Client`."""
        known = () if self._node.membership is None else self._node.membership.nodes()
        mine = NodeView(self._node.id, self._node.slots, self._node.facilities.capabilities)
        return [mine, *map(_other, known)]

    async def network(self) -> Graph:
        """See `Client`."""
        return graph(self._node.entries())

    async def close(self) -> None:
        """See `Client`."""
        await self._node.close()

    def _feed(self, job: JobId) -> Feed:
        feed = self._node.engine.feeds.get(job)
        if feed is None:
            raise SpecError(f"this node knows no job {job}")
        return feed

    async def _shard_inputs(self, row: JobRow) -> tuple[tuple[str, ...], ...]:
        """The logical paths of every shard's inputs, read from the plan once."""
        if row.job not in self._inputs:
            self._inputs[row.job] = await asyncio.to_thread(_planned_inputs, self._node.content, row.plan)
        return self._inputs[row.job]


def the_one(prefix: str, jobs: Iterable[JobId]) -> JobId:
    """The one of `jobs` (the latest last) that starts with `prefix`; raises `SpecError` for none or several."""
    known = list(jobs)
    wanted = prefix if prefix.startswith("j-") else f"j-{prefix}"
    found = [job for job in known if job.startswith(wanted)]
    if len(found) != 1:
        latest = ", ".join(short(job) for job in known[-5:]) or "none"
        what = "no job" if not found else f"{len(found)} jobs"
        raise SpecError(f"{what} with an id that starts with {prefix!r}; the latest are: {latest}")
    return found[0]


async def open_member(peer: str) -> LocalClient:
    """A client of a new node in this process that brings its jobs to the network of the node at `peer`, a multiaddr.

    It takes no jobs of others, and nobody can dial it. Raises `SpecError` for no multiaddr, `NodeUnreachable`.
    """
    settings = NetworkSettings(open=over_libp2p(), peers=(peer,), rules=Selection(requesters=()), resume=False)
    node = await open_node(network=settings)
    try:
        await node.join(peer)
    except BaseException:
        await node.close()
        raise
    return LocalClient(node)


def _other(seen: NodeSeen) -> NodeView:
    """A node as its own record describes it."""
    record = seen.record
    if record is None or not record.engines:
        return NodeView(seen.node, seen.room, None)
    best = record.engines[0]
    can = Capabilities(
        executor=best.name,
        isolation=best.isolation,
        slots=record.slots,
        memory_per_slot=best.memory,
        python=best.python,
        images=record.images,
    )
    return NodeView(seen.node, seen.room, can)


def _planned_inputs(content: ContentStore, plan: str) -> tuple[tuple[str, ...], ...]:
    return tuple(_logical(read_shard(content, block)[0]) for block in read_blocks(content, plan))


def _logical(entries: Sequence[Entry]) -> tuple[str, ...]:
    return tuple(entry.path for entry in entries)


def _shard_view(feed: Feed, index: int, inputs: tuple[str, ...]) -> ShardView:
    live, row = feed.shards.get(index), feed.shard_rows.get(index)
    outcome = row.outcome if row else None
    if live is None:
        return ShardView(index, "waiting", row.attempts if row else 0, None, inputs, outcome)
    return ShardView(index, live.state, live.attempt, live.node, inputs, outcome, row.disagreed if row else ())


async def in_parts(store: ContentStore, cid: str, path: str) -> AsyncIterator[bytes]:
    """`results.file_parts`, read in threads."""
    with store.hold():
        async for part in in_threads(file_parts(store, cid, path)):
            yield part


def measured(store: ContentStore, cid: str) -> tuple[int, int]:
    """(bytes, files) of a file or folder, links not followed."""
    sizes = [item.size for item in Reader(store, Cid.parse(cid)).walk() if item.kind == "file"]
    return sum(sizes), len(sizes)


def _put(folder: Path, path: Path, profile: str) -> Stored:
    """Import into the store in `folder`, which other instances (the node's) may have open."""
    store = BlockStore(folder, profile=profile)
    try:
        with store.hold():
            cid = store.add_path(path)
            store.pin(cid, owner=PUT)
            store.flush()
            return Stored(cid, *measured(store, cid), profile)
    finally:
        store.close()


def _import_files(content: ContentStore, files: Mapping[str, bytes]) -> str:
    """A folder of these files in the store. Not by way of the disk: to remove a folder there can take 2 ms (seen)."""
    stored = [(path, content.add_bytes(data), len(data)) for path, data in files.items()]
    return store_folder(content, stored, profile=PROFILES[PROFILE])
