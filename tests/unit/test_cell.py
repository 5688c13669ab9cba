import ast
import contextlib
import importlib.metadata
import json
import linecache
import os.path
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bacalhau_jupyter import cell, names
from bacalhau_node import modules
from bacalhau_node.errors import SpecError
from bacalhau_node.executors.agent.variables import define as define_in


def refused(call, *args, **more):
    with pytest.raises(SpecError) as caught:
        call(*args, **more)
    return str(caught.value)


# --- reading ---


@pytest.mark.parametrize(
    "body",
    [
        "",
        "x = 1;",
        "await x",
        "async with a as b: pass",
        "x = '''\n%foo\n!ls\n'''",
        "x = (1\n%2)",
        "import os; os.sep  # c",
    ],
)
def test_a_python_body_ships_untouched(body):
    read = cell.read(body)
    assert read.source == body
    assert read.notes == ()


@pytest.mark.parametrize(
    ("body", "source"),
    [
        ("%matplotlib inline\nx", "pass\nx"),
        ("if x:\n    %load_ext foo\ny", "if x:\n    pass\ny"),
        ("df?\n?df\nlen??", "pass\npass\npass"),
        ("a\n%autoreload 2\nb\n%config X.y = 3\n", "a\npass\nb\npass\n"),
    ],
)
def test_harmless_notebook_commands_are_left_out_and_lines_keep_their_numbers(body, source):
    read = cell.read(body)
    assert read.source == source
    assert len(read.notes) == sum(old != new for old, new in zip(body.split("\n"), source.split("\n"), strict=True))


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("x = 1\n!ls it's", "line 3: `!` is IPython's; in a job use subprocess.run"),
        ("files = !ls", "line 2: `!` is IPython's"),
        ("%%time\nx", "line 2: `%%time` can't stand inside a cell; put it on a line above %%bacalhau"),
        ("%time x", "line 2: `%time` is a command of the notebook"),
        ("y = %who_ls", "line 2: `%who_ls` is a command of the notebook"),
        ("%pip install x", "line 2: packages are installed before the shards start"),
        ("%matplotlib inline\n\n!echo '", "line 4: `!`"),
    ],
)
def test_other_notebook_commands_are_refused_with_their_line(body, says):
    assert says in refused(cell.read, body)


def test_a_syntax_error_looks_like_pythons_own_with_the_cells_line():
    text = refused(cell.read, "x = 1\nfor i in range(3)\n    print(i)", name="Cell In[3]")
    assert text == ("Cell In[3], line 3\n    for i in range(3)\n                     ^\nSyntaxError: expected ':'")


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("return 3", "Cell, line 2\n    return 3\n    ^^^^^^^^\nSyntaxError: 'return' outside function"),
        ("x = 1 +\n%matplotlib inline", "Cell, line 2"),
        ("  x = 1\n y", "IndentationError: unexpected indent"),
        ("a\0b", "null bytes"),
        ("'\ud800'", "surrogates not allowed"),
        ("(" * 5000, "too many nested parentheses"),
        ("x = " + "-" * 100_000 + "1", "Cell"),
    ],
)
def test_what_is_no_program_is_refused(body, says):
    text = refused(cell.read, body, name="Cell")
    assert says in text
    assert len(text) < 2000


@given(
    st.lists(
        st.sampled_from(["%", "!", "?", "\n", "x", " ", "=", "(", "'", "matplotlib", "%%", "    "])
        | st.text(max_size=5)
    )
)
def test_no_body_does_anything_but_parse_or_be_refused(pieces):
    body = "".join(pieces)
    with contextlib.suppress(SpecError):
        assert cell.read(body).source.count("\n") == body.count("\n")


# --- names ---


def missing(source, known=("inputs", "outputs", "shard")):
    return [(item.line, item.name) for item in names.find(source, cell.read(source).tree, known=known)]


