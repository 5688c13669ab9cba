"""The long-lived background thread of a kernel: an asyncio loop and one Client on it; one for each node in use.

Theory of operation. While a cell runs, the kernel's own loop stands still, and a cell that
awaits can't be stopped; so the node lives on a loop of its own in a daemon thread, and the
main thread waits for answers on a lock, which Stop interrupts. The node opens in the background
when the extension is loaded and everything that needs it waits for that. It is closed before
the interpreter takes its thread pools down, so that no container outlives the kernel.

Jobs go to the node that their line names (`--node URL`), else to the one that `%bacalhau connect` named,
else to `BACALHAU_JUPYTER_NODE`, else to the one in this kernel. A node elsewhere has a URL; a multiaddr
(`/ip4/…/p2p/…`) names a network instead, to which a second node in this kernel then brings the jobs.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures.thread  # noqa: F401  loaded before `_at_exit`, so that its own hook runs after ours
import contextlib
import os
import tempfile
import threading
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from bacalhau_node.errors import BacalhauError, NodeUnreachable, SpecError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine

    from bacalhau_jupyter.progress import JobMonitor
    from bacalhau_node.client import Client

T = TypeVar("T")

SAID_SECONDS = 0.5
"""How often it is said how much of a result has come."""

CLOSE_SECONDS = 2.0
"""How long a kernel that ends waits for its node to put everything away."""


class Session:
    """A loop in a thread, and the client that `open_client` makes there at first use.

    `node` is the URL of a node elsewhere, "" for the one in this kernel.
    """

    def __init__(self, open_client: Callable[[], Awaitable[Client]], *, node: str = "") -> None:
        self.node = node
        self.uploaded: tuple[int, int] | None = None
        """(bytes sent, bytes to send) of inputs on their way to a node elsewhere."""
        self._received = 0
        self._open_client = open_client
        self._opening: asyncio.Task[Client] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._process = os.getpid()
        self._closed = False
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="bacalhau", daemon=True)
        self._thread.start()

    @property
    def open(self) -> bool:
        """Whether it can be asked: not closed, and not the copy of a session in a forked process."""
        return not self._closed and self._process == os.getpid()

    def call(self, ask: Callable[[Client], Awaitable[T]], *, timeout: float | None = None) -> T:
        """What `ask` answers, from any thread but the loop's own; an interrupt cancels it.

        Raises what `ask` raises, and `NodeUnreachable` when the answer takes longer than `timeout` seconds.
        """
        future = self.begin(ask)
        try:
            return future.result(timeout)
        except FutureTimeout as error:
            if future.done():  # the timeout is the answer
                raise
            raise NodeUnreachable(f"{self._name} did not answer in {timeout} s; try again") from error
        finally:
            future.cancel()

    def fetch(self, ask: Callable[[Client], Awaitable[T]]) -> T:
        """`call` for what may be large: every half second it says how much has come from a node elsewhere."""
        from bacalhau_node.literals import size_text  # noqa: PLC0415  loading the extension stays quick

        self._received, said = 0, False
        future = self.begin(ask)
        try:
            while True:
                try:
                    return future.result(SAID_SECONDS)
                except FutureTimeout:
                    if future.done():  # the timeout is the answer
                        raise
                if self._received:
                    print(f"\rreceiving {size_text(self._received)}", end="", flush=True)  # noqa: T201  a cell's output
                    said = True
        finally:
            future.cancel()
            if said:
                print()  # noqa: T201  a cell's output

    def begin(self, ask: Callable[[Client], Awaitable[T]]) -> Future[T]:
        """The same without waiting."""

        async def answer() -> T:
            return await ask(await self._client())

        return self._begin(answer())

    def watch(self, monitor: JobMonitor) -> None:
        """Feed `monitor` with the updates of its job from now on, to the end."""

        async def start() -> None:
            task = asyncio.create_task(self._feed(monitor))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

        self._begin(start())

    def folder(self) -> Path:
        """A folder for what is fetched to this machine; it goes when the session is closed."""
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="bacalhau-", ignore_cleanup_errors=True)
        return Path(self._folder.name)

    def close(self) -> None:
        """End the node and the thread; returns within little more than `CLOSE_SECONDS` seconds."""
        if not self.open:
            return
        self._closed = True
        future = asyncio.run_coroutine_threadsafe(self._shut(), self._loop)
        with contextlib.suppress(FutureTimeout, BacalhauError):  # there is nobody left to tell
            future.result(CLOSE_SECONDS)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(0.5)
        if self._folder is not None:
            self._folder.cleanup()

    @property
    def _name(self) -> str:
        return f"the node at {self.node}" if self.node else "the node in this kernel"

    def tell(self, sent: int, total: int) -> None:
        """Note how much of a job's inputs was sent."""
        self.uploaded = sent, total

    def receive(self, count: int) -> None:
        """Note how much has come of a result."""
        self._received = count

    # --- on the loop ---

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()
        left = asyncio.all_tasks(self._loop)
        for task in left:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
        self._loop.close()

    def _begin(self, work: Coroutine[object, object, T]) -> Future[T]:
        if not self.open:
            work.close()
            raise NodeUnreachable("the node of this kernel is closed; run `%load_ext bacalhau_jupyter` again")
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    async def _client(self) -> Client:
        """The one client; whoever comes while it opens waits for the same one, and a failure is tried again."""
        if self._opening is None or (self._opening.done() and self._opening.exception()):
            self._opening = asyncio.ensure_future(self._open_client())
        return await asyncio.shield(self._opening)

    async def _feed(self, monitor: JobMonitor) -> None:
        broken: Exception | None = NodeUnreachable(f"{self._name} was left before the job ended")
        try:
            client = await self._client()
            async for update in client.updates(monitor.submission.job):
                monitor.feed(update)
            broken = None
        except BacalhauError as error:
            broken = error
        finally:
            monitor.end(broken)

    async def _shut(self) -> None:
        for task in tuple(self._tasks):
            task.cancel()
        if self._opening is not None:
            client = await self._opening
            await client.close()


