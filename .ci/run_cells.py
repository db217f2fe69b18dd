"""Run the code of a notebook where there is no Jupyter, no nbdev and no network.

    python .ci/run_cells.py [--flags "slow gpu"] [--small] NOTEBOOK ...

It needs JAX, what the notebook itself imports, and nothing else: a notebook is JSON, and its cells are run in order in
one namespace, in the notebook's folder, so that measurements are written where the notebook looks for them. As in
`tools.py run`, cells with a flag run where the flag is asked for. The notebook itself stays as it is.

An import of what is not installed is skipped, and so are cells without a flag that stop for want of it: tests, mostly. A
cell with a flag runs or fails. The package is read from this repository, installed or not.
"""

import argparse
import ast
import json
import os
import re
import sys
import tempfile
from configparser import ConfigParser
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def read_settings() -> dict[str, str]:
    """What settings.ini says."""
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    return dict(config["DEFAULT"])


def read_directives(source: str) -> dict[str, str]:
    """The `#|` lines at the top of a code cell: {"gpu": ""} or {"eval": "false"}."""
    top = re.match(r"(?:#\|.*\n?|\s*\n)*", source)[0]
    return {key: value.strip() for key, value in re.findall(r"#\|\s*(\w+):?(.*)", top)}


def use_package(folder: Path) -> None:
    """Import the package from this repository, in processes that a cell starts too.

    Where it is not installed, its version is written to `folder`, for importlib.metadata to find.
    """
    settings = read_settings()
    sys.path[:0] = [str(ROOT), str(folder)]
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(folder), os.environ.get("PYTHONPATH", "")])
    try:
        version(settings["lib_name"])
    except PackageNotFoundError:
        name, number = settings["lib_name"], settings["version"]
        info = folder / f"{name}-{number}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {number}\n")


class Runner:
    """Runs cells one after another in one namespace, and remembers the names that could not be imported."""

    def __init__(self):
        self.namespace = {"__name__": "__main__"}
        self.missing: set[str] = set()

    def run(self, source: str, where: str) -> None:
        """Run one cell, statement by statement."""
        for statement in ast.parse(source, where).body:
            code = compile(ast.Module([statement], []), where, "exec")
            try:
                exec(code, self.namespace)
            except ModuleNotFoundError as error:
                if not isinstance(statement, ast.Import | ast.ImportFrom):
                    raise
                print(f"{where}: {error}", flush=True)
                self.missing |= {(alias.asname or alias.name).split(".")[0] for alias in statement.names}

    def run_if_possible(self, source: str, where: str) -> None:
        """Run one cell, and give it up where it needs a name that could not be imported."""
        try:
            self.run(source, where)
        except NameError as error:
            if error.name not in self.missing:
                raise
            print(f"{where}: skipped, for want of {error.name}", flush=True)


def run_notebook(path: Path, flags: set[str]) -> None:
    """Run the cells of a notebook that have no flag, or one of `flags`."""
    known = set(read_settings()["tst_flags"].split())
    runner = Runner()
    for number, cell in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"]):
        source = "".join(cell["source"])
        directives = read_directives(source)
        marks = known & directives.keys()
        if cell["cell_type"] != "code" or marks - flags or directives.get("eval") == "false":
            continue
        run = runner.run if marks else runner.run_if_possible
        run(source, f"{path.name} [{number}]")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebook", nargs="+", type=Path)
    parser.add_argument("--flags", default="", help="also run cells with these flags")
    parser.add_argument("--small", action="store_true", help="the small size, to try a notebook that has one")
    arguments = parser.parse_args()
    os.environ.setdefault("MPLBACKEND", "agg")
    if arguments.small:
        os.environ["GGN_NB_SIZE"] = "small"
    with tempfile.TemporaryDirectory() as folder:
        use_package(Path(folder))
        for path in [path.resolve() for path in arguments.notebook]:
            os.chdir(path.parent)
            sys.path.insert(0, str(path.parent))
            run_notebook(path, set(arguments.flags.split()))


if __name__ == "__main__":
    main()
