"""How long a notebook waits for the import."""

from __future__ import annotations

import statistics
import subprocess
import sys

from tests.bench.harness import Figure, at_most

TITLE = "import"
EXECUTORS = ("plain",)
OURS = "bacalhau_jupyter"
MODULES = (OURS, "multiprocessing.pool", "joblib", "distributed", "ipyparallel")
TIMES = 7


def import_ms(module: str) -> float:
    """The milliseconds of one import in a new interpreter that has IPython loaded."""
    code = f"import IPython, time; start = time.perf_counter(); import {module}; print(time.perf_counter() - start)"
    return 1000 * float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)


def run(_: str) -> list[Figure]:
    """Medians, one import of each module in turn."""
    rounds = [{module: import_ms(module) for module in MODULES} for _ in range(TIMES)]
    median = {module: statistics.median(one[module] for one in rounds) for module in MODULES}
    beside = ", ".join(f"{module} {median[module]:.0f} ms" for module in MODULES if module != OURS)
    return [
        Figure(
            what="import, IPython loaded",
            ours=f"{median[OURS]:.0f} ms",
            beside=beside,
            measured=median[OURS],
            goal=at_most(60, "ms"),
        )
    ]
