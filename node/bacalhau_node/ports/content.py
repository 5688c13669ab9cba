"""Blocks and files by CID: the store, and those elsewhere who may have what it lacks."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Literal, Protocol

from bacalhau_node.cid import Cid

Scope = Literal["block", "entity", "all"]
"""How much of a DAG is asked for (`dag-scope` of the trustless gateway specification)."""


class Draft(Protocol):
    """A file that is being written into the store, and hashed as it is written. All methods block."""

    @property
    def folder(self) -> Path:
        """A folder on the disk that it is written to."""
        ...

    def write(self, at: int, pieces: Sequence[bytes | memoryview]) -> None:
        """Write a part, in any thread, at the same time as others; raises `OSError` where the disk takes no more.

        All parts but the last have a multiple of 1 MiB, which no leaf is larger than. One that is late, after `close`,
        raises `OSError` too.
        """
        ...

    def start_again(self) -> None:
        """Forget what was written."""
        ...

    def finish(self) -> str:
        """Make what was written a UnixFS file of the store, and return its CID: in the index when this returns."""
        ...

    def close(self) -> None:
        """Remove it, unless it was finished."""
        ...


class ContentStore(Protocol):
    """Blocks and files by CID. Methods may block on disk: call from a thread unless they say "quick".

    What nobody pinned may be collected some time after it was last put, imported, asked for or read: an hour
    at the earliest, and never while a `hold` lasts that began before, in whatever process of the user.
    """

    def put(self, data: bytes, *, codec: Literal["raw", "dag-json"] = "raw") -> str:
        """Store one block of at most 1 MiB and return its CID. Quick."""
        ...

    def get(self, cid: str) -> bytes:
        """The verified bytes of one block; raises `ContentError` when it is missing or damaged. Quick."""
        ...

    def has(self, cid: str) -> bool:
        """Whether the block is here, and so all below it; it counts as used. Quick."""
        ...

    def block(self, cid: Cid) -> bytes:
        """`get` for those that hold the CID in bytes. Quick."""
        ...

    def holds(self, cid: Cid) -> bool:
        """`has` for those that hold the CID in bytes. Quick."""
        ...

    def keep(self, cid: Cid, block: bytes) -> None:
        """Store a block that was checked against its CID, and all of whose links are here. Mostly quick."""
        ...

    def to_send(self, cid: Cid) -> bytes:
        """`block` for those who send it on to somebody who checks it: what is surely unchanged isn't hashed. Quick."""
        ...

    def file_size(self, cid: Cid) -> int | None:
        """The size of the file with this root, if it is known without reading it. Quick."""
        ...

    def flush(self) -> None:
        """Make every `put` so far durable (group commit). Quick."""
        ...

    def add_bytes(self, data: bytes) -> str:
        """Import `data` as a UnixFS file and return its CID."""
        ...

    def add_path(self, path: Path, *, move: bool = False, link: bool = False) -> str:
        """Import a file or a folder as UnixFS. `move`: the store takes the files over, and does not copy them.

        `link`: the files stay where they are and the store reads them there. One that has changed since is a
        `ContentError` when it is read, and from then on it is missing here, as is all that contains it.
        """
        ...

    def draft(self) -> Draft:
        """A new empty file, for what comes part by part; to be closed. Raises `OSError`."""
        ...

    def list(self, cid: str) -> list[tuple[str, str, int]]:
        """All files below a UnixFS root: (logical path, CID, size), sorted by path; `("", cid, size)` for a file.

        An empty folder is listed as (its path + "/", CID, 0). Links inside the root count as what they lead to.
        """
        ...

    def read(self, cid: str) -> bytes:
        """A whole UnixFS file, verified."""
        ...

    def file(self, cid: str) -> Path | None:
        """A file on disk that holds exactly this UnixFS file's bytes, if the store has it as one piece."""
        ...

    def export(self, cid: str, target: Path) -> None:
        """Write a UnixFS file or folder to `target` (which must not exist), verified, never outside of it."""
        ...

    def pin(self, cid: str, *, owner: str = "") -> None:
        """Keep this root and all below it; counted for each owner. Quick."""
        ...

    def unpin(self, cid: str, *, owner: str = "") -> None:
        """Take one `pin` back. Quick."""
        ...

    def pins(self, cid: str) -> int:
        """How often this root is pinned now, by all owners. Quick."""
        ...

    def release(self, owner: str) -> None:
        """Take all pins of this owner back. Quick."""
        ...

    def owners(self) -> Sequence[str]:
        """Who has pinned something, sorted."""
        ...

    def hold(self) -> AbstractContextManager[None]:
        """Until it ends nothing is collected that was put, imported, asked for or read since it began. Quick.

        For what takes long and isn't pinned yet: a download, a plan. It ends with its process, however that ends.
        """
        ...

    def collect(self, *, keep: int = 0) -> int:
        """Remove what is neither pinned nor held, least recently used first, until `keep` bytes are left.

        Returns how many bytes were freed. The store does it by itself when it grows over its limit.
        """
        ...

    def close(self) -> None:
        """Flush and close."""
        ...


class Provider(Protocol):
    """Somebody who may have blocks. What comes from it is believed by nobody: whoever asks checks every block."""

    @property
    def name(self) -> str:
        """For messages about who was asked: "https://ipfs.example.org", "node 12D3…", "kubo at 127.0.0.1:5001"."""
        ...

    def car(self, root: Cid, *, path: str = "", scope: Scope = "all") -> AsyncIterator[bytes]:
        """The bytes of a CAR (v1, depth first, each block as often as the walk meets it or once) for `root` and `path`.

        Scope "block": the block at the end of the path; "entity": the whole file, or of a folder its listing;
        "all": everything below. The blocks on the way from the root come first. Raises `ContentError` when it does
        not have the root, `NodeUnreachable` when it does not answer; may end too early.
        """
        ...

    async def block(self, cid: Cid, *, root: Cid) -> bytes:
        """One block below `root`; raises `ContentError` when it is not there, `NodeUnreachable`."""
        ...
