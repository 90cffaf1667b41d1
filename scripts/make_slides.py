"""Write the slides of a notebook: one page for a projector, made from the executed notebook.

    python scripts/make_slides.py 03_pairs slides    # slides/03_pairs.html

`make book` writes the slides of all notebooks. A deck has 10 to 15 slides: the goals, one slide for
each section (its first paragraphs and formulas, with one output), further questions that ask for a
prediction with the output that answers them, the summary, and the questions to recall. Outputs keep
the order of the notebook, so a question comes before its answer. The rest of a section's text is in
the speaker notes (key S). Exercises, hints and code are not shown.

The pages use reveal.js and MathJax from installed packages and need no network.
"""

from __future__ import annotations

import argparse
import base64
import html
import importlib.util
import operator
import posixpath
import re
import shutil
import textwrap
from dataclasses import dataclass, field, replace
from pathlib import Path

import nbformat
from markdown_it import MarkdownIt
from mdit_py_plugins.dollarmath import dollarmath_plugin

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "notebooks"
FEWEST, SLIDES = 10, 15  # of a deck, where the notebook has enough outputs
HEIGHT = 600  # pixels for what is under the title
LEAD, LEAST = 260, 99  # pixels for the text before an output, the most and the least
FIGURE, LARGE_FIGURE = 330, 440  # pixels, the smallest height of a small and of a large figure
TALL = 500  # pixels of a figure in the notebook that needs all the room on a slide
WORDS = 60  # of a paragraph
CHARACTERS = 80  # in a line of text
LINES, COLUMNS = 14, 110  # of printed output
LARGE_LINES, LARGE_COLUMNS = 6, 76  # of printed output in large type
TABLE_ROWS, TABLE_COLUMNS = 9, 8
REVEAL = ("dist/reveal.css", "dist/reveal.js", "plugin/notes/notes.js")

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}: slides</title>
<link rel="icon" href="../_static/icon.svg">
<link rel="stylesheet" href="reveal.js/dist/reveal.css">
<link rel="stylesheet" href="../_static/slides.css">
<script>
window.MathJax = {{
  options: {{enableMenu: false, menuOptions: {{settings: {{assistiveMml: false}}}}}},
  startup: {{pageReady: () => MathJax.startup.defaultPageReady().then(fit)}},
}}
</script>
<script defer src="../_static/mathjax/tex-svg.js"></script>
</head>
<body>
<div class="reveal"><div class="slides">
{slides}
</div></div>
<script src="reveal.js/dist/reveal.js"></script>
<script src="reveal.js/plugin/notes/notes.js"></script>
<script>
// Smaller type on a slide whose content does not fit.
function fit() {{
  if (!Reveal.isReady()) return
  const slide = Reveal.getCurrentSlide()
  for (let size = 100; size > 50 && (slide.scrollHeight > 720 || slide.scrollWidth > 1280); size -= 5)
    slide.style.fontSize = `${{size - 5}}%`
}}
Reveal.on("ready", fit)
Reveal.on("slidechanged", fit)
Reveal.initialize({{
  width: 1280, height: 720, margin: 0.04, center: false, hash: true, slideNumber: "c/t",
  scrollActivationWidth: null, transition: "none", plugins: [RevealNotes],
}})
</script>
</body>
</html>
"""


@dataclass
class Item:
    """A block of text (Markdown) or the output of a cell (HTML) in the order of the notebook."""

    kind: str  # paragraph, list, table, math, code, predict, output or figure
    content: str

    @property
    def html(self) -> str:
        return self.content if self.kind in ("output", "figure") else to_html(self.content)

    @property
    def tall(self) -> bool:
        """Whether it is a figure of TALL pixels."""
        _, found, png = self.content.partition("data:image/png;base64,")
        return bool(found) and png_size(png)[1] >= TALL

    @property
    def height(self) -> int:
        """Pixels on a slide, an estimate that is rather too large."""
        rows = self.content.count("\n") + 1
        if self.kind == "figure":  # at 0.8 of its size in the notebook, if that is more
            _, _, png = self.content.partition("data:image/png;base64,")
            return min(max(FIGURE, int(0.8 * png_size(png)[1])), LARGE_FIGURE)
        if self.kind == "output":
            height = 45 * self.content.count("<tr") + 15
            for large, text in re.findall("<pre( class=.*?)?>(.*?)</pre>", self.content, re.S):
                height += (36 if large else 25) * (text.count("\n") + 1) + 45
            return height
        if self.kind == "code":
            return 25 * rows + 45
        if self.kind == "math":
            return 120
        if self.kind == "table":
            return 45 * rows + 15
        text = re.sub(r"\]\([^)]*\)", "]", self.content)
        parts = re.split(r"\n(?=- |\d+\. )", text)
        return 15 + 42 * sum(1 + len(part) // CHARACTERS for part in parts)


@dataclass
class Step:
    """An output, the question that asks to predict it, and the paragraphs around it."""

    output: Item
    question: Item | None
    takeaway: Item | None  # the paragraph after it
    before: Item | None = None  # the paragraph before it
    answers: bool = False  # the question; other outputs may follow it as well

    @property
    def rank(self) -> int:
        """Answers to questions come first, and among them figures."""
        return 2 * (not self.answers) + (self.output.kind != "figure")

    @property
    def height(self) -> int:
        return self.output.height + (self.question.height + 20 if self.question else 0)

    def introduction(self) -> list[Item]:
        """What says what is to be seen where there is no question: the paragraph before."""
        shown = [shorten(self.before)] if self.before and not self.question else []
        return [item for item in shown if item.height <= HEIGHT - self.height]

    def html(self, height: int) -> list[str]:
        """The step in at most `height` pixels; output and explanation appear with the next key."""
        parts, left = [], height - self.height
        if self.question:
            parts.append(f'<div class="question">{self.question.html}</div>')
        shown = self.output.html
        takeaway = shorten(self.takeaway) if self.takeaway else None
        if self.output.tall or (takeaway and takeaway.content.endswith(":")):
            takeaway = None
        if takeaway and takeaway.height <= left:
            left -= takeaway.height
        else:
            takeaway = None
        if self.output.kind == "figure":
            height = self.output.height + left
            shown = f'<div class="figure" style="height: {height}px">{shown}</div>'
        parts.append(f'<div class="fragment">{shown}</div>' if self.question else shown)
        if takeaway:
            parts.append(f'<div class="fragment">{takeaway.html}</div>')
        return parts


@dataclass
class Section:
    title: str
    items: list[Item] = field(default_factory=list)

    def text(self) -> list[Item]:
        return [item for item in self.items if item.kind not in ("output", "figure")]

    def lead(self, limit: int) -> list[Item]:
        """The text before the first question or output, in at most `limit` pixels."""
        shown, height = [], 0
        for item in self.items:
            if item.height > limit - height:
                item = shorten(item, limit - height)
            if item.kind in ("predict", "output", "figure") or height + item.height > limit:
                break
            shown.append(item)
            height += item.height
            if item.content.endswith(":"):  # what it announces is worth more room
                limit = HEIGHT
        followers = [*shown[1:], None]
        return [
            item if after and after.kind in ("math", "list", "table", "code") else shorten(item)
            for item, after in zip(shown, followers, strict=False)
        ]

    def steps(self) -> list[Step]:
        """Every output; all outputs that directly follow a question belong to it.

        The first figure among them answers it, or else the first output.
        """
        found, question = [], None
        around = zip([None, *self.items], self.items, [*self.items[1:], None], strict=False)
        for before, item, after in around:
            if item.kind in ("output", "figure"):
                texts = (x if x and x.kind == "paragraph" else None for x in (after, before))
                found.append(Step(item, question, *texts))
            else:
                question = item if item.kind == "predict" else None
        for step in found:
            same = [s for s in found if step.question and s.question is step.question]
            step.answers = step is min(same, key=lambda s: s.output.kind != "figure", default=None)
        return found


def png_size(png: str) -> tuple[int, int]:
    """Width and height in pixels of a PNG in base64: its bytes 16 to 23."""
    header = base64.b64decode(png[:32])
    return int.from_bytes(header[16:20]), int.from_bytes(header[20:24])


def shorten(item: Item, height: int = HEIGHT) -> Item:
    """Of a paragraph the first sentences, without a last one that leads to what is not shown.

    There is always one. Further ones have room in `height` pixels and in WORDS.
    """
    if item.kind != "paragraph":
        return item
    sentences = re.split(r"(?<=[.?!:])\s+(?=[A-Z*`$\[])", item.content)
    if len(sentences) > 1 and not re.search(r"[.?!][)*`]*$", sentences[-1]):
        sentences.pop()
    kept = Item(item.kind, sentences[0])
    for sentence in sentences[1:]:
        longer = Item(item.kind, f"{kept.content} {sentence}")
        if len(longer.content.split()) > WORDS or longer.height > height:
            break
        kept = longer
    return kept


# From a notebook to sections


def markdown() -> MarkdownIt:
    def formula(text: str, options: dict) -> str:
        left, right = (r"\[", r"\]") if options["display_mode"] else (r"\(", r"\)")
        return f'<span class="math">{left}{html.escape(text)}{right}</span>'

    reader = MarkdownIt("commonmark").enable("table")
    dollarmath_plugin(reader, renderer=formula)
    return reader


MARKDOWN = markdown()
KINDS = {
    "bullet_list_open": "list",
    "ordered_list_open": "list",
    "table_open": "table",
    "math_block": "math",
    "fence": "code",
}


def to_html(text: str) -> str:
    """Markdown as HTML, with links as they are seen from the folder of the slides."""

    def link(match: re.Match) -> str:
        target, _, anchor = match["target"].partition("#")
        if "://" in target:
            return match[0]
        path, suffix = posixpath.splitext(posixpath.normpath(f"notebooks/{target}"))
        if suffix not in (".md", ".ipynb"):
            return match["text"]
        address = f"../{path}.html" + (f"#{anchor}" if anchor else "")
        return f'<a href="{address}">{match["text"]}</a>'

    pattern = r'<a href="(?P<target>[^"]*)">(?P<text>.*?)</a>'
    return re.sub(pattern, link, MARKDOWN.render(text), flags=re.S)


def read_sections(notebook: nbformat.NotebookNode) -> list[Section]:
    """The sections of a notebook without exercises and code; the first is its beginning."""
    sections, in_exercise = [], False
    for cell in notebook.cells:
        if cell.cell_type == "code":
            if sections and not in_exercise:
                sections[-1].items += outputs(cell)
            continue
        answers = r"<details><summary>Answer</summary>(.*?)</details>"  # shown after the output
        source = re.sub(answers, r"\1", cell.source, flags=re.S)
        source = re.sub(r"<details>.*?</details>", "", source, flags=re.S)
        for kind, text in blocks(source):
            if kind == "heading":
                level, title = re.match(r"(#+) +(.*)", text).groups()
                in_exercise = title.startswith("Exercise ")
                if len(level) < 3:
                    sections.append(Section(title))
            elif not in_exercise:
                sections[-1].items.append(Item(kind, text))
            elif link := re.search(r"\]\(solutions/\S*\)\.?\s*", text):  # the end of an exercise
                in_exercise = False
                if rest := text[link.end() :]:
                    sections[-1].items.append(Item(kind, rest))
    return sections


def blocks(source: str) -> list[tuple[str, str]]:
    """The blocks of Markdown text, each with its kind."""
    lines, found = source.split("\n"), []
    for token in MARKDOWN.parse(source):
        if token.level or not token.map or token.nesting < 0:
            continue
        text = "\n".join(lines[slice(*token.map)]).strip()
        kind = KINDS.get(token.type, "paragraph")
        if token.type == "heading_open":
            kind = "heading"
        start = text.find("**Predict") if kind == "paragraph" else -1
        if start > 0:  # a question at the end of a paragraph
            found.append((kind, text[:start].rstrip()))
        found.append(("predict", text[start:]) if start >= 0 else (kind, text))
    return found


def outputs(cell: nbformat.NotebookNode) -> list[Item]:
    """The figures of a cell, then its printed text and tables if all of them fit on a slide."""
    figures, texts = [], []
    for output in cell.outputs:
        data = output.get("data", {})
        if "image/png" in data:
            text = html.escape(output.metadata.get("image/png", {}).get("alt", ""))
            picture = f'<img alt="{text}" src="data:image/png;base64,{data["image/png"].strip()}">'
            figures.append(Item("figure", picture))
        elif "<table" in data.get("text/html", ""):
            texts.append(table(data["text/html"]))
        else:
            texts.append(printed(output.get("text", data.get("text/plain", "")).rstrip()))
    return figures + ([Item("output", "".join(texts))] if all(texts) and texts else [])


def table(text: str) -> str | None:
    """A table of pandas as HTML; None if it is too large for a slide."""
    columns = max(len(re.findall("<t[hd]", row)) for row in text.split("<tr")[1:])
    if text.count("<tr") > TABLE_ROWS or columns > TABLE_COLUMNS:
        return None
    return re.sub(r"<style.*?</style>", "", text, flags=re.S)


def printed(text: str) -> str | None:
    """Printed text as HTML with long lines wrapped; None if it is empty or too large for a slide."""
    wrapped = (textwrap.wrap(line, COLUMNS) or [""] for line in text.split("\n"))
    lines = [part for parts in wrapped for part in parts]
    text = "\n".join(lines)
    if not text or len(lines) > LINES:
        return None
    large = len(lines) <= LARGE_LINES and max(map(len, lines)) <= LARGE_COLUMNS
    return f"<pre{' class=large' if large else ''}>{html.escape(text)}</pre>"


# From sections to slides


def deck(notebook: nbformat.NotebookNode) -> str:
    """All slides of a notebook as HTML."""
    first, *sections, last = read_sections(notebook)
    goals = [item.html for item in first.items if item.kind == "list"][:1]
    endings = summary(last)
    slides = [slide(first.title, goals, level=1)]
    fixed = 1 + len(endings)
    for section, parts in zip(
        sections, arrange(sections, FEWEST - fixed, SLIDES - fixed), strict=True
    ):
        notes = [item.html for item in section.text()]
        for lead, step in parts:
            body = [item.html for item in lead]
            if step:
                body += step.html(HEIGHT - sum(item.height for item in lead))
            slides.append(slide(section.title, body, notes=notes))
    return "\n".join(slides + endings)


Part = tuple[list[Item], Step | None]  # what is on a slide: text, and an output with its question


def arrange(sections: list[Section], fewest: int, most: int) -> list[list[Part]]:
    """The slides of each section: the best step of each, then further questions and figures.

    At most `most` slides, and at least `fewest` if the sections have enough outputs.
    """
    steps = [[s for s in section.steps() if s.height <= HEIGHT] for section in sections]
    rank = operator.attrgetter("rank")
    best = [step for found in steps for step in sorted(found, key=rank)[:1]]
    further = sorted((s for found in steps for s in found if s not in best), key=rank)
    asked = sum(step.rank < 3 for step in further)
    layout = []
    for count in range(len(further), -1, -1):
        shown = best + further[:count]
        layout = [
            parts_of(section, [step for step in found if step in shown])
            for section, found in zip(sections, steps, strict=True)
        ]
        slides = sum(map(len, layout))
        if slides <= most and (count <= asked or slides <= fewest):
            break
    return layout


def parts_of(section: Section, steps: list[Step]) -> list[Part]:
    """The slides of a section: its text with the first step, then one for each further step.

    Paragraphs are shortened for the first step. A formula, list or table that leaves it no room has
    a slide. Steps keep the order of the notebook, so that a question comes before its answer, and
    only the first of several outputs has the question.
    """
    lead = section.lead(LEAD if steps else HEIGHT)
    if not steps:
        return [(lead, None)]
    asked = [step.question for step in steps]
    steps = [
        replace(step, question=None) if step.question in asked[:i] else step
        for i, step in enumerate(steps)
    ]
    room = HEIGHT - steps[0].height
    if sum(item.height for item in lead) > room:
        if any(item.kind != "paragraph" for item in lead) or room < LEAST:
            return [(lead, None), *((step.introduction(), step) for step in steps)]
        lead = section.lead(room)
    return [(lead, steps[0]), *((step.introduction(), step) for step in steps[1:])]


def summary(section: Section) -> list[str]:
    """The slides at the end: what was learnt, and the questions to recall."""
    lists = [item for item in section.items if item.kind == "list"]
    slides = [slide(section.title, [lists[0].html])] if lists else []
    if len(lists) > 1:
        slides.append(slide("Recall, without looking up", [lists[-1].html]))
    return slides


def slide(title: str, body: list[str], level: int = 2, notes: list[str] = ()) -> str:
    heading = to_html(title).strip().removeprefix("<p>").removesuffix("</p>")
    parts = [f"<h{level}>{heading}</h{level}>", *body]
    if notes:
        parts.append(f'<aside class="notes">{"".join(notes)}</aside>')
    return "<section>\n" + "\n".join(parts) + "\n</section>"


# Files


def write(name: str, folder: Path) -> None:
    """Write the slides of a notebook, and reveal.js next to them.

    Outputs are those of the solved notebook: a cell after an exercise may use what it defines.
    """
    notebook, solved = (
        nbformat.read(path / f"{name}.ipynb", as_version=4)
        for path in (NOTEBOOKS, NOTEBOOKS / "solutions")
    )
    for cell, filled_in in zip(notebook.cells, solved.cells, strict=True):
        if cell.cell_type == "code":
            cell.outputs = filled_in.outputs
    package = Path(importlib.util.find_spec("sphinx_revealjs").origin).parent
    for file in REVEAL:
        target = folder / "reveal.js" / file
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(package / "_static" / "revealjs" / file, target)
    title = notebook.cells[0].source.split("\n")[0].removeprefix("# ")
    page = PAGE.format(title=html.escape(title), slides=deck(notebook))
    (folder / f"{name}.html").write_text(page)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", help="name of a notebook, without folder and suffix")
    parser.add_argument("folder", type=Path, help="folder for the slides")
    options = parser.parse_args()
    write(options.name, options.folder)


if __name__ == "__main__":
    main()
