import decimal
import io
import json

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bacalhau_jupyter import result as results
from bacalhau_jupyter import values
from bacalhau_jupyter.result import Reader, Result, ShardResult
from bacalhau_node.errors import JobFailed, SpecError
from bacalhau_node.messages import Blob, ShardError, Value

UNUSED = Reader(blob=lambda blob: pytest.fail(f"{blob} was read"), folder=lambda cid: pytest.fail(f"{cid} was read"))
FAILED = ShardError(kind="exception", name="KeyError", message="'x'")


def shard(index, value, **more):
    if value is None:
        return ShardResult(index=index, **more)
    kind, data = values.encode("x", value)
    name = "Index" if isinstance(value, pd.Index) else type(value).__name__
    return ShardResult(index=index, value=Value(kind, name, Blob(len(data), data)), **more)


def result(*given_values):
    return Result([shard(index, value) for index, value in enumerate(given_values)], UNUSED)


def df(*given_values, **more):
    return result(*given_values).df(**more)


def refused(*given_values):
    with pytest.raises(SpecError) as caught:
        df(*given_values)
    return str(caught.value)


def frame(**columns):
    return pd.DataFrame(columns)


def equal(one, other):
    pd.testing.assert_frame_equal(one, other)


def zoned(*texts, unit="us", zone="Europe/Berlin"):
    return pd.to_datetime(list(texts)).tz_localize(zone).as_unit(unit)


# --- tables ---

KEYS = pd.MultiIndex.from_tuples([(1, "a"), (2, "b")], names=["k", None])


@pytest.mark.parametrize(
    "frames",
    [
        [frame(a=[1, 2]), frame(a=[3])],
        [frame(a=[1, 2]), frame(a=[1.5])],
        [frame(a=np.array([1], "i1")), frame(a=np.array([300], "i2"))],
        [frame(a=[2**60 + 1]), frame(a=[0.5])],
        [frame(a=pd.array([1, None], "Int64")), frame(a=[3])],
        [frame(a=[3]), frame(a=pd.array([1, None], "Int64"))],
        [frame(a=pd.array([1, None], "Int64")), frame(a=[1.5])],
        [frame(a=pd.array([True, None], "boolean")), frame(a=[True])],
        [frame(a=zoned("2020-01-01")), frame(a=zoned("2021-07-01"))],
        [frame(a=zoned("2020-01-01")), frame(a=zoned("2021-07-01", unit="ns"))],
        [frame(a=pd.Categorical(["u", "v"])), frame(a=pd.Categorical(["v"], categories=["u", "v"]))],
        [
            frame(a=pd.Categorical(["u"], categories=["v", "u"], ordered=True)),
            frame(a=pd.Categorical(["v"], categories=["v", "u"], ordered=True)),
        ],
        [
            frame(a=pd.period_range("2020-01", periods=2, freq="M")),
            frame(a=pd.period_range("2021", periods=1, freq="M")),
        ],
        [frame(a=pd.to_timedelta(["1s", None])), frame(a=pd.to_timedelta(["2h"]))],
        [frame(a=[1], b=["x"]), frame(b=["y"], c=[2])],
        [frame(a=[True, False]), frame(a=[True])],
        [frame(a=["ü"]), frame(a=[None, "x"])],
        [pd.DataFrame({0: [1], 1: ["x"]}), pd.DataFrame({0: [2], 1: ["y"]})],
        [pd.DataFrame({("a", "b"): [1]}), pd.DataFrame({("a", "b"): [2]})],
    ],
    ids=lambda frames: " + ".join(str(each.dtypes.iloc[0]) for each in frames),
)
def test_numbered_tables_join_as_pandas_concatenates_them(frames):
    equal(df(*frames), pd.concat(frames, ignore_index=True))


