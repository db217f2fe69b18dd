"""The house: rooms that import downwards, few public names, docstrings that explain and run."""

import ast
import doctest
import enum
import importlib
import inspect
import json
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path
from typing import get_type_hints, is_typeddict

import ggn_nb
import ggn_nb.losses
import jax
import pytest
from ggn_nb.losses import closed_form
from tools import NBS, ROOT, notebooks

ROOMS = ["tools", "losses", "operators", "layers", "linalg", "applications", "demo"]  # from the ground floor up
OPEN_ROOMS = ["tools", "demo"]  # what their modules export is for whoever imports it from there
COLUMNS = 100

def module_name(path: Path) -> str:
    """The name under which a file is imported."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


MODULES = {  # the exported modules: all but the `__init__.py` files, which are written by hand
    module_name(path): path
    for path in sorted((ROOT / "ggn_nb").rglob("*.py"))
    if path.name not in ("__init__.py", "_modidx.py")
}


# Imports


def room(module: str) -> int:
    """The floor of a module or of a room's package."""
    return ROOMS.index(module.split(".")[1])


def absolute(module: str, node: ast.ImportFrom) -> str:
    """What `node`, which stands in `module`, imports from."""
    above = module.split(".")[: -node.level] if node.level else []
    return ".".join([*above, *filter(None, [node.module])])


