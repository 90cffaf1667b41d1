"""Make notebooks/shipped_run from a finished run of the default profile.

    python scripts/ship_run.py runs/cpu                          # writes notebooks/shipped_run
    python scripts/ship_run.py runs/cpu --out /some/other/place

The notebooks read it, so that students do not have to wait for a run. It keeps all rows and columns:
the tables are compressed to a tenth of their size, and `datasets.load_from_disk` reads them as
before. It leaves out files that are in the repository already or follow from the others
(`LEFT_OUT`). The README.md of the copy says how the run was made.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

import pandas
import pyarrow as pa

from irpo_utils import UserError, profiles
from studies import api
from studies.api import MAY_CHANGE, checksums

ROOT = Path(__file__).resolve().parent.parent
PROFILE = "cpu"
LIMIT = 10_000_000  # bytes
NO_MATTER = ("seed", "dequantize", *MAY_CHANGE)  # packed weights are the same numbers
LEFT_OUT = {  # glob pattern: why
    "iteration_*/samples": "`graded` holds the same rows and their grades",
    "accuracy_*": "the figure of five such runs is in `figures/`",
    "evaluations": "evaluations made after the run",
    ".*": "the lock",
    "**/cache-*": "cache files of `datasets`",
}
MACHINE = re.compile(
    rb"(?<![\w.])/(?:home|root|Users|work|workspace|tmp|mnt|opt|srv|var|private)/|[A-Z]:\\\\"
)

README = """\
# A finished run of the default profile

The notebooks read this run if you have not made one yourself. It was made with

    {command}

in {minutes:.0f} minutes on {threads} thread(s) of an {cpu} ({gpus}), with Python {python}, {versions}, at commit {commit}. A + after
the commit means that the code had changes since then. The seed is {seed}; the other settings are in `profile.json`.

{table}

Accuracy in %, greedy and sampled, on {n} test questions, for one seed. [`figures/`](../../figures/LOG.md) has five seeds.

`python scripts/ship_run.py {run}` made this folder from the run directory. The tables hold all rows and columns. They are
compressed, and `datasets.load_from_disk` reads them. The configurations of the adapters name their base model by its short
name. These files are left out:

{left_out}
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="a finished run directory")
    parser.add_argument("--out", type=Path, default=ROOT / "notebooks" / "shipped_run")
    options = parser.parse_args()
    try:
        size = ship(options.run, options.out)
    except UserError as error:
        sys.exit(f"error: {error}")
    print(f"{options.out}: {size / 1e6:.1f} MB")


def ship(run: Path, out: Path) -> int:
    """Write the slim copy of `run` to `out`, whole or not at all; returns its size in bytes."""
    check(run)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".", dir=out.parent) as folder:
        copy = Path(folder) / out.name
        copy_files(run, copy)
        for sums in copy.rglob(checksums.NAME):
            renew(sums)
        (copy / "README.md").write_text(describe(run))
        (copy / ".gitignore").write_text(
            "cache-*\n"
        )  # `datasets` writes such files next to what it reads
        size = inspect(copy)
        shutil.rmtree(out, ignore_errors=True)
        copy.rename(out)
    return size


def check(run: Path) -> None:
    """Refuse a run that is not finished, not sound, or not of the default profile."""
    settings, default = api.load_profile(run), profiles.get(PROFILE)
    free = {name: getattr(default, name) for name in NO_MATTER}
    if dataclasses.replace(settings, **free) != default:
        raise UserError(
            f"{run} was not made with the profile {PROFILE}, which the notebooks' text describes. Make one with "
            f"`python -m irpo_utils run --profile {PROFILE} --out runs/{PROFILE}`."
        )
    needed = [
        run / "metrics.csv",
        run / "timing.csv",
        run / f"iteration_{settings.iterations}" / "metrics.json",
    ]
    if missing := [str(path) for path in needed if not path.exists()]:
        raise UserError(
            f"{run} is not finished: {', '.join(missing)} is missing. Run the command that made it again: it resumes."
        )
    damaged = [
        str(sums.parent)
        for sums in run.rglob(checksums.NAME)
        if checksums.read(sums.parent) is None
    ]
    if damaged:
        raise UserError(
            f"{', '.join(damaged)}: the checksums do not match. The command that made the run repairs it."
        )


