"""Inputs from the web: a file at a URL, a folder of which a server shows the index, a list of URLs.

Theory of operation. Listing asks each server for the headers of each file: what it is called, how large it
is, and which version it is (`UrlRef`). A plan holds exactly that; the bytes come when a shard needs them, must be of
that version, and go into the content store. Which CID they got is remembered under URL and version, so a job that runs
again asks for headers only. A file whose server names no version gets a mark of this listing in its
place: it is downloaded once for the job, and never taken for another job's.

A file whose size nobody knows is downloaded when it is listed (shards are cut by bytes), and pinned by its checksum.
A file that can't be listed does not keep others from being used: it is listed as `Doubtful`, its shard
tries again and fails with the reason if there still is one.
"""

from __future__ import annotations

import asyncio
import importlib
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar
from urllib.parse import urlsplit
from weakref import WeakValueDictionary

import msgspec

from bacalhau_node.errors import BugError, ContentError, SpecError
from bacalhau_node.fetched import Fetched, unsigned
from bacalhau_node.ports import Access, ContentStore, Told
from bacalhau_node.sharding import Doubtful, Entry, Reference, UrlRef, shown
from bacalhau_node.sources import listing
from bacalhau_node.sources.limits import Limits
from bacalhau_node.sources.stored import stored_file
from bacalhau_node.spec import InputSource

if TYPE_CHECKING:
    from bacalhau_node.sources.download import Got, Wanted
    from bacalhau_node.sources.web import Web

T = TypeVar("T")

AT_ONCE: Final = 8
PER_HOST: Final = 4
"""Questions and downloads at once, in all and at one server: as browsers do."""

MAX_FILES: Final = 100_000
MAX_FOLDERS: Final = 1_000
MAX_LEVELS: Final = 16
"""Bounds on what the index of a folder may lead to."""

_LISTED, _UNSEEN = "~", "?"
"""What versions of our own start with: of a file that has none, and of one that could not be looked at."""

_TELL: Final = 0.2
"""Seconds between two words about one transfer."""


