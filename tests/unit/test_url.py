"""Files from the web: what a good server gives, and one clear error for each thing that a bad one does."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import hashlib
import os
import resource
import socket
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import quote

import aiohttp
import pytest
from hypothesis import given
from hypothesis import strategies as st
from yarl import URL

from bacalhau_node.content.blocks import BlockStore
from bacalhau_node.errors import BugError, ContentError, SpecError
from bacalhau_node.fetched import Fetched
from bacalhau_node.ports import Access
from bacalhau_node.sharding import ContentRef, Doubtful, Entry, UrlRef
from bacalhau_node.sources import download, guard
from bacalhau_node.sources.guard import Guard
from bacalhau_node.sources.limits import Limits
from bacalhau_node.sources.listing import file_name, list_paths, shown_url
from bacalhau_node.sources.url import UrlSource
from bacalhau_node.sources.web import open_web
from bacalhau_node.spec import InputSource
from tests.certificate import CERTIFICATE, KEY
from tests.hostile_http import (
    Asked,
    Hostile,
    data,
    drip,
    endless,
    head,
    hostile,
    ranged,
    redirect,
    short,
    silent,
    status,
)

QUICK = Limits(pause=0.001, silence=0.3, connect=2, reserve=0, file=50_000_000, page=100_000)
BODY = os.urandom(3_000_000)
TAG = '"v1"'


@pytest.fixture
async def server() -> AsyncIterator[Hostile]:
    async with hostile() as server:
        yield server


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files here are written in several blocks."""
    monkeypatch.setattr(download, "BLOCK", 1 << 20)


class Here:
    """A source with its store, and what it told."""

    def __init__(self, root: Path, *, own: bool = True, limits: Limits = QUICK) -> None:
        self.store = BlockStore(root / "store")
        self.fetched = Fetched(root / "store")
        self.source = UrlSource(self.store, fetched=self.fetched, own=own, limits=limits)
        self.told: list[tuple[str, int, int | None, str]] = []
        self.own, self.whose, self.scratch = own, "", root / "scratch"

    async def list(self, url: str) -> list[Entry]:
        return await asyncio.to_thread(self.source.list, InputSource(source=url), index=0)

    async def fetch(self, *entries: Entry) -> None:
        access = Access(own=self.own, whose=self.whose)
        await self.source.fetch(entries, access=access, told=lambda *word: self.told.append(word))

    async def one(self, url: str) -> bytes:
        (entry,) = await self.list(url)
        await self.fetch(entry)
        return self.read(entry)

    def read(self, entry: Entry) -> bytes:
        return self.source.open(entry.reference, scratch=self.scratch).read_bytes()

    def nothing_left(self) -> bool:
        return {path.name for path in self.store.folder.glob("tmp/*/*")} <= {"lock"}

    def close(self) -> None:
        self.fetched.close()
        self.store.close()


@pytest.fixture
async def here(tmp_path: Path) -> AsyncIterator[Here]:
    with contextlib.closing(Here(tmp_path)) as made:
        yield made
        assert made.nothing_left()


# --- what a good server gives ---


async def test_a_file_is_listed_with_its_name_size_and_version_and_comes_when_it_is_fetched(here, server):
    server.answers["/a/x%20y.csv"] = data(BODY, ETag=TAG)
    (entry,) = await here.list(f"{server.url}/a/x%20y.csv")
    assert (entry.path, entry.size) == ("x y.csv", len(BODY))
    assert entry.reference == UrlRef(f"{server.url}/a/x%20y.csv", TAG)
    assert server.gets("/a/x%20y.csv") == []
    await here.fetch(entry)
    assert here.read(entry) == BODY
    here.source.check(entry.reference)
    cid = here.store.add_bytes(BODY)
    assert here.told[-1] == ("x y.csv", len(BODY), len(BODY), cid)


async def test_a_version_is_downloaded_once_and_is_known_to_the_next_process(here, server, tmp_path):
    server.answers["/x.csv"] = data(BODY, ETag=TAG)
    await here.one(f"{server.url}/x.csv")
    with contextlib.closing(Here(tmp_path)) as again:
        assert await again.one(f"{server.url}/x.csv") == BODY
    assert len(server.gets("/x.csv")) == 1


