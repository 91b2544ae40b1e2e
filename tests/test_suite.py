"""What a metric must not depend on, what the commands make of the newer parts, and the reference's arithmetic in training."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file

import openunlearn_nb
from openunlearn_nb.experiments.alternates import read_alternates
from openunlearn_nb.commands.cli import main
from openunlearn_nb.models.saving import save_model
from openunlearn_nb.models.tiny import tiny_llama, train_tokenizer
from openunlearn_nb.data.muse import Muse
from openunlearn_nb.training.pairs import TrainConfig
from openunlearn_nb.evaluation.entries import compute_entries
from openunlearn_nb.evaluation.metric import Context
from openunlearn_nb.evaluation.model_results import ModelResults
from openunlearn_nb.data.encoding import Encoder, encode_all
from openunlearn_nb.data.prompts import PROMPTS
from openunlearn_nb.evaluation.records import read_json
from openunlearn_nb.data.tofu import Tofu, load_tofu
from openunlearn_nb.training.trainer import train
from openunlearn_nb.data.wmdp import Wmdp

QUICK = {"gradient_checkpointing": False, "effective_batch": 8, "batch_size": 8}


class Few:
    """A benchmark of which only the first rows are asked, in reverse order if wanted."""

    def __init__(self, whole, n, step=1):
        self.whole, self.name, self.some = whole, whole.name, lambda rows: rows[:n][::step]
        self.metrics, self.default_metrics = whole.metrics, whole.default_metrics

    def data_sets(self, split):
        return self.whole.data_sets(split)

    def scored(self, where, part, enc):
        return self.some(self.whole.scored(where, part, enc))

    def prompts(self, where, enc):
        asked = self.whole.prompts(where, enc)
        return asked._replace(ids=self.some(asked.ids), reference_answers=self.some(asked.reference_answers))


def taught(benchmark, prompt):
    """A small model that learnt a little, so that its numbers are not all alike."""
    tokenizer = train_tokenizer(benchmark.tokenizer_texts(), 600, chat=prompt == "chat")
    model, enc = tiny_llama(tokenizer, hidden=32, layers=2), Encoder(tokenizer, PROMPTS[prompt])
    lessons = benchmark.embedded_examples(benchmark.training_sets(benchmark.splits[0])[0], enc)[:96]
    train(model, tokenizer.pad_token_id, "Finetune", [], lessons, TrainConfig(learning_rate=5e-3, epochs=4, **QUICK))
    return model, enc


@pytest.mark.parametrize("benchmark, prompt, split", [(Tofu(max_rows=250), "chat", "forget01"), (Muse(shots=1), "plain", "News")])
@pytest.mark.filterwarnings("ignore")
def test_metrics_do_not_depend_on_batches_order_or_padding(benchmark, prompt, split, monkeypatch):
    """All metrics of a suite, with one row at a time, in reverse, and without anything that rows share, within 1e-5."""
    model, enc = taught(benchmark, prompt)

    def all_of(batch_size=64, step=1):
        results = ModelResults(model, enc, Few(benchmark, 8, step), batch_size)
        first = compute_entries(results, split, ["all"], Context(classifier="characters"))
        return compute_entries(results, split, ["all"], Context(first, "characters"))

    whole, others = all_of(), {"one at a time": all_of(1), "in reverse": all_of(step=-1)}
    for module in ("scoring", "generation"):  # as with a model whose keys and values cannot be shared
        monkeypatch.setattr(f"openunlearn_nb.models.{module}.can_share_prefixes", lambda model: False)
    others["rows read whole"] = all_of()
    for how, other in others.items():
        assert other.keys() == whole.keys() == set(benchmark.metrics)
        for name, entry in whole.items():
            assert entry["agg_value"] is not None, name
            assert other[name]["agg_value"] == pytest.approx(entry["agg_value"], rel=1e-5, abs=1e-5), (how, name)


def test_a_grids_numbers_do_not_depend_on_the_number_of_processes(small_grid, tmp_path):
    from openunlearn_nb.experiments.grid import run_grid

    folder, grid = small_grid
    assert run_grid(grid, tmp_path, jobs=1, show=False) == []
    for row in ("Retain", "NPO", "IdkDPO"):
        ours, theirs = (read_json(f / "forget01" / row / "TOFU_SUMMARY.json") for f in (folder, tmp_path))
        assert ours.keys() == theirs.keys() and all(theirs[k] == pytest.approx(v, rel=1e-5, abs=1e-5) for k, v in ours.items())


def test_public_names():
    assert callable(openunlearn_nb.method_loss) and "NPO" in openunlearn_nb.METHODS
    with pytest.raises(AttributeError, match="no_such"):
        _ = openunlearn_nb.no_such


@pytest.fixture(scope="module")
def world():
    rows = [(r["question"], r["answer"]) for r in load_tofu("full")[-16:]]
    tokenizer = train_tokenizer([q + " " + a for q, a in rows], 500)
    examples = encode_all(Encoder(tokenizer, PROMPTS["chat"]), rows)
    return tokenizer, tiny_llama(tokenizer, hidden=32, layers=2), examples[8:], examples[:8]


@pytest.mark.parametrize("method", ["UNDIAL", "SatImp", "WGA", "CEU", "PDU", "AltPO", "NPO"])
def test_every_method_trains_plainly_and_with_the_references_arithmetic(method, world):
    tokenizer, model, forget, retain = world
    losses = {}
    for compat in (None, "open-unlearning"):
        some = copy.deepcopy(model)
        settings = {"retain_loss_type": "KL"} if method == "NPO" else {"retain_loss_eps": 0.3} if method == "PDU" else {}
        _, losses[compat] = train(some, tokenizer.pad_token_id, method, forget, retain, TrainConfig(learning_rate=5e-3, epochs=4, **QUICK), settings,
                                  [retain] * 4 if method == "AltPO" else None, compat=compat)
        assert len(losses[compat]) == 4 and any(not torch.equal(a, b) for a, b in zip(some.parameters(), model.parameters()))
    same = losses[None] == pytest.approx(losses["open-unlearning"], rel=1e-5)  # padding on the other side shows in the last digit
    assert same == (method in ("SatImp", "WGA", "CEU", "AltPO"))


def test_rows_without_labels_are_left_out_of_training(world):
    tokenizer, model, forget, retain = world
    blank = {"input_ids": [5, 6], "labels": [-100, -100]}
    config = TrainConfig(learning_rate=1e-3, epochs=1, **QUICK)
    with_blank, without = (train(copy.deepcopy(model), tokenizer.pad_token_id, "NPO", f, retain, config).losses for f in ([blank, *forget], forget))
    assert with_blank == without
    with pytest.raises(openunlearn_nb.internals.errors.OpenUnlearnError, match="None of the 1 examples to forget has a labelled token"):
        train(copy.deepcopy(model), tokenizer.pad_token_id, "NPO", [blank], retain, config)


def test_alternates_are_made_read_and_used(tmp_path, capsys):
    file = tmp_path / "other.jsonl"
    some = ["--split", "forget01", "--train-rows", "250"]
    assert main(["alternates", *some, "--repeats", "2", "--output", str(file)]) == 0
    assert "40 other answers to 20 questions" in capsys.readouterr().out
    pairs = Tofu().forget_pairs("forget01")
    for (_, truth), texts in zip(pairs, read_alternates(file, [q for q, _ in pairs])):
        assert len(texts) == 2 and all(t.strip() and t != truth for t in texts)
    out = str(tmp_path / "altpo")
    assert main(["train", "--method", "AltPO", *some, "--alternates", str(file), "--epochs", "1", "--output", out]) == 0
    assert len(read_json(tmp_path / "altpo/train.json")["alternates"]) == 20
    file.write_text("\n".join(file.read_text().splitlines()[4:]))
    assert main(["train", "--method", "AltPO", *some, "--alternates", str(file), "--output", out + "2"]) == 2
    assert "has no alternate for 2 of 20 questions" in capsys.readouterr().err


@pytest.mark.slow  # test_teachings has the same table with pairs of their own
def test_seeds_make_one_table(tmp_path, small_data, capsys):
    command = ["tofu", "--splits", "forget01", "--methods", "WGA", "--data", small_data, "--epochs", "1", "--output", str(tmp_path), "--quiet"]
    assert main([*command, "--seeds", "0", "1"]) == 0
    shown = capsys.readouterr().out
    assert "seeds 0, 1: mean ± standard deviation" in shown and "±" in next(line for line in shown.splitlines() if line.startswith("WGA"))
    assert main(["table", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["TOFU"]["embedded"]["forget01"]["WGA"]["model_utility"]["seeds"] == 2
    assert main(command) == 2 and "holds grids of several seeds" in capsys.readouterr().err
    assert main([*command, "--seeds", "1", "1"]) == 2 and "different numbers, not 1 1" in capsys.readouterr().err
    assert main([*command, "--seeds", "2", "--epochs", "2"]) == 2 and "another configuration" in capsys.readouterr().err


@pytest.mark.slow
def test_a_new_base_is_taught_the_benchmark(tmp_path, capsys):
    """Finetuned and Retain from one command, and a grid on them."""
    tokenizer = train_tokenizer(Tofu().tokenizer_texts(), 600)
    base = save_model(tiny_llama(tokenizer, hidden=32, layers=2), tokenizer, tmp_path / "base")
    made = str(tmp_path / "made")
    assert main(["train", "--method", "Finetune", "--model", str(base), "--on", "full,retain99", "--epochs", "1", "--output", made]) == 0
    assert "made/full: Finetune on full, 63 steps" in capsys.readouterr().out
    assert read_json(tmp_path / "made/retain99/train.json")["published"]["training"]["epochs"] == 5
    grid = ["tofu", "--model", f"{made}/full", "--retain-model", f"{made}/{{retain}}", "--splits", "forget01", "--methods", "RMU"]
    assert main([*grid, "--epochs", "1", "--output", str(tmp_path / "runs"), "--quiet"]) == 1  # this model has no layer 7
    assert "module_regex" in capsys.readouterr().err
    assert {f.parent.name for f in (tmp_path / "runs").rglob("run.json")} == {"Finetuned", "Retain"}


def corpora(folder):
    for split in Wmdp.splits:
        for side in ("forget", "retain"):
            texts = Wmdp().corpus(split, side)[:8]
            (folder / f"{split}-{side}-corpus.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in texts))
    return str(folder)


@pytest.mark.slow
def test_wmdp_and_general_ability(tmp_path, capsys):
    pytest.importorskip("lm_eval", reason='general ability needs lm-eval: pip install -e ".[lm]"')
    tokenizer = train_tokenizer(Muse().tokenizer_texts(), 600, chat=False)
    base = str(save_model(tiny_llama(tokenizer, hidden=32, layers=3), tokenizer, tmp_path / "base"))
    layer = ["--set", r"module_regex=model\.layers\.1", "--set", r'trainable_params_regex=["model\\.layers\\.(0|1)\\.mlp\\.down_proj\\.weight"]']
    train_ = ["train", "--benchmark", "WMDP", "--method", "RMU", "--model", base, "--split", "cyber", *layer]
    assert main([*train_, "--data", corpora(tmp_path), "--output", str(tmp_path / "rmu")]) == 0
    record = read_json(tmp_path / "rmu/train.json")
    assert "RMU on cyber, 80 steps" in capsys.readouterr().out and record["training"]["max_steps"] == 80
    before, after = (load_file(f"{folder}/model.safetensors") for folder in (base, tmp_path / "rmu"))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {f"model.layers.{i}.mlp.down_proj.weight" for i in (0, 1)}
    for model, out in ((base, "a"), (str(tmp_path / "rmu"), "b")):
        assert main(["eval", "lm", "--model", model, "--tasks", "mini_bio,mini_bio_mmlu", "--limit", "8", "--output", str(tmp_path / "lm" / out)]) == 0
    capsys.readouterr()
    log = read_json(tmp_path / "lm/a/LMEval_EVAL.json")["mini_bio/acc"]
    scores = [row["score"] for row in log["value_by_index"].values()]
    assert len(scores) == 8 and sum(scores) / 8 == log["agg_value"]
    assert main(["table", str(tmp_path / "lm"), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["LMEval"]["all models"]["general ability"]
    assert set(rows) == {"base", "rmu"} and set(rows["rmu"]) == {"mini_bio/acc", "mini_bio_mmlu/acc"}
    assert main(["table", str(tmp_path / "lm")]) == 0 and "by lm-eval" in capsys.readouterr().out
    assert main(["eval", "lm", "--model", base, "--tasks", "mmmlu_bio"]) == 2 and "Unknown lm-eval task" in capsys.readouterr().err
    assert main(["train", "--benchmark", "WMDP", "--method", "RMU", "--model", base, "--data", str(tmp_path / "lm"), "--output", "x"]) == 2
    assert "bio-forget-corpus.jsonl" in capsys.readouterr().err
