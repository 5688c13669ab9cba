"""A folder made of files that are in the store already: nothing is read again, only the folders' own blocks are new."""

from __future__ import annotations

import os
from collections.abc import Iterable

from bacalhau_node.cid import DAG_PB, Cid
from bacalhau_node.content.dagpb import PbLink, decode_node
from bacalhau_node.content.unixfs import Profile, import_links
from bacalhau_node.errors import ContentError
from bacalhau_node.ports import ContentStore
from bacalhau_node.sharding import shown

_Nested = dict[str, "Cid | _Nested"]


def store_folder(store: ContentStore, files: Iterable[tuple[str, str, int]], *, profile: Profile) -> str:
    """The CID of a folder with these files, (path, CID, size); a path that ends in "/" is an empty folder.

    It is the CID that `ipfs add` gives a folder with these files in it. Blocks on the disk.
    """
    root: _Nested = {}
    for path, cid, _ in files:
        *folders, name = path.split("/")
        here = root
        for folder in folders:
            below = here.setdefault(folder, {})
            if isinstance(below, Cid):
                raise _both(path)
            here = below
        if name and here.setdefault(name, parsed := Cid.parse(cid)) != parsed:
            raise _both(path)
    return str(Cid(_link(store, root, profile).cid))


def _link(store: ContentStore, item: Cid | _Nested, profile: Profile) -> PbLink:
    """What a folder has of this file or folder, but for its name."""
    if isinstance(item, Cid):
        return PbLink(item.binary, b"", _size(item, store.block(item)))
    found = []
    for name, below in sorted((os.fsencode(name), below) for name, below in item.items()):
        link = _link(store, below, profile)
        found.append(PbLink(link.cid, name, link.tsize))
    return import_links(found, lambda cid, block: store.keep(Cid(cid), block), profile=profile)


def _size(cid: Cid, block: bytes) -> int:
    """Bytes of all blocks below a file's root, it included."""
    below = decode_node(block).links if cid.codec == DAG_PB else ()
    return len(block) + sum(link.tsize for link in below)


def _both(path: str) -> ContentError:
    return ContentError(f"what lies at {shown(path)} is two things: give one of the two another name")
