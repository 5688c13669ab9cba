"""The machines of a node, and which of them an event is for."""

from __future__ import annotations

from dataclasses import dataclass

from bacalhau_node.messages import Accept, Announce, Cancel, Kept, MembershipMessage, Offer, Recall, Reject
from bacalhau_node.protocol import events as ev
from bacalhau_node.protocol.compute import Compute
from bacalhau_node.protocol.membership import Membership
from bacalhau_node.protocol.requester import Requester

_TO_COMPUTE = (Offer, Accept, Reject, Kept, Cancel, Recall, Announce)
_COMPUTE_EVENTS = (ev.ExecutionStarted, ev.ExecutionEnded)
_COMPUTE_TIMERS = (ev.HeartbeatTimer, ev.ProposeTimer, ev.BidTimer)
_MEMBERSHIP_EVENTS = (ev.LinkUp, ev.LinkDown, ev.Dialled, ev.DialFailed, ev.Join, ev.Leave, ev.LoadChanged)


@dataclass(frozen=True)
class Machines:
    """Both halves of a node, and who else is there, for a node on a network."""

    requester: Requester
    compute: Compute
    membership: Membership | None

    def of(self, event: ev.Event) -> Requester | Compute | Membership:
        """Whose the event is; it knows how large the network is."""
        if self.membership is not None:
            if for_membership(event):
                return self.membership
            self.compute.network = self.requester.book.network = 1 + len(self.membership)
        return self.compute if _for_compute(event) else self.requester


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
