"""How a cell failed, as data: the `ShardError` of the host's messages."""

from __future__ import annotations

import linecache
import os

from .words import clean, safe_message, safe_repr, shorten

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .frames import Header

MAX_MESSAGE = 10_000
"""Characters of an exception's message that travel."""
MAX_FRAMES = 20
"""Frames of a traceback that travel from each of its ends."""
OWN_FOLDER = os.path.dirname((lambda: None).__code__.co_filename)
"""Frames of code that lies here are left out."""


def blame(kind: str, message: str, *, name: str = "") -> Header:
    """A failure that is no exception of the cell."""
    return {"kind": kind, "name": name, "message": message}


def exit_result(error: SystemExit) -> Header:
    """The result of a cell that ended by `sys.exit`: nothing or 0 is a good end without a value."""
    if error.code is None or error.code == 0:
        return {"exit_code": 0}
    if isinstance(error.code, int):
        code = error.code & 0xFF
        return {"exit_code": code, "error": blame("exit", "the cell ended with exit code %d" % code)}
    text = shorten(error.code if isinstance(error.code, str) else safe_repr(error.code), MAX_MESSAGE)
    return {"exit_code": 1, "error": blame("exit", "the cell ended with exit code 1: %s" % text)}


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


def members(error: BaseException) -> list[str]:
    """The exceptions of a group, one line each."""
    inside = getattr(error, "exceptions", ()) if type(error).__name__.endswith("ExceptionGroup") else ()
    return ["holds %s: %s" % (type(one).__name__, shorten(safe_message(one), 500)) for one in inside[:10]]


def causes(error: BaseException, name: str) -> list[str]:
    """The chain of exceptions before this one, one line each, at most five."""
    lines: list[str] = []
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


def traceback_frames(error: BaseException, name: str) -> tuple[list[Header], int]:
    """The frames from the cell's own first one on, and how many were left out in the middle."""
    found: list[Header] = []
    trace = error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        if os.path.dirname(code.co_filename) != OWN_FOLDER:
            found.append(frame_of(code.co_filename, trace.tb_lineno, code.co_name, name))
        trace = trace.tb_next
    if isinstance(error, SyntaxError) and error.filename and error.lineno:
        found.append(frame_of(error.filename, error.lineno, "", name))
    found = from_the_cell(found)
    if len(found) <= 2 * MAX_FRAMES:
        return found, 0
    return found[:MAX_FRAMES] + found[-MAX_FRAMES:], len(found) - 2 * MAX_FRAMES


def from_the_cell(frames: list[Header]) -> list[Header]:
    """The frames without those before the cell's own first one."""
    return frames[next((at for at, frame in enumerate(frames) if frame["in_cell"]), 0) :]


def crash_frames(text: str, name: str) -> list[Header]:
    """The same of what `faulthandler` wrote, which begins with the innermost: `  File "cell", line 3 in f`."""
    found: list[Header] = []
    for line in text.splitlines():
        place, _, rest = line.partition('", line ')
        number, _, function = rest.partition(" in ")
        file = place[len('  File "') :]
        if number.isdigit() and os.path.dirname(file) != OWN_FOLDER:
            found.append(frame_of(file, int(number), function, name))
    return from_the_cell(found[::-1])


def frame_of(file: str, line: int, function: str, name: str) -> Header:
    """One frame as data; the text comes from the file, or from the cell's source."""
    text = clean(linecache.getline(file, line).strip())
    return {"file": file, "line": line, "function": function, "text": text[:500], "in_cell": file == name}
