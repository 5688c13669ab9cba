import contextlib
import datetime as dt
import html
import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bacalhau_jupyter import values
from bacalhau_node.errors import ContentError, SpecError
from bacalhau_node.executors.agent import values as agent_values
from bacalhau_node.executors.agent.variables import load_variables

FRAME = pd.DataFrame(
    {
        "n": pd.array([1, None], dtype="Int64"),
        "c": pd.Categorical(["u", "v"]),
        "t": pd.to_datetime(["2020-01-01", None]).tz_localize("Europe/Berlin"),
        "s": ["ü", None],
    },
    index=pd.MultiIndex.from_tuples([(1, "a"), (2, "b")], names=["k", None]),
)
FRAME.attrs = {"source": "here"}


def same(one, other):
    if isinstance(one, pd.DataFrame):
        pd.testing.assert_frame_equal(one, other, check_freq=False)
        assert one.attrs == other.attrs
    elif isinstance(one, pd.Series):
        pd.testing.assert_series_equal(one, other)
    elif isinstance(one, pd.Index):
        pd.testing.assert_index_equal(one, other)
    elif isinstance(one, np.ndarray):
        np.testing.assert_array_equal(one, other, strict=True)
    elif isinstance(one, pa.Table):
        assert one.equals(other)
    else:
        assert one == other
        assert type(one) is type(other)
    return True


CASES = [
    (None, "json"),
    ({"a": [1, 2.5, True, None, "ü\ud800"], "": {}}, "json"),
    ("text", "json"),
    (2**80, "json"),
    (b"\0raw", "bytes"),
    (np.arange(6, dtype="i2").reshape(2, 3), "npy"),
    (np.array(["a", "bc"]), "npy"),
    (np.array([(1, 2.5)], dtype=[("a", "i4"), ("b", "f8")]), "npy"),
    (FRAME, "arrow"),
    (pd.DataFrame(), "arrow"),
    (pd.DataFrame({0: [1], 1: ["x"]}), "arrow"),
    (pd.Series([1.5, None], name="x"), "arrow"),
    (pd.Series(["a"], index=["i"]), "arrow"),
    (pd.Series([1, 2], name=0), "arrow"),
    (pd.Index(["a", "b"], name="k"), "arrow"),
    (pd.Index([1.5]), "arrow"),
    (pd.MultiIndex.from_tuples([(1, "a")], names=["k", "l"]), "arrow"),
    (pa.table({"a": [1, None], "b": [["x"], []]}), "arrow"),
]


def test_a_round_trip_gives_an_equal_value(tmp_path):
    for value, extension in CASES:
        found, data = values.encode("x", value)
        assert found == extension
        file = tmp_path / "value"
        file.write_bytes(data)
        assert same(value, values.decode(extension, type(value).__name__, data))
        assert same(value, values.decode(extension, type(value).__name__, file))


def test_the_agent_reads_variables_as_they_were(tmp_path):
    for number, (value, _) in enumerate(CASES):
        extension, data = values.encode("x", value)
        (tmp_path / f"v{number}.{extension}").write_bytes(data)
    found = load_variables(str(tmp_path))
    assert all(same(value, found[f"v{number}"]) for number, (value, _) in enumerate(CASES))


def test_what_the_agent_writes_reads_back(tmp_path):
    for value, kind in CASES[1:]:
        sent = agent_values.encode_value(value)
        data = sent.data
        if sent.write is not None:
            sent.write(str(tmp_path / "file"))
            data = tmp_path / "file"
        assert sent.kind == kind
        assert same(value, values.decode(sent.kind, sent.type, data))


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(plain)
def test_plain_values_travel_as_json(value):
    assert values.decode("json", "", values.encode("x", value)[1]) == value


def test_numpy_numbers_and_tuples_travel_as_plain_ones():
    _, data = values.encode("x", {"a": (np.float64(1.5), np.int8(2), np.bool_(True)), "b": np.str_("x")})
    assert values.decode("json", "dict", data) == {"a": [1.5, 2, True], "b": "x"}


loop = []
loop.append(loop)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({1, 2}, "--vars x: a set can't go along; send text, numbers"),
        ([dt.date(2020, 1, 1)], "--vars x: a date can't go along"),
        ({"a": {1: 2}}, "a dict with an int as key (1) can't go along"),
        (object(), "an object can't go along"),
        (1j, "a complex can't go along"),
        (loop, "it holds itself"),
        (np.array([object()]), "an array of Python objects can't go along"),
        (pd.DataFrame({"a": [object()]}), "this DataFrame can't go along as a table"),
        (pd.DataFrame({"a": [1, "x"]}), "this DataFrame can't go along as a table"),
    ],
)
def test_what_cannot_go_along_is_refused_with_its_type(value, says):
    with pytest.raises(SpecError) as caught:
        values.encode("x", value)
    assert says in str(caught.value)


def test_a_variable_over_the_limit_is_refused(monkeypatch):
    monkeypatch.setattr(values, "LIMIT", 10)
    with pytest.raises(SpecError, match="--vars x: 11 bytes; at most 10 can go along"):
        values.encode("x", b"x" * 11)


@pytest.mark.parametrize(
    ("kind", "data"),
    [("json", b"{"), ("json", b"\xff"), ("npy", b"no"), ("arrow", b"no"), ("mime", b"[]"), ("arrow", b"")],
)
def test_a_damaged_value_is_an_error_of_content(kind, data):
    with pytest.raises(ContentError, match=f"the value of a shard \\({kind}, T\\) can't be read"):
        values.decode(kind, "T", data)


