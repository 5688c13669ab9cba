"""What the peers' workers run; importable by all of them, pandas loaded only where it is used."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd


def trivial(index: int) -> int:
    """Nothing, and an answer."""
    return index


def group(path: str) -> pd.DataFrame:
    """One CSV file of the glob case, grouped."""
    import pandas as pd  # noqa: PLC0415

    grouped = pd.read_csv(path).groupby("region")
    return grouped.agg(n=("bytes", "size"), total=("bytes", "sum"), mean=("seconds", "mean"), best=("score", "max"))


def make_frame(index: int, megabytes: int) -> pd.DataFrame:
    """A frame of eight numeric columns: 64 bytes a row."""
    import numpy as np  # noqa: PLC0415
    import pandas as pd  # noqa: PLC0415

    rows = np.arange(megabytes * 1_000_000 // 64, dtype="float64") + index
    return pd.DataFrame({f"c{k}": rows * (k + 1) for k in range(8)})


def make_100_mb(index: int) -> pd.DataFrame:
    """One of ten parts of a gigabyte."""
    return make_frame(index, 100)


def die_at_50(job: tuple[int, str]) -> int:
    """(index, marker file): the fiftieth dies of SIGKILL when the others are done, and leaves the time of its death."""
    index, marker = job
    if index == 50:
        time.sleep(1)
        with open(marker, "w") as file:  # noqa: PTH123
            file.write(repr(time.time()))
        os.kill(os.getpid(), signal.SIGKILL)
    return index


def ticks() -> None:
    """Twenty lines, each with the time of its print, as a user writes it: no flush."""
    _tick(print)


def dask_ticks() -> None:
    """The same by dask's own print: it has none for the plain one."""
    from distributed import print as to_client  # noqa: PLC0415

    _tick(to_client)


def _tick(say: Callable[..., None]) -> None:
    for k in range(20):
        say("TICK", k, repr(time.time()), "END")
        time.sleep((0.11, 0.17, 0.13, 0.19, 0.07)[k % 5])
