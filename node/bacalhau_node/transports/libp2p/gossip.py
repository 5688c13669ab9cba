"""What is published reaches everybody: gossipsub 1.1 on one topic, on streams of libp2p.

Theory of operation. Neighbours that are subscribed to the topic open a stream each towards the other and write RPCs
(protobuf, length first) on it. About `DEGREE` of them form this node's part of the **mesh**: whoever gets a message for
the first time passes it on to its mesh at once. A publisher gives its own messages to all its neighbours. Every
`BEAT` seconds the mesh is repaired (graft, prune) and the neighbours outside of it are told which messages were seen
lately (IHAVE), so that they can ask for what they lack (IWANT).

A message is signed by its author, whose key is in its id or beside it, and is checked at every hop before it is passed
on: who relays it is nobody. Its id is the author and a number that grows even across restarts. What one author has
others pass on is bounded (`Allowances`): more is heard by nobody beyond its own neighbours, and who relays it is not at
fault, as other implementations know no such bound.

libp2p's `Pubsub` and `GossipSub` speak the same protocol but fail the figures and the promises: 10 ms and more for each
delivery, a process that ends at the first malformed message, messages dropped at 10 a second, at a queue of 32, and
after a restart, and a node that its only neighbour prunes is cut off. Peer exchange is left out here on purpose: who is
a neighbour is for membership to decide, and it has its own exchange.

`Router` decides; what it says goes into its neighbours' queues, which somebody else carries.
"""

from __future__ import annotations

import logging
import random
import time
from collections import deque
from collections.abc import Callable, Iterable
from functools import lru_cache
from itertools import islice
from typing import Any

from google.protobuf.message import DecodeError
from libp2p.crypto.keys import PrivateKey
from libp2p.peer.id import ID
from libp2p.pubsub.pb import rpc_pb2
from libp2p.pubsub.validators import PUBSUB_SIGNING_PREFIX, signature_validator
from libp2p.utils.varint import encode_varint_prefixed

from bacalhau_node.errors import ProtocolError
from bacalhau_node.ids import NodeId
from bacalhau_node.ports import Packet
from bacalhau_node.transports.libp2p.limits import ENVELOPE, LARGEST_PUBLISHED, LARGEST_RPC
from bacalhau_node.transports.libp2p.waiting import Waiting

log = logging.getLogger(__name__)

PROTOCOL = "/meshsub/1.1.0"
TOPIC = "bacalhau-jupyter/1"

DEGREE, FEWEST, MOST = 6, 4, 12
"""Neighbours in the mesh: how many are looked for, when it is too small, when too large (gossipsub's own numbers)."""

BEAT = 2.0
BACK_OFF = 10.0
"""Seconds for which whoever was pruned is not grafted again; short, so that a healed link is used soon."""

LATELY, TOLD_BEATS = 8, 2
"""Beats for which a message can be asked for, and for which neighbours outside of the mesh are told of it: all of them,
or the leaves of a star, of which a hub takes only some into its mesh, would miss it."""

ASKED = 500
"""Ids that one IHAVE may make this node ask for."""

REMEMBERED, SEEN = 240.0, 100_000
"""Seconds for which an id counts as seen (twice what others keep), and how many are kept at most."""

QUEUE = 4 * 1024 * 1024
"""Bytes that wait for one neighbour; it loses more, is counted, and may ask for it later."""

ALLOWED, PER_MESSAGE = 1024 * 1024, 512
"""Bytes that others pass on for one author in a minute, and what each message counts beyond its own. A job that finds
too few nodes is announced a few times, by a kilobyte or two: so this is a hundred of those jobs a minute."""

AUTHORS = 10_000
"""Authors whose use of that is remembered."""