async def test_the_date_of_the_last_change_is_a_version_where_there_is_no_strong_etag(here, server):
    date = "Thu, 26 Nov 2020 12:00:00 GMT"
    server.answers["/x.csv"] = data(b"1", ETag='W/"weak"', Last_Modified=date)
    (entry,) = await here.list(f"{server.url}/x.csv")
    assert entry.reference == UrlRef(f"{server.url}/x.csv", date)


async def test_a_file_without_a_version_is_downloaded_once_for_each_job(here, server):
    server.answers["/x.csv"] = data(b"1")
    (entry,) = await here.list(f"{server.url}/x.csv")
    await here.fetch(entry)
    await here.fetch(entry)
    assert len(server.gets("/x.csv")) == 1
    server.answers["/x.csv"] = data(b"2")
    assert await here.one(f"{server.url}/x.csv") == b"2"
    assert here.read(entry) == b"1"


async def test_shards_that_want_the_same_file_at_once_download_it_once(here, server):
    server.answers["/x.csv"] = data(BODY, ETag=TAG)
    (entry,) = await here.list(f"{server.url}/x.csv")
    await asyncio.gather(*(here.fetch(entry) for _ in range(10)))
    assert len(server.gets("/x.csv")) == 1


async def test_a_file_of_unknown_length_is_measured_when_it_is_listed_and_pinned_by_its_checksum(here, server):
    server.answers["/x.csv"] = data(BODY, Content_Length="?")
    (entry,) = await here.list(f"{server.url}/x.csv")
    assert entry.size == len(BODY)
    assert entry.reference.sha256 == hashlib.sha256(BODY).hexdigest()
    gets = len(server.gets("/x.csv"))
    await here.fetch(entry)
    assert here.read(entry) == BODY
    assert len(server.gets("/x.csv")) == gets


async def test_a_server_that_knows_no_head_is_asked_by_get(here, server):
    async def answer(asked, writer):
        await (status(405) if asked.method == "HEAD" else data(BODY, ETag=TAG))(asked, writer)

    server.answers["/x.csv"] = answer
    assert await here.one(f"{server.url}/x.csv") == BODY


async def test_a_checksum_in_the_url_must_be_that_of_the_bytes(here, server):
    server.answers["/x.csv"] = data(BODY, ETag=TAG)
    right = hashlib.sha256(BODY).hexdigest()
    assert await here.one(f"{server.url}/x.csv#sha256={right.upper()}") == BODY
    with pytest.raises(ContentError, match=f"has the sha256 {right}, not {'0' * 64}"):
        await here.one(f"{server.url}/x.csv#sha256={'0' * 64}")
    with pytest.raises(SpecError, match="64 hexadecimal digits"):
        await here.list(f"{server.url}/x.csv#sha256=abc")


async def test_a_file_that_is_known_by_its_checksum_is_not_downloaded_from_elsewhere(here, server):
    server.answers["/x.csv"] = server.answers["/mirror.csv"] = data(BODY)
    right = hashlib.sha256(BODY).hexdigest()
    await here.one(f"{server.url}/x.csv#sha256={right}")
    assert await here.one(f"{server.url}/mirror.csv#sha256={right}") == BODY
    assert server.gets("/mirror.csv") == []


async def test_redirects_are_followed_and_the_name_is_that_of_where_they_end(here, server):
    server.answers["/latest"] = redirect("/2024/data.csv")
    server.answers["/2024/data.csv"] = data(b"1", ETag=TAG)
    (entry,) = await here.list(f"{server.url}/latest")
    assert (entry.path, entry.reference.url) == ("data.csv", f"{server.url}/latest")
    await here.fetch(entry)
    assert here.read(entry) == b"1"


async def test_no_more_than_four_questions_at_once_go_to_one_server(here, server, tmp_path):
    now, most = 0, 0

    async def answer(asked, writer):
        nonlocal now, most
        now += 1
        most = max(most, now)
        await asyncio.sleep(0.01)
        now -= 1
        await data(b"1", ETag=TAG)(asked, writer)

    server.default = answer
    (tmp_path / "many.urls").write_text("\n".join(f"{server.url}/{number}.csv" for number in range(40)))
    entries = await here.list(str(tmp_path / "many.urls"))
    await here.fetch(*entries)
    assert len(entries) == 40
    assert most == 4


# --- folders and lists ---


INDEX = "<html><head><title>Index of /d</title></head><body>{}</body></html>"


