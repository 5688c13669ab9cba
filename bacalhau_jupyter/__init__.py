"""Run a notebook cell on shards of your data: `%load_ext bacalhau_jupyter`, then `%%bacalhau`.

From Python: `submit`, `attach`, `jobs` and `connect`, which are in `bacalhau_jupyter.asking`; they load
when they are first used, so that loading the extension takes milliseconds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bacalhau_jupyter.asking import attach, connect, jobs, submit
    from bacalhau_jupyter.devstacks import Devstack, devstack
    from bacalhau_jupyter.failures import JobInterrupted
    from bacalhau_jupyter.job import Job
    from bacalhau_jupyter.result import Result

_HOME = {
    "Devstack": "devstacks",
    "Job": "job",
    "JobInterrupted": "failures",
    "Result": "result",
    "attach": "asking",
    "connect": "asking",
    "devstack": "devstacks",
    "jobs": "asking",
    "submit": "asking",
}

__all__ = [
    "Devstack",
    "Job",
    "JobInterrupted",
    "Result",
    "attach",
    "connect",
    "devstack",
    "jobs",
    "load_ipython_extension",
    "submit",
    "unload_ipython_extension",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module  # noqa: PLC0415  this module imports nothing before it is needed

    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def load_ipython_extension(shell: Any) -> None:
    """`%load_ext bacalhau_jupyter`: the magics, their completions, and a node that starts meanwhile."""
    from bacalhau_jupyter import magics  # noqa: PLC0415  this module imports nothing before it is needed

    magics.load(shell)


def unload_ipython_extension(shell: Any) -> None:
    """`%unload_ext bacalhau_jupyter`: takes the magics back and closes the node; running jobs stop."""
    from bacalhau_jupyter import magics, session  # noqa: PLC0415  this module imports nothing before it is needed

    magics.unload(shell)
    session.close()
