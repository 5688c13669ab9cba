"""Bad input of every kind: one clear error, the rest of the job kept, nothing left behind, the next job works."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from tests.conftest import docker_address
from tests.notebook.bad_input import EXECUTORS, ITEMS, Item, Referee, referee

OURS = re.compile(r"Traceback|bacalhau_node|/slot/|agent\.py|\bn-[0-9a-f]{8}|\bj-[0-9a-f]{9}|NoneType")
"""What nobody wants to read: frames of this package, ids of nodes, whole ids of jobs."""
MOST_LINES = 12
"""Lines that a reader is shown about a failure of one kind, what shards printed not counted."""

GATES = {"docker": pytest.mark.docker, "sandbox": pytest.mark.sandbox}


@pytest.fixture(scope="module", params=[pytest.param(name, marks=GATES.get(name, ())) for name in EXECUTORS])
def court(request, tmp_path_factory) -> Iterator[Referee]:
    """A kernel for all items with one executor; when it has ended, nothing of it may be left."""
    with referee(tmp_path_factory.mktemp("court"), request.param, docker_address()) as one:
        yield one
    assert one.left_by_the_kernel() == ()


@pytest.mark.parametrize("item", [pytest.param(one, id=one.name, marks=[pytest.mark.slow] * one.slow) for one in ITEMS])
def test_bad_input_is_told_once_and_the_rest_is_kept(court, item: Item):
    reading = court.judge(item)
    missing = [words for words in item.says if not re.search(words, reading.text)]
    own = [line for line in reading.text.splitlines() if not line.startswith("[shard ")]
    repeated = [line for line in own if own.count(line) > 1 and len(line) > 20]
    assert not missing, reading.text[-3000:]
    assert not OURS.search("\n".join(own)), reading.text[-3000:]
    assert repeated == []
    assert len(own) <= MOST_LINES
    assert reading.kept.startswith(item.kept) if item.kept else not reading.kept
    assert reading.jobs == (item.kept is not None)
    assert reading.left == ()
    assert court.works()
