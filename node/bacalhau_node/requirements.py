"""The packages that a cell asks for, read and checked before anything is sent.

Theory of operation. A cell says what it needs in three ways: `--require` on its line, a block of
comments as PEP 723 describes it (`# /// script` … `# ///`, TOML inside), and a short line of
comment, `# requires: pandas>=2, tabulate`. Block and short line are read as comments, so that the
same text inside a string is just text. What the line of the cell says about a package takes the
place of what the cell's text says about it. Only names with versions, extras and markers pass:
a node installs from its package indexes, never from an address that a job names.
"""

from __future__ import annotations

import io
import re
import tokenize
import tomllib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from bacalhau_node.errors import SpecError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from packaging.requirements import Requirement

MOST: Final = 100
"""Requirements of one cell: far more than anyone writes by hand."""
_BETWEEN: Final = re.compile(r",(?![^\[]*\])\s*(?=[A-Za-z0-9])")
"""The commas of `pandas>=2,<3, rich[a,b]` that stand between packages: versions begin with an operator."""
_SHORT: Final = re.compile(r"#\s*requires:(.*)")
_OPEN: Final = re.compile(r"# /// ([A-Za-z0-9-]+)\s*")
_CLOSE: Final = "# ///"
_KEYS: Final = frozenset(("dependencies", "requires-python", "tool"))


@dataclass(frozen=True, slots=True)
class Declared:
    """What the text of a cell asks for: packages, and which Pythons will do ("": any)."""

    requires: tuple[str, ...] = ()
    python: str = ""


def parse(text: str) -> Requirement:
    """One requirement as PEP 508 writes it, without an address. Raises `SpecError`, which names it."""
    from packaging.requirements import InvalidRequirement, Requirement  # noqa: PLC0415 - few cells ask for packages

    try:
        found = Requirement(text)
    except InvalidRequirement as error:
        reason = str(error).splitlines()[0]
        raise SpecError(f"{text.strip()!r} is not a package with versions, such as 'tabulate>=0.9': {reason}") from None
    if found.url is not None:
        raise SpecError(
            f"{text.strip()!r} names an address; only packages of the node's package index can be installed. "
            "Source of your own goes along with --module"
        )
    return found


def split(text: str) -> tuple[str, ...]:
    """The requirements in a list with commas, each as `normal` writes it. Raises `SpecError`."""
    parts = [part for part in _BETWEEN.split(text) if part.strip()]
    if not parts:
        raise SpecError("no package is named; write something like tabulate>=0.9")
    return tuple(normal(part) for part in parts)


def normal(text: str) -> str:
    """One requirement in the spelling that equal ones share. Raises `SpecError`."""
    from packaging.utils import canonicalize_name  # noqa: PLC0415 - few cells ask for packages

    found = parse(text)
    found.name = canonicalize_name(found.name)
    return str(found)


def name_of(requirement: str) -> str:
    """The normal name of the package that a requirement is about."""
    from packaging.utils import canonicalize_name  # noqa: PLC0415 - few cells ask for packages

    return canonicalize_name(parse(requirement).name)


def merged(line: Iterable[str], text: Iterable[str]) -> tuple[str, ...]:
    """What a cell needs in all, sorted: what its line says of a package counts in place of what its text says."""
    said = set(line)
    names = {name_of(requirement) for requirement in said}
    found = sorted(said | {requirement for requirement in text if name_of(requirement) not in names})
    if len(found) > MOST:
        raise SpecError(f"{len(found)} packages are asked for; a cell can have at most {MOST}")
    return tuple(found)


def beyond(versions: Mapping[str, str], requires: Iterable[str]) -> dict[str, str]:
    """`versions` of distributions without those that `requires` is about: these are not the notebook's."""
    from packaging.utils import canonicalize_name  # noqa: PLC0415 - few cells ask for packages

    names = {name_of(requirement) for requirement in requires}
    return {name: version for name, version in versions.items() if canonicalize_name(name) not in names}


def unmet(requires: Iterable[str], *, python: str, versions: Mapping[str, str]) -> list[str]:
    """Which of `requires` a Python of this version with these distributions (by normal name) lacks.

    Raises `SpecError` for a distribution that it has in a version that won't do. What a requirement's
    extras bring is not looked for: one with extras counts as lacking.
    """
    lacking = []
    marks = {"python_full_version": python, "python_version": ".".join(python.split(".")[:2])}
    for text in requires:
        wanted = parse(text)
        if wanted.marker is not None and not wanted.marker.evaluate(marks):
            continue
        have = versions.get(name_of(text))
        if have is not None and not wanted.specifier.contains(have, prereleases=True):
            raise SpecError(
                f"the cell requires {text}, and its environment has {wanted.name} {have}, which stays as it is: "
                "packages are added to it, never changed. Change it where the notebook runs, or name an --image"
            )
        if have is None or wanted.extras:
            lacking.append(text)
    return lacking


