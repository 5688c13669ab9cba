"""Buckets as inputs and as the place of results, on a real S3 server; boto3 fills them and looks at what is there."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import obstore
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from msgspec import structs

from bacalhau_node import sharding
from bacalhau_node.buckets import explained, parse
from bacalhau_node.content.blocks import BlockStore
from bacalhau_node.errors import BugError, ContentError, SpecError
from bacalhau_node.fetched import Fetched
from bacalhau_node.ports import Access
from bacalhau_node.publishers.bucket import BucketPublisher
from bacalhau_node.sharding import ContentRef, Entry, LocalStamp, Unusable, UrlRef
from bacalhau_node.sources import bucket as module
from bacalhau_node.sources.bucket import BucketSource
from bacalhau_node.sources.url import UrlSource
from bacalhau_node.spec import InputSource
from bacalhau_node.testing.builders import a_job_id
from tests.object_store import PUBLIC, SECRET_KEY, Bucket, new_bucket


@pytest.fixture
def source(tmp_path) -> Iterator[BucketSource]:
    root = tmp_path / "store"
    with contextlib.closing(BlockStore(root)) as store, contextlib.closing(Fetched(root)) as table:
        yield BucketSource(store, fetched=table)


def listed(source: BucketSource, text: str, index: int = 0) -> list[Entry]:
    return source.list(InputSource(source=text), index=index)


async def fetched(source: BucketSource, entries: list[Entry], told=lambda *_: None, *, own: bool = True) -> None:
    async with asyncio.timeout(60):
        await source.fetch(entries, access=Access(own=own), told=told)


def read(source: BucketSource, entry: Entry, scratch: Path) -> bytes:
    return source.open(entry.reference, scratch=scratch).read_bytes()


def nothing_half_made(root: Path) -> bool:
    return {path.name for path in root.glob("store/tmp/*/*")} == {"lock"}


# --- names ---


@pytest.mark.parametrize("text", ["s3://bucket", "s3://bucket/a b/*.csv", "gs://bucket/x", "az://container/x/"])
def test_it_claims_the_names_of_buckets(source, text):
    assert source.claims(text)


@pytest.mark.parametrize("text", ["/data", "https://s3.amazonaws.com/b/x", "ipfs://Qm", "S3://bucket", "s3:bucket"])
def test_it_claims_nothing_else(source, text):
    assert not source.claims(text)


@pytest.mark.parametrize(
    "text",
    ["s3://", "s3:///x", "s3://u:p@host/x", "s3://host:80/x", "s3://a..b/x", "s3://b?x/y", "s3://b%2f/x"],
)
def test_a_name_that_is_not_that_of_a_bucket_is_the_authors_error(source, text):
    with pytest.raises(SpecError, match="does not name a bucket"):
        listed(source, text)


@pytest.mark.parametrize("key", ["a//b", "../x", "a/./b", "/lead", "a\0b", "a\nb"])
def test_a_key_that_can_not_be_a_path_is_the_authors_error(source, key):
    with pytest.raises(SpecError, match="can't be a path of files"):
        listed(source, f"s3://bucket/{key}")


# --- listing ---

FILES = {"data/b.csv": b"22", "data/a/z": b"1", "data/a.b": b"333", "data/é 日+%25?#.csv": b"4444", "data/Z": b"5"}


@pytest.mark.parametrize("end", ["", "/"])
def test_a_prefix_is_a_folder_sorted_by_the_bytes_of_its_paths(source, bucket, end):
    bucket.put(FILES | {"database/no": b"", "other": b""})
    entries = listed(source, f"s3://{bucket.name}/data{end}", index=3)
    assert [(entry.path, entry.size, entry.source) for entry in entries] == [
        ("Z", 1, 3),
        ("a.b", 3, 3),
        ("a/z", 1, 3),
        ("b.csv", 2, 3),
        ("é 日+%25?#.csv", 4, 3),
    ]
    assert {entry.reference.url for entry in entries} == {f"s3://{bucket.name}/{key}" for key in FILES}


def test_a_whole_bucket_is_a_folder(source, bucket):
    bucket.put(FILES)
    assert {entry.path for entry in listed(source, f"s3://{bucket.name}")} == set(FILES)


def test_the_key_of_an_object_is_one_file_with_its_own_name(source, bucket):
    bucket.put(FILES | {"data/b.csv.gz": b""})
    (entry,) = listed(source, f"s3://{bucket.name}/data/b.csv")
    assert (entry.path, entry.size) == ("b.csv", 2)


def test_what_marks_an_empty_folder_is_no_file_and_an_empty_file_is_one(source, bucket):
    bucket.put({"data/": b"", "data/sub/": b"", "data/sub/x": b"1", "data/empty/": b"", "data/_SUCCESS": b""})
    assert [entry.path for entry in listed(source, f"s3://{bucket.name}/data")] == ["_SUCCESS", "sub/x"]


def test_a_key_that_is_a_folder_too_waits_until_it_is_selected(source, bucket):
    bucket.put({"data/x": b"1", "data/x/y": b"2"})
    entries = listed(source, f"s3://{bucket.name}/data/")
    assert [entry.path for entry in entries if isinstance(entry, Unusable)] == ["x"]
    assert [unit[0].path for unit in sharding.select(entries, ["x/*"])] == ["x/y"]
    with pytest.raises(ContentError, match=f"s3://{bucket.name}/data/x is a file and a folder too: rename"):
        sharding.select(entries, [])


def test_a_name_that_no_disk_takes_waits_until_it_is_selected():
    place = parse("s3://bucket/data")
    problems = module._problems(place, ["é" * 128, "é" * 127, "twice", "twice"])
    assert problems["é" * 128].endswith("longer than 255 bytes, which no disk takes: rename the object")
    assert set(problems) == {"é" * 128, "twice"}


def test_a_key_that_no_path_can_stand_for_is_an_error_naming_it(source, bucket):
    bucket.put({"data/new\nline": b"1"})
    with pytest.raises(ContentError, match=r"holds a key that can't be a path of files .*new"):
        listed(source, f"s3://{bucket.name}/data")


def test_an_empty_prefix_is_an_error_with_what_is_there(source, bucket):
    with pytest.raises(ContentError, match=f"the bucket s3://{bucket.name} is empty"):
        listed(source, f"s3://{bucket.name}/flihgts/2013")
    bucket.put({"flights/2013.csv": b"1", "readme": b"2"})
    with pytest.raises(ContentError) as caught:
        listed(source, f"s3://{bucket.name}/flihgts/2013")
    assert str(caught.value) == (
        f"there is nothing at s3://{bucket.name}/flihgts/2013; did you mean flights?"
        " The bucket holds, for example, flights/, readme"
    )


def test_more_objects_than_a_page_holds_are_all_listed(source, bucket):
    store = source._buckets.open(parse(f"s3://{bucket.name}"))

    async def fill() -> None:
        await asyncio.gather(*(obstore.put_async(store, f"data/{number:04}", b"x") for number in range(1_100)))

    asyncio.run(fill())
    assert [entry.path for entry in listed(source, f"s3://{bucket.name}/data")] == [f"{n:04}" for n in range(1_100)]


# --- bytes ---


async def test_what_is_fetched_holds_the_bytes_that_were_listed(source, bucket, tmp_path):
    files = FILES | {"data/empty": b"", "data/5MB": os.urandom(5_000_000)}
    bucket.put(files)
    entries = listed(source, f"s3://{bucket.name}/data")
    told = []
    await fetched(source, entries, lambda *what: told.append(what))
    assert {f"data/{entry.path}": read(source, entry, tmp_path / "scratch") for entry in entries} == files
    for entry in entries:
        source.check(entry.reference)
    ends = {name: (done, total) for name, done, total, cid in told if cid}
    assert ends == {entry.path: (entry.size, entry.size) for entry in entries}
    parts = [done for name, done, total, cid in told if name == "5MB" and not cid]
    assert parts == sorted(parts)
    assert parts[-1] == 5_000_000
    assert nothing_half_made(tmp_path)


async def test_a_rerun_asks_the_bucket_for_nothing(source, bucket, tmp_path):
    bucket.put({"x": b"1"})
    (entry,) = listed(source, f"s3://{bucket.name}/x")
    await fetched(source, [entry])
    bucket.delete("x")
    told = []
    await fetched(source, [entry], lambda *what: told.append(what))
    assert (told, read(source, entry, tmp_path)) == ([], b"1")


@pytest.mark.parametrize("size", [3, 5_000_000])
async def test_an_object_that_changed_after_the_plan_is_an_error_naming_it(source, bucket, tmp_path, size):
    bucket.put({"x": bytes(size)})
    (entry,) = listed(source, f"s3://{bucket.name}/x")
    bucket.put({"x": b"\1" * size})
    with pytest.raises(ContentError, match=f"s3://{bucket.name}/x: it changed after the job was planned"):
        await fetched(source, [entry])
    assert nothing_half_made(tmp_path)


@pytest.mark.parametrize("size", [3, 5_000_000])
async def test_an_object_that_is_gone_is_an_error_naming_it(source, bucket, tmp_path, size):
    bucket.put({"x": bytes(size), "y": b"1"})
    entries = listed(source, f"s3://{bucket.name}")
    bucket.delete("x")
    with pytest.raises(ContentError, match=f"s3://{bucket.name}/x is gone: it was removed after the job was planned"):
        await fetched(source, entries)
    with pytest.raises(ContentError, match="no longer in this node's store"):
        source.open(entries[0].reference, scratch=tmp_path)


async def test_a_bucket_with_versions_gives_the_planned_ones(source, bucket, tmp_path):
    bucket.put({"old": b"0"})
    bucket.keep_versions()
    bucket.put({"x": b"one", "y": b"1"})
    entries = listed(source, f"s3://{bucket.name}")
    bucket.put({"x": b"two!"})
    bucket.delete("old")
    await fetched(source, entries[:2])
    assert [read(source, entry, tmp_path) for entry in entries[:2]] == [b"0", b"one"]
    version = entries[2].reference.version.partition(" ")[0]
    bucket.s3.delete_object(Bucket=bucket.name, Key="y", VersionId=version)
    with pytest.raises(ContentError, match="/y is gone: it was removed"):
        await fetched(source, entries)


@pytest.mark.parametrize("size", [2_000_000, 5_000_000])
async def test_a_disk_that_takes_no_more_is_an_error_and_nothing_is_left(source, bucket, tmp_path, size):
    body = os.urandom(size)
    bucket.put({"x": body})
    (entry,) = listed(source, f"s3://{bucket.name}/x")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limit[1]))
    try:
        with pytest.raises(ContentError, match=r"File too large"):
            await fetched(source, [entry])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert nothing_half_made(tmp_path)
    await fetched(source, [entry])
    assert read(source, entry, tmp_path) == body


async def test_the_jobs_of_others_are_never_served_by_this_machines_credentials(source, bucket):
    bucket.put({"x": b"1"})
    entries = listed(source, f"s3://{bucket.name}")
    with pytest.raises(ContentError, match="this node's credentials for buckets are its owner's"):
        await fetched(source, entries, own=False)


async def test_a_fetch_that_is_cancelled_leaves_nothing(source, bucket, tmp_path):
    bucket.put({"x": os.urandom(20_000_000)})
    (entry,) = listed(source, f"s3://{bucket.name}")
    begun = asyncio.Event()
    task = asyncio.create_task(fetched(source, [entry], lambda *_: begun.set()))
    first = asyncio.create_task(begun.wait())
    await asyncio.wait((task, first), return_when=asyncio.FIRST_COMPLETED)
    task.cancel()
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert nothing_half_made(tmp_path)
    with pytest.raises(ContentError):
        source.open(entry.reference, scratch=tmp_path)


async def test_what_two_shards_want_at_once_is_brought_once(source, bucket):
    bucket.put({f"{number:02}": bytes(number) for number in range(70)} | {"large": bytes(100_000)})
    entries = listed(source, f"s3://{bucket.name}")
    told = []
    wanted = (entries, entries[::-1], entries[20:], entries[:50] * 2, entries)
    await asyncio.gather(*(fetched(source, some, lambda *what: told.append(what)) for some in wanted))
    assert sorted(name for name, *_ in told) == [entry.path for entry in entries]


async def test_many_sources_share_what_was_fetched(source, bucket, tmp_path):
    bucket.put({"x": b"1"})
    entries = listed(source, f"s3://{bucket.name}")
    await fetched(source, entries)
    with contextlib.closing(Fetched(tmp_path / "store")) as table:
        assert table.recall(entries[0].reference.url, entries[0].reference.version)


def test_what_another_source_listed_is_a_bug_to_open_and_ignored_by_the_check(source, tmp_path):
    for reference in (LocalStamp("/nowhere", 1, 1, 1, 1), ContentRef("Qm"), UrlRef("https://example.org/x")):
        source.check(reference)
    with pytest.raises(BugError):
        source.open(ContentRef("Qm"), scratch=tmp_path)


# --- for other nodes ---


async def test_a_signed_url_reads_the_object_and_only_in_its_planned_state(source, bucket):
    bucket.put({"data/é 日.csv": b"one"})
    (entry,) = listed(source, f"s3://{bucket.name}")
    signed = await source.presign(entry.reference, seconds=60)
    assert signed.url.startswith(os.environ["AWS_ENDPOINT_URL"])
    assert os.environ["AWS_SECRET_ACCESS_KEY"] not in signed.url
    async with aiohttp.ClientSession() as session:

        async def get(url: str) -> tuple[int, bytes]:
            async with session.get(url, headers={"If-Match": signed.version}) as answer:
                return answer.status, await answer.read()

        assert await get(signed.url) == (200, b"one")
        assert (await get(signed.url.partition("?")[0]))[0] == 403
        bucket.put({"data/é 日.csv": b"two"})
        assert (await get(signed.url))[0] == 412


async def test_another_node_reads_a_signed_url_in_its_planned_state_only(source, bucket, tmp_path):
    bucket.put({"data/x.csv": b"one"})
    (entry,) = listed(source, f"s3://{bucket.name}")
    offered = structs.replace(entry, reference=await source.presign(entry.reference, seconds=60))

    def another(name: str) -> UrlSource:
        return UrlSource(store, fetched=table)

    root = tmp_path / "other"
    with contextlib.closing(BlockStore(root)) as store, contextlib.closing(Fetched(root)) as table:
        await fetched(another("first"), [offered])
        assert read(another("first"), offered, tmp_path) == b"one"
    bucket.put({"data/x.csv": b"two"})
    root = tmp_path / "third"
    with (
        contextlib.closing(BlockStore(root)) as store,
        contextlib.closing(Fetched(root)) as table,
        pytest.raises(ContentError, match="changed since the job was planned"),
    ):
        await fetched(another("second"), [offered])


async def test_a_signed_url_names_the_planned_version_where_the_bucket_keeps_versions(source, bucket, tmp_path):
    bucket.keep_versions()
    key = "data/é 日+%~'(1)'.csv"
    bucket.put({key: b"one"})
    (entry,) = listed(source, f"s3://{bucket.name}")
    bucket.put({key: b"two"})
    offered = structs.replace(entry, reference=await source.presign(entry.reference, seconds=60))
    assert f"versionId={entry.reference.version.partition(' ')[0]}" in offered.reference.url
    root = tmp_path / "other"
    with contextlib.closing(BlockStore(root)) as store, contextlib.closing(Fetched(root)) as table:
        another = UrlSource(store, fetched=table)
        await fetched(another, [offered])
        assert read(another, offered, tmp_path) == b"one"
    forged = structs.replace(offered.reference, url=offered.reference.url.replace("versionId=", "versionId=0"))
    async with aiohttp.ClientSession() as session, session.get(forged.url) as answer:
        assert answer.status == 403


@pytest.fixture
def public(bucket) -> Bucket:
    """A bucket that anybody may read."""
    with contextlib.suppress(bucket.s3.exceptions.BucketAlreadyOwnedByYou, bucket.s3.exceptions.BucketAlreadyExists):
        bucket.s3.create_bucket(Bucket=PUBLIC)
    return Bucket(PUBLIC, bucket.s3)


async def test_a_public_bucket_is_read_without_credentials(source, public, monkeypatch, tmp_path):
    public.put({"s3/a b": b"1"})
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
    (entry,) = listed(source, f"s3://{PUBLIC}/s3")
    await fetched(source, [entry])
    assert read(source, entry, tmp_path) == b"1"
    plain = await source.presign(entry.reference, seconds=60)
    assert plain == UrlRef(f"{os.environ['AWS_ENDPOINT_URL']}/{PUBLIC}/s3/a%20b", entry.reference.version)
    async with aiohttp.ClientSession() as session, session.get(plain.url) as answer:
        assert await answer.read() == b"1"


def google(monkeypatch: pytest.MonkeyPatch, server: str) -> None:
    """What speaks like Google's storage is at `server`, and asks nobody who they are."""
    account = {
        "gcs_base_url": server,
        "disable_oauth": True,
        "client_email": "",
        "private_key": "",
        "private_key_id": "",
    }
    monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT_KEY", json.dumps(account))