class UrlSource:
    """`--input https://…`: a file; a folder, if it ends in "/" and answers an index; a list, if it ends in `.urls`.

    - `https://example.org/a.csv` is one file, named by the server or by the URL. `#sha256=HEX` says what it must be.
    - `https://example.org/data/` is a folder: all files that its index shows, and those of the folders below.
    - A file whose name ends in `.urls` or `.urls.txt` (here, at a URL, or in the store) holds one URL a line; what
      follows a `#` at the start of a line or after a blank is a comment. The files are called by their names, or
      by their URLs below what is common to them where two names are equal.

    `own`: whether what is listed is for the owner of this node (see `guard`). Made on the loop on which `fetch` is
    called.
    """

    def __init__(
        self, content: ContentStore, *, fetched: Fetched, own: bool = True, limits: Limits | None = None
    ) -> None:
        self._content, self._fetched, self._own = content, fetched, own
        self._limits = limits or Limits()
        self._loop = asyncio.get_running_loop()
        self._locks: WeakValueDictionary[tuple[str, str], asyncio.Lock] = WeakValueDictionary()
        self._hosts: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()
        self._all = asyncio.Semaphore(AT_ONCE)

    def claims(self, source: str) -> bool:
        """Whether `source` is an http(s) URL, or the name of a list of URLs."""
        local = source.startswith(("/", "ipfs://"))
        return source.lower().startswith(("http://", "https://")) or (local and listing.is_list(source))

    # --- listing ---

    def list(self, source: InputSource, *, index: int) -> list[Entry]:
        """Every file, sorted by its path; raises `ContentError` for a folder or a list that can't be read."""
        listed = asyncio.run_coroutine_threadsafe(self._list(source.source, index), self._loop).result()
        return sorted(listed, key=lambda entry: entry.path.encode("utf-8", "surrogateescape"))

    async def _list(self, source: str, index: int) -> Sequence[Entry]:
        async with self._web(own=self._own) as web:
            if listing.is_list(source):
                urls = listing.read_list(await self._text(web, source), source)
                return _as_list(urls, await self._files(web, urls, index))
            url, _ = listing.parse_url(source)
            if urlsplit(url).path.endswith("/"):
                final, page = await self._turn(url, lambda: web.page(url))
                if page is not None:
                    return await self._folder(web, final, page, index)
            return await self._files(web, [source], index)

    async def _text(self, web: Web, source: str) -> str:
        """The text of a list of URLs."""
        if not source.startswith(("/", "ipfs://")):
            url, _ = listing.parse_url(source)
            return await self._turn(url, lambda: web.text(url))
        if not self._own and source.startswith("/"):
            raise SpecError(f"--input {shown(source)}: a file of this machine is no input for other people's jobs")
        data = await asyncio.to_thread(_read_here, self._content, source, self._limits.page)
        return data.decode("utf-8-sig", "replace")

    async def _files(self, web: Web, urls: Sequence[str], index: int) -> Sequence[Entry]:
        looked = await _all([self._file(web, url, index) for url in urls])
        mixed = any(not page and not isinstance(entry, Doubtful) for entry, page in looked)
        return [_suspected(entry) if mixed and page else entry for entry, page in looked]

    async def _file(self, web: Web, source: str, index: int) -> tuple[Entry, bool]:
        """(the entry of one URL, whether it answers a web page)."""
        url, sha256 = listing.parse_url(source)
        try:
            found = await self._turn(url, lambda: web.look(url))
            reference = UrlRef(url, found.version or _LISTED + uuid.uuid4().hex, sha256)
            size = found.size
            if size is None:
                size, reference = await self._measured(web, Entry(found.name, reference, 0))
        except ContentError as error:
            return _doubtful(
                Entry(listing.file_name("", url, url), UrlRef(url, "", sha256), 0, index), str(error)
            ), False
        return Entry(found.name, reference, size, index), listing.is_html(found.kind)

    async def _measured(self, web: Web, entry: Entry) -> tuple[int, UrlRef]:
        """(size, reference) of a file whose size its server does not say: it is brought here to know it."""
        cid, sha256 = await self._bring(web, entry, Access(own=self._own), told=_nobody, size=None)
        ((_, _, size),) = await asyncio.to_thread(self._content.list, cid)
        reference = _url(entry.reference)
        if _is_mark(reference.version) and sha256:
            reference = UrlRef(reference.url, reference.version, sha256)
        return size, reference

    async def _folder(self, web: Web, root: str, page: bytes, index: int) -> Sequence[Entry]:
        """All files below an index, level by level."""
        index_of, files = _late("autoindex"), dict[str, str]()
        pages: Sequence[tuple[str, bytes]] = [(root, page)]
        seen = {root}
        for _ in range(MAX_LEVELS):
            links = [link for url, body in pages for link in index_of.read_index(_decoded(body), url)]
            paths = {link: index_of.below(link, root) for link in links}
            files |= {link: path for link, path in paths.items() if not link.endswith("/")}
            folders = [link for link in paths if link.endswith("/") and link not in seen]
            seen.update(folders)
            if len(files) > MAX_FILES or len(seen) > MAX_FOLDERS:
                raise ContentError(
                    f"{listing.shown_url(root)} has more than {MAX_FILES} files or {MAX_FOLDERS} folders:"
                    " name a folder below it"
                )
            pages = await self._pages(web, folders)
            if not pages:
                break
        else:
            raise ContentError(
                f"{listing.shown_url(root)} has more than {MAX_LEVELS} levels of folders: name one below"
            )
        entries = await self._files(web, tuple(files), index)
        return [_renamed(entry, path) for entry, path in zip(entries, files.values(), strict=True)]

    async def _pages(self, web: Web, folders: Sequence[str]) -> Sequence[tuple[str, bytes]]:
        async def page(url: str) -> tuple[str, bytes]:
            final, body = await self._turn(url, lambda: web.page(url))
            if body is None or not final.startswith(url):
                raise ContentError(f"{listing.shown_url(url)} is shown as a folder, and answers no index")
            return url, body

        return await _all([page(url) for url in folders])

    # --- fetching ---

    async def fetch(self, entries: Sequence[Entry], *, access: Access, told: Told) -> None:
        """Download what is not in the store yet, several at once; see `ports.Source`."""
        missing = []
        for entry in entries:
            if (cid := self._known(_url(entry.reference), access)) is None:
                missing.append(entry)
            else:
                told(entry.path, entry.size, entry.size, cid)
        if missing:
            async with self._web(own=access.own) as web:
                await _all([self._bring(web, entry, access, told=told, size=_size(entry)) for entry in missing])

    def _known(self, reference: UrlRef, access: Access) -> str | None:
        """The CID of what is here already of the very file that is meant, as far as those may know who want it."""
        key, *others = _keys(reference, access)
        for one in (key, *others):
            cid = self._fetched.recall(*one)
            if cid is not None and self._content.has(cid):
                if one != key:
                    self._fetched.remember(*key, cid)  # `open` is told the reference alone
                return cid
        return None

    def _opened(self, reference: UrlRef) -> str | None:
        """The CID of what was fetched, for whomever."""
        return self._known(reference, Access()) or self._known(reference, Access(own=False))

    async def _bring(self, web: Web, entry: Entry, access: Access, *, told: Told, size: int | None) -> tuple[str, str]:
        """(CID, sha256 if it was downloaded now) of one file, once however many shards want it at the same time."""
        reference = _url(entry.reference)
        lock = self._locks.setdefault(_keys(reference, access)[-1], asyncio.Lock())
        async with lock:
            if (cid := self._known(reference, access)) is not None:
                told(entry.path, entry.size, entry.size, cid)
                return cid, ""
            return await self._turn(reference.url, lambda: self._download(web, entry, access, told=told, size=size))

    async def _download(
        self, web: Web, entry: Entry, access: Access, *, told: Told, size: int | None
    ) -> tuple[str, str]:
        reference, module = _url(entry.reference), _late("download")
        version = "" if _is_mark(reference.version) else reference.version
        wanted: Wanted = module.Wanted(url=reference.url, version=version, size=size, sha256=reference.sha256)
        told(entry.path, 0, size, "")  # a slow one is seen before its first MiB is here
        got: Got = await module.download(web, wanted, self._content, _Telling(entry.path, told, self._loop.time))
        keys = _keys(UrlRef(reference.url, reference.version), access)
        if got.sha256:
            keys += _keys(UrlRef("", "", got.sha256), access)
        self._fetched.remember_all([(*key, got.cid) for key in keys])
        told(entry.path, got.size, got.size, got.cid)
        return got.cid, got.sha256

    def open(self, reference: Reference, *, scratch: Path) -> Path:
        """The store's own file where it has one, else one written to `scratch`."""
        url = _url(reference)
        cid = self._opened(url)
        if cid is None:
            raise ContentError(f"{listing.shown_url(url.url)} is no longer in this node's store: run the job again")
        return stored_file(self._content, cid, scratch)

    def check(self, reference: Reference) -> None:
        """The store's file that was handed out is looked at again: the shard may have written to it."""
        if isinstance(reference, UrlRef) and (cid := self._opened(reference)) is not None:
            self._content.file(cid)

    # --- who asks, and how many at once ---

    @asynccontextmanager
    async def _web(self, *, own: bool) -> AsyncIterator[Web]:
        async with _late("web").open_web(_late("guard").Guard(own=own), self._limits) as web:
            yield web

    async def _turn(self, url: str, ask: Callable[[], Awaitable[T]]) -> T:
        """Ask when the server and this node have a turn free."""
        host = urlsplit(url).netloc
        turns = self._hosts.setdefault(host, asyncio.Semaphore(PER_HOST))
        async with turns, self._all:
            return await ask()


