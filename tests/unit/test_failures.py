"""Failed shards as people read them."""

from __future__ import annotations

import traceback

from bacalhau_jupyter.failures import (
    MAX_GROUPS,
    CellText,
    FailedShard,
    Failures,
    JobInterrupted,
    brief,
    explain,
    headline,
    named,
    report,
)
from bacalhau_node.errors import JobFailed
from bacalhau_node.messages import Frame, ShardError

CELL = CellText(5, ("%%bacalhau --shards 10", "def f(x):", "    return {}[x]", "", "f('a')"))
FRAMES = (Frame("cell", 5, "<module>", in_cell=True), Frame("cell", 3, "f", in_cell=True))
ERROR = ShardError("exception", "KeyError", "'a'", FRAMES)


def plain(lines):
    return report(brief(JobFailed("end"), lines)).split("\n")


def test_a_remote_exception_is_drawn_on_the_lines_of_the_cell():
    failures = Failures()
    failures.add(3, ERROR)
    shard = FailedShard(3, "this machine", ("flights/a.csv",))
    lines = plain(explain(failures.groups(), {3: shard}, CELL, printed=True))
    assert lines[:2] == ["KeyError: 'a' in shard 3", "  on this machine, input flights/a.csv"]
    assert "Cell In[5], line 5" in lines
    assert "----> 5 f('a')" in lines
    assert "Cell In[5], line 3, in f" in lines
    assert "----> 3     return {}[x]" in lines
    assert lines[-1] == "JobFailed: end"


def test_a_script_shows_the_failures_below_its_traceback():
    failures = Failures()
    failures.add(3, ERROR)
    shown = "".join(
        traceback.format_exception(brief(JobFailed("end"), explain(failures.groups(), {}, CELL, printed=True)))
    )
    assert "JobFailed: end\nKeyError: 'a' in shard 3\n" in shown
    assert "----> 5 f('a')" in shown
    assert "\x1b" not in shown


def test_nothing_that_a_shard_says_acts_on_a_terminal_but_colours():
    evil = "\x1b]52;c;aGk=\x07\x1b[2J\x1b[31m"
    failures = Failures()
    failures.add(3, ShardError("exception", f"E{evil}", f"x{evil}\ny{evil}", (Frame(evil, 1, evil),), (evil,)))
    shard = FailedShard(3, "n-2", lines=(evil,))
    lines = "\n".join(explain(failures.groups(), {3: shard}, CELL, printed=False))
    assert "\x1b[31m" in lines
    assert not {"\x07", "\x1b]", "\x1b[2J"} & {lines[at : at + size] for at in range(len(lines)) for size in (1, 2, 4)}
    assert headline(failures.groups()[0].error) == "E\x1b[31m: x\x1b[31m"


def test_equal_failures_are_shown_once_with_their_first_shard():
    failures = Failures()
    for index in range(36, -1, -1):
        failures.add(index, ERROR)
    shards = {0: FailedShard(0, "n-2", ("a\n\udcff", "b", "c"))}
    lines = plain(explain(failures.groups(), shards, CELL, printed=True))
    assert lines[0] == "KeyError: 'a' in 37 shards (0, 1, 2, 3, 4, 5, 6, 7, …)"
    assert lines[1] == r"  shard 0: on n-2, input 'a\n\udcff' and 2 more"
    assert sum("KeyError" in line for line in lines) == 1


def test_four_kinds_are_shown_and_the_rest_is_counted():
    failures = Failures()
    for index in range(MAX_GROUPS + 3):
        failures.add(index, ShardError("exit", message=f"ended with exit code {index}"))
    lines = plain(explain(failures.groups(), {}, CELL, printed=True))
    assert sum("ended with" in line for line in lines) == MAX_GROUPS
    assert "3 more kinds of failure in 3 shards" in lines


def test_the_last_lines_of_a_shard_are_shown_unless_they_were_printed():
    failures = Failures()
    failures.add(1, ShardError("memory", message="over its limit of 512 MB"))
    shards = {1: FailedShard(1, "n-1", (), 137, 2, ("reading", "adding"))}
    silent = plain(explain(failures.groups(), shards, CELL, printed=False))
    assert silent[:5] == [
        "shard 1: over its limit of 512 MB",
        "  on n-1, exit code 137, 2 attempts",
        "last lines of shard 1:",
        "    reading",
        "    adding",
    ]
    assert "    reading" not in plain(explain(failures.groups(), shards, CELL, printed=True))


def test_frames_outside_of_the_cell_name_their_file():
    error = ShardError("exception", "ValueError", "no", (Frame("/lib/frame.py", 12, "go", " x = 1 "),))
    failures = Failures()
    failures.add(0, error)
    lines = plain(explain(failures.groups(), {}, CELL, printed=True))
    assert lines[2:4] == ["File /lib/frame.py:12, in go", "    x = 1"]


def test_a_line_that_the_cell_does_not_have_is_drawn_from_the_frame():
    failures = Failures()
    failures.add(0, ShardError("exception", "E", "", (Frame("cell", 99, "", "boom()", in_cell=True),)))
    assert "----> 99 boom()" in plain(explain(failures.groups(), {}, CellText(), printed=True))


def test_a_message_of_many_lines_is_headed_by_its_first():
    assert headline(ShardError("exception", "ValueError", "first\nsecond")) == "ValueError: first"
    assert headline(ShardError("exception", "ValueError")) == "ValueError"
    assert headline(ShardError("timeout")) == "ran over --timeout"


def test_one_shard_is_named_without_a_list():
    assert named((7,)) == "shard 7"
    assert named((7, 9)) == "2 shards (7, 9)"


def test_an_interrupt_is_a_keyboard_interrupt_with_one_line():
    error = JobInterrupted("stopped", job="j-1")
    assert isinstance(error, KeyboardInterrupt)
    assert len(error._render_traceback_()) == 1
