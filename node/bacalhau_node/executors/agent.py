"""The agent: runs the shards of one job inside a slot. One file, standard library only, Python 3.8 or later.

Longer than 400 lines because it goes into containers and to other interpreters as one file.

Theory of operation
===================
The host starts `python -s -u agent.py` (or `-I -u`) with two byte streams, file descriptors 0 and 1,
keeps both, and talks in frames. Descriptors 0 and 1 are moved away before anything else runs, so that
a stray print can't damage a frame. The end of descriptor 0 is a dead-man's switch: everything is killed.

Three kinds of process:

* The **parent** imports nothing but the standard library. It reads and writes frames, starts shards one
  after another, reads what they print, enforces limits, and removes whatever a shard left running.
* The **template** is forked from it. It imports what the cell imports, freezes the collector, compiles the
  cell, and then only forks on request: all that shards have in common is done in it, once. One that dies,
  or that must have other imports, is replaced by a new one.
* A **shard** is one forked child of the template, with its own session. It runs the cell, sends its value by
  a pipe, and exits.

The parent is a subreaper, so a process that a shard started becomes the parent's child when the shard is
gone, whatever it did to hide. After each shard the parent stops and kills its descendants until none is left.

The pipes for stdout, stderr and the value are made once and inherited; they are empty between two shards,
because nobody who could write to them is alive then. Text goes out in whole lines; an unfinished line
follows after 50 ms. The parent never waits for the host: up to 16 MB of frames are kept, then the shard's
pipes are left unread, and so the shard waits.

Frames
======
Two big-endian lengths of four bytes (header, body), a JSON object with the type in "t", and the body.

host to agent
    hello      path, env, imports, oom, watch    first, once; `imports` are preloaded
    prepare    imports                           preload these; what was preloaded stays if it has them all
    job        bundle, name, line_offset, imports, env, argv     once; `argv`: a program in place of a cell
    run        key, shard, count, seed, inputs, logical, shared, outputs, work, scratch, env, timeout, memory,
               disk, hold                        queued behind the runs before it
    kill       key                               end this run, started or not; answered by its `done`
    recall     key                               give this run back if it has not started: `recalled`, else nothing
    collected  key                               the outputs of a `hold` run are taken: go on
    bye                                          like the end of the stream
agent to host
    ready      python, pid
    warm       imports, ms                       what was preloaded
    started    key, pid
    lines      key, stream                       body: text as bytes
    done       key, ok, exit_code, error, value {kind, type, file}, seconds, max_rss, cut, outputs
                                                 body: the value, unless it lies in `file` of the scratch folder
    recalled   key                               this run will not start here
    error      message                           a frame that was not understood

What a cell finds
=================
`inputs`, `outputs`, `shard` and its variables as globals of `__main__`; `sys.argv == ["cell"]`; stdin is empty; the
working folder and `TMPDIR` are a private folder that is removed afterwards; `random` and `numpy.random` are
seeded from (job, shard). Lines of the cell keep the numbers and the file name that they have in the notebook.
"""

from __future__ import annotations

import sys

if __name__ == "__main__" and sys.path and not sys.flags.isolated:
    del sys.path[0]  # the folder of this file: its neighbours must not hide anybody's modules

import __future__

import ast
import atexit
import base64
import contextlib
import ctypes
import errno
import faulthandler
import gc
import io
import json
import linecache
import math
import os
import random
import resource
import selectors
import signal
import socket
import stat
import struct
import threading
import time
import tokenize
import types
from collections import deque
from pathlib import Path

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Deque, Dict, List, NoReturn, Optional, Set, Tuple

    Header = Dict[str, Any]

INLINE = 64 * 1024
"""A value up to this size rides in its frame (DESIGN section 3)."""
HEAD = 8 * 1024 * 1024
"""Text of a shard that is sent as it comes, both streams together."""
TAIL = 1024 * 1024
"""Text of a stream that is kept beyond that: its end. 10 MB in all (DESIGN section 6)."""
BACKLOG = 16 * 1024 * 1024
"""Frames that wait for a slow host, before the shard has to wait too."""
UNFINISHED = 0.05
"""Seconds after which an unfinished line is sent."""
PACE = 0.005
"""Seconds between two frames of one stream while it prints without a pause."""
LINGER = 10.0
"""Seconds that threads and exit handlers may go on after a cell's value is known."""
LEFT_BEHIND = b"[a thread or exit handler that the cell left was ended %g s after the cell]\n"
WATCH = 0.05
"""Seconds between two looks at memory and processes where no control group holds them."""
DISK_WATCH = 0.25
"""Seconds between two looks at the disk that a shard uses; a look never takes more than a twentieth of the time."""
MAX_PROCESSES = 512
"""Processes of one shard where no control group counts them (pids limit of DESIGN section 6)."""
MAX_DEATHS = 3
"""Templates that may die in a row before this agent gives up and ends."""
MAX_MESSAGE = 10_000
"""Characters of an exception's message that travel."""
MAX_FRAMES = 20
"""Frames of a traceback that travel from each of its ends."""

OWN_FILE = (lambda: None).__code__.co_filename
LENGTHS = struct.Struct(">II")
REPORT = struct.Struct(">cqqq")
FUTURE = 0
for _name in __future__.all_feature_names:
    FUTURE |= getattr(__future__, _name).compiler_flag

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36


LIBC = ctypes.CDLL(None)


def prctl(option: int, value: int) -> None:
    """Ask the kernel for one thing about this process."""
    LIBC.prctl(option, value, 0, 0, 0)


def pack(header: Header, body: bytes = b"") -> bytes:
    """One frame."""
    head = json.dumps(header).encode()
    return LENGTHS.pack(len(head), len(body)) + head + body


def clean(text: str) -> str:
    """`text` without lone surrogates, which are no JSON for the host."""
    return text.encode("utf-8", "replace").decode("utf-8")


def unpack(buffer: bytearray) -> Optional[Tuple[Header, bytes]]:
    """Take one whole frame off the front of `buffer`, if there is one."""
    if len(buffer) < LENGTHS.size:
        return None
    head, body = LENGTHS.unpack_from(buffer)
    start, end = LENGTHS.size + head, LENGTHS.size + head + body
    if len(buffer) < end:
        return None
    result = json.loads(bytes(buffer[LENGTHS.size : start])), bytes(buffer[start:end])
    del buffer[:end]
    return result


# --- the cell's side: its code ---


class Muted:
    """The value of a cell that has none."""


def ends_in_semicolon(source: str, node: ast.stmt) -> bool:
    """Whether the last token of `source`, whose last statement is `node`, is a semicolon: its value is muted."""
    tail = "\n".join(source.split("\n")[(node.end_lineno or 1) - 1 :])
    if ";" not in tail:
        return False
    last = ""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.OP or (token.string.strip() and token.type not in (tokenize.COMMENT, tokenize.NL)):
            last = token.string
    return last == ";"


def compile_cell(source: str, name: str) -> List[Tuple[types.CodeType, bool]]:
    """The code objects of a cell in order; the flag says that the object's value is the cell's."""
    awaits = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
    tree = compile(source, name, "exec", ast.PyCF_ONLY_AST | awaits, dont_inherit=True)
    assert isinstance(tree, ast.Module)
    last = tree.body[-1] if tree.body else None
    if not isinstance(last, ast.Expr) or ends_in_semicolon(source, last):
        return [(compile(tree, name, "exec", awaits, dont_inherit=True), False)]
    body = compile(ast.Module(tree.body[:-1], []), name, "exec", awaits, dont_inherit=True)
    flags = awaits | body.co_flags & FUTURE
    return [(body, False), (compile(ast.Expression(last.value), name, "eval", flags, dont_inherit=True), True)]


