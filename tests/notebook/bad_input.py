"""Cells that must fail well: what they do, what their reader is told, and that nothing stays behind.

    python -m tests.notebook.bad_input      # runs them all and writes artifacts/bad-input.md

An `Item` is one cell with its bad input. `Referee` runs it in a real kernel and tells what was read, what of the
job was kept, and what of it is still there. `test_bad_input.py` holds that against the item.
"""

from __future__ import annotations

import os
import re
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import docker

from tests.images import shell_image
from tests.notebook.kernels import COLOUR, NO_DOCKER, ROOT, Kernel, Shown
from tests.services import docker_daemon

EXECUTORS = ("docker", "sandbox", "process")
NO_DAEMON = EXECUTORS[1:]
NO_SANDBOX = {"PATH": str(Path(sys.executable).parent)}
"""The environment of a kernel that finds no bubblewrap."""
SECONDS = 90
"""How long what is left of a job may take to go: generous, since the machine may be busy."""
RECORDS = {"journal.sqlite", "lock", "docker-works"}
"""Files of a node that outlive it."""
REPORT = ROOT / "artifacts" / "bad-input.md"


@dataclass(frozen=True, kw_only=True)
class Item:
    """One bad input.

    `cell` may hold `{data}`, a folder with a.csv, b.csv and c.csv, which `spoil` may have changed, and `{image}`, an
    image without Python. `says`: regular expressions that what stands below the cell must match. `kept`: what
    `j.result(partial=True).values()` must be; None where no job may come to be. Once `cue` stands below the cell,
    `then` happens: Stop, or a change of b.csv.
    """

    name: str
    cell: str
    says: tuple[str, ...] = ()
    kept: str | None = None
    spoil: Callable[[Path], object] | None = None
    cue: str = ""
    then: Literal["stop", "change"] = "stop"
    executors: tuple[str, ...] = EXECUTORS
    slow: bool = False


# --- how a folder is spoilt ---


def _socket(data: Path) -> None:
    with socket.socket(socket.AF_UNIX) as one:
        here = Path.cwd()
        os.chdir(data)  # the path of a socket must be short
        one.bind("d.csv")
        os.chdir(here)


def _link(target: str, data: Path) -> None:
    (data / "d.csv").symlink_to(target)


def _name(name: bytes, data: Path) -> None:
    (data / "b.csv").rename(data / os.fsdecode(name))


# --- the list ---

INPUT = "%%bacalhau -i '{data}' --glob '*.csv' --shards 3 -o j"


def _refused(name: str, line: str, *says: str, body: str = "1", spoil: Callable[[Path], object] | None = None) -> Item:
    """A cell that makes no job."""
    return Item(name=name, cell=f"%%bacalhau {line}\n{body}", says=says, spoil=spoil)


def _one_of_three(
    name: str,
    bad: str,
    *says: str,
    options: str = "",
    kept: str = "[0, 2]",
    cue: str = "",
    executors: tuple[str, ...] = EXECUTORS,
    slow: bool = False,
) -> Item:
    """A job of three shards of which the middle one does something bad."""
    body = f"import os, time\nif shard.index == 1:\n    {bad}\nshard.index"
    cell = f"%%bacalhau --shards 3 -o j {options}\n{body}"
    return Item(name=name, cell=cell, says=says, kept=kept, cue=cue, executors=executors, slow=slow)


def _hopeless(name: str, options: str, *says: str, executors: tuple[str, ...] = EXECUTORS) -> Item:
    """A job that no node can run."""
    cell = f"%%bacalhau --shards 3 -o j {options}\n1"
    return Item(name=name, cell=cell, says=says, kept="JobFailed", executors=executors)


def _odd_name(name: str, bad: bytes) -> Item:
    """No error at all: such files are files."""
    return Item(
        name=name,
        cell=f"{INPUT}\nshard.index, inputs[0].read_text(), inputs[0].name == {os.fsdecode(bad)!r}",
        kept="[[0, 'a', False], [1, 'b', True], [2, 'c', False]]",
        spoil=partial(_name, bad),
    )


CHANGED = "if shard.index == 1:\n    print('on')\n    while inputs[0].stat().st_size == 1: pass\nshard.index"

