"""The phases of `scripts/gpu_report.py`: each in a separate process with a time limit.

A crash or a hang costs one measurement: the process of its phase is started again without it, or
ended at the time limit, and all other measurements are kept. This module imports no other package,
so it records what is missing. `gpu_phases` has what is measured.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

from irpo_utils import UserError

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = [sys.executable, "-m", "studies.gpu_phases"]
# In this order, with shares of the time. What a phase leaves over is shared by those after it, so
# the phase that can use any amount of time is last.
SHARES = {"tests": 130, "sampling": 110, "training": 70, "run": 60, "plan": 25, "notebooks": 85}
PLANNED = ("sampling", "training", "run")
GRACE = 5.0  # seconds that a process gets to end by itself
UNFINISHED = ("waiting", "started")
PACKED = (".json", ".jsonl", ".csv", ".log")  # small files of a run: no weights, no data sets
LARGEST = 2_000_000  # bytes of a file that is packed
COLUMNS = ("phase", "variant", "status", "metric", "value", "reason")


@dataclass
class Settings:
    """What is measured. `model`, `data`: folders; `work`: the folder for logs and the run."""

    task: str
    model: str | None = None
    data: str | None = None
    device: str = "cuda"
    tiny: bool = False
    work: str = ""

    @classmethod
    def of(cls, model=None, data=None, task=None, **more) -> Settings:
        """Settings with paths that do not depend on the working directory."""
        model, data = (
            str(Path(path).expanduser().resolve()) if path else None for path in (model, data)
        )
        return cls(task or ("gsm8k" if data else "word_problems"), model, data, **more)


class Records:
    """The measurements of a phase: one line of JSON each, written as soon as it is known.

    A record has `variant`, `status` and, where known, `values` (numbers by name), `settings` and
    `reason`. The status is waiting, started, done, failed, not run, crashed or time limit. The
    variant "" stands for the phase as a whole.
    """

    def __init__(self, path: Path):
        self.path = path

    def write(self, variant: str, status: str, **more) -> None:
        line = json.dumps({"variant": variant, "status": status, **more})
        with self.path.open("a") as file:
            file.write(f"\n{line}")  # a line that a killed process left unfinished stays alone

    def read(self) -> dict[str, dict]:
        """The last record of each variant."""
        found = {}
        for line in self.path.read_text().splitlines() if self.path.exists() else []:
            with contextlib.suppress(ValueError):
                record = json.loads(line)
                found[record["variant"]] = record
        return found

    def finished(self) -> set[str]:
        """The variants that need no further measurement."""
        return {name for name, record in self.read().items() if record["status"] not in UNFINISHED}

    def measure(self, items) -> None:
        """Measure each (variant, function, settings) without a record; functions return `values`.

        An error is recorded as the reason, and the next variant is measured.
        """
        finished = self.finished()
        todo = [item for item in items if item[0] not in finished]
        for variant, _, settings in todo:
            self.write(variant, "waiting", settings=settings)
        for variant, function, settings in todo:
            self.write(variant, "started", settings=settings)
            try:
                values = {name: _rounded(value) for name, value in function().items()}
                self.write(variant, "done", settings=settings, values=values)
            except (ImportError, UserError) as error:
                self.write(variant, "not run", settings=settings, reason=reason_of(error))
            except Exception as error:  # whatever a library raises is a result
                traceback.print_exc()
                self.write(variant, "failed", settings=settings, reason=reason_of(error))
                if "CUDA error" in str(error):  # nothing works in this process any more
                    raise

    def close(self, status: str, reason: str) -> None:
        """Give the variants that have begun a status; those that wait keep theirs."""
        for variant, record in self.read().items():
            if record["status"] == "started":
                self.write(variant, status, **_details(record), reason=reason)


def _rounded(value):
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _details(record: dict) -> dict:
    return {k: v for k, v in record.items() if k not in ("variant", "status")}


def reason_of(error: BaseException) -> str:
    """The first line of an error, without the folder of this repository."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return _short(lines[0])


def _short(text: str) -> str:
    return text.replace(f"{ROOT}/", "")[:300]


def last_line(log: Path, word: str = "") -> str:
    """The last line of a log that contains `word`, or the last one, as a reason."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", log.read_text(errors="replace")) if log.exists() else ""
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["no message"]
    return _short(([line for line in lines if word in line] or lines)[-1])


def run_limited(words: list[str], seconds: float, log: Path, grace: float = GRACE, **options):
    """The exit status of a command, or None if it took longer; its processes are ended.

    Its output is added to `log`. options: of `subprocess.Popen`.
    """
    with log.open("a") as file:
        output = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(words, start_new_session=True, **output, **options)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        end(process, grace)


def end(process: subprocess.Popen, grace: float = GRACE) -> None:
    """End a process that leads a session, and what it started: SIGTERM, then SIGKILL."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(grace)