def evaluate(parts: List[Tuple[types.CodeType, bool]], names: Dict[str, Any]) -> Any:
    """Run the parts in one namespace; all in one event loop when any of them awaits."""
    coroutine = 0x80  # inspect.CO_COROUTINE: it awaits at the top level
    if not any(code.co_flags & coroutine for code, _ in parts):
        value: Any = Muted
        for code, wanted in parts:
            result = eval(code, names)
            value = result if wanted else value
        return value

    async def together() -> Any:
        value: Any = Muted
        for code, wanted in parts:
            result = eval(code, names)
            if code.co_flags & coroutine:
                result = await result
            value = result if wanted else value
        return value

    import asyncio  # only cells that await pay for it

    return asyncio.run(together())


class Shard:
    """What a cell knows of the shard it runs: `index` of `count`, its logical `inputs`, the `shared` paths."""

    def __init__(self, run: Header) -> None:
        self.index: int = run["shard"]
        self.count: int = run["count"]
        self.inputs: List[str] = list(run.get("logical", ()))
        self.shared: List[Path] = [Path(path) for path in run.get("shared", ())]

    def __repr__(self) -> str:
        return "shard %d of %d: %s" % (self.index, self.count, ", ".join(self.inputs) or "no inputs")


def load_variables(folder: str) -> Dict[str, Any]:
    """The values that came with the cell: `NAME.json`, `.npy`, `.arrow` or `.bytes`."""
    names: Dict[str, Any] = {}
    for file in sorted(os.listdir(folder)):
        name, extension = os.path.splitext(file)
        names[name] = READERS[extension](os.path.join(folder, file))
    return names


def define(path: str, names: Dict[str, Any]) -> None:
    """Run the source of the notebook's own functions and classes, if any came; annotations are not evaluated."""
    if not os.path.exists(path):
        return
    source = read_bytes(path).decode("utf-8")
    file = os.path.basename(path)
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    exec(compile(source, file, "exec", __future__.annotations.compiler_flag, dont_inherit=True), names)


def read_bytes(path: str) -> bytes:
    """A whole file."""
    with open(path, "rb") as file:
        return file.read()


def read_npy(path: str) -> Any:
    """A NumPy array, without pickle."""
    import numpy as np

    return np.load(path, allow_pickle=False)


def read_arrow(path: str) -> Any:
    """A table, as what it was written from: a frame, a Series or an Index of pandas, a frame of polars."""
    import pyarrow as pa

    table = pa.ipc.open_file(pa.memory_map(path)).read_all()
    metadata = table.schema.metadata or {}
    mark = json.loads(metadata.get(MARK, b"{}"))
    if mark.get("library") == "polars":
        import polars as pl  # type: ignore[import-not-found]  # only where the environment has it

        return pl.from_arrow(table)
    if b"pandas" not in metadata:
        return table
    frame = table.to_pandas()
    if mark.get("type") not in ("Series", "Index"):
        return frame
    column = frame.iloc[:, 0]
    column.name = column.name if mark.get("named") else None
    if mark["type"] == "Series":
        return column
    import pandas as pd

    return pd.Index(column, name=column.name) if frame.shape[1] == 1 else pd.MultiIndex.from_frame(frame)


READERS: Dict[str, Callable[[str], Any]] = {
    ".json": lambda path: json.loads(read_bytes(path)),
    ".npy": read_npy,
    ".arrow": read_arrow,
    ".bytes": read_bytes,
}
MARK = b"bacalhau"
"""Schema metadata of an Arrow file: {"library", "type", "named"} of the value that it was written from."""


# --- the cell's side: its value ---


class CannotTravel(Exception):
    """A value that should travel as data and can't; the text says why and what to do."""


class Value:
    """A value on its way: `kind` and `type` of messages.Value, and the bytes or what writes them to a file."""

    def __init__(self, kind: str, name: str, data: bytes = b"", write: Optional[Callable[[str], None]] = None) -> None:
        self.kind = kind
        self.type = name
        self.data = data
        self.write = write


EXTENSION = {"json": "json", "arrow": "arrow", "npy": "npy", "bytes": "bin", "mime": "mime.json", "repr": "txt"}


def encode_value(value: Any) -> Value:
    """`value` in the first form that fits it. Raises `CannotTravel` for a table that Arrow can't hold."""
    name = type(value).__name__
    if value is None or value is Muted:
        return Value("none", "NoneType")
    if isinstance(value, (bytes, bytearray, memoryview)):
        return Value("bytes", name, bytes(value))
    for attempt in (encode_table, encode_array, encode_json, encode_mime):
        result = attempt(value, name)
        if result is not None:
            return result
    return Value("repr", name, safe_repr(value).encode("utf-8", "backslashreplace"))


def is_a(value: Any, module: str, *names: str) -> bool:
    """Whether `value` is an instance of a class of a module, if that module is loaded at all."""
    loaded = sys.modules.get(module)
    classes = tuple(getattr(loaded, name) for name in names if hasattr(loaded, name))
    return isinstance(value, classes)


def encode_table(value: Any, name: str) -> Optional[Value]:
    """Frames, Series and indexes of pandas, frames of polars, Arrow tables, and what exports itself as one."""
    pandas = is_a(value, "pandas", "DataFrame", "Series", "Index")
    known = pandas or is_a(value, "pyarrow", "Table", "RecordBatch") or is_a(value, "polars", "DataFrame", "Series")
    if not known and (isinstance(value, type) or not hasattr(value, "__arrow_c_stream__")):
        return None
    try:
        import pyarrow as pa
    except ImportError:
        raise CannotTravel(
            "a %s travels as an Arrow table, and pyarrow is not installed where the shard ran: add --require pyarrow, "
            "or end the cell with plain values (.to_dict())" % name
        ) from None
    table = pandas_table(pa, value) if pandas else arrow_table(pa, value)
    kind = next((one for one in ("Series", "Index") if is_a(value, "pandas", one)), name)
    if table.nbytes <= INLINE:
        sink = pa.BufferOutputStream()
        write_ipc(pa, table, sink)
        return Value("arrow", kind, sink.getvalue().to_pybytes())
    return Value("arrow", kind, write=lambda path: write_ipc(pa, table, path))


def write_ipc(pa: Any, table: Any, sink: Any) -> None:
    """An Arrow IPC file, uncompressed so that it can be mapped."""
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


def arrow_table(pa: Any, value: Any) -> Any:
    """Anything that knows Arrow, as a table marked with its library."""
    if is_a(value, "polars", "Series"):
        value = value.to_frame()
    library = type(value).__module__.split(".")[0]
    table = value.to_arrow() if library == "polars" else pa.table(value)
    return marked(table, {"library": library, "type": type(value).__name__})


def pandas_table(pa: Any, value: Any) -> Any:
    """A frame, Series or Index of pandas as a table with its metadata; raises `CannotTravel` with the column's name."""
    frame = value
    mark: Header = {"library": "pandas", "type": "DataFrame"}
    if is_a(value, "pandas", "Series"):
        frame, mark = value.to_frame(), {"library": "pandas", "type": "Series", "named": value.name is not None}
    elif is_a(value, "pandas", "MultiIndex"):  # a level without a name gets the one that pandas gives it as a column
        levels = ["level_%d" % at if level is None else level for at, level in enumerate(value.names)]
        frame, mark = value.to_frame(index=False, name=levels), {"library": "pandas", "type": "Index", "named": True}
    elif is_a(value, "pandas", "Index"):
        frame = value.to_frame(index=False)
        mark = {"library": "pandas", "type": "Index", "named": value.name is not None}
    try:
        return marked(pa.Table.from_pandas(frame), mark)
    except (pa.ArrowException, TypeError, ValueError, OverflowError, NotImplementedError) as error:
        raise CannotTravel(table_problem(pa, frame, error)) from None


