"""What works on this machine, found by trying it, and what to do about what doesn't."""

from __future__ import annotations

import asyncio
import importlib.metadata
import platform
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import msgspec

from bacalhau_node import __version__
from bacalhau_node.content.kubo import CONNECT, connected
from bacalhau_node.errors import BacalhauError, SpecError
from bacalhau_node.executors.gpus import NO_DRIVER, detect, listed
from bacalhau_node.folders import data_folder
from bacalhau_node.layers import installer
from bacalhau_node.node import open_node
from bacalhau_node.ports import Capabilities

LOW_DISK = 10 * 10**9
"""Less free space than the default disk of one shard deserves a warning."""


class Finding(msgspec.Struct, frozen=True):
    """One thing that was tried. `remedy` says what to do unless it is fine."""

    what: str
    state: Literal["ok", "warning", "problem"]
    detail: str
    remedy: str = ""


async def examine() -> list[Finding]:
    """Try everything a first job needs; never raises for what is merely missing."""
    findings = [_python(), _folder(), *map(_package, ("pandas", "pyarrow", "ipykernel", "ipywidgets", "anywidget"))]
    with tempfile.TemporaryDirectory(prefix="bacalhau-doctor-") as name:
        try:
            node = await open_node(Path(name))
        except BacalhauError as error:
            return [*findings, Finding("node", "problem", str(error), "see the text")]
        try:
            await node.facilities.try_all()
            findings += map(_executor, node.facilities.executors())
        finally:
            await node.close()
    findings += [_uv(), await asyncio.to_thread(_gpu), await _ipfs()]
    return findings


def healthy(findings: Sequence[Finding]) -> bool:
    """Whether a first job can run: nothing is a problem."""
    return all(finding.state != "problem" for finding in findings)


def _python() -> Finding:
    detail = f"bacalhau-jupyter {__version__}, Python {platform.python_version()}, {platform.platform(terse=True)}"
    if sys.platform != "linux":
        return Finding("platform", "warning", detail, "only Linux has been tried so far")
    return Finding("platform", "ok", detail)


def _folder() -> Finding:
    folder = data_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        return Finding("data folder", "problem", f"{folder}: {error.strerror}", "set BACALHAU_DIR to a folder of yours")
    free = shutil.disk_usage(folder).free
    detail = f"{folder}, {free / 1e9:.0f} GB free"
    if free < LOW_DISK:
        return Finding("data folder", "warning", detail, "free some space, or set BACALHAU_DIR to a larger disk")
    return Finding("data folder", "ok", detail)


def _package(name: str) -> Finding:
    try:
        return Finding(name, "ok", importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, "warning", "not installed", f"pip install {name}: without it frames or the live view fail")


def _uv() -> Finding:
    try:
        return Finding("uv", "ok", f"{installer.find()}: installs what --require asks for")
    except SpecError as error:
        return Finding("uv", "warning", str(error), "pip install uv, unless no cell uses --require")


def _executor(told: Capabilities) -> Finding:
    what = f"executor {told.executor}"
    if told.problem:
        return Finding(what, "warning", told.problem, "jobs run in the next executor of this list")
    limits = "" if told.limits_enforced else ", but memory and process limits are NOT enforced here"
    gigabytes = told.memory_per_slot / 1e9
    detail = f"isolation {told.isolation}, {told.slots} slots of {gigabytes:.1f} GB, Python {told.python}{limits}"
    return Finding(what, "ok" if told.limits_enforced else "warning", detail, "" if not limits else "use cgroup v2")


def _gpu() -> Finding:
    cards, problem = detect()
    if cards:
        return Finding("GPU", "ok", listed(cards))
    if problem == NO_DRIVER:
        return Finding("GPU", "ok", f"none ({NO_DRIVER}): jobs with --gpu are refused")
    return Finding("GPU", "warning", problem, "jobs with --gpu are refused until it is")


async def _ipfs() -> Finding:
    try:
        daemon = connected()
    except BacalhauError as error:
        return Finding("IPFS daemon", "warning", str(error), "see the text")
    if daemon is None:
        return Finding("IPFS daemon", "ok", f"none named by {CONNECT}: --publish ipfs is refused")
    try:
        return Finding("IPFS daemon", "ok", f"{daemon.name}, version {await daemon.version()}")
    except BacalhauError as error:
        return Finding("IPFS daemon", "warning", f"{daemon.name}: {error}", f"start it, or correct {CONNECT}")
