"""`--publish store`: the result stays where every result is, in the content store of its requester."""

from __future__ import annotations

from bacalhau_node.ids import JobId


class StorePublisher:
    """`ports.Publisher` of what is published already."""

    def claims(self, target: str) -> bool:
        """Whether `target` is the store."""
        return target == "store"

    async def check(self, target: str) -> None:
        """Nothing can be in the way."""

    async def publish(self, job: JobId, root: str, target: str) -> tuple[str, ...]:
        """The result is there, and nowhere else."""
        del job, root, target  # nothing is left to do with them
        return ()
