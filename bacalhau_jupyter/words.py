r"""The option line as words, and `{expression}` in a word as the value of a notebook variable. Pure.

The rules, all of them: blanks separate words; `'…'` and `"…"` group, and inside quotes a
backslash frees the same quote or another backslash (any other stays as it is, so `C:\data` and
regular expressions survive); `{…}` outside quotes is one piece, its quotes and blanks kept;
`#` at the start of a word begins a comment. `$`, `~`, `*` and everything else are plain text.

`{…}` counts as an expression when it is one in Python and not a tuple, set or dict: glob braces
such as `{a,b}` and `{1..3}` stay what they are. So does `{j-3f2a91bc}`, the beginning of a job's id.
"""

from __future__ import annotations

import ast
import re
import warnings
from dataclasses import dataclass
from numbers import Real
from os import PathLike, fspath
from typing import TYPE_CHECKING

from bacalhau_node.errors import SpecError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@dataclass(frozen=True)
class Word:
    """One word of the line. `quoted`: it began with a quote, so it is a value even where it looks like an option."""

    text: str
    quoted: bool = False


def split(line: str) -> list[Word]:
    """The words of `line`; raises `SpecError` for a quote that is never closed."""
    words: list[Word] = []
    at = 0
    while at < len(line):
        if line[at].isspace():
            at += 1
        elif line[at] == "#":
            end = line.find("\n", at)
            at = end if end >= 0 else len(line)
        else:
            word, at = _word(line, at)
            words.append(word)
    return words


def _word(line: str, start: int) -> tuple[Word, int]:
    parts: list[str] = []
    at = start
    while at < len(line) and not line[at].isspace():
        if line[at] in "'\"":
            part, at = _quoted(line, at)
        else:
            end = closing(line, at) if line[at] == "{" else None
            end = at if end is None else end
            part, at = line[at : end + 1], end + 1
        parts.append(part)
    return Word("".join(parts), quoted=line[start] in "'\""), at


def _quoted(line: str, start: int) -> tuple[str, int]:
    quote, at, parts = line[start], start + 1, []
    while at < len(line) and line[at] != quote:
        if line[at] == "\\" and line[at + 1 : at + 2] in (quote, "\\"):
            at += 1
        parts.append(line[at])
        at += 1
    if at >= len(line):
        raise SpecError(f"a quote is never closed: {line[start : start + 40]}")
    return "".join(parts), at + 1


def closing(text: str, start: int) -> int | None:
    """Where the brace at `start` closes, counting inner braces but not those in quotes; None if it doesn't."""
    depth, quote, at = 0, "", start
    while at < len(text):
        char = text[at]
        if quote:
            at += char == "\\"
            quote = "" if char == quote else quote
        elif char in "'\"":
            quote = char
        elif char in "{}":
            depth += 1 if char == "{" else -1
            if not depth:
                return at
        at += 1
    return None


def expand(text: str, lookup: Callable[[str], object]) -> object:
    """`text` with each `{expression}` replaced by its value; the value itself when `text` is nothing else.

    `lookup` evaluates an expression; what it can't find or do becomes a `SpecError` that names it.
    """
    pieces = list(_pieces(text))
    if len(pieces) == 1 and pieces[0][1]:
        return _evaluate(pieces[0][0], lookup)
    return "".join(as_text(_evaluate(piece, lookup), piece) if live else piece for piece, live in pieces)


def _pieces(text: str) -> Iterator[tuple[str, bool]]:
    """`text` cut into (piece, whether it is an expression); expressions come without their braces."""
    done = at = 0
    while (at := text.find("{", at)) >= 0:
        end = closing(text, at)
        if end is None:
            at += 1
            continue
        inner = text[at + 1 : end].strip()
        if _is_expression(inner):
            if at > done:
                yield text[done:at], False
            yield inner, True
            done = end + 1
        at = end + 1
    if done < len(text):
        yield text[done:], False


JOB = re.compile(r"j-[0-9a-f]{8}[0-9a-f-]{0,28}")
"""A job by its id, or by the first ten characters of it or more."""


def _is_expression(text: str) -> bool:
    if JOB.fullmatch(text):
        return True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an odd literal in what may not be Python at all
            body = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # the last two: absurdly nested text
        return False
    return not isinstance(body, ast.Tuple | ast.Set | ast.Dict)


_OF_EXPRESSIONS = (ArithmeticError, AttributeError, LookupError, RuntimeError, SyntaxError, TypeError, ValueError)
"""What an expression on an option line can be expected to raise."""


def _evaluate(expression: str, lookup: Callable[[str], object]) -> object:
    try:
        return lookup(expression)
    except NameError as error:
        name = error.name or expression
        raise SpecError(f"{{{expression}}}: there is no variable `{name}` in the notebook") from error
    except _OF_EXPRESSIONS as error:
        raise SpecError(f"{{{expression}}}: {type(error).__name__}: {error}") from error


def as_text(value: object, label: str) -> str:
    """A notebook value as the text of an option: text, numbers, paths, and jobs or results by their CID."""
    if isinstance(value, str):
        return value
    if isinstance(value, PathLike):
        path = fspath(value)
        return path if isinstance(path, str) else path.decode("utf-8", "surrogateescape")
    if isinstance(value, Real) and not isinstance(value, bool):
        return str(value)
    result = getattr(value, "result", None)
    cid = getattr(result() if callable(result) else value, "cid", None)
    if isinstance(cid, str) and cid:
        return f"ipfs://{cid}"
    raise SpecError(f"`{label}` is {_article(type(value).__name__)}; text, a number, a path or a job is needed")


def _article(name: str) -> str:
    return f"an {name}" if name[:1].lower() in "aeio" else f"a {name}"
