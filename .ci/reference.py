"""What the site shows of the package: an entry for each public name, links to them, and plots whose code is folded.

nbdev runs `Reference` on each notebook, as settings.ini says. Entries are read from the module that the notebook exports, so
that no cell runs, and names are those that users import.
"""

import ast
import enum
import functools
import importlib
import inspect
import re
import textwrap
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fastcore.utils import dict2obj
from ggn_nb._modidx import d as index
from nbdev.config import get_config
from nbdev.doclinks import _nbpath2html
from nbdev.process import Processor

HOME = index["settings"]["doc_host"] + index["settings"]["doc_baseurl"] + "/"
ROOMS = ["tools", "losses", "operators", "layers", "linalg", "applications"]  # from the ground floor up
WIDTH = 80  # of signatures


class Reference(Processor):
    """Give a notebook its API entries and its links, and fold the code of its plots."""

    def begin(self):
        """Find the notebook's page."""
        path = Path(self.nb.path_).resolve().relative_to(get_config().nbs_path.resolve())
        self.page = _nbpath2html(path).as_posix()

    def cell(self, cell):
        """An entry in the place of `show_doc(name)`; links in the text; the code of a picture folded."""
        if cell.cell_type == "markdown":
            cell.source = linked(apart(cell.source, self.page), self.page)
            return
        if getattr(cell, "has_sd", False):
            name = re.search(r"show_doc\((\w+)\)", cell.source)[1]
            data = {"text/markdown": entry(public_names()[name, self.page], name, self.page)}
            cell.outputs = [dict2obj({"output_type": "display_data", "metadata": {}, "data": data})]
            return
        pictures = [kind for output in cell.get("outputs", []) for kind in output.get("data", {}) if kind.startswith("image/")]
        if pictures and "#| code-fold:" not in cell.source:
            cell.source = "#| code-fold: true\n" + cell.source


# Names and links


@functools.cache
def public_names() -> dict[tuple[str, str], str]:
    """The module of each exported name, by name and page."""
    found = {}
    for module, symbols in index["syms"].items():
        exported = getattr(importlib.import_module(module), "__all__", [])
        for symbol, (where, _) in symbols.items():
            name = symbol.removeprefix(module + ".")
            if name in exported:
                found[name, where.partition("#")[0]] = module
    return found


def public_by_page(page: str) -> set[str]:
    """The names that have their entries on a page."""
    return {name for name, where in public_names() if where == page}


@functools.cache
def anchors() -> dict[str, str]:
    """Where each public name and each method of a public class has its entry: page#anchor."""
    found = {}
    for (name, page), module in public_names().items():
        found[name] = f"{page}#{name}"
        value = getattr(importlib.import_module(module), name)
        if isinstance(value, type):
            found |= {f"{name}.{method}": f"{page}#{name}.{method}" for method, _ in methods(value)}
    return found


@functools.cache
def ambiguous() -> set[str]:
    """What is also the name of a method or an argument."""
    values = [getattr(importlib.import_module(module), name) for (name, _), module in public_names().items()]
    return {name.partition(".")[2] for name in anchors()} | {name for value in values for name in parameters_of(value)}


def floor(page: str) -> int:
    """How high the room of a page lies; tutorials and the like lie above all."""
    folder = page.partition("#")[0].partition("/")[0]
    return len(ROOMS) if folder == "demo.html" else ROOMS.index(folder) if folder in ROOMS else len(ROOMS) - 1


def linked(markdown: str, page: str, own: tuple[str, ...] = ()) -> str:
    """Markdown in which names in backticks lead to their entries.

    Where a name has two meanings, a page means none of a room above its own: on a page about losses, `sample` is the method, and
    no function of linear algebra. Headings, what is a link already, and the names in `own` stay as they are.
    """

    def link(code: re.Match) -> str:
        name = code[1].removesuffix("()")
        target = anchors().get(name)
        if target is None or name in own or name in ambiguous() and floor(target) > floor(page):
            return code[0]
        return f"[`{code[1]}`]({HOME}{target})"

    parts = re.split(r"(^```.*?^```|^#.*?$|\[[^\]\n]*\]\([^)]*\)|\$\$.*?\$\$|``.*?``)", markdown, flags=re.S | re.M)
    parts[::2] = [re.sub(r"(?<!`)`([^`\s]+)`(?!`)", link, part) for part in parts[::2]]
    return "".join(parts)


def apart(markdown: str, page: str) -> str:
    """Markdown in which no heading has the anchor of an entry on its page, as `## Transformer` on that of `transformer`."""
    names = {name.lower() for name in public_by_page(page)}

    def mark(line: re.Match) -> str:
        anchor = line[1].strip().lower().replace(" ", "-")
        return f"{line[0]} {{#about-{anchor}}}" if anchor in names else line[0]

    return re.sub(r"^##+ ([\w ]+)$", mark, markdown, flags=re.M)


# Entries


