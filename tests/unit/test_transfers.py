"""What is said of bytes on their way."""

from __future__ import annotations

import pytest

from bacalhau_node import transfers
from bacalhau_node.feed import ShardBytes
from bacalhau_node.testing.builders import a_job_id
from bacalhau_node.transfers import Transfers


def at(
    name: str, done: int, total: int | None = None, *, shard: int = 0, attempt: int = 1, cid: str = ""
) -> ShardBytes:
    return ShardBytes(a_job_id(), shard, attempt, name, done, total, cid)


def test_a_transfer_is_shown_once_it_has_lasted_half_a_second() -> None:
    one = Transfers()
    one.take(at("x.csv", 0, 1_200_000_000), 10.0)
    assert one.now(10.4) == ""
    one.take(at("x.csv", 120_000_000, 1_200_000_000), 10.4)
    assert one.now(10.5) == "fetching x.csv 120 MB of 1.2 GB"


@pytest.mark.parametrize(
    ("total", "of"), [(2000, "fetching 2 files, 1.5 kB of 4 kB"), (None, "fetching 2 files, 1.5 kB")]
)
def test_several_are_one_line(total: int | None, of: str) -> None:
    one = Transfers()
    one.take(at("a", 500, 2000), 0.0)
    one.take(at("b", 1000, total, shard=1), 0.0)
    assert one.now(1.0) == of


def test_a_name_that_no_terminal_can_show_is_escaped() -> None:
    one = Transfers()
    one.take(at("a\n\udcff.csv", 5, 10), 0.0)
    assert one.now(1.0) == r"fetching 'a\n\udcff.csv' 5 bytes of 10 bytes"


def test_a_node_that_names_files_without_end_fills_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfers, "MOST", 10)
    one = Transfers()
    for number in range(1_000):
        one.take(at(f"{number}", 5, 10), 0.0)
    assert one.now(1.0) == "fetching 10 files, 50 bytes of 100 bytes"


def test_what_has_come_is_counted_with_its_cids() -> None:
    one = Transfers()
    assert one.fetched() == ""
    one.take(at("a", 5, 10), 0.0)
    one.take(at("a", 10, 10, cid="cid-a"), 9.0)
    assert (one.now(9.0), one.fetched()) == ("", "fetched 1 file, 10 bytes: cid-a")
    for name in "bcde":
        one.take(at(name, 10, cid=f"cid-{name}"), 9.0)
    assert one.fetched() == "fetched 5 files, 50 bytes: cid-a, cid-b, cid-c and 2 more"


def test_another_attempt_begins_anew_and_a_shard_that_starts_needs_nothing_more() -> None:
    one = Transfers()
    one.take(at("a", 900, 1000), 0.0)
    one.take(at("a", 0, 1000, attempt=2), 5.0)
    assert one.now(5.1) == ""
    assert one.now(5.6) == "fetching a 0 bytes of 1 kB"
    one.over(1)
    assert one.now(5.6)
    one.over(0)
    assert one.now(5.6) == ""
