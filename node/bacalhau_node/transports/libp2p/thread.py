"""One thread with trio for every libp2p host of the process, and the bridge between it and asyncio.

Theory of operation. libp2p speaks trio, the node speaks asyncio. The first transport of the process starts the
thread, the last one ends it; a kernel that is busy or interrupted does not stop it. Work crosses in both directions
as calls that are queued, and a whole queue costs one wake-up: `NetworkThread.call` starts something over there and
gives a future back, `Shore.post` calls something on one asyncio loop. Nothing else is shared but what `Inbox` says.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import weakref
from collections import deque
from collections.abc import Callable
from functools import partial
from inspect import isawaitable
from typing import Any

import trio

from bacalhau_node.errors import BugError, NodeUnreachable

log = logging.getLogger(__name__)

NAME = "bacalhau-network"
START_SECONDS = 30


class Shore:
    """The end of the bridge at one asyncio loop. Only the network's thread posts."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._due: deque[tuple[Callable[..., object], tuple[Any, ...]]] = deque()
        self._armed = False

    def post(self, call: Callable[..., object], *args: Any) -> None:
        """Have `call(*args)`, which must not raise, run on the loop; nothing happens when the loop is closed."""
        self._due.append((call, args))
        if self._armed:
            return
        self._armed = True
        try:
            self._loop.call_soon_threadsafe(self._run)
        except RuntimeError:  # the loop is closed: nobody waits any more
            self._due.clear()

    def _run(self) -> None:
        self._armed = False  # before looking, so that what is added meanwhile comes with the next wake-up
        for _ in range(len(self._due)):
            call, args = self._due.popleft()
            call(*args)


class _Call:
    """One call that an asyncio task waits for, seen from the network's thread."""

    def __init__(self, future: asyncio.Future[Any], shore: Shore) -> None:
        self.future, self.shore = future, shore
        self.scope = trio.CancelScope()
        self.ended = False

    def end(self, result: object, error: BaseException | None = None) -> None:
        """Say how it ended; only the first word counts."""
        if not self.ended:
            self.ended = True
            self.shore.post(self._settle, result, error)

    def _settle(self, result: object, error: BaseException | None) -> None:
        if self.future.done():
            return
        if error is None:
            self.future.set_result(result)
        else:
            self.future.set_exception(error)


class NetworkThread:
    """The thread; `borrow` it, `give_back` once. Methods with no other word belong to asyncio's side."""

    _lock = threading.Lock()
    _current: NetworkThread | None = None

    def __init__(self) -> None:
        self._borrowers = 0
        self._due: deque[tuple[Callable[..., object], tuple[Any, ...]]] = deque()
        self._shores: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Shore] = weakref.WeakKeyDictionary()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._main, name=NAME, daemon=True)

    @classmethod
    def borrow(cls) -> NetworkThread:
        """The thread of this process, started if need be. Blocks for the import of libp2p: not for an event loop."""
        from bacalhau_node.transports.libp2p import host  # noqa: F401, PLC0415 - two seconds that the thread must not take

        with cls._lock:
            if cls._current is None:
                cls._current = cls()
            return cls._current.lent()

    def lent(self) -> NetworkThread:
        """The same, with one borrower more; starts with the first."""
        if not self._borrowers:
            self._thread.start()
            if not self._ready.wait(START_SECONDS):
                raise BugError(f"the network's thread did not start in {START_SECONDS} s")
        self._borrowers += 1
        return self

    def give_back(self) -> None:
        """Say that one borrower is done; the thread ends after the last one, and this waits for it."""
        with self._lock:
            self._borrowers -= 1
            if self._borrowers:
                return
            NetworkThread._current = None
        self.post(self._nursery.cancel_scope.cancel)
        self._thread.join()

    def shore(self) -> Shore:
        """The end of the bridge at the loop that runs now."""
        loop = asyncio.get_running_loop()
        shore = self._shores.get(loop)
        if shore is None:
            shore = self._shores[loop] = Shore(loop)
        return shore

    def call(self, work: Callable[..., object], *args: Any) -> asyncio.Future[Any]:
        """Run `work(*args)` over there, and what it returns if that has to be awaited; cancelling cancels it."""
        call = _Call(asyncio.get_running_loop().create_future(), self.shore())
        call.future.add_done_callback(lambda future: self.post(call.scope.cancel) if future.cancelled() else None)
        try:
            self._post(self._begin, call, work, args)
        except trio.RunFinishedError:
            call.future.set_exception(NodeUnreachable("the network's thread has ended: start the node again"))
        return call.future

    def post(self, work: Callable[..., object], *args: Any) -> None:
        """Run `work(*args)`, which must neither raise nor wait, over there; nothing happens after its end."""
        try:
            self._post(work, *args)
        except trio.RunFinishedError:
            log.debug("the network's thread has ended; %s is not called", work)

    async def start(self, work: Callable[..., Any], *args: Any) -> None:
        """From over there: run an async function in the background, from when it says that it has started."""
        await self._nursery.start(guarded_start, work, *args)

    def _main(self) -> None:
        try:
            trio.run(self._until_cancelled)
        except Exception:  # the last boundary of a thread: whoever waits was told as the tasks ended
            log.exception("the network's thread broke down")

    async def _until_cancelled(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        async with trio.open_nursery() as self._nursery:
            self._ready.set()
            await trio.sleep_forever()

    def _post(self, work: Callable[..., object], *args: Any) -> None:
        self._due.append((work, args))
        self._token.run_sync_soon(self._run, idempotent=True)

    def _run(self) -> None:
        for _ in range(len(self._due)):
            work, args = self._due.popleft()
            work(*args)

    def _begin(self, call: _Call, work: Callable[..., object], args: tuple[Any, ...]) -> None:
        try:
            result = work(*args)
        except Exception as error:  # noqa: BLE001 - whoever called gets it
            call.end(None, error)
            return
        if isawaitable(result):
            self._nursery.start_soon(self._finish, call, result)
        else:
            call.end(result)

    async def _finish(self, call: _Call, work: Any) -> None:
        try:
            with call.scope:
                call.end(await work)
        except Exception as error:  # noqa: BLE001 - whoever called gets it
            call.end(None, error)
        finally:
            call.end(None, NodeUnreachable("the network's thread has ended"))


async def guarded_start(work: Callable[..., Any], *args: Any, task_status: Any) -> None:
    """`guarded`, for what says when it has started."""
    await guarded(partial(work, task_status=task_status), *args)


async def guarded(work: Callable[..., Any], *args: Any) -> None:
    """The task boundary of the network's thread: what was not foreseen is told with its traceback."""
    try:
        await work(*args)
    except Exception:  # see above
        log.exception("a task of the network failed")
