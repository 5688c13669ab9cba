"""The table of what was fetched already."""

import sqlite3
from concurrent.futures import ThreadPoolExecutor

import pytest

from bacalhau_node.errors import ContentError
from bacalhau_node.fetched import Fetched, unsigned


def test_what_is_remembered_is_recalled_by_every_process_and_by_the_next(tmp_path):
    ours, theirs = Fetched(tmp_path), Fetched(tmp_path)
    ours.remember("s3://b/x", '"1"', "Qm1")
    ours.remember("s3://b/x", '"2"', "Qm2")
    ours.remember("s3://b/x", '"2"', "Qm3")
    assert theirs.recall("s3://b/x", '"1"') == "Qm1"
    assert theirs.recall("s3://b/x", '"2"') == "Qm3"
    assert theirs.recall("s3://b/x", "") is None
    ours.close()
    theirs.close()
    again = Fetched(tmp_path)
    assert again.recall("s3://b/x", '"1"') == "Qm1"
    again.close()


def test_threads_may_use_it_at_once(tmp_path):
    table = Fetched(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: table.remember(f"u{number}", "", str(number)), range(200)))
        assert list(pool.map(lambda number: table.recall(f"u{number}", ""), range(200))) == list(map(str, range(200)))
    table.close()


def test_only_the_newest_rows_are_kept(tmp_path):
    table = Fetched(tmp_path)
    for number in range(10):
        table.remember(f"u{number}", "", "cid")
    table.close()
    table = Fetched(tmp_path, most=3)
    assert [number for number in range(10) if table.recall(f"u{number}", "")] == [7, 8, 9]
    table.close()


def test_a_damaged_table_is_an_error_that_says_what_to_remove(tmp_path):
    (tmp_path / "fetched.sqlite").write_bytes(b"not a database, but long enough to look at" * 100)
    with pytest.raises(ContentError, match=r"fetched\.sqlite.*remove the file") as caught:
        Fetched(tmp_path).recall("u", "")
    assert isinstance(caught.value.__cause__, sqlite3.Error)


AMAZON = "X-Amz-Algorithm=A&X-Amz-Credential=K%2F20260101&X-Amz-Date=D&X-Amz-Expires=60&X-Amz-SignedHeaders=host"
AZURE = "sv=2021-08-06&st=2026&se=2027&sr=b&sp=r&sig=x%3D"


@pytest.mark.parametrize(
    ("query", "left"),
    [
        (f"?{AMAZON}&X-Amz-Security-Token=T&X-Amz-Signature=S", ""),
        (f"?{AMAZON}&versionId=v%2F1&X-Amz-Signature=S", "?versionId=v%2F1"),
        ("?generation=7&X-Goog-Algorithm=A&X-Goog-Signature=S", "?generation=7"),
        (f"?{AZURE}", ""),
        (f"?versionid=1&{AZURE}&skoid=1&ske=2", "?versionid=1"),
        ("?st=1&sp=2&sr=3", "?st=1&sp=2&sr=3"),
        ("?signature=mine&b=?&a", "?signature=mine&b=?&a"),
        ("?", "?"),
        ("", ""),
    ],
)
def test_a_url_is_told_by_what_it_names_and_not_by_how_it_is_signed(query, left):
    assert unsigned(f"https://b.example.org/a%20b.csv{query}") == f"https://b.example.org/a%20b.csv{left}"
