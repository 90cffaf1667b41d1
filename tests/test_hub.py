"""What a user sees when the hub refuses, against a local server that answers as the hub does."""

import http.server
import os
import subprocess
import sys
import threading

import pytest

from irpo_utils import UserError
from irpo_utils.ops.hub import explained

PROGRAM = """
from irpo_utils import UserError, profiles
from irpo_utils.ops import run
try:
    run.load_model(profiles.get("smoke", model="owner/name"))
except UserError as error:
    print("USER ERROR:", error)
"""


@pytest.fixture()
def hub():
    """A hub on which every file is refused with `answer`: (status, X-Error-Code)."""

    class Handler(http.server.BaseHTTPRequestHandler):
        answer = (404, "RepoNotFound")

        def do_GET(self):
            status, code = Handler.answer
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("X-Error-Message", "Access to model owner/name is restricted.")
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_POST = do_GET

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield Handler, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def load(endpoint, cache, **more) -> str:
    environment = {
        **os.environ,
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(cache),
        "HF_HUB_OFFLINE": "0",
        **more,
    }
    environment.pop("HF_TOKEN", None)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("status", [401, pytest.param(403, marks=pytest.mark.slow)])
def test_a_gated_model_without_a_token(hub, tmp_path, status):
    handler, endpoint = hub
    handler.answer = (status, "GatedRepo")
    assert (
        "owner/name is gated: accept its licence" in (said := load(endpoint, tmp_path))
        and "hf auth login" in said
    )


@pytest.mark.slow
def test_a_model_that_does_not_exist(hub, tmp_path):
    said = load(hub[1], tmp_path)
    assert "USER ERROR: " in said and "owner/name" in said and "gated" not in said


@pytest.mark.slow
def test_no_network(tmp_path):
    said = load("http://127.0.0.1:9", tmp_path)
    assert "Without a network, give --model a local folder" in said


@pytest.mark.parametrize(
    "text, gated",
    [
        ("127.0.0.1:40137 timed out (Request ID: 34031a)", False),
        ("403 Client Error: Forbidden for url", True),
        ("Cannot access gated repo for url", True),
    ],
)
def test_digits_of_an_address_are_no_status(text, gated):
    with pytest.raises(UserError) as error, explained("owner/name"):
        raise OSError(text)
    assert ("is gated" in str(error.value)) == gated


@pytest.mark.parametrize(
    "text", ["CUDA out of memory. Tried to allocate 2 GiB", "CUDA error: device-side assert"]
)
def test_a_problem_of_the_gpu_is_not_blamed_on_the_model(text):
    with pytest.raises(RuntimeError, match=text[:10]), explained("owner/name"):
        raise RuntimeError(text)


def test_a_folder_that_cannot_be_loaded_and_code_of_its_own(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="model folder .* could not be loaded: broken"):
        with explained(str(tmp_path)):
            raise ValueError("broken")
    with pytest.raises(UserError, match="asks to run its own code, which is refused"):
        with explained("owner/name"):
            raise ValueError("set trust_remote_code=True to allow custom code")


@pytest.mark.slow
def test_a_hub_that_does_not_answer(tmp_path):
    """It takes the connection and says nothing: the load ends after the time limit."""
    import socket

    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        kept = []
        threading.Thread(
            target=lambda: [kept.append(server.accept()) for _ in range(64)], daemon=True
        ).start()
        said = load(
            f"http://127.0.0.1:{server.getsockname()[1]}",
            tmp_path,
            HF_HUB_ETAG_TIMEOUT="1",
            HF_HUB_DOWNLOAD_TIMEOUT="1",
        )
    assert "Without a network, give --model a local folder" in said
