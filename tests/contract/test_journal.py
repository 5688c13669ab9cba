"""What every journal promises; and that the one on disk keeps it through kills and damage."""

import base64
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from bacalhau_node import journal as journal_module
from bacalhau_node.errors import ContentError
from bacalhau_node.filesystem import on_network
from bacalhau_node.ids import Execution
from bacalhau_node.journal import SqliteJournal
from bacalhau_node.messages import Blob, Frame, Outcome, ShardError, Value
from bacalhau_node.ports import Journal
from bacalhau_node.protocol.events import ComputeRow, JobRow, Row, ShardRow
from bacalhau_node.spec import InputSource, JobSpec, PythonCell
from bacalhau_node.testing.fakes import MemoryJournal

Reopen = Callable[[], Journal]


def job(number: int = 0, **fields) -> JobRow:
    spec = JobSpec(task=PythonCell(bundle="bafy"), inputs=(InputSource(source="/data/é\n"),), env={"A": "b"})
    name = f"j-00000000-0000-0000-0000-{number:012x}"
    return JobRow(
        **{"job": name, "state": "Running", "spec": spec, "plan": "bafy", "count": 3, "created": 1.5, **fields}
    )


def shard(number: int = 0, of: JobRow | None = None, **fields) -> ShardRow:
    return ShardRow(**{"job": (of or job()).job, "shard": number, "state": "kept", **fields})


def outcome(text: bytes = b"hello") -> Outcome:
    error = ShardError("exception", "ValueError", "no\ncsv", (Frame("cell", 3, "f", "f()", in_cell=True),), ("note",))
    return Outcome(ok=False, value=Value("json", "int", Blob(1, b"7")), stdout=Blob(len(text), text), error=error)


RESULT = outcome()


def owed(number: int = 0, attempt: int = 1, result: Outcome | None = RESULT) -> ComputeRow:
    return ComputeRow(Execution(job().job, number, attempt), "n-node", result)


@pytest.fixture(params=["memory", "sqlite", "sqlite-durable", "sqlite-without-wal"])
def reopen(request, tmp_path, monkeypatch) -> Reopen:
    """Opens the journal, and again after a close."""
    if request.param == "memory":
        kept = MemoryJournal()
        return lambda: kept
    if request.param == "sqlite-without-wal":
        monkeypatch.setattr(journal_module, "on_network", lambda folder: True)
    return lambda: SqliteJournal(tmp_path / "journal.sqlite", durable=request.param == "sqlite-durable")


def committed(reopen: Reopen, *batches: list[Row]) -> list[Row]:
    """What a later life of the node reads after these commits."""
    journal = reopen()
    for batch in batches:
        journal.commit(batch)
    journal.close()
    journal = reopen()
    rows = journal.load()
    journal.close()
    return rows


# --- every journal ---


def test_forgotten_jobs_leave_nothing_but_what_is_owed(reopen):
    journal = reopen()
    journal.commit([job(1), shard(0, job(1)), job(2), shard(0, job(2)), job(), shard(), owed()])
    journal.forget([job(1).job, job().job])
    assert journal.load() == [job(2), shard(0, job(2)), owed()]
    journal.forget([job(1).job])
    journal.close()
    assert reopen().load() == [job(2), shard(0, job(2)), owed()]


def test_a_new_journal_is_empty(reopen):
    assert committed(reopen) == []


def test_rows_come_back_as_they_were(reopen):
    rows = [job(reason="why é", cid="bafy"), shard(0, attempts=2, node="n-node", outcome=outcome()), owed()]
    assert committed(reopen, rows) == rows


def test_jobs_come_first_then_shards_then_results_each_in_order(reopen):
    rows = [job(0), job(1), shard(0), shard(2), shard(10), shard(0, job(1)), owed(1, 2), owed(1, 10), owed(2, 1)]
    assert committed(reopen, rows[::-1]) == rows


def test_a_row_takes_the_place_of_the_one_with_its_key(reopen):
    first, second = shard(state="running", attempts=1), shard(state="kept", attempts=2)
    assert committed(reopen, [first], [second]) == [second]
    assert committed(reopen, [first, second, first]) == [first]


def test_results_of_two_attempts_are_two_rows(reopen):
    rows = [owed(0, 1), owed(0, 2, outcome(b"other"))]
    assert committed(reopen, rows) == rows


def test_a_result_without_an_outcome_is_forgotten(reopen):
    assert committed(reopen, [owed(0), owed(1)], [owed(0, result=None), owed(7, result=None)]) == [owed(1)]
    assert committed(reopen, [owed(0), owed(0, result=None)], [owed(1, result=None), owed(1)]) == [owed(1)]


def test_an_empty_commit_changes_nothing(reopen):
    assert committed(reopen, [job()], [], []) == [job()]


