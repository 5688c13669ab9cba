"""The owner's rules: what `policy.toml` may say, and what a refused job is told."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from bacalhau_node.api.auth import Caller
from bacalhau_node.api.policy import admitted, check_selected
from bacalhau_node.content.blocks import BlockStore
from bacalhau_node.errors import NoCapacity, SpecError
from bacalhau_node.selection import NO_RULES, Selection, read_selection
from bacalhau_node.spec import Command, InputSource, JobSpec, Resources

ANN = Caller("ann", "submit")
ROOT = Caller("root", "admin")
NOWHERE = "bafkreigh2akiscaildcqabsyg3dfr6chu3fgpregiymsck7e7aqa4s52zy"
GIB = 2**30


def a_job(**fields: object) -> JobSpec:
    return JobSpec(task=Command(argv=("true",)), **fields)  # type: ignore[arg-type]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[BlockStore]:
    store = BlockStore(tmp_path / "store")
    yield store
    store.close()


def _rules(folder: Path, text: str) -> Selection:
    (folder / "policy.toml").write_text(text, encoding="utf-8")
    return read_selection(folder)


def test_without_a_file_there_are_no_rules(tmp_path):
    assert read_selection(tmp_path) == NO_RULES


def test_sizes_and_times_are_written_as_in_options(tmp_path):
    rules = _rules(tmp_path, 'memory = "1.5GiB"\ntimeout = "90m"\ncpu = 2\n')
    assert (rules.memory, rules.timeout, rules.cpu) == (1.5 * GIB, 5400.0, 2.0)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("cpu =", "Invalid value"),
        ("cpus = 2", "cpus"),
        ("cpu = 0", "> 0"),
        ("timeout = inf", "<= 31622400"),
        ('memory = "lots"', "not a size"),
        ('requesters = "ann"', "array"),
        ('isolation = "jail"', "jail"),
    ],
)
def test_a_rule_that_is_none_is_told_with_its_file(tmp_path, text, says):
    with pytest.raises(SpecError) as error:
        _rules(tmp_path, text)
    assert str(error.value).startswith(f"{tmp_path}/policy.toml: ")
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("rules", "job", "says"),
    [
        ({"requesters": ("ben", "lab-*")}, {}, "this node takes no jobs of ann"),
        ({"requesters": ("a*",)}, {}, None),
        ({"requesters": ()}, {}, "this node takes no jobs of ann"),
        ({"images": ("python:3.*",)}, {"image": "python:3.12"}, None),
        ({"images": ("python:3.*",)}, {"image": "miner"}, "this node runs no image miner; it runs python:3.*"),
        ({"images": ()}, {"image": "miner"}, "this node runs no image miner; it runs none"),
        ({"images": ()}, {}, None),
        ({"cpu": 2.0}, {"resources": Resources(cpu=2.5)}, "at most 2 cores, and --cpu asks for 2.5"),
        ({"cpu": 2.0}, {"resources": Resources(cpu=2)}, None),
        (
            {"memory": 10**9},
            {"resources": Resources(memory=2 * 10**9)},
            "at most 1 GB of memory, and --memory asks for 2",
        ),
        ({"gpus": 0}, {"resources": Resources(gpus=1)}, "at most 0 GPUs, and --gpu asks for 1"),
        ({"stateless": False}, {}, "this node takes no jobs without inputs"),
        ({"stateless": False}, {"shared": (InputSource(source=f"ipfs://{NOWHERE}"),)}, None),
        ({"local_inputs": True}, {"inputs": (InputSource(source=f"ipfs://{NOWHERE}/a"),)}, f"{NOWHERE}/a is not here"),
        ({"local_inputs": True}, {}, None),
    ],
)
def test_each_rule_refuses_in_a_sentence_and_lets_the_rest_through(store, rules, job, says):
    if says is None:
        check_selected(a_job(**job), ANN, Selection(**rules), store)
        return
    with pytest.raises(NoCapacity) as error:
        check_selected(a_job(**job), ANN, Selection(**rules), store)
    assert says in str(error.value)


def test_an_input_that_is_here_is_local(store):
    cid = store.add_bytes(b"data")
    spec = a_job(inputs=(InputSource(source=f"ipfs://{cid}"),))
    check_selected(spec, ANN, Selection(local_inputs=True), store)


def test_the_owners_jobs_are_not_selected(store):
    check_selected(a_job(), ROOT, Selection(requesters=(), stateless=False), store)


def test_limits_are_set_where_a_job_does_not_say_or_asks_for_less(store):
    rules = Selection(isolation="container", timeout=60.0, memory=GIB)
    spec = admitted(a_job(isolation="sandbox", timeout=90.0), ANN, rules, usual_memory=4 * GIB)
    assert (spec.isolation, spec.timeout, spec.resources.memory) == ("container", 60.0, GIB)
    spec = admitted(a_job(timeout=30.0), ANN, rules, usual_memory=GIB // 2)
    assert (spec.timeout, spec.resources.memory) == (30.0, None)


def test_others_get_a_sandbox_and_an_hour_without_any_rule():
    spec = admitted(a_job(isolation="none"), ANN, NO_RULES, usual_memory=GIB)
    assert (spec.isolation, spec.timeout, spec.labels) == ("sandbox", 3600.0, {"bacalhau.owner": "ann"})
