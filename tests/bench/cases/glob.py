"""Two hundred CSV files grouped file by file, and one table at the caller."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pandas as pd

from tests.bench import ours
from tests.bench.data import csv_files
from tests.bench.harness import Figure, at_most, in_turn
from tests.bench.peers import Multiprocessing, started
from tests.bench.work import group

TITLE = "200 CSV files grouped"
EXECUTORS = ("local", "docker")
TIMES = 3
GOALS = {10: 1.05, 200: 2.0}
CELL = """\
import pandas as pd

def group(path):
    grouped = pd.read_csv(path).groupby("region")
    return grouped.agg(n=("bytes", "size"), total=("bytes", "sum"), mean=("seconds", "mean"), best=("score", "max"))

pd.concat(group(path) for path in inputs)"""


def by_hand(paths: list[Path]) -> pd.DataFrame:
    """What a script does: a pool, a map, a concat."""
    pool = Multiprocessing()
    try:
        return pd.concat(pool.map(group, paths))
    finally:
        pool.close()


def ours_with(shards: int, folder: Path) -> pd.DataFrame:
    """The same table from our shards."""
    return ours.run_job(CELL, input=[str(folder)], glob="*.csv", shards=shards).result().df()


def same(found: pd.DataFrame, expected: pd.DataFrame) -> None:
    """A wrong answer is no figure."""
    pd.testing.assert_frame_equal(found, expected, check_dtype=False)


def run(executor: str) -> list[Figure]:
    """All in turn; the peers' workers have pandas loaded, ours are as the node keeps them."""
    paths = csv_files()
    expected = by_hand(paths)
    ours.warm("import pandas as pd\n1 + 1")
    with started(*(("joblib", "dask") if executor != "docker" else ())) as peers:
        calls: dict[str, Callable[[], pd.DataFrame]] = {
            "by hand": partial(by_hand, paths),
            "10": partial(ours_with, 10, paths[0].parent),
            "200": partial(ours_with, 200, paths[0].parent),
        } | {name: lambda peer=peer: pd.concat(peer.map(group, paths)) for name, peer in peers.items()}
        for call in calls.values():
            same(call(), expected)
        taken = in_turn(calls, times=TIMES)
    beside = ", ".join(f"{name} {taken[name]:.2f} s" for name in ("by hand", *peers))
    return [
        Figure(
            what=f"200 CSV files (200 MB) grouped, {shards} shards, {executor}",
            ours=f"{taken[str(shards)]:.2f} s",
            beside=beside.replace("by hand", "hand-written pool"),
            measured=taken[str(shards)] / taken["by hand"],
            goal=at_most(goal, "× the pool"),
        )
        for shards, goal in GOALS.items()
    ]
