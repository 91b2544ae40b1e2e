"""The library's index (`nbs/reference/api.ipynb`): every public function and class, and the chapter that explains it.

Of the constants it has those that the package itself exports; the others stand beside what reads them.

Run by scripts/readme.py."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import rooms

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "nbs" / "reference" / "api.ipynb"
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


class Name(NamedTuple):
    """A public name: its room and chapter (`methods`, `losses`), its one line, and whether a heading is called so."""

    room: str
    chapter: str
    name: str
    line: str
    headed: bool


def first_sentence(text: str) -> str:
    """The first sentence of a docstring, or two where one says little, on one line, fit for a cell of a table."""
    paragraph = " ".join(text.strip().split("\n\n")[0].split())
    sentence = re.match(r".{25,}?\.(?= |$)", paragraph)
    return (sentence[0] if sentence else paragraph).replace("|", "\\|")


def assigned(node: ast.stmt) -> list[str]:
    """The names that an assignment at the top of a module gives values to."""
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


@cache
def exported() -> list[str]:
    """The names that `import openunlearn_nb` gives."""
    tree = ast.parse((ROOT / "openunlearn_nb" / "__init__.py").read_text(encoding="utf-8"))
    values = {name: node.value for node in tree.body if isinstance(node, ast.Assign) for name in assigned(node)}
    return ast.literal_eval(values["__all__"])


def names_of(file: Path) -> Iterator[Name]:
    """The public functions and classes of a module, and the constants that the package exports, in its order."""
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, Definition) and not node.name.startswith("_"):
            yield Name(file.parent.name, file.stem, node.name, first_sentence(ast.get_docstring(node) or ""), True)
        for name in set(assigned(node)) & set(exported()):
            line = f"The registry of what is declared with `{name.lower()[:-1]}`."
            yield Name(file.parent.name, file.stem, name, line, False)


def row(name: Name) -> str:
    anchor = f"#{name.name.lower()}" if name.headed else ""
    place = f"../{name.room}/{name.chapter}.ipynb"
    return f"| [`{name.name}`]({place}{anchor}) | {name.line} | [{name.room}.{name.chapter}]({place}) |"


def section(title: str, about: str, names: list[Name]) -> str:
    rows = [row(name) for name in sorted(names, key=lambda name: name.name.lower())]
    head = ["| name | what it is | chapter |", "|---|---|---|"]
    return "\n".join([f"## {title}", "", *([about, ""] if about else []), *head, *rows])


def page() -> str:
    """The notebook with the index."""
    folders = [room for room in rooms.ROOMS if (ROOT / "openunlearn_nb" / room).is_dir()]
    names = [name for room in folders for file in sorted((ROOT / "openunlearn_nb" / room).glob("*.py"))
             if file.stem != "__init__" for name in names_of(file)]
    top = {name.name: name for name in names if name.name in exported()}
    texts = ["# API index\n\n> Every public function and class, what it is, and the chapter that explains it.",
             section("The package", "These are imported from `openunlearn_nb` itself. Most scripts need no others.",
                     list(top.values()))]
    for room in folders:
        texts.append(section(rooms.ROOMS[room][0], "", [name for name in names if name.room == room]))
    return rooms.notebook("api", texts)


def main() -> None:
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