async def test_a_bucket_of_google_is_read_over_its_own_protocol(source, bucket, public, monkeypatch, tmp_path):
    """Its XML API is close enough to S3's that the same server answers; only signatures differ, so without them."""
    public.put({"gs/a b": b"1", "gs/large": bytes(5_000_000)})
    google(monkeypatch, os.environ["AWS_ENDPOINT_URL"])
    entries = listed(source, f"gs://{PUBLIC}/gs")
    await fetched(source, entries)
    assert [read(source, entry, tmp_path) for entry in entries] == [b"1", bytes(5_000_000)]
    with pytest.raises(SpecError, match=r"at Google Cloud Storage refuses .*set GOOGLE_SERVICE_ACCOUNT"):
        listed(source, f"gs://{bucket.name}")


# --- what can be wrong ---


def test_a_bucket_that_is_not_there_is_told(source, bucket):
    with pytest.raises(SpecError, match=r"there is no bucket 'nowhere' at http://127.0.0.1:\d+ \(NoSuchBucket"):
        listed(source, "s3://nowhere/data")
    with pytest.raises(SpecError, match="there is no bucket 'nowhere'"):
        listed(source, "s3://nowhere")


@pytest.mark.parametrize("key", ["", "/data", "/data/x"])
def test_wrong_credentials_are_told_with_what_to_set_and_never_shown(source, bucket, monkeypatch, key):
    bucket.put({"data/x": b"1"})
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "some-other-secret")
    with pytest.raises(SpecError, match=r"refuses this machine's credentials .*set AWS_ACCESS_KEY_ID") as caught:
        listed(source, f"s3://{bucket.name}{key}")
    assert "s3://" + bucket.name in str(caught.value)
    assert os.environ["AWS_ENDPOINT_URL"] in str(caught.value)
    assert "some-other-secret" not in str(caught.value)
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
    assert listed(source, f"s3://{bucket.name}/data")