def test_rows_may_come_from_an_iterator(reopen):
    assert committed(reopen, (row for row in [job()])) == [job()]


def test_a_large_row_comes_back(reopen):
    row = shard(outcome=outcome(os.urandom(1024 * 1024)))
    assert committed(reopen, [row]) == [row]


def test_load_shows_what_was_committed_before_in_the_same_life(reopen):
    journal = reopen()
    journal.commit([job()])
    assert journal.load() == [job()]
    journal.commit([shard()])
    assert journal.load() == [job(), shard()]
    journal.close()


def test_a_row_that_cannot_be_written_takes_its_whole_commit_with_it(reopen):
    journal = reopen()
    with pytest.raises(UnicodeEncodeError):
        journal.commit([job(), job(1, reason="not text: \udc80")])
    assert journal.load() == []
    journal.commit([job()])
    assert journal.load() == [job()]
    journal.close()


# --- on disk ---


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "journal.sqlite"


def filled(path: Path, shards: int = 200) -> list[Row]:
    rows = [job(), *(shard(number, outcome=outcome(b"%d" % number * 40)) for number in range(shards))]
    journal = SqliteJournal(path)
    journal.commit(rows)
    journal.close()
    return rows


COMMITTING = """
import sys
from pathlib import Path
from bacalhau_node import journal
from bacalhau_node.protocol.events import ShardRow
if sys.argv[2] == "rollback":
    journal.on_network = lambda folder: True
kept = journal.SqliteJournal(Path(sys.argv[1]))
job = "j-00000000-0000-0000-0000-000000000000"
turn = kept.load()[0].attempts if kept.load() else 0
while True:
    turn += 1
    kept.commit([ShardRow(job, shard, "running", attempts=turn) for shard in range(50)])
    print(turn, flush=True)
"""


@pytest.mark.parametrize("mode", ["wal", "rollback"])
def test_after_a_kill_every_commit_that_returned_is_there_and_none_is_half(path, mode):
    for life in range(4):
        worker = subprocess.Popen(
            [sys.executable, "-c", COMMITTING, str(path), mode],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        with worker:
            for _ in range(5 + 7 * life):
                told = int(worker.stdout.readline())
            worker.send_signal(signal.SIGKILL)
            told = max([told, *map(int, worker.stdout.read().splitlines()[:-1])])
        journal = SqliteJournal(path)
        rows = journal.load()
        journal.close()
        assert len(rows) == 50
        assert len({row.attempts for row in rows}) == 1
        assert rows[0].attempts >= told


def test_a_copy_taken_between_two_commits_holds_all_of_the_first(path, tmp_path):
    journal = SqliteJournal(path)
    journal.commit([job()])
    for file in tmp_path.iterdir():
        shutil.copy(file, tmp_path / f"copy-{file.name}")
    copy = SqliteJournal(tmp_path / "copy-journal.sqlite")
    assert copy.load() == [job()]
    copy.close()
    journal.close()


def test_a_journal_without_rows_has_no_file(path):
    journal = SqliteJournal(path)
    journal.forget([job().job])
    assert journal.load() == []
    assert list(path.parent.iterdir()) == []
    journal.commit([job()])
    assert path.stat().st_size > 0
    journal.close()


def test_a_second_process_is_kept_out(path):
    filled(path)
    journal = SqliteJournal(path)
    with pytest.raises(ContentError, match="in use by another process"):
        SqliteJournal(path)
    journal.commit([job()])
    journal.close()
    SqliteJournal(path).close()


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda data: b"", id="empty"),
        pytest.param(lambda data: b"not a database at all" * 400, id="something else"),
        pytest.param(lambda data: b"\xff" * 100 + data[100:], id="header"),
        pytest.param(lambda data: data[: len(data) // 2], id="half of it"),
        pytest.param(lambda data: data[:8192] + b"\0" * 8192 + data[16384:], id="zeroed pages"),
        pytest.param(lambda data: data.replace(b"777", b"778"), id="content of a row"),
    ],
)
def test_a_damaged_journal_is_an_error_that_says_what_to_do_and_stays_as_it_is(path, damage):
    filled(path)
    broken = damage(path.read_bytes())
    path.write_bytes(broken)
    with pytest.raises(ContentError) as caught:
        SqliteJournal(path).load()
    assert str(path) in str(caught.value)
    assert "is damaged" in str(caught.value)
    assert "Move journal.sqlite and journal.sqlite-wal out of" in str(caught.value)
    assert path.read_bytes()[100:] == broken[100:]  # the header's counters may move


