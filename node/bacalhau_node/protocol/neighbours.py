"""Neighbours and suspects, and how much each node has sent lately.

Most known nodes have no more than a record; only neighbours and suspects have a `Peer`, which holds their story.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from bacalhau_node.ids import NodeId
from bacalhau_node.protocol.tables import MEMBER, Story, illegal, remember

FLOOD: Final = 64
"""Membership messages of one node in `FLOOD_TIME` seconds; more, and it is hung up on."""

FLOOD_TIME: Final = 10.0
BANNED: Final = 600.0
"""Seconds during which nobody listens to a node that did wrong."""

MAX_BANNED: Final = 256
MAX_WATCHED: Final = 4096


@dataclass(slots=True, eq=False)
class Peer:
    """A neighbour or a suspect.

    `asked`: when it was last asked to compare; `silent`: how often since it last answered; `owed`: it may want records
    in return.
    `since`, `tries`, `due`: since when it is a suspect, how many dials have failed, when the next one is.
    """

    id: NodeId
    state: str
    since: float
    asked: float = float("-inf")
    silent: int = 0
    owed: bool = False
    tries: int = 0
    due: float = 0.0
    story: Story = ()


@dataclass(slots=True, eq=False)
class Watch:
    """How much a node has sent lately; `served`: when it last got records by a digest."""

    since: float
    count: int = 0
    served: float = float("-inf")


class Neighbours:
    """The peers of a node, by id, and its links."""

    def __init__(self) -> None:
        self.peers: dict[NodeId, Peer] = {}
        self.links: dict[NodeId, None] = {}
        self.banned: dict[NodeId, float] = {}
        self._watched: dict[NodeId, Watch] = {}

    @property
    def near(self) -> list[Peer]:
        """The neighbours, in the order in which they became it."""
        return [peer for peer in self.peers.values() if peer.state == "neighbour"]

    @property
    def suspects(self) -> list[Peer]:
        """Nodes that may be dead."""
        return [peer for peer in self.peers.values() if peer.state == "suspect"]

    def is_near(self, node: NodeId) -> bool:
        """Whether the node is a neighbour."""
        peer = self.peers.get(node)
        return peer is not None and peer.state == "neighbour"

    def move(self, node: NodeId, state: str, verb: str, now: float) -> Peer | None:
        """Change a node's state, which is `state` now; returns its peer, if it has one in the new state."""
        peer = self.peers.get(node)
        story = peer.story if peer else ()
        after = MEMBER[state].get(verb)
        if after is None:
            raise illegal(f"node {node}", state, verb, story)
        if after not in ("neighbour", "suspect"):
            self.peers.pop(node, None)
            return None
        self.peers.pop(node, None)  # so that the order is that of becoming it
        made = self.peers[node] = Peer(node, after, now, story=remember(story, now, verb))
        return made

    def watch(self, node: NodeId, now: float) -> Watch:
        """Count a message of this node."""
        watch = self._watched.get(node)
        if watch is None:
            watch = self._watched[node] = Watch(now)
            if len(self._watched) > MAX_WATCHED:
                del self._watched[next(iter(self._watched))]
        if now - watch.since > FLOOD_TIME:
            watch.since, watch.count = now, 0
        watch.count += 1
        return watch

    def ban(self, node: NodeId, now: float) -> None:
        """Listen to a node no more for a while."""
        self.banned[node] = now + BANNED
        if len(self.banned) > MAX_BANNED:
            del self.banned[next(iter(self.banned))]

    def is_banned(self, node: NodeId, now: float) -> bool:
        """Whether the node did wrong a short while ago."""
        return self.banned.get(node, now) > now

    def tidy(self, now: float) -> None:
        """Forget what doesn't count any more."""
        for banned in [one for one, until in self.banned.items() if until <= now]:
            del self.banned[banned]
        for node in [one for one, watch in self._watched.items() if now - watch.since > 2 * FLOOD_TIME]:
            del self._watched[node]
