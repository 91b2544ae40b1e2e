"""What makes a page of the site from a notebook (scripts/website), and what Quarto needs for the same pages."""

import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

from website import checks, notebooks, pages  # noqa: E402


def shown(name: str) -> dict:
    """A cell as nbdev puts it before the source of a definition."""
    text = f"---\n\n### {name}\n\n```python\ndef {name}(\n    *args, **kwargs\n):\n```\n\n*What {name} is.*\n\nMore."
    outputs = [{"data": {"text/markdown": text}}]
    return {"cell_type": "code", "source": f"#| echo: false\nshow_doc({name})", "outputs": outputs}


def source(code: str) -> dict:
    options = '#| code-fold: show\n#| code-summary: "Exported source"\n'
    return {"cell_type": "code", "source": options + code, "outputs": []}


def test_each_definition_is_followed_by_its_own_source():
    cell = source("LIMIT = 3\n\ndef one():\n    return LIMIT\n\ndef _helper():\n    return 0\n\nclass Two:\n    pass")
    made = notebooks.regrouped([shown("Two"), cell, shown("one")], {"one": "address#L3"})
    first_lines = [notebooks.text_of(cell).splitlines()[0] for cell in made]
    assert first_lines == ["### one", "LIMIT = 3", "### Two", "def _helper():"]
    assert "[source](address#L3){.source-link}" in made[0]["source"] and made[0]["source"].endswith("*What one is.*\n\nMore.")
    assert made[1]["source"].endswith("return LIMIT") and "kwargs" not in made[2]["source"]


def test_cells_that_define_nothing_stay_as_they_are():
    prose, run = {"cell_type": "markdown", "source": "text"}, {"cell_type": "code", "source": "print(1)", "outputs": []}
    made = notebooks.regrouped([prose, source("from pathlib import Path"), run], {})
    assert made[0] is prose and made[2] is run and made[1]["source"] == "from pathlib import Path"


def test_a_definition_is_linked_to_the_line_where_it_begins():
    module = notebooks.module_of(ROOT / "nbs/methods/method.ipynb")
    line = notebooks.lines_of_definitions(module)["Method"]
    assert module == Path("openunlearn_nb/methods/method.py")
    assert (ROOT / module).read_text(encoding="utf-8").splitlines()[line - 1].startswith("class Method(")


def test_a_figure_has_the_alt_text_of_its_cell():
    drawn = {"data": {"image/svg+xml": "<?xml version='1.0'?>\n<svg width='1'><metadata>x</metadata></svg>"}}
    cell = {"cell_type": "code", "source": '#| fig-alt: "A < B, rising"\nplot()', "outputs": [drawn]}
    notebooks.name_figures(cell)
    expected = """<div class="figure"><svg role="img" aria-label="A &lt; B, rising" width='1'></svg></div>"""
    assert cell["outputs"][0]["data"] == {"text/html": expected}


def test_a_span_over_two_lines_is_closed_and_opened_again():
    lines = pages.lines_in('<span class="st">"a\nb"</span>')
    assert lines == ['<span class="st">"a</span>', '<span class="st">b"</span>']


@pytest.mark.parametrize("line, column", [("call(first, second)", 4), ("    value = make(first,", 17), ("rows = [", 4)])
def test_the_rest_of_a_line_stands_at_its_open_bracket(line, column):
    assert pages.hanging(line) == column


def test_columns_scroll_and_sentences_wrap():
    text = "A sentence  here.\n\n        load  train\nZeRO-2   1.0    2.0\nZeRO-3  10.5   11.0\n\nTake ZeRO-3."
    kinds = re.findall(r"<pre( class=columns)?", pages.output(re.match("(.*)", text, re.S)))
    assert kinds == ["", " class=columns", ""]


def test_a_table_is_put_into_one_box_that_scrolls():
    box = '<div class="scroll" tabindex="0"><table><tr></tr></table></div>'
    assert pages.finished("<table><tr></tr></table>") == box
    assert pages.finished('<div class="sd-table">\n<table><tr></tr></table></div>') == box


