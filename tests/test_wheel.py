"""The package as a user gets it: built from its own source archive, installed alone."""

import subprocess
import sys
import venv
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest
from conftest import ROOT

NEEDS_AN_EXTRA = {"ggn_nb.demo"}

CHECK = """
import importlib, importlib.metadata, pkgutil, sys
import ggn_nb

needs_an_extra, version = set(sys.argv[1].split()), sys.argv[2]
assert "site-packages" in ggn_nb.__file__, ggn_nb.__file__
assert importlib.metadata.version("ggn_nb") == version
assert ggn_nb.__version__ == version
names = {m.name for m in pkgutil.walk_packages(ggn_nb.__path__, "ggn_nb.")}
assert needs_an_extra < names, names
for name in names - needs_an_extra:
    importlib.import_module(name)

import jax.numpy as jnp

x, w, v = jnp.eye(3), jnp.ones(3), jnp.array([1.0, 2.0, 3.0])
data = {"input": x, "target": jnp.zeros(3)}
mv = ggn_nb.create_ggn_mv(lambda input, params: input @ params, w, data, "mse")
assert jnp.allclose(mv(v), 2 * v), mv(v)
print(len(names), "modules")
"""


def run(*command, cwd: Path) -> str:
    """Run a command away from the repository; its output is shown when it fails."""
    done = subprocess.run([str(c) for c in command], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(once) -> Path:
    """The wheel, built from the source archive, which is built from the files of the tree."""

    def build(folder: Path) -> None:
        for name in ("settings.ini", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "ggn_nb"):
            run("cp", "-r", ROOT / name, folder, cwd=folder)
        run(sys.executable, "-m", "build", folder, cwd=folder)

    return next((once("wheel", build) / "dist").glob("*.whl"))


def test_wheel_holds_the_package_alone(wheel):
    modules = {p.relative_to(ROOT).as_posix() for p in (ROOT / "ggn_nb").rglob("*.py")}
    files = set(zipfile.ZipFile(wheel).namelist())
    assert {f for f in files if ".dist-info/" not in f} == modules | {"ggn_nb/py.typed"}
    assert any(f.endswith("licenses/LICENSE") for f in files)


def test_wheel_works_with_its_runtime_dependency_alone(wheel, tmp_path):
    config = ConfigParser()
    config.read(ROOT / "settings.ini")
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", wheel, cwd=tmp_path)
    run(python, "-m", "pip", "check", cwd=tmp_path)
    check = [python, "-c", CHECK, " ".join(NEEDS_AN_EXTRA), config["DEFAULT"]["version"]]
    assert "modules" in run(*check, cwd=tmp_path)
