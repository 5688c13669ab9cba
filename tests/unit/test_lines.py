"""Text of shards on its way to a cell: whole lines, terminal rules, and a rate that a page survives."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bacalhau_jupyter.lines import (
    BURST_SECONDS,
    CHARS_PER_SECOND,
    CLOSED_SECONDS,
    LINE_LIMIT,
    LINES_PER_SECOND,
    TAIL_LINES,
    LineBuffer,
    LineGate,
    Tail,
)

BOTH = frozenset(("stdout", "stderr"))
BURST = int(LINES_PER_SECOND * BURST_SECONDS)


def gate(count=2, streams=BOTH):
    return LineGate(count=count, hint="job.logs({shard})", now=0.0, streams=streams)


def text_of(pieces):
    return "".join(piece.text for piece in pieces)


# --- lines from pieces ---


@given(st.text(alphabet="ab\n", max_size=60), st.lists(st.integers(0, 60), max_size=8))
def test_pieces_cut_anywhere_make_the_same_lines(text, cuts):
    buffer = LineBuffer()
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    lines = [line for a, b in pairwise(edges) for line in buffer.feed(text[a:b])]
    assert [*lines, buffer.end()] == text.split("\n")


@given(st.lists(st.text(alphabet="ab\r", max_size=12), min_size=1, max_size=6))
def test_a_carriage_return_starts_the_line_anew_wherever_the_pieces_are_cut(pieces):
    buffer = LineBuffer()
    for piece in pieces:
        assert buffer.feed(piece) == []
    assert buffer.rest() == "".join(pieces).rstrip("\r").rpartition("\r")[2]


def test_windows_line_ends_are_line_ends():
    assert LineBuffer().feed("one\r\ntwo\r\n") == ["one", "two"]


def test_a_line_without_end_keeps_its_beginning_and_counts_the_rest():
    buffer = LineBuffer()
    for _ in range(30):
        assert buffer.feed("x" * 1000) == []
    assert buffer.rest() == "x" * LINE_LIMIT + f"… ({30_000 - LINE_LIMIT:,} characters more)"


def test_a_tail_is_the_last_lines_with_the_unfinished_one():
    tail = Tail()
    tail.extend([str(number) for number in range(100)])
    assert tail.lines("now") == (*map(str, range(100 - TAIL_LINES + 1, 100)), "now")


# --- the gate ---


def test_lines_of_several_shards_carry_their_number():
    one = gate()
    one.lines(3, "stdout", ["a", "b"], 0.0)
    one.lines(4, "stderr", ["c"], 0.0)
    assert one.take(0.0) == [("stdout", "[shard 3] a\n[shard 3] b\n"), ("stderr", "[shard 4] c\n")]


def test_a_single_shard_prints_as_a_plain_cell_does():
    one = gate(count=1)
    one.text(0, "stdout", "working", 0.0)
    assert text_of(one.take(0.0)) == "working"
    one.text(0, "stdout", " … done\n", 0.0)
    assert text_of(one.take(0.0)) == " … done\n"


def test_of_states_that_overwrite_each_other_the_last_is_sent_and_overwrites():
    one = gate(count=1)
    one.text(0, "stdout", " 10 %\r 20 %\r 30 %", 0.0)
    assert text_of(one.take(0.0)) == "\r 30 %"


def test_what_comes_too_fast_is_counted_and_told_with_the_way_to_it():
    one = gate()
    one.lines(3, "stdout", ["x"] * (BURST + 12_340), 0.0)
    shown = text_of(one.take(0.0))
    assert shown.count("\n") == BURST
    assert not one.ready(CLOSED_SECONDS / 2)
    assert text_of(one.take(CLOSED_SECONDS)) == "… 12,340 lines more: job.logs(3)\n"


def test_lines_held_from_several_shards_are_told_together():
    one = gate()
    for shard in (3, 4):
        one.lines(shard, "stdout", ["x"] * BURST, 0.0)
    assert text_of(one.end(0.0)).endswith(f"… {BURST:,} lines more: job.logs(4)\n")
    for shard in (3, 4):
        one.lines(shard, "stdout", ["x"], 0.0)
    assert "2 lines more in 2 shards" in text_of(one.end(0.0))


def test_the_gate_opens_again_and_says_first_what_was_missed():
    one = gate()
    one.lines(0, "stdout", ["x"] * (BURST + 1), 0.0)
    one.take(0.0)
    one.lines(0, "stdout", ["later"], 2.0)
    assert text_of(one.take(2.0)) == "… 1 line more: job.logs(0)\n[shard 0] later\n"


def test_a_notice_never_continues_an_unfinished_line():
    one = gate(count=1)
    one.text(0, "stdout", "unfinished", 0.0)
    one.text(0, "stdout", "\n" * (BURST + 5), 0.0)
    one.text(0, "stdout", "y" * (CHARS_PER_SECOND * 6), 0.0)
    lines = text_of(one.end(0.0)).split("\n")
    assert lines[0] == "unfinished"
    assert lines[-2].startswith("… ")


@given(st.lists(st.tuples(st.floats(0.0, 0.5), st.integers(1, 400)), max_size=40))
def test_no_more_than_the_rate_and_the_burst_ever_pass(pushes):
    one, now, seen = gate(), 0.0, 0
    for wait, count in pushes:
        now += wait
        one.lines(0, "stdout", ["line"] * count, now)
        seen += sum(line.endswith("line") for line in text_of(one.take(now)).split("\n"))
    assert seen <= LINES_PER_SECOND * (now + BURST_SECONDS)


@given(st.lists(st.tuples(st.floats(0.0, 3.0), st.integers(0, 3000)), max_size=12))
def test_every_line_is_shown_or_counted(pushes):
    one, now, shown = gate(), 0.0, []
    for wait, count in pushes:
        now += wait
        one.lines(0, "stdout", ["line"] * count, now)
        shown.append(text_of(one.take(now)))
    lines = ("".join(shown) + text_of(one.end(now))).splitlines()
    counted = sum(int(line.split()[1].replace(",", "")) for line in lines if line.startswith("…"))
    assert sum(line.endswith("] line") for line in lines) + counted == sum(count for _, count in pushes)


@pytest.mark.parametrize("streams", [frozenset(), frozenset(("stderr",))])
def test_streams_that_are_not_wanted_are_silent(streams):
    one = gate(streams=streams)
    one.lines(0, "stdout", ["x"], 0.0)
    assert one.end(0.0) == []


def test_escape_codes_of_a_shard_end_with_its_line():
    many = gate()
    many.lines(0, "stdout", ["\x1b[32mgreen", "\x1b[31mred\x1b[0m", "\x1b[2K\x1b[1Aabove", "plain"], 0.0)
    assert text_of(many.take(0.0)).splitlines() == [
        "[shard 0] \x1b[32mgreen\x1b[0m",
        "[shard 0] \x1b[31mred\x1b[0m",
        "[shard 0] above\x1b[0m",
        "[shard 0] plain",
    ]


CODES = ["]52;c;aGk=\x07", "]0;title\x1b\\", "]8;;http://x", "Pq", "c", "", "(0"]


@pytest.mark.parametrize("code", [*(f"\x1b{code}" for code in CODES), "\b\b\b", "\x9b2J", "\f"])
def test_no_code_of_a_shard_names_the_window_fills_the_clipboard_or_takes_the_next_lines(code):
    many = gate()
    many.lines(0, "stdout", [f"{code}", "next"], 0.0)
    first, second = text_of(many.take(0.0)).splitlines()
    assert first.removesuffix("\x1b[0m") in {f"[shard 0] {left}" for left in ("", "c", "(0", "2J")}
    assert second == "[shard 0] next"
