"""What URLs, headers and lists say: the name of a file, the checksum it must have, the URLs of a list. Pure.

Everything here may come from a server that nobody trusts: a name never becomes a path.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from email.message import Message
from typing import Final
from urllib.parse import unquote, urljoin, urlsplit

from bacalhau_node.errors import SpecError

MAX_NAME: Final = 255
"""Bytes of a file's name on every usual file system."""

MAX_URL: Final = 8_192
"""Characters of a URL; servers refuse longer ones."""

_SECRET = re.compile(r"(?i)([?&;][^=&;#]*(?:sig|token|key|secret|passw|credential|auth)[^=&;#]*=)[^&;#]+")
"""Parameters of a URL that open something: what S3, Google and Azure sign with, and what else is called so."""

LIST_SUFFIXES: Final = (".urls", ".urls.txt")

PAGES: Final = frozenset({"htm", "html", "xhtml", "shtml", "mht", "mhtml"})
"""Suffixes of files that are meant to be web pages."""

_SUFFIX = re.compile(r"\.([A-Za-z][A-Za-z0-9]{0,9})$")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_SHA256 = re.compile(r"sha256=([0-9a-fA-F]{64})")


def parse_url(text: str) -> tuple[str, str]:
    """(the URL to ask, the sha256 that its bytes must have or ""); raises `SpecError` for what is no http(s) URL."""
    url, _, fragment = text.partition("#")
    problem = _problem(url)
    if problem is None and fragment.startswith("sha256=") and not _SHA256.fullmatch(fragment):
        problem = "#sha256= is followed by 64 hexadecimal digits"
    if problem:
        raise SpecError(f"--input {shown_url(text)[:300]!r}: {problem}")
    match = _SHA256.fullmatch(fragment)
    return url, match[1].lower() if match else ""


def _problem(url: str) -> str | None:
    if len(url) > MAX_URL:
        return f"a URL has at most {MAX_URL} characters"
    if _CONTROL.search(url) or " " in url:
        return "a URL holds no blanks and no control characters: write %20 for a blank"
    try:
        parts = urlsplit(url)
        port_is_one = parts.port is None or parts.port > 0
    except ValueError as error:
        return f"not a URL: {error}"
    if parts.scheme.lower() not in ("http", "https") or not parts.hostname or not port_is_one:
        return "not a URL such as https://example.org/data.csv"
    return None


def shown_url(url: str) -> str:
    """`url` for a message: without a password or what a signed one is signed by, escaped where it would hide something.

    Messages go into logs, journals and the records of shards, and those may be published.
    """
    head, at, tail = url.partition("://")[2].partition("/")[0].rpartition("@")
    if at:
        url = url.replace(f"{head}@{tail}", f"{head.partition(':')[0]}:…@{tail}", 1)
    url = _SECRET.sub(r"\1…", url)
    return url if url.isprintable() else repr(url)


def is_page(kind: str, name: str) -> bool:
    """Whether an answer of this content type is a web page though a file called `name` is none."""
    suffix = _SUFFIX.search(name)
    return is_html(kind) and suffix is not None and suffix[1].lower() not in PAGES


def is_html(kind: str) -> bool:
    """Whether a content type is that of a web page."""
    return kind.partition(";")[0].strip().lower() in ("text/html", "application/xhtml+xml")


# --- names ---


def file_name(disposition: str, final: str, asked: str) -> str:
    """What a file is called: by its `Content-Disposition`, else by the URL that answered or the one that was asked.

    Of the two URLs the first counts whose name has a suffix: storage behind a redirect often names files by a hash.
    """
    if name := _disposed(disposition):
        return name
    names = [_of_url(final), _of_url(asked)]
    with_suffix = [name for name in names if _SUFFIX.search(name)]
    return next(filter(None, (*with_suffix, *names)), urlsplit(asked).hostname or "file")


def _of_url(url: str) -> str:
    return clean_name(unquote(urlsplit(url).path.rpartition("/")[2]))


def _disposed(header: str) -> str:
    """The file name of a `Content-Disposition`, "" where it has none. Never hidden: nobody asked for that."""
    message = Message()
    message["Content-Disposition"] = _CONTROL.sub("", header)
    try:
        name = message.get_filename("")
    except (LookupError, ValueError):  # an unknown charset
        return ""
    return clean_name(unquote(name) if "%" in name and "/" not in unquote(name) else name).lstrip(".")


def clean_name(name: str) -> str:
    """`name` as one level of a path, cut to what file systems take; "" if nothing is left of it."""
    name = _CONTROL.sub("", name.replace("\\", "/")).strip().rpartition("/")[2]
    name = name.encode("utf-8", "replace").decode()
    if len(name.encode()) > MAX_NAME:
        match = _SUFFIX.search(name)
        suffix = match[0] if match else ""
        name = name.encode()[: MAX_NAME - len(suffix)].decode("utf-8", "ignore") + suffix
    return "" if name in (".", "..") else name


# --- lists ---


def is_list(source: str) -> bool:
    """Whether an input is a file with a URL on each line, by its name."""
    path = source if source.startswith(("/", "ipfs://")) else re.split("[?#]", source)[0]
    return path.endswith(LIST_SUFFIXES)


def read_list(text: str, source: str) -> list[str]:
    """The URLs of a list, each once, in order; those of a remote list may be relative to it."""
    base = source if source.lower().startswith(("http://", "https://")) else ""
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        item = "" if line.lstrip().startswith("#") else re.split(r"\s#", line)[0].strip()
        if not item:
            continue
        url = urljoin(base, item)
        try:
            parse_url(url)
        except SpecError as error:
            raise SpecError(f"{shown_url(source)}, line {number}: {str(error).removeprefix('--input ')}") from error
        found.append(url)
    if not found:
        raise SpecError(f"{shown_url(source)} lists no URLs: it has one on each line, and # starts a comment")
    return list(dict.fromkeys(found))


def list_paths(urls: Sequence[str], names: Sequence[str]) -> list[str]:
    """Where the files of a list lie: by their names; where two are equal, all by their URLs below the common folder."""
    if len(set(names)) == len(names):
        return list(names)
    levels = [_levels(url, name) for url, name in zip(urls, names, strict=True)]
    shortest = min(map(len, levels)) - 1
    common = next((at for at in range(shortest) if len({level[at] for level in levels}) > 1), shortest)
    paths = ["/".join(level[common:]) for level in levels]
    return [
        path if paths.index(path) == at else f"{path.rpartition('/')[0]}/{at}/{path.rpartition('/')[2]}".lstrip("/")
        for at, path in enumerate(paths)
    ]


def _levels(url: str, name: str) -> list[str]:
    parts = urlsplit(url)
    folders = [clean_name(unquote(level)) for level in parts.path.split("/")[1:-1]]
    return [clean_name(parts.netloc.rpartition("@")[2]), *filter(None, folders), name]
