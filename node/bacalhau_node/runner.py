"""One execution from offer to outcome: open its inputs, run it, check them again, name its bytes.

Whatever goes wrong on the way becomes an `Outcome` that says so: an input that is gone or has
changed is the shard's own error (kind "input"), everything that is this node's fault has kind
"node", and the requester may try elsewhere. What a shard of another node needs is brought here first.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import msgspec

from bacalhau_node import scratch_folder, strangers
from bacalhau_node.content.records import encode_outcome, seal
from bacalhau_node.errors import BacalhauError, ContentError, NodeUnreachable, SpecError
from bacalhau_node.exchange import Exchange
from bacalhau_node.facilities import Facilities
from bacalhau_node.ids import Execution, JobId, NodeId
from bacalhau_node.keeping import Keeping
from bacalhau_node.layers.store import Layer
from bacalhau_node.masking import NO_SECRETS, Secrets
from bacalhau_node.messages import INLINE_LIMIT, Blob, ErrorKind, Lines, Outcome, ShardError, Transfer, Value
from bacalhau_node.outcomes import Telling, masked, printable
from bacalhau_node.plan import read_shard
from bacalhau_node.ports import (
    Access,
    ContentStore,
    Executor,
    Provider,
    Publisher,
    RawOutcome,
    ShardTask,
    Source,
    StagedFile,
    Told,
)
from bacalhau_node.protocol.events import Event, JobSealed, Keep, Run, Seal
from bacalhau_node.publishers import publish
from bacalhau_node.sharding import ContentRef, Entry, container_path, mounts, shown
from bacalhau_node.spec import OWNER_LABEL, InputSource, JobSpec, PythonCell

log = logging.getLogger(__name__)

T = TypeVar("T")

ShardEntries = tuple[tuple[Entry, ...], tuple[Entry, ...]]
"""The files of a shard, and those that go to every shard."""

GONE = "its secrets ({}) are gone with the node's memory: submit it again"
"""Why a job that a restarted node goes on with can't run its shards."""

LINGER = 2.0
"""Seconds that a job of another node is held when nothing of it is here: its next shard may be on the way (a guess)."""

LONGEST_MESSAGE = 10_000
"""Characters of an error, which may quote a stranger: it has to fit into a record."""

INLINE_FILES = 64
"""So many files are opened and checked on the loop (a few microseconds each); more go to a thread."""


