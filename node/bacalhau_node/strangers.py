"""What a job of another node may bring here before its first line runs: nobody has looked at any of it before.

Its spec is admitted by `selection`, its blocks are checked by those who read them. Here are the bounds on the rest: how
much comes for a shard, and which secrets come with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from bacalhau_node.errors import ContentError, SpecError
from bacalhau_node.executors.limits import DEFAULT_DISK
from bacalhau_node.literals import size_text
from bacalhau_node.masking import Secrets
from bacalhau_node.protocol.events import Run
from bacalhau_node.sharding import Entry, LocalStamp
from bacalhau_node.spec import JobSpec

MAX_PLAN: Final = 1024**3
"""Bytes of the blocks of one shard's plan: some millions of files."""


def disk(spec: JobSpec) -> int:
    """Bytes that a shard may write, and that its cell's folder and its inputs may have."""
    return spec.resources.disk or DEFAULT_DISK


def secrets_of(run: Run) -> Secrets:
    """What came with the offer; raises `SpecError` for what the spec does not name, or can't be a secret."""
    if set(run.secrets) != set(run.spec.secrets):
        raise SpecError(f"the job names the secrets {sorted(run.spec.secrets)}, and came with {sorted(run.secrets)}")
    return Secrets(run.secrets)


def check_entries(spec: JobSpec, entries: Sequence[Entry], shared: Sequence[Entry]) -> None:
    """Raise `ContentError` for files that can't be meant, and for more than there is disk for."""
    for side, sources in ((entries, spec.inputs), (shared, spec.shared)):
        if any(entry.source >= len(sources) for entry in side):
            raise ContentError(f"a file of the shard is of an input that the job does not have (it has {len(sources)})")
    if any(isinstance(entry.reference, LocalStamp) for entry in (*entries, *shared)):
        raise ContentError("the plan of the shard names a file of its own machine, which no other node reads")
    size, most = sum(entry.size for entry in (*entries, *shared)), disk(spec)
    if size > most:
        raise ContentError(
            f"the files of the shard have {size_text(size)}, and on another node it has a disk of {size_text(most)}:"
            " raise --disk, or make more shards"
        )
