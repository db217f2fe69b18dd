"""The built site: its links, its sources, and how it behaves in a browser."""

import functools
import http.server
import importlib
import json
import posixpath
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import pytest
from bs4 import BeautifulSoup
from ggn_nb._modidx import d as index
from nbdev.doclinks import _nbpath2html
from tools import DOCS, NBS, ROOT, notebooks

HOME = index["settings"]["doc_host"] + index["settings"]["doc_baseurl"] + "/"
PAGES = [_nbpath2html(path.relative_to(NBS)).as_posix() for path in notebooks()]
SOURCE = f"{index['settings']['git_url']}/blob/{index['settings']['branch']}/"


@pytest.fixture(scope="module")
def problems(once) -> str:
    """What `make docs` says when it does not end well."""

    def build(folder: Path) -> None:
        shutil.rmtree(DOCS, ignore_errors=True)
        done = subprocess.run([sys.executable, ROOT / ".ci" / "tools.py", "docs"], capture_output=True, text=True)
        (folder / "problems").write_text(done.stdout + done.stderr if done.returncode else "")

    return (once("site", build) / "problems").read_text()


@pytest.fixture(scope="module")
def site(problems) -> dict[str, BeautifulSoup]:
    """Every page of the site by its path."""
    pages = {p.relative_to(DOCS).as_posix(): BeautifulSoup(p.read_text(), "html.parser") for p in DOCS.rglob("*.html")}
    assert pages, problems
    return pages


def test_site_builds_without_warnings(problems):
    assert not problems


def test_every_notebook_is_a_page(site):
    assert sorted(site) == sorted(PAGES)


def missing(url: str, base: str, pages: dict[str, BeautifulSoup]) -> bool:
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
    return bool(parts.fragment) and pages[path].find(id=unquote(parts.fragment)) is None


def follow(base: str, page: BeautifulSoup, selector: str) -> str | None:
    """The page of the site that the first such link on the page `base` leads to."""
    link = page.select_one(selector)
    return link and posixpath.normpath(urljoin(base, link["href"]))


def test_pages_lead_from_one_to_the_next(site):
    """By the links at their feet, in reading order: after the home page the tutorials, the tour first; the tools come last."""
    assert PAGES[:3] == ["index.html", "tutorials/index.html", "tutorials/tour.html"]
    assert PAGES[-1].startswith("tools/")
    forwards = [follow(name, site[name], ".nav-page-next a") for name in PAGES]
    backwards = [follow(name, site[name], ".nav-page-previous a") for name in PAGES]
    assert forwards == [*PAGES[1:], None]
    assert backwards == [None, *PAGES[:-1]]


def test_sidebar_lists_every_page_in_reading_order(site):
    for base, page in site.items():
        entries = [link["href"] for link in page.select("#quarto-sidebar a.sidebar-link[href]")]
        assert [posixpath.normpath(urljoin(base, url)) for url in entries if url[0] != "#"] == PAGES


def test_home_page_leads_everywhere(site):
    """It links every page, but one whose result does not exist yet."""
    linked = {posixpath.normpath(url.partition("#")[0]) for url, _ in links(site["index.html"].select_one("main"))}
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
        if not outside(url) and urlsplit(url).scheme in ("", "http", "https") and missing(url, base, site)
    ]
    assert not broken


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
    assert not [url for url in pages if missing(url or ".", "", site)]
    assert not [name for name in files if not (ROOT / name).exists()]


def test_nothing_is_loaded_from_another_host(site):
    assert not [(base, url) for base, page in site.items() for url, loads in links(page) if loads and outside(url)]
    styles = "".join(p.read_text() for p in DOCS.rglob("*.css"))
    assert not re.findall(r"(?:@import|url\()\s*[\"']?(?:https?:)?//[^\"')]*", styles)


def api() -> list[str]:
    """Every exported function and class, as module.name."""
    found = []
    for module, symbols in index["syms"].items():
        exported = getattr(importlib.import_module(module), "__all__", [])
        found += [symbol for symbol in symbols if symbol.removeprefix(module + ".") in exported]
    return found


@pytest.mark.parametrize("symbol", api())
def test_api_entry_links_to_its_source(symbol, site):
    module, _, name = symbol.rpartition(".")
    where, path = index["syms"][module][symbol]
    page, _, anchor = where.partition("#")
    assert site[page].find(id=anchor), f"{where} is not on the site"
    heading = site[page].find("h3", string=name)  # not by its id: those of `MLP` and `mlp` differ by more than case
    source = heading.find_previous("a", string="source")["href"]
    file, _, line = source.partition("#L")
    assert file == SOURCE + path
    assert re.match(rf"(def|class) {name}\b", (ROOT / path).read_text().splitlines()[int(line) - 1])


# In a browser


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
    for flag in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-gpu", "window-size=1280,900"):
        options.add_argument("--" + flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    window = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield window
    window.quit()


@pytest.fixture(scope="module", params=PAGES)
def page(request, site, address, browser):
    """One page, loaded in the browser with empty logs before it."""
    browser.get_log("browser"), browser.get_log("performance")
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
    """Nothing but boxes that scroll by themselves is wider than a small screen."""
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    )
    try:
        boxes = "[document.documentElement, document.querySelector('main')]"
        assert max(browser.execute_script(f"return {boxes}.map(e => e.scrollWidth)")) <= 390
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_maths_is_found_where_the_notebooks_have_it(site):
    """A notebook with display maths gives a page with it, so that the checks above see some."""
    with_maths = [p for p in notebooks() if re.search(r"\$\$[^`]", p.read_text())]
    pages = [name for name, page in site.items() if page.select("main .math.display")]
    assert len(with_maths) == len(pages) > 0


def test_search_finds_create_ggn_mv(address, browser):
    from selenium.webdriver.support.ui import WebDriverWait

    browser.get(address)
    box = browser.find_element("css selector", ".smalldocs-search input")
    box.send_keys("create_ggn_mv")
    WebDriverWait(browser, 10).until(lambda b: b.find_elements("css selector", ".search-result"))
    results = browser.find_elements("css selector", ".search-result")
    assert any("create_ggn_mv" in result.text for result in results)
    target = index["syms"]["ggn_nb.operators.ggn"]["ggn_nb.operators.ggn.create_ggn_mv"][0]
    assert address + target in [result.get_attribute("href") for result in results]
    browser.get(address + target)
    assert browser.find_element("id", "create_ggn_mv").is_displayed()
