"""Outcomes as blocks: the answer and the record of an execution, and the root of a whole job.

An **answer** holds only what the cell computed, value and outputs: no attempt, time or node, so
equal runs have equal answers. A **record** links to its answer and holds the rest. A job's root lists
(shard, record). All are canonical DAG-JSON. Bytes up to `INLINE_LIMIT` stand in the block, larger ones
are files that it links to; which of the two is decided here by size alone, or equal values could differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, TypeVar

import msgspec

from bacalhau_node import dagjson
from bacalhau_node.dagjson import Link
from bacalhau_node.errors import ContentError
from bacalhau_node.messages import INLINE_LIMIT, Blob, Outcome, ShardError, Value, ValueKind
from bacalhau_node.ports import ContentStore

_T = TypeVar("_T")

ROOT_LIMIT = 5_000
"""Entries of one block of a root: about 90 bytes each, so half of the largest block."""


def encode_outcome(store: ContentStore, outcome: Outcome) -> Outcome:
    """Store the answer and the record of `outcome`; return it with both CIDs and each blob in its proper form."""
    value = msgspec.structs.replace(outcome.value, blob=_settled(store, outcome.value.blob))
    stdout, stderr = _settled(store, outcome.stdout), _settled(store, outcome.stderr)
    answer = store.put(
        dagjson.encode(
            {
                "value": {"kind": value.kind, "type": value.type, **_blob_fields(value.blob)},
                "outputs": None if outcome.outputs is None else Link(outcome.outputs),
            },
        ),
        codec="dag-json",
    )
    record = store.put(
        dagjson.encode(
            {
                "answer": Link(answer),
                "ok": outcome.ok,
                "exit_code": outcome.exit_code,
                "stdout": _blob_fields(stdout),
                "stderr": _blob_fields(stderr),
                "cut": outcome.cut,
                "error": None if outcome.error is None else msgspec.to_builtins(outcome.error),
                "seconds": float(outcome.seconds),
                "max_rss": outcome.max_rss,
                "executor": outcome.executor,
            },
        ),
        codec="dag-json",
    )
    return msgspec.structs.replace(outcome, value=value, stdout=stdout, stderr=stderr, answer=answer, record=record)


def read_record(store: ContentStore, cid: str) -> Outcome:
    """The outcome that `encode_outcome` stored under this record CID; raises `ContentError`."""
    record = _convert(store, cid, _Record)
    answer = _convert(store, record.answer.cid, _Answer)
    return Outcome(
        ok=record.ok,
        exit_code=record.exit_code,
        value=Value(answer.value.kind, answer.value.type, answer.value.blob()),
        outputs=None if answer.outputs is None else answer.outputs.cid,
        stdout=record.stdout.blob(),
        stderr=record.stderr.blob(),
        cut=record.cut,
        error=record.error,
        seconds=record.seconds,
        max_rss=record.max_rss,
        executor=record.executor,
        answer=record.answer.cid,
        record=cid,
    )


def seal(store: ContentStore, records: Sequence[tuple[int, str]]) -> str:
    """Store the root over the (shard, record CID) pairs of a job and return its CID."""
    chunks = [records[at : at + ROOT_LIMIT] for at in range(0, len(records), ROOT_LIMIT)]
    parts = [dagjson.encode({"shards": [(shard, Link(cid)) for shard, cid in chunk]}) for chunk in chunks or [()]]
    cids = [store.put(part, codec="dag-json") for part in parts]
    if len(cids) == 1:
        return cids[0]
    return store.put(dagjson.encode({"parts": [Link(cid) for cid in cids]}), codec="dag-json")


def read_root(store: ContentStore, cid: str) -> list[tuple[int, str]]:
    """The (shard, record CID) pairs of a job's root; raises `ContentError`."""
    root = _convert(store, cid, _Root)
    parts = [root, *(_convert(store, link.cid, _Root) for link in root.parts)]
    return [(shard, link.cid) for part in parts for shard, link in part.shards]


class _Bytes(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    data: bytes | None = msgspec.field(default=None, name="bytes")
    link: Link | None = None
    size: int = 0

    def blob(self) -> Blob:
        if self.link is not None:
            return Blob(self.size, None, self.link.cid)
        data = self.data or b""
        return Blob(len(data), data)


class _Value(_Bytes, kw_only=True):
    kind: ValueKind
    type: str


class _Answer(msgspec.Struct):
    value: _Value
    outputs: Link | None


class _Record(msgspec.Struct):
    answer: Link
    ok: bool
    exit_code: int
    stdout: _Bytes
    stderr: _Bytes
    cut: int
    error: ShardError | None
    seconds: float
    max_rss: int
    executor: str


class _Root(msgspec.Struct, forbid_unknown_fields=True):
    shards: list[tuple[Annotated[int, msgspec.Meta(ge=0)], Link]] = []
    parts: list[Link] = []


def _settled(store: ContentStore, blob: Blob) -> Blob:
    if blob.inline is None:
        if blob.size > INLINE_LIMIT or blob.cid is None:
            return blob
        return Blob(blob.size, store.read(blob.cid))
    if len(blob.inline) > INLINE_LIMIT:
        return Blob(len(blob.inline), None, store.add_bytes(blob.inline))
    return blob


def _blob_fields(blob: Blob) -> dict[str, Any]:
    if blob.cid is not None:
        return {"link": Link(blob.cid), "size": blob.size}
    return {"bytes": blob.inline}


def _convert(store: ContentStore, cid: str, shape: type[_T]) -> _T:
    try:
        return msgspec.convert(dagjson.decode(store.get(cid)), shape)
    except msgspec.ValidationError as error:
        raise ContentError(f"the block {cid} is not a {shape.__name__.strip('_').lower()}: {error}") from error
