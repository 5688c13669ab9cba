"""Identifiers: strings with one shape each, checked where they are made or decoded.

`JobId` and `NodeId` are annotated strings, so msgspec checks the pattern in every message it
decodes and nobody downstream checks again.
"""

from __future__ import annotations

import re
from typing import Annotated

import msgspec

from bacalhau_node.errors import SpecError

JOB_PATTERN = r"^j-[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\Z"  # `$` would let a line break pass
NODE_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_-]{2,127}\Z"

JobId = Annotated[str, msgspec.Meta(pattern=JOB_PATTERN)]
"""`j-` and a UUID, the shape of today's Bacalhau job ids. Ten characters are enough to type."""

NodeId = Annotated[str, msgspec.Meta(pattern=NODE_PATTERN)]
"""A node's name on the network: later its libp2p peer id, which has the same alphabet."""

_JOB = re.compile(JOB_PATTERN)
_NODE = re.compile(NODE_PATTERN)


class Execution(msgspec.Struct, frozen=True, order=True, gc=False):
    """One shard of one job on one node: `attempt` counts the offers of that shard, from 1."""

    job: JobId
    shard: Annotated[int, msgspec.Meta(ge=0, lt=2**31)]
    attempt: Annotated[int, msgspec.Meta(ge=0, lt=2**31)]

    def __str__(self) -> str:
        return f"{short(self.job)}/{self.shard}#{self.attempt}"


def job_id(text: str) -> JobId:
    """`text` as a `JobId`; raises `SpecError` when it has another shape."""
    if not _JOB.match(text):
        raise SpecError(f"{text!r} is not a job id (j-xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx)")
    return text


def node_id(text: str) -> NodeId:
    """`text` as a `NodeId`; raises `SpecError` when it has another shape."""
    if not _NODE.match(text):
        raise SpecError(f"{text!r} is not a node id (3 to 128 letters, digits, '-' and '_')")
    return text


def short(job: JobId) -> str:
    """The first ten characters, enough to recognise a job in a line of output."""
    return job[:10]
