"""Choose the default profile's settings on the validation split: one run per trial.

    python scripts/studies/tune.py                 # all, about 8 minutes each on one core; resumes
    python scripts/studies/tune.py lr_2e-5 k_8     # these only

The test split is not used. Writes figures/tuning.csv (metrics table; `method` is the trial), and
versions and hardware to figures/tuning.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import pandas

sys.path.append(str(Path(__file__).resolve().parents[1]))
from irpo_utils import UserError, profiles
from studies import api

EVALUATION = {"eval_split": "validation", "eval_samples": 4, "eval_samples_ends": 4}
TRIALS = {
    "lr_3e-5": {"learning_rate": 3e-5},
    "lr_2e-5": {"learning_rate": 2e-5},
    "lr_1.5e-5": {"learning_rate": 1.5e-5},
    "lr_1e-4": {"learning_rate": 1e-4},
    "lr_1e-4_alpha_5": {"learning_rate": 1e-4, "alpha": 5.0},
    "lr_2e-5_k_8": {"learning_rate": 2e-5, "k_pairs": 8},
    "lr_2e-5_hotter": {"learning_rate": 2e-5, "temperature": [1.0, 1.0, 1.3, 1.3]},
    "lr_2e-5_n_16": {"learning_rate": 2e-5, "n_samples": 16},
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("trials", nargs="*", help=f"some of {', '.join(TRIALS)} (default: all)")
    parser.add_argument("--runs", type=Path, default=Path("runs/tuning"))
    parser.add_argument("--out", type=Path, default=Path("figures"))
    options = parser.parse_args()
    unknown = sorted(set(options.trials) - set(TRIALS))
    if unknown:
        parser.error(f"unknown trial {', '.join(unknown)}. The trials are {', '.join(TRIALS)}")
    api.quiet_libraries()
    for name in options.trials or TRIALS:
        print(f"{name}: {TRIALS[name]}", flush=True)
        api.run(profiles.get("cpu", **EVALUATION, **TRIALS[name]), options.runs / name)
    write_table(options.runs, options.out)


def write_table(runs: Path, out: Path) -> None:
    """Write the table of all finished trials in the folder `runs`."""
    tables, records = [], {}
    for name, settings in TRIALS.items():
        try:
            profile = api.load_profile(runs / name)
        except UserError:
            continue
        if not (runs / name / f"iteration_{profile.iterations}" / "metrics.json").exists():
            continue
        tables.append(pandas.read_csv(runs / name / "metrics.csv").assign(method=name))
        records[name] = {
            "settings": settings,
            "profile": dataclasses.asdict(profile),
            "environment": json.loads((runs / name / "environment.json").read_text()),
            "seconds": float(pandas.read_csv(runs / name / "timing.csv").seconds.sum()),
        }
    out.mkdir(exist_ok=True)
    pandas.concat(tables).to_csv(out / "tuning.csv", index=False)
    record = {"command": "python scripts/studies/tune.py", "trials": records}
    (out / "tuning.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
