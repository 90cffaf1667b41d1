r"""math-verify in a child process, so that no comparison takes unbounded time or memory.

The child is ended after `TIME_LIMIT` seconds of processor time (not wall-clock time: a busy
machine must not make a correct answer wrong) or at `MEMORY_LIMIT` bytes, whatever thread the caller
is in. No text is evaluated as code: only the LaTeX grammar is used, not the library's `parse_expr`.
The child ends when its input does, that is with the process that started it.
"""

import contextlib
import functools
import importlib
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

from irpo_utils import UserError

TIME_LIMIT = 3.0  # seconds of processor time for one comparison
PATIENCE = 20  # times as long by the clock, for a child that is not given the processor
START_LIMIT = 120.0  # seconds by the clock for starting the child
MEMORY_LIMIT = 2 << 30  # bytes
# A product without a sign, which the library reads as a mixed number, 3(4) as 7, or a function.
PRODUCT = re.compile(r"(?:(?<=\))|(?<=\\pi)|(?<=\d)(?<![\^_]\d))\s*(?=\()|(?<=\))\s*(?=\d|\\frac)")


class Verifier:
    """One question per line to the child, which is killed when it takes too long."""

    def __init__(self):
        self.lock, self.process = threading.Lock(), None

    def equal(self, gold: str, answer: str) -> bool:
        """The library's verdict; `TimeoutError` if there is none in time. Thread-safe."""
        with self.lock:
            if self.process is None or self.process.poll() is not None:
                self._start()
            reply = self._ask([gold, answer, TIME_LIMIT], PATIENCE * TIME_LIMIT)
        if not reply:
            raise TimeoutError
        return reply == "1"

    def _start(self) -> None:
        command = [sys.executable, "-m", "irpo_utils.tasks.verifier"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        root = Path(__file__).parents[2]  # where `-m` finds the package
        self.process = subprocess.Popen(command, cwd=root, text=True, encoding="utf-8", **pipes)
        if not self._ask(["x+1", "1+x", 0], START_LIMIT):  # imports all that later questions need
            raise UserError(
                "The grader of the task math did not start. It needs the library math-verify: pip "
                "install math-verify. To see the error, run `python -m irpo_utils.tasks.verifier`."
            )

    def _ask(self, question: list, limit: float) -> str:
        """The reply to one question; "" if it takes longer than the limit, and the child ends."""
        reply, process = "", self.process
        timer = threading.Timer(limit, process.kill)
        timer.start()
        try:
            with contextlib.suppress(OSError):  # the child is gone
                print(json.dumps(question), file=process.stdin, flush=True)
                reply = process.stdout.readline().strip()
        finally:  # also after Ctrl-C: an unread reply would be taken for the next question's
            timer.cancel()
            if not reply:
                process.kill()
                with contextlib.suppress(OSError):  # what could not be written to it
                    process.communicate()
        return reply


@functools.lru_cache(maxsize=1)
def verifier(process_id: int) -> Verifier:
    """One child for each process: after a fork two must not share one pipe."""
    return Verifier()


def _read(text: str) -> list:
    """The library's expressions for a LaTeX text; the time is limited by the process alone."""
    from math_verify import LatexExtractionConfig, parse

    text = PRODUCT.sub(r"\\cdot ", text)
    latex = [LatexExtractionConfig()]
    return parse(f"${text}$", latex, "no_fallback", parsing_timeout=None, raise_on_error=True)


def _same(gold: str, answer: str) -> bool:
    """Equal for the library, and to nine digits if both are numbers.

    To the library's 15 decimals 1/2^98 is 1/2^99.
    """
    from math_verify import verify
    from sympy import Expr

    one, two = _read(gold), _read(answer)
    if not verify(one, two, timeout_seconds=None, raise_on_error=True):
        return False
    if not all(isinstance(value, Expr) and value.is_number for value in (one[0], two[0])):
        return True
    value, given = one[0].doit(), two[0].doit()
    return bool(abs((value - given).evalf(30)) <= 1e-9 * abs(given.evalf(30)))


def _limit_time(seconds: float) -> None:
    """The kernel ends this process after so much processor time, even in C code; 0 for never."""
    if hasattr(signal, "setitimer"):  # not on Windows: there the clock alone decides
        signal.setitimer(signal.ITIMER_PROF, seconds)


def serve() -> None:
    """The child: reads [gold, answer, seconds] as JSON lines, replies 1 or 0 to each."""
    importlib.import_module("math_verify")  # if it is missing, the child ends before any reply
    logging.disable()
    with contextlib.suppress(ImportError, ValueError, OSError):  # not on every system
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no reply
    for line in sys.stdin:
        gold, answer, seconds = json.loads(line)
        _limit_time(seconds)
        try:
            verdict = _same(gold, answer)
        except Exception:  # the library raises errors of many classes for what it cannot read
            verdict = False
        _limit_time(0)
        print(int(verdict), file=replies, flush=True)


if __name__ == "__main__":
    serve()
