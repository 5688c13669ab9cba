"""What every executor must do: one suite, run over each of them.

A test module makes a fixture `bench` (a `ShardBench` over its executor, closed afterwards) and a
subclass of `ExecutorContract`; pytest collects the rest from here. Each method is one rule.
Longer than 400 lines because it is one suite: a list of short rules over the same bench.
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import textwrap
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

from bacalhau_node.ids import Execution, JobId
from bacalhau_node.masking import Secrets
from bacalhau_node.ports import Executor, ExecutorEvent, RawOutcome, ShardLines, ShardStarted, ShardTask, StagedFile
from bacalhau_node.spec import JobSpec, PythonCell, Resources

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

DEADLINE: Final = 60.0
"""Seconds that anything in the suite may take on a machine that is busy."""
PROMPT: Final = 10.0
"""Seconds within which a kill must have taken effect; the promise is one second on an idle machine."""
MB: Final = 1024 * 1024


def job_number(number: int) -> JobId:
    """A job id made from a number."""
    return f"j-00000000-0000-4000-8000-{number:012x}"


class ShardBench:
    """Turns source text into executions of one executor. `folder` is on the store's file system."""

    def __init__(self, executor: Executor, folder: Path) -> None:
        self.executor = executor
        self.folder = folder
        self._bundles: dict[tuple[Any, ...], Path] = {}
        self._count = 0

    async def run(
        self,
        source: str,
        *,
        on_event: Callable[[ExecutorEvent], None] = lambda _: None,
        **options: Any,
    ) -> RawOutcome:
        """Run one shard of `source`; options as for `task`."""
        async with asyncio.timeout(DEADLINE):
            return await self.executor.run(self.task(source, **options), on_event)

    def task(
        self,
        source: str,
        *,
        shard: int = 0,
        job: int | None = None,
        files: Mapping[str, str] | None = None,
        variables: Mapping[str, bytes] | None = None,
        imports: tuple[str, ...] = (),
        resources: Resources | None = None,
        **spec: Any,
    ) -> ShardTask:
        """One execution of `source`; `job` counts jobs, by default one for each source (a job has one cell)."""
        self._count += 1
        source = textwrap.dedent(source)
        bundle = self._bundle(source, variables or {}, imports)
        number = job if job is not None else list(self._bundles.values()).index(bundle) + 1000
        scratch = self.folder / f"scratch-{self._count}"
        scratch.mkdir()
        cell = PythonCell(bundle=f"bundle-{number}", name="<cell>", line_offset=1, imports=imports)
        return ShardTask(
            execution=Execution(job_number(number), shard, self._count),
            spec=JobSpec(task=cell, resources=resources or Resources(), **spec),
            count=7,
            files=self._stage(files or {}),
            scratch=scratch,
            bundle=bundle,
        )

    def _bundle(self, source: str, variables: Mapping[str, bytes], imports: tuple[str, ...]) -> Path:
        key = source, imports, *sorted(variables.items())
        if key not in self._bundles:
            bundle = self._bundles[key] = self.folder / f"bundle-{len(self._bundles)}"
            (bundle / "vars").mkdir(parents=True)
            (bundle / "cell.py").write_text(source)
            for name, data in variables.items():
                (bundle / "vars" / name).write_bytes(data)
        return self._bundles[key]

    def _stage(self, files: Mapping[str, str]) -> tuple[StagedFile, ...]:
        folder = self.folder / f"files-{self._count}"
        staged = []
        for name, text in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            staged.append(StagedFile(path, f"/inputs/{name}", name, len(text)))
        return tuple(staged)


def value_bytes(outcome: RawOutcome) -> bytes:
    """The bytes of a value, wherever they lie."""
    assert outcome.ok, outcome.error
    data = outcome.value.data
    return data.read_bytes() if isinstance(data, Path) else data


def _holding(folder: Path, data: bytes) -> list[Path]:
    """The files below `folder` that hold these bytes."""
    paths = (Path(base, name) for base, _, names in os.walk(folder) for name in names)
    return [path for path in paths if path.is_file() and not path.is_symlink() and data in path.read_bytes()]


