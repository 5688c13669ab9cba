"""Many nodes in one process: a network to try things on, and to measure.

Theory of operation. Every node is a whole one, with an identity, a store, a journal and a folder of its own; what they
share is the process, its event loop, and the machine's executors. The **slots** of the machine are dealt out: with more
nodes than slots each has one, and the executors queue what is too much. Node 0 is the one to talk to.

Some are opened at a time, and then introduced: each is told of an earlier one by lot, to be linked with, and tells node
0 of itself, so that node 0 can place shards on all of them at once. The rest is membership's. What a job of
one of them runs in need not be isolated from the others, as they all belong to the same person; jobs from outside of
the devstack get what the rules for other people's jobs say.

**Bad actors** are real nodes whose executor is hostile: it gives wrong answers, takes and never runs, or boasts of
slots that it doesn't have. `--replicas` and `--agree` find the first kind; time finds the others.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import random
import resource
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final, Literal

from msgspec import structs

from bacalhau_node.errors import SpecError
from bacalhau_node.executors.fake import FakeExecutor
from bacalhau_node.folders import NodeFolder, take_folder
from bacalhau_node.ids import JobId, NodeId
from bacalhau_node.messages import Copy, Records
from bacalhau_node.network import NetworkSettings, Open, new_archive, over_libp2p, over_memory
from bacalhau_node.node import Node, open_node
from bacalhau_node.opening import machine_executors
from bacalhau_node.ports import Capabilities, Executor, ExecutorEvent, RawOutcome, RawValue, ShardTask, Target
from bacalhau_node.protocol import events as ev
from bacalhau_node.protocol.membership import Settings
from bacalhau_node.selection import NO_RULES, Selection
from bacalhau_node.spec import JobSpec
from bacalhau_node.topology import GROUP
from bacalhau_node.transports.memory import MemoryHub

ALL_MET: Final = 60.0
"""Seconds that the nodes may take to know each other; then the devstack is given out as it is."""

AT_ONCE: Final = 16
"""Nodes that are opened at the same time: they wait for the disk and for threads (a guess)."""

COLLECTED: Final = (50_000, 20, 100)
"""When Python's collector looks for garbage: a network is millions of objects that stay (a third of what opening a
thousand nodes costs was spent on looking at them)."""

LISTEN: Final = "/ip4/127.0.0.1/tcp/0"
BAD: Final = "bad-actor"
"""The label of a node that is hostile on purpose, and says how."""

TransportName = Literal["libp2p", "memory"]
Start = Literal["random", "star", "frozen star"]
Work = Literal["real", "fake"] | Executor

_SHARED_MEMORY = MemoryHub()


class _Machine:
    """The executors of this machine, lent to many nodes; a job is released when the last node has released it."""

    def __init__(self, executors: Sequence[Executor], nodes: int) -> None:
        self._executors, self._nodes = executors, nodes
        self._users: dict[tuple[int, JobId], set[int]] = defaultdict(set)

    def lend(self, node: int) -> list[Executor]:
        """The executors as one node sees them."""
        return [_Lent(self, index, node) for index in range(len(self._executors))]

    def executor(self, index: int) -> Executor:
        """One of them."""
        return self._executors[index]

    def share(self, slots: int) -> int:
        """The slots of one node."""
        return max(1, slots // self._nodes)

    def uses(self, index: int, job: JobId, node: int) -> None:
        """The node runs something of the job."""
        self._users[index, job].add(node)

    async def release(self, index: int, job: JobId, node: int) -> None:
        """The node runs nothing of the job any more."""
        users = self._users.get((index, job), set())
        users.discard(node)
        if not users and self._users.pop((index, job), None) is not None:
            await self._executors[index].release(job)

    async def close(self) -> None:
        """End all of them."""
        await asyncio.gather(*(executor.close() for executor in self._executors))


class _Lent:
    """`ports.Executor`: one of the machine's executors, in the hands of one node."""

    def __init__(self, machine: _Machine, index: int, node: int) -> None:
        self._machine, self._index, self._node = machine, index, node
        self._executor = machine.executor(index)

    async def probe(self) -> Capabilities:
        """What the executor can do, with this node's share of its slots."""
        told = await self._executor.probe()
        return structs.replace(told, slots=self._machine.share(told.slots))

    def check(self, spec: JobSpec) -> str | None:
        """See `ports.Executor`."""
        return self._executor.check(spec)

    async def target(self, spec: JobSpec) -> Target:
        """See `ports.Executor`."""
        return await self._executor.target(spec)

    async def run(self, task: ShardTask, emit: Callable[[ExecutorEvent], None]) -> RawOutcome:
        """See `ports.Executor`."""
        self._machine.uses(self._index, task.execution.job, self._node)
        return await self._executor.run(task, emit)

    async def release(self, job: JobId) -> None:
        """See `ports.Executor`."""
        await self._machine.release(self._index, job, self._node)

    async def close(self) -> None:
        """Nothing: what was lent is closed by its owner."""


