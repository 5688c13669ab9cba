"""Inputs by CID: which are understood, what is listed, and what is handed out."""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import pytest

from bacalhau_node.cid import Cid
from bacalhau_node.content import elsewhere
from bacalhau_node.content.blocks import BlockStore
from bacalhau_node.content.car import header, section
from bacalhau_node.content.dagpb import PbLink
from bacalhau_node.content.elsewhere import Elsewhere
from bacalhau_node.content.unixfs import PROFILES, import_links
from bacalhau_node.errors import BugError, ContentError, NodeUnreachable, SpecError
from bacalhau_node.ports import Access, Provider, Scope
from bacalhau_node.sharding import ContentRef, Entry, LocalStamp
from bacalhau_node.sources.ipfs import ContentSource
from bacalhau_node.spec import InputSource

ABSENT = "bafkreigh2akiscaildcqabsyg3dfr6chu3fgpregiymsck7e7aqa4s52zy"
BIG = os.urandom(300_000)


@pytest.fixture
def store(tmp_path):
    with contextlib.closing(BlockStore(tmp_path / "store")) as store:
        yield store


@pytest.fixture
def source(store):
    return ContentSource(store, Elsewhere(store))


@pytest.fixture
def root(store, tmp_path):
    """A folder in the store."""
    for name, data in {"a.csv": b"1", "year/01.csv": b"22", "year/02.csv": BIG, "years.txt": b""}.items():
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    (tmp_path / "in/none").mkdir()
    return store.add_path(tmp_path / "in")


def listed(source: ContentSource, text: str) -> list[tuple[str, int]]:
    return [(entry.path, entry.size) for entry in source.list(InputSource(source=text), index=2)]


def test_cids_and_ipfs_addresses_are_claimed_and_nothing_else(source):
    for text in (ABSENT, f"ipfs://{ABSENT}", f"ipfs://{ABSENT}/a/b", "ipfs://nonsense"):
        assert source.claims(text)
    for text in ("/data", "data", "https://example.org/x", "s3://bucket/x", ABSENT[:-1], f"/ipfs/{ABSENT}", ""):
        assert not source.claims(text)


def test_a_folder_is_listed_with_its_files_and_empty_folders(source, root):
    everything = [("a.csv", 1), ("none/", 0), ("year/01.csv", 2), ("year/02.csv", len(BIG)), ("years.txt", 0)]
    assert listed(source, root) == listed(source, f"ipfs://{root}") == listed(source, f"ipfs://{root}/") == everything
    (entry, *_) = source.list(InputSource(source=root), index=2)
    assert (entry.source, type(entry.reference)) == (2, ContentRef)


def test_a_path_names_a_folder_or_a_file_below_the_cid(source, root):
    assert listed(source, f"ipfs://{root}/year") == [("01.csv", 2), ("02.csv", len(BIG))]
    assert listed(source, f"ipfs://{root}/year/01.csv") == [("01.csv", 2)]
    assert listed(source, f"ipfs://{root}/none") == []
    with pytest.raises(ContentError, match=f"there is no 2024 in {root}, which holds a.csv, none/, year/01.csv"):
        listed(source, f"ipfs://{root}/2024")


def test_a_file_is_one_entry_named_by_its_cid(source, store):
    cid = store.add_bytes(b"data")
    assert source.list(InputSource(source=cid), index=0) == [Entry(cid, ContentRef(cid), 4, 0)]


def test_what_nobody_is_known_to_have_is_an_error_that_says_whom_to_name(source):
    with pytest.raises(ContentError, match=f"{ABSENT} is not in.*BACALHAU_IPFS_CONNECT.*BACALHAU_IPFS_GATEWAYS"):
        listed(source, ABSENT)
    with pytest.raises(SpecError, match="'nonsense' is not a CID"):
        listed(source, "ipfs://nonsense")


