"""Which addresses a node asks for inputs: a job of somebody else must not reach what only this machine can reach.

Theory of operation. What a URL names is decided when a connection is made: a name may lead anywhere, lead elsewhere
a moment later, or a redirect may follow. So the check sits where the socket is made, after the name was
resolved and for every redirect anew: aiohttp asks `Guard.socket` for each address that it is about to dial, and
no second look-up happens in between. (A resolver of our own would not be asked for literal addresses.) The host's
text is looked at too, which is all there is where a proxy dials in our place.

For other people's jobs only the public internet is left, and no proxy is used. The owner's own jobs may ask any
address but those at which clouds hand out the machine's credentials. What another node serves may also be asked for
at the very address of its link to this one, or anywhere on this machine if the link is from here: in a private
network it is there, and has shown that it is.
"""

from __future__ import annotations

import ipaddress
import socket
from typing import Any, Final

from bacalhau_node.errors import ContentError

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

METADATA: Final = frozenset(
    map(
        ipaddress.ip_address,
        (
            "169.254.169.254",  # AWS, Azure, Google, OpenStack and others
            "169.254.170.2",  # AWS containers
            "169.254.170.23",  # AWS pods
            "fd00:ec2::254",
            "fd00:ec2::23",
            "fd20:ce::254",  # Google
            "100.100.100.200",  # Alibaba
            "168.63.129.16",  # Azure's host, at an address that counts as public
        ),
    )
)
METADATA_NAMES: Final = frozenset(
    {"metadata", "metadata.google.internal", "metadata.goog", "instance-data.ec2.internal"}
)

_REFUSED: Final = tuple(
    map(
        ipaddress.ip_network,
        (
            # what `is_global` of some Python versions lets pass
            "192.0.0.0/24",
            "192.88.99.0/24",
            "224.0.0.0/4",
            "fec0::/10",
            "ff00::/8",
            # IPv6 that stands for IPv4: whoever translates it is on our side of the wall
            "::/96",
            "64:ff9b::/96",
            "64:ff9b:1::/48",
            "2001::/32",
            "2002::/16",
        ),
    )
)
_NAT64: Final = (ipaddress.IPv6Network("64:ff9b::/96"), ipaddress.IPv6Network("::/96"))


class Refused(OSError):
    """An address that must not be dialled. An `OSError`, so that aiohttp tries the other addresses of the name."""


class Guard:
    """The rules for one kind of asker: `own` for the owner of this node, whose jobs may ask nearly everybody.

    `near`: the IP address from which the asker is linked to this node, "" for none; it may be asked, too.
    """

    def __init__(self, *, own: bool, near: str = "") -> None:
        self.own = own
        self._near = _meant(ipaddress.ip_address(near)) if near else None

    def check_host(self, host: str) -> None:
        """Raise `ContentError` if a URL's host, as it is written, is one that is never asked."""
        try:
            problem = self._problem(ipaddress.ip_address(host.removeprefix("[").removesuffix("]")))
        except ValueError:
            name = host.rstrip(".").lower()
            problem = f"{name} hands out this machine's credentials" if name in METADATA_NAMES else None
        if problem:
            raise ContentError(f"{problem}: a node asks no such address for inputs")

    def socket(self, info: tuple[Any, ...]) -> socket.socket:
        """A new socket for one result of `getaddrinfo`; raises `Refused`. For `TCPConnector(socket_factory=…)`."""
        family, kind, protocol, _, place = info
        if problem := self._problem(ipaddress.ip_address(place[0])):
            raise Refused(f"{problem}: a node asks no such address for inputs")
        return socket.socket(family=family, type=kind, proto=protocol)

    def _problem(self, address: Address) -> str | None:
        """Why `address` is not dialled; None if it may be."""
        meant = _meant(address)
        if meant in METADATA:
            return f"{address} hands out this machine's credentials"
        if self.own or self._is_near(meant):
            return None
        mapped = isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None
        seen = (meant,) if mapped else (address, meant)
        public = meant.is_global and not any(one in net for one in seen for net in _REFUSED)
        return None if public else f"{address} is not an address of the public internet"

    def _is_near(self, meant: Address) -> bool:
        near = self._near
        return near is not None and (meant == near or (meant.is_loopback and near.is_loopback))


def _meant(address: Address) -> Address:
    """The IPv4 address that an IPv6 address stands for, or the address itself, without its zone."""
    if isinstance(address, ipaddress.IPv4Address):
        return address
    if address.ipv4_mapped is not None:
        return address.ipv4_mapped
    if address.sixtofour is not None:
        return address.sixtofour
    if any(address in net for net in _NAT64) and int(address) & 0xFFFFFFFF > 1:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return ipaddress.IPv6Address(int(address))