def measure(
    settings: Settings,
    out: str | Path = "figures",
    runs: str | Path = "runs",
    name: str | None = None,
    seconds: float = 480.0,
    only: list[str] = (),
) -> Report:
    """Measure all phases that are not finished, or those in `only` again, in `seconds` at most.

    `out`: folder of the results. `runs`: folder for logs and the run. Raises `UserError` without a
    GPU, for an unknown phase, and for results of another GPU or of other settings.
    """
    if unknown := sorted(set(only) - set(SHARES)):
        raise UserError(f"There is no phase {unknown[0]}. The phases are {', '.join(SHARES)}.")
    deadline = time.monotonic() + seconds
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        environment = find_environment(settings)
        name = name or re.sub(r"\W+", "_", (environment["gpus"] or ["cpu"])[0].lower())
        report = Report(settings, Path(out), Path(runs), name, environment)
        todo = {phase for phase in SHARES if phase in only or not (only or report.has(phase))}
        if todo & set(PLANNED):  # the plan is compared with what they measure
            todo.add("plan")
        todo = [phase for phase in SHARES if phase in todo]
        for i, phase in enumerate(todo):
            share = SHARES[phase] / sum(SHARES[other] for other in todo[i:])
            left = deadline - time.monotonic() - GRACE
            report.measure(phase, max(0.0, left * share), again=phase in (*only, "plan"))
        return report
    finally:
        signal.signal(signal.SIGTERM, before)


def find_environment(settings: Settings) -> dict:
    """Hardware, driver, versions and commit, from a separate process; `UserError` without a GPU."""
    with tempfile.TemporaryDirectory() as folder:
        records, log = Records(Path(folder) / "environment.jsonl"), Path(folder) / "log"
        _run_phase("environment", dataclasses.replace(settings, work=folder), 120.0, log)
        record = records.read().get("environment", {"reason": last_line(log)})
    if record.get("status") != "done":
        raise UserError(f"PyTorch does not work here: {record['reason']}.")
    environment = record["values"]
    if settings.device == "cuda" and not environment["gpus"]:
        raise UserError(
            f"PyTorch {environment['versions']['torch']} sees no CUDA GPU (driver: "
            f"{environment['driver']}). Compare the driver in `nvidia-smi` with the CUDA version "
            f"{environment['cuda']} of PyTorch, or add --device cpu --tiny."
        )
    return environment | {"command": " ".join(["python scripts/gpu_report.py", *sys.argv[1:]])}


def _run_phase(phase: str, settings: Settings, seconds: float, log: Path) -> int | None:
    """One process of a phase."""
    folders = [str(ROOT), str(ROOT / "scripts"), os.environ.get("PYTHONPATH", "")]
    changes = {"PYTHONPATH": os.pathsep.join(folders), "HF_HUB_OFFLINE": "1"}
    if settings.device == "cpu":
        changes["CUDA_VISIBLE_DEVICES"] = ""
    words = [*PROGRAM, phase, json.dumps(dataclasses.asdict(settings))]
    return run_limited(words, seconds, log, cwd=ROOT, env={**os.environ, **changes})


