"""Real text that is on every machine: the docstrings of the Python standard library, as documents.

The demo and the tests train on it. Sources are parsed, never imported, so nothing of a module runs:

    for document in docstring_documents():
        document["text"], document["module"]

One document per module: its name and docstring, then every public class and function with signature and docstring.
The order is fixed and texts are unique, so a Python version always gives the same documents.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import inspect
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.errors import UserError

# Tests and their data, third-party code, and applications whose docstrings speak of windows and buttons.
_LEFT_OUT_FOLDERS = {
    "__pycache__",
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "ensurepip",
}
_LEFT_OUT_FOLDERS |= {"turtledemo", "pydoc_data", "_vendor", "lib-dynload"}
# The file behind `os.path`, under the name that people import; its Windows twin says the same again.
_PUBLIC_NAMES = {"posixpath": "os.path"}
_LEFT_OUT_MODULES = {"ntpath"}
_SHORTEST_DOCUMENT = 80  # characters: below, there is a name and hardly a sentence


@dataclass(frozen=True)
class Entry:
    """One documented thing.

    Attributes:
        name: the dotted name, such as `os.path.join`; of a module, its name.
        signature: `join(a, *p)`, or empty for a module.
        docstring: cleaned as `inspect.cleandoc` does.
    """

    name: str
    signature: str
    docstring: str


def docstring_documents(packages: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """One document per module that has docstrings, in the order of module names.

    Args:
        packages: installed packages to read as well, after the standard library.

    Returns:
        Dictionaries with `text` and `module`.

    Raises:
        UserError: a package is not installed, or has no Python sources.
    """
    seen: set[str] = set()
    for module, entries in docstring_entries(packages):
        parts = [f"{entry.signature}\n{entry.docstring}" if entry.signature else entry.docstring for entry in entries]
        text = f"{module}\n\n" + "\n\n".join(parts)
        body = text.partition("\n")[2]
        if len(text) >= _SHORTEST_DOCUMENT and body not in seen:
            seen.add(body)
            yield {"text": text, "module": module}


def docstring_entries(packages: Sequence[str] = ()) -> Iterator[tuple[str, list[Entry]]]:
    """Each module's name and its documented entries, the module's own first; see `docstring_documents`."""
    roots = [(Path(sysconfig.get_path("stdlib")), "")]
    roots += [(_package_folder(name), name) for name in packages]
    for folder, prefix in roots:
        yield from _folder_entries(folder, prefix)


@functools.cache  # documents and conversations are made from the same entries
def _folder_entries(folder: Path, prefix: str) -> list[tuple[str, list[Entry]]]:
    sources = {_module_name(file.relative_to(folder), prefix): file for file in _sources(folder)}
    modules = [(module, _entries(module, sources[module])) for module in sorted(sources.keys() - _LEFT_OUT_MODULES)]
    return [(module, entries) for module, entries in modules if entries]


def _package_folder(name: str) -> Path:
    try:
        found = importlib.util.find_spec(name)  # a top-level name: finds it without running it
    except (ImportError, ValueError):
        found = None
    folders = list(found.submodule_search_locations or []) if found else []
    if not folders or "." in name:
        raise UserError(f"{name!r} is not an installed package with Python sources: install it or leave it out.")
    return Path(folders[0])


def _sources(folder: Path) -> Iterator[Path]:
    for path in folder.iterdir():
        if path.is_dir():
            if path.name not in _LEFT_OUT_FOLDERS and not path.name.startswith(("config-", ".")):
                yield from _sources(path)
        elif path.suffix == ".py" and path.name != "__main__.py":
            yield path


def _module_name(file: Path, prefix: str) -> str:
    parts = [prefix] if prefix else []
    parts += file.with_suffix("").parts
    name = ".".join(parts).removesuffix(".__init__")
    return _PUBLIC_NAMES.get(name, name)


def _entries(module: str, file: Path) -> list[Entry]:
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):  # templates and sources for another Python
        return []
    entries = [Entry(module, "", _docstring(tree))] if _docstring(tree) else []
    entries += _members(tree, module)
    return entries


def _members(parent: ast.Module | ast.ClassDef, prefix: str) -> Iterator[Entry]:
    for node in parent.body:
        if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) or node.name.startswith("_"):
            continue
        name = f"{prefix}.{node.name}"
        if docstring := _docstring(node):
            yield Entry(name, _signature(node), docstring)
        if isinstance(node, ast.ClassDef):
            yield from _members(node, name)


def _docstring(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    docstring = inspect.cleandoc(ast.get_docstring(node, clean=False) or "").strip()
    try:
        docstring.encode("utf-8")
    except UnicodeEncodeError:  # a lone surrogate is legal in a Python string, not in a text file
        return ""
    return docstring


def _signature(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        return f"class {node.name}({bases})" if bases else f"class {node.name}"
    keyword = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
    return f"{keyword} {node.name}({ast.unparse(node.args)})"