def test_a_cid_of_another_codec_is_an_error_that_says_which_are_read(source):
    cbor = "bafyreigbtj4x7ip5legnfznufuopl4sg4knzc2cof6duas4b3q2fy6swua"
    with pytest.raises(SpecError, match=f"--input ipfs://{cbor}/a: .* only sha2-256 of raw, dag-pb or dag-json"):
        listed(source, f"ipfs://{cbor}/a")


def test_the_stores_own_file_is_handed_out_and_small_ones_are_written_once(source, root, store, tmp_path):
    entries = {entry.path: entry for entry in source.list(InputSource(source=root), index=0)}
    large, small = entries["year/02.csv"].reference, entries["year/01.csv"].reference
    assert source.open(large, scratch=tmp_path) == store.file(large.cid)
    first = source.open(small, scratch=tmp_path)
    assert (first.read_bytes(), first.parent) == (b"22", tmp_path)
    assert source.open(small, scratch=tmp_path) == first


def test_a_file_of_the_store_that_a_shard_wrote_to_is_noticed(source, root, tmp_path):
    entries = {entry.path: entry for entry in source.list(InputSource(source=root), index=0)}
    reference = entries["year/02.csv"].reference
    path = source.open(reference, scratch=tmp_path)
    source.check(reference)
    path.chmod(0o644)
    path.write_bytes(b"x" * len(BIG))
    with pytest.raises(ContentError, match="damaged"):
        source.check(reference)


def test_what_another_source_listed_is_not_checked_and_never_opened(source):
    stamp = LocalStamp("/nowhere", 1, 1, 1, 1)
    source.check(stamp)
    with pytest.raises(BugError):
        source.open(stamp, scratch=Path("/nowhere"))


# --- what is not here ---


class Peer:
    """Has what `store` has, and says what it was asked for."""

    def __init__(self, store: BlockStore, name: str = "peer") -> None:
        self.name, self._store = name, store
        self.asked: list[Cid] = []

    async def car(self, root: Cid, *, path: str = "", scope: Scope = "all") -> AsyncIterator[bytes]:
        yield header([root]) + section(root, await self.block(root, root=root))

    async def block(self, cid: Cid, *, root: Cid) -> bytes:
        self.asked.append(cid)
        return self._store.block(cid)


@pytest.fixture
def theirs(tmp_path):
    with contextlib.closing(BlockStore(tmp_path / "theirs")) as store:
        yield store


@pytest.fixture
def far(theirs, tmp_path):
    """A folder that is not here."""
    for name, data in {"a.csv": b"1", "year/01.csv": b"22", "year/02.csv": BIG, "years.txt": b""}.items():
        path = tmp_path / "far" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    (tmp_path / "far/none").mkdir()
    return theirs.add_path(tmp_path / "far")


@pytest.fixture
def named(monkeypatch) -> Callable[[Sequence[Provider]], None]:
    """Sets whom the environment names."""
    return lambda providers: monkeypatch.setattr(elsewhere, "named", lambda: tuple(providers))


def bring(source: ContentSource, entries: Sequence[Entry], *providers: Provider) -> list[tuple[str, int, str]]:
    told = []
    access = Access(providers=providers)
    asyncio.run(source.fetch(entries, access=access, told=lambda name, done, _, cid: told.append((name, done, cid))))
    return told


def test_a_folder_from_elsewhere_is_listed_like_one_that_is_here(source, store, theirs, far, named):
    there = ContentSource(theirs, Elsewhere(theirs))
    for below in ("", "/year", "/year/01.csv", "/none", "/years.txt"):
        named([peer := Peer(theirs)])
        text = InputSource(source=f"ipfs://{far}{below}")
        assert source.list(text, index=1) == there.list(text, index=1)
        assert sum(len(theirs.block(cid)) for cid in peer.asked) < len(BIG) / 2
    with pytest.raises(ContentError, match=f"there is no 2024 in {far}"):
        listed(source, f"ipfs://{far}/2024")
    assert not store.has(far)


