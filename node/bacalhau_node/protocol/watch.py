"""What the requester does as time passes: silent nodes, work that never starts, slow shards, queues beside idle nodes.

Theory of operation. Two timers of a job come here, each as long as it is needed. The **lease** timer
gives up attempts whose node is silent, or has taken them and does not begin, or goes on long
after the shard's own time is over; an offer without an answer is sent again.

The **watch** timer runs while every shard of the job is on some node and there are several nodes. When
some of them have room that no job can fill, it moves work there:

- **Recall.** What a node has taken and not started waits behind its slots. The longest such queue gives
  half of itself, and no more than there is room elsewhere; so a fast node that runs dry takes from a slow one
  again and again, and the end comes for both at once. The node answers with a refusal for what
  it had not started, and that goes to others first.
- **A second try.** A shard gets one more attempt, on a node that has not tried it, when its node was dialled in vain
  (its link broke), when its node took it and begins nothing, or when half of the job is done and it has been at work
  for longer than `SLOW` times the median of those. The first end counts, the other attempt is cancelled: so a link
  that broke for a moment costs no attempt. It is made once for each shard.
"""

from __future__ import annotations

from typing import Final

from bacalhau_node.messages import Recall
from bacalhau_node.protocol.book import Book
from bacalhau_node.protocol.placement import LEASE
from bacalhau_node.protocol.records import Attempt, Job, Node

LEASE_CHECK: Final = LEASE / 3
"""How often leases are looked at, and after how long an unanswered offer or recall is sent again."""

NEVER_STARTS: Final = 600.0
"""Seconds after which what was taken counts as lost if nothing of ours runs there: an environment may take minutes."""

LATE_START: Final = 30.0
"""Seconds after which what was taken is tried elsewhere besides, if nothing of ours runs there (a guess)."""

OVERTIME: Final = 60.0
"""Seconds beyond `--timeout` after which a node is not believed any more (a guess)."""

WATCH: Final = 1.0
"""Seconds between two looks for slow shards and queues (a guess)."""

SLOW: Final = 2.0
SLOW_AT_LEAST: Final = 5.0
"""A shard is slow after so many times the median of those that are done, and so many seconds (guesses)."""


def check_leases(book: Book, job: Job) -> None:
    """Give up what is lost, and offer again what was not answered."""
    now = book.now
    for attempt in list(job.live.values()):
        if attempt.packing:
            continue
        if now - attempt.heard >= LEASE:
            book.lose(attempt, f"node {attempt.node.id} was silent for {LEASE:g} seconds")
        elif (why := _stuck(attempt, now)) is not None:
            book.lose(attempt, f"node {attempt.node.id} {why}")
        elif attempt.phase == "offered" and now - attempt.offered >= LEASE_CHECK and attempt.execution in job.live:
            book.send_offer(attempt)


def needed(book: Book, job: Job) -> bool:
    """Whether the watch timer is needed."""
    return bool(job.live) and not job.wanting and len(book.placement.nodes) > 1


def watch(book: Book, job: Job) -> None:
    """Move work to where there is room."""
    if job.wanting:
        return
    room = {node.id: node.room for node in book.placement.idle() if not (node.distrusted or job.excludes(node.id))}
    if room:
        _try_again(book, job, room)
        _recall(book, job, room)


def unreached(book: Book, node: Node) -> None:
    """Try elsewhere what a node has that was dialled in vain; where others have no room, `watch` does it later."""
    node.suspect, node.room = True, 0
    for job in {attempt.job.id: attempt.job for attempt in node.live.values()}.values():
        watch(book, job)


def _stuck(attempt: Attempt, now: float) -> str | None:
    """What is wrong with an attempt whose node is alive."""
    if attempt.coming:
        return None
    timeout, past = attempt.job.spec.timeout, now - attempt.since
    if attempt.phase == "running" and timeout is not None and past >= timeout + OVERTIME:
        return f"did not end it {OVERTIME:g} seconds after its time of {timeout:g} seconds was over"
    if attempt.phase == "taken" and past >= NEVER_STARTS and not _runs_something(attempt.node):
        return f"took it and did not start it for {NEVER_STARTS:g} seconds"
    return None


def _runs_something(node: Node) -> bool:
    return any(attempt.phase == "running" for attempt in node.live.values())


def _try_again(book: Book, job: Job, room: dict[str, int]) -> None:
    limit = _limit(job)
    for attempt in list(job.live.values()):
        late = attempt.node.suspect or _never_begins(book, attempt) or _is_slow(book, attempt, limit)
        if late and not (attempt.packing or attempt.coming or attempt.shard.extra) and job.free:
            _second(book, job, attempt, room)


def _never_begins(book: Book, attempt: Attempt) -> bool:
    """Whether a node took it and does not begin, though it says that it is at work."""
    waits = attempt.phase == "taken" and book.now - attempt.since > LATE_START
    return waits and not _runs_something(attempt.node)


def _is_slow(book: Book, attempt: Attempt, limit: float) -> bool:
    return 0 < limit < book.now - attempt.since and attempt.phase != "offered"


def _limit(job: Job) -> float:
    """The seconds after which a shard is slow; 0 while too few are done."""
    if 2 * len(job.seconds) < min(len(job.shards), job.seconds.maxlen or 0):
        return 0.0
    durations = sorted(job.seconds)
    return max(SLOW * durations[len(durations) // 2], SLOW_AT_LEAST) if durations else 0.0


def _second(book: Book, job: Job, attempt: Attempt, room: dict[str, int]) -> None:
    """One more attempt of a shard, on an idle node that has not tried it."""
    shard = attempt.shard
    for name, left in room.items():
        node = book.placement.nodes[name]
        if left and not shard.had(name):
            room[name] -= 1
            node.room -= 1
            shard.extra = True
            book.offer(node, job, shard)
            return


def _recall(book: Book, job: Job, room: dict[str, int]) -> None:
    queues: dict[str, list[Attempt]] = {}
    for attempt in job.live.values():
        waits = attempt.phase == "taken" and not attempt.coming
        if waits and book.now - max(attempt.since, attempt.recalled or 0.0) >= WATCH:
            queues.setdefault(attempt.node.id, []).append(attempt)
    for name, queue in sorted(queues.items(), key=lambda one: -len(one[1])):
        elsewhere = sum(left for other, left in room.items() if other != name)
        back = queue[-min(elsewhere, (len(queue) + 1) // 2) :] if elsewhere and _runs_something(queue[0].node) else []
        if not back:
            continue
        _take_from(room, len(back), but=name)
        for attempt in back:
            attempt.recalled = book.now
        book.send(name, Recall(tuple(attempt.execution for attempt in back)))


def _take_from(room: dict[str, int], count: int, *, but: str) -> None:
    for name, left in room.items():
        if name != but:
            room[name] = left - min(count, left)
            count -= min(count, left)
