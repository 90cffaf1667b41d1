"""The committed notebooks: made from their sources, executed in order, linked, and executed again by nbval."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
pytest.importorskip("jupytext")
pytest.importorskip("nbval")

ROOT = Path(__file__).parent.parent
NOTEBOOKS = ROOT / "notebooks"
NAMES = (
    "00_start_here",
    "01_sampling",
    "01b_fast_sampling",
    "02_grading",
    "03_pairs",
    "04_dpo_nll_training",
    "04b_qlora_by_hand",
    "05_iterations",
    "06_baselines_and_ablations",
    "06b_judges_luck_ablations",
    "07_real_models_on_one_gpu",
    "07b_what_the_data_must_be",
    "08_past_one_gpu",
)
# Off the course: no other notebook needs them, and they have fewer exercises.
OPTIONAL = (
    "01b_fast_sampling",
    "04b_qlora_by_hand",
    "06b_judges_luck_ablations",
    "07b_what_the_data_must_be",
)
COURSE = tuple(name for name in NAMES if name not in OPTIONAL)
REAL = ("07_real_models_on_one_gpu", "07b_what_the_data_must_be")  # need a real model
DEFAULTS = dict.fromkeys(NAMES, "cpu") | dict.fromkeys(REAL, "smollm2-135m-cpu")  # profiles
MACHINE = re.compile(
    r"(?<![\w.])/(?:home|root|Users|work|workspace|tmp|mnt|opt|srv|var|private)/|\b[A-Z]:\\"
)
CELL_SECONDS = 900  # far more than any cell takes with the smoke profile, also on a busy machine

UNCOMPARED = "nbval-ignore-output"  # the tag of a cell whose output nbval does not compare

by_name = pytest.mark.parametrize("name", NAMES)
by_view = pytest.mark.parametrize("solved", [False, True], ids=["student", "solved"])


def number_of(name: str) -> str:
    """The number of a notebook in the headings of its exercises: "4", or "4b" if it is optional."""
    return name.partition("_")[0].lstrip("0") or "0"


def least_exercises(name: str) -> int:
    return 2 if name in OPTIONAL else 3


def script(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MAKE = script("make_notebooks")


def path_of(name: str, solved: bool) -> Path:
    return NOTEBOOKS / ("solutions" if solved else "") / f"{name}.ipynb"


def committed(name: str, solved: bool):
    path = path_of(name, solved)
    assert path.exists(), f"{path.relative_to(ROOT)} is missing: run `make notebooks`"
    return nbformat.read(path, as_version=4)


def view(name: str, solved: bool):
    return MAKE.view((NOTEBOOKS / "source" / f"{name}.py").read_text(), solved)


def code_cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def text_of(output) -> str:
    """All text of an output: a stream, or what an object shows as."""
    return output.get("text", "") + "".join(
        str(data) for kind, data in output.get("data", {}).items() if kind.startswith("text/")
    )


# The committed files


def test_every_source_is_a_notebook_and_every_notebook_has_a_source():
    assert [path.stem for path in sorted((NOTEBOOKS / "source").glob("*.py"))] == list(NAMES)
    for folder in (NOTEBOOKS, NOTEBOOKS / "solutions"):
        assert {path.stem for path in folder.glob("*.ipynb")} == set(NAMES), (
            f"run `make notebooks` ({folder.name})"
        )


@by_name
@by_view
def test_committed_notebook_is_what_its_source_gives(name, solved):
    made, there = view(name, solved), committed(name, solved)
    assert [(cell.cell_type, cell.id, cell.source, cell.metadata) for cell in there.cells] == [
        (cell.cell_type, cell.id, cell.source, cell.metadata) for cell in made.cells
    ], "the source has changed: run `make notebooks`"


@by_name
@by_view
def test_committed_notebook_was_executed_in_order_without_errors(name, solved):
    cells = code_cells(committed(name, solved))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        for output in cell.outputs:
            assert output.output_type != "error" and output.get("name") != "stderr", cell.source


@by_name
@by_view
def test_committed_outputs_are_those_of_the_default_profile(name, solved):
    said = "".join(
        text_of(output)
        for cell in code_cells(committed(name, solved))[:2]
        for output in cell.outputs
    )
    assert f"profile {DEFAULTS[name]} " in said, "run `make notebooks` without IRPO_PROFILE"


@by_name
@by_view
def test_committed_notebook_says_nothing_of_the_machine(name, solved):
    notebook = committed(name, solved)
    assert dict(notebook.metadata) == MAKE.KERNEL
    for cell in notebook.cells:
        assert set(cell.metadata) <= {"tags", "jupyter"}, cell.source
        assert not MACHINE.search(cell.source), cell.source
        for output in cell.get("outputs", []):
            assert not MACHINE.search(text_of(output)), text_of(output)


@by_name
@by_view
def test_figures_have_alternative_text(name, solved):
    """As `irpo_utils.plots` gives it: what is shown, with its numbers."""
    for cell in committed(name, solved).cells:
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                alternative = output.metadata.get("image/png", {}).get("alt", "")
                assert len(alternative) > 40 and re.search(r"\d", alternative), cell.source
        assert cell.cell_type == "code" or not re.search(
            r"!\[\]|<img(?![^>]*\balt=)", cell.source
        ), cell.source


@by_name
def test_checks_accept_the_solved_notebook_and_not_the_unsolved_one(name):
    for solved in (False, True):
        said = [
            text_of(cell.outputs[0])
            for cell in code_cells(committed(name, solved))
            if is_check(cell)
        ]
        assert len(said) >= least_exercises(name) and all(
            text.startswith("Right") == solved for text in said
        ), said


# What a notebook consists of


def is_check(cell) -> bool:
    return (
        cell.cell_type == "code"
        and re.search(r"^print\(checks_\d\d\.", cell.source, re.M) is not None
    )


@by_name
def test_beginning_says_what_it_takes_and_what_it_gives(name):
    first, *_, last = view(name, solved=False).cells
    assert first.source.startswith(f"# {name.partition('_')[0]} · ")
    for part in (
        "**What you will be able to do**\n\n- ",
        f"| | `smoke` | `{DEFAULTS[name]}` (default) | one GPU |",
        "**Needs**",
        "**Before this**",
    ):
        assert part in first.source, part
    assert "TIME_" not in first.source, "the time of a profile has not been filled in"
    before = [other for other in COURSE if other < name]
    after = [other for other in COURSE if other > name]
    assert not before or f"]({before[-1]}.ipynb)" in first.source
    assert "**Next**" in last.source
    assert not after or f"]({after[0]}.ipynb)" in last.source


LONGER = {"06_baselines_and_ablations": 2200, "07_real_models_on_one_gpu": 2250}
LONGER["08_past_one_gpu"] = 1900


@by_name
def test_the_prose_is_read_in_half_an_hour(name):
    """Words without tables, formulas and the targets of links."""
    words = 0
    for cell in view(name, solved=False).cells:
        if cell.cell_type == "markdown":
            lines = [line for line in cell.source.splitlines() if not line.startswith("|")]
            text = re.sub(r"\]\([^)]*\)", "]", "\n".join(lines))
            text = re.sub(r"\$\$.*?\$\$|\$[^$]*\$", "", text, flags=re.S)
            words += len(re.findall(r"\S*\w\S*", text))
    assert words <= LONGER.get(name, 1800)


@by_name
def test_setting_comes_first_and_predictions_and_recall_are_asked_for(name):
    notebook = view(name, solved=False)
    assert (
        f'PROFILE = os.environ.get("IRPO_PROFILE", "{DEFAULTS[name]}")'
        in code_cells(notebook)[0].source
    )
    prose = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    assert prose.count("**Predict") >= least_exercises(name)
    assert "## What you have learnt" in prose and "**Try**" in prose and "**Recall" in prose


@by_name
def test_folded_text_is_rendered(name):
    """Markdown inside HTML needs a blank line around it, else lists and links stay raw text."""
    for cell in view(name, solved=False).cells:
        if cell.cell_type == "markdown":
            lines = cell.source.split("\n")
            for line, following in zip(lines, [*lines[1:], ""], strict=True):
                if "</summary>" in line or "</details>" in line:
                    assert line.endswith(("</summary>", "</details>")) and not following, line


@by_name
@by_view
def test_code_cells_are_short(name, solved):
    for cell in code_cells(view(name, solved)):
        assert len(cell.source.splitlines()) <= 25, cell.source


@by_name
@by_view
def test_exercises_have_hint_check_and_solution(name, solved):
    cells = view(name, solved).cells
    starts = [
        i
        for i, cell in enumerate(cells)
        if cell.cell_type == "markdown" and re.search(r"^#+ Exercise ", cell.source, re.M)
    ]
    assert len(starts) >= least_exercises(name)
    words = "The code above is the worked solution." if solved else f"](solutions/{name}.ipynb)"
    for number, (start, end) in enumerate(zip(starts, [*starts[1:], len(cells)]), 1):
        head, to_fill_in, *rest = cells[start:end]
        assert head.source.startswith(f"### Exercise {number_of(name)}.{number}: ")
        for part in (
            "**Goal**",
            "**Difficulty**: ",
            "**Time**: ",
            "<details><summary>Hint</summary>\n\n",
            "\n\n</details>",
        ):
            assert part in head.source, f"{part} in {head.source}"
        assert to_fill_in.cell_type == "code" and is_check(rest[0])
        texts = (cell.source for cell in rest if cell.cell_type == "markdown")
        assert any(words in text for text in texts), head.source


@by_name
def test_both_views_differ_in_the_exercises_alone(name):
    student, solved = (code_cells(view(name, which)) for which in (False, True))
    text = (NOTEBOOKS / "source" / f"{name}.py").read_text()
    assert (
        sum(a.source != b.source for a, b in zip(student, solved, strict=True))
        == text.count("# SOLUTION")
        >= least_exercises(name)
    )
    assert not any(re.search(r"# (SOLUTION|STUB|END)\b", cell.source) for cell in student + solved)


@by_name
def test_no_cell_is_left_out_by_nbval(name):
    setting, *others = code_cells(view(name, solved=True))
    assert set(setting.metadata.get("tags", [])) <= {UNCOMPARED}
    for cell in others:
        assert cell.metadata.get("tags", []) in ([], [UNCOMPARED], [MAKE.CHECK]), cell.source
        assert not re.search(r"#\s*(NBVAL_|PYTEST_)", cell.source), cell.source


@by_name
def test_checks_of_the_build_are_folded_and_print_nothing(name):
    for cell in code_cells(committed(name, solved=True)):
        if MAKE.CHECK in cell.metadata.get("tags", []):
            assert cell.source.split("\n")[-1].startswith("assert "), cell.source
            assert cell.metadata["jupyter"] == {"source_hidden": True} and not cell.outputs
        else:
            assert "plots.alt_text" not in cell.source, cell.source


# Links

PAGES = [
    path
    for folder in (ROOT, ROOT / "docs", ROOT / "figures", NOTEBOOKS / "shipped_run")
    for path in sorted(folder.glob("*.md"))
]


@by_name
@by_view
def test_links_of_notebooks_lead_somewhere(name, solved):
    prose = "\n\n".join(
        cell.source for cell in view(name, solved).cells if cell.cell_type == "markdown"
    )
    assert not dead_links(prose, path_of(name, solved))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_of_pages_lead_somewhere(page):
    assert not dead_links(page.read_text(), page)


def dead_links(text: str, place: Path) -> list[str]:
    """Links to files or headings that do not exist, of a text that lies at `place`."""
    targets = re.findall(r"(?<!\\)\]\(([^)\s]+)\)", without_code(text))
    return [
        target
        for target in targets
        if not target.startswith(("https://", "http://")) and not leads_somewhere(target, place)
    ]


def leads_somewhere(target: str, place: Path) -> bool:
    file, _, anchor = target.partition("#")
    path = (place.parent / file).resolve() if file else place
    return (
        path.is_relative_to(ROOT)
        and (path.exists() or path == place)
        and (not anchor or anchor in anchors(path))
    )


def anchors(path: Path) -> set[str]:
    """What a `#...` in a link to this page or notebook may say."""
    if path.suffix == ".ipynb":  # JupyterLab and GitHub: the heading with hyphens for spaces
        texts = [
            cell.source
            for cell in nbformat.read(path, as_version=4).cells
            if cell.cell_type == "markdown"
        ]
        return {heading.replace(" ", "-") for text in texts for heading in headings(text)}
    found: dict[str, int] = {}
    for heading in headings(
        path.read_text()
    ):  # GitHub: small letters, no punctuation; repetitions are numbered
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        found[slug] = found.get(slug, -1) + 1
    return {f"{slug}-{i}" if i else slug for slug, count in found.items() for i in range(count + 1)}


def headings(text: str) -> list[str]:
    return [
        re.sub(r"\[([^\]]*)\]\([^)]*\)|[`*]", r"\1", heading).strip()
        for heading in re.findall(r"^#{1,6} +(.+?)[ #]*$", without_code(text, inline=False), re.M)
    ]


def without_code(text: str, inline: bool = True) -> str:
    text = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
    return re.sub(r"`[^`\n]*`", "", text) if inline else text


def test_a_dead_link_is_found(tmp_path):
    """The check itself: what does not lead anywhere is named, what does is not."""
    page = tmp_path / "page.md"
    page.write_text("# One: `two` & *three*\n## Again\n## Again\n```\n# no heading\n```\n")
    assert anchors(page) == {"one-two--three", "again", "again-1"}
    place = ROOT / "docs" / "new.md"
    assert dead_links(
        "[a](../README.md) [b](nothing.md) [c](../README.md#no-such-heading) [d](../../x) `[e](code)`",
        place,
    ) == ["nothing.md", "../README.md#no-such-heading", "../../x"]
    assert not dead_links(
        "[a](../README.md#the-package) [b](https://example.org/x) [c](model_card_seed.md)", place
    )


def test_links_of_the_solved_view_start_a_folder_deeper():
    source = "# %% [markdown]\n# [a](../docs/x.md#y) [b](01_sampling.ipynb) [c](solutions/00_start_here.ipynb) [d](https://e.org/f) [g](#h)\n"
    assert MAKE.view(source, solved=False).cells[0].source == source.split("\n")[1][2:]
    assert MAKE.view(source, solved=True).cells[0].source == (
        "[a](../../docs/x.md#y) [b](../01_sampling.ipynb) [c](00_start_here.ipynb) [d](https://e.org/f) [g](#h)"
    )


def test_tags_of_a_source_are_in_the_notebook():
    source = (
        f'# %% tags=["{UNCOMPARED}"]\n1\n\n# %% other="x"\n2\n\n# %% tags=["{MAKE.CHECK}"]\n3\n'
    )
    first, second, third = MAKE.view(source, solved=False).cells
    assert (first.source, first.metadata) == ("1", {"tags": [UNCOMPARED]})
    assert (second.source, second.metadata) == ("2", {})
    assert third.metadata == {"tags": [MAKE.CHECK], "jupyter": {"source_hidden": True}}


# The run that ships


@pytest.fixture(scope="module")
def ship_run():
    return script("ship_run")


def test_shipped_run_is_a_whole_sound_run_of_the_default_profile(ship_run):
    ship_run.check(NOTEBOOKS / "shipped_run")
    assert ship_run.inspect(NOTEBOOKS / "shipped_run") < 10e6


def test_shipped_tables_give_the_shipped_numbers():
    import pandas
    from datasets import load_from_disk

    run = NOTEBOOKS / "shipped_run"
    metrics = pandas.read_csv(run / "metrics.csv")
    for row in metrics[metrics.metric.isin(["greedy", "sampled"])].itertuples():
        table = load_from_disk(
            str(run / f"iteration_{row.iteration}" / "evaluation" / row.metric), keep_in_memory=True
        )
        assert sum(table["correct"]) / len(table) == pytest.approx(row.value), (
            f"{row.metric} of M_{row.iteration}"
        )
    for t in range(json.loads((run / "profile.json").read_text())["iterations"]):
        counts = json.loads((run / f"iteration_{t}" / "pairs" / "counts.json").read_text())
        assert (
            len(load_from_disk(str(run / f"iteration_{t}" / "pairs"), keep_in_memory=True))
            == counts["pairs"]
        )


def test_shipping_is_exact_repeatable_and_refuses_half_a_run(ship_run, tmp_path):
    """What was shipped already ships as it is; a run with a damaged or a missing part does not ship at all."""
    run = NOTEBOOKS / "shipped_run"
    ship_run.ship(run, tmp_path / "again")
    for file in (
        path
        for path in run.rglob("*")
        if path.is_file() and path.suffix in (".json", ".jsonl", ".csv", ".safetensors")
    ):
        if (
            file.name != "checksums.json"
        ):  # other versions of the libraries may compress differently
            assert (tmp_path / "again" / file.relative_to(run)).read_bytes() == file.read_bytes(), (
                file
            )
    counts = tmp_path / "again" / "iteration_1" / "pairs" / "counts.json"
    counts.write_text(counts.read_text().replace("1", "2"))
    with pytest.raises(ship_run.UserError, match="checksums do not match"):
        ship_run.ship(tmp_path / "again", tmp_path / "out")
    shutil.rmtree(tmp_path / "again" / "iteration_4")
    with pytest.raises(ship_run.UserError, match="not finished"):
        ship_run.ship(tmp_path / "again", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again"]


# Execution


@pytest.fixture(scope="session")
def clean_copy(tmp_path_factory) -> Path:
    """What the notebooks need and no more: no runs of whoever tests, nothing installed in their stead."""
    copy = tmp_path_factory.mktemp("clean") / "repository"
    for folder in ("irpo_utils", "notebooks", "figures", "scripts"):
        shutil.copytree(
            ROOT / folder,
            copy / folder,
            ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", "cache-*", "phases"),
        )
    return copy


@pytest.fixture(scope="session")
def copy_without_a_run(clean_copy, tmp_path_factory) -> Path:
    copy = tmp_path_factory.mktemp("bare") / "repository"
    return shutil.copytree(
        clean_copy, copy, ignore=shutil.ignore_patterns("shipped_run", "scratch")
    )


def nbval(copy: Path, *files: Path) -> tuple[dict[str, list[str]], str]:
    """Execute notebooks in a fresh kernel each and compare: file -> result of every code cell, and what pytest said."""
    report, scratch = copy / "report.xml", copy / "scratch"
    scratch.mkdir(exist_ok=True)
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("PYTEST_ADDOPTS", "IRPO_DATA")
    }
    environment |= {
        **MAKE.QUIET,
        "IRPO_PROFILE": "smoke",
        "PYTHONPATH": str(copy),
        "IPYTHONDIR": str(scratch / "ipython"),
        "TMPDIR": str(scratch),
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "--nbval",
            "--nbval-current-env",
            f"--nbval-cell-timeout={CELL_SECONDS}",
            "-q",
            "--color=no",
            "-p",
            "no:cacheprovider",
            f"--rootdir={copy}",
            f"--junitxml={report}",
            *map(str, files),
        ],
        cwd=copy,
        env=environment,
        capture_output=True,
        text=True,
    )
    results: dict[str, list[str]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        result = next(
            (child.tag for child in case if child.tag in ("failure", "error", "skipped")), "passed"
        )
        results.setdefault(
            case.attrib["classname"].removesuffix(".ipynb").split(".")[-1], []
        ).append(result)
    return results, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.mark.slow
@by_name
@by_view
def test_notebook_runs_to_its_end_and_gives_the_committed_outputs(name, solved, clean_copy):
    cells = code_cells(committed(name, solved))
    results, said = nbval(clean_copy, clean_copy / path_of(name, solved).relative_to(ROOT))
    assert list(results.values()) == [["passed"] * len(cells)], said


@pytest.mark.slow
@by_name
def test_notebook_makes_what_it_needs_where_no_run_is_there(name, copy_without_a_run):
    """Results come from the reader's own run, else from the shipped one, else they are made on the spot: here the last."""
    cells = code_cells(committed(name, solved=False))
    results, said = nbval(
        copy_without_a_run, copy_without_a_run / path_of(name, solved=False).relative_to(ROOT)
    )
    assert list(results.values()) == [["passed"] * len(cells)], said