def value(outcome: RawOutcome) -> Any:
    """A JSON value."""
    assert outcome.value.kind in ("json", "none"), outcome
    return json.loads(value_bytes(outcome)) if outcome.value.kind == "json" else None


def text_of(events: list[ExecutorEvent], stream: str = "stdout") -> str:
    """All text of one stream, in the order of its events."""
    return "".join(event.text for event in events if isinstance(event, ShardLines) and event.stream == stream)


def failure(outcome: RawOutcome) -> tuple[str, str]:
    """Kind and message of a failed shard."""
    assert not outcome.ok
    assert outcome.error is not None
    return outcome.error.kind, outcome.error.message


async def until(condition: Callable[[], object], *, seconds: float = DEADLINE) -> None:
    """Return once `condition()` is true; fail when it is not within `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s"
        await asyncio.sleep(0.01)


def processes_with(word: str) -> list[int]:
    """The processes of this machine, those in containers included, whose command line holds `word`."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                if word.encode() in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue  # it ended while we looked
    return found


class ValueContract:
    """What a cell's last expression becomes."""

    async def test_plain_values_travel_as_json(self, bench: ShardBench) -> None:
        """Numbers, text, lists and dicts come back equal."""
        source = "{'a': [1, 2.5, None, True], 'ü': 'ß\\n'}"
        outcome = await bench.run(source)
        assert value(outcome) == {"a": [1, 2.5, None, True], "ü": "ß\n"}
        assert outcome.value.type == "dict"

    async def test_a_statement_or_a_semicolon_leaves_no_value(self, bench: ShardBench) -> None:
        """As in a notebook; a semicolon in a string or a comment mutes nothing."""
        for source in ("x = 1", "5;", "5 ;  # really", "None", "", "# nothing"):
            outcome = await bench.run(source)
            assert (outcome.ok, outcome.value.kind) == (True, "none"), source
        for source in ("'a;'", "5  # no; not muted", "(\n5\n)"):
            assert (await bench.run(source)).value.kind == "json", source

    async def test_numbers_of_numpy_travel_as_json(self, bench: ShardBench) -> None:
        """Also inside of lists and dicts, where they are most often met."""
        source = "import numpy as np\n{'n': np.int64(3), 'm': [np.float32(0.5)], 'b': np.bool_(True)}"
        outcome = await bench.run(source, imports=("numpy",))
        assert value(outcome) == {"n": 3, "m": [0.5], "b": True}

    async def test_values_that_are_not_finite_travel(self, bench: ShardBench) -> None:
        """As Python's JSON writes them."""
        outcome = await bench.run("[float('nan'), float('inf'), (1, 2)]")
        first, second, third = value(outcome)
        assert first != first  # noqa: PLR0124 - only NaN differs from itself
        assert (second, third) == (float("inf"), [1, 2])

    async def test_bytes_travel_as_they_are(self, bench: ShardBench) -> None:
        """All 256 of them."""
        outcome = await bench.run("bytes(range(256))")
        assert (outcome.value.kind, value_bytes(outcome)) == ("bytes", bytes(range(256)))

    async def test_an_array_travels_without_pickle(self, bench: ShardBench) -> None:
        """In NumPy's own format."""
        import numpy as np  # noqa: PLC0415 - an optional dependency of the package

        outcome = await bench.run("import numpy as np\nnp.arange(12, dtype='i2').reshape(3, 4)", imports=("numpy",))
        assert outcome.value.kind == "npy"
        array = np.load(io.BytesIO(value_bytes(outcome)), allow_pickle=False)
        assert array.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
        assert array.dtype == np.int16

    async def test_a_frame_comes_back_equal(self, bench: ShardBench) -> None:
        """With its index of two levels, categories, time zone and missing integers."""
        import pandas as pd  # noqa: PLC0415 - an optional dependency of the package

        source = FRAME + "frame"
        outcome = await bench.run(source, imports=("pandas",))
        names: dict[str, Any] = {}
        exec(FRAME, names)  # noqa: S102 - the same source makes what is expected
        assert (outcome.value.kind, outcome.value.type) == ("arrow", "DataFrame")
        pd.testing.assert_frame_equal(read_table(value_bytes(outcome)).to_pandas(), names["frame"])

    async def test_a_series_comes_back_with_its_index_and_name(self, bench: ShardBench) -> None:
        """As a table of one column; the type tells."""
        source = "import pandas as pd\npd.Series([1, 2], index=['a', 'b'], name='n')"
        outcome = await bench.run(source, imports=("pandas",))
        frame = read_table(value_bytes(outcome)).to_pandas()
        assert (outcome.value.type, frame["n"].to_dict()) == ("Series", {"a": 1, "b": 2})

    async def test_a_column_that_cannot_travel_is_named(self, bench: ShardBench) -> None:
        """With what to do about it."""
        source = "import pandas as pd\npd.DataFrame({'good': [1, 2], 'bad': [1, 'x']})"
        kind, message = failure(await bench.run(source, imports=("pandas",)))
        assert kind == "output"
        assert "'bad'" in message
        assert "astype" in message

    async def test_variables_arrive_as_what_they_were(self, bench: ShardBench) -> None:
        """A value of a shard, stored as a variable, is the same object in the next job."""
        source = "import pandas as pd\npd.Series([1.5, None], index=pd.Index(['a', 'b'], name='key'))"
        series = await bench.run(source, imports=("pandas",))
        variables = {"series.arrow": value_bytes(series), "number.json": b"[1, 2]", "raw.bytes": b"\x00\xff"}
        check = (
            "import pandas as pd\n"
            "expected = pd.Series([1.5, None], index=pd.Index(['a', 'b'], name='key'))\n"
            "pd.testing.assert_series_equal(series, expected)\n"
            "[number, list(raw), series.name]"
        )
        assert value(await bench.run(check, imports=("pandas",), variables=variables)) == [[1, 2], [0, 255], None]

    async def test_anything_else_is_its_repr(self, bench: ShardBench) -> None:
        """Also a dict that JSON would change, and an object whose repr fails."""
        for source, text in (
            ("object", "<class 'object'>"),
            ("{1: 2}", "{1: 2}"),
            ("{3}", "{3}"),
            ("class Odd:\n  def __repr__(self): return 1 / 0\nOdd()", "<Odd object whose repr failed"),
        ):
            outcome = await bench.run(source)
            assert outcome.value.kind == "repr"
            assert value_bytes(outcome).decode().startswith(text)

    async def test_a_picture_travels_as_mime(self, bench: ShardBench) -> None:
        """An object that draws itself, as a notebook would show it."""
        source = "class Figure:\n  def _repr_png_(self): return b'\\x89PNG'\nFigure()"
        outcome = await bench.run(source)
        bundle = json.loads(value_bytes(outcome))
        assert (outcome.value.kind, bundle["image/png"]) == ("mime", "iVBORw==")
        assert "Figure object" in bundle["text/plain"]

    async def test_what_pyplot_has_drawn_travels_where_there_is_no_other_value(self, bench: ShardBench) -> None:
        """As a notebook shows it below a cell that ends with `plt.show()` or `plt.plot(…)`."""
        pyplot = (
            "import sys, types\n"
            "class Figure:\n  def savefig(self, file, **_): file.write(b'\\x89PNG')\n"
            "sys.modules['matplotlib.figure'] = types.SimpleNamespace(Figure=Figure)\n"
            "sys.modules['matplotlib.pyplot'] = types.SimpleNamespace(get_fignums=lambda: [1], gcf=Figure)\n"
        )
        for source, kind in (
            ("None", "mime"),
            ("[object()]", "mime"),
            ("x = 1", "none"),
            ("5;", "none"),
            ("5", "json"),
        ):
            outcome = await bench.run(pyplot + source)
            assert (outcome.ok, outcome.value.kind) == (True, kind), source

    async def test_large_values_lie_in_the_scratch_folder(self, bench: ShardBench) -> None:
        """50 MB of bytes, and a text over the inline limit."""
        outcome = await bench.run("b'abcdefgh' * (50 * 1024 * 128)")
        assert isinstance(outcome.value.data, Path)
        assert outcome.value.data.stat().st_size == 50 * MB
        assert value(await bench.run("'x' * 100_000")) == "x" * 100_000

    async def test_awaiting_at_the_top_level_works(self, bench: ShardBench) -> None:
        """The whole cell shares one event loop."""
        source = (
            "import asyncio\ntask = asyncio.ensure_future(asyncio.sleep(0, 'done'))\nx = await task\n(x, await task)"
        )
        assert value(await bench.run(source)) == ["done", "done"]

    async def test_future_imports_hold_for_the_last_expression(self, bench: ShardBench) -> None:
        """The two halves of a cell are compiled alike."""
        source = "from __future__ import annotations\ndef f(x: Unknown): ...\nf.__annotations__"
        assert value(await bench.run(source)) == {"x": "Unknown"}


