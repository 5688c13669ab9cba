"""A cell as a bundle: its source untouched, the values and the source that go with it. Pure but for reading modules.

Theory of operation: `read` parses the cell, deals with what is IPython and not Python, and stops
a syntax error with the numbers that the lines have in the notebook. `bundle` checks the names,
encodes the `--vars`, collects local modules, and lays the files out as `spec.PythonCell` says:
`cell.py`, `vars/NAME.EXT`, `definitions.py` (source of the notebook's functions and classes, run
before the cell), `modules/…`. Equal cells make equal bundles, byte for byte.
"""

from __future__ import annotations

import ast
import re
import traceback
import warnings
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import TYPE_CHECKING

from bacalhau_jupyter import names, sources, values
from bacalhau_jupyter.option_table import JOB_NAMES
from bacalhau_node import modules
from bacalhau_node.errors import SpecError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

MAGIC_LINE = 1
"""Lines of the cell before its body."""
_SHOWN = 500
"""Characters of a line that a message may repeat."""
_HARMLESS = frozenset(("matplotlib", "config", "load_ext", "reload_ext", "unload_ext", "autoreload", "precision"))
"""Magics that only set up the notebook: a shard does as well without them."""
_MAGIC = re.compile(r"\s*(?:[\w.,\[\] ]+=\s*)?(%%?|!!?)\s*([A-Za-z_]\w*)?")
_HELP = re.compile(r"\s*(?:\?{1,2}[\w.%]+|[%\w.]+\?{1,2})\s*;?\s*")


@dataclass(frozen=True)
class Cell:
    """A cell that parses. `source` is the body as it ships, `first` lines stand before it, `notes` tell of changes."""

    source: str
    tree: ast.Module
    name: str
    first: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """What is sent: relative path -> bytes; `imports` to preload; distribution -> version of what it imports."""

    files: dict[str, bytes] = field(repr=False)
    notes: tuple[str, ...]
    imports: tuple[str, ...]
    versions: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Around:
    """The notebook around a cell: its variables, its cells so far, and the folder that imports start from."""

    namespace: Mapping[str, object]
    history: Sequence[str]
    folder: Path


# --- the source ---


def read(body: str, *, name: str = "cell", first: int = MAGIC_LINE) -> Cell:
    """The cell, if its body is Python. `first` lines stand before it; raises `SpecError` as Python would show it."""
    source = body
    notes: list[str] = []
    while True:
        try:
            tree = _compiled(source, name)
            return Cell(source, tree, name, first, tuple(notes))
        except SyntaxError as error:
            changed = _without_magic(source, error.lineno or 0, first)
            if changed is None:
                raise SpecError(_syntax_text(error, name, source, first)) from error
            source = changed
            notes.append(f"line {(error.lineno or 0) + first} is for the notebook and left out of the job")
        except (ValueError, RecursionError, MemoryError) as error:  # null bytes, lone surrogates; absurdly nested
            raise SpecError(f"{name} is not a Python program: {error or type(error).__name__}") from error


def _compiled(source: str, name: str) -> ast.Module:
    """The tree, after the whole of the compiler has seen it ('return' outside function and the like)."""
    source.encode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the shards show them, on the right lines
        flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
        tree = compile(source, name, "exec", flags | ast.PyCF_ONLY_AST, dont_inherit=True)
        compile(source, name, "exec", flags, dont_inherit=True)
    assert isinstance(tree, ast.Module)
    return tree


def _without_magic(source: str, line: int, first: int) -> str | None:
    """`source` with the IPython command in `line` taken out; None if there is none; refuses one that matters."""
    lines = source.split("\n")
    if not 1 <= line <= len(lines):
        return None
    text = lines[line - 1]
    magic = _MAGIC.match(text)
    indent = text[: len(text) - len(text.lstrip())]
    if not magic and not _HELP.fullmatch(text):
        return None
    if magic and not (magic[1] == "%" and magic[2] in _HARMLESS):
        raise SpecError(f"line {line + first}: {_magic_text(magic[1], magic[2] or '')}\n    {text.strip()[:_SHOWN]}")
    lines[line - 1] = f"{indent}pass"
    return "\n".join(lines)


