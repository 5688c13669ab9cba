"""What people type for sizes, times, counts and inputs, read once for the magic and the command line. Pure.

Every function raises `SpecError` with the text that belongs after the option and its value:
what is wrong, then what would be right.
"""

from __future__ import annotations

import difflib
import ipaddress
import re
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from bacalhau_node.errors import SpecError
from bacalhau_node.spec import InputSource

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable

_POWERS = "kmgtp"
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?(?:([kmgtp]?)(i?)b)?", re.IGNORECASE)
_NUMBER = r"([0-9]+(?:\.[0-9]+)?)"
_TIME = re.compile("".join(rf"(?:{_NUMBER}{unit})?" for unit in ("d", "h", "m(?!s)", "s", "ms")))
_TIME_UNITS = (86_400.0, 3_600.0, 60.0, 1.0, 0.001)
_LONGEST = 366 * 86_400.0
"""No job of a notebook lasts a year: longer is a slip of the keyboard."""
_LARGEST = 10**18
_CID = re.compile(r"(?:Qm[1-9A-HJ-NP-Za-km-z]{44}|b[a-z2-7]{50,}|z[1-9A-HJ-NP-Za-km-z]{44,})(?:/.*)?", re.DOTALL)
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
SCHEMES = ("ipfs", "http", "https", "s3", "gs", "az")
"""What an input from elsewhere begins with."""


BUCKETS = SCHEMES[3:]
TARGETS = ("store", "ipfs", "filecoin")
LOCAL = "local:"

ELSEWHERE = {
    "--in": "--vars",
    "--concurrency": "--replicas",
    "--count": "--replicas",
    "--confidence": "--agree",
    "--input-urls": "--input",
    "--input-volumes": "--input",
    "--sharding-glob-pattern": "--glob",
    "--sharding-batch-size": "--batch-size",
}
"""Options that people bring along (upstream's, an older draft's) and what they are called here."""

_ABBREVIATION = 4
"""Characters, dashes included, from which a word may be the beginning of the one that was meant."""


def size(text: str) -> int:
    """Bytes: `64MB` (decimal), `1.5GiB` (binary) or a plain number; letters in any case."""
    match = _SIZE.fullmatch(text)
    if not match or (match[3] and not match[2]):
        raise SpecError("not a size; write 500MB, 1.5GiB or a number of bytes")
    factor = (1024 if match[3] else 1000) ** (_POWERS.index(match[2].lower()) + 1) if match[2] else 1
    value = float(match[1]) * factor
    if not 1 <= value <= _LARGEST:
        raise SpecError("a size between 1 byte and 1000 PB is needed")
    return round(value)


def size_text(count: int) -> str:
    """Bytes for people, decimal as they are typed: 300_000_000 is `300 MB`."""
    value, unit = float(count), "bytes"
    for larger in ("kB", "MB", "GB", "TB", "PB", "EB"):
        if value < 999.5:
            break
        value, unit = value / 1000, larger
    return f"{value:.3g} {unit}"


def inert(text: str) -> str:
    """`text` on one line, with every character escaped that ends a line, acts on a terminal or hides others."""
    return "".join(one if one.isprintable() else ascii(one)[1:-1] for one in text)


def seconds(text: str) -> float:
    """Seconds: `90`, `10m`, `1h30m`, `500ms`."""
    match = _TIME.fullmatch(text) if text else None
    if match:
        value = sum(float(part) * unit for part, unit in zip(match.groups(), _TIME_UNITS, strict=True) if part)
    elif re.fullmatch(_NUMBER, text):
        value = float(text)
    else:
        raise SpecError("not a time; write 90 (seconds), 10m, 1h30m or 500ms")
    if not 0 < value <= _LONGEST:
        raise SpecError("a time above 0 and up to a year is needed")
    return value


def count(text: str, *, low: int = 1, high: int = 1_000_000) -> int:
    """A whole number from `low` to `high`."""
    if not re.fullmatch(r"[+-]?[0-9]+", text):
        raise SpecError("not a whole number")
    value = int(text) if len(text) < 20 else (low - 1 if text.startswith("-") else high + 1)
    if value < low:
        raise SpecError(f"at least {low} is needed")
    if value > high:
        raise SpecError(f"at most {high} is possible")
    return value


def cores(text: str) -> float:
    """A number of CPU cores, fractions allowed."""
    if not re.fullmatch(_NUMBER, text):
        raise SpecError("not a number of cores; write 2 or 0.5")
    value = float(text)
    if not 0.01 <= value <= 4096:
        raise SpecError("between 0.01 and 4096 cores are possible")
    return value


def pair(text: str) -> tuple[str, str]:
    """`KEY=VALUE`; the value may hold anything, `=` included."""
    key, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_.-]*", key):
        raise SpecError("write KEY=VALUE, the key of letters, digits and '_'")
    return key, value


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def node_url(text: str) -> str:
    """The URL of a node: `http://127.0.0.1:1234`, `https://host:1234`, `localhost:1234`.

    Beyond this machine only https: a key must not be read on the way.
    """
    parts = urlsplit(text if "://" in text else f"//{text}")
    try:
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise SpecError(f"{text!r} is not the address of a node: {error}") from error
    scheme = parts.scheme or ("http" if host and is_loopback(host) else "https")
    if not host or scheme not in {"http", "https"} or parts.query or parts.fragment or parts.username:
        raise SpecError(f"{text!r} is not the address of a node: write http://127.0.0.1:1234 or https://host:1234")
    if scheme == "http" and not is_loopback(host):
        raise SpecError(f"{text}: over http:// your key and data could be read on the way; use https://")
    name = f"[{host}]" if ":" in host else host
    return f"{scheme}://{name}{f':{port}' if port else ''}{parts.path.rstrip('/')}"


