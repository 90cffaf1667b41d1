"""Break runs in every way that a rented machine knows, and count what held.

    python scripts/check_reliability.py kill      # SIGKILL at 30 random moments of a whole run of the default profile
    python scripts/check_reliability.py damage    # every file of a run directory with a byte flipped, and cut in half
    python scripts/check_reliability.py disk      # a disk that fills up (a small tmpfs) and a read-only mount; needs root
    python scripts/check_reliability.py long      # 20 iterations: memory, open files and threads
    python scripts/check_reliability.py faults    # the tests that inject a fault, counted by what they break

Each writes its rows into figures/reliability.csv (`test`, `tried`, `held`, `note`; other rows stay) and what made them
into reliability.json; `long` also writes figures/long_run.csv. `held` counts tries that ended as they should.
"""

from __future__ import annotations

import argparse
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
from pathlib import Path

from irpo_utils import checksums, iteration, profiles
from irpo_utils.__main__ import calm_libraries

COLUMNS = ("test", "tried", "held", "note")
TIMES = (
    "environment.json",
    "timing.csv",
    checksums.NAME,
    ".lock",
    "state.json",
    "dataset_info.json",
    "accuracy_per_iteration.json",
)  # differ between equal runs
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
FAULTS = {  # what is broken: the tests that do so
    "out of memory in sampling, training and scoring": [
        "test_sampling.py",
        "test_training.py",
        "test_models.py",
        "test_cli.py",
        "out_of_memory",
    ],
    "non-finite loss or gradients": ["test_training.py", "not_finite"],
    "a reference, pairs or questions that are not those of the run": [
        "test_training.py",
        "test_iteration.py",
        "test_contamination.py",
        "test_vllm_server.py",
        "reference_that_is_not or made_from_another or of_other_settings or behind or refused or not_whole",
    ],
    "a collapse is named while it happens": [
        "test_training.py",
        "test_iteration.py",
        "collapse or run_off",
    ],
    "two runs on one directory": ["test_iteration.py", "two_runs or another_process"],
    "a clock that is set back": [
        "test_iteration.py",
        "test_training.py",
        "clock or training_that_was_killed",
    ],
    "no network, a hub that does not answer, gated or absent models": ["test_hub.py", ""],
    "Ctrl-C": ["test_cli.py", "ctrl_c"],
    "one of two processes killed": ["test_processes.py", "dies"],
    "hostile questions and completions": [
        "test_hostile_input.py",
        "test_grading.py",
        "hostile or strange or escape or turn or ends or hundred_thousand or raise",
    ],
    "pickles, code of a model's own, truncated weights": [
        "test_models.py",
        "pickled or code_of_its_own or truncated",
    ],
}
PACKAGE = str(Path(__file__).resolve().parent.parent)


def content(run: Path) -> dict[str, str]:
    """Every file of a run by its checksum, times left out."""
    found = {}
    for path in sorted(run.rglob("*")):
        if (
            path.is_file()
            and path.name not in TIMES
            and "unfinished" not in str(path)
            and path.suffix not in (".png", ".svg")
        ):
            text = path.read_bytes()
            if path.suffix == ".jsonl":
                text = "\n".join(_without_seconds(line) for line in text.decode().splitlines())
            elif path.name == "summary.json":
                text = _without_seconds(text)
            found[str(path.relative_to(run))] = checksums.of_text(
                text if isinstance(text, str) else text.hex()
            )
    return found


def _without_seconds(text) -> str:
    return json.dumps({key: value for key, value in json.loads(text).items() if key != "seconds"})


def command(out: Path, **settings) -> list[str]:
    options = [
        word
        for name, value in settings.items()
        for word in (f"--{name.replace('_', '-')}", str(value))
    ]
    return [sys.executable, "-m", "irpo_utils", "run", "--quiet", "--out", str(out), *options]


def start(words: list[str], log) -> subprocess.Popen:
    return subprocess.Popen(
        words,
        stdout=log,
        stderr=log,
        env={**os.environ, "PYTHONPATH": PACKAGE},
        start_new_session=True,
    )


