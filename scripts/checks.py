"""What the tests check, as a table: every test marked `checks(area, given, then)`.

python scripts/checks.py    # prints it; the page nbs/tutorials/what_is_checked.ipynb shows it
"""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pandas as pd

TESTS = Path(__file__).resolve().parents[1] / "tests"


class Check(NamedTuple):
    """One check: its area, what was given, what happens, and the test that holds it."""

    area: str
    given: str
    then: str
    test: str


def marked(decorator: ast.expr) -> dict[str, str] | None:
    """The words of a decorator `pytest.mark.checks(...)`; None for another."""
    if not (isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "pytest.mark.checks"):
        return None
    return {word.arg: ast.literal_eval(word.value) for word in decorator.keywords if word.arg}


def all_checks(folder: Path = TESTS) -> list[Check]:
    """Every check of the tests in a folder, by area and then in the order of the tests."""
    return sorted(_found(folder), key=lambda check: check.area)


def _found(folder: Path) -> Iterator[Check]:
    for file in sorted(folder.glob("test_*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.FunctionDef):
                continue
            for decorator in node.decorator_list:
                words = marked(decorator)
                if words is not None:
                    yield Check(words["area"], words["given"], words["then"], f"{file.stem}.{node.name}")


def table(checks: list[Check]) -> str:
    """The checks of one area as HTML, without their tests."""
    with pd.option_context("display.max_colwidth", None):
        return pd.DataFrame([{"given": check.given, "what happens": check.then} for check in checks]).to_html(index=False)


if __name__ == "__main__":
    for check in all_checks():
        print(f"{check.area}: {check.given} -> {check.then}  ({check.test})")
