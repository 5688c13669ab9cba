"""The agent's rules that need no process: the last expression, values, errors, the text that is kept."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bacalhau_node.errors import ProtocolError
from bacalhau_node.executors.agent import cell, failures, frames, tables, text, travel, values, words
from bacalhau_node.executors.link import AgentLink


def value_of(source: str) -> Any:
    return cell.evaluate(cell.compile_cell(source, "<rules>"), {})


@pytest.mark.parametrize(
    ("source", "value"),
    [
        ("1 + 1", 2),
        ("x = 2\nx", 2),
        ("x = 2; x", 2),
        ("(\n1,\n2\n)", (1, 2)),
        ("'a;'", "a;"),
        ("'a'  # b;", "a"),
        ("(3\n# ;\n)", 3),
        ("(y := 4)", 4),
        ("'''\n;\n'''", "\n;\n"),
        ("def f():\n    return 5\nf()", 5),
        ("if True:\n    6\n7", 7),
        ('"""doc"""', "doc"),
        ("from __future__ import annotations\n8", 8),
        ("9\n\n# the end;\n", 9),
    ],
)
def test_the_last_expression_is_the_value(source: str, value: object) -> None:
    assert value_of(source) == value


@pytest.mark.parametrize(
    "source",
    ["1;", "1 ; # comment", "x = 1\nx;\n\n", "(\n1\n);", "for x in (1,): x", "x = 1", "x: int = 1", "import os", ""],
)
def test_a_semicolon_or_a_statement_leaves_none(source: str) -> None:
    assert value_of(source) is travel.Muted


def test_a_body_that_awaits_and_an_expression_that_does_not_share_a_loop() -> None:
    source = (
        "import asyncio\nloop = asyncio.get_running_loop()\nawait asyncio.sleep(0)\nloop is asyncio.get_running_loop()"
    )
    assert value_of(source) is True


def test_a_coroutine_that_is_the_value_is_not_awaited_for_its_author() -> None:
    coroutine = value_of("async def f(): ...\nf()")
    coroutine.close()
    assert type(coroutine).__name__ == "coroutine"


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(plain)
def test_every_plain_value_travels_and_comes_back(value: object) -> None:
    encoded = values.encode_value(value)
    assert encoded.kind == ("none" if value is None else "json")
    if value is not None:
        assert values.same(value, json.loads(encoded.data))


@pytest.mark.parametrize("value", [{1: 2}, {None: 1}, [{(1, 2): 3}], {1, 2}, 1j, range(3), object, [object()]])
def test_what_json_would_change_is_shown_as_repr(value: object) -> None:
    assert values.encode_value(value).kind == "repr"


def test_a_value_that_holds_itself_is_shown_as_repr() -> None:
    value: list[object] = []
    value.append(value)
    assert values.encode_value(value).data == b"[[...]]"


@pytest.mark.parametrize(("value", "back"), [(True, 1), (0, None), ("1", 1), ([1], [2]), ({"a": 1}, {"b": 1})])
def test_a_value_is_not_the_same_as_another(value: object, back: object) -> None:
    assert not values.same(value, back)


def test_arrays_of_objects_are_shown_as_repr() -> None:
    numpy = pytest.importorskip("numpy")
    assert values.encode_value(numpy.array([object()])).kind == "repr"
    assert values.encode_value(numpy.datetime64("2020-01-01")).kind == "repr"
    assert values.encode_value(numpy.zeros(3)).kind == "npy"


def test_two_columns_of_one_name_are_an_error_that_names_them() -> None:
    pandas = pytest.importorskip("pandas")
    with pytest.raises(travel.CannotTravel, match="two columns are called 'a'"):
        values.encode_value(pandas.DataFrame([[1, 2]], columns=["a", "a"]))


@pytest.mark.parametrize("name", [None, "n"])
def test_series_and_indexes_come_back_as_they_were(name: str | None, tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    for value in (pandas.Series([1, 2], name=name), pandas.Index(["a", "b"], name=name)):
        back = round_trip(value, tmp_path / "value.arrow")
        assert type(back) is type(value)
        assert back.equals(value)
        assert back.name == value.name


def test_an_index_of_levels_comes_back_with_all_levels_named(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    value = pandas.MultiIndex.from_tuples([("a", 1), ("b", 2)], names=["key", None])
    back = round_trip(value, tmp_path / "value.arrow")
    assert back.equals(value)
    assert list(back.names) == ["key", "level_1"]


def round_trip(value: Any, path: Path) -> Any:
    path.write_bytes(values.encode_value(value).data)
    return tables.read_arrow(str(path))


class Log:
    """What a `Text` sent, and the clock it was told."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self.text = text.Text(self.sent.append)

    def pass_time(self, until: float) -> None:
        while self.text.due and self.text.due <= until:
            self.text.flush(self.text.due)