def test_a_private_bucket_is_not_read_without_a_signature(source, bucket, monkeypatch):
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
    with pytest.raises(SpecError, match=r"refuses this machine's credentials \(AccessDenied"):
        listed(source, f"s3://{bucket.name}")


async def test_a_server_that_went_away_is_told(source, bucket, monkeypatch):
    bucket.put({"x": b"1"})
    (entry,) = listed(source, f"s3://{bucket.name}")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setattr("bacalhau_node.buckets._RETRIES", 0)
    with pytest.raises(ContentError, match=r"/x at http://127.0.0.1:1 does not answer .*check the network"):
        await fetched(source, [entry])


@pytest.mark.parametrize("endpoint", ["nonsense", "http://", "http://key:secret@host/", "ftp://host", "http://h:x"])
def test_an_endpoint_that_is_no_address_is_told(source, monkeypatch, endpoint):
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    with pytest.raises(SpecError, match="AWS_ENDPOINT_URL is not an address") as caught:
        listed(source, "s3://bucket")
    assert "key:secret" not in str(caught.value)


def test_an_azure_container_without_an_account_is_told(source, monkeypatch):
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)
    with pytest.raises(SpecError, match=r"az://container/x can't be opened .*set AZURE_STORAGE_ACCOUNT_NAME"):
        listed(source, "az://container/x")


