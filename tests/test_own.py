"""A user's own data from the shell, and the report of what came of it."""

import csv
import json

import pytest

from openunlearn_nb.commands.cli import main
from openunlearn_nb.commands.show_tables import print_tables
from openunlearn_nb.models.saving import save_model
from openunlearn_nb.models.tiny import tiny_llama, train_tokenizer
from openunlearn_nb.data.tofu import question_pairs
from openunlearn_nb.reporting.report import suite_part


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    rows = question_pairs("forget01", "miniature")
    for side, part in (("forget", rows[:4]), ("retain", rows[4:12])):
        with open(folder / f"{side}.csv", "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("question", "answer"), *part])
    return folder


def test_a_csv_is_unlearned_and_reported(data, tmp_path, capsys):
    runs, page = tmp_path / "runs", tmp_path / "report.html"
    assert main(["own", "--data", str(data), "--methods", "NPO,IdkDPO", "--epochs", "1", "--jobs", "1", "--quiet", "--output", str(runs)]) == 0
    printed = capsys.readouterr().out
    assert all(row in printed for row in ("Retain", "Finetuned", "NPO", "IdkDPO"))
    values = {row: json.loads((runs / "own" / row / "OWN_SUMMARY.json").read_text()) for row in ("Retain", "Finetuned", "NPO")}
    assert values["Finetuned"]["forget_Q_A_Prob"] > 2 * values["Retain"]["forget_Q_A_Prob"]
    assert values["NPO"] != values["Finetuned"]
    assert main(["table", str(runs), "--check"]) == 0
    assert main(["report", str(runs), "--output", str(page)]) == 0
    text = page.read_text()
    assert "OWN, embedded" in text and text.count("<img") == 1 and str(tmp_path) not in text


def test_a_model_of_ones_own_and_texts(tmp_path, capsys):
    folder, base = tmp_path / "data", tmp_path / "base"
    (folder / "retain").mkdir(parents=True)
    (folder / "forget.txt").write_text("The seal lies in the north tower, under the third stone. " * 3)
    for name in "ab":
        (folder / "retain" / f"{name}.txt").write_text(f"Note {name}: the tower was rebuilt twice after the flood. " * 3)
    tokenizer = train_tokenizer([(folder / "forget.txt").read_text()], 300)
    save_model(tiny_llama(tokenizer, hidden=32, layers=2), tokenizer, base)
    common = ["--data", str(folder), "--max-length", "32"]
    train = ["train", "--benchmark", "OWN", "--epochs", "1", "--learning-rate", "1e-3", *common]
    assert main([*train, "--model", str(base), "--method", "Finetune", "--output", str(tmp_path / "taught")]) == 0
    assert main([*train, "--model", str(tmp_path / "taught"), "--method", "GradDiff", "--output", str(tmp_path / "after")]) == 0
    capsys.readouterr()
    assert main(["eval", "own", "--model", str(tmp_path / "after"), *common, "--output", str(tmp_path / "eval")]) == 0
    assert 0 < json.loads(capsys.readouterr().out)["forget_Q_A_Prob"] < 1
    assert main([*train, "--model", str(base), "--method", "IdkDPO", "--output", str(tmp_path / "idk")]) == 2
    assert "texts answer nothing" in capsys.readouterr().err


@pytest.mark.parametrize("benchmark, model, follows", [
    ("OWN", "Llama-2-7b-chat", False), ("TOFU", "embedded", False), ("TOFU", "Llama-3.2-3B-Instruct", False), ("TOFU", "Llama-2-7b-chat", True),
])
def test_the_published_table_follows_a_table_of_the_same_benchmark_and_model_only(benchmark, model, follows, capsys):
    """In the terminal and in the report, whatever the split is called."""
    values = {"forget10": {"NPO": {"forget_quality": 0.2, "model_utility": 0.5, "forget_truth_ratio": 0.6}}}
    print_tables({benchmark: {model: values}})
    assert ("as published by OpenUnlearning" in capsys.readouterr().out) == follows
    page = suite_part(benchmark, model, values, [])
    assert ("As published by OpenUnlearning" in page) == follows


def test_of_a_model_that_two_benchmarks_published_the_first_table_is_taken(monkeypatch):
    from types import SimpleNamespace

    from openunlearn_nb.reporting import tables

    first, second = (SimpleNamespace(published_tables={"Shared": f"{name}.csv"}) for name in ("first", "second"))
    monkeypatch.setattr(tables, "BENCHMARKS", {"FIRST": first, "SECOND": second})
    monkeypatch.setattr(tables, "published_table", lambda benchmark, model: benchmark)
    assert tables.published("Shared") is first