async def test_a_list_holds_one_url_a_line_and_names_that_are_equal_get_their_folders(here, server, tmp_path):
    server.default = data(b"1", ETag=TAG)
    lines = ["# years", "", f"{server.url}/2020/a.csv  # the first", f"{server.url}/2021/a.csv", f"{server.url}/b.csv"]
    (tmp_path / "years.urls").write_text("\n".join(lines))
    assert [entry.path for entry in await here.list(str(tmp_path / "years.urls"))] == [
        "2020/a.csv",
        "2021/a.csv",
        "b.csv",
    ]
    server.answers["/all.urls.txt"] = data(b"2020/a.csv\n/2020/c.csv\n", Content_Type="text/plain")
    entries = await here.list(f"{server.url}/all.urls.txt")
    assert [entry.reference.url for entry in entries] == [f"{server.url}/2020/a.csv", f"{server.url}/2020/c.csv"]
    stored = here.store.add_path(tmp_path / "years.urls")
    with pytest.raises(ContentError, match="there is no list"):
        await here.list(f"ipfs://{stored}/years.urls")


async def test_a_list_with_a_line_that_is_no_url_is_the_authors_error(here, tmp_path):
    (tmp_path / "x.urls").write_text("https://example.org/a\nftp://example.org/b\n")
    with pytest.raises(SpecError, match=r"x\.urls, line 2: 'ftp://example.org/b'"):
        await here.list(str(tmp_path / "x.urls"))
    (tmp_path / "x.urls").write_text("# nothing\n")
    with pytest.raises(SpecError, match="lists no URLs"):
        await here.list(str(tmp_path / "x.urls"))


async def test_an_index_that_links_out_of_itself_is_an_error_and_one_that_links_elsewhere_is_not(here, server):
    server.answers["/d/"] = data(
        INDEX.format('<a href="/e/x">x</a><a href="http://other/">o</a>').encode(), Content_Type="text/html"
    )
    assert await here.list(f"{server.url}/d/") == []
    for link in ("%2e%2e/x", "..%2fx", "a%00b", "%2F"):
        server.answers["/d/"] = data(INDEX.format(f'<a href="{link}">x</a>').encode(), Content_Type="text/html")
        server.default = data(b"1")
        with pytest.raises(ContentError, match="can't be the path of a file"):
            await here.list(f"{server.url}/d/")


async def test_an_index_that_was_asked_for_with_a_query_is_a_folder_too(here, server):
    page = INDEX.format('<a href="?C=N">sort</a><a href="x.csv">x</a><a href="sub/y.csv">y</a>').encode()
    server.answers["/d/?C=M"] = data(page, Content_Type="text/html")
    server.default = data(b"1", ETag=TAG)
    assert [entry.path for entry in await here.list(f"{server.url}/d/?C=M")] == ["sub/y.csv", "x.csv"]


async def test_a_folder_that_never_ends_is_an_error(here, server):
    async def answer(asked, writer):
        await data(INDEX.format('<a href="deeper/">d</a>').encode(), Content_Type="text/html")(asked, writer)

    server.default = answer
    with pytest.raises(ContentError, match="more than 16 levels"):
        await here.list(f"{server.url}/d/")


async def test_a_web_page_that_is_no_index_is_an_error(here, server):
    server.default = data(b"<title>Welcome</title><a href='x'>x</a>", Content_Type="text/html")
    with pytest.raises(ContentError, match=r"'Welcome'.*no index of a folder"):
        await here.list(f"{server.url}/")


async def test_an_index_that_is_too_long_is_an_error(here, server):
    server.default = endless(Content_Type="text/html")
    with pytest.raises(ContentError, match="longer than an index"):
        await here.list(f"{server.url}/")


# --- names ---


@pytest.mark.parametrize(
    ("disposition", "name"),
    [
        ('attachment; filename="data.csv"', "data.csv"),
        ("attachment; filename*=UTF-8''%E2%82%AC%20rates.csv", "€ rates.csv"),
        ('attachment; filename="../../etc/x"', "x"),
        ('attachment; filename="..\\\\..\\\\x.csv"', "x.csv"),
        ("attachment; filename*=UTF-8''..%2Fx", "x"),
        ("attachment; filename*=UTF-8''a%00b.csv", "ab.csv"),
        ("attachment; filename*=no-such''x", "x"),
        ('attachment; filename=".."', "url.csv"),
        ('attachment; filename=".bashrc"', "bashrc"),
        (f'attachment; filename="{"n" * 5000}.csv"', "n" * 251 + ".csv"),
        ("inline", "url.csv"),
    ],
)
async def test_a_name_from_the_server_is_never_a_path(here, server, disposition, name):
    server.answers["/url.csv"] = data(b"1", ETag=TAG, Content_Disposition=disposition)
    (entry,) = await here.list(f"{server.url}/url.csv")
    assert entry.path == name


