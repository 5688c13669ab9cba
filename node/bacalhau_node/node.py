"""One node, assembled: folder, store, journal, executors, machines, engine.

Nothing is decided here but which parts make a node. The executors are tried in the order
container, sandbox, plain process; each job gets the first that works and can run it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import msgspec

from bacalhau_node.cid import Cid
from bacalhau_node.content.blocks import BlockStore
from bacalhau_node.content.elsewhere import Elsewhere
from bacalhau_node.content.folders import store_folder
from bacalhau_node.content.gateway import Gateway
from bacalhau_node.content.grants import Grants
from bacalhau_node.content.kubo import connected
from bacalhau_node.content.piece import commit
from bacalhau_node.content.unixfs import PROFILES
from bacalhau_node.content.walk import Want
from bacalhau_node.engine import Engine
from bacalhau_node.errors import ContentError, SpecError
from bacalhau_node.facilities import Facilities
from bacalhau_node.fetched import Fetched
from bacalhau_node.folders import NodeFolder
from bacalhau_node.ids import JobId, NodeId, short
from bacalhau_node.journal import SqliteJournal
from bacalhau_node.keeping import Keeping
from bacalhau_node.masking import Secrets
from bacalhau_node.messages import NodeRecord
from bacalhau_node.network import Joined, NetworkSettings
from bacalhau_node.opening import Opening, begin
from bacalhau_node.plan import JobPlan, make_plan, read_blocks, store_plan
from bacalhau_node.ports import Access, ContentStore, Executor, Journal, Publisher, Source, Transport
from bacalhau_node.protocol import events as ev
from bacalhau_node.protocol.compute import Compute
from bacalhau_node.protocol.fitness import parse_constraint
from bacalhau_node.protocol.membership import Entry, Membership
from bacalhau_node.protocol.requester import Requester
from bacalhau_node.publishers import publisher_for
from bacalhau_node.publishers.bucket import BucketPublisher
from bacalhau_node.publishers.filecoin import FilecoinPublisher
from bacalhau_node.publishers.ipfs import IpfsPublisher
from bacalhau_node.publishers.store import StorePublisher
from bacalhau_node.results import ResultSource, combined, shards
from bacalhau_node.retention import Retention
from bacalhau_node.reuse import equal_job, obstacle
from bacalhau_node.runner import Runner
from bacalhau_node.sources.archive import Unpacker
from bacalhau_node.sources.bucket import BucketSource
from bacalhau_node.sources.ipfs import ContentSource
from bacalhau_node.sources.local import LocalSource
from bacalhau_node.sources.url import UrlSource
from bacalhau_node.spec import OWNER_LABEL, InputSource, JobSpec
from bacalhau_node.transports.memory import MemoryHub, MemoryTransport

log = logging.getLogger(__name__)

PROFILE = "unixfs-v0-2015"
"""How files become blocks here: as an unconfigured kubo makes them, so that CIDs are equal."""


@dataclass(frozen=True)
class Started:
    """The answer to a submission: the job (`reused`: an equal one of before), its plan, sentences for its user."""

    job: JobId
    plan: JobPlan
    notes: tuple[str, ...] = ()
    reused: bool = False


class Node:
    """One running node. Made by `open_node`; all methods on the loop that made it."""

    def __init__(
        self,
        folder: NodeFolder,
        facilities: Facilities,
        *,
        content: ContentStore,
        journal: Journal,
        transport: Transport,
        joined: Joined | None = None,
        resume: bool = False,
    ) -> None:
        self.folder, self.id = folder, transport.node
        self.content, self.grants = content, Grants()
        self.gateway = Gateway(content, self.grants)
        transport.serve(self.gateway.answering())
        self.facilities = facilities
        self._journal, self._transport, self._joined = journal, transport, joined
        self.elsewhere = Elsewhere(content)
        files = ContentSource(content, self.elsewhere)
        self._fetched = Fetched(folder.store)
        buckets = BucketSource(content, fetched=self._fetched)
        url = partial(UrlSource, content, fetched=self._fetched)
        others: tuple[Source, ...] = (LocalSource(), ResultSource(content, files), files, buckets)
        self._sources: tuple[Source, ...] = (url(own=True), *others)
        self._sources_for_others: tuple[Source, ...] = (url(own=False), *others)
        self._unpacker = Unpacker(content, fetched=self._fetched, folder=folder.path / "work")
        to_bucket = BucketPublisher(
            content, files=partial(shards, content), folder=folder.path / "work", profile=PROFILE
        )
        self._filecoin = FilecoinPublisher(
            folder.store / "pieces",
            archive=lambda root: self.gateway.archive(Want(Cid.parse(root))),
            commit=commit,
            profile=PROFILE,
        )
        to_ipfs = IpfsPublisher(
            content,
            folder=lambda root: store_folder(content, combined(content, root), profile=PROFILES[PROFILE]),
            archive=lambda root: self.gateway.archive(Want(Cid.parse(root))),
            daemon=connected,
        )
        self._publishers: tuple[Publisher, ...] = (StorePublisher(), to_bucket, to_ipfs, self._filecoin)
        self._keeping = Keeping(folder.node, content)
        self._exchange = joined.exchange(self, buckets) if joined is not None else None
        self._runner = Runner(
            folder.path / "work",
            node=self.id,
            content=content,
            sources=self._sources,
            facilities=facilities,
            keeping=self._keeping,
            publishers=self._publishers,
            exchange=self._exchange,
        )
        self.slots = facilities.slots
        self.interrupted: tuple[JobId, ...] = ()
        """Jobs that an earlier process of this node left unfinished, and that are stopped now."""
        self._start(resume=resume)

    def _start(self, *, resume: bool) -> None:
        """Recover the machines from the journal and start the engine."""
        now = asyncio.get_running_loop().time()
        rows = self._journal.load()
        self._keeping.tidy(rows, exists=self.folder.exists)
        unfinished = [row for row in rows if isinstance(row, ev.JobRow) and row.state not in ev.FINAL_JOB]
        blocks = {row.job: self._blocks(row.plan) for row in unfinished if resume}
        self.interrupted = () if resume else tuple(row.job for row in unfinished)
        requester, effects = Requester.recover(self.id, rows, now, resume=resume, blocks=blocks)
        compute, more = Compute.recover(self.id, rows, now, slots=self.slots, refuse=self._refuse)
        network = None
        if self._joined is not None and self._exchange is not None:
            self._exchange.recover(rows)
            requester.book.addresses = tuple(self._transport.addresses())
            network = self._joined.network(self._exchange, compute, self.facilities)
        self.engine = Engine(
            requester=requester,
            compute=compute,
            transport=self._transport,
            journal=self._journal,
            content=self.content,
            work=self._runner,
            network=network,
        )
        self.engine.recover(rows, [*effects, *more])
        self._retention = Retention(
            self.engine.feeds,
            journal=self._journal,
            keeping=self._keeping,
            busy=lambda job: job in requester.book.jobs,
        )
        self.engine.post(ev.NodeSeen(self.id, self.slots))
        if self._joined is not None:
            self.engine.post(self._joined.first())

    async def forget_old_jobs(self, now: float) -> None:
        """Forget jobs that ended long ago, or long before others; `now` in seconds since 1970."""
        try:
            if await self._retention.apply(now):
                await self.tidy_pieces(now)
        except ContentError as error:
            log.warning("old jobs can't be forgotten now: %s", error)

    async def tidy_pieces(self, now: float) -> None:
        """Remove what was packed for Filecoin of results that no job keeps any more."""
        try:
            await asyncio.to_thread(self._filecoin.tidy, kept=lambda root: self.content.pins(root) > 0, now=now)
        except (ContentError, OSError) as error:
            log.warning("pieces of old jobs can't be removed now: %s", error)

    def _blocks(self, plan: str) -> tuple[str, ...]:
        """The shards' blocks of a plan; none when it is damaged: then each shard fails, and says so."""
        try:
            return read_blocks(self.content, plan)
        except ContentError as error:
            log.warning("the plan of an unfinished job can't be read: %s", error)
            return ()

    # --- jobs ---

    async def plan(self, spec: JobSpec) -> JobPlan:
        """List and split the inputs of `spec`; raises `SpecError` when its result could not go where it is to."""
        parse_constraint(spec.constraint)
        await publisher_for(self._publishers, spec.publish).check(spec.publish)
        await self.facilities.try_for(spec)
        own = OWNER_LABEL not in spec.labels
        sources = self._sources if own else self._sources_for_others
        unpack = partial(self._unpacker.list, access=Access(own=own))
        return await asyncio.to_thread(make_plan, spec, sources, slots=self.slots, unpack=unpack)

    async def submit(
        self, spec: JobSpec, *, created: float, secrets: Mapping[str, str], job: JobId | None = None
    ) -> Started:
        """Plan, journal and start a job; it exists when this returns. `job`: an id that its client made up."""
        entrusted = Secrets(secrets)
        if set(secrets) != set(spec.secrets):
            raise SpecError(f"secrets {sorted(spec.secrets)} are named, and values for {sorted(secrets)} were sent")
        await self.facilities.probe_again()
        if spec.pin:
            spec = await asyncio.to_thread(self._pin, spec)
        plan = await self.plan(spec)
        stored = store_plan(plan, self.content)
        notes: tuple[str, ...] = ()
        if spec.reuse:
            equal, note = self._equal(spec, plan, stored.root)
            if equal is not None:
                return Started(equal.job, plan, (note,), reused=True)
            notes = (note,) if note else ()
        job = job or f"j-{uuid.uuid4()}"
        self._runner.entrust(job, entrusted)
        self._keeping.submitted(job, spec, stored.root)
        try:
            self.engine.settle(ev.Submitted(job, spec, stored.root, stored.blocks, created))
        except ContentError:
            self._runner.ended(job)
            self._keeping.forgotten((job,))
            raise
        await self.forget_old_jobs(created)
        return Started(job, plan, notes)

    def _equal(self, spec: JobSpec, plan: JobPlan, root: str) -> tuple[ev.JobRow | None, str]:
        """A completed job whose result can be taken for that of `spec`, and a sentence about it for its user."""
        if why := obstacle(spec, plan):
            return None, why
        rows = (feed.row for feed in self.engine.feeds.values() if feed.row is not None)
        row = equal_job((row for row in rows if row.cid and self.content.has(row.cid)), spec, root)
        if row is None:
            return None, ""
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(row.created))
        return row, f"--reuse: the result of job {short(row.job)} of {when}: same source, environment and inputs"

    def _pin(self, spec: JobSpec) -> JobSpec:
        """The same job over copies of its local inputs in the store, named by CID."""

        def pinned(source: InputSource) -> InputSource:
            if not source.source.startswith("/"):
                return source
            path = Path(source.source).resolve()
            with _as_folder(path) as (folder, below):
                cid = self.content.add_path(folder)
            return msgspec.structs.replace(source, source=f"ipfs://{cid}{below}")

        return _replaced(spec, tuple(map(pinned, spec.inputs)), tuple(map(pinned, spec.shared)))

    def _refuse(self, requester: NodeId, spec: JobSpec) -> str | None:
        """Why this node can never run `spec` for this requester."""
        if requester == self.id:
            return self.facilities.refuse(spec)
        if self._exchange is None:
            return "this node takes only its own jobs"
        return self._exchange.guests.refuse(requester, spec)

    def secrets(self, job: JobId, spec: JobSpec) -> Secrets:
        """The values that were entrusted to this node for its job; raises `SpecError` when they are gone."""
        return self._runner.secrets(job, spec)

    @property
    def membership(self) -> Membership | None:
        """Who else is on the network; None for a node that is on none."""
        return self._joined.membership if self._joined is not None else None

    # --- end ---

    def entries(self) -> Iterator[Entry]:
        """This node and all that it knows, for people."""
        if self.membership is not None:
            return self.membership.entries(asyncio.get_running_loop().time())
        record = NodeRecord(node=self.id, version=1, slots=self.slots, room=self.slots, jobs=self.engine.running)
        return iter((Entry(record, "self", 0.0),))

    @property
    def transport(self) -> Transport:
        """What carries bytes between this node and others."""
        return self._transport

    def addresses(self) -> Sequence[str]:
        """Multiaddrs by which others can dial this node."""
        return self._transport.addresses()

    async def join(self, address: str) -> NodeId:
        """Meet the network of the node at this multiaddr; raises `NodeUnreachable`, `SpecError` for no multiaddr."""
        return await self._transport.dial(address)

    async def close(self, *, farewell: bool = True) -> None:
        """End everything this node started, in an order that loses nothing; with `farewell` others are told first."""
        try:
            if self._joined is not None:
                self._joined.remember()
                if farewell:
                    await self.engine.leave()
            await self.engine.close()
            await self.facilities.close()
            await self._transport.close()
            self._journal.close()
            self._fetched.close()
            await asyncio.to_thread(shutil.rmtree, self.folder.path / "work", ignore_errors=True)
            self.content.close()  # on a full disk this may fail
        finally:
            self.folder.close()


