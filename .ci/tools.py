"""Work on the notebooks: run them, refresh what is made from them, build the site.

    python .ci/tools.py run [--flags "slow gpu"] NOTEBOOK ...   execute, save the outputs, clean
    python .ci/tools.py prepare                                 clean, export, sidebar, README.md
    python .ci/tools.py docs                                    build the site into _docs

The Makefile calls these; the tests call the functions.
"""

import argparse
import functools
import json
import os
import posixpath
import re
import shutil
import sys
import tempfile
import unicodedata
from pathlib import Path

import nbformat
import yaml
from nbdev.config import get_config

ROOT = Path(__file__).resolve().parent.parent
NBS, DOCS = ROOT / "nbs", ROOT / "_docs"
CONTENTS = [  # of nbs/ and of the site, in reading order: a page of its own, or a folder with its section's title
    "index.ipynb",
    ("tutorials", "Tutorials"),
    "demo.ipynb",
    ("how-to", "How-to"),
    "api.ipynb",
    "map.ipynb",
    ("losses", "Losses"),
    ("operators", "Operators"),
    ("layers", "Layers"),
    ("linalg", "Linear algebra"),
    ("applications", "Applications"),
    ("timing", "Timing"),
    ("tools", "Tools"),
]
NEXT = r"^## (Where to go next|Read on)"  # the heading under which a page says what to read after it
ALSO = {"tutorials/sequences.html": "mask padding"}  # other words for what a page is about, for the search


def in_folder(folder: str) -> list[Path]:
    """The notebooks of a folder: its index, then by number."""
    return sorted((NBS / folder).glob("*.ipynb"), key=lambda path: (path.name != "index.ipynb", path.name))


def notebooks() -> list[Path]:
    """Every notebook of the project; those of a folder in the order in which they build on each other."""
    found: list[Path] = []
    for entry in CONTENTS:
        found += [NBS / entry] if isinstance(entry, str) else in_folder(entry[0])
    return found


@functools.cache
def sources(path: Path, kind: str) -> list[str]:
    """The cells of a notebook that are "code" or "markdown"."""
    return ["".join(cell["source"]) for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == kind]


@functools.cache
def is_inside(path: Path) -> bool:
    """Whether a notebook of a room defines no public name: its page comes last on the site."""
    exported = re.compile(r"#\| export\s*\n(?:.*\n)*?(?:def|class) [^_]")
    cells = sources(path, "code")
    has_module = any("#| default_exp" in source for source in cells)
    return has_module and not any(exported.match(source) for source in cells)


def contents() -> list[tuple[str, list[Path]]]:
    """The site's pages in reading order, by section, with what is inside a room after all else; "" holds a page of its own."""
    found, inside = [], []
    for entry in CONTENTS:
        if isinstance(entry, str):
            found.append(("", [NBS / entry]))
            continue
        folder, title = entry
        hidden = [path for path in in_folder(folder) if is_inside(path)]
        found.append((title, [path for path in in_folder(folder) if path not in hidden]))
        inside += [(f"Inside: {title.lower()}", hidden)] if hidden else []
    return found + inside


def reading_order() -> list[Path]:
    """The notebooks as the site leads through them."""
    return [path for _, paths in contents() for path in paths]


# Run


def directives(source: str) -> dict[str, str]:
    """The `#|` lines at the top of a code cell: {"gpu": ""} or {"eval": "false"}."""
    lines = re.match(r"(?:#\|.*\n?|\s*\n)*", source)[0]
    return {k: v.strip() for k, v in re.findall(r"#\|\s*(\w+):?(.*)", lines)}


def execute(path: Path, flags: str = "") -> nbformat.NotebookNode:
    """Run a notebook in a fresh kernel; a failing cell raises with its traceback.

    Cells marked with one of settings.ini's `tst_flags` do not run, and keep their outputs,
    unless the flag is in `flags`.
    """
    from nbclient import NotebookClient
    from traitlets.config import Config

    skip = set(get_config().tst_flags.split()) - set(flags.split())
    nb = nbformat.read(path, as_version=4)
    for cell in nb.cells:
        marks = directives(cell.source)
        if skip & marks.keys() or marks.get("eval") == "false":
            cell.metadata["tags"] = ["skip-execution"]
    where = {"metadata": {"path": str(path.parent)}}
    settings = {"timeout": 900, "record_timing": False, "coalesce_streams": True}
    with tempfile.TemporaryDirectory() as folder:  # talk through files: kernels started together may take the same ports
        kernel = {"transport": "ipc", "connection_file": f"{folder}/kernel.json"}
        config = Config({"KernelManager": kernel if os.name == "posix" else {}})
        return NotebookClient(nb, kernel_name="python3", resources=where, config=config, **settings).execute()


