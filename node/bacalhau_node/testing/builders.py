"""Builders for tests: each makes one valid thing, and says only what the test is about.

`matching` compares effects partially: it finds those of a type whose named fields are equal.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

from bacalhau_node.ids import Execution, JobId
from bacalhau_node.messages import ErrorKind, Message, Outcome, ShardError
from bacalhau_node.protocol.events import Effect, Send, Submitted
from bacalhau_node.spec import Command, JobSpec

T = TypeVar("T")


def a_job_id(n: int = 0) -> JobId:
    """The job id number `n`."""
    return f"j-00000000-0000-0000-0000-{n:012x}"


def a_spec(**fields: Any) -> JobSpec:
    """A job of a harmless command; `fields` are those of `JobSpec`."""
    return JobSpec(**{"task": Command(argv=("true",)), **fields})


def a_job(n: int = 0, *, shards: int = 1, **fields: Any) -> Submitted:
    """Job number `n` with so many shards, as it is submitted."""
    blocks = tuple(f"block-{index}" for index in range(shards))
    return Submitted(a_job_id(n), a_spec(**fields), "plan", blocks, 0.0)


def an_execution(shard: int = 0, attempt: int = 1, *, job: int = 0) -> Execution:
    """An execution of job number `job`."""
    return Execution(a_job_id(job), shard, attempt)


def a_result(record: str = "record", *, answer: str = "answer", seconds: float = 0.05) -> Outcome:
    """A good outcome."""
    return Outcome(ok=True, record=record, answer=answer, seconds=seconds)


def a_failure(kind: ErrorKind = "exception", *, seconds: float = 0.05) -> Outcome:
    """A bad outcome."""
    return Outcome(ok=False, exit_code=1, error=ShardError(kind, message="as asked"), record="record", seconds=seconds)


def matching(effects: Iterable[Effect], kind: type[T], **fields: object) -> list[T]:
    """The effects of this type whose named fields have these values."""
    found = [effect for effect in effects if isinstance(effect, kind)]
    return [one for one in found if all(getattr(one, name) == value for name, value in fields.items())]


def sent(effects: Iterable[Effect], kind: type[T], *, to: str | None = None) -> list[T]:
    """The messages of this type that the effects send (to one node)."""
    messages: list[tuple[str, Message]] = [(one.to, one.message) for one in matching(effects, Send)]
    return [message for node, message in messages if isinstance(message, kind) and to in (None, node)]
