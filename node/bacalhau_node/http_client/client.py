"""`HttpClient`: everything that a node in this process gives, from one elsewhere.

Local inputs are sent along (`upload`), results are fetched and checked (`fetch`), and what breaks in
between is mended (`connection`). Content that lies in this user's own store is taken from there: a
node on the same machine and data folder sends nothing twice.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import tempfile
import uuid
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from msgspec import structs

from bacalhau_node.api import shapes
from bacalhau_node.cid import DAG_JSON, Cid
from bacalhau_node.client import NONE, Graph, JobLine, JobPlan, JobView, NodeView, Stored, Submission, Update, in_parts
from bacalhau_node.content.blocks import BlockStore
from bacalhau_node.content.incoming import Shelf
from bacalhau_node.content.reader import Reader
from bacalhau_node.content.unixfs import PROFILES, Imported
from bacalhau_node.errors import BacalhauError, ContentError, SpecError
from bacalhau_node.folders import data_folder, servers
from bacalhau_node.http_client import upload
from bacalhau_node.http_client.connection import BROKEN, LONG, PATIENCE, Connection, part
from bacalhau_node.http_client.fetch import Memory, fetch, fetch_anywhere
from bacalhau_node.ids import JobId
from bacalhau_node.literals import is_loopback, node_url
from bacalhau_node.node import PROFILE
from bacalhau_node.plan import make_plan
from bacalhau_node.protocol.events import FINAL_JOB, JobChanged
from bacalhau_node.sharding import LocalStamp
from bacalhau_node.sources.local import LocalSource
from bacalhau_node.spec import InputSource, JobSpec, PythonCell

CALL_OFF_SECONDS = 2.0
BUNDLES_KEPT = 8
"""Small folders of cells that may still be submitted; each is at most `shapes.MAX_BUNDLE`."""

LONGEST_EVENT = 64 * 1024 * 1024
"""Bytes of one event; a shard's text comes in much smaller ones."""


