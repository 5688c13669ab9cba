"""Inputs in buckets: `s3://bucket/prefix`, `gs://…`, `az://…`.

Theory of operation. A listing pins every object to the state that it had then: its version where the bucket keeps
versions, and its ETag. Only that state is ever read (`If-Match` with every request): an object that was overwritten
or removed since is an error that names it, unless its version is still there. What came is in the store under
its CID, and `Fetched` knows which state of which object that is: a rerun reads nothing from the bucket.

A prefix is a folder, as people see it in a console: keys are split at `/`, and what can't be a file below a folder
(a key that is a folder for others as well, a name that no disk takes) is listed as unusable.

What opens the bucket is this machine's, so it serves this machine's owner: the jobs of others get what they
need by URLs that their own requester signed (`presign`), never by a key that they only had to name.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, closing
from dataclasses import dataclass
from functools import cache, partial
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar
from weakref import WeakValueDictionary

from bacalhau_node.buckets import Buckets, Place, asked, claims, parse, together, url_for_others
from bacalhau_node.errors import BugError, ContentError, SpecError
from bacalhau_node.fetched import Fetched
from bacalhau_node.literals import nearest
from bacalhau_node.ports import Access, ContentStore, Told
from bacalhau_node.sharding import Entry, Reference, Unusable, UrlRef, shown
from bacalhau_node.sources.stored import stored_file
from bacalhau_node.spec import InputSource

if TYPE_CHECKING:
    from obstore import GetOptions, ObjectMeta

    from bacalhau_node.buckets import Store

PART: Final = 4 * 1024 * 1024
"""Bytes that one request asks for; what is larger comes in parts, many at once."""

REQUESTS: Final = 32
"""Requests of a node at once: 128 MiB on their way at most."""

PARTS: Final = 8
"""Parts of one object at once."""

SMALL, RUN = 64 * 1024, 8
"""Objects up to `SMALL` bytes go to threads in runs of up to `RUN`: one by one that takes as long as reading them."""

MOST_VERSIONS: Final = 10_000
"""Objects of a listing that are each asked for their version; in a larger one ETags alone pin them."""

_CHANGED: Final = "it changed after the job was planned: run the job again"
_LONGEST: Final = 255  # bytes of a name, on every disk of ours
_T = TypeVar("_T")

Run = Sequence[tuple[Entry, UrlRef]]


class BucketSource:
    """`ports.Source` over object stores."""

    def __init__(self, content: ContentStore, *, fetched: Fetched) -> None:
        self._content, self._fetched = content, fetched
        self._buckets = Buckets()
        self._pool = ThreadPoolExecutor(REQUESTS, "bucket")
        self._locks: WeakValueDictionary[UrlRef, asyncio.Lock] = WeakValueDictionary()
        self._brought: list[tuple[str, str, str]] = []
        self._next: asyncio.Task[None] | None = None  # what will write these rows
        self._writing = asyncio.Lock()

    def claims(self, source: str) -> bool:
        """Whether `source` names a bucket."""
        return claims(source)

    # --- listing ---

    def list(self, source: InputSource, *, index: int) -> list[Entry]:
        """Every object below the prefix, or the one object with this very key."""
        place = parse(source.source)
        store = self._buckets.open(place)
        if not place.folder and (one := _alone(store, place)) is not None:
            return [_entry(place, one, path=place.key.rpartition("/")[2], index=index)]
        found = _looked_at(store, place, _listed(store, place))
        if not found:
            raise ContentError(_nothing(store, place))
        below = len(place.key) + 1 if place.key else 0
        paths = [meta["path"][below:] for meta in found]
        problems = _problems(place, paths)
        entries = [
            _entry(place, meta, path=path, index=index, problem=problems.get(path, ""))
            for meta, path in zip(found, paths, strict=True)
        ]
        return sorted(entries, key=lambda entry: entry.path.encode())

    # --- bytes ---

    async def fetch(self, entries: Sequence[Entry], *, access: Access, told: Told) -> None:
        """Bring the objects here, many at once, each in the state that was listed."""
        missing = await asyncio.to_thread(self._missing, entries)
        if missing and not access.own:
            raise ContentError(
                f"{shown(missing[0][1].url)}: this node's credentials for buckets are its owner's,"
                " and serve no jobs of others: their requester has to send signed URLs"
            )
        runs = _runs(missing)
        opened = cache(self._buckets.open)  # to look at the settings takes as long as a small object

        async def work() -> None:
            for run in runs:
                async with AsyncExitStack() as locks:
                    if mine := await self._locked(run, locks):
                        await self._bring(mine, opened, told)

        with self._content.hold():  # it may take longer than the store keeps what nobody uses
            await together(work, min(2 * REQUESTS, len(missing)))  # half of them may wait for their rows

    def open(self, reference: Reference, *, scratch: Path) -> Path:
        """The store's own file where it has one, else one written to `scratch` (once for each CID)."""
        if not isinstance(reference, UrlRef):
            raise BugError(f"a source of buckets was asked to open {reference!r}")
        cid = self._known(reference)
        if cid is None:
            raise ContentError(f"{shown(reference.url)} is no longer in this node's store: run the job again")
        return stored_file(self._content, cid, scratch)

    def check(self, reference: Reference) -> None:
        """An object's state was read once and can't change; the store's file that was handed out is looked at again."""
        if isinstance(reference, UrlRef) and claims(reference.url) and (cid := self._known(reference)) is not None:
            self._content.file(cid)

    async def presign(self, reference: UrlRef, *, seconds: int) -> UrlRef:
        """The same object as a URL that anybody can read for so long; its version is the ETag.

        Where the URL can't name the version that was listed (see `url_for_others`), it reads the newest, and only if
        that is still the same. Raises `SpecError` or `ContentError`.
        """
        place, (version, etag) = parse(reference.url), _pins(reference)

        def sign() -> str:
            return url_for_others(self._buckets.open(place), place, version, seconds=seconds)

        return UrlRef(await asyncio.to_thread(sign), etag, reference.sha256)

    def _missing(self, entries: Sequence[Entry]) -> Run:
        """What is not here yet, each object once and in one order for all: who waits for a lock holds none after it."""
        wanted = {_reference(entry): entry for entry in entries}
        missing = [(entry, reference) for reference, entry in wanted.items() if self._known(reference) is None]
        return sorted(missing, key=lambda one: (one[1].url, one[1].version))

    async def _locked(self, run: Run, locks: AsyncExitStack) -> Run:
        """Lock these objects until `locks` ends, and leave out what somebody else brought while he had one locked."""
        waited = False
        for _, reference in run:
            lock = self._locks.setdefault(reference, asyncio.Lock())
            waited |= lock.locked()
            await locks.enter_async_context(lock)
        return await self._in_pool(partial(self._missing, [entry for entry, _ in run])) if waited else run

    def _known(self, reference: UrlRef) -> str | None:
        """The CID of what is here already."""
        cid = self._fetched.recall(reference.url, reference.version)
        return cid if cid is not None and self._content.has(cid) else None

    async def _bring(self, run: Run, opened: Callable[[Place], Store], told: Told) -> None:
        """Objects, into the store and into the table of what was fetched."""
        objects = [(entry, _Object(opened, reference)) for entry, reference in run]

        def bring() -> list[str]:
            return [self._content.add_bytes(wanted.read(entry.size, None)) for entry, wanted in objects]

        if run[0][0].size <= PART:
            cids = await self._in_pool(bring)
        else:
            cids = [await self._bring_parts(*objects[0], told)]
        await self._remember([(wanted.url, wanted.version, cid) for (_, wanted), cid in zip(run, cids, strict=True)])
        for (entry, _), cid in zip(run, cids, strict=True):
            told(entry.path, entry.size, entry.size, cid)

    async def _remember(self, rows: Sequence[tuple[str, str, str]]) -> None:
        """Make what came durable, in one transaction with all that came while the last one was written."""
        self._brought += rows
        if self._next is None:
            self._next = asyncio.create_task(self._write())
        await asyncio.shield(self._next)

    async def _write(self) -> None:
        async with self._writing:
            rows, self._brought, self._next = self._brought, [], None

            def write() -> None:
                self._content.flush()
                self._fetched.remember_all(rows)

            await self._in_pool(write)

    async def _bring_parts(self, entry: Entry, wanted: _Object, told: Told) -> str:
        """A large object, part by part, in whatever order they come."""
        starts, done = iter(range(0, entry.size, PART)), 0
        try:
            with closing(self._content.draft()) as draft:

                def bring(start: int) -> int:
                    end = min(start + PART, entry.size)
                    draft.write(start, [wanted.read(end - start, (start, end))])
                    return end - start

                async def work() -> None:
                    nonlocal done
                    for start in starts:
                        brought = await self._in_pool(partial(bring, start))
                        done += brought  # not before the await: others add meanwhile
                        told(entry.path, done, entry.size, "")

                await together(work, PARTS)
                return await self._in_pool(draft.finish)
        except OSError as error:
            raise ContentError(
                f"{shown(wanted.reference.url)} can't be written to the content store: {error.strerror or error};"
                " make room"
            ) from error

    async def _in_pool(self, work: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)


