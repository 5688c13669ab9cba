"""How a node takes part in a network: its name there, what it says about itself, whom it knows, what it moves.

A node that is on no network has none of this: no key, no port, no third machine, no cost.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Container, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final, Protocol

import msgspec

from bacalhau_node import __version__
from bacalhau_node.content.grants import Grants
from bacalhau_node.engine import Network
from bacalhau_node.exchange import Exchange
from bacalhau_node.facilities import Facilities
from bacalhau_node.identity import Identity, read_identity, verify
from bacalhau_node.ids import JobId, NodeId
from bacalhau_node.masking import Secrets
from bacalhau_node.messages import Engine, NodeRecord
from bacalhau_node.packing import SIGNED_FOR, Packing
from bacalhau_node.ports import Capabilities, ContentStore, Transport
from bacalhau_node.protocol import events as ev
from bacalhau_node.protocol.archive import Archive
from bacalhau_node.protocol.compute import Compute
from bacalhau_node.protocol.membership import Membership, Settings
from bacalhau_node.selection import NO_RULES, Guests, Selection
from bacalhau_node.sources.bucket import BucketSource
from bacalhau_node.sources.local import LocalSource
from bacalhau_node.spec import JobSpec
from bacalhau_node.transports.memory import MemoryHub, MemoryTransport

log = logging.getLogger(__name__)

IDENTITY_FILE: Final = "identity"
PEERS_FILE: Final = "peers.json"

REMEMBER_EVERY: Final = 60.0
"""Seconds between two looks at whether the addresses of neighbours have to be written down anew."""

Open = Callable[[Identity], Awaitable[Transport]]
"""Opens a node's transport."""


@dataclass(frozen=True, kw_only=True)
class NetworkSettings:
    """The network that a node joins: `open` opens its transport, `peers` are multiaddrs of nodes to begin with.

    `rules`: for jobs of other nodes; `labels`: what `--constraint` looks at. `archive` is shared by the nodes of one
    process. `family`: nodes of the same owner, whose jobs need not be isolated from this one. `gateway`: the base URL
    at which this node serves content over HTTP. `resume`: unfinished jobs go on when the node is opened again.
    """

    open: Open
    peers: tuple[str, ...] = ()
    rules: Selection = NO_RULES
    labels: Mapping[str, str] = field(default_factory=dict)
    archive: Archive | None = None
    gateway: str = ""
    resume: bool = True
    family: Container[NodeId] = frozenset()
    neighbours: Settings | None = None


def new_archive() -> Archive:
    """An archive for all nodes of a process."""
    return Archive(verify)


def over_memory(hub: MemoryHub) -> Open:
    """The network of one process and loop."""

    async def opened(identity: Identity) -> Transport:
        return MemoryTransport(hub, identity.node)

    return opened


def over_libp2p(*, listen: tuple[str, ...] = (), network_key: str = "", in_process: bool = True) -> Open:
    """A network of libp2p hosts: `listen` are multiaddrs, `network_key` is the secret of a closed one."""

    async def opened(identity: Identity) -> Transport:
        from bacalhau_node.transports.libp2p import LibP2PTransport  # noqa: PLC0415 - trio and libp2p load when needed

        return await LibP2PTransport.open(identity.seed, listen=listen, network_key=network_key, in_process=in_process)

    return opened


class Host(Protocol):
    """What is needed of the node itself."""

    content: ContentStore
    grants: Grants
    facilities: Facilities

    def secrets(self, job: JobId, spec: JobSpec) -> Secrets:
        """The values that were entrusted to it for a job."""
        ...


class Joined:
    """One node on its network, from the moment that its transport is open."""

    def __init__(self, settings: NetworkSettings, folder: Path, identity: Identity, transport: Transport) -> None:
        self.settings, self.identity, self.transport = settings, identity, transport
        self._folder = folder
        self._remembered: tuple[str, ...] = ()
        self._looked = 0.0
        self.membership: Membership | None = None

    @classmethod
    async def open(cls, settings: NetworkSettings, folder: Path) -> Joined:
        """Read who the node is, or make it somebody, and open its transport."""
        identity = await asyncio.to_thread(read_identity, folder / IDENTITY_FILE)
        return cls(settings, folder, identity, await settings.open(identity))

    def exchange(self, node: Host, buckets: BucketSource) -> Exchange:
        """What moves the bytes of the node's jobs."""
        guests = Guests(
            self.settings.rules,
            node.content,
            refuse=node.facilities.refuse,
            family=self.settings.family,
            usual_memory=lambda: node.facilities.capabilities.memory_per_slot,
        )
        packing = Packing(node.content, local=LocalSource(), presign=partial(buckets.presign, seconds=SIGNED_FOR))
        return Exchange(
            self.transport,
            key=self.identity.seed,
            content=node.content,
            grants=node.grants,
            packing=packing,
            secrets=lambda job, spec: node.secrets(job, spec).values,
            guests=guests,
            gateway=self.settings.gateway,
        )

    def network(self, exchange: Exchange, compute: Compute, facilities: Facilities) -> Network:
        """What the engine has to know of it."""

        def describe() -> NodeRecord:
            self._remember()
            return self._record(compute, facilities)

        self.membership = Membership(
            describe(),
            archive=new_archive() if self.settings.archive is None else self.settings.archive,
            sign=self.identity.sign,
            seed=int.from_bytes(self.identity.seed[:8], "big"),
            epoch_ns=time.time_ns(),
            now=asyncio.get_running_loop().time(),
            settings=self.settings.neighbours,
        )
        return Network(exchange, self.membership, describe)

    def first(self) -> ev.Join:
        """What membership is told first."""
        try:
            remembered = msgspec.json.decode((self._folder / PEERS_FILE).read_bytes(), type=tuple[str, ...])
        except (OSError, msgspec.DecodeError):
            remembered = ()
        return ev.Join(tuple(self.settings.peers), remembered)

    def _record(self, compute: Compute, facilities: Facilities) -> NodeRecord:
        engines = tuple(_engine(one) for one in facilities.working())
        return NodeRecord(
            node=self.identity.node,
            version=time.time_ns(),
            addresses=tuple(self.transport.addresses()),
            agent=f"bacalhau-jupyter {__version__}",
            slots=compute.slots,
            room=compute.room,
            engines=engines,
            images=tuple(dict.fromkeys(name for one in facilities.working() for name in one.images)),
            labels=dict(self.settings.labels),
            gateway=self.settings.gateway,
            jobs=compute.active,
        )

    def _remember(self) -> None:
        now = time.monotonic()
        if self.membership is None or now - self._looked < REMEMBER_EVERY:
            return
        self._looked = now
        self.remember()

    def remember(self) -> None:
        """Write down where the neighbours are, for the next life."""
        peers = self.membership.peers() if self.membership is not None else ()
        if not peers or peers == self._remembered:
            return
        fresh = self._folder / f"{PEERS_FILE}.new"
        try:
            fresh.write_bytes(msgspec.json.encode(peers))
            fresh.replace(self._folder / PEERS_FILE)
        except OSError as error:
            log.warning("the addresses of neighbours can't be written down: %s", error)
        self._remembered = peers


def _engine(one: Capabilities) -> Engine:
    return Engine(one.executor, one.isolation, one.python, one.memory_per_slot, tuple(gpu.memory for gpu in one.gpus))