@contextlib.contextmanager
def _as_folder(path: Path) -> Iterator[tuple[Path, str]]:
    """(a folder, the path below it) that stand for `path`: a single file keeps its name by a folder around it."""
    if path.is_dir():
        yield path, ""
        return
    with tempfile.TemporaryDirectory() as name:
        shutil.copyfile(path, Path(name) / path.name)
        yield Path(name), f"/{path.name}"


def _replaced(spec: JobSpec, inputs: tuple[InputSource, ...], shared: tuple[InputSource, ...]) -> JobSpec:
    return msgspec.structs.replace(spec, inputs=inputs, shared=shared)


async def open_node(
    root: Path | None = None,
    *,
    executors: Sequence[Executor] | None = None,
    serving: str = "",
    network: NetworkSettings | None = None,
) -> Node:
    """A running node below `root` (default: the user's data folder), with these executors or those of this machine.

    `serving`: the address (`HOST:PORT`) of a server. It goes on with the jobs that it had when it ended; the
    node of a notebook stops those. `network`: the one that it joins; without it no other node is met. When it can't
    be opened (a damaged journal, a full disk) nothing of it is left.
    """
    return await finish(await begin(root, executors=executors, serving=serving), network=network)


async def finish(opening: Opening, *, network: NetworkSettings | None = None) -> Node:
    """The node that was begun; when it can't be opened, nothing of it is left."""
    folder = opening.folder
    async with contextlib.AsyncExitStack() as undo:
        undo.push_async_callback(opening.undo)
        journal = SqliteJournal(folder.path / "journal.sqlite")
        undo.callback(journal.close)
        content = BlockStore(folder.store, profile=PROFILE)
        undo.callback(content.close)
        joined = await Joined.open(network, folder.path) if network is not None else None
        transport = joined.transport if joined is not None else MemoryTransport(MemoryHub(), folder.node)
        undo.push_async_callback(transport.close)
        facilities = await opening.facilities
        if folder.asked or network is not None:
            await facilities.try_all()  # others are told what it has, and jobs of before may need any
        node = Node(
            folder,
            facilities,
            content=content,
            journal=journal,
            transport=transport,
            joined=joined,
            resume=bool(folder.asked) or (network is not None and network.resume),
        )
        undo.push_async_callback(node.engine.close)
        await node.forget_old_jobs(time.time())
        await node.tidy_pieces(time.time())  # of jobs that other nodes of this folder have forgotten, or took along
        undo.pop_all()
    return node