@pytest.mark.parametrize(
    "source",
    [
        "for i in inputs: total = i",
        "total = 0\nfor i in inputs: total += 1\ntotal",
        "[a for a in inputs if (w := a)]\nw",
        "import os.path as p, sys\np.join, sys",
        "from os.path import join\njoin",
        "class A:\n    b = 1\n    c = b\n    def d(self): return __class__, super()\nA",
        "def top(a, b): return a, b",  # the symbol tables mistake this function for the module
        "def f():\n    global g\n    g = 1\nf()\ng",
        "try:\n    import q\nexcept ImportError as e:\n    print(e)",
        "match shard:\n    case {'x': y, **rest}: y, rest\n    case [z, *more]: z, more",
        "with open('f') as f: f.read()",
        "lambda a, *b, c=1, **d: (a, b, c, d)",
        "def g(n):\n    n += 1\n    return n",
        "if inputs: k = 1\nk",
        "print(y := 3, y)",
        "from m import *\nanything",
        "exec('x = 1')\nx",
        "globals()['x'] = 1\nx",
        "from __future__ import annotations\ndef f(a: Frame) -> Frame: ...\nx: Frame = 1",
        "__name__, __doc__, print",
        "x: int = 3\ndel x",
    ],
)
def test_names_that_something_binds_are_not_missing(source):
    assert missing(source) == []


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("df", [(1, "df")]),
        ("\n\ndef f():\n    return df.x", [(4, "df")]),
        ("df = df.dropna()", [(1, "df")]),  # reads the notebook's before it binds its own
        ("x += 1", [(1, "x")]),
        ("for i in inputs: total += i", [(1, "total")]),
        ("del x", [(1, "x")]),
        ("def f(a: Frame): ...", [(1, "Frame")]),
        ("[i for i in df if i > low]", [(1, "df"), (1, "low")]),
        ("await df", [(1, "df")]),
        ("b\na", [(1, "b"), (2, "a")]),
        ("display(1)", [(1, "display")]),
        ("def f():\n    x = 1\nx", [(3, "x")]),
        ("x = 1\ndel y", [(2, "y")]),
        ("print(i)\nfor i in inputs: pass", [(1, "i")]),
    ],
)
def test_names_that_nothing_binds_are_missing(source, found):
    assert missing(source) == found


def test_the_standard_library_is_hardly_ever_accused():
    accused = []
    for path in sorted(__import__("pathlib").Path(os.__file__).parent.glob("[a-d]*.py")):
        source = path.read_text(encoding="utf-8")
        if names.find(source, ast.parse(source), known={"__file__", "__path__", "__spec__", "__package__"}):
            accused.append(path.name)
    assert len(accused) <= 1


# --- bundles ---


@pytest.fixture
def notebook(tmp_path):
    """A notebook's cells, run; functions find their source as they do in a kernel."""
    cells = []
    namespace = {"__name__": "__main__"}

    def run(source):
        cells.append(source)
        file = f"<cell {len(cells)}>"
        linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
        exec(compile(source, file, "exec"), namespace)

    def bundle(body, *, variables=(), extra=(), check=True):
        around = cell.Around(namespace=namespace, history=cells, folder=tmp_path)
        return cell.bundle(cell.read(body), around, variables=variables, extra=extra, check=check)

    bundle.run = run
    bundle.folder = tmp_path
    return bundle


def test_a_bare_cell_is_one_file(notebook):
    made = notebook("1 + 1")
    assert made == cell.Bundle(files={"cell.py": b"1 + 1"}, notes=(), imports=(), versions={})


def test_equal_cells_make_equal_bundles(notebook):
    notebook.run("a = [1, 2]\ndef f(): return a")
    assert notebook("f()", variables=["a", "f"]) == notebook("f()", variables=["a", "f"])