class HttpClient:
    """A `client.Client` of the node at `url`.

    `token`: its key; default: the token file of a node of this user on this machine, else `BACALHAU_API_KEY`.
    `folder`: where content is cached, default this user's data folder. `patience`: seconds until a node that
    doesn't answer any more raises `NodeUnreachable`. `progress` is told (bytes sent, bytes to send) of inputs,
    `received` how many bytes came of the file or folder that is fetched.
    """

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        folder: Path | None = None,
        patience: float = PATIENCE,
        progress: upload.Progress | None = None,
        received: Callable[[int], None] | None = None,
    ) -> None:
        self.url = node_url(url)
        self._folder = folder or data_folder()
        key = find_key(self.url, self._folder) if token is None else token
        self._connection = Connection(self.url, key, patience=patience)
        self._progress, self._received = progress, received
        self._hashed: dict[LocalStamp, Imported] = {}
        self._bundles: OrderedDict[str, dict[str, bytes]] = OrderedDict()
        self._store: BlockStore | None = None
        self._opening = asyncio.Lock()

    # --- jobs ---

    async def put_bundle(self, files: Mapping[str, bytes]) -> str:
        """See `client.Client`. A small one is only named here, and goes along with the job's submission."""
        if sum(map(len, files.values())) <= shapes.MAX_BUNDLE:
            bundle = upload.folder_cid(files)
            self._bundles[bundle] = dict(files)
            if len(self._bundles) > BUNDLES_KEPT:
                self._bundles.popitem(last=False)
            return bundle
        with tempfile.TemporaryDirectory(prefix="bacalhau-") as name:
            return await self._send_folder(Path(name), files)

    async def _send_folder(self, folder: Path, files: Mapping[str, bytes]) -> str:
        def build(tree: upload.Tree) -> str:
            for path, data in files.items():
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                (folder / path).write_bytes(data)
            return tree.add(LocalSource().list(InputSource(source=str(folder)), index=0))

        tree = upload.Tree({}, reuse=False)
        root = await asyncio.to_thread(build, tree)
        await upload.send(self._connection, tree, self._progress)
        return root

    async def plan(self, spec: JobSpec) -> JobPlan:
        """See `client.Client`. Local inputs alone are planned here: nothing is sent for it."""
        sources = (*spec.inputs, *spec.shared)
        if sources and all(upload.is_local(source) and not upload.goes_whole(source) for source in sources):
            slots = (await self.nodes())[0].room
            return await asyncio.to_thread(make_plan, spec, (LocalSource(),), slots=slots)
        spec, _ = await self._uploaded(spec)
        return await self._connection.ask("POST", "/v0/plan", JobPlan, body=shapes.PlanRequest(spec), seconds=LONG)

    async def submit(self, spec: JobSpec, *, secrets: Mapping[str, str] = NONE) -> Submission:
        """See `client.Client`. Asked again under the same id when the connection breaks, so there is one job."""
        spec, notes = await self._uploaded(spec)
        files = self._bundles.get(spec.task.bundle, {}) if isinstance(spec.task, PythonCell) else {}
        body = shapes.SubmitRequest(f"j-{uuid.uuid4()}", spec, files, dict(secrets))
        try:
            submission = await self._connection.ask("POST", "/v0/jobs", Submission, body=body, seconds=LONG)
        except asyncio.CancelledError:
            await self._call_off(body.job)
            raise
        return structs.replace(submission, notes=(*notes, *submission.notes))

    async def _call_off(self, job: JobId) -> None:
        """Nobody waits for the answer to a submission any more: the job must not run, if there is one."""
        with contextlib.suppress(BacalhauError, TimeoutError):
            async with asyncio.timeout(CALL_OFF_SECONDS):
                await self.cancel(job)

    async def _uploaded(self, spec: JobSpec) -> tuple[JobSpec, tuple[str, ...]]:
        return await upload.upload(self._connection, spec, self._hashed, self._progress)

    async def updates(self, job: JobId) -> AsyncIterator[Update]:
        """See `client.Client`. Goes on where it was when the connection breaks."""
        last, retry = "", self._connection.retry()
        while True:
            try:
                async with contextlib.aclosing(self._events(job, last)) as events:
                    async for number, update in events:
                        last = number
                        retry.progress()
                        yield update
                        if isinstance(update, JobChanged) and update.state in FINAL_JOB:
                            await _finish(events)
                            return
                await retry.again(ConnectionError("it closed the connection"))
            except BROKEN as error:
                await retry.again(error)

    async def _events(self, job: JobId, last: str) -> AsyncGenerator[tuple[str, Update], None]:
        """(id, update) as they come over one connection."""
        headers = {"Last-Event-ID": last} if last else {}
        path = f"/v0/jobs/{part(job)}/updates"
        async with self._connection.stream("GET", path, headers=headers, silence=3 * shapes.HEARTBEAT) as response:
            buffer = bytearray()
            async for data in response.content.iter_any():
                buffer += data
                *events, rest = buffer.split(b"\n\n")
                buffer = rest
                if len(buffer) > LONGEST_EVENT:
                    raise ContentError(f"the node sent an event of over {LONGEST_EVENT} bytes")
                for event in events:
                    if (found := shapes.read_event(bytes(event).split(b"\n"))) is not None:
                        yield found

    async def cancel(self, job: JobId) -> None:
        """See `client.Client`."""
        await self._connection.ask("POST", f"/v0/jobs/{part(job)}/cancel", dict[str, str])

    async def job(self, job: JobId) -> JobView:
        """See `client.Client`."""
        return await self._connection.ask("GET", f"/v0/jobs/{part(job)}", JobView)

    async def jobs(self) -> Sequence[JobLine]:
        """See `client.Client`."""
        return await self._connection.ask("GET", "/v0/jobs", list[JobLine])

    async def find(self, prefix: str) -> JobId:
        """See `client.Client`."""
        answer = await self._connection.ask("GET", "/v0/jobs/find", shapes.FoundAnswer, query={"prefix": prefix})
        return answer.job

    async def nodes(self) -> Sequence[NodeView]:
        """See `client.Client`."""
        return await self._connection.ask("GET", "/v0/nodes", list[NodeView])

    async def network(self) -> Graph:
        """See `client.Client`."""
        return await self._connection.ask("GET", "/v0/network", Graph)

    # --- content ---

    async def put(self, path: Path, *, profile: str = PROFILE) -> Stored:
        """See `client.Client`. The files stay where they are; only blocks that the node lacks are sent."""
        if profile not in PROFILES:
            raise SpecError(f"{profile!r} is not a UnixFS profile: there are {', '.join(PROFILES)}")
        tree = upload.Tree({}, reuse=False, profile=PROFILES[profile])
        cid = await asyncio.to_thread(tree.add_path, path)
        await upload.send(self._connection, tree, self._progress)
        await self._connection.ask("POST", f"/v0/pins/{cid}", shapes.PinAnswer)
        return Stored(cid, tree.size, tree.files, profile)

    async def cat(self, cid: str, path: str = "") -> AsyncIterator[bytes]:
        """See `client.Client`."""
        store = await self._opened()
        if await asyncio.to_thread(store.has, cid):
            async for part in in_parts(store, cid, path):
                yield part
            return
        root = _parsed(cid)
        with tempfile.TemporaryDirectory(prefix="bacalhau-") as name:
            fresh = await asyncio.to_thread(BlockStore, Path(name))
            try:
                if root.codec == DAG_JSON:  # of a result all is needed to know what is where in it
                    await self._fetch_anywhere(root, fresh)
                else:
                    cid, path = await self._fetch_anywhere(root, fresh, path), ""
                async for part in in_parts(fresh, cid, path):
                    yield part
            finally:
                await asyncio.to_thread(fresh.close)

    async def read(self, cid: str) -> bytes:
        """See `client.Client`."""
        store = await self._opened()
        if await asyncio.to_thread(store.has, cid):
            return await asyncio.to_thread(store.read, cid)
        root, memory = _parsed(cid), Memory()
        await fetch(self._connection, root, memory, told=self._received)
        return await asyncio.to_thread(lambda: b"".join(Reader(memory, root).chunks(root)))

    async def file(self, cid: str) -> Path | None:
        """See `client.Client`. What is not on this machine yet is fetched, and kept in the store."""
        store = await self._opened()
        if not await asyncio.to_thread(store.has, cid):
            with tempfile.TemporaryDirectory(prefix="bacalhau-", dir=store.folder / "tmp") as name:
                target = Path(name) / "content"
                await self._fetch_to(cid, target, Path(name) / "blocks")
                await asyncio.to_thread(lambda: store.add_path(target, move=True))
        return await asyncio.to_thread(store.file, cid)

    async def download(self, cid: str, target: Path) -> None:
        """See `client.Client`."""
        store = await self._opened()
        if await asyncio.to_thread(store.has, cid):
            await asyncio.to_thread(store.export, cid, target)
            return
        if await asyncio.to_thread(os.path.lexists, target):
            raise ContentError(f"{target} exists already: choose another name or remove it")
        with tempfile.TemporaryDirectory(prefix="bacalhau-", dir=store.folder / "tmp") as name:
            await self._fetch_to(cid, target, Path(name))

    async def _fetch_anywhere(self, root: Cid, shelf: Shelf, path: str = "") -> str:
        return await fetch_anywhere(self._connection, root, shelf, path=path, told=self._received)

    async def _fetch_to(self, cid: str, target: Path, blocks: Path) -> None:
        """Fetch a file or folder and write it to `target`; `blocks`: room for what it is made from."""
        store = await asyncio.to_thread(BlockStore, blocks)
        try:
            await self._fetch_anywhere(_parsed(cid), store)
            await asyncio.to_thread(store.export, cid, target)
        finally:
            await asyncio.to_thread(store.close)

    async def _opened(self) -> BlockStore:
        """This user's own store, opened at first use."""
        async with self._opening:
            if self._store is None:
                self._store = await asyncio.to_thread(BlockStore, self._folder / "store")
        return self._store

    async def close(self) -> None:
        """Let go of the node: its jobs go on."""
        await self._connection.close()
        if self._store is not None:
            await asyncio.to_thread(self._store.close)


async def _finish(events: AsyncIterator[object]) -> None:
    """Read the end of a stream, so that its connection can be used again; the node sends it at once."""
    with contextlib.suppress(*BROKEN):
        async with asyncio.timeout(1):
            async for _ in events:
                pass


def find_key(url: str, folder: Path) -> str:
    """The key for the node at `url`: its token where this user serves it here, else `BACALHAU_API_KEY`, else ""."""
    parts = urlsplit(url)
    if is_loopback(parts.hostname or ""):
        for own, token in servers(folder):
            if token and urlsplit(own).port == parts.port:
                return token
    return os.environ.get("BACALHAU_API_KEY", "")


def _parsed(cid: str) -> Cid:
    try:
        return Cid.parse(cid)
    except SpecError as error:
        raise ContentError(str(error)) from error
