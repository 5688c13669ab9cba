"""A job's results as a folder: `shards/INDEX/{stdout,stderr,exit_code,value…,outputs/}` and `combined/`.

`combined/` holds the text of all shards in order and the files that they wrote, under names that clash with no other
(see `results.Names`): nothing is ever overwritten. Links are followed there, those to folders left out; `shards/` has
all of them as they were. Raw, there is no `combined/`.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from bacalhau_node.client import Client, JobView
from bacalhau_node.errors import ContentError
from bacalhau_node.messages import Blob, Outcome
from bacalhau_node.results import SUFFIXES, Names


async def download(client: Client, view: JobView, target: Path, *, raw: bool = False) -> None:
    """Write every shard that has ended to `target`, which must not exist or be empty; raises `ContentError`."""
    try:
        await asyncio.to_thread(_make, target)
        await _write(client, view, target, raw=raw)
    except OSError as error:
        raise ContentError(f"{target} can't be written: {error.strerror or error}; name another folder") from error


async def _write(client: Client, view: JobView, target: Path, *, raw: bool) -> None:
    combined, names = target / "combined", Names()
    for shard in view.shards:
        if shard.outcome is not None:
            folder = target / "shards" / str(shard.index)
            await _shard(client, shard.outcome, folder)
            if not raw:
                await asyncio.to_thread(_combine, folder, combined, names, shard.index)


def _make(target: Path) -> None:
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ContentError(f"{target} is there already and not an empty folder: name another one")
    target.mkdir(parents=True, exist_ok=True)


def _begin(folder: Path, exit_code: int) -> None:
    folder.mkdir(parents=True)
    (folder / "exit_code").write_text(f"{exit_code}\n")


async def _shard(client: Client, outcome: Outcome, folder: Path) -> None:
    await asyncio.to_thread(_begin, folder, outcome.exit_code)
    await _blob(client, outcome.stdout, folder / "stdout")
    await _blob(client, outcome.stderr, folder / "stderr")
    if outcome.value.kind != "none":
        await _blob(client, outcome.value.blob, folder / f"value{SUFFIXES[outcome.value.kind]}")
    if outcome.outputs:
        await client.download(outcome.outputs, folder / "outputs")


async def _blob(client: Client, blob: Blob, target: Path) -> None:
    if blob.inline is not None:
        await asyncio.to_thread(target.write_bytes, blob.inline)
    elif blob.cid is not None:
        await client.download(blob.cid, target)


# --- combined ---


def _combine(folder: Path, combined: Path, names: Names, shard: int) -> None:
    combined.mkdir(exist_ok=True)
    for stream in ("stdout", "stderr"):
        with (combined / stream).open("ab") as merged, (folder / stream).open("rb") as part:
            shutil.copyfileobj(part, merged)
    for path in sorted(_written(folder / "outputs")):
        _place(folder / "outputs" / path, combined / "outputs" / names.place(path, shard))


def _written(outputs: Path) -> Iterator[str]:
    """The path of every file, and of every empty folder with "/" at its end."""
    for parent, folders, files in os.walk(outputs):
        here = Path(parent)
        yield from (str((here / name).relative_to(outputs)) for name in files if (here / name).is_file())
        if here != outputs and not folders and not files:
            yield f"{here.relative_to(outputs)}/"


def _place(source: Path, target: Path) -> None:
    """A second name for the file, or a copy of it; never over another one."""
    if source.is_dir():
        target.mkdir(parents=True, exist_ok=True)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(os.path.realpath(source), target)
    except FileExistsError as error:
        raise ContentError(
            f"{target} can't be written: {target.parent} holds a name that this file system takes for the same; "
            "get it with --raw"
        ) from error
    except OSError:  # a file system without hard links
        shutil.copy2(source, target)
