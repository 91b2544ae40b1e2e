"""What others wrote, files and names alike: read with suspicion, shown as it is, obeyed nowhere."""

import csv
import io
import json
import re
from html.parser import HTMLParser

import pytest

from openunlearn_nb.reporting import tables as t
from openunlearn_nb.commands.cli import main
from openunlearn_nb.internals.json_shapes import check_shape, parse_json
from openunlearn_nb.internals.errors import OpenUnlearnError, csv_text, latex_text, markdown_text, printable
from openunlearn_nb.evaluation.records import SHAPES, read_json

ESCAPES = "\x1b[31mred\x1b[0m\x1b]0;title\x07\x9b2J\r\u202e"
FORMULA = "=cmd|' /C calc'!A0"
MARKED = "a|b [x](http://evil.test) <img src=x> `c`\nnext"
LATEX = r"\input{x} $\alpha$ a_b^c ~ [y] 100% & #1"




def one_row(name: str, value: float = 0.5) -> dict:
    return {"forget10": {name: {"forget_quality": value}}}


@pytest.fixture
def evaluated(tmp_path):
    """Write a folder with an evaluation of one row of this name; give the folder."""

    def write(row: str, evaluation: dict | None = None, record: dict | None = None):
        folder = tmp_path / "runs/own/x"
        folder.mkdir(parents=True, exist_ok=True)
        quoted = {
            "input": row,
            "ground_truth": row,
            "generation": row,
            "rouge1_recall": 0.5,
            "rougeL_f1": 0.5,
            "rougeL_recall": 0.5,
        }
        default = {
            "forget_Q_A_Prob": {"value_by_index": {"0": {"prob": 0.5, "avg_loss": 0.7}}},
            "forget_Q_A_ROUGE": {"value_by_index": {"0": quoted}},
        }
        (folder / "OWN_EVAL.json").write_text(json.dumps(evaluation or default))
        (folder / "run.json").write_text(json.dumps({"model": row, "split": "own", "row": row, **(record or {})}))
        return tmp_path / "runs"

    return write


# one function a place


@pytest.mark.checks(area="Untrusted text", given="ANSI and OSC escapes, other control characters, or turns of the writing direction in anything printed",
                    then="they are shown as \\x1b and the like")
def test_nothing_printed_is_obeyed_by_a_terminal():
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", printable(ESCAPES)) and "\\x1b[31mred" in printable(
        ESCAPES
    )
    assert printable("Zoë\t± 川\n") == "Zoë\t± 川\n" and printable("\ud83d") == "\\ud83d"
    assert "\x1b" not in str(OpenUnlearnError(f"No model {ESCAPES}."))


@pytest.mark.checks(area="Untrusted text", given="names with escapes in a folder of runs",
                    then="table prints them harmlessly")
def test_a_table_of_others_prints_no_escape(evaluated, capsys):
    for style in ([], ["--markdown"], ["--latex"], ["--csv"], ["--json"]):
        assert main(["table", str(evaluated(ESCAPES)), *style]) == 0
        printed = capsys.readouterr().out
        assert "red" in printed and not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", printed)


@pytest.mark.checks(area="Untrusted text", given="an error or a note that quotes escapes",
                    then="they are shown as \\x1b and the like")
def test_errors_and_notes_print_no_escape(tmp_path, capsys):
    assert main(["table", str(tmp_path / f"no{ESCAPES}where")]) == 2
    assert "\x1b" not in capsys.readouterr().err
    from openunlearn_nb.experiments.display import Display

    display = Display([], [], show=False)
    display.note(f"an answer: {ESCAPES}")
    assert "an answer" in (said := capsys.readouterr().err) and "\x1b]0" not in said


@pytest.mark.checks(area="Untrusted text", given="a name that a spreadsheet would run as a formula",
                    then="it has a quote before it in CSV; numbers stay numbers")
