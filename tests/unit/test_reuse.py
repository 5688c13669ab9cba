"""Which jobs are equal."""

from __future__ import annotations

import pytest
from msgspec import structs

from bacalhau_node.plan import JobPlan, PlannedShard
from bacalhau_node.protocol.events import JobRow
from bacalhau_node.reuse import equal_job, obstacle
from bacalhau_node.sharding import Entry, LocalStamp, UrlRef
from bacalhau_node.spec import InputSource, JobSpec, PythonCell, Resources, Sharding
from bacalhau_node.testing.builders import a_job_id

CELL = PythonCell(bundle="bundle", name="In[3]", line_offset=1, python="3.11", versions={"pandas": "3.1"})
SPEC = JobSpec(task=CELL, inputs=(InputSource(source="/data"),), sharding=Sharding(n=4), reuse=True)
ROW = JobRow(a_job_id(1), "Completed", structs.replace(SPEC, reuse=False), "plan", 4, 1.0, cid="cid")


def test_the_newest_equal_job_is_taken() -> None:
    rows = [structs.replace(ROW, job=a_job_id(n), created=float(n)) for n in (1, 3, 2)]
    assert equal_job(rows, SPEC, "plan") == rows[1]


@pytest.mark.parametrize(
    "changes",
    [
        {"task": structs.replace(CELL, name="In[9]", line_offset=4)},
        {"timeout": 9.0, "job_timeout": 99.0, "parallel": 2, "retries": 3},
    ],
)
def test_what_changes_no_answer_makes_no_other_job(changes: dict[str, object]) -> None:
    assert equal_job([ROW], structs.replace(SPEC, **changes), "plan") == ROW


@pytest.mark.parametrize(
    "changes",
    [
        {"task": structs.replace(CELL, bundle="other")},
        {"task": structs.replace(CELL, versions={"pandas": "3.2"})},
        {"image": "python:3.12"},
        {"env": {"A": "1"}},
        {"sharding": Sharding(n=5)},
        {"inputs": (InputSource(source="/data", mount="/m"),)},
        {"resources": Resources(gpus=1)},
        {"network": "full"},
        {"publish": "ipfs"},
        {"labels": {"who": "another"}},
    ],
)
def test_what_may_change_an_answer_makes_another_job(changes: dict[str, object]) -> None:
    assert equal_job([ROW], structs.replace(SPEC, **changes), "plan") is None


def test_only_completed_jobs_over_the_same_entries_count() -> None:
    assert equal_job([ROW], SPEC, "another plan") is None
    for state in ("Running", "Failed", "Stopped"):
        assert equal_job([structs.replace(ROW, state=state)], SPEC, "plan") is None


def test_a_job_that_was_to_be_published_and_was_not_is_run_again() -> None:
    spec = structs.replace(SPEC, publish="s3://b")
    row = structs.replace(ROW, spec=spec, reason="kept in the store, but not published")
    assert equal_job([row], spec, "plan") is None
    assert equal_job([structs.replace(row, published=("s3://b/x",))], spec, "plan") is not None


def _plan(reference: LocalStamp | UrlRef) -> JobPlan:
    return JobPlan((PlannedShard((Entry("a", reference, 1),), 1),))


def test_what_nobody_can_know_to_be_the_same_is_run_again() -> None:
    assert "says nothing of its version" in obstacle(SPEC, _plan(UrlRef("https://h/x")))
    assert not obstacle(SPEC, _plan(UrlRef("https://h/x", version='"etag"')))
    assert not obstacle(SPEC, _plan(UrlRef("https://h/x", sha256="00")))
    assert not obstacle(SPEC, _plan(LocalStamp("/data/a", 1, 2, 3, 4)))
    assert "--secret" in obstacle(structs.replace(SPEC, secrets=("TOKEN",)), _plan(LocalStamp("/a", 1, 2, 3, 4)))
