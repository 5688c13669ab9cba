"""Sharding: which files a job takes, and which shard gets which."""

import os
import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bacalhau_node import sharding
from bacalhau_node.errors import ContentError, ProtocolError, SpecError
from bacalhau_node.sharding import ContentRef, Entry, LocalStamp, Unusable
from bacalhau_node.spec import Command, InputSource, JobSpec, Sharding


def file(path: str, size: int = 1, source: int = 0) -> Entry:
    return Entry(path, LocalStamp(f"/data/{path}", size, 1, 2, 3), size, source)


def files(*paths: str) -> list[Entry]:
    return [file(path) for path in paths]


def selected(paths: list[str], *globs: str) -> list[list[str]]:
    return [[entry.path for entry in unit] for unit in sharding.select(files(*paths), globs)]


def flat(paths: list[str], *globs: str) -> list[str]:
    return [path for unit in selected(paths, *globs) for path in unit]


def cut(sizes: list[int], *, slots: int = 2, **how) -> tuple[list[list[int]], list[str]]:
    units = [(file(f"{index:06}", size),) for index, size in enumerate(sizes)]
    shards, notes = sharding.split(units, Sharding(**how), slots=slots, with_inputs=True)
    return [[entry.size for entry in shard] for shard in shards], notes


names = st.text(
    st.one_of(st.sampled_from(" \n'\"\\[]{}*?é日\udc80.-"), st.characters(codec="ascii", exclude_characters="/\0")),
    min_size=1,
    max_size=6,
).filter(lambda name: name not in {".", ".."})
paths = st.lists(names, min_size=1, max_size=3).map("/".join)
listings = st.lists(paths, unique=True, max_size=30).map(lambda found: sorted(found, key=os.fsencode))


# --- select ---


def test_without_a_glob_every_visible_file_is_taken_in_order():
    there = [".git/config", "a b.csv", "a/.hidden", "a/é.csv", "a/.ipynb_checkpoints/x.csv", "b\n'\".csv", "c\udc80"]
    assert flat(there) == ["a b.csv", "a/é.csv", "b\n'\".csv", "c\udc80"]


@pytest.mark.parametrize(
    ("glob", "expected"),
    [
        ("*.csv", ["a.csv", "b.csv"]),
        ("**/*.csv", ["a.csv", "b.csv", "d/c.csv", "d/e/f.csv"]),
        ("d/**", ["d/c.csv", "d/e/f.csv", "d/g.txt"]),
        ("?.csv", ["a.csv", "b.csv"]),
        ("[ac].csv", ["a.csv"]),
        ("[!a].csv", ["b.csv"]),
        ("*/{c,x}.csv", ["d/c.csv"]),
        ("{a,d/e/f}.csv", ["a.csv", "d/e/f.csv"]),
        ("/inputs/*.csv", ["a.csv", "b.csv"]),
        ("/inputs/d/*", ["d/c.csv", "d/g.txt"]),
        (".*", [".h.csv"]),
        ("d/.x/*", ["d/.x/h.csv"]),
        ("**/.ipynb_checkpoints/*", ["d/.ipynb_checkpoints/c.csv"]),
        (r"\[1\].csv", ["[1].csv"]),
    ],
)
def test_a_glob_selects(glob, expected):
    there = [".h.csv", "[1].csv", "a.csv", "b.csv", "d/.ipynb_checkpoints/c.csv", "d/.x/h.csv", "d/c.csv", "d/e/f.csv"]
    there.append("d/g.txt")
    if glob == "*.csv" or glob.startswith(("**", "/inputs/*")):
        there.remove("[1].csv")
    assert flat(there, glob) == expected


def test_several_globs_are_a_union_and_each_file_comes_once():
    assert flat(["a.csv", "b.csv", "c.txt"], "b.*", "*.csv", "*.csv") == ["a.csv", "b.csv"]


def test_a_newline_after_the_match_is_part_of_the_name():
    assert flat(["a.csv", "a.csv\n"], "*.csv") == ["a.csv"]


def test_a_pattern_that_ends_in_a_slash_selects_whole_folders_with_their_hidden_files():
    there = ["a.zarr/.zarray", "a.zarr/.ipynb_checkpoints/x", "a.zarr/0/1", "b.zarr/0", "c.csv", "d/e.zarr/0"]
    assert selected(there, "*.zarr/") == [["a.zarr/.zarray", "a.zarr/0/1"], ["b.zarr/0"]]