INPUTS = (
    _refused("no such folder", "-i '{data}x'", r"--input .*x: no such file or folder; did you mean data"),
    _refused(
        "no such file for all shards",
        "--with '{data}/a.cvs'",
        r"--with .*a\.cvs: no such file or folder; did you mean a\.csv",
    ),
    _refused("a glob without a match", "-i '{data}' --glob '*.tsv'", r"'\*.tsv' matches none of the 3", "  a.csv"),
    _refused("a folder without files", "-i '{data}/new'", "no files", spoil=lambda data: (data / "new").mkdir()),
    _refused("a link to nothing", "-i '{data}'", "d.csv is a link to .*gone.* mend it", spoil=partial(_link, "gone")),
    _refused("a link to itself", "-i '{data}'", "d.csv is a link to .* mend it", spoil=partial(_link, "d.csv")),
    _refused("a link that leads out", "-i '{data}'", "d.csv .*leads out", spoil=partial(_link, "/etc/passwd")),
    _refused("a socket among the files", "-i '{data}'", "d.csv is a socket, not a file", spoil=_socket),
    Item(
        name="a file that only its owner may read",
        cell=f"{INPUT}\ninputs[0].read_text()",
        kept="['a', 'b', 'c']",
        spoil=lambda data: (data / "b.csv").chmod(0o600),
    ),
    Item(
        name="a file that can't be read when its turn comes",
        cell="%%bacalhau -i /proc/self/mem -o j\n1",
        says=("shard 0: /proc/self/mem can't be given to the shard: Input/output error",),
        kept="JobFailed",
        executors=("docker",),
    ),
    Item(
        name="a file that changes while the job runs",
        cell=f"{INPUT}\n{CHANGED}",
        says=("shard 1: .*b.csv changed while the job ran", "run the job again", r"2 finished: j\.result"),
        kept="[0, 2]",
        cue="on",
        then="change",
    ),
    _odd_name("a name with a newline", b"b\nb.csv"),
    _odd_name("a name with quotes", b"b'\"b.csv"),
    _odd_name("a name that is no text", b"b\xffb.csv"),
    Item(
        name="an error about a file whose name is no text",
        cell=f"{INPUT}\nif shard.index == 1: raise ValueError(inputs[0].name)\nshard.index",
        says=(r"ValueError: b\\udcffb.csv in shard 1", r"input 'b\\udcffb.csv'"),
        kept="[0, 2]",
        spoil=partial(_name, b"b\xffb.csv"),
    ),
)

LINES = (
    _refused(
        "a syntax error", "", r"Cell In\[\d+\], line 3", r"SyntaxError: '\(' was never closed", body="x = 1\ny = (2"
    ),
    _refused("a notebook-only name", "", "line 2: `theirs` .* add --vars theirs", body="theirs + 1"),
    _refused("an unknown option", "--sharts 3", "unknown option --sharts; did you mean --shards"),
    _refused("an abbreviated option", "--sha 3", "unknown option --sha; did you mean --shards"),
    _refused("--shards 0", "--shards 0", "--shards 0: at least 1"),
    _refused("--shards ten", "--shards ten", "--shards ten: not a whole number"),
    _refused("-input x", "-input x", "unknown option -input; did you mean --input"),
    _refused("--memory lots", "--memory lots", "--memory lots: not a size; write 500MB"),
    _hopeless("--memory 10TB", "--memory 10TB", "--memory 10 TB: this node can give a shard at most"),
    _hopeless("--gpu without a GPU", "--gpu", "--gpu: this node has no GPU"),
    _hopeless(
        "a missing image", "--image no/such:image", "no/such:image is not here", "pull it", executors=("docker",)
    ),
    _hopeless(
        "an image without Python",
        "--image {image}",
        "no Python in the image",
        "cells need one, --raw does not",
        executors=("docker",),
    ),
    _hopeless("--image without Docker", "--image a:b", "--image a:b", "no Docker daemon", executors=NO_DAEMON),
    _hopeless(
        "--isolation container without Docker",
        "--isolation container",
        "--isolation container",
        "no Docker daemon",
        executors=NO_DAEMON,
    ),
)