def test_variables_lie_in_vars_by_name_and_format(notebook):
    notebook.run("a = {'x': [1, None]}\nb = b'raw'")
    files = notebook("a, b", variables=["a", "b"]).files
    assert json.loads(files["vars/a.json"]) == {"x": [1, None]}
    assert files["vars/b.bytes"] == b"raw"


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("\ndf", "line 3: `df` lives in your notebook, not in the job: add --vars df"),
        ("np.sum", "line 2: `np` is imported in your notebook, not in the job: add `import json as np` to the cell"),
        ("join", "add `from posixpath import join` to the cell"),
        ("f", "line 2: `f` is defined in your notebook, not in the job: add --vars f"),
        ("A", "line 2: `A` is defined in your notebook, not in the job: add --vars A"),
        ("dff", "line 2: `dff` is not defined, neither in the cell nor in the notebook: did you mean `df`?"),
        ("inptus", "did you mean `inputs`?"),
        ("display(1)", "line 2: `display` exists only in a notebook, not in the job: print the object, or"),
        ("df, f", "All of them: --vars df,f"),
        ("df", "(--no-check skips this check)"),
    ],
)
def test_a_missing_name_comes_with_its_remedy(notebook, body, says):
    notebook.run("import json as np\nfrom os.path import join\ndf = 1\ndef f(): pass\nclass A: pass")
    assert says in refused(notebook, body)


def test_without_the_check_a_missing_name_goes_through(notebook):
    assert notebook("df", check=False).files == {"cell.py": b"df"}


def test_a_variable_that_is_not_there_is_refused(notebook):
    assert "--vars nope: there is no such variable" in refused(notebook, "1", variables=["nope"])


@pytest.fixture
def defined(tmp_path):
    """The names that the agent makes of a bundle's definitions."""

    def define(made, **names_before):
        path = tmp_path / "definitions.py"
        path.write_bytes(made.files["definitions.py"])
        space = {"__name__": "job", **names_before}
        define_in(str(path), space)
        return space

    return define


def test_functions_and_classes_of_the_notebook_go_along_as_source(notebook, defined):
    notebook.run("import json\nfrom os.path import join as j\nclass Base: pass")
    body = "def both(self, x: json.JSONDecoder) -> No: return json.dumps(j('a', limit))"
    notebook.run(f"from __future__ import annotations\n\nclass Sub(Base):\n    {body}")
    notebook.run("double = lambda x: x * 2\nlimit = 'b'\nalias = Sub")
    made = notebook("alias, double", variables=["alias", "Sub", "Base", "double", "limit"], check=False)
    space = defined(made, limit="b")
    assert space["alias"]().both(None) == '"a/b"'
    assert isinstance(space["Sub"](), space["Base"])
    assert space["double"](3) == 6
    assert "vars/limit.json" in made.files


def test_a_decorated_function_goes_with_its_decorator(notebook, defined):
    notebook.run("import functools\n@functools.lru_cache\ndef slow(x):\n    return x + 1")
    assert defined(notebook("slow(1)", variables=["slow"]))["slow"](1) == 2


def test_what_a_sent_function_needs_is_checked_too(notebook):
    notebook.run("rate = 3\ndef helper(): return rate\ndef f(): return helper()")
    text = refused(notebook, "f()", variables=["f", "helper"])
    assert "`helper` uses `rate`, which lives in your notebook, not in the job: add --vars rate" in text
    assert notebook("rate = 1\nf()", variables=["f", "helper"]).files


@pytest.mark.parametrize(
    ("source", "name", "says"),
    [
        (
            "def outer():\n    y = 1\n    def inner(): return y\n    return inner\nf = outer()",
            "f",
            "made inside another function",
        ),
        ("import json as j", "j", "--vars j: it is a module; add `import json as j` to the cell"),
        ("from os.path import join", "join", "it comes from the module posixpath; import it in the cell"),
        ("f = type('F', (), {'__module__': '__main__'})", "f", "no cell of this notebook holds its source"),
        ("import functools\nf = functools.partial(print)", "f", "a partial can't go along"),
    ],
)
def test_what_has_no_source_of_its_own_is_refused(notebook, source, name, says):
    notebook.run(source)
    assert says in refused(notebook, "1", variables=[name])