def marked(table: Any, mark: Header) -> Any:
    """The table with our line in its schema's metadata."""
    return table.replace_schema_metadata({**(table.schema.metadata or {}), MARK: json.dumps(mark).encode()})


def table_problem(pa: Any, frame: Any, error: BaseException) -> str:
    """Which column of a frame stopped it, and what to do."""
    if frame.columns.has_duplicates:
        twice = frame.columns[frame.columns.duplicated()][0]
        return "two columns are called %r: rename one, a table's columns need names of their own" % (twice,)
    for position, label in enumerate(frame.columns):
        column = frame.iloc[:, position]
        try:
            pa.Array.from_pandas(column)
        except (pa.ArrowException, TypeError, ValueError, OverflowError, NotImplementedError) as reason:
            kinds = sorted({type(item).__name__ for item in column.iloc[:1000]})
            return (
                "column %r holds values that a table can't hold together (%s): %s. Convert it first, for example "
                "df[%r] = df[%r].astype(str)" % (label, ", ".join(kinds[:5]), shorten(str(reason), 300), label, label)
            )
    return "the frame can't travel as a table: %s. Convert its index with reset_index()" % shorten(str(error), 300)


def encode_array(value: Any, _name: str) -> Optional[Value]:
    """NumPy arrays of plain numbers, strings, times or records."""
    if not is_a(value, "numpy", "ndarray") or value.dtype.hasobject:
        return None
    np = sys.modules["numpy"]
    if value.nbytes <= INLINE // 2:
        sink = io.BytesIO()
        np.save(sink, value, allow_pickle=False)
        return Value("npy", "ndarray", sink.getvalue())

    def write(path: str) -> None:
        with open(path, "wb") as file:
            np.save(file, value, allow_pickle=False)

    return Value("npy", "ndarray", write=write)


def plain_scalar(item: Any) -> Any:
    """Python's own form of one of NumPy's scalars."""
    if is_a(item, "numpy", "generic"):
        return item.item()
    raise TypeError(type(item).__name__)


def dumps(value: Any) -> str:
    """JSON; the encoder that knows NumPy is made only where it is needed."""
    try:
        return json.dumps(value)
    except TypeError:
        return json.dumps(value, default=plain_scalar)


def encode_json(value: Any, name: str) -> Optional[Value]:
    """What JSON gives back equal: NumPy's scalars become Python's, tuples become lists, NaN and infinity stay."""
    if not isinstance(value, (bool, int, float, str, list, tuple, dict)) and not is_a(value, "numpy", "generic"):
        return None
    try:
        text = dumps(value)
        return Value("json", name, text.encode()) if same(value, json.loads(text)) else None
    except (TypeError, ValueError, RecursionError, OverflowError):
        return None


def same(value: Any, back: Any) -> bool:
    """Whether `back`, read from JSON, is what `value` was; NaN is NaN, a tuple is a list."""
    if isinstance(value, dict):
        return (
            type(back) is dict
            and len(value) == len(back)
            and all(isinstance(key, str) and key in back and same(item, back[key]) for key, item in value.items())
        )
    if isinstance(value, (list, tuple)):
        return type(back) is list and len(value) == len(back) and all(map(same, value, back))
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return type(back) in (bool, str, type(None)) and bool(value == back)
    return bool(value == back) or (math.isnan(value) and math.isnan(back))


MIME = (
    ("text/html", "_repr_html_"),
    ("image/svg+xml", "_repr_svg_"),
    ("image/png", "_repr_png_"),
    ("image/jpeg", "_repr_jpeg_"),
    ("text/markdown", "_repr_markdown_"),
    ("text/latex", "_repr_latex_"),
)


def encode_mime(value: Any, name: str) -> Optional[Value]:
    """What a notebook would show: a figure, or an object that knows how to draw itself."""
    if isinstance(value, type):
        return None
    bundle = figure_bundle(value) or own_bundle(value)
    if not bundle:
        return None
    bundle.setdefault("text/plain", safe_repr(value))
    data = {kind: base64.b64encode(part).decode() if isinstance(part, bytes) else part for kind, part in bundle.items()}
    try:
        return Value("mime", name, json.dumps(data).encode())
    except (TypeError, ValueError):
        return None


def figure_bundle(value: Any) -> Dict[str, Any]:
    """A matplotlib figure, or the one that axes belong to, as a picture."""
    figure = value.figure if is_a(value, "matplotlib.axes", "Axes") else value
    if not is_a(figure, "matplotlib.figure", "Figure"):
        return {}
    sink = io.BytesIO()
    figure.savefig(sink, format="png", bbox_inches="tight")
    return {"image/png": sink.getvalue()}


def own_bundle(value: Any) -> Dict[str, Any]:
    """What the value's own display methods give; one that fails is left out, as in a notebook."""
    bundle: Dict[str, Any] = {}
    for kind, method in (("", "_repr_mimebundle_"), *MIME):
        draw = getattr(value, method, None)
        if not callable(draw):
            continue
        try:
            part = draw()
        except Exception:
            continue
        part = part[0] if isinstance(part, tuple) else part
        if not kind and isinstance(part, dict):
            return part
        if kind and part:
            bundle[kind] = part
    return bundle


def safe_repr(value: Any) -> str:
    """`repr`, also of an object whose own fails."""
    try:
        return repr(value)
    except Exception as error:
        return "<%s object whose repr failed with %s>" % (type(value).__name__, type(error).__name__)