FRAME: Final = """
import pandas as pd
index = pd.MultiIndex.from_tuples([("a", 1), ("b", 2)], names=["k", None])
frame = pd.DataFrame(
    {
        "text": ["x", "ü"],
        "category": pd.Categorical(["u", "v"], categories=["v", "u"], ordered=True),
        "time": pd.to_datetime(["2020-01-01", "2021-06-01"]).tz_localize("Europe/Berlin"),
        "integer": pd.array([1, None], dtype="Int64"),
        "delta": pd.to_timedelta([1, 2], unit="s"),
    },
    index=index,
)
"""


def read_table(data: bytes) -> Any:
    """An Arrow IPC file."""
    import pyarrow as pa  # noqa: PLC0415 - an optional dependency of the package

    return pa.ipc.open_file(pa.BufferReader(data)).read_all()


class TextContract:
    """What a shard prints."""

    async def test_lines_arrive_before_the_shard_ends(self, bench: ShardBench) -> None:
        """Started first, then the line, while the shard still runs."""
        events: list[ExecutorEvent] = []
        source = "import time\nprint('first')\nwhile True: time.sleep(0.01)"
        running = asyncio.ensure_future(bench.run(source, on_event=events.append))
        await until(lambda: text_of(events) == "first\n")
        assert isinstance(events[0], ShardStarted)
        assert not running.done()
        running.cancel()
        await asyncio.wait({running})

    async def test_an_unfinished_line_arrives_too(self, bench: ShardBench) -> None:
        """A prompt or a progress dot is not held back until the newline."""
        events: list[ExecutorEvent] = []
        source = "import time\nprint('dots..', end='')\nwhile True: time.sleep(0.01)"
        running = asyncio.ensure_future(bench.run(source, on_event=events.append))
        await until(lambda: text_of(events) == "dots..")
        running.cancel()
        await asyncio.wait({running})

    async def test_text_is_whole_and_in_order(self, bench: ShardBench) -> None:
        """Both streams, a line of 100 kB, carriage returns and characters of several bytes."""
        events: list[ExecutorEvent] = []
        source = """
            import sys
            for number in range(2000): print(number, 'ü')
            print('€' * 40_000)
            print('10%\\r20%\\r', end='')
            print('wrong', file=sys.stderr)
        """
        outcome = await bench.run(source, on_event=events.append)
        expected = "".join(f"{number} ü\n" for number in range(2000)) + "€" * 40_000 + "\n10%\r20%\r"
        assert outcome.stdout.decode() == expected
        assert text_of(events) == expected
        assert (outcome.stderr, text_of(events, "stderr"), outcome.cut) == (b"wrong\n", "wrong\n", 0)

    async def test_text_of_child_processes_is_text_of_the_shard(self, bench: ShardBench) -> None:
        """They inherit the streams."""
        outcome = await bench.run("import subprocess\nsubprocess.run(['sh', '-c', 'echo out; echo err >&2'])\nNone")
        assert (outcome.stdout, outcome.stderr) == (b"out\n", b"err\n")

    async def test_too_much_text_is_cut_in_the_middle(self, bench: ShardBench) -> None:
        """Head and tail stay, what is missing is counted, and the value is not lost."""
        source = "for number in range(200_000): print(f'{number:099}')\n'value'"
        outcome = await bench.run(source)
        assert value(outcome) == "value"
        lines = outcome.stdout.splitlines()
        assert (int(lines[0]), int(lines[-1])) == (0, 199_999)
        assert 8 * MB < len(outcome.stdout) < 11 * MB
        assert outcome.cut + len(outcome.stdout) >= 20_000_000
        assert str(outcome.cut).encode() in outcome.stdout

    async def test_bytes_that_are_not_text_are_kept(self, bench: ShardBench) -> None:
        """Shown with replacement characters, stored as they are."""
        events: list[ExecutorEvent] = []
        outcome = await bench.run("import os\nos.write(1, b'\\xff\\xfe\\n')\nNone", on_event=events.append)
        assert (outcome.stdout, text_of(events)) == (b"\xff\xfe\n", "\ufffd\ufffd\n")


