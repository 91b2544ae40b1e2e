"""MUSE: the grid and its studies, odd data sets, and memory that does not grow with the corpus."""

import json
import shutil
import subprocess
import sys

import pytest

from openunlearn_nb.commands.cli import main
from openunlearn_nb.data.sources import _stored_rows, write_folder
from openunlearn_nb.internals.errors import OpenUnlearnError
from openunlearn_nb.experiments.grid_config import GridConfig
from openunlearn_nb.experiments.grid import plan, run_grid
from openunlearn_nb.data.miniature_muse import make_muse
from openunlearn_nb.models.saving import save_model
from openunlearn_nb.models.tiny import tiny_llama, train_tokenizer
from openunlearn_nb.data.muse import Muse
from openunlearn_nb.data.muse_rows import STUDIES
from openunlearn_nb.evaluation.records import read_json
from openunlearn_nb.internals.files import write_json
from openunlearn_nb.experiments.cells import cell_folder, finished
from openunlearn_nb.reporting.collect import find_runs, measured


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with an untrained model that reads 1,024 tokens."""
    tokenizer = train_tokenizer([r["text"] for r in make_muse()["raw"]["forget"]], 1000, chat=False)
    model = tiny_llama(tokenizer, hidden=32, layers=2)
    model.config.max_position_embeddings = 1024
    return save_model(model, tokenizer, tmp_path_factory.mktemp("model") / "tiny")


def evaluation(model, data, output, *options):
    """Run `eval muse`; the exit code and the evaluation that was written."""
    _stored_rows.cache_clear()
    code = main(["eval", "muse", "--model", str(model), "--data", str(data), "--output", str(output), *options])
    return code, read_json(output / "MUSE_EVAL.json") if code == 0 else None


def folder_with(tmp_path, **changes):
    """The miniature News as a folder, some of its configs changed."""
    configs = make_muse()
    for config, splits in changes.items():
        configs[config] = {k: v for k, v in (configs[config] | splits).items() if v is not None}
    return write_folder(tmp_path / "MUSE-News", configs)


def test_shape_of_the_published_files(muse_grid, eval_logs):
    folder, _ = muse_grid
    ours = read_json(folder / "News/NPO/MUSE_EVAL.json")
    theirs = read_json(eval_logs / "muse_Llama-2-7b-hf_News_target/MUSE_EVAL.json")
    assert set(ours) == {*Muse.default_metrics, "mia_min_k"} <= set(theirs)
    for name in ours:
        assert set(ours[name]) == set(theirs[name])
        if "value_by_index" in ours[name]:
            assert ours[name]["value_by_index"]["0"].keys() == theirs[name]["value_by_index"]["0"].keys()
    summary = read_json(folder / "News/NPO/MUSE_SUMMARY.json")
    assert set(summary) == set(Muse.default_metrics) and all(summary[k] == ours[k]["agg_value"] for k in summary)


def test_the_table_shows_the_benchmark(muse_grid):
    folder, grid = muse_grid
    table = measured(find_runs(folder), "MUSE")["embedded"]["News"]
    assert table["Finetuned"]["exact_memorization"] > table["Retain"]["exact_memorization"] + 0.2
    assert table["Finetuned"]["privleak"] < -60 and table["Retain"]["privleak"] == 0
    assert table["GradAscent"] != table["Finetuned"] != table["NPO"] and plan(grid, str(folder)) == []


def test_requests_follow_one_another(muse_grid, tmp_path):
    """Each request starts from the model the last one left; a model that is gone is made again."""
    _, small = muse_grid
    grid = GridConfig(**{**vars(small), "splits": ("sust_1", "sust_2", "sust_3"), "methods": ("GradDiff",), "epochs": 1})
    assert run_grid(grid, tmp_path, jobs=1, show=False) == []
    record = read_json(cell_folder(tmp_path, "sust_2", "GradDiff") / "run.json")
    assert record["model_path"].endswith("sust_1/GradDiff/model") and record["model_kept"]
    kept = read_json(cell_folder(tmp_path, "sust_1", "GradDiff") / "model/train.json")
    assert kept["prompt"] == record["prompt"] == read_json(cell_folder(tmp_path, "News", "Retain") / "run.json")["prompt"]
    assert {(r.split, r.row) for r in find_runs(tmp_path)} == {
        ("News", "Finetuned"), ("News", "Retain"), ("sust_1", "GradDiff"), ("sust_2", "GradDiff"), ("sust_3", "GradDiff")}
    before = read_json(cell_folder(tmp_path, "sust_3", "GradDiff") / "MUSE_EVAL.json")
    for split in ("sust_2", "sust_3"):
        (cell_folder(tmp_path, split, "GradDiff") / "run.json").unlink()
    next((cell_folder(tmp_path, "sust_1", "GradDiff") / "model").glob("*.safetensors")).unlink()
    assert not finished(cell_folder(tmp_path, "sust_1", "GradDiff"), "MUSE")
    assert [t.split for t in plan(grid, str(tmp_path)) if t.row] == ["sust_1", "sust_2", "sust_3"]
    assert run_grid(grid, tmp_path, jobs=1, show=False) == []
    assert read_json(cell_folder(tmp_path, "sust_3", "GradDiff") / "MUSE_EVAL.json") == before


def test_a_small_model_is_asked_to_forget_only_what_it_was_taught():
    """With few texts taught, the scalability study still grows, and every request of the other has some."""
    few = Muse(max_rows=16)
    taught = set(few.documents("News", "forget", "retain1", "retain2"))
    sizes = [len(few.request(s)) for s in STUDIES["scalability"]]
    assert sizes == sorted(set(sizes)) and all(set(few.request(s)) <= taught for s in few.splits if s != "Books")
    assert all(few.request(s) for s in STUDIES["sustainability"])
    with pytest.raises(OpenUnlearnError, match="What sust_4 of miniature asks to forget .* holds no text"):
        Muse(max_rows=1).check("sust_4")


def test_empty_and_long_documents(model, tmp_path, capsys):
    """An empty passage scores null; one longer than the model reads is cut, counted and reported."""
    texts = [r["text"] for r in make_muse()["privleak"]["forget"]]
    data = folder_with(tmp_path, privleak={"forget": [{"text": t} for t in ["", " ".join(texts * 2), *texts]]})
    code, log = evaluation(model, data, tmp_path / "out", "--metrics", "privleak")
    said = capsys.readouterr().err
    assert code == 0 and said.count("are longer") == 1 and "1 of 14 texts of News/privleak/forget are longer" in said and "1024" in said
    assert "1 of 14 texts of News/privleak/forget have no token to score" in said
    scores = log["mia_min_k"]["forget"]["value_by_index"]
    assert scores["0"] == {"score": None} and scores["1"]["score"] > 0 and log["privleak"]["agg_value"] is not None


def test_without_a_holdout(model, tmp_path, capsys):
    data = folder_with(tmp_path, privleak={"holdout": None})
    code, log = evaluation(model, data, tmp_path / "out", "--metrics", "privleak,extraction_strength")
    said = capsys.readouterr().err
    assert code == 0 and said.count("no holdout") == 1 and "0.5" not in said
    assert log["privleak"] == {"agg_value": None} and "privleak" not in read_json(tmp_path / "out/MUSE_SUMMARY.json")


def test_a_metric_without_any_row_is_said(model, tmp_path, capsys):
    data = folder_with(tmp_path, privleak={"holdout": [{"text": "  "}]})
    code, log = evaluation(model, data, tmp_path / "out", "--metrics", "privleak")
    assert code == 0 and log["privleak"]["agg_value"] is None and "mia_min_k is null" in capsys.readouterr().err


def test_few_shot_split_shorter_than_asked(model, tmp_path, capsys):
    data = folder_with(tmp_path, knowmem={"retain_qa_icl": make_muse()["knowmem"]["retain_qa_icl"][:4]})
    assert evaluation(model, data, tmp_path / "out")[0] == 2
    assert "retain_qa_icl has 4 few-shot examples, fewer than the 10" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert evaluation(model, data, tmp_path / "out", "--shots", "4", "--metrics", "retain_knowmem_ROUGE")[0] == 0


def test_few_shot_prompts_that_do_not_fit(model, tmp_path, capsys):
    """Said once for each set, with the number; the rows score null, and so does a metric without any row."""
    code, log = evaluation(model, folder_with(tmp_path), tmp_path / "out", "--metrics", "forget_knowmem_ROUGE", "--max-length", "100")
    assert code == 0 and "38 of 38 few-shot prompts of News/knowmem/forget_qa have more than 100 tokens" in capsys.readouterr().err
    entry = log["forget_knowmem_ROUGE"]
    assert entry["agg_value"] is None and entry["value_by_index"]["0"]["rougeL_f1"] is None and entry["value_by_index"]["0"]["ground_truth"]


def test_data_set_lacking_a_split_or_a_column(model, tmp_path, capsys):
    assert main(["muse", "--data", str(folder_with(tmp_path, sust={"forget_3": None})), "--study", "sustainability", "--output",
                 str(tmp_path / "out")]) == 2
    assert "has no sust/forget_3" in capsys.readouterr().err
    _stored_rows.cache_clear()
    assert evaluation(model, folder_with(tmp_path, verbmem={"forget": [{"prompt": "a"}]}), tmp_path / "out")[0] == 2
    assert "lacks the column 'gt'" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_retain_log_of_other_texts(muse_grid, model, tmp_path, capsys):
    folder, _ = muse_grid
    assert evaluation(model, "miniature", tmp_path / "a", "--metrics", "privleak", "--retain-log", str(folder / "News/Retain"))[0] == 2
    assert "another family of models (hidden_size" in capsys.readouterr().err  # as the record beside the log tells
    (tmp_path / "log").mkdir()
    log = ["--retain-log", str(shutil.copy(folder / "News/Retain/MUSE_EVAL.json", tmp_path / "log"))]
    assert evaluation(model, "miniature", tmp_path / "a", "--metrics", "privleak", *log)[0] == 0
    assert "0.5" not in capsys.readouterr().err
    assert evaluation(model, "miniature:1", tmp_path / "b", "--metrics", "privleak", *log)[0] == 2
    assert "other texts" in capsys.readouterr().err
    assert evaluation(model, "miniature", tmp_path / "c", "--metrics", "privleak")[0] == 0
    assert "privleak is taken against an AUC of 0.5" in capsys.readouterr().err


def test_retain_log_of_another_benchmark(muse_grid, small_grid, model, tmp_path, capsys):
    """A TOFU log also has a Min-K attack; it is no yardstick here. Nor is a log that does not quote its texts."""
    assert evaluation(model, "miniature", tmp_path / "a", "--retain-log", str(small_grid[0] / "forget01/Retain/TOFU_EVAL.json"))[0] == 2
    assert "another benchmark" in capsys.readouterr().err
    log = read_json(muse_grid[0] / "News/Retain/MUSE_EVAL.json")
    write_json(tmp_path / "bare/MUSE_EVAL.json", {k: v for k, v in log.items() if "verbmem" not in k})
    assert evaluation(model, "miniature", tmp_path / "b", "--retain-log", str(tmp_path / "bare"))[0] == 2
    assert "has no forget_verbmem_ROUGE" in capsys.readouterr().err


def test_a_data_fault_is_said_before_any_training(tmp_path, capsys):
    for number, (changes, said) in enumerate([(dict(raw={"retain1": None}), "has no raw/retain1"),
                                              (dict(knowmem={"retain_qa": None}), "knowmem/retain_qa"),
                                              (dict(knowmem={"forget_qa_icl": []}), "forget_qa_icl"),
                                              (dict(raw={"forget": [{"text": ""}, {"text": " "}]}), "holds no text")]):
        data = folder_with(tmp_path / str(number), **changes)
        assert main(["muse", "--data", str(data), "--output", str(tmp_path / "out")]) == 2
        assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_unlearn_then_evaluate_equals_the_cell(muse_grid, tmp_path, capsys):
    folder, grid = muse_grid
    common = ["--train-rows", str(grid.train_rows)]
    assert main(["train", "--benchmark", "muse", "--method", "NPO", "--epochs", "3", "--output", str(tmp_path / "npo"), *common]) == 0
    capsys.readouterr()
    assert main(["eval", "muse", "--model", str(tmp_path / "npo"), "--retain-log", str(folder / "News/Retain"), "--output", str(tmp_path / "e")]) == 0
    mine, cell = json.loads(capsys.readouterr().out), read_json(folder / "News/NPO/MUSE_SUMMARY.json")
    assert mine == pytest.approx(cell, rel=1e-4, abs=1e-6)
    # An unlearned model is no yardstick, and a model's folder no place for an evaluation.
    npo = ["eval", "muse", "--model", str(tmp_path / "npo"), "--metrics", "privleak"]
    assert main([*npo, "--retain-log", str(tmp_path / "e"), "--output", str(tmp_path / "f")]) == 2
    assert "evaluation of NPO, not of a retain model" in capsys.readouterr().err
    assert main([*npo, "--output", str(tmp_path / "npo")]) == 2 and "a folder with a model" in capsys.readouterr().err


MEMORY = """
import resource, sys
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from openunlearn_nb.models.scoring import score
torch.set_num_threads(1)
model = LlamaForCausalLM(LlamaConfig(vocab_size=32000, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)).eval()
passage = list(range(5, 2053))
score(model, [{"input_ids": passage, "labels": [-100, *passage[1:]]}] * int(sys.argv[1]), 0, tokens=2048)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_corpus():
    """Twenty more passages of 2,048 tokens cost less than half of one passage's distribution (250 MB in fp32)."""
    run = lambda n: int(subprocess.run([sys.executable, "-c", MEMORY, n], capture_output=True, text=True, check=True).stdout)
    peak = [min(run(n) for _ in range(4)) for n in ("12", "32")]  # some runs of the same program keep freed blocks for a while
    assert peak[1] - peak[0] < 125_000, peak  # kB; the first passages settle the allocator


@pytest.mark.slow
def test_real_news(real_muse, model, tmp_path, capsys):
    """All of MUSE-News through an untrained model: two minutes."""
    code, log = evaluation(model, real_muse, tmp_path / "out", "--max-length", "1024")
    said = capsys.readouterr().err
    assert code == 0 and len(log["mia_min_k"]["forget"]["value_by_index"]) == len(log["mia_min_k"]["holdout"]["value_by_index"]) == 100
    assert "100 of 100 texts of News/privleak/forget are longer" in said and 0.3 < log["mia_min_k"]["auc"] < 0.7
    assert len(log["forget_verbmem_ROUGE"]["value_by_index"]) == 100