@dataclass
class _Job:
    """What all executions of one job on this node share."""

    executor: Executor
    name: str
    folder: Path
    requester: NodeId
    foreign: bool
    uses: int = 0
    """How many executions it has had."""
    bundle: Path | None = None
    layer: Layer | None = None
    problem: SpecError | None = None
    """Why none of its shards can run here."""
    ready: bool = False
    bare: str = ""
    """The block of its shards without input, once one of them was read."""
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class Runner:
    """Runs executions for the engine. `exchange` moves what they need between the nodes of a network."""

    def __init__(
        self,
        folder: Path,
        *,
        node: NodeId,
        content: ContentStore,
        sources: Sequence[Source],
        facilities: Facilities,
        keeping: Keeping,
        publishers: Sequence[Publisher] = (),
        exchange: Exchange | None = None,
    ) -> None:
        self._folder, self._content, self._sources, self._facilities = folder, content, sources, facilities
        self._node, self._publishers, self._keeping, self._exchange = node, publishers, keeping, exchange
        self._jobs: dict[JobId, _Job] = {}
        self._made = 0
        self._secrets: dict[JobId, Secrets] = {}

    def entrust(self, job: JobId, secrets: Secrets) -> None:
        """Hold the values of a job's secrets, in memory and nowhere else, until `ended`."""
        if secrets:
            self._secrets[job] = secrets

    def ended(self, job: JobId) -> None:
        """The job has ended: forget its secrets, and let its inputs go."""
        self._secrets.pop(job, None)
        self._keeping.ended(job)
        if self._exchange is not None:
            self._exchange.ended(job)

    def secrets(self, job: JobId, spec: JobSpec) -> Secrets:
        """What was entrusted for the job; raises `SpecError` when it is gone."""
        secrets = self._secrets.get(job, NO_SECRETS)
        if missing := [name for name in spec.secrets if name not in secrets.values]:
            raise SpecError(GONE.format(", ".join(missing)))
        return secrets

    def settled(self, execution: Execution) -> None:
        """The result of an execution is kept elsewhere or unwanted: let it go."""
        self._keeping.settled(execution)

    async def execute(self, run: Run, progress: Callable[[Event | Lines | Transfer], None]) -> Outcome:
        """Run one execution to its outcome, which is kept until it is `settled`; only cancellation is raised."""
        try:
            outcome = await self._outcome(run, progress)
        finally:
            self._keeping.ran(run.execution)
        self._keeping.owed(run.execution, outcome)
        if self._exchange is not None:
            self._exchange.owe(run.execution, outcome, run.grant)
        return outcome

    async def _outcome(self, run: Run, progress: Callable[[Event | Lines | Transfer], None]) -> Outcome:
        execution = run.execution
        try:
            run, secrets = self._admitted(run)
            job = self._job(run)
        except SpecError as error:
            return self._failed("environment", error)
        except BacalhauError as error:
            return self._failed("node", error)
        scratch = job.folder / f"{execution.shard}.{execution.attempt}"
        try:
            return await self._execute(run, job, scratch, progress=progress, secrets=secrets)
        except ContentError as error:
            return self._failed("input", error)
        except NodeUnreachable as error:
            log.warning("execution %s: %s", execution, error)
            return self._failed("node", error)
        except Exception as error:  # the boundary of a task of the engine: it has to end, whatever a stranger sent
            log.exception("execution %s failed in the node", execution)
            return self._failed("node", error)
        finally:
            await scratch_folder.remove(scratch)

    def _admitted(self, run: Run) -> tuple[Run, Secrets]:
        """The execution as it may run here, and its secrets; raises `SpecError`."""
        if run.requester == self._node or self._exchange is None:
            return run, self.secrets(run.execution.job, run.spec)
        spec = self._exchange.guests.admit(run.requester, run.spec)
        return msgspec.structs.replace(run, spec=spec), strangers.secrets_of(run)

    async def release(self, job: JobId) -> None:
        """Nothing of `job` is held now: free its executor's slots and its folder, if nothing more comes."""
        held = self._jobs.get(job)
        if held is not None and held.foreign:
            uses = held.uses
            await asyncio.sleep(LINGER)
            if held.uses != uses or self._jobs.get(job) is not held:
                return
        if self._exchange is not None:
            self._exchange.released(job)  # before anything is awaited: what is owed next is opened anew
        if held is not None:
            del self._jobs[job]
            await held.executor.release(job)
            if held.layer is not None:
                held.layer.close()
            await asyncio.to_thread(shutil.rmtree, held.folder, ignore_errors=True)

    def keep(self, order: Keep) -> None:
        """Pin an accepted result: the blocks are in the store that all nodes of this user share."""
        self._keeping.kept(order.execution.job, order.outcome.record)

    async def seal(self, order: Seal) -> JobSealed:
        """Store and pin the root over a job's records, then publish it."""
        cid = seal(self._content, order.records)
        self._keeping.kept(order.job, cid)
        self._content.flush()
        published, problem = await publish(self._publishers, order.job, cid, order.publish)
        return JobSealed(order.job, cid, published, problem)

    def _job(self, run: Run) -> _Job:
        job = self._jobs.get(run.execution.job)
        if job is None:
            self._made += 1  # the folder of an earlier one may be on its way out
            folder = self._folder / f"{run.execution.job}.{self._made}"
            job = _Job(*self._facilities.choose(run.spec), folder, run.requester, foreign=run.requester != self._node)
            self._jobs[run.execution.job] = job
        elif job.requester != run.requester:
            raise NodeUnreachable("a job of another node has this id, and is being put away here")
        job.uses += 1
        return job

    async def _execute(
        self,
        run: Run,
        job: _Job,
        scratch: Path,
        *,
        progress: Callable[[Event | Lines | Transfer], None],
        secrets: Secrets,
    ) -> Outcome:
        providers = self._exchange.providers(run) if self._exchange is not None else ()
        if not job.ready:
            async with job.lock:
                await self._prepare(job, run.spec, providers)
        if job.problem is not None:
            return self._failed("environment", job.problem)
        entries, shared = await self._entries(run, job, providers)
        owner = run.spec.labels.get(OWNER_LABEL, "")
        own = run.requester == self._node and not owner
        access = Access(own=own, whose="" if own else f"{run.requester} {owner}", providers=providers)

        def told(name: str, done: int, total: int | None, cid: str) -> None:
            progress(Transfer(run.execution, name, done, total, cid))

        await self._fetch(entries, run.spec.inputs, access, told)
        await self._fetch(shared, run.spec.shared, access, told)
        heavy = len(entries) + len(shared) > INLINE_FILES
        await _in_thread_if(heavy, lambda: self._keeping.running(run.execution, (*entries, *shared)))

        def stage() -> list[StagedFile]:
            inputs = self._open(entries, run.spec, scratch, shared=False)
            return inputs + self._open(shared, run.spec, scratch, shared=True)

        def check() -> None:
            self._check(entries, run.spec.inputs)
            self._check(shared, run.spec.shared)

        files = await _in_thread_if(heavy, stage)
        task = ShardTask(
            execution=run.execution,
            spec=run.spec,
            count=run.count,
            files=tuple(files),
            scratch=scratch,
            bundle=job.bundle,
            layer=job.layer.path if job.layer is not None else None,
            secrets=secrets,
        )
        telling = Telling(run.execution, progress, secrets)
        try:
            raw = await job.executor.run(task, telling)
        finally:
            telling.end()
        await _in_thread_if(heavy, check)
        raw = await asyncio.to_thread(masked, raw, secrets) if secrets else raw
        self._facilities.at_fault |= raw.error is not None and raw.error.kind == "node"
        try:
            return await self._name(raw, job.name, move=own)
        except ContentError as error:  # the store did not take the result: not the input's fault
            log.exception("the result of %s can't be stored", run.execution)
            return self._failed("node", error)

    async def _prepare(self, job: _Job, spec: JobSpec, providers: Sequence[Provider]) -> None:
        """Unpack the cell's folder and install what it requires, once for the job."""
        if job.ready:
            return
        job.folder.mkdir(parents=True, exist_ok=True)
        if isinstance(spec.task, PythonCell):
            if job.bundle is None:
                await self._bring(spec.task.bundle, providers, limit=strangers.disk(spec))
                bundle = job.folder / f"bundle.{uuid.uuid4().hex}"  # a try that was cancelled may still write its own
                await asyncio.to_thread(self._content.export, spec.task.bundle, bundle)
                job.bundle = bundle
            if spec.task.requires:
                try:
                    job.layer = await self._facilities.layers.open(spec.task.requires, await job.executor.target(spec))
                except SpecError as error:
                    job.problem = error
        job.ready = True

    # --- inputs ---

    async def _bring(self, root: str, providers: Sequence[Provider], *, limit: int) -> None:
        if self._exchange is not None and providers:
            await self._exchange.bring(root, providers, limit=limit)

    async def _entries(self, run: Run, job: _Job, providers: Sequence[Provider]) -> ShardEntries:
        if not job.foreign:
            if run.block == job.bare:
                return (), ()
            entries, shared = read_shard(self._content, run.block)
            if not (entries or shared):
                job.bare = run.block
            return entries, shared
        await self._bring(run.block, providers, limit=strangers.MAX_PLAN)
        entries, shared = await asyncio.to_thread(read_shard, self._content, run.block)
        strangers.check_entries(run.spec, entries, shared)
        return entries, shared

    async def _fetch(
        self, entries: Sequence[Entry], sources: Sequence[InputSource], access: Access, told: Told
    ) -> None:
        """Have the entries brought to this machine, each by its source."""
        found: dict[Source, list[Entry]] = {}
        for entry in entries:
            found.setdefault(self._source(sources[entry.source], entry), []).append(entry)
        for source, mine in found.items():
            await source.fetch(mine, access=access, told=told)

    def _open(self, entries: Sequence[Entry], spec: JobSpec, scratch: Path, *, shared: bool) -> list[StagedFile]:
        if not entries:
            return []
        own, common = mounts(spec)
        sources, targets = (spec.shared, common) if shared else (spec.inputs, own)
        files = []
        for entry in entries:
            source = sources[entry.source]
            mount = container_path(targets[entry.source], source, entry)
            opened = self._source(source, entry).open(entry.reference, scratch=scratch)
            path = scratch_folder.named(opened, entry, scratch / "named", mount)
            files.append(StagedFile(path=path, mount=mount, logical=entry.path, size=entry.size, shared=shared))
        return files

    def _check(self, entries: Sequence[Entry], sources: Sequence[InputSource]) -> None:
        for entry in entries:
            self._source(sources[entry.source], entry).check(entry.reference)

    def _source(self, source: InputSource, entry: Entry) -> Source:
        """Who brings an entry of this input; one by CID comes by its CID, whatever it was listed from (an archive)."""
        reference = entry.reference
        name = f"ipfs://{reference.cid}" if isinstance(reference, ContentRef) else source.source
        for candidate in self._sources:
            if candidate.claims(name):
                return candidate
        raise ContentError(f"no source of this node opens {shown(source.source)}")

    # --- results ---

    async def _name(self, raw: RawOutcome, executor: str, *, move: bool) -> Outcome:
        """The outcome with every byte either inside or in the content store.

        Files are taken over (`move`) of the owner's jobs. Those of others are copied: something that took over its
        container could hold one open, and write to it when the store has hashed it.
        """
        outcome = Outcome(
            ok=raw.ok,
            exit_code=raw.exit_code,
            value=Value(raw.value.kind, raw.value.type, await self._blob(raw.value.data, move=move)),
            outputs=await self._add(raw.outputs, move=move) if raw.outputs else None,
            stdout=await self._blob(raw.stdout, move=move),
            stderr=await self._blob(raw.stderr, move=move),
            cut=raw.cut,
            error=raw.error,
            seconds=raw.seconds,
            max_rss=raw.max_rss,
            executor=executor,
        )
        return encode_outcome(self._content, printable(outcome))

    def _failed(self, kind: ErrorKind, error: Exception) -> Outcome:
        failure = ShardError(kind=kind, name=type(error).__name__, message=str(error)[:LONGEST_MESSAGE])
        return encode_outcome(self._content, printable(Outcome(ok=False, exit_code=1, error=failure)))

    async def _blob(self, data: bytes | Path, *, move: bool) -> Blob:
        if isinstance(data, Path):
            size = data.stat().st_size  # noqa: ASYNC240 - microseconds
            return Blob(size=size, inline=None, cid=await self._add(data, move=move))
        if len(data) <= INLINE_LIMIT:
            return Blob(size=len(data), inline=data)
        cid = await asyncio.to_thread(self._content.add_bytes, data)
        return Blob(size=len(data), inline=None, cid=cid)

    async def _add(self, path: Path, *, move: bool) -> str:
        return await asyncio.to_thread(lambda: self._content.add_path(path, move=move))


async def _in_thread_if(heavy: bool, work: Callable[[], T]) -> T:  # noqa: FBT001 - reads as a sentence
    return await asyncio.to_thread(work) if heavy else work()
