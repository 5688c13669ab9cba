"""`--reuse`: which completed job is equal to a new one, so that its result can be taken.

Two jobs are equal when the same source would run in the same environment over the same inputs: their specs are
alike in everything that can change an answer, and their plans, which hold a stamp, a CID or a version for every entry,
are the same block. How long a shard may take, how many run at once, what a cell is called in tracebacks: none of that
changes an answer. Whoever asks for it says that the cell gives the same answer each time; what can't be known to be
the same (files at a URL that names no version, secrets) is never taken for equal.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from msgspec import structs

from bacalhau_node.plan import JobPlan
from bacalhau_node.protocol.events import JobRow
from bacalhau_node.sharding import UrlRef
from bacalhau_node.sources.listing import shown_url
from bacalhau_node.spec import JobSpec, PythonCell

_USUAL: Final[dict[str, object]] = {
    "timeout": None,
    "job_timeout": None,
    "parallel": None,
    "retries": 0,
    "pin": False,
    "constraint": "",
    "reuse": True,
}
"""What changes no answer, and what stands in its place when specs are compared."""


def obstacle(spec: JobSpec, plan: JobPlan) -> str:
    """Why no job can be known to be equal to this one, a sentence for its user; "" when there is no reason."""
    if spec.secrets:
        return "--reuse: not with --secret, whose values are kept nowhere: it runs"
    entries = (*plan.shared, *(entry for shard in plan.shards for entry in shard.entries))
    for entry in entries:
        reference = entry.reference
        if isinstance(reference, UrlRef) and not reference.pinned:
            url = shown_url(reference.url)
            return f"--reuse: {url} says nothing of its version, it may be another file now: it runs"
    return ""


def equal_job(rows: Iterable[JobRow], spec: JobSpec, plan: str) -> JobRow | None:
    """The newest completed job that is equal to the one with this spec and this plan (the CID of its root)."""
    wanted = _essence(spec)
    equal = [
        row
        for row in rows
        if row.state == "Completed"
        and row.plan == plan
        and (row.published or row.spec.publish == "store")
        and _essence(row.spec) == wanted
    ]
    return max(equal, key=lambda row: row.created, default=None)


def _essence(spec: JobSpec) -> JobSpec:
    task = spec.task
    if isinstance(task, PythonCell):
        task = structs.replace(task, name="", line_offset=0)
    return structs.replace(spec, task=task, **_USUAL)
