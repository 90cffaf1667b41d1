"""The book: it builds without warnings, its links lead somewhere, and a browser shows it without a network."""

import base64
import functools
import html
import http.server
import json
import os
import re
import subprocess
import sys
import threading
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlparse

import nbformat
import pytest
import yaml
from PIL import Image

for package in ("sphinx", "myst_nb", "sphinx_book_theme", "sphinx_revealjs"):
    pytest.importorskip(package)

import make_slides  # noqa: E402  needs what the lines above ask for

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
# Pages that the browser opens; the second of the notebooks has the most equations.
SHOWN = (
    "docs/index.html",
    "notebooks/00_start_here.html",
    "notebooks/04_dpo_nll_training.html",
    "docs/results/comparison.html",
    "docs/glossary.html",
)
PHONE = 390  # pixels


def build(folder: Path, *options: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "sphinx", "-q", "-b", "html", "-c", str(ROOT / "docs")]
    return subprocess.run(
        [*command, *options, str(ROOT), str(folder)],
        env={**os.environ, "BOOK_REPOSITORY": "", **environment},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def book(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("book") / "html"
    done = build(folder, "-W", "--keep-going")
    assert done.returncode == 0 and not done.stderr, done.stderr
    return folder


class Page(HTMLParser):
    """What the tests ask of a page: its ids, links, pictures, and the files that it loads."""

    def __init__(self, path: Path):
        super().__init__()
        self.path, self.text = path, path.read_text()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.pictures: list[dict[str, str]] = []
        self.loads: list[str] = []
        self.feed(self.text)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        if "id" in attributes:
            self.ids.add(attributes["id"])
        if tag == "a" and "href" in attributes:
            self.links.append(attributes["href"])
        if tag == "img":
            self.pictures.append(attributes)
        if tag in ("script", "img", "iframe", "embed", "source") and "src" in attributes:
            self.loads.append(attributes["src"])
        if tag in ("link", "object") and (attributes.keys() & {"href", "data"}):
            self.loads.append(attributes.get("href") or attributes["data"])

    def code_cells(self) -> set[str]:
        blocks = re.findall(r'class="cell_input.*?<pre>(.*?)</pre>', self.text, re.S)
        return {html.unescape(re.sub("<[^>]*>", "", block)).strip() for block in blocks}


@functools.cache
def parsed(path: Path) -> Page:
    return Page(path)


def pages(book: Path) -> list[Page]:
    found = [parsed(path) for path in sorted(book.rglob("*.html"))]
    assert len(found) > 2 * len(NOTEBOOKS)
    return found


def test_every_notebook_and_page_is_in_the_book(book):
    sources = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "figures").glob("*.md")]
    sources += [*(ROOT / "docs" / "results").glob("*.md"), *(ROOT / "notebooks").glob("*.ipynb")]
    sources += (ROOT / "notebooks" / "solutions").glob("*.ipynb")
    listed = parsed(book / "docs" / "index.html").links
    for source in sources:
        page = source.relative_to(ROOT).with_suffix(".html")
        assert (book / page).exists(), page
        if page != Path("docs/index.html"):
            assert os.path.relpath(page, "docs") in listed, f"the navigation lacks {page}"
    assert 'url=docs/index.html"' in (book / "index.html").read_text()


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_student_pages_have_stubs_and_solutions_are_on_their_own_pages(name, book):
    student, solved = (
        parsed(book / "notebooks" / folder / f"{name}.html") for folder in ("", "solutions")
    )
    titles = [re.search("<title>(.*?) &#8212; ", page.text)[1] for page in (student, solved)]
    assert titles[1] == f"{titles[0]}: solutions"
    cells = [
        [
            cell.source
            for cell in nbformat.read(ROOT / "notebooks" / folder / f"{name}.ipynb", 4).cells
            if cell.cell_type == "code"
        ]
        for folder in ("", "solutions")
    ]
    filled_in = [(open_, full) for open_, full in zip(*cells, strict=True) if open_ != full]
    assert len(filled_in) >= (2 if re.match(r"\d+b_", name) else 3)  # optional ones have fewer
    shown = [page.code_cells() for page in (student, solved)]
    for pair in filled_in:
        open_, full = (text.removeprefix("# NBVAL_IGNORE_OUTPUT\n").strip() for text in pair)
        assert open_ in shown[0] and full not in shown[0]
        assert full in shown[1] and open_ not in shown[1]


def test_links_and_anchors_inside_the_book_lead_somewhere(book):
    dead, checked = [], 0
    for page in pages(book):
        for link in page.links:
            address, anchor = urldefrag(link)
            if urlparse(address).scheme or link == "#":
                continue
            file = unquote(address.split("?")[0])
            target = (page.path.parent / file).resolve() if file else page.path
            checked += 1
            if not target.is_file() or (anchor and unquote(anchor) not in parsed(target).ids):
                dead.append(f"{page.path.relative_to(book)}: {link}")
    assert not dead and checked > 1000


