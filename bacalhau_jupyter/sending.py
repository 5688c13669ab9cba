"""From a request and a body to a submitted job: the bundle, the spec, and where it will run."""

from __future__ import annotations

import os
import platform
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from bacalhau_jupyter import cell as cells
from bacalhau_jupyter import options
from bacalhau_jupyter.record import Place
from bacalhau_node import requirements
from bacalhau_node.errors import SpecError
from bacalhau_node.masking import gathered
from bacalhau_node.spec import Command, PythonCell

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from bacalhau_node.client import Client, JobPlan, NodeView, Submission
    from bacalhau_node.ids import JobId
    from bacalhau_node.spec import JobSpec

ONLY_IN_CELLS = {
    "out": "submit() returns the job",
    "df": "job.result().df() has the frame",
    "reduce": "work on job.result().df()",
    "partial": "job.result(partial=True) does it",
    "background": "submit() returns at once",
    "on_interrupt": "submit() returns at once",
    "progress": "job.widget shows it",
    "logs": "job.logs() has the lines",
    "dry_run": "use %%bacalhau --dry-run",
    "help": "use %bacalhau --help",
}


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A job that could be sent; the bundle's `files` are not stored yet."""

    spec: JobSpec
    files: Mapping[str, bytes]
    notes: tuple[str, ...] = ()
    node: str | None = None
    """Where it goes; None: to the node that jobs go to now."""
    local: Path | None = None
    """The folder that its result is downloaded to (`--publish local:DIR`)."""
    secrets: Mapping[str, str] = field(default_factory=dict, repr=False)


def prepare(request: options.CellRequest, body: str, *, name: str, first: int, around: cells.Around) -> Prepared:
    """Check and bundle a cell. `name` is what tracebacks call it, `first` how many lines stand before its body."""
    secrets = gathered(request.secrets, os.environ, around.namespace)
    if request.raw:
        spec = options.to_spec(request, Command(shell=body))
        return Prepared(spec=spec, files={}, node=request.node, local=request.local, secrets=secrets)
    cell = cells.read(body, name=name, first=first)
    requires, doubts = _requires(request, cell)
    bundle = cells.bundle(cell, around, variables=request.vars, extra=request.modules, check=not request.no_check)
    task = PythonCell(
        bundle="",
        name=name,
        line_offset=first,
        imports=bundle.imports,
        python=f"{sys.version_info.major}.{sys.version_info.minor}",
        versions=requirements.beyond(bundle.versions, requires),
        requires=requires,
    )
    notes = (*bundle.notes, *doubts)
    spec = options.to_spec(request, task)
    return Prepared(spec=spec, files=bundle.files, notes=notes, node=request.node, local=request.local, secrets=secrets)


def _requires(request: options.CellRequest, cell: cells.Cell) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(packages, notes): what line and text of the cell ask for; its `requires-python` is checked on the way."""
    said = requirements.declared(cell.source, first=cell.first)
    requires = requirements.merged(request.requires, said.requires)
    if request.image is not None:
        return requires, (f"requires-python {said.python} is not compared with the image's",) if said.python else ()
    requirements.check_python(said.python, platform.python_version())
    return requires, ()


def from_python(source: str, words: Mapping[str, object], namespace: Mapping[str, Any]) -> Prepared:
    """What `submit(source, **words)` sends."""
    if not isinstance(source, str):
        raise SpecError(f"source: the text of a cell is needed, not a {type(source).__name__}")
    for name in words:
        if name in ONLY_IN_CELLS:
            raise SpecError(f"{name}={words[name]!r} is for %%bacalhau cells; {ONLY_IN_CELLS[name]}")
    request = options.from_words(words, options.notebook(namespace))
    around = cells.Around(namespace=namespace, history=namespace.get("In", []), folder=Path.cwd())
    return prepare(request, source, name="submitted source", first=0, around=around)


def notebook_namespace() -> Mapping[str, Any]:
    """The variables of the notebook, or of the program where there is none."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    namespace: Mapping[str, Any] = shell.user_ns if shell else vars(sys.modules["__main__"])
    return namespace


async def send(client: Client, prepared: Prepared, *, node: str, made: list[JobId]) -> tuple[Submission, Place]:
    """Store the bundle, submit the job, and say where it runs. `node`: the URL of the node asked, "" in this kernel.

    The job's id is added to `made` as soon as there is one: whoever stops waiting has to know.
    """
    spec = prepared.spec
    if isinstance(spec.task, PythonCell):
        task = msgspec.structs.replace(spec.task, bundle=await client.put_bundle(prepared.files))
        spec = msgspec.structs.replace(spec, task=task)
    submission = await client.submit(spec, secrets=prepared.secrets)
    made.append(submission.job)
    nodes = await client.nodes()
    return submission, place_of(submission, nodes, node=node)


async def call_off(client: Client, made: Sequence[JobId]) -> None:
    """A submission was interrupted, and nobody will watch its job: it must not run."""
    for job in made:
        await client.cancel(job)


def place_of(submission: Submission, nodes: Sequence[NodeView], *, node: str = "") -> Place:
    """Where the job runs, in words; `nodes` begins with the one that was asked, whose URL is `node`."""
    here = nodes[0]
    if submission.node != here.node:
        return Place(submission.node, submission.executor)
    return Place(node or "this machine", submission.executor, here.executor.slots if here.executor else None)


def described(prepared: Prepared, plan: JobPlan) -> str:
    """What `--dry-run` shows: plan, bundle and environment."""
    count = len(plan.shards)
    lines = [f"{count:,} shard{'s' * (count != 1)}:"]
    lines += [
        f"  {index:>5}  {shard.size:>13,} bytes  {_first(tuple(entry.path for entry in shard.entries))}"
        for index, shard in enumerate(plan.shards[:20])
    ]
    if count > 20:
        lines.append(f"  … {count - 20:,} more")
    if prepared.files:
        lines.append("sent with each:")
        lines += [f"  {len(data):>13,} bytes  {path}" for path, data in sorted(prepared.files.items())]
    task = prepared.spec.task
    if isinstance(task, PythonCell):
        packages = ", ".join(f"{name} {version}" for name, version in sorted(task.versions.items()))
        lines.append(f"needs: Python {task.python}{f', {packages}' if packages else ''}")
        lines += [f"to install: {', '.join(task.requires)}"] if task.requires else []
    return "\n".join([*lines, *prepared.notes, *plan.notes])


def _first(paths: tuple[str, ...]) -> str:
    shown = ", ".join(paths[:3]).encode("utf-8", "backslashreplace").decode()
    return f"{shown} and {len(paths) - 3:,} more" if len(paths) > 3 else shown