class EndContract:
    """How a shard can end."""

    async def test_exit_codes_are_reported(self, bench: ShardBench) -> None:
        """Those of `sys.exit` and of `os._exit`; 0 is a good end."""
        for source, code in (
            ("import sys\nsys.exit(3)", 3),
            ("import os\nos._exit(5)", 5),
            ("exit('no data')", 1),
        ):
            outcome = await bench.run(source)
            assert (outcome.ok, outcome.exit_code) == (False, code)
            assert failure(outcome)[0] == "exit"
        for source in ("import sys\nsys.exit()", "import sys\nsys.exit(0)", "import os\nos._exit(0)"):
            assert (await bench.run(source)).ok

    async def test_signals_are_named(self, bench: ShardBench) -> None:
        """Killed by itself, or by a bad pointer; the next shard is fine."""
        for source, name in (
            ("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)", "SIGKILL"),
            ("import ctypes\nctypes.string_at(0)", "SIGSEGV"),
        ):
            outcome = await bench.run(source)
            assert outcome.error is not None
            assert (outcome.error.kind, outcome.error.name) == ("signal", name)
            assert [frame.in_cell for frame in outcome.error.frames] == ([True, False] if name == "SIGSEGV" else [])
            assert outcome.stderr == b""
        assert (await bench.run("1")).ok

    async def test_an_exception_comes_with_the_lines_of_the_cell(self, bench: ShardBench) -> None:
        """Numbered as in the notebook, where line 1 is the magic; frames of the agent are left out."""
        source = "def inner(x):\n    return 1 / x\n\n\nprint('before')\ninner(0)\n"
        outcome = await bench.run(source)
        error = outcome.error
        assert error is not None
        assert (error.kind, error.name, error.message) == ("exception", "ZeroDivisionError", "division by zero")
        assert [(frame.file, frame.line, frame.function, frame.text, frame.in_cell) for frame in error.frames] == [
            ("<cell>", 7, "<module>", "inner(0)", True),
            ("<cell>", 3, "inner", "return 1 / x", True),
        ]
        assert (outcome.exit_code, outcome.stdout) == (1, b"before\n")

    async def test_an_exception_of_an_awaiting_cell_has_no_frames_of_the_loop(self, bench: ShardBench) -> None:
        """They would only hide the line that matters."""
        error = (await bench.run("import asyncio\nawait asyncio.sleep(0)\n{}['x']")).error
        assert error is not None
        assert [(frame.file, frame.line) for frame in error.frames] == [("<cell>", 4)]

    async def test_causes_and_notes_are_told(self, bench: ShardBench) -> None:
        """One line each."""
        source = """
            try:
                {}['x']
            except KeyError as first:
                raise ValueError('second') from first
        """
        error = (await bench.run(source)).error
        assert error is not None
        assert error.notes == ("caused by KeyError: 'x' (line 4)",)

    async def test_odd_exceptions_are_told_too(self, bench: ShardBench) -> None:
        """One whose text fails, one with a huge text, one of a thousand frames."""
        broken = "class Broken(Exception):\n  def __str__(self): return 1 / 0\nraise Broken"
        assert "could not be made" in failure(await bench.run(broken))[1]
        assert len(failure(await bench.run("raise ValueError('x' * 1_000_000)"))[1]) < 20_000
        deep = await bench.run("def f(): f()\nf()")
        assert deep.error is not None
        assert deep.error.name == "RecursionError"
        assert len(deep.error.frames) <= 40

    async def test_a_syntax_error_has_its_line(self, bench: ShardBench) -> None:
        """Numbered like every other line."""
        outcome = await bench.run("x = 1\ny = (\n")
        assert outcome.error is not None
        assert outcome.error.name == "SyntaxError"
        assert [(frame.line, frame.text, frame.in_cell) for frame in outcome.error.frames] == [(3, "y = (", True)]

    async def test_a_timeout_ends_the_shard(self, bench: ShardBench) -> None:
        """Also one that ignores signals; what it had printed is kept."""
        source = "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint('here')\nwhile True: pass"
        outcome = await bench.run(source, timeout=0.5)
        kind, message = failure(outcome)
        assert (kind, outcome.stdout) == ("timeout", b"here\n")
        assert "0.5 s" in message

    async def test_cancelling_kills_the_whole_tree(self, bench: ShardBench) -> None:
        """Within a second on an idle machine; the slot is usable afterwards."""
        marker = f"86400.{time.monotonic_ns()}"
        source = f"""
            import subprocess, time
            subprocess.Popen(['sleep', '{marker}'], start_new_session=True)
            subprocess.Popen(['sh', '-c', 'trap "" TERM; sleep {marker} & wait'])
            while True: time.sleep(0.01)
        """
        running = asyncio.ensure_future(bench.run(source, job=1))
        await until(lambda: len(processes_with(f"sleep\0{marker}")) == 2)
        running.cancel()
        await asyncio.wait({running}, timeout=PROMPT)
        assert running.cancelled()
        assert processes_with(marker) == []
        assert value(await bench.run("1", job=2)) == 1

    async def test_what_a_shard_leaves_running_is_ended(self, bench: ShardBench) -> None:
        """Processes that hid in a session of their own, and daemon threads; its value is not lost."""
        marker = f"86400.{time.monotonic_ns()}"
        source = f"""
            import subprocess, threading
            subprocess.Popen(['sh', '-c', 'sleep {marker} & sleep {marker} &'], start_new_session=True).wait()
            threading.Thread(target=threading.Event().wait, daemon=True).start()
            'value'
        """
        assert value(await bench.run(source)) == "value"
        assert processes_with(marker) == []

    async def test_threads_may_finish(self, bench: ShardBench) -> None:
        """What a thread prints after the last line of the cell is still the shard's."""
        source = "import threading, time\nthreading.Timer(0.2, print, ['late']).start()\n'value'"
        outcome = await bench.run(source)
        assert (value(outcome), outcome.stdout) == ("value", b"late\n")

    async def test_a_shard_that_kills_its_agent_harms_only_itself(self, bench: ShardBench) -> None:
        """A clear error for it, and the next shard runs."""
        kill_parent = "import os, signal\nwhile shard.index == 0: os.kill(os.getppid(), signal.SIGKILL)\n1"
        assert failure(await bench.run(kill_parent))[0] in ("signal", "node")
        assert value(await bench.run(kill_parent, shard=1)) == 1
        kill_agent = """
            import os, signal
            parent = open(f'/proc/{os.getppid()}/stat').read().rpartition(')')[2].split()[1]
            while shard.index == 0: os.kill(int(parent), signal.SIGKILL)
            1
        """
        kind, message = failure(await bench.run(kill_agent))
        assert kind in ("signal", "node")
        assert message
        assert value(await bench.run(kill_agent, shard=1)) == 1


