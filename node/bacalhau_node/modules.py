"""What a cell imports: which of it is source to send along, which is installed, and in what versions.

Theory of operation. A module is *local* when it lies in the notebook's folder, or is found by
Python outside every place where packages are installed (an editable install, a folder put on
the path). Local modules travel as source, with the local modules that they import in turn, at
most `SOURCE_LIMIT` bytes of it. Everything else has to be there where the job runs, and the
distributions behind it are named with their versions.
"""

from __future__ import annotations

import ast
import importlib.machinery
import importlib.metadata
import importlib.util
import sys
import sysconfig
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from bacalhau_node.errors import SpecError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

SOURCE_LIMIT = 10 * 1000 * 1000
"""Bytes of local source that go along unasked; more is data in the wrong place."""
MODULE_LIMIT = 100 * 1000 * 1000
"""Bytes that `--module` may add: the bundle is built in memory."""
PRELOADABLE = frozenset(
    ("numpy", "pandas", "pyarrow", "scipy", "sklearn", "statsmodels", "matplotlib", "PIL", "lxml", "bs4", "requests")
)
"""Packages that a shard may inherit by fork: slow to import, and known to start no thread when imported."""
_COMPILED = (".so", ".pyd", ".dylib")
_INSTALLED = frozenset(("site-packages", "dist-packages"))


