"""README's tables are those of the result files, and what it links to exists."""

import importlib.util
import re
from pathlib import Path

import pandas
import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def tables():
    spec = importlib.util.spec_from_file_location(
        "readme_tables", ROOT / "scripts" / "readme_tables.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_are_made_from_the_result_files(tables):
    text = (ROOT / "README.md").read_text()
    assert tables.fill(text) == text, "run: python scripts/readme_tables.py"
    assert "| M4 |" in text and "| M0 |" in text


def test_links_and_pictures_exist_and_pictures_have_alternative_text():
    text = (ROOT / "README.md").read_text()
    targets = re.findall(r"(!?)\[([^\]]*)\]\(([^)]+)\)", text)
    assert len(targets) > 8
    for picture, words, target in targets:
        assert target.startswith("https://") or (ROOT / target).exists(), target
        assert not picture or len(words) > 30


def test_the_reported_run_holds_what_it_promises():
    """Five seeds, iterations 0 to 4, greedy and sampled accuracy rising in each, 50 points gained."""
    table = pandas.read_csv(ROOT / "figures" / "accuracy_per_iteration.csv")
    assert table.seed.nunique() >= 5 and set(table.split) == {"test"}
    assert table.groupby("iteration").seed.nunique().eq(table.seed.nunique()).all() and set(
        table.iteration
    ) == set(range(5))
    for metric in ("greedy", "sampled"):
        means = table[table.metric == metric].groupby("iteration").value.mean()
        assert means.is_monotonic_increasing and means.is_unique, metric
    greedy = table[table.metric == "greedy"].groupby("iteration").value.mean()
    assert greedy[4] - greedy[0] >= 0.5