@pytest.mark.parametrize(
    "frames",
    [
        [pd.DataFrame({"a": [1, 2]}, KEYS), pd.DataFrame({"a": [3, 4]}, KEYS)],
        [pd.DataFrame({"a": [1]}, pd.Index(["x"], name="c")), pd.DataFrame({"a": [2]}, pd.Index(["x"], name="c"))],
        [pd.DataFrame({"a": [1]}, ["x"]), pd.DataFrame({"a": [2]}, ["y"])],
        [pd.DataFrame({"a": [1]}, [5]), pd.DataFrame({"a": [2, 3]}, [7, 5])],
        [pd.DataFrame({"a": [1]}, zoned("2020-01-01")), pd.DataFrame({"a": [2]}, zoned("2020-01-02"))],
        [pd.DataFrame({"a": [1, 2]}), pd.DataFrame({"a": [3]}, pd.Index([9], name="c"))],
        [pd.DataFrame({"a": [1]}, pd.Index([1], name="a")), pd.DataFrame({"a": [3]}, pd.Index([9], name="a"))],
        [pd.DataFrame({"a": [1, 2]}, pd.RangeIndex(2, name="r")), pd.DataFrame({"a": [3]}, pd.RangeIndex(1, name="r"))],
    ],
    ids=lambda frames: " + ".join(str(each.index) for each in frames),
)
def test_any_other_index_is_kept(frames):
    joined = df(*frames)
    pd.testing.assert_frame_equal(joined, pd.concat(frames), check_index_type=False)
    assert list(joined.index) == [label for each in frames for label in each.index]
    assert joined.index.names == pd.concat(frames).index.names


def test_a_default_index_is_numbered_anew_wherever_it_starts():
    assert df(frame(a=[1, 2]), frame(a=[1, 2, 3]).iloc[1:]).index.equals(pd.RangeIndex(4))


@pytest.mark.parametrize("missing", [[np.nan, np.nan], [None, None], pd.array([None, None], "Int64"), [pd.NaT, pd.NaT]])
@pytest.mark.parametrize("full", [["x", "y"], zoned("2020-01-01", "2021-01-01"), pd.Categorical(["u", "v"])])
def test_a_column_that_is_all_missing_takes_the_type_of_the_others(missing, full):
    for frames in ([frame(a=missing), frame(a=full)], [frame(a=full), frame(a=missing)]):
        joined = df(*frames)["a"]
        assert joined.isna().sum() == 2
        assert joined.dropna().tolist() == list(full)
        assert joined.dtype == frame(a=full)["a"].dtype


def test_tables_without_rows_have_no_say_in_types():
    equal(df(frame(a=[]), frame(a=["x"]), pd.DataFrame()), frame(a=["x"]))
    equal(df(pd.DataFrame(), frame(a=[])), frame(a=np.array([], dtype=float)))


def test_different_categories_become_their_union():
    joined = df(frame(a=pd.Categorical(["u", "v"])), frame(a=pd.Categorical(["w", "u"])))
    equal(joined, frame(a=pd.Categorical(["u", "v", "w", "u"])))
    many = pd.Categorical([str(number) for number in range(300)])
    assert len(df(frame(a=pd.Categorical(["u"])), frame(a=many))["a"].cat.categories) == 301


@pytest.mark.parametrize(
    "second",
    [pd.Categorical(["w"], ordered=True), pd.Categorical(["w"]), ["w"]],
    ids=["other order", "no order", "text"],
)
def test_categories_whose_union_would_invent_something_become_values(second):
    equal(df(frame(a=pd.Categorical(["v", "u"], ordered=True)), frame(a=second)), frame(a=["v", "u", "w"]))


def test_attributes_are_kept_where_all_agree():
    one, other = frame(a=[1]), frame(a=[2])
    one.attrs = other.attrs = {"k": 1}
    assert df(one, other).attrs == {"k": 1}
    other.attrs = {"k": 2}
    assert df(one, other).attrs == {}


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        ([1], ["x"], "int64 in shard 0, str in shard 2"),
        (["x"], [1.5], "str in shard 0, float64 in shard 2"),
        ([1], [True], "int64 in shard 0, bool in shard 2"),
        (zoned("2020-01-01"), zoned("2020-01-01", zone="UTC"), "timestamp[us, tz=Europe/Berlin] in shard 0"),
        ([[1]], [["x"]], "list<item: int64> in shard 0"),
        ([decimal.Decimal("1.5")], ["x"], "decimal128(2, 1) in shard 0, str in shard 2"),
    ],
)
def test_types_that_clash_name_the_column_and_two_shards(first, second, words):
    text = refused(frame(a=first), frame(a=first), frame(a=second))
    assert f"column 'a': {words}" in text
    assert "df['a'].astype(str)" in text


