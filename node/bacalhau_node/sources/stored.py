"""What a source has brought lies in the content store: how its file is handed to a shard."""

from __future__ import annotations

from pathlib import Path

from bacalhau_node.ports import ContentStore


def stored_file(content: ContentStore, cid: str, scratch: Path) -> Path:
    """The store's own file where it has one, else one written to `scratch` (once for each CID)."""
    path = content.file(cid)
    if path is None:
        path = scratch / cid
        if not path.exists():  # an export appears whole or not at all
            scratch.mkdir(parents=True, exist_ok=True)
            content.export(cid, path)
    return path
