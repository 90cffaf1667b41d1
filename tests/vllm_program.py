"""A stand-in for the program `vllm`: `python vllm_program.py serve MODEL --port N ...`.

It passes requests on to the stand-in server of test_vllm_server.py, so that it starts at once. The
folder STAND_IN has the address of that server (`url`), and the fault to show (`fault`): a word, and
the number of completions before it. It gets a line for each start (`starts`): process ids and
arguments.
"""

import http.server
import json
import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

FOLDER = Path(os.environ["STAND_IN"])
URL = (FOLDER / "url").read_text()
FAULT, _, AFTER = (FOLDER / "fault").read_text().partition(" ")
AFTER = int(AFTER or 0)


class Handler(http.server.BaseHTTPRequestHandler):
    completions = 0

    def do_GET(self):
        self.pass_on(None)

    def do_POST(self):
        self.pass_on(self.rfile.read(int(self.headers["Content-Length"])))

    def pass_on(self, content):
        if self.path.endswith("completions"):
            Handler.completions += 1
        if Handler.completions > AFTER and FAULT == "dies":
            os._exit(3)
        if Handler.completions > AFTER and FAULT == "hangs":
            time.sleep(1000)
        with urllib.request.urlopen(urllib.request.Request(URL + self.path, content)) as reply:
            data = reply.read()
        if self.path.endswith("completions") and FAULT == "other_base":
            found = json.loads(data)
            for choice in found["choices"]:
                logps = choice["logprobs"]["token_logprobs"]
                choice["logprobs"]["token_logprobs"] = [value - 1 for value in logps]
            data = json.dumps(found).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


class Server(http.server.ThreadingHTTPServer):
    request_queue_size = 512  # connections that may wait; 5 by default


if __name__ == "__main__":
    worker = subprocess.Popen(["sleep", "1000"])  # as vLLM's processes for the model
    with (FOLDER / "starts").open("a") as file:
        words, updating = sys.argv[1:], os.environ["VLLM_ALLOW_RUNTIME_LORA_UPDATING"]
        row = {"pids": [os.getpid(), worker.pid], "words": words, "updating": updating}
        file.write(json.dumps(row) + "\n")
    if FAULT == "ends":
        sys.exit("RuntimeError: no room for the model")
    if FAULT == "loads":
        time.sleep(1000)
    Server(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
