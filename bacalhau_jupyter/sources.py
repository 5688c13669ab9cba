"""Functions and classes of the notebook as source: the text that makes them again, never a pickle.

A function's source is found by Python itself; a class that was typed into a cell is looked up in
the notebook's history, newest cell first. What can't be made again from its text alone (a
closure, something built in, something made by a call) is refused.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bacalhau_node.errors import SpecError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence


@dataclass(frozen=True)
class Definition:
    """The source that binds `name`, with its tree."""

    name: str
    source: str
    tree: ast.Module


def is_definition(value: object) -> bool:
    """Whether `value` is something that goes along as source: a function, a class, or a function that wraps one."""
    return inspect.isclass(value) or inspect.isfunction(inspect.unwrap(value)) if callable(value) else False


def definition(name: str, value: Any, history: Sequence[str]) -> Definition:
    """The source of a function or class called `name` in the notebook, whose cells so far are `history`."""
    inner = inspect.unwrap(value)
    home = getattr(inner, "__module__", None)
    if home != "__main__":
        raise SpecError(f"--vars {name}: it comes from the module {home}; import it in the cell instead")
    if "<locals>" in getattr(inner, "__qualname__", "") or getattr(inner, "__closure__", None):
        raise SpecError(f"--vars {name}: it was made inside another function and holds on to its variables; {_MOVE}")
    source = _of_function(inner) if inspect.isfunction(inner) else None
    source = source or _of_history(inner.__name__, history) or _of_history(name, history)
    if source is None:
        raise SpecError(f"--vars {name}: no cell of this notebook holds its source; {_MOVE}")
    tree = ast.parse(source)
    own = _bound(tree.body[0])
    if own != name:
        source += f"\n{name} = {own}"
        tree = ast.parse(source)
    return Definition(name, source, tree)


_MOVE = "define it in a cell of its own, or in a .py file beside the notebook and import it"


def in_order(definitions: Iterable[Definition]) -> list[Definition]:
    """With what a definition needs in the moment it is made (bases, decorators, defaults) before it."""
    rest = {item.name: item for item in definitions}
    done: list[Definition] = []
    while rest:
        ready = [item for item in rest.values() if not (_needs(item.tree) & (rest.keys() - {item.name}))]
        if not ready:
            raise SpecError(f"--vars {','.join(rest)}: each of them needs another one to be made first")
        done += [rest.pop(item.name) for item in ready]
    return done


def _needs(tree: ast.Module) -> set[str]:
    """The names that are read while `tree` runs, function bodies excluded."""
    found: set[str] = set()
    rest: list[ast.AST] = list(tree.body)
    while rest:
        node = rest.pop()
        if isinstance(node, ast.Name):
            found.add(node.id)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            rest += [*node.decorator_list, node.args, *filter(None, [node.returns])]
        elif isinstance(node, ast.Lambda):
            rest.append(node.args)
        else:
            rest += ast.iter_child_nodes(node)
    return found


def _of_function(function: Callable[..., Any]) -> str | None:
    """What Python finds, if it is one whole definition; a lambda's line may hold more or less than that."""
    try:
        source = textwrap.dedent(inspect.getsource(function))
        tree = ast.parse(source)
    except (OSError, TypeError, SyntaxError, ValueError):
        return None
    return source if len(tree.body) == 1 and _bound(tree.body[0]) else None


def _of_history(name: str, history: Sequence[str]) -> str | None:
    """The newest definition of `name` at the top level of a cell."""
    for cell in reversed(history):
        if name not in cell:
            continue
        try:
            tree = ast.parse(cell)
        except (SyntaxError, ValueError):  # a cell with magics, or one that never ran
            continue
        for node in reversed(tree.body):
            if _bound(node) == name:
                return _segment(cell, node)
    return None


def _bound(node: ast.stmt) -> str | None:
    """The name that a definition binds: `def`, `class`, or `name = lambda …`."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return node.name
    if isinstance(node, ast.Assign) and isinstance(node.value, ast.Lambda) and isinstance(node.targets[0], ast.Name):
        return node.targets[0].id
    return None


def _segment(cell: str, node: ast.stmt) -> str:
    decorators = getattr(node, "decorator_list", [])
    first = min([node.lineno, *(item.lineno for item in decorators)])
    return "\n".join(cell.splitlines()[first - 1 : node.end_lineno])