def test_an_intact_row_of_another_shape_is_damage(path):
    filled(path)
    data = msgspec.msgpack.encode({"type": "job", "job": 7})
    with sqlite3.connect(path) as db:
        db.execute("UPDATE entry SET data = ?, crc = ? WHERE kind = 0", (data, journal_module.zlib.crc32(data)))
    db.close()
    journal = SqliteJournal(path)
    with pytest.raises(ContentError, match="a row is not what this version writes"):
        journal.load()
    journal.close()


def test_a_database_of_something_else_is_not_taken_over(path):
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE theirs (x)")
    db.close()
    before = path.read_bytes()
    with pytest.raises(ContentError, match="a database of something else"):
        SqliteJournal(path)
    assert path.read_bytes() == before


FIRST_ROWS = (
    (
        "iaR0eXBlo2pvYqNqb2LZJmotMDAwMDAwMDAtMDAwMC0wMDAwLTAwMDAtMDAwMDAwMDAwMDAwpXN0YXRlqUNvbXBsZXRlZKRzcGVj"
        "3gATpHRhc2uHpHR5cGWkY2VsbKZidW5kbGXZO2JhZmtyZWlnaDJha2lzY2FpbGRjcWFic3lnM2RmcjZjaHUzZmdwcmVnaXltc2Nr"
        "N2U3YXFhNHM1Mnp5pG5hbWWkY2VsbKtsaW5lX29mZnNldACnaW1wb3J0c5CmcHl0aG9uoKh2ZXJzaW9uc4CmaW5wdXRzkYKmc291"
        "cmNlpS9kYXRhpW1vdW50wKZzaGFyZWSQpWdsb2JzkKhzaGFyZGluZ4KiYnmlY291bnShbgGpcmVzb3VyY2VzhaNjcHXLP/AAAAAA"
        "AACmbWVtb3J5wKRkaXNrwKRncHVzAKlncHVfc2hhcmUBp3RpbWVvdXTAq2pvYl90aW1lb3V0wKhwYXJhbGxlbMCncmV0cmllcwCo"
        "cmVwbGljYXMBpWFncmVlAaVpbWFnZcCpaXNvbGF0aW9uwK1jb250YWluZXJfcGVyo2pvYqduZXR3b3JrpG5vbmWjZW52gKZsYWJl"
        "bHOAo3BpbsKkcGxhbqRwbGFupWNvdW50AadjcmVhdGVkyz/4AAAAAAAApnJlYXNvbqCjY2lko2NpZA=="
    ),
    (
        "iKR0eXBlpXNoYXJko2pvYtkmai0wMDAwMDAwMC0wMDAwLTAwMDAtMDAwMC0wMDAwMDAwMDAwMDClc2hhcmQApXN0YXRlpGtlcHSo"
        "YXR0ZW1wdHMBp2F0dGVtcHQBpG5vZGWmbm9kZS0xp291dGNvbWWNom9rw6lleGl0X2NvZGUApXZhbHVlg6RraW5kpG5vbmWkdHlw"
        "ZahOb25lVHlwZaRibG9ig6RzaXplAKZpbmxpbmXEAKNjaWTAp291dHB1dHPApnN0ZG91dIOkc2l6ZQKmaW5saW5lxAIxCqNjaWTA"
        "pnN0ZGVycoOkc2l6ZQCmaW5saW5lxACjY2lkwKNjdXQApWVycm9ywKdzZWNvbmRzywAAAAAAAAAAp21heF9yc3MAqGV4ZWN1dG9y"
        "oKZhbnN3ZXKhYaZyZWNvcmShcg=="
    ),
    (
        "hKR0eXBlp2NvbXB1dGWpZXhlY3V0aW9ug6Nqb2LZJmotMDAwMDAwMDAtMDAwMC0wMDAwLTAwMDAtMDAwMDAwMDAwMDAwpXNoYXJk"
        "AKdhdHRlbXB0AalyZXF1ZXN0ZXKmbm9kZS0xp291dGNvbWWNom9rw6lleGl0X2NvZGUApXZhbHVlg6RraW5kpG5vbmWkdHlwZahO"
        "b25lVHlwZaRibG9ig6RzaXplAKZpbmxpbmXEAKNjaWTAp291dHB1dHPApnN0ZG91dIOkc2l6ZQKmaW5saW5lxAIxCqNjaWTApnN0"
        "ZGVycoOkc2l6ZQCmaW5saW5lxACjY2lkwKNjdXQApWVycm9ywKdzZWNvbmRzywAAAAAAAAAAp21heF9yc3MAqGV4ZWN1dG9yoKZh"
        "bnN3ZXKhYaZyZWNvcmShcg=="
    ),
)
"""A job, a shard and a result that is owed, as the first version of format 1 wrote them (base64)."""


