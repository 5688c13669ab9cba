"""`--publish s3://BUCKET/PREFIX`, `gs://…`, `az://…`: the result of a job as files in a bucket.

    PREFIX/JOB/shards/INDEX/{stdout,stderr,exit_code,value…,outputs/…}      as `download` lays them out
    PREFIX/JOB/manifest.json                                                written last: all of the above is there

Theory of operation. Objects are only ever created. One that is there already is compared byte by byte: an equal one
stays as it is, so publishing again (after a crash, say) changes nothing and ends what was begun; a different one is
somebody else's, and an error. What fits one request is created under a condition that the server checks
(`If-None-Match: *`; with Google, generation 0). Larger objects go up in parts, which obstore can't tie to a condition,
so they are asked for first: two who write one large object at the same moment both succeed, and below a job's own id
both write the same bytes.

The manifest names the root of the result, the profile that its CIDs were made with, and each file's CID and size.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from bacalhau_node.buckets import Buckets, Place, asked, claims, explained, is_path, parse, together
from bacalhau_node.errors import ContentError, SpecError
from bacalhau_node.ids import JobId
from bacalhau_node.ports import ContentStore
from bacalhau_node.sharding import shown

if TYPE_CHECKING:
    from bacalhau_node.buckets import Store

log = logging.getLogger(__name__)

PART: Final = 8 * 1024 * 1024
"""What goes in one request; larger objects go in parts of this size, 4 at once, so 20 times S3's least."""

_MOST_PARTS: Final = 9_000  # of the 10,000 that S3 allows
_AT_ONCE: Final = 16
_LARGE_AT_ONCE: Final = 2

File = tuple[str, str, int]
"""(path, CID, size) of a file of a result; an empty folder's path ends in "/"."""


class BucketPublisher:
    """`ports.Publisher` to object stores.

    `files` lists a sealed result by its root; `folder` is for files on their way, on the store's file system; `profile`
    is the name of the UnixFS profile of `content`.
    """

    def __init__(
        self, content: ContentStore, *, files: Callable[[str], Sequence[File]], folder: Path, profile: str
    ) -> None:
        self._content, self._files, self._folder, self._profile = content, files, folder, profile
        self._buckets = Buckets()
        self._pool = ThreadPoolExecutor(_AT_ONCE, "publish")
        self._large = threading.Semaphore(_LARGE_AT_ONCE)

    def claims(self, target: str) -> bool:
        """Whether `target` names a bucket."""
        return claims(target)

    async def check(self, target: str) -> None:
        """Create a tiny object of a name of its own below the prefix and remove it: whoever may do that may publish."""
        place = parse(target)
        probe = place.at(_join(place.key, f".bacalhau-probe-{secrets.token_hex(8)}"))

        def probed() -> None:
            store = self._buckets.open(place)
            _created(store, probe, b"bacalhau")
            _removed(store, probe)

        await self._in_pool(probed)

    async def publish(self, job: JobId, root: str, target: str) -> tuple[str, ...]:
        """Write what is missing of the result; returns the URL of its folder and of its manifest.

        Raises `SpecError` for settings and for objects that are in the way, else `ContentError`.
        """
        place = parse(target)
        store, base = self._buckets.open(place), _join(place.key, job)
        listed = await asyncio.to_thread(self._files, root)
        files = [file for file in listed if not file[0].endswith("/")]  # buckets have no folders
        for path, _, _ in files:
            if not is_path(path):
                raise SpecError(f"{shown(path)} of the result can't be a key in a bucket: give the file another name")
        queue, stop = iter(files), threading.Event()

        async def work() -> None:
            for file in queue:
                await self._in_pool(partial(self._put, store, place.at(f"{base}/{file[0]}"), file, stop))

        try:
            await together(work, min(_AT_ONCE, len(files)))
        finally:
            stop.set()  # threads can't be cancelled
        manifest = place.at(f"{base}/manifest.json")
        await self._in_pool(partial(_create_or_compare, store, manifest, self._manifest(job, root, files)))
        return (f"{place.at(base)}/", str(manifest))

    async def _in_pool(self, work: Callable[[], None]) -> None:
        await asyncio.get_running_loop().run_in_executor(self._pool, work)

    def _manifest(self, job: JobId, root: str, files: Sequence[File]) -> bytes:
        """The same bytes for the same result, always: so it holds no times."""
        described = [{"path": path, "cid": cid, "size": size} for path, cid, size in files]
        whole = {"job": job, "root": root, "profile": self._profile, "files": described}
        return msgspec.json.format(msgspec.json.encode(whole), indent=1) + b"\n"

    def _put(self, store: Store, place: Place, file: File, stop: threading.Event) -> None:
        _, cid, size = file
        if size <= PART:
            _create_or_compare(store, place, self._content.read(cid))
            return
        with self._large, self._on_disk(cid) as path:
            if stop.is_set():
                return
            if not _there(store, place):
                _upload(store, place, path, size=size, stop=stop)
            elif not _equal(store, place, path):
                raise _in_the_way(place)

    @contextmanager
    def _on_disk(self, cid: str) -> Iterator[Path]:
        """The store's own file, or one for as long as it is needed."""
        if (own := self._content.file(cid)) is not None:
            yield own
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"publish-{secrets.token_hex(8)}"
        try:
            self._content.export(cid, path)
            yield path
        finally:
            path.unlink(missing_ok=True)


