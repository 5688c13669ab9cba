import contextlib
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bacalhau_jupyter import options, words
from bacalhau_jupyter.option_table import GROUPS, OPTIONS
from bacalhau_node import literals
from bacalhau_node.errors import SpecError
from bacalhau_node.spec import Command, InputSource, JobSpec, Resources, Sharding

CID = "QmYwAPJzv5CZsnA625s3Xf2nemtYgPpHdWEz79ojWnPbdG"


@dataclass
class Finished:
    cid: str = CID

    def result(self):
        return self


NAMES = {"n": 7, "path": "data", "paths": ["data", "more"], "job": Finished(), "d": {"a b": "data"}, "frame": object()}
FILES = {"/here/data", "/here/more"}


def lookup(expression):
    return eval(expression, dict(NAMES))


NOTEBOOK = options.Notebook(
    lookup=lookup, place=literals.Place(exists=FILES.__contains__, cwd="/here", home="/home/ann", names=lambda _: ())
)
DATA = InputSource(source="/here/data")
MORE = InputSource(source="/here/more")


def parse(line):
    return options.parse(line, NOTEBOOK)


def refused(line):
    with pytest.raises(SpecError) as caught:
        parse(line)
    return str(caught.value)


# --- words ---


@pytest.mark.parametrize(
    ("line", "texts"),
    [
        ("", []),
        ("  a\tb\u00a0c ", ["a", "b", "c"]),
        ("'a b' \"c d\"", ["a b", "c d"]),
        ("a'b c'd", ["ab cd"]),
        (r"'it\'s' 'C:\data' '\\'", ["it's", r"C:\data", "\\"]),
        (r"C:\data", [r"C:\data"]),
        ("''", [""]),
        ("a # b", ["a"]),
        ("a#b '#c'", ["a#b", "#c"]),
        ("# all", []),
        ("{d['a b']}x", ["{d['a b']}x"]),
        ("*.{csv,tsv}", ["*.{csv,tsv}"]),
        ("{a b", ["{a", "b"]),
        ("$1 ~ *", ["$1", "~", "*"]),
    ],
)
def test_blanks_separate_and_quotes_group(line, texts):
    assert [word.text for word in words.split(line)] == texts


@pytest.mark.parametrize("line", ["'", 'a "b', "'a\\'", "a'b"])
def test_an_open_quote_is_refused(line):
    with pytest.raises(SpecError, match="a quote is never closed"):
        words.split(line)


def quoted(text):
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


@given(st.lists(st.text()))
def test_quoted_words_come_back_as_they_were(texts):
    assert [word.text for word in words.split(" ".join(map(quoted, texts)))] == texts


@pytest.mark.parametrize(
    "text", ["{a,b}", "*.{csv,tsv}", "{1..3}", "{}", "{{n}}", "{a b}", "{", "}{", "{'a': 1}", "x{"]
)
def test_braces_that_are_no_expression_stay(text):
    assert words.expand(text, lookup) == text


def test_expressions_are_replaced_and_a_lone_one_keeps_its_value():
    assert words.expand("{n}", lookup) == 7
    assert words.expand("a{n}{ path }-{a,b}", lookup) == "a7data-{a,b}"
    assert words.expand("{d['a b']}", lookup) == "data"
    assert words.expand("x{job}", lookup) == f"xipfs://{CID}"


# --- lines ---


def test_an_empty_line_is_one_shard_of_nothing():
    assert parse("") == options.CellRequest()
    assert options.to_spec(parse(""), Command()) == JobSpec(task=Command())


def test_gpu_takes_a_number_and_never_the_next_option():
    assert parse("--gpu --shards 10").resources == Resources(gpus=1)
    assert parse("--gpu --shards 10").sharding == Sharding(n=10)
    assert parse("--gpu 2").resources == Resources(gpus=2)
    assert parse("--gpu=2 --background").resources == Resources(gpus=2)
    assert parse("--shards 10 --gpu").resources == Resources(gpus=1)


def test_a_gpu_can_be_shared_by_so_many_shards_where_one_is_asked_for():
    assert parse("--gpu --gpu-share 3").resources == Resources(gpus=1, gpu_share=3)
    with pytest.raises(SpecError, match="add --gpu"):
        parse("--gpu-share 3")