class LimitContract:
    """What a shard may use."""

    async def test_a_fork_bomb_ends_with_its_shard(self, bench: ShardBench) -> None:
        """And the next shard runs as if nothing had been."""
        source = "import os\nwhile shard.index == 0:\n  try: os.fork()\n  except OSError: pass\n1"
        kind, _ = failure(await bench.run(source, timeout=1.0))
        assert kind in ("timeout", "signal", "memory")
        assert value(await bench.run(source, timeout=1.0, shard=1)) == 1

    async def test_a_shard_over_its_memory_is_killed(self, bench: ShardBench) -> None:
        """The error tells the limit, and the next shard is fine."""
        limit = Resources(memory=256_000_000)
        source = "data = []\nwhile shard.index == 0: data.append(b'x' * 10_000_000)\n1"
        outcome = await bench.run(source, resources=limit)
        kind, message = failure(outcome)
        assert kind == "memory"
        assert "256 MB" in message
        assert value(await bench.run(source, resources=limit, shard=1)) == 1

    async def test_a_shard_over_its_disk_is_stopped(self, bench: ShardBench) -> None:
        """One large file, or many small ones that it keeps."""
        limit = Resources(disk=20 * MB)
        one = "with open(outputs / 'large', 'wb') as file: file.write(bytes(30_000_000))"
        assert failure(await bench.run(one, resources=limit))[0] == "disk"
        many = """
            import time
            for number in range(10):
                (outputs / str(number)).write_bytes(b'x' * 5_000_000)
            while True: time.sleep(0.01)
        """
        assert failure(await bench.run(many, resources=limit))[0] == "disk"