def shorten(text: str, limit: int) -> str:
    """At most `limit` characters, both ends kept."""
    text = clean(text)
    if len(text) <= limit:
        return text
    return "%s … %d characters left out … %s" % (text[: limit * 2 // 3], len(text) - limit, text[-(limit // 3) :])


# --- the cell's side: its errors ---


def describe(error: BaseException, name: str) -> Header:
    """An exception as data: a `ShardError`. `name` is the cell's file name."""
    frames, hidden = traceback_frames(error, name)
    notes = [shorten(str(note), MAX_MESSAGE) for note in getattr(error, "__notes__", ())]
    if hidden:
        notes.append("%d frames are left out of the traceback" % hidden)
    return {
        "kind": "exception",
        "name": type(error).__name__,
        "message": shorten(safe_message(error), MAX_MESSAGE),
        "frames": frames,
        "notes": notes + members(error) + causes(error, name),
    }


def safe_message(error: BaseException) -> str:
    """The text of an exception, also of one whose `__str__` raises."""
    try:
        if isinstance(error, SyntaxError) and error.msg:
            return error.msg
        return str(error)
    except Exception as second:
        return "<its message could not be made: %s>" % type(second).__name__


def members(error: BaseException) -> List[str]:
    """The exceptions of a group, one line each."""
    inside = getattr(error, "exceptions", ()) if type(error).__name__.endswith("ExceptionGroup") else ()
    return ["holds %s: %s" % (type(one).__name__, shorten(safe_message(one), 500)) for one in inside[:10]]


def causes(error: BaseException, name: str) -> List[str]:
    """The chain of exceptions before this one, one line each, at most five."""
    lines: List[str] = []
    seen = {id(error)}
    while len(lines) < 5:
        before, word = error.__cause__, "caused by"
        if before is None and not error.__suppress_context__:
            before, word = error.__context__, "while handling"
        if before is None or id(before) in seen:
            break
        seen.add(id(before))
        own = [frame for frame in traceback_frames(before, name)[0] if frame["in_cell"]]
        place = " (line %d)" % own[-1]["line"] if own else ""
        lines.append("%s %s: %s%s" % (word, type(before).__name__, shorten(safe_message(before), 500), place))
        error = before
    return lines


def traceback_frames(error: BaseException, name: str) -> Tuple[List[Header], int]:
    """The frames from the cell's own first one on, and how many were left out in the middle."""
    found: List[Header] = []
    trace = error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        if code.co_filename != OWN_FILE:
            found.append(frame_of(code.co_filename, trace.tb_lineno, code.co_name, name))
        trace = trace.tb_next
    if isinstance(error, SyntaxError) and error.filename and error.lineno:
        found.append(frame_of(error.filename, error.lineno, "", name))
    first = next((at for at, frame in enumerate(found) if frame["in_cell"]), 0)
    found = found[first:]
    if len(found) <= 2 * MAX_FRAMES:
        return found, 0
    return found[:MAX_FRAMES] + found[-MAX_FRAMES:], len(found) - 2 * MAX_FRAMES


def frame_of(file: str, line: int, function: str, name: str) -> Header:
    """One frame as data; the text comes from the file, or from the cell's source."""
    text = clean(linecache.getline(file, line).strip())
    return {"file": file, "line": line, "function": function, "text": text[:500], "in_cell": file == name}


# --- the cell's side: one process, from the fork to its end ---


class Plumbing:
    """The pipes that all shards inherit: read ends for the parent, write ends for the shards."""

    def __init__(self) -> None:
        self.out, self.out_end = os.pipe()
        self.err, self.err_end = os.pipe()
        self.result, self.result_end = os.pipe()
        for fd in (self.out, self.err, self.result):
            os.set_blocking(fd, False)


def shard_process(cell: Cell, run: Header, result: int) -> NoReturn:
    """The whole life of a shard's process after the fork; never returns."""
    code = 1
    try:
        os.setsid()
        if run.get("disk"):
            resource.setrlimit(resource.RLIMIT_FSIZE, (run["disk"], run["disk"]))
        os.chdir(run["work"])
        if cell.argv:
            send_result(result, pack({"exit_code": 127, "error": run_program(cell.argv)}))
            code = 127
            return  # type: ignore[misc]  # `finally` ends the process
        pid = os.getpid()
        header, body = run_cell(cell, run)
        code = header["exit_code"]
        if os.getpid() == pid:  # a child that the cell forked, and that came back here, has no say
            send_result(result, pack(header, body))
            finish_threads()
    except BaseException as error:
        os.write(2, ("the agent's own error: %s: %s\n" % (type(error).__name__, safe_message(error))).encode())
    finally:
        os._exit(code)


def run_program(argv: List[str]) -> Header:
    """Become a program; returns only the error when there is none of that name."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # Python ignores both, and a program would inherit that
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    try:
        os.execvp(argv[0], argv)
    except OSError as error:
        text = "%s can't be started: %s" % (argv[0], error.strerror)
        return {"kind": "environment", "name": type(error).__name__, "message": text}


def run_cell(cell: Cell, run: Header) -> Tuple[Header, bytes]:
    """Run the cell: header and body of the result."""
    try:
        return travelling(cell.value(), run["scratch"])
    except SystemExit as error:
        return exit_result(error), b""
    except CannotTravel as error:
        return failed({"kind": "output", "name": "", "message": str(error)}), b""
    except BaseException as error:
        what = describe(error, cell.name)
        if isinstance(error, OSError) and error.errno in (errno.EFBIG, errno.ENOSPC, errno.EDQUOT):
            what["kind"] = "disk"
        return failed(what), b""


def failed(error: Header, code: int = 1) -> Header:
    """The result of a cell that failed."""
    return {"exit_code": code, "error": error}


def exit_result(error: SystemExit) -> Header:
    """`sys.exit`: nothing or 0 is a good end without a value."""
    if error.code is None or error.code == 0:
        return {"exit_code": 0}
    if isinstance(error.code, int):
        code = error.code & 0xFF
        return failed(blame("exit", "the cell ended with exit code %d" % code), code)
    text = shorten(error.code if isinstance(error.code, str) else safe_repr(error.code), MAX_MESSAGE)
    return failed(blame("exit", "the cell ended with exit code 1: %s" % text))


class Cell:
    """What runs: read and compiled in the template, evaluated in each shard."""

    def __init__(self, job: Header) -> None:
        self.argv: List[str] = list(job["argv"])
        self.name: str = job["name"]
        self.bundle: str = job["bundle"]
        self.parts: List[Tuple[types.CodeType, bool]] = []
        self.problem: Optional[BaseException] = None
        self.main = types.ModuleType("__main__")
        self.seed = 0
        self.variables = ""
        os.environ.update(job["env"])
        if not self.argv:
            self.compile(job["line_offset"])

    def compile(self, line_offset: int) -> None:
        """Read the source; what is wrong with it is for each shard to say."""
        sys.modules["__main__"] = self.main
        sys.argv[:] = ["cell"]
        sys.path.insert(0, os.path.join(self.bundle, "modules"))
        try:
            folder = os.path.join(self.bundle, "vars")
            self.variables = folder if os.path.isdir(folder) else ""
            source = "\n" * line_offset + read_bytes(os.path.join(self.bundle, "cell.py")).decode("utf-8")
            linecache.cache[self.name] = (len(source), None, source.splitlines(keepends=True), self.name)
            self.parts = compile_cell(source, self.name)
        except Exception as error:
            self.problem = error

    def prepare(self, run: Header) -> None:
        """Set what differs from shard to shard, still in the template: a fork pays for each page it writes."""
        os.environ.update(run.get("env", {}))
        os.environ["TMPDIR"] = run["work"]
        self.seed = run["seed"]
        names = self.main.__dict__
        names["inputs"] = [Path(path) for path in run.get("inputs", ())]
        names["outputs"] = Path(run["outputs"])
        names["shard"] = Shard(run)

    def value(self) -> Any:
        """The value of the cell's last expression, or `Muted`; in the shard's own process."""
        if self.problem is not None:
            raise self.problem
        seed_generators(self.seed)  # not earlier: `random` seeds itself in every fork
        if self.variables:
            self.main.__dict__.update(load_variables(self.variables))
        define(os.path.join(self.bundle, "definitions.py"), self.main.__dict__)
        return evaluate(self.parts, self.main.__dict__)


def seed_generators(seed: int) -> None:
    """Seed `random` now, and `numpy.random` now or when it is imported."""
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed)
    else:
        sys.meta_path.insert(0, SeedNumpy(seed))


class SeedNumpy:
    """Seeds `numpy.random` in the moment it has been imported; finds nothing itself."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def find_spec(self, name: str, *_: Any) -> Any:
        """The spec of `numpy.random` by the other finders, with a loader that seeds afterwards."""
        if name != "numpy.random":
            return None
        sys.meta_path.remove(self)
        import importlib.util

        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute, seed = spec.loader.exec_module, self.seed

        def seeded(module: types.ModuleType) -> None:
            execute(module)
            module.seed(seed)

        spec.loader.exec_module = seeded  # type: ignore[method-assign]  # this one instance only
        return spec


def travelling(value: Any, scratch: str) -> Tuple[Header, bytes]:
    """Header and body of a value; a large one goes to a file, under its final name only when it is whole."""
    try:
        encoded = encode_value(value)
    except CannotTravel:
        raise
    except Exception as error:
        text = "the cell's value, a %s, can't travel: %s: %s"
        reason = shorten(safe_message(error), 1000)
        raise CannotTravel(text % (type(value).__name__, type(error).__name__, reason)) from error
    head: Header = {"kind": encoded.kind, "type": encoded.type}
    if encoded.write is None and len(encoded.data) <= INLINE:
        return {"exit_code": 0, "value": head}, encoded.data
    head["file"] = "value." + EXTENSION[encoded.kind]
    target = os.path.join(scratch, head["file"])
    os.makedirs(scratch, exist_ok=True)
    if encoded.write is not None:
        encoded.write(target + ".part")
    else:
        with open(target + ".part", "wb") as file:
            file.write(encoded.data)
    os.rename(target + ".part", target)
    return {"exit_code": 0, "value": head}, b""


def send_result(fd: int, data: bytes) -> None:
    """Write all of it; a parent that is gone ends this process soon anyway."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def finish_threads() -> None:
    """What an interpreter does at its end, but for taking itself apart: join threads, run exit handlers."""
    try:
        threading._shutdown()  # type: ignore[attr-defined]  # noqa: SLF001 - joining all threads has no public name
        atexit._run_exitfuncs()  # noqa: SLF001 - nor has this
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


# --- the template ---


def template_process(channel: socket.socket, imports: List[str], plumbing: Plumbing, private: List[int]) -> NoReturn:
    """The whole life of the template: import, freeze, then fork a shard for each request; never returns."""
    try:
        for fd in (*private, plumbing.out, plumbing.err, plumbing.result):
            os.close(fd)
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        be_killed_first()
        done = [name for name in imports if preload(name)]
        if "pandas" in done:
            rehearse_pandas()
        safe = not imports or len(os.listdir("/proc/self/task")) == 1  # a fork copies one thread: others would hang
        channel.sendall(pack({"imports": done, "safe": safe}))
        open_streams(plumbing)
        rehearse_values()
        gc.collect()
        gc.freeze()
        cell = Cell(read_message(channel))
        while safe:
            serve_request(channel, cell, plumbing.result_end)
    finally:
        os._exit(0)


def be_killed_first() -> None:
    """When memory runs out, the kernel should choose a shard, not the agent and not the notebook."""
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:  # it helps, but is not needed
        file.write("900")


def open_streams(plumbing: Plumbing) -> None:
    """Point stdout and stderr at the shards' pipes, unbuffered as with `python -u`."""
    for name, fd, end in (("stdout", 1, plumbing.out_end), ("stderr", 2, plumbing.err_end)):
        os.dup2(end, fd)
        os.close(end)
        raw: Any = io.FileIO(fd, "w", closefd=False)
        stream = io.TextIOWrapper(raw, encoding="utf-8", errors="backslashreplace", write_through=True)
        setattr(sys, name, stream)
        setattr(sys, "__%s__" % name, stream)
    faulthandler.enable(file=2, all_threads=False)


def preload(name: str) -> bool:
    """Import one module; the cell will say itself what is wrong with one that fails."""
    try:
        __import__(name)
    except BaseException:
        return False
    return True


def rehearse_pandas() -> None:
    """One tiny read and group: what pandas sets up at its first use is then shared by all shards."""
    import pandas as pd

    frame = pd.read_csv(io.StringIO("key,value\na,1\nb,2\n"))
    frame.groupby("key")["value"].sum()
    preload("pyarrow")


def rehearse_values() -> None:
    """Run once what every shard runs: what Python adapts in its code at first use is then shared, not copied."""
    samples: List[Any] = [0, "", [], {}]
    for value in samples * 8:
        pack(*travelling(value, ""))


def serve_request(channel: socket.socket, cell: Cell, result: int) -> None:
    """Wait for one request, fork its shard, report its process id and later its end."""
    run = read_message(channel)
    cell.prepare(run)
    try:
        pid = os.fork()
    except OSError as error:
        channel.sendall(REPORT.pack(b"f", error.errno or 0, 0, 0))
        return
    if pid == 0:
        os.close(channel.fileno())
        shard_process(cell, run, result)
    channel.sendall(REPORT.pack(b"p", pid, 0, 0))
    _, status, usage = os.wait4(pid, 0)
    channel.sendall(REPORT.pack(b"x", pid, status, usage.ru_maxrss))


def read_message(channel: socket.socket) -> Header:
    """One message of the parent: its size, then JSON."""
    size = LENGTHS.unpack(read_exactly(channel, LENGTHS.size))[0]
    message: Header = json.loads(read_exactly(channel, size))
    return message


def read_exactly(channel: socket.socket, size: int) -> bytes:
    """`size` bytes; the end of the channel is the end of this process."""
    data = b""
    while len(data) < size:
        part = channel.recv(size - len(data))
        if not part:
            os._exit(0)
        data += part
    return data


class Template:
    """The parent's view of the template: what it was to import, and whether it can fork by now."""

    def __init__(self, pid: int, channel: socket.socket, wanted: List[str]) -> None:
        self.pid = pid
        self.channel = channel
        self.children = Children(pid)
        self.wanted = wanted
        self.ready = False
        self.since = time.monotonic()
        self.buffer = bytearray()

    def tell(self, message: Header) -> None:
        """Send a message; the template is idle, so it reads at once."""
        data = json.dumps(message).encode()
        with contextlib.suppress(OSError):  # its end is seen on the channel
            self.channel.sendall(LENGTHS.pack(len(data), 0) + data)


# --- the parent: what it knows of the running shard ---


class Text:
    """One stream of a shard: whole lines go out, an unfinished one after a while; the cap keeps both ends."""

    def __init__(self, send: Callable[[bytes], None]) -> None:
        self.send = send
        self.pending = bytearray()
        self.due = 0.0
        self.sent = 0.0
        self.tail: Deque[bytes] = deque()
        self.kept = 0
        self.cut = 0

    def feed(self, data: bytes, room: int, now: float) -> int:
        """Take what was printed; `room` is what may still be sent. Returns how much of it was used."""
        used = min(room, len(data))
        if used:
            self.pending += data[:used]
            if not self.due:
                self.due = max(now, self.sent + PACE) if b"\n" in data[:used] else now + UNFINISHED
            elif b"\n" in data[:used]:
                self.due = min(self.due, max(now, self.sent + PACE))
        if used < len(data):
            self.tail.append(data[used:])
            self.kept += len(data) - used
            while self.kept - len(self.tail[0]) >= TAIL:
                self.cut += len(self.tail[0])
                self.kept -= len(self.tail.popleft())
        return used

    def flush(self, now: float, *, everything: bool = False) -> None:
        """Send the whole lines; everything when asked, or when the unfinished line has waited for long enough."""
        end = len(self.pending) if everything else self.pending.rfind(b"\n") + 1
        end = end or len(self.pending)
        if end:
            self.send(bytes(self.pending[:end]))
            del self.pending[:end]
        self.sent = now
        self.due = now + UNFINISHED if self.pending else 0.0

    def finish(self, now: float) -> int:
        """The shard has ended: send the rest and the kept tail; returns how many bytes were cut out."""
        self.flush(now, everything=True)
        if self.cut:
            self.send(b"\n[... %d bytes left out ...]\n" % self.cut)
        if self.kept:
            self.send(b"".join(self.tail))
        return self.cut


class Running:
    """The shard that runs now: one execution from its fork until its last frame."""

    def __init__(self, run: Header, send: Callable[[Header, bytes], None]) -> None:
        self.run = run
        self.key: str = run["key"]
        self.began = time.monotonic()
        self.pid = 0
        self.room = HEAD
        self.streams = {
            name: Text(lambda body, name=name: send({"t": "lines", "key": self.key, "stream": name}, body))  # type: ignore[misc]  # the default binds the name
            for name in ("stdout", "stderr")
        }
        self.result = bytearray()
        self.why: Optional[Header] = None
        self.deadline = self.began + run["timeout"] if run.get("timeout") else 0.0
        self.linger = 0.0
        self.watch_at = 0.0
        self.disk_at = self.began + DISK_WATCH if run.get("disk") else 0.0

    def timers(self) -> List[float]:
        """When something has to be looked at; zeros are none."""
        texts = [text.due for text in self.streams.values()]
        return [self.deadline, self.linger, self.watch_at, self.disk_at, *texts]


def blame(kind: str, message: str) -> Header:
    """A `ShardError` that is no exception."""
    return {"kind": kind, "name": "", "message": message}


def outcome(running: Running, status: int, ooms: int) -> Tuple[Header, bytes]:
    """How the shard ended: the fields `ok`, `exit_code`, `error` and `value` of its `done`, and the body."""
    result = unpack(running.result)
    header, body = result if result is not None else ({}, b"")
    killed = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    code = 128 + killed if killed else os.WEXITSTATUS(status)
    if running.why is not None:
        return {"ok": False, "exit_code": code, "error": running.why}, b""
    if header.get("error"):
        return {"ok": False, "exit_code": header.get("exit_code", 127), "error": header["error"]}, b""
    if killed and result is None:
        return {"ok": False, "exit_code": code, "error": killed_by(running.run, killed, ooms)}, b""
    if result is None and code:
        text = "the process ended with exit code %d" % code
        return {"ok": False, "exit_code": code, "error": blame("exit", text)}, b""
    return {"ok": True, "exit_code": 0, "value": header.get("value")}, body


def killed_by(run: Header, number: int, ooms: int) -> Header:
    """What a signal means: the kernel's memory killer, the file size limit, or the signal itself."""
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = "signal %d" % number
    if number == signal.SIGKILL and ooms:
        return blame("memory", memory_text(run))
    if number == signal.SIGXFSZ and run.get("disk"):
        return blame("disk", disk_text(run))
    return {"kind": "signal", "name": name, "message": "the process was killed by %s" % name}


def memory_text(run: Header) -> str:
    """What to say of a shard that ran out of memory."""
    limit = " of %s" % size_text(run["memory"]) if run.get("memory") else ""
    return "the shard used more than its memory limit%s: give it more with --memory, or use smaller shards" % limit


def disk_text(run: Header) -> str:
    """What to say of a shard that wrote too much."""
    return "the shard wrote more than its disk limit of %s: raise it with --disk" % size_text(run["disk"])


def size_text(size: int) -> str:
    """Bytes for people."""
    for unit, name in ((1 << 30, "GB"), (1 << 20, "MB"), (1 << 10, "kB")):
        if size >= unit:
            return "%.4g %s" % (size / unit, name)
    return "%d bytes" % size


# --- the parent: processes and folders ---


def children_of(pid: int) -> List[int]:
    """The child processes of one process, all of its threads'."""
    found: List[int] = []
    if not os.path.exists("/proc/self/task/%d/children" % os.getpid()):
        return [child for child in map(int, filter(str.isdigit, os.listdir("/proc"))) if parent_of(child) == pid]
    with contextlib.suppress(OSError):  # it has ended meanwhile
        for task in os.listdir("/proc/%d/task" % pid):
            with open("/proc/%d/task/%s/children" % (pid, task)) as file:
                found += map(int, file.read().split())
    return found


def parent_of(pid: int) -> int:
    """The parent of a process; 0 when it has ended."""
    try:
        with open("/proc/%d/stat" % pid) as file:
            return int(file.read().rpartition(")")[2].split()[1])
    except OSError:
        return 0


class Children:
    """The child processes of a process with one thread, asked often: the file stays open."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        try:
            self.fd = os.open("/proc/%d/task/%d/children" % (pid, pid), os.O_RDONLY)
        except OSError:
            self.fd = -1  # a kernel that was built without it

    def now(self) -> List[int]:
        """Its children at this moment."""
        if self.fd < 0:
            return children_of(self.pid)
        try:
            return [int(pid) for pid in os.pread(self.fd, 1 << 20, 0).split()]
        except OSError:
            return []  # it has ended

    def close(self) -> None:
        """Let go of the file."""
        if self.fd >= 0:
            os.close(self.fd)


def descendants(roots: List[int]) -> Set[int]:
    """All processes below these, the roots themselves included."""
    found: Set[int] = set()
    todo = list(roots)
    while todo:
        pid = todo.pop()
        if pid not in found:
            found.add(pid)
            todo += children_of(pid)
    return found


def group_of(pid: int) -> int:
    """The process group of a process; 0 when it has ended."""
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return 0


def send_signal(pid: int, number: int) -> None:
    """Signal a process that may have ended."""
    with contextlib.suppress(
        ProcessLookupError, PermissionError
    ):  # ended, or it changed its user: the container's end takes it
        os.kill(pid, number)


def resident(pid: int) -> int:
    """Bytes of memory that only this process holds, or its share of what is shared."""
    try:
        with open("/proc/%d/statm" % pid) as file:
            fields = file.read().split()
        return (int(fields[1]) - int(fields[2])) * resource.getpagesize()
    except (OSError, IndexError):
        return 0


def proportional(pid: int) -> int:
    """Like `resident`, with pages that a fork shares divided fairly; slower, and on Linux 4.14 or later."""
    try:
        with open("/proc/%d/smaps_rollup" % pid) as file:
            return sum(int(line.split()[1]) * 1024 for line in file if line.startswith("Pss:"))
    except (OSError, ValueError, IndexError):
        return resident(pid)


def disk_use(folder: str) -> int:
    """Bytes that the files below a folder occupy; links are not followed."""
    total = 0
    for base, _, files in os.walk(folder):
        for name in files:
            with contextlib.suppress(OSError):  # removed meanwhile
                total += os.lstat(os.path.join(base, name)).st_blocks * 512
    return total


def make_folder(folder: str) -> None:
    """A folder, mostly below one that exists."""
    try:
        os.mkdir(folder)
    except FileExistsError:
        pass
    except FileNotFoundError:
        os.makedirs(folder, exist_ok=True)


def remove_tree(folder: str) -> None:
    """Remove a folder with all below it; what can't be removed is left to the host."""
    with contextlib.suppress(OSError):  # not empty
        os.rmdir(folder)
        return
    for base, folders, files in os.walk(folder, topdown=False):
        for name in files + folders:
            path = os.path.join(base, name)
            with contextlib.suppress(OSError):  # the host looks again
                if stat.S_ISDIR(os.lstat(path).st_mode):
                    os.rmdir(path)
                else:
                    os.unlink(path)
    with contextlib.suppress(OSError):  # the host looks again
        os.rmdir(folder)


def has_entries(folder: str) -> bool:
    """Whether there is anything in the folder."""
    try:
        with os.scandir(folder) as entries:
            return any(True for _ in entries)
    except OSError:
        return False


def oom_kills(files: List[str]) -> int:
    """How often the kernel's memory killer struck in our control group."""
    for path in files:
        try:
            with open(path) as file:
                lines = [line.split() for line in file]
        except OSError:
            continue  # the other version of control groups
        for words in lines:
            if len(words) == 2 and words[0] == "oom_kill":
                return int(words[1])
    return 0


# --- the parent ---


class Agent:
    """The parent process: one loop over the host, the template and the running shard."""

    def __init__(self, host_in: int, host_out: int) -> None:
        self.host_in = host_in
        self.host_out = host_out
        self.incoming = bytearray()
        self.outgoing = bytearray()
        self.plumbing = Plumbing()
        self.wake, self.wake_end = os.pipe()
        self.children = Children(os.getpid())
        self.setup: Header = {}
        self.job: Header = {}
        self.queue: Deque[Header] = deque()
        self.running: Optional[Running] = None
        self.template: Optional[Template] = None
        self.held = ""
        self.deaths = 0
        self.ooms = 0
        self.reading = False
        self.writing = False
        self.selector = selectors.DefaultSelector()

    def start(self) -> NoReturn:
        """Set up and serve the host until it is gone."""
        for fd in (self.host_in, self.host_out, self.wake, self.wake_end):
            os.set_blocking(fd, False)
        prctl(PR_SET_CHILD_SUBREAPER, 1)
        signal.set_wakeup_fd(self.wake_end, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, lambda *_: self.end())
        self.selector.register(self.host_in, selectors.EVENT_READ, self.hear)
        self.selector.register(self.wake, selectors.EVENT_READ, self.reap)
        gc.collect()
        gc.freeze()
        self.send({"t": "ready", "python": "%d.%d.%d" % sys.version_info[:3], "pid": os.getpid()})
        while True:
            self.turn()

    def turn(self) -> None:
        """One round: wait, handle what came, look at the clock, write."""
        timers = [at for at in self.running.timers() if at] if self.running else []
        wait = max(0.0, min(timers) - time.monotonic()) if timers else None
        for key, _ in self.selector.select(wait):
            key.data()
        if self.running:
            self.look_at_clock(self.running, time.monotonic())
        template = self.template
        if self.queue and self.running is None and not self.held and self.job and template and template.ready:
            self.start_next(template)
        self.write()

    # the host

    def send(self, header: Header, body: bytes = b"") -> None:
        """Queue a frame to the host; never waits."""
        self.outgoing += pack(header, body)

    def write(self) -> None:
        """Write what the host takes now; watch the backlog on both of its sides."""
        if self.outgoing:
            try:
                sent = os.write(self.host_out, memoryview(self.outgoing)[: 1 << 20])
            except BlockingIOError:
                sent = 0
            except OSError:
                self.end()
            del self.outgoing[:sent]
        if bool(self.outgoing) != self.writing:
            self.writing = not self.writing
            if self.writing:
                self.selector.register(self.host_out, selectors.EVENT_WRITE, lambda: None)
            else:
                self.selector.unregister(self.host_out)
        self.listen(on=len(self.outgoing) < BACKLOG)

    def hear(self) -> None:
        """Frames of the host."""
        try:
            data = os.read(self.host_in, 1 << 18)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.end()
        self.incoming += data
        while True:
            try:
                frame = unpack(self.incoming)
            except ValueError as error:
                self.send({"t": "error", "message": "not a frame: %s" % error})
                return
            if frame is None:
                return
            self.obey(frame[0])

    def obey(self, header: Header) -> None:
        """One frame of the host."""
        orders: Dict[Any, Callable[[], None]] = {
            "hello": lambda: self.hello(header),
            "prepare": lambda: self.preload(header["imports"]),
            "job": lambda: self.take_job(header),
            "run": lambda: self.queue.append(header),
            "kill": lambda: self.cancel(header["key"]),
            "recall": lambda: self.give_back(header["key"]),
            "collected": lambda: self.release(header["key"]),
            "bye": self.end,
        }
        order = orders.get(header.get("t"))
        if order is None:
            self.send({"t": "error", "message": "unknown frame %r" % (header.get("t"),)})
        else:
            order()

    def preload(self, imports: List[str]) -> None:
        """Have these modules, while there is no job; more of them do no harm."""
        if self.template is None or not set(imports) <= set(self.template.wanted):
            self.prepare(imports)

    def give_back(self, key: str) -> None:
        """A run may go elsewhere if it has not started."""
        if self.unqueue(key):
            self.send({"t": "recalled", "key": key})

    def release(self, key: str) -> None:
        """Outputs are taken: go on."""
        if self.held == key:
            self.held = ""

    def hello(self, header: Header) -> None:
        """What holds for the whole life of this agent."""
        self.setup = header
        self.ooms = oom_kills(header["oom"])
        os.environ.update(header.get("env", {}))
        for name in ("OMP", "OPENBLAS", "MKL", "NUMEXPR"):
            os.environ.setdefault(name + "_NUM_THREADS", "1")
        os.environ.setdefault("JE_ARROW_MALLOC_CONF", "background_thread:false")  # a second thread forbids the fork
        os.environ.setdefault("MPLBACKEND", "agg")
        known = set(sys.path)
        sys.path[:0] = [path for path in header.get("path", ()) if path not in known]
        self.prepare(list(header.get("imports", ())))

    def take_job(self, header: Header) -> None:
        """The job; what is preloaded stays if it serves: same modules, same number of their threads."""
        self.job = header
        os.environ.update(header["env"])
        threads = any(name.endswith("_NUM_THREADS") for name in header["env"])
        wanted = set(header["imports"])
        if self.template is None or threads or not wanted <= set(self.template.wanted):
            self.prepare(sorted(wanted))
        elif self.template.ready:
            self.template.tell(header)

    def cancel(self, key: str) -> None:
        """End one run, wherever it is."""
        gone = blame("signal", "cancelled")
        if self.running and self.running.key == key:
            self.stop(self.running, gone)
            return
        if self.unqueue(key):
            self.send({"t": "done", "key": key, "ok": False, "exit_code": 137, "error": gone})

    def unqueue(self, key: str) -> bool:
        """Forget a run that has not started; False when there is none."""
        found = [run for run in self.queue if run["key"] == key]
        for run in found:
            self.queue.remove(run)
        return bool(found)

    def end(self, code: int = 0) -> NoReturn:
        """Kill everything and exit."""
        try:
            self.kill_shard()
            if self.running:
                remove_tree(self.running.run["work"])
        finally:
            if self.template:
                send_signal(self.template.pid, signal.SIGKILL)
            os._exit(code)

    # the template

    def prepare(self, imports: List[str], *, really: bool = True) -> None:
        """Replace the template by one that imports these; if not `really`, by one that leaves that to the cell."""
        self.drop_template()
        ours, theirs = socket.socketpair()
        private = [self.host_in, self.host_out, self.wake, self.wake_end, self.selector.fileno(), ours.fileno()]
        private += [fd for fd in (self.children.fd,) if fd >= 0]
        pid = os.fork()
        if pid == 0:
            template_process(theirs, imports if really else [], self.plumbing, private)
        theirs.close()
        template = self.template = Template(pid, ours, imports)
        self.selector.register(ours, selectors.EVENT_READ, lambda: self.hear_template(template))

    def drop_template(self) -> None:
        """Let the template go."""
        if self.template:
            self.selector.unregister(self.template.channel)
            self.template.channel.close()
            self.template.children.close()
            send_signal(self.template.pid, signal.SIGKILL)
            self.template = None

    def hear_template(self, template: Template) -> None:
        """Reports of the template."""
        if template is not self.template:
            return  # replaced in this very turn
        data = template.channel.recv(65536)
        if not data:
            self.lost_template(template)
            return
        template.buffer += data
        if not template.ready:
            self.template_ready(template)
        while template.ready and len(template.buffer) >= REPORT.size:
            what, first, second, third = REPORT.unpack_from(template.buffer)
            del template.buffer[: REPORT.size]
            self.report(what, first, second, third)

    def template_ready(self, template: Template) -> None:
        """Its first message: what it has imported, and whether it may fork with that."""
        frame = unpack(template.buffer)
        if frame is None:
            return
        if not frame[0]["safe"]:
            self.prepare(template.wanted, really=False)
            return
        template.ready = True
        spent = int(1000 * (time.monotonic() - template.since))
        self.send({"t": "warm", "imports": frame[0]["imports"], "ms": spent})
        if self.job:
            template.tell(self.job)

    def report(self, what: bytes, first: int, status: int, max_rss: int) -> None:
        """One report: a shard's process id, its end, or that it could not be forked."""
        running = self.running
        if running is None:
            return
        if what == b"p":
            self.deaths = 0
            self.started(running, first)
        elif what == b"x":
            self.finish(running, status=status, max_rss=max_rss)
        else:
            running.why = blame("node", "no process could be started: %s" % os.strerror(first))
            self.finish(running, status=1 << 8, max_rss=0)

    def lost_template(self, template: Template) -> None:
        """The template is gone, and its shard with it; the next one gets a new one."""
        self.drop_template()
        self.deaths += 1
        if self.deaths > MAX_DEATHS:
            os.write(2, b"the process that imports and compiles the cell ended %d times in a row\n" % self.deaths)
            self.end(1)
        if self.running:
            self.kill_shard()
            self.finish(self.running, status=signal.SIGKILL, max_rss=0)
        self.prepare(template.wanted, really=template.ready)

    def reap(self) -> None:
        """Collect ended children: what shards left to us, and former templates."""
        with contextlib.suppress(BlockingIOError):  # someone read it already
            os.read(self.wake, 4096)
        with contextlib.suppress(ChildProcessError):  # none is left
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass

    # the running shard

    def start_next(self, template: Template) -> None:
        """Start the next run of the queue."""
        run = self.queue.popleft()
        self.running = running = Running(run, self.send)
        for folder in (run["work"], run["outputs"]):
            make_folder(folder)
        if self.setup["watch"]:
            running.watch_at = running.began + WATCH
        template.tell(run)

    def started(self, running: Running, pid: int) -> None:
        """The shard has a process."""
        running.pid = pid
        self.send({"t": "started", "key": running.key, "pid": pid})
        if running.why:
            self.kill_shard()

    def listen(self, *, on: bool) -> None:
        """Read the shard's pipes, or leave them unread so that it waits."""
        if on == self.reading:
            return
        self.reading = on
        pipes = self.plumbing
        for fd, read in ((pipes.out, self.read_out), (pipes.err, self.read_err), (pipes.result, self.read_result)):
            if on:
                self.selector.register(fd, selectors.EVENT_READ, read)
            else:
                self.selector.unregister(fd)

    def read_out(self) -> bool:
        """Some stdout; False when there is none."""
        return self.read_text(self.plumbing.out, "stdout")

    def read_err(self) -> bool:
        """Some stderr; False when there is none."""
        return self.read_text(self.plumbing.err, "stderr")

    def read_text(self, fd: int, stream: str) -> bool:
        """Some text of the running shard; False when there is none."""
        try:
            data = os.read(fd, 65536)
        except BlockingIOError:
            return False
        if self.running:
            self.running.room -= self.running.streams[stream].feed(data, self.running.room, time.monotonic())
        return True

    def read_result(self) -> bool:
        """Some of the shard's result; False when there is none. What is whole starts the time for leftovers."""
        try:
            data = os.read(self.plumbing.result, 65536)
        except BlockingIOError:
            return False
        if self.running:
            self.running.result += data
            if not self.running.linger:
                self.running.linger = time.monotonic() + LINGER
        return True

    def look_at_clock(self, running: Running, now: float) -> None:
        """Send text that is due; enforce the limits."""
        for text in running.streams.values():
            if text.due and text.due <= now:
                text.flush(now)
        if running.deadline and running.deadline <= now:
            limit = "%g s" % running.run["timeout"]
            self.stop(running, blame("timeout", "the shard ran longer than its --timeout of %s" % limit))
        elif running.linger and running.linger <= now:
            running.linger = 0.0
            running.streams["stderr"].feed(LEFT_BEHIND % LINGER, running.room, now)
            self.kill_shard()
        elif running.watch_at and running.watch_at <= now:
            running.watch_at = now + WATCH
            self.watch(running)
        elif running.disk_at and running.disk_at <= now:
            self.watch_disk(running)

    def watch(self, running: Running) -> None:
        """Count the shard's processes and its memory, where the kernel doesn't."""
        pids = self.shard_processes()
        if len(pids) > MAX_PROCESSES:
            text = "the shard had %d processes; at most %d are allowed" % (len(pids), MAX_PROCESSES)
            self.stop(running, {"kind": "signal", "name": "SIGKILL", "message": text})
        limit = running.run.get("memory", 0)
        if limit and sum(map(resident, pids)) > limit and sum(map(proportional, pids)) > limit:
            self.stop(running, blame("memory", memory_text(running.run)))

    def watch_disk(self, running: Running) -> None:
        """Measure the shard's folders."""
        began = time.monotonic()
        run = running.run
        if sum(map(disk_use, {run["work"], run["outputs"], run["scratch"]})) > run["disk"]:
            self.stop(running, blame("disk", disk_text(run)))
        now = time.monotonic()
        running.disk_at = now + max(DISK_WATCH, 20 * (now - began))

    def stop(self, running: Running, why: Header) -> None:
        """Kill the running shard and remember why; its end comes as every end does."""
        running.why = running.why or why
        running.deadline = running.watch_at = running.disk_at = 0.0
        self.kill_shard()

    def shard_processes(self) -> Set[int]:
        """All that the running shard started: what is below us, but for the template."""
        roots = self.children.now()
        if self.template:
            roots = [pid for pid in roots if pid != self.template.pid] + self.template.children.now()
        return descendants(roots) if roots else set()

    def kill_shard(self) -> None:
        """Kill all of the shard's processes, however fast they start others.

        A process group dies as a whole: the kernel lets no member fork while it is being killed. What
        left its group is stopped first, so that none can start another, and killed when no new ones appear.
        """
        stopped: Set[int] = set()
        own = os.getpgrp()
        while True:
            new = self.shard_processes() - stopped
            if not new:
                break
            for group in set(map(group_of, new)) - {own, 0}:
                with contextlib.suppress(ProcessLookupError, PermissionError):  # ended, or it changed its user
                    os.killpg(group, signal.SIGKILL)
            for pid in new:
                send_signal(pid, signal.SIGSTOP)
            stopped |= new
        for pid in stopped:
            send_signal(pid, signal.SIGKILL)

    def sweep(self) -> None:
        """After a shard: kill and reap what it left, until nothing is below us but the template."""
        while self.shard_processes():
            self.kill_shard()
            self.reap()
            time.sleep(0.001)

    def new_oom_kills(self, status: int) -> int:
        """How many processes the kernel killed for memory since the last look; looks only after a SIGKILL."""
        if not (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL):
            return 0
        before, self.ooms = self.ooms, oom_kills(self.setup["oom"])
        return self.ooms - before

    def finish(self, running: Running, *, status: int, max_rss: int) -> None:
        """The shard's process has ended: clean up behind it, then send its last frame."""
        running.pid = 0
        self.running = None
        self.sweep()
        self.running = running
        for read in (self.read_out, self.read_err, self.read_result):
            while read():
                pass
        self.running = None
        now = time.monotonic()
        cut = sum(text.finish(now) for text in running.streams.values())
        run = running.run
        end, body = outcome(running, status, self.new_oom_kills(status))
        remove_tree(run["work"])
        wrote = has_entries(run["outputs"])
        self.held = running.key if wrote and run.get("hold") else ""
        self.send(
            {
                "t": "done",
                "key": running.key,
                **end,
                "seconds": now - running.began,
                "max_rss": max_rss * 1024,
                "cut": cut,
                "outputs": wrote,
            },
            body,
        )


def main() -> None:
    """Move the streams to where nobody prints, and serve."""
    host_in, host_out = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    os.close(nothing)
    Agent(host_in, host_out).start()


if __name__ == "__main__":
    main()
