"""One trivial cell through the whole node, over the same cell run by the kernel itself."""

from __future__ import annotations

import statistics
import time
from pathlib import Path

from tests.bench.harness import Figure, at_most
from tests.bench.kernel import Kernel
from tests.bench.notebooks import CELLS, SETUP

TITLE = "trivial cell"
EXECUTORS = ("local", "docker")
TIMES = 12
ROW = 10
SPARE_SECONDS = 1.0
"""Time for a spare to come up after a job, as between two cells of a user."""


def median_ms(kernel: Kernel, cell: str, *, pause: float, times: int = TIMES) -> float:
    """The median milliseconds of a cell, run so many times with a pause before each."""
    taken = []
    for _ in range(times):
        time.sleep(pause)
        taken.append(1000 * kernel.run(cell).seconds)
    return statistics.median(taken)


def peers(folder: Path) -> str:
    """What the same cell costs with others, in kernels of their own."""
    found = []
    for name in ("multiprocessing", "joblib", "dask", "ipyparallel"):
        with Kernel(folder) as kernel:
            kernel.run(SETUP[name])
            median_ms(kernel, CELLS[name], pause=0, times=3)
            bare = median_ms(kernel, "1 + 1", pause=0.05)
            found.append(f"{name} {median_ms(kernel, CELLS[name], pause=0.05) - bare:.1f} ms")
    return ", ".join(found)


def run(executor: str) -> list[Figure]:
    """With a spare ready, and ten in a row."""
    with Kernel(Path.cwd()) as kernel:
        kernel.run(SETUP["ours"])
        median_ms(kernel, CELLS["ours"], pause=SPARE_SECONDS, times=3)
        bare = median_ms(kernel, "1 + 1", pause=0.05)
        spare = median_ms(kernel, CELLS["ours"], pause=SPARE_SECONDS)
        time.sleep(SPARE_SECONDS)
        row = median_ms(kernel, CELLS["ours"], pause=0, times=ROW)
    others = peers(Path.cwd()) if executor != "docker" else ""
    cases = [("one trivial cell, spare ready", spare, others), (f"{ROW} trivial cells in a row, each", row, "")]
    return [
        Figure(
            what=f"{what}, {executor}",
            ours=f"{ours:.1f} ms",
            beside=f"bare cell {bare:.1f} ms" + (f"; added by {beside}" if beside else ""),
            measured=ours - bare,
            goal=at_most(25, "ms added"),
        )
        for what, ours, beside in cases
    ]
