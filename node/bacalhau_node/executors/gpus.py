"""The GPUs of this machine: what is there, and which shard has which.

Theory of operation (DESIGN section 6). The driver's own library lists the cards (NVML, by the package
`nvidia-ml-py`, which is loaded only where that library is). A card that is cut into slices (MIG) is
listed as its slices. Cards are handed out by UUID and never by count: asked for "one GPU", a daemon
gives everybody the first.

A shard takes its cards before it gets a slot, and gives them back when whatever it ran in is gone, on
every way out. Those who wait are served in the order in which they came. A card has one shard; with
`--gpu-share N` it has up to N shards of one job.

All of a user's nodes keep out of each other's way by a lock for each card, which the system takes
back when a process dies. Nothing is written down, so there is nothing to recover: what runs in a
process, a sandbox or an agent's container dies with its node, and containers that outlived theirs
are removed before a node with cards takes its first job (`plant.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import fcntl
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote

from bacalhau_node.errors import SpecError
from bacalhau_node.literals import size_text
from bacalhau_node.ports import Gpu

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence

    from bacalhau_node.ids import Execution, JobId
    from bacalhau_node.spec import Resources

LIBRARY: Final = "libnvidia-ml.so.1"
"""The driver's library; without it there is no driver."""
NO_DRIVER: Final = "no NVIDIA driver found"
ELSEWHERE_SECONDS: Final = 0.5
"""Between two looks at a card that another node of this user has (a guess: GPU shards last seconds)."""
NO_RUNTIME: Final = (
    "--gpu: the Docker daemon of this node can't give a GPU to an image: "
    "install the NVIDIA Container Toolkit and restart the daemon"
)
"""What a daemon without the hook of that toolkit refuses only when a container starts."""
LOOK_SECONDS: Final = 60.0
"""So long are cards taken to be there: where no process keeps the driver awake, asking it can take a second a card."""
_CONTROL: Final = ("/dev/nvidiactl", "/dev/nvidia-uvm", "/dev/nvidia-uvm-tools")
"""What a program needs to open besides the card itself."""


class NoGpu(SpecError):
    """The cards that a shard waited for are not there any more."""


# --- what is there ---


def detect() -> tuple[tuple[Gpu, ...], str]:
    """(the cards that this process may use, why there are none). Blocks, about a millisecond."""
    try:
        ctypes.CDLL(LIBRARY)
    except OSError:
        return (), NO_DRIVER
    try:
        import pynvml as nvml  # noqa: PLC0415 - an optional extra, and 50 ms: only where there is a driver
    except ImportError:
        return (), "there is an NVIDIA driver; to use it: pip install 'bacalhau-jupyter[gpu]'"
    try:
        found = _asked(nvml)
    except nvml.NVMLError_DriverNotLoaded:
        return (), NO_DRIVER
    except nvml.NVMLError as error:
        return (), f"the NVIDIA driver does not answer: {error}"
    cards = visible(found, os.environ.get("CUDA_VISIBLE_DEVICES"))
    hidden = "CUDA_VISIBLE_DEVICES of the node's process names none" if found else "its NVIDIA driver knows no card"
    return cards, "" if cards else hidden


def _asked(nvml: Any) -> tuple[Gpu, ...]:
    nvml.nvmlInit()
    try:
        return tuple(_cards(nvml))
    finally:
        nvml.nvmlShutdown()


def _cards(nvml: Any) -> Iterator[Gpu]:
    for index in range(nvml.nvmlDeviceGetCount()):
        try:
            card = nvml.nvmlDeviceGetHandleByIndex(index)
            if _is_cut(nvml, card):
                yield from (_described(nvml, each, minor=None) for each in _slices(nvml, card))
            else:
                yield _described(nvml, card, minor=nvml.nvmlDeviceGetMinorNumber(card))
        except (nvml.NVMLError_GpuIsLost, nvml.NVMLError_NoPermission):
            continue  # of no use to anybody; the others are


def _is_cut(nvml: Any, card: Any) -> bool:
    """Whether a card is used by its slices only; there may be none yet."""
    try:
        return bool(nvml.nvmlDeviceGetMigMode(card)[0] == nvml.NVML_DEVICE_MIG_ENABLE)
    except (nvml.NVMLError_NotSupported, nvml.NVMLError_FunctionNotFound):  # an older card, an older driver
        return False


def _slices(nvml: Any, card: Any) -> Iterator[Any]:
    for index in range(nvml.nvmlDeviceGetMaxMigDeviceCount(card)):
        with contextlib.suppress(nvml.NVMLError_NotFound):  # indexes have gaps
            yield nvml.nvmlDeviceGetMigDeviceHandleByIndex(card, index)


