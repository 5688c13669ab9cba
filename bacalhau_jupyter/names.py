"""Names that a cell reads but that nothing in the job binds. Pure.

Theory of operation: the compiler's own symbol tables tell which names of the module's scope are
read and which are assigned, function bodies and comprehensions included. Two things they can't
tell are added from the tree: `x += 1` and `del x` need an `x` that is there, and so does
`df = df.dropna()` as a statement of the cell itself, where the reading comes before the binding.
Anything less certain (branches, loops, order of calls) counts as bound: a check that stops a
good cell is worse than one that misses a bad name.
"""

from __future__ import annotations

import ast
import builtins
import difflib
import inspect
import symtable
import types
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bacalhau_jupyter.option_table import JOB_NAMES

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

NOTEBOOK_ONLY = frozenset(("display", "get_ipython", "In", "Out", "_", "__"))
"""What IPython adds to a notebook's names, some of it to the builtins of the kernel."""
ALWAYS = (frozenset(dir(builtins)) - NOTEBOOK_ONLY) | {
    "__name__",
    "__doc__",
    "__builtins__",
    "__annotations__",
    "__class__",
}
_MAKERS_OF_NAMES = frozenset(("exec", "eval", "globals"))
_SIMPLE = (ast.Assign, ast.AugAssign, ast.AnnAssign, ast.Expr, ast.Delete, ast.Assert)
_OWN_SCOPE = (ast.Lambda, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
_COMPREHENSION = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


@dataclass(frozen=True, order=True)
class Missing:
    """A name that nothing binds, and the first line that reads it; `user` is the shipped function that reads it."""

    line: int
    name: str
    user: str = ""


def find(source: str, tree: ast.Module, *, known: Collection[str]) -> list[Missing]:
    """The missing names of `source` (whose tree is `tree`), by line; `known` are bound before it runs.

    Empty where names can be made at run time: `import *`, `exec`, `eval`, `globals()`.
    """
    if any(_makes_names(node) for node in ast.walk(tree)):
        return []
    given = ALWAYS | set(known)
    read, own = _global_names(source)
    grown = {target.id for target in _grown_targets(_module_nodes(tree))}
    own |= _walrus(tree)  # from Python 3.12 on, the tables miss those inside comprehensions
    names = read - own | (grown - set(_bindings(tree))) | _read_too_early(tree, given) & (read | grown)
    return sorted(Missing(_first_line(tree, name), name) for name in names - given)


def bound(source: str) -> set[str]:
    """The names that `source` itself binds in the module's scope."""
    return _global_names(source)[1]


def _makes_names(node: ast.AST) -> bool:
    if isinstance(node, ast.ImportFrom):
        return any(alias.name == "*" for alias in node.names)
    return isinstance(node, ast.Name) and node.id in _MAKERS_OF_NAMES


def _global_names(source: str) -> tuple[set[str], set[str]]:
    """(read, bound): the names of the module's scope, those that functions reach included."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the syntax check has compiled it before
        tables = [symtable.symtable(source, "cell", "exec")]
    read: set[str] = set()
    bound: set[str] = set()
    for table in tables:
        tables += table.get_children()
        for symbol in table.get_symbols():
            binds = symbol.is_assigned() or symbol.is_imported() or symbol.is_parameter()
            # `is_global` alone is wrong inside a function called "top": Python takes it for the module.
            reaches_module = table.get_type() == "module" or symbol.is_declared_global() or not binds
            if symbol.is_global() and reaches_module:
                bound |= {symbol.get_name()} if binds else set()
                read |= {symbol.get_name()} if symbol.is_referenced() else set()
    return read, bound


def _grown_targets(nodes: Iterator[ast.AST]) -> Iterator[ast.Name]:
    """The targets of `x += 1` and `del x`, which bind nothing new and need an `x`."""
    for node in nodes:
        if isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name):
            yield node.target
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Del):
            yield node


def _module_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes that run in the module's own scope with `node`: no function bodies, no insides of comprehensions."""
    yield node
    if isinstance(node, _OWN_SCOPE):
        return
    inner = [node.generators[0].iter] if isinstance(node, _COMPREHENSION) else ast.iter_child_nodes(node)
    for child in inner:
        yield from _module_nodes(child)


def _bindings(tree: ast.AST) -> Iterator[str]:
    """Every name that something in `tree` binds anew, in whatever scope."""
    grown = set(_grown_targets(ast.walk(tree)))
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name, ctx=ast.Store()) if node not in grown:
                yield name
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield name
            case ast.alias(name=name, asname=asname):
                yield asname or name.partition(".")[0]
            case ast.ExceptHandler(name=str(name)) | ast.MatchAs(name=str(name)) | ast.MatchStar(name=str(name)):
                yield name
            case ast.MatchMapping(rest=str(name)):
                yield name
            case _:
                pass


