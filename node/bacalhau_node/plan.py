"""The plan of a job: made once by the requester, stored as blocks, read by whoever runs a shard.

A shard's block holds its entries (a long list goes on in the blocks that `more` links to) and
links to the blocks of what `--with` brought; the root holds links to all shards. So an offer
names one CID for each shard, and a node reads only the blocks of the shards that it runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final, Protocol

import msgspec

from bacalhau_node import dagjson
from bacalhau_node.content.records import read_root, seal
from bacalhau_node.errors import BugError, ContentError, SpecError
from bacalhau_node.ports import ContentStore, Source
from bacalhau_node.sharding import (
    Doubtful,
    Entry,
    Unit,
    check_places,
    chunks,
    mounts,
    plan_block,
    read_block,
    select,
    split,
)
from bacalhau_node.spec import InputSource, JobSpec

LISTED_AT_ONCE: Final = 8
"""Inputs that are listed at the same time: each may wait for a server."""

REASONS: Final = 20
"""Of so many entries that could not be looked at an error says why."""


MAX_ENTRIES: Final = 2_000_000
"""Files of one shard, and as many that go to every shard: some 800 MB of memory, and what a plan of others may cost."""


class PlannedShard(msgspec.Struct, frozen=True):
    """One shard of a plan: its entries in order, and their bytes."""

    entries: tuple[Entry, ...]
    size: int


class JobPlan(msgspec.Struct, frozen=True):
    """What `--dry-run` shows and what a job is made from. `notes`: sentences for the user ("3 files: 3 shards")."""

    shards: tuple[PlannedShard, ...]
    shared: tuple[Entry, ...] = ()
    notes: tuple[str, ...] = ()


class StoredPlan(msgspec.Struct, frozen=True):
    """The CIDs of a stored plan: its root, and the block of each shard in order."""

    root: str
    blocks: tuple[str, ...]


class Unpack(Protocol):
    """Lists an input with `unpack`: what is in archives in their place."""

    def __call__(self, listed_by: Source, source: InputSource, *, index: int) -> list[Entry]:
        """The entries; from a thread."""
        ...


def make_plan(spec: JobSpec, sources: Sequence[Source], *, slots: int, unpack: Unpack | None = None) -> JobPlan:
    """List the inputs and split them. Blocks on disks and servers; raises `SpecError` and `ContentError`.

    What could not be looked at gets its place in a shard, which tries again: unless there is nothing else.
    """
    mounts(spec)  # clashes of mounts are told before anything is listed
    listed = _list_all(spec.inputs, sources, unpack)
    shared = [entry for entry in _list_all(spec.shared, sources, unpack) if not entry.path.endswith("/")]
    units = select(listed, spec.globs)
    doubts = _doubts(units, shared)
    units = [tuple(map(_settled, unit)) for unit in units] if doubts else units
    shards, notes = split(units, spec.sharding, slots=slots, with_inputs=bool(spec.inputs))
    check_places(spec, (entry for entries in shards for entry in entries), shared)
    planned = tuple(PlannedShard(entries, sum(entry.size for entry in entries)) for entries in shards)
    return JobPlan(planned, tuple(shared), (*notes, *doubts))


def store_plan(plan: JobPlan, content: ContentStore) -> StoredPlan:
    """Put the plan's blocks into the store."""
    shared = store_entries(plan.shared, content)
    blocks = tuple(store_shard(shard.entries, shared, content) for shard in plan.shards)
    return StoredPlan(seal(content, list(enumerate(blocks))), blocks)


def read_shard(content: ContentStore, block: str) -> tuple[tuple[Entry, ...], tuple[Entry, ...]]:
    """(entries of the shard, entries that go to every shard), from the shard's block."""
    node = _node(content, block)
    return (*read_block(node), *_linked(content, node, "more")), _linked(content, node, "shared")


def read_blocks(content: ContentStore, root: str) -> tuple[str, ...]:
    """The shards' blocks of a stored plan, by shard."""
    return tuple(block for _, block in read_root(content, root))


