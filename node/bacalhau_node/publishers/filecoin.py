"""`--publish filecoin`: a result made ready for Filecoin's storage providers, who pull it from this node.

Theory of operation. The result becomes a **piece**: a CAR (version 1) of everything below its root, in the order of its
links, so the same result is always the same file. Its commitment (`content.piece`) names it to providers, who
check what they pull against it. File and manifest lie in `pieces/` of the store's folder; the node's HTTP port gives
them out to everybody who has the piece's CID, whole or in ranges (`GET /piece/{CID}`), as it is done today in
place of pushing data to a provider. Both stay as long as a job keeps the result, and go `IDLE` seconds after
they were last asked for when none does any more: their time of change is that of the last use.

**Packing rules.** A piece takes a power of two of bytes in a sector, 127/128 of them payload; what is over is zeros,
which are never stored or sent: the CID of version 2 says how many there are. A result is one piece, up to what a
sector of 64 GiB holds. Providers want large pieces (most of 1 MiB at least, many of some GiB): smaller ones are
aggregated (FRC-0058), each at an offset that is a multiple of its own padded size, with an index at the end. The
aggregate is the work of who makes the deal: `content.aggregate` has the rules and the proofs, and the manifest what
they need of each piece (`cid_v1`, `padded`, `payload`).

**What is tried.** File, commitment, manifest and the port: by the vectors of FRC-0069 and an independent reader of
CARs; aggregates: by the figures that FRC-0058's first implementation has published. **What is not:** no deal is made,
and nothing here speaks to a provider or a chain.
"""

from __future__ import annotations

import asyncio
import os
import re
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final, Protocol

import msgspec

from bacalhau_node.errors import ContentError
from bacalhau_node.ids import JobId

IDLE: Final = 86_400.0
"""Seconds: who pulls a large piece in ranges comes back within a day (a guess)."""

_OURS = re.compile(r"b[a-z2-7]{50,120}\.(?:car|json)|[0-9a-f]{32}\.tmp")


class Piece(Protocol):
    """What is needed of `content.piece.Piece`."""

    @property
    def cid_v1(self) -> str:
        """Root alone."""
        ...

    @property
    def cid_v2(self) -> str:
        """Root, height and padding."""
        ...

    @property
    def payload(self) -> int:
        """Bytes of the CAR."""
        ...

    @property
    def padded(self) -> int:
        """Bytes in a sector."""
        ...

    @property
    def padding(self) -> int:
        """Zeros behind the payload."""
        ...


class PieceEntry(msgspec.Struct, frozen=True):
    """A piece in a manifest; sizes in bytes."""

    cid: str
    cid_v1: str
    payload: int
    padding: int
    padded: int


class Manifest(msgspec.Struct, frozen=True):
    """What a deal needs to know of a published result. `url`: below the address of the node's API; `car`: the file."""

    root: str
    profile: str
    car: str
    piece: PieceEntry
    url: str


class FilecoinPublisher:
    """`ports.Publisher` into `folder`.

    `archive` gives the bytes of the CAR of a root, `commit` the piece that a file is; both block. `profile`: under
    which UnixFS profile the files in it were imported.
    """

    def __init__(
        self,
        folder: Path,
        *,
        archive: Callable[[str], Iterator[bytes]],
        commit: Callable[[Path, threading.Event], Piece],
        profile: str,
    ) -> None:
        self._folder, self._archive, self._commit, self._profile = folder, archive, commit, profile

    def claims(self, target: str) -> bool:
        """Whether `target` is Filecoin."""
        return target == "filecoin"

    async def check(self, target: str) -> None:
        """Nothing but the disk can be in the way."""

    async def publish(self, job: JobId, root: str, target: str) -> tuple[str, ...]:  # noqa: ARG002 - it is one place
        """Pack the result; a second time it is there."""
        stop = threading.Event()
        try:
            manifest = await asyncio.to_thread(self._packed, root, stop)
        finally:
            stop.set()  # of a thread that nobody waits for any more
        return (f"piece {manifest.piece.cid}", str(self._folder / f"{root}.json"))

    def tidy(self, *, kept: Callable[[str], bool], now: float) -> None:
        """Remove what belongs to no result that is `kept` (asked by its root) and was not used lately; blocks.

        `now`: seconds since 1970. Files that nobody here has made stay.
        """
        with suppress(FileNotFoundError):  # nothing was ever published here, or another process tidies too
            ours = [path for path in self._folder.iterdir() if _OURS.fullmatch(path.name)]
            manifests = [path for path in ours if path.suffix == ".json" and kept(path.stem)]
            needed = {name for path in manifests for name in _names(path)}
            for path in ours:
                if path.name not in needed and now - path.stat().st_mtime > IDLE:
                    path.unlink(missing_ok=True)

    def _packed(self, root: str, stop: threading.Event) -> Manifest:
        path = self._folder / f"{root}.json"
        try:
            known = msgspec.json.decode(path.read_bytes(), type=Manifest)
            for used in (self._folder / known.car, path):
                os.utime(used)
        except (FileNotFoundError, msgspec.DecodeError):
            pass  # not packed yet, or by something else
        else:
            return known
        self._folder.mkdir(parents=True, exist_ok=True)
        draft = self._folder / f"{uuid.uuid4().hex}.tmp"
        try:
            return self._pack(root, draft, path, stop)
        finally:
            draft.unlink(missing_ok=True)

    def _pack(self, root: str, draft: Path, path: Path, stop: threading.Event) -> Manifest:
        """Write the archive to `draft`, hash it, and give it its name; its manifest comes last."""
        with draft.open("wb") as file:
            for part in self._archive(root):
                if stop.is_set():
                    raise ContentError(f"{root} was not packed to the end: the node stops")
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        piece = self._commit(draft, stop)
        entry = PieceEntry(piece.cid_v2, piece.cid_v1, piece.payload, piece.padding, piece.padded)
        manifest = Manifest(root, self._profile, f"{entry.cid}.car", entry, f"/piece/{entry.cid}")
        draft.replace(self._folder / manifest.car)
        draft.write_bytes(msgspec.json.format(msgspec.json.encode(manifest), indent=2))
        draft.replace(path)
        return manifest


def _names(manifest: Path) -> tuple[str, ...]:
    """The files of a piece."""
    with suppress(msgspec.DecodeError):
        return manifest.name, msgspec.json.decode(manifest.read_bytes(), type=Manifest).car
    return ()
