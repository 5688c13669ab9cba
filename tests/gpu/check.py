"""What `run.sh` runs: shards that use a real card, in each executor; says what each saw."""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from itertools import combinations
from pathlib import Path
from typing import Any

from bacalhau_node.executors.docker import DockerExecutor
from bacalhau_node.executors.gpus import Gpus, detect, listed
from bacalhau_node.executors.process import ProcessExecutor
from bacalhau_node.executors.sandbox import SandboxExecutor
from bacalhau_node.ports import Executor, Gpu
from bacalhau_node.spec import Resources
from bacalhau_node.testing.executor_suite import ShardBench, value

CELL = Path(__file__).with_name("cuda_cell.py").read_text()
ONE = Resources(gpus=1)


async def main() -> int:
    cards, problem = detect()
    if not cards:
        print(f"no card: {problem}")
        return 2
    print(listed(cards))
    with tempfile.TemporaryDirectory(prefix="bacalhau-gpu-") as place:
        folder = Path(place)
        (folder / "docker").mkdir()
        gpus = Gpus(folder / "gpus")
        executors: dict[str, Executor] = {
            "process": ProcessExecutor(folder / "process", slots=len(cards) + 1, gpus=gpus),
            "sandbox": SandboxExecutor(folder / "sandbox", slots=len(cards) + 1, gpus=gpus),
            "docker": DockerExecutor(folder / "docker", node="n-gpu-check", slots=len(cards) + 1, gpus=gpus),
        }
        good = [await tried(name, executor, cards, folder) for name, executor in executors.items()]
    return 0 if all(good) else 1


async def tried(name: str, executor: Executor, cards: tuple[Gpu, ...], folder: Path) -> bool:
    """Whether all was well, an executor that does not work here at all included."""
    try:
        if problem := (await executor.probe()).problem:
            print(f"{name}: left out: {problem}")
            return True
        (folder / f"bench-{name}").mkdir()
        bench = ShardBench(executor, folder / f"bench-{name}")
        if refusal := executor.check(bench.task(CELL, resources=ONE).spec):
            print(f"{name}: REFUSED: {refusal}")
            return False
        began = time.monotonic()
        runs = [bench.run(CELL, shard=number, resources=ONE) for number in range(len(cards) + 1)]
        outcomes = await asyncio.gather(*runs)
        seconds = time.monotonic() - began
        for outcome in outcomes:
            if not outcome.ok:
                print(f"{name}: FAILED: {outcome.error}\n{outcome.stderr.decode(errors='replace')}")
                return False
        return judged(name, [value(outcome) for outcome in outcomes], seconds)
    finally:
        await executor.close()


def judged(name: str, shards: list[dict[str, Any]], seconds: float) -> bool:
    good = True
    for number, seen in enumerate(shards):
        own = seen["given"].partition("-")[2].replace("-", "") == seen["uuid"]
        fine = own and seen["cards"] == 1 and seen["added"]
        good &= fine
        print(f"{name}: shard {number}: {'ok' if fine else 'WRONG'}: {seen}")
    for one, other in combinations(shards, 2):
        if one["given"] == other["given"] and one["from"] < other["to"] and other["from"] < one["to"]:
            good = False
            print(f"{name}: WRONG: two shards were on {one['given']} at once")
    print(f"{name}: {'ok' if good else 'FAILED'}, {len(shards)} shards in {seconds:.1f} s")
    return good


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
