"""The reference pages of metrics: every metric is on one page, and all pages have one shape."""

import json
import re
from pathlib import Path

import pytest

from openunlearn_nb.evaluation.metric import METRICS

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(file for file in (ROOT / "nbs/reference/metrics").glob("*.ipynb") if file.stem != "index")
HEADINGS = ["The idea", "The equation", "By hand", "The picture: four example models", "Settings and variants",
            "Published values", "Embedded values", "How to read it", "When it misleads", "Use"]


def text_of(file: Path, kind: str) -> str:
    cells = json.loads(file.read_text(encoding="utf-8"))["cells"]
    return "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == kind)


def declared_on(file: Path) -> list[str]:
    """The metrics whose declarations a page prints."""
    code = text_of(file, "code")
    lists = re.findall(r"declared\((\".*?\")\)", code) + re.findall(r"(?s)^names = \[(.*?)\]\nMarkdown\(declared", code, re.M)
    return [name for part in lists for name in re.findall(r'"(\w+)"', part)]


def test_every_metric_is_on_exactly_one_page():
    ours = [name for name, one in METRICS.items() if one.function.__module__.startswith("openunlearn_nb.")]
    assert sorted(name for file in PAGES for name in declared_on(file)) == sorted(ours)


@pytest.mark.parametrize("file", PAGES, ids=lambda file: file.stem)
def test_a_page_has_the_agreed_shape(file):
    prose = text_of(file, "markdown")
    assert re.match(r"# .+\n\n> .+", prose)
    assert re.findall(r"(?m)^## (.+)$", prose) == HEADINGS
    assert re.search(r"(?i)does \*?not\*? show|do \*?not\*? show", prose)
    assert "#| fig-alt:" in text_of(file, "code")


def test_the_index_and_the_sidebar_name_every_page():
    index = text_of(ROOT / "nbs/reference/metrics/index.ipynb", "markdown")
    sidebar = (ROOT / "_quarto.yml").read_text(encoding="utf-8")
    for file in PAGES:
        assert f"]({file.name})" in index
        assert f"- reference/metrics/{file.name}" in sidebar
