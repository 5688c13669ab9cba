"""Shares of a machine go to whoever asked first."""

import asyncio

import pytest

from bacalhau_node.executors.turns import Turns


async def asked(turns: Turns, shares: int, order: list[int]) -> asyncio.Task[None]:
    """A task that waits for shares, and is in the queue when this returns."""

    async def take() -> None:
        await turns.take(shares)
        order.append(shares)

    task = asyncio.create_task(take())
    await asyncio.sleep(0)
    return task


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_free_shares_are_taken_at_once() -> None:
    turns = Turns(3)
    await turns.take(2)
    assert not turns.full
    await turns.take(1)
    assert turns.full
    assert not turns.crowded


async def test_a_large_request_is_not_overtaken_by_small_ones() -> None:
    turns, order = Turns(2), []
    await turns.take(1)
    tasks = [await asked(turns, shares, order) for shares in (2, 1)]
    assert turns.crowded
    assert order == []  # one share is free, but the larger request came first
    turns.give(1)
    await settle()
    assert order == [2]
    turns.give(2)
    await settle()
    assert order == [2, 1]
    await asyncio.gather(*tasks)


async def test_a_cancelled_wait_leaves_the_queue_and_lets_others_by() -> None:
    turns, order = Turns(2), []
    await turns.take(1)
    large, small = await asked(turns, 2, order), await asked(turns, 1, order)
    large.cancel()
    await settle()
    assert order == [1]
    assert not turns.crowded
    await small


async def test_a_wait_that_is_cancelled_as_its_turn_comes_gives_it_back() -> None:
    turns, order = Turns(1), []
    await turns.take(1)
    first, second = await asked(turns, 1, order), await asked(turns, 1, order)
    turns.give(1)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    await settle()
    assert second.done()
    assert turns.full
