"""The cell: read and compiled in the template, evaluated in each shard; the names that it finds."""

from __future__ import annotations
import __future__

import ast
import io
import linecache
import os
import sys
import tokenize
import types
from pathlib import Path

from .seeds import seed_generators
from .travel import Muted
from .variables import define, load_variables, read_bytes

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from .frames import Header

FUTURE = 0
for _name in __future__.all_feature_names:
    FUTURE |= getattr(__future__, _name).compiler_flag


def compile_cell(source: str, name: str) -> list[tuple[types.CodeType, bool]]:
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


def evaluate(parts: list[tuple[types.CodeType, bool]], names: dict[str, Any]) -> Any:
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
        self.inputs: list[str] = list(run.get("logical", ()))
        self.shared: list[Path] = [Path(path) for path in run.get("shared", ())]

    def __repr__(self) -> str:
        return "shard %d of %d: %s" % (self.index, self.count, ", ".join(self.inputs) or "no inputs")


class Cell:
    """What runs: read and compiled in the template, evaluated in each shard."""

    def __init__(self, job: Header) -> None:
        self.argv: list[str] = list(job["argv"])
        self.name: str = job["name"]
        self.bundle: str = job["bundle"]
        self.parts: list[tuple[types.CodeType, bool]] = []
        self.problem: BaseException | None = None
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
        except Exception as error:  # anybody's text
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