@pytest.mark.parametrize(
    ("line", "field", "value"),
    [
        ("-i data --input=more", "inputs", (DATA, MORE)),
        ("-i {paths}", "inputs", (DATA, MORE)),
        ("-i {path}:/m", "inputs", (InputSource(source="/here/data", mount="/m"),)),
        ("-i {job}", "inputs", (InputSource(source=f"ipfs://{CID}"),)),
        ("-i {job}:/m", "inputs", (InputSource(source=f"ipfs://{CID}", mount="/m"),)),
        ("--with data", "shared", (DATA,)),
        ("-i data --glob '*.{csv,tsv}' --glob b", "globs", ("*.{csv,tsv}", "b")),
        ("--shards auto", "sharding", Sharding(by="auto")),
        ("--shards {n}", "sharding", Sharding(n=7)),
        ("-i data --batch-size 3", "sharding", Sharding(by="batch", n=3)),
        ("-i data --shard-size 64MB", "sharding", Sharding(by="size", n=64_000_000)),
        ("--vars a,b --vars b,c", "vars", ("a", "b", "c")),
        ("--vars 'a, b'", "vars", ("a", "b")),
        ("--df t --reduce \"df.agg({'a': 'sum'})\"", "reduce", "df.agg({'a': 'sum'})"),
        ('--df t --reduce "-df"', "reduce", "-df"),
        ("--cpu 0.5 --memory 10TB --disk 1GiB", "resources", Resources(cpu=0.5, memory=10**13, disk=2**30)),
        ("--timeout 1h30m", "timeout", 5400.0),
        ("--retries 0", "retries", 0),
        ("-e A=b=c -e X=", "env", {"A": "b=c", "X": ""}),
        ("--secret A --secret B --secret A", "secrets", ("A", "B")),
        ("-l team=ml", "labels", {"team": "ml"}),
        ("--image python:3.11 # comment", "image", "python:3.11"),
        ("--raw", "raw", True),
        ("--no-check", "no_check", True),
        ("-h --input nope", "help", True),
        ("--on-interrupt detach", "on_interrupt", "detach"),
        ("--require b>=2,<3,a --require A[x]", "requires", ("b<3,>=2", "a", "a[x]")),
    ],
)
def test_an_option_sets_its_field(line, field, value):
    assert getattr(parse(line), field) == value


def test_what_a_request_says_is_in_its_spec():
    line = "-i data --with more --glob a --shards 3 --timeout 9 --parallel 2 --retries 1 --image i -e A=b --pin"
    assert options.to_spec(parse(line), Command(shell="ls")) == JobSpec(
        task=Command(shell="ls"),
        inputs=(DATA,),
        shared=(MORE,),
        globs=("a",),
        sharding=Sharding(n=3),
        timeout=9.0,
        parallel=2,
        retries=1,
        image="i",
        env={"A": "b"},
        pin=True,
    )


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("--shard 3", "unknown option --shard; did you mean --shards?"),
        ("--shard=3", "unknown option --shard; did you mean --shards?"),
        ("--inp x", "unknown option --inp; did you mean --input?"),
        ("-input x", "unknown option -input; did you mean --input?"),
        ("-gpu", "unknown option -gpu; did you mean --gpu?"),
        ("\u2014shards 3", "did you mean --shards?"),
        ("--qqq", "unknown option --qqq; %bacalhau --help lists them"),
        ("--in a", "unknown option --in; it is called --vars here"),
        ("--concurrency 3", "it is called --replicas here"),
        ("--confidence 3", "it is called --agree here"),
        ("--par 3", "unknown option --par; did you mean --partial or --parallel?"),
        ("--sharding-glob-pattern *.csv", "it is called --glob here"),
        ("--input", "--input needs a value: --input SRC"),
        ("--input --shards 3", "--input needs a value"),
        ("--raw=yes", "--raw=yes: it takes no value"),
        ("--shards 1 --shards 2", "--shards 2: given twice, first as 1"),
        ("--gpu --gpu", "--gpu 1: given twice"),
        ("data", "unexpected word 'data'"),
        ("'--gpu'", "unexpected word '--gpu'"),
        ("--vars a b", "unexpected word 'b': no option takes it; quote"),
        ("--input nope", "--input nope: no such file or folder: /here/nope"),
        ("--input {nope}", "--input {nope}: there is no variable `nope` in the notebook"),
        ("--input {paths[9]}", "--input {paths[9]}: IndexError"),
        ("--input {(yield)}", "--input {(yield)}: SyntaxError"),
        ("--input {frame}", "--input `frame` is an object; text, a number, a path or a job is needed"),
        ("--shards 0", "--shards 0: at least 1 is needed; write a number of shards or auto"),
        ("--shards many", "--shards many: not a whole number; write a number of shards or auto"),
        ("--shards 100001", "--shards 100001: at most 100000 is possible"),
        ("-i data --shards 2 --batch-size 2", "--shards and --batch-size: only one of"),
        ("--shard-size 64MB", "add --input SRC"),
        ("--glob a", "add --input SRC"),
        ("--gpu x", "--gpu x: not a whole number"),
        ("--memory 512m", "--memory 512m: not a size; write 500MB"),
        ("--timeout soon", "--timeout soon: not a time"),
        ("--isolation sandbx", "one of container, sandbox, none is needed; did you mean sandbox?"),
        ("--vars inputs", "`inputs` is what the job gives the cell"),
        ("--vars a.b", "--vars a.b: not a Python name"),
        ("--df class", "--df class: not a Python name"),
        ("--df a --reduce 'df +'", "--reduce df +: not a Python expression: invalid syntax"),
        ("--reduce df", "add --df NAME"),
        ("--df a --out a", "two different names"),
        ("--raw --require a", "--raw makes the cell a shell script; --require is for Python cells"),
        ("--require 'a b'", "--require a b: 'a b' is not a package with versions"),
        ("--require a@file:///x", "names an address"),
        ("--raw --vars a", "--raw makes the cell a shell script"),
        ("-e A=1 -e A=2", "--env: a key is given twice"),
        ("-e A", "--env A: write"),
        ("--image 'a b'", "not the name of an image"),
        ("--secret A=1", "--secret A=1: the name of an environment variable is needed, never its value"),
        ("--secret a --vars b,a", "--secret a is in --vars too, which are stored"),
        ("--replicas 33", "--replicas 33: at most 32 is possible"),
        ("--publish nowhere", "--publish nowhere: results don't go there; what there is: store, ipfs"),
        ("--input ftp://b/c", "--input ftp://b/c: ftp:// is no place for inputs"),
    ],
)
def test_a_refusal_names_the_option_its_value_and_what_is_allowed(line, says):
    assert says in refused(line)