def test_the_keys_of_a_profile_serve_where_the_environment_has_none(source, bucket, monkeypatch, tmp_path):
    bucket.put({"x": b"1"})
    keys = f"aws_access_key_id = {os.environ['AWS_ACCESS_KEY_ID']}\naws_secret_access_key = {SECRET_KEY}"
    (tmp_path / "credentials").write_text(f"[default]\naws_access_key_id = no\n[work]\n{keys}\n")
    (tmp_path / "config").write_text(f"[profile work]\nendpoint_url = {os.environ['AWS_ENDPOINT_URL']}\n")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_PROFILE", "work")
    assert [entry.path for entry in listed(source, f"s3://{bucket.name}")] == ["x"]
    (tmp_path / "credentials").write_text("secret-without-a-section\n")
    with pytest.raises(SpecError, match="credentials can't be read") as caught:
        listed(source, f"s3://{bucket.name}")
    assert "secret-without" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "kind", "told"),
    [
        (
            "Error performing PUT http://169.254.169.254/latest/api/token in 6ms - HTTP error: error sending request",
            SpecError,
            "s3://bucket at Amazon S3, eu-west-1: this machine has no credentials for it: set AWS_ACCESS_KEY_ID",
        ),
        (
            "status code: 301 Moved Permanently: <Code>PermanentRedirect</Code><Message>Elsewhere.</Message></Error>",
            SpecError,
            "is in another region (PermanentRedirect: Elsewhere.): set AWS_REGION",
        ),
        (
            "Generic S3 error: Error performing GET https://h/b in 5s - status code: 503 Service Unavailable: ",
            ContentError,
            "s3://bucket at Amazon S3, eu-west-1: 503 Service Unavailable",
        ),
        (
            "<Code>SignatureDoesNotMatch</Code><Message>No.</Message><StringToSign>KEY</StringToSign> 403 Forbidden",
            SpecError,
            "refuses this machine's credentials (SignatureDoesNotMatch: No.): set",
        ),
        (
            "<Code>AuthorizationFailure</Code><Message>Failed.\nRequestId:KEY</Message> 403 Forbidden",
            SpecError,
            "refuses this machine's credentials (AuthorizationFailure: Failed.): set",
        ),
        ("Generic S3 error: odd https://h/x?X-Amz-Signature=KEY\nDebug source: KEY", ContentError, "odd https://h/x"),
    ],
)
def test_what_the_library_says_is_told_in_words_and_without_secrets(bucket, monkeypatch, text, kind, told):
    for name in ("AWS_ENDPOINT_URL", "AWS_REGION"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_REGION", "eu-west-1")
    error = explained(OSError(text), parse("s3://bucket"))
    assert type(error) is kind
    assert told in str(error)
    assert "KEY" not in str(error).replace("ACCESS_KEY", "")


async def test_without_the_library_the_error_says_what_to_install(source, result, monkeypatch):
    monkeypatch.setitem(sys.modules, "obstore", None)
    install = r"needs obstore: pip install 'bacalhau-jupyter\[buckets\]'"
    with pytest.raises(SpecError, match=install):
        listed(source, "s3://bucket/x")
    with pytest.raises(SpecError, match=install):
        await source.presign(UrlRef("s3://bucket/x", '"1"'), seconds=60)
    with pytest.raises(SpecError, match=install):
        await result.publisher.check("s3://bucket/x")


def test_a_node_does_not_load_the_library_before_it_is_needed():
    code = "import sys, bacalhau_node.node; sys.exit('obstore' in sys.modules)"
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )


def test_two_buckets_are_two_stores(source, bucket, s3_server):
    bucket.put({"x": b"1"})
    other = new_bucket(s3_server)
    other.put({"y": b"2"})
    assert [entry.path for entry in listed(source, f"s3://{other.name}")] == ["y"]
    assert [entry.path for entry in listed(source, f"s3://{bucket.name}")] == ["x"]


# --- publishing ---

ROOT = "bafyreib2rxk3rw6putwp3cqv4ngqygb2u7k3hzhwkuqxvdxn5rmr4inmea"


@dataclass
class Published:
    """A publisher over a store, and the result that it is given whatever root it is asked for."""

    publisher: BucketPublisher
    store: BlockStore
    files: list[tuple[str, str, int]]

    def holds(self, files: dict[str, bytes]) -> None:
        self.files[:] = [(path, self.store.add_bytes(data), len(data)) for path, data in files.items()]

    async def to(self, target: str) -> tuple[str, ...]:
        async with asyncio.timeout(60):
            return await self.publisher.publish(JOB, ROOT, target)


JOB = a_job_id()
RESULT = {"shards/0/stdout": b"hello\n", "shards/0/exit_code": b"0\n", "shards/0/outputs/é 日+%?#.csv": b"1"}


@pytest.fixture
def result(tmp_path) -> Iterator[Published]:
    with contextlib.closing(BlockStore(tmp_path / "store")) as store:
        files = []
        made = BucketPublisher(store, files=lambda root: files, folder=tmp_path / "work", profile="unixfs-v0-2015")
        yield Published(made, store, files)


