"""Feeds: whoever reads from a number on gets what came after it, in order, and nobody's slowness costs memory."""

from __future__ import annotations

import asyncio

from hypothesis import given
from hypothesis import strategies as st

from bacalhau_node import feed as feed_module
from bacalhau_node.feed import FETCHED_LIMIT, NAME_LIMIT, TEXT_LIMIT, Feed, ShardBytes, ShardText, Update
from bacalhau_node.protocol.events import JobChanged, ShardChanged
from bacalhau_node.testing.builders import a_job_id

JOB = a_job_id()


def _shard(shard: int, state: str = "running", attempt: int = 1) -> ShardChanged:
    return ShardChanged(JOB, shard, state, "node", attempt)


def _text(text: str, shard: int = 0) -> ShardText:
    return ShardText(JOB, shard, 1, "stdout", text)


async def _all(feed: Feed) -> list[Update]:
    async with asyncio.timeout(10):
        return [update async for update in feed.follow()]


async def test_a_watcher_of_an_ended_job_gets_its_last_state_and_its_text():
    feed = Feed(JOB)
    for update in (_shard(0), _shard(1), _shard(0, "kept")):
        feed.publish(update)
    feed.text(_text("late\n"))
    end = JobChanged(JOB, "Completed", cid="cid")
    feed.publish(end)
    assert await _all(feed) == [_shard(1), _shard(0, "kept"), _text("late\n"), end]
    assert await feed.wait(0)
    assert not await feed.wait(feed.after(0)[-1][0])


async def test_a_waiting_watcher_is_woken_by_what_comes_and_by_the_end():
    feed = Feed(JOB)
    watching = asyncio.create_task(_all(feed))
    await asyncio.sleep(0)
    feed.text(_text("a"))
    await asyncio.sleep(0)
    feed.text(_text("b"))
    feed.end()
    assert await watching == [JobChanged(JOB, "Pending"), _text("a"), _text("b")]


@given(st.lists(st.one_of(st.integers(0, 5), st.text("ab", min_size=1, max_size=3)), max_size=40), st.data())
def test_reading_in_steps_loses_no_text_and_ends_in_the_same_state(steps, data):
    feed, number = Feed(JOB), 0
    seen: list[Update] = []
    for attempt, step in enumerate(steps, 1):
        if isinstance(step, str):
            feed.text(_text(step))
        else:
            feed.publish(_shard(step, attempt=attempt))
        if data.draw(st.booleans()):
            news = feed.after(number)
            assert [at for at, _ in news] == sorted(at for at, _ in news)
            seen += [update for _, update in news]
            number = news[-1][0]
    seen += [update for _, update in feed.after(number)]
    assert "".join(one.text for one in seen if isinstance(one, ShardText)) == "".join(
        s for s in steps if isinstance(s, str)
    )
    latest = {one.shard: one for one in seen if isinstance(one, ShardChanged)}
    assert latest == feed.shards


def test_text_over_the_limit_goes_first_and_states_stay():
    feed = Feed(JOB)
    feed.publish(_shard(0))
    part = "x" * (TEXT_LIMIT // 4)
    for number in range(10):
        feed.text(_text(f"{number}{part[1:]}"))
    found = [update for _, update in feed.after(0)]
    assert _shard(0) in found
    assert [one.text[0] for one in found if isinstance(one, ShardText)] == list("6789")


def test_states_are_counted():
    feed = Feed(JOB)
    for update in (_shard(0), _shard(1), _shard(0, "kept"), _shard(1, "waiting"), _shard(1, "running")):
        feed.publish(update)
    assert +feed.counts == {"kept": 1, "running": 1}


def _bytes(done: int, shard: int = 0, *, name: str = "a", cid: str = "") -> ShardBytes:
    return ShardBytes(JOB, shard, 1, name, done, 9, cid)


async def test_of_a_transfer_that_goes_on_the_latest_is_kept_and_every_one_that_is_over():
    feed = Feed(JOB)
    for news in (_bytes(1), _bytes(2), _bytes(9, cid="cid-a"), _bytes(3, name="b"), _bytes(4, name="b")):
        feed.transfer(news)
    feed.end()
    assert (await _all(feed))[1:] == [_bytes(9, cid="cid-a"), _bytes(4, name="b")]


def test_transfers_of_a_long_job_are_bounded():
    feed = Feed(JOB)
    for number in range(FETCHED_LIMIT + 5):
        feed.transfer(_bytes(9, number, cid=f"cid-{number}"))
    kept = [update.cid for _, update in feed.after(0) if isinstance(update, ShardBytes)]
    assert (len(kept), kept[0]) == (FETCHED_LIMIT, "cid-5")


async def test_texts_and_names_of_strangers_take_a_bounded_place(monkeypatch):
    monkeypatch.setattr(feed_module, "TEXTS_LIMIT", 100)
    feed = Feed(JOB)
    for number in range(1_000):
        feed.text(_text("" if number % 2 else "x"))
        feed.transfer(ShardBytes(JOB, 0, 1, "n" * 100_000, 1, 1, "c" * 100_000))
    kept = [update for _, update in feed.after(0)]
    assert sum(isinstance(update, ShardText) for update in kept) == 100
    assert max(len(update.name + update.cid) for update in kept if isinstance(update, ShardBytes)) == 2 * NAME_LIMIT
