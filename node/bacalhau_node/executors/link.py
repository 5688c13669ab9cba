"""Frames between a host and its agent, over any pair of byte streams.

A frame is two big-endian lengths of four bytes (header, body), a JSON header with the frame's type
in "t", and the body. The table of all frames stands at the head of `agent/frames.py`. What comes from an
agent may come from a hostile cell in the same container: every frame is checked as it is decoded.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from typing import Any, Literal, Protocol

import msgspec

from bacalhau_node.errors import ProtocolError
from bacalhau_node.messages import ShardError, ValueKind

MAX_HEADER = 16 * 1024 * 1024
"""A run's header lists the shard's files: 100,000 paths of 160 bytes."""
MAX_BODY = 64 * 1024 * 1024
"""No frame of the agent is larger: texts are cut and values go to files long before."""


class Pipe(Protocol):
    """The two byte streams of an agent."""

    async def read(self) -> bytes:
        """The next bytes; empty when the agent is gone."""
        ...

    def write(self, data: bytes) -> None:
        """Queue `data`; never waits, and drops it when the agent is gone."""
        ...

    async def drain(self) -> None:
        """Wait until what was queued is mostly written."""
        ...

    def close(self) -> None:
        """Let go of both streams: the agent then kills what it runs and exits."""
        ...


_LENGTHS = struct.Struct(">II")


class Reply(msgspec.Struct, frozen=True, kw_only=True):
    """Any frame of the agent: `t` is its type, the rest is present where that type has it."""

    t: str
    key: str = ""
    stream: Literal["stdout", "stderr"] = "stdout"
    ok: bool = False
    exit_code: int = 0
    error: ShardError | None = None
    value: ValueHead | None = None
    seconds: float = 0.0
    max_rss: int = 0
    cut: int = 0
    outputs: bool = False
    pid: int = 0
    python: str = ""
    imports: tuple[str, ...] = ()
    message: str = ""


class ValueHead(msgspec.Struct, frozen=True):
    """What a value is; `file`: its name in the scratch folder, empty when it is the frame's body."""

    kind: ValueKind
    type: str
    file: str = ""


_decoder = msgspec.json.Decoder(Reply)


def frame(kind: str, fields: msgspec.Struct | Mapping[str, Any] | None = None) -> bytes:
    """One frame to the agent: `fields` with the type beside them, without a body."""
    values = fields if isinstance(fields, Mapping) else msgspec.to_builtins(fields) if fields is not None else {}
    header = json.dumps({"t": kind, **values}).encode()  # paths may hold surrogates, which only this one escapes
    return _LENGTHS.pack(len(header), 0) + header


class AgentLink:
    """Frames of the agent out of a `Pipe`, whole, however the bytes were cut."""

    def __init__(self, pipe: Pipe) -> None:
        self._pipe = pipe
        self._buffer = bytearray()

    async def receive(self) -> list[tuple[Reply, bytes]]:
        """The next frames, at least one; empty when the agent is gone. Raises `ProtocolError` for what is none."""
        while True:
            frames = self._parse()
            if frames:
                return frames
            data = await self._pipe.read()
            if not data:
                return []
            self._buffer += data

    def _parse(self) -> list[tuple[Reply, bytes]]:
        frames = []
        buffer, at = self._buffer, 0
        while len(buffer) - at >= _LENGTHS.size:
            header, body = _LENGTHS.unpack_from(buffer, at)
            if header > MAX_HEADER or body > MAX_BODY:
                raise ProtocolError(
                    f"the agent announced a frame of {header} + {body} bytes: something else wrote to its pipe"
                )
            start = at + _LENGTHS.size
            if len(buffer) < start + header + body:
                break
            frames.append(
                self._frame(
                    bytes(buffer[start : start + header]), bytes(buffer[start + header : start + header + body])
                )
            )
            at = start + header + body
        del buffer[:at]
        return frames

    @staticmethod
    def _frame(header: bytes, body: bytes) -> tuple[Reply, bytes]:
        try:
            return _decoder.decode(header), body
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ProtocolError(f"the agent sent a frame that is none ({error}): {header[:200]!r}") from error
