"""A gigabyte made in ten shards, as one DataFrame at the caller."""

from __future__ import annotations

import pandas as pd

from tests.bench import ours
from tests.bench.harness import Figure, at_least, in_turn
from tests.bench.peers import started
from tests.bench.work import make_100_mb, trivial

TITLE = "1 GB of results"
EXECUTORS = ("local", "docker")
SHARDS = 10
MEGABYTES = 1000
CELL = """\
import numpy as np
import pandas as pd

rows = np.arange(100 * 1_000_000 // 64, dtype="float64") + shard.index
pd.DataFrame({f"c{k}": rows * (k + 1) for k in range(8)})"""


def same(found: pd.DataFrame) -> None:
    """Every row is there."""
    assert len(found) == SHARDS * (100 * 1_000_000 // 64), len(found)


def run(executor: str) -> list[Figure]:
    """Ours three times; the others once, for they are slow at it."""
    ours.warm("import pandas as pd\nimport numpy as np\n1 + 1")
    call = lambda: same(ours.run_job(CELL, shards=SHARDS).result().df())  # noqa: E731 - timed as it stands
    seconds = in_turn({"ours": call}, times=3)["ours"]
    beside = {}
    with started(*(("multiprocessing", "joblib", "dask", "ipyparallel") if executor != "docker" else ())) as peers:
        for name, peer in peers.items():
            peer.map(trivial, range(8))
            theirs = in_turn({name: lambda one=peer: same(pd.concat(one.map(make_100_mb, range(SHARDS))))}, times=1)
            beside |= theirs
    return [
        Figure(
            what=f"1 GB result to a DataFrame, {executor}",
            ours=f"{MEGABYTES / seconds:.0f} MB/s",
            beside=", ".join(f"{name} {MEGABYTES / one:.0f} MB/s" for name, one in beside.items()),
            measured=MEGABYTES / seconds,
            goal=at_least(600, "MB/s"),
        )
    ]
