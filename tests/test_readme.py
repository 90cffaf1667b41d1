"""Tables of README and of the result pages are those of the result files, and links work."""

import re
from pathlib import Path

import pandas
import pytest

import readme_tables

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("page", readme_tables.PAGES, ids=lambda page: page.name)
def test_tables_are_made_from_the_result_files(page):
    text = page.read_text()
    assert readme_tables.fill(text) == text, "run: python scripts/readme_tables.py"
    assert "<!-- table:" in text and "\n| " in text


@pytest.mark.parametrize("page", readme_tables.PAGES, ids=lambda page: page.name)
def test_links_and_pictures_exist_and_pictures_have_alternative_text(page):
    text = page.read_text()
    targets = re.findall(r"(!?)\[([^\]]*)\]\(([^)]+)\)", text)
    for picture, words, target in targets:
        if target.startswith("#"):
            assert re.search(rf"^## {words}$", text, re.M | re.I), target
            continue
        assert target.startswith("https://") or (page.parent / target).exists(), target
        assert not picture or len(words) > 30


def test_methods_with_fewer_seeds_are_not_ranked_with_the_others():
    first, second = readme_tables.comparison().split("The next table")
    means = pandas.read_csv(ROOT / "figures" / "comparison_mean.csv")
    for method, seeds in means[means.iteration > 0].groupby("method").seeds.max().items():
        row = f"| {readme_tables.api.method_title(method)} |"
        assert (row in first) == (seeds == 5), row
        assert (row in second) == (seeds == 3 or method == "irpo"), row


def test_readme_is_short_enough_to_be_read():
    """Prose and tables, without code, addresses of links and the marks of tables."""
    text = (ROOT / "README.md").read_text()
    prose = re.sub(r"^```.*?^```|^    .*?$|<!--.*?-->|^[|-]+$", "", text, flags=re.S | re.M)
    prose = re.sub(r"\]\([^)]*\)", "]", prose).replace("|", " ")
    assert len(prose.split()) <= 900
    assert text.index("make test") < text.index("## The notebooks")


def test_the_reported_run_holds_what_it_promises():
    """Five seeds, iterations 0 to 4, greedy and sampled accuracy rising in each, 50 points gained."""
    table = pandas.read_csv(ROOT / "figures" / "accuracy_per_iteration.csv")
    assert table.seed.nunique() >= 5 and set(table.split) == {"test"}
    seeds = table.groupby("iteration").seed.nunique()
    assert seeds.eq(table.seed.nunique()).all() and set(table.iteration) == set(range(5))
    for metric in ("greedy", "sampled"):
        means = table[table.metric == metric].groupby("iteration").value.mean()
        assert means.is_monotonic_increasing and means.is_unique, metric
    greedy = table[table.metric == "greedy"].groupby("iteration").value.mean()
    assert greedy[4] - greedy[0] >= 0.5
