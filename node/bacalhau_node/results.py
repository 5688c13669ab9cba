"""A job's result seen as one folder: the names of `combined/` in a download, and what `--input {job}` lists.

Shards write without knowing of each other, so two of them may have chosen one name. **Nothing is ever
overwritten**: the first shard (by its number) keeps the name, what comes later gets `.shard-INDEX` before its suffix
(`result.csv`, `result.shard-1.csv`), and a folder that would lie where a file lies, or the other way round, likewise.

As an input, a result is named by the CID of its root, `ipfs://CID[/path]`: the root is a list of records (see
`content.records`), no UnixFS folder, and `ResultSource` reads it as one. It has two parts: `outputs`, what the shards
wrote, with the names of above, and `values`, the value of each shard (`0.arrow`, `1.arrow`). Without a path, or
with one that begins with neither word, it is `outputs`, or `values` where no shard wrote a file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Final, Literal

from bacalhau_node.cid import DAG_JSON, Cid
from bacalhau_node.content.reader import Reader
from bacalhau_node.content.records import read_record, read_root
from bacalhau_node.content.walk import Want, resolved, steps_of
from bacalhau_node.errors import ContentError, SpecError
from bacalhau_node.messages import Blob, Outcome, ValueKind
from bacalhau_node.ports import Access, ContentStore, Source, Told
from bacalhau_node.sharding import ContentRef, Entry, Reference, shown
from bacalhau_node.spec import InputSource

SUFFIXES: Final[dict[ValueKind, str]] = {
    "json": ".json",
    "arrow": ".arrow",
    "npy": ".npy",
    "bytes": ".bin",
    "mime": ".mime.json",
    "repr": ".txt",
}
"""How a file with the value of a shard ends."""

_SCHEME = "ipfs://"
Listed = tuple[str, str, int]
"""(path, CID, size) of a file; of an empty folder its path ends in "/" and its size is 0."""
Listing = list[Listed]


class Names:
    """Hands out the names of one combined folder, each once."""

    def __init__(self) -> None:
        self._taken: dict[str, Literal["file", "folder"]] = {}

    def place(self, path: str, shard: int) -> str:
        """Where the file `path` of this shard lies; a `path` that ends in "/" is a folder."""
        *folders, name = path.split("/")
        here = ""
        for folder in folders:
            here = self._step(here, folder, shard, kind="folder")
        return self._step(here, name, shard, kind="file") if name else f"{here}/"

    def _step(self, parent: str, name: str, shard: int, *, kind: Literal["file", "folder"]) -> str:
        for candidate in _candidates(name, shard):
            path = f"{parent}/{candidate}" if parent else candidate
            if path not in self._taken or self._taken[path] == kind == "folder":
                self._taken[path] = kind
                return path
        raise AssertionError  # there is always another candidate


def _candidates(name: str, shard: int) -> Iterator[str]:
    yield name
    path, number = PurePosixPath(name), 1
    while True:
        yield f"{path.stem}.shard-{shard}{f'.{number}' if number > 1 else ''}{path.suffix}"
        number += 1


class ResultSource:
    """`ports.Source` of sealed results that `store` has; `content` brings and opens the files in them."""

    def __init__(self, store: ContentStore, content: Source) -> None:
        self._store, self._content = store, content

    def claims(self, source: str) -> bool:
        """Whether `source` names a block of records, not of files."""
        try:
            return Cid.parse(_split(source)[0]).codec == DAG_JSON
        except SpecError:
            return False

    def list(self, source: InputSource, *, index: int) -> list[Entry]:
        """The files of the result, or those below the path."""
        cid, path = _split(source.source)
        if source.unpack:
            raise SpecError(f"{source.source} is the result of a job and no archive: leave `unpack` out")
        if not self._store.has(cid):
            raise ContentError(f"the result {cid} is not on this node: give this input to the node that has the job")
        listed = result_files(self._store, cid, path)
        return [Entry(name, ContentRef(file), size, index) for name, file, size in listed]

    async def fetch(self, entries: Sequence[Entry], *, access: Access, told: Told) -> None:
        """See `ports.Source`."""
        await self._content.fetch(entries, access=access, told=told)

    def open(self, reference: Reference, *, scratch: Path) -> Path:
        """See `ports.Source`."""
        return self._content.open(reference, scratch=scratch)

    def check(self, reference: Reference) -> None:
        """See `ports.Source`."""
        self._content.check(reference)


def result_files(store: ContentStore, cid: str, path: str) -> Listing:
    """The files of a sealed result, or those below `path`; raises `ContentError` where there are none."""
    listed = _below(_part(store, cid, path.partition("/")[0]), path)
    if not listed:
        raise ContentError(f"the result {cid} has no {shown(path) or 'files and no values'}")
    return listed


def _part(store: ContentStore, cid: str, part: str) -> Listing:
    """Everything in one part of the result; in one that was named, with its name before each path."""
    outcomes = [(shard, read_record(store, record)) for shard, record in read_root(store, cid)]
    if part == "values":
        return _under(part, values(outcomes, store.add_bytes))
    found = outputs(outcomes, store.list)
    if part == "outputs":
        return _under(part, found)
    return found or values(outcomes, store.add_bytes)


def file_parts(store: ContentStore, cid: str, path: str) -> Iterator[bytes]:
    """The bytes of the file at `path` below a folder or a sealed result, checked; blocks. Raises `ContentError`."""
    root = Cid.parse(cid)
    if root.codec == DAG_JSON:
        found = [file for _, file, _ in result_files(store, cid, path)]
        if len(found) > 1:
            raise ContentError(f"{shown(path) or cid} is a folder of {len(found):,} files: name one of them")
        root = Cid.parse(found[0])
    else:
        levels, absent = resolved(store.block, Want(root, steps_of(path), "entity"))
        if absent:
            raise ContentError(absent)
        root = levels[-1]
    yield from Reader(store, root).chunks(root)


def shards(store: ContentStore, root: str) -> Listing:
    """Every file of a sealed result, as `download` lays them out: `shards/INDEX/{stdout,stderr,exit_code,value…}`."""
    found: Listing = []
    for shard, record in read_root(store, root):
        outcome = read_record(store, record)
        files = _texts(outcome, store.add_bytes)
        if outcome.value.kind != "none":
            blob = outcome.value.blob
            files.append((f"value{SUFFIXES[outcome.value.kind]}", _named(blob, store.add_bytes), blob.size))
        wrote = _under("outputs", list(store.list(outcome.outputs))) if outcome.outputs else []
        found += _under(f"shards/{shard}", [*files, *wrote])
    return found


def combined(store: ContentStore, root: str) -> Listing:
    """A sealed result as one folder without anything twice: `outputs`, `values`, and the text of each shard."""
    outcomes = [(shard, read_record(store, record)) for shard, record in read_root(store, root)]
    texts = [_under(f"shards/{shard}", _texts(outcome, store.add_bytes)) for shard, outcome in outcomes]
    return [
        *_under("outputs", outputs(outcomes, store.list)),
        *_under("values", values(outcomes, store.add_bytes)),
        *(one for text in texts for one in text),
    ]


def outputs(outcomes: Sequence[tuple[int, Outcome]], listing: Callable[[str], Sequence[Listed]]) -> Listing:
    """What the shards wrote, as one folder."""
    names = Names()
    return [
        (names.place(path, shard), cid, size)
        for shard, outcome in outcomes
        if outcome.outputs
        for path, cid, size in listing(outcome.outputs)
    ]


def values(outcomes: Sequence[tuple[int, Outcome]], add: Callable[[bytes], str]) -> Listing:
    """The values of the shards as files, numbered so that they sort like the shards."""
    width = len(str(max((shard for shard, _ in outcomes), default=0)))
    return [
        (f"{shard:0{width}}{SUFFIXES[outcome.value.kind]}", _named(outcome.value.blob, add), outcome.value.blob.size)
        for shard, outcome in outcomes
        if outcome.value.kind != "none"
    ]


def _texts(outcome: Outcome, add: Callable[[bytes], str]) -> Listing:
    code = f"{outcome.exit_code}\n".encode()
    blobs = {"exit_code": Blob(len(code), code), "stdout": outcome.stdout, "stderr": outcome.stderr}
    return [(name, _named(blob, add), blob.size) for name, blob in blobs.items()]


def _named(blob: Blob, add: Callable[[bytes], str]) -> str:
    return blob.cid or add(blob.inline or b"")


def _under(folder: str, listed: Listing) -> Listing:
    return [(f"{folder}/{path}", cid, size) for path, cid, size in listed]


def _split(source: str) -> tuple[str, str]:
    cid, _, path = source.removeprefix(_SCHEME).partition("/")
    return cid, path.strip("/")


def _below(listed: Listing, path: str) -> Listing:
    """What is at `path`, by its name alone, or below it; sorted as every listing is."""
    if not path:
        return sorted(listed)
    inside = [(name.removeprefix(f"{path}/"), cid, size) for name, cid, size in listed if name.startswith(f"{path}/")]
    alone = [(path.rpartition("/")[2], cid, size) for name, cid, size in listed if name == path]
    return sorted(one for one in (*inside, *alone) if one[0])
