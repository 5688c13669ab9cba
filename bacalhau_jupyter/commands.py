"""`%bacalhau COMMAND`: what can be asked about jobs and the node. Each answers with text, or a `Job`."""

from __future__ import annotations

import platform
import time
from typing import TYPE_CHECKING, Any

from bacalhau_jupyter import asking, options, painters, words
from bacalhau_jupyter.job import ANSWER_SECONDS
from bacalhau_jupyter.option_table import OPTIONS
from bacalhau_jupyter.record import size
from bacalhau_jupyter.running import Running
from bacalhau_jupyter.session import session
from bacalhau_node import __version__
from bacalhau_node.errors import SpecError
from bacalhau_node.folders import data_folder
from bacalhau_node.ids import short
from bacalhau_node.literals import nearest
from bacalhau_node.protocol.events import FINAL_JOB

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from bacalhau_node.client import JobLine, NodeView

JOBS_SHOWN = 20


def run(shell: Any, line: str) -> object:
    """Do what the line asks for; raises `SpecError` for what it can't."""
    name, *arguments = [word.text for word in words.split(line)] or ["status"]
    if name not in COMMANDS:
        raise SpecError(f"%bacalhau {name}: {_unknown(name)}")
    least, most, command = COMMANDS[name]
    if not least <= len(arguments) <= most:
        raise SpecError(f"%bacalhau {line.strip()}: {name} takes {_counted(name, least, most)}")
    answer = command(shell, *arguments)
    if not isinstance(answer, str):
        return answer
    print(answer)  # noqa: T201  a cell's output
    return None


def completions(text: str) -> list[str]:
    """What `text`, all that stands between the magic and the cursor, can become."""
    return [name for name in COMMANDS if name.startswith(text)]


def _unknown(name: str) -> str:
    if name.partition("=")[0] in OPTIONS:
        return f"options belong to a cell: %%bacalhau {name} above its code"
    if name in ELSEWHERE:
        return f"no such command; here it is {ELSEWHERE[name]}"
    known = ", ".join(COMMANDS)
    return f"no such command{nearest(name, COMMANDS) or f'; it knows {known}'}"


def _counted(name: str, least: int, most: int) -> str:
    if most == 0:
        return "nothing more"
    if name == "connect":
        return "the URL of a node, or the multiaddr of one on a network"
    return "a job's id" if most == 1 else "a job's id, and the number of a shard" if least else "at most one word"


def _help(_shell: Any) -> str:
    return options.usage()


def _status(_shell: Any) -> str:
    lines = asking.jobs()
    going = [short(line.job) for line in lines if line.state not in FINAL_JOB]
    return "\n".join((_node(_nodes()[0]), f"{len(lines)} jobs, {len(going)} not ended", *going))


def _jobs(_shell: Any) -> str:
    lines = asking.jobs()
    shown = [_job(line) for line in lines[:JOBS_SHOWN]] or ["no jobs yet"]
    if len(lines) > JOBS_SHOWN:
        shown.append(f"… {len(lines) - JOBS_SHOWN:,} older ones; bacalhau_jupyter.jobs() has all")
    return "\n".join(shown)


def _job(line: JobLine) -> str:
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(line.created))
    return f"{short(line.job)}  {line.state:<9}  {line.count:>6,} shards  {when}  {line.reason}".rstrip()


def _logs(_shell: Any, job: str, shard: str = "") -> str:
    if shard and not shard.isdecimal():
        raise SpecError(f"%bacalhau logs {job} {shard}: the number of a shard is needed")
    return asking.attach(job).logs(int(shard) if shard else None).rstrip("\n")


def _attach(shell: Any, job: str) -> object:
    """Show a job in this cell: beside what else is done where somebody watches, else to its end."""
    way = painters.resolved("auto", shell=shell)
    running = Running(asking.attach(job), options.CellRequest(on_interrupt="detach"), way, shell)
    return running.go_on() if way in {"widget", "html"} else running.wait()


def _cancel(_shell: Any, job: str) -> str:
    found = asking.attach(job)
    if (state := found.view().state) in FINAL_JOB:
        return f"job {short(found.id)} has ended already: {state}"
    found.cancel()
    return f"job {short(found.id)}: asked to stop; what is finished is kept"


def _show_nodes(_shell: Any) -> str:
    return "\n".join(map(_node, _nodes()))


def _connect(_shell: Any, address: str) -> str:
    asking.connect(address)
    return f"jobs go to {session().node or 'the node in this kernel'} now: {_node(_nodes()[0])}"


def _network(_shell: Any) -> None:
    """Show the network that the node knows, in this cell's output, from now on."""
    from bacalhau_jupyter import network  # noqa: PLC0415  it brings numpy

    network.show(session())


def _nodes() -> Sequence[NodeView]:
    return session().call(lambda client: client.nodes(), timeout=ANSWER_SECONDS)


def _node(node: NodeView) -> str:
    can = node.executor
    if can is None:
        return f"node {node.node[:16]}"
    memory = f", {size(can.memory_per_slot)} each" if can.memory_per_slot else ""
    problem = f" — {can.problem}" if can.problem else ""
    return f"node {node.node[:16]}: {can.executor}, {can.slots} slots{memory}, Python {can.python}{problem}"


def _config(_shell: Any) -> str:
    versions = f"bacalhau-jupyter {__version__}, Python {platform.python_version()}"
    where = f"jobs go to: {session().node or 'the node in this kernel'}"
    return f"{versions}\ndata folder (BACALHAU_DIR): {data_folder()}\n{where}"


COMMANDS: dict[str, tuple[int, int, Callable[..., object]]] = {
    "status": (0, 0, _status),
    "jobs": (0, 0, _jobs),
    "logs": (1, 2, _logs),
    "attach": (1, 1, _attach),
    "cancel": (1, 1, _cancel),
    "connect": (1, 1, _connect),
    "nodes": (0, 0, _show_nodes),
    "network": (0, 0, _network),
    "config": (0, 0, _config),
    "--help": (0, 0, _help),
}
"""Name -> (fewest arguments, most arguments, what does it)."""

ELSEWHERE = {
    "create": "%%bacalhau above the code of a cell",
    "describe": "attach ID",
    "devstack": "bacalhau_jupyter.devstack(nodes=3).connect()",
    "docker": "%%bacalhau --image NAME --raw above a shell script",
    "get": "bacalhau_jupyter.attach(ID).result().files()",
    "job": "jobs, attach ID, logs ID or cancel ID",
    "list": "jobs",
    "node": "nodes",
    "run": "%%bacalhau above the code of a cell",
    "serve": "bacalhau-node serve, in a shell",
    "stop": "cancel ID",
}
"""Commands that people bring along, from upstream or from `bacalhau-node`, and what to type here."""