# --- bad actors ---


class WrongAnswers:
    """A hostile `ports.Executor`: runs what it should, and answers with something else."""

    how = "answers wrongly"

    def __init__(self, good: Executor) -> None:
        self._good = good

    async def probe(self) -> Capabilities:
        """See `ports.Executor`."""
        return await self._good.probe()

    def check(self, spec: JobSpec) -> str | None:
        """See `ports.Executor`."""
        return self._good.check(spec)

    async def target(self, spec: JobSpec) -> Target:
        """See `ports.Executor`."""
        return await self._good.target(spec)

    async def run(self, task: ShardTask, emit: Callable[[ExecutorEvent], None]) -> RawOutcome:
        """The outcome, with a value that the shard never had."""
        told = await self._good.run(task, emit)
        return structs.replace(told, value=RawValue("json", "str", b'"a wrong answer"'))

    async def release(self, job: JobId) -> None:
        """See `ports.Executor`."""
        await self._good.release(job)

    async def close(self) -> None:
        """See `ports.Executor`."""
        await self._good.close()


class NeverRuns(WrongAnswers):
    """A hostile `ports.Executor`: takes everything and begins nothing."""

    how = "takes and never runs"

    async def run(self, task: ShardTask, emit: Callable[[ExecutorEvent], None]) -> RawOutcome:
        """Wait for ever."""
        del task, emit  # nobody looks at them
        await asyncio.Event().wait()
        raise AssertionError("an event that nobody sets was set")


class Boasts(WrongAnswers):
    """A hostile `ports.Executor`: says that it has a thousand slots."""

    how = "boasts of slots"

    async def probe(self) -> Capabilities:
        """A lie."""
        return structs.replace(await self._good.probe(), slots=1_000)

    async def run(self, task: ShardTask, emit: Callable[[ExecutorEvent], None]) -> RawOutcome:
        """The truth, when there is a slot at last."""
        return await self._good.run(task, emit)


BAD_ACTORS: Final = (WrongAnswers, NeverRuns, Boasts)


# --- the devstack ---


class Devstack:
    """Running nodes, from `open_devstack` to `close`."""

    def __init__(self, nodes: list[Node], machine: _Machine, folder: contextlib.AbstractContextManager[object]) -> None:
        self.nodes = nodes
        self._machine, self._folder = machine, folder

    @property
    def first(self) -> Node:
        """The node to talk to."""
        return self.nodes[0]

    @property
    def peer(self) -> str:
        """The multiaddr by which another devstack, or a node, joins this one; "" where nobody can."""
        return next(iter(self.first.addresses()), "")

    async def meet(self, *, seconds: float) -> bool:
        """Wait until node 0 knows all others; False when that takes too long."""
        others = len(self.nodes) - 1
        membership = self.first.membership
        assert membership is not None, "every node of a devstack is on a network"
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while len(membership) < others:  # noqa: ASYNC110 - membership is a machine: nobody is woken by it
                    await asyncio.sleep(0.02)
        return len(membership) >= others

    async def kill(self, index: int) -> Node:
        """End a node without a word, as if its process had been killed; what it journaled is on disk."""
        node = self.nodes.pop(index)
        await node.close(farewell=False)
        return node

    async def close(self) -> None:
        """End all nodes, and then the executors."""
        await asyncio.gather(*(node.close(farewell=False) for node in self.nodes))
        await self._machine.close()
        with self._folder:
            pass