def _read_too_early(tree: ast.Module, given: Collection[str]) -> set[str]:
    """Names that a plain statement of the cell reads before any statement so far can have bound them."""
    so_far = set(given)
    found: set[str] = set()
    for statement in tree.body:
        if isinstance(statement, _SIMPLE):
            found |= set(_reads(statement)) - so_far - _walrus(statement)
        so_far |= set(_bindings(statement))
    return found


def _reads(statement: ast.stmt) -> Iterator[str]:
    yield from (target.id for target in _grown_targets(_module_nodes(statement)))
    for node in _module_nodes(statement):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            yield node.id


def _walrus(tree: ast.AST) -> set[str]:
    return {
        node.target.id
        for node in ast.walk(tree)
        if isinstance(node, ast.NamedExpr) and isinstance(node.target, ast.Name)
    }


def _first_line(tree: ast.Module, name: str) -> int:
    """The first line that reads `name`, or (`x += 1`) that changes it."""
    places = [node for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id == name]
    reads = [node for node in places if isinstance(node.ctx, ast.Load)]
    return min((node.lineno for node in reads or places), default=1)


# --- what to say ---


def explain(missing: Sequence[Missing], namespace: Mapping[str, object]) -> str:
    """What is missing and what to do about it; `namespace` holds the notebook's variables."""
    lines = []
    for item in missing:
        place = f"`{item.user}` uses" if item.user else f"line {item.line}:"
        says, remedy = _verdict(item.name, namespace)
        lines.append(f"{place} `{item.name}`{', which' if item.user else ''} {says}{remedy and f': {remedy}'}")
    wanted = [item.name for item in missing if _verdict(item.name, namespace)[1].startswith("add --vars")]
    if len(set(wanted)) > 1:
        lines.append(f"All of them: --vars {','.join(dict.fromkeys(wanted))}")
    return "\n".join((*lines, "(--no-check skips this check)"))


def _verdict(name: str, namespace: Mapping[str, object]) -> tuple[str, str]:
    """(what is wrong with the name, what to do)."""
    if name in NOTEBOOK_ONLY:
        remedy = "print the object, or make it the last line" if name == "display" else ""
        return "exists only in a notebook, not in the job", remedy
    if name not in namespace:
        close = difflib.get_close_matches(name, [*JOB_NAMES, *namespace, *ALWAYS], n=1, cutoff=0.75)
        return "is not defined, neither in the cell nor in the notebook", f"did you mean `{close[0]}`?" if close else ""
    value = namespace[name]
    line = import_line(name, value)
    if line:
        return "is imported in your notebook, not in the job", f"add `{line}` to the cell"
    if inspect.isroutine(value) or inspect.isclass(value):
        return "is defined in your notebook, not in the job", f"add --vars {name} (its source goes along)"
    return "lives in your notebook, not in the job", f"add --vars {name}"


def import_line(name: str, value: object) -> str | None:
    """The import that binds `name` to `value` again, if it is a module, or a function or class out of one."""
    if isinstance(value, types.ModuleType):
        home, _, last = value.__name__.rpartition(".")
        if name == value.__name__:
            return f"import {name}"
        return f"from {home} import {name}" if home and name == last else f"import {value.__name__} as {name}"
    origin = getattr(value, "__module__", None)
    if not (inspect.isroutine(value) or inspect.isclass(value)) or origin in (None, "__main__", "builtins"):
        return None
    original = getattr(value, "__name__", name)
    return f"from {origin} import {original}" + (f" as {name}" if original != name else "")
