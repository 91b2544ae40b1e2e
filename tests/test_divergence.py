"""A model that answers NaN has not forgotten: its rows are null, and a training that ends so says it."""

import json
import math
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from openunlearn_nb.evaluation import membership, metrics, rouge
from openunlearn_nb.reporting.collect import find_runs, measured
from openunlearn_nb.experiments.config import RunConfig
from openunlearn_nb.internals.errors import OpenUnlearnError
from openunlearn_nb.models.generation import _by_transformers, generate
from openunlearn_nb.experiments.grid_config import GridConfig
from openunlearn_nb.experiments.grid import plan, run_grid
from openunlearn_nb.models.tiny import tiny_llama, train_tokenizer
from openunlearn_nb.data.custom import Own
from openunlearn_nb.training.pairs import TrainConfig
from openunlearn_nb.evaluation.entries import compute_entries, recompute, summarise
from openunlearn_nb.evaluation.metric import Context
from openunlearn_nb.evaluation.model_results import ModelResults
from openunlearn_nb.data.encoding import Encoder
from openunlearn_nb.data.prompts import PROMPTS
from openunlearn_nb.evaluation.records import read_json
from openunlearn_nb.internals.files import to_json
from openunlearn_nb.reporting.report import write_report
from openunlearn_nb.experiments.runs import train_model
from openunlearn_nb.reporting.tables import to_text
from openunlearn_nb.data.tofu import Tofu
from openunlearn_nb.training.divergence import diverged_at
from openunlearn_nb.training.trainer import train


def scored(*logps: float) -> dict:
    n = len(logps)
    return {"logps": np.array(logps, np.float32), "hits": np.ones(n, bool), "means": np.full(n, -2, np.float32),
            "variances": np.ones(n, np.float32), "answer": "text"}


ROWS = {"prob": metrics.probability, "extraction strength": metrics.extraction_strength,
        "exact memorization": metrics.exact_memorization, "loss": membership.mia_loss, "zlib": membership.mia_zlib,
        "min_k": membership.mia_min_k, "min_k_plus_plus": membership.mia_min_k_plus_plus,
        "perturbed": lambda row: metrics.probability({"answers": [row]})}


def values(row: dict | float | None) -> list:
    cells = row if isinstance(row, dict) else {"score": row}
    return [v for value in cells.values() for v in (value if isinstance(value, list) else [value])]


@pytest.mark.checks(area="Metrics", given="an answer of which one token's log-probability is NaN or infinite", then="every metric's row is null")
@pytest.mark.parametrize("lost", [math.nan, -math.inf, math.inf])
@pytest.mark.parametrize("name", ROWS)
def test_a_row_without_a_finite_likelihood_is_null(name, lost):
    assert None not in values(ROWS[name](scored(-1, -2, -3)))
    for place in range(3):
        logps = [-1.0, -2.0, -3.0]
        logps[place] = lost
        assert set(values(ROWS[name](scored(*logps)))) == {None}


def results(lost: set[int]) -> SimpleNamespace:
    """Results on TOFU with ten rows of each data set; of rows in `lost` the model said nothing finite."""
    one = lambda i: scored(-0.5, math.nan if i in lost else -1.0 - 0.1 * i)
    made = {
        "answer": one,
        "paraphrase": one,
        "moments": one,
        "perturbed": lambda i: {"answers": [one(i), one(i)]},
        "generation": lambda i: {"prompt": "Who?", "answer": f"Mara Vell wrote it {i}", "generation": None if i in lost else f"Mara wrote {i}"},
        "gradient": lambda i: {"norm": None if i in lost else 1.0},
    }
    sets = set(Tofu().data_sets("forget01").values())
    found = {(where, part): [make(i) for i in range(10)] for where in sets for part, make in made.items()}
    return SimpleNamespace(benchmark=Tofu(), rows=found, compute=lambda where, parts: None)


def evaluated(lost: set[int]):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        entries = compute_entries(results(lost), "forget01", ["all"], Context(classifier="characters"), against_itself=True)
    return entries, [str(w.message) for w in caught]


@pytest.mark.checks(area="Metrics", given="a model that answers NaN to all rows", then="all values are null, and a warning counts the rows")
def test_a_model_that_answers_nan_has_no_values():
    entries, told = evaluated(set(range(10)))
    assert {name: e["agg_value"] for name, e in entries.items() if e["agg_value"] is not None} == {}
    assert summarise(entries, list(Tofu.metrics)) == {}
    assert all(e["null_rows"] == 10 for e in entries.values() if "value_by_index" in e)
    assert any("no finite numbers in 10 of 10 rows" in text for text in told)


@pytest.mark.checks(area="Metrics", given="a model that answers NaN to some rows", then="the other rows' values, and `null_rows` in each entry")
def test_lost_rows_are_counted_and_left_out():
    (entries, _), (whole, quiet) = evaluated({2, 3, 7}), evaluated(set())
    assert "null_rows" not in str(whole) and not any("finite" in text for text in quiet)
    for name in ("forget_Q_A_Prob", "forget_Q_A_ROUGE", "retain_Truth_Ratio", "extraction_strength", "ra_Q_A_Prob_normalised"):
        assert entries[name]["null_rows"] == 3
        left = {i: row for i, row in whole[name]["value_by_index"].items() if int(i) not in (2, 3, 7)}
        assert {i: row for i, row in entries[name]["value_by_index"].items() if None not in values(row)} == left
    assert entries["mia_min_k"]["forget"]["null_rows"] == 3 and entries["mia_loss"]["auc"] is not None
    again = recompute(json.loads(to_json(entries)), Tofu, entries)
    assert all(again[name]["agg_value"] == entries[name]["agg_value"] for name in again)


