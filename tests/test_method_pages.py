"""Every method has a page, of one shape."""

import json
from pathlib import Path

import pytest

from openunlearn_nb import method, method_loss
from openunlearn_nb.methods.method import METHODS
from openunlearn_nb.methods.names import METHOD_NAMES
from openunlearn_nb.reporting.method_pages import draw_pushes, settings_table, two_moments

PAGES = Path(__file__).resolve().parents[1] / "nbs" / "reference" / "methods"
HEADINGS = ["Quick start", "The equation", "What it pushes", "Settings", "How it did", "When it fails", "Logged metrics", "See also"]


def cells_of(name: str) -> list[dict]:
    return json.loads((PAGES / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]


@pytest.mark.parametrize("name", METHOD_NAMES)
def test_a_method_has_a_page_of_the_agreed_shape(name):
    text = "\n".join("".join(cell["source"]) for cell in cells_of(name) if cell["cell_type"] == "markdown")
    assert text.startswith(f"# {name}\n\n> ")
    assert [line[3:] for line in text.splitlines() if line.startswith("## ")] == HEADINGS


@pytest.mark.parametrize("name", METHOD_NAMES)
def test_the_page_of_a_method_shows_all_its_settings(name):
    shown = json.dumps([cell.get("outputs") for cell in cells_of(name)])
    assert [key for key in METHODS[name].defaults if f"`{key}`" not in shown] == []


def test_all_pages_are_in_the_comparison():
    text = "".join("".join(cell["source"]) for cell in cells_of("index"))
    assert [name for name in METHOD_NAMES if f"({name}.ipynb)" not in text] == []


def test_the_parts_of_a_page_are_made_for_a_method_of_ones_own():
    @method("PageTrial", paper="a test", strength=2.0)
    def trial(model, batch, ref_model, s):
        return s.strength * method_loss("GradAscent", model, batch, terms=("forget",)).parts["forget"]

    try:
        assert "`strength`" in settings_table("PageTrial")
        assert draw_pushes("PageTrial", two_moments(steps=2, ascent=1)).patches
    finally:
        METHODS.remove("PageTrial")
