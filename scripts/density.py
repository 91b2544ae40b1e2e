"""How densely each chapter explains its code: prose words, exported lines, and definitions that the next cell runs.

`python scripts/density.py [FOLDER ...]` prints a line for each notebook and one for each folder (default: nbs)."""

import ast
import json
import re
import sys
from pathlib import Path
from typing import NamedTuple


class Density(NamedTuple):
    """Counts of one notebook, or the sums of several."""

    words: int  # in Markdown cells, tables and headings included
    lines: int  # of exported cells that define something, the mark left out
    cells: int  # exported cells that define something
    run: int  # of these, the ones that the next code cell uses
    wide: int  # exported lines of more than 120 characters

    def __add__(self, other):
        return Density(*map(sum, zip(self, other)))

    def line(self, name: str) -> str:
        each_line, each_cell = self.words / max(1, self.lines), self.lines / max(1, self.cells)
        return (f"{name:<34}{self.words:>6} words {self.lines:>5} lines {each_line:>6.1f} words a line "
                f"{each_cell:>6.1f} lines a cell {self.run:>3} of {self.cells:>3} run next {self.wide:>4} wide")


def defined(text: str) -> set[str]:
    """Names that a cell defines at its top level, imports left out."""
    found = set()
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {inner.id for target in targets for inner in ast.walk(target) if isinstance(inner, ast.Name)}
    return found


def only_imports(text: str) -> bool:
    """Whether a cell, not an exported one, holds nothing but imports: nbdev wants these in a cell of their own."""
    if text.startswith("#| export"):
        return False
    try:
        return all(isinstance(node, ast.Import | ast.ImportFrom) for node in ast.parse(text).body)
    except SyntaxError:  # a magic
        return False


def density(file: Path) -> Density:
    """The counts of a notebook."""
    cells = json.loads(file.read_text(encoding="utf-8"))["cells"]
    texts = [(cell["cell_type"], "".join(cell["source"])) for cell in cells]
    words = sum(len(re.findall(r"[\w'`/.-]*\w[\w'`/.-]*", text)) for kind, text in texts if kind == "markdown")
    code = [text for kind, text in texts if kind == "code" and not text.startswith("#| default_exp") and not only_imports(text)]
    total = Density(words, 0, 0, 0, 0)
    for text, after in zip(code, [*code[1:], ""]):
        if text.startswith("#| export") and (names := defined(text)):
            lines = [line for line in text.splitlines()[1:] if line.strip()]
            uses = not after.startswith("#| export") and any(re.search(rf"\b{name}\b", after) for name in names)
            total += Density(0, len(lines), 1, int(uses), sum(len(line) > 120 for line in lines))
    return total


def main(folders: list[str]) -> None:
    for folder in folders:
        total = Density(0, 0, 0, 0, 0)
        for file in sorted(Path(folder).rglob("*.ipynb")):
            one = density(file)
            total += one
            print(one.line(str(file.relative_to(folder))))
        print(total.line(f"{folder} in all"))


if __name__ == "__main__":
    main(sys.argv[1:] or ["nbs"])
