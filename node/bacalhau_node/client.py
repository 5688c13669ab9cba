"""Who submits jobs and reads results: one Protocol, over a node in this process or a remote one."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import msgspec

from bacalhau_node.feed import ShardText as ShardText
from bacalhau_node.feed import Update as Update
from bacalhau_node.ids import JobId, NodeId
from bacalhau_node.messages import Outcome
from bacalhau_node.plan import JobPlan as JobPlan
from bacalhau_node.plan import PlannedShard as PlannedShard
from bacalhau_node.ports import Capabilities
from bacalhau_node.protocol.events import JobChanged as JobChanged
from bacalhau_node.protocol.events import JobState, ShardState
from bacalhau_node.protocol.events import ShardChanged as ShardChanged
from bacalhau_node.spec import JobSpec


class Submission(msgspec.Struct, frozen=True):
    """The answer to a submission: the job's id, how many shards it has, where it runs."""

    job: JobId
    count: int
    node: NodeId
    executor: str
    notes: tuple[str, ...] = ()


class ShardView(msgspec.Struct, frozen=True):
    """One shard as it stands. `inputs`: logical paths. `outcome`: once it has ended."""

    index: int
    state: ShardState
    attempts: int
    node: NodeId | None
    inputs: tuple[str, ...]
    outcome: Outcome | None


class JobView(msgspec.Struct, frozen=True):
    """One job as it stands, all shards included."""

    job: JobId
    state: JobState
    reason: str
    cid: str
    created: float
    spec: JobSpec
    shards: tuple[ShardView, ...]


class JobLine(msgspec.Struct, frozen=True):
    """One job in a list."""

    job: JobId
    state: JobState
    created: float
    count: int
    reason: str


class NodeView(msgspec.Struct, frozen=True):
    """A node that this one knows."""

    node: NodeId
    room: int
    executor: Capabilities | None


class Client(Protocol):
    """All calls on one asyncio loop. An unknown job raises `SpecError`, a node that is gone `NodeUnreachable`."""

    async def put_bundle(self, files: Mapping[str, bytes]) -> str:
        """Store a cell's folder (relative path -> bytes) and return its CID, for `PythonCell.bundle`."""
        ...

    async def plan(self, spec: JobSpec) -> JobPlan:
        """List the inputs and split them, without a job; raises `SpecError` or `ContentError`."""
        ...

    async def submit(self, spec: JobSpec) -> Submission:
        """List, plan, journal, start; the job exists when this returns."""
        ...

    def updates(self, job: JobId) -> AsyncIterator[Update]:
        """First the present state (one `JobChanged`, a `ShardChanged` for each shard that is not waiting, the text so
        far), then every change; ends after a `JobChanged` to a final state."""
        ...

    async def cancel(self, job: JobId) -> None:
        """Ask for the end; returns at once. What is finished is kept."""
        ...

    async def job(self, job: JobId) -> JobView:
        """The job with all its shards."""
        ...

    async def jobs(self) -> Sequence[JobLine]:
        """All jobs that the node knows, newest first."""
        ...

    async def find(self, prefix: str) -> JobId:
        """The one job whose id starts with `prefix`; raises `SpecError` for none or several."""
        ...

    async def read(self, cid: str) -> bytes:
        """A whole file of the content store, verified."""
        ...

    async def file(self, cid: str) -> Path | None:
        """A local file with exactly these bytes, to be mapped in place of reading; None when there is none."""
        ...

    async def download(self, cid: str, target: Path) -> None:
        """Write a file or folder of the content store to `target`, which must not exist."""
        ...

    async def nodes(self) -> Sequence[NodeView]:
        """The nodes known, this one first."""
        ...

    async def close(self) -> None:
        """Let go of the node; one in this process is closed with it."""
        ...
