"""From `%load_ext` to the first result, in a new kernel with an empty data folder."""

from __future__ import annotations

import os
import statistics
import tempfile
from pathlib import Path

from tests.bench import containers
from tests.bench.harness import Figure, at_most, seconds_of
from tests.bench.kernel import Kernel

TITLE = "first result"
EXECUTORS = ("local", "docker")
TIMES = 3


def first_result() -> float:
    """Seconds of the two cells that a user types first."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["BACALHAU_DIR"] = folder
        with Kernel(Path(folder)) as kernel:
            kernel.run("1 + 1")
            return kernel.run("%load_ext bacalhau_jupyter").seconds + kernel.run("%%bacalhau\n1 + 1").seconds


def run(executor: str) -> list[Figure]:
    """Medians of both, in turn; once before that, for what Python has to compile."""
    first_result()
    if executor != "docker":
        seconds = statistics.median(first_result() for _ in range(TIMES))
        return [
            Figure(
                what=f"`%load_ext` to first result, {executor}",
                ours=f"{1000 * seconds:.0f} ms",
                beside="",
                measured=seconds,
                goal=at_most(0.35, "s"),
            )
        ]
    with containers.image() as image:
        pairs = [(first_result(), seconds_of(lambda: containers.docker_run(image))) for _ in range(TIMES)]
    ours, beside = (statistics.median(column) for column in zip(*pairs, strict=True))
    return [
        Figure(
            what="`%load_ext` to first result, docker",
            ours=f"{1000 * ours:.0f} ms",
            beside=f"`docker run` of the same Python {1000 * beside:.0f} ms",
            measured=ours - beside,
            goal=at_most(0.2, "s more"),
        )
    ]
