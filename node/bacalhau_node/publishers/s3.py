"""`--publish s3://BUCKET/PREFIX`: the result of a job as files in a bucket.

    PREFIX/JOB/shards/INDEX/{stdout,stderr,exit_code,value…,outputs/…}      as `download` lays them out
    PREFIX/JOB/manifest.json                                                written last: all of the above is there

Theory of operation. Objects are only ever created. One that is there already is compared byte by byte: an equal one
stays as it is, so publishing again (after a crash, say) changes nothing and ends what was begun; a different one is
somebody else's, and an error. What fits one request is created under a condition that the server checks
(`If-None-Match`). Larger objects go up in parts, which obstore can't tie to a condition, so they are asked for first:
two who write one large object at the same moment both succeed, and below a job's own id both write the same bytes.

The manifest names the root of the result, the profile that its CIDs were made with, and each file's CID and size.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from bacalhau_node.buckets import Buckets, Place, answered, explained, is_path, parse, together
from bacalhau_node.errors import SpecError
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


class S3Publisher:
    """`ports.Publisher` to S3 and what speaks like it.

    `files` lists a sealed result by its root; `folder` is for files on their way, on the store's file system; `profile`
    is the name of the UnixFS profile of `content`.
    """

    def __init__(
        self, content: ContentStore, *, files: Callable[[str], Sequence[File]], folder: Path, profile: str
    ) -> None:
        self._content, self._files, self._folder, self._profile = content, files, folder, profile
        self._buckets = Buckets()
        self._large = asyncio.Semaphore(_LARGE_AT_ONCE)

    def claims(self, target: str) -> bool:
        """Whether `target` is `s3://…`."""
        return target.startswith("s3://")

    async def check(self, target: str) -> None:
        """Create a tiny object of a name of its own below the prefix and remove it: whoever may do that may publish."""
        place = parse(target)
        store = self._buckets.open(place)
        probe = place.at(_join(place.key, f".bacalhau-probe-{secrets.token_hex(8)}"))
        await _created(store, probe, b"bacalhau")
        await _removed(store, probe)

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
        queue = iter(files)

        async def work() -> None:
            for path, cid, size in queue:
                await self._put(store, place.at(f"{base}/{path}"), cid, size=size)

        await together(work, min(_AT_ONCE, len(files)))
        manifest = place.at(f"{base}/manifest.json")
        await _create_or_compare(store, manifest, self._manifest(job, root, files))
        return (f"{place.at(base)}/", str(manifest))

    def _manifest(self, job: JobId, root: str, files: Sequence[File]) -> bytes:
        """The same bytes for the same result, always: so it holds no times."""
        described = [{"path": path, "cid": cid, "size": size} for path, cid, size in files]
        whole = {"job": job, "root": root, "profile": self._profile, "files": described}
        return msgspec.json.format(msgspec.json.encode(whole), indent=1) + b"\n"

    async def _put(self, store: Store, place: Place, cid: str, *, size: int) -> None:
        if size <= PART:
            data = await asyncio.to_thread(self._content.read, cid)
            await _create_or_compare(store, place, data)
            return
        async with self._large, self._on_disk(cid) as path:
            if not await _there(store, place):
                await _uploaded(store, place, path, size=size)
            elif not await _equal(store, place, path):
                raise _in_the_way(place)

    @asynccontextmanager
    async def _on_disk(self, cid: str) -> AsyncIterator[Path]:
        """The store's own file, or one for as long as it is needed."""
        if (own := await asyncio.to_thread(self._content.file, cid)) is not None:
            yield own
            return
        path = self._folder / f"publish-{secrets.token_hex(8)}"
        try:
            await asyncio.to_thread(self._export, cid, path)
            yield path
        finally:
            path.unlink(missing_ok=True)

    def _export(self, cid: str, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._content.export(cid, path)


# --- one object ---


async def _create_or_compare(store: Store, place: Place, data: bytes) -> None:
    if not await _created(store, place, data) and not await _equal(store, place, data):
        raise _in_the_way(place)


async def _created(store: Store, place: Place, data: bytes) -> bool:
    """Create an object; False when there is one."""
    import obstore  # noqa: PLC0415 - only who uses buckets has it
    from obstore.exceptions import AlreadyExistsError, PreconditionError  # noqa: PLC0415

    there = (AlreadyExistsError, PreconditionError)  # the second: somebody is just creating it
    try:
        await answered(place, obstore.put_async(store, place.key, data, mode="create"), but=there)
    except there:
        return False
    return True


async def _uploaded(store: Store, place: Place, path: Path, *, size: int) -> None:
    import obstore  # noqa: PLC0415 - only who uses buckets has it

    part = max(PART, -(-size // _MOST_PARTS))
    await answered(place, obstore.put_async(store, place.key, path, chunk_size=part, max_concurrency=4))


async def _there(store: Store, place: Place) -> bool:
    import obstore  # noqa: PLC0415 - only who uses buckets has it

    try:
        await answered(place, obstore.head_async(store, place.key), but=(FileNotFoundError,))
    except FileNotFoundError:
        return False
    return True


async def _equal(store: Store, place: Place, ours: bytes | Path) -> bool:
    """Whether the object holds these very bytes."""
    import obstore  # noqa: PLC0415 - only who uses buckets has it

    async def compare() -> bool:
        theirs = await obstore.get_async(store, place.key)
        with BytesIO(ours) if isinstance(ours, bytes) else ours.open("rb") as reader:
            async for chunk in theirs.stream(min_chunk_size=PART):
                if await asyncio.to_thread(reader.read, len(chunk)) != bytes(chunk):
                    return False
            return not reader.read(1)

    return await answered(place, compare())


async def _removed(store: Store, place: Place) -> None:
    """Remove the probe. Who may create but not remove can publish all the same: then it stays, and the log says so."""
    import obstore  # noqa: PLC0415 - only who uses buckets has it
    from obstore.exceptions import BaseError  # noqa: PLC0415

    try:
        await obstore.delete_async(store, place.key)
    except (BaseError, OSError) as error:
        log.warning("%s was written to see whether it can be, and can't be removed: %s", place, explained(error, place))


def _in_the_way(place: Place) -> SpecError:
    return SpecError(
        f"{place} is there already, with other bytes, and nothing is ever overwritten: publish to another prefix"
    )


def _join(prefix: str, name: str) -> str:
    return f"{prefix}/{name}" if prefix else name
