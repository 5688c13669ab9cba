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
from bacalhau_node.content.gateway import Gateway
from bacalhau_node.content.grants import Grants
from bacalhau_node.content.piece import commit
from bacalhau_node.content.walk import Want
from bacalhau_node.engine import Engine
from bacalhau_node.errors import BugError, ContentError, SpecError
from bacalhau_node.executors.docker import DockerExecutor
from bacalhau_node.executors.gpus import Gpus, at_once
from bacalhau_node.executors.process import ProcessExecutor
from bacalhau_node.executors.sandbox import SandboxExecutor
from bacalhau_node.fetched import Fetched
from bacalhau_node.folders import NodeFolder, data_folder, take_folder
from bacalhau_node.ids import JobId, NodeId, short
from bacalhau_node.journal import SqliteJournal
from bacalhau_node.keeping import Keeping
from bacalhau_node.layers.store import Layers
from bacalhau_node.masking import Secrets
from bacalhau_node.plan import JobPlan, make_plan, read_blocks, store_plan
from bacalhau_node.ports import Access, Capabilities, ContentStore, Executor, Journal, Publisher, Source, Transport
from bacalhau_node.protocol import events as ev
from bacalhau_node.protocol.compute import Compute
from bacalhau_node.protocol.requester import Requester
from bacalhau_node.publishers import publisher_for
from bacalhau_node.publishers.filecoin import FilecoinPublisher
from bacalhau_node.publishers.s3 import S3Publisher
from bacalhau_node.publishers.store import StorePublisher
from bacalhau_node.results import ResultSource, shards
from bacalhau_node.retention import Retention
from bacalhau_node.reuse import equal_job, obstacle
from bacalhau_node.runner import Runner
from bacalhau_node.sources.archive import Unpacker
from bacalhau_node.sources.bucket import BucketSource
from bacalhau_node.sources.ipfs import ContentSource
from bacalhau_node.sources.local import LocalSource
from bacalhau_node.sources.url import UrlSource
from bacalhau_node.spec import OWNER_LABEL, InputSource, JobSpec, PythonCell
from bacalhau_node.transports.memory import MemoryHub, MemoryTransport

log = logging.getLogger(__name__)

PROFILE = "unixfs-v0-2015"
"""How files become blocks here: as an unconfigured kubo makes them, so that CIDs are equal."""

PROBE_AGAIN = 5.0
"""Seconds after which a submission asks again which executors work (a daemon may have gone or come)."""


@dataclass(frozen=True)
class Started:
    """The answer to a submission: the job (`reused`: an equal one of before), its plan, sentences for its user."""

    job: JobId
    plan: JobPlan
    notes: tuple[str, ...] = ()
    reused: bool = False


@dataclass
class _Option:
    """An executor and what its last probe said."""

    executor: Executor
    capabilities: Capabilities


