"""Who may ask a node for what.

Theory of operation. Every request but `/health` and `/ready` carries a key (`Authorization: Bearer …`); what the
`gateway` gives is also had with a capability. Only hashes of keys are held and compared, all of them, in constant
time. A node on loopback has one key of its own, which lies in a file that only its user can read. Keys for others
come from a file with a line for each: a role, the sha256 of the key in hex, a name. `admin` is the node's owner;
`submit` sees and cancels the jobs of that name and no others. Content is open to every key: who names a CID was
told it, as a link that is listed nowhere.

No browser page is ever a client, so whatever a browser adds to requests from pages (`Origin`, `Sec-Fetch-Site`)
is refused, and a node on loopback answers only to loopback names: a page of a site that points its own name
at 127.0.0.1 (DNS rebinding) sends the wrong `Host`.
"""

from __future__ import annotations

import hmac
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Literal

from bacalhau_node.errors import SpecError

LOOPBACK = frozenset(("localhost", "127.0.0.1", "::1"))


@dataclass(frozen=True)
class Caller:
    """Who asks."""

    name: str
    role: Literal["submit", "admin"]

    def sees(self, owner: str) -> bool:
        """Whether a job of `owner` exists for this caller."""
        return self.role == "admin" or owner == self.name


OWNER = Caller("owner", "admin")


class Keys:
    """The keys that open a node."""

    def __init__(self, entries: Iterable[tuple[bytes, Caller]]) -> None:
        self._entries = tuple(entries)

    def caller(self, authorization: str | None) -> Caller | None:
        """Whose key this header carries; None for no key, or one that opens nothing."""
        if not (key := bearer(authorization)):
            return None
        digest = sha256(key.encode("utf-8", "surrogateescape")).digest()
        found = None
        for known, caller in self._entries:
            if hmac.compare_digest(known, digest):
                found = caller
        return found


def bearer(authorization: str | None) -> str:
    """The key or capability in a header `Authorization: Bearer …`, "" if there is none."""
    scheme, _, key = (authorization or "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""


def own_key(token: str) -> tuple[bytes, Caller]:
    """The entry of the node's own token."""
    return sha256(token.encode()).digest(), OWNER


def read_keys(path: Path) -> list[tuple[bytes, Caller]]:
    """The entries of a file of keys; raises `SpecError` naming the line that is wrong."""
    try:
        text, mode = path.read_text(encoding="utf-8"), path.stat().st_mode
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"--keys {path} can't be read: {error}") from error
    if mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise SpecError(f"--keys {path}: others may write to it, and so let themselves in: chmod 600 {path}")
    lines = [(number, line.split()) for number, line in enumerate(text.splitlines(), 1)]
    entries = [_entry(path, number, words) for number, words in lines if words and not words[0].startswith("#")]
    if not entries:
        raise SpecError(f"--keys {path} holds no key; a line is: submit|admin SHA256 NAME")
    return entries


def _entry(path: Path, number: int, words: list[str]) -> tuple[bytes, Caller]:
    match words:
        case [("submit" | "admin") as role, digest, name] if len(digest) == 64 and not set(digest) - set(
            "0123456789abcdef"
        ):
            return bytes.fromhex(digest), Caller(name, "admin" if role == "admin" else "submit")
        case _:
            raise SpecError(
                f"--keys {path}, line {number}: not a key; a line is: submit|admin SHA256 NAME,"
                " with the hash in lower-case hex as `printf %s KEY | sha256sum` prints it"
            )


def foreign(headers: Mapping[str, str], *, loopback: bool) -> str | None:
    """Why a request comes from where none may come from; None if it doesn't."""
    if "Origin" in headers or headers.get("Sec-Fetch-Site", "none") != "none":
        return "this API is for programs: requests of web pages are refused"
    host = headers.get("Host", "")
    if loopback and _name(host) not in LOOPBACK:
        return f"this node is called localhost or 127.0.0.1, not {host[:100]!r}"
    return None


def _name(host: str) -> str:
    """A `Host` header without its port."""
    name, colon, port = host.rpartition(":")
    if not colon or not port.isdecimal():
        name = host
    return name[1:-1] if name.startswith("[") and name.endswith("]") else name