def imported(module: str) -> Iterator[str]:
    """The modules and packages of this project that `module` imports, at its top or in a function."""
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            origin = absolute(module, node)
            inside = [f"{origin}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES else origin for name in inside]
        else:
            continue
        yield from (name for name in names if name.split(".")[0] == "ggn_nb")


IMPORTS = {module: set(imported(module)) for module in MODULES}
ARROWS = [(module, name) for module, names in IMPORTS.items() for name in sorted(names)]


def test_every_module_is_in_a_room():
    assert not [module for module in MODULES if module.split(".")[1] not in ROOMS]


def test_modules_are_imported_and_not_the_package_that_collects_them():
    assert not [(module, name) for module, name in ARROWS if name == "ggn_nb"]


def test_rooms_import_downwards():
    assert not [(module, name) for module, name in ARROWS if room(name) > room(module)]


def test_imports_have_no_circle():
    assert set(TopologicalSorter(IMPORTS).static_order()) >= set(MODULES)


@pytest.fixture(scope="module")
def page() -> dict[str, int]:
    """The place in the order of building of the notebook that each module is exported from."""
    order = [path.relative_to(NBS).as_posix() for path in notebooks()]

    def place(path: Path) -> int:
        return order.index(re.search(r"File to edit: (?:\.\./)+nbs/(.*)\.", path.read_text())[1])

    return {module: place(path) for module, path in MODULES.items()}


def test_pages_of_a_room_build_on_earlier_ones(page):
    inside = [(module, name) for module, name in ARROWS if room(module) == room(name)]
    assert len(inside) > 20
    assert not [(module, name) for module, name in inside if name not in page]  # the room's package
    assert not [(module, name) for module, name in inside if page[name] >= page[module]]


# Names


PUBLIC = [ggn_nb, ggn_nb.losses]


def exported(module: str) -> list[str]:
    """The names in a module's `__all__`."""
    return getattr(importlib.import_module(module), "__all__", [])


def test_public_names_are_listed():
    for package in PUBLIC:
        names = package.__all__
        assert len(set(names)) == len(names) > 0
        assert not [name for name in names if not hasattr(package, name)]


def test_exported_names_are_public():
    """What a module lists in `__all__` can be imported from `ggn_nb` or `ggn_nb.losses`; the rest is private."""
    modules = [module for module in MODULES if module.split(".")[1] not in OPEN_ROOMS]
    public = {name for package in PUBLIC for name in package.__all__}
    assert not [(module, name) for module in modules for name in exported(module) if name not in public]


# Lines


def code(path: Path) -> list[str]:
    """The lines of a module without its docstring, which is prose, and `__all__`, which nbdev sets."""
    text = re.sub(r'\A""".*?"""', "", path.read_text(), flags=re.S)
    return re.sub(r"^__all__ = \[.*?\]$", "", text, flags=re.S | re.M).splitlines()


def test_lines_of_code_fit():
    lines = [(module, line) for module, path in MODULES.items() for line in code(path)]
    assert not [(module, line) for module, line in lines if len(line) > COLUMNS]


def statements(cell: dict) -> list[ast.stmt]:
    """What a cell of code does, without Jupyter's magic."""
    lines = [line for line in cell["source"] if not line.startswith("%")]
    return ast.parse("".join(lines)).body if cell["cell_type"] == "code" else []


def test_cells_with_imports_do_nothing_else():
    """nbdev runs them, and them alone, to build the site."""
    mixed = []
    for path in notebooks():
        for cell in json.loads(path.read_text())["cells"]:
            kinds = {isinstance(s, ast.Import | ast.ImportFrom) for s in statements(cell)}
            if len(kinds) == 2:
                mixed.append((path.name, cell["id"]))
    assert not mixed


# Docstrings


def public() -> dict[str, object]:
    """The public functions and classes by name."""
    names = [(package, name) for package in PUBLIC for name in getattr(package, "__all__", [])]
    found = {name: getattr(package, name) for package, name in names}
    return {name: value for name, value in found.items() if callable(value)}


def described(value) -> str:
    """The docstring of a public name; empty where there is none."""
    return inspect.getdoc(value) or ""


def made_by_another(value) -> bool:
    """Whether a class sends its reader to the function that makes its instances."""
    return isinstance(value, type) and bool(re.search(r"\bMade by `", described(value)))


def own_keys(value) -> list[str]:
    """The keys of a `TypedDict`, without those of another that its docstring refers to."""
    others = {name: other for name, other in public().items() if is_typeddict(other)}
    named = [other for name, other in others.items() if f"`{name}`" in described(value)]
    elsewhere = {key for other in named for key in get_type_hints(other)}
    return [key for key in get_type_hints(value) if key not in elsewhere]


def to_document(value) -> list[str]:
    """What a docstring must name: members, keys, or the parameters of what users call."""
    if isinstance(value, type) and issubclass(value, enum.Enum):
        return [member.name for member in value]
    if is_typeddict(value):
        return own_keys(value)
    return [] if made_by_another(value) else list(inspect.signature(value).parameters)


def test_docstrings_name_every_parameter():
    missing = [
        (name, parameter)
        for name, value in public().items()
        for parameter in to_document(value)
        if not re.search(rf"`\**{parameter}\b", described(value))
    ]
    assert public()
    assert not missing


def test_docstrings_have_an_example():
    example = re.compile(r"^Examples?:.*?^ +>>> ", re.S | re.M)
    used = [name for name, v in public().items() if not (made_by_another(v) or is_typeddict(v))]
    assert used
    assert not [name for name in used if not example.search(described(public()[name]))]


def examples(module: str) -> list[doctest.DocTest]:
    """The examples in a module's docstrings, each to be run by itself."""
    found = doctest.DocTestFinder().find(importlib.import_module(module), globs={})
    return [test for test in found if test.examples]


def test_examples_of_public_names_are_run():
    run = {test.name for module in MODULES for test in examples(module)}
    shown = {name: value for name, value in public().items() if ">>> " in described(value)}
    name_in_module = {name: f"{value.__module__}.{value.__qualname__}" for name, value in shown.items()}
    assert not [name for name, full in name_in_module.items() if full not in run]


@pytest.fixture
def default_jax():
    """JAX as users have it, without this suite's settings."""
    settings = {
        "jax_enable_x64": False,
        "jax_numpy_dtype_promotion": "standard",
        "jax_numpy_rank_promotion": "allow",
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.mark.parametrize("module", MODULES)
def test_examples_run(module, default_jax, monkeypatch):
    monkeypatch.setattr(closed_form, "_MAKERS", closed_form.registered_losses())  # an example registers one
    monkeypatch.setattr(closed_form, "_ROWS", closed_form.registered_rows())
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    report: list[str] = []
    for test in examples(module):
        runner.run(test, out=report.append)
    assert runner.summarize(verbose=False).failed == 0, "".join(report)