class Node:
    """One running node. Made by `open_node`; all methods on the loop that made it."""

    def __init__(
        self,
        folder: NodeFolder,
        options: Sequence[_Option],
        *,
        content: ContentStore,
        journal: Journal,
        transport: Transport,
        resume: bool = False,
    ) -> None:
        self.folder, self.id = folder, folder.node
        self.content, self.grants = content, Grants()
        self.gateway = Gateway(content, self.grants)
        transport.serve(self.gateway.answering())
        self._options = list(options)
        self._probed = asyncio.get_running_loop().time()
        self._journal, self._transport = journal, transport
        files = ContentSource(content)
        self._fetched = Fetched(folder.store)
        buckets = BucketSource(content, fetched=self._fetched, folder=folder.path / "work")
        url = partial(UrlSource, content, fetched=self._fetched, folder=folder.path / "work")
        others: tuple[Source, ...] = (LocalSource(), ResultSource(content, files), files, buckets)
        self._sources: tuple[Source, ...] = (url(own=True), *others)
        self._sources_for_others: tuple[Source, ...] = (url(own=False), *others)
        self._unpacker = Unpacker(content, fetched=self._fetched, folder=folder.path / "work")
        to_s3 = S3Publisher(content, files=partial(shards, content), folder=folder.path / "work", profile=PROFILE)
        filecoin = FilecoinPublisher(
            folder.store / "pieces",
            archive=lambda root: self.gateway.archive(Want(Cid.parse(root))),
            commit=commit,
            profile=PROFILE,
        )
        self._publishers: tuple[Publisher, ...] = (StorePublisher(), to_s3, filecoin)
        self._layers = Layers(folder.root / "layers")
        self._keeping = Keeping(folder.node, content)
        self._runner = Runner(
            folder.path / "work",
            node=self.id,
            content=content,
            sources=self._sources,
            choose=self._choose,
            layers=self._layers,
            keeping=self._keeping,
            publishers=self._publishers,
        )
        self.slots = max(option.capabilities.slots for option in options)
        self.interrupted: tuple[JobId, ...] = ()
        """Jobs that an earlier process of this node left unfinished, and that are stopped now."""
        self._start(resume=resume)

    @property
    def capabilities(self) -> Capabilities:
        """What the best executor that works can do."""
        return self._working()[0].capabilities

    def _start(self, *, resume: bool) -> None:
        """Recover the machines from the journal and start the engine."""
        now = asyncio.get_running_loop().time()
        rows = self._journal.load()
        self._keeping.tidy(rows, exists=self.folder.exists)
        unfinished = [row for row in rows if isinstance(row, ev.JobRow) and row.state not in ev.FINAL_JOB]
        blocks = {row.job: self._blocks(row.plan) for row in unfinished if resume}
        self.interrupted = () if resume else tuple(row.job for row in unfinished)
        requester, effects = Requester.recover(self.id, rows, now, resume=resume, blocks=blocks)
        compute, more = Compute.recover(self.id, rows, now, slots=self.slots, refuse=self._refuse_offer)
        self.engine = Engine(
            requester=requester,
            compute=compute,
            transport=self._transport,
            journal=self._journal,
            content=self.content,
            work=self._runner,
        )
        self.engine.recover(rows, [*effects, *more])
        self._retention = Retention(
            self.engine.feeds,
            journal=self._journal,
            keeping=self._keeping,
            busy=lambda job: job in requester.book.jobs,
        )
        self.engine.post(ev.NodeSeen(self.id, self.slots))

    async def forget_old_jobs(self, now: float) -> None:
        """Forget jobs that ended long ago, or long before others; `now` in seconds since 1970."""
        try:
            await self._retention.apply(now)
        except ContentError as error:
            log.warning("old jobs can't be forgotten now: %s", error)

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
        await publisher_for(self._publishers, spec.publish).check(spec.publish)
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
        await self.probe_again()
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

    # --- environments ---

    async def environment(self, spec: JobSpec) -> tuple[str, ...]:
        """Where `spec` would run and what would be installed for it, in sentences for `--dry-run`."""
        if (refusal := self._refuse(spec)) is not None:
            return (f"environment: none on this node: {refusal}",)
        executor, name = self._choose(spec)
        requires = spec.task.requires if isinstance(spec.task, PythonCell) else ()
        if spec.image is not None:
            where = (f"environment: {name}, the image {spec.image}",)
            return (*where, f"packages: {', '.join(requires)}, for the Python of the image") if requires else where
        target = await executor.target(spec)
        whose = "this machine's" if target.executable else "the base image's"
        where = (f"environment: {name}, {whose} Python {target.python}",)
        return (*where, self._layers.describe(requires, target)) if requires else where

    def gpu_notes(self, spec: JobSpec, count: int) -> tuple[str, ...]:
        """What keeps most of the `count` shards of `spec` waiting if GPUs do, in a sentence for its user."""
        if not spec.resources.gpus or self._refuse(spec) is not None:
            return ()
        cards = self._option(spec).capabilities.gpus
        most = at_once(cards, spec.resources)
        if most >= min(count, self.slots):
            return ()
        return (f"{len(cards)} GPU{'s' * (len(cards) != 1)}: {most} of {count} shards at once, the others queue",)

    async def preparations(self, spec: JobSpec) -> tuple[str, ...]:
        """What has to be done before the first shard of `spec` can start, in sentences for its user."""
        requires = spec.task.requires if isinstance(spec.task, PythonCell) else ()
        if not requires or spec.image is not None or self._refuse(spec) is not None:
            return ()
        executor, _ = self._choose(spec)
        if not self._layers.missing(requires, await executor.target(spec)):
            return ()
        return (f"installing {', '.join(requires)} before the first shard; later jobs find it installed",)

    # --- executors ---

    async def probe_again(self) -> None:
        """Ask the executors again if the last answer is old, or one of them has failed since."""
        now = asyncio.get_running_loop().time()
        if now - self._probed < PROBE_AGAIN and not self._runner.at_fault:
            return
        self._probed, self._runner.at_fault = now, False
        for option in self._options:
            option.capabilities = await option.executor.probe()

    def executors(self) -> list[Capabilities]:
        """What each executor said at its last probe, best isolation first."""
        return [option.capabilities for option in self._options]

    def _working(self) -> list[_Option]:
        return [option for option in self._options if option.capabilities.problem is None]

    def problems(self) -> list[str]:
        """Why the better executors don't work here, one sentence each."""
        return [option.capabilities.problem for option in self._options if option.capabilities.problem]

    def _refuse_offer(self, requester: NodeId, spec: JobSpec) -> str | None:
        """Why this node can never run `spec` for this requester."""
        return self._refuse(spec) if requester == self.id else "this node takes only its own jobs"

    def _refuse(self, spec: JobSpec) -> str | None:
        """Why no executor of this node can ever run `spec`; None if one can."""
        reasons = [option.executor.check(spec) for option in self._working()]
        if None in reasons:
            return None
        best = [reason for reason in reasons[:1] if reason]  # those that isolate less can't do more
        better = self.problems() if _asks_for_a_container(spec) or not best else ()
        return "; ".join([*best, *better]) or "no executor works on this node"

    def _choose(self, spec: JobSpec) -> tuple[Executor, str]:
        option = self._option(spec)
        return option.executor, option.capabilities.executor

    def _option(self, spec: JobSpec) -> _Option:
        for option in self._working():
            if option.executor.check(spec) is None:
                return option
        raise BugError(f"a job was taken that no executor can run: {self._refuse(spec)}")

    # --- end ---

    async def close(self) -> None:
        """End everything this node started, in an order that loses nothing."""
        try:
            await self.engine.close()
            await asyncio.gather(*(option.executor.close() for option in self._options))
            await self._transport.close()
            self._journal.close()
            self._fetched.close()
            await asyncio.to_thread(shutil.rmtree, self.folder.path / "work", ignore_errors=True)
            self.content.close()  # on a full disk this may fail
        finally:
            self.folder.close()


