"""How a task waits for the one thing that only it waits for."""

from __future__ import annotations

import trio


class Waiting:
    """A place where at most one task waits until it is woken, cheaper than an event."""

    def __init__(self) -> None:
        self._task: trio.lowlevel.Task | None = None

    async def wait(self) -> None:
        """Wait for `wake`."""
        if self._task is not None:
            raise trio.BusyResourceError("two tasks wait for the same end of a stream")
        self._task = trio.lowlevel.current_task()
        await trio.lowlevel.wait_task_rescheduled(self._abort)

    def wake(self) -> None:
        """Let the task that waits, if there is one, go on."""
        task, self._task = self._task, None
        if task is not None:
            trio.lowlevel.reschedule(task)

    def _abort(self, _: object) -> trio.lowlevel.Abort:
        self._task = None
        return trio.lowlevel.Abort.SUCCEEDED