def kill(folder: Path, kills: int, seed: int, **settings) -> list[dict]:
    """A run that is killed without warning at random moments and started again each time, beside one that is not."""
    rng, log = random.Random(seed), (folder / "output.txt").open("w")
    whole, broken = folder / "whole", folder / "broken"
    began = time.perf_counter()
    if start(command(whole, **settings), log).wait():
        sys.exit(f"error: the unbroken run failed, see {log.name}")
    took, done, lost, places = time.perf_counter() - began, 0, 0.0, []
    shortest = 8.0  # to import and load, and at least something more
    began = time.perf_counter()
    while True:
        process = start(command(broken, **settings), log)
        longest = shortest + 2 * _left(broken, whole) / (
            kills - done + 3
        )  # so that they spread over all that is left
        try:
            status = process.wait(timeout=None if done >= kills else rng.uniform(shortest, longest))
            if status:
                sys.exit(
                    f"error: the broken run failed with status {status} after {done} kills, see {log.name}"
                )
            break
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            done += 1
            places.append(_where(broken))
            print(f"killed {done}: {places[-1]}", flush=True)
    lost = time.perf_counter() - began - took
    a, b = content(whole), content(broken)
    differing = sorted(name for name in {*a, *b} if a.get(name) != b.get(name))
    left = [str(path) for path in broken.rglob("*unfinished*")] + [
        str(path) for path in broken.rglob("*.partial")
    ]
    where = ", ".join(f"{places.count(place)} in {place}" for place in sorted(set(places)))
    note = (
        f"{len(a)} files equal to the unbroken run's; killed {where}; {took:.0f} s unbroken, "
        f"{lost / max(1, done):.0f} s more for each kill"
        if not differing and not left
        else f"differing: {differing[:5]}; left over: {left[:5]}"
    )
    if done < kills:
        note += f"; the run ended before kill {kills}"
    held = 0 if differing or left else done
    return [
        {
            "test": "SIGKILL at random moments, then resumed",
            "tried": kills,
            "held": held,
            "note": note,
        }
    ]


def _left(run: Path, whole: Path) -> float:
    """Seconds of the stages of `whole` that are not finished in `run`."""
    with (whole / "timing.csv").open() as file:
        return sum(
            float(row["seconds"])
            for row in csv.DictReader(file)
            if not (run / f"iteration_{row['iteration']}" / row["stage"]).exists()
        )


def _where(run: Path) -> str:
    """The stage that was in hand, as far as the files tell."""
    unfinished = sorted(run.glob("iteration_*/.*.unfinished"))
    if unfinished:
        return unfinished[-1].name.split(".")[1]
    return "start-up" if not list(run.glob("iteration_*")) else "another stage, or start-up"


def damage(folder: Path, seed: int) -> list[dict]:
    """Every file of a finished small run, once with a byte flipped and once cut in half; then the same command again."""
    profile, whole = profiles.get("cpu", **SMALL), folder / "whole"
    iteration.run(profile, whole, progress=False)
    expected, rng, rows = content(whole), random.Random(seed), []
    files = [
        path.relative_to(whole)
        for path in sorted(whole.rglob("*"))
        if path.is_file() and path.name != ".lock"
    ]
    for kind in ("a byte flipped", "cut in half"):
        held, notes = 0, []
        for name in files:
            run = folder / "damaged"
            shutil.rmtree(run, ignore_errors=True)
            shutil.copytree(whole, run)
            data = bytearray((run / name).read_bytes())
            if kind == "cut in half":
                data = data[: len(data) // 2]
            elif data:
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            (run / name).write_bytes(data)
            try:
                iteration.run(profile, run, progress=False)
                held += content(run) == expected
                notes += [] if content(run) == expected else [f"{name}: other results"]
            except iteration.UserError as error:
                held += 1
                notes.append(f"{name}: refused")
                assert str(name.name) in str(error) or "other settings" in str(error), error
        rows.append(
            {
                "test": f"every file of a run directory: {kind}",
                "tried": len(files),
                "held": held,
                "note": "; ".join(notes) or "all made again, or did not matter",
            }
        )
    return rows


def disk(folder: Path) -> list[dict]:
    """A tmpfs of a few sizes that fills up while a run writes, then is made larger; and a read-only mount."""
    rows, place = [], folder / "mount"
    place.mkdir()
    whole = folder / "whole"
    subprocess.run(
        command(whole, **SMALL),
        check=True,
        env={**os.environ, "PYTHONPATH": PACKAGE},
        capture_output=True,
    )
    expected, held, notes, sizes = content(whole), 0, [], (1, 100, 300, 600, 900, 1500, 2500)
    for kilobytes in sizes:
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(place)], check=True
        )
        try:
            first = _short(command(place / "run", **SMALL))
            clear = first.returncode == 0 or (
                first.returncode == 1
                and "Traceback" not in first.stderr
                and "space" in first.stderr
            )
            subprocess.run(["mount", "-o", "remount,size=200m", str(place)], check=True)
            second = _short(command(place / "run", **SMALL))
            good = clear and second.returncode == 0 and content(place / "run") == expected
            held += good
            notes += (
                []
                if good
                else [
                    f"{kilobytes} kB: {first.returncode}, {second.returncode}: {first.stderr[-200:]}"
                ]
            )
        finally:
            subprocess.run(["umount", str(place)], check=True)
    rows.append(
        {
            "test": "a disk that fills up, made larger afterwards",
            "tried": len(sizes),
            "held": held,
            "note": "; ".join(notes) or "one clear error each, then the same results as without",
        }
    )
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=10m", "tmpfs", str(place)], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
        failed = _short(command(place / "run", **SMALL))
        clear = (
            failed.returncode == 1
            and "Traceback" not in failed.stderr
            and "read-only" in failed.stderr.lower()
        )
    finally:
        subprocess.run(["umount", str(place)], check=True)
    return rows + [
        {
            "test": "a read-only folder",
            "tried": 1,
            "held": int(clear),
            "note": failed.stderr.strip()[-400:].replace(f"{place}/", ""),
        }
    ]


