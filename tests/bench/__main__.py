"""Run the cases and write the table: `python -m tests.bench [CASE]...`."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from tests.bench import harness

CASES = (
    "importing",
    "first",
    "hello",
    "stream",
    "core",
    "simulation",
    "hosts",
    "network",
    "peered",
    "tcp",
    "fanout",
    "containers",
    "glob",
    "results",
    "storing",
    "buckets",
    "urls",
    "gateway",
    "killed",
)
CASE_SECONDS = 300
"""A case may take so long, unless it has `SECONDS` of its own."""


def plan(names: list[str]) -> list[tuple[str, str]]:
    """The (case, executor) pairs to run, in the table's order."""
    unknown = set(names) - set(CASES)
    if unknown:
        raise SystemExit(f"no such case: {', '.join(sorted(unknown))}; there are {', '.join(CASES)}")
    chosen = [name for name in CASES if name in names or not names]
    return [(name, one) for name in chosen for one in importlib.import_module(f"tests.bench.cases.{name}").EXECUTORS]


def environment(executor: str, folder: Path) -> dict[str, str]:
    """A case's environment: an empty data folder, modules that stay compiled, and for "local" no Docker daemon."""
    paths = [str(harness.ROOT), str(harness.ROOT / "node"), os.environ.get("PYTHONPATH", "")]
    own = {"BACALHAU_DIR": str(folder), "PYTHONPATH": os.pathsep.join(filter(None, paths)), "IPYTHONDIR": str(folder)}
    own["PYTHONDONTWRITEBYTECODE"] = ""  # else every kernel compiles all that it imports, which no user's does
    return os.environ | own | ({"DOCKER_HOST": harness.NOWHERE} if executor == "local" else {})


def run_case(name: str, executor: str) -> bool:
    """Run one case in a process of its own; whether it came to its end."""
    seconds = getattr(importlib.import_module(f"tests.bench.cases.{name}"), "SECONDS", CASE_SECONDS)
    print(f"{name} ({executor}) …", flush=True)
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        command = [sys.executable, "-m", "tests.bench.child", name, executor]
        env = environment(executor, Path(folder))
        with subprocess.Popen(command, env=env, start_new_session=True) as child:
            try:
                return child.wait(seconds) == 0
            except subprocess.TimeoutExpired:
                print(f"{name} ({executor}) did not end within {seconds} s", flush=True)
                return False
            finally:
                end_session(child.pid)


def end_session(session: int) -> None:
    """Kill what a case has left running: pools of peers often outlive their caller."""
    with suppress(ProcessLookupError):
        os.killpg(session, signal.SIGKILL)


def write_table() -> None:
    """Write BENCHMARKS.md from the last run of every case."""
    kept = {(run.case, run.executor): run for run in map(harness.load, harness.OUT.glob("*.json"))}
    runs = [kept[pair] for pair in plan([]) if pair in kept]
    if not runs:
        return
    text = harness.TABLE.read_text() if harness.TABLE.exists() else "# Benchmarks\n\n"
    head = text.split(harness.BEGIN)[0]
    harness.TABLE.write_text(f"{head}{harness.BEGIN}\n\n{harness.report(runs)}\n")
    print(harness.table(runs))


def main(names: list[str]) -> int:
    """Run, write; the number of cases that did not end well."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # cases end with us
    broken = [pair for pair in plan(names) if not run_case(*pair)]
    write_table()
    for name, executor in broken:
        print(f"{name} ({executor}) gave no figures")
    return len(broken)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
