"""Who may run next: shares of a machine, handed out in the order in which they were asked for."""

from __future__ import annotations

import asyncio
from collections import deque


class Turns:
    """`total` shares. A shard of the usual size takes one; one that wants more memory or cores takes more.

    First come, first served, whatever the sizes: a large shard is not overtaken for ever by small ones.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self._free = total
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @property
    def crowded(self) -> bool:
        """Whether somebody waits."""
        return bool(self._waiting)

    @property
    def full(self) -> bool:
        """Whether a shard of the usual size would have to wait."""
        return self._free < 1 or self.crowded

    async def take(self, shares: int) -> None:
        """Wait for so many shares (at most all) and take them; a cancelled wait takes none."""
        if self._free >= shares and not self._waiting:
            self._free -= shares
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append((shares, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.give(shares)
            else:
                self._waiting.remove((shares, turn))
                self._serve()
            raise

    def give(self, shares: int) -> None:
        """Give shares back."""
        self._free += shares
        self._serve()

    def _serve(self) -> None:
        while self._waiting and self._waiting[0][0] <= self._free:
            shares, turn = self._waiting.popleft()
            self._free -= shares
            turn.set_result(None)