def test_a_value_that_does_not_fit_names_column_and_shard():
    assert "column 'a' of shard 0 doesn't fit into int64" in refused(frame(a=np.array([2**63], "u8")), frame(a=[-1]))


def test_indexes_of_different_depth_are_refused():
    assert "1 levels in shard 0 and 2 in shard 1; end the cell with .reset_index()" in refused(
        frame(a=[1, 2]), pd.DataFrame({"a": [1, 2]}, KEYS)
    )


def test_arrow_tables_join_too():
    joined = result(pa.table({"a": [1, None]}), pa.table({"a": [1.5], "b": ["x"]}))
    assert joined.arrow().to_pylist() == [{"a": 1.0, "b": None}, {"a": None, "b": None}, {"a": 1.5, "b": "x"}]
    equal(joined.df(), frame(a=[1.0, None, 1.5], b=[None, None, "x"]))


def test_a_result_speaks_arrow():
    named = pd.DataFrame({"a": [1]}, pd.Index(["x"], name="c"))
    assert pa.table(result(named, named)).to_pylist() == [{"a": 1, "c": "x"}, {"a": 1, "c": "x"}]
    assert pa.table(result(1, 2)).to_pylist() == [{"value": 1}, {"value": 2}]


def test_a_joined_frame_can_be_written_to():
    for joined in (df(frame(a=[1, 2])), df(frame(a=[1], b=[1.5]), frame(a=[2], b=[2.5]))):
        joined.iloc[0, 0] = 9
        assert joined.iloc[0, 0] == 9


table = st.lists(st.tuples(st.none() | st.integers(-(2**40), 2**40), st.none() | st.text(max_size=3)), max_size=4)


@given(st.lists(table, min_size=1, max_size=4))
def test_no_row_is_lost_or_moved(shards):
    frames = [pd.DataFrame(rows, columns=["n", "s"]) for rows in shards]
    joined = df(*frames)
    wanted = [row for rows in shards for row in rows]
    found = [tuple(None if pd.isna(item) else item for item in row) for row in joined.itertuples(index=False)]
    assert found == wanted


SMALL = st.integers(0, 3)
MAKERS = {
    "int64": lambda n: n,
    "Int8": lambda n: n or None,
    "float32": lambda n: n / 2 if n else None,
    "boolean": lambda n: [None, True, False, True][n],
    "str": lambda n: "abc"[:n] or None,
    "category": "wxyz".__getitem__,
    "datetime64[us, Asia/Tokyo]": lambda n: pd.Timestamp(2020, 1, n + 1, tz="Asia/Tokyo") if n else None,
    "timedelta64[ns]": lambda n: pd.Timedelta(n, "h"),
    "period[D]": lambda n: pd.Period(f"2020-01-0{n + 1}", "D"),
}
KINDS = st.sampled_from(sorted(MAKERS))


def column(numbers, kind):
    items = [MAKERS[kind](number) for number in numbers]
    return pd.Categorical(items, list("wxyz")) if kind == "category" else pd.array(items, dtype=kind)


def indexed(rows, kinds, *, by):
    made = pd.DataFrame({f"c{at}": column([row[at] for row in rows], kind) for at, kind in enumerate(kinds)})
    return made.set_index([f"c{at}" for at in range(by)]) if by else made


@given(st.data(), st.lists(KINDS, min_size=1, max_size=4), st.integers(0, 2))
def test_shards_of_equal_types_join_as_pandas_concatenates_them(data, kinds, by):
    shards = data.draw(
        st.lists(st.lists(st.tuples(*[SMALL] * len(kinds)), min_size=1, max_size=4), min_size=1, max_size=4)
    )
    # Arrow itself gives an index with a mask back without it
    by = 0 if {"Int8", "boolean"}.intersection(kinds[:by]) else min(by, len(kinds) - 1)
    frames = [indexed(rows, kinds, by=by) for rows in shards]
    wanted = pd.concat(frames, ignore_index=not by)
    pd.testing.assert_frame_equal(df(*frames), wanted, check_index_type=False, check_column_type=False)


