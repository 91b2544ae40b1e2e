"""The published logs, recomputed from their per-example values."""

import json

import pytest

from openunlearn_nb.data.benchmark import BENCHMARKS
from openunlearn_nb.evaluation.entries import recompute
from openunlearn_nb.evaluation.membership import leakage, reference_rows
from openunlearn_nb.evaluation.metric import rows_of
from openunlearn_nb.evaluation.rouge import rouge_row
from openunlearn_nb.models.tiny import train_tokenizer
from openunlearn_nb.data.muse import Muse
from openunlearn_nb.data.encoding import Encoder
from openunlearn_nb.data.prompts import PROMPTS
from openunlearn_nb.evaluation.records import read_json
from openunlearn_nb.reporting.collect import find_runs, measured
from openunlearn_nb.reporting.tables import digits, published

TOFU_MODELS = ("Llama-2-7b-chat", "Llama-3.2-1B-Instruct", "Llama-3.2-3B-Instruct")
CELLS = {(m, f"forget{p}") for m in TOFU_MODELS for p in ("01", "05", "10")} | {("Llama-2-7b", "News"), ("Llama-2-7b", "Books")}


@pytest.fixture(scope="module")
def runs(eval_logs):
    return find_runs(eval_logs)


def test_every_log_is_found(runs):
    assert {(r.model, r.split, r.row) for r in runs} == {(*cell, row) for cell in CELLS for row in ("Finetuned", "Retain")}


def test_recomputed_aggregates_equal_the_logs(runs):
    """Every entry of every log, six membership attacks among them, to 1e-9; the Retain logs hold no forget_quality."""
    retain = {(r.model, r.split): read_json(r.file) for r in runs if r.row == "Retain"}
    compared = []
    for run in runs:
        log, again = read_json(run.file), recompute(read_json(run.file), BENCHMARKS[run.suite], retain[run.model, run.split])
        if run.row == "Retain":
            assert again["privleak"]["agg_value"] == pytest.approx(0, abs=1e-9)  # against itself; in the log, against 0.5:
            again["privleak"] = {"agg_value": leakage(again["mia_min_k"]["auc"], 0.5)}
        for name in (n for n in log if log[n]["agg_value"] is not None):
            assert again[name]["agg_value"] == pytest.approx(log[name]["agg_value"], rel=1e-9, abs=1e-12), (run, name)
            compared.append(name)
    assert len(compared) == sum(len(read_json(r.file)) for r in runs) - 9  # the Retain logs of TOFU, with a null forget_quality
    assert {"mia_loss", "mia_zlib", "mia_reference", "mia_gradnorm", "mia_min_k", "mia_min_k_plus_plus"} <= set(compared)


def test_attacks_scores_of_the_logs_agree_with_each_other(runs):
    """mia_loss is the forget answers' avg_loss; mia_reference is the difference of two logs' losses, but for the precision they ran in."""
    retain = {(r.model, r.split): read_json(r.file) for r in runs if r.row == "Retain"}
    for run in (r for r in runs if r.suite == "TOFU" and r.row == "Finetuned"):
        log, known = read_json(run.file), retain[run.model, run.split]
        assert [r["score"] for r in rows_of(log["mia_loss"]["forget"])] == [r["avg_loss"] for r in rows_of(log["forget_Q_A_Prob"])]
        again = reference_rows(rows_of(log["mia_loss"]["forget"]), rows_of(known["mia_loss"]["forget"]))
        for a, b in zip(again, rows_of(log["mia_reference"]["forget"])):
            assert a["score"] == pytest.approx(b["score"], abs=0.1)