@pytest.fixture(scope="module")
def broken():
    tokenizer = train_tokenizer(["Who wrote the tale? Mara Vell wrote it."], 300)
    model = tiny_llama(tokenizer, hidden=16, layers=1).eval()
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    return model, tokenizer


@pytest.mark.checks(area="Metrics", given="logits that are NaN while a model writes its answer", then="there is no generation, and its ROUGE is null")
def test_a_broken_model_says_nothing(broken):
    model, tokenizer = broken
    prompts = [tokenizer("Who wrote it?")["input_ids"], tokenizer("Who?")["input_ids"]]
    assert generate(model, tokenizer, prompts, max_new_tokens=4) == [None, None]
    assert generate(model, tokenizer, prompts, max_new_tokens=4, temperature=1.0) == [None, None]
    assert _by_transformers(model, tokenizer, prompts, {1}, 4, (), 0.0) == [[-1], [-1]]
    assert rouge.rouge_row("Who?", "Mara Vell", None)["rougeL_recall"] is None


def own_data(folder):
    for name in ("forget", "retain"):
        lines = [f"Who wrote {name} tale {i}?,Mara Vell number {i} wrote it" for i in range(12)]
        (folder / f"{name}.csv").write_text("\n".join(["question,answer", *lines]))
    return str(folder)


def test_an_evaluation_of_a_broken_model(broken, tmp_path):
    """From logits to entries, with real passes."""
    model, tokenizer = broken
    with pytest.warns(UserWarning, match="no finite numbers in 12 of 12 rows of forget, 12 of 12 rows of retain"):
        entries = compute_entries(ModelResults(model, Encoder(tokenizer, PROMPTS["plain"]), Own(own_data(tmp_path))), "own", context=Context(classifier="characters"))
    assert {e["agg_value"] for e in entries.values()} == {None} and {e["null_rows"] for e in entries.values()} == {12}


@pytest.mark.checks(area="Training", given="a learning rate that makes the loss or the weights NaN", then="a warning names the step")
def test_a_diverged_training_says_so(tmp_path):
    tokenizer = train_tokenizer(["Who wrote the tale? Mara Vell wrote it."], 300)
    model = tiny_llama(tokenizer, hidden=16, layers=1)
    examples = [{"input_ids": list(range(5, 15)), "labels": [-100] * 3 + list(range(8, 15))}] * 4
    wild = TrainConfig(learning_rate=1e38, epochs=4, effective_batch=4, batch_size=4, warmup_epochs=0, optim="sgd", gradient_checkpointing=False)
    with pytest.warns(UserWarning, match=r"GradAscent diverged: at step \d of 4 .* The learning rate was 1e\+38"):
        made = train(model, 0, "GradAscent", examples, [], wild)
    assert diverged_at(made.model, made.losses) == 1 + [math.isfinite(loss) for loss in made.losses].index(False)


def test_weights_alone_may_be_lost(broken):
    whole = tiny_llama(broken[1], hidden=16, layers=1)
    assert diverged_at(broken[0], [1.0, 2.0]) == 2 and diverged_at(whole, [1.0, math.inf, math.nan]) == 2 and diverged_at(whole, [1.0]) is None


@pytest.mark.checks(area="Training", given="a cell of a grid that diverges",
                    then="its record, the table and the report say so; its values are null, and it is not run again")
def test_a_diverged_cell_is_told_everywhere(small_grid, tmp_path):
    _, grid = small_grid
    wild = GridConfig(**{**vars(grid), "methods": ("GradAscent",), "learning_rate": 1e30, "epochs": 4,
                         "metrics": ("forget_quality", "forget_Q_A_Prob")})
    with pytest.warns(UserWarning, match="GradAscent diverged"):
        assert run_grid(wild, tmp_path, jobs=1, show=False) == []
    folder = tmp_path / "forget01/GradAscent"
    record = read_json(folder / "run.json")
    assert record["diverged"] is True and record["losses"][record["diverged_at"] - 1] is None and not any(folder.glob("**/*.safetensors"))
    assert "diverged" not in read_json(tmp_path / "forget01/Finetuned/run.json")
    assert read_json(folder / "TOFU_SUMMARY.json") == {} and plan(wild, str(tmp_path)) == []
    shown = to_text(measured(find_runs(tmp_path))["embedded"])
    assert "GradAscent *" in shown and f"* GradAscent on forget01: its training diverged (step {record['diverged_at']})" in shown
    assert "GradAscent on forget01: its training diverged" in write_report(tmp_path, tmp_path / "report.html").read_text()


@pytest.mark.checks(area="Training", given="`openunlearn train` that diverges", then="one sentence with the step and the learning rate; no model is saved")
def test_no_diverged_model_is_saved(small_grid, tmp_path):
    _, grid = small_grid
    config = RunConfig(train_rows=grid.train_rows, epochs=4, learning_rate=1e30)
    with pytest.warns(UserWarning, match="GradAscent diverged"), pytest.raises(OpenUnlearnError, match=r"GradAscent diverged at step \d+ of \d+.*below 1e\+30"):
        train_model(config, "GradAscent", "forget01", None, {}, tmp_path / "model")
    assert not (tmp_path / "model").exists()