def _described(nvml: Any, card: Any, *, minor: int | None) -> Gpu:
    return Gpu(
        uuid=nvml.nvmlDeviceGetUUID(card),
        name=nvml.nvmlDeviceGetName(card),
        memory=nvml.nvmlDeviceGetMemoryInfo(card).total,
        minor=minor,
    )


def visible(cards: Sequence[Gpu], given: str | None) -> tuple[Gpu, ...]:
    """Those of the cards that `CUDA_VISIBLE_DEVICES` (None: unset) leaves to this process, as CUDA reads it.

    It names numbers or starts of UUIDs, and ends at the first that fits none.
    """
    if given is None:
        return tuple(cards)
    left: list[Gpu] = []
    for word in (word.strip() for word in given.split(",")):
        named = [
            card for index, card in enumerate(cards) if word and (word == str(index) or card.uuid.startswith(word))
        ]
        if len(named) != 1 or named[0] in left:
            break
        left += named
    return tuple(left)


def devices(cards: Iterable[Gpu]) -> tuple[Path, ...]:
    """The device files of these whole cards, with those that all cards share, as far as they exist."""
    paths = [*(f"/dev/nvidia{card.minor}" for card in cards if card.minor is not None), *_CONTROL]
    return tuple(path for path in map(Path, paths) if path.exists())


def no_runtime(error: Exception) -> bool:
    """Whether a daemon said that it has nothing by which a container gets a GPU."""
    return "could not select device driver" in str(error)


def variables(uuids: Sequence[str]) -> dict[str, str]:
    """What tells CUDA, and what comes with it, which cards a shard has; none: that it has none."""
    named = ",".join(uuids)
    return {"CUDA_VISIBLE_DEVICES": named, "NVIDIA_VISIBLE_DEVICES": named or "void"}


def listed(cards: Sequence[Gpu]) -> str:
    """The cards for a person: "2 GPUs: NVIDIA A100 (40 GB), NVIDIA T4 (16 GB)"."""
    names = ", ".join(f"{card.name} ({size_text(card.memory)})" for card in cards)
    return f"{len(cards)} GPU{'s' * (len(cards) != 1)}{': ' if cards else ''}{names}"


# --- who has what ---


@dataclass(eq=False, slots=True)
class _Waiter:
    execution: Execution
    count: int
    share: int
    whole: bool
    granted: asyncio.Future[tuple[Gpu, ...]]


@dataclass(slots=True)
class _Held:
    """A card in use: the lock that keeps other nodes off it, and the shards of `job` that have it."""

    lock: int
    job: JobId
    share: int
    by: list[Execution] = field(default_factory=list)