@pytest.mark.parametrize("name", [FORMULA, "+1+1", "-2+3", "@SUM(A1)", "\t=1", "\n=1", "＝1"])
def test_csv_holds_no_formula(name):
    head, row = csv.reader(io.StringIO(t.to_csv({name: one_row(name, -0.5)}, ["forget_quality", name])))
    assert row[0][0] == row[1][0] == head[4][0] == "'" and row[3] == "-0.5"
    assert csv_text("-1e-3") == "-1e-3" and csv_text("NPO") == "NPO"


@pytest.mark.checks(area="Untrusted text", given="newlines, pipes, links or elements of HTML in a name in a Markdown table",
                    then="the table keeps its rows and cells, and shows the name as it is")
def test_markdown_tables_hold_no_markup():
    lines = t.to_markdown(one_row(MARKED), ["forget_quality"]).splitlines()
    assert len(lines) == 3 and len(re.findall(r"(?<!\\)\|", lines[2])) == 3
    assert "](" not in lines[2].replace("\\]", "") and "://" not in lines[2] and "<" not in lines[2]
    assert markdown_text("Llama-3.2-1B forget_quality (0.52 ± 0.01)") == "Llama-3.2-1B forget_quality (0.52 ± 0.01)"


@pytest.mark.checks(area="Untrusted text", given="markup in what a model card says",
                    then="the card shows it as it is")
def test_a_model_card_holds_no_markup():
    from openunlearn_nb.experiments.cards import model_card

    record = {
        "method": MARKED,
        "benchmark": "OWN",
        "split": "own",
        "model_path": MARKED,
        "start": {},
        "config": {"data": MARKED, "seed": 0},
        "settings": {"x": MARKED},
        "training": {},
        "losses": [1.0],
        "environment": {"openunlearn_nb": "0"},
    }
    card = model_card(record)
    title = next(line for line in card.splitlines() if line.startswith("# "))
    rows = [line for line in card.splitlines() if line.startswith("| ")]
    assert "\\[x\\]" in title and "&lt;img" in title and "next, OWN own" in title
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 3 for row in rows) and all(
        row.count("`") in (0, 2) for row in rows
    )


@pytest.mark.checks(area="Untrusted text", given="LaTeX's own characters in a name in a LaTeX table",
                    then="they are set as they are; no command is called")
def test_latex_tables_hold_no_command():
    row = next(line for line in t.to_latex(one_row(LATEX), ["forget_quality"]).splitlines() if "input" in line)
    name = row.split(" & 0.50")[0]
    assert set(re.findall(r"\\[a-z]+", name)) == {r"\textbackslash", r"\textasciicircum", r"\textasciitilde"}
    assert name == latex_text(LATEX) and not re.search(r"(?<!\\)[$#%&_]", name) and "{[}y{]}" in name


@pytest.mark.checks(area="Untrusted text", given="dollars, backslashes or a leading underscore in a name in a plot",
                    then="the label shows it as it is, and the legend has it")
def test_labels_of_plots_are_no_formulas():
    import matplotlib.pyplot as plt

    from openunlearn_nb.reporting.plots import metric_bars, quality_against_utility, step_lines

    rows = {name: {"model_utility": 0.5, "forget_quality": 0.1} for name in (r"$\frac{$", "_hidden", "$x$", "Retain")}
    ax = quality_against_utility(rows, title=r"$\nothing{$ of $x$")
    labels = [text.get_text() for text in ax.legend().get_texts()]
    assert len(labels) == 4 and " _hidden" in labels
    figures = [
        ax.figure,
        metric_bars(rows, ["model_utility"], "$x$ $"),
        step_lines({n: [v] for n, v in rows.items()}, ["$m$"], {}, "step", "$"),
    ]
    for figure in figures:
        figure.canvas.draw()  # raises where a label is no formula but is taken for one
        plt.close(figure)
    assert not any(text.get_text().count("$") - text.get_text().count("\\$") for text in ax.legend().get_texts())


@pytest.mark.checks(area="Untrusted text", given="HTML in names, questions and answers",
                    then="the report and the notebooks' tables show it as text")