def test_a_folder_inside_a_selected_folder_and_a_file_of_it_stay_with_the_outer_one():
    assert selected(["a/b/c", "a/d", "e"], "a/b/", "a/", "**") == [["a/b/c", "a/d"], ["e"]]


def test_braces_may_hold_folders_and_files():
    assert selected(["a/b", "a/c", "d"], "{a/,d}") == [["a/b", "a/c"], ["d"]]


def test_hidden_folders_are_selected_only_when_the_pattern_names_a_dot():
    there = [".git/x", "a/b"]
    assert selected(there, "*/") == [["a/b"]]
    assert selected(there, ".*/") == [[".git/x"]]


def test_equal_folders_of_two_inputs_are_two_units():
    entries = [file("a/b", source=0), file("a/c", source=0), file("a/b", source=1)]
    units = sharding.select(entries, ["*/"])
    assert [[(entry.source, entry.path) for entry in unit] for unit in units] == [
        [(0, "a/b"), (0, "a/c")],
        [(1, "a/b")],
    ]


def test_empty_folders_belong_to_whole_folders_only():
    assert selected(["a/b", "a/c/", "d/"]) == [["a/b"]]
    assert selected(["a/b", "a/c/", "d/"], "**") == [["a/b"]]
    assert selected(["a/b", "a/c/", "d/"], "*/") == [["a/b", "a/c/"], ["d/"]]


def test_a_glob_without_a_match_shows_itself_and_five_paths():
    there = [".hidden", *(f"{number}.csv" for number in range(9)), "odd\nname"]
    with pytest.raises(SpecError) as caught:
        flat(there, "*.csv", "*.parquet")
    text = str(caught.value)
    assert "'*.parquet'" in text
    assert "11 files" in text
    assert re.findall(r"^  (.*)$", text, re.MULTILINE) == [f"{number}.csv" for number in range(5)]


def test_a_glob_that_matches_deeper_is_told_so():
    with pytest.raises(SpecError, match=r"'\*\*/\*\.csv' would match 2"):
        flat(["a/b.csv", "c/d.csv"], "*.csv")


@pytest.mark.parametrize("glob", ["", "/", "/inputs/", "{1..99999999}", "{a,b}" * 20])
def test_a_glob_that_names_nothing_or_too_much_is_refused(glob):
    with pytest.raises(SpecError, match="--glob"):
        flat(["a"], glob)


def test_only_hidden_files_are_an_error_that_says_how_to_name_them():
    with pytest.raises(SpecError, match="all 2 files of the inputs are hidden"):
        flat([".a", "b/.c"])


def test_what_cannot_be_read_is_an_error_only_when_it_is_selected():
    broken = Unusable(".venv/bin/python", LocalStamp("/data/.venv/bin/python", 0, 0, 0, 0), 0, problem="leads out")
    entries = [broken, *files("a.csv")]
    assert sharding.select(entries, ["*.csv"]) == [(entries[1],)]
    with pytest.raises(ContentError, match="leads out"):
        sharding.select(entries, ["**/.*/**", ".venv/"])
    with pytest.raises(ContentError, match="leads out"):
        sharding.plan_block(entries)


def simple_match(pattern: str, path: str) -> bool:
    """Second opinion for `*`, `?` and `**` as a whole level, level by level, without any library."""

    def level(glob: str, name: str, *, start: bool) -> bool:
        if not glob:
            return not name
        if start and name.startswith(".") and glob[0] != ".":
            return False
        if glob[0] == "*":
            return any(level(glob[1:], name[skip:], start=False) for skip in range(len(name) + 1))
        return bool(name) and glob[0] in ("?", name[0]) and level(glob[1:], name[1:], start=False)

    def levels(globs: list[str], parts: list[str]) -> bool:
        if not globs:
            return not parts
        if globs[0] == "**":
            visible = bool(parts) and not parts[0].startswith(".")
            last = len(globs) == 1 and len(parts) == 1
            return (visible and (last or levels(globs, parts[1:]))) or (len(globs) > 1 and levels(globs[1:], parts))
        return bool(parts) and level(globs[0], parts[0], start=True) and levels(globs[1:], parts[1:])

    return levels(pattern.split("/"), path.split("/"))


