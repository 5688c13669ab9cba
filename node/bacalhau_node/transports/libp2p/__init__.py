"""Nodes on a libp2p network, behind `ports.Transport`.

`LibP2PTransport` is asyncio's half and all that others need; it imports neither libp2p nor trio until one is opened.
The other half lives on one thread for all nodes of the process: `thread` (the bridge), `inbox` (what has come), `host`
(one node), `dialling`, `link`, `gossip` with `meshing`, and `asking` (what it does), `lean`, `addresses`, `streams`,
`yamux` and `inprocess` (what that stands on).
"""

from bacalhau_node.transports.libp2p.transport import LibP2PTransport as LibP2PTransport