def run(paths: list[str], flags: str = "") -> None:
    """Execute notebooks and save them, clean, with their new outputs."""
    from nbdev.clean import nbdev_clean

    for path in [Path(p).resolve() for p in paths] or notebooks():
        print(f"running {path.relative_to(ROOT)}", flush=True)
        nbformat.write(execute(path, flags), path)
        nbdev_clean.__wrapped__(str(path))


# Prepare


def sidebar() -> str:
    """The site's contents as YAML: pages of their own, and one section for each folder."""
    entries: list = []
    for title, paths in contents():
        pages = [path.relative_to(NBS).as_posix() for path in paths]
        entries += [{"section": title, "contents": pages}] if title else pages
    head = "# Made from the notebooks' folders by `make prepare`.\n"
    return head + yaml.safe_dump({"website": {"sidebar": {"contents": entries}}}, sort_keys=False)


def readme() -> tuple[str, dict[str, bytes]]:
    """README.md as text, and its pictures by path, from nbs/index.ipynb."""
    from nbconvert import MarkdownExporter
    from nbdev.processors import FilterDefaults
    from nbdev.serve_drv import exec_nb

    with tempfile.TemporaryDirectory() as folder:
        processed = Path(folder) / "index.ipynb"
        exec_nb(NBS / "index.ipynb", processed, FilterDefaults)
        nb = nbformat.read(processed, as_version=4)
    front = yaml.safe_load(nb.cells[0].source.strip().strip("-"))
    title = f"# {front['title']}\n\n{badges()}\n\n> {front['description']}"
    nb.cells[0] = nbformat.v4.new_markdown_cell(title)
    sources = [cell.source for cell in nb.cells]
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            cell.source = from_root(cell.source)
        elif cell.cell_type == "code":
            hidden = directives(cell.source).get("echo") == "false"
            cell.metadata["transient"] = {"remove_source": hidden}
            cell.source = re.sub(r"^(#\|.*\n)+", "", cell.source)
    nb.metadata["language_info"] = {"name": "python"}
    text, found = MarkdownExporter().from_notebook_node(nb, {"output_files_dir": "nbs/index_files"})
    said = iter(re.findall(r'^#\| fig-alt: "(.*)"$', "\n".join(sources), flags=re.M))
    text = re.sub(r"!\[png\]", lambda _: f"![{next(said)}]", text)
    return re.sub(r"\n\s*\n", "\n\n", text).strip() + "\n", found["outputs"]


def badges() -> str:
    """A row of badges, for README.md alone: a page of the site loads nothing from another host."""
    cfg = get_config()
    flow = f"{cfg.git_url}/actions/workflows"
    row = {
        "tests": (f"{flow}/test.yml/badge.svg", f"{flow}/test.yml"),
        "site": (f"{flow}/site.yml/badge.svg", f"{cfg.doc_host}{cfg.doc_baseurl}/"),
        "version": (f"https://img.shields.io/pypi/v/{cfg.lib_name}.svg", f"https://pypi.org/project/{cfg.lib_name}/"),
        "Python": (f"https://img.shields.io/pypi/pyversions/{cfg.lib_name}.svg", f"https://pypi.org/project/{cfg.lib_name}/"),
        "licence": ("https://img.shields.io/badge/licence-Apache_2.0-blue.svg", f"{cfg.git_url}/blob/{cfg.branch}/LICENSE"),
    }
    return "\n".join(f"[![{name}]({picture})]({leads})" for name, (picture, leads) in row.items())


def from_root(markdown: str) -> str:
    """Relative links of a page in nbs/, written from the repository's root; code stays as it is."""

    def fix(link: re.Match) -> str:
        return link[1] + posixpath.normpath("nbs/" + link[2])

    parts = re.split(r"(```.*?```|`[^`\n]*`)", markdown, flags=re.S)
    parts[::2] = [re.sub(r'(\]\(|src="|href=")(?!\w+:|#)([^)"\s]+)', fix, part) for part in parts[::2]]
    return "".join(parts)


def prepare() -> None:
    """Clean the notebooks and write all that is made from them."""
    from nbdev.clean import nbdev_clean
    from nbdev.doclinks import nbdev_export
    from nbdev.quarto import refresh_quarto_yml

    nbdev_clean.__wrapped__()
    nbdev_export.__wrapped__()
    refresh_quarto_yml()
    (NBS / "sidebar.yml").write_text(sidebar())
    text, pictures = readme()
    (ROOT / "README.md").write_text(text)
    shutil.rmtree(NBS / "index_files", ignore_errors=True)
    for name, data in pictures.items():
        (ROOT / name).parent.mkdir(exist_ok=True)
        (ROOT / name).write_bytes(data)


# Docs