def copy_files(run: Path, out: Path) -> None:
    """Every file that is not left out, slimmed, at the same place."""
    omitted = {path for pattern in LEFT_OUT for path in run.glob(pattern)}
    for file in sorted(path for path in run.rglob("*") if path.is_file()):
        if not omitted & {file, *file.parents}:
            place = out / file.relative_to(run)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(slim(file))


def slim(file: Path) -> bytes:
    """The content of a file as it is shipped."""
    if file.suffix == ".arrow":
        return compress(file)
    if (
        file.name == "adapter_config.json"
    ):  # it names the base by its place on the machine of the run
        config = json.loads(file.read_text())
        config["base_model_name_or_path"] = profiles.get(PROFILE).model
        return (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()
    return file.read_bytes()


def compress(file: Path) -> bytes:
    """The same table in one compressed batch."""
    table = pa.ipc.open_stream(file.read_bytes()).read_all().combine_chunks()
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression=pa.Codec("zstd", 19))
    with pa.ipc.new_stream(sink, table.schema, options=options) as writer:
        writer.write_table(table)
    content = sink.getvalue().to_pybytes()
    assert pa.ipc.open_stream(content).read_all().equals(table)
    return content


def renew(sums: Path) -> None:
    """Checksums of the files as they are shipped; the stage's seconds and tokens stay."""
    record = json.loads(sums.read_text())
    record["sha256"] = {name: checksums.of_file(sums.parent / name) for name in record["sha256"]}
    sums.write_text(json.dumps(record, indent=1))


def describe(run: Path) -> str:
    """The README of the shipped run."""
    settings, machine = (api.load_profile(run), json.loads((run / "environment.json").read_text()))
    metrics = pandas.read_csv(run / "metrics.csv")
    accuracy = metrics[metrics.metric.isin(["greedy", "sampled"])].pivot(
        index="iteration", columns="metric", values="value"
    )
    minutes = pandas.read_csv(run / "timing.csv").seconds.sum() / 60
    rows = [
        f"| M{t} | {100 * row.greedy:.1f} | {100 * row.sampled:.1f} |"
        for t, row in accuracy.iterrows()
    ]
    run = Path(os.path.relpath(run, ROOT))
    command = f"python -m irpo_utils run --profile {PROFILE} --seed {settings.seed} --out {run}"
    return README.format(
        command=machine.get("command") or command,
        run=run,
        seed=settings.seed,
        python=machine["python"],
        cpu=machine["processor"],
        threads=machine["threads"],
        gpus=", ".join(machine["gpus"]) or "no GPU",
        commit=machine["commit"],
        versions=", ".join(f"{name} {version}" for name, version in machine["versions"].items()),
        minutes=minutes,
        n=int(metrics[metrics.metric == "greedy"].n.max()),
        table="\n".join(["| | greedy | sampled |", "|---|---|---|", *rows]),
        left_out="\n".join(f"- `{pattern}`: {why}" for pattern, why in LEFT_OUT.items()),
    )


def inspect(folder: Path) -> int:
    """The size of all files; raises if it is too large or a file names a place on a machine."""
    contents = {
        file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()
    }
    named = [str(name) for name, content in contents.items() if MACHINE.search(content)]
    if named:
        raise UserError(f"These files name a folder of the machine: {', '.join(named)}.")
    size = sum(map(len, contents.values()))
    if size > LIMIT:
        raise UserError(
            f"The run takes {size / 1e6:.1f} MB, more than {LIMIT / 1e6:.0f} MB. Add to LEFT_OUT."
        )
    return size


if __name__ == "__main__":
    main()
