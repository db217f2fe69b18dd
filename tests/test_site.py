"""The built site: its links, its sources, and how it behaves in a browser."""

import base64
import functools
import http.server
import importlib
import inspect
import json
import posixpath
import re
import shutil
import struct
import subprocess
import sys
import threading
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import ggn_nb.losses
import nbformat
import pytest
import reference
from bs4 import BeautifulSoup
from ggn_nb._modidx import d as index
from nbdev.doclinks import _nbpath2html
from tools import DOCS, NBS, NEXT, ROOT, is_inside, notebooks, reading_order

HOME = index["settings"]["doc_host"] + index["settings"]["doc_baseurl"] + "/"
PAGES = [_nbpath2html(path.relative_to(NBS)).as_posix() for path in reading_order()]
NOTEBOOKS = dict(zip(PAGES, reading_order(), strict=True))
PUBLIC = [*ggn_nb.__all__, *ggn_nb.losses.__all__]
SOURCE = f"{index['settings']['git_url']}/blob/{index['settings']['branch']}/"


@pytest.fixture(scope="module")
def problems(once) -> str:
    """What `make docs` says beside the number of pages."""

    def build(folder: Path) -> None:
        shutil.rmtree(DOCS, ignore_errors=True)
        done = subprocess.run([sys.executable, ROOT / ".ci" / "tools.py", "docs"], capture_output=True, text=True)
        said = re.sub(r"\A\d+ pages in _docs\n\Z", "", done.stdout) + done.stderr
        (folder / "problems").write_text(said or f"ends with {done.returncode}" * bool(done.returncode))

    return (once("site", build) / "problems").read_text()


@pytest.fixture(scope="module")
def site(problems) -> dict[str, BeautifulSoup]:
    """Every page of the site by its path, with its code in one colour."""
    colour = re.compile(r'<span class="[a-z]{2}">([^<]*)</span>')
    files = {p.relative_to(DOCS).as_posix(): p.read_text() for p in DOCS.rglob("*.html")}
    assert files, problems
    return {name: BeautifulSoup(colour.sub(r"\1", text), "html.parser") for name, text in files.items()}


def test_site_builds_without_warnings(problems):
    assert not problems


def test_every_notebook_is_a_page(site):
    assert sorted(site) == sorted(PAGES)


@functools.cache
def ids(page: str) -> set[str]:
    """The anchors of a page."""
    return set(re.findall(r'<[^>]* id="([^"]+)"', (DOCS / page).read_text()))


def missing(url: str, base: str) -> bool:
    """Whether a link on the page `base` leads to no file or no anchor of the site."""
    target = urljoin(HOME + base, url)
    if not target.startswith(HOME):
        return True
    parts = urlsplit(target.removeprefix(HOME))
    path = posixpath.normpath(unquote(parts.path)) if parts.path else "."
    if (DOCS / path).is_dir():
        path = posixpath.normpath(path + "/index.html")
    if not (DOCS / path).is_file():
        return True
    return bool(parts.fragment) and unquote(parts.fragment) not in ids(path)


def follow(base: str, page: BeautifulSoup, selector: str) -> str | None:
    """The page of the site that the first such link on the page `base` leads to."""
    link = page.select_one(selector)
    return link and posixpath.normpath(urljoin(base, link["href"]))


def test_pages_lead_from_one_to_the_next(site):
    """By the links at their feet, in reading order: after the home page the tutorials, the tour first, last what is inside the rooms."""
    assert PAGES[:3] == ["index.html", "tutorials/index.html", "tutorials/tour.html"]
    assert sorted(reading_order()) == sorted(notebooks())
    inside = [is_inside(path) for path in reading_order()]
    assert inside == sorted(inside)
    forwards = [follow(name, site[name], ".nav-page-next a") for name in PAGES]
    backwards = [follow(name, site[name], ".nav-page-previous a") for name in PAGES]
    assert forwards == [*PAGES[1:], None]
    assert backwards == [None, *PAGES[:-1]]


def test_sidebar_lists_every_page_in_reading_order(site):
    for base, page in site.items():
        entries = [link["href"] for link in page.select("#quarto-sidebar a.sidebar-link[href]")]
        assert [posixpath.normpath(urljoin(base, url)) for url in entries if url[0] != "#"] == PAGES