BODIES = (
    _one_of_three(
        "a cell that prints 1 GB in long lines",
        "for n in range(1000): print('x' * 10**6)",
        "left out|lines more",
        kept="[0, 1, 2]",
        slow=True,
    ),
    _one_of_three(
        "a cell that prints 1 GB in short lines",
        "for n in range(10_000): print('\\n'.join(['x' * 99] * 1000))",
        r"lines more: j\.logs\(1\)",
        kept="[0, 1, 2]",
        slow=True,
    ),
    _one_of_three("a cell that forks a bomb", "while True: os.fork()", "in shard 1|shard 1:", "processes", slow=True),
    _one_of_three(
        "a cell that fills the disk",
        "open(outputs / 'x', 'wb').write(bytes(200_000_000))",
        "shard 1: the shard wrote more than its disk limit of 50 MB: raise it with --disk",
        options="--disk 50MB",
    ),
    _one_of_three(
        "a cell that fills the disk with small files",
        "for n in range(10**6): (outputs / str(n)).write_bytes(bytes(10**6))",
        "shard 1: the shard wrote more than its disk limit of 50 MB: raise it with --disk",
        options="--disk 50MB",
    ),
    _one_of_three(
        "a cell that never ends, with --timeout",
        "while True: pass",
        "shard 1: the shard ran longer than its --timeout of 1 s: give it more",
        options="--timeout 1",
    ),
    _one_of_three(
        "a cell that never ends and hears no signal",
        "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)",
        "shard 1: the shard ran longer than its --timeout of 1 s: give it more",
        options="--timeout 1",
    ),
    _one_of_three(
        "a job that never ends, with --job-timeout",
        "time.sleep(600)",
        "ran longer than its --job-timeout of 10 s; 2 finished",
        options="--job-timeout 10",
    ),
    _one_of_three(
        "a cell that never ends, with Stop",
        "print('on'); time.sleep(600)",
        r"JobInterrupted: job j-\w{8} stopped; 1 of 3 shards finished: j\.result\(partial=True\)",
        options="--parallel 1",
        kept="[0]",
        cue="on",
    ),
    _one_of_three("a cell that kills itself", "os.kill(os.getpid(), 9)", r"shard 1: .*SIGKILL\n.*2 attempts"),
    _one_of_three("a cell that kills what runs it", "os.kill(os.getppid(), 9); time.sleep(600)", "shard 1: .*SIGKILL"),
    _one_of_three(
        "a cell that crashes Python",
        "__import__('ctypes').string_at(0)",
        "killed by SIGSEGV",
        r"----> 4     __import__",
    ),
    _one_of_three("a cell that exits with 3", "raise SystemExit(3)", "shard 1: the cell ended with exit code 3"),
    _one_of_three("a process that exits with 3", "os._exit(3)", "shard 1: the process ended with exit code 3"),
    _one_of_three(
        "a cell that is killed for memory",
        "x = bytearray(10**9)",
        "shard 1: the shard used more than its memory limit of 300 MB: give it more with --memory",
        options="--memory 300MB",
    ),
    _one_of_three("an exception", "{{}}['x']", "KeyError: 'x' in shard 1", r"----> 4     {}\['x'\]"),
)

LOCK = "import threading\nthreading.Lock() if shard.index == 1 else shard.index"
FRAME = "import pandas as pd\npd.DataFrame({{'a': [1]}}) if shard.index == 1 else shard.index"
DF = "%%bacalhau --shards 3 -o j --df t"

VALUES = (
    Item(
        name="an object that can't travel",
        cell=f"%%bacalhau --shards 3 -o j\n{LOCK}",
        says=("repr of a lock; the object itself stayed in the shard",),
        kept="[0, <unlocked _thread.lock",
    ),
    Item(
        name="an object that can't travel, with --df",
        cell=f"{DF}\n{LOCK}",
        says=("shard 1 returned a lock, which has no rows", r"\(result = j\.result\(\)\)"),
        kept="[0, <unlocked _thread.lock",
    ),
    Item(
        name="an object that can't be shown",
        cell="%%bacalhau --shards 3 -o j\nclass A:\n    def __repr__(self): 1 / 0\nA() if shard.index == 1 else 0",
        says=("repr failed with ZeroDivisionError",),
        kept="[0, <A object whose repr failed",
    ),
    Item(
        name="an int here and a str there",
        cell=f"{DF}\n'one' if shard.index == 1 else shard.index",
        says=("shard 0 returned an int, shard 1 a str; .* same kind", r"\(result = j\.result\(\)\)"),
        kept="[0, 'one', 2]",
    ),
    Item(
        name="an int here and a frame there",
        cell=f"{DF}\n{FRAME}",
        says=("shard 0 returned an int, shard 1 a DataFrame; .* same kind", r"\(result = j\.result\(\)\)"),
        kept="[0, a 0 1, 2]",
    ),
    Item(
        name="a shard that fails, with --partial",
        cell=f"{DF} --partial\n1 / (shard.index - 1)",
        says=("ZeroDivisionError: division by zero in shard 1", "----> 2 1 / ", "2 finished", "value\\n0"),
        kept="[-1.0, 1.0]",
    ),
    Item(
        name="a --reduce that fails",
        cell=f"{DF} --reduce \"df.groupby('nope').sum()\"\n{{{{'a': 1}}}}",
        says=(r"--reduce df.groupby\('nope'\).sum\(\): KeyError: 'nope'", r"\(result = j\.result\(\)\)"),
        kept="[{'a': 1}, {'a': 1}, {'a': 1}]",
    ),
)

