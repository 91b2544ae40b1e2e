"""The published logs, recomputed from their per-example values."""

import json

import pytest

from openunlearn_nb.metrics import rouge_row
from openunlearn_nb.records import read_json
from openunlearn_nb.suites import recompute, rows_of
from openunlearn_nb.tables import digits, find_runs, measured, published

MODELS = ["Llama-2-7b-chat", "Llama-3.2-1B-Instruct"]


@pytest.fixture(scope="module")
def runs(eval_logs):
    return [run for run in find_runs(eval_logs) if run.model in MODELS]


def test_every_log_is_found(runs):
    assert {(r.model, r.split, r.row) for r in runs} == {
        (m, f"forget{p}", row) for m in MODELS for p in ("01", "05", "10") for row in ("Finetuned", "Retain")}


def test_recomputed_aggregates_equal_the_logs(runs):
    """Every aggregate the suite knows, to 1e-9; the Retain logs hold no forget_quality, and their privleak is against 0.5."""
    retain = {(r.model, r.split): read_json(r.file) for r in runs if r.row == "Retain"}
    compared = 0
    for run in runs:
        log = read_json(run.file)
        for name, entry in recompute(log, retain[run.model, run.split]).items():
            if run.row == "Retain" and name in ("forget_quality", "privleak"):
                assert entry["agg_value"] == pytest.approx(1.0 if name == "forget_quality" else 0.0, abs=1e-9)
            else:
                assert entry["agg_value"] == pytest.approx(log[name]["agg_value"], abs=1e-9), (run, name)
                if log[name]["agg_value"]:
                    assert entry["agg_value"] == pytest.approx(log[name]["agg_value"], rel=1e-9), (run, name)
                compared += 1
    assert compared > 250


def test_llama_2_equals_the_printed_page(eval_logs):
    """Finetuned and Retain rows, digit for digit: 1.27e-03, 5.87e-14, 4.35e-25, 0.63, 0.53, ..."""
    table = measured(find_runs(eval_logs))["Llama-2-7b-chat"]
    page = published("Llama-2-7b-chat")
    for split, rows in table.items():
        assert set(rows) == {"Finetuned", "Retain"}
        for row, values in rows.items():
            for metric, printed in page[split][row].items():
                assert float(digits(values[metric])) == float(printed), (split, row, metric)
    assert [digits(table[s]["Finetuned"]["forget_quality"]) for s in table] == ["1.27e-03", "5.87e-14", "4.35e-25"]


def test_rouge_rescored_from_the_logged_generations(runs):
    run = next(r for r in runs if r.row == "Retain" and r.split == "forget10")
    for row in rows_of(read_json(run.file)["forget_Q_A_ROUGE"]):
        again = rouge_row(row["input"], row["ground_truth"], row["generation"])
        for key in ("rouge1_recall", "rougeL_f1", "rougeL_recall"):
            assert again[key] == pytest.approx(row[key], abs=1e-9)


def test_table_command_prints_them_as_json(eval_logs, capsys):
    from openunlearn_nb.cli import main

    assert main(["table", str(eval_logs), "--json"]) == 0
    tables = json.loads(capsys.readouterr().out)
    assert tables["Llama-2-7b-chat"]["forget10"]["Finetuned"]["forget_quality"] == pytest.approx(4.346199600129006e-25, rel=1e-9)