def _asks_for_a_container(spec: JobSpec) -> bool:
    """Whether what refuses `spec` may be that a better executor does not work here."""
    return bool(spec.image or spec.isolation or spec.container_per == "shard")


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
    root: Path | None = None, *, executors: Sequence[Executor] | None = None, serving: str = ""
) -> Node:
    """A running node below `root` (default: the user's data folder), with these executors or those of this machine.

    `serving`: the address (`HOST:PORT`) of a server. It goes on with the jobs that it had when it ended; the
    node of a notebook stops those. When it can't be opened (a damaged journal, a full disk) nothing of it is left.
    """
    async with contextlib.AsyncExitStack() as undo:
        folder = await asyncio.to_thread(lambda: take_folder(root or data_folder(), serving=serving))
        undo.callback(folder.close)
        journal = SqliteJournal(folder.path / "journal.sqlite")
        undo.callback(journal.close)
        content = BlockStore(folder.store, profile=PROFILE)
        undo.callback(content.close)
        transport = MemoryTransport(MemoryHub(), folder.node)
        undo.push_async_callback(transport.close)
        chosen = list(executors) if executors is not None else _executors(folder)
        for executor in chosen:
            undo.push_async_callback(executor.close)
        for left in ("work", "process"):  # by a node of this folder that was killed
            await asyncio.to_thread(shutil.rmtree, folder.path / left, ignore_errors=True)
        capabilities = await asyncio.gather(*(executor.probe() for executor in chosen))
        options = [_Option(executor, told) for executor, told in zip(chosen, capabilities, strict=True)]
        node = Node(folder, options, content=content, journal=journal, transport=transport, resume=bool(serving))
        undo.push_async_callback(node.engine.close)
        await node.forget_old_jobs(time.time())
        undo.pop_all()
    return node


def _executors(folder: NodeFolder) -> list[Executor]:
    """The executors of this machine, best isolation first."""
    gpus = Gpus(folder.root / "gpus")
    return [
        DockerExecutor(folder.path, node=folder.node, is_alive=folder.is_alive, gpus=gpus),
        SandboxExecutor(folder.path / "sandbox", gpus=gpus),
        ProcessExecutor(folder.path / "process", gpus=gpus),
    ]
