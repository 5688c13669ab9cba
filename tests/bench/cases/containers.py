"""A hundred trivial shards in containers, over `docker run` in a loop."""

from __future__ import annotations

from tests.bench import containers, ours
from tests.bench.harness import Figure, at_least, at_most, in_turn, seconds_of

TITLE = "100 shards in containers"
EXECUTORS = ("docker",)
COUNT = 100
SAMPLE = 12
"""`docker run`s that are really made: a hundred would take half a minute."""


def answers() -> None:
    """Our hundred shards, with all of their values at the caller."""
    values = ours.run_job("shard.index", shards=COUNT, isolation="container").result().values()
    assert list(values) == list(range(COUNT)), values


def run(_: str) -> list[Figure]:
    """Ours five times, the loop once."""
    ours.warm()
    seconds = in_turn({"ours": answers}, times=5)["ours"]
    with containers.image() as image:
        containers.docker_run(image)
        loop = seconds_of(lambda: containers.docker_loop(image, SAMPLE)) * COUNT / SAMPLE
    beside = f"`docker run` loop, two at a time {loop:.1f} s (from {SAMPLE})"
    what = "100 trivial shards in containers"
    return [
        Figure(what=what, ours=f"{seconds:.2f} s", beside=beside, measured=seconds, goal=at_most(1, "s")),
        Figure(
            what=f"{what}, as a ratio",
            ours=f"{seconds:.2f} s",
            beside=beside,
            measured=loop / seconds,
            goal=at_least(18, "× faster"),
        ),
    ]