class Neighbour:
    """A node on the other end of a pair of gossip streams, and what waits for it."""

    def __init__(self, node: NodeId) -> None:
        self.node = node
        self.subscribed = False
        self.pruned_until = 0.0
        self.slow = self.gone = False
        self._queue: list[bytes] = []
        self.queued = 0
        self._writer = Waiting()

    def send(self, rpc: bytes) -> bool:
        """Queue an encoded RPC; False when there is no room for it. One that is gone misses nothing."""
        if self.gone or self.queued + len(rpc) > QUEUE:
            return self.gone
        self._queue.append(rpc)
        self.queued += len(rpc)
        self._writer.wake()
        return True

    def leave(self) -> None:
        """Let go of whoever carries what waits for it."""
        self.gone = True
        self._queue.clear()
        self.queued = 0
        self._writer.wake()

    async def take(self) -> bytes:
        """Everything that waits, as soon as something does; `b""` once it is gone."""
        while not self._queue and not self.gone:
            await self._writer.wait()
        data = b"".join(self._queue)
        self._queue.clear()
        self.queued = 0
        return data


class Allowances:
    """What each author may still have others pass on: `ALLOWED` bytes, which come back in a minute."""

    def __init__(self) -> None:
        self._left: dict[bytes, tuple[float, float, bool]] = {}

    def spend(self, author: bytes, size: int, now: float) -> bool:
        """Whether a message of so many bytes may be passed on; then it is taken off. Who may not is told of once."""
        left, since, told = self._left.pop(author, (ALLOWED, now, False))
        left = min(ALLOWED, left + (now - since) * ALLOWED / 60)
        fits = size <= LARGEST_PUBLISHED + ENVELOPE and size + PER_MESSAGE <= left
        self._left[author] = (left - size - PER_MESSAGE if fits else left, now, told or not fits)
        if not (fits or told):
            log.warning(
                "node %s publishes too much, which is not passed on: the last was %d bytes", _name(author), size
            )
        if len(self._left) > AUTHORS:
            del self._left[next(iter(self._left))]
        return fits


