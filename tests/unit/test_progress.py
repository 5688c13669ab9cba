"""The live model of a job: fed from one thread, read by another."""

from __future__ import annotations

import threading
import time

import pytest

from bacalhau_jupyter.progress import DONE, FAILED, RETRYING, RUNNING, STOPPED, WAITING, JobMonitor
from bacalhau_node.client import Submission
from bacalhau_node.feed import ShardBytes, ShardText
from bacalhau_node.messages import Frame, ShardError
from bacalhau_node.protocol.events import JobChanged, ShardChanged

JOB = "j-3f2a91bc-1111-4222-8333-444444444444"
ERROR = ShardError("exception", "KeyError", "'x'", (Frame("cell", 3, "f", in_cell=True),))


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def monitor(count=4, **options):
    return JobMonitor(Submission(JOB, count, "n-1", "docker"), hint="job.logs({shard})", **options)


def shard(index, state, attempt=1, error=None):
    return ShardChanged(JOB, index, state, "n-1", attempt, error)


def text(index, words, *, attempt=1, stream="stdout"):
    return ShardText(JOB, index, attempt, stream, words)


# --- states ---


def test_each_shard_is_one_byte():
    one = monitor(6)
    for index, state in enumerate(("taken", "running", "kept", "failed", "stopped")):
        one.feed(shard(index, state, error=ERROR if state == "failed" else None))
    one.feed(shard(5, "running", attempt=2))
    assert one.snapshot().states == bytes((WAITING, RUNNING, DONE, FAILED, STOPPED, RETRYING))


def test_a_late_word_about_an_older_attempt_changes_nothing():
    one = monitor()
    one.feed(shard(0, "running", attempt=2))
    one.feed(shard(0, "waiting", attempt=1))
    one.feed(text(0, "of the first attempt\n", attempt=1))
    assert one.snapshot().states[0] == RETRYING
    assert one.tail(0) == ()


def test_the_end_of_an_older_attempt_counts():
    one = monitor()
    one.feed(shard(0, "running", attempt=2))
    one.feed(shard(0, "accepted", attempt=1))
    one.feed(shard(0, "kept", attempt=1))
    assert one.snapshot().states[0] == DONE


def test_a_final_state_stays():
    one = monitor()
    one.feed(shard(0, "kept"))
    one.feed(shard(0, "running"))
    assert one.snapshot().states[0] == DONE


def test_equal_failures_are_one_group_in_the_order_of_their_shards():
    one = monitor(10)
    other = ShardError("memory", message="over its limit of 512 MB", notes=("a",))
    for index in (7, 3):
        one.feed(shard(index, "failed", error=ERROR))
    one.feed(shard(5, "failed", error=other))
    groups = one.snapshot().failures
    assert [group.shards for group in groups] == [(3, 7), (5,)]
    assert str(groups[0]) == "KeyError: 'x' in 2 shards (3, 7)"


def test_a_snapshot_has_a_new_version_only_after_a_change():
    one = monitor()
    first = one.snapshot()
    assert one.snapshot().version == first.version
    one.feed(shard(0, "running"))
    assert one.snapshot().version > first.version


# --- time ---


def test_the_rest_is_expected_to_take_as_long_as_what_is_done():
    clock = Clock()
    one = monitor(10, clock=clock)
    one.feed(shard(0, "running"))
    clock.now += 4
    assert one.snapshot().eta is None
    one.feed(shard(0, "kept"))
    one.feed(shard(1, "kept"))
    assert one.snapshot().eta == pytest.approx(16)


def test_the_clock_stands_still_after_the_end():
    clock = Clock()
    one = monitor(clock=clock)
    clock.now += 3
    one.end()
    clock.now += 3
    assert one.snapshot().elapsed == 3


def test_nobody_knows_how_long_a_job_took_that_was_over_before():
    one = monitor(age=None)
    one.end()
    assert one.snapshot().elapsed is None


# --- text ---