def test_figures_have_alternative_text(book):
    figures = 0
    for page in pages(book):
        for picture in page.pictures:
            if "_images/" in picture["src"]:
                figures += 1
                assert len(picture.get("alt", "")) > 30, f"{page.path}: {picture['src']}"
            assert picture.get("alt", "").strip(), f"{page.path}: {picture['src']}"
    drawn = sum(
        path.read_text().count('"image/png": "')
        for folder in ("", "solutions")
        for path in (ROOT / "notebooks" / folder).glob("*.ipynb")
    )
    assert figures >= drawn > 0


def test_pages_load_nothing_from_a_network(book):
    for page in pages(book):
        for address in page.loads:
            assert not urlparse(address).netloc, f"{page.path.relative_to(book)}: {address}"
    for sheet in book.rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*[\"']?(https?:)?//", sheet.read_text()), sheet


def test_buttons_need_the_address_of_the_repository(book, tmp_path):
    """Download always, Colab, its set-up cell and links to source files if there is an address."""
    name = "notebooks/00_start_here"
    links = parsed(book / f"{name}.html").links
    assert f"../_sources/{name}.ipynb" in links and not any(
        "colab.research" in link for link in links
    )
    download = book / "_sources" / f"{name}.ipynb"
    assert download.read_bytes() == (ROOT / f"{name}.ipynb").read_bytes()

    assert "github.com/OWNER/NAME" in parsed(book / "docs" / "colab.html").text

    options = ("-D", f"include_patterns={name}.ipynb,docs/colab.md", "-D", f"root_doc={name}")
    build(tmp_path, *options, BOOK_REPOSITORY="https://github.com/owner/name")
    links = parsed(tmp_path / f"{name}.html").links
    assert "../docs/colab.html" in links
    assert "git clone --quiet --depth 1 https://github.com/owner/name ~/irpo" in cell_of_colab(
        tmp_path
    )
    colab = "https://colab.research.google.com/github/owner/name/blob/main/"
    assert f"{colab}{name}.ipynb" in links
    assert "https://github.com/owner/name/blob/main/irpo_utils/iteration.py" in links


def cell_of_colab(book: Path) -> str:
    """The set-up cell as the page shows it."""
    text = parsed(book / "docs" / "colab.html").text
    [block] = re.findall(r"<pre>(.*?)</pre>", text, re.S)
    return html.unescape(re.sub("<[^>]*>", "", block))


def test_figures_that_a_phone_would_make_unreadable_are_wide(book):
    """The style sheet lets these scroll in their box."""
    wide, narrow = [], []
    for page in map(parsed, sorted((book / "notebooks").glob("0*.html"))):
        for picture in page.pictures:
            if "_images/" in picture["src"] and picture["src"].endswith(".png"):
                width, _ = Image.open(page.path.parent / picture["src"]).size
                (wide if width >= 650 else narrow).append(picture.get("class", ""))
    assert wide and all("wide" in kind for kind in wide)
    assert not all("wide" in kind for kind in narrow)


def test_a_link_to_a_solution_opens_its_exercise(book):
    page = (book / "notebooks" / "05_iterations.html").read_text()
    anchors = re.findall(r'href="solutions/05_iterations\.html#(exercise-5-\d)', page)
    assert anchors == ["exercise-5-1", "exercise-5-2", "exercise-5-3", "exercise-5-4"]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_slides_have_goals_figures_questions_and_a_summary(name, book):
    page = parsed(book / "slides" / f"{name}.html")
    slides = page.text.split("<section>")[1:]
    assert 10 <= len(slides) <= 15
    assert "<h1>" in slides[0] and "<ul>" in slides[0]
    assert "What you have learnt" in page.text and 'class="question"' in page.text
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", 4)
    figures = sum(
        "image/png" in o.get("data", {}) for c in notebook.cells for o in c.get("outputs", [])
    )
    assert len(page.pictures) >= min(figures, 1)
    listed = ["slides"] if re.match(r"\d+b_", name) else ["slides", "teaching"]  # optional ones
    for where in listed:
        assert f"../slides/{name}.html" in parsed(book / "docs" / f"{where}.html").links


