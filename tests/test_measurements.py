"""What the timing pages show: from which JAX it is, against which targets, and by which scripts it was measured."""

import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import jax
import pytest
from packaging.requirements import Requirement
from tools import NBS, ROOT, notebooks

TIMING = NBS / "timing"
KEPT = sorted((TIMING / "data").glob("*.json"))
TARGETS = json.loads((TIMING / "targets.json").read_text())


# Versions


def allowed_versions():
    """The versions of JAX that settings.ini allows."""
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini")
    requirements = map(Requirement, config["DEFAULT"]["requirements"].split())
    (specifier,) = [r.specifier for r in requirements if r.name == "jax"]
    return specifier


def versions_in_outputs(notebook: dict) -> set[str]:
    """The versions of JAX that a notebook's saved outputs name."""
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
    texts = [output.get("text", output.get("data", {}).get("text/plain", "")) for output in outputs]
    text = "\n".join("".join(lines) for lines in texts)
    return set(re.findall(r"\bjax\W{1,4}(\d+\.\d+\.\d+)", text, flags=re.I))


def versions_in_data(found) -> set[str]:
    """The versions of JAX in a kept measurement: the values of every key `jax`."""
    if isinstance(found, list):
        return set().union(*map(versions_in_data, found))
    if not isinstance(found, dict):
        return set()
    return {found["jax"]} if "jax" in found else set().union(*map(versions_in_data, found.values()))


def outdated(versions: set[str]) -> list[str]:
    """Those that settings.ini does not allow."""
    allowed = allowed_versions()
    return sorted(version for version in versions if not allowed.contains(version, prereleases=True))


def test_versions_are_found_where_they_are():
    texts = [["reference: a; platform cpu, jax 0.10.2, dtype float32\n"], "2 cores of a CPU, JAX 0.9.1, 2026-11-25"]
    outputs = [{"text": texts[0]}, {"data": {"text/plain": texts[1]}}, {"data": {"image/png": "jax 1.2.3"}}]
    outputs += [{"text": "{'device': 'cpu', 'jax': '0.7.0'}"}, {"text": "jaxlib 0.3.0, optax 0.2.8"}]
    assert versions_in_outputs({"cells": [{"outputs": outputs}, {}]}) == {"0.10.2", "0.9.1", "0.7.0"}
    assert versions_in_data({"a": [{"context": {"jax": "0.10.2"}}], "where": {"jax": "0.7.0"}}) == {"0.10.2", "0.7.0"}
    assert outdated({"0.6.2", "0.10.2", "0.10.1", "0.11.0"}) == ["0.10.2", "0.6.2"]


@pytest.mark.parametrize("path", notebooks(), ids=lambda path: path.relative_to(NBS).as_posix())
def test_saved_outputs_are_from_an_allowed_jax(path):
    assert not outdated(versions_in_outputs(json.loads(path.read_text()))), "measure again"


@pytest.mark.parametrize("path", KEPT, ids=lambda path: path.name)
def test_kept_measurements_are_from_an_allowed_jax(path):
    versions = versions_in_data(json.loads(path.read_text()))
    assert versions
    assert not outdated(versions), "measure again"


# Targets


def newest(name: str) -> dict:
    """The newest measurement of a name on a CPU; the files' names end in the date."""
    return json.loads(max(path for path in KEPT if path.name.startswith(f"{name}-cpu")).read_text())


def test_targets_are_of_what_is_measured():
    """Each target is of a case and a contestant that the newest measurement on a CPU has."""
    products, policies, layers = newest("products"), newest("policies"), newest("layers")
    measured = {
        "products": policies["products"],
        "eight vectors": {case: by_k["8"] for case, by_k in policies["vectors"].items()},
        "streams": policies["streams"],
        "compiling": policies["compiling"],
        "overhead": {"eager call": {name.removeprefix("G, ") for name in products["overhead"]}},
        "layers": {f"{part}, {case}": names for part in ("diagonals", "products") for case, names in layers[part].items()},
    }
    assert set(TARGETS) == {"where", "unit", *measured}
    assert set(TARGETS["unit"]) == set(measured)
    for part, found in measured.items():
        for case, targets in TARGETS[part].items():
            assert set(targets) <= set(found[case]), f"{part}, {case}"


# Scripts beside the notebooks


