"""Fork, answer through a pipe, reap: `python fork_loop.py COUNT AGENT` prints the seconds.

The process is as large as the one that the node forks shards from: it has loaded the same modules.
"""

from __future__ import annotations

import importlib
import os
import sys
import time


def load(folder: str) -> None:
    """Import what the agent imports, by the name that it gives itself."""
    package = type(sys)("_bacalhau_agent")
    package.__path__ = [folder]
    sys.modules["_bacalhau_agent"] = package
    importlib.import_module("_bacalhau_agent.supervise")


def start(index: int) -> tuple[int, int]:
    """(process, pipe) of a child that answers with its index."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.write(writer, str(index).encode())
        os._exit(0)
    os.close(writer)
    return child, reader


def finish(child: int, reader: int) -> int:
    """The child's answer, with the child reaped."""
    answer = int(os.read(reader, 64))
    os.close(reader)
    os.waitpid(child, 0)
    return answer


def main(count: int) -> float:
    """Seconds for so many children, two at a time."""
    begin = time.perf_counter()
    running = [start(0)]
    for index in range(1, count):
        running.append(start(index))
        finish(*running.pop(0))
    finish(*running.pop())
    return time.perf_counter() - begin


if __name__ == "__main__":
    load(sys.argv[2])
    print(main(int(sys.argv[1])))
