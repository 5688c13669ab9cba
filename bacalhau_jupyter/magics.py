"""`%%bacalhau` and `%bacalhau`: parse, call, display. Nothing is decided here.

This is all that `%load_ext` waits for, so everything but IPython is imported where it is used.
"""

# ruff: noqa: PLC0415

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from IPython.core.completer import SimpleCompletion, context_matcher
from IPython.core.error import UsageError
from IPython.core.magic import Magics, line_cell_magic, magics_class, no_var_expand, output_can_be_silenced

from bacalhau_node.errors import BacalhauError, BugError, SpecError

if TYPE_CHECKING:
    from concurrent.futures import Future

    from IPython.core.completer import CompletionContext, SimpleMatcherResult


@magics_class
class BacalhauMagics(Magics):
    """The two magics of the extension."""

    @no_var_expand
    @output_can_be_silenced
    @line_cell_magic
    def bacalhau(self, line: str, cell: str | None = None) -> object:
        """Run the cell on shards of your data: `%%bacalhau --input data --glob '*.csv' --shards 10 --df totals`.

        In the cell, `inputs` are the files of one shard, `outputs` is a folder for files that are part
        of the result, and the value of the last expression comes back. The cell's own value is the joined
        DataFrame with `--df`, else the `Result`. `%bacalhau --help` lists all options.

        As a line: `%bacalhau status | jobs | logs ID [SHARD] | attach ID | cancel ID | nodes | network | connect URL |
        config | --help`.
        """
        try:
            return self._command(line) if cell is None else self._cell(line, cell)
        except SpecError as error:
            # The class itself: IPython shows a subclass with a whole traceback.
            raise UsageError(str(error)) from None
        except BugError:
            raise
        except BacalhauError as error:
            from bacalhau_jupyter.failures import brief

            raise brief(error) from None

    def _cell(self, line: str, cell: str) -> object:
        from bacalhau_jupyter import options, running

        assert self.shell is not None  # IPython sets it
        request = options.parse(line, options.notebook(self.shell.user_ns))
        if request.help:
            print(options.usage())  # noqa: T201  a cell's output
            return None
        return running.run(self.shell, request, cell)

    def _command(self, line: str) -> object:
        from bacalhau_jupyter import commands

        return commands.run(self.shell, line)


def load(shell: Any) -> None:
    """Register magics and completions with `shell` and begin to start the node; again: the same, once."""
    unload(shell)
    shell.register_magics(BacalhauMagics)
    shell.Completer.custom_matchers.append(complete_options)
    from bacalhau_jupyter.session import session

    _tell_unfinished(shell, session().begin(_unfinished))


def unload(shell: Any) -> None:
    """Take back what `load` registered."""
    matchers = shell.Completer.custom_matchers
    matchers[:] = [matcher for matcher in matchers if matcher is not complete_options]
    for kind in ("line", "cell"):
        shell.magics_manager.magics[kind].pop("bacalhau", None)


# --- the start ---


async def _unfinished(client: Any) -> tuple[str, ...]:
    return tuple(getattr(client, "interrupted", ()))


def _tell_unfinished(shell: Any, answer: Future[tuple[str, ...]]) -> None:
    """Once the node is up, say under the present cell which jobs an earlier kernel left behind."""
    parent = shell.get_parent() if hasattr(shell, "kernel") else None

    def tell() -> None:
        if answer.exception() is not None or not answer.result():
            return
        if parent is not None:
            getattr(shell, "set_thread_parent", shell.set_parent)(parent)
        from bacalhau_node.ids import short

        left = answer.result()
        names = ", ".join(f"`%bacalhau attach {short(job)}`" for job in left[:5])
        print(f"{len(left)} unfinished job{'s' * (len(left) != 1)}: {names}", flush=True)  # noqa: T201  a cell's output

    threading.Thread(target=tell, name="bacalhau start", daemon=True).start()


# --- completions ---


@context_matcher()  # type: ignore[untyped-decorator]  # IPython has no types
def complete_options(context: CompletionContext) -> SimpleMatcherResult:
    """Options and their choices, on the line of the magic only; the commands of `%bacalhau`."""
    magic, blank, line = context.line_with_cursor[: context.cursor_position].partition(" ")
    if blank and magic == "%%bacalhau" and context.cursor_line == 0:
        from bacalhau_jupyter.options import line_completions as completions
    elif blank and magic == "%bacalhau":
        from bacalhau_jupyter.commands import completions
    else:
        return {"completions": []}
    found = [SimpleCompletion(name, type="param") for name in completions(line)]
    return {"completions": found, "suppress": bool(found)}
