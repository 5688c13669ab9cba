"""Piece commitments against vectors, and the publisher that packs results for Filecoin."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from bacalhau_node.api.answers import TRAFFIC
from bacalhau_node.api.metrics import Traffic
from bacalhau_node.api.piece import Pieces
from bacalhau_node.content import piece
from bacalhau_node.content.piece import SEGMENT, Piece, commit
from bacalhau_node.errors import ContentError
from bacalhau_node.publishers.filecoin import FilecoinPublisher
from bacalhau_node.testing.builders import a_job_id

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "piece.json").read_text())
NEVER = threading.Event()


def c(n: int) -> bytes:
    return hashlib.shake_128(b"vec-%d" % n).digest(n)


def _file(folder: Path, data: bytes) -> Path:
    path = folder / "payload"
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("vector", VECTORS["vectors"], ids=lambda vector: vector["payload"])
def test_pieces_have_the_cids_that_others_give_them(vector: dict[str, str], tmp_path: Path) -> None:
    found = commit(_file(tmp_path, eval(vector["payload"])), NEVER)
    assert found.cid_v2 == vector["piece_cid_v2"]
    assert vector["piece_cid_v1"] in {None, found.cid_v1}
    assert found.payload + found.padding == found.padded // 128 * 127


def test_the_roots_of_zeros_are_known_up_to_the_largest_sector() -> None:
    zeros = VECTORS["zeros"]
    height = zeros["height"]
    assert Piece(piece.ZEROS[height], height, 127 << height - 2).cid_v2 == zeros["piece_cid_v2"]
    assert len(piece.ZEROS) == piece.MAX_HEIGHT + 1


@pytest.mark.parametrize("segments", [2, 3])
def test_a_file_of_several_segments_is_hashed_by_helpers(segments: int, tmp_path: Path) -> None:
    """Each segment's tree is the one that it has as a file of its own; what is missing to a power of two is zeros."""
    data, rest = c(SEGMENT), b"" if segments == 2 else b"end"
    found = commit(_file(tmp_path, data * 2 + rest), NEVER)
    one = commit(_file(tmp_path, data), NEVER).root
    expected = piece.above(one + one)
    if rest:
        last = commit(_file(tmp_path, rest), NEVER).root
        for height in range(2, 19):
            last = piece.above(last + piece.ZEROS[height])
        expected = piece.above(expected + last)
    assert (found.root, found.height) == (expected, 17 + segments)


def test_a_node_that_stops_waits_for_no_piece(tmp_path: Path) -> None:
    stop = threading.Event()
    stop.set()
    with pytest.raises(ContentError, match="the node stops"):
        commit(_file(tmp_path, bytes(SEGMENT + 1)), stop)


def test_what_no_sector_holds_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate((1 << 36) // 128 * 127 + 1)
    with pytest.raises(ContentError, match="over what the largest sector"):
        commit(path, NEVER)


# --- the publisher ---


class Archive:
    def __init__(self) -> None:
        self.asked = 0

    def __call__(self, root: str) -> Iterator[bytes]:
        self.asked += 1
        yield from (b"head of ", root.encode())


def test_a_result_is_packed_once_and_its_manifest_says_what_a_deal_needs(tmp_path: Path) -> None:
    archive = Archive()
    publisher = FilecoinPublisher(tmp_path / "pieces", archive=archive, commit=commit, profile="unixfs-v0-2015")
    assert publisher.claims("filecoin")
    assert not publisher.claims("ipfs")
    asyncio.run(publisher.check("filecoin"))
    places = asyncio.run(publisher.publish(a_job_id(), "root-cid", "filecoin"))
    assert asyncio.run(publisher.publish(a_job_id(1), "root-cid", "filecoin")) == places
    assert archive.asked == 1
    manifest = json.loads(Path(places[1]).read_text())
    entry = manifest["piece"]
    car = tmp_path / "pieces" / manifest["car"]
    assert car.read_bytes() == b"head of root-cid"
    assert places[0] == f"piece {entry['cid']}"
    assert (manifest["root"], manifest["profile"], manifest["url"]) == (
        "root-cid",
        "unixfs-v0-2015",
        f"/piece/{entry['cid']}",
    )
    assert (entry["payload"], entry["padding"], entry["padded"]) == (16, 111, 128)
    assert entry["cid_v1"].startswith("baga6ea4seaq")
    assert sorted(path.suffix for path in car.parent.iterdir()) == [".car", ".json"]


def test_a_piece_that_was_removed_is_packed_again(tmp_path: Path) -> None:
    archive = Archive()
    publisher = FilecoinPublisher(tmp_path, archive=archive, commit=commit, profile="unixfs-v0-2015")
    places = asyncio.run(publisher.publish(a_job_id(), "root-cid", "filecoin"))
    next(tmp_path.glob("*.car")).unlink()
    assert asyncio.run(publisher.publish(a_job_id(), "root-cid", "filecoin")) == places
    assert archive.asked == 2
    assert list(tmp_path.glob("*.car"))


ROOTS = [f"baguqeera{letter * 52}" for letter in "ab"]
DAY = 86_400


def _filecoin(folder: Path) -> FilecoinPublisher:
    return FilecoinPublisher(folder, archive=Archive(), commit=commit, profile="unixfs-v0-2015")


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def _age(folder: Path) -> None:
    """As if nothing had been used for years."""
    for path in folder.iterdir():
        os.utime(path, (0, 0))


def test_a_piece_goes_with_the_last_job_that_keeps_its_result_and_no_other_file_does(tmp_path: Path) -> None:
    publisher, now = _filecoin(tmp_path), time.time()
    publisher.tidy(kept=lambda _: False, now=now)  # nothing was published yet
    for root in ROOTS:
        asyncio.run(publisher.publish(a_job_id(), root, "filecoin"))
    (tmp_path / f"{'0' * 32}.tmp").write_bytes(b"of a process that was killed")
    (tmp_path / "notes.json").write_text("somebody's own")
    everything = _names(tmp_path)
    publisher.tidy(kept=lambda _: False, now=now + DAY - 60)
    assert _names(tmp_path) == everything
    publisher.tidy(kept=ROOTS[:1].__contains__, now=now + DAY + 60)
    car = json.loads((tmp_path / f"{ROOTS[0]}.json").read_text())["car"]
    assert _names(tmp_path) == {f"{ROOTS[0]}.json", car, "notes.json"}


def test_a_piece_that_is_published_again_counts_as_used(tmp_path: Path) -> None:
    publisher = _filecoin(tmp_path)
    asyncio.run(publisher.publish(a_job_id(), ROOTS[0], "filecoin"))
    _age(tmp_path)
    asyncio.run(publisher.publish(a_job_id(1), ROOTS[0], "filecoin"))
    everything = _names(tmp_path)
    publisher.tidy(kept=lambda _: False, now=time.time())
    assert _names(tmp_path) == everything


async def test_a_piece_that_is_asked_for_stays(tmp_path: Path) -> None:
    publisher = _filecoin(tmp_path)
    place, _ = await publisher.publish(a_job_id(), ROOTS[0], "filecoin")
    _age(tmp_path)
    app = web.Application()
    app[TRAFFIC] = Traffic()
    app.add_routes(Pieces(tmp_path).routes())
    async with TestClient(TestServer(app)) as client:
        for _ in range(2):
            answer = await client.get(f"/piece/{place.removeprefix('piece ')}", headers={"Range": "bytes=8-"})
            assert await answer.read() == ROOTS[0].encode()
            publisher.tidy(kept=lambda _: False, now=time.time())
