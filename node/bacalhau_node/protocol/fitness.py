"""Whether a node can run a job, by what the node says about itself: so it is not asked for nothing.

Only what is certain excludes a node here; everything else the node decides itself when it is asked. A
constraint is an expression over the node's labels, in the words of Kubernetes' selectors:

    zone=eu, disk!=hdd, gpu in (a100, h100), tier notin (spot), fast, !shared

All parts must hold. `!=` and `notin` hold for a node without the label, too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Final

import msgspec

from bacalhau_node.errors import SpecError
from bacalhau_node.messages import Engine, NodeRecord
from bacalhau_node.spec import ISOLATION_RANK, InputSource, JobSpec, PythonCell

UNNAMED: Final = "ipfs://"
"""The source of an announced input: that there is one, and no word of which."""

_KEY: Final = r"[A-Za-z0-9](?:[A-Za-z0-9._/-]*[A-Za-z0-9])?"
_VALUE: Final = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?"
_TERM: Final = re.compile(
    rf"\s*(?:(?P<absent>!)\s*(?P<missing>{_KEY})"
    rf"|(?P<key>{_KEY})\s*(?:(?P<sign>==|=|!=)\s*(?P<value>{_VALUE})?|\s(?P<set>in|notin)\s*\((?P<values>[^()]*)\))?)"
    r"\s*(?:,|$)"
)


class Requirement(msgspec.Struct, frozen=True):
    """One part of a constraint. `values` None: only whether the label is there counts."""

    key: str
    wanted: bool
    values: tuple[str, ...] | None = None

    def holds(self, labels: Mapping[str, str]) -> bool:
        """Whether a node with these labels fits."""
        if self.values is None:
            return (self.key in labels) == self.wanted
        return (labels.get(self.key) in self.values) == self.wanted


@lru_cache(maxsize=64)
def parse_constraint(text: str) -> tuple[Requirement, ...]:
    """The parts of a constraint; raises `SpecError` that shows where it can't be read."""
    found, at = [], 0
    while text[at:].strip():
        match = _TERM.match(text, at)
        if match is None:
            raise SpecError(
                f"--constraint: can't read {text[at:].strip()!r}; "
                "write key=value, key!=value, key in (a, b), key notin (a, b), key or !key, with commas between"
            )
        found.append(_requirement(match))
        at = match.end()
    return tuple(found)


def _requirement(match: re.Match[str]) -> Requirement:
    if match["absent"]:
        return Requirement(match["missing"], wanted=False)
    if match["set"]:
        values = tuple(value.strip() for value in match["values"].split(","))
        return Requirement(match["key"], wanted=match["set"] == "in", values=values)
    if match["sign"]:
        return Requirement(match["key"], wanted=match["sign"] != "!=", values=(match["value"] or "",))
    return Requirement(match["key"], wanted=True)


def unfit(spec: JobSpec, record: NodeRecord) -> str:
    """Why this node can't run the job, as what follows its name; "" if nothing says so."""
    if record.leaving:
        return "is leaving"
    if not all(requirement.holds(record.labels) for requirement in parse_constraint(spec.constraint)):
        labels = ", ".join(f"{key}={value}" for key, value in sorted(record.labels.items())) or "none"
        return f"does not fit --constraint {spec.constraint}; its labels: {labels}"
    if not record.engines:
        return "runs no jobs of others"
    problems = [next(_lacks(spec, engine), "") for engine in record.engines]
    return "" if "" in problems else problems[0]


def _lacks(spec: JobSpec, engine: Engine) -> Iterator[str]:
    """What the engine lacks for the job, the first thing first."""
    need = "container" if spec.image is not None or spec.container_per == "shard" else spec.isolation or "none"
    if ISOLATION_RANK[engine.isolation] < ISOLATION_RANK[need]:
        yield f"isolates by {engine.isolation}, and {need} is needed"
    task, asked = spec.task, spec.resources
    if isinstance(task, PythonCell) and spec.image is None and not _same_minor(task.python, engine.python):
        yield f"has Python {engine.python}, and the cell needs {task.python}"
    if asked.memory is not None and engine.memory and asked.memory > engine.memory:
        yield f"gives a shard {engine.memory:,} bytes of memory, and {asked.memory:,} are asked for"
    if asked.gpus > len(engine.gpus):
        yield f"has {len(engine.gpus)} GPUs, and --gpu asks for {asked.gpus}"


def _same_minor(wanted: str, has: str) -> bool:
    """Whether two versions of Python agree as far as both are known."""
    return not wanted or not has or wanted.split(".")[:2] == has.split(".")[:2]


def requirements_only(spec: JobSpec) -> JobSpec:
    """What decides whether a node can run the job, without what names its data, its code or its author.

    A job with inputs has one here, `UNNAMED`: some nodes take no jobs without any.
    """
    task = spec.task
    if isinstance(task, PythonCell):
        task = PythonCell(bundle="", python=task.python, versions=task.versions, requires=task.requires)
    else:
        task = type(task)()
    return JobSpec(
        task=task,
        inputs=(InputSource(source=UNNAMED),) if spec.inputs or spec.shared else (),
        resources=spec.resources,
        timeout=spec.timeout,
        image=spec.image,
        isolation=spec.isolation,
        container_per=spec.container_per,
        network=spec.network,
        constraint=spec.constraint,
    )
