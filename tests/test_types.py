"""What type checkers make of the package: nothing to say about a user's script, an error at each mistake."""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

SCRIPTS = ROOT / "tests" / "types"
WRONG = SCRIPTS / "wrong.py"
MARKED = [n for n, line in enumerate(WRONG.read_text().splitlines(), 1) if line.endswith("# error")]


def by_mypy(folder: Path) -> set[tuple[str, int]]:
    """Where mypy finds an error: file and line."""
    command = [sys.executable, "-m", "mypy", "--follow-imports=silent", "--cache-dir", folder, SCRIPTS]
    done = subprocess.run(command, env=os.environ | {"MYPYPATH": str(ROOT)}, capture_output=True, text=True)
    assert "checked 2 source files" in done.stdout, done.stdout + done.stderr
    found = re.findall(r"(\w+\.py):(\d+): error", done.stdout)
    return {(name, int(line)) for name, line in found}


def by_pyright(folder: Path) -> set[tuple[str, int]]:
    """Where pyright, in the distribution that needs no download, finds an error: file and line."""
    settings = {"typeCheckingMode": "standard", "extraPaths": [str(ROOT)], "include": [str(SCRIPTS)]}
    (folder / "pyrightconfig.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "basedpyright", "--pythonpath", sys.executable, "--outputjson", "-p", folder]
    report = json.loads(subprocess.run(command, capture_output=True, text=True).stdout)
    assert report["summary"]["filesAnalyzed"] == 2
    errors = [d for d in report["generalDiagnostics"] if d["severity"] == "error"]
    return {(Path(d["file"]).name, d["range"]["start"]["line"] + 1) for d in errors}


@pytest.mark.parametrize("check", [by_mypy, by_pyright])
def test_type_checkers_find_mistakes_and_nothing_else(check, tmp_path):
    assert len(MARKED) == 7
    assert check(tmp_path) == {("wrong.py", line) for line in MARKED}


def test_the_right_script_runs(capsys):
    runpy.run_path(str(SCRIPTS / "right.py"))
    assert "True" in capsys.readouterr().out
