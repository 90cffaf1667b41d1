"""Choose the default profile's settings on the validation split: one run per trial, one table of what was tried.

    python scripts/tune.py                 # all trials, about 8 minutes each on one core; resumable
    python scripts/tune.py lr_2e-5 k_8     # these only (run two at a time to use two cores)

The test split is never looked at. The table is figures/tuning.csv (metrics table, `method` names the trial), with
versions and hardware in figures/tuning.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

import pandas

from irpo_utils import UserError, iteration, profiles
from irpo_utils.__main__ import calm_libraries

EVALUATION = dict(eval_split="validation", eval_samples=4, eval_samples_ends=4)
TRIALS = {
    "lr_3e-5": dict(learning_rate=3e-5),
    "lr_2e-5": dict(learning_rate=2e-5),
    "lr_1.5e-5": dict(learning_rate=1.5e-5),
    "lr_1e-4": dict(learning_rate=1e-4),
    "lr_1e-4_alpha_5": dict(learning_rate=1e-4, alpha=5.0),
    "lr_2e-5_k_8": dict(learning_rate=2e-5, k_pairs=8),
    "lr_2e-5_hotter": dict(learning_rate=2e-5, temperature=[1.0, 1.0, 1.3, 1.3]),
    "lr_2e-5_n_16": dict(learning_rate=2e-5, n_samples=16),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("trials", nargs="*", help=f"some of {', '.join(TRIALS)} (default: all)")
    parser.add_argument("--runs", type=Path, default=Path("runs/tuning"))
    parser.add_argument("--out", type=Path, default=Path("figures"))
    options = parser.parse_args()
    if unknown := set(options.trials) - set(TRIALS):
        raise SystemExit(
            f"error: there is no trial {', '.join(sorted(unknown))}. The trials are {', '.join(TRIALS)}."
        )
    calm_libraries()
    for name in options.trials or TRIALS:
        print(f"{name}: {TRIALS[name]}", flush=True)
        iteration.run(profiles.get("cpu", **EVALUATION, **TRIALS[name]), options.runs / name)
    write_table(options.runs, options.out)


def write_table(runs: Path, out: Path) -> None:
    """All finished trials, whoever ran them."""
    tables, records = [], {}
    for name, settings in TRIALS.items():
        try:
            profile = iteration.load_profile(runs / name)
        except UserError:
            continue
        if (runs / name / f"iteration_{profile.iterations}" / "metrics.json").exists():
            tables.append(pandas.read_csv(runs / name / "metrics.csv").assign(method=name))
            records[name] = {
                "settings": settings,
                "profile": dataclasses.asdict(profile),
                "environment": json.loads((runs / name / "environment.json").read_text()),
                "seconds": float(pandas.read_csv(runs / name / "timing.csv").seconds.sum()),
            }
    out.mkdir(exist_ok=True)
    pandas.concat(tables).to_csv(out / "tuning.csv", index=False)
    (out / "tuning.json").write_text(
        json.dumps({"command": "python scripts/tune.py", "trials": records}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