def test_an_option_is_not_broken_at_its_hyphens():
    assert pages.whole_options("<code>tofu --dry-run</code>") == '<code>tofu <span class="option">--dry-run</span></code>'
    assert pages.whole_options("<pre><code>--dry-run</code></pre>") == "<pre><code>--dry-run</code></pre>"


def test_words_begin_at_the_left_and_numbers_end_at_the_right():
    head = "<tr><th></th><th>answer</th><th>p</th></tr>"
    made = pages.aligned(f"<table>{head}<tr><th>0</th><td>two words</td><td>1e-5</td></tr></table>")
    assert re.findall(r"<t. class=\"words\">([^<]*)", made) == ["answer", "two words"]


def test_short_cells_of_a_table_of_prose_are_marked():
    cells = '<td><code>run</code></td><td style="text-align:right">0.5</td><td>A sentence that is longer.</td>'
    made = pages.finished(f'<table class="caption-top table"><tr>{cells}</tr></table>')
    assert re.findall("<td([^>]*)>", made) == [' class="short"', ' class="short" style="text-align:right"', ""]


def test_no_font_is_loaded_from_elsewhere():
    style = "@import url(https://example.invalid/css2?family=Lato:wght@0,400;1,700&display=swap);body{color:red}"
    assert checks.REMOTE_STYLE.search(style)
    assert pages.own_fonts(style) == "body{color:red}"


def configuration() -> dict:
    import yaml

    return yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))


def entries(contents: list) -> list[str]:
    """The notebooks of a sidebar, in its order."""
    found = []
    for entry in contents:
        if isinstance(entry, str):
            found.append(entry)
        else:
            found += entries(entry["contents"]) if "contents" in entry else [entry["href"]]
    return found


def test_the_sidebar_lists_every_notebook_once():
    listed = entries(configuration()["website"]["sidebar"]["contents"])
    there = {file.relative_to(ROOT / "nbs").as_posix() for file in (ROOT / "nbs").rglob("*.ipynb")
             if ".ipynb_checkpoints" not in file.parts}
    assert len(listed) == len(set(listed)) and set(listed) == there


def test_the_sidebar_begins_with_what_users_need_and_ends_with_internals():
    sections = configuration()["website"]["sidebar"]["contents"]
    names = [entry.get("section") or entry["text"] for entry in sections]
    assert names == ["Home", "Start here", "Results", "Methods", "Metrics", "Library", "Appendix"]
    assert {Path(name).parent.name for name in entries(sections[-1:])} == {"reference", "internals"}


def test_the_files_that_quarto_is_given_exist():
    page, site = configuration()["format"]["html"], configuration()["website"]
    styles = [name for mode in page["theme"].values() for name in mode if name.endswith(".scss")]
    for name in [page["css"], site["favicon"], *styles]:
        assert (ROOT / "nbs" / name).is_file()
    for name in styles:  # Quarto refuses a layer without a mark
        assert "/*-- scss:defaults --*/" in (ROOT / "nbs" / name).read_text(encoding="utf-8")


def test_quarto_knows_the_keys():
    config = pytest.importorskip("smalldocs.config", reason="smalldocs is not installed: pip install -e .[docs]")
    from smalldocs.quarto_keys import QUARTO_PAGE_OPTIONS

    known = {key: value for key, value in config.KNOWN.items() if key in ("project", "website", "format")}
    assert config.check_keys(configuration(), known, "") == []
    assert set(configuration()["format"]["html"]) <= QUARTO_PAGE_OPTIONS | config.HTML_OPTIONS


def test_a_notebook_has_one_title_and_a_kernel():
    """Quarto takes a notebook's title from its first cell, and its language from its kernel."""
    wrong = []
    for file in (file for file in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in file.parts):
        book = json.loads(file.read_text(encoding="utf-8"))
        first = "".join(book["cells"][0]["source"])
        if not first.startswith("# ") or book["metadata"]["kernelspec"]["language"] != "python":
            wrong.append(file.relative_to(ROOT).as_posix())
    assert wrong == []
