"""Settings of the book: `make book` writes it to docs/_build/html.

Sphinx reads the files where they lie, with the root of the repository as its source folder. Links
and pictures therefore work here as they do on GitHub. Notebooks keep the outputs they were
committed with; nothing is executed, and neither the build nor the finished pages use a network.
"""

import importlib.util
import json
import os
import re
import shutil
import sys
from pathlib import Path

from docutils import nodes
from mdit_py_plugins.anchors.index import slugify
from sphinx import addnodes
from sphinx.transforms import SphinxTransform

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
import make_slides  # noqa: E402

# The address of the repository, as https://github.com/OWNER/NAME. With it the pages have a button
# "Open in Colab" and links to the source files, and docs/colab.md has the address; without it there
# is no such button, and the links download the files from the book.
REPOSITORY = os.environ.get("BOOK_REPOSITORY", "").rstrip("/")
BRANCH = os.environ.get("BOOK_BRANCH", "main")

project = "Iterative RPO"
author = "The Iterative RPO tutorials authors"
language = "en"

# Pages

root_doc = "docs/index"
include_patterns = [
    "README.md",
    "docs/**.md",
    "figures/*.md",
    "notebooks/*.ipynb",
    "notebooks/solutions/*.ipynb",
    "scripts/cluster/README.md",
]
with_pages = {pattern.split("/")[0] for pattern in include_patterns}
exclude_patterns = [path.name for path in ROOT.iterdir() if path.name not in with_pages]
exclude_patterns += ["docs/_build", "notebooks/shipped_run", "**/.ipynb_checkpoints"]

extensions = ["myst_nb"]
nb_execution_mode = "off"
nb_ipywidgets_js = {}  # would be loaded from a network
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 4  # links such as glossary.md#nll-term, as on GitHub
suppress_warnings = ["myst.header"]  # the glossary's terms are headings of the third level

# Theme

html_theme = "sphinx_book_theme"
html_title = "Iterative RPO tutorials"
html_favicon = "_static/icon.svg"
html_static_path = ["_static"]
html_css_files = ["book.css"]
html_extra_path = ["_extra"]
html_context = {"default_mode": "auto"}  # light or dark, as the reader's system
html_theme_options = {
    "path_to_docs": "",
    "home_page_in_toc": False,
    "show_navbar_depth": 1,
    "show_toc_level": 2,
    "use_download_button": True,
    "use_fullscreen_button": False,
    "navbar_persistent": [],  # the sidebar has the search button
}
if REPOSITORY:
    html_theme_options |= {
        "repository_url": REPOSITORY,
        "repository_branch": BRANCH,
        "repository_provider": "github",
        "use_repository_button": True,
        "launch_buttons": {"colab_url": "https://colab.research.google.com"},
    }

# Equations: MathJax as one file, taken from a package and shipped with the pages

MATHJAX = "mathjax/tex-svg.js"
mathjax_path = MATHJAX
mathjax3_config = {"options": {"enableMenu": False}}


def copy_mathjax(app, exception) -> None:
    package = importlib.util.find_spec("sphinx-mathjax-offline")
    if exception is None and app.builder.format == "html":
        target = Path(app.outdir) / "_static" / MATHJAX
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(Path(package.origin).parent / "static" / MATHJAX, target)


# Notebooks

WIDE = 650  # pixels, from which a figure on a phone is wider than the screen and scrolls


def prepare_notebook(app, docname: str, source: list[str]) -> None:
    """Prepare a notebook for myst-nb: texts of figures, marks for nbval, titles of solutions.

    The alternative text of a figure is in the metadata of its output, where JupyterLab reads it.
    myst-nb takes it from the metadata of the cell. Wide figures get a class for the style sheet.
    """
    if not docname.startswith("notebooks/"):
        return
    notebook = json.loads(source[0])
    for cell in notebook["cells"]:
        cell["source"] = "".join(cell["source"]).removeprefix("# NBVAL_IGNORE_OUTPUT\n")
        drawn = [o for o in cell.get("outputs", []) if "image/png" in o.get("data", {})]
        if drawn:
            texts = [o.get("metadata", {}).get("image/png", {}).get("alt", "") for o in drawn]
            image = {"alt": " ".join(texts)}
            pictures = ("".join(o["data"]["image/png"]) for o in drawn)
            if any(make_slides.png_size(png)[0] >= WIDE for png in pictures):
                image["classes"] = "wide"
            cell["metadata"]["mystnb"] = {"image": image}
    link_to_exercises(notebook["cells"])
    first = notebook["cells"][0]
    if REPOSITORY:
        page = "../" * docname.count("/") + "docs/colab.md"
        first["source"] += f"\n\n**In Colab** run the [set-up cell]({page}) first."
    if docname.startswith("notebooks/solutions/"):
        first["source"] = re.sub(r"\A# (.+)", r"# \1: solutions", first["source"])
    source[0] = json.dumps(notebook)