@given(
    st.lists(
        st.sampled_from([*OPTIONS, "-i", "data", "{n}", "{nope}", "{", "=", "'", "a,b", "3", "64MB", "-", "#"])
        | st.text()
    )
)
def test_no_line_does_anything_but_parse_or_be_refused(pieces):
    with contextlib.suppress(SpecError):
        parse(" ".join(pieces))


# --- Python ---


def test_python_words_mean_the_same_as_the_line():
    spoken = options.from_words(
        {"input": ["data", "more"], "glob": "*.csv", "shards": 10, "gpu": True, "env": {"A": 1}}, NOTEBOOK
    )
    assert spoken == parse("-i data -i more --glob *.csv --shards 10 --gpu -e A=1")
    assert options.from_words({"with_": "data", "pin": True, "raw": False, "df": None}, NOTEBOOK) == parse(
        "--with data --pin"
    )
    assert options.from_words({"batch_size": 2, "input": Finished()}, NOTEBOOK) == parse(f"-i {CID} --batch-size 2")


@pytest.mark.parametrize(
    ("given_words", "says"),
    [({"shard": 3}, "did you mean --shards?"), ({"raw": "no"}, "raw='no': True or False"), ({"shards": []}, "shards")],
)
def test_python_words_are_refused_like_the_line(given_words, says):
    with pytest.raises(SpecError, match=re.escape(says)):
        options.from_words(given_words, NOTEBOOK)


# --- where results go ---


def test_a_local_folder_for_results_is_nothing_that_the_node_hears_of():
    request = parse("--publish local:out --constraint 'region=eu' --reuse")
    assert request.local == Path("/here/out")
    spec = options.to_spec(request, Command(shell="true"))
    assert (spec.publish, spec.constraint, spec.reuse) == ("store", "region=eu", True)
    spec = options.to_spec(parse("--publish s3://b/p"), Command(shell="true"))
    assert (spec.publish, spec.reuse) == ("s3://b/p", False)


# --- help and completion ---


def test_usage_has_one_line_for_every_option():
    lines = options.usage().splitlines()
    for option in (option for group in GROUPS.values() for option in group):
        assert sum(bool(re.search(rf"{option.flag}(?![\w-])", line)) for line in lines if "%%" not in line) == 1
    assert max(map(len, lines)) <= 110


@pytest.mark.parametrize(
    ("text", "offers"),
    [
        ("--sh", ["--shards", "--shard-size"]),
        ("--gpu --sh", ["--shards", "--shard-size"]),
        ("--shards 3 --sh", ["--shard-size"]),
        ("--isolation ", ["container", "sandbox", "none"]),
        ("--isolation s", ["sandbox"]),
        ("--isolation=s", ["--isolation=sandbox"]),
        ("--shards a", ["auto"]),
        ("--input ", []),
        ("--sec", ["--secret"]),
        ("--reu", ["--reuse"]),
        ("--publish loc", ["local:"]),
        ("--nothing", []),
        ("--df 'a", []),
    ],
)
def test_completion_offers_options_and_choices(text, offers):
    assert options.line_completions(text) == offers


def test_completion_offers_everything_on_an_empty_word():
    assert "--input" in options.line_completions("")
    assert "--input" in options.line_completions("--input data ")
    assert "--raw" not in options.line_completions("--raw ")
