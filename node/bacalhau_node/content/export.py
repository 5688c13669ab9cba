"""Writing content out as files and folders, inside a target and nowhere else.

Everything is written to a new place beside the target, which gets its final name only when
all is there and checked. Names were checked by the reader, folders are made here, and symbolic links are made
last and only where they stay inside: so no write can pass through one.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from bacalhau_node.cid import Cid
from bacalhau_node.content.reader import Item, Reader, resolve
from bacalhau_node.errors import ContentError
from bacalhau_node.sharding import shown


def export(reader: Reader, root: Cid, target: Path) -> None:
    """Write the file or folder `root` to `target`; raises `ContentError` and leaves nothing behind."""
    _refuse_existing(target)
    made = target.with_name(f".bacalhau-{secrets.token_hex(8)}")
    try:
        with _removed_on_failure(made):
            _write(reader, root, made)
            _refuse_existing(target)
            made.rename(target)
    except OSError as error:
        text = error.strerror or error
        raise ContentError(f"cannot write {target}: {text}; make room there, or name a folder elsewhere") from error


@contextlib.contextmanager
def _removed_on_failure(made: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        if made.is_dir():
            shutil.rmtree(made, ignore_errors=True)
        else:
            made.unlink(missing_ok=True)
        raise


def _refuse_existing(target: Path) -> None:
    if os.path.lexists(target):
        raise ContentError(f"{target} exists already: choose another name or remove it")


def _write(reader: Reader, root: Cid, made: Path) -> None:
    items = {item.path: item for item in reader.walk()}
    links = [item for item in items.values() if item.kind == "symlink"]
    if items[""].kind == "symlink":
        raise ContentError(f"{root} is a symbolic link, neither a file nor a folder")
    for link in links:
        resolve(items, link.path)
    _refuse_too_large(root, sum(item.size for item in items.values()), made.parent)
    for item in (*(one for one in items.values() if one.kind != "symlink"), *links):
        try:
            _write_item(reader, item, _place(made, item))
        except FileExistsError as error:
            raise _twins(item, made.parent) from error


def _twins(item: Item, folder: Path) -> ContentError:
    return ContentError(
        f"cannot write {shown(item.path)}: another item has the same name on the disk of {folder}, which ignores case"
        " or how letters are composed: choose a folder on another disk"
    )


def _refuse_too_large(root: Cid, size: int, folder: Path) -> None:
    """Parts of a tree may be named many times: what counts is what would be written, and no file may have more."""
    free = shutil.disk_usage(folder).free
    if size > free:
        raise ContentError(f"{root} expands to {size} bytes and {folder} has room for {free}: make room first")


def _write_item(reader: Reader, item: Item, path: Path) -> None:
    if item.kind == "folder":
        path.mkdir()
    elif item.kind == "symlink":
        path.symlink_to(item.target)
    else:
        with path.open("xb") as out:
            for chunk in reader.chunks(item.cid, size=item.size):
                out.write(chunk)


def _place(made: Path, item: Item) -> Path:
    return made / item.path if item.path else made
