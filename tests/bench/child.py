"""One case on one executor, in this process: `python -m tests.bench.child CASE EXECUTOR`."""

from __future__ import annotations

import importlib
import sys
import time

from tests.bench.harness import Run, calibrate, now, save
from tests.bench.ours import executor_name


def main(name: str, executor: str) -> None:
    """Calibrate, run, calibrate, keep."""
    case = importlib.import_module(f"tests.bench.cases.{name}")
    found = executor_name()
    if executor == "docker" != found:
        print("  left out: no Docker daemon answers", flush=True)
        return
    before = calibrate()
    start = time.monotonic()
    figures = tuple(case.run(found))
    seconds = time.monotonic() - start
    run = Run(
        case=name,
        executor=executor,
        date=now(),
        calibration=(before, calibrate()),
        seconds=seconds,
        figures=figures,
    )
    save(run)
    for one in figures:
        print(f"  {one.what}: {one.ours} ({one.goal}: {'met' if one.met else 'missed'})", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
