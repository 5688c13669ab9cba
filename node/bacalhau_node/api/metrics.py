"""What a node counts, in the text format of Prometheus."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from bacalhau_node import __version__
from bacalhau_node.node import Node
from bacalhau_node.ports import Waiting
from bacalhau_node.protocol.membership import Membership

SHARDS_WAITING = "waiting"


@dataclass
class Traffic:
    """What went over the API since it started; bytes of bodies."""

    requests: Counter[tuple[str, int]] = field(default_factory=Counter)
    """By (method and route, status)."""
    received: int = 0
    sent: int = 0
    watchers: int = 0


def text(node: Node, traffic: Traffic) -> str:
    """All figures of `node` at this moment."""
    jobs: Counter[str] = Counter(feed.job.state for feed in node.engine.feeds.values())
    shards: Counter[str] = Counter()
    for feed in node.engine.feeds.values():
        shards.update(+feed.counts)
        if feed.row is not None:
            shards[SHARDS_WAITING] += feed.row.count - feed.counts.total()
    requests = {_labels(route=route, status=str(status)): count for (route, status), count in traffic.requests.items()}
    network = node.membership
    tally, transport = node.engine.tally, node.transport
    age = network.age if network is not None else 0.0
    dropped = tally.dropped + transport.dropped
    messages, volume = tally.waiting(), transport.waiting
    disk = shutil.disk_usage(node.folder.store)
    return "".join(
        (
            _metric("info", "gauge", "The version that runs.", {_labels(version=__version__, node=node.id): 1}),
            _metric("jobs", "gauge", "Jobs that the node knows, by state.", _by_state(jobs)),
            _metric("shards", "gauge", "Shards of those jobs, by state.", _by_state(shards)),
            _metric("executions_running", "gauge", "Executions at work on this node.", {"": node.engine.running}),
            _metric("slots", "gauge", "Executions that this node can run at once.", {"": node.slots}),
            _metric("inbox_events", "gauge", "Events that wait for the next turn.", {"": node.engine.waiting}),
            _metric("network_nodes", "gauge", "Other nodes that are known.", {"": len(network or ())}),
            _metric("network_neighbours", "gauge", "Those it compares views with.", {"": _neighbours(network)}),
            _metric("message_age_seconds", "gauge", "Half of what an answer takes.", {"": age}),
            _metric("messages_dropped_total", "counter", "Refused or not sent.", {"": dropped}),
            _metric("outgoing_messages", "gauge", "Wait for the transport, in all and for one node.", _sizes(messages)),
            _metric("outgoing_bytes", "gauge", "Wait in the transport, in all and for one node.", _sizes(volume)),
            _metric("messages_total", "counter", "Messages between nodes.", _by_kind(tally.messages)),
            _metric("message_bytes_total", "counter", "Their bytes.", _by_kind(tally.sizes)),
            _metric("executions_lost_total", "counter", "Given up: their nodes were silent.", {"": node.engine.lost}),
            _metric("store_free_bytes", "gauge", "Free space of the content store's disk.", {"": disk.free}),
            _metric("api_requests_total", "counter", "Requests answered.", requests),
            _metric("api_received_bytes_total", "counter", "Bytes of bodies received.", {"": traffic.received}),
            _metric("api_sent_bytes_total", "counter", "Bytes of streams sent.", {"": traffic.sent}),
            _metric("api_watchers", "gauge", "Open streams of updates.", {"": traffic.watchers}),
        )
    )


def _by_state(counts: Mapping[str, int]) -> dict[str, int]:
    return {_labels(state=state): count for state, count in sorted(counts.items())}


def _neighbours(network: Membership | None) -> int:
    return len(network.neighbours) if network is not None else 0


def _sizes(waiting: Waiting) -> dict[str, int]:
    return {_labels(of="all"): waiting.total, _labels(of="most"): waiting.most}


def _by_kind(counts: Mapping[tuple[str, str], int]) -> dict[str, int]:
    return {_labels(way=way, kind=kind): count for (way, kind), count in sorted(counts.items())}


def _labels(**labels: str) -> str:
    return "{" + ",".join(f'{name}="{_escaped(value)}"' for name, value in labels.items()) + "}"


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _metric(name: str, kind: str, what: str, values: Mapping[str, float]) -> str:
    name = f"bacalhau_{name}"
    return _lines([f"# HELP {name} {what}", f"# TYPE {name} {kind}", *(f"{name}{at} {n}" for at, n in values.items())])


def _lines(lines: Iterable[str]) -> str:
    return "".join(f"{line}\n" for line in lines)