@given(st.text(max_size=80), st.text(max_size=80))
def test_whatever_a_server_calls_a_file_it_is_one_level_of_a_path(header, name):
    for disposition in (header, f'attachment; filename="{name}"', f"attachment; filename*=UTF-8''{quote(name)}"):
        found = file_name(disposition, f"http://x/{quote(name)}", "http://x/")
        assert found not in ("", ".", "..")
        assert not {"/", "\0"} & set(found)
        assert len(found.encode()) <= 255


@given(
    st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from("ab"), st.sampled_from("xy")), unique=True, min_size=1)
)
def test_no_two_files_of_a_list_lie_at_one_place(parts):
    urls = [f"https://{host}.org/{folder}/{name}.csv" for host, folder, name in parts]
    paths = list_paths(urls, [url.rpartition("/")[2] for url in urls])
    assert len(set(paths)) == len(paths)
    assert all(path.endswith(url.rpartition("/")[2]) for path, url in zip(paths, urls, strict=True))


# --- what bad servers do when they are asked what there is ---


async def doubt(here: Here, url: str) -> str:
    """Why a URL could not be listed; fetching it must say the same."""
    (entry,) = await here.list(url)
    assert isinstance(entry, Doubtful), entry
    assert (entry.size, entry.path) == (0, URL(url).name)
    with pytest.raises(ContentError) as caught:
        await here.fetch(entry)
    assert here.nothing_left()
    assert type(caught.value) is ContentError
    return entry.problem


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (status(404), "answers 404 Not Found: there is no such file"),
        (status(401), "answers 401 Unauthorized: it wants to know who asks"),
        (status(500), "answers 500 Internal Server Error (3 attempts)"),
        (status(304), "answers 304"),
        (redirect("/x.csv"), "leads to 6 redirects"),
        (redirect("file:///etc/passwd"), "which is not http or https"),
        (redirect("http://[bad"), "which is no URL"),
        (redirect("http://169.254.169.254/latest/meta-data/"), "169.254.169.254 hands out this machine's credentials"),
        (redirect("http://[::ffff:169.254.169.254]/"), "hands out this machine's credentials"),
        (redirect("http://metadata.google.internal/"), "metadata.google.internal hands out this machine's credentials"),
        (data(b"<html>", Content_Type="text/html; charset=utf-8"), "answers a web page (text/html), not data"),
        (data(gzip.compress(bytes(200_000_000)), Content_Encoding="gzip"), "is sent packed (Content-Encoding: gzip)"),
        (silent, "3 attempts"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_a_url_that_can_not_be_listed_says_why_and_so_does_its_shard(here, server, answer, problem):
    server.answers["/x.csv"] = answer
    assert problem in await doubt(here, f"{server.url}/x.csv")


async def test_a_server_that_is_not_there_is_named(here, server):
    async with hostile() as gone:
        url = f"{gone.url}/x.csv"
    assert f"{url}: Connect call failed" in await doubt(here, url)
    assert "no-such-host.invalid" in await doubt(here, "http://no-such-host.invalid/x.csv")


async def test_what_speaks_no_http_is_named(here, server):
    async def answer(_: Asked, writer: asyncio.StreamWriter) -> None:
        writer.write(b"SSH-2.0-OpenSSH_9.2\r\n\r\n")

    server.answers["/x.csv"] = answer
    assert "an answer that is not HTTP" in await doubt(here, f"{server.url}/x.csv")


async def test_a_url_that_answers_in_the_end_is_no_longer_doubtful(here, server):
    server.answers["/x.csv"] = status(503)
    (entry,) = await here.list(f"{server.url}/x.csv")
    server.answers["/x.csv"] = data(BODY, ETag=TAG)
    await here.fetch(entry)
    assert here.read(entry) == BODY


async def test_a_page_without_a_suffix_among_data_is_suspected(here, server, tmp_path):
    server.answers["/a"] = data(b"1", ETag=TAG)
    server.answers["/b"] = data(b"<html>log in", ETag=TAG, Content_Type="text/html")
    (tmp_path / "x.urls").write_text(f"{server.url}/a\n{server.url}/b\n")
    first, second = await here.list(str(tmp_path / "x.urls"))
    assert not isinstance(first, Doubtful)
    assert isinstance(second, Doubtful)
    assert "not data as those that are listed with it" in second.problem


async def test_a_page_is_data_where_that_is_what_was_asked_for(here, server):
    server.answers["/x.html"] = data(b"<html>", ETag=TAG, Content_Type="text/html")
    assert await here.one(f"{server.url}/x.html") == b"<html>"


async def test_a_packed_file_that_is_called_like_one_stays_packed(here, server):
    packed = gzip.compress(b"a,b\n")
    server.answers["/x.csv.gz"] = data(packed, ETag=TAG, Content_Encoding="gzip")
    assert await here.one(f"{server.url}/x.csv.gz") == packed


@pytest.mark.parametrize(
    "url",
    [
        "http://",
        "https:///x",
        "http://a b/",
        "http://x:99999/",
        "http://x/\0",
        "http://[::1/x",
        "http://x/" + "y" * 9000,
    ],
)
async def test_what_is_no_url_is_the_authors_error(here, url):
    with pytest.raises(SpecError):
        await here.list(url)


def test_a_password_is_in_no_message():
    assert shown_url("https://me:secret@example.org/x?y=@z") == "https://me:…@example.org/x?y=@z"


@pytest.mark.parametrize(
    "name", ["X-Amz-Signature", "X-Amz-Security-Token", "X-Goog-Signature", "sig", "api_key", "token"]
)
def test_what_a_url_is_signed_by_is_in_no_message(name):
    """A shard that can't fetch its file says so in its record, which may be published."""
    shown = shown_url(f"https://b.example.org/x.csv?a=1&{name}=0123abcd&b=2")
    assert shown == f"https://b.example.org/x.csv?a=1&{name}=…&b=2"


# --- what bad servers do while they send ---


async def listed_as(here: Here, server: Hostile, answer, etag: str | None = TAG) -> Entry:
    """A file that was listed in peace, and that `answer` answers from now on."""
    server.answers["/x.csv"] = data(BODY, **({"ETag": etag} if etag else {}))
    (entry,) = await here.list(f"{server.url}/x.csv")
    server.answers["/x.csv"] = answer
    return entry


async def fails(here: Here, entry: Entry) -> str:
    with pytest.raises(ContentError) as caught:
        await here.fetch(entry)
    assert here.nothing_left()
    with pytest.raises(ContentError, match="no longer in this node's store"):
        here.read(entry)
    return str(caught.value)


async def test_a_download_that_breaks_off_goes_on_where_it_was(here, server):
    stops = [1_200_000, 0, 1_100_000, 500_000]
    entry = await listed_as(here, server, ranged(BODY, etag=TAG, stops=stops))
    await here.fetch(entry)
    assert here.read(entry) == BODY
    asked = [one.headers.get("range") for one in server.gets("/x.csv")]
    assert asked[0] is None
    assert asked[-1] == "bytes=2800000-"
    assert sum(one is not None for one in asked) == 4


async def test_a_server_that_ignores_the_range_starts_again(here, server):
    stops = [2_000_000]

    async def answer(asked, writer):
        plain = Asked(asked.method, asked.path, {})
        await ranged(BODY, etag=TAG, stops=stops)(plain, writer)

    entry = await listed_as(here, server, answer)
    await here.fetch(entry)
    assert here.read(entry) == BODY


@pytest.mark.parametrize("content_range", ["bytes 0-9/3000000", "bytes 2000000-2999999/9999999", "nonsense", None])
async def test_another_part_than_was_asked_for_is_never_taken(here, server, content_range):
    stops = [2_000_000]

    async def answer(asked, writer):
        if "range" not in asked.headers:
            return await ranged(BODY, etag=TAG, stops=stops)(asked, writer)
        named = {"Content-Range": content_range} if content_range else {}
        writer.write(head(206, {"ETag": TAG, "Content-Length": 1_000_000, **named}) + bytes(1_000_000))
        return None

    entry = await listed_as(here, server, answer)
    await here.fetch(entry)
    assert here.read(entry) == BODY


async def test_a_file_without_a_strong_validator_is_never_pieced_together(here, server):
    stops = [2_000_000]
    entry = await listed_as(here, server, ranged(BODY, etag='W/"weak"', stops=stops), etag=None)
    await here.fetch(entry)
    assert here.read(entry) == BODY
    assert all("range" not in one.headers for one in server.gets("/x.csv"))


async def test_a_file_that_changed_since_it_was_listed_is_an_error(here, server):
    entry = await listed_as(here, server, data(BODY, ETag='"v2"'))
    assert 'changed since the job was planned (it was "v1", it is "v2")' in await fails(here, entry)


async def test_a_file_that_changes_between_two_attempts_is_an_error(here, server):
    async def answer(asked, writer):
        tag = TAG if len(server.gets("/x.csv")) == 1 else '"v2"'
        await ranged(BODY, etag=tag, stops=[2_000_000] if tag == TAG else [])(asked, writer)

    entry = await listed_as(here, server, answer)
    assert "changed since the job was planned" in await fails(here, entry)


async def test_a_file_of_another_length_than_was_listed_changed(here, server):
    entry = await listed_as(here, server, data(BODY + b"1"), etag=None)
    assert f"it had {len(BODY)} bytes, it has {len(BODY) + 1}" in await fails(here, entry)


async def test_a_body_that_is_shorter_than_announced_is_an_error(here, server):
    entry = await listed_as(here, server, short(BODY[:100], claimed=len(BODY)), etag=None)
    assert "3 attempts" in await fails(here, entry)


async def test_a_file_that_says_no_size_and_has_no_end_is_cut_off(here, server):
    server.answers["/x.csv"] = endless()
    assert "larger than 50000000 bytes" in await doubt(here, f"{server.url}/x.csv")


async def test_a_file_that_says_it_is_larger_than_the_cap_is_not_begun(here, server):
    server.answers["/x.csv"] = data(BODY, Content_Length=50_000_001)
    (entry,) = await here.list(f"{server.url}/x.csv")
    assert "at most 50000000 are downloaded" in await fails(here, entry)


async def test_a_drip_is_given_up(here, server):
    entry = await listed_as(here, server, drip(len(BODY), every=0.05), etag=None)
    assert "sends too slowly" in await fails(here, entry)


async def test_headers_that_drip_are_given_up(here, server):
    async def answer(_, writer):
        writer.write(b"HTTP/1.1 200 OK\r\n")
        while True:
            writer.write(b"X: y\r\n")
            await writer.drain()
            await asyncio.sleep(0.05)

    entry = await listed_as(here, server, answer)
    assert "sends nothing" in await fails(here, entry)


async def test_silence_is_given_up(here, server):
    entry = await listed_as(here, server, silent)
    assert "sends nothing" in await fails(here, entry)


async def test_a_full_disk_is_said_before_anything_is_written(here, server, tmp_path):
    server.answers["/x.csv"] = data(BODY, ETag=TAG)
    with contextlib.closing(Here(tmp_path / "other", limits=Limits(reserve=1 << 60))) as full:
        (entry,) = await full.list(f"{server.url}/x.csv")
        with pytest.raises(ContentError, match=f"no room for {len(BODY)} bytes"):
            await full.fetch(entry)
        assert full.nothing_left()


async def test_a_disk_that_takes_no_more_in_the_middle_is_an_error(here, server):
    server.answers["/x.csv"] = data(BODY, ETag=TAG)
    (entry,) = await here.list(f"{server.url}/x.csv")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(BODY) - 1_000, limit[1]))
    try:
        with pytest.raises(ContentError, match=r"x\.csv can't be written to .*: File too large; make room"):
            await here.fetch(entry)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert here.nothing_left()
    await here.fetch(entry)
    assert here.read(entry) == BODY


