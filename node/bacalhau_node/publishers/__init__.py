"""Where results go: which publisher a target is for, and how often it is tried.

A result is sealed, pinned in the store and owed to nobody before it is published, so a target that fails can't
lose it: after some tries the job ends as it would have, and its reason says what was not published and why. What is
interrupted (the node stops) is published again when the job goes on: every publisher may be asked twice.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Final

from bacalhau_node.errors import BacalhauError, SpecError
from bacalhau_node.ids import JobId
from bacalhau_node.ports import Publisher

log = logging.getLogger(__name__)

PAUSES: Final = (0.5, 2.0, 8.0)
"""Seconds before each further try (guesses): a server that is restarted is waited for, a night is not."""

FORMS: Final = (
    ("store", "store"),
    ("s3://bucket", "s3://BUCKET/PREFIX"),
    ("gs://bucket", "gs://BUCKET/PREFIX"),
    ("az://container", "az://CONTAINER/PREFIX"),
    ("ipfs", "ipfs"),
    ("filecoin", "filecoin"),
)
"""(a target, how such targets are written), for telling people what there is."""


def publisher_for(publishers: Sequence[Publisher], target: str) -> Publisher:
    """The first publisher that claims `target`; raises `SpecError` that lists what there is."""
    for publisher in publishers:
        if publisher.claims(target):
            return publisher
    known = [form for example, form in FORMS if any(one.claims(example) for one in publishers)]
    raise SpecError(f"--publish {target}: this node publishes to {', '.join(known)}; local:DIR is for the client")


async def publish(publishers: Sequence[Publisher], job: JobId, root: str, target: str) -> tuple[tuple[str, ...], str]:
    """(where the result `root` lies now, why it does not): the second is "" when all went well.

    Errors of the job's author (`SpecError`: no such bucket, no credentials) are not tried again.
    """
    pauses = iter(PAUSES)
    while True:
        try:
            return await publisher_for(publishers, target).publish(job, root, target), ""
        except (BacalhauError, OSError) as error:
            log.warning("a result was not published", extra={"job": job, "target": target, "error": str(error)})
            pause = None if isinstance(error, SpecError) else next(pauses, None)
            if pause is None:
                return (), f"kept in the store, but not published to {target}: {error}"
        except Exception:  # the boundary of a task of the engine: a job has to end, whatever a server's answer sets off
            log.exception("a result was not published", extra={"job": job, "target": target})
            return (), f"kept in the store, but not published to {target}: this node's log says why"
        await asyncio.sleep(pause)
