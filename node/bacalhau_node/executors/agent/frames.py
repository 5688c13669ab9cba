"""Frames between the agent and its host, and between its processes.

Two big-endian lengths of four bytes (header, body), a JSON object with the type in "t", and the body.

host to agent
    hello      path, env, imports, oom, watch    first, once; `imports` are preloaded
    prepare    imports                           preload these; what was preloaded stays if it has them all
    job        bundle, name, line_offset, imports, env, argv     once; `argv`: a program in place of a cell
    run        key, shard, count, seed, inputs, logical, shared, outputs, work, scratch, env, timeout, memory,
               disk, hold                        queued behind the runs before it
    kill       key                               end this run, started or not; answered by its `done`
    recall     key                               give this run back if it has not started: `recalled`, else nothing
    collected  key                               the outputs of a `hold` run are taken: go on
    bye                                          like the end of the stream
agent to host
    ready      python, pid
    warm       imports, ms                       what was preloaded
    started    key, pid
    lines      key, stream                       body: text as bytes
    done       key, ok, exit_code, error, value {kind, type, file}, seconds, max_rss, cut, outputs
                                                 body: the value, unless it lies in `file` of the scratch folder
    recalled   key                               this run will not start here
    error      message                           a frame that was not understood
parent to template, not as frames (`template.py`)
    the `job` once, then a `run` each time a shard is to be forked
template to parent
    imports, safe    first, once; then reports of a fixed size (`template.py`)
shard to parent
    exit_code, error, value                      body: the value
"""

from __future__ import annotations

import json
import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Dict

    Header = Dict[str, Any]

LENGTHS = struct.Struct(">II")


def pack(header: Header, body: bytes = b"") -> bytes:
    """One frame."""
    head = json.dumps(header).encode()
    return LENGTHS.pack(len(head), len(body)) + head + body


def unpack(buffer: bytearray) -> tuple[Header, bytes] | None:
    """Take one whole frame off the front of `buffer`, if there is one."""
    if len(buffer) < LENGTHS.size:
        return None
    head, body = LENGTHS.unpack_from(buffer)
    start, end = LENGTHS.size + head, LENGTHS.size + head + body
    if len(buffer) < end:
        return None
    result = json.loads(bytes(buffer[LENGTHS.size : start])), bytes(buffer[start:end])
    del buffer[:end]
    return result
