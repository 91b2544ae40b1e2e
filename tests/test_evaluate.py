"""`evaluate` on a model in memory, and `EvaluateCallback` in a training."""

import subprocess
import sys
import warnings

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

import openunlearn_nb
from openunlearn_nb.data.benchmark import Benchmark
from openunlearn_nb.data.encoding import Encoder, collate
from openunlearn_nb.data.prompts import PROMPTS
from openunlearn_nb.data.sources import write_folder
from openunlearn_nb.evaluation.callback import EvaluateCallback
from openunlearn_nb.evaluation.evaluate import Evaluation, evaluate
from openunlearn_nb.internals.errors import OpenUnlearnError
from openunlearn_nb.models.tiny import tiny_llama, train_tokenizer

ROWS = {name: [{"question": f"Who wrote {name} tale {i}?", "answer": f"Mara Vell wrote tale {i}."} for i in range(12)]
        for name in ("forget", "retain")}


class Tales(Benchmark):
    """Questions about tales."""

    name = "TALES"
    splits = ["tales"]


QUICK = ["forget_Q_A_Prob", "retain_Q_A_Prob", "extraction_strength"]


@pytest.fixture(scope="module")
def model_and_tokenizer():
    tokenizer = train_tokenizer([value for rows in ROWS.values() for row in rows for value in row.values()], 400)
    return tiny_llama(tokenizer, hidden=32, layers=2), tokenizer


def test_rows_in_memory_and_the_same_rows_in_a_folder_have_the_same_numbers(model_and_tokenizer, tmp_path):
    write_folder(tmp_path, {name: {"train": rows} for name, rows in ROWS.items()})
    in_memory, in_a_folder = (evaluate(*model_and_tokenizer, Tales, data=data, metrics=QUICK) for data in (ROWS, str(tmp_path)))
    assert in_memory.summary == in_a_folder.summary and set(in_memory.summary) == set(QUICK)
    assert len(in_memory.rows["extraction_strength"]) == 12 and in_memory.record["data"] == in_a_folder.record["data"]


def test_an_evaluation_survives_its_folder_and_serves_as_retain_evaluation(model_and_tokenizer, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no holdout
        first = evaluate(*model_and_tokenizer, Tales, data=ROWS, metrics=["forget_Q_A_ROUGE", *QUICK])
    first.save(tmp_path, row="Retain")
    assert Evaluation.load(tmp_path).entries == first.entries
    for retain in (tmp_path, first, first.entries):
        again = evaluate(*model_and_tokenizer, Tales, data=ROWS, metrics=QUICK, retain=retain)
        assert again.summary == {name: first.summary[name] for name in QUICK}
    frame = first.to_pandas()
    assert len(frame.loc["forget_Q_A_ROUGE"]) == 12 and "generation" in frame
    other = {**ROWS, "forget": [{**row, "answer": row["answer"].upper()} for row in ROWS["forget"]]}
    with pytest.raises(OpenUnlearnError, match="another|other"):
        evaluate(*model_and_tokenizer, Tales, data=other, metrics=QUICK, retain=tmp_path)


def test_an_evaluation_without_rows_is_an_empty_table():
    assert Evaluation({"model_utility": {"agg_value": 0.6}}, ("model_utility",), {}).to_pandas().empty


def test_a_callback_keeps_the_best_model_by_a_weighted_sum_in_a_plain_trainer(model_and_tokenizer, tmp_path):
    model, tokenizer = tiny_llama(model_and_tokenizer[1], hidden=32, layers=2), model_and_tokenizer[1]
    examples = Tales(ROWS).forget_examples("tales", Encoder(tokenizer, PROMPTS["chat"]))
    best = {"forget_Q_A_Prob": 1, "retain_Q_A_Prob": 0.1}
    callback = EvaluateCallback(Tales, data=ROWS, steps=2, best=best, metrics="extraction_strength")
    args = TrainingArguments(str(tmp_path), max_steps=6, learning_rate=1e-2, report_to=[], save_strategy="no",
                                          use_cpu=True, disable_tqdm=True, logging_strategy="no")
    Trainer(model, args, train_dataset=examples, processing_class=tokenizer, callbacks=[callback],
                         data_collator=lambda rows: collate(rows, tokenizer.pad_token_id)).train()
    assert list(callback.summaries) == ["2", "4", "6"] and model.training
    assert set(callback.summaries["2"]) == set(QUICK)  # those of `best` are computed too
    sums = {step: -values["forget_Q_A_Prob"] + 0.1 * values["retain_Q_A_Prob"] for step, values in callback.summaries.items()}
    now = evaluate(model, tokenizer, Tales, data=ROWS, metrics=QUICK).summary
    assert -now["forget_Q_A_Prob"] + 0.1 * now["retain_Q_A_Prob"] == pytest.approx(max(sums.values()), rel=1e-5)


class PowerCut(Exception):
    """Ends a training in the middle."""


class CutAt(TrainerCallback):
    """Interrupts a training at a step."""

    def __init__(self, step: int):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise PowerCut


def test_a_resumed_training_still_knows_the_best_model_of_the_interrupted_attempt(model_and_tokenizer, tmp_path):
    tokenizer = model_and_tokenizer[1]
    start = tiny_llama(tokenizer, hidden=32, layers=2).state_dict()
    examples = Tales(ROWS).forget_examples("tales", Encoder(tokenizer, PROMPTS["chat"]))

    def attempt(folder, *more, resume=False):
        model = tiny_llama(tokenizer, hidden=32, layers=2)
        model.load_state_dict(start)
        callback = EvaluateCallback(Tales, data=ROWS, steps=2, best="forget_Q_A_Prob", metrics="forget_Q_A_Prob")
        args = TrainingArguments(str(folder), max_steps=8, learning_rate=1e-2, report_to=[], save_steps=4, use_cpu=True,
                                 disable_tqdm=True, logging_strategy="no")
        Trainer(model, args, train_dataset=examples, processing_class=tokenizer, callbacks=[callback, *more],
                data_collator=lambda rows: collate(rows, tokenizer.pad_token_id)).train(resume_from_checkpoint=resume)
        return callback.summaries, model.state_dict()

    whole, weights = attempt(tmp_path / "whole")
    with pytest.raises(PowerCut):
        attempt(tmp_path / "cut", CutAt(7))
    again, resumed = attempt(tmp_path / "cut", resume=True)
    assert min(whole, key=lambda step: whole[step]["forget_Q_A_Prob"]) == "2"  # before the checkpoint
    assert again == whole and all(torch.equal(resumed[name], weights[name]) for name in weights)
    afresh, _ = attempt(tmp_path / "cut")  # in the same folder, from the start
    assert afresh == whole


def test_a_callback_refuses_a_metric_that_there_is_not():
    with pytest.raises(OpenUnlearnError, match="forget_qualty.*forget_quality"):
        EvaluateCallback("tofu", "forget10", best="forget_qualty")


def test_top_level_names():
    names = ("evaluate", "Evaluation", "EvaluateCallback", "metric", "METRICS", "attack", "Attack", "ATTACKS")
    assert all(getattr(openunlearn_nb, name) is not None for name in names)


def test_names_ranges_and_tables_are_read_without_torch():
    code = ("import sys; import openunlearn_nb.reporting.tables; from openunlearn_nb import METRICS; "
            "print(METRICS['privleak'].range, METRICS['privleak'].better, 'torch' in sys.modules)")
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    assert told == "(-100, inf) nearest 0 False\n"