async def test_a_download_that_is_cancelled_leaves_nothing(here, server):
    begun = asyncio.Event()

    async def answer(asked, writer):
        writer.write(head(200, {"Content-Length": len(BODY), "ETag": TAG}) + BODY[:2_000_000])
        await writer.drain()
        begun.set()
        await asyncio.Event().wait()

    entry = await listed_as(here, server, answer)
    task = asyncio.create_task(here.fetch(entry))
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert here.nothing_left()
    server.answers["/x.csv"] = data(BODY, ETag=TAG)
    await here.fetch(entry)
    assert here.read(entry) == BODY


async def test_one_file_that_fails_ends_the_others_of_its_shard(here, server):
    server.answers["/a.csv"] = server.answers["/b.csv"] = data(BODY, ETag=TAG)
    first, second = [*await here.list(f"{server.url}/a.csv"), *await here.list(f"{server.url}/b.csv")]
    server.answers["/a.csv"], server.answers["/b.csv"] = silent, status(404)
    with pytest.raises(ContentError, match=r"b\.csv answers 404"):
        await here.fetch(first, second)
    assert here.nothing_left()


async def test_what_was_not_fetched_is_not_opened(here):
    with pytest.raises(ContentError, match="no longer in this node's store"):
        here.source.open(UrlRef("http://x/y", TAG), scratch=here.scratch)
    with pytest.raises(BugError):
        here.source.open(ContentRef("bafy"), scratch=here.scratch)