class Gpus:
    """The cards of one node. `folder`: where the locks of all nodes of this user lie. On one asyncio loop."""

    def __init__(self, folder: Path, *, find: Callable[[], tuple[tuple[Gpu, ...], str]] = detect) -> None:
        self.cards: tuple[Gpu, ...] = ()
        self._problem = NO_DRIVER
        self._folder, self._find = folder, find
        self._held: dict[str, _Held] = {}
        self._waiting: list[_Waiter] = []
        self._again: asyncio.TimerHandle | None = None
        self._looking = asyncio.Lock()
        self._looked = 0.0

    @property
    def table(self) -> dict[str, tuple[Execution, ...]]:
        """UUID of each card in use -> the executions that have it."""
        return {uuid: tuple(held.by) for uuid, held in self._held.items()}

    async def look(self) -> None:
        """See which cards there are, unless that was seen just now; the executors of a node ask all at once."""
        async with self._looking:
            now = asyncio.get_running_loop().time()
            if self.cards and now - self._looked < LOOK_SECONDS:
                return
            self.cards, self._problem = await asyncio.to_thread(self._find)
            self._looked = now
        for waiter in list(self._waiting):
            lack = self._lack(waiter.count, whole=waiter.whole)
            if lack is not None and not waiter.granted.done():
                waiter.granted.set_exception(NoGpu(lack))
                self._waiting.remove(waiter)
        self._serve()

    def lack(self, resources: Resources, *, whole: bool = False) -> str | None:
        """Why this node can never give a shard so many cards; None if it can. `whole`: slices of cards don't count."""
        return self._lack(resources.gpus, whole=whole) if resources.gpus else None

    def _lack(self, count: int, *, whole: bool) -> str | None:
        if not self.cards:
            return f"--gpu: this node has no GPU ({self._problem})"
        fitting = self._fitting(count, whole=whole)
        if count <= len(fitting):
            return None
        if len(fitting) < len(self.cards):
            what = "have slices of them only in an image" if whole else "have one slice of a card"
            return f"--gpu {count}: a shard can {what}; this node has {listed(self.cards)}"
        return f"--gpu {count}: this node has {listed(self.cards)}"

    def _fitting(self, count: int, *, whole: bool) -> list[Gpu]:
        """Cards that may serve such a shard. CUDA opens one slice in a process at most."""
        return [card for card in self.cards if card.minor is not None or not (whole or count > 1)]

    @contextlib.asynccontextmanager
    async def hold(
        self, execution: Execution, resources: Resources, *, whole: bool = False
    ) -> AsyncIterator[tuple[Gpu, ...]]:
        """The cards of one execution until it leaves the context, waited for; none if it asks for none.

        Raises `NoGpu` when there are too few (any more).
        """
        if not resources.gpus:
            yield ()
            return
        cards = await self._take(execution, resources, whole=whole)
        try:
            yield cards
        finally:
            self._give(execution, cards)

    async def _take(self, execution: Execution, resources: Resources, *, whole: bool) -> tuple[Gpu, ...]:
        if (lack := self.lack(resources, whole=whole)) is not None:
            raise NoGpu(lack)
        granted: asyncio.Future[tuple[Gpu, ...]] = asyncio.get_running_loop().create_future()
        waiter = _Waiter(execution, resources.gpus, resources.gpu_share, whole, granted)
        self._waiting.append(waiter)
        self._serve()
        try:
            return await granted
        except asyncio.CancelledError:
            if waiter in self._waiting:
                self._waiting.remove(waiter)
                self._serve()
            elif not granted.cancelled() and granted.exception() is None:
                self._give(execution, granted.result())
            raise

    def _give(self, execution: Execution, cards: Iterable[Gpu]) -> None:
        self._drop(execution, cards)
        self._serve()

    def _drop(self, execution: Execution, cards: Iterable[Gpu]) -> None:
        for card in cards:
            held = self._held[card.uuid]
            held.by.remove(execution)
            if not held.by:
                os.close(held.lock)
                del self._held[card.uuid]

    def _serve(self) -> None:
        """Give cards to those who wait, in their order."""
        if self._again is not None:
            self._again.cancel()
            self._again = None
        while self._waiting:
            waiter = self._waiting[0]
            try:
                cards = () if waiter.granted.done() else self._grant(waiter)
            except OSError as error:
                waiter.granted.set_exception(NoGpu(f"a GPU can't be locked for this node: {error}"))
                cards = ()
            if cards is None:
                return
            self._waiting.pop(0)
            if cards:
                waiter.granted.set_result(cards)

    def _grant(self, waiter: _Waiter) -> tuple[Gpu, ...] | None:
        """As many cards as wanted, the least shared first, now in the table; None if there are too few."""
        taken: list[Gpu] = []
        elsewhere = False
        try:
            for card in sorted(self._fitting(waiter.count, whole=waiter.whole), key=self._users):
                if len(taken) < waiter.count:
                    got = self._try(card, waiter)
                    elsewhere |= got is None
                    taken += [card] if got else []
        finally:
            if len(taken) < waiter.count:
                self._drop(waiter.execution, taken)
        if len(taken) == waiter.count:
            return tuple(taken)
        if elsewhere:
            self._again = asyncio.get_running_loop().call_later(ELSEWHERE_SECONDS, self._serve)
        return None

    def _users(self, card: Gpu) -> int:
        held = self._held.get(card.uuid)
        return len(held.by) if held else 0

    def _try(self, card: Gpu, waiter: _Waiter) -> bool | None:
        """Put the card into the table for the waiter; False: it is full, None: another node has it."""
        held = self._held.get(card.uuid)
        if held is None:
            lock = self._lock(card)
            if lock is None:
                return None
            held = self._held[card.uuid] = _Held(lock, waiter.execution.job, waiter.share)
        elif (held.job, held.share) != (waiter.execution.job, waiter.share) or len(held.by) >= held.share:
            return False
        held.by.append(waiter.execution)
        return True

    def _lock(self, card: Gpu) -> int | None:
        self._folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(self._folder / quote(card.uuid, safe=""), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            return None
        return lock


def at_once(cards: Sequence[Gpu], resources: Resources) -> int:
    """How many shards these cards serve at the same time."""
    fitting = [card for card in cards if card.minor is not None or resources.gpus == 1]
    return len(fitting) // resources.gpus * resources.gpu_share