def run_python(*arguments, folder=TIMING, **environment) -> str:
    """What a fresh interpreter prints."""
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths} | environment
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def load_script(name: str):
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(name, TIMING / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_peak_memory_holds_what_the_data_needs():
    peaks = [int(run_python("peak_memory.py", *options)) for options in ([4096], [4096, "--batch-size", 64])]
    hidden = 4096 * 1024 * 4  # bytes of one layer's output for all samples
    assert peaks[0] - peaks[1] > hidden


@pytest.mark.skipif(sys.platform != "linux", reason="needs an affinity to a core")
def test_profile_has_every_policy_and_kind():
    found = json.loads(run_python("profile_products.py", "CNN", "--num-samples", 4))
    assert set(found) == {"gradient", "cached", "cached, batch_size", "recomputed"}
    for policy, run in found.items():
        assert set(run["milliseconds"]) == {"convolutions", "matrix products", "the rest"}, policy
        assert run["milliseconds"]["convolutions"] > 0
    assert found["cached"]["flops"] < found["recomputed"]["flops"]


PROGRAM = """HloModule example
%fused (p: f32[2]) -> f32[2] {
  ROOT %product = f32[2]{0} dot(%a, %b)
}
%body (p: f32[2]) -> f32[2] {
  %filtered = f32[2]{0} convolution(%a, %b)
}
ENTRY %main (p: f32[2]) -> f32[2] {
  %loop = f32[2]{0} while(%p), condition=%more, body=%body
  %sum = f32[2]{0} add(%p, %p)
  ROOT %last = f32[2]{0} fusion(%loop), kind=kOutput, calls=%fused
}
"""


def test_kinds_of_instructions():
    kinds = load_script("profile_products").kinds_of(PROGRAM)
    assert kinds == {
        "product": "matrix products",
        "filtered": "convolutions",
        "sum": "the rest",
        "last": "matrix products",
    }


@pytest.mark.parametrize(("contestant", "checks"), [("by hand", False), ("ggn_nb, cached", True)])
def test_first_product_has_its_parts(contestant, checks):
    parts = json.loads(run_python("first_product.py", "MLP", contestant, "--num-samples", 4))
    assert set(parts) == {"checking", "compiling", "the rest"}
    assert (parts["checking"] > 0) == checks
    assert parts["compiling"] > 0


# Cells without Jupyter

ABSENT = ("fastcore", "nbdev", "IPython", "ipykernel", "nbclient", "nbformat", "optax", "sklearn")
RUN_CELLS = f"""
import runpy, sys
sys.modules.update(dict.fromkeys({ABSENT!r}))
sys.argv[0] = {str(ROOT / ".ci" / "run_cells.py")!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run_cells(*arguments, folder) -> str:
    """What the script prints where only JAX and matplotlib are installed."""
    return run_python("-c", RUN_CELLS, *arguments, folder=folder)


def write_notebook(path: Path, *sources: str) -> None:
    cells = [{"cell_type": "code", "source": source.splitlines(keepends=True)} for source in sources]
    cells.insert(1, {"cell_type": "markdown", "source": ["# Not code"]})
    path.write_text(json.dumps({"cells": cells}))


IMPORTS = "#| hide\nfrom fastcore.test import test_eq as same\nimport math"


def test_cells_run_without_jupyter(tmp_path):
    measured = "#| slow\nfrom pathlib import Path\nPath('found').write_text(str(double(math.pi)))"
    tested = "same(1, 2)"
    never = ["#| gpu\nraise ValueError", "#| eval: false\nraise ValueError"]
    write_notebook(tmp_path / "a.ipynb", IMPORTS, "def double(x): return 2 * x", tested, *never, measured, "print('end')")
    said = run_cells("a.ipynb", "--flags", "slow", folder=tmp_path)
    assert float((tmp_path / "found").read_text()) == 2 * math.pi
    assert "a.ipynb [0]: No module named 'fastcore" in said
    assert re.search(r"a.ipynb \[3\]: skipped, for want of same\nend\n$", said)


@pytest.mark.parametrize(
    ("cell", "error"),
    [("#| slow\nsame(1, 1)", "NameError"), ("undefined", "NameError"), ("assert 1 == 2", "AssertionError")],
)
def test_cells_that_must_run_fail_without_jupyter(cell, error, tmp_path):
    write_notebook(tmp_path / "a.ipynb", IMPORTS, cell)
    with pytest.raises(AssertionError, match=error):
        run_cells("a.ipynb", "--flags", "slow", folder=tmp_path)


def test_large_transformer_is_measured_without_jupyter(tmp_path):
    (tmp_path / "05_large.ipynb").write_text((TIMING / "05_large.ipynb").read_text())
    before = sorted(KEPT)
    run_cells("--flags", "gpu", "--small", "05_large.ipynb", folder=tmp_path)
    (path,) = (tmp_path / "data").iterdir()
    found = json.loads(path.read_text())
    assert path.name.startswith("small-")
    assert found["parameters"] == 137_216
    for dtype in ("float32", "bfloat16"):
        context = found[dtype]["context"]
        assert (context["dtype"], context["jax"]) == (dtype, jax.__version__)
        for measured in ("seconds", "operations", "relative rate"):
            assert set(found[dtype][measured]) == {"gradient", "cached", "recomputed"}
    assert sorted((TIMING / "data").glob("*.json")) == before