def test_home_page_leads_everywhere(site):
    """It links every page, in its text or at its head, but one whose result does not exist yet."""
    home = site["index.html"]
    found = [*links(home.select_one("main")), *links(home.select_one(".navbar-nav"))]
    linked = {posixpath.normpath(url.partition("#")[0]) for url, _ in found}
    assert set(PAGES) - linked == {"index.html", "timing/large.html"}


def links(page: BeautifulSoup):
    """Each link of a page and whether the browser loads it by itself."""
    for tag in page.find_all(True):
        for name in ("href", "src", "data"):
            if tag.get(name):
                yield tag[name], tag.name != "a"


def outside(url: str) -> bool:
    """Whether a link leads to another host."""
    return bool(urlsplit(url).netloc)


def test_internal_links_and_anchors_resolve(site):
    broken = [
        (base, url)
        for base, page in site.items()
        for url, _ in links(page)
        if not outside(url) and urlsplit(url).scheme in ("", "http", "https") and missing(url, base)
    ]
    assert not broken


def test_anchors_are_unique(site):
    twice = []
    for name, page in site.items():
        anchors = [tag["id"] for tag in page.find_all(id=True)]
        twice += [(name, anchor) for anchor in set(anchors) if anchors.count(anchor) > 1]
    assert not twice


def test_no_link_is_left_as_text(site):
    """A name in backticks gets a link of its own, so one within a link would leave the outer one as text."""
    left = []
    for name, page in site.items():
        prose = [text for text in page.main.find_all(string=re.compile(r"\]\(")) if not text.find_parent(["pre", "code"])]
        left += [(name, str(text)) for text in prose if not text.find_parent(class_="math")]
    assert not left


def test_readme_links_resolve(site):
    readme = re.sub(r"```.*?```", "", (ROOT / "README.md").read_text(), flags=re.S)
    targets = re.findall(r"\]\(([^)\s]+)\)", readme) + re.findall(r'(?:src|href)="([^"]+)"', readme)
    pages = [url.removeprefix(HOME) for url in targets if url.startswith(HOME)]
    files = [url.partition("#")[0] for url in targets if not outside(url) and url[0] != "#"]
    assert not [url for url in pages if missing(url or ".", "")]
    assert not [name for name in files if not (ROOT / name).exists()]


def test_nothing_is_loaded_from_another_host(site):
    assert not [(base, url) for base, page in site.items() for url, loads in links(page) if loads and outside(url)]
    styles = "".join(p.read_text() for p in DOCS.rglob("*.css"))
    assert not re.findall(r"(?:@import|url\()\s*[\"']?(?:https?:)?//[^\"')]*", styles)


def test_pages_open_as_notebooks(site):
    """At the top of each page: its notebook as it is, in Colab and in the repository, a copy in Markdown, and what to install."""
    for name, path in NOTEBOOKS.items():
        place = path.relative_to(ROOT).as_posix()
        found = {link.get_text(): link["href"] for link in site[name].select("main > .opened a")}
        assert found["Open in Colab"] == SOURCE.replace("//github.com", "//colab.research.google.com/github") + place
        assert found["Source"] == SOURCE + place
        assert posixpath.normpath(urljoin(name, found["What it needs"])) == "how-to/install.html#open-a-page-as-a-notebook"
        downloaded = DOCS / posixpath.join(posixpath.dirname(name), found["Download"])
        assert downloaded.read_bytes() == path.read_bytes()
        nbformat.validate(nbformat.read(downloaded, as_version=4))
        text = (DOCS / posixpath.join(posixpath.dirname(name), found["Markdown"])).read_text()
        assert text.startswith(f"# {site[name].h1.get_text()}\n")
        assert not re.findall(r"^:::|^#.*\{#|<a id=|<!--", text, flags=re.M)


def test_list_for_language_models_has_every_page(site):
    """In reading order."""
    found = re.findall(rf"^- \[.+\]\({HOME}(.+)\.llms\.md\): .", (DOCS / "llms.txt").read_text(), flags=re.M)
    assert [f"{name}.html" for name in found] == PAGES


def test_pages_show_the_version(site):
    assert {page.footer.find(class_="nav-footer-left").get_text() for page in site.values()} == {f"ggn_nb {ggn_nb.__version__}"}


def test_pages_end_with_what_to_read_next(site):
    for name, page in site.items():
        head = [head for head in page.select("main h2") if re.match(NEXT, f"## {head.get_text()}")]
        assert head, name
        assert any(not outside(link["href"]) for link in head[-1].find_parent("section").select("a[href]")), name


