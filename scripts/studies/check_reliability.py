"""Break runs in the ways that rented machines break them, and count how often a run survived.

    python scripts/studies/check_reliability.py kill     # SIGKILL at 30 random moments of a run
    python scripts/studies/check_reliability.py damage   # flip a byte of every file, cut it in half
    python scripts/studies/check_reliability.py disk     # full and read-only disks; needs root
    python scripts/studies/check_reliability.py long     # 20 iterations: memory, files, threads
    python scripts/studies/check_reliability.py faults   # the tests that inject a fault

Each adds its rows to figures/reliability.csv (`test`, `tried`, `held`, `note`) and how they were
made to reliability.json; `long` also writes long_run.csv. `held` counts the tries that ended as
they should.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import xml.etree.ElementTree as xml
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))
from irpo_utils import UserError, profiles
from studies import api
from studies.api import checksums

COLUMNS = ("test", "tried", "held", "note")
TIMES = (  # files that differ between equal runs
    "environment.json",
    "timing.csv",
    checksums.NAME,
    ".lock",
    "state.json",
    "dataset_info.json",
    "accuracy_per_iteration.json",
)
SMALL = dict(
    iterations=1,
    n_questions=24,
    n_samples=4,
    k_pairs=2,
    n_eval_questions=20,
    eval_samples=2,
    eval_samples_ends=2,
    learning_rate=1e-4,
)
FAULTS = {  # what is broken: files of tests, and words that select some of their tests
    "out of memory in sampling, training and scoring": [
        "core/test_sampling.py",
        "core/test_models.py",
        "test_long_training.py",
        "test_cli.py",
        "out_of_memory",
    ],
    "non-finite loss or gradients": ["core/test_training.py", "not_finite"],
    "a reference, pairs or questions that are not those of the run": [
        "core/test_training.py",
        "test_run.py",
        "test_contamination.py",
        "test_vllm_server.py",
        "reference_that_is_not or made_from_another or of_other_settings or behind or refused "
        "or not_whole",
    ],
    "a collapse is named while it happens": ["test_long_training.py", "test_run.py", "collapse"],
    "two runs on one directory": ["test_run.py", "two_runs"],
    "a clock that is set back": [
        "test_run.py",
        "test_long_training.py",
        "clock or training_that_was_killed",
    ],
    "no network, a hub that does not answer, gated or absent models": ["test_hub.py", ""],
    "Ctrl-C": ["test_cli.py", "interrupt"],
    "one of two processes killed": ["test_processes.py", "dies"],
    "hostile questions and completions": [
        "test_hostile_input.py",
        "test_grading.py",
        "hostile or strange or escape or turn or ends or hundred_thousand or raise",
    ],
    "pickles, code of a model's own, truncated weights": [
        "core/test_models.py",
        "test_export.py",
        "test_hub.py",
        "pickled or code_of_its_own or truncated",
    ],
}
ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


def content(run: Path) -> dict[str, str]:
    """The checksum of every file of a run, without what depends on time."""
    found = {}
    for path in sorted(run.rglob("*")):
        ignored = path.name in TIMES or "unfinished" in str(path)
        if not path.is_file() or ignored or path.suffix in (".png", ".svg"):
            continue
        if path.suffix == ".jsonl" or path.name == "summary.json":
            rows = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
            text = "\n".join(_without_seconds(row) for row in rows)
        else:
            text = path.read_bytes().hex()
        found[str(path.relative_to(run))] = checksums.of_text(text)
    return found


def _without_seconds(text: str) -> str:
    return json.dumps({key: value for key, value in json.loads(text).items() if key != "seconds"})


def row(test: str, tried: int, held: int, note: str) -> dict:
    return {"test": test, "tried": tried, "held": int(held), "note": note}


def command(out: Path, **settings) -> list[str]:
    options = [
        word
        for name, value in settings.items()
        for word in (f"--{name.replace('_', '-')}", str(value))
    ]
    return [sys.executable, "-m", "irpo_utils", "run", "--quiet", "--out", str(out), *options]


def start(words: list[str], log) -> subprocess.Popen:
    output = {"stdout": log, "stderr": log}
    return subprocess.Popen(words, env=ENVIRONMENT, start_new_session=True, **output)


def finish(words: list[str]) -> subprocess.CompletedProcess:
    return subprocess.run(words, capture_output=True, text=True, env=ENVIRONMENT)


def kill(folder: Path, kills: int, seed: int, profile: str) -> list[dict]:
    """A run that is killed at random moments and resumed, next to one that is not killed."""
    log = (folder / "output.txt").open("w")
    whole, broken = folder / "whole", folder / "broken"
    began = time.perf_counter()
    if start(command(whole, profile=profile), log).wait():
        sys.exit(f"error: the run without kills failed, see {log.name}")
    took = time.perf_counter() - began
    began = time.perf_counter()
    places = _kill_and_resume(broken, whole, kills, random.Random(seed), profile, log)
    lost = time.perf_counter() - began - took
    a, b = content(whole), content(broken)
    differing = sorted(name for name in {*a, *b} if a.get(name) != b.get(name))
    left = [str(path) for name in ("unfinished", "partial") for path in broken.rglob(f"*{name}*")]
    where = ", ".join(f"{places.count(place)} in {place}" for place in sorted(set(places)))
    note = (
        f"{len(a)} files equal to those of the run without kills; killed {where}; {took:.0f} s "
        f"without kills, {lost / max(1, len(places)):.0f} s more for each kill"
    )
    if differing or left:
        note = f"differing: {differing[:5]}; left over: {left[:5]}"
    if len(places) < kills:
        note += f"; the run ended before kill {kills}"
    held = 0 if differing or left else len(places)
    return [row("SIGKILL at random moments, then resumed", kills, held, note)]


def _kill_and_resume(run: Path, whole: Path, kills: int, rng, profile: str, log) -> list[str]:
    """Resume `run` after each kill until it is finished; returns what it did when it was killed."""
    shortest = 8.0  # seconds to import and load, and for something more
    places = []
    while True:
        process = start(command(run, profile=profile), log)
        # Kills are spread over all that is left of the run.
        longest = shortest + 2 * _left(run, whole) / (kills - len(places) + 3)
        timeout = None if len(places) >= kills else rng.uniform(shortest, longest)
        try:
            status = process.wait(timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            places.append(_where(run))
            print(f"killed {len(places)}: {places[-1]}", flush=True)
            continue
        if status:
            sys.exit(f"error: the run failed after {len(places)} kills, see {log.name}")
        return places


def _left(run: Path, whole: Path) -> float:
    """Seconds of the stages of `whole` that are not finished in `run`."""
    with (whole / "timing.csv").open() as file:
        return sum(
            float(row["seconds"])
            for row in csv.DictReader(file)
            if not (run / f"iteration_{row['iteration']}" / row["stage"]).exists()
        )


def _where(run: Path) -> str:
    """The stage that a run was in, as far as its files tell."""
    unfinished = sorted(run.glob("iteration_*/.*.unfinished"))
    if unfinished:
        return unfinished[-1].name.split(".")[1]
    return "another stage, or start-up" if list(run.glob("iteration_*")) else "start-up"


def damage(folder: Path, seed: int) -> list[dict]:
    """Damage each file of a finished run, and give the same command again."""
    profile, whole, run = profiles.get("cpu", **SMALL), folder / "whole", folder / "damaged"
    api.run(profile, whole, progress=False)
    expected, rng, rows = content(whole), random.Random(seed), []
    files = [path.relative_to(whole) for path in sorted(whole.rglob("*")) if path.is_file()]
    files = [name for name in files if name.name != ".lock"]
    for kind in ("a byte flipped", "cut in half"):
        held, notes = 0, []
        for name in files:
            shutil.rmtree(run, ignore_errors=True)
            shutil.copytree(whole, run)
            data = bytearray((run / name).read_bytes())
            if kind == "cut in half":
                data = data[: len(data) // 2]
            elif data:
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            (run / name).write_bytes(data)
            good, note = _repeat(profile, run, name, expected)
            held += good
            notes += [f"{name}: {note}"] if note else []
        note = "; ".join(notes) or "all made again, or did not matter"
        rows.append(row(f"every file of a run directory: {kind}", len(files), held, note))
    return rows


def _repeat(profile, run: Path, name: Path, expected: dict) -> tuple[bool, str]:
    """Run a damaged directory again: (whether it ended as it should, a note)."""
    try:
        api.run(profile, run, progress=False)
    except UserError as error:
        named = name.name in str(error) or "other settings" in str(error)
        return named, "refused"
    same = content(run) == expected
    return same, "" if same else "other results"


def disk(folder: Path) -> list[dict]:
    """A tmpfs that fills up while a run writes, then is made larger; and a read-only mount."""
    place, whole = folder / "mount", folder / "whole"
    place.mkdir()
    if finish(command(whole, **SMALL)).returncode:
        sys.exit("error: the run on a disk with space failed")
    expected, held, notes, sizes = content(whole), 0, [], (1, 100, 300, 600, 900, 1500, 2500)
    for kilobytes in sizes:
        with _mounted(place, f"{kilobytes}k"):
            first = finish(command(place / "run", **SMALL))
            clear = first.returncode == 0 or _says(first, "space")
            _mount("-o", "remount,size=200m", str(place))
            second = finish(command(place / "run", **SMALL))
            good = clear and second.returncode == 0 and content(place / "run") == expected
        held += good
        if not good:
            codes = f"{first.returncode}, {second.returncode}"
            notes.append(f"{kilobytes} kB: {codes}: {first.stderr[-200:]}")
    note = "; ".join(notes) or "one clear error each, then the same results as without"
    full = row("a disk that fills up, made larger afterwards", len(sizes), held, note)
    with _mounted(place, "10m"):
        _mount("-o", "remount,ro", str(place))
        failed = finish(command(place / "run", **SMALL))
    note = failed.stderr.strip()[-400:].replace(f"{place}/", "")
    return [full, row("a read-only folder", 1, _says(failed, "read-only"), note)]


def _says(done: subprocess.CompletedProcess, text: str) -> bool:
    """Whether a command ended with one clear error that has this text."""
    message = done.stderr.lower()
    return done.returncode == 1 and "traceback" not in message and text in message


def _mount(*words: str) -> None:
    subprocess.run(["mount", *words], check=True)


@contextlib.contextmanager
def _mounted(place: Path, size: str):
    """A tmpfs of that size at `place`."""
    _mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place))
    try:
        yield
    finally:
        subprocess.run(["umount", str(place)], check=True)


def long(folder: Path, iterations: int, out: Path) -> list[dict]:
    """Many iterations in one process, with its memory, open files and threads after each."""
    import pandas

    settings = SMALL | {"iterations": iterations, "n_questions": 120, "learning_rate": 2e-5}
    rows, run, over = [], folder / "long", threading.Event()

    def watch():
        """Note the state of the process whenever another iteration has its metrics."""
        while not over.wait(0.1):
            t = len(rows)
            if (run / f"iteration_{t}" / "metrics.json").exists():
                rows.append({"iteration": t, **_process_state()})

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        api.run(profiles.get("cpu", **settings), run, progress=False)
        time.sleep(1)
    finally:
        over.set()
        watcher.join()
    table = pandas.DataFrame(rows)
    table.to_csv(out / "long_run.csv", index=False)
    names = ["memory_mb", "files", "system_threads"]
    later = table.loc[table.iteration >= 2, names]
    growth = later.iloc[-3:].mean() - later.iloc[:3].mean()
    flat = growth.memory_mb < 100 and growth.files <= 2 and growth.system_threads <= 2
    note = (
        f"from the third iteration to the last: memory {growth.memory_mb:+.0f} MB of "
        f"{table.memory_mb.iloc[-1]:.0f}, open files {growth.files:+.0f}, threads "
        f"{growth.system_threads:+.0f}; see long_run.csv"
    )
    test = f"{iterations} iterations in one process: memory, open files, threads"
    return [row(test, iterations, iterations if flat else 0, note)]


def _process_state() -> dict:
    lines = Path("/proc/self/status").read_text().splitlines()
    status = dict(line.split(":", 1) for line in lines)
    return {
        "memory_mb": int(status["VmRSS"].split()[0]) / 1024,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "files": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
        "system_threads": int(status["Threads"]),
    }


def faults(folder: Path) -> list[dict]:
    """The tests that inject a fault, by what they break; `held` are those that passed."""
    rows, result = [], folder / "result.xml"
    for name, (*files, words) in FAULTS.items():
        result.unlink(missing_ok=True)
        command = [sys.executable, "-m", "pytest", "-q", f"--junit-xml={result}", "-k", words]
        command += [f"tests/{file}" for file in files]
        subprocess.run(command, cwd=ROOT, capture_output=True)
        cases = list(xml.parse(result).iter("testcase"))
        kinds = [{child.tag for child in case} for case in cases]
        failed = [
            case.get("name")
            for case, kind in zip(cases, kinds, strict=True)
            if kind & {"failure", "error"}
        ]
        skipped = sum("skipped" in kind for kind in kinds)
        tried = len(cases) - skipped
        if not tried:
            sys.exit(f"error: no test ran for {name!r}: {words!r} in {', '.join(files)}")
        note = f"failed: {', '.join(failed)}" if failed else f"tests in {', '.join(files)}"
        if skipped:
            note += f"; {skipped} skipped here"
        rows.append(row(f"injected: {name}", tried, tried - len(failed), note))
    return rows


def save(rows: list[dict], what: str, record: dict, out: Path) -> None:
    """Put the rows into reliability.csv, instead of those of the same tests."""
    table, records = out / "reliability.csv", out / "reliability.json"
    old = list(csv.DictReader(table.open())) if table.exists() else []
    replaced = {new["test"] for new in rows}
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows([each for each in old if each["test"] not in replaced] + rows)
    known = json.loads(records.read_text()) if records.exists() else {}
    records.write_text(json.dumps({**known, what: record}, indent=1) + "\n")


def check(options, folder: Path) -> list[dict]:
    """The rows of one of the checks."""
    if options.what == "kill":
        profile = "smoke" if options.small else "cpu"
        return kill(folder, options.kills, options.seed, profile)
    if options.what == "damage":
        return damage(folder, options.seed)
    if options.what == "disk":
        return disk(folder)
    if options.what == "long":
        return long(folder, options.iterations, options.out)
    return faults(folder)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("what", choices=("kill", "damage", "disk", "long", "faults"))
    add("--kills", type=int, default=30)
    add("--iterations", type=int, default=20, help="of the long run")
    add("--small", action="store_true", help="kill a run of the profile smoke, to try it out")
    add("--seed", type=int, default=0)
    add("--out", type=Path, default=Path("figures"))
    options = parser.parse_args()
    began = time.perf_counter()
    api.quiet_libraries()
    with tempfile.TemporaryDirectory() as name:
        rows = check(options, Path(name))
    seconds = round(time.perf_counter() - began)
    record = {"seed": options.seed, "seconds": seconds, **api.environment()}
    save(rows, options.what, record, options.out)
    for each in rows:
        print(f"{each['test']}: {each['held']} of {each['tried']}. {each['note']}")
    if any(each["held"] != each["tried"] for each in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