def _short(words: list[str]) -> subprocess.CompletedProcess:
    return subprocess.run(
        words, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": PACKAGE}
    )


def long(folder: Path, iterations: int) -> list[dict]:
    """Many iterations in one process, with its memory, open files and threads after each."""
    import pandas

    from irpo_utils import plots

    rows, report = [], iteration._Loop._report

    def noted(self, t, *arguments):
        report(self, t, *arguments)
        status = dict(
            line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines()
        )
        rows.append(
            {
                "iteration": t,
                "memory_mb": int(status["VmRSS"].split()[0]) / 1024,
                "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
                "files": len(os.listdir("/proc/self/fd")),
                "threads": threading.active_count(),
                "system_threads": int(status["Threads"]),
            }
        )

    iteration._Loop._report = noted
    try:
        settings = SMALL | {"iterations": iterations, "n_questions": 120, "learning_rate": 2e-5}
        iteration.run(profiles.get("cpu", **settings), folder / "long", progress=False)
    finally:
        iteration._Loop._report = report
    table = pandas.DataFrame(rows)
    table.to_csv(FIGURES / "long_run.csv", index=False)
    half = table[table.iteration >= 2]
    growth = {
        name: half[name].iloc[-3:].mean() - half[name].iloc[:3].mean()
        for name in ("memory_mb", "files", "system_threads")
    }
    flat = growth["memory_mb"] < 100 and growth["files"] <= 2 and growth["system_threads"] <= 2
    return [
        {
            "test": f"{iterations} iterations in one process: memory, open files, threads",
            "tried": iterations,
            "held": iterations if flat else 0,
            "note": f"from the third iteration to the last: memory {growth['memory_mb']:+.0f} MB of {table.memory_mb.iloc[-1]:.0f}, "
            f"open files {growth['files']:+.0f}, threads {growth['system_threads']:+.0f}; see long_run.csv",
        }
    ]


def faults(folder: Path) -> list[dict]:
    """The tests that inject a fault, by what they break; `held` are those that passed."""
    import xml.etree.ElementTree as xml

    rows = []
    for name, (*files, words) in FAULTS.items():
        result = folder / "result.xml"
        result.unlink(missing_ok=True)
        subprocess.run(
            [
                sys.executable,
                "-m",
                "pytest",
                "-q",
                f"--junit-xml={result}",
                "-k",
                words,
                *(f"tests/{f}" for f in files),
            ],
            cwd=PACKAGE,
            capture_output=True,
        )
        cases = list(xml.parse(result).iter("testcase"))
        skipped = [case for case in cases if case.find("skipped") is not None]
        failed = [
            case.get("name")
            for case in cases
            if case.find("failure") is not None or case.find("error") is not None
        ]
        tried = len(cases) - len(skipped)
        if not tried:
            sys.exit(f"error: no test ran for {name!r}: {words!r} in {', '.join(files)}")
        note = f"failed: {', '.join(failed)}" if failed else f"tests in {', '.join(files)}"
        rows.append(
            {
                "test": f"injected: {name}",
                "tried": tried,
                "held": tried - len(failed),
                "note": note + f"; {len(skipped)} skipped here" * bool(skipped),
            }
        )
    return rows


def save(rows: list[dict], what: str, record: dict) -> None:
    """Put the rows into reliability.csv in the place of those of the same tests."""
    table, records = FIGURES / "reliability.csv", FIGURES / "reliability.json"
    old = list(csv.DictReader(table.open())) if table.exists() else []
    new = [row for row in old if row["test"] not in {row["test"] for row in rows}] + rows
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(new)
    known = json.loads(records.read_text()) if records.exists() else {}
    records.write_text(json.dumps({**known, what: record}, indent=1) + "\n")


def main() -> None:
    global FIGURES
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("kill", "damage", "disk", "long", "faults"))
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--iterations", type=int, default=20, help="of the long run")
    parser.add_argument(
        "--small",
        action="store_true",
        help="kill a run of the profile smoke: for a look, or a test",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("figures"))
    options = parser.parse_args()
    FIGURES, began = options.out, time.perf_counter()
    calm_libraries()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = {
            "kill": lambda: kill(
                folder, options.kills, options.seed, profile="smoke" if options.small else "cpu"
            ),
            "damage": lambda: damage(folder, options.seed),
            "disk": lambda: disk(folder),
            "long": lambda: long(folder, options.iterations),
            "faults": lambda: faults(folder),
        }[options.what]()
    save(
        rows,
        options.what,
        {
            "seed": options.seed,
            "seconds": round(time.perf_counter() - began),
            **iteration.environment(),
        },
    )
    for row in rows:
        print(f"{row['test']}: {row['held']} of {row['tried']}. {row['note']}")
    if any(row["held"] != row["tried"] for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
