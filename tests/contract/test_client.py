"""What every client promises, the same tests over a node in this process and over HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from msgspec import structs

from bacalhau_node.api.auth import own_key
from bacalhau_node.api.server import ApiServer, bind
from bacalhau_node.cid import Cid
from bacalhau_node.client import Client, JobView, LocalClient, ShardText, Stored, Update
from bacalhau_node.content.blocks import BlockStore
from bacalhau_node.content.unixfs import PROFILES, import_folder
from bacalhau_node.errors import BacalhauError, ContentError, SpecError
from bacalhau_node.executors.process import ProcessExecutor
from bacalhau_node.http_client import HttpClient
from bacalhau_node.node import PROFILE, open_node
from bacalhau_node.protocol.events import JobChanged, ShardChanged
from bacalhau_node.spec import Command, InputSource, JobSpec, PythonCell, Resources, Sharding
from tests import rpc_daemon
from tests.rpc_daemon import Simulated

SUM = "sum(int(line) for path in inputs for line in path.read_text().split())"
UNKNOWN = "j-00000000-0000-0000-0000-000000000000"
NOWHERE = "bafkreigh2akiscaildcqabsyg3dfr6chu3fgpregiymsck7e7aqa4s52zy"


@dataclass
class Side:
    """A client, and one of the node itself to look behind it."""

    client: Client
    node: LocalClient


@pytest.fixture(params=["local", "http"])
async def side(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Side]:
    root = tmp_path / "node"
    local = LocalClient(await open_node(root, executors=[ProcessExecutor(root / "process", slots=2)]))
    if request.param == "local":
        yield Side(local, local)
        await local.close()
        return
    server = ApiServer(local, [own_key("secret")])
    await server.start(bind("127.0.0.1", 0))
    client = HttpClient(server.url, token="secret", folder=tmp_path / "client", patience=10)
    yield Side(client, local)
    await client.close()
    await local.close()
    await server.close()


@pytest.fixture
def client(side: Side) -> Client:
    return side.client


async def _spec(client: Client, source: str, *inputs: Path, **fields: object) -> JobSpec:
    bundle = await client.put_bundle({"cell.py": source.encode()})
    sources = tuple(InputSource(source=str(path)) for path in inputs)
    return JobSpec(task=PythonCell(bundle=bundle), inputs=sources, **fields)


async def _updates(client: Client, job: str) -> list[Update]:
    async with asyncio.timeout(60):
        return [update async for update in client.updates(job)]


async def _done(client: Client, spec: JobSpec) -> JobView:
    submission = await client.submit(spec)
    await _updates(client, submission.job)
    return await client.job(submission.job)


def _values(view: JobView) -> list[bytes | None]:
    return [shard.outcome.value.blob.inline for shard in view.shards if shard.outcome]


def _numbers(folder: Path, count: int = 6) -> Path:
    folder.mkdir()
    for number in range(count):
        (folder / f"{number}.txt").write_text(f"{number}\n{number * 10}\n")
    return folder


# --- a job ---


async def test_values_text_and_states_of_every_shard_come_back(client: Client, tmp_path: Path) -> None:
    folder = _numbers(tmp_path / "in")
    submission = await client.submit(
        await _spec(client, f"print('here', shard.index)\n{SUM}", folder, sharding=Sharding(n=3))
    )
    assert submission.count == 3
    assert submission.executor == "process"
    updates = await _updates(client, submission.job)
    view = await client.job(submission.job)
    assert view.state == "Completed"
    assert _values(view) == [b"11", b"55", b"99"]
    assert [shard.inputs for shard in view.shards] == [("0.txt", "1.txt"), ("2.txt", "3.txt"), ("4.txt", "5.txt")]
    texts = sorted(update.text for update in updates if isinstance(update, ShardText))
    assert texts == [f"here {n}\n" for n in range(3)]
    last = updates[-1]
    assert isinstance(last, JobChanged)
    assert (last.state, last.cid) == ("Completed", view.cid)
    kept = {update.shard for update in updates if isinstance(update, ShardChanged) and update.state == "kept"}
    assert kept == {0, 1, 2}


async def test_a_late_watcher_gets_the_present_state_and_the_text_so_far(client: Client) -> None:
    submission = await client.submit(await _spec(client, "print('one')\nprint('two')\n3"))
    first = await _updates(client, submission.job)
    late = await _updates(client, submission.job)
    text = [update.text for update in first if isinstance(update, ShardText)]
    assert "".join(text) == "one\ntwo\n"
    assert [update.text for update in late if isinstance(update, ShardText)] == text
    assert [update.state for update in late if isinstance(update, ShardChanged)] == ["kept"]
    assert late[-1] == first[-1]


async def test_a_watcher_in_the_middle_misses_nothing_that_comes(client: Client, tmp_path: Path) -> None:
    source = f"print('first', flush=True)\nimport pathlib\ngo = pathlib.Path({str(tmp_path / 'go')!r})\n"
    source += "while not go.exists(): pass\nprint('second')"
    submission = await client.submit(await _spec(client, source))
    async with asyncio.timeout(60):
        async for update in client.updates(submission.job):
            if isinstance(update, ShardText):
                (tmp_path / "go").touch()
                break
    updates = await _updates(client, submission.job)
    assert "".join(update.text for update in updates if isinstance(update, ShardText)) == "first\nsecond\n"


async def test_a_failing_shard_keeps_its_error_and_leaves_the_others(client: Client) -> None:
    view = await _done(client, await _spec(client, "assert shard.index, 'nö'\nshard.index", sharding=Sharding(n=3)))
    assert view.state == "Failed"
    assert [shard.state for shard in view.shards] == ["failed", "kept", "kept"]
    outcome = view.shards[0].outcome
    assert outcome is not None
    assert outcome.error is not None
    assert (outcome.error.kind, outcome.error.name, outcome.error.message) == ("exception", "AssertionError", "nö")


async def test_a_command_runs_and_its_exit_code_counts(client: Client) -> None:
    view = await _done(client, JobSpec(task=Command(shell="echo $WHO; exit 3"), env={"WHO": "mé"}))
    assert view.state == "Failed"
    outcome = view.shards[0].outcome
    assert outcome is not None
    assert (outcome.exit_code, outcome.stdout.inline) == (3, "mé\n".encode())


async def test_two_clients_may_cancel_one_job(client: Client) -> None:
    source = "import time\nif shard.index: time.sleep(600)\n'done'"
    submission = await client.submit(await _spec(client, source, sharding=Sharding(n=4)))
    async with asyncio.timeout(60):
        async for update in client.updates(submission.job):
            if isinstance(update, ShardChanged) and update.state == "kept":
                await asyncio.gather(client.cancel(submission.job), client.cancel(submission.job))
    await client.cancel(submission.job)
    view = await client.job(submission.job)
    assert view.state == "Stopped"
    assert [shard.state for shard in view.shards] == ["kept", "stopped", "stopped", "stopped"]


async def test_jobs_are_listed_newest_first_and_found_by_the_start_of_their_id(client: Client) -> None:
    assert list(await client.jobs()) == []
    ids = [(await _done(client, await _spec(client, str(number)))).job for number in range(2)]
    lines = await client.jobs()
    assert [line.job for line in lines] == ids[::-1]
    assert {(line.state, line.count) for line in lines} == {("Completed", 1)}
    assert await client.find(ids[0][:12]) == ids[0]
    assert await client.find(ids[1].removeprefix("j-")) == ids[1]


async def test_many_shards_are_all_in_the_view(client: Client) -> None:
    view = await _done(client, await _spec(client, "shard.index", sharding=Sharding(n=60)))
    assert _values(view) == [str(index).encode() for index in range(60)]


async def test_the_spec_comes_back_as_it_was_sent(client: Client) -> None:
    spec = await _spec(
        client,
        "1",
        labels={"word": "ü€😀"},
        env={"A": "line\nline"},
        retries=2,
        timeout=30.5,
        resources=Resources(cpu=0.5),
    )
    assert (await _done(client, spec)).spec == spec


async def test_nodes_begin_with_the_one_that_was_asked(client: Client) -> None:
    node = (await client.nodes())[0]
    assert node.node == (await client.submit(await _spec(client, "1"))).node
    assert node.executor is not None
    assert (node.executor.executor, node.executor.slots, node.room) == ("process", 2, 2)


# --- inputs ---


async def test_a_plan_shows_what_a_job_would_do(client: Client, tmp_path: Path) -> None:
    folder = _numbers(tmp_path / "in")
    spec = await _spec(client, SUM, folder, globs=("[0-3].txt",), sharding=Sharding(n=2))
    plan = await client.plan(spec)
    assert [[entry.path for entry in shard.entries] for shard in plan.shards] == [
        ["0.txt", "1.txt"],
        ["2.txt", "3.txt"],
    ]
    assert list(await client.jobs()) == []


async def test_names_values_and_text_may_hold_anything(client: Client, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    (folder / "ünter ordner").mkdir(parents=True)
    (folder / "ünter ordner" / "a b?%2F#\n€.txt").write_text("5")
    spec = await _spec(client, f"print('zeile\\n\\ndata: ü\\r\\n€')\n{SUM}", folder, globs=("**/*.txt",))
    submission = await client.submit(spec)
    updates = await _updates(client, submission.job)
    view = await client.job(submission.job)
    assert _values(view) == [b"5"]
    assert view.shards[0].inputs == ("ünter ordner/a b?%2F#\n€.txt",)
    text = "".join(update.text for update in updates if isinstance(update, ShardText))
    assert text == "zeile\n\ndata: ü\r\n€\n"


async def test_a_name_that_is_not_utf_8_travels(client: Client, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    name = b"b\xff.txt"
    (Path(str(folder).encode().decode()) / name.decode("utf-8", "surrogateescape")).write_text("7")
    view = await _done(client, await _spec(client, SUM, folder))
    assert _values(view) == [b"7"]
    assert view.shards[0].inputs == ("b\udcff.txt",)


async def test_a_single_file_and_shared_data_keep_their_names(client: Client, tmp_path: Path) -> None:
    (tmp_path / "one.csv").write_text("1")
    (tmp_path / "table.csv").write_text("2")
    source = "(inputs[0].name, inputs[0].read_text(), shard.shared[0].name, shard.shared[0].read_text())"
    spec = await _spec(client, source, tmp_path / "one.csv")
    shared = (InputSource(source=str(tmp_path / "table.csv")),)
    assert _values(await _done(client, structs.replace(spec, shared=shared))) == [b'["one.csv", "1", "table.csv", "2"]']


async def test_links_count_as_what_they_lead_to(client: Client, tmp_path: Path) -> None:
    folder = _numbers(tmp_path / "in", 2)
    (folder / "again.txt").symlink_to("1.txt")
    view = await _done(client, await _spec(client, SUM, folder))
    assert _values(view) == [b"22"]
    assert view.shards[0].inputs == ("0.txt", "1.txt", "again.txt")


async def test_an_input_that_is_wrong_never_becomes_a_job(client: Client, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path, kind, text in (("empty", SpecError, "no files"), ("nowhere", ContentError, "nowhere")):
        with pytest.raises(kind, match=text):
            await client.submit(await _spec(client, SUM, tmp_path / path))
    with pytest.raises(SpecError, match="matches none"):
        await client.plan(await _spec(client, SUM, _numbers(tmp_path / "in"), globs=("*.csv",)))
    with pytest.raises(ContentError, match="is not"):
        await client.submit(
            structs.replace(await _spec(client, SUM), inputs=(InputSource(source=f"ipfs://{NOWHERE}"),))
        )
    assert list(await client.jobs()) == []


async def test_a_results_files_are_the_input_of_the_next_job(client: Client, tmp_path: Path) -> None:
    first = await _done(client, await _spec(client, "(outputs / 'n.txt').write_text('41')\n1"))
    outcome = first.shards[0].outcome
    assert outcome is not None
    spec = await _spec(client, SUM)
    inputs = (InputSource(source=f"ipfs://{outcome.outputs}"),)
    assert _values(await _done(client, structs.replace(spec, inputs=inputs))) == [b"41"]


# --- content ---


async def test_a_big_value_is_read_mapped_and_downloaded_the_same(client: Client, tmp_path: Path) -> None:
    view = await _done(client, await _spec(client, "import random\nrandom.Random(1).randbytes(3_000_000)"))
    outcome = view.shards[0].outcome
    assert outcome is not None
    cid = outcome.value.blob.cid
    assert cid is not None
    data = await client.read(cid)
    assert len(data) == outcome.value.blob.size == 3_000_000
    await client.download(cid, tmp_path / "value")
    assert (tmp_path / "value").read_bytes() == data
    path = await client.file(cid)
    assert path is not None
    assert path.read_bytes() == data


async def test_folders_are_downloaded_whole_and_never_over_something(client: Client, tmp_path: Path) -> None:
    source = "(outputs / 'below').mkdir()\n"
    source += "(outputs / 'below' / 'ü.bin').write_bytes(b'x' * 700_000)\n(outputs / 'a').touch()"
    outcome = (await _done(client, await _spec(client, source))).shards[0].outcome
    assert outcome is not None
    assert outcome.outputs is not None
    await client.download(outcome.outputs, tmp_path / "out")
    assert (tmp_path / "out" / "below" / "ü.bin").stat().st_size == 700_000
    assert (tmp_path / "out" / "a").read_bytes() == b""
    with pytest.raises(ContentError, match="exists already"):
        await client.download(outcome.outputs, tmp_path / "out")
    with pytest.raises(ContentError):
        await client.download(outcome.outputs, tmp_path / "no" / "such" / "folder")


def _tree(folder: Path) -> Path:
    (folder / "d").mkdir(parents=True)
    (folder / "a.txt").write_text("a")
    (folder / "d" / "big").write_bytes(bytes(range(256)) * 4000)
    (folder / ".hidden").write_text("h")
    (folder / "link").symlink_to("a.txt")
    return folder


@pytest.mark.parametrize("profile", ["unixfs-v0-2015", "unixfs-v1-2025"])
async def test_what_is_put_is_kept_under_the_cid_that_the_profile_gives_it(
    side: Side, tmp_path: Path, profile: str
) -> None:
    folder = _tree(tmp_path / "tree")
    stored = await side.client.put(folder, profile=profile)
    other = BlockStore(tmp_path / "other", profile=profile)
    assert stored == Stored(other.add_path(folder), 256 * 4000 + 2, 3, profile)
    assert side.node.node.content.pins(stored.cid) == 1
    file = await side.client.put(folder / "a.txt", profile=profile)
    assert (file.cid, file.files) == (other.add_path(folder / "a.txt"), 1)


async def test_files_are_read_by_their_path_below_what_was_put(client: Client, tmp_path: Path) -> None:
    stored = await client.put(_tree(tmp_path / "tree"))

    async def cat(cid: str, path: str = "") -> bytes:
        return b"".join([part async for part in client.cat(cid, path)])

    assert await cat(stored.cid, "a.txt") == b"a"
    assert await cat(stored.cid, "d/big") == bytes(range(256)) * 4000
    empty = tmp_path / "empty"
    empty.touch()
    assert await cat((await client.put(empty)).cid) == b""
    for path, says in (("", "folder"), ("d", "folder"), ("nothing", "nothing")):
        with pytest.raises(ContentError, match=says):
            await cat(stored.cid, path)


@pytest.fixture
def daemon(monkeypatch: pytest.MonkeyPatch) -> Iterator[Simulated]:
    """An IPFS daemon that the environment names."""
    with rpc_daemon.simulated() as one:
        monkeypatch.setenv("BACALHAU_IPFS_CONNECT", one.address)
        yield one


def _only_there(daemon: Simulated, folder: Path) -> str:
    root = import_folder(
        _tree(folder),
        lambda cid, block: daemon.blocks.update({cid[-32:]: block}),
        profile=PROFILES[PROFILE],
        hidden=True,
    )
    return str(Cid(root.cid))


async def test_content_that_the_node_lacks_comes_from_the_daemon_that_the_environment_names(
    client: Client, daemon: Simulated, tmp_path: Path
) -> None:
    cid = _only_there(daemon, tmp_path / "tree")
    assert b"".join([part async for part in client.cat(cid, "a.txt")]) == b"a"
    assert len([call for call in daemon.calls if call.startswith("block/get")]) == 2  # the folder and the file
    await client.download(cid, tmp_path / "got")
    assert (tmp_path / "got/d/big").read_bytes() == bytes(range(256)) * 4000


async def test_content_that_nobody_has_is_an_error_that_says_who_was_asked_and_how_long(
    client: Client, daemon: Simulated, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    who = rf"{NOWHERE} could not be fetched.*Asked: kubo at {daemon.address} \(\d+\.\d s\): .*could not find"
    with pytest.raises(ContentError, match=who):
        await client.download(NOWHERE, tmp_path / "got")
    with pytest.raises(ContentError, match=who):
        [part async for part in client.cat(NOWHERE)]
    assert not (tmp_path / "got").exists()
    monkeypatch.delenv("BACALHAU_IPFS_CONNECT")
    with pytest.raises(ContentError, match=r"nobody is known who has it: name an|Asked: the node at http"):
        await client.download(NOWHERE, tmp_path / "got")


async def test_an_unknown_profile_is_told_with_those_that_there_are(client: Client, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="there are unixfs-v0-2015"):
        await client.put(_tree(tmp_path / "tree"), profile="v9")


async def test_a_result_is_a_folder_to_read_from_and_the_input_of_the_next_job(client: Client) -> None:
    source = "(outputs / 'r.txt').write_text(str(shard.index))\nshard.index"
    view = await _done(client, await _spec(client, source, sharding=Sharding(n=2)))
    assert (await client.jobs())[0].cid == view.cid

    async def cat(path: str) -> bytes:
        return b"".join([part async for part in client.cat(view.cid, path)])

    assert [await cat(path) for path in ("r.txt", "outputs/r.shard-1.txt", "values/1.json")] == [b"0", b"1", b"1"]
    with pytest.raises(ContentError, match="is a folder of 2 files"):
        await cat("outputs")
    spec = await _spec(client, "sorted(path.read_text() for path in inputs)")
    spec = structs.replace(spec, inputs=(InputSource(source=f"ipfs://{view.cid}"),))
    assert _values(await _done(client, spec)) == [b'["0", "1"]']


async def test_an_equal_jobs_result_is_taken(client: Client, tmp_path: Path) -> None:
    spec = await _spec(client, SUM, _numbers(tmp_path / "in"), reuse=True)
    first = await client.submit(spec)
    await _updates(client, first.job)
    again = await client.submit(spec)
    assert (first.reused, again.reused, again.job) == (False, True, first.job)
    assert "the result of job" in " ".join(again.notes)
    assert not (await client.submit(structs.replace(spec, reuse=False))).reused


async def test_a_result_is_published_and_where_is_told_with_its_end(client: Client) -> None:
    view = await _done(client, await _spec(client, "1", publish="filecoin"))
    assert (view.state, view.reason) == ("Completed", "")
    assert view.published[0].startswith("piece bafkzcib")
    with pytest.raises(SpecError, match="--publish ipfs9: this node publishes to store"):
        await client.submit(await _spec(client, "1", publish="ipfs9"))


async def test_a_bundle_has_the_cid_that_every_client_gives_it(side: Side) -> None:
    files = {"cell.py": b"1", "vars/ü.json": b"{}", "vars/a/b": b"x" * 300_000, "modules/empty": b""}
    assert await side.client.put_bundle(files) == await side.node.put_bundle(files)


async def test_a_large_bundle_arrives(client: Client) -> None:
    cell = b"(pathlib.Path(big.__file__).parent / 'data.bin').stat().st_size"
    files = {"cell.py": b"import big, pathlib\n" + cell, "modules/big.py": b"", "modules/data.bin": b"y" * 2_500_000}
    bundle = await client.put_bundle(files)
    assert _values(await _done(client, JobSpec(task=PythonCell(bundle=bundle)))) == [b"2500000"]


# --- errors ---


async def test_an_unknown_job_is_named(client: Client) -> None:
    for ask in (client.job(UNKNOWN), client.cancel(UNKNOWN), _updates(client, UNKNOWN)):
        with pytest.raises(SpecError, match=f"^this node knows no job {UNKNOWN}$"):
            await ask
    for odd in ("nonsense", "../../v0/nodes", "j-%2e", "ü"):
        with pytest.raises(SpecError, match=r"^this node knows no job "):
            await client.job(odd)
    with pytest.raises(SpecError, match="no job with an id that starts with 'j-f'; the latest are: none"):
        await client.find("j-f")


async def test_unknown_and_impossible_content_is_an_error(client: Client, tmp_path: Path) -> None:
    for cid in (NOWHERE, "nonsense", "../x"):
        with pytest.raises(ContentError):
            await client.read(cid)
        with pytest.raises(ContentError):
            await client.download(cid, tmp_path / "out")
    assert not (tmp_path / "out").exists()


async def test_what_no_node_can_run_says_why(client: Client) -> None:
    view = await _done(client, await _spec(client, "1", isolation="container"))
    assert view.state == "Failed"
    assert "--isolation container" in view.reason


async def test_a_mount_that_cant_be_one_is_refused(client: Client, tmp_path: Path) -> None:
    folder = _numbers(tmp_path / "in")
    for mount in ("relative", "/etc/x", "/a/../b"):
        spec = structs.replace(await _spec(client, SUM), inputs=(InputSource(source=str(folder), mount=mount),))
        with pytest.raises(BacalhauError, match="mount"):
            await client.submit(spec)