def test_whole_lines_go_at_once_and_the_rest_after_a_while() -> None:
    log = Log()
    log.text.feed(b"one\ntw", 1000, 10.0)
    assert log.text.due == 10.0
    log.pass_time(10.0)
    assert log.sent == [b"one\n"]
    log.text.feed(b"o", 1000, 10.01)
    log.pass_time(10.04)
    assert log.sent == [b"one\n"]
    log.pass_time(10.06)
    assert log.sent == [b"one\n", b"two"]
    assert log.text.due == 0.0


def test_a_stream_that_prints_without_pause_is_paced() -> None:
    log = Log()
    for step in range(1000):
        now = 10 + step / 10_000
        log.text.feed(b"line\n", 10_000, now)
        log.pass_time(now)
    assert log.text.finish(10.1) == 0
    assert b"".join(log.sent) == b"line\n" * 1000
    assert len(log.sent) <= 0.1 / text.PACE + 2


@given(st.lists(st.integers(1, 300_000), max_size=30), st.integers(0, 2_000_000))
def test_head_and_tail_are_kept_and_the_middle_is_counted(sizes: list[int], room: int) -> None:
    log = Log()
    whole, left = b"", room
    for number, size in enumerate(sizes):
        data = bytes([65 + number]) * size
        whole += data
        left -= log.text.feed(data, left, 10.0)
    cut = log.text.finish(10.0)
    kept = b"".join(log.sent)
    if not cut:
        assert kept == whole
        return
    head, _, tail = kept.partition(b"\n[... %d bytes left out ...]\n" % cut)
    assert head == whole[:room]
    assert whole.endswith(tail)
    assert len(head) + len(tail) + cut == len(whole)
    assert len(tail) >= min(text.TAIL, len(whole) - room)


def test_frames_are_read_from_any_cuts() -> None:
    data = frames.pack({"t": "run"}, b"body") + frames.pack({"t": "bye"})
    buffer = bytearray()
    found = []
    for byte in data:
        buffer.append(byte)
        frame = frames.unpack(buffer)
        if frame is not None:
            found.append(frame)
    assert found == [({"t": "run"}, b"body"), ({"t": "bye"}, b"")]


def test_a_message_of_lone_surrogates_can_be_sent() -> None:
    assert failures.describe(ValueError("\udc80"), "<rules>")["message"] == "\\udc80"


def test_sizes_are_written_for_people() -> None:
    assert [words.size_text(size) for size in (12, 2000, 300 * 10**6, 15 * 10**8, 2**40)] == [
        "12 bytes",
        "2 kB",
        "300 MB",
        "1.5 GB",
        "1.1 TB",
    ]


def test_a_crash_is_read_from_the_line_of_the_cell_that_led_to_it_inwards() -> None:
    own = failures.OWN_FOLDER
    text = (
        "Fatal Python error: Segmentation fault\n\nStack (most recent call first):\n"
        '  File "/lib/ctypes.py", line 5 in string_at\n  File "<cell>", line 4 in f\n'
        '  File "<cell>", line 9 in <module>\n'
        f'  File "{own}/shard.py", line 70 in run_cell\n\nExtension modules: numpy (total: 1)\n'
    )
    found = [(frame["file"], frame["line"], frame["function"]) for frame in failures.crash_frames(text, "<cell>")]
    assert found == [("<cell>", 9, "<module>"), ("<cell>", 4, "f"), ("/lib/ctypes.py", 5, "string_at")]


def test_a_number_too_long_for_text_says_so() -> None:
    assert values.encode_value(10**5000).data == b"<int object whose repr failed with ValueError>"


@pytest.mark.parametrize("header", [b"[" * 60_000, b'{"t": "done", "x": ' + b"[" * 60_000, b"\xff", b'"\xff"', b"{}"])
async def test_whatever_writes_to_the_agents_pipe_is_told_as_its_fault(header: bytes) -> None:
    class Once:
        async def read(self) -> bytes:
            return struct.pack(">II", len(header), 0) + header

    with pytest.raises(ProtocolError, match="a frame that is none"):
        await AgentLink(Once()).receive()  # type: ignore[arg-type]  # it reads, and no more