def imports(tree: ast.AST) -> frozenset[str]:
    """The top-level modules that `tree` imports anywhere, function bodies included."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
    return frozenset(found - {"__future__"})


def preload(imported: Iterable[str]) -> tuple[str, ...]:
    """Those of `imported` that a worker may import once for all shards."""
    return tuple(sorted(PRELOADABLE.intersection(imported)))


def local(imported: Iterable[str], folder: Path) -> tuple[dict[str, bytes], frozenset[str]]:
    """(files, imports): the source of the local modules among `imported`, and all that they import themselves.

    Paths are relative to a folder on the path of the job. Raises `SpecError` for a compiled
    module, for source that is not Python, and for more than `SOURCE_LIMIT` bytes.
    """
    files: dict[str, bytes] = {}
    seen: set[str] = set()
    rest = set(imported)
    while rest:
        name = min(rest)
        rest.discard(name)
        seen.add(name)
        root = _local_root(name, folder)
        if root:
            added = _source(name, root, everything=False)
            files |= added
            _check_size("the local source", {inner: len(data) for inner, data in files.items()})
            rest |= set(_imports_of(added)) - seen
    return files, frozenset(seen)


def asked(wanted: str, folder: Path) -> dict[str, bytes]:
    """What `--module wanted` sends: a file, a folder or an importable module, its data files included."""
    path = folder / Path(wanted).expanduser()
    if path.exists():
        root: Path | None = path.resolve()
    elif wanted.isidentifier():
        root = _root(importlib.util.find_spec(wanted)) if wanted not in sys.builtin_module_names else None
    else:
        root = None
    if root is None:
        raise SpecError(f"--module {wanted}: neither a file or folder in {folder} nor a module that Python finds")
    return _source(root.stem if root.is_file() else root.name, root, everything=True)


def _local_root(name: str, folder: Path) -> Path | None:
    """The file or folder of a module that has to be sent, or None when it is installed (or nowhere)."""
    if name in sys.stdlib_module_names or name in sys.builtin_module_names:
        return None
    beside = importlib.machinery.PathFinder.find_spec(name, [str(folder)])
    if beside and beside.loader:
        return _root(beside)
    try:
        found = importlib.util.find_spec(name)
    except ValueError:  # a module without a spec, such as one made by hand
        return None
    found = found or beside
    root = _root(found)
    return root if root and not _is_installed(root) else None


def _root(spec: importlib.machinery.ModuleSpec | None) -> Path | None:
    """The file of a module, the folder of a package; None for what is built in or comes out of an archive."""
    if spec is None:
        return None
    places = list(spec.submodule_search_locations or ())
    root = Path(places[0]) if places else Path(spec.origin or "")
    return root.resolve() if (places or spec.has_location) and root.exists() else None


def _is_installed(root: Path) -> bool:
    standard = Path(sysconfig.get_path("stdlib")).resolve()
    return bool(_INSTALLED.intersection(root.parts)) or root.is_relative_to(standard)


def _source(name: str, root: Path, *, everything: bool) -> dict[str, bytes]:
    """The files below `root`, named from `name` on; only Python source unless `everything` is wanted."""
    paths = {root.name: root} if root.is_file() else dict(_below(root, name))
    compiled = [inner for inner in paths if inner.endswith(_COMPILED)]
    if compiled:
        raise SpecError(
            f"`{name}` has compiled parts ({compiled[0]}), which can't be sent as source: "
            "install it where the job runs, or use an --image that has it"
        )
    wanted = {inner: path for inner, path in paths.items() if everything or inner.endswith(".py")}
    try:
        _check_size(f"`{name}`", {inner: path.stat().st_size for inner, path in wanted.items()}, everything=everything)
        return {inner: path.read_bytes() for inner, path in wanted.items()}
    except OSError as error:
        raise SpecError(f"`{name}` can't be read: {error}") from error


def _below(root: Path, name: str) -> Iterator[tuple[str, Path]]:
    """The files below a folder that may be sent; folders behind links stay out, so that there are no loops."""
    for path in sorted(root.iterdir()):
        inner = f"{name}/{path.name}"
        if path.name.startswith(".") or path.name == "__pycache__":
            continue
        if path.is_dir():
            yield from () if path.is_symlink() else _below(path, inner)
        elif path.is_file():
            yield inner, path


def _imports_of(files: Mapping[str, bytes]) -> Iterator[str]:
    for inner, data in files.items():
        try:
            yield from imports(ast.parse(data, inner))
        except (SyntaxError, ValueError) as error:
            if "/" not in inner:  # inside a package it may be a template, or never imported
                raise SpecError(f"{inner}, which the cell imports, is not valid Python: {error}") from error


def _check_size(what: str, sizes: Mapping[str, int], *, everything: bool = False) -> None:
    total, limit = sum(sizes.values()), MODULE_LIMIT if everything else SOURCE_LIMIT
    if total > limit:
        largest = max(sizes, key=sizes.__getitem__)
        raise SpecError(
            f"{what} has {total:,} bytes, {largest} alone {sizes[largest]:,}; at most {limit:,} can go along. "
            "Give data by --with"
        )


# --- versions ---


def versions(imported: Iterable[str]) -> dict[str, str]:
    """Distribution -> version for what `imported` needs; what is not installed here is left out."""
    found: dict[str, str] = {}
    for name in sorted(set(imported) - sys.stdlib_module_names):
        found |= _distributions(name)
    return dict(sorted(found.items()))


def _distributions(module: str) -> dict[str, str]:
    """The distributions that provide `module`: mostly the one of its name, which spares a walk over all of them."""
    try:
        same = importlib.metadata.distribution(module)
    except (importlib.metadata.PackageNotFoundError, ValueError):
        same = None
    if same and any(Path(str(same.locate_file(f"{module}{end}"))).exists() for end in ("", ".py")):
        return {same.name: same.version}
    if importlib.machinery.PathFinder.find_spec(module) is None:
        return {}
    return {name: importlib.metadata.version(name) for name in _providers(_stamp()).get(module, ())}


def _stamp() -> tuple[tuple[str, int], ...]:
    """Changes when something is installed or removed anywhere on the path."""
    folders = [Path(entry) for entry in sys.path if entry and Path(entry).is_dir()]
    return tuple((str(folder), folder.stat().st_mtime_ns) for folder in folders)


@lru_cache(maxsize=1)
def _providers(stamp: tuple[tuple[str, int], ...]) -> dict[str, list[str]]:  # noqa: ARG001  the key of the cache
    """Top-level module -> distributions, from every distribution's list of files: 150 ms for 200 of them."""
    return dict(importlib.metadata.packages_distributions())