class _Telling:
    """Passes on how far a transfer is, a few times a second."""

    def __init__(self, name: str, told: Told, clock: Callable[[], float]) -> None:
        self._name, self._told, self._clock = name, told, clock
        self._last = clock()

    def __call__(self, done: int, total: int | None) -> None:
        if (now := self._clock()) - self._last >= _TELL:
            self._last = now
            self._told(self._name, done, total, "")


def _nobody(_name: str, _done: int, _total: int | None, _cid: str) -> None:
    """Nobody watches a listing."""


def _late(module: str) -> Any:
    """A module of this package that is loaded when a URL is asked: local jobs need neither it nor aiohttp."""
    try:
        return importlib.import_module(f"bacalhau_node.sources.{module}")
    except ModuleNotFoundError as error:
        raise SpecError(f"inputs from URLs need {error.name}: pip install 'bacalhau-jupyter[http]'") from error


def _url(reference: Reference) -> UrlRef:
    if not isinstance(reference, UrlRef):
        raise BugError(f"a source of URLs was asked to open {reference!r}")
    return reference


def _size(entry: Entry) -> int | None:
    """The size that a file was listed with; None where it could not be looked at."""
    return None if _url(entry.reference).version.startswith(_UNSEEN) else entry.size


def _keys(reference: UrlRef, access: Access) -> list[tuple[str, str]]:
    """What `Fetched` calls this file: a checksum says more than a URL and a version.

    What came for the owner's jobs is not there for those of others, who could guess at what they may not ask for. For
    the same reason an object whose URL was signed is there again, under another signature, only for the same one.
    """
    place = "" if access.own else "others "
    if reference.sha256:
        return [(f"{place}sha256:{reference.sha256}", "")]
    keys = [(place + reference.url, reference.version)]
    if (access.own or access.whose) and (plain := unsigned(reference.url)) != reference.url:
        keys.append((f"signed {access.whose} {plain}", reference.version))
    return keys


