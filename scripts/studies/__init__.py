"""The studies of the package: comparisons and ablations over seeds, their tables and figures,
benchmarks, and checks that break runs on purpose. `scripts/study.py` and `scripts/bench.py` run
them."""
