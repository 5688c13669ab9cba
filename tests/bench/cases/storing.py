"""How fast files get their CIDs and come into the content store, beside nothing but sha256 over the same bytes."""

from __future__ import annotations

import contextlib
import hashlib
import os
import statistics
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from bacalhau_node.content.blocks import BlockStore
from bacalhau_node.content.unixfs import PROFILES, hash_path
from tests.bench.harness import Figure, at_least, seconds_of

TITLE = "importing files"
EXECUTORS = ("local",)
MEGABYTES = 300
FILES = 5000
TIMES = 5
GOALS = {"unixfs-v0-2015": 0.75, "unixfs-v1-2025": 0.9}
"""Of plain sha256 (DESIGN section 10)."""

_UNLIMITED = 1 << 50
_BUFFER = 1 << 20


def sha256_of(path: Path) -> str:
    """Plain sha256, one thread."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(_BUFFER))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def sha256sum(folder: Path) -> None:
    """The same by coreutils, all files in one process."""
    subprocess.run("sha256sum -- * > /dev/null", shell=True, cwd=folder, check=True)


def ways(path: Path, profile: str) -> dict[str, Callable[[], object]]:
    """An import that only hashes, and two into a new store."""

    def import_into(**how: bool) -> None:
        store = Path(tempfile.mkdtemp(prefix="store-", dir=path.parent))
        with contextlib.closing(BlockStore(store, profile=profile, limit=_UNLIMITED)) as new:
            new.add_path(path, **how)

    return {
        "hashed": lambda: hash_path(path, profile=PROFILES[profile]),
        "linked": lambda: import_into(link=True),
        "copied": import_into,
    }


def medians(calls: dict[str, Callable[[], object]], stores: Path) -> dict[str, float]:
    """The median seconds of each call, made in turn; `stores` is where they make their stores."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(TIMES):
        for name, call in calls.items():
            taken[name].append(seconds_of(call))
            empty(stores)
    return {name: statistics.median(values) for name, values in taken.items()}


def empty(stores: Path) -> None:
    """Give the disk back what lies in the stores, but keep their files.

    To make a file, ext4 passes over all inodes that were removed in the last minutes, one by one: after a store of
    5,000 files was removed the next one takes 0.2 ms more for each of its files, which no user's store has to.
    """
    for file in stores.glob("store-*/files/*/*"):
        file.chmod(0o600)
        os.truncate(file, 0)


def figure(what: str, path: Path, profile: str, beside: dict[str, Callable[[], object]]) -> Figure:
    """The slowest of the three ways decides; the first of those beside is what it is compared with."""
    ours = ways(path, profile)
    seconds = medians(ours | beside, path.parent)
    plain = seconds[next(iter(beside))]
    speeds = {name: f"{name} {MEGABYTES / seconds[name]:,.0f} MB/s" for name in (*ours, *beside)}
    return Figure(
        what=f"{what} imported, {profile}",
        ours=", ".join(speeds[name] for name in ours),
        beside=", ".join(speeds[name] for name in beside),
        measured=plain / max(seconds[name] for name in ours),
        goal=at_least(GOALS[profile], "× sha256"),
    )


def run(_: str) -> list[Figure]:
    """300 MB in one file, and in 5,000."""
    work = Path(os.environ["BACALHAU_DIR"])
    large, small = work / "large", work / "small"
    large.write_bytes(os.urandom(MEGABYTES * 1_000_000))
    small.mkdir()
    for number in range(FILES):
        (small / f"{number:04}.bin").write_bytes(os.urandom(MEGABYTES * 1_000_000 // FILES))
    one = {"sha256": lambda: sha256_of(large)}
    many = {"sha256sum": lambda: sha256sum(small), "sha256": lambda: list(map(sha256_of, sorted(small.iterdir())))}
    return [
        *(figure(f"{MEGABYTES} MB in one file", large, profile, one) for profile in GOALS),
        *(figure(f"{MEGABYTES} MB in {FILES:,} files", small, profile, many) for profile in GOALS),
    ]
