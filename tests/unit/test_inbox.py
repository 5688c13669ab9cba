"""The inbox: what is heard first, what need not be heard, and when a turn is due."""

from __future__ import annotations

import asyncio

from bacalhau_node.inbox import GROUP, Inbox
from bacalhau_node.protocol import events as ev
from bacalhau_node.testing.builders import a_job_id, a_result, an_execution

FIRST, SECOND, THIRD = (ev.CancelRequested(a_job_id(n)) for n in range(3))


class Reader:
    """Takes everything in its turn. `busy`: short shards are at work."""

    def __init__(self, *, busy: bool = False) -> None:
        self.busy = busy
        self.turns: list[tuple[float, list[ev.Event]]] = []
        self.more = asyncio.Event()
        self.inbox = Inbox(self.turn, patient=lambda: self.busy)

    def turn(self) -> None:
        now, taken = self.inbox.begin(), []
        while self.inbox:
            taken.append(self.inbox.take())
        self.turns.append((now, taken))
        self.more.set()

    async def turn_of(self, *events: ev.Event) -> list[ev.Event]:
        """Post these, and wait for the turn that they get."""
        self.more.clear()
        for event in events:
            self.inbox.post(event)
        await asyncio.wait_for(self.more.wait(), 10)
        return self.turns[-1][1]


async def test_all_that_is_posted_gets_one_turn() -> None:
    reader = Reader()
    assert await reader.turn_of(FIRST, SECOND) == [FIRST, SECOND]
    assert len(reader.turns) == 1


async def test_what_machines_say_to_each_other_is_heard_first() -> None:
    inbox = Reader().inbox
    inbox.add(FIRST)
    inbox.say(SECOND)
    inbox.say(THIRD)
    assert [inbox.take() for _ in range(len(inbox))] == [SECOND, THIRD, FIRST]


async def test_a_start_is_not_told_when_the_end_waits_too() -> None:
    ended = ev.ExecutionEnded(an_execution(0), a_result())
    started = [ev.ExecutionStarted(an_execution(n)) for n in range(2)]
    assert await Reader().turn_of(started[0], started[1], ended) == [started[1], ended]


async def test_turns_are_apart_while_short_shards_are_at_work() -> None:
    reader = Reader(busy=True)
    await reader.turn_of(FIRST)
    await reader.turn_of(SECOND)
    (first, _), (second, _) = reader.turns
    assert second - first >= 0.9 * GROUP  # a timer may be early by the clock's resolution


async def test_a_turn_that_waits_is_due_at_once_when_nothing_is_at_work_any_more() -> None:
    reader = Reader(busy=True)
    await reader.turn_of(FIRST)
    reader.inbox.post(SECOND)
    reader.busy = False
    reader.more.clear()
    reader.inbox.post(THIRD)
    await asyncio.sleep(0)
    assert [taken for _, taken in reader.turns] == [[FIRST], [SECOND, THIRD]]


async def test_a_closed_inbox_calls_nobody() -> None:
    reader = Reader()
    reader.inbox.post(FIRST)
    reader.inbox.close()
    reader.inbox.post(SECOND)
    await asyncio.sleep(0)
    assert not reader.turns
