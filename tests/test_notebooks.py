"""The notebooks: each one runs, is clean, and agrees with what is made from it."""

import ast
import gc
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
from nbdev.config import get_config
from nbdev.test import test_nb as run_cells
from tools import NBS, ROOT, notebooks, readme, sidebar

NAMES = [path.relative_to(NBS).as_posix() for path in notebooks()]
GENERATED = {"_proc", "_docs", "build", "dist"}


@pytest.fixture
def copy(tmp_path):
    """A copy of what nbdev reads, and a function that runs a command of nbdev in it."""
    for folder in ("nbs", "ggn_nb"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    shutil.copy(ROOT / "settings.ini", tmp_path)

    def nbdev(command: str) -> Path:
        code = f"from nbdev.{command.split('.')[0]} import *; {command.split('.')[1]}"
        env = {k: v for k, v in os.environ.items() if k != "IN_TEST"}
        subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, check=True)
        return tmp_path

    return nbdev


def contents(folder: Path) -> dict[str, str]:
    """The files of a package by path, without caches."""
    files = (p for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
    return {p.relative_to(folder).as_posix(): p.read_text() for p in files}


def test_every_notebook_of_the_repository_is_run():
    tree = {
        path.relative_to(NBS).as_posix() if path.is_relative_to(NBS) else str(path)
        for path in ROOT.rglob("*.ipynb")
        if not any(part[0] == "." or part in GENERATED for part in path.relative_to(ROOT).parts[:-1])
    }
    assert len(NAMES) > 0
    assert sorted(NAMES) == sorted(tree)


# Each notebook has a process of its own, which starts with the libraries that most import.
FORK = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
PROCESSES = multiprocessing.get_context(FORK)
PROCESSES.set_forkserver_preload(["ggn_nb", "matplotlib.pyplot", "nbdev.test"])


def check_notebook(path: Path, flags: str, thresholds: tuple[int, int, int]) -> str:
    """Run the cells of a notebook, as nbdev does; the traceback of the first that fails."""
    gc.freeze()
    gc.set_threshold(*thresholds)
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()) as errors:
        passed, _ = run_cells(path, get_config().tst_flags.split(), flags.split())
    return "" if passed else errors.getvalue()


@pytest.mark.parametrize("name", NAMES)
def test_notebook_runs(name, pytestconfig, monkeypatch):
    monkeypatch.chdir(ROOT)
    with ProcessPoolExecutor(1, PROCESSES) as process:
        failure = process.submit(check_notebook, NBS / name, pytestconfig.getoption("flags"), gc.get_threshold()).result()
    if failure:
        pytest.fail(f"{name}\n{failure}", pytrace=False)


@pytest.mark.parametrize("name", NAMES)
def test_cell_ids_are_present_and_unique(name):
    nb = json.loads((NBS / name).read_text())
    ids = [cell.get("id") for cell in nb["cells"]]
    assert all(ids)
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("name", NAMES)
def test_saved_outputs_are_results(name):
    """No warning, no address in memory and no folder of the machine that ran it."""
    cells = json.loads((NBS / name).read_text())["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output.get("name") == "stderr"]
    texts = ["".join(output.get("text") or output.get("data", {}).get("text/plain", "")) for output in outputs]
    assert not [text for text in texts if re.search(r"0x[0-9a-f]{8}|/(?:tmp|home|root|Users)/", text)]


def test_notebooks_are_clean(copy):
    cleaned = copy("clean.nbdev_clean()") / "nbs"
    dirty = [name for name in NAMES if (cleaned / name).read_bytes() != (NBS / name).read_bytes()]
    assert not dirty, "run `make prepare`"


def test_exported_modules_are_in_sync(copy, tmp_path):
    for path in (tmp_path / "ggn_nb").rglob("*.py"):
        if path.name != "__init__.py":
            path.unlink()
    exported = copy("doclinks.nbdev_export()") / "ggn_nb"
    assert contents(exported) == contents(ROOT / "ggn_nb"), "run `make prepare`"


def test_exported_modules_compile_without_warnings(tmp_path):
    shutil.copytree(ROOT / "ggn_nb", tmp_path / "ggn_nb", ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-W", "error", "-m", "compileall", "-q", "ggn_nb"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_site_settings_are_in_sync(copy):
    made = copy("quarto.refresh_quarto_yml()") / "nbs"
    assert (made / "nbdev.yml").read_text() == (NBS / "nbdev.yml").read_text(), "run `make prepare`"
    assert sidebar() == (NBS / "sidebar.yml").read_text(), "run `make prepare`"


def test_readme_is_in_sync(monkeypatch):
    monkeypatch.chdir(ROOT)
    text, pictures = readme()
    assert text == (ROOT / "README.md").read_text(), "run `make prepare`"
    assert pictures == {p.relative_to(ROOT).as_posix(): p.read_bytes() for p in (NBS / "index_files").glob("*")}


def test_contributing_example_runs():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.S)
    assert len(blocks) == 2
    exec("\n".join(blocks), {})


# Words that are spelt otherwise in Britain; names and titles of works are as they are.
AMERICAN = (
    r"\b(?!(?:re|over)?siz(?:e|es|ed|ing)\b|seiz|priz)(?:\w+(?:iz|yz)(?:e|es|ed|ing|er|ers|able|ation|ations)"
    r"|(?:behavi|col|fav|flav|hon|lab|neighb|rum|vap)or(?!i[st]|at)\w*|(?:cent|met|fib)er(?:s|ed)?|gray\w*|artifacts?|toward|catalogs?|dialogs?"
    r"|(?:model|label|travel|cancel|signal|channel|level)(?:ed|ing)|fulfills?|skillful|defense|judgment|math)\b"
)
PROPER = r"(?i:generalized) Gauss-Newton|Apache License"


def prose(markdown: str) -> str:
    """Text without code, maths, words in quotation marks or italics, and the texts of links to other sites."""
    apart = r"```.*?```|``.*?``|`[^`]*`|\$\$.*?\$\$|\$[^$]*\$|\"[^\"\n]*\"|\[[^\]]*\]\(http[^)]*\)|\]\([^)]*\)|(?<!\*)\*[^*\n]+\*(?!\*)|https?:\S+"
    return re.sub(f"{apart}|{PROPER}", "", markdown, flags=re.S)


def test_prose_is_british():
    """The text of notebooks and of the files in Markdown, and the docstrings."""
    texts = {str(name): (ROOT / name).read_text() for name in ROOT.glob("*.md")}
    for path in notebooks():
        cells = json.loads(path.read_text())["cells"]
        texts[path.name] = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    for path in (ROOT / "ggn_nb").rglob("*.py"):
        nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)]
        texts[str(path)] = "\n\n".join(re.sub(r">>>.*", "", ast.get_docstring(node) or "") for node in nodes)
    assert not [(name, found[0]) for name, text in texts.items() for found in re.finditer(AMERICAN, prose(text), flags=re.I)]
