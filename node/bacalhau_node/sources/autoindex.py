"""The index of a folder, as Apache, nginx and others show it: the links below it, and what paths they stand for. Pure.

The page comes from a server that nobody trusts: no link leads out of the folder that was named.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from urllib.parse import unquote, urljoin, urlsplit, urlunsplit

from bacalhau_node.errors import ContentError
from bacalhau_node.sources.listing import MAX_NAME, shown_url

_INDEX = re.compile(r"\b(index of|directory listing|listing of|directory:)|\s-\s/", re.IGNORECASE)


class _Page(HTMLParser):
    """The links of a page, and the text of its title and headings."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.title = ""
        self._inside = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._inside = self._inside or tag in ("title", "h1")
        if tag == "a":
            self.links += [value for name, value in attrs if name == "href" and value]

    def handle_endtag(self, tag: str) -> None:
        self._inside = self._inside and tag not in ("title", "h1")

    def handle_data(self, data: str) -> None:
        if self._inside and len(self.title) < 200:
            self.title += data.strip()


def read_index(page: str, url: str) -> Iterator[str]:
    """The URLs of what an index (as Apache, nginx and others make them) shows below `url`, each once.

    Folders end in "/". Left out: what leads elsewhere or up, and links that only sort the page anew. Raises
    `ContentError` for a page that is no index.
    """
    parsed = _Page()
    parsed.feed(page)
    if not _INDEX.search(parsed.title):
        raise ContentError(
            f"{shown_url(url)} answers a web page ({parsed.title[:80] or 'without a title'!r}) that is no index of a"
            " folder: name the files, or put their URLs into a list that ends in .urls"
        )
    folder = _folder_of(url)
    seen = set()
    for link in parsed.links:
        try:
            target = _canonical(urljoin(url, link.strip()))
        except ValueError:
            continue
        below = target.removeprefix(folder)
        if target == below or not below or "?" in below or target in seen:
            continue
        seen.add(target)
        yield target


def _canonical(url: str) -> str:
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc, parts.path, parts.query, ""))


def _folder_of(url: str) -> str:
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc, parts.path, "", ""))


def below(url: str, folder: str) -> str:
    """The logical path of `url` below the index `folder`; raises `ContentError` for one that can be no path."""
    path = unquote(url.removeprefix(_folder_of(folder)), errors="surrogateescape")
    levels = path.removesuffix("/").split("/")
    if (
        "\0" in path
        or not {"", ".", ".."}.isdisjoint(levels)
        or any(len(level.encode("utf-8", "surrogateescape")) > MAX_NAME for level in levels)
    ):
        raise ContentError(f"the index {shown_url(folder)} links to {path[:100]!r}, which can't be the path of a file")
    return path
