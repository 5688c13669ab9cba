"""Measure the product's files and functions against the budgets of CONTRIBUTING.md.

A file of more than 400 lines needs a reason in its first lines ("Longer than 400 lines because …");
without one this script fails. So does a broad `except` that neither raises again nor says in its line whose faults
it takes. Function lengths are printed as a trend, with the five longest named.
"""

from __future__ import annotations

import ast
import io
import sys
import tokenize
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PRODUCT = ("bacalhau_jupyter", "node/bacalhau_node")
SUFFIXES = (".py", ".js", ".css")
FILE_LINES = 400
FUNCTION_LINES = 25
EXCUSE = "longer than 400 lines because"
EXCUSE_WITHIN = 80
SILENT = {"COMMENT", "NL", "NEWLINE", "INDENT", "DEDENT", "ENCODING", "ENDMARKER"}


class Function(NamedTuple):
    """One function and its lines of code: neither docstring, comments nor blank lines."""

    lines: int
    place: str


def code_lines(source: str) -> set[int]:
    """The numbers of the lines that hold code or text."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    spans = [(token.start[0], token.end[0]) for token in tokens if tokenize.tok_name[token.type] not in SILENT]
    return {number for first, last in spans for number in range(first, last + 1)}


def functions(path: Path) -> list[Function]:
    """Every function of a Python file with its length."""
    source = path.read_text()
    code = code_lines(source)
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0]
            documented = ast.get_docstring(node) is not None and first.end_lineno is not None
            silent = range(first.lineno, (first.end_lineno or 0) + 1) if documented else range(0)
            own = code & set(range(node.lineno, (node.end_lineno or node.lineno) + 1)) - set(silent)
            found.append(Function(len(own), f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"))
    return found


def product_files() -> list[Path]:
    """All source files of the two packages."""
    return sorted(p for top in PRODUCT for p in (ROOT / top).rglob("*") if p.suffix in SUFFIXES)


def too_long(path: Path) -> str | None:
    """Why a file breaks the budget, or None."""
    lines = path.read_text().splitlines()
    excused = EXCUSE in " ".join(lines[:EXCUSE_WITHIN]).lower()
    if len(lines) <= FILE_LINES or excused:
        return None
    where = f"in its first {EXCUSE_WITHIN} lines"
    return f"{path.relative_to(ROOT)} has {len(lines)} lines: split it, or say why ('{EXCUSE} …' {where})"


def too_broad(path: Path) -> list[str]:
    """Each `except` of a Python file that takes every error for itself and doesn't say why."""
    source = path.read_text()
    lines = source.splitlines()
    return [
        f"{path.relative_to(ROOT)}:{node.lineno} takes every error: name those that are meant, or say whose these are"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or ast.unparse(node.type) in {"Exception", "BaseException"})
        and not (isinstance(last := node.body[-1], ast.Raise) and last.exc is None)
        and "  # " not in lines[node.lineno - 1]
    ]


def main() -> int:
    """Print the numbers; 1 when a file is too long, or an `except` too broad, without a reason."""
    files = product_files()
    found = sorted((one for path in files if path.suffix == ".py" for one in functions(path)), reverse=True)
    if found:
        p95 = found[len(found) // 20].lines
        over = sum(one.lines > FUNCTION_LINES for one in found)
        print(f"{len(files)} files, {len(found)} functions: 95% have at most {p95} lines, {over} over {FUNCTION_LINES}")
    for one in found[:5]:
        print(f"  {one.lines:4} {one.place}")
    problems = list(filter(None, map(too_long, files)))
    problems += [problem for path in files if path.suffix == ".py" for problem in too_broad(path)]
    print(*problems, sep="\n", end="\n" if problems else "")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