ITEMS = (*INPUTS, *LINES, *BODIES, *VALUES)


# --- one item in a kernel ---


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What stood below the cell, how many jobs came of it, what was kept, and what was left of them."""

    text: str
    jobs: int
    kept: str
    left: tuple[str, ...]
    seconds: float

    @property
    def first(self) -> str:
        """The line that is read first."""
        return next((line for line in self.text.splitlines() if not line.startswith("[shard ")), "")


class Referee:
    """A kernel whose jobs run with one executor, and eyes outside of it."""

    def __init__(self, folder: Path, *, executor: str, docker_host: str | None) -> None:
        self.folder, self.executor = folder, executor
        self._docker = docker_host if executor == "docker" else None
        self.environment = {"DOCKER_HOST": self._docker or NO_DOCKER, "TMPDIR": str(folder / "tmp")}
        self.environment |= NO_SANDBOX if executor == "process" else {}
        self._count = 0
        (folder / "tmp").mkdir()
        self.kernel = Kernel(folder, **self.environment)

    def load(self) -> None:
        """Load the extension, and see that it is this executor that jobs get."""
        assert not self.kernel.run("%load_ext bacalhau_jupyter\nimport bacalhau_jupyter as bj").error
        assert self.executor in self.kernel.run("%bacalhau nodes").text()

    def judge(self, item: Item) -> Reading:
        """Run one item to its end, in a folder of its own."""
        data, image = self._data(item), shell_image(self._docker) if self._docker else ""
        before = self._jobs()
        self.kernel.run("j, theirs = None, 3")
        start = time.monotonic()
        shown = self.kernel.send(item.cell.format(data=data, image=image))
        if item.cue:
            self.kernel.until(lambda: item.cue in shown.text() or shown.idle)
            self._disturb(item, data)
        self.kernel.until(lambda: shown.idle)
        seconds = time.monotonic() - start
        made = self._jobs() - before
        kept = self.kernel.run("j and j.result(partial=True).values()")
        return Reading(
            text=_text(shown),
            jobs=len(made),
            kept=re.sub(r"\s+", " ", kept.value or kept.error.rpartition("\n")[2]),
            left=self._left(made),
            seconds=seconds,
        )

    def works(self) -> bool:
        """Whether the kernel and its next job do."""
        return "shard 0: 42" in self.kernel.run("%%bacalhau --progress none\n41 + 1").value

    def _jobs(self) -> set[str]:
        return set(re.findall(r"j-[0-9a-f-]+", self.kernel.run("[line.job for line in bj.jobs()]").value))

    def _data(self, item: Item) -> Path:
        self._count += 1
        data = self.folder / f"data {self._count}"
        data.mkdir()
        for name in "abc":
            (data / f"{name}.csv").write_text(name)
        if item.spoil:
            item.spoil(data)
        return data

    def _disturb(self, item: Item, data: Path) -> None:
        if item.then == "stop":
            self.kernel.interrupt()
        else:
            (data / "b.csv").write_text("longer than it was")

    # --- what stays behind ---

    def _left(self, jobs: set[str]) -> tuple[str, ...]:
        """What is still there of these jobs once it has had time to go."""
        return _after_a_while(lambda: [one for job in jobs for one in self._traces(job)])

    def _traces(self, job: str) -> Iterator[str]:
        yield from (f"process {name}" for name in _processes(f"BACALHAU_JOB_ID={job}"))
        yield from (f"container {name}" for name in self._containers(f"io.bacalhau-jupyter.job={job}"))
        yield from (f"mount {line}" for line in _mounts() if job in line)
        yield from (f"file {path}" for path in _files(self.folder / "data") if job in path)

    def still_running(self) -> tuple[str, ...]:
        """What runs on although the kernel has ended."""
        return _after_a_while(lambda: [*self._own_processes(), *self._own_containers(every=False)])

    def left_by_the_kernel(self) -> tuple[str, ...]:
        """What is still there, once the kernel has ended, of everything that it started or made but its records."""
        return _after_a_while(lambda: [*self._own_processes(), *self._own_containers(every=True), *self._own_files()])

    def _own_processes(self) -> Iterator[str]:
        for variable in ("BACALHAU_DIR", "TMPDIR"):
            yield from (f"process {name}" for name in _processes(f"{variable}={self.folder}"))

    def _own_containers(self, *, every: bool) -> Iterator[str]:
        for node in self._nodes():
            found = self._containers(f"io.bacalhau-jupyter.node={node.name}", every=every)
            yield from (f"container {name}" for name in found)

    def _own_files(self) -> Iterator[str]:
        yield from (f"mount {line}" for line in _mounts() if str(self.folder) in line)
        yield from (f"file {path}" for path in _files(self.folder / "tmp"))
        yield from (f"file {path}" for path in _files(self.folder / "data" / "store" / "tmp"))
        for node in self._nodes():
            files = (path for path in map(Path, _files(node)) if not path.is_dir())
            yield from (f"file {path}" for path in files if path.name not in RECORDS)

    def _nodes(self) -> list[Path]:
        return list((self.folder / "data" / "nodes").iterdir())

    def _containers(self, label: str, *, every: bool = True) -> list[str]:
        if self._docker is None:
            return []
        api = docker.APIClient(base_url=self._docker)
        try:
            return [one["Names"][0] for one in api.containers(all=every, filters={"label": label})]
        finally:
            api.close()


def _processes(variable: str) -> Iterator[str]:
    """Processes in whose environment a variable begins like that."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            environment = (process / "environ").read_bytes().split(b"\0")
        except OSError:  # it ended meanwhile, or is another user's
            continue
        if any(one.startswith(variable.encode()) for one in environment):
            yield process.name