class Router:
    """One node's part in the mesh of one topic."""

    def __init__(self, key: PrivateKey, topic: str, *, chance: random.Random, now: Callable[[], float]) -> None:
        self._key, self._id, self._topic = key, ID.from_pubkey(key.get_public_key()), topic
        self._chance, self._now = chance, now
        self._number = time.time_ns()  # grows across restarts, or others would take new messages for old ones
        self.neighbours: dict[NodeId, Neighbour] = {}
        self.mesh: dict[NodeId, Neighbour] = {}
        self._seen: dict[bytes, float] = {}
        self._lately: deque[dict[bytes, bytes]] = deque([{}], maxlen=LATELY)
        self._lately_bytes = 0  # of this beat
        self._allowances = Allowances()
        self.dropped = 0

    # --- neighbours ---

    def add(self, neighbour: Neighbour) -> None:
        """A stream to it is open: say what we want to hear."""
        self.neighbours[neighbour.node] = neighbour
        hello = rpc_pb2.RPC(subscriptions=[rpc_pb2.RPC.SubOpts(subscribe=True, topicid=self._topic)])
        neighbour.send(_encoded(hello))

    def remove(self, neighbour: Neighbour) -> None:
        """Its stream is closed."""
        neighbour.leave()
        if self.neighbours.get(neighbour.node) is neighbour:
            del self.neighbours[neighbour.node]
            if self.mesh.pop(neighbour.node, None):
                self._mend()

    # --- messages ---

    def publish(self, data: bytes) -> None:
        """Sign `data` and give it to every neighbour."""
        self._number += 1
        message = rpc_pb2.Message(
            data=data,
            topicIDs=[self._topic],
            from_id=self._id.to_bytes(),
            seqno=self._number.to_bytes(8, "big"),
        )
        message.signature = self._key.sign(PUBSUB_SIGNING_PREFIX.encode() + message.SerializeToString())
        key = _id_of(message)
        self._remember(key)
        self._pass_on(key, message, to=self.neighbours.values())

    def heard(self, neighbour: Neighbour, raw: bytes) -> list[Packet]:
        """Act on one RPC; what is new in it comes back. Raises `ProtocolError` for what no honest node sends."""
        try:
            rpc = rpc_pb2.RPC.FromString(raw)
        except DecodeError as error:
            raise ProtocolError(f"gossip that is no RPC ({len(raw)} bytes)") from error
        for subscription in rpc.subscriptions:
            if subscription.topicid == self._topic:
                self._subscribed(neighbour, wanted=subscription.subscribe)
        fresh = [packet for message in rpc.publish if (packet := self._message(neighbour, message))]
        if rpc.HasField("control"):
            self._control(neighbour, rpc.control)
        return fresh

    def _message(self, neighbour: Neighbour, message: rpc_pb2.Message) -> Packet | None:
        key = _id_of(message)
        if key in self._seen or self._topic not in message.topicIDs or message.from_id == self._id.to_bytes():
            return None
        encoded = message.SerializeToString()
        if not _genuine(encoded):
            raise ProtocolError("a published message without its author's signature")
        self._remember(key)
        if not self._allowances.spend(message.from_id, len(encoded), self._now()):
            self.dropped += 1
            return None
        self._pass_on(key, message, to=self.mesh.values(), but=neighbour)
        return Packet(_name(message.from_id), message.data)

    def _pass_on(
        self, key: bytes, message: rpc_pb2.Message, *, to: Iterable[Neighbour], but: Neighbour | None = None
    ) -> None:
        rpc = _encoded(rpc_pb2.RPC(publish=[message]))  # once for all of them
        self._lately_bytes += len(rpc)
        if self._lately_bytes <= QUEUE:  # what is over that nobody can ask for
            self._lately[0][key] = rpc
        for neighbour in to:
            if neighbour.subscribed and neighbour is not but and neighbour.node != _name(message.from_id):
                self._send(neighbour, rpc)

    def _send(self, neighbour: Neighbour, rpc: bytes) -> None:
        if neighbour.send(rpc):
            return
        self.dropped += 1
        if not neighbour.slow:
            neighbour.slow = True
            log.warning("node %s takes messages too slowly: it loses some of what is published", neighbour.node)

    # --- the mesh ---

    def beat(self) -> None:
        """Mend the mesh, tell others what was seen lately, forget what is old."""
        now = self._now()
        self._mend()
        while len(self.mesh) > MOST:
            self._prune(self._chance.choice(list(self.mesh.values())))
        self._tell(self._outside())
        self._lately.appendleft({})
        self._lately_bytes = 0
        while self._seen and self._oldest() < now - REMEMBERED:
            del self._seen[next(iter(self._seen))]

    def _subscribed(self, neighbour: Neighbour, *, wanted: bool) -> None:
        if wanted and not neighbour.subscribed:
            neighbour.subscribed = True
            self._tell([neighbour])
            self._mend(up_to=DEGREE)
        elif not wanted:
            neighbour.subscribed = False
            self.mesh.pop(neighbour.node, None)

    def _mend(self, up_to: int = FEWEST) -> None:
        """Graft neighbours if the mesh is smaller than that."""
        if len(self.mesh) >= up_to or len(self.mesh) == len(self.neighbours):
            return
        now = self._now()
        free = [
            n for n in self.neighbours.values() if n.subscribed and n.node not in self.mesh and n.pruned_until <= now
        ]
        graft = _encoded(_control(graft=[rpc_pb2.ControlGraft(topicID=self._topic)]))
        for neighbour in self._chance.sample(free, min(len(free), DEGREE - len(self.mesh))):
            self.mesh[neighbour.node] = neighbour
            neighbour.send(graft)

    def _outside(self) -> list[Neighbour]:
        """Neighbours who want to hear of the topic, and are not in the mesh."""
        return [one for one in self.neighbours.values() if one.subscribed and one.node not in self.mesh]

    def _prune(self, neighbour: Neighbour) -> None:
        self.mesh.pop(neighbour.node, None)
        neighbour.pruned_until = self._now() + BACK_OFF
        prune = rpc_pb2.ControlPrune(topicID=self._topic, backoff=int(BACK_OFF))
        neighbour.send(_encoded(_control(prune=[prune])))

    def _tell(self, neighbours: Iterable[Neighbour]) -> None:
        """Say which messages of the last few beats are here."""
        ids = [key for beat in islice(self._lately, TOLD_BEATS) for key in beat]
        if ids:
            have = rpc_pb2.ControlIHave(topicID=self._topic, messageIDs=ids[:ASKED])
            rpc = _encoded(_control(ihave=[have]))
            for neighbour in neighbours:
                neighbour.send(rpc)

    def _control(self, neighbour: Neighbour, control: rpc_pb2.ControlMessage) -> None:
        for graft in control.graft:
            if graft.topicID == self._topic:
                self._grafted(neighbour)
        for prune in control.prune:
            if prune.topicID == self._topic:
                neighbour.pruned_until = self._now() + max(prune.backoff, BACK_OFF)
                self.mesh.pop(neighbour.node, None)
                self._mend()
        self._answer(neighbour, control)

    def _grafted(self, neighbour: Neighbour) -> None:
        early = neighbour.pruned_until > self._now()
        if early or (len(self.mesh) >= MOST and neighbour.node not in self.mesh):
            self._prune(neighbour)
        else:
            self.mesh[neighbour.node] = neighbour

    def _answer(self, neighbour: Neighbour, control: rpc_pb2.ControlMessage) -> None:
        """Ask for what we lack, and give what is asked for."""
        lacking = [key for have in control.ihave for key in have.messageIDs if key not in self._seen][:ASKED]
        if lacking:
            neighbour.send(_encoded(_control(iwant=[rpc_pb2.ControlIWant(messageIDs=lacking)])))
        for key in [key for want in control.iwant for key in want.messageIDs][:ASKED]:
            for beat in self._lately:
                if key in beat:
                    self._send(neighbour, beat[key])

    def _remember(self, key: bytes) -> None:
        self._seen[key] = self._now()
        if len(self._seen) > SEEN:
            del self._seen[next(iter(self._seen))]

    def _oldest(self) -> float:
        return next(iter(self._seen.values()))