async def open_devstack(  # noqa: PLR0913 - what a network can be like
    nodes: int = 3,
    *,
    root: Path,
    transport: TransportName = "libp2p",
    peers: Sequence[str] = (),
    bad_actors: int = 0,
    work: Work = "real",
    network_key: str = "",
    rules: Selection = NO_RULES,
    start: Start = "random",
    group: str = "",
) -> Devstack:
    """So many nodes below `root` that know each other; `peers`: multiaddrs of others, which node 0 joins.

    `start`: to whom each is introduced; a "frozen star" never exchanges peers. `group`: what pictures call them. The
    last `bad_actors` nodes are hostile. `work`: on the executors of this machine, or only as if, or on this one.
    Raises `SpecError`.
    """
    if not 1 <= nodes <= 10_000 or not 0 <= bad_actors < nodes:
        raise SpecError(f"{nodes} nodes, {bad_actors} bad ones: from 1 to 10000 are possible, and node 0 is a good one")
    _allow_files()
    async with contextlib.AsyncExitStack() as undo:
        folder = await asyncio.to_thread(take_folder, root / "machine")
        held = undo.enter_context(contextlib.ExitStack())
        held.callback(folder.close)
        held.enter_context(_rare_collections())
        machine = _Machine(_executors(work, folder, nodes), nodes)
        undo.push_async_callback(machine.close)
        family: set[NodeId] = set()
        settings = NetworkSettings(
            open=_opener(transport, network_key),
            rules=rules,
            labels={GROUP: group or root.name},
            archive=new_archive(),
            family=family,
            neighbours=_neighbours(nodes, start),
        )

        async def opened(index: int) -> Node:
            bad = BAD_ACTORS[index % len(BAD_ACTORS)] if index >= nodes - bad_actors else None
            labels = settings.labels if bad is None else {**settings.labels, BAD: bad.how}
            lent = machine.lend(index)
            node = await open_node(
                root / f"{index:04}",
                executors=lent if bad is None else [bad(one) for one in lent],
                network=replace(settings, labels=labels),
            )
            undo.push_async_callback(node.close)
            family.add(node.id)
            return node

        stack = Devstack(await _introduced(opened, nodes, peers, start=start), machine, held)
        await stack.meet(seconds=ALL_MET)
        undo.pop_all()
    return stack


async def _introduced(
    opened: Callable[[int], Awaitable[Node]], count: int, peers: Sequence[str], *, start: Start
) -> list[Node]:
    """Open so many nodes, some at a time, and introduce each to an earlier one: to node 0 in a star."""
    chance = random.Random(count)  # noqa: S311 - a network that can be had again, no secret
    room = asyncio.Semaphore(AT_ONCE)
    loop = asyncio.get_running_loop()
    known: list[asyncio.Future[Node]] = [loop.create_future() for _ in range(count)]

    async def introduce(index: int, earlier: int) -> Node:
        async with room:
            node = await opened(index)
        known[index].set_result(node)
        names = (await known[earlier]).addresses()[:1] if index else peers
        node.engine.post(ev.Join(tuple(names)))
        if index and node.membership is not None:
            about_itself = Records((Copy(node.membership.view.own.signed, 0),))
            (await known[0]).engine.post(ev.Received(node.id, about_itself))
        return node

    async with asyncio.TaskGroup() as group:
        earlier = [chance.randrange(max(1, index)) if start == "random" else 0 for index in range(count)]
        tasks = [group.create_task(introduce(*pair)) for pair in enumerate(earlier)]
    return [task.result() for task in tasks]


def _executors(work: Work, folder: NodeFolder, nodes: int) -> Sequence[Executor]:
    if work == "real":
        return machine_executors(folder)
    return [FakeExecutor(slots=nodes, isolation="sandbox") if work == "fake" else work]


def _opener(transport: TransportName, network_key: str) -> Open:
    """Within the process nodes reach each other without sockets; those of other processes place shards on each."""
    if transport == "memory":
        return over_memory(_SHARED_MEMORY)
    return over_libp2p(listen=(LISTEN,), network_key=network_key)


def _neighbours(nodes: int, start: Start) -> Settings:
    if start == "frozen star":  # nobody has too few neighbours, nor too many
        return Settings(low=0, target=nodes, high=nodes, period=_period(nodes))
    return Settings(period=_period(nodes))


def _period(nodes: int) -> tuple[float, float]:
    """Seconds between two comparisons of views: about fifty of them a second in the whole process, at most."""
    shortest = min(20.0, max(1.0, nodes / 50))
    return shortest, 1.5 * shortest


@contextlib.contextmanager
def _rare_collections() -> Iterator[None]:
    before = gc.get_threshold()
    gc.set_threshold(*COLLECTED)
    try:
        yield
    finally:
        gc.set_threshold(*before)


def _allow_files() -> None:
    """Let this process open as many files as it may: each node has about ten."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
