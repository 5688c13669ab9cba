"""The background thread of a kernel: one loop, one client, answers to other threads."""

from __future__ import annotations

import asyncio
import io
import sys
import threading

import pytest

from bacalhau_jupyter import session
from bacalhau_jupyter.progress import JobMonitor
from bacalhau_jupyter.session import CLOSE_SECONDS, Session
from bacalhau_node.client import Submission
from bacalhau_node.errors import NodeUnreachable, SpecError
from bacalhau_node.protocol.events import JobChanged

JOB = "j-3f2a91bc-1111-4222-8333-444444444444"


class Scripted:
    """A client of which only what a session itself uses is real."""

    def __init__(self, updates=(), *, error=None):
        self.closed = threading.Event()
        self._updates, self._error = updates, error

    async def updates(self, job):
        for update in self._updates:
            yield update
        if self._error:
            raise self._error

    async def close(self):
        self.closed.set()


@pytest.fixture
def sessions():
    """Makes sessions over scripted clients and closes them."""
    made = []

    def make(client=None, open_client=None):
        async def give():
            return client or Scripted()

        made.append(Session(open_client or give))
        return made[-1]

    yield make
    for one in made:
        one.close()


def monitor():
    return JobMonitor(Submission(JOB, 2, "n-1", "docker"), hint="{shard}")


async def thread_of(_client):
    return threading.current_thread().name


def test_answers_come_from_a_thread_of_its_own(sessions):
    assert sessions().call(thread_of) == "bacalhau"


def test_one_client_serves_all_and_opens_once(sessions):
    opened = []

    async def slow():
        opened.append(1)
        await asyncio.sleep(0.01)
        return Scripted()

    one = sessions(open_client=slow)
    answers = [one.begin(thread_of) for _ in range(5)]
    assert [answer.result(5) for answer in answers] == ["bacalhau"] * 5
    assert opened == [1]


def test_a_client_that_failed_to_open_is_tried_again(sessions):
    tries = []

    async def second_time():
        tries.append(1)
        if len(tries) == 1:
            raise NodeUnreachable("not yet")
        return Scripted()

    one = sessions(open_client=second_time)
    with pytest.raises(NodeUnreachable, match="not yet"):
        one.call(thread_of)
    assert one.call(thread_of) == "bacalhau"


def test_errors_and_late_answers_reach_the_caller(sessions):
    one = sessions()

    async def refuse(_client):
        raise SpecError("no such job")

    async def never(_client):
        await asyncio.sleep(3600)

    with pytest.raises(SpecError, match="no such job"):
        one.call(refuse)
    with pytest.raises(NodeUnreachable, match=r"did not answer in 0.05 s"):
        one.call(never, timeout=0.05)


def test_a_monitor_is_fed_to_the_end(sessions):
    followed = monitor()
    sessions(Scripted([JobChanged(JOB, "Running"), JobChanged(JOB, "Completed")])).watch(followed)
    assert followed.wait_end(5)
    assert followed.state == "Completed"
    assert followed.broken is None


def test_a_feed_that_breaks_ends_the_wait_and_says_why(sessions):
    followed = monitor()
    sessions(Scripted(error=NodeUnreachable("cut off"))).watch(followed)
    assert followed.wait_end(5)
    assert str(followed.broken) == "cut off"


def test_closing_closes_the_client_frees_waiters_and_refuses_more(sessions):
    class Waiting(Scripted):
        async def updates(self, job):
            yield JobChanged(job, "Running")
            await asyncio.sleep(3600)

    client, followed = Waiting(), monitor()
    one = sessions(client)
    one.watch(followed)
    one.call(thread_of)
    folder = one.folder()
    one.close()
    assert client.closed.is_set()
    assert followed.wait_end(5)
    assert not folder.exists()
    with pytest.raises(NodeUnreachable, match="load_ext"):
        one.call(thread_of)


def test_a_client_that_does_not_close_holds_nobody_up(sessions, monkeypatch):
    class Stuck(Scripted):
        async def close(self):
            await asyncio.sleep(3600)

    monkeypatch.setattr("bacalhau_jupyter.session.CLOSE_SECONDS", CLOSE_SECONDS / 20)
    one = sessions(Stuck())
    one.call(thread_of)
    closing = threading.Thread(target=one.close)
    closing.start()
    closing.join(30)
    assert not closing.is_alive()


def test_a_result_that_takes_long_says_how_much_has_come(sessions, monkeypatch):
    one, said = sessions(), threading.Event()

    class Cell(io.StringIO):
        def write(self, text):
            said.set()
            return super().write(text)

    async def slow(_client):
        one.receive(5_000_000)
        return await asyncio.to_thread(said.wait, 30)

    monkeypatch.setattr(session, "SAID_SECONDS", 0.01)
    monkeypatch.setattr(sys, "stdout", cell := Cell())
    assert one.fetch(slow)
    assert cell.getvalue().startswith("\rreceiving 5 MB")
    assert cell.getvalue().endswith("\n")
    monkeypatch.setattr(sys, "stdout", cell := Cell())
    assert one.fetch(thread_of) == "bacalhau"
    assert cell.getvalue() == ""