def _magic_text(mark: str, word: str) -> str:
    if mark == "%%":
        return f"`%%{word}` can't stand inside a cell; put it on a line above %%bacalhau"
    if word in ("pip", "conda", "mamba", "uv"):
        return (
            "packages are installed before the shards start: write `# requires: NAME` in its place, or --require NAME"
        )
    if mark.startswith("!"):
        return "`!` is IPython's; in a job use subprocess.run([...]), or --raw to run the whole cell as a shell script"
    return f"`%{word}` is a command of the notebook and can't run in a shard; remove the line"


def _syntax_text(error: SyntaxError, name: str, source: str, first: int) -> str:
    """What Python shows, with the lines of the whole cell and the cell's own name."""
    lines = source.splitlines()
    number = error.lineno or 0
    if not number:
        return f"{name}: SyntaxError: {error.msg}"
    error.text = lines[number - 1] if 1 <= number <= len(lines) and len(lines[number - 1]) <= _SHOWN else None
    error.lineno, error.end_lineno = number + first, (error.end_lineno or number) + first
    _, *shown = traceback.format_exception_only(error)
    return f"{name}, line {number + first}\n{''.join(shown)}".rstrip("\n")


# --- the bundle ---


def bundle(
    cell: Cell, around: Around, *, variables: Sequence[str] = (), extra: Sequence[str] = (), check: bool = True
) -> Bundle:
    """Everything that goes with `cell`: `variables` by `--vars`, `extra` by `--module`; `check`: the names.

    Raises `SpecError` for what can't go, and for names that nothing in the job would bind.
    """
    absent = [name for name in variables if name not in around.namespace]
    if absent:
        raise SpecError(f"--vars {','.join(absent)}: there is no such variable in the notebook")
    chosen = {name: around.namespace[name] for name in variables}
    for name, value in chosen.items():
        if isinstance(value, ModuleType):
            raise SpecError(f"--vars {name}: it is a module; add `{names.import_line(name, value)}` to the cell")
    definitions, missing = _definitions(chosen, cell, around)
    if check:
        found = names.find(cell.source, cell.tree, known={*variables, *JOB_NAMES})
        missing += [replace(item, line=item.line + cell.first) for item in found]
        if missing:
            raise SpecError(names.explain(missing, around.namespace))
    files = {"cell.py": cell.source.encode()}
    if definitions:
        files["definitions.py"] = definitions.encode()
    for name, value in chosen.items():
        if not sources.is_definition(value):
            extension, data = values.encode(name, value)
            files[f"vars/{name}.{extension}"] = data
    return _with_modules(files, cell, ast.parse(definitions), around, extra)


def _definitions(chosen: Mapping[str, object], cell: Cell, around: Around) -> tuple[str, list[names.Missing]]:
    """The text of `definitions.py` for the functions and classes among `chosen`, and what they miss.

    What they use of imported things is imported again; annotations may name anything: the agent does not evaluate them.
    """
    defined = sources.in_order(
        sources.definition(name, value, around.history)
        for name, value in chosen.items()
        if sources.is_definition(value)
    )
    known = {*chosen, *JOB_NAMES, *names.bound(cell.source)}
    lines: set[str] = set()
    missing: list[names.Missing] = []
    for item in defined:
        for each in names.find(item.source, item.tree, known=known):
            line = names.import_line(each.name, around.namespace.get(each.name))
            lines |= {line} if line else set()
            missing += [] if line else [replace(each, user=item.name)]
    parts = ["\n".join(sorted(lines)), *(item.source for item in defined)]
    return "".join(part.strip("\n") + "\n\n\n" for part in parts if part), missing


def _with_modules(
    files: dict[str, bytes], cell: Cell, definitions: ast.Module, around: Around, extra: Sequence[str]
) -> Bundle:
    imported = modules.imports(cell.tree) | modules.imports(definitions)
    sent, all_imports = modules.local(imported, around.folder)
    for wanted in extra:
        sent |= modules.asked(wanted, around.folder)
    files |= {f"modules/{inner}": data for inner, data in sent.items()}
    outside = all_imports - {inner.partition("/")[0].removesuffix(".py") for inner in sent}
    return Bundle(
        files=files,
        notes=(*cell.notes, *_notes(files)),
        imports=modules.preload(outside),
        versions=modules.versions(outside),
    )


def _notes(files: Mapping[str, bytes]) -> Iterator[str]:
    sent = [inner for inner in files if inner.startswith("modules/")]
    if sent:
        total = sum(len(files[inner]) for inner in sent)
        tops = sorted({inner.split("/")[1].removesuffix(".py") for inner in sent})
        yield f"sent along as source: {', '.join(tops)} ({len(sent)} files, {total:,} bytes)"