def _is_mark(version: str) -> bool:
    return version.startswith((_LISTED, _UNSEEN))


def _doubtful(entry: Entry, problem: str) -> Doubtful:
    reference = _url(entry.reference)
    unseen = UrlRef(reference.url, _UNSEEN + uuid.uuid4().hex, reference.sha256)
    return Doubtful(entry.path, unseen, 0, entry.source, problem=problem)


def _suspected(entry: Entry) -> Entry:
    """A web page among data, unless it is called like one."""
    if entry.path.rpartition(".")[2].lower() in listing.PAGES:
        return entry
    url = listing.shown_url(_url(entry.reference).url)
    return _doubtful(entry, f"{url} answers a web page (text/html), not data as those that are listed with it")


def _as_list(urls: Sequence[str], entries: Sequence[Entry]) -> list[Entry]:
    """The entries of a list, at places of their own."""
    paths = listing.list_paths([listing.parse_url(url)[0] for url in urls], [entry.path for entry in entries])
    return [_renamed(entry, path) for entry, path in zip(entries, paths, strict=True)]


def _renamed(entry: Entry, path: str) -> Entry:
    return msgspec.structs.replace(entry, path=path)


def _decoded(page: bytes) -> str:
    return page.decode("utf-8", "replace")


def _read_here(content: ContentStore, source: str, most: int) -> bytes:
    """A list of URLs that lies on this machine, or in the store where a client has sent it."""
    if source.startswith("ipfs://"):
        cid, _, path = source.removeprefix("ipfs://").partition("/")
        found = [file for item, file, size in content.list(cid) if item == path and size <= most]
        if not found:
            raise ContentError(f"there is no list {shown(path)} of at most {most} bytes in {cid}")
        return content.read(found[0])
    try:
        with Path(source).open("rb") as file:
            data = file.read(most + 1)
    except OSError as error:
        raise ContentError(f"{shown(source)} can't be read: {error.strerror}") from error
    if len(data) > most:
        raise ContentError(f"{shown(source)} has more than {most} bytes: too long for a list of URLs")
    return data


async def _all(jobs: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """What all of them return, in order; the first that fails ends the others."""
    tasks = [asyncio.ensure_future(job) for job in jobs]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