def test_it_claims_buckets_only(result):
    assert all(map(result.publisher.claims, ("s3://b/p", "gs://b", "az://b/p")))
    assert not any(map(result.publisher.claims, ("store", "ipfs", "local:/x", "s3", "https://b")))


@pytest.mark.parametrize("prefix", ["", "/", "/p/q", "/p/q/"])
async def test_a_result_is_published_as_files_and_a_manifest(result, bucket, prefix):
    result.holds(RESULT | {"shards/1/outputs/large": os.urandom(10_000_000)})
    result.files.append(("shards/1/outputs/empty/", "cid", 0))
    urls = await result.to(f"s3://{bucket.name}{prefix}")
    base = f"{prefix.strip('/')}/{JOB}".lstrip("/")
    assert urls == (f"s3://{bucket.name}/{base}/", f"s3://{bucket.name}/{base}/manifest.json")
    there = bucket.read()
    manifest = json.loads(there.pop(f"{base}/manifest.json"))
    assert (manifest["job"], manifest["root"], manifest["profile"]) == (JOB, ROOT, "unixfs-v0-2015")
    assert there == {f"{base}/{path}": result.store.read(cid) for path, cid, _ in result.files[:-1]}
    assert [tuple(one.values()) for one in manifest["files"]] == result.files[:-1]