def test_slides_of_a_small_notebook():
    def text(source):
        return nbformat.v4.new_markdown_cell(source)

    def code(output):
        result = nbformat.v4.new_output("stream", name="stdout", text=output)
        return nbformat.v4.new_code_cell("print()", outputs=[result])

    cells = [
        text("# Title\n\n- one goal"),
        text(
            "## 1 First\n\nA [term](../docs/glossary.md#dpo), $x < y$. See:\n\n**Predict**: how many?"
        ),
        code("42\n"),
        text(
            "<details><summary>Answer</summary>\n\nForty-two.\n\n</details>\n\n### Exercise 1.1: count\n\nDo it. <details>hidden</details>"
        ),
        code("not on a slide"),
        text("[Solution](solutions/title.ipynb). And then?\n\nAfterwards."),
        text("## What you have learnt\n\n- counting\n\n1. How many?"),
    ]
    notebook = nbformat.v4.new_notebook(cells=cells)
    slides = make_slides.deck(notebook).split("<section>")[1:]
    assert len(slides) == 4 and "one goal" in slides[0]
    section, notes = slides[1].split("<aside")
    assert '<a href="../docs/glossary.html#dpo">term</a>' in section and "See:" not in section
    assert r"\(x &lt; y\)" in section
    assert section.index("how many?") < section.index('<div class="fragment"><pre class=large>42')
    assert section.index("42</pre>") < section.index("Forty-two.")
    assert (
        "See:" in notes
        and "And then?" in notes
        and "Afterwards." in notes
        and "Solution" not in notes
    )
    assert not re.search("not on|Do it|hidden", "".join(slides))
    assert "counting" in slides[2] and "How many?" in slides[3]


def test_slides_keep_the_order_of_a_section():
    """A figure ranks above printed text, but the question that it also answers comes first."""
    drawn = nbformat.v4.new_output("display_data", {"image/png": "aGk=" * 8})
    cells = [
        nbformat.v4.new_markdown_cell("# Title\n\n- one goal"),
        nbformat.v4.new_markdown_cell("## 1 First\n\nSome text.\n\n**Predict**: how many?"),
        nbformat.v4.new_code_cell("print()", outputs=[nbformat.v4.new_output("stream", text="42")]),
        nbformat.v4.new_code_cell("draw()", outputs=[drawn]),
        nbformat.v4.new_markdown_cell("The same by seed:"),
        nbformat.v4.new_code_cell("draw()", outputs=[drawn]),
        nbformat.v4.new_markdown_cell("## What you have learnt\n\n- counting\n\n1. How many?"),
    ]
    slides = make_slides.deck(nbformat.v4.new_notebook(cells=cells)).split("<section>")[2:5]
    assert "Some text." in slides[0] and slides[0].index("how many?") < slides[0].index("42")
    assert "<img" in slides[1] and "<img" not in slides[0]
    assert slides[2].index("The same by seed:") < slides[2].index("<img")
    assert all("Some text." in slide.partition("<aside")[2] for slide in slides)


def test_slides_wrap_long_lines_and_give_large_figures_room():
    lines = make_slides.printed("word " * 60).split("\n")
    assert len(lines) > 1 and max(map(len, lines)) <= make_slides.COLUMNS + len("<pre></pre>")

    def height(pixels):
        header = bytes(16) + (700).to_bytes(4) + pixels.to_bytes(4)
        png = base64.b64encode(header).decode()
        return make_slides.Item("figure", f"data:image/png;base64,{png}").height

    assert height(200) == make_slides.FIGURE < height(500) == 400 < height(2000)
    assert height(2000) == make_slides.LARGE_FIGURE


def test_the_plan_for_teaching_names_sections_as_the_notebooks_do():
    sources = [path.read_text() for path in (ROOT / "notebooks" / "source").glob("*.py")]
    titles = {title for text in sources for title in re.findall("^# ## (.+)$", text, re.M)}
    named = re.findall(r"\*(\d+ \w[^*|]*)\*", (ROOT / "docs" / "teaching.md").read_text())
    assert len(named) > 50 and set(named) <= titles


def test_workflow_publishes_what_make_book_builds():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "book.yml").read_text())
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    assert any(step.get("run") == "make book" for step in steps)
    [upload] = [step for step in steps if "upload-pages-artifact" in step.get("uses", "")]
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(rf"^book:.*\n\t.* -W .* {re.escape(upload['with']['path'])}$", makefile, re.M)


# In a browser