def entry(module: str, name: str, page: str) -> str:
    """The entry of a function or class, with its methods."""
    value = getattr(importlib.import_module(module), name)
    parts = [f"### {name} {{#{name}}}", described(value, name, page)]
    if isinstance(value, type):
        for method, member in methods(value):
            full = f"{name}.{method}"
            parts += [f"#### {full} {{#{full}}}", described(member, full, page)]
    return f"::: {{.api}}\n\n[source]({source_of(module, name)}){{.api-source}}\n\n" + "\n\n".join(parts) + "\n\n:::"


def source_of(module: str, name: str) -> str:
    """The line of the repository where a function or class is defined."""
    lines = inspect.getsource(importlib.import_module(module)).splitlines()
    number = next(i for i, line in enumerate(lines, 1) if re.match(rf"(def|class) {name}\b", line))
    settings, (_, path) = index["settings"], index["syms"][module][f"{module}.{name}"]
    return f"{settings['git_url']}/blob/{settings['branch']}/{path}#L{number}"


def methods(cls: type) -> list[tuple[str, Any]]:
    """The documented methods and properties that a class has beyond those of its bases."""
    members = [(name, getattr(member, "__func__", member)) for name, member in vars(cls).items()]
    return [
        (name, member)
        for name, member in members
        if callable(member) or isinstance(member, property | functools.cached_property)
        if not isinstance(member, type) and own_doc(member)
        if not (name.startswith("_") and name != "__call__")
        if not (name in inspect.get_annotations(cls) or is_documented(cls, name))
    ]


def is_documented(cls: type, name: str) -> bool:
    """Whether a base of a class describes a method."""
    bases = [vars(base)[name] for base in cls.__mro__[1:-1] if name in vars(base)]
    return any(own_doc(getattr(member, "__func__", member)) for member in bases)


def own_doc(member: Any) -> str:
    """A docstring that is the member's own."""
    member = getattr(member, "fget", None) or getattr(member, "func", None) or member
    return inspect.cleandoc(getattr(member, "__doc__", None) or "")


def described(value: Any, name: str, page: str) -> str:
    """Signature, summary, arguments, returns, raises and example."""
    parameters = parameters_of(value)
    bases = [base.__name__ for base in getattr(value, "__bases__", ()) if base.__name__ in anchors()]
    sections = list(sections_of(own_doc(value)))
    own = (*parameters, *(arg for title, text in sections if title.startswith("Arguments") for arg in arguments_in(text)))
    parts = [f"```python\n{signature(value, name, parameters)}\n```"]
    for title, text in sections:
        if not title:
            parts += [linked(escaped(text), page, own)]
            parts += [f"A kind of {linked(', '.join(f'`{base}`' for base in bases), page)}, with its methods."] * bool(bases)
        elif title.startswith("Arguments"):
            rows, rest = argument_rows(text, name, parameters)
            parts += [f"**{title}**"] * (title != "Arguments")
            parts += [linked(table("argument", rows), page, own), linked(escaped(rest), page, own)]
        elif title.startswith("Example"):
            parts += [f"**{title}**", f"```python\n{textwrap.dedent(text).strip()}\n```"]
        else:
            parts += [f"**{title}**", linked(escaped(text), page, own)]
    if isinstance(value, type) and (rows := attribute_rows(value, name)):
        parts += [linked(table("attribute", rows), page)]
    return "\n\n".join(filter(None, parts))


def sections_of(doc: str) -> Iterator[tuple[str, str]]:
    """The parts of a docstring by their titles; "" is what stands before the first."""
    titles = r"^((?:Arguments|Returns|Raises|Examples?)[^\n:]*):\n\n"
    parts = re.split(titles, doc.strip() + "\n", flags=re.M)
    yield "", parts[0].strip()
    yield from zip(parts[1::2], (part.rstrip() for part in parts[2::2]), strict=True)


def arguments_in(text: str) -> list[str]:
    """The names in a list of arguments."""
    heads = re.findall(r"^- ([^:\n]*):", text, flags=re.M)
    return [name.lstrip("*") for head in heads for name in re.findall(r"`([^`]+)`", head)]


def table(first: str, rows: list[list[str]]) -> str:
    """Rows of three cells, under a head."""
    head = [[first, "type and default", "meaning"], [":--"] * 3]
    lines = ["|" + "|".join(cells) + "|" for cells in head + [[cell.replace("|", r"\|") for cell in row] for row in rows]]
    return "::: {.api-arguments}\n\n" + "\n".join(lines) + "\n\n:::"


def argument_rows(text: str, name: str, parameters: dict[str, inspect.Parameter]) -> tuple[list[list[str]], str]:
    """A list of arguments as rows, with an anchor for each; and the text after the list."""
    text, _, rest = text.partition("\n\n")
    rows = []
    for item in re.split(r"^- ", text, flags=re.M)[1:]:
        head, _, meaning = item.partition(":")
        names = arguments_in(f"- {item}")
        anchor = "".join(f'<a id="{name}.{arg}"></a>' for arg in names)
        kinds = [f"`{kind}`" for arg in names if (kind := kind_of(parameters.get(arg)))]
        rows.append([anchor + head.strip(), "<br>".join(kinds), escaped(" ".join(meaning.split()))])
    return rows, rest


