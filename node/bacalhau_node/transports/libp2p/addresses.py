"""Multiaddrs as people and nodes write them: where to listen, and whom to dial where."""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Sequence
from typing import NamedTuple

import trio
from libp2p.peer.id import ID
from libp2p.utils.address_validation import expand_wildcard_address
from multiaddr import Multiaddr
from multiaddr.exceptions import Error as MultiaddrError

from bacalhau_node.errors import SpecError
from bacalhau_node.ids import NodeId

NAMES = ("ip4", "ip6", "dns", "dns4", "dns6")
FAMILIES = {"ip4": socket.AF_INET, "ip6": socket.AF_INET6}
WAITING_CONNECTIONS = 1_024
IN_PROCESS = "/memory/0"
"""The address of a node that only its own process can dial."""


class Where(NamedTuple):
    """The node that an address names, and its host and port; None where only this process can dial it."""

    node: NodeId
    tcp: tuple[str, int] | None


def where(address: str) -> Where:
    """Read an address to dial; raises `SpecError` for anything else."""
    parts = _parts(address)
    if "p2p" not in parts:
        raise SpecError(f"{address} does not say which node is there: add /p2p/ and the node's id to it")
    try:
        ID.from_string(parts["p2p"])
    except ValueError as error:
        raise SpecError(f"{address}: {parts['p2p']} is not a node's id") from error
    host = next((parts[name] for name in NAMES if name in parts), None)
    if host is not None and "tcp" in parts:
        return Where(parts["p2p"], (host, int(parts["tcp"])))
    if "memory" in parts:
        return Where(parts["p2p"], None)
    raise SpecError(f"{address} is no address that this node can dial: it knows /ip4, /ip6 and /dns with /tcp")


def listeners(listen: Sequence[str]) -> list[trio.SocketListener]:
    """Sockets at all these addresses, or none; raises `SpecError`."""
    with contextlib.ExitStack() as undo:
        found = []
        for address in listen:
            found.append(one := listener(address))
            undo.callback(one.socket.close)
        undo.pop_all()
    return found


def listener(address: str) -> trio.SocketListener:
    """A socket that listens at `/ip4/…/tcp/PORT` or `/ip6/…/tcp/PORT`, alone; raises `SpecError` where it can't."""
    parts = _parts(address)
    family = next((name for name in FAMILIES if name in parts), None)
    if family is None or "tcp" not in parts:
        raise SpecError(f"{address} is no address to listen on: write /ip4/0.0.0.0/tcp/4001, or port 0 for any")
    sock = socket.socket(FAMILIES[family], socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # past connections of the port don't matter
        if family == "ip6":
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind((parts[family], int(parts["tcp"])))
        sock.listen(WAITING_CONNECTIONS)
        sock.setblocking(False)
    except OSError as error:
        sock.close()
        raise SpecError(f"this node can't listen on {address}: {_why(error)}") from error
    return trio.SocketListener(trio.socket.from_stdlib_socket(sock))


def reachable(sockets: Sequence[trio.SocketListener]) -> list[str]:
    """The addresses that lead to these sockets; of one that listens everywhere, this machine's own comes last."""
    found = []
    for one in sockets:
        host, port, *_ = one.socket.getsockname()
        family, loopback = ("ip6", "::1") if ":" in host else ("ip4", "127.0.0.1")
        hosts = [host]
        if host in {"0.0.0.0", "::"}:  # noqa: S104 - where its user wants to listen
            every = (
                a.value_for_protocol(family) for a in expand_wildcard_address(Multiaddr(f"/{family}/{host}/tcp/{port}"))
            )
            hosts = [*(a for a in every if a != loopback), loopback]
        found += [f"/{family}/{a}/tcp/{port}" for a in hosts]
    return found


def remote(stream: trio.SocketStream) -> str:
    """Who is at the other end of a socket, as far as it can be told."""
    try:
        return str(stream.socket.getpeername()[0])
    except OSError:
        return "somebody"


def _why(error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return "the port is in use; choose another, or port 0 for any free one"
    return error.strerror or str(error)


def _parts(address: str) -> dict[str, str]:
    try:
        return {protocol.name: value for protocol, value in Multiaddr(address).items()}
    except (MultiaddrError, ValueError) as error:
        raise SpecError(f"{address} is not a multiaddr (/ip4/10.0.0.5/tcp/4001/p2p/12D3…): {error}") from error