pattern_levels = st.one_of(st.just("**"), st.from_regex(r"\A(\*?[.ab?]{1,3}\*?|\*)\Z"))
simple_paths = st.lists(st.from_regex(r"\A[.ab]{1,4}\Z").filter(lambda name: name.strip(".")), min_size=1, max_size=3)


@given(
    pattern=st.lists(pattern_levels, min_size=1, max_size=3).map("/".join),
    there=st.lists(simple_paths.map("/".join), unique=True, min_size=1, max_size=10),
)
def test_globs_agree_with_an_independent_matcher(pattern, there):
    expected = [path for path in there if simple_match(pattern, path)]
    if expected:
        assert flat(there, pattern) == expected
    else:
        with pytest.raises(SpecError):
            flat(there, pattern)


@given(there=listings, globs=st.lists(st.text(st.sampled_from("ab*?[]{},.!^-\\/"), max_size=8), max_size=3))
def test_any_pattern_selects_each_file_at_most_once_or_is_refused(there, globs):
    try:
        taken = flat(there, *globs)
    except SpecError:
        return
    assert len(taken) == len(set(taken))
    assert set(taken) <= set(there)


# --- split ---


def test_by_count_the_bytes_are_balanced_in_contiguous_shards():
    assert cut([1, 1, 1, 1, 4, 4], n=3)[0] == [[1, 1, 1, 1], [4], [4]]
    assert cut([1] * 10, n=3)[0] == [[1] * 3, [1] * 4, [1] * 3]


def test_more_shards_than_files_is_one_file_a_shard_and_said():
    shards, notes = cut([5, 5, 5], n=10)
    assert shards == [[5], [5], [5]]
    assert notes == ["--shards 10: only 3 files, so 3 shards"]


def test_one_shard_tells_of_auto():
    assert cut([1] * 365)[1] == ["365 files in one shard: --shards auto makes 8 of them"]
    assert cut([1])[1] == []


@pytest.mark.parametrize(("many", "expected"), [(3, 3), (8, 8), (100, 8)])
def test_auto_makes_four_shards_a_slot_or_one_a_file(many, expected):
    shards, notes = cut([1] * many, by="auto")
    assert len(shards) == expected
    assert notes == []


def test_batches_hold_so_many_files_and_the_rest():
    assert [len(shard) for shard in cut([1] * 7, by="batch", n=3)[0]] == [3, 3, 1]


def test_by_size_consecutive_files_fill_a_shard_and_a_larger_one_is_alone():
    assert cut([4, 6, 1, 99, 0, 10, 1], by="size", n=10)[0] == [[4, 6], [1], [99], [0, 10], [1]]


def test_empty_files_are_balanced_by_number():
    assert [len(shard) for shard in cut([0] * 9, n=3)[0]] == [3, 3, 3]


def test_a_huge_file_does_not_drag_its_neighbours_together():
    for sizes in ([10**10] + [1000] * 1000, [1000] * 1000 + [10**10], [0] * 500 + [10**10] + [0] * 500):
        lengths = [len(shard) for shard in cut(sizes, n=11)[0]]
        assert max(lengths) <= 102, lengths


def test_a_folder_is_never_cut():
    units = [tuple(files("a/1", "a/2", "a/3")), tuple(files("b/1"))]
    shards, notes = sharding.split(units, Sharding(n=4), slots=1, with_inputs=True)
    assert shards == units
    assert "so 2 shards" in notes[0]


def test_without_inputs_there_are_so_many_shards_without_entries():
    assert sharding.split([], Sharding(n=3), slots=1, with_inputs=False) == ([(), (), ()], [])


@pytest.mark.parametrize(
    ("by", "option"), [("auto", "--shards auto"), ("batch", "--batch-size"), ("size", "--shard-size")]
)
def test_dividing_files_needs_an_input(by, option):
    with pytest.raises(SpecError, match=option):
        sharding.split([], Sharding(by=by), slots=1, with_inputs=False)


def test_inputs_without_files_are_an_error():
    with pytest.raises(SpecError, match="hold no files"):
        sharding.split([], Sharding(), slots=1, with_inputs=True)


