"""The layers of one user: folders of installed packages, each under the hash of all that decides its content.

    BACALHAU_DIR/layers/KEY/lock         held by who builds it (alone) or by nodes whose jobs use it (shared)
    BACALHAU_DIR/layers/KEY/layer.json   what is in it; written last, so it is there when the layer is whole
    BACALHAU_DIR/layers/KEY/site/        the packages, on the path of the shards

Theory of operation. Several notebooks share the folder. Who wants a layer locks it: shared if it is
whole, alone to build it, so that it is built once and the others wait. It is built in a folder beside
`site` and renamed. A layer in use stays locked until its job is released; the system takes the
locks of a dead node back. After each build, the layers that nobody uses go, those that were used
longest ago first, until `MOST` and `MOST_BYTES` hold. A removed layer may be made anew by someone who waits
for its lock: so whoever gets a lock looks whether the file that it locked is still the one of that name.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import os
import secrets
import shutil
import stat
from typing import TYPE_CHECKING, Final

import msgspec

from bacalhau_node import requirements
from bacalhau_node.errors import SpecError
from bacalhau_node.layers import installer

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from bacalhau_node.ports import Target

MOST: Final = 50
"""Layers that are kept."""
MOST_BYTES: Final = 5 * 1024**3
"""Bytes of all layers that are kept; a single one may be larger."""
_GONE: Final = ".gone-"
_LOOK_AGAIN: Final = 0.05
"""Seconds between two looks at a layer that another node builds."""


class Contents(msgspec.Struct, frozen=True):
    """What a layer holds: NAME==VERSION each, and its bytes."""

    packages: tuple[str, ...]
    size: int = 0


class Layer:
    """A layer that is whole and in use. `path` is None when the environment has everything already."""

    def __init__(self, folder: Path | None, contents: Contents, lock: int | None) -> None:
        self.path = folder / "site" if folder is not None and contents.packages else None
        self.packages = contents.packages
        self._lock = lock

    def close(self) -> None:
        """It is not used any more, as far as its owner is concerned."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


class Layers:
    """All layers below `folder`."""

    def __init__(self, folder: Path, *, most: int = MOST, most_bytes: int = MOST_BYTES) -> None:
        self._folder, self._most, self._most_bytes = folder, most, most_bytes

    async def open(self, requires: Sequence[str], target: Target) -> Layer:
        """A layer with what `requires` needs beyond `target`, built if there is none. Raises `SpecError`."""
        if _satisfied(requires, target):
            return Layer(None, Contents(()), None)
        folder = self._folder / key(requires, target)
        while True:
            if (lock := await asyncio.to_thread(_lock, folder, fcntl.LOCK_SH)) is not None:
                if (contents := _contents(folder)) is not None:
                    os.utime(folder / "lock")
                    return Layer(folder, contents, lock)
                os.close(lock)
            if (lock := await asyncio.to_thread(_lock, folder, fcntl.LOCK_EX)) is not None:
                try:
                    await self._build(folder, requires, target)
                finally:
                    await asyncio.to_thread(_discard_unfinished, folder)
                    os.close(lock)
                await asyncio.to_thread(self._prune, folder)
            else:
                await asyncio.sleep(_LOOK_AGAIN)

    def describe(self, requires: Sequence[str], target: Target) -> str:
        """What `open` would find, in one sentence."""
        if _satisfied(requires, target):
            return "packages: all that is required is there already"
        name = key(requires, target)
        contents = _contents(self._folder / name)
        if contents is None:
            return f"packages: layer {name}, not here yet: {', '.join(requires)} will be installed first"
        return f"packages: layer {name}, ready: {', '.join(contents.packages) or 'nothing to add'}"

    def missing(self, requires: Sequence[str], target: Target) -> bool:
        """Whether `open` has to build."""
        return not _satisfied(requires, target) and _contents(self._folder / key(requires, target)) is None

    async def _build(self, folder: Path, requires: Sequence[str], target: Target) -> None:
        """Make the layer whole. Its folder is locked; whatever lies in it is from someone who was killed."""
        if _contents(folder) is not None:
            return
        try:
            work = await asyncio.to_thread(_workplace, folder)
            constraints, own = _constraints(target)
            pinned = await installer.resolve(requires, target, constraints, work)
            packages = tuple(each for each in pinned if own.get(_name(each)) != each)
            if packages:
                await installer.install(packages, target, work, work / "site")
            await asyncio.to_thread(_finish, folder, work, packages)
        except OSError as error:
            raise SpecError(f"packages can't be installed in {folder}: {error}") from error

    def _prune(self, newest: Path) -> None:
        """Remove what is over the limits and used by nobody, and what somebody was killed over while he removed it."""
        for gone in self._folder.glob(f"{_GONE}*"):
            shutil.rmtree(gone, ignore_errors=True)
        found = [
            ((folder / "lock").stat().st_mtime, contents.size, folder)
            for folder in self._folder.iterdir()
            if (contents := _contents(folder)) is not None
        ]
        count, size = len(found), sum(each for _, each, _ in found)
        for _, each, folder in sorted(found):
            over = count > self._most or size > self._most_bytes
            if over and folder != newest and self._remove(folder):
                count, size = count - 1, size - each

    def _remove(self, folder: Path) -> bool:
        lock = _lock(folder, fcntl.LOCK_EX)
        if lock is None:
            return False
        gone = self._folder / f"{_GONE}{secrets.token_hex(4)}"
        folder.rename(gone)
        os.close(lock)
        shutil.rmtree(gone, ignore_errors=True)
        return True