def check_python(wanted: str, version: str) -> None:
    """Raise `SpecError` if a Python of this version ("3.11.4") is not among those that `requires-python` allows."""
    from packaging.specifiers import SpecifierSet  # noqa: PLC0415 - few cells ask for a Python

    if wanted and not SpecifierSet(wanted).contains(version, prereleases=True):
        raise SpecError(
            f"the cell needs Python {wanted} (requires-python); jobs run the notebook's, which is {version}: "
            "start the notebook with another Python, or name an --image that has one"
        )


# --- what the text of a cell says ---


def declared(source: str, *, first: int = 0) -> Declared:
    """What block and short lines of `source`, which is Python, ask for; `first` lines stand before it.

    Raises `SpecError` with the line for what can't be read.
    """
    if "requires:" not in source and "# ///" not in source:
        return Declared()
    comments = _comments(source)
    start, end, kind = _block(comments, first)
    block = Declared()
    if kind:
        block = _read_block({line: comments[line] for line in range(start + 1, end)}, first)
    shorts = {
        line: short[1]
        for line, text in comments.items()
        if not (kind and start <= line <= end) and (short := _SHORT.fullmatch(text))
    }
    requires = list(block.requires)
    for line, text in shorts.items():
        try:
            requires += split(text)
        except SpecError as error:
            raise SpecError(f"line {line + first}, # requires: {error}") from None
    return Declared(tuple(dict.fromkeys(requires)), block.python)


def _comments(source: str) -> dict[int, str]:
    """The comments that fill a line from its first column: line -> text."""
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    except (tokenize.TokenError, SyntaxError) as error:
        raise SpecError(f"the comments of the cell can't be read: {error}") from error
    return {
        token.start[0]: token.string.rstrip()
        for token in tokens
        if token.type == tokenize.COMMENT and not token.start[1]
    }


def _block(comments: Mapping[int, str], first: int) -> tuple[int, int, str]:
    """(first line, last line, kind) of the `script` block; (0, 0, "") without one."""
    found: list[tuple[int, int, str]] = []
    after = 0
    for line, text in comments.items():
        opening = _OPEN.fullmatch(text)
        if line <= after or opening is None:
            continue
        after = _end(comments, line)
        if opening[1] == "script":
            found.append((line, after, "script"))
    if len(found) > 1:
        lines = " and ".join(str(start + first) for start, _, _ in found)
        raise SpecError(f"lines {lines}: a cell can have one `# /// script` block")
    if found and not found[0][1]:
        raise SpecError(
            f"line {found[0][0] + first}: `# /// script` has no end; close the block with a line `{_CLOSE}`"
        )
    return found[0] if found else (0, 0, "")


def _end(comments: Mapping[int, str], start: int) -> int:
    """The line that closes the block: the last `# ///` of the comments that follow without a gap; 0: none does."""
    end, line = 0, start + 1
    while (text := comments.get(line)) is not None and (text == "#" or text.startswith("# ")):
        end = line if text == _CLOSE else end
        line += 1
    return end


def _read_block(lines: Mapping[int, str], first: int) -> Declared:
    where = f"line {min(lines, default=0) + first}, # /// script"
    try:
        content = tomllib.loads("\n".join(text[2:] for text in lines.values()))
    except tomllib.TOMLDecodeError as error:
        raise SpecError(f"{where}: not TOML: {error}") from None
    strange = sorted(content.keys() - _KEYS)
    if strange:
        raise SpecError(f"{where}: {strange[0]!r} means nothing here; {', '.join(sorted(_KEYS))} do")
    requires, python = content.get("dependencies", []), content.get("requires-python", "")
    if not isinstance(requires, list) or not all(isinstance(text, str) for text in requires):
        raise SpecError(f"{where}: dependencies = {requires!r}: a list of texts is needed")
    try:
        return Declared(tuple(map(normal, requires)), _specifier(python))
    except SpecError as error:
        raise SpecError(f"{where}: {error}") from None


def _specifier(text: object) -> str:
    from packaging.specifiers import InvalidSpecifier, SpecifierSet  # noqa: PLC0415 - few cells ask for a Python

    try:
        return str(SpecifierSet(text)) if isinstance(text, str) and text else _no_specifier(text)
    except InvalidSpecifier:
        return _no_specifier(text)


def _no_specifier(text: object) -> str:
    if text == "":
        return ""
    raise SpecError(f"requires-python = {text!r}: something like '>=3.11' is needed")
