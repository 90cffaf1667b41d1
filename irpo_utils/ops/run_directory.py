"""The folder of a run: paths, checksums, resumption. It knows nothing of what the artefacts mean.

Each artefact is written beside its place, gets a list of checksums and of what it was made from, and is moved in whole. A
stage whose artefact is there, sound, and made from what is there now, is not done again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import torch
from safetensors import SafetensorError
from tqdm.auto import tqdm

from irpo_utils import UserError, checksums, processes
from irpo_utils.profiles import MAY_CHANGE, Profile


MACHINE = (
    "python",
    "versions",
    "system",
    "processor",
    "gpus",
    "world_size",
    "commit",
)  # what a run may be gone on with on another
SETTINGS = (
    "settings"  # among the inputs in an artefact's record, beside the folders that it was made from
)


class RunDirectory:
    """Paths, checksums and resumption; knows nothing of what the artefacts mean."""

    def __init__(self, out: str | Path, profile: Profile):
        self.path = Path(out)
        self.profile = profile
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _disk_error(self.path, error) from error

    def check_profile(self) -> None:
        """Write profile.json and environment.json, or compare with what is there if anything was made with it.

        Only who holds the lock may call this: another process would rewrite the settings of a run in progress.
        """
        path, new = self.path / "profile.json", dataclasses.asdict(self.profile)
        if not any(self.path.glob("iteration_*/*")):
            self.write_file(path, json.dumps(new, indent=1) + "\n")
            self.write_file(
                self.path / "environment.json", json.dumps(environment(), indent=1) + "\n"
            )
            return
        try:
            old = dataclasses.asdict(
                Profile(**json.loads(path.read_text()))
            )  # fields that came later: their defaults
        except (OSError, ValueError, TypeError) as error:
            raise UserError(
                f"{path} is missing or damaged, so that there is no telling what the iterations in {self.path} "
                "were made with. Put it back, or choose another --out."
            ) from error
        differing = [
            f"{key} ({old.get(key)!r} there, {new.get(key)!r} now)"
            for key in sorted({*old, *new})
            if old.get(key) != new.get(key) and key not in MAY_CHANGE
        ]
        if differing:
            raise UserError(
                f"{self.path} was made with other settings: {', '.join(differing)}. Choose another --out, or "
                "give the same settings to go on with it."
            )
        if old != new:
            self.write_file(path, json.dumps(new, indent=1) + "\n")
        path, now = self.path / "environment.json", environment()
        try:
            record = dict(json.loads(path.read_text()))
        except (OSError, ValueError, TypeError):
            record = {
                **now,
                "note": "the record of where this run was begun was lost; this is where it was gone on with",
            }
            self.write_file(path, json.dumps(record, indent=1) + "\n")
        others = record.get("gone_on_with", [])
        if not is_whole(self.path) and all(
            any(one.get(name) != now[name] for name in MACHINE) for one in (record, *others)
        ):
            self.write_file(
                path, json.dumps(record | {"gone_on_with": [*others, now]}, indent=1) + "\n"
            )

    def inputs(self) -> dict[str, str | None]:
        """What tells the model and the questions of this run from others of the same name, as far as that is known."""
        path = self.path / "inputs.json"
        if not path.exists():
            return {}
        try:
            return dict(json.loads(path.read_text()))
        except (ValueError, TypeError) as error:
            raise UserError(
                f"{path} is damaged, so that there is no telling whether model and questions are still the same. "
                "Put it back, remove it if you are sure, or choose another --out."
            ) from error

    def check_inputs(self, inputs: dict[str, str | None]) -> None:
        """Write inputs.json, or refuse to go on with another model or other questions under the same name."""
        path, old = self.path / "inputs.json", self.inputs()
        for name, value in inputs.items():
            if old.get(name) and value and old[name] != value:
                raise UserError(
                    f"The {name} of {self.path} changed since it was begun (what lies behind --model or --data is not "
                    "the same any more). Put it back as it was, or choose another --out."
                )
        if old != inputs:
            self.write_file(path, json.dumps(inputs, indent=1) + "\n")

    def warn(self, t: int, stage: str, text: str) -> None:
        """A line in iteration_t/warnings.jsonl, once."""
        path, line = (
            self.folder(t) / "warnings.jsonl",
            json.dumps({"stage": stage, "warning": text}) + "\n",
        )
        lines = path.read_text(errors="replace") if path.exists() else ""
        if line not in lines:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.write_file(path, lines + line)

    def lock(self):
        """One process at a time; the lock goes away with the process, also when it is killed."""
        from filelock import FileLock, Timeout

        if not processes.is_first():
            return contextlib.nullcontext()
        lock = FileLock(self.path / ".lock")
        try:
            return lock.acquire(timeout=0)
        except Timeout as error:
            raise UserError(
                f"{self.path} is in use by another run. Wait for it, or choose another --out."
            ) from error
        except OSError as error:
            raise _disk_error(self.path, error) from error

    def folder(self, t: int) -> Path:
        return self.path / f"iteration_{t}"

    def unfinished(self, t: int, name: str, of: tuple[Path, ...] = ()) -> Path:
        """Where a stage that works on `of` keeps what it has so far, in folders with checksums, until the artefact is there."""
        return (
            self.folder(t)
            / f".{name}.{checksums.of_text(json.dumps(self._digests(of)))[:8]}.unfinished"
        )

    def _digests(self, of: tuple[Path, ...]) -> dict[str, str]:
        return {str(folder.relative_to(self.path)): checksums.digest(folder) for folder in of}

    def stage(
        self,
        t: int,
        name: str,
        make,
        save,
        of: tuple[Path, ...] = (),
        settings: dict | None = None,
        tokens=lambda content: None,
    ) -> Path:
        """The folder of an artefact, made by `save(make(), folder)` unless it is there, sound, and made from `of` as they are.

        `settings`: all else that the artefact depends on. It is in its record, so that one from the directory of another run is
        not taken for this run's.
        """
        place, kept, inputs = self.folder(t) / name, self.unfinished(t, name, of), self._digests(of)
        if settings:
            inputs[SETTINGS] = checksums.of_text(json.dumps(settings, sort_keys=True))
        if processes.from_first(lambda: self._is_there(place, inputs)):
            return place
        started = time.perf_counter() - _seconds_spent(kept)
        content = make()
        processes.wait()  # others may still read what lies in `kept`
        if processes.is_first():
            self._keep(
                place,
                save,
                content,
                {
                    "seconds": round(time.perf_counter() - started, 3),
                    "tokens": tokens(content),
                    "inputs": inputs,
                },
            )
        processes.wait()
        return place

    @staticmethod
    def _is_there(place: Path, inputs: dict[str, str]) -> bool:
        """Whether an artefact is sound and made from `inputs`; says so where there is one that is not."""
        record = checksums.read(place)
        known = (record or {}).get(
            "inputs", inputs
        )  # records of earlier versions have no settings, or no inputs at all
        if record and {SETTINGS: inputs.get(SETTINGS), **known} == {SETTINGS: None, **inputs}:
            return True
        if place.exists():
            other = [
                "set of settings" if name == SETTINGS else name
                for name in inputs
                if known.get(name, "") != inputs[name]
            ]
            tqdm.write(
                f"{place} was made from another {' and '.join(other)} than there is now, and is made again."
                if record
                else f"{place} is damaged (its checksums do not match) and is made again."
            )
        return False

    @staticmethod
    def _keep(place: Path, save, content, record: dict) -> None:
        """Write an artefact beside its place and move it in whole."""
        partial = place.with_name(f".{place.name}.partial")
        try:
            for leftover in (partial, place):
                shutil.rmtree(leftover, ignore_errors=True)
            partial.mkdir(parents=True)
            save(content, partial)
            checksums.write(partial, record)
            os.replace(partial, place)
            for folder in place.parent.glob(f".{place.name}.*unfinished"):
                shutil.rmtree(folder, ignore_errors=True)
        except (
            OSError,
            SafetensorError,
        ) as error:  # safetensors reports a full disk in an error of its own
            shutil.rmtree(partial, ignore_errors=True)
            raise _disk_error(place, error) from error

    def write_file(self, path: Path, text: str) -> None:
        """Write a small file whole or not at all; of several processes the first does."""
        if not processes.is_first():
            return
        try:
            self._write(path, text)
        except OSError as error:
            raise _disk_error(path, error) from error

    @staticmethod
    def _write(path: Path, text: str) -> None:
        partial = path.with_name(f".{path.name}.partial")
        try:
            partial.write_text(text)
            os.replace(partial, path)
        except OSError:
            partial.unlink(missing_ok=True)
            raise

    def keep_file(self, path: Path, text: str) -> None:
        """Write a small file, unless it says so already."""
        if not path.exists() or path.read_bytes() != text.encode():
            self.write_file(path, text)

    def metrics(self, iterations) -> list[dict]:
        return [
            row
            for t in iterations
            for row in json.loads((self.folder(t) / "metrics.json").read_text())
        ]

    def write_tables(self, iterations) -> None:
        """metrics.csv and timing.csv from what the iterations hold."""
        import pandas

        if not processes.is_first():
            return

        self.write_file(
            self.path / "metrics.csv",
            pandas.DataFrame(self.metrics(iterations)).to_csv(index=False),
        )
        rows = []
        for t in iterations:
            for sums in sorted(self.folder(t).glob(f"*/{checksums.NAME}")):
                try:
                    record = json.loads(sums.read_text())
                    rows.append(
                        {
                            "iteration": t,
                            "stage": sums.parent.name,
                            "seconds": record["seconds"],
                            "tokens": record["tokens"],
                        }
                    )
                except (ValueError, KeyError, TypeError):
                    continue  # damaged: that stage is made again, and then this table
        self.write_file(self.path / "timing.csv", pandas.DataFrame(rows).to_csv(index=False))


def is_whole(run: Path) -> bool:
    """Whether a run has all its iterations, sound, made from one another as they are now, and in its table."""
    import pandas

    try:
        iterations = range(json.loads((run / "profile.json").read_text())["iterations"] + 1)
        for t in iterations:
            json.loads((run / f"iteration_{t}" / "metrics.json").read_text())
        listed = set(pandas.read_csv(run / "metrics.csv").iteration)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    names = ("evaluation", "adapter")
    needed = {
        run / f"iteration_{t}" / name for t in iterations for name in names[: 1 + (t > 0)]
    }  # M_0 may have no adapter
    others = {sums.parent for sums in run.glob(f"iteration_*/*/{checksums.NAME}")}
    records = {folder: checksums.read(folder) for folder in needed | others}
    sources = {
        source: value
        for record in records.values()
        for source, value in (record or {}).get("inputs", {}).items()
    }
    sources.pop(SETTINGS, None)
    return (
        listed == set(iterations)
        and all(records.values())
        and all(checksums.digest(run / source) == value for source, value in sources.items())
    )


def environment() -> dict:
    """Versions, hardware and commit, to stand beside every result."""
    names = (
        "torch",
        "transformers",
        "trl",
        "peft",
        "bitsandbytes",
        "datasets",
        "accelerate",
        "numpy",
    )
    versions = {name: _version(name) for name in names}
    gpu = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "command": _command(),
        "python": platform.python_version(),
        "versions": versions,
        "system": platform.system(),
        "processor": _processor(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": gpu,
        "world_size": processes.count(),
        "commit": _commit(),
    }


def _command() -> str:
    """The command line of this process, without the place where Python or the package lies."""
    program = Path(sys.argv[0])
    name = "python -m irpo_utils" if program.name == "__main__.py" else f"python {program.name}"
    return " ".join([name, *sys.argv[1:]])


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """The commit of the checkout that this package lies in, with "+" where files were changed since."""

    def git(*words):
        return subprocess.run(
            ["git", "-C", str(Path(__file__).parent), *words],
            capture_output=True,
            text=True,
            timeout=10,
        )

    try:
        head, status = (
            git("rev-parse", "--short=12", "HEAD"),
            git("status", "--porcelain", "--untracked-files=no"),
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return (
        head.stdout.strip() + ("+" if status.stdout.strip() else "")
        if head.returncode == 0
        else None
    )


def _seconds_spent(unfinished: Path) -> float:
    """What earlier processes spent on a stage, as far as it is kept: blocks add up, a checkpoint holds all before it in training."""
    seconds = {
        folder.name: record["seconds"]
        for folder in unfinished.glob("*")
        if (record := checksums.read(folder))
    }
    return sum(
        value for name, value in seconds.items() if name.startswith(("block", "reference"))
    ) + max(
        (value for name, value in seconds.items() if name.startswith("checkpoint")), default=0.0
    )


def _disk_error(path: Path, error: Exception) -> UserError:
    return UserError(
        f"{path} could not be written ({getattr(error, 'strerror', None) or error}). Nothing half-written "
        "was left; free some space or choose another --out, and run the same command again: it goes on where it stood."
    )