class Server(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def site(book):
    handler = functools.partial(Server, directory=str(book))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    """A tab of a headless browser that keeps the events of its pages."""
    test_browser = pytest.importorskip("test_browser")
    if test_browser.BROWSER is None:
        pytest.skip("no Chromium or Chrome is installed")

    class Tab(test_browser.Page):
        events: list[dict] = []
        wait = staticmethod(test_browser.wait)

        def call(self, method: str, **parameters):
            self.sent += 1
            message = {"id": self.sent, "method": method, "params": parameters}
            self.socket.send(json.dumps(message))
            while (answer := json.loads(self.socket.recv())).get("id") != self.sent:
                self.events.append(answer)
            return answer["result"]

        def open(self, address: str, width: int, mode: str = "light") -> None:
            """Load a page at a width in pixels and wait until its equations are drawn."""
            self.events.clear()
            screen = {"width": width, "height": 900, "deviceScaleFactor": 1}
            self.call("Emulation.setDeviceMetricsOverride", mobile=width < 500, **screen)
            scheme = {"name": "prefers-color-scheme", "value": mode}
            self.call("Emulation.setEmulatedMedia", features=[scheme])
            self.call("Page.navigate", url=address)
            self.wait(lambda: self.value(LOADED))

        def errors(self) -> list[str]:
            """What the console shows as an error, and exceptions."""
            found = []
            for event in self.events:
                content = event["params"]
                level = content.get("type") or content.get("entry", {}).get("level")
                if event["method"] == "Runtime.exceptionThrown" or level == "error":
                    found.append(json.dumps(content))
            return found

        def requests(self) -> list[str]:
            sent = [e for e in self.events if e["method"] == "Network.requestWillBeSent"]
            return [event["params"]["request"]["url"] for event in sent]

    tab = Tab(tmp_path_factory.mktemp("browser"))
    for domain in ("Page", "Runtime", "Log", "Network"):
        tab.call(f"{domain}.enable")
    yield tab
    tab.close()


LOADED = """document.readyState == 'complete' && location.protocol == 'http:'
    && [...document.querySelectorAll('.math')].every(e => e.querySelector('mjx-container svg'))"""
EQUATIONS = "document.querySelectorAll('.math mjx-container svg path').length"
FAULTY_EQUATIONS = "document.querySelectorAll('[data-mjx-error], mjx-merror').length"
EMPTY_PICTURES = """[...document.querySelectorAll('article img')]
    .filter(image => (image.loading = 'eager') && image.complete && !image.naturalWidth)
    .map(image => image.src)"""
# Equations inside a line that fit into their box, and yet it scrolls: a phone draws a bar below them.
BARS = """[...document.querySelectorAll('span.math')].filter(box => box.scrollWidth > box.clientWidth
    && box.querySelector('svg').getBoundingClientRect().width < box.clientWidth + 1).length"""
OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"


@pytest.mark.parametrize("page", SHOWN)
def test_page_in_a_browser(page, site, tab):
    for width in (1200, PHONE):
        tab.open(f"{site}/{page}", width)
        assert tab.errors() == []
        assert all(address.startswith((site, "data:")) for address in tab.requests())
        assert tab.value(EMPTY_PICTURES) == [] and tab.value(FAULTY_EQUATIONS) == 0
        assert tab.value(OVERFLOW) == 0
    if page in ("notebooks/04_dpo_nll_training.html", "docs/glossary.html"):
        assert tab.value(EQUATIONS) > 20 and tab.value(BARS) == 0


def test_no_page_scrolls_sideways_on_a_phone(book, site, tab):
    wide = []
    for folder in ("docs", "notebooks", "figures", "scripts"):
        for path in sorted((book / folder).rglob("*.html")):
            page = path.relative_to(book)
            tab.open(f"{site}/{page}", PHONE)
            assert tab.errors() == []
            if tab.value(OVERFLOW):
                wide.append(str(page))
    assert not wide


SLIDE = """(() => { Reveal.slide(%d, 0, 99)
    const slide = Reveal.getCurrentSlide(), shown = [...slide.children].filter(e => e.tagName != 'ASIDE')
    return [slide.scrollWidth, Math.max(...shown.map(e => e.offsetTop + e.offsetHeight))] })()"""


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_slides_fit_on_the_screen(name, site, tab):
    tab.open(f"{site}/slides/{name}.html", 1280)
    tab.wait(lambda: tab.value("Reveal.isReady()"))
    for number in range(tab.value("Reveal.getTotalSlides()")):
        width, height = tab.value(SLIDE % number)
        assert width <= 1280 and height <= 720, f"slide {number + 1}"
    assert tab.errors() == [] and tab.value(FAULTY_EQUATIONS) == 0
    assert all(address.startswith((site, "data:")) for address in tab.requests())


def test_light_and_dark_mode(site, tab):
    background = "getComputedStyle(document.body).backgroundColor"
    colours = []
    for mode in ("light", "dark"):
        tab.open(f"{site}/{SHOWN[0]}", 1200, mode)
        colours.append(sum(map(int, re.findall(r"\d+", tab.value(background))[:3])))
    assert colours[0] > 600 and colours[1] < 150


def test_search_finds_a_term_without_a_network(site, tab):
    tab.open(f"{site}/search.html?q=elicitation", 1200)
    found = "[...document.querySelectorAll('#search-results li a')].map(link => link.href)"
    results = tab.wait(lambda: tab.value(found))
    assert any("docs/glossary.html" in address for address in results)
    assert tab.errors() == []
    assert all(address.startswith((site, "data:")) for address in tab.requests())
