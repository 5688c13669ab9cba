"""Whether this machine can run a job at all without an image, and why not."""

from __future__ import annotations

import os
import platform
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

from bacalhau_node import requirements
from bacalhau_node.errors import SpecError
from bacalhau_node.executors.limits import usable_cores, usable_memory
from bacalhau_node.literals import size_text
from bacalhau_node.ports import Target
from bacalhau_node.spec import ISOLATION_RANK, JobSpec, PythonCell, Resources

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

_DISTRIBUTION: Final = re.compile(r"([^-]+)-([^-]+)(?:-py[0-9.]+)?\.(?:dist|egg)-info")
"""How installers name the folder that describes a distribution: name, version, sometimes the Python."""


def misfit(spec: JobSpec, versions: Mapping[str, str]) -> str | None:
    """Why plain processes of this interpreter, with these distributions (none: unknown), can't run `spec`; or None."""
    problem = _refused(spec) or _too_large(spec.resources)
    if problem is None and isinstance(spec.task, PythonCell):
        return mismatch(spec.task, versions)
    return problem


def _refused(spec: JobSpec) -> str | None:
    """What only containers can do."""
    here = "this node runs shards as plain processes"
    if spec.image is not None:
        return f"--image {spec.image}: {here}"
    if spec.isolation is not None and ISOLATION_RANK[spec.isolation] > ISOLATION_RANK["none"]:
        return f"--isolation {spec.isolation}: {here}"
    if spec.container_per == "shard":
        return f"--container-per shard: {here}"
    return None


def _too_large(resources: Resources) -> str | None:
    """What this machine has not."""
    if resources.memory is not None and resources.memory > usable_memory():
        return (
            f"--memory {size_text(resources.memory)}: this node can give a shard at most {size_text(usable_memory())}"
        )
    if resources.cpu > usable_cores():
        return f"--cpu {resources.cpu:g}: this node can give a shard at most {usable_cores()} cores"
    return None


def mismatch(
    cell: PythonCell, versions: Mapping[str, str], *, python: str = "", where: str = "this node"
) -> str | None:
    """What the cell needs that an environment has not, in one sentence; or None.

    `versions`: its distributions (none: unknown). `python`: its full version, this interpreter's by default.
    """
    python = python or platform.python_version()
    differ = dict(_differences(cell, versions, python))
    if differ:
        return f"needs {_listed(differ.keys())}; {where} has {_listed(differ.values())}"
    try:
        requirements.unmet(cell.requires if versions else (), python=python, versions=versions)
    except SpecError as error:
        return str(error)
    return None


def _differences(cell: PythonCell, versions: Mapping[str, str], python: str) -> Iterator[tuple[str, str]]:
    """(what is needed, what is there in its place), each."""
    if cell.python and _minor(cell.python) != _minor(python):
        yield f"Python {cell.python}", f"Python {'.'.join(_minor(python))}"
    for name, version in cell.versions.items() if versions else ():
        have = versions.get(_normal(name))
        if have is None:
            yield f"{name} {version}", f"no {name}"
        elif _minor(have) != _minor(version):
            yield f"{name} {version}", f"{name} {have}"


def _listed(words: Iterable[str]) -> str:
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last


def installed() -> dict[str, str]:
    """The distributions of this interpreter: normal name -> version.

    Read from the names of their folders: far faster (25 times, seen) than from the files in them.
    """
    found: dict[str, str] = {}
    for folder in map(Path, reversed(sys.path)):  # what comes first is what is imported
        if folder.is_dir():
            matches = (_DISTRIBUTION.fullmatch(path.name) for path in folder.iterdir())
            found |= {_normal(match[1]): match[2] for match in matches if match}
    return found


def own_target(versions: Mapping[str, str]) -> Target:
    """This interpreter, with these distributions, as something that packages are installed for."""
    return Target(
        python=platform.python_version(),
        system=sys.platform,
        machine=os.uname().machine,
        libc=" ".join(platform.libc_ver()).strip(),
        versions=versions,
        executable=Path(sys.executable),
    )


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _minor(version: str) -> list[str]:
    return version.split(".")[:2]


def python_version() -> str:
    """This interpreter, as a `PythonCell` names one: "3.11"."""
    return f"{sys.version_info.major}.{sys.version_info.minor}"