def test_references_have_links(site):
    """To the work itself, unless it is centuries old."""
    listed = [(name, item) for name, page in site.items() for item in page.select("#references li")]
    assert len(listed) > 80
    bare = [(name, item.get_text()) for name, item in listed if not item.select('a[href^="https:"]')]
    assert not [each for each in bare if not re.search(r", 1[78]\d\d\b", each[1])]


# The reference

ENTRIES = sorted((module, name, page) for (name, page), module in reference.public_names().items())


def box(site, page: str, name: str):
    """The entry of a name, whose anchor is spelt as the name."""
    heading = site[page].find(id=name)
    assert heading is not None, f"{page} has no entry {name}"
    return heading.find_parent(class_="api")


@pytest.mark.parametrize(("module", "name", "page"), ENTRIES)
def test_api_entry(module, name, page, site):
    """It links to its source, its signature fits, and every parameter that its docstring explains is a row with an anchor."""
    entry, value = box(site, page, name), getattr(importlib.import_module(module), name)
    source = entry.find("a", string="source")["href"]
    file, _, line = source.partition("#L")
    path = module.replace(".", "/") + ".py"
    assert file == SOURCE + path
    assert re.match(rf"(def|class) {name}\b", (ROOT / path).read_text().splitlines()[int(line) - 1])
    signature = entry.pre.get_text()
    assert re.match(rf"(?:class )?{name}\b", signature)
    assert max(map(len, signature.splitlines())) <= 100
    assert not re.findall(r"__main__|\bat 0x|jaxlib|\*args, \*\*kwargs|ggn_nb\.\w+\.\w+\.\w", entry.get_text())
    assert not [text for text in entry.find_all(string=re.compile(r"\]\(")) if not text.find_parent("pre")]
    assert "](" not in signature
    explained = re.findall(r"^- `\**(\w+)`:", inspect.getdoc(value).partition("Arguments:")[2].partition("\n\n\n")[0], flags=re.M)
    parameters = [each for each in explained if each in reference.parameters_of(value)]
    assert [each for each in parameters if not entry.find(id=f"{name}.{each}")] == []
    for title in ("Returns", "Raises", "Example"):
        assert (f"\n{title}:\n" in f"\n{inspect.getdoc(value)}") <= (entry.find("strong", string=title) is not None)


@pytest.mark.parametrize("name", ["Operator.matmat", "Operator.dense", "Loss.value", "Loss.hessian_mv", "Stream.source", "Solution.residual"])
def test_methods_and_fields_have_entries(name, site):
    page, _, _ = reference.anchors()[name.split(".")[0]].partition("#")
    assert site[page].find(id=name)


def test_reference_lists_the_public_names(site):
    """Each once, with a link to its entry and the first sentence of its docstring."""
    rows = {row.td.get_text(): row for row in site["api.html"].select("main tbody tr")}
    assert {name for name in rows if "." not in name} == set(PUBLIC)
    for name, row in rows.items():
        assert posixpath.normpath(row.a["href"]) == reference.anchors()[name]
        owner, _, method = name.partition(".")
        value = getattr(ggn_nb if owner in ggn_nb.__all__ else ggn_nb.losses, owner)
        doc = inspect.getdoc(getattr(value, method) if method else value).split("\n\n")[0]
        plain = lambda text: re.sub(r"[\s`‘’'“”\"]", "", text)
        assert plain(row.find_all("td")[1].get_text()) == plain(doc)


def test_names_lead_to_their_own_entries(site):
    """A name in backticks leads to the entry of that name, and one with two meanings to none in a room above the page."""
    wrong = []
    for base, page in site.items():
        for link in page.select("main p a[href*='#'] > code, main li a[href*='#'] > code, main td a[href*='#'] > code"):
            target = posixpath.normpath(urljoin(HOME + base, link.parent["href"])).split(HOME.partition("://")[2])[-1]
            name = link.get_text().removesuffix("()")
            above = reference.floor(target) > reference.floor(base) and base != "api.html"
            if target != reference.anchors().get(name) or above and name in reference.ambiguous():
                wrong.append((base, name, target))
    assert not wrong


# Pictures


def pictures(site):
    """Each picture of the pages, with its page and the cell that made it."""
    for name, page in site.items():
        for picture in page.select("main .cell-output img"):
            yield name, picture, picture.find_parent(class_="cell")