# --- rows ---


@pytest.mark.parametrize(
    ("given_values", "joined"),
    [
        ([1, 2.5], frame(value=[1.0, 2.5])),
        (["a", "b"], frame(value=["a", "b"])),
        ([{"a": 1}, {"a": 2, "b": "x"}], frame(a=[1, 2], b=[None, "x"])),
        ([[{"a": 1}, {"a": 2}], [], [{"a": 3}]], frame(a=[1, 2, 3])),
        ([[1, 2], [3]], frame(value=[1, 2, 3])),
        ([pd.Series([1, 2], ["a", "b"]), pd.Series([3, 4], ["b", "c"])], frame(a=[1, None], b=[2, 3], c=[None, 4.0])),
        ([np.array([1, 2]), np.array([3])], frame(value=[1, 2, 3])),
        ([np.ones((1, 2)), np.zeros((2, 2))], pd.DataFrame([[1.0, 1.0], [0, 0], [0, 0]])),
        ([np.array([(1, 2.5)], dtype=[("a", "i4"), ("b", "f8")])], frame(a=[1], b=[2.5])),
        ([pd.Index(["a"]), pd.Index(["b"])], frame(value=["a", "b"])),
        ([{}, {}], pd.DataFrame(index=pd.RangeIndex(2))),
        ([{"a": None}, {"a": "x"}], frame(a=[None, "x"])),
        ([True, False], frame(value=[True, False])),
    ],
)
def test_plain_values_become_rows(given_values, joined):
    pd.testing.assert_frame_equal(df(*given_values), joined, check_column_type=False)


def test_shards_without_a_value_are_left_out():
    equal(df(None, frame(a=[1]), None, frame(a=[2])), frame(a=[1, 2]))


def test_the_shard_of_a_row_is_a_column_on_demand():
    joined = df(frame(a=[1, 2]), None, frame(a=[3]), shard=True)
    equal(joined, pd.DataFrame({"_shard": [0, 0, 2], "a": [1, 2, 3]}))
    equal(df([1, 2], [3], shard=True), pd.DataFrame({"_shard": [0, 0, 1], "value": [1, 2, 3]}))
    equal(df(frame(a=[]), frame(a=[3]), shard=True), pd.DataFrame({"_shard": [1], "a": [3]}))


@pytest.mark.parametrize(
    ("given_values", "says"),
    [
        ([1, 2, "x"], "shard 0 returned an int, shard 2 a str"),
        ([1, True], "shard 0 returned an int, shard 1 a bool"),
        ([frame(a=[1]), {"a": 1}], "shard 0 returned a DataFrame, shard 1 a dict"),
        ([None, None], "no shard returned a value: end the cell with an expression"),
        ([b"x"], "shard 0 returned a bytes, which has no rows; result.values()"),
        ([{"a": 1}, {"a": "x"}], "column 'a': a number in shard 0, str in shard 1"),
        ([pd.Series(range(10_001))], "shard 0 returned a Series of 10,001 values"),
        ([pd.Series([1, 2], ["a", "a"])], "a Series with the label 'a' twice"),
    ],
)
def test_values_of_no_common_kind_are_refused(given_values, says):
    assert says in refused(*given_values)


# --- the result ---


def test_a_result_goes_by_shard():
    made = Result([shard(1, "b"), shard(0, "a"), ShardResult(index=2, error=FAILED)], UNUSED, cid="root")
    assert (made.cid, len(made), made[0], made[1], made.values(), list(made)) == (
        "root",
        3,
        "a",
        "b",
        ["a", "b"],
        ["a", "b"],
    )
    assert (made.partial, made.failed) == (True, (2,))
    with pytest.raises(JobFailed, match="shard 2 failed: KeyError: 'x'"):
        made[2]
    with pytest.raises(IndexError):
        made[3]


