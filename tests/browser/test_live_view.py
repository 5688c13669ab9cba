"""The live view and the record as people see them, in JupyterLab."""

from __future__ import annotations

import re
import shutil

import pytest
from playwright.sync_api import expect

from tests.browser.lab import SECONDS, begin, command, outputs, shot

pytestmark = [pytest.mark.browser, pytest.mark.slow]

LOAD = "%load_ext bacalhau_jupyter"
WIDGET = "application/vnd.jupyter.widget-view+json"
LONG = SECONDS * 1000


def waiting(go, *, shards=24, options="", fail=False):
    """A cell whose shards wait for the file `go`, all but the first two; the second one fails if asked to."""
    failing = "if shard.index == 1: raise KeyError('carrier')" if fail else ""
    return f"""%%bacalhau --shards {shards} {options}
import os, time
print(f"shard {{shard.index}} of {{shard.count}} reads", flush=True)
{failing}
while shard.index > 1 and not os.path.exists({str(go)!r}): time.sleep(0.02)
shard.index"""


def test_a_running_job_is_seen_and_read_and_keys_stay_in_it(lab):
    lab.write("running.ipynb", LOAD, waiting(lab.signals / "running-it", fail=True))
    with lab.open("running.ipynb") as page:
        begin(page)
        bar = page.get_by_role("progressbar", name="Shards finished")
        expect(bar).to_have_attribute("aria-valuetext", "2 of 24 shards finished, 1 failed", timeout=LONG)
        expect(page.locator(".bj-tile")).to_have_count(24)
        expect(page.get_by_text("KeyError: 'carrier' in shard 1", exact=True)).to_be_visible()
        expect(page.locator(".bj-title")).to_contain_text("24 shards on this machine (")
        shot(page, "running-light")
        keys_stay_in_the_view(page)
        (lab.signals / "running-it").touch()
        expect(page.get_by_alt_text("24 shards: 23 done, 1 failed")).to_be_visible(timeout=LONG)
        expect(page.locator(".bj-job")).to_have_count(0)
        expect(page.locator(".jp-OutputArea")).to_contain_text(["Cell In[2], line 4"])
        shot(page, "failed-light")


def keys_stay_in_the_view(page):
    """Arrows move, Enter opens, Escape closes, and the letters that cut and copy cells do nothing."""
    cells = page.locator(".jp-Notebook .jp-CodeCell")
    before = cells.count()
    page.get_by_role("button", name="shard 0, done").click()
    detail = page.get_by_role("region", name="shard 0, done")
    expect(detail).to_contain_text("shard 0 of 24 reads")
    page.keyboard.press("Escape")
    expect(detail).to_be_hidden()
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("button", name="shard 1, failed")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.get_by_role("region", name="shard 1, failed")).to_contain_text("shard 1 of 24 reads")
    for key in ("x", "d", "d", "a", "b"):
        page.keyboard.press(key)
    page.keyboard.press("End")
    expect(page.get_by_role("button", name="shard 23, waiting")).to_be_focused()
    assert cells.count() == before
    assert page.locator(".bj-tile[tabindex='0']").count() == 1


def test_the_record_is_there_after_saving_and_reopening_without_a_kernel(lab):
    (lab.signals / "record-kernel").touch()
    path = lab.write(
        "finished.ipynb", LOAD, waiting(lab.signals / "record-kernel", shards=6).replace("0.02", "0.5") + "\n"
    )
    path.write_text(path.read_text().replace("import os, time", "import os, time; time.sleep(0.4)"))
    with lab.open("finished.ipynb") as page:
        begin(page)
        expect(page.get_by_alt_text("6 shards: 6 done")).to_be_visible(timeout=LONG)
        assert WIDGET not in str(outputs(page, 1))
        shot(page, "finished-light")
        command(page, "docmanager:save")
        page.evaluate("() => jupyterapp.shell.currentWidget.sessionContext.shutdown()")
    # A copy is not trusted: JupyterLab sanitises what it shows.
    shutil.copy(path, lab.root / "copy.ipynb")
    (lab.root / "copy.ipynb").write_text(re.sub(r'"python3?"', '"none"', (lab.root / "copy.ipynb").read_text()))
    with lab.open("copy.ipynb", kernel=False) as page:
        expect(page.get_by_alt_text("6 shards: 6 done")).to_be_visible(timeout=LONG)
        output = page.locator(".jp-OutputArea").nth(1)
        expect(output).to_contain_text("6 shards done")
        expect(output).not_to_contain_text("Loading widget")
        page.get_by_role("dialog").get_by_role("button", name="No Kernel").click()
        page.locator("summary").click()
        expect(page.get_by_role("row", name=re.compile("^5 done"))).to_be_visible()
        shot(page, "reopened-without-kernel")