def docs() -> int:
    """Build the site into _docs; return the number of warnings."""
    from nbdev.serve import proc_nbs
    from smalldocs import highlight, markdown
    from smalldocs.config import load
    from smalldocs.site import Page, Site

    class NbdevSite(Site):
        """A site with nbdev's page names, 03_ggn.ipynb as ggn.html; each page ends with what to read next."""

        def read(self, src) -> Page:
            page = super().read(src)
            page.out = page.out.with_name(page.front.pop("output-file", page.out.name))
            page.body += further(NBS / src)
            return page

        def llms_copy(self, page: Page) -> tuple[str, dict[str, bytes]]:
            text, files = super().llms_copy(page)
            return re.sub(r'^:::.*\n\n?|^<!-- WARNING.*\n\n?| ?\{[.#][\w.-]+\}$|<a id="[^"]*"></a>', "", text, flags=re.M), files

        def write_llms_txt(self) -> None:
            (self.out / "llms.txt").write_text(llms_txt())

        def warn(self, message: str) -> None:
            if "output-file" not in message:
                super().warn(message)

        def write_search(self) -> None:
            super().write_search()
            path = self.out / "search.json"
            found = searchable(json.loads(path.read_text()), {p.out.as_posix(): p.html for p in self.pages.values()})
            path.write_text(json.dumps(found, ensure_ascii=False))

    # Without digits allowed beside it, `$x$` at the start of a line that ends in a digit is not read as maths.
    plugin = markdown.dollarmath_plugin
    markdown.dollarmath_plugin = lambda md, **options: plugin(md, **options | {"allow_digits": True})
    highlight.css_class = functools.cache(highlight.css_class)  # a fifth of the time
    project, cfg = load(proc_nbs(force=True, n_workers=2)), get_config()
    project.website["page-footer"]["left"] = f"{cfg.lib_name} {cfg.version}"
    site = NbdevSite(project)
    site.out = DOCS
    print(f"{site.build()} pages in {DOCS.name}")
    finish(site)
    for warning in site.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    return len(site.warnings)


def searchable(entries: list[dict], pages: dict[str, str]) -> list[dict]:
    """The entries of the search, with one for each argument, in the order and with the rank that .ci/search.js reads."""
    import html

    import ggn_nb.losses
    import reference

    text = lambda markup: " ".join(html.unescape(re.sub(r"<[^>]+>", " ", markup)).split())
    titles = {entry["href"].partition("#")[0]: entry["title"] for entry in entries}
    for page, body in pages.items():
        for row in re.findall(r"<tr>(.*?)</tr>", body, flags=re.S):
            for name in re.findall(r'<a id="([\w.]+)"></a>', row):
                href = f"{page}#{name}"
                entries.append({"objectID": href, "href": href, "title": titles[page], "section": name, "text": text(row)})
    order = [_page(path) for path in reading_order()]
    inside = {_page(path) for path in notebooks() if is_inside(path)}
    names = [*ggn_nb.__all__, *ggn_nb.losses.__all__]

    def place(entry: dict) -> tuple[int, ...]:
        page, _, anchor = entry["href"].partition("#")
        name = anchor.partition(".")[0]
        return entry["rank"], names.index(name) if name in names else len(names), order.index(page)

    for entry in entries:
        entry["text"] = re.sub(r"\\([A-Za-z]{2,}) ?", letter, entry["text"])
        page, _, anchor = entry["href"].partition("#")
        room = page.split("/")[0]
        public = anchor.partition(".")[0] in reference.public_by_page(page)
        guide = room in ("tutorials", "how-to") or "/" not in page and page != "map.html"
        if room in ("tools", "timing") or page in inside:
            entry["rank"] = 4 if page in inside else 2
        else:
            entry["rank"] = 0 if guide else 0.2 if public else 1
        if entry["href"] in ALSO:
            entry["also"] = ALSO[entry["href"]]
    return sorted(entries, key=place)


def letter(command: re.Match) -> str:
    """A command of TeX as plain text: a Greek letter as such, what sets the type as nothing, others by their name."""
    name = command[1]
    try:
        return unicodedata.lookup(f"GREEK {'SMALL' if name.islower() else 'CAPITAL'} LETTER {name.upper()}")
    except KeyError:
        return "" if name in ("frac", "left", "right", "mathrm", "text", "mathbb", "top", "quad", "qquad", "big", "Big") else name + " "


def _page(path: Path) -> str:
    """The page of a notebook."""
    from nbdev.doclinks import _nbpath2html

    return _nbpath2html(path.relative_to(NBS)).as_posix()


# What to read next


@functools.cache
def head(path: Path) -> tuple[str, str]:
    """Title and summary of a notebook, by its first cell."""
    return re.match(r"# (.+)\n\n> (.+)", sources(path, "markdown")[0]).groups()


