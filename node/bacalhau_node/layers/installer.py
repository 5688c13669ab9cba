"""uv as this node uses it: what a list of requirements comes to, and the wheels of that, in a folder.

Only wheels are installed, so that no code of a package runs on the node; and only what the
environment lacks: its own packages stay what they are, as constraints, and are not installed again.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

from bacalhau_node.errors import SpecError
from bacalhau_node.layers.indexes import pip_files, settings

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from bacalhau_node.ports import Target

LONGEST: Final = 290.0
"""Seconds for one call: two of them end before a requester takes the work for lost (`protocol/watch.py`)."""
_GLIBC: Final = (40, 39, 38, 37, 36, 35, 34, 33, 32, 31, 28, 17)
"""The minor versions of glibc 2 that uv can be told about."""
_SHOWN: Final = 12
_LINK_PASSWORD: Final = re.compile(r"://[^/@\s]+@")


def find() -> str:
    """The path of uv: the package's, else the machine's. Raises `SpecError`."""
    try:
        import uv  # noqa: PLC0415 - an optional extra

        return str(uv.find_uv_bin())
    except (ImportError, FileNotFoundError):
        pass
    found = shutil.which("uv")
    if found is None:
        raise SpecError(
            "packages can't be installed on this node, because uv is not there: pip install 'bacalhau-jupyter[require]'"
        )
    return found


async def resolve(requires: Sequence[str], target: Target, constraints: Sequence[str], folder: Path) -> list[str]:
    """Every distribution, as NAME==VERSION, that `requires` comes to for `target`. Raises `SpecError`.

    `folder` is empty and for uv's own use. Distributions of `constraints` keep their versions.
    """
    kept = folder / "constraints.txt"
    kept.write_text("\n".join(constraints))
    words = ("pip", "compile", "-", "--constraint", str(kept), "--no-header", "--no-annotate")
    text = await _run(words, "\n".join(requires), target, folder)
    return [line.partition(";")[0].strip() for line in text.splitlines() if "==" in line]


async def install(pinned: Sequence[str], target: Target, folder: Path, into: Path) -> None:
    """Install exactly these distributions into the folder `into`. Raises `SpecError`."""
    words = ["pip", "install", "-r", "-", "--no-deps", "--target", str(into)]
    if target.executable is not None:
        words.append("--compile-bytecode")  # shards see the folder read-only
    await _run(words, "\n".join(pinned), target, folder)


async def _run(words: Iterable[str], text: str, target: Target, folder: Path) -> str:
    environment, options = settings(os.environ, pip_files(os.environ, home=Path.home()))
    process = await asyncio.create_subprocess_exec(
        find(),
        *words,
        *options,
        *_python(target),
        *("--only-binary", ":all:", "--quiet", "--color", "never"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        cwd=folder,  # away from anybody's pyproject.toml
        env=environment,
        start_new_session=True,
    )
    try:
        async with asyncio.timeout(LONGEST):
            out, errors = await process.communicate(text.encode())
    except TimeoutError:
        raise SpecError(f"installing packages took more than {LONGEST:.0f} s and was given up") from None
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
    if process.returncode:
        raise SpecError(readable(errors.decode(errors="replace"), target))
    return out.decode()


def _python(target: Target) -> tuple[str, ...]:
    if target.executable is not None:
        return ("--python", str(target.executable))
    return (
        *("--python", sys.executable),
        *("--python-version", target.python),
        *("--python-platform", platform(target)),
    )


def platform(target: Target) -> str:
    """What uv calls the machine of a target. Raises `SpecError` for what it has no name for."""
    libc, _, version = target.libc.partition(" ")
    if libc != "glibc":
        return f"{target.machine}-unknown-linux-musl"
    minor = int(version.split(".")[1])
    known = next((known for known in _GLIBC if known <= minor), None)
    if known is None:
        raise SpecError(f"packages can't be installed for glibc {version}: 2.17 is the oldest that wheels are made for")
    return f"{target.machine}-manylinux_2_{known}"


# --- what uv says ---


def readable(errors: str, target: Target) -> str:
    """What uv printed when it gave up, for a person: the cause first, without its frame."""
    text = _LINK_PASSWORD.sub("://…@", errors)
    python = ".".join(target.python.split(".")[:2])
    if missing := re.search(
        r"Because (\S+) was not found in the (?:package registry|provided package locations)", text
    ):
        return f"there is no package {missing[1]} in the package index of this node"
    if wheels := re.search(r"Wheels are required for `([^`]+)`", text):
        return (
            f"there is no wheel of {wheels[1]} for Python {python} on {target.system} {target.machine}, "
            f"and this node builds nothing from source{_details(text)}"
        )
    if fetch := re.search(r"Failed to fetch: `?(\S+?)`?\n", text):
        *_, last = text.strip().splitlines()
        return f"the package index can't be reached: {fetch[1]}: {last.strip().removeprefix('cause: ')}"
    return f"the packages can't be installed for Python {python}{_details(text)}"


def _details(text: str) -> str:
    lines = [line.strip() for line in text.splitlines()]
    kept = [
        re.sub(r"^(error|cause|× |╰─▶ )[: ]*", "", line) for line in lines if line and "No solution found" not in line
    ]
    cause = "\n".join(line for line in kept[:_SHOWN] if not line.startswith("hint:"))
    cause = cause.replace(", we can conclude that your requirements are unsatisfiable", "")
    return f":\n{cause}" if "\n" in cause else f": {cause}"