def rpcs(buffer: bytearray) -> list[bytes]:
    """Take every whole RPC out of the front of `buffer`; raises `ProtocolError` for one that is too large."""
    found = []
    while prefix := _prefix(buffer):
        size, begin = prefix
        if size > LARGEST_RPC:
            raise ProtocolError(f"gossip of {size} bytes at once, where {LARGEST_RPC} are allowed")
        if len(buffer) < begin + size:
            break
        found.append(bytes(memoryview(buffer)[begin : begin + size]))
        del buffer[: begin + size]
    return found


def _prefix(buffer: bytearray) -> tuple[int, int] | None:
    """The length of the next RPC, and where it begins; None when not all of that is here."""
    size = 0
    for at, byte in enumerate(buffer[:5]):
        size |= (byte & 0x7F) << (7 * at)
        if byte < 0x80:
            return size, at + 1
    if len(buffer) >= 5:
        raise ProtocolError("gossip whose length has no end")
    return None


def _encoded(rpc: rpc_pb2.RPC) -> bytes:
    return bytes(encode_varint_prefixed(rpc.SerializeToString()))


def _control(**what: Any) -> rpc_pb2.RPC:
    return rpc_pb2.RPC(control=rpc_pb2.ControlMessage(**what))


def _id_of(message: rpc_pb2.Message) -> bytes:
    return bytes(message.from_id + message.seqno)


@lru_cache(4096)
def _name(peer: bytes) -> NodeId:
    return str(ID(peer).to_base58())


@lru_cache(1024)
def _genuine(message: bytes) -> bool:
    """Whether an encoded message carries its author's signature. Each is checked once for all hosts of a process."""
    try:
        return bool(signature_validator(rpc_pb2.Message.FromString(message)))
    except Exception:  # noqa: BLE001 - garbage arrives here, and keys and ids of any kind raise what they like
        return False