# --- one object ---


def _create_or_compare(store: Store, place: Place, data: bytes) -> None:
    if not _created(store, place, data) and not _equal(store, place, data):
        raise _in_the_way(place)


def _created(store: Store, place: Place, data: bytes) -> bool:
    """Create an object; False when there is one."""
    import obstore  # noqa: PLC0415 - only who uses buckets has it
    from obstore.exceptions import AlreadyExistsError, PreconditionError  # noqa: PLC0415

    there = (AlreadyExistsError, PreconditionError)  # the second: somebody is just creating it
    try:
        asked(place, lambda: obstore.put(store, place.key, data, mode="create"), but=there)
    except there:
        return False
    return True


def _upload(store: Store, place: Place, path: Path, *, size: int, stop: threading.Event) -> None:
    """Write a large object in parts; with `stop` set it is given up, and there is no object."""
    import obstore  # noqa: PLC0415 - only who uses buckets has it

    length = max(PART, -(-size // _MOST_PARTS))

    def parts() -> Iterator[bytes]:
        with path.open("rb") as reader:
            while part := reader.read(length):
                if stop.is_set():
                    raise ContentError(f"{place} was not published: the node stops")
                yield part

    asked(place, lambda: obstore.put(store, place.key, parts(), chunk_size=length, max_concurrency=4))


def _there(store: Store, place: Place) -> bool:
    import obstore  # noqa: PLC0415 - only who uses buckets has it

    try:
        asked(place, lambda: obstore.head(store, place.key), but=(FileNotFoundError,))
    except FileNotFoundError:
        return False
    return True


def _equal(store: Store, place: Place, ours: bytes | Path) -> bool:
    """Whether the object holds these very bytes."""
    import obstore  # noqa: PLC0415 - only who uses buckets has it

    def compare() -> bool:
        theirs = obstore.get(store, place.key)
        with BytesIO(ours) if isinstance(ours, bytes) else ours.open("rb") as reader:
            same = all(reader.read(len(chunk)) == bytes(chunk) for chunk in theirs.stream(min_chunk_size=PART))
            return same and not reader.read(1)

    return asked(place, compare)


def _removed(store: Store, place: Place) -> None:
    """Remove the probe. Who may create but not remove can publish all the same: then it stays, and the log says so."""
    import obstore  # noqa: PLC0415 - only who uses buckets has it
    from obstore.exceptions import BaseError  # noqa: PLC0415

    try:
        obstore.delete(store, place.key)
    except (BaseError, OSError) as error:
        log.warning("%s was written to see whether it can be, and can't be removed: %s", place, explained(error, place))


def _in_the_way(place: Place) -> SpecError:
    return SpecError(
        f"{place} is there already, with other bytes, and nothing is ever overwritten: publish to another prefix"
    )


def _join(prefix: str, name: str) -> str:
    return f"{prefix}/{name}" if prefix else name
