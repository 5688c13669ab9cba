"""The process of one shard: forked from the template, it runs the cell, sends the result, and exits."""

from __future__ import annotations

import atexit
import errno
import os
import resource
import signal
import sys

from .failures import blame, describe, exit_result
from .frames import pack
from .travel import CannotTravel
from .values import travelling
from .watch import MAX_PROCESSES, out_of_disk
from .words import safe_message

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

    from .cell import Cell
    from .frames import Header


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
    except BaseException as error:  # the last boundary of a process
        os.write(2, ("the agent's own error: %s: %s\n" % (type(error).__name__, safe_message(error))).encode())
    finally:
        os._exit(code)


def run_program(argv: list[str]) -> Header:
    """Become a program; returns only the error when there is none of that name."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # Python ignores both, and a program would inherit that
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    try:
        os.execvp(argv[0], argv)
    except OSError as error:
        text = "%s can't be started: %s" % (argv[0], error.strerror)
        return blame("environment", text, name=type(error).__name__)


def run_cell(cell: Cell, run: Header) -> tuple[Header, bytes]:
    """Run the cell: header and body of the result."""
    try:
        return travelling(cell.value(), run["scratch"])
    except SystemExit as error:
        return exit_result(error), b""
    except CannotTravel as error:
        return {"exit_code": 1, "error": blame("output", str(error))}, b""
    except BaseException as error:  # the user's own code
        return {"exit_code": 1, "error": explained(describe(error, cell.name), error, run)}, b""


def explained(what: Header, error: BaseException, run: Header) -> Header:
    """The exception as data, with the limit that it comes from."""
    number = error.errno if isinstance(error, OSError) else None
    if number == errno.EFBIG and run.get("disk"):
        return {**what, **out_of_disk(run)}
    if number in (errno.EFBIG, errno.ENOSPC, errno.EDQUOT):
        return {**what, "kind": "disk"}
    if number == errno.EAGAIN:
        what["notes"].append("if it was starting processes: a shard may have at most %d at once" % MAX_PROCESSES)
    if isinstance(error, ModuleNotFoundError) and "." not in (error.name or "."):
        what["notes"].append("--require PKG installs a package for the job, --module PATH sends source of your own")
    return what


def send_result(fd: int, data: bytes) -> None:
    """Write all of it; a parent that is gone ends this process soon anyway."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def finish_threads() -> None:
    """What an interpreter does at its end, but for taking itself apart: join threads, run exit handlers."""
    threading = sys.modules.get("threading")  # importing it here would make every fork dearer
    try:
        if threading:
            threading._shutdown()  # noqa: SLF001 - joining all threads has no public name
        atexit._run_exitfuncs()  # noqa: SLF001 - nor has this
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