@pytest.mark.parametrize(("width", "dark"), [(420, False), (1100, True)])
def test_the_view_fits_a_narrow_page_and_a_dark_one(lab, width, dark):
    name = f"look-{width}.ipynb"
    lab.write(name, LOAD, waiting(lab.signals / f"view-{width}", shards=300, options="--logs none"))
    with lab.open(name, width=width, dark=dark) as page:
        begin(page)
        expect(page.locator(".bj-tile")).to_have_count(300, timeout=LONG)
        expect(page.locator(".bj-chip[data-code='2']")).to_have_text("2 done")
        shot(page, f"running-{width}-{'dark' if dark else 'light'}")
        assert page.evaluate(
            "() => { const e = document.querySelector('.bj-job'); return e.scrollWidth <= e.clientWidth; }"
        )
        (lab.signals / f"view-{width}").touch()
        expect(page.get_by_alt_text("300 shards: 300 done")).to_be_visible(timeout=LONG)


def test_the_button_of_a_background_job_cancels_it(lab):
    lab.write(
        "background.ipynb", LOAD, waiting(lab.signals / "never", shards=4, options="--background -o job"), "1 + 1"
    )
    with lab.open("background.ipynb") as page:
        begin(page)
        button = page.get_by_role("button", name="Cancel")
        expect(button).to_be_visible(timeout=LONG)
        shot(page, "background-light")
        button.click()
        expect(page.get_by_alt_text("4 shards: 2 done, 2 stopped")).to_be_visible(timeout=LONG)


def test_a_page_that_is_reloaded_shows_the_background_job_to_its_end(lab):
    lab.write("reload.ipynb", LOAD, waiting(lab.signals / "page-end", shards=4, options="--background -o job"))
    with lab.open("reload.ipynb") as page:
        begin(page)
        expect(page.locator(".bj-chip[data-code='2']")).to_have_text("2 done", timeout=LONG)
        command(page, "docmanager:save")
        page.reload()
        expect(page.locator(".bj-chip[data-code='2']")).to_have_text("2 done", timeout=LONG)
        (lab.signals / "page-end").touch()
        expect(page.locator(".bj-state").or_(page.get_by_alt_text("4 shards: 4 done"))).to_have_text(
            re.compile("Completed|^$"), timeout=LONG
        )


FETCHING = """from bacalhau_jupyter.progress import JobMonitor
from bacalhau_jupyter.record import Place
from bacalhau_jupyter.view import LiveView
from bacalhau_node.client import ShardBytes, ShardChanged, Submission
job, now = "j-3f2a91bc-1111-4222-8333-444444444444", [0.0]
monitor = JobMonitor(Submission(job, 24, "n-1", "docker"), hint="", clock=lambda: now[0])
monitor.feed(ShardChanged(job, 0, "taken", "n-1", 1))
monitor.feed(ShardBytes(job, 0, 1, "2019-10.csv", 0, 1_200_000_000, ""))
now[0] = 1.0
monitor.feed(ShardBytes(job, 0, 1, "2019-10.csv", 120_000_000, 1_200_000_000, ""))
LiveView(monitor, Place("this machine", "docker", 2)).widget"""


def test_what_is_fetched_stands_beside_the_counts(lab):
    lab.write("fetching.ipynb", FETCHING)
    with lab.open("fetching.ipynb") as page:
        begin(page)
        expect(page.locator(".bj-bytes")).to_have_text("fetching 2019-10.csv 120 MB of 1.2 GB", timeout=LONG)
        shot(page, "fetching-light")