def test_an_array_with_pickled_objects_is_never_loaded(tmp_path):
    np.save(tmp_path / "x.npy", np.array([object()]), allow_pickle=True)
    with pytest.raises(ContentError):
        values.decode("npy", "ndarray", tmp_path / "x.npy")


def test_a_repr_says_that_it_is_one():
    value = values.decode("repr", "Model", b"Model(3)")
    assert value == "Model(3)"
    assert value.type == "Model"
    assert "repr of a Model" in repr(value)


def test_a_drawing_shows_itself():
    picture = json.dumps({"image/png": "iVBO", "text/plain": "<Figure>"}).encode()
    value = values.decode("mime", "Figure", picture)
    assert value.data["image/png"] == b"\x89PN"[:3]
    assert value._repr_mimebundle_()["image/png"] == "iVBO"
    assert value.as_html() == '<img alt="Figure" src="data:image/png;base64,iVBO">'
    assert repr(value) == "<Figure>"
    assert values.Drawing("T", {"text/html": "<b>x</b>"}).as_html() == "<b>x</b>"
    assert values.Drawing("T", {"text/latex": "x"}).as_html() == ""


def test_importing_the_notebook_side_loads_nothing_heavy():
    names = "options, cell, values, result, join, rows"
    code = f"import sys\nfrom bacalhau_jupyter import {names}\n"
    code += "print([n for n in ('pandas', 'numpy', 'pyarrow', 'IPython') if n in sys.modules])"
    path = json.dumps([entry for entry in sys.path if entry])
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {path}\n{code}"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


# --- values of nodes that nobody here knows ---

EVIL = "<script>alert(1)</script><img src=x onerror='alert(2)'>"


def _mime(**parts):
    bundle = {kind.replace("_", "/", 1).replace("svg", "svg+xml"): part for kind, part in parts.items()}
    return values.decode("mime", '"><script>', json.dumps(bundle).encode(), foreign=True)


def test_html_of_another_node_is_shown_in_a_frame_that_runs_no_scripts():
    drawing = _mime(text_html=EVIL, application_javascript="alert(3)", text_plain="a chart")
    assert drawing._repr_mimebundle_() == {
        "text/html": f'<iframe sandbox srcdoc="{html.escape(EVIL)}" style="{values._FRAME}"></iframe>',
        "text/plain": "a chart",
    }
    assert drawing.as_html() == drawing.data["text/html"]
    assert values.decode("mime", "T", json.dumps({"text/html": EVIL}).encode()).as_html() == EVIL


@pytest.mark.parametrize(("kind", "part"), [("image_png", "iVBO"), ("image_svg", f"<svg>{EVIL}</svg>")])
def test_pictures_of_another_node_are_images_which_act_on_nothing(kind, part):
    shown = _mime(**{kind: part}, text_html=EVIL)._repr_mimebundle_()
    assert set(shown) == {"text/html", "text/plain"}
    assert shown["text/html"].startswith('<img alt="&quot;&gt;&lt;script&gt;" src="data:image/')
    assert "<script" not in shown["text/html"]


@pytest.mark.parametrize("part", [7, ["x"], {"a": EVIL}, None])
def test_a_drawing_of_another_node_that_is_none_is_told_or_empty(part):
    for kind in ("text_html", "image_svg", "image_png", "text_plain"):
        with contextlib.suppress(ContentError):
            assert EVIL not in _mime(**{kind: part}).as_html()


def _lying(what: str) -> bytes:
    """Files of Arrow whose lengths lead out of their buffers; reading one kills the process."""
    numbers = np.array([0, 2**30, 5], dtype="int32")
    if what == "offsets":
        column = pa.StringArray.from_buffers(2, pa.py_buffer(numbers), pa.py_buffer(b"abcde"))
    elif what == "indices":
        kind = pa.dictionary(pa.int32(), pa.string())
        column = pa.DictionaryArray.from_buffers(kind, 3, [None, pa.py_buffer(numbers)], pa.array(["a", "b"]))
    else:
        column = pa.array(np.arange(10))
    table = pa.table({"a": column})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    data = sink.getvalue().to_pybytes()
    ten, million = (number.to_bytes(8, "little") for number in (10, 1_000_000))
    return data.replace(ten, million) if what == "rows" else data


@pytest.mark.parametrize("way", ["mapped", "in memory"])
@pytest.mark.parametrize("what", ["offsets", "indices", "rows"])
def test_a_table_whose_lengths_lie_is_refused_and_kills_nobody(what, way, tmp_path):
    data = _lying(what)
    if way == "mapped":
        data = tmp_path / "value.arrow"
        data.write_bytes(_lying(what))
    with pytest.raises(ContentError, match="can't be read"):
        values.decode("arrow", "DataFrame", data, foreign=True)


def _npy(descr: str, shape: str) -> bytes:
    header = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}}}"
    return b"\x93NUMPY\x01\x00v\x00" + header.ljust(118).encode()


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        ("json", b"[" * 1_000_000),
        ("npy", _npy("<f8", "(1000000000000,)")),
        ("npy", _npy("<f8", "(-1,)")),
        ("npy", _npy("|O", "(1,)")),
        ("arrow", b"ARROW1" + b"\xff" * 100),
    ],
)
def test_what_is_damaged_on_purpose_is_an_error_that_names_the_value(kind, data):
    with pytest.raises(ContentError, match="can't be read"):
        values.decode(kind, "T", data, foreign=True)