def test_html_shows_names_and_answers_as_text(evaluated, tmp_path):
    from openunlearn_nb.reporting.explore import epochs_table, heat_strip
    from openunlearn_nb.reporting.report import write_report

    bad = "<script>alert(1)</script><img src=x onerror=y>\"'\ud83d"
    tags: list[str] = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attrs: tags.append(tag if "onerror" not in dict(attrs) else "bad")  # type: ignore[method-assign]
    page = write_report(evaluated(bad), tmp_path / "report.html").read_text()
    for text in (page, heat_strip([(bad, 0.5)]), epochs_table({"1": {bad: 0.5, "other": None}}, 1)):
        parser.feed(text)
    assert "script" not in tags and "bad" not in tags and page.count("&lt;script&gt;") > 3


# files


@pytest.mark.checks(area="Untrusted text", given="JSON nested 100,000 deep",
                    then="one sentence says so")
@pytest.mark.parametrize(
    "text", ["[" * 100_000, "[" * 100_000 + "]" * 100_000, '{"a":' * 100_000, "[" * 400 + "]" * 400]
)
def test_deep_json_is_refused(text, tmp_path):
    (tmp_path / "run.json").write_text(f'{{"a": {text}}}')
    with pytest.raises(ValueError):
        parse_json(text)
    with pytest.raises(OpenUnlearnError, match="run.json is not valid JSON"):
        read_json(tmp_path / "run.json")


@pytest.mark.checks(area="Untrusted text", given="JSON that names something twice in one object",
                    then="one sentence names it")
def test_a_name_twice_is_refused(tmp_path):
    (tmp_path / "run.json").write_text('{"seed": 0, "row": {"seed": 1, "seed": 2}}')
    with pytest.raises(OpenUnlearnError, match="'seed' twice"):
        read_json(tmp_path / "run.json", "run record")


@pytest.mark.checks(area="Untrusted text", given="NaN or Infinity in somebody's record",
                    then="read as null")
def test_constants_that_are_no_json_are_null(tmp_path):
    (tmp_path / "x.json").write_text('{"a": NaN, "b": [-Infinity, 1e999], "c": {"d": 1}}')
    assert read_json(tmp_path / "x.json") == {"a": None, "b": [None, None], "c": {"d": 1}}


WRONG = {
    "evaluation": [
        {"m": 0.5},
        {"m": {"value_by_index": []}},
        {"m": {"value_by_index": {"x": {}}}},
        {"m": {"value_by_index": {"0": 1}}},
        {"m": {"agg_value": "high"}},
        {"m": {"value_by_index": {"0": {"prob": ["x"]}}}},
        {"m": {"agg_value": 10**400}},
    ],
    "retain log": [{"mia_min_k": {"forget": {}}}, {"forget_truth_ratio": {"value_by_index": {"0": {}}}}, {"m": []}],
    "summary": [{"m": "0.5"}, {"m": True}],
    "evaluation history": [{"first": {}}, {"1": 0.5}, {"1": {"m": "x"}}],
    "run record": [
        {"model": 1},
        {"row": None},
        {"files": []},
        {"data": {"a": 1}},
        {"settings": "beta"},
        {"training": []},
        {"seconds": "long"},
    ],
    "training record": [{}, {"prompt": "chat"}, {"prompt": {"colour": "red"}}, {"prompt": {}, "method": 3}],
    "grid configuration": [{"data_hashes": []}, {"recipes": {"NPO": 1}}],
    "record of a failure": [{"error": None}],
}


@pytest.mark.checks(area="Untrusted text", given="a run record, evaluation, summary, retain log, epochs.json, training record or grid.json with another value in a field",
                    then="one sentence names file and field")
@pytest.mark.parametrize("what", WRONG)
def test_a_file_of_the_wrong_shape_is_refused(what, tmp_path):
    assert WRONG.keys() == SHAPES.keys()
    for value in [*WRONG[what], [], "text"]:
        (tmp_path / "file.json").write_text(json.dumps(value))
        with pytest.raises(OpenUnlearnError, match=f"The {what} .*file.json (is not in the shape of one|holds a)"):
            read_json(tmp_path / "file.json", what)


