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
EXECUTORS = ("plain", "docker")
GOAL_MS = {"plain": 10, "docker": 20}
TICK = re.compile(r"TICK (\d+) ([\d.]+) END")
LINES = 20
LATE_SECONDS = 0.5
TAIL = 4000


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
    """(delays in ms, characters that came for each that was printed) of one tool's cell."""
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
            sent += sum(len(one.text) for one in arrivals)
            printed += sum(len(f"TICK {k} {time.time()!r} END\n") for k in range(LINES))
    return delays, sent / printed


def run(executor: str) -> list[Figure]:
    """Ours three times; the others once each, beside the plain executor."""
    delays, growth = listen("ours", times=3)
    beside = []
    for name in ("bare", "multiprocessing", "dask", "ipyparallel") if executor == "plain" else ():
        theirs, repeated = listen(name)
        label = "print in the cell itself" if name == "bare" else name
        beside.append(f"{label} {percentile(theirs, 0.95):.0f} ms (sends {repeated:.1f} × the text)")
    middle = statistics.median(delays)
    p95 = percentile(delays, 0.95)
    return [
        Figure(
            what=f"print in a shard to the cell, p95, {executor}",
            ours=f"{p95:.1f} ms (median {middle:.1f} ms)",
            beside=", ".join(beside),
            measured=p95,
            goal=at_most(GOAL_MS[executor], "ms"),
        ),
        Figure(
            what=f"characters sent for each printed, {executor}",
            ours=f"{growth:.2f} ×",
            beside="",
            measured=growth,
            goal=at_most(2, "× the text"),
        ),
    ]
