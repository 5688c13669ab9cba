"""The one tree of errors: the class says who has to act.

Every message says what happened, with the values, and then what to do. Callers catch the
leaves; `BacalhauError` itself is only for the boundaries that show an error to a person.
"""

from __future__ import annotations


class BacalhauError(Exception):
    """Base of every error this package raises on purpose. Never raised itself."""


class SpecError(BacalhauError):
    """The cell or its options are wrong: the author of the job has to change them."""


class JobFailed(BacalhauError):
    """The job ran and some of its shards failed; what finished is kept."""


class NoCapacity(BacalhauError):
    """No known node can ever run the job; the text lists each node's reason."""


class NodeUnreachable(BacalhauError):
    """The node that was asked does not answer."""


class ContentError(BacalhauError):
    """Data is missing, changed, unreadable, or does not match its CID."""


class ProtocolError(BacalhauError):
    """A peer sent something that the protocol does not allow: the peer is at fault."""


class BugError(BacalhauError):
    """This package broke its own rules. `story` tells what happened to the record before."""

    def __init__(self, message: str, *, story: tuple[str, ...] = ()) -> None:
        text = "\n".join((message, *(f"  {line}" for line in story)))
        super().__init__(f"{text}\nThis is a bug in bacalhau-jupyter: please report it with the text above.")
        self.story = story
