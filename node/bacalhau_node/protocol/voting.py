"""Which of several ends of a shard counts (`--replicas C --agree K`).

Every execution that ended, and is not to be repeated, is a **vote**: for its answer when it was
good, else for failing with an error of this kind and name. The first K equal votes decide, and
the earliest of them is the one end that counts. Until then nobody but the requester sees any of them.
A node that ran the shard several times, because there are not enough others, has several votes as long as
all votes are equal; as soon as somebody contradicts, it has one.

C executions are started, on different nodes where possible. When C votes don't hold K equal
ones, as many more are wanted as could still make them, up to `EXTRA_VOTES` beyond C; then the shard
has failed. A node whose vote was against what was accepted has **disagreed**: for another answer,
or because the cell itself failed there. Failures that depend on the machine (memory, time, disk, an
input that can't be read) don't count as disagreeing.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from bacalhau_node.ids import NodeId
from bacalhau_node.messages import Outcome, ShardError
from bacalhau_node.protocol.records import Ended, Shard
from bacalhau_node.spec import JobSpec

EXTRA_VOTES: Final = 2
"""Executions beyond `--replicas` that a shard may have to find equal answers (a guess)."""

MAX_LOST: Final = 3
"""Attempts that may be lost with their nodes before the shard fails, for each of its replicas (DESIGN section 5).

Offers that nobody answered don't count while there are other nodes: when a hundred of a thousand nodes had died, two of
120 simulated jobs met three of them in a row.
"""

MAX_KILLED: Final = 2
"""Attempts that a signal may kill before the shard fails: one repeat (DESIGN section 5)."""

Ballot = tuple[str, ...]

_OF_THE_CELL: Final = frozenset(("exception", "exit"))
"""Errors that every node should have alike."""


def repeats(shard: Shard, outcome: Outcome, spec: JobSpec) -> bool:
    """Whether an attempt that failed is repeated; counts it by the kind of its error (DESIGN section 5)."""
    kind = outcome.error.kind if outcome.error else "exit"
    if kind == "node":
        shard.lost += 1
        return shard.lost < MAX_LOST * spec.replicas
    if kind == "signal":
        shard.killed += 1
        return shard.killed < MAX_KILLED
    shard.failed += 1
    return kind != "memory" and shard.failed <= spec.retries


def ballot(outcome: Outcome) -> Ballot:
    """What an outcome votes for: equal ballots agree."""
    if outcome.ok:
        return ("answer", outcome.answer)
    return ("error", outcome.error.kind, outcome.error.name) if outcome.error else ("error",)


def winner(votes: Iterable[Ended], *, agree: int) -> Ended | None:
    """The earliest of `agree` equal votes, if there are so many."""
    groups = _grouped(votes)
    return next((equal[0] for equal in groups.values() if _weight(equal, alone=len(groups) == 1) >= agree), None)


def missing(votes: tuple[Ended, ...], spec: JobSpec) -> int:
    """How many more votes are wanted, none of `votes` having won; 0: there is no hope any more."""
    if len(votes) < spec.replicas:
        return spec.replicas - len(votes)
    groups = _grouped(votes)
    more = spec.agree - max(_weight(equal, alone=len(groups) == 1) for equal in groups.values())
    return more if len(votes) + more <= spec.replicas + EXTRA_VOTES else 0


def disagreed(votes: Iterable[Ended], chosen: Ended) -> tuple[NodeId, ...]:
    """The nodes that voted against the good answer `chosen`, each once, in the order of their votes."""
    if not chosen.outcome.ok:
        return ()
    against = [vote.node for vote in votes if vote.node != chosen.node and _against(vote.outcome, chosen.outcome)]
    return tuple(dict.fromkeys(against))


def undecided(votes: tuple[Ended, ...], spec: JobSpec) -> ShardError:
    """The error of a shard whose executions didn't agree."""
    groups = _grouped(votes)
    told = "; ".join(f"{' and '.join(vote.node for vote in equal)}: {_told(key)}" for key, equal in groups.items())
    gave = f"{len(votes)} executions gave {len(groups)} different answers" if len(votes) > 1 else "one execution ended"
    return ShardError("node", name="Disagreement", message=f"{gave}, and {spec.agree} equal ones are needed: {told}")


def _grouped(votes: Iterable[Ended]) -> dict[Ballot, list[Ended]]:
    groups: dict[Ballot, list[Ended]] = {}
    for vote in votes:
        groups.setdefault(ballot(vote.outcome), []).append(vote)
    return groups


def _weight(equal: list[Ended], *, alone: bool) -> int:
    return len(equal) if alone else len({vote.node for vote in equal})


def _against(outcome: Outcome, chosen: Outcome) -> bool:
    if outcome.ok:
        return outcome.answer != chosen.answer
    return outcome.error is not None and outcome.error.kind in _OF_THE_CELL


def _told(key: Ballot) -> str:
    what, *rest = key
    return f"answer {rest[0]}" if what == "answer" else " ".join(filter(None, ("failed:", *rest)))
