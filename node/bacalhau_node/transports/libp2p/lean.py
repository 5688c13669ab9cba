"""libp2p's own host, without its ideas of whom to connect to, whom to drop, and what to ask everybody.

Left out are: every security but noise (with plaintext among the offers a peer's id would only be claimed), the resource
manager, the automatic dialler, the pruning of connections, identify on every new connection (it is still answered), its
transports, and its yamux (see `yamux`).
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Any

from libp2p import new_host
from libp2p.abc import IMuxedConn, ISecureConn
from libp2p.crypto.keys import KeyPair
from libp2p.crypto.x25519 import create_new_key_pair as create_noise_key
from libp2p.host.basic_host import BasicHost
from libp2p.network.auto_connector import AutoConnector
from libp2p.network.config import ConnectionConfig
from libp2p.network.connection import swarm_connection
from libp2p.network.stream.net_stream import NetStream
from libp2p.network.swarm import Swarm
from libp2p.peer.id import ID
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE
from libp2p.security.noise.transport import Transport as Noise
from libp2p.stream_muxer.muxer_multistream import MuxerMultistream
from multiaddr import Multiaddr

from bacalhau_node.errors import ProtocolError
from bacalhau_node.transports.libp2p import yamux

HANDSHAKE_SECONDS = 15
ENOUGH = 100_000
"""More connections than there are: how many this node has is for membership to decide."""

Blame = Callable[[ID, ProtocolError], None]
Handler = Callable[[Any], Awaitable[None]]


class _NoDialler(AutoConnector):
    """Instead of what would dial every peer that was ever heard of."""

    async def run_background_task(self, nursery: object) -> None:
        """Nothing is done in the background."""

    async def maybe_connect(self) -> None:
        """Nobody is dialled."""


class _Muxers(MuxerMultistream):
    """Negotiates yamux like its base, which would then take libp2p's own class whatever it was given."""

    def __init__(self, blame: Blame) -> None:
        super().__init__({yamux.PROTOCOL: yamux.Conn}, HANDSHAKE_SECONDS)
        self._blame = blame

    async def new_conn(self, conn: ISecureConn, peer_id: ID) -> IMuxedConn:
        """The connection with streams on it."""
        protocol, _ = await self._selector.select(conn, conn.is_initiator, self.negotiate_timeout)
        return self._annotate_connection(yamux.Conn(conn, peer_id, blame=self._blame), conn, protocol)


def lean_host(keys: KeyPair, *, addresses: Callable[[], list[Multiaddr]], blame: Blame, incoming: Handler) -> BasicHost:
    """A host that advertises `addresses`, and gives every stream that a peer opens to `incoming`."""
    _keep_quiet()
    host = new_host(
        key_pair=keys,
        sec_opt={NOISE: Noise(keys, noise_privkey=create_noise_key().private_key)},
        muxer_opt={yamux.PROTOCOL: yamux.Conn},
        connection_config=ConnectionConfig(
            max_connections=ENOUGH,
            max_connections_per_peer=ENOUGH,
            high_watermark=ENOUGH,
            min_connections=0,
            low_watermark=0,
            inbound_upgrade_timeout=HANDSHAKE_SECONDS,
            outbound_upgrade_timeout=HANDSHAKE_SECONDS,
        ),
        transports=[],
        addrs_factory=lambda _: addresses(),
        disable_identify_address_discovery=True,
    )
    assert isinstance(host, BasicHost)
    swarm = swarm_of(host)
    swarm.set_resource_manager(None)
    swarm.auto_connector = _NoDialler(swarm)
    swarm.notifees.clear()  # among them the one that asks every new peer to identify itself
    swarm.upgrader.muxer_multistream = _Muxers(blame)

    async def unwrapped(stream: Any) -> None:
        assert isinstance(stream, NetStream)
        await incoming(stream)

    swarm.set_stream_handler(unwrapped)
    return host


def swarm_of(host: BasicHost) -> Swarm:
    """The host's connections."""
    swarm = host.get_network()
    assert isinstance(swarm, Swarm)
    return swarm


def _keep_quiet() -> None:
    """Have libp2p say nothing unless its user wants to hear it (`LIBP2P_DEBUG`): what matters is told by `Complaints`.

    One of its modules logs by the functions of `logging` itself, which put a handler on the root logger of whoever
    imports it: it gets a logger instead.
    """
    logger = logging.getLogger("libp2p")
    if logger.level == logging.WARNING and not logger.handlers:
        logger.setLevel(logging.CRITICAL + 1)
    setattr(swarm_connection, "logging", logging.getLogger("libp2p.network.connection"))  # noqa: B010 - a module's name