class WorldContract:
    """What a shard finds around it."""

    async def test_inputs_come_in_plan_order(self, bench: ShardBench) -> None:
        """As paths to be read, with their logical names beside them."""
        source = "([path.read_text() for path in inputs], shard.inputs, shard.index, shard.count)"
        outcome = await bench.run(source, files={"b/2.csv": "two", "a/1.csv": "one"}, shard=3)
        assert value(outcome) == [["two", "one"], ["b/2.csv", "a/1.csv"], 3, 7]

    async def test_the_environment_names_the_execution(self, bench: ShardBench) -> None:
        """Under today's Bacalhau names, with the job's own variables."""
        source = "import os\n[os.environ.get(name) for name in ('BACALHAU_JOB_ID', 'BACALHAU_PARTITION_INDEX', 'OWN')]"
        outcome = await bench.run(source, job=5, shard=2, env={"OWN": "value"})
        assert value(outcome) == [job_number(5), "2", "value"]

    async def test_secrets_are_variables_of_their_shard_and_on_no_disk(self, bench: ShardBench) -> None:
        """Shards of other jobs don't have them."""
        source = "import os, sys\nprint('on', flush=True)\nsys.stdin.read()\nos.environ.get('API_KEY')"
        secret = "hunter2-correct-horse"  # noqa: S105 - of nothing
        task = msgspec.structs.replace(bench.task(source, job=6), secrets=Secrets({"API_KEY": secret}))
        found: list[Path] = []

        def look(event: ExecutorEvent) -> None:
            if isinstance(event, ShardLines):
                found.extend(_holding(bench.folder, secret.encode()))

        async with asyncio.timeout(DEADLINE):
            outcome = await bench.executor.run(task, look)
        assert value(outcome) == secret
        assert found == []
        assert value(await bench.run(source, job=7)) is None

    async def test_outputs_are_collected(self, bench: ShardBench) -> None:
        """Nested folders included; without any there is no folder."""
        source = """
            if shard.index == 0:
                (outputs / 'a' / 'b').mkdir(parents=True)
                (outputs / 'a' / 'b' / 'f').write_text('x')
        """
        outcome = await bench.run(source)
        assert outcome.outputs is not None
        assert (outcome.outputs / "a" / "b" / "f").read_text() == "x"
        assert (await bench.run(source, shard=1)).outputs is None

    async def test_outputs_of_a_shard_that_failed_are_kept_apart(self, bench: ShardBench) -> None:
        """The next shard starts with an empty folder."""
        source = "found = list(outputs.iterdir())\n(outputs / 'f').write_text('x')\n1 / shard.index\nlen(found)"
        assert not (await bench.run(source)).ok
        assert value(await bench.run(source, shard=1)) == 0

    async def test_the_working_folder_is_private_and_writable(self, bench: ShardBench) -> None:
        """For relative and for temporary files; it is empty for every shard."""
        source = """
            import os, tempfile
            found = os.listdir()
            open('file', 'w').write('x')
            handle, path = tempfile.mkstemp()
            found
        """
        assert value(await bench.run(source, job=1)) == []
        assert value(await bench.run(source, job=1)) == []

    async def test_shards_share_no_state(self, bench: ShardBench) -> None:
        """Neither within a job nor between two."""
        source = "import math\nseen = hasattr(math, 'leak')\nmath.leak = True\nseen"
        assert [value(await bench.run(source, job=job)) for job in (1, 1, 2)] == [False, False, False]

    async def test_random_numbers_repeat_for_a_shard_and_differ_between_shards(self, bench: ShardBench) -> None:
        """Python's and NumPy's, preloaded or not; and sets of strings have one order."""
        for imports in ((), ("numpy",)):
            source = "import random, numpy as np\n(random.random(), np.random.rand(), list(set('abcdef')))"
            runs = [value(await bench.run(source, shard=shard, imports=imports)) for shard in (0, 0, 1)]
            assert runs[0] == runs[1]
            assert runs[0][:2] != runs[2][:2]

    async def test_stdin_is_empty(self, bench: ShardBench) -> None:
        """Reading from it ends at once, in the shard and in its children."""
        assert (await bench.run("input()")).error.name == "EOFError"  # type: ignore[union-attr]  # it must have one
        assert value(await bench.run("import subprocess\nsubprocess.run(['cat']).returncode")) == 0

    async def test_the_cell_is_main(self, bench: ShardBench) -> None:
        """So that guards, pickle and multiprocessing work as in a notebook."""
        source = """
            import multiprocessing, sys
            def double(x): return 2 * x
            with multiprocessing.get_context('fork').Pool(2) as pool:
                doubled = pool.map(double, [1, 2])
            (__name__, sys.argv, doubled)
        """
        assert value(await bench.run(source)) == ["__main__", ["cell"], [2, 4]]

    async def test_a_fork_of_the_cell_has_no_say(self, bench: ShardBench) -> None:
        """Only the first process's value counts."""
        source = "import os\npid = os.fork()\nif pid: os.waitpid(pid, 0)\n'parent' if pid else 'child'"
        assert value(await bench.run(source)) == "parent"