def test_a_shard_brings_its_own_files_and_is_told_of_each(source, store, theirs, far, named):
    named([Peer(theirs)])
    entries = {entry.path: entry for entry in source.list(InputSource(source=far), index=0)}
    named([])
    large, peer = entries["year/02.csv"], Peer(theirs, "requester")
    told = bring(source, [large, entries["a.csv"]], peer)
    assert {name for name, _, _ in told} == {"year/02.csv"}  # all of the small one came when it was listed
    assert told[-1] == ("year/02.csv", len(BIG), large.reference.cid)
    assert max(done for _, done, _ in told) == len(BIG)
    assert store.read(large.reference.cid) == BIG
    assert not store.has(far)
    assert bring(source, [large], peer) == []


def test_who_the_job_names_is_asked_before_whom_the_node_names(source, theirs, far, named, tmp_path):
    (entry,) = ContentSource(theirs, Elsewhere(theirs)).list(InputSource(source=f"ipfs://{far}/year/02.csv"), index=0)
    with contextlib.closing(BlockStore(tmp_path / "empty")) as nothing:
        requester, daemon = Peer(nothing, "requester"), Peer(theirs, "daemon")
        named([daemon])
        bring(source, [entry], requester)
        assert requester.asked == [Cid.parse(entry.reference.cid)]
        assert daemon.asked


def test_what_nobody_has_names_the_file_and_all_who_were_asked(source, theirs, named, tmp_path):
    entry = Entry("x.csv", ContentRef(ABSENT), 4)
    named([Peer(theirs, "one"), Peer(theirs, "two")])
    with pytest.raises(ContentError, match=rf"x\.csv: {ABSENT} could not be fetched.*one \(.* s\): .*two \(.* s\): "):
        bring(source, [entry])
    with pytest.raises(NodeUnreachable, match=r"x\.csv: .*three"):
        bring(source, [entry], Peer(theirs, "three"))


def test_a_file_that_is_wanted_by_many_comes_once(source, theirs, far, named):
    (entry,) = ContentSource(theirs, Elsewhere(theirs)).list(InputSource(source=f"ipfs://{far}/year/02.csv"), index=0)
    named([peer := Peer(theirs)])

    async def all_at_once() -> None:
        await asyncio.gather(*(source.fetch([entry], access=Access(), told=lambda *_: None) for _ in range(20)))

    asyncio.run(all_at_once())
    assert len(peer.asked) == len(set(peer.asked))


def test_more_bytes_than_the_plan_has_are_not_taken(source, store, theirs, named):
    cid = theirs.add_bytes(os.urandom(5_000_000))
    named([Peer(theirs)])
    with pytest.raises(ContentError, match="more than was announced"):
        bring(source, [Entry("x.csv", ContentRef(cid), 1_000_000)])
    assert not store.has(cid)


def test_a_folder_that_tells_wrong_sizes_of_small_files_can_be_used(source, store, theirs, named):
    """Some tools write no size beside a file's name."""
    small = theirs.put(b"data")
    blocks: list[tuple[Cid, bytes]] = []
    link = PbLink(Cid.parse(small).binary, b"x.csv", 0)
    made = import_links([link], lambda cid, block: blocks.append((Cid(cid), block)), profile=PROFILES["unixfs-v1-2025"])
    theirs.keep(*blocks[0])
    named([Peer(theirs)])
    entries = source.list(InputSource(source=str(Cid(made.cid))), index=0)
    bring(source, entries)
    assert store.read(small) == b"data"


def test_gateways_and_daemon_are_those_that_the_environment_names(monkeypatch):
    assert elsewhere.named() == ()
    monkeypatch.setenv("BACALHAU_IPFS_CONNECT", "/ip4/127.0.0.1/tcp/5001")
    monkeypatch.setenv("BACALHAU_IPFS_GATEWAYS", "https://one.example.org, http://two.example.org:8080/,")
    names = [provider.name for provider in elsewhere.named()]
    assert names == ["kubo at 127.0.0.1:5001", "https://one.example.org", "http://two.example.org:8080"]
    monkeypatch.setenv("BACALHAU_IPFS_GATEWAYS", "two.example.org")
    with pytest.raises(SpecError, match="'two\\.example\\.org' is not the address of a gateway"):
        elsewhere.named()
