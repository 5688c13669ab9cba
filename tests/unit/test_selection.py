"""The owner's rules: what `policy.toml` may say, and what a refused job is told."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from bacalhau_node.api.auth import Caller
from bacalhau_node.api.policy import admitted, check_selected
from bacalhau_node.content.blocks import BlockStore
from bacalhau_node.errors import NoCapacity, SpecError
from bacalhau_node.protocol.fitness import requirements_only
from bacalhau_node.selection import NO_RULES, Guests, Probe, Selection, read_selection
from bacalhau_node.spec import Command, InputSource, JobSpec, PythonCell, Resources

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
        ({}, {"resources": Resources(disk=10**18)}, "at most 100 GB of disk, and --disk asks for 1 EB"),
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


# --- a probe that is asked over HTTP, and jobs of other nodes ---


async def _asked(status: int, body: bytes, *, seconds: float = 5.0, hangs: bool = False) -> tuple[str, bytes]:
    """(why a job is not taken, what was posted) by a probe that answers like this."""
    posted, over = b"", asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal posted
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(line.split(b":")[1] for line in head.split(b"\r\n") if line.lower().startswith(b"content-length"))
        posted = await reader.readexactly(int(length))
        if hangs:
            await reader.read()
        writer.write(b"HTTP/1.1 %d X\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s" % (status, len(body), body))
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
        over.set()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/take"
        try:
            await Probe(Selection(probe=url, probe_seconds=seconds)).ask("j-1", a_job(), "12D3KooWAnn")
        except NoCapacity as error:
            return str(error), posted
        finally:
            async with asyncio.timeout(10):
                await over.wait()  # or its connection is left to whatever test comes next
        return "", posted


async def test_a_probe_over_http_takes_a_job_by_200_and_refuses_it_by_anything_else_with_its_first_line() -> None:
    why, posted = await _asked(200, b"welcome")
    assert why == ""
    question = json.loads(posted)
    assert (question["job"], question["requester"], set(question)) == (
        "j-1",
        "12D3KooWAnn",
        {"job", "requester", "spec"},
    )
    why, _ = await _asked(403, b"not on a Thursday\nmore")
    assert why == "this node does not take the job: not on a Thursday"
    why, _ = await _asked(200, b"", seconds=0.2, hangs=True)
    assert "does not answer" in why


@pytest.mark.parametrize(
    ("job", "says"),
    [
        ({"inputs": (InputSource(source="/etc"),)}, "names a place of another machine"),
        ({"inputs": (InputSource(source="s3://theirs/data"),)}, "names a place of another machine"),
        ({"env": {"a b": "c"}}, "names are of letters"),
        ({"retries": 10**6}, "from 0 to 100"),
        ({"network": "full"}, "gives jobs of others no network"),
        ({"publish": "local:/etc"}, "publishes no results of others"),
    ],
)
def test_what_another_node_may_not_ask_for_is_refused_in_a_sentence(
    store: BlockStore, job: dict[str, object], says: str
) -> None:
    guests = Guests(NO_RULES, store, refuse=lambda _: None, usual_memory=lambda: GIB)
    assert says in (guests.refuse("12D3KooWAnn", a_job(**job)) or "")
    assert guests.refuse("12D3KooWAnn", a_job()) is None


@pytest.mark.parametrize("rules", [{"stateless": False}, {"local_inputs": True}])
def test_a_node_hears_of_an_announced_job_only_that_it_has_inputs(store: BlockStore, rules: dict[str, object]) -> None:
    guests = Guests(Selection(**rules), store, refuse=lambda _: None, usual_memory=lambda: GIB)
    job = a_job(shared=(InputSource(source=f"ipfs://{NOWHERE}"),))
    assert guests.refuse("12D3KooWAnn", requirements_only(job)) is None


def test_a_job_of_the_same_owners_node_needs_no_isolation(store: BlockStore) -> None:
    guests = Guests(NO_RULES, store, refuse=lambda _: None, usual_memory=lambda: GIB, family={"n-mine"})
    assert guests.admit("n-mine", a_job()).isolation == "none"
    assert guests.admit("n-other", a_job()).isolation == "sandbox"


@pytest.mark.parametrize(
    "package",
    [
        "evil @ https://example.org/evil.whl",
        "evil @ file:///root/evil.whl",
        "-r /etc/passwd",
        "--index-url https://example.org",
        "x; python_version > '3\n--index-url https://example.org\n'",
        "x" * 2_000,
    ],
)
def test_what_a_stranger_has_installed_is_a_package_by_name(package):
    """Whoever sends a spec need not have used our options."""
    cell = PythonCell(bundle=NOWHERE, requires=(package,))
    with pytest.raises(SpecError):
        admitted(JobSpec(task=cell), ANN, NO_RULES, usual_memory=GIB)
    fine = PythonCell(bundle=NOWHERE, requires=("rich[jupyter]>=13; python_version >= '3.8'",))
    admitted(JobSpec(task=fine), ANN, NO_RULES, usual_memory=GIB)