def test_too_many_shards_are_refused():
    units = [(file(str(index)),) for index in range(100_001)]
    with pytest.raises(SpecError, match="100001 shards: at most 100000"):
        sharding.split(units, Sharding(by="batch", n=1), slots=1, with_inputs=True)


sizes_of_files = st.lists(st.one_of(st.integers(0, 5), st.integers(0, 2**50), st.just(0)), min_size=1, max_size=40)
ways = st.one_of(
    st.builds(Sharding, by=st.just("count"), n=st.integers(1, 50)),
    st.builds(Sharding, by=st.just("auto")),
    st.builds(Sharding, by=st.just("batch"), n=st.integers(1, 50)),
    st.builds(Sharding, by=st.just("size"), n=st.integers(1, 2**51)),
)


@given(sizes=sizes_of_files, way=ways, slots=st.integers(1, 5))
def test_every_file_is_in_exactly_one_shard_in_order_and_no_shard_is_empty(sizes, way, slots):
    units = [(file(str(index), size),) for index, size in enumerate(sizes)]
    shards, _ = sharding.split(units, way, slots=slots, with_inputs=True)
    assert [entry for shard in shards for entry in shard] == [entry for unit in units for entry in unit]
    assert all(shards)
    if way.by == "count":
        assert len(shards) == min(way.n, len(units))


def smallest_largest(sizes: list[int], count: int) -> int:
    """By dynamic programming over all contiguous splits."""
    best = [0] + [sum(sizes) + 1] * len(sizes)
    for _ in range(count):
        best = [
            0 if not end else min(max(best[at], sum(sizes[at:end])) for at in range(end)) for end in range(len(best))
        ]
    return best[-1]


@given(sizes=st.lists(st.one_of(st.integers(0, 9), st.integers(0, 10**12)), min_size=1, max_size=12), data=st.data())
def test_no_contiguous_split_has_a_smaller_largest_shard(sizes, data):
    count = data.draw(st.integers(1, len(sizes)))
    ends = sharding.balanced_cuts(sizes, count)
    sums = [sum(sizes[start:end]) for start, end in zip([0, *ends], ends, strict=False)]
    assert len(ends) == count
    assert max(sums) == smallest_largest(sizes, count)


@given(size=st.integers(0, 2**40), many=st.integers(1, 300), data=st.data())
def test_equal_files_are_spread_evenly(size, many, data):
    count = data.draw(st.integers(1, many))
    ends = sharding.balanced_cuts([size] * many, count)
    lengths = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    assert max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize("count", [10, 1_000, 60_000])
def test_a_hundred_thousand_files_take_seconds_at_most(count):
    entries = [file(f"{index % 100:03}/part {index}.csv", index * 7919 % 10_007) for index in range(100_000)]
    start = time.process_time()
    units = sharding.select(entries, ["**/*.csv", "/inputs/0*/**"])
    shards, _ = sharding.split(units, Sharding(n=count), slots=2, with_inputs=True)
    spent = time.process_time() - start
    assert len(shards) == count
    assert spent < 6, f"{spent:.1f} s of processor time"


# --- places ---


def spec(*inputs: InputSource, shared: tuple[InputSource, ...] = ()) -> JobSpec:
    return JobSpec(task=Command(), inputs=inputs, shared=shared)


def at(source: str, mount: str | None = None) -> InputSource:
    return InputSource(source=source, mount=mount)


def test_one_input_lies_at_inputs_and_several_at_their_numbers():
    assert sharding.mounts(spec(at("/a"))) == (("/inputs",), ())
    several = spec(at("/a"), at("/b", "/data/"), at("/c"), shared=(at("/m"),))
    assert sharding.mounts(several) == (("/inputs/0", "/data", "/inputs/2"), ("/shared",))
    assert sharding.mounts(spec(shared=(at("/m"), at("/n"))))[1] == ("/shared/0", "/shared/1")


@pytest.mark.parametrize(
    "mount", ["data", "/", "//", "/a/../b", "/a//b", "/./a", "", "/usr/x", "/outputs", "/proc", "/a\nb"]
)
def test_a_mount_that_cannot_be_one_is_refused(mount):
    with pytest.raises(SpecError, match="mount"):
        sharding.mounts(spec(at("/a", mount)))


