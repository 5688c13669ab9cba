"""What the engine has to do with the transport: what comes in, decoded; what goes out, one queue for each node.

Theory of operation. Every node that something is sent to has a **queue**, and at most one task that empties it, in
order. So a node that takes nothing holds up nobody else, and what waits for it is bounded: printed lines that wait are
joined, and beyond `MAX_WAITING` characters left out (all of them are in the record of their shard); of how far a
transfer is only the latest counts; beyond `MAX_QUEUE` messages the oldest are dropped, which is told. The protocol
lives with every loss. When a node can't be reached, everything that waits for it has failed.

What is no message ends the link that it came by: its sender is at fault.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Final, Protocol

from msgspec import structs

from bacalhau_node import wire
from bacalhau_node.errors import BugError, NodeUnreachable, ProtocolError, SpecError
from bacalhau_node.ids import NodeId
from bacalhau_node.messages import Lines, Message, Transfer
from bacalhau_node.ports import Packet, Transport, Waiting
from bacalhau_node.protocol import events as ev

log = logging.getLogger(__name__)

MAX_WAITING: Final = 1024 * 1024
"""Characters of printed text that wait for one node."""

MAX_QUEUE: Final = 10_000
"""Messages that wait for one node: some 10 MB at most (a guess)."""

MAX_REASON: Final = 300
"""Characters of what another node did wrong, which may hold some of its own words."""

MAX_TOLD: Final = 1_000
"""Faults of others that are remembered, so that each is told once: whoever makes up more is told of again."""

LEFT_OUT: Final = "\n[lines left out here: too many for the network; all of them are in the result]\n"

Failed = Callable[[NodeId, list[Message], str], None]
"""Called with the messages that could not be sent to a node, and why."""

NETWORK_EFFECTS = ev.Publish | ev.Dial | ev.HangUp | ev.Complain | ev.Learn


class Spawn(Protocol):
    """Starts a task that its owner ends."""

    def __call__(self, work: Coroutine[object, object, None], /) -> object:
        """Start it."""
        ...


@dataclass
class Tally:
    """What went between this node and others since it started. By (way: "in" or "out", kind): messages, their bytes.

    `waiting`: messages that wait to be given to the transport.
    """

    waiting: Callable[[], Waiting]
    messages: Counter[tuple[str, str]] = field(default_factory=Counter)
    sizes: Counter[tuple[str, str]] = field(default_factory=Counter)
    dropped: int = 0
    """Messages that waited for nodes that take too few."""

    def count(self, way: str, message: Message, data: bytes) -> None:
        """One more."""
        kind = str(message.__struct_config__.tag)
        self.messages[way, kind] += 1
        self.sizes[way, kind] += len(data)


class _Queue:
    """What waits for one node."""

    def __init__(self) -> None:
        self.messages: deque[Message] = deque()
        self.text = 0
        self.cut = False
        self.dropped = 0

    def put(self, message: Message) -> None:
        last = self.messages[-1] if self.messages else None
        if isinstance(message, Lines):
            self._put_lines(message, last)
        elif isinstance(message, Transfer) and isinstance(last, Transfer) and _same(message, last) and not last.cid:
            self.messages[-1] = message
        else:
            self.messages.append(message)
        while len(self.messages) > MAX_QUEUE:
            self._forget(self.messages.popleft())
            self.dropped += 1

    def _put_lines(self, lines: Lines, last: Message | None) -> None:
        text = lines.text
        if self.text + len(text) > MAX_WAITING:
            text, self.cut = "" if self.cut else LEFT_OUT, True
        else:
            self.cut = False
        self.text += len(text)
        if isinstance(last, Lines) and (last.execution, last.stream) == (lines.execution, lines.stream):
            self.messages[-1] = structs.replace(last, text=last.text + text)
        elif text:
            self.messages.append(structs.replace(lines, text=text))

    def take(self) -> Message:
        """The next one."""
        message = self.messages.popleft()
        self._forget(message)
        return message

    def take_all(self) -> list[Message]:
        """All that is left."""
        messages = list(self.messages)
        self.messages.clear()
        self.text = 0
        return messages

    def _forget(self, message: Message) -> None:
        if isinstance(message, Lines):
            self.text -= len(message.text)


def _encoded(to: NodeId, message: Message) -> bytes | None:
    """The message as bytes; None for one that is too large: those behind it are sent all the same."""
    try:
        return wire.encode(message)
    except BugError:
        log.exception("a message is not sent", extra={"to": to, "kind": type(message).__name__})
        return None


def _same(one: Transfer, other: Transfer) -> bool:
    return (one.execution, one.name) == (other.execution, other.name)


class Links:
    """The network of one engine. `post` gives an event to the machines."""

    def __init__(self, transport: Transport, *, spawn: Spawn, post: Callable[[ev.Event], None], failed: Failed) -> None:
        self._transport, self._spawn, self._post, self._failed = transport, spawn, post, failed
        self._queues: dict[NodeId, _Queue] = {}
        self._told: set[tuple[NodeId, str]] = set()
        self.tally = Tally(self._waiting)
        self.idle = asyncio.Event()
        """Nothing waits to be sent."""
        self.idle.set()

    # --- out ---

    def send(self, to: NodeId, message: Message) -> None:
        """Send a message as soon as the node takes it."""
        queue = self._queues.get(to)
        if queue is None:
            queue = self._queues[to] = _Queue()
            queue.put(message)
            self.idle.clear()
            self._spawn(self._empty(to, queue))
        else:
            queue.put(message)

    def _waiting(self) -> Waiting:
        lengths = [len(queue.messages) for queue in self._queues.values()]
        return Waiting(sum(lengths), max(lengths, default=0))

    async def _empty(self, to: NodeId, queue: _Queue) -> None:
        message: Message | None = None
        try:
            while queue.messages:
                message = queue.take()
                if (data := _encoded(to, message)) is not None:
                    await self._transport.send(to, data)
                    self.tally.count("out", message, data)
        except NodeUnreachable as error:
            assert message is not None, "nothing was sent"
            self._failed(to, [message, *queue.take_all()], str(error))
        finally:
            del self._queues[to]
            if not self._queues:
                self.idle.set()
            if queue.dropped:
                self.tally.dropped += queue.dropped
                log.warning("messages were dropped: the node takes too few", extra={"to": to, "count": queue.dropped})

    def perform(self, effect: NETWORK_EFFECTS) -> None:
        """Carry out what concerns the network as a whole."""
        match effect:
            case ev.Publish(message):
                self._spawn(self._publish(message))
            case ev.Dial(address, node):
                self._spawn(self._dial(address, node))
            case ev.HangUp(node, reason):
                self.complain(node, reason)
                self._spawn(self._transport.hang_up(node))
            case ev.Complain(node, reason):
                self.complain(node, reason)
            case ev.Learn(node, addresses):
                self._transport.learn(node, addresses)

    async def _publish(self, message: Message) -> None:
        data = wire.encode(message)
        try:
            await self._transport.publish(data)
        except NodeUnreachable as error:
            log.warning("an announcement was not sent: %s", error)
        else:
            self.tally.count("out", message, data)

    async def _dial(self, address: str, node: NodeId | None) -> None:
        try:
            found = await self._transport.dial(address)
        except (NodeUnreachable, SpecError) as error:
            if node is None and (address, "") not in self._told:  # a person named it, or an earlier life of this node
                self._told.add((address, ""))
                log.warning("%s can't be joined, and is tried again: %s", address, error)
            self._post(ev.DialFailed(address, node, str(error)))
        else:
            self._post(ev.Dialled(address, found))

    def complain(self, node: NodeId, reason: str) -> None:
        """Tell once in the log what a node did wrong."""
        reason = reason[:MAX_REASON]
        if reason and (node, reason) not in self._told:
            if len(self._told) >= MAX_TOLD:
                self._told.clear()
            self._told.add((node, reason))
            log.warning("a node is at fault: %s", reason, extra={"peer": node})

    # --- in ---

    async def receive(self, heard: Callable[[NodeId, Message], None]) -> None:
        """Give every message to `heard`, and post the news of links, until the transport is closed."""
        async for arrival in self._transport.received():
            if not isinstance(arrival, Packet):
                self._post(arrival)
                continue
            try:
                message = wire.decode(arrival.data)
            except ProtocolError as error:
                self.complain(arrival.author, f"it sent what is no message: {error}")
                self._spawn(self._transport.hang_up(arrival.author))
                continue
            self.tally.count("in", message, arrival.data)
            heard(arrival.author, message)