def test_nbval_fails_where_an_output_or_an_assertion_is_wrong(tmp_path):
    """A small notebook, whole and with one thing altered: exactly the altered cell fails."""

    def cell_of(source: str, text: str):
        outputs = [nbformat.v4.new_output("stream", text=text)]
        return nbformat.v4.new_code_cell(source, outputs=outputs)

    setting = cell_of("x = 0.1 + 0.2", "")
    setting.outputs = []
    printed = cell_of("print(10 * 10)", "100\n")
    asserted = cell_of("print(round(x, 1))\nassert abs(x - 0.3) < 1e-9", "0.3\n")
    uncompared = nbformat.from_dict(
        {**asserted, "source": "# NBVAL_IGNORE_OUTPUT\n" + asserted.source}
    )

    def altered(cell, **changes):
        return nbformat.from_dict({**cell, **changes})

    def saying(cell, text):
        return altered(cell, outputs=[{**cell.outputs[0], "text": text}])

    def with_false_assertion(cell):
        return altered(cell, source=cell.source.replace("\nassert abs(", "\nassert not abs("))

    copies = {
        "whole": [setting, printed, asserted, uncompared],
        "output": [
            setting,
            saying(printed, printed.outputs[0].text.replace("0", "1")),
            asserted,
            uncompared,
        ],
        "missing_output": [setting, altered(printed, outputs=[]), asserted, uncompared],
        "assertion": [setting, printed, with_false_assertion(asserted), uncompared],
        "uncompared_output": [setting, printed, asserted, saying(uncompared, "something else")],
        "uncompared_assertion": [setting, printed, asserted, with_false_assertion(uncompared)],
        "tagged_output": [
            setting,
            altered(saying(printed, "something else"), metadata={"tags": [UNCOMPARED]}),
        ],
    }
    for name, chosen in copies.items():
        chosen = [
            altered(cell, id=f"cell-{i}", execution_count=i + 1) for i, cell in enumerate(chosen)
        ]
        nbformat.write(
            nbformat.v4.new_notebook(cells=chosen, metadata=MAKE.KERNEL), tmp_path / f"{name}.ipynb"
        )
    results, said = nbval(tmp_path, *(tmp_path / f"{name}.ipynb" for name in copies))
    failing = {
        name: [i for i, result in enumerate(cells) if result == "failure"]
        for name, cells in results.items()
    }
    assert failing == {
        "whole": [],
        "output": [1],
        "missing_output": [1],
        "assertion": [2],
        "uncompared_output": [],
        "uncompared_assertion": [3],
        "tagged_output": [],
    }, said


def test_new_text_keeps_the_outputs_of_the_same_code(tmp_path):
    made = nbformat.read(ROOT / "notebooks/04b_qlora_by_hand.ipynb", as_version=4)
    path = tmp_path / "made.ipynb"
    nbformat.write(made, path)
    anew = view("04b_qlora_by_hand", solved=False)
    assert not any(cell.get("outputs") for cell in anew.cells)
    MAKE.keep_outputs(anew, path)
    assert [cell.get("outputs") for cell in anew.cells] == [c.get("outputs") for c in made.cells]
    next(cell for cell in anew.cells if cell.cell_type == "code").source += "\nprint(1)"
    with pytest.raises(SystemExit, match="error: the code of made.ipynb has changed"):
        MAKE.keep_outputs(anew, path)