# --- who asks ---


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "[::ffff:127.0.0.1]", "[::1]", "0x7f.1", "0.0.0.0", "10.0.0.1"]
)
async def test_jobs_of_others_reach_nothing_but_the_public_internet(server, tmp_path, host):
    server.default = data(b"secret", ETag=TAG)
    url = f"http://{host}:{URL(server.url).port}/x.csv"
    with contextlib.closing(Here(tmp_path, own=False)) as others:
        (entry,) = await others.list(url)
        assert isinstance(entry, Doubtful)
        assert "is not an address of the public internet" in entry.problem
    with contextlib.closing(Here(tmp_path)) as planner:
        planner.own = False  # listed for oneself, fetched for others
        with pytest.raises(ContentError, match="not an address of the public internet"):
            await planner.fetch(Entry("x.csv", UrlRef(url, TAG), 6))
    assert server.asked == []


async def test_what_came_for_the_owner_is_not_there_for_others_who_guess_its_version_or_checksum(here, server):
    server.default = data(BODY, ETag=TAG)
    await here.one(f"{server.url}/x.csv")
    checksum = hashlib.sha256(BODY).hexdigest()
    await here.one(f"{server.url}/x.csv#sha256={checksum}")
    here.own = False
    for guess in (UrlRef(f"{server.url}/x.csv", TAG), UrlRef(f"{server.url}/x.csv", "", checksum)):
        with pytest.raises(ContentError, match="not an address of the public internet"):
            await here.fetch(Entry("x.csv", guess, len(BODY)))