def test_rows_of_the_first_version_are_read_and_missing_fields_have_their_defaults(path):
    journal_module._create(path)
    name = job(0).job
    with sqlite3.connect(path) as db:
        for kind, row in enumerate(map(base64.b64decode, FIRST_ROWS)):
            crc = journal_module.zlib.crc32(row)
            db.execute("INSERT INTO entry VALUES (?, ?, 0, ?, ?, ?)", (kind, name, int(kind == 2), row, crc))
    db.close()
    journal = SqliteJournal(path)
    job_row, shard_row, owed_row = journal.load()
    journal.close()
    bundle = "bafkreigh2akiscaildcqabsyg3dfr6chu3fgpregiymsck7e7aqa4s52zy"
    spec = JobSpec(task=PythonCell(bundle=bundle), inputs=(InputSource(source="/data"),))
    result = Outcome(ok=True, stdout=Blob(2, b"1\n"), answer="a", record="r")
    assert job_row == JobRow(name, "Completed", spec, "plan", 1, 1.5, cid="cid")
    assert shard_row == ShardRow(name, 0, "kept", 1, 1, "node-1", result)
    assert owed_row == ComputeRow(Execution(name, 0, 1), "node-1", result)


def test_a_newer_format_is_refused_by_its_number(path):
    filled(path)
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 7")
    db.close()
    with pytest.raises(ContentError, match="has format 7, this version of bacalhau-jupyter knows 1"):
        SqliteJournal(path)


def test_the_log_of_a_journal_that_is_not_there_is_an_error(path):
    (path.parent / "journal.sqlite-wal").write_bytes(b"rest")
    with pytest.raises(ContentError, match=r"journal\.sqlite-wal belongs to journal\.sqlite, which is not there"):
        SqliteJournal(path)
    assert not path.exists()


def test_a_creation_that_was_cut_short_is_made_again(path):
    (path.parent / "journal.sqlite.new").write_bytes(b"SQLite form")
    rows = filled(path)
    journal = SqliteJournal(path)
    assert journal.load() == rows
    journal.close()


def test_a_folder_that_is_not_there_is_an_error(path):
    with pytest.raises(ContentError, match="can't be used"):
        SqliteJournal(path.parent / "none" / "journal.sqlite")


def test_a_full_disk_is_an_error_and_the_journal_goes_on_from_before(path):
    rows = filled(path, 20)
    journal = SqliteJournal(path)
    pages = journal._db.execute("PRAGMA page_count").fetchone()[0]
    journal._db.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(ContentError, match="Check that its disk has room"):
        journal.commit([shard(1000 + number, outcome=outcome(bytes(10_000))) for number in range(10)])
    journal._db.execute("PRAGMA max_page_count = 1000000")
    journal.commit([shard(20)])
    assert journal.load() == [*rows, shard(20)]
    journal.close()


def test_a_thousand_shards_in_batches_cost_little(path):
    journal = SqliteJournal(path)
    start = time.process_time()
    for batch in range(20):
        journal.commit([shard(batch * 50 + number, state="running") for number in range(50)])
    spent = time.process_time() - start
    journal.close()
    assert spent < 1, f"{spent:.3f} s of processor time; some tens of milliseconds are usual"


# --- where WAL does not work ---


@pytest.mark.parametrize(
    ("folder", "expected"),
    [
        ("/", False),
        ("/home/a", False),
        ("/mnt/nfs/a/b", True),
        ("/mnt/nfsx", False),
        ("/mnt/with blank/a", True),
        ("/mnt/nfs/local/a", False),
        ("/mnt/sshfs", True),
        ("/mnt/over", True),
    ],
)
def test_network_file_systems_are_told_by_the_mount_table(tmp_path, folder, expected):
    table = tmp_path / "mounts"
    table.write_text(
        "overlay / overlay rw 0 0\n"
        "server:/a /mnt/nfs nfs4 rw,vers=4.2 0 0\n"
        "/dev/sda1 /mnt/nfs/local ext4 rw 0 0\n"
        "//server/b /mnt/with\\040blank cifs rw 0 0\n"
        "me@host: /mnt/sshfs fuse.sshfs rw 0 0\n"
        "/dev/sdb /mnt/over ext4 rw 0 0\n"
        "server:/c /mnt/over nfs rw 0 0\n"
    )
    assert on_network(Path(folder), table=table) is expected


def test_without_a_mount_table_a_file_system_is_taken_as_local(tmp_path):
    assert on_network(tmp_path, table=tmp_path / "none") is False


def test_a_network_file_system_gets_a_rollback_journal(path, monkeypatch):
    filled(path)
    journal = SqliteJournal(path)
    assert journal._db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    journal.close()
    monkeypatch.setattr(journal_module, "on_network", lambda folder: True)
    journal = SqliteJournal(path)
    assert journal._db.execute("PRAGMA journal_mode").fetchone() == ("delete",)
    journal.close()