# --- modules ---


def write(folder, files):
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_modules_beside_the_notebook_go_along_with_those_they_import(notebook):
    write(notebook.folder, {"helper.py": "import pkg.part, json", "other.py": "1", "pkg/data": "x"})
    write(notebook.folder / "pkg", {"part.py": "from . import more\nimport numpy", "more.py": "", "__init__.py": ""})
    write(notebook.folder / "pkg", {".hidden.py": "", "__pycache__/part.py": ""})
    made = notebook("def f():\n    import helper")
    assert sorted(made.files) == [
        "cell.py",
        "modules/helper.py",
        "modules/pkg/__init__.py",
        "modules/pkg/more.py",
        "modules/pkg/part.py",
    ]
    assert made.notes == ("sent along as source: helper, pkg (4 files, 52 bytes)",)
    assert made.imports == ("numpy",)
    assert made.versions == {"numpy": importlib.metadata.version("numpy")}


def test_modules_off_the_installed_places_go_along(notebook, tmp_path, monkeypatch):
    write(tmp_path / "elsewhere", {"editable.py": "x = 1"})
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "elsewhere")])
    assert notebook("import editable").files["modules/editable.py"] == b"x = 1"


def test_installed_modules_and_the_standard_library_stay_where_they_are(notebook):
    made = notebook("from __future__ import annotations\nimport json, pandas, yaml_of_nowhere\nfrom . import x")
    assert list(made.files) == ["cell.py"]
    assert made.versions == {"pandas": importlib.metadata.version("pandas")}
    assert made.imports == ("pandas",)


def test_the_distribution_of_another_name_is_found():
    assert modules.versions(["dateutil"]) == {"python-dateutil": importlib.metadata.version("python-dateutil")}


def test_module_option_adds_files_folders_and_their_data(notebook):
    write(notebook.folder, {"pkg/part.py": "", "pkg/data": "x", "table": "1,2", "one.py": "1"})
    made = notebook("1", extra=["pkg", "one.py", str(notebook.folder / "table")])
    assert sorted(made.files) == [
        "cell.py",
        "modules/one.py",
        "modules/pkg/data",
        "modules/pkg/part.py",
        "modules/table",
    ]


def test_links_inside_a_package_are_not_followed_in_circles(notebook):
    write(notebook.folder, {"pkg/__init__.py": ""})
    (notebook.folder / "pkg/loop").symlink_to(notebook.folder / "pkg")
    assert sorted(notebook("import pkg").files) == ["cell.py", "modules/pkg/__init__.py"]


def test_a_compiled_module_is_named(notebook):
    write(notebook.folder / "fast", {"__init__.py": "", "_core.so": ""})
    assert "`fast` has compiled parts (fast/_core.so)" in refused(notebook, "import fast")


def test_too_much_source_is_named(notebook):
    (notebook.folder / "big.py").write_text("#" * modules.SOURCE_LIMIT + "\n")
    assert "big.py alone 10,000,001; at most 10,000,000" in refused(notebook, "import big")


def test_a_local_module_with_a_syntax_error_is_named(notebook):
    write(notebook.folder, {"broken.py": "def", "pkg/__init__.py": "", "pkg/template.py": "{{ x }} y"})
    assert "modules/pkg/template.py" in notebook("import pkg").files
    assert "broken.py, which the cell imports, is not valid Python" in refused(notebook, "import broken")


@pytest.mark.parametrize("wanted", ["nope", "./nope", "sys", "a b"])
def test_a_module_that_is_not_there_is_refused(notebook, wanted):
    assert f"--module {wanted}: neither a file or folder" in refused(notebook, "1", extra=[wanted])


def test_only_known_packages_are_preloaded():
    assert modules.preload(["pandas", "threading", "torch", "numpy"]) == ("numpy", "pandas")