@pytest.mark.parametrize(
    ("near", "asked", "may"),
    [
        ("10.1.2.3", "10.1.2.3", True),
        ("10.1.2.3", "10.1.2.4", False),
        ("10.1.2.3", "127.0.0.1", False),
        ("10.1.2.3", "::ffff:10.1.2.3", True),
        ("::ffff:10.1.2.3", "10.1.2.3", True),
        ("127.0.0.1", "127.0.1.1", True),
        ("127.0.0.1", "::1", True),
        ("127.0.0.1", "10.1.2.3", False),
        ("fd00::1", "fd00::1", True),
        ("169.254.169.254", "169.254.169.254", False),
        ("", "127.0.0.1", False),
        ("", "8.8.8.8", True),
    ],
)
def test_what_another_node_serves_is_asked_for_where_it_is_linked_from_and_on_the_internet(near, asked, may):
    family = socket.AF_INET6 if ":" in asked else socket.AF_INET
    info = (family, socket.SOCK_STREAM, 0, "", (asked, 80))
    with contextlib.nullcontext() if may else pytest.raises(OSError, match=r"public internet|credentials"):
        Guard(own=False, near=near).socket(info).close()


class OneDoor(Guard):
    """The rules for others, but for one server of this machine that stands for the internet."""

    def __init__(self, port: int) -> None:
        super().__init__(own=False)
        self._port = port

    def socket(self, info):
        return (Guard(own=True) if info[4][1] == self._port else super()).socket(info)


def signed(server: Hostile, signature: str) -> Entry:
    """An object of a bucket as a requester offers it."""
    url = URL(server.url).with_host("localhost") / "x.csv"
    query = f"X-Amz-Date={signature}&X-Amz-Signature={signature}"
    return Entry("x.csv", UrlRef(f"{url}?{query}", TAG), len(BODY))