class PaceContract:
    """Many shards."""

    async def test_two_hundred_shards_run_in_one_go(self, bench: ShardBench) -> None:
        """Each gets its own answer, whatever their number ahead of the slots."""
        outcomes = await asyncio.gather(*(bench.run("shard.index", shard=index) for index in range(200)))
        assert [value(outcome) for outcome in outcomes] == list(range(200))

    async def test_two_jobs_can_run_at_once(self, bench: ShardBench) -> None:
        """With more shards than slots each."""
        runs = [bench.run("shard.index", shard=index, job=job) for index in range(10) for job in (1, 2)]
        assert [value(outcome) for outcome in await asyncio.gather(*runs)] == [
            index for index in range(10) for _ in "ab"
        ]

    async def test_a_queued_shard_can_be_cancelled(self, bench: ShardBench) -> None:
        """It never runs, and those before and behind it do."""
        tasks = [asyncio.ensure_future(bench.run("shard.index", shard=index)) for index in range(30)]
        tasks[20].cancel()
        await asyncio.wait(tasks)
        assert tasks[20].cancelled()
        assert [value(task.result()) for index, task in enumerate(tasks) if index != 20] == [
            index for index in range(30) if index != 20
        ]

    async def test_a_released_job_leaves_room_for_the_next(self, bench: ShardBench) -> None:
        """And a released job may even come back."""
        assert value(await bench.run("1", job=1)) == 1
        await bench.executor.release(job_number(1))
        assert value(await bench.run("2", job=2)) == 2
        assert value(await bench.run("1", job=1)) == 1


class ExecutorContract(ValueContract, TextContract, EndContract, LimitContract, WorldContract, PaceContract):
    """All rules. Subclass it in a test module that has a fixture `bench`."""