def link_to_exercises(cells: list[dict]) -> None:
    """Let links to a solution open it at the exercise: the page is long."""
    anchor = ""
    for cell in cells:
        if cell["cell_type"] == "markdown":
            for title in re.findall("^### (Exercise .+)$", cell["source"], re.M):
                anchor = f"#{slugify(title)}"
            link = r"(?<=\]\()(solutions/\w+\.ipynb)(?=\))"
            cell["source"] = re.sub(link, rf"\1{anchor}", cell["source"])


def fill_in_address(app, docname: str, source: list[str]) -> None:
    """Put the repository's address into the set-up cell for Colab and into `git clone`."""
    if REPOSITORY:
        source[0] = source[0].replace("https://github.com/OWNER/NAME", REPOSITORY)
        source[0] = source[0].replace("git clone REPOSITORY", f"git clone {REPOSITORY}")


# Slides: a page of reveal.js for each notebook, the list of them, and links from the teaching plan

DECKS = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))


def list_slides(app, docname: str, source: list[str]) -> None:
    if docname == "docs/slides":
        session = 0
        for name in DECKS:
            first = json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text())["cells"][0]
            title = "".join(first["source"]).split("\n")[0].removeprefix("# ")
            in_course = re.match(r"\d+_", name)  # 04b is optional
            session += bool(in_course)
            before = f"Session {session}: " if in_course else ""
            source[0] += f'\n- {before}<a href="../slides/{name}.html">{title}</a>'


def link_slides(app, docname: str, source: list[str]) -> None:
    """Add the deck of a session to its links to the notebook and the solutions."""
    if docname == "docs/teaching":
        link = r"\[solutions\]\(\.\./notebooks/solutions/(.*?)\.ipynb\)"
        source[0] = re.sub(link, r'\g<0>, <a href="../slides/\1.html">slides</a>', source[0])


def write_slides(app, exception) -> None:
    if exception is None and app.builder.format == "html":
        for name in DECKS:
            make_slides.write(name, Path(app.outdir) / "slides")


# Links to files and folders of the repository that are not pages


class LinksToFiles(SphinxTransform):
    """A link to a source file or a folder opens it in the repository, if that has an address.

    Without an address the book offers the file for download and shows a folder's name as text.
    """

    default_priority = 400  # before Sphinx collects the files to download

    def apply(self, **kwargs) -> None:
        for link in list(self.document.findall(is_link_to_file)):
            relative, absolute = self.env.relfn2path(link["reftarget"], self.env.docname)
            path = Path(absolute)
            if REPOSITORY and path.exists():
                kind = "tree" if path.is_dir() else "blob"
                address = f"{REPOSITORY}/{kind}/{BRANCH}/{path.relative_to(ROOT).as_posix()}"
                link.replace_self(nodes.reference("", "", *link.children, refuri=address))
            elif path.is_dir():
                link.replace_self(link.children)


def is_link_to_file(node) -> bool:
    if isinstance(node, addnodes.pending_xref):  # what MyST does not find as a file, a folder too
        return node["reftype"] == "myst" and not node.get("refdomain")
    return isinstance(node, addnodes.download_reference)


def setup(app) -> None:
    app.connect("source-read", prepare_notebook)
    app.connect("source-read", fill_in_address)
    app.connect("source-read", list_slides)
    app.connect("source-read", link_slides)
    app.connect("build-finished", copy_mathjax)
    app.connect("build-finished", write_slides)
    app.add_transform(LinksToFiles)