@pytest.mark.checks(area="Untrusted text", given="somebody's folder of runs, with anything in any field",
                    then="table and report say one sentence or show it; there is no traceback")
def test_no_field_of_a_run_makes_a_traceback(evaluated, tmp_path):
    row = {"prob": 0.5, "avg_loss": 0.7}
    odd: list = [
        None,
        [],
        {},
        "x",
        1,
        [{}],
        {"0": 1},
        {"value_by_index": {}},
        {"value_by_index": {"0": {}}},
        {"forget": {}},
    ]
    for value in odd:
        for evaluation in (
            {"forget_Q_A_Prob": value},
            {"forget_Q_A_ROUGE": value},
            {"mia_min_k": value},
            {"forget_Q_A_Prob": {"value_by_index": {"0": row}}, "x": value},
        ):
            folder = evaluated("NPO", evaluation)
            assert main(["table", str(folder)]) in (0, 2)
        for field in ("row", "settings", "retain_log"):
            assert main(["table", str(evaluated("NPO", None, {field: value}))]) in (0, 2)
        assert main(["table", str(folder), "--check"]) in (1, 2)
    evaluated("NPO", None, {"settings": {"a": [[]], "b": "<b>"}, "training": {"learning_rate": {}}})
    assert main(["report", str(folder), "--output", str(tmp_path / "r.html")]) == 0


@pytest.mark.checks(area="Untrusted text", given="a file of alternates with a line that is none",
                    then="one sentence names file, line and field")
@pytest.mark.parametrize(
    "line",
    [
        "[1]",
        '{"question": 1, "alternate": "x"}',
        '{"question": "Who?"}',
        '{"question": "Who?", "alternate": " "}',
        "[" * 100_000,
        "{",
    ],
)
def test_a_wrong_line_of_alternates_is_refused(line, tmp_path):
    from openunlearn_nb.experiments.alternates import read_alternates

    (tmp_path / "a.jsonl").write_text('{"question": "Who?", "alternate": "Orla"}\n' + line)
    with pytest.raises(OpenUnlearnError, match="Line 2 of .*a.jsonl is no alternate"):
        read_alternates(tmp_path / "a.jsonl", ["Who?"])


@pytest.mark.checks(area="Untrusted text", given="a checkpoint whose run.json has another shape",
                    then="one sentence says that it is damaged")
@pytest.mark.parametrize(
    "about",
    [
        "[]",
        '{"run": []}',
        '{"what": {}}',
        "[" * 100_000,
    ],
)
def test_a_checkpoint_of_the_wrong_shape_is_damaged(about, tmp_path):
    from openunlearn_nb.training.checkpoints import last_checkpoint

    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1/run.json").write_text(about)
    with pytest.raises(OpenUnlearnError, match="checkpoint-1 is damaged"):
        last_checkpoint(tmp_path, {})


@pytest.mark.checks(area="Untrusted text", given="--set with JSON nested 100,000 deep",
                    then="taken as text, as whatever is no JSON is")
def test_a_deep_setting_is_a_text():
    from openunlearn_nb.commands.parsing import read_pairs

    assert read_pairs(["x=" + "[" * 100_000]) == {"x": ["[" * 100_000]} and read_pairs(["x=0.5"]) == {"x": [0.5]}


def test_shapes_name_the_field():
    shape = {"a": {"*": [(float, None)]}, "b?": bool}
    check_shape({"a": {"x": [1, None, 2.5]}, "c": object()}, shape)
    for value, field in (
        ({}, "a is missing"),
        ({"a": {"x": [1, True]}}, r"a.x\[1\] is True"),
        ({"a": {}, "b": 0}, "b is 0"),
    ):
        with pytest.raises(ValueError, match=field):
            check_shape(value, shape)
