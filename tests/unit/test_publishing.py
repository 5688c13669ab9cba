"""Which publisher a target is for, and what happens when it fails."""

from __future__ import annotations

import pytest

from bacalhau_node import publishers
from bacalhau_node.errors import BacalhauError, ContentError, NodeUnreachable, SpecError
from bacalhau_node.publishers import publish, publisher_for
from bacalhau_node.publishers.store import StorePublisher
from bacalhau_node.testing.builders import a_job_id


class Bucket:
    """Publishes to s3:// after as many failures as it was given."""

    def __init__(self, *errors: BacalhauError | OSError) -> None:
        self.errors = list(errors)
        self.asked = 0

    def claims(self, target: str) -> bool:
        return target.startswith("s3://")

    async def check(self, target: str) -> None:
        pass

    async def publish(self, job: str, root: str, target: str) -> tuple[str, ...]:
        self.asked += 1
        if self.errors:
            raise self.errors.pop(0)
        return (f"{target}/{root}",)


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publishers, "PAUSES", (0.0, 0.0, 0.0))


def test_an_unknown_target_is_told_with_those_that_there_are() -> None:
    known = (StorePublisher(), Bucket())
    assert publisher_for(known, "s3://b/p") is known[1]
    with pytest.raises(SpecError, match="this node publishes to store, s3://BUCKET/PREFIX; local:DIR"):
        publisher_for(known, "ipfs")


async def test_the_store_has_every_result_already() -> None:
    assert await publish((StorePublisher(),), a_job_id(), "cid", "store") == ((), "")


@pytest.mark.parametrize("error", [ContentError("no room"), NodeUnreachable("away"), OSError("reset")])
async def test_what_fails_for_a_while_is_published_in_the_end(error: BacalhauError | OSError) -> None:
    bucket = Bucket(error, error, error)
    assert await publish((bucket,), a_job_id(), "cid", "s3://b") == (("s3://b/cid",), "")


async def test_what_goes_on_failing_is_told_and_kept() -> None:
    bucket = Bucket(*[NodeUnreachable("nobody answers at b")] * 9)
    published, problem = await publish((bucket,), a_job_id(), "cid", "s3://b")
    assert (published, bucket.asked) == ((), 4)
    assert problem == "kept in the store, but not published to s3://b: nobody answers at b"


async def test_a_mistake_of_the_author_is_not_tried_again() -> None:
    bucket = Bucket(SpecError("there is no bucket b"))
    _, problem = await publish((bucket,), a_job_id(), "cid", "s3://b")
    assert bucket.asked == 1
    assert problem.endswith("there is no bucket b")


async def test_a_fault_that_nobody_foresaw_ends_the_job_as_well() -> None:
    """Else it would be at publishing for ever."""
    bucket = Bucket(KeyError("what a server should not have left out"))  # type: ignore[arg-type]
    published, problem = await publish((bucket,), a_job_id(), "cid", "s3://b")
    assert (published, bucket.asked) == ((), 1)
    assert problem == "kept in the store, but not published to s3://b: this node's log says why"