def test_two_inputs_at_one_mount_are_refused_by_name():
    with pytest.raises(SpecError, match=r"/a and /b are both mounted at /data"):
        sharding.mounts(spec(at("/a", "/data"), shared=(at("/b", "/data/"),)))


def test_a_mount_names_a_single_file_unless_it_ends_in_a_slash():
    one = Entry("m.pkl", LocalStamp("/home/m.pkl", 1, 1, 1, 1), 1)
    content = Entry("m.pkl", ContentRef("bafy"), 1)
    for entry, source in ((one, "/home/m.pkl"), (content, "ipfs://bafy/x/m.pkl")):
        assert sharding.container_path("/model", at(source, "/model"), entry) == "/model"
        assert sharding.container_path("/model", at(source, "/model/"), entry) == "/model/m.pkl"
        assert sharding.container_path("/inputs", at(source), entry) == "/inputs/m.pkl"
    assert sharding.container_path("/model", at("/home", "/model"), one) == "/model/m.pkl"


def test_entries_that_want_one_place_are_refused_by_name():
    job = spec(at("/a"), shared=(at("/b", "/inputs/x"),))
    sharding.check_places(job, files("x/y", "z"), files("w"))
    with pytest.raises(SpecError, match=r"/a and /b both want /inputs/x/y in the container"):
        sharding.check_places(job, files("x/y"), files("y"))


@pytest.mark.parametrize(("inner", "outer"), [("y/z", "x"), ("z", "x")])
def test_an_entry_below_a_file_is_refused_by_name(inner, outer):
    with pytest.raises(SpecError, match="both want /inputs/x in the container"):
        sharding.check_places(spec(at("/a"), shared=(at("/b", "/inputs/x"),)), files(outer), files(inner))


# --- blocks ---

references = st.one_of(
    st.builds(ContentRef, st.text(st.sampled_from("abc234"), min_size=1)),
    st.builds(
        LocalStamp,
        st.binary(min_size=1, max_size=20).map(os.fsdecode),
        st.shared(st.integers(0, 2**63), key="size"),
        st.integers(0, 2**63),
        st.integers(0, 2**64),
        st.integers(0, 2**64),
    ),
)
logical_paths = st.lists(
    st.binary(min_size=1, max_size=8).filter(lambda raw: raw not in {b".", b".."} and not {0, 0x2F} & set(raw)),
    min_size=1,
    max_size=3,
).map(lambda levels: os.fsdecode(b"/".join(levels)))
entries_of_plans = st.lists(
    st.builds(Entry, logical_paths, references, st.shared(st.integers(0, 2**63), key="size"), st.integers(0, 9))
)


@given(entries=entries_of_plans)
def test_a_block_holds_every_entry_whatever_its_name(entries):
    assert sharding.read_block(sharding.plan_block(entries)) == tuple(entries)


@given(entries=entries_of_plans)
def test_chunks_keep_every_entry_in_order(entries):
    assert [entry for part in sharding.chunks(entries) for entry in part] == entries


def test_chunks_fit_into_a_block_of_the_store():
    dagjson = pytest.importorskip("bacalhau_node.dagjson")
    entries = [file("\x01" * 200 + str(index), 2**63) for index in range(5_000)]
    parts = list(sharding.chunks(entries))
    assert len(parts) > 1
    assert all(len(dagjson.encode(sharding.plan_block(part))) < 1024 * 1024 for part in parts)


@pytest.mark.parametrize(
    "data",
    [
        None,
        {},
        {"entries": {}},
        {"entries": [[]]},
        {"entries": [["a", 0, "1", "cid"]]},
        {"entries": [["../a", 0, 1, "cid"]]},
        {"entries": [["/etc/passwd", 0, 1, "cid"]]},
        {"entries": [["a//b", 0, 1, "cid"]]},
        {"entries": [["", 0, 1, "cid"]]},
        {"entries": [["a\0", 0, 1, "cid"]]},
        {"entries": [[b"a/..", 0, 1, "cid"]]},
        {"entries": [[7, 0, 1, "cid"]]},
        {"entries": [["a", -1, 1, "cid"]]},
        {"entries": [["a", 0, -1, "cid"]]},
    ],
)
def test_a_block_from_elsewhere_that_is_no_list_of_entries_is_refused(data):
    with pytest.raises(ProtocolError):
        sharding.read_block(data)
