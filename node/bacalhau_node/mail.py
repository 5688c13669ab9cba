"""What happens to messages between the network and the machines of a node, so that those need not know of bytes.

- An **offer** to another node is packed before it is sent: what its shards need can be fetched then. What is no longer
  wanted by the time is left out.
- An offer of another node is first shown to whoever speaks for this node's owner.
- A **proposal** waits until its result has been fetched and checked, so what the requester accepts is here.
- Printed lines, and how far transfers are, go to those who watch, and no machine sees them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final

from msgspec import structs

from bacalhau_node.ids import Execution, NodeId
from bacalhau_node.links import Links, Spawn
from bacalhau_node.literals import inert
from bacalhau_node.messages import Lines, Message, Offer, Propose, Refuse, ShardError, Transfer
from bacalhau_node.ports import Transport
from bacalhau_node.protocol import events as ev
from bacalhau_node.protocol.compute import Compute
from bacalhau_node.protocol.requester import Requester
from bacalhau_node.work import Trade

log = logging.getLogger(__name__)

LONGEST_REASON: Final = 1_000
"""Characters of a node's reason for a refusal, which a job keeps and its user sees."""

UNFORESEEN = ShardError("node", message="it could not be offered to another node: this node's log says why")


class Mail:
    """The messages of one node. `post` gives an event to the machines, `passing` news to those who watch.

    Without `trade` the node is on no network, and there is nobody to send an offer to.
    """

    def __init__(
        self,
        transport: Transport,
        *,
        requester: Requester,
        compute: Compute,
        trade: Trade | None,
        spawn: Spawn,
        post: Callable[[ev.Event], None],
        passing: Callable[[NodeId, Lines | Transfer], None],
    ) -> None:
        self._node, self._requester, self._compute, self._trade = transport.node, requester, compute, trade
        self._spawn, self._post, self._passing = spawn, post, passing
        self._coming: set[Execution] = set()
        """Results that are fetched now."""
        self.links = Links(transport, spawn=spawn, post=post, failed=self._unsent)
        spawn(self.links.receive(self._heard))

    def send(self, to: NodeId, message: Message) -> None:
        """Send a message to another node."""
        if isinstance(message, Offer) and self._trade is not None:
            self._spawn(self._packed(to, message, self._trade))
        else:
            self.links.send(to, message)

    def _heard(self, author: NodeId, message: Message) -> None:
        match message:
            case Lines() | Transfer():
                self._passing(author, message)
            case Offer() if self._trade is not None:
                self._spawn(self._vetted(author, message, self._trade))
            case Propose(execution=execution) if self._trade is not None and self._requester.wants(execution, author):
                if execution not in self._coming:
                    self._coming.add(execution)
                    self._spawn(self._collected(author, message, self._trade))
            case Refuse(reason=reason):
                self._post(
                    ev.Received(
                        author, structs.replace(message, reason=inert(reason[:LONGEST_REASON])[:LONGEST_REASON])
                    )
                )
            case _:
                self._post(ev.Received(author, message))

    def _unsent(self, to: NodeId, messages: list[Message], reason: str) -> None:
        """Messages that could not be sent: those that nobody sends again by himself are told to the machines."""
        log.info("a node can't be reached: %s", reason, extra={"peer": to})
        for message in messages:
            if isinstance(message, Offer):
                self._post(ev.OfferUnsent(_executions(message), reason))
        self._post(ev.DialFailed("", to, reason))

    async def _packed(self, to: NodeId, offer: Offer, trade: Trade) -> None:
        offer = self._wanted(to, offer)
        if not offer.shards:
            return
        failed = [ev.OfferFailed(execution, UNFORESEEN) for execution in _executions(offer)]
        try:
            ready, failed = await trade.pack(to, offer)
        finally:  # whatever happens: who waits for its offer waits for ever
            for failure in failed:
                self._post(failure)
        ready = self._wanted(to, ready)
        if ready.shards:
            self.links.send(to, ready)
            self._post(ev.OfferPacked(_executions(ready)))

    def _wanted(self, to: NodeId, offer: Offer) -> Offer:
        """The offer, with what is still to be offered."""
        wants = self._requester.wants
        shards = tuple(one for one in offer.shards if wants(Execution(offer.job, one.shard, one.attempt), to))
        return structs.replace(offer, shards=shards)

    async def _vetted(self, author: NodeId, offer: Offer, trade: Trade) -> None:
        executions = _executions(offer)
        known = any(execution in self._compute.held for execution in executions)
        if not known and (refusal := await trade.vet(author, offer)) is not None:
            room = self._compute.room if refusal.kind == "never" else 0  # else it is offered again at once
            self.links.send(author, Refuse(executions, refusal.kind, refusal.reason, room))
        else:
            self._post(ev.Received(author, offer))

    async def _collected(self, author: NodeId, proposal: Propose, trade: Trade) -> None:
        execution = proposal.execution
        self._post(ev.ResultComing(execution, author))
        end: ev.Event = ev.ResultMissing(execution, author, "this node could not look at it")
        try:
            end = await trade.collect(author, proposal) or ev.Received(author, proposal)
        finally:  # whatever happens: an attempt whose result is coming has no lease
            self._coming.discard(execution)
            self._post(end)


def _executions(offer: Offer) -> tuple[Execution, ...]:
    return tuple(Execution(offer.job, one.shard, one.attempt) for one in offer.shards)
