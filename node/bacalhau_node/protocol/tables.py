"""Which state may follow which: of a shard at the requester, of an execution at a compute node, of a node in a view.

The machines change the state of a record in one place, by these tables. A pair that is not in
the table is a bug of this package, and the error carries what happened to the record before. What
*peers* send out of turn never gets here: the machines drop it first, by the execution it names.

`python -m bacalhau_node.protocol.tables` prints the tables as Mermaid diagrams.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from bacalhau_node.errors import BugError

Table = Mapping[str, Mapping[str, str]]
Story = tuple[tuple[float, str, str], ...]
"""What happened to a record: (when, verb, detail), oldest first, the last `STORY_LENGTH` of it."""

STORY_LENGTH: Final = 8
"""Two whole attempts (offer, take, start, return); memory is bounded for 100,000 shards."""

SHARD: Final[Table] = {
    "waiting": {"offer": "offered", "accept": "accepted", "fail": "failed", "stop": "stopped"},
    "offered": {
        "take": "taken",
        "accept": "accepted",
        "return": "waiting",
        "fail": "failed",
        "stop": "stopped",
    },
    "taken": {"start": "running", "accept": "accepted", "return": "waiting", "fail": "failed", "stop": "stopped"},
    "running": {"accept": "accepted", "return": "waiting", "fail": "failed", "stop": "stopped"},
    "accepted": {"keep": "kept", "fail": "failed"},
    "kept": {},
    "failed": {},
    "stopped": {},
}
"""A shard at the requester: as far as its most advanced live attempt is. `return`: that one was refused, given
back, lost, or is to be repeated. `accept` and `fail` while waiting: by a late result of a lost attempt.
`accepted` holds a result or a final failure until it is stored."""

EXECUTION: Final[Table] = {
    "taken": {"start": "running", "end": "proposed", "drop": "over"},
    "running": {"end": "proposed", "drop": "over"},
    "proposed": {"accept": "accepted", "drop": "over"},
    "accepted": {"drop": "over"},
    "over": {},
}
"""An execution at a compute node. `drop`: kept elsewhere, rejected, cancelled, recalled or orphaned."""

MEMBER: Final[Table] = {
    "known": {"link": "neighbour", "fail": "suspect", "leave": "left", "fade": "forgotten", "evict": "forgotten"},
    "neighbour": {"part": "known", "lose": "suspect", "leave": "left"},
    "suspect": {"hear": "known", "link": "neighbour", "die": "dead", "leave": "left", "fade": "forgotten"},
    "dead": {"hear": "known", "rumour": "suspect", "leave": "left", "expire": "forgotten"},
    "left": {"hear": "known", "link": "neighbour", "expire": "forgotten"},
    "forgotten": {},
}
"""Another node, in a node's view. `link`, `part`: both agreed to be neighbours, or one has enough. `lose`: its link
broke, or it answers nothing; `fail`: it could not be reached; `hear`: it has made a record since, or it has a link;
`rumour`: it has made one at about that time; `die`: nobody opened for a while; `fade`: its record is too old; `expire`:
that can't come back any more; `evict`: the view is full. A forgotten node may be met again, as a new one."""

DIAGRAMS: Final[Mapping[str, tuple[str, Table]]] = {
    "A shard, at the requester": ("waiting", SHARD),
    "An execution, at a compute node": ("taken", EXECUTION),
    "Another node, in a view": ("known", MEMBER),
}


def illegal(what: str, state: str, verb: str, story: Story) -> BugError:
    """The error for a pair that is not in the tables."""
    return BugError(f"{what} is {state}: {verb!r} can't happen to it", story=told(story))


def remember(story: Story, now: float, verb: str, detail: str = "") -> Story:
    """The story with one more line, without its oldest ones."""
    return (*story[1 - STORY_LENGTH :], (now, verb, detail))


def told(story: Story) -> tuple[str, ...]:
    """The story as lines of text."""
    return tuple(f"{now:.3f} {verb} {detail}".rstrip() for now, verb, detail in story)


def mermaid() -> str:
    """Every table as a titled Mermaid state diagram, as ARCHITECTURE.md shows them."""
    return "\n\n".join(f"{title}:\n\n{_diagram(first, table)}" for title, (first, table) in DIAGRAMS.items())


def _diagram(first: str, table: Table) -> str:
    arrows = [f"    [*] --> {first}"]
    for state, verbs in table.items():
        ends: dict[str, list[str]] = {}
        for verb, after in verbs.items():
            ends.setdefault(after, []).append(verb)
        arrows += [f"    {state} --> {after}: {', '.join(names)}" for after, names in ends.items()]
        if not verbs:
            arrows.append(f"    {state} --> [*]")
    return "\n".join(("```mermaid", "stateDiagram-v2", *arrows, "```"))


if __name__ == "__main__":
    print(mermaid())  # noqa: T201 - printing is what this entry point is for