def store_shard(entries: tuple[Entry, ...], shared: list[dagjson.Link], content: ContentStore) -> str:
    """Put one shard's block into the store; `shared`: the links to what goes to every shard."""
    first, *rest = list(chunks(entries)) or [()]
    node = plan_block(first)
    if rest:
        node["more"] = [_store_block(part, content) for part in rest]
    if shared:
        node["shared"] = shared
    return content.put(dagjson.encode(node), codec="dag-json")


def store_entries(entries: tuple[Entry, ...], content: ContentStore) -> list[dagjson.Link]:
    """Put a list of entries into the store, as links for `store_shard`."""
    return [_store_block(part, content) for part in chunks(entries)]


def _store_block(entries: tuple[Entry, ...], content: ContentStore) -> dagjson.Link:
    return dagjson.Link(content.put(dagjson.encode(plan_block(entries)), codec="dag-json"))


def _node(content: ContentStore, block: str) -> dict[str, object]:
    node = dagjson.decode(content.get(block))
    if not isinstance(node, dict):
        raise ContentError(f"{block} is not a shard of a plan")
    return node


def _linked(content: ContentStore, node: dict[str, object], name: str) -> tuple[Entry, ...]:
    links = node.get(name, [])
    if not isinstance(links, list):
        raise ContentError(f"a shard of a plan has {name!r} that is not a list of links")
    found: list[Entry] = []
    for link in links:
        if isinstance(link, dagjson.Link):
            found += read_block(_node(content, link.cid))
        if len(found) > MAX_ENTRIES:
            raise ContentError(f"a shard of a plan has more than {MAX_ENTRIES:,} files: make more shards")
    return tuple(found)


def _doubts(units: Sequence[Unit], shared: Sequence[Entry]) -> tuple[str, ...]:
    """A sentence about what could not be looked at; raises `ContentError` where no shard could do without."""
    needed = [entry.problem for entry in shared if isinstance(entry, Doubtful)]
    entries = [entry for unit in units for entry in unit]
    problems = [entry.problem for entry in entries if isinstance(entry, Doubtful)]
    if needed or (problems and len(problems) == len(entries)):
        raise ContentError(_reasons(needed or problems, "\n"))
    if not problems:
        return ()
    count = f"{len(problems)} of {len(entries)} files can't be looked at now, their shards try again"
    return (f"{count}: {_reasons(problems, '; ')}",)


def _reasons(problems: Sequence[str], between: str) -> str:
    more = [f"and {len(problems) - REASONS} more"] if len(problems) > REASONS else []
    return between.join([*problems[:REASONS], *more])


def _settled(entry: Entry) -> Entry:
    """What a plan keeps of an entry: a doubt was told once."""
    if not isinstance(entry, Doubtful):
        return entry
    return Entry(entry.path, entry.reference, entry.size, entry.source)


def _list_all(inputs: Sequence[InputSource], sources: Sequence[Source], unpack: Unpack | None) -> list[Entry]:
    """All entries in the order of the inputs; the first input that fails is told, whatever comes first in time."""
    if len(inputs) < 2:
        return [entry for index, source in enumerate(inputs) for entry in _list(source, index, sources, unpack)]
    with ThreadPoolExecutor(LISTED_AT_ONCE) as pool:
        listed = [pool.submit(_list, source, index, sources, unpack) for index, source in enumerate(inputs)]
        return [entry for future in listed for entry in future.result()]


def _list(source: InputSource, index: int, sources: Sequence[Source], unpack: Unpack | None) -> list[Entry]:
    for candidate in sources:
        if not candidate.claims(source.source):
            continue
        if not source.unpack:
            return candidate.list(source, index=index)
        if unpack is None:
            raise BugError(f"nobody here unpacks {source.source}")
        return unpack(candidate, source, index=index)
    raise SpecError(f"--input {source.source}: no source of this node reads it; its extras may not be installed")