def test_pictures_have_alternative_text_and_folded_code(site):
    found = list(pictures(site))
    assert len(found) > 60
    assert not [name for name, picture, _ in found if len(picture.get("alt", "")) < 30]
    assert not [name for name, _, cell in found if cell.find("pre", class_="sourceCode") and not cell.find("details")]


def test_type_in_pictures_is_large_enough():
    """Letters of 10 points, matplotlib's own size, have 11 pixels or more where a page is 774 pixels wide."""
    small = []
    for path in notebooks():
        for cell in nbformat.read(path, as_version=4).cells:
            for output in cell.get("outputs", []):
                data = base64.b64decode(output.get("data", {}).get("image/png", ""))
                (width,), density = struct.unpack(">I", data[16:20] or bytes(4)), data.find(b"pHYs")
                if density < 0:
                    continue  # a preview, of a picture that is shown elsewhere
                inches = width / (struct.unpack(">I", data[density + 4 : density + 8])[0] * 0.0254)
                if 10 / 72 * min(774, width) / inches < 11:
                    small.append((path.name, cell.id, round(inches, 1)))
    assert not small


def test_no_picture_is_left_as_text(site):
    assert not [name for name, page in site.items() if "<Figure size" in page.main.get_text()]


# In a browser

SMALL_PICTURES = """return [...document.querySelectorAll('main .cell-output img')].filter(
    e => e.getBoundingClientRect().width < .6 * e.naturalWidth).map(e => [e.alt, e.naturalWidth])"""
NOT_HANGING = """return [...document.querySelectorAll('main pre.sourceCode code')].flatMap(code => {
    const lines = code.textContent.split('\\n').filter(line => line.length > 100), wrapped = [...code.querySelectorAll('.long')];
    const starts = e => { const range = document.createRange(), walker = document.createTreeWalker(e, 4), found = new Map();
        while (walker.nextNode()) { range.selectNodeContents(walker.currentNode);
            for (const r of range.getClientRects()) if (r.width > 1) {
                const row = Math.round(r.bottom / 8); found.set(row, Math.min(r.left, found.get(row) ?? Infinity)); } }
        return [...found.values()]; };
    const flat = wrapped.filter(e => e.checkVisibility()).filter(e => {
        const [first, ...rest] = starts(e); return rest.some(left => left < first + 8); });
    const copied = code.checkVisibility() && code.innerText.trim() !== code.textContent.trim() ? ['copied otherwise'] : [];
    return [...copied, ...lines.filter(line => !wrapped.some(e => e.textContent.trim() === line.trim())), ...flat.map(e => e.textContent)];
})"""
CUT_OFF = """return [...document.querySelectorAll('main pre, main .sd-table, main .math.display')].filter(
    e => e.scrollWidth > e.clientWidth + 1 && e.checkVisibility()).map(e => e.textContent.trim().slice(0, 60))"""