async def test_an_object_whose_url_is_signed_anew_is_here_already(here, server):
    server.default = data(BODY, ETag=TAG)
    for number in range(2):
        entry = signed(server, str(number))
        await here.fetch(entry)
        assert here.read(entry) == BODY
    assert len(server.asked) == 1


async def test_what_came_by_a_signed_url_is_there_for_those_alone_who_had_it_signed(server, tmp_path, monkeypatch):
    """A requester that knows the name and the ETag of an object need not be one who may read it."""
    monkeypatch.setattr(guard, "Guard", lambda **_: OneDoor(URL(server.url).port))
    with contextlib.closing(Here(tmp_path, own=False)) as here:
        server.default = data(BODY, ETag=TAG)
        for number, whose in enumerate(("one", "one", "")):
            here.whose = whose
            await here.fetch(signed(server, str(number)))
        assert len(server.asked) == 2
        server.default = status(403)
        for whose in ("another", ""):
            here.whose = whose
            with pytest.raises(ContentError, match="403"):
                await here.fetch(signed(server, "forged"))


@pytest.mark.parametrize(
    "inside", ["169.254.169.254", "[::ffff:127.0.0.1]", "localhost", "192.168.0.1", "[64:ff9b::7f00:1]"]
)
async def test_no_redirect_leads_jobs_of_others_inside(server, inside):
    async with hostile() as secret:
        secret.default = data(b"secret")
        server.default = redirect(f"http://{inside}:{URL(secret.url).port}/")
        async with open_web(OneDoor(URL(server.url).port), QUICK) as web:
            with pytest.raises(ContentError, match=r"credentials|not an address of the public internet"):
                await web.look(f"{server.url}/x.csv")
        assert secret.asked == []


async def test_no_redirect_leads_from_https_to_http_and_the_other_way_is_fine(here, server, tmp_path, monkeypatch):
    (tmp_path / "cert.pem").write_text(CERTIFICATE + KEY)
    serving = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    serving.load_cert_chain(tmp_path / "cert.pem")
    asking = ssl.create_default_context(cadata=CERTIFICATE)
    async with hostile(tls=serving) as secure:
        assert "its certificate is not valid" in await doubt(here, f"{secure.url}/x.csv")
        monkeypatch.setattr(aiohttp.connector, "_SSL_CONTEXT_VERIFIED", asking)
        secure.answers["/x.csv"] = redirect(f"{server.url}/x.csv")
        server.answers["/x.csv"] = data(b"1", ETag=TAG)
        assert "from https to http" in await doubt(here, f"{secure.url}/x.csv")
        server.answers["/y.csv"] = redirect(f"{secure.url}/y.csv")
        secure.answers["/y.csv"] = data(b"1", ETag=TAG)
        assert await here.one(f"{server.url}/y.csv") == b"1"


async def test_own_jobs_go_through_the_proxy_and_jobs_of_others_do_not(server, tmp_path, monkeypatch):
    async def proxy(asked, writer):
        await data(b"by proxy", ETag=TAG)(asked, writer)

    server.default = proxy
    monkeypatch.setenv("http_proxy", server.url)
    url = "http://data.example.invalid/x.csv"
    with contextlib.closing(Here(tmp_path)) as own:
        assert await own.one(url) == b"by proxy"
        assert server.asked[-1].path == url
        asked = len(server.asked)
        assert "hands out this machine's credentials" in (await own.list("http://169.254.169.254/x"))[0].problem
        assert len(server.asked) == asked
    with contextlib.closing(Here(tmp_path, own=False)) as others:
        assert isinstance((await others.list(url))[0], Doubtful)
    assert len(server.asked) == asked


async def test_without_aiohttp_the_error_says_what_to_install(here, monkeypatch):
    monkeypatch.setattr("importlib.import_module", lambda name: exec("raise ModuleNotFoundError(name='aiohttp')"))
    with pytest.raises(SpecError, match=r"need aiohttp: pip install 'bacalhau-jupyter\[http\]'"):
        await here.list("https://example.org/x.csv")


def test_the_reserve_is_kept_free(tmp_path):
    Limits(reserve=0).check_room(tmp_path, 1)
    with pytest.raises(ContentError, match="kept in reserve"):
        Limits(reserve=1 << 60).check_room(tmp_path, 1)
