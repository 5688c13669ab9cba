"""The plan of a job: made once by the requester, stored as blocks, read by whoever runs a shard.

A shard's block holds its entries and a link to the block of what `--with` brought; the root
holds links to all of them. So an offer names one CID for each shard, and a node reads only
the blocks of the shards that it runs.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from bacalhau_node import dagjson
from bacalhau_node.content.records import seal
from bacalhau_node.errors import ContentError, SpecError
from bacalhau_node.ports import ContentStore, Source
from bacalhau_node.sharding import Entry, mounts, plan_block, read_block, select, split
from bacalhau_node.spec import InputSource, JobSpec


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


def make_plan(spec: JobSpec, sources: Sequence[Source], *, slots: int) -> JobPlan:
    """List the inputs and split them. Blocks on disks; raises `SpecError` and `ContentError`."""
    mounts(spec)  # clashes are told before anything is listed
    listed = _list_all(spec.inputs, sources)
    shared = _list_all(spec.shared, sources)
    units = select(listed, spec.globs)
    shards, notes = split(units, spec.sharding, slots=slots, with_inputs=bool(spec.inputs))
    planned = tuple(PlannedShard(tuple(entries), sum(entry.size for entry in entries)) for entries in shards)
    return JobPlan(planned, tuple(shared), tuple(notes))


def store_plan(plan: JobPlan, content: ContentStore) -> StoredPlan:
    """Put the plan's blocks into the store."""
    shared = content.put(dagjson.encode(plan_block(plan.shared)), codec="dag-json") if plan.shared else None
    blocks = tuple(_store_shard(shard, shared, content) for shard in plan.shards)
    return StoredPlan(seal(content, list(enumerate(blocks))), blocks)


def read_shard(content: ContentStore, block: str) -> tuple[tuple[Entry, ...], tuple[Entry, ...]]:
    """(entries of the shard, entries that go to every shard), from the shard's block."""
    node = dagjson.decode(content.get(block))
    if not isinstance(node, dict):
        raise ContentError(f"{block} is not a shard of a plan")
    link = node.get("shared")
    shared = read_block(dagjson.decode(content.get(str(link)))) if link is not None else ()
    return read_block(node), shared


def _store_shard(shard: PlannedShard, shared: str | None, content: ContentStore) -> str:
    node = plan_block(shard.entries)
    if shared is not None:
        node["shared"] = dagjson.Link(shared)
    return content.put(dagjson.encode(node), codec="dag-json")


def _list_all(inputs: Sequence[InputSource], sources: Sequence[Source]) -> list[Entry]:
    return [entry for index, source in enumerate(inputs) for entry in _list(source, index, sources)]


def _list(source: InputSource, index: int, sources: Sequence[Source]) -> list[Entry]:
    for candidate in sources:
        if candidate.claims(source.source):
            return candidate.list(source, index=index)
    raise SpecError(
        f"--input {source.source}: this version reads local folders and files, and CIDs that are in this node's store"
    )