def test_nothing_is_read_before_it_is_needed(tmp_path):
    read = []

    def blob(wanted):
        read.append(wanted.cid)
        path = tmp_path / wanted.cid
        path.write_bytes(values.encode("x", frame(a=[int(wanted.cid)]))[1])
        return path

    stored = [ShardResult(index=i, value=Value("arrow", "DataFrame", Blob(9, None, str(i)))) for i in range(3)]
    made = Result(stored, Reader(blob=blob, folder=UNUSED.folder))
    assert (len(made), made.partial, read) == (3, False, [])
    equal(made[1], frame(a=[1]))
    assert read == ["1"]
    equal(made.df(), frame(a=[0, 1, 2]))


def test_files_are_all_that_the_shards_wrote(tmp_path):
    for name in ("cid0/b.txt", "cid0/a/c.txt", "cid2/b.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    made = Result(
        [ShardResult(index=0, outputs="cid0"), ShardResult(index=1), ShardResult(index=2, outputs="cid2")],
        Reader(blob=UNUSED.blob, folder=tmp_path.joinpath),
    )
    assert [str(path.relative_to(tmp_path)) for path in made.files()] == ["cid0/a/c.txt", "cid0/b.txt", "cid2/b.txt"]


def test_a_result_shows_what_it_holds_and_what_it_hides():
    made = Result([*(shard(i, frame(a=[i, i])) for i in range(7)), ShardResult(index=7, error=FAILED)], UNUSED)
    lines = repr(made).splitlines()
    assert lines[0] == "Result: 8 shards · DataFrame · 14 rows · 1 failed"
    assert lines[1] == "  shard 0: DataFrame, 2 rows × 1 columns (a)"
    assert lines[-2:] == ["  … 2 more: result.df() joins them, result.values() lists them", "  failed: 7"]
    assert repr(result(42, None)) == "Result: 2 shards · int · 1 without a value\n  shard 0: 42\n  shard 1: None"
    assert len(repr(result("x" * 10_000))) < 300


def test_html_shows_tables_and_pictures_and_escapes_the_rest():
    picture = Value("mime", "Figure", Blob(1, b'{"image/png": "iVBO"}'))
    shards = [
        ShardResult(index=0, value=picture, inputs=("<a>", "b", "c")),
        shard(1, "<script>"),
        shard(2, frame(a=[1])),
    ]
    text = Result(shards, UNUSED)._repr_html_()
    assert "data:image/png;base64,iVBO" in text
    assert "shard 0: &lt;a&gt;, b and 1 more" in text
    assert "<div><b>shard 1</b> <code>&#x27;&lt;script&gt;&#x27;</code></div>" in text
    assert pd.read_html(io.StringIO(text))[0]["a"].tolist() == [1] if _can_read_html() else "<table" in text


def test_values_of_other_nodes_act_on_no_page():
    evil = json.dumps({"text/html": "<script>alert(1)</script>"}).encode()
    value = Value("mime", "T", Blob(len(evil), evil))
    mine, others = ShardResult(index=0, value=value), ShardResult(index=1, value=value, foreign=True)
    assert "<script>" in Result([mine], UNUSED)._repr_html_(), "one's own charts need theirs"
    assert "<script>" not in Result([others], UNUSED)._repr_html_()
    assert "<script>" not in str(Result([others], UNUSED)[0]._repr_mimebundle_())


def _can_read_html():
    return bool(pd.io.html.import_optional_dependency("lxml", errors="ignore"))


# --- reduce ---


def test_reduce_works_on_the_joined_frame_among_the_notebooks_names():
    reduced = results.reduce(
        "df.groupby('k').sum() * factor + np.int64(1)", frame(k=["a", "a"], n=[1, 2]), {"factor": 10}
    )
    assert reduced.loc["a", "n"] == 31


def test_an_error_of_reduce_shows_the_expression_and_the_columns():
    with pytest.raises(SpecError, match=r"--reduce df\['b'\]: KeyError: 'b'; df has the columns a"):
        results.reduce("df['b']", frame(a=[1]), {})