def test_the_unfinished_line_of_a_shard_comes_when_it_ends():
    one = monitor()
    one.feed(text(2, "no newline"))
    assert one.take() == []
    assert one.tail(2) == ("no newline",)
    one.feed(shard(2, "kept"))
    assert one.take() == [("stdout", "[shard 2] no newline\n")]


def test_lines_of_two_attempts_are_not_mixed():
    one = monitor()
    one.feed(text(2, "half", attempt=1))
    one.feed(text(2, "whole\n", attempt=2))
    assert one.take() == [("stdout", "[shard 2] half\n[shard 2] whole\n")]


def test_the_last_lines_of_the_job_name_their_shards():
    one = monitor(streams=frozenset())
    one.feed(text(2, "a\n"))
    one.feed(text(3, "b\n", stream="stderr"))
    assert one.recent() == ("[shard 2] a", "[shard 3] b")
    assert one.take() == []


def test_those_that_printed_latest_come_first():
    one = monitor()
    for index in (0, 1, 2, 0):
        one.feed(text(index, f"{index}\n"))
    assert list(one.talking(2)) == [0, 2]


# --- threads ---


def waiting(one):
    """A thread that waits for the monitor; returns it and a list that gets the time when it woke."""
    woke = []
    ready = threading.Event()

    def wait():
        ready.set()
        one.wait(30)
        woke.append(time.monotonic())

    thread = threading.Thread(target=wait)
    thread.start()
    ready.wait(5)
    return thread, woke


@pytest.mark.parametrize("wake", [lambda one: one.feed(text(0, "line\n")), lambda one: one.end()])
def test_text_and_the_end_wake_the_reader_at_once(wake):
    one = monitor()
    thread, woke = waiting(one)
    began = time.monotonic()
    wake(one)
    thread.join(5)
    assert woke
    assert woke[0] - began < 1


def test_a_change_of_state_alone_wakes_nobody():
    one = monitor()
    one.feed(JobChanged(JOB, "Running"))
    one.feed(shard(0, "running"))
    assert not one.wait(0.01)
    assert one.take() == []


def test_whoever_asks_after_the_end_is_called_at_once_and_the_others_once():
    one, calls = monitor(), []
    one.when_ended(lambda: calls.append("before"))
    one.end()
    one.end()
    one.when_ended(lambda: calls.append("after"))
    assert calls == ["before", "after"]


def test_a_feed_that_broke_says_why():
    one = monitor()
    one.end(ValueError("gone"))
    assert one.wait_end(0)
    assert str(one.broken) == "gone"


def test_feeding_and_reading_at_once_lose_no_line():
    one, total = monitor(2), 400
    feeders = [
        threading.Thread(target=lambda index=index: [one.feed(text(index, f"{n}\n")) for n in range(total)])
        for index in range(2)
    ]
    for feeder in feeders:
        feeder.start()
    seen = []
    while any(feeder.is_alive() for feeder in feeders):
        one.wait(0.01)
        seen += [piece.text for piece in one.take()]
    one.end()
    seen += [piece.text for piece in one.take()]
    lines = "".join(seen).splitlines()
    for index in range(2):
        assert [line for line in lines if line.startswith(f"[shard {index}]")] == [
            f"[shard {index}] {n}" for n in range(total)
        ]


# --- bytes ---


def test_what_is_fetched_is_in_the_picture_until_its_shard_starts():
    clock = Clock()
    one = monitor(2, clock=clock)
    one.feed(shard(1, "taken"))
    one.feed(ShardBytes(JOB, 1, 1, "x.csv", 0, 2_000_000, ""))
    clock.now += 1
    one.feed(ShardBytes(JOB, 1, 1, "x.csv", 500_000, 2_000_000, ""))
    assert one.snapshot().fetching == "fetching x.csv 500 kB of 2 MB"
    one.feed(shard(1, "running"))
    assert one.snapshot().fetching == ""
    assert one.fetched() == ""


def test_what_was_fetched_is_known_by_its_cid():
    one = monitor(2)
    one.feed(ShardBytes(JOB, 1, 1, "x.csv", 2_000_000, 2_000_000, "bafy1"))
    assert one.fetched() == "fetched 1 file, 2 MB: bafy1"
