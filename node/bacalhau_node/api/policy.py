"""What a spec that comes from outside may hold: bounds for everybody, and limits for others than the owner.

The magic and the command line check what people type; here nothing was checked by anybody. Local paths
name files of the client's machine, never of the node's: clients upload what they name. A job of somebody
else is isolated at least by a sandbox, has no network, and ends after an hour a shard, unless the owner's
rules (`selection`) say otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from bacalhau_node.api.auth import Caller
from bacalhau_node.api.shapes import MAX_BUNDLE
from bacalhau_node.bounds import check_bounds
from bacalhau_node.cid import Cid
from bacalhau_node.errors import ContentError, NoCapacity, SpecError
from bacalhau_node.literals import BUCKETS
from bacalhau_node.ports import ContentStore
from bacalhau_node.selection import Selection
from bacalhau_node.spec import OWNER_LABEL, InputSource, JobSpec, PythonCell

BUNDLE_FILES = 10_000


def owner(spec: JobSpec) -> str:
    """Whose job this is; "" for the node's owner."""
    return spec.labels.get(OWNER_LABEL, "")


def admitted(spec: JobSpec, caller: Caller, rules: Selection, *, usual_memory: int) -> JobSpec:
    """The spec as it will run; raises `SpecError` for what no spec may say.

    `usual_memory`: what a shard gets on this node that doesn't say.
    """
    check_bounds(spec)
    if OWNER_LABEL in spec.labels:
        raise SpecError(f"the label {OWNER_LABEL} is set by the node: leave it out")
    for source in (*spec.inputs, *spec.shared):
        _check_source(source, own=caller.role == "admin")
    return spec if caller.role == "admin" else rules.limited(spec, caller.name, usual_memory=usual_memory)


def check_bundle(spec: JobSpec, content: ContentStore) -> None:
    """Raise `ContentError` for a cell whose folder was not sent."""
    if isinstance(spec.task, PythonCell) and not content.has(spec.task.bundle):
        raise ContentError(f"the cell's folder {spec.task.bundle} is not on this node: send it first")


def check_files(files: Mapping[str, bytes]) -> None:
    """Raise `SpecError` for a cell's folder that is too large, or has a path that leads out of it."""
    if len(files) > BUNDLE_FILES or sum(map(len, files.values())) > MAX_BUNDLE:
        raise SpecError(f"a bundle of over {MAX_BUNDLE} bytes: send it as an archive to /v0/car")
    for path in files:
        steps = path.split("/")
        if not all(steps) or {".", ".."} & set(steps) or "\0" in path or len(path) > 4096:
            raise SpecError(f"{path[:200]!r} is not a path below the bundle's folder")


def known_fields(given: object, read: object, where: str = "spec") -> None:
    """Raise `SpecError` for a field of `given` that nobody read: what it asks for would silently not be done."""
    if isinstance(given, Mapping) and isinstance(read, Mapping):
        for name, value in given.items():
            if name not in read:
                raise SpecError(f"{where}.{name} is not known to this node: a newer version may know it")
            known_fields(value, read[name], f"{where}.{name}")
    elif isinstance(given, list) and isinstance(read, list | tuple):
        for index, value in enumerate(given):
            known_fields(value, read[index], f"{where}[{index}]")


def plain(spec: JobSpec) -> Any:
    """The spec as maps and lists."""
    return msgspec.to_builtins(spec)


def check_selected(spec: JobSpec, caller: Caller, rules: Selection, content: ContentStore) -> None:
    """Raise `NoCapacity` for a job of somebody else that the owner's rules refuse."""
    if caller.role != "admin" and (why := rules.refusal(spec, caller.name, content)) is not None:
        raise NoCapacity(f"this node {why}")


def _check_source(source: InputSource, *, own: bool) -> None:
    text = source.source
    if "\0" in text:
        raise SpecError("an input holds a null character")
    if text.startswith(("http://", "https://")):
        return  # whom it may ask is decided when it is asked
    if own and text.startswith(tuple(f"{each}://" for each in BUCKETS)):
        return  # what the node's own credentials open is for its owner
    if not text.startswith("ipfs://"):
        raise SpecError(
            f"--input {text[:200]}: a node takes ipfs://CID, URLs (http, https) and, of its owner, buckets; its client"
            " uploads local files"
        )
    Cid.parse(text.removeprefix("ipfs://").partition("/")[0])
