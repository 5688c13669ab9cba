"""The socket at which the API listens: how many connections there may be, in all and from one address.

Theory of operation. A connection is an open file, of which a process has a number (1,024 by default) that it needs for
its work, too: with none left no shard starts and no turn is committed. So connections are counted where they are made,
before TLS and before a byte of a request: asyncio takes them by `accept` of this socket, and ends them by `close` of
what that gave. The first `SPARE` beyond a limit are **surplus**: their request is answered, by 503 and a sentence.
What comes on top of them is closed at once.

On loopback all have one address, programs of this machine as well as whoever comes through a proxy or `ssh -L`: there
only their number in all is limited. One network of IPv6 (/64) counts as one address: it is what a single line is given.
"""

from __future__ import annotations

import ipaddress
import resource
import socket
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any, Final

from bacalhau_node.literals import is_loopback

SPARE: Final = 16

_LEAST, _MOST = 64, 10_000
_BITS: Final = 64


Place = tuple[Any, ...]
"""An IP address and a port, as sockets give them."""


class Seats:
    """Who is connected: at most `most`, and `each` from one address."""

    def __init__(self, most: int, each: int) -> None:
        self.most, self.each = most, each
        self._taken: Counter[str] = Counter()
        self._surplus: set[Place] = set()

    def take(self, place: Place) -> bool:
        """Count a new connection; False if it has to be closed, and does not count."""
        who, count = _who(place[0]), self._taken.total()
        from_one = 0 if is_loopback(place[0]) else self._taken[who]
        if count >= self.most + SPARE or from_one >= self.each + SPARE:
            return False
        if count >= self.most or from_one >= self.each:
            self._surplus.add(place)
        self._taken[who] += 1
        return True

    def leave(self, place: Place) -> None:
        """A connection that was counted is over."""
        self._taken -= Counter((_who(place[0]),))
        self._surplus.discard(place)

    def is_surplus(self, place: Place) -> bool:
        """Whether a connection was one too many when it came."""
        return place in self._surplus


class Door(socket.socket):
    """A listening socket that takes as many connections as there are `seats`."""

    def __init__(self, family: int, kind: int, protocol: int) -> None:
        super().__init__(family, kind, protocol)
        most = usual_most()
        self.seats = Seats(most, most // 2)

    def accept(self) -> tuple[socket.socket, Place]:
        """The next connection and its address; raises `BlockingIOError` when there is none, or one too many."""
        plain, place = super().accept()
        if not self.seats.take(place):
            plain.close()
            raise BlockingIOError
        leave = partial(self.seats.leave, place)
        return _Visitor(plain, leave), place


class _Visitor(socket.socket):
    """A connection that says when it is closed."""

    def __init__(self, plain: socket.socket, gone: Callable[[], None]) -> None:
        super().__init__(plain.family, plain.type, plain.proto, fileno=plain.detach())
        self._gone: Callable[[], None] | None = gone

    def close(self) -> None:
        """Close it; closing twice is closing once."""
        super().close()
        gone, self._gone = self._gone, None
        if gone is not None:
            gone()


def usual_most() -> int:
    """A quarter of the files that this process may open: its links to other nodes may have another half."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MOST if soft == resource.RLIM_INFINITY else min(_MOST, max(_LEAST, soft // 4))


def _who(host: str) -> str:
    """Whom an address stands for."""
    address = ipaddress.ip_address(host.partition("%")[0])
    if isinstance(address, ipaddress.IPv4Address) or address.ipv4_mapped is not None:
        return str(address)
    return str(ipaddress.IPv6Network((int(address) >> _BITS << _BITS, _BITS)))
