"""Figures and goals, calibration, and the table that they end in."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
OUT = ROOT / "bench-out"
TABLE = ROOT / "BENCHMARKS.md"
WORKERS = 2
"""Workers of every peer: the goals are meant for two cores."""

NOWHERE = "unix:///nonexistent/docker.sock"
"""A Docker address where nobody answers: the executor is then a sandbox or a plain process."""

DISTURBED = 1.5
"""A run whose calibration is this much worse than the best seen ran beside something else."""

BEGIN = "<!-- figures: written by `make bench` -->"
"""What stands above it in BENCHMARKS.md is written by hand."""

PACKAGES = ("ipykernel", "pandas", "pyarrow", "joblib", "distributed", "ipyparallel", "docker")


@dataclass(frozen=True, kw_only=True)
class Goal:
    """What a figure should reach: `limit` in `unit`, from below or from above."""

    limit: float
    unit: str
    ceiling: bool

    def __str__(self) -> str:
        """As the table shows it."""
        return f"at {'most' if self.ceiling else 'least'} {self.limit:g} {self.unit}"


def at_most(limit: float, unit: str) -> Goal:
    """A goal from above."""
    return Goal(limit=limit, unit=unit, ceiling=True)


def at_least(limit: float, unit: str) -> Goal:
    """A goal from below."""
    return Goal(limit=limit, unit=unit, ceiling=False)


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One row of the table. `measured` is what the goal is about, in the goal's unit."""

    what: str
    ours: str
    beside: str
    measured: float
    goal: Goal

    @property
    def met(self) -> bool:
        """Whether the goal is reached."""
        return self.measured <= self.goal.limit if self.goal.ceiling else self.measured >= self.goal.limit


@dataclass(frozen=True, kw_only=True)
class Run:
    """What one child process measured: a case on one executor, between two calibrations in ms."""

    case: str
    executor: str
    date: str
    calibration: tuple[float, float]
    seconds: float
    figures: tuple[Figure, ...]


# --- measuring ---


def seconds_of(call: Callable[[], Any]) -> float:
    """How long one call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def in_turn(calls: dict[str, Callable[[], Any]], *, times: int) -> dict[str, float]:
    """The median seconds of each call, made in turn so that a disturbance meets all of them alike."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(times):
        for name, call in calls.items():
            taken[name].append(seconds_of(call))
    return {name: statistics.median(values) for name, values in taken.items()}


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` (0 to 1) of the values lie; the nearest one."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def _spin(_: int) -> float:
    start = time.perf_counter()
    total = 0
    for number in range(1_000_000):
        total += number & 7
    return time.perf_counter() - start


def calibrate() -> float:
    """The milliseconds of a fixed piece of work on two cores at once: they tell a quiet run from a disturbed one."""
    with get_context("fork").Pool(WORKERS) as pool:
        return 1000 * max(pool.map(_spin, range(WORKERS), chunksize=1))


# --- keeping and showing ---


def save(run: Run) -> None:
    """Keep a run; the next one of the same case and executor takes its place."""
    OUT.mkdir(exist_ok=True)
    (OUT / f"{run.case}-{run.executor}.json").write_text(json.dumps(asdict(run), indent=1))


def load(path: Path) -> Run:
    """A run that was kept."""
    data = json.loads(path.read_text())
    figures = tuple(Figure(**(one | {"goal": Goal(**one["goal"])})) for one in data.pop("figures"))
    return Run(**(data | {"figures": figures, "calibration": tuple(data["calibration"])}))


def table(runs: Iterable[Run]) -> str:
    """The Markdown table of runs, in their order."""
    runs = list(runs)
    best = min(min(run.calibration) for run in runs)
    rows = ["| what | ours | beside it | compared | goal | |", "|---|---|---|---|---|---|"]
    for run in runs:
        mark = " \\*" if max(run.calibration) > DISTURBED * best else ""
        rows += [
            f"| {one.what}{mark} | {one.ours} | {one.beside} | {number(one.measured)} {one.goal.unit} "
            f"| {one.goal} | {'met' if one.met else '**missed**'} |"
            for one in run.figures
        ]
    return "\n".join(rows)


def report(runs: Sequence[Run]) -> str:
    """The table with where and when it was measured."""
    dates = sorted({run.date for run in runs})
    quiet = min(min(run.calibration) for run in runs)
    worst = max(max(run.calibration) for run in runs)
    return f"""\
{machine()}; {" to ".join(dict.fromkeys((dates[0], dates[-1])))}; {versions()}.
Calibration {quiet:.0f} to {worst:.0f} ms; a row with \\* ran beside something else.

{table(runs)}"""


def number(value: float) -> str:
    """Three digits that count."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def machine() -> str:
    """The machine in words."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cores = f"{len(os.sched_getaffinity(0))} cores ({models[0] if models else platform.machine()})"
    return f"{cores}, {memory:.0f} GiB, {platform.system()} {platform.release()}"


def versions() -> str:
    """Python and the packages that matter here."""
    found = [f"Python {platform.python_version()}"]
    for name in PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def now() -> str:
    """Today's date."""
    return datetime.now(UTC).date().isoformat()