@dataclass(frozen=True)
class _Object:
    """An object in its listed state. `opened` gives the store of a bucket."""

    opened: Callable[[Place], Store]
    reference: UrlRef

    def read(self, size: int, between: tuple[int, int] | None) -> bytes:
        """All of it, or the bytes between two offsets: there must be `size` of them."""
        import obstore  # noqa: PLC0415 - only who uses buckets has it

        place, (version, etag) = parse(self.reference.url), _pins(self.reference)
        options: GetOptions = {"if_match": etag}
        if version is not None:
            options["version"] = version
        if between is not None:
            options["range"] = between
        store = self.opened(place.at(""))
        data = _as_planned(place, lambda: bytes(obstore.get(store, place.key, options=options).bytes()))
        if len(data) != size:
            raise ContentError(f"{place} has {len(data)} bytes in place of {size}: {_CHANGED}")
        return data


# --- listing ---


def _listed(store: Store, place: Place) -> list[ObjectMeta]:
    import obstore  # noqa: PLC0415 - only who uses buckets has it
    from obstore.exceptions import InvalidPathError  # noqa: PLC0415

    try:
        return list(asked(place, lambda: obstore.list(store, place.key or None).collect(), but=(InvalidPathError,)))
    except InvalidPathError as error:
        key = str(error).partition("\n")[0]
        raise ContentError(
            f"{place} holds a key that can't be a path of files ({key}): name a folder beside it, or rename the object"
        ) from error