class Report:
    """The results in OUT/gpu_NAME.json (everything) and .csv (one row per number).

    The JSON has `settings`, `environment` and `phases`; each phase has its `status` (finished, not
    run, crashed, time limit, stopped), `reason`, `seconds`, `limit`, `commit`, and `records`. The
    small files of RUNS/gpu_NAME are packed in OUT/gpu_NAME_files.tar.gz.
    """

    def __init__(self, settings: Settings, out: Path, runs: Path, name: str, environment: dict):
        self.work = (runs / f"gpu_{name}").resolve()
        self.settings = dataclasses.replace(settings, work=str(self.work))
        self.environment, self.json_file = environment, out / f"gpu_{name}.json"
        self.phases = self._known()
        if not self.phases:  # files without results are of an older report
            shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir(parents=True, exist_ok=True)
        out.mkdir(parents=True, exist_ok=True)
        for phase, found in self.phases.items():
            if not self.records(phase).path.exists():  # made on another machine
                self._write_records(phase, found["records"])
        self.save()

    def _known(self) -> dict:
        """The phases of an earlier call; they must have been measured on the same terms."""
        if not self.json_file.exists():
            return {}
        found = json.loads(self.json_file.read_text())
        old = found["settings"] | {"GPU": found["environment"]["gpus"]}
        new = self._terms() | {"GPU": self.environment["gpus"]}
        if other := sorted(name for name in new if old[name] != new[name]):
            raise UserError(
                f"{self.json_file} was measured with another {', '.join(other)}. Choose another "
                "--name, or remove the file to measure everything again."
            )
        return found["phases"]

    def _terms(self) -> dict:
        return {k: v for k, v in dataclasses.asdict(self.settings).items() if k != "work"}

    def has(self, phase: str) -> bool:
        """Whether a phase is finished, so that it is not measured again."""
        return self.phases.get(phase, {}).get("status") == "finished"

    def records(self, phase: str) -> Records:
        return Records(self.work / f"{phase}.jsonl")

    def _write_records(self, phase: str, records: list[dict]) -> None:
        records_of_phase = self.records(phase)
        records_of_phase.path.unlink(missing_ok=True)
        for record in records:
            records_of_phase.write(record["variant"], record["status"], **_details(record))

    def measure(self, phase: str, seconds: float, again: bool = False) -> None:
        """Measure a phase; what an earlier call has measured is kept, except `again`."""
        records = self.records(phase)
        kept = [] if again else [r for r in records.read().values() if r["status"] == "done"]
        self._write_records(phase, kept)
        print(f"{phase}: {seconds:.0f} s at most ...", end=" ", flush=True)
        started, ended = time.monotonic(), ("stopped", "The report was interrupted.")
        try:
            ended = self._processes(phase, seconds)
        finally:
            records.close(ended[0], ended[1] or "")
            self.phases[phase] = {
                "status": ended[0],
                "reason": ended[1],
                "seconds": round(time.monotonic() - started, 1),
                "limit": round(seconds, 1),
                "commit": self.environment["commit"],
                "command": self.environment["command"],
                "records": [r for r in records.read().values() if r["variant"]],
            }
            self.save()
            print(f"{ended[0]}, {counts(self.phases[phase])}", flush=True)

    def _processes(self, phase: str, seconds: float) -> tuple[str, str | None]:
        """(status, reason) of a phase; a process that crashed is started again for the rest."""
        records, log = self.records(phase), self.work / f"{phase}.log"
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            before = records.finished()
            code = _run_phase(phase, self.settings, left, log)
            found = records.read()
            if code is None:
                break
            if code == 0:
                whole = found.pop("", {})
                return whole.get("status", "finished"), whole.get("reason")
            reason = f"exit status {code}: {last_line(log)}"
            records.close("crashed", reason)
            if records.finished() == before:
                return "crashed", reason
        return "time limit", f"The phase had {seconds:.0f} seconds."

    def save(self) -> None:
        """Write all files anew."""
        content = {"settings": self._terms(), "environment": self.environment}
        content["phases"] = self.phases
        _replace(self.json_file, (json.dumps(content, indent=1) + "\n").encode())
        table = io.StringIO()
        writer = csv.DictWriter(table, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for phase, found in self.phases.items():
            writer.writerows(rows_of(phase, found))
        _replace(self.json_file.with_suffix(".csv"), table.getvalue().encode())
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w:gz") as archive:
            for file in sorted(self.work.rglob("*")):
                if file.suffix in PACKED and file.stat().st_size <= LARGEST:
                    archive.add(file, file.relative_to(self.work.parent))
        archive_name = f"{self.json_file.stem}_files.tar.gz"
        _replace(self.json_file.with_name(archive_name), packed.getvalue())

    def table(self) -> str:
        """Each phase in a line."""
        lines = []
        for phase in SHARES:
            found = self.phases.get(phase, {"status": "not run", "reason": None, "records": []})
            line = f"{phase:10} {found['status']:10} {found.get('seconds', 0):6.0f} s  "
            lines.append(f"{line}{counts(found)}  {found['reason'] or ''}".rstrip())
        return "\n".join(lines)


def counts(found: dict) -> str:
    """How many measurements of a phase have which status, as text."""
    status = [record["status"] for record in found["records"]]
    return ", ".join(f"{status.count(name)} {name}" for name in dict.fromkeys(status)) or "nothing"


def rows_of(phase: str, found: dict) -> list[dict]:
    """The rows of a phase in the table: the phase itself, then every number and every failure."""
    head = {"phase": phase, "variant": "", "status": found["status"], "reason": found["reason"]}
    rows = [head | {"metric": "seconds", "value": found["seconds"]}]
    for record in found["records"]:
        row = {name: record.get(name) for name in ("variant", "status", "reason")}
        values = record.get("values") or {None: None}
        rows += [{"phase": phase, **row, "metric": k, "value": v} for k, v in values.items()]
    return rows


def _replace(file: Path, content: bytes) -> None:
    partial = file.with_name(f".{file.name}.partial")
    partial.write_bytes(content)
    partial.replace(file)
