"""What the repository says of itself: versions, workflows, forms."""

import json
import re
import sys
from configparser import ConfigParser
from itertools import combinations, product
from math import prod

import pytest
import yaml
from conftest import ROOT, cover
from tools import NBS, directives

CONFIG = ConfigParser(delimiters=["="])
CONFIG.read(ROOT / "settings.ini", encoding="utf-8")
SETTINGS = CONFIG["DEFAULT"]
WORKFLOWS = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / ".github" / "workflows").glob("*.yml")}
TUTORIALS, HOW_TO = (sorted((NBS / folder).glob("[0-9]*.ipynb")) for folder in ("tutorials", "how-to"))
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))


def minors(first: str, last: str) -> list[str]:
    """The versions of Python from one to another: 3.11, 3.12, …"""
    return [f"3.{minor}" for minor in range(int(first.split(".")[1]), int(last.split(".")[1]) + 1)]


@pytest.mark.parametrize("sizes", [(5,), (4, 3), (2, 5, 3), (2, 1, 2, 3)], ids=str)
def test_a_cover_of_cases_has_all_pairs_of_values_and_few_cases(sizes):
    cases = list(product(*map(range, sizes)))
    strength = 2 if len(sizes) > 2 else 1
    parts = lambda cases: {part for case in cases for part in combinations(enumerate(case), strength)}
    chosen = cover(cases)
    assert chosen <= set(cases)
    assert parts(chosen) == parts(cases)
    assert len(chosen) <= 1.25 * prod(sorted(sizes)[-strength:])


def test_citation_and_changelog_have_the_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    latest = re.search(r"^## (\S+?),", (ROOT / "CHANGELOG.md").read_text(), flags=re.M)[1]
    assert citation["version"] == latest == SETTINGS["version"]
    assert citation["license"] == "Apache-2.0"
    assert citation["repository-code"] == SETTINGS["git_url"]


def test_workflows_are_tests_site_and_release():
    assert set(WORKFLOWS) == {"test", "site", "release"}
    assert {name: flow["name"] for name, flow in WORKFLOWS.items()} == {name: name for name in WORKFLOWS}


def test_workflows_keep_what_they_have_downloaded():
    steps = [step for flow in WORKFLOWS.values() for job in flow["jobs"].values() for step in job["steps"]]
    pythons = [step["with"] for step in steps if step.get("uses", "").startswith("actions/setup-python")]
    assert len(pythons) >= 5
    assert not [given for given in pythons if given.get("cache") != "pip"]


def test_workflow_runs_each_version_of_python():
    matrix = WORKFLOWS["test"]["jobs"]["test"]["strategy"]["matrix"]
    assert matrix["python"] == minors(SETTINGS["min_python"], SETTINGS["max_python"])


def test_workflow_runs_the_oldest_and_the_newest_jax():
    versions = {run["jax"] for run in WORKFLOWS["test"]["jobs"]["versions"]["strategy"]["matrix"]["include"]}
    oldest = re.search(r"jax>=([\d.]+)", SETTINGS["requirements"])[1]
    assert versions == {f"{oldest}.0", "newest"}


def imported_by_tutorials() -> set[str]:
    """The modules that the tutorials and how-to pages import when they run, without Python's own."""
    pages = [json.loads(path.read_text()) for name in ("tutorials", "how-to") for path in (NBS / name).glob("*.ipynb")]
    sources = ["".join(cell["source"]) for page in pages for cell in page["cells"] if cell["cell_type"] == "code"]
    run = [source for source in sources if directives(source).get("eval") != "false"]
    names = {name for source in run for name in re.findall(r"^(?:import|from) (\w+)", source, flags=re.M)}
    return names - sys.stdlib_module_names - {"ggn_nb", "jax", "numpy"}


def test_tutorials_are_an_extra_with_all_that_they_import():
    # where the module has another name, or comes with another library
    libraries = {"sklearn": "scikit-learn", "haiku": "dm-haiku", "PIL": "matplotlib", "IPython": "jupyterlab"}
    needed = {libraries.get(name, name) for name in imported_by_tutorials()}
    brought = {name.partition(">")[0] for name in SETTINGS["tutorials_requirements"].split()}
    assert {"matplotlib", "scikit-learn", "flax"} <= needed
    assert not needed - brought
    assert "jupyterlab" in brought


def prose(path) -> str:
    """The text of a page."""
    return "\n".join("".join(cell["source"]) for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "markdown")


@pytest.mark.parametrize("page", TUTORIALS + HOW_TO, ids=lambda path: path.stem)
def test_page_says_where_to_go_next(page):
    links = re.split(r"^## Where to go next$", prose(page), flags=re.M)[1:]
    assert len(links) == 1
    assert re.search(r"\]\((?:\.\./)?[\w/-]+\.ipynb\)", links[0])


@pytest.mark.parametrize("page", TUTORIALS, ids=lambda path: path.stem)
def test_tutorial_says_what_it_needs_and_how_long_it_runs(page):
    top = prose(page)[:700]
    stated = re.search(r'Needs `pip install "ggn_nb\[[\w,]+\]"`; runs in about (\d+) seconds\.', top)
    entry = prose(NBS / "tutorials/index.ipynb").split(f"]({page.name})", 1)[1]
    assert re.search(r"Runs in about (\d+) seconds", entry)[1] == stated[1]


def test_readme_is_legible_on_pypi():
    """No mathematics, which PyPI does not render; a picture with words for it; badges; the address of the site."""
    readme = (ROOT / "README.md").read_text()
    assert "$" not in readme
    badges, pictures = re.findall(r"\[!\[(.*?)\]", readme), re.findall(r"(?<!\[)!\[(.*?)\]\(nbs/", readme)
    assert len(badges) >= 4
    assert len(pictures) == 1
    assert len(pictures[0]) > 40
    assert f"<{SETTINGS['doc_host']}{SETTINGS['doc_baseurl']}/>" in readme


@pytest.mark.parametrize("form", FORMS, ids=lambda path: path.stem)
def test_issue_forms_are_complete(form):
    content = yaml.safe_load(form.read_text())
    if form.stem == "config":
        assert all({"name", "url", "about"} == set(link) for link in content["contact_links"])
    else:
        assert {"name", "description", "body"} <= set(content)
        ids = [field["id"] for field in content["body"]]
        assert len(set(ids)) == len(ids) > 0