@functools.cache
def leads_to(path: Path) -> set[Path]:
    """The notebooks that the text of a notebook links."""
    return {(path.parent / name).resolve() for name in re.findall(r"\]\(([^)#:]+\.ipynb)", "\n".join(sources(path, "markdown")))}


def further(path: Path) -> str:
    """What to read after a page that does not say so: the next one (after the last the first), and what leads to it, guides first."""
    if any(re.search(NEXT, text, flags=re.M) for text in sources(path, "markdown")):
        return ""
    order = reading_order()
    after = (order[order.index(path) + 1 :] or order)[:1]
    users = [each for each in order if path in leads_to(each) and "/" in each.relative_to(NBS).as_posix()]
    users = [each for each in users if each.stem != "index" and each not in after][:4]
    link = lambda each: f"[{head(each)[0]}]({posixpath.relpath(each, path.parent)})"
    lines = [f"- {link(each)}: {head(each)[1]}" for each in after]
    lines += [f"- Used in {', '.join(map(link, users))}."] * bool(users)
    return "\n\n## Where to go next\n\n" + "\n".join(lines) + "\n"


def llms_txt() -> str:
    """The contents of the site for language models: each page's copy in Markdown, by section, with its summary."""
    cfg = get_config()
    lines = [f"# {cfg.lib_name}\n\n> {cfg.description}"]
    for title, paths in contents():
        lines += [f"\n## {title}\n"] * bool(title)
        lines += [f"- [{head(p)[0]}]({cfg.doc_host}{cfg.doc_baseurl}/{_page(p).removesuffix('.html')}.llms.md): {head(p)[1]}" for p in paths]
    return "\n".join(lines) + "\n"


# Finish


def finish(site) -> None:
    """Make the site whole: nothing comes from another host, the search is its own, and each page can be opened as a notebook."""
    from smalldocs.layout import KATEX

    shutil.copytree(NBS / "katex", DOCS / "site_libs" / "katex")
    shutil.copy(ROOT / ".ci" / "search.js", DOCS / "site_libs" / "fuse" / "fuse.min.js")
    cfg = get_config()
    home = f"{cfg.doc_host}{cfg.doc_baseurl}/"
    for page in site.pages.values():
        file = DOCS / page.out
        up = "../" * (len(page.out.parts) - 1) or "./"
        html = file.read_text().replace(KATEX, up + "site_libs/katex").replace(f'href="{home}', f'href="{up}')
        html = re.sub(r"(<pre[^>]*><code[^>]*>)(.*?)(?=</code>)", lambda code: code[1] + hanging(code[2]), html, flags=re.S)
        shutil.copy(NBS / page.src, file.parent)
        file.write_text(re.sub(r'<header id="title-block-header".*?</header>', lambda head: head[0] + opened(page), html, flags=re.S))
    for css in (DOCS / "site_libs" / "themes").glob("*.css"):
        css.write_text(re.sub(r"@import url\(https:[^)]*\);", "", css.read_text()))


def opened(page) -> str:
    """A line of links by which a page is opened as what it is made from."""
    cfg = get_config()
    place = f"{cfg.git_url.removeprefix('https://github.com/')}/blob/{cfg.branch}/{cfg.nbs_path.name}/{page.src}"
    links = {
        "Download": f'href="{page.src.name}" download',
        "Open in Colab": f'href="https://colab.research.google.com/github/{place}"',
        "Source": f'href="https://github.com/{place}"',
        "Markdown": f'href="{page.out.stem}.llms.md"',
        "What it needs": f'href="{posixpath.relpath("how-to/install.html", page.out.parent.as_posix())}#open-a-page-as-a-notebook"',
    }
    return f'<p class="opened">This page is a notebook: {" · ".join(f"<a {to}>{name}</a>" for name, to in links.items())}</p>'


def hanging(code: str) -> str:
    """Highlighted code whose long lines, where they are broken, go on further to the right than they began."""
    found, within = [], []
    for line in code.split("\n"):
        before = list(within)
        for tag in re.findall(r"<[^>]*>", line):
            within.append(tag) if tag[1] != "/" else within.pop()
        text = re.sub(r"<[^>]*>|&\w+;", lambda part: "" if part[0][0] == "<" else "x", line)
        if len(text) > 90:
            inside = "".join(before) + line + "</span>" * len(within)
            begins = len(text) - len(text.lstrip())
            line = "</span>" * len(before) + f'<span class="long" style="--begins: {begins}ch">{inside}</span>' + "".join(within)
        found.append(line)
    return "\n".join(found)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["run", "prepare", "docs"])
    parser.add_argument("notebook", nargs="*", help="for run; all of them when none is named")
    parser.add_argument("--flags", default="", help="for run: also run cells with these flags")
    args = parser.parse_intermixed_args()
    os.chdir(ROOT)
    sys.exit(run(args.notebook, args.flags) if args.action == "run" else globals()[args.action]())