def test_muse_news_equals_the_printed_page(runs):
    """0.64, 0.58, -99.81, 0.56 and 0.33, 0.20, 0, 0.56; and the logs' own aggregates to 1e-9."""
    table, page = measured(runs, "MUSE")["Llama-2-7b"]["News"], published("Llama-2-7b")["News"]
    columns = ["forget_knowmem_ROUGE", "forget_verbmem_ROUGE", "privleak", "retain_knowmem_ROUGE"]
    assert list(Muse.columns) == columns
    assert [digits(table["Finetuned"][c]) for c in columns] == ["0.64", "0.58", "-99.81", "0.56"]
    assert [digits(table["Retain"][c]) for c in columns] == ["0.33", "0.20", "0.00", "0.56"] and table["Retain"]["privleak"] == 0
    assert all(float(digits(table[row][c])) == float(page[row][c]) for row in table for c in columns)
    log = read_json(next(r.file for r in runs if r.split == "News" and r.row == "Finetuned"))
    for name in (*columns, "extraction_strength", "exact_memorization"):
        assert table["Finetuned"][name] == pytest.approx(log[name]["agg_value"], abs=1e-9), name


def test_muse_books_equals_the_printed_page_in_all_but_one_number(runs):
    """The log itself says -57.34, the page -57.26."""
    table, page = measured(runs, "MUSE")["Llama-2-7b"]["Books"], published("Llama-2-7b")["Books"]
    differ = {(row, c): digits(table[row][c]) for row in table for c in Muse.columns if float(digits(table[row][c])) != float(page[row][c])}
    assert differ == {("Finetuned", "privleak"): "-57.34"} and float(page["Finetuned"]["privleak"]) == -57.26


def test_muse_rouge_rescored_from_the_logged_generations(runs):
    compared = 0
    for run in (r for r in runs if r.suite == "MUSE"):
        log = read_json(run.file)
        for name in ("forget_knowmem_ROUGE", "forget_verbmem_ROUGE", "retain_knowmem_ROUGE"):
            for row in rows_of(log[name]):
                again = rouge_row(row["input"], row["ground_truth"], row["generation"], published=True)
                for key in ("rouge1_recall", "rougeL_f1", "rougeL_recall"):
                    assert again[key] == pytest.approx(row[key], abs=1e-9), (run, name)
                compared += 1
    assert compared == 1200


def test_muse_prompts_are_the_published_ones(runs, real_muse):
    """Our few-shot prompts and beginnings, character for character but for the white space that decoding tidies."""
    muse, bare = Muse(real_muse), lambda text: "".join(text.split())
    log = read_json(next(r.file for r in runs if r.split == "News" and r.row == "Finetuned"))
    enc = Encoder(train_tokenizer(["any text"], 300, chat=False), PROMPTS["plain"], max_length=100_000)
    for where, name in {"verbmem/forget": "forget_verbmem_ROUGE", "knowmem/forget_qa": "forget_knowmem_ROUGE",
                        "knowmem/retain_qa": "retain_knowmem_ROUGE"}.items():
        logged, prompts = rows_of(log[name]), muse.prompts(f"News/{where}", enc)
        assert len(logged) == len(prompts.ids) == 100
        for entry, ids, truth in zip(logged, prompts.ids, prompts.reference_answers):
            assert bare(enc.tokenizer.decode(ids)) == bare(entry["input"]) and bare(truth) == bare(entry["ground_truth"])


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
    run = next(r for r in runs if r.row == "Retain" and r.split == "forget10" and r.model == "Llama-2-7b-chat")
    for row in rows_of(read_json(run.file)["forget_Q_A_ROUGE"]):
        again = rouge_row(row["input"], row["ground_truth"], row["generation"], published=True)
        for key in ("rouge1_recall", "rougeL_f1", "rougeL_recall"):
            assert again[key] == pytest.approx(row[key], abs=1e-9)


def test_table_command_prints_them_as_json(eval_logs, capsys):
    from openunlearn_nb.commands.cli import main

    assert main(["table", str(eval_logs), "--json"]) == 0
    tables = json.loads(capsys.readouterr().out)
    assert tables["MUSE"]["Llama-2-7b"]["News"]["Retain"]["privleak"] == 0
    assert tables["TOFU"]["Llama-2-7b-chat"]["forget10"]["Finetuned"]["forget_quality"] == pytest.approx(4.346199600129006e-25, rel=1e-9)
