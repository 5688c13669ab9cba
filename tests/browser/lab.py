"""A JupyterLab server and pages of it, in a Chromium without a screen."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nbformat
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.notebook.kernels import environment, signals

SECONDS = 90
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
SHOTS = Path(__file__).parents[2] / "artifacts" / "screenshots"


class Lab:
    """One server and one browser. Every page opens a notebook of its own."""

    def __init__(self, root: Path, address: str, browser: Browser) -> None:
        self.root, self.address, self.browser = root, address, browser
        self.signals = signals(root.parent / "data")

    def write(self, name: str, *cells: str) -> Path:
        """A notebook of these code cells in the server's folder."""
        spec = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
        book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells], metadata=spec)
        nbformat.write(book, self.root / name)
        return self.root / name

    @contextmanager
    def open(self, name: str, *, width: int = 1100, dark: bool = False, kernel: bool = True) -> Iterator[Page]:
        """A page that shows the notebook; with `kernel`, one that is ready to run cells."""
        self._theme("JupyterLab Dark" if dark else "JupyterLab Light")
        page = self.browser.new_page(viewport={"width": width, "height": 900}, reduced_motion="reduce")
        try:
            page.goto(f"{self.address}/doc/tree/{name}?reset")
            expect(page.locator(".jp-Notebook .jp-CodeCell").first).to_be_visible(timeout=SECONDS * 1000)
            if kernel:
                idle = "() => jupyterapp.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'"
                page.wait_for_function(idle, timeout=SECONDS * 1000)
            yield page
        finally:
            page.close()

    def _theme(self, name: str) -> None:
        folder = self.root.parent / "settings" / "@jupyterlab" / "apputils-extension"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "themes.jupyterlab-settings").write_text(json.dumps({"theme": name}))
        (folder / "notification.jupyterlab-settings").write_text(json.dumps({"fetchNews": "false"}))


def command(page: Page, name: str) -> None:
    """Run one of JupyterLab's commands, and wait for it."""
    page.evaluate(f"() => jupyterapp.commands.execute({name!r})")


def begin(page: Page) -> None:
    """Run all cells without waiting for them."""
    page.evaluate("() => { jupyterapp.commands.execute('notebook:run-all-cells'); }")


def outputs(page: Page, index: int) -> list[dict[str, Any]]:
    """The outputs of a cell as the notebook will be saved."""
    return page.evaluate(f"() => jupyterapp.shell.currentWidget.content.model.cells.get({index}).outputs.toJSON()")


def shot(page: Page, name: str) -> None:
    """Leave a picture for people to look at."""
    SHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SHOTS / f"{name}.png")


@contextmanager
def running(folder: Path, chromium: str) -> Iterator[Lab]:
    """A server with its folders in `folder`, and a browser."""
    root = folder / "notebooks"
    root.mkdir()
    env = environment(folder / "data", JUPYTERLAB_SETTINGS_DIR=str(folder / "settings"))
    env["JUPYTERLAB_WORKSPACES_DIR"] = str(folder / "workspaces")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = (
        f"--port={port}",
        f"--ServerApp.root_dir={root}",
        "--no-browser",
        "--allow-root",
        "--IdentityProvider.token=",
        "--LabApp.expose_app_in_browser=True",
    )
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", *arguments], env=env, stdout=log, stderr=log, cwd=root
        )
        try:
            _until_it_answers(port, server, folder / "log")
            with sync_playwright() as play:
                browser = play.chromium.launch(executable_path=chromium, args=FLAGS)
                yield Lab(root, f"http://127.0.0.1:{port}", browser)
                browser.close()
        finally:
            server.terminate()
            server.wait(30)


def _until_it_answers(port: int, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        assert server.poll() is None, log.read_text()
        with socket.socket() as probe:
            probe.settimeout(1)
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise AssertionError(f"JupyterLab did not start:\n{log.read_text()}")


os.environ.setdefault("PLAYWRIGHT_SKIP_BROWSER_DOWNLOAD", "1")