# --- those of this kernel ---

LOCAL = "local"
"""What names the node in this kernel where a URL is expected."""

_sessions: dict[str, Session] = {}
_connected: str | None = None
_lock = threading.Lock()


def session(node: str | None = None) -> Session:
    """The session with a node, made when it is first asked for and again after it was closed.

    `node` is a URL, the multiaddr of a node whose network the kernel's own joins, or `LOCAL`; without it: the node
    that jobs go to now. Raises `SpecError` for anything else.
    """
    where = default_node() if node is None else _address(node)
    with _lock:
        found = _sessions.get(where)
        if found is None or not found.open:
            found = _sessions[where] = _made(where)
            _at_exit(found.close)
        return found


def sessions() -> list[Session]:
    """Those that are open: the one with the node that jobs go to first."""
    first = session()
    with _lock:
        return [first, *(each for each in _sessions.values() if each.open and each is not first)]


def default_node() -> str:
    """The URL of the node that jobs go to; "" for the one in this kernel."""
    if _connected is not None:
        return _connected
    return _address(os.environ.get("BACALHAU_JUPYTER_NODE") or LOCAL)


def connect(node: str) -> None:
    """Let jobs go to this node from now on."""
    global _connected  # noqa: PLW0603  one kernel, one node that jobs go to
    _connected = _address(node)


def close() -> None:
    """Close the sessions of this process."""
    for each in tuple(_sessions.values()):
        each.close()


def _address(node: str) -> str:
    if node == LOCAL:
        return ""
    if node.startswith("/"):
        return node
    from bacalhau_node.literals import node_url  # noqa: PLC0415  loading the extension stays quick

    return node_url(node)


def _made(node: str) -> Session:
    if not node:
        return Session(_open_local)
    if node.startswith("/"):
        return Session(lambda: _open_member(node), node=node)

    async def open_remote() -> Client:
        try:
            from bacalhau_node.http_client import HttpClient  # noqa: PLC0415  aiohttp loads when it is needed
        except ImportError as error:
            raise SpecError("a node elsewhere needs aiohttp: pip install 'bacalhau-jupyter[http]'") from error
        return HttpClient(node, progress=made.tell, received=made.receive)

    made = Session(open_remote, node=node)
    return made


async def _open_local() -> Client:
    from bacalhau_node.local import open_local  # noqa: PLC0415  the node's modules load in this thread

    return await open_local()


async def _open_member(peer: str) -> Client:
    try:
        import libp2p  # noqa: F401, PLC0415  a network is joined when it is asked for
    except ImportError as error:
        raise SpecError("a network of nodes needs libp2p: pip install 'bacalhau-jupyter[network]'") from error
    from bacalhau_node.client import open_member  # noqa: PLC0415  the node's modules load in this thread

    return await open_member(peer)


def _at_exit(close: Callable[[], None]) -> None:
    """Call `close` when the interpreter ends, while threads can still be given work.

    `atexit` runs too late for that: the executors of `concurrent.futures` refuse work by then. Python has
    no public hook before them, so the one that they use themselves is taken where it exists.
    """
    register = getattr(threading, "_register_atexit", atexit.register)
    register(close)
