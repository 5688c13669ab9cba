"""From a `print` in a shard to the arrival of that line as a message of the cell."""

from __future__ import annotations

import re
import statistics
import time
from pathlib import Path

from tests.bench.harness import Figure, at_most, percentile
from tests.bench.kernel import Arrival, Kernel
from tests.bench.notebooks import SETUP, TICKS

TITLE = "print to cell"
EXECUTORS = ("local", "docker")
GOAL_MS = {"docker": 20}
LOCAL_GOAL_MS = 10
TICK = re.compile(r"TICK (\d+) ([\d.]+) END")
LINES = 20
LATE_SECONDS = 0.5
TAIL = 4000
FEW, MANY, WIDTH = 250, 750, 60
"""Lines of so many characters: bytes that are sent linear in the text cost the same for each."""


def delays_ms(arrivals: list[Arrival]) -> list[float]:
    """How long each line took; a line may come in several messages, and a display may show it again."""
    found: dict[str, float] = {}
    streamed = ""
    for one in arrivals:
        streamed = (streamed + one.text)[-TAIL:] if one.kind == "stream" else streamed
        for name, printed in TICK.findall(streamed if one.kind == "stream" else one.text):
            found.setdefault(name, 1000 * (one.at - float(printed)))
    return list(found.values())


def listen(name: str, *, times: int = 1) -> tuple[list[float], float]:
    """(delays in ms, characters of text that came for each that was printed) of one tool's cell."""
    delays: list[float] = []
    sent = printed = 0
    with Kernel(Path.cwd()) as kernel:
        kernel.run(SETUP[name] or "pass")
        for _ in range(times):
            arrivals = kernel.run(TICKS[name]).arrivals
            time.sleep(LATE_SECONDS)  # what comes after the cell's end comes with the next
            arrivals += kernel.run("pass").arrivals
            came = delays_ms(arrivals)
            if len(came) < LINES:
                raise RuntimeError(f"{name}: {LINES - len(came)} of {LINES} lines never came")
            delays += came
            sent += sum(len(one.text) for one in arrivals if one.kind != "comm")
            printed += sum(len(f"TICK {k} {time.time()!r} END\n") for k in range(LINES))
    return delays, sent / printed


def growth() -> float:
    """Characters that more text costs, for each of its own: all messages of a cell, the live view's too."""
    sent = []
    with Kernel(Path.cwd()) as kernel:
        kernel.run(SETUP["ours"])
        for count in (FEW, FEW, MANY):  # the first one warms up
            cell = f"%%bacalhau\nfor k in range({count}):\n    print('x' * {WIDTH - 1})"
            sent.append(sum(len(one.text) for one in kernel.run(cell).arrivals))
    return (sent[-1] - sent[-2]) / ((MANY - FEW) * WIDTH)


def run(executor: str) -> list[Figure]:
    """Ours three times; the others once each, beside the local executor."""
    delays, _ = listen("ours", times=3)
    grown = growth()
    beside = []
    for name in ("bare", "multiprocessing", "dask", "ipyparallel") if executor != "docker" else ():
        theirs, repeated = listen(name)
        label = "print in the cell itself" if name == "bare" else name
        beside.append(f"{label} {percentile(theirs, 0.95):.0f} ms (sends {repeated:.1f} × the text)")
    p95 = percentile(delays, 0.95)
    return [
        Figure(
            what=f"print in a shard to the cell, p95, {executor}",
            ours=f"{p95:.1f} ms (median {statistics.median(delays):.1f} ms)",
            beside=", ".join(beside),
            measured=p95,
            goal=at_most(GOAL_MS.get(executor, LOCAL_GOAL_MS), "ms"),
        ),
        Figure(
            what=f"characters sent for each more that is printed ({FEW} to {MANY} lines), {executor}",
            ours=f"{grown:.2f} ×",
            beside="",
            measured=grown,
            goal=at_most(1.5, "× the text"),
        ),
    ]
