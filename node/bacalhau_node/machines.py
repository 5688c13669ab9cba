"""The machines of a node, and which of them an event is for."""

from __future__ import annotations

import logging

from bacalhau_node.ids import NodeId
from bacalhau_node.messages import Accept, Announce, Cancel, Kept, MembershipMessage, Offer, Recall, Reject
from bacalhau_node.protocol import events as ev
from bacalhau_node.protocol.compute import Compute
from bacalhau_node.protocol.membership import Membership
from bacalhau_node.protocol.requester import Requester

log = logging.getLogger(__name__)

MAX_TOLD = 1_000
"""Nodes whose faults are told once; whoever comes after so many is told of again."""

_TO_COMPUTE = (Offer, Accept, Reject, Kept, Cancel, Recall, Announce)
_COMPUTE_EVENTS = (ev.ExecutionStarted, ev.ExecutionEnded)
_COMPUTE_TIMERS = (ev.HeartbeatTimer, ev.BidTimer)
_MEMBERSHIP_EVENTS = (ev.LinkUp, ev.LinkDown, ev.Dialled, ev.DialFailed, ev.Join, ev.Leave, ev.LoadChanged)


class Machines:
    """Both halves of a node, and who else is there, for a node on a network.

    `placing`: the requester is told who is there. It need not know before it has a job, and most nodes of a large
    network never have one: a thousand nodes that know each other in this way are a million records.
    """

    def __init__(self, requester: Requester, compute: Compute, membership: Membership | None) -> None:
        self._requester, self._compute, self._membership = requester, compute, membership
        self.placing = bool(requester.book.jobs)
        self._told: set[NodeId] = set()
        if membership is not None:
            membership.look_after(lambda node: requester.book.placement.works(node) or compute.serves(node))

    def step(self, event: ev.Event, now: float) -> list[ev.Effect]:
        """What the machine says that the event is for; a message of another node that breaks it costs only itself."""
        try:
            return self._step(event, now)
        except Exception:  # what one stranger sends must not take what a whole turn has decided for others
            if not isinstance(event, ev.Received) or event.sender == self._compute.node:
                raise
            if event.sender not in self._told:
                self._told = {*self._told, event.sender} if len(self._told) < MAX_TOLD else {event.sender}
                log.exception("a message of another node broke a rule of this one", extra={"peer": event.sender})
            return []

    def _step(self, event: ev.Event, now: float) -> list[ev.Effect]:
        """The same; the machine knows how large the network is."""
        if self._membership is not None:
            if for_membership(event):
                return self._membership.step(event, now)
            self._compute.network = self._requester.book.network = 1 + len(self._membership)
            if isinstance(event, ev.Submitted) and not self.placing:
                self._look_around(self._membership, now)
        return (self._compute if _for_compute(event) else self._requester).step(event, now)

    def _look_around(self, membership: Membership, now: float) -> None:
        self.placing = True
        for seen in membership.nodes():
            self._requester.step(seen, now)  # it has no job yet, and so nothing to say


def for_membership(event: ev.Event) -> bool:
    """Whether it is about who is there."""
    match event:
        case ev.Received(message=message):
            return isinstance(message, MembershipMessage)
        case ev.TimerFired(timer):
            return isinstance(timer, ev.ExchangeTimer)
        case _:
            return isinstance(event, _MEMBERSHIP_EVENTS)


def _for_compute(event: ev.Event) -> bool:
    match event:
        case ev.Received(message=message):
            return isinstance(message, _TO_COMPUTE)
        case ev.TimerFired(timer):
            return isinstance(timer, _COMPUTE_TIMERS)
        case _:
            return isinstance(event, _COMPUTE_EVENTS)