def attribute_rows(cls: type, name: str) -> list[list[str]]:
    """What a class says of its attributes, each in a string after it."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body
    rows = []
    for line, text in zip(body, body[1:], strict=False):
        if isinstance(line, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            kind = re.sub(r"^ClassVar\[(.*)\]$", r"\1", ast.unparse(line.annotation))
            default = f" = {ast.unparse(line.value)}".replace("'", '"') if line.value else ""
            anchor = f'<a id="{name}.{line.target.id}"></a>`{line.target.id}`'
            rows.append([anchor, f"`{kind}{default}`", escaped(" ".join(text.value.value.split()))])
    return rows


def escaped(text: str) -> str:
    """A docstring's text as Markdown: what is no code is text, but for lists."""
    parts = re.split(r"(`[^`]*`)", text)
    parts[::2] = [re.sub(r'([*<>$"~\[\]^])', r"\\\1", part) for part in parts[::2]]
    return "".join(parts)


# Signatures


def parameters_of(value: Any) -> dict[str, inspect.Parameter]:
    """The parameters that a caller gives, by name; the keys of a `TypedDict`."""
    if typing.is_typeddict(value):
        kind = inspect.Parameter.KEYWORD_ONLY
        return {key: inspect.Parameter(key, kind, annotation=hint) for key, hint in typing.get_type_hints(value).items()}
    if isinstance(value, property | functools.cached_property) or (isinstance(value, type) and issubclass(value, enum.Enum)):
        return {}
    found = inspect.signature(value).parameters
    return {name: p for name, p in found.items() if name not in ("self", "cls")}


def signature(value: Any, name: str, parameters: dict[str, inspect.Parameter]) -> str:
    """How to write it, in lines that fit a page; types and meanings stand in the table below."""
    if isinstance(value, property | functools.cached_property):
        getter = value.fget if isinstance(value, property) else value.func
        return name + returned(getter)
    if isinstance(value, type) and (typing.is_typeddict(value) or issubclass(value, enum.Enum) or not parameters):
        return f"class {name}"
    words, last = [], None
    for parameter in parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and last not in (parameter.KEYWORD_ONLY, parameter.VAR_POSITIONAL):
            words.append("*")
        last = parameter.kind
        stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        words.append(stars + parameter.name + (f"={default_of(parameter)}" if has_default(parameter) else ""))
    prefix, end = "class " * isinstance(value, type), "" if isinstance(value, type) else returned(value)
    line = f"{prefix}{name}({', '.join(words)}){end}"
    if len(line) <= WIDTH:
        return line
    inside = textwrap.fill(", ".join(words), WIDTH, initial_indent="    ", subsequent_indent="    ", break_on_hyphens=False)
    return f"{prefix}{name}(\n{inside},\n){end}"


def returned(fn: Callable) -> str:
    """The type of a function's result, as a signature ends."""
    annotation = inspect.signature(fn).return_annotation
    return "" if annotation in (inspect.Signature.empty, Any) else f" -> {type_name(annotation)}"


def has_default(parameter: inspect.Parameter) -> bool:
    """Whether a parameter may be left out."""
    return parameter.default is not parameter.empty


def default_of(parameter: inspect.Parameter) -> str:
    """A default as one writes it; "..." where it has no such form."""
    text = repr(parameter.default).replace("'", '"') if isinstance(parameter.default, str) else repr(parameter.default)
    return "..." if text.startswith("<") or " at 0x" in text or "(" in text else text


def kind_of(parameter: inspect.Parameter | None) -> str:
    """Type and default of a parameter."""
    if parameter is None:
        return ""
    untyped = parameter.annotation in (parameter.empty, Any)
    default = f"= {default_of(parameter)}" if has_default(parameter) else ""
    return " ".join(filter(None, ["" if untyped else type_name(parameter.annotation), default]))


def type_name(annotation: Any) -> str:
    """A type as one writes it, without modules."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is None or annotation is types.NoneType:
        return "None"
    if isinstance(annotation, str):
        return annotation
    if annotation is Any:
        return "Any"
    if origin in (typing.Union, types.UnionType):
        return " | ".join(dict.fromkeys(type_name(each) for each in inner))
    if origin is typing.Literal:
        return " | ".join(f'"{each}"' for each in inner)
    if origin is typing.ClassVar:
        return type_name(inner[0])
    name = getattr(origin or annotation, "__name__", str(annotation)).rpartition(".")[2]
    if not inner or name == "Callable":
        return name
    return f"{name}[{', '.join('...' if each is ... else type_name(each) for each in inner)}]"