async def test_what_is_large_goes_up_in_parts(result, bucket):
    result.holds({"large": bytes(20_000_000)})
    await result.to(f"s3://{bucket.name}/p")
    etag = bucket.s3.head_object(Bucket=bucket.name, Key=f"p/{JOB}/large")["ETag"]
    assert etag.endswith('-3"')


async def test_publishing_again_changes_nothing(result, bucket):
    bucket.keep_versions()
    result.holds(RESULT | {"large": os.urandom(10_000_000)})
    first = await result.to(f"s3://{bucket.name}")
    assert await result.to(f"s3://{bucket.name}") == first
    versions = bucket.s3.list_object_versions(Bucket=bucket.name)["Versions"]
    assert sorted(one["Key"] for one in versions) == sorted(bucket.read())


async def test_publishing_goes_on_where_it_broke_off(result, bucket):
    result.holds(RESULT | {"large": os.urandom(10_000_000)})
    await result.to(f"s3://{bucket.name}")
    whole = bucket.read()
    bucket.delete(f"{JOB}/manifest.json", f"{JOB}/large", f"{JOB}/shards/0/stdout")
    await result.to(f"s3://{bucket.name}")
    assert bucket.read() == whole


async def test_publishing_that_is_cancelled_leaves_no_part_of_an_object(result, bucket):
    result.holds({"large": os.urandom(100_000_000)})
    task = asyncio.create_task(result.to(f"s3://{bucket.name}"))

    def parts() -> list[str]:
        return [one["Key"] for one in bucket.s3.list_multipart_uploads(Bucket=bucket.name).get("Uploads", ())]

    async with asyncio.timeout(60):
        while not await asyncio.to_thread(parts):
            assert not task.done()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.to_thread(result.publisher._pool.shutdown)
    assert bucket.read() == {}
    assert parts() == []


