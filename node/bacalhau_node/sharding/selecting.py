"""Which files of a listing a job takes: `--glob`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from bacalhau_node.errors import ContentError, SpecError
from bacalhau_node.sharding.entries import Entry, Unit, Unusable, shown

MAX_EXPANSIONS = 1_000
"""Bound on what the braces of one pattern may expand to, so that a pattern of 20 bytes stays cheap."""

CHECKPOINTS = ".ipynb_checkpoints"


def select(entries: Sequence[Entry], globs: Sequence[str]) -> list[Unit]:
    """The files that the patterns name, in the order of `entries`, each once; every visible file without a pattern.

    A pattern is held against the path below the input (a leading `/inputs/` is taken off). One that
    ends in `/` selects folders: all that lies below one is one unit, hidden files included (a Zarr
    array is mostly those) but without notebook checkpoints; a folder inside another belongs to the
    outer one. Elsewhere hidden files need a pattern whose level starts with a dot.

    Raises `SpecError` for a pattern without a match, `ContentError` for a selected file that can't be read.
    """
    patterns = [_Pattern(glob) for glob in globs]
    files = [entry for entry in entries if not entry.path.endswith("/")]
    if not globs:
        units: list[Unit] = [(entry,) for entry in files if not is_hidden(entry.path)]
        if files and not units:
            raise SpecError(f"all {len(files)} files of the inputs are hidden: name them, as in --glob '**/.*'")
    else:
        units = _matching(entries, patterns)
        for pattern in patterns:
            if not pattern.used:
                raise SpecError(_no_match(pattern, files))
    for unit in units:
        refuse_unusable(unit)
    return units


def is_hidden(path: str) -> bool:
    """Whether a level of the logical path starts with a dot."""
    return path.startswith(".") or "/." in path


class _Pattern:
    """One `--glob`, compiled; `used` once something matched."""

    def __init__(self, glob: str) -> None:
        self.glob = glob
        self.text = glob.removeprefix("/inputs/")
        if not self.text.strip("/"):
            raise SpecError(f"--glob {glob!r} names no file: leave it out to take all of them")
        self.used = False
        import bracex  # noqa: PLC0415 - with wcmatch a tenth of what a node loads, so only where there is a pattern

        try:
            expanded = bracex.expand(self.text, keep_escapes=True, limit=MAX_EXPANSIONS)
        except bracex.ExpansionLimitException as error:
            raise SpecError(f"--glob {glob!r}: its braces stand for more than {MAX_EXPANSIONS} patterns") from error
        self.files = _compile([one for one in expanded if not one.endswith("/")])
        self.folders = _compile([one.rstrip("/") for one in expanded if one.endswith("/")])

    def takes_file(self, path: str) -> bool:
        return self._note(self.files is not None and self.files.fullmatch(path) is not None)

    def takes_folder(self, path: str) -> bool:
        return self._note(self.folders is not None and self.folders.fullmatch(path) is not None)

    def _note(self, matched: bool) -> bool:  # noqa: FBT001 - one value passing through
        self.used = self.used or matched
        return matched


def _compile(globs: Sequence[str]) -> re.Pattern[str] | None:
    """One expression for all of `globs`; None for none. To be used with `fullmatch`: `$` alone lets a newline pass."""
    from wcmatch import glob as wcglob  # noqa: PLC0415 - as above

    flags = wcglob.GLOBSTAR | wcglob.CASE | wcglob.FORCEUNIX
    parts = [part for glob in globs for part in wcglob.translate(glob, flags=flags)[0]]
    return re.compile("|".join(f"(?:{part})" for part in parts)) if parts else None


def _matching(entries: Sequence[Entry], patterns: Sequence[_Pattern]) -> list[Unit]:
    """Units in the order of their first entry: whole folders first take what is theirs, then files match alone."""
    file_patterns = [pattern for pattern in patterns if pattern.files is not None]
    whole = _whole_folders(entries, [pattern for pattern in patterns if pattern.folders is not None])
    units: dict[tuple[int, str], list[Entry]] = {}
    for entry in entries:
        folder = whole.get((entry.source, entry.path.rpartition("/")[0]))
        alone = [pattern.takes_file(entry.path) for pattern in file_patterns if not entry.path.endswith("/")]
        if folder is not None and f"/{CHECKPOINTS}/" not in entry.path[len(folder) :]:
            units.setdefault((entry.source, folder + "/"), []).append(entry)
        elif any(alone):
            units[entry.source, entry.path] = [entry]
    return [tuple(unit) for unit in units.values()]


def _whole_folders(entries: Sequence[Entry], patterns: Sequence[_Pattern]) -> dict[tuple[int, str], str | None]:
    """(source, folder) -> the outermost selected folder that it lies in (perhaps itself), or None."""
    found: dict[tuple[int, str], str | None] = {}
    for entry in entries if patterns else ():
        parent = entry.path.rpartition("/")[0]
        if (entry.source, parent) in found:
            continue
        levels = parent.split("/") if parent else []
        outer: str | None = None
        for depth in range(1, len(levels) + 1):
            folder = "/".join(levels[:depth])
            key = (entry.source, folder)
            if key not in found:
                selected = [pattern.takes_folder(folder) for pattern in patterns]
                found[key] = folder if outer is None and any(selected) else outer
            outer = found[key]
    return found


def _no_match(pattern: _Pattern, files: Sequence[Entry]) -> str:
    """What the pattern was, what is there, and the pattern that was perhaps meant."""
    if not files:
        return f"--glob {pattern.glob!r} matches nothing: there are no files (it selects among those of --input)"
    lines = [f"--glob {pattern.glob!r} matches none of the {len(files)} files of the inputs. There are, for example:"]
    lines += [f"  {shown(entry.path)}" for entry in sorted(files, key=lambda one: is_hidden(one.path))[:5]]
    deeper = _Pattern(f"**/{pattern.text}")
    if matches := sum(1 for entry in files if deeper.takes_file(entry.path)):
        lines.append(f"{deeper.glob!r} would match {matches}: '*' stays within one folder")
    else:
        lines.append("Patterns are held against these paths; '*' stays within one folder, '**' crosses folders")
    return "\n".join(lines)


def refuse_unusable(entries: Iterable[Entry]) -> None:
    """Raise `ContentError` for the first entry that can't be read."""
    for entry in entries:
        if isinstance(entry, Unusable):
            raise ContentError(entry.problem)
