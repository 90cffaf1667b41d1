"""One notebook in JupyterLab as a reader has it: open it in a browser, run all cells, see the figure."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

pytest.importorskip("jupyterlab")
websocket = pytest.importorskip("websocket")

ROOT = Path(__file__).parent.parent
NOTEBOOK = "03_pairs.ipynb"
BROWSER = next(
    filter(
        None,
        map(
            shutil.which, ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
        ),
    ),
    None,
)
SECONDS = 240  # for each thing that is waited for; with the smoke profile a few are enough

TAB = "[...jupyterapp.shell.widgets('main')].find(tab => tab.sessionContext)"
CELLS = f"{TAB}.content.model.sharedModel.cells.filter(cell => cell.cell_type == 'code')"
KERNEL_IS_READY = f"{TAB}.sessionContext.session.kernel.status == 'idle'"
ALL_RAN = f"{CELLS}.every(cell => cell.execution_count > 0) && {KERNEL_IS_READY}"
ERRORS = f"{CELLS}.flatMap(cell => cell.outputs).filter(output => output.output_type == 'error').map(output => output.evalue)"
FIGURES = "[...document.querySelectorAll('.jp-OutputArea-output img')].filter(image => image.naturalWidth > 100).length"


class Page:
    """A tab of a browser without a window, driven over its debugging port."""

    def __init__(self, folder: Path):
        self.process = subprocess.Popen(
            [
                BROWSER,
                "--headless=new",
                "--no-sandbox",
                "--disable-gpu",
                "--disable-dev-shm-usage",
                "--window-size=1280,1600",
                "--remote-debugging-port=0",
                f"--user-data-dir={folder}",
                "about:blank",
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        port = wait(
            lambda: (
                (folder / "DevToolsActivePort").exists()
                and (folder / "DevToolsActivePort").read_text().split("\n")[0]
            )
        )
        tabs = json.load(urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list"))
        [address] = [tab["webSocketDebuggerUrl"] for tab in tabs if tab["type"] == "page"]
        self.socket, self.sent = (
            websocket.create_connection(address, suppress_origin=True, timeout=SECONDS),
            0,
        )

    def call(self, method: str, **parameters):
        self.sent += 1
        self.socket.send(json.dumps({"id": self.sent, "method": method, "params": parameters}))
        while (answer := json.loads(self.socket.recv())).get("id") != self.sent:
            pass
        return answer["result"]

    def value(self, expression: str):
        """What a JavaScript expression gives; None while the page is not so far."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        return None if "exceptionDetails" in result else result["result"].get("value")

    def close(self) -> None:
        self.socket.close()
        self.process.kill()
        self.process.wait()


def wait(condition):
    """The first true value of `condition()`."""
    end = time.monotonic() + SECONDS
    while not (value := condition()):
        assert time.monotonic() < end, f"waited {SECONDS} seconds in vain"
        time.sleep(0.2)
    return value


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """The address of a JupyterLab on a copy of the notebooks, with nobody's settings."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    for folder in ("irpo_utils", "notebooks", "figures"):
        shutil.copytree(
            ROOT / folder,
            tmp_path / folder,
            ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", "phases"),
        )
    settings = tmp_path / "settings" / "@jupyterlab" / "notebook-extension"
    settings.mkdir(parents=True)  # cells out of sight are not drawn otherwise
    (settings / "tracker.jupyterlab-settings").write_text('{"windowingMode": "none"}')
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    places = {
        f"JUPYTER_{name}_DIR": str(tmp_path / name.lower())
        for name in ("CONFIG", "DATA", "RUNTIME")
    }
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "jupyterlab",
            "notebooks",
            "--no-browser",
            "--allow-root",
            "--IdentityProvider.token=",
            "--ip=127.0.0.1",
            f"--port={port}",
            "--ServerApp.port_retries=0",
            "--expose-app-in-browser",
            "--LabApp.extension_manager=readonly",
        ],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={
            **os.environ,
            **places,
            "JUPYTERLAB_SETTINGS_DIR": str(tmp_path / "settings"),
            "JUPYTERLAB_WORKSPACES_DIR": str(tmp_path / "workspaces"),
            "PYTHONPATH": str(tmp_path),
            "IRPO_PROFILE": "smoke",
            "HF_HUB_OFFLINE": "1",
            "TMPDIR": str(tmp_path),
        },
    )
    yield f"http://127.0.0.1:{port}"
    process.terminate()
    process.wait()


def answers(address: str) -> bool:
    try:
        return urllib.request.urlopen(f"{address}/api/status", timeout=5).status == 200
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome is installed")
@pytest.mark.skipif(
    not (ROOT / "notebooks" / NOTEBOOK).exists(), reason=f"{NOTEBOOK} has not been made"
)
def test_a_notebook_runs_in_the_browser_and_its_figure_appears(lab, tmp_path):
    wait(lambda: answers(lab))
    page = Page(tmp_path / "browser")
    try:
        page.call("Emulation.setFocusEmulationEnabled", enabled=True)
        page.call("Page.navigate", url=f"{lab}/lab/tree/{NOTEBOOK}")
        wait(lambda: page.value(KERNEL_IS_READY))
        page.value(f"jupyterapp.shell.activateById({TAB}.id)")
        page.value("jupyterapp.commands.execute('notebook:clear-all-cell-outputs')")
        wait(lambda: page.value(f"{CELLS}.every(cell => cell.outputs.length == 0)"))
        assert page.value(FIGURES) == 0
        page.value("void jupyterapp.commands.execute('notebook:run-all-cells')")
        wait(lambda: page.value(ALL_RAN) or page.value(ERRORS))
        assert page.value(ERRORS) == [] and page.value(f"{CELLS}.length") > 10
        assert wait(lambda: page.value(FIGURES)) >= 1
    finally:
        page.close()
