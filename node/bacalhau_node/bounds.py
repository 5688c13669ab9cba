"""Bounds on a spec that comes from outside, over the API or from another node: nobody has checked it before."""

from __future__ import annotations

import math
import re

from bacalhau_node import requirements
from bacalhau_node.errors import SpecError
from bacalhau_node.sharding import mounts
from bacalhau_node.spec import MAX_GPU_SHARE, JobSpec, PythonCell

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")
_LONGEST = 366 * 86_400.0
_LONGEST_PACKAGE = 1_000


def check_bounds(spec: JobSpec) -> None:
    """Raise `SpecError` for numbers, names and mounts that no spec may have."""
    _check_numbers(spec)
    _check_names(spec)
    _check_packages(spec)
    mounts(spec)


def _check_numbers(spec: JobSpec) -> None:
    take = spec.resources
    bounds: tuple[tuple[str, float | None, float, float], ...] = (
        ("parallel", spec.parallel, 1, 1_000_000),
        ("retries", spec.retries, 0, 100),
        ("timeout", spec.timeout, 0.001, _LONGEST),
        ("job_timeout", spec.job_timeout, 0.001, _LONGEST),
        ("resources.cpu", take.cpu, 0.01, 4096),
        ("resources.memory", take.memory, 1, 10**18),
        ("resources.disk", take.disk, 1, 10**18),
        ("resources.gpus", take.gpus, 0, 1024),
        ("resources.gpu_share", take.gpu_share, 1, MAX_GPU_SHARE),
    )
    for name, value, low, high in bounds:
        if value is not None and not (math.isfinite(value) and low <= value <= high):
            raise SpecError(f"{name} is {value}: from {low:g} to {high:g} is possible")


def _check_names(spec: JobSpec) -> None:
    for what, pairs in (("env", spec.env), ("labels", spec.labels)):
        for name, value in pairs.items():
            if not _NAME.fullmatch(name) or "\0" in value:
                raise SpecError(f"{what} {name!r}: names are of letters, digits and '_', and no value holds a null")
    for name in spec.secrets:
        if not _NAME.fullmatch(name):
            raise SpecError(f"secret {name!r}: names are of letters, digits and '_'")


def _check_packages(spec: JobSpec) -> None:
    """Each is a line of what an installer reads, so it has to be one: a name with versions, and no address."""
    wanted = spec.task.requires if isinstance(spec.task, PythonCell) else ()
    if len(wanted) > requirements.MOST:
        raise SpecError(f"{len(wanted)} packages are required: at most {requirements.MOST} are possible")
    for text in wanted:
        if not text.isprintable() or len(text) > _LONGEST_PACKAGE:
            raise SpecError(f"the required package {text[:100]!r} is no line of at most {_LONGEST_PACKAGE} characters")
        requirements.parse(text)