def nearest(text: str, allowed: Iterable[str]) -> str:
    """`; did you mean X?` for the allowed word that looks most like `text`, or what it abbreviates, or nothing."""
    words = {word.lower(): word for word in allowed}
    close = difflib.get_close_matches(text.lower(), words, n=1, cutoff=0.6)
    longer = [word for word in words if len(text) >= _ABBREVIATION and word.startswith(text.lower())]
    if longer and not set(close) & set(longer):
        close = longer
    return f"; did you mean {' or '.join(words[word] for word in close)}?" if close else ""


def unknown(flag: str, allowed: Collection[str]) -> str:
    """What to say of an option that there is not: what it is called here, or looks most like; or nothing."""
    here = ELSEWHERE.get(flag)
    return f"; it is called {here} here" if here in allowed else nearest(flag, allowed)


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where relative paths start and how to ask whether one exists; handed in, so that reading stays pure."""

    exists: Callable[[str], bool]
    cwd: str
    home: str
    names: Callable[[str], Iterable[str]]
    """What a folder holds; nothing where that can't be told."""


def source(text: str, place: Place) -> InputSource:
    """An input: a path, a URL (`https://…`), a bucket (`s3://…`, `gs://…`, `az://…`), `ipfs://CID[/path]` or a CID.

    With `:/mount` behind it, or as `src=…[,dst=…][,unpack]`, where `unpack` takes an archive for the folder that is
    in it. An existing path wins over a CID, and over the reading of its last `:` as the start of a mount.
    """
    if text.startswith("src="):
        body, comma, mount = text.removeprefix("src=").removesuffix(",unpack").rpartition(",dst=")
        where = _where(body if comma else mount, place)
        return InputSource(source=where, mount=_mount(mount) if comma else None, unpack=text.endswith(",unpack"))
    if not _exists(text, place):
        head, _, mount = text.rpartition(":")
        if mount.startswith("/") and not mount.startswith("//") and _complete(head, place):
            return InputSource(source=_where(head, place), mount=_mount(mount))
    return InputSource(source=_where(text, place))


def _complete(text: str, place: Place) -> bool:
    return bool(_SCHEME.match(text) or _CID.fullmatch(text) or _exists(text, place))


def _exists(text: str, place: Place) -> bool:
    return bool(text) and "\0" not in text and place.exists(_absolute(text, place))


def _absolute(text: str, place: Place) -> str:
    if text == "~" or text.startswith("~/"):
        text = place.home + text[1:]
    return str(PurePosixPath(place.cwd) / text)


def _where(text: str, place: Place) -> str:
    if _exists(text, place):
        return _absolute(text, place)
    if scheme := _SCHEME.match(text):
        return _elsewhere(scheme[1].lower(), text[scheme.end() :])
    if _CID.fullmatch(text):
        return _elsewhere("ipfs", text)
    if not text or "\0" in text:
        raise SpecError("not a path")
    missing = PurePosixPath(_absolute(text, place))
    where = "" if str(missing) == text else f": {missing}"
    raise SpecError(f"no such file or folder{where}{nearest(missing.name, place.names(str(missing.parent)))}")


def _elsewhere(scheme: str, rest: str) -> str:
    if scheme not in SCHEMES:
        known = ", ".join(f"{each}://" for each in SCHEMES)
        raise SpecError(f"{scheme}:// is no place for inputs{nearest(scheme, SCHEMES) or f'; give a path, or {known}'}")
    if scheme == "ipfs":
        if not _CID.fullmatch(rest):
            raise SpecError("no CID after ipfs://; write ipfs://CID or ipfs://CID/path")
        return f"ipfs://{rest.rstrip('/')}"
    if not rest.partition("/")[0] or not rest.isprintable():
        raise SpecError(f"no {'server' if scheme.startswith('http') else 'bucket'} after {scheme}://")
    return f"{scheme}://{rest}"


def publish(text: str, place: Place) -> str:
    """Where results go: `store`, `ipfs`, `filecoin`, a bucket, or `local:DIR` (DIR made absolute).

    `local:DIR` is done by whoever waits for the job; a node never hears of it. Of the others it may know fewer.
    """
    if text.startswith(LOCAL):
        folder = text.removeprefix(LOCAL)
        if not folder or "\0" in folder:
            raise SpecError("local: needs a folder, as in local:results")
        return f"{LOCAL}{_absolute(folder, place)}"
    scheme = _SCHEME.match(text)
    if text in TARGETS or (scheme and scheme[1] in BUCKETS and text[scheme.end() :].strip("/")):
        return text
    known = [*TARGETS, "local:DIR", *(f"{each}://…" for each in BUCKETS)]
    raise SpecError(f"results don't go there{nearest(text, TARGETS)}; what there is: {', '.join(known)}")


def _mount(text: str) -> str:
    parts = text.split("/")
    if parts[0] or ".." in parts or not text.strip("/") or "\0" in text or parts[1] == "outputs":
        raise SpecError(f"{text!r} can't be a mount; write an absolute folder such as /data, not / nor /outputs")
    return str(PurePosixPath("/" + text.strip("/")))
