"""Make the notebooks from their sources: one source gives two notebooks, both executed.

    python scripts/make_notebooks.py              # all of them
    python scripts/make_notebooks.py 03_pairs     # one of them
    python scripts/make_notebooks.py --text 03    # new text alone: the outputs stay

Writes notebooks/NN_*.ipynb with open exercises and notebooks/solutions/NN_*.ipynb with solutions.
A source is a percent script, notebooks/source/NN_name.py: `# %% [markdown]` starts a text cell,
`# %%` a code cell, `# %% tags=["nbval-ignore-output"]` one whose output nbval does not compare,
and `# %% tags=["remove-cell"]` a check of the build, which JupyterLab folds and the book leaves out.
A code cell that a student fills in has both versions; the lines with the markers are in neither
notebook:

    def wrap_around(n_winners, n_losers, k):
        # SOLUTION
        return [(i % n_winners, i % n_losers) for i in range(k)]
        # STUB
        # return None      # your turn
        # END

Links in a source are those of the notebook with open exercises. The solved one is a folder deeper,
so `view` changes them there: other pages get one more `..`. It also leaves out the link to the
solution. Links to other notebooks go to those with open exercises.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
EXERCISE = re.compile(
    r"^[ ]*# SOLUTION\n(?P<solution>.*?)^[ ]*# STUB\n(?P<stub>.*?)^[ ]*# END\n?", re.S | re.M
)
LINK = re.compile(r"(?<=\]\()(?!https?://|#)(?P<target>[^)\s]+)(?=\))")
SOLUTION = re.compile(r"(The worked solution is in )?\[[^\]]*\]\(solutions/[^)]*\)\.")
CHECK = "remove-cell"  # the book leaves these cells out
KERNEL = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
QUIET = {
    "TQDM_DISABLE": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}


def view(source: str, solved: bool) -> nbformat.NotebookNode:
    """The notebook of a source, with solutions or with stubs."""

    def choose(match: re.Match) -> str:
        return (
            match["solution"] if solved else re.sub(r"^([ ]*)# ?", r"\1", match["stub"], flags=re.M)
        )

    notebook = jupytext.reads(source, fmt="py:percent")
    for i, cell in enumerate(notebook.cells):
        if cell.cell_type == "code":
            cell.source = EXERCISE.sub(choose, cell.source + "\n").rstrip("\n")
        elif solved:
            cell.source = SOLUTION.sub("The code above is the worked solution.", cell.source)
            cell.source = LINK.sub(_from_solutions, cell.source)
        cell.id = f"cell-{i:03d}"  # does not change with every build
        cell.metadata = _kept_metadata(cell)
    notebook.metadata = nbformat.from_dict(KERNEL)
    return notebook


def _kept_metadata(cell) -> nbformat.NotebookNode:
    """The tags of a cell, for example `# %% tags=["nbval-ignore-output"]`; CHECK is also folded."""
    tags = list(cell.metadata.get("tags", []))
    folded = {"jupyter": {"source_hidden": True}} if CHECK in tags else {}
    return nbformat.from_dict({"tags": tags, **folded} if tags else {})


def _from_solutions(link: re.Match) -> str:
    """A link of the student's notebook as seen from the folder of the solutions."""
    target = link["target"]
    return target.removeprefix("solutions/") if target.startswith("solutions/") else f"../{target}"


def execute(notebook: nbformat.NotebookNode, folder: Path, timeout: int = 1800) -> None:
    """Run all cells in order in a fresh kernel; what the libraries say on stderr is not kept."""
    NotebookClient(
        notebook,
        timeout=timeout,
        kernel_name="python3",
        coalesce_streams=True,
        resources={"metadata": {"path": str(folder)}},
    ).execute()
    notebook.metadata = nbformat.from_dict(
        KERNEL
    )  # executing adds the Python version of this machine
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.metadata = _kept_metadata(cell)
            cell.outputs = [
                o for o in cell.outputs if not (o.output_type == "stream" and o.name == "stderr")
            ]


def keep_outputs(notebook: nbformat.NotebookNode, path: Path) -> None:
    """Take the outputs of the notebook at `path`; ends the program where its code is another."""
    old, new = (
        [cell for cell in book.cells if cell.cell_type == "code"]
        for book in (nbformat.read(path, as_version=4), notebook)
    )
    if [cell.source for cell in old] != [cell.source for cell in new]:
        sys.exit(f"error: the code of {path.name} has changed. Run it: leave --text out.")
    for before, now in zip(old, new, strict=True):
        now.outputs, now.execution_count = before.outputs, before.execution_count


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="beginnings of notebook names (default: all)")
    parser.add_argument("--text", action="store_true", help="change the text, keep the outputs")
    options = parser.parse_args()
    os.environ.update(QUIET)
    sources = sorted(
        path
        for path in (NOTEBOOKS / "source").glob("*.py")
        if not options.names or path.stem.startswith(tuple(options.names))
    )
    if not sources:
        sys.exit(
            f"error: no source in {NOTEBOOKS / 'source'} begins with {' or '.join(options.names)}."
        )
    for path in sources:
        for folder, solved in ((NOTEBOOKS, False), (NOTEBOOKS / "solutions", True)):
            notebook, made = view(path.read_text(), solved), folder / f"{path.stem}.ipynb"
            if options.text:
                keep_outputs(notebook, made)
            else:
                execute(notebook, folder)
            nbformat.write(notebook, made)
            print(f"{folder.name}/{path.stem}.ipynb", flush=True)


if __name__ == "__main__":
    main()