def _head(store: Store, place: Place) -> ObjectMeta | None:
    """What the bucket says about one object; None if it is not there."""
    import obstore  # noqa: PLC0415 - only who uses buckets has it

    try:
        return asked(place, lambda: obstore.head(store, place.key), but=(FileNotFoundError,))
    except FileNotFoundError:
        return None


def _alone(store: Store, place: Place) -> ObjectMeta | None:
    """The object with this very key, if there is one and it may be looked at: if not, the listing says why."""
    from obstore.exceptions import PermissionDeniedError  # noqa: PLC0415 - only who uses buckets has it

    try:
        return _head(store, place)
    except SpecError as error:
        if isinstance(error.__cause__, PermissionDeniedError):
            return None
        raise


def _looked_at(store: Store, place: Place, listed: Sequence[ObjectMeta]) -> list[ObjectMeta]:
    """The listing with versions, where the bucket keeps them, and without what marks a folder.

    Consoles mark an empty folder by an empty object whose key ends in "/", which is listed under a name without it:
    so whatever is empty is asked for by its name.
    """
    first = next((_head(store, place.at(meta["path"])) for meta in listed if meta["size"]), None)
    versioned = first is not None and first["version"] is not None and len(listed) <= MOST_VERSIONS

    def look(meta: ObjectMeta) -> ObjectMeta | None:
        return _head(store, place.at(meta["path"]))

    doubtful = [versioned or not meta["size"] for meta in listed]
    with ThreadPoolExecutor(REQUESTS // 2) as pool:
        looked = pool.map(look, compress(listed, doubtful))
        seen = [next(looked) if doubt else meta for meta, doubt in zip(listed, doubtful, strict=True)]
    return [meta for meta in seen if meta is not None]


def _problems(place: Place, paths: Sequence[str]) -> dict[str, str]:
    """Path -> why it can't be a file."""
    folders: set[str] = set()
    for path in paths:
        folder = path.rpartition("/")[0]
        while folder and folder not in folders:
            folders.add(folder)
            folder = folder.rpartition("/")[0]
    twice = {path for path, count in Counter(paths).items() if count > 1}
    found = {}
    for path in paths:
        if path in folders:
            found[path] = "is a file and a folder too"
        elif path in twice:
            found[path] = "is there twice, by keys that differ in '/' only"
        elif max(len(part.encode()) for part in path.split("/")) > _LONGEST:
            found[path] = f"has a name longer than {_LONGEST} bytes, which no disk takes"
    base = f"{place}/"
    return {path: f"{shown(base + path)} {problem}: rename the object" for path, problem in found.items()}


def _entry(place: Place, meta: ObjectMeta, *, path: str, index: int, problem: str = "") -> Entry:
    etag = meta["e_tag"] or ""
    url = str(place.at(meta["path"]))
    if not etag:
        problem = problem or f"{shown(url)} has no ETag, so nobody can tell whether it changes"
    reference = UrlRef(url, f"{meta['version']} {etag}" if meta["version"] else etag)
    if problem:
        return Unusable(path, reference, meta["size"], index, problem=problem)
    return Entry(path, reference, meta["size"], index)


def _pins(reference: UrlRef) -> tuple[str | None, str]:
    """(version, ETag) of a reference that `_entry` made."""
    version, blank, etag = reference.version.partition(" ")
    return (version, etag) if blank else (None, version)


def _nothing(store: Store, place: Place) -> str:
    """That nothing is there, and what is."""
    import obstore  # noqa: PLC0415 - only who uses buckets has it

    root = asked(place, lambda: obstore.list_with_delimiter(store))
    names = [f"{name}/" for name in root["common_prefixes"]] + [meta["path"] for meta in root["objects"]]
    if not names:
        return f"the bucket {place.scheme}://{place.bucket} is empty"
    near = nearest(place.key.partition("/")[0], [name.rstrip("/") for name in names])
    return f"there is nothing at {place}{near or '.'} The bucket holds, for example, {', '.join(map(shown, names[:5]))}"


# --- bytes ---


def _runs(missing: Run) -> Iterator[Run]:
    """What one thread brings at a time: a large object, or small ones, fewer of them towards the end."""
    yield from ([one] for one in missing if one[0].size > SMALL)
    small = deque(one for one in missing if one[0].size <= SMALL)
    while small:
        yield [small.popleft() for _ in range(min(RUN, 1 + len(small) // REQUESTS))]


def _as_planned(place: Place, ask: Callable[[], _T]) -> _T:
    """What comes of an object that was listed; a `ContentError` tells what is the matter with it now."""
    from obstore.exceptions import PreconditionError  # noqa: PLC0415 - only who uses buckets has it

    try:
        return asked(place, ask, but=(PreconditionError, FileNotFoundError))
    except PreconditionError as error:
        raise ContentError(f"{shown(str(place))}: {_CHANGED}") from error
    except FileNotFoundError as error:
        raise ContentError(f"{shown(str(place))} is gone: it was removed after the job was planned") from error
    except SpecError as error:  # settings that have changed since the listing
        raise ContentError(str(error)) from error


def _reference(entry: Entry) -> UrlRef:
    if not isinstance(entry.reference, UrlRef):
        raise BugError(f"a source of buckets was asked to fetch {entry!r}")
    return entry.reference
