"""What the engine has others do: everything that takes time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from bacalhau_node.ids import Execution, JobId, NodeId
from bacalhau_node.messages import Lines, Offer, Outcome, Propose, Transfer
from bacalhau_node.protocol import events as ev
from bacalhau_node.selection import Refusal


class Work(Protocol):
    """What takes time: each call is one task of the engine, and its end the next event."""

    async def execute(self, run: ev.Run, progress: Callable[[ev.Event | Lines | Transfer], None]) -> Outcome:
        """Stage, run and store one execution; progress through the callback, the end returned."""
        ...

    async def release(self, job: JobId) -> None:
        """No execution of `job` is held any more."""
        ...

    def ended(self, job: JobId) -> None:
        """The job of this node has its final state."""
        ...

    def settled(self, execution: Execution) -> None:
        """The result of an execution is kept elsewhere or unwanted."""
        ...

    def keep(self, order: ev.Keep) -> None:
        """Store an accepted result so that its node may forget it. Quick; raises `ContentError` and `OSError`."""
        ...

    async def seal(self, order: ev.Seal) -> ev.JobSealed:
        """Store the root over a job's records, and publish it where that is asked for."""
        ...


class Trade(Protocol):
    """What a node on a network does with others: each call is one task of the engine."""

    async def vet(self, requester: NodeId, offer: Offer) -> Refusal | None:
        """Why the owner of this node does not want a job of another node; None if it may be taken."""
        ...

    async def pack(self, to: NodeId, offer: Offer) -> tuple[Offer, list[ev.OfferFailed]]:
        """The offer with everything that another node needs, and the executions that can't be offered."""
        ...

    async def collect(self, sender: NodeId, proposal: Propose) -> ev.ResultMissing | None:
        """Bring the result that another node proposes here, and check it; None when all is well."""
        ...
