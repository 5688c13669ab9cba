"""Who may have which content: bearer capabilities of jobs, and what is public.

A token is a random text that stands for the right to fetch some roots with everything below them. It is made for
one job, travels in the job's offers, and is forgotten with the job. Whoever has neither
a token nor a key of the API gets only what the owner of this node published.
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Iterable, Sequence
from hashlib import sha256

from bacalhau_node.cid import Cid

_BYTES = 32


def new_token() -> str:
    """A token that nobody can guess: 256 bits in 43 characters that need no quoting."""
    return secrets.token_urlsafe(_BYTES)


class Grants:
    """What each token opens. Roots are CIDs; both versions of one count as the same.

    The codec is a part of the name: bytes that somebody chose, read as something else, would link to what they like.
    """

    def __init__(self) -> None:
        self._opened: dict[bytes, set[bytes]] = {}
        self._public: Counter[Cid] = Counter()

    def open(self, token: str, roots: Iterable[str]) -> None:
        """Add roots to what this token opens; raises `SpecError` for what is no CID."""
        named = {Cid.parse(root).v1().binary for root in roots}
        self._opened.setdefault(_key(token), set()).update(named)

    def close(self, token: str) -> None:
        """The token opens nothing any more; nothing happens when it never did."""
        self._opened.pop(_key(token), None)

    def publish(self, root: str) -> None:
        """Open a root to everybody; counted."""
        self._public[Cid.parse(root).v1()] += 1

    def withdraw(self, root: str) -> None:
        """Take one `publish` back; nothing happens when there was none."""
        cid = Cid.parse(root).v1()
        self._public[cid] -= 1
        if self._public[cid] <= 0:
            del self._public[cid]

    def allows(self, token: str | None, root: Cid) -> bool:
        """Whether somebody with this token, or without one, may have `root` and everything below it."""
        if root.v1() in self._public:
            return True
        return token is not None and root.v1().binary in self._opened.get(_key(token), ())

    def public(self) -> Sequence[Cid]:
        """The roots that are open to everybody."""
        return list(self._public)


def _key(token: str) -> bytes:
    """Tokens are looked up by hash: how long that takes tells nothing about those that there are."""
    return sha256(token.encode("utf-8", "surrogateescape")).digest()
