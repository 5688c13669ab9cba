"""What a node tells its clients of jobs, shards, content and nodes."""

from __future__ import annotations

from collections import Counter

import msgspec

from bacalhau_node.ids import JobId, NodeId
from bacalhau_node.messages import Outcome
from bacalhau_node.ports import Capabilities
from bacalhau_node.protocol.events import JobState, ShardState
from bacalhau_node.spec import JobSpec


class Submission(msgspec.Struct, frozen=True):
    """The answer to a submission: the job's id, how many shards it has, where it runs.

    `reused`: the job is an equal one that has completed before.
    """

    job: JobId
    count: int
    node: NodeId
    executor: str
    notes: tuple[str, ...] = ()
    reused: bool = False


class ShardView(msgspec.Struct, frozen=True):
    """One shard as it stands. `inputs`: logical paths. `outcome`: once it has ended.

    `disagreed`: nodes that gave another answer than the one that counts (`--agree`).
    """

    index: int
    state: ShardState
    attempts: int
    node: NodeId | None
    inputs: tuple[str, ...]
    outcome: Outcome | None
    disagreed: tuple[NodeId, ...] = ()


class JobView(msgspec.Struct, frozen=True):
    """One job as it stands, all shards included. `published`: where its result lies besides its node's store."""

    job: JobId
    state: JobState
    reason: str
    cid: str
    created: float
    spec: JobSpec
    published: tuple[str, ...]
    shards: tuple[ShardView, ...]

    def disagreements(self) -> list[str]:
        """A sentence about each node that was outvoted (`--agree`)."""
        counts = Counter(node for shard in self.shards for node in shard.disagreed)
        return [
            f"node {node} gave another answer in {count:,} of {len(self.shards):,} shards and is avoided"
            for node, count in counts.items()
        ]


class JobLine(msgspec.Struct, frozen=True):
    """One job in a list."""

    job: JobId
    state: JobState
    created: float
    count: int
    reason: str
    cid: str = ""


class Stored(msgspec.Struct, frozen=True):
    """What was put into a node's store: its CID under a UnixFS profile, and what it was made from."""

    cid: str
    bytes: int
    files: int
    profile: str


class NodeView(msgspec.Struct, frozen=True):
    """A node that this one knows. `executor`: only of this one."""

    node: NodeId
    room: int
    executor: Capabilities | None