@pytest.mark.parametrize("size", [4, 10_000_000])
@pytest.mark.parametrize("other", ["same size", "shorter", "longer"])
async def test_a_foreign_object_in_the_way_is_never_overwritten_and_told(result, bucket, size, other):
    ours = bytes(size)
    theirs = {"same size": ours[:-1] + b"\1", "shorter": ours[:-1], "longer": ours + b"\0"}[other]
    result.holds({"x": ours})
    bucket.put({f"p/{JOB}/x": theirs})
    with pytest.raises(SpecError, match=f"s3://{bucket.name}/p/{JOB}/x is there already, with other bytes"):
        await result.to(f"s3://{bucket.name}/p")
    assert bucket.read() == {f"p/{JOB}/x": theirs}


async def test_another_result_of_the_same_job_is_told_by_its_manifest(result, bucket):
    result.holds(RESULT)
    await result.to(f"s3://{bucket.name}")
    result.files.pop()
    with pytest.raises(SpecError, match=r"manifest\.json is there already"):
        await result.to(f"s3://{bucket.name}")


async def test_a_name_that_can_not_be_a_key_is_told_before_anything_is_written(result, bucket):
    result.holds(RESULT | {"shards/0/outputs/a\nb": b"1"})
    with pytest.raises(SpecError, match=r"outputs/a\\nb' of the result can't be a key"):
        await result.to(f"s3://{bucket.name}")
    assert bucket.read() == {}


async def test_a_check_leaves_nothing_behind(result, bucket):
    await result.publisher.check(f"s3://{bucket.name}/some/prefix")
    assert bucket.read() == {}


async def test_a_result_is_created_in_a_bucket_of_google_and_never_overwrites(result, monkeypatch):
    """Its condition is another one than S3's, and the S3 server of these tests does not know it."""
    there: dict[str, bytes] = {}

    async def answer(request: web.Request) -> web.Response:
        if request.method == "PUT":
            assert request.headers["x-goog-if-generation-match"] == "0"
            if request.path in there:
                return web.Response(status=412)
            there[request.path] = await request.read()
        if request.method == "DELETE":
            del there[request.path]
        headers = {"ETag": '"1"', "Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT"}
        return web.Response(body=there.get(request.path, b""), headers=headers)

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answer)
    async with TestServer(app) as server:
        google(monkeypatch, str(server.make_url("")).rstrip("/"))
        result.holds(RESULT)
        await result.publisher.check("gs://bucket/p")
        for _ in range(2):
            assert await result.to("gs://bucket/p") == (f"gs://bucket/p/{JOB}/", f"gs://bucket/p/{JOB}/manifest.json")
        assert json.loads(there.pop(f"/bucket/p/{JOB}/manifest.json"))["root"] == ROOT
        assert there == {f"/bucket/p/{JOB}/{path}": result.store.read(cid) for path, cid, _ in result.files}
        there[f"/bucket/p/{JOB}/shards/0/stdout"] = b"theirs"
        with pytest.raises(SpecError, match=rf"gs://bucket/p/{JOB}/shards/0/stdout is there already, with other bytes"):
            await result.to("gs://bucket/p")
    assert there[f"/bucket/p/{JOB}/shards/0/stdout"] == b"theirs"


async def test_an_azure_container_without_an_account_is_no_place_for_results(result, monkeypatch):
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)
    with pytest.raises(SpecError, match=r"az://container/x can't be opened .*set AZURE_STORAGE_ACCOUNT_NAME"):
        await result.publisher.check("az://container/x")


@pytest.mark.parametrize(
    ("target", "variable", "match"),
    [
        ("s3://nowhere-to-be-found/p", "", "there is no bucket 'nowhere-to-be-found'"),
        ("s3://{}/p", "AWS_SECRET_ACCESS_KEY", "refuses this machine's credentials .*AWS_ACCESS_KEY_ID"),
        ("s3://{}/p", "AWS_ACCESS_KEY_ID", "refuses this machine's credentials .*AWS_ACCESS_KEY_ID"),
        ("s3://{}//p", "", "can't be a path"),
        ("s3:///p", "", "does not name a bucket"),
    ],
)
async def test_what_could_not_be_published_is_told_before_the_job(result, bucket, monkeypatch, target, variable, match):
    if variable:
        monkeypatch.setenv(variable, "wrong")
    result.holds(RESULT)
    with pytest.raises(SpecError, match=match):
        await result.publisher.check(target.format(bucket.name))
    with pytest.raises(SpecError, match=match):
        await result.to(target.format(bucket.name))
