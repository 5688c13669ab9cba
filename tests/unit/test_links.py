"""What waits for a node: in order, joined, bounded; what can't be sent is told; what is no message ends its link."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from bacalhau_node import wire
from bacalhau_node.errors import NodeUnreachable
from bacalhau_node.links import LEFT_OUT, MAX_TOLD, MAX_WAITING, Links
from bacalhau_node.messages import Accept, Kept, Lines, Message, Reject, Transfer
from bacalhau_node.ports import Packet, Waiting
from bacalhau_node.testing.builders import an_execution

E = an_execution()


class Network:
    """A transport whose sends wait until they may go."""

    def __init__(self, *packets: Packet) -> None:
        self.go = asyncio.Event()
        self.sent: list[Message] = []
        self.problem: NodeUnreachable | None = None
        self.left: list[str] = []
        self._packets = packets

    async def send(self, _to: str, data: bytes) -> None:
        await self.go.wait()
        if self.problem:
            raise self.problem
        self.sent.append(wire.decode(data))

    async def hang_up(self, node: str) -> None:
        self.left.append(node)

    async def received(self) -> AsyncIterator[Packet]:
        for packet in self._packets:
            yield packet


def links(network: Network, failed: list[Any] | None = None) -> tuple[Links, set[asyncio.Task[None]]]:
    tasks: set[asyncio.Task[None]] = set()

    def spawn(work: Any) -> None:
        tasks.add(asyncio.get_running_loop().create_task(work))

    told = failed if failed is not None else []
    made = Links(network, spawn=spawn, post=lambda _: None, failed=lambda *news: told.append(news))  # type: ignore[arg-type]
    return made, tasks


async def sent(network: Network, *messages: Message) -> list[Message]:
    made, tasks = links(network)
    for message in messages:
        made.send("n-1", message)
        await asyncio.sleep(0)
    network.go.set()
    await asyncio.gather(*tasks)
    assert made.idle.is_set()
    return network.sent


async def test_messages_arrive_in_order_and_lines_that_wait_are_joined() -> None:
    first, *rest = await sent(
        Network(), Accept(E), Lines(E, "stdout", "a\n"), Lines(E, "stdout", "b\n"), Lines(E, "stderr", "c\n"), Accept(E)
    )
    assert [first, *rest] == [Accept(E), Lines(E, "stdout", "a\nb\n"), Lines(E, "stderr", "c\n"), Accept(E)]


async def test_of_a_transfer_that_waits_only_the_latest_word_counts_but_its_end_always() -> None:
    news = [Transfer(E, "a", done, 9) for done in (1, 2)], Transfer(E, "a", 9, 9, "cid"), Transfer(E, "b", 1)
    assert await sent(Network(), Accept(E), *news[0], *news[1:]) == [Accept(E), *news[1:]]


async def test_text_beyond_what_may_wait_is_left_out_and_said_so_once() -> None:
    text = "x" * (MAX_WAITING // 2)
    _, lines = await sent(Network(), Accept(E), *(Lines(E, "stdout", text) for _ in range(5)))
    assert isinstance(lines, Lines)
    assert len(lines.text) <= MAX_WAITING + len(LEFT_OUT)
    assert lines.text.count(LEFT_OUT) == 1


async def test_all_that_waits_for_a_node_that_cannot_be_reached_has_failed() -> None:
    network, failed = Network(), []
    network.problem = NodeUnreachable("no route")
    made, tasks = links(network, failed)
    for message in (Accept(E), Accept(an_execution(1))):
        made.send("n-1", message)
    network.go.set()
    await asyncio.gather(*tasks)
    assert failed == [("n-1", [Accept(E), Accept(an_execution(1))], "no route")]


async def test_what_waits_is_counted_in_all_and_for_the_node_with_most_of_it() -> None:
    network = Network()
    made, tasks = links(network)
    for to in ("n-1", "n-1", "n-1", "n-2"):
        made.send(to, Accept(E))
    assert made.tally.waiting() == Waiting(4, 3)
    network.go.set()
    await asyncio.gather(*tasks)
    assert made.tally.waiting() == Waiting()


async def test_what_is_no_message_ends_the_link_and_the_next_message_is_heard() -> None:
    network = Network(Packet("n-bad", b"garbage"), Packet("n-1", wire.encode(Accept(E))))
    made, tasks = links(network)
    heard: list[Any] = []
    await made.receive(lambda *news: heard.append(news))
    await asyncio.gather(*tasks)
    assert heard == [("n-1", Accept(E))]
    assert network.left == ["n-bad"]


GOOD = wire.encode(Accept(E))


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "a message of 0 bytes"),
        (b"\xff" * 300, "message version 255, this node speaks 1"),
        (bytes((wire.VERSION + 1,)) + GOOD[1:], "message version 2, this node speaks 1"),
        (GOOD[:-5], "not a message: "),
        (GOOD + b"more", "not a message: "),
        (bytes((wire.VERSION,)) + b"\x91" * 5_000, "not a message: "),
        (bytes(wire.MAX_MESSAGE + 1), f"a message of {wire.MAX_MESSAGE + 1} bytes"),
    ],
    ids=["empty", "garbage", "future version", "truncated", "with more behind it", "nested", "oversized"],
)
async def test_each_fault_is_told_once_with_its_cause_and_ends_its_link_each_time(
    data: bytes, says: str, caplog: pytest.LogCaptureFixture
) -> None:
    network = Network(*[Packet("n-bad", data)] * 2, Packet("n-1", GOOD))
    made, tasks = links(network)
    heard: list[Any] = []
    await made.receive(lambda *news: heard.append(news))
    await asyncio.gather(*tasks)
    assert heard == [("n-1", Accept(E))]
    assert network.left == ["n-bad", "n-bad"]
    [told] = [record for record in caplog.records if record.levelname == "WARNING"]
    assert f"it sent what is no message: {says}" in told.getMessage()
    assert vars(told)["peer"] == "n-bad"


async def test_a_message_that_is_too_large_takes_none_with_it() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wire, "MAX_MESSAGE", 100)
        assert await sent(Network(), Accept(E), Reject(E, "x" * 200), Kept(E)) == [Accept(E), Kept(E)]


async def test_faults_of_others_are_remembered_within_a_bound() -> None:
    made, _ = links(Network())
    for number in range(3 * MAX_TOLD):
        made.complain(f"n-{number}", "x" * 10_000)
    assert len(made._told) <= MAX_TOLD
    assert max(len(reason) for _, reason in made._told) <= 1_000
