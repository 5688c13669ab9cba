"""What happens to attempts while bytes move between nodes, outside of the machine.

An offer to another node is packed before it is sent, and a result of another node is fetched before its proposal is
looked at. Both take time, and both may fail: here is what that means.
"""

from __future__ import annotations

from bacalhau_node.ids import Execution
from bacalhau_node.messages import Outcome, Reject
from bacalhau_node.protocol.book import Book
from bacalhau_node.protocol.events import OfferFailed, OfferPacked, OfferUnsent, ResultComing, ResultMissing
from bacalhau_node.protocol.records import Attempt, Ended

Moved = OfferPacked | OfferFailed | OfferUnsent | ResultComing | ResultMissing


def step(book: Book, event: Moved) -> None:
    """Change the attempts that the event is about; of those that are not live nothing changes."""
    match event:
        case OfferPacked():
            for attempt in _live(book, event.executions):
                _packed(book, attempt)
        case OfferFailed():
            for attempt in _live(book, (event.execution,)):
                failure = Outcome(ok=False, exit_code=1, error=event.error)
                book.fail(attempt.job, attempt.shard, Ended(attempt.execution, attempt.node.id, failure))
        case OfferUnsent():
            for attempt in _live(book, event.executions):
                book.unsent(attempt, event.reason)
        case ResultComing():
            attempt_or_not = book.verdict(event.node, event.execution)
            if isinstance(attempt_or_not, Attempt):
                attempt_or_not.coming = True
        case ResultMissing():
            _missing(book, event)


def _live(book: Book, executions: tuple[Execution, ...]) -> list[Attempt]:
    """The attempts of those of these executions that are live."""
    found = [job.live.get(one) for one in executions if (job := book.jobs.get(one.job)) is not None]
    return [attempt for attempt in found if attempt is not None]


def _packed(book: Book, attempt: Attempt) -> None:
    """The offer is on its way: the lease begins. An offer that is sent once more begins no new one."""
    if attempt.packing:
        attempt.packing = False
        attempt.heard = attempt.offered = attempt.since = book.now


def _missing(book: Book, event: ResultMissing) -> None:
    if event.lied:
        book.placement.distrust(event.node)
        book.send(event.node, Reject(event.execution, event.reason))
    attempt = book.verdict(event.node, event.execution)
    if isinstance(attempt, Attempt):
        attempt.coming = False
        book.lose(attempt, f"the result of node {event.node} did not come: {event.reason}")