def _mounts() -> list[str]:
    return Path("/proc/mounts").read_text().splitlines()


def _files(folder: Path) -> Iterator[str]:
    for base, folders, files in os.walk(folder):
        yield from (f"{base}/{name}" for name in (*folders, *files))


def _after_a_while(look: Callable[[], list[str]]) -> tuple[str, ...]:
    deadline = time.monotonic() + SECONDS
    while (left := look()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return tuple(left)


def _text(shown: Shown) -> str:
    """What the cell printed, then its error, or its value."""
    parts = (shown.text(), shown.text("stderr"), shown.error, shown.value)
    return COLOUR.sub("", "\n".join(part.rstrip("\n") for part in parts if part))


@contextmanager
def referee(folder: Path, executor: str, docker_host: str | None) -> Iterator[Referee]:
    """A referee whose kernel ends with the block."""
    one = Referee(folder, executor=executor, docker_host=docker_host)
    try:
        one.load()
        yield one
    finally:
        one.kernel.close()


# --- the table ---


def table(executors: tuple[str, ...], docker_host: str | None) -> Iterator[str]:
    """The rows of a Markdown table: every item with every executor."""
    yield "| bad input | executor | what is read first | kept | left behind |"
    yield "|---|---|---|---|---|"
    for executor in executors:
        with tempfile.TemporaryDirectory(prefix="bad-input-", ignore_cleanup_errors=True) as name:
            with referee(Path(name), executor, docker_host) as judge:
                for item in ITEMS:
                    if executor in item.executors:
                        yield _row(item, executor, judge.judge(item), Path(name))
            left = ", ".join(judge.left_by_the_kernel()) or "nothing"
            yield f"| the end of the kernel | {executor} | | | {left} |"


def _row(item: Item, executor: str, reading: Reading, folder: Path) -> str:
    cells = (
        item.name,
        executor,
        f"`{reading.first.replace(str(folder), '…')[:200]}`",
        f"`{reading.kept[:40]}`" if item.kept else "no job",
        ", ".join(reading.left) or "nothing",
    )
    return f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |"


def main() -> None:
    """Write the table of this machine."""
    with docker_daemon() as host:
        rows = []
        for row in table(EXECUTORS if host else NO_DAEMON, host):
            print(row, flush=True)
            rows.append(row)
    REPORT.parent.mkdir(exist_ok=True)
    REPORT.write_text("\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