# --- what decides the content ---


def key(requires: Sequence[str], target: Target) -> str:
    """The name of a layer: equal for equal content, on any machine."""
    constraints, _ = _constraints(target)
    machine = [target.system, target.machine, target.libc]
    facts = [target.python.split(".")[:2], machine, sorted(requires), constraints]
    return hashlib.sha256(msgspec.json.encode(facts)).hexdigest()[:24]


def _satisfied(requires: Sequence[str], target: Target) -> bool:
    """Whether the target has all that is required. Raises `SpecError` for what it has in a version that won't do."""
    return not requirements.unmet(requires, python=target.python, versions=target.versions)


def _constraints(target: Target) -> tuple[list[str], dict[str, str]]:
    """What the target has: as constraints, sorted, and by name. A build of its own ("2.4+cpu") counts as a release."""
    from packaging.version import InvalidVersion, Version  # noqa: PLC0415 - few cells ask for packages

    own: dict[str, str] = {}
    for name, version in target.versions.items():
        with contextlib.suppress(InvalidVersion):
            own[name] = f"{name}=={Version(version).public}"
    return sorted(own.values()), own


def _name(pinned: str) -> str:
    from packaging.utils import canonicalize_name  # noqa: PLC0415 - few cells ask for packages

    return canonicalize_name(pinned.partition("==")[0].partition("[")[0])


# --- one folder ---


def _lock(folder: Path, kind: int) -> int | None:
    """The folder's lock, which closing gives back; None while somebody holds it, or when it was removed just now."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
        if (folder / "lock").stat().st_ino == os.fstat(lock).st_ino:
            return lock
    except (BlockingIOError, FileNotFoundError):
        pass
    os.close(lock)
    return None


def _contents(folder: Path) -> Contents | None:
    try:
        return msgspec.json.decode((folder / "layer.json").read_bytes(), type=Contents)
    except (OSError, msgspec.DecodeError):
        return None


def _workplace(folder: Path) -> Path:
    """A new folder for building in; whatever else lies in the layer's folder is from somebody who was killed."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
    work = folder / f"new-{secrets.token_hex(4)}"
    (work / "site").mkdir(parents=True)
    return work


def _finish(folder: Path, work: Path, packages: tuple[str, ...]) -> None:
    """Make what was installed the layer."""
    site = work / "site"
    (site / ".lock").unlink(missing_ok=True)  # uv's own
    contents = Contents(packages, _opened(site))
    site.rename(folder / "site")
    (work / "layer.json").write_bytes(msgspec.json.encode(contents))
    (work / "layer.json").rename(folder / "layer.json")
    shutil.rmtree(work, ignore_errors=True)


def _opened(site: Path) -> int:
    """Let any user read the packages, whom shards may run as; returns their bytes."""
    total = 0
    for path in (site, *site.rglob("*")):
        status = path.lstat()
        if stat.S_ISLNK(status.st_mode):
            continue
        mode = status.st_mode | (0o555 if stat.S_ISDIR(status.st_mode) else 0o444)
        if mode != status.st_mode:
            path.chmod(stat.S_IMODE(mode))
        total += status.st_size
    return total


def _discard_unfinished(folder: Path) -> None:
    """Remove the folder of a layer that could not be built; those who wait for its lock make a new one."""
    if _contents(folder) is None:
        shutil.rmtree(folder, ignore_errors=True)