DIM = """
const light = c => c.map(x => x / 255).map(x => x <= .04 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4);
const luminance = c => light(c).reduce((sum, x, i) => sum + x * [.2126, .7152, .0722][i], 0);
const read = text => { const [r, g, b, a = 1] = text.match(/[\\d.]+/g).map(Number); return [[r, g, b], a]; };
const over = ([c, a], below) => c.map((x, i) => x * a + below[i] * (1 - a));
const grounds = new Map();
const ground = e => { if (!grounds.has(e)) grounds.set(e, seen(e)); return grounds.get(e); };
const seen = e => { const [c, a] = read(getComputedStyle(e).backgroundColor);
    return a === 1 || !e.parentElement ? over([c, a], [255, 255, 255]) : over([c, a], ground(e.parentElement)); };
const found = [];
for (const e of document.querySelectorAll('body *')) {
    const text = [...e.childNodes].filter(n => n.nodeType === 3).map(n => n.data.trim()).join('');
    if (!text || !e.checkVisibility({visibilityProperty: true}) || e.closest('.katex')) continue;
    const below = ground(e), [c, a] = read(getComputedStyle(e).color);
    let opacity = a;
    for (let p = e; p; p = p.parentElement) opacity *= getComputedStyle(p).opacity;
    const [x, y] = [luminance(over([c, opacity], below)), luminance(below)];
    const contrast = (Math.max(x, y) + .05) / (Math.min(x, y) + .05);
    if (contrast < 4.5) found.push([text.slice(0, 30), contrast]);
}
return found"""


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serve files without a line of log for each request."""

    def log_message(self, *args):
        """Say nothing."""


@pytest.fixture(scope="module")
def address(site, tmp_path_factory) -> str:
    """The address of a server that shows the site in a folder, as its real host does."""
    root = tmp_path_factory.mktemp("host")
    (root / "ggn_nb").symlink_to(DOCS)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=root))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/ggn_nb/"
    server.shutdown()


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium."""
    from selenium import webdriver

    names = ("chromium", "chromium-browser", "google-chrome")
    chromium, driver = next(filter(None, map(shutil.which, names)), None), shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("needs Chromium and chromedriver (on Debian: apt install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-gpu", "hide-scrollbars"):
        options.add_argument("--" + flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    window = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield window
    window.quit()


def screen(browser, width: int):
    """Give the window this width."""
    size = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


@pytest.fixture(scope="module", params=PAGES)
def page(request, site, address, browser):
    """One page, loaded in the browser with empty logs before it, as on a phone."""
    browser.get_log("browser"), browser.get_log("performance")
    screen(browser, 390)
    browser.get(address + request.param)
    browser.execute_async_script("document.fonts.ready.then(arguments[0])")
    return request.param


def test_page_loads_quietly_and_alone(page, address, browser):
    """No message in the console, no failed request, no request to another host."""
    assert browser.title
    assert browser.find_elements("css selector", "main h1")
    assert [entry["message"] for entry in browser.get_log("browser")] == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = {e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"}
    status = [e["params"]["response"] for e in events if e["method"] == "Network.responseReceived"]
    assert address + page in sent
    assert not [url for url in sent if not url.startswith((address, "data:", "blob:"))]
    assert not [(r["url"], r["status"]) for r in status if r["status"] >= 400]


def test_page_renders_its_maths(page, site, browser):
    expected = len(site[page].select("main .math"))
    assert len(browser.find_elements("css selector", "main .math:has(.katex)")) == expected
    wrong = browser.find_elements("css selector", ".katex-error, .katex [mathcolor='#cc0000']")  # unknown commands are red
    assert [e.get_attribute("textContent") for e in wrong] == []
    prose = browser.execute_script(
        "const main = document.querySelector('main').cloneNode(true);"
        "main.querySelectorAll('pre, code, .katex').forEach(e => e.remove()); return main.textContent"
    )
    assert not re.findall(r".*(?:\$|\\[\[\]()]|\\[a-zA-Z]{2,}).*", prose), "left as text"


def test_page_fits_a_phone(page, browser):
    """Nothing but boxes that scroll by themselves is wider than a small screen, and pictures stay legible in theirs."""
    screen(browser, 390)
    boxes = "[document.documentElement, document.querySelector('main')]"
    assert max(browser.execute_script(f"return {boxes}.map(e => e.scrollWidth)")) <= 390
    assert browser.execute_script(SMALL_PICTURES) == []


def test_page_fits_a_desktop(page, browser):
    """At 1280 pixels nothing is cut off: no code, no table, no formula; and pictures are hardly made smaller."""
    screen(browser, 1280)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 1280
    assert browser.execute_script(CUT_OFF) == []
    assert browser.execute_script(SMALL_PICTURES) == []


def test_long_lines_of_code_go_on_further_in(page, browser):
    """What does not fit in a line begins to the right of where the line began, and is copied as it was written."""
    screen(browser, 1280)
    assert browser.execute_script(NOT_HANGING) == []


def test_maths_is_found_where_the_notebooks_have_it(site):
    """A notebook with display maths gives a page with it, so that the checks above see some."""
    with_maths = [p for p in notebooks() if re.search(r"\$\$[^`]", p.read_text())]
    pages = [name for name, page in site.items() if page.select("main .math.display")]
    assert len(with_maths) == len(pages) > 0


def search(browser, words: str) -> list[str]:
    """The addresses that the search box of the present page offers, best first."""
    from selenium.webdriver.support.ui import WebDriverWait

    box = browser.find_element("css selector", ".smalldocs-search input")
    enter = (
        "const [box, words] = arguments; document.querySelector('.smalldocs-search-results').innerHTML = '';"
        "box.focus(); box.value = words; box.dispatchEvent(new Event('input'))"
    )
    browser.execute_script("arguments[0].value = ''", box)
    browser.execute_script(enter, box, words)
    WebDriverWait(browser, 10, poll_frequency=0.05).until(lambda b: b.find_elements("css selector", ".search-result, .search-none"))
    return browser.execute_script("return [...document.querySelectorAll('.search-result')].map(e => e.href)")


@pytest.fixture(scope="module")
def home(address, browser):
    """The home page, loaded."""
    screen(browser, 1280)
    browser.get(address)
    return address


FLAX_DIAGONAL = "how-to/model_libraries.html#the-diagonal-of-a-flax-model"
WANTED = {  # what a user types, and how the addresses begin of which the first hit must be one
    "create_ggn_mv": ("operators/ggn.html#create_ggn_mv",),
    "diagonal": ("layers/diagonal.html#diagonal",),
    "trace": ("layers/diagonal.html#trace",),
    "laplace": ("tutorials/laplace.html",),
    "influence": ("tutorials/influence.html", "applications/influence.html"),
    "flax": ("how-to/model_libraries.html",),
    "equinox": ("how-to/model_libraries.html",),
    "memory": ("tutorials/large_data.html", "how-to/"),
    "mask": ("tutorials/sequences.html",),
    "install": ("how-to/install.html",),
    "GPU": ("how-to/install.html",),
    "batch_size": ("operators/ggn.html#create_ggn_mv.batch_size",),
    "cross_entropy": ("losses/cross_entropy.html#cross_entropy",),
    "cross entropy": ("losses/cross_entropy.html",),
    "ignore_index": ("losses/cross_entropy.html#cross_entropy.ignore_index",),
    "G.matmat": ("operators/operator.html#Operator.matmat",),
    "Loss.value": ("losses/loss.html#Loss.value",),
    "solve": ("linalg/functions.html#solve",),
    "flax diagonal": (FLAX_DIAGONAL,),
    "the diagonal of my Flax model": (FLAX_DIAGONAL,),
}


@pytest.mark.parametrize("words", WANTED)
def test_search_finds_first_what_a_user_wants(words, home, site, browser):
    first = search(browser, words)[0].removeprefix(home)
    assert first.startswith(WANTED[words])
    assert not missing(first, "")


def test_search_finds_what_is_inside_last(home, browser):
    """For a word that all rooms use."""
    hits = [url.removeprefix(home).partition("#")[0] for url in search(browser, "linearise")]
    inside = [is_inside(NOTEBOOKS[page]) for page in hits]
    assert len(hits) > 5
    assert inside == sorted(inside)


@pytest.mark.parametrize("width", [390, 1280])
def test_newcomer_finds_the_diagonal_of_a_flax_model(width, home, browser):
    """In three clicks from the home page, at most, on a phone too, with nothing cut off on the way."""
    screen(browser, width)
    browser.get(home)
    for _ in range(3):
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        links = "[...document.querySelectorAll('main a, #TOC a')].filter(e => e.checkVisibility())"
        offered = f"return {links}.filter(e => /flax/i.test(e.textContent))"
        best = max(browser.execute_script(offered), key=lambda link: "diagonal" in link.text.lower())
        browser.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", best)
        best.click()
        if browser.current_url == home + FLAX_DIAGONAL:
            break
    assert browser.current_url == home + FLAX_DIAGONAL
    section = browser.find_element("css selector", "#the-diagonal-of-a-flax-model")
    assert "diagonal(G)" in section.text
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read(scheme, address, browser):
    """Text, links and search results have a contrast of at least 4.5."""
    screen(browser, 1280)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
    try:
        for name in ("operators/ggn.html", "losses/index.html", "tutorials/laplace.html"):
            browser.get(address + name)
            search(browser, "mask")
            assert browser.execute_script(DIM) == []
    finally:
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_list_of_pages_on_a_phone(address, browser):
    """It covers the text under it, and begins below the header."""
    screen(browser, 390)
    browser.get(address + "operators/ggn.html")
    browser.find_element("css selector", ".quarto-btn-toggle").click()
    top, header, alpha = browser.execute_script(
        "const list = document.querySelector('#quarto-sidebar'), [first] = list.querySelectorAll('a');"
        "const layers = getComputedStyle(list).background.match(/rgba?\\([^)]*\\)/g);"
        "return [first.getBoundingClientRect().top, document.querySelector('#quarto-header').offsetHeight, layers.at(-1)]"
    )
    assert top >= header
    assert not re.fullmatch(r"rgba\(.*, 0?\.\d+\)", alpha)
