"""A job's results as a folder: `shards/INDEX/{stdout,stderr,exit_code,value…,outputs/}` and `combined/`.

`combined/` holds the text of all shards in order and the files that they wrote, merged: a name
that several shards wrote keeps its first owner, the others get `.shard-INDEX` before the suffix.
So nothing is ever overwritten. Raw, there is no `combined/`.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from pathlib import Path, PurePath

from bacalhau_node.client import Client, JobView, ShardView
from bacalhau_node.errors import ContentError
from bacalhau_node.messages import Blob, Outcome

SUFFIXES = {"json": ".json", "arrow": ".arrow", "npy": ".npy", "bytes": ".bin", "mime": ".mime.json", "repr": ".txt"}


async def download(client: Client, view: JobView, target: Path, *, raw: bool = False) -> None:
    """Write every shard that has ended to `target`, which must not exist or be empty."""
    combined = target / "combined"
    await asyncio.to_thread(_make, target)
    for shard in view.shards:
        if shard.outcome is not None:
            folder = target / "shards" / str(shard.index)
            await _shard(client, shard.outcome, folder)
            if not raw:
                await asyncio.to_thread(_combine, folder, combined, shard)


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


def _combine(folder: Path, combined: Path, shard: ShardView) -> None:
    combined.mkdir(exist_ok=True)
    for stream in ("stdout", "stderr"):
        with (combined / stream).open("ab") as merged, (folder / stream).open("rb") as part:
            shutil.copyfileobj(part, merged)
    outputs = folder / "outputs"
    for parent, _, names in os.walk(outputs):
        for name in names:
            source = Path(parent, name)
            _place(source, combined / "outputs" / source.relative_to(outputs), shard.index)


def _place(source: Path, target: Path, index: int) -> None:
    """A second name for the file (or a copy of it), never over another one."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists() or target.is_symlink():
        name = PurePath(target.name)
        target = target.with_name(f"{name.stem}.shard-{index}{name.suffix}")
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)
