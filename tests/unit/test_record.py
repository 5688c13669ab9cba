"""What stays of a job in a notebook."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser
from xml.etree import ElementTree as ET

import pytest

from bacalhau_jupyter.progress import DONE, FAILED, STOPPED, WAITING
from bacalhau_jupyter.record import MAX_ROWS, MAX_TILES, Place, Record, aggregated, duration, size, tiles
from bacalhau_node.cli import jobs
from bacalhau_node.cli.printing import closing_line
from bacalhau_node.client import JobView, ShardView
from bacalhau_node.messages import Outcome, ShardError
from bacalhau_node.spec import JobSpec, PythonCell

JOB = "j-3f2a91bc-1111-4222-8333-444444444444"
HERE = Place("this machine", "docker", 2)
ERROR = ShardError("exception", "KeyError", "'x'")


def shard(index, state="kept", *, error=None, inputs=("a.csv",)):
    return ShardView(index, state, 1, "n-1", inputs, Outcome(ok=error is None, seconds=0.5, error=error))


def record(shards, state="Completed", reason="", seconds=12.4):
    spec = JobSpec(task=PythonCell(bundle="b"))
    return Record.of_view(JobView(JOB, state, reason, "", 0.0, spec, (), tuple(shards)), HERE, seconds)


def failed(count=10, *indices):
    return [shard(i, "failed", error=ERROR) if i in indices else shard(i) for i in range(count)]


class Tags(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


# --- the text ---


def test_the_plain_form_is_one_line():
    text = record(failed(10, 7), "Failed", "1 of 10 shards failed").plain()
    assert text == "job j-3f2a91bc: 10/10 shards, 1 failed (7), 12.4 s on this machine (docker)"


def test_notes_are_lines_below_and_pass_the_sanitiser():
    spec = JobSpec(task=PythonCell(bundle="b"))
    view = JobView(JOB, "Completed", "", "cid", 0.0, spec, ("s3://b/<x>",), (shard(0),))
    one = Record.of_view(view, HERE, 1.0, ["fetched 1 file, 2 MB: bafy1"])
    assert one.plain().splitlines()[1:] == ["fetched 1 file, 2 MB: bafy1", "published: s3://b/<x>"]
    assert "<div>published: s3://b/&lt;x&gt;</div>" in one.html()


def test_a_node_that_was_outvoted_is_named_with_how_often():
    liar = [ShardView(index, "kept", 3, "n-1", (), Outcome(ok=True), ("n-9",)) for index in (0, 1)]
    view = JobView(JOB, "Completed", "", "cid", 0.0, JobSpec(task=PythonCell(bundle="b")), (), (*liar, shard(2)))
    sentence = "node n-9 gave another answer in 2 of 3 shards and is avoided"
    assert Record.of_view(view, HERE, 1.0).plain().splitlines()[1:] == [sentence]
    assert sentence in closing_line(view, 1.0)
    described = jobs.described(view).splitlines()
    assert sentence in described
    assert described[-1].endswith("a.csv")
    assert described[-2].endswith("(not the answer of n-9)")


def test_what_was_not_published_is_told_beside_failures():
    text = record(failed(2, 1), "Failed", "1 of 2 shards failed; kept in the store, but not published").plain()
    assert text.endswith("(kept in the store, but not published)")


def test_a_job_that_goes_on_says_so():
    text = record([shard(0), shard(1, "running")], "Running").plain()
    assert text == "job j-3f2a91bc: 1/2 shards, running, 12.4 s on this machine (docker)"


def test_a_reason_that_the_shards_do_not_tell_is_told():
    text = record([shard(0), shard(1, "stopped")], "Stopped", "cancelled", None).plain()
    assert text == "job j-3f2a91bc: 1/2 shards, 1 stopped (1) on this machine (docker) (cancelled)"


def test_the_place_names_node_executor_and_slots():
    assert str(HERE) == "this machine (docker, 2 slots)"
    assert str(Place("n-7", "process", 1)) == "n-7 (process, 1 slot)"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.031, "0.03 s"), (12.44, "12.4 s"), (185, "3 min 5 s"), (7800, "2 h 10 min")]
)
def test_durations_are_read_at_a_glance(seconds, text):
    assert duration(seconds) == text


def test_sizes_have_units():
    assert [size(n) for n in (999, 1500, 512_000_000, 2_500_000_000)] == ["999 B", "2 kB", "512 MB", "2.5 GB"]


# --- the HTML ---


def test_nothing_is_used_that_the_sanitiser_drops():
    html = record(failed(10, 7), "Failed").html()
    tags = {tag for tag, _ in Tags(html).found}
    assert not tags & {"style", "svg", "script", "button", "progress"}
    assert "var(--" not in html
    assert not re.search(r"\b(role|aria-\w+|on\w+)=", html)


def test_the_image_has_a_text_of_its_own():
    (image,) = [attrs for tag, attrs in Tags(record(failed(10, 7), "Failed").html()).found if tag == "img"]
    assert image["alt"] == "10 shards: 9 done, 1 failed"
    kind, _, data = image["src"].partition(";base64,")
    assert kind == "data:image/svg+xml"
    assert ET.fromstring(base64.b64decode(data)).tag.endswith("svg")


def test_failed_shards_stand_first_in_the_table_and_the_rest_is_counted():
    html = record(failed(MAX_ROWS + 50, 240), "Failed").html()
    rows = re.findall(r'<th scope="row">(\d+)</th>', html)
    assert rows[:2] == ["240", "0"]
    assert len(rows) == MAX_ROWS
    assert "50 more shards are not shown here" in html


def test_names_are_escaped_and_odd_bytes_made_visible():
    name = "<b>\n\u202e\x1b" + b"\xff".decode("utf-8", "surrogateescape")
    html = record([shard(0, inputs=(name, "b"))]).html()
    assert "&lt;b&gt;\\n\\u202e\\x1b\\udcff and 1 more" in html
    html.encode()


# --- the picture ---


def test_each_tile_is_drawn_and_each_state_has_a_shape_of_its_own():
    marks = set()
    for code in range(6):
        svg = tiles(bytes((code,)))
        ET.fromstring(svg)
        marks.add(re.sub(r'(fill|stroke)="#\w+"', "", svg))
    assert len(marks) == 6


def test_many_shards_share_tiles_that_show_the_worst():
    states = bytearray([DONE]) * (3 * MAX_TILES)
    states[4] = FAILED
    shown = aggregated(bytes(states))
    assert len(shown) == MAX_TILES
    assert shown[1] == FAILED
    assert set(shown) == {DONE, FAILED}


def test_fewer_shards_have_a_tile_each():
    states = bytes((WAITING, DONE, STOPPED))
    assert aggregated(states) == states


def test_the_picture_of_many_shards_stays_small():
    assert len(tiles(bytes([DONE]) * 100_000)) < 100_000
