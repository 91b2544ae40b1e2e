"""The package's rooms: which module may import which, and that every module has its notebook."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE, NOTEBOOKS = ROOT / "openunlearn_nb", ROOT / "nbs"
ROOMS = ("internals", "data", "models", "methods", "training", "evaluation", "experiments", "reporting", "commands")  # lowest first
BY_HAND = {"__init__.py", "__main__.py", "_modidx.py"}  # written by hand, or an index


def modules() -> list[Path]:
    return [file for file in sorted(PACKAGE.rglob("*.py")) if file.name not in BY_HAND]


def imported_rooms(file: Path) -> Iterator[str]:
    """The first folder of every import of the package in a module, also of those inside functions."""
    room = file.parent.name
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            yield room
        elif isinstance(node, ast.ImportFrom) and node.level == 2:
            for module in [node.module] if node.module else [alias.name for alias in node.names]:
                yield module.split(".")[0]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("openunlearn_nb."):
            yield node.module.split(".")[1]


def test_a_room_imports_only_rooms_before_it():
    wrong = [f"{file.relative_to(PACKAGE)} imports {room}" for file in modules() for room in imported_rooms(file)
             if room in ROOMS and ROOMS.index(room) > ROOMS.index(file.parent.name)]
    assert not wrong


def test_modules_are_in_rooms():
    assert {file.parent.name for file in modules()} == set(ROOMS)


def test_every_module_has_its_notebook():
    """`nbdev_export` leaves a module behind whose notebook is gone, and a folder hides a module of its name."""
    made = {match[1] for file in NOTEBOOKS.rglob("*.ipynb") if (match := re.search(r'#\| default_exp ([\w.]+)', file.read_text(encoding="utf-8")))}
    there = {".".join(file.relative_to(PACKAGE).with_suffix("").parts) for file in modules()}
    assert there == made
