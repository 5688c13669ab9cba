"""How long a notebook waits for the import."""

from __future__ import annotations

import statistics
import subprocess
import sys

from tests.bench.harness import Figure, at_most

TITLE = "import"
EXECUTORS = ("local",)
OURS = "bacalhau_jupyter"
MODULES = (OURS, "multiprocessing.pool", "joblib", "distributed", "ipyparallel")
TIMES = 7
PROGRAM = """\
import time
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance()
start = time.perf_counter()
{statement}
print(time.perf_counter() - start)"""


def import_ms(module: str) -> float:
    """The milliseconds of one import into a new IPython shell; ours as `%load_ext`, which loads more."""
    statement = f"shell.run_line_magic('load_ext', '{OURS}')" if module == OURS else f"import {module}"
    code = PROGRAM.format(statement=statement)
    return 1000 * float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)


def run(_: str) -> list[Figure]:
    """Medians, one import of each module in turn; the first round is for what Python has to compile."""
    rounds = [{module: import_ms(module) for module in MODULES} for _ in range(1 + TIMES)][1:]
    median = {module: statistics.median(one[module] for one in rounds) for module in MODULES}
    beside = ", ".join(f"{module} {median[module]:.0f} ms" for module in MODULES if module != OURS)
    return [
        Figure(
            what="import and `%load_ext`, IPython loaded",
            ours=f"{median[OURS]:.0f} ms",
            beside=beside,
            measured=median[OURS],
            goal=at_most(60, "ms"),
        )
    ]
