"""What comes with a cell: variables of the notebook, and the source of its functions and classes."""

from __future__ import annotations
import __future__

import json
import linecache
import os

from .tables import read_arrow

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable


def load_variables(folder: str) -> dict[str, Any]:
    """The values that came with the cell: `NAME.json`, `.npy`, `.arrow` or `.bytes`."""
    names: dict[str, Any] = {}
    for file in sorted(os.listdir(folder)):
        name, extension = os.path.splitext(file)
        names[name] = READERS[extension](os.path.join(folder, file))
    return names


def define(path: str, names: dict[str, Any]) -> None:
    """Run the source of the notebook's own functions and classes, if any came; annotations are not evaluated."""
    if not os.path.exists(path):
        return
    source = read_bytes(path).decode("utf-8")
    file = os.path.basename(path)
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    exec(compile(source, file, "exec", __future__.annotations.compiler_flag, dont_inherit=True), names)


def read_bytes(path: str) -> bytes:
    """A whole file."""
    with open(path, "rb") as file:
        return file.read()


def read_npy(path: str) -> Any:
    """A NumPy array, without pickle."""
    import numpy as np

    return np.load(path, allow_pickle=False)


READERS: dict[str, Callable[[str], Any]] = {
    ".json": lambda path: json.loads(read_bytes(path)),
    ".npy": read_npy,
    ".arrow": read_arrow,
    ".bytes": read_bytes,
}
