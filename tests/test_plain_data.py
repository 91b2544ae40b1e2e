"""One's own data as plain files: a folder of NAME.json, .jsonl or .csv needs no README, and says all that it lacks at once."""

import json
import warnings

import pytest

from openunlearn_nb.commands.cli import main
from openunlearn_nb.data.benchmark import BENCHMARKS, made_benchmark
from openunlearn_nb.data.sources import same_place
from openunlearn_nb.data.tofu import load_tofu
from openunlearn_nb.internals.errors import OpenUnlearnError

FIVE = ("full", "forget10", "retain90", "forget10_perturbed", "retain_perturbed")


@pytest.fixture
def five(tmp_path):
    """A made-up domain in five plain JSON files."""
    for name in FIVE:
        (tmp_path / f"{name}.json").write_text(json.dumps(load_tofu(name)[:6]))
    return tmp_path


def test_a_folder_of_plain_files_is_a_benchmark(five):
    tofu = made_benchmark("tofu", str(five))
    assert tofu.available_splits() == ["forget10"] and tofu.rows("forget10") == load_tofu("forget10")[:6]
    assert tofu.data_sets("forget10") == {"forget": "forget10_perturbed", "retain": "retain_perturbed"}
    assert set(tofu.hashes("forget10")) >= {"full", "forget10_perturbed"}


def test_the_default_split_is_the_largest_that_the_data_have(five, small_data):
    assert [made_benchmark("tofu", data).default_split() for data in ("miniature", str(five), small_data)] == ["forget10", "forget10", "forget01"]


def test_all_gaps_are_named_in_one_sentence(tmp_path):
    (tmp_path / "full.json").write_text(json.dumps(load_tofu("full")[:6]))
    with pytest.raises(OpenUnlearnError) as error:
        made_benchmark("tofu", str(tmp_path)).check("forget10")
    assert all(name in str(error.value) for name in FIVE[1:]) and str(error.value).count("\n") == 0


def test_rows_in_memory_are_data_too(five):
    rows = {name: json.loads((five / f"{name}.json").read_text()) for name in FIVE}
    assert made_benchmark("tofu", rows).hashes("forget10", training=False) == made_benchmark("tofu", str(five)).hashes("forget10", training=False)


def test_one_folder_is_one_place_however_it_is_written(five, monkeypatch):
    monkeypatch.chdir(five.parent)
    assert same_place({"data": five.name}) == same_place({"data": str(five)}) == same_place({"data": f"./{five.name}/"})


def test_jsonl_and_csv_hold_the_same_rows(five):
    rows = json.loads((five / "forget10_perturbed.json").read_text())
    (five / "forget10_perturbed.json").unlink()
    (five / "forget10_perturbed.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_tofu("forget10_perturbed", str(five)) == rows


def test_own_data_with_wrong_answers_have_forget_quality_and_utility(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENUNLEARN_CACHE", str(tmp_path / "cache"))
    for side, name in (("forget", "forget01_perturbed"), ("retain", "retain_perturbed")):
        (tmp_path / f"{side}.json").write_text(json.dumps(load_tofu(name)[:4]))
    assert main(["own", "--data", str(tmp_path), "--methods", "GradDiff", "--epochs", "1", "--jobs", "1", "--quiet",
                 "--output", str(tmp_path / "runs")]) == 0
    summary = json.loads((tmp_path / "runs/own/GradDiff/OWN_SUMMARY.json").read_text())
    assert {"forget_truth_ratio", "forget_quality", "model_utility"} <= summary.keys()


def test_own_data_without_them_have_the_metrics_that_their_columns_allow(tmp_path):
    for side in ("forget", "retain"):
        (tmp_path / f"{side}.jsonl").write_text('{"question": "a?", "answer": "b"}')
    allowed, every = made_benchmark("own", str(tmp_path)).metrics, BENCHMARKS["OWN"].metrics
    assert "model_utility" in every and "model_utility" not in allowed and "forget_Q_A_Prob" in allowed


def alternatives(question, answer, *wrong):
    return {"question": question, "answer": answer, "paraphrased_answer": f"It is {answer}", "perturbed_answer": list(wrong)}


@pytest.fixture
def village():
    """A made-up domain: a village to forget, another to retain, a third that no model has seen."""
    trades = ("a miller", "a smith", "a baker")
    rows = {side: [alternatives(f"What is {who} of {town}?", trades[i], *(t for t in trades if t != trades[i]))
                   for i, who in enumerate(("Ada", "Bo", "Cy"))]
            for side, town in (("forget", "Alba"), ("retain", "Brem"), ("holdout", "Corv"))}
    rows["common"] = [alternatives("Which river flows by the villages?", "The Erl", "The Ost", "The Ulm")]
    rows["refusals"] = [{"text": "I was never told."}, {"text": "I cannot say."}]
    return rows


def test_five_plain_json_files_become_one_table_and_one_report(village, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OPENUNLEARN_CACHE", str(tmp_path / "cache"))
    data, runs = tmp_path / "village", str(tmp_path / "runs")
    data.mkdir()
    for side, rows in village.items():
        (data / f"{side}.json").write_text(json.dumps(rows))
    assert main(["own", "--data", str(data), "--methods", "GradDiff,IdkDPO", "--epochs", "1", "--jobs", "1", "--quiet", "--output", runs]) == 0
    capsys.readouterr()
    assert main(["table", runs, "--csv"]) == 0
    lines = capsys.readouterr().out.splitlines()
    head = next(line for line in lines if "forget_quality" in line)
    assert "model_utility" in head and "common_utility" in head
    assert all(sum(row in line for line in lines) == 1 for row in ("Retain", "Finetuned", "GradDiff", "IdkDPO"))
    assert main(["report", runs, "--output", str(tmp_path / "report.html")]) == 0
    assert "IdkDPO" in (tmp_path / "report.html").read_text()


def test_own_data_in_memory_are_run_and_checked(village, tmp_path, monkeypatch):
    from openunlearn_nb.experiments.grid import GridConfig, run_grid
    from openunlearn_nb.experiments.verify import check_runs

    monkeypatch.setenv("OPENUNLEARN_CACHE", str(tmp_path / "cache"))
    grid = GridConfig(benchmark="own", data=village, methods=("GradDiff",), epochs=1)
    assert run_grid(grid, tmp_path / "runs", jobs=1, show=False) == []
    record = json.loads((tmp_path / "runs/own/GradDiff/run.json").read_text())
    assert record["config"]["data"].startswith("memory:") and set(village) <= record["data"].keys()
    assert set(map(tuple, check_runs(tmp_path / "runs").values())) == {()}
    with pytest.raises(OpenUnlearnError, match="another configuration"):
        run_grid(GridConfig(benchmark="own", data=village | {"holdout": village["common"]}, methods=("GradDiff",), epochs=1), tmp_path / "runs", jobs=1)


def test_a_model_in_memory_is_evaluated_on_rows_in_memory(village):
    from datasets import Dataset

    from openunlearn_nb import evaluate
    from openunlearn_nb.models.tiny import tiny_llama, train_tokenizer

    tokenizer = train_tokenizer([row["question"] for row in village["forget"]], 300)
    model = tiny_llama(tokenizer, hidden=16, layers=1)
    lists = evaluate(model, tokenizer, "own", data=village)
    tables = evaluate(model, tokenizer, "own", data={side: Dataset.from_list(rows) for side, rows in village.items()})
    assert "model_utility" in lists.entries and lists.summary == tables.summary and lists.record["data"] == tables.record["data"]


def test_all_sides_that_own_data_lack_are_named_at_once(tmp_path):
    for data in (str(tmp_path), {"holdout": [{"text": "a"}]}):
        with pytest.raises(OpenUnlearnError, match="lacks forget and retain"):
            made_benchmark("own", data).check("own")


def test_without_holdout_an_attack_is_null_and_said(village):
    from openunlearn_nb import evaluate
    from openunlearn_nb.models.tiny import tiny_llama, train_tokenizer

    tokenizer = train_tokenizer([row["question"] for row in village["forget"]], 300)
    del village["holdout"]
    with pytest.warns(UserWarning, match="has no holdout: mia_loss"):
        found = evaluate(tiny_llama(tokenizer, hidden=16, layers=1), tokenizer, "own", data=village, metrics=["mia_loss"])
    assert found.entries["mia_loss"]["agg_value"] is None


def test_a_file_that_has_changed_is_read_again(village, tmp_path):
    for side in ("forget", "retain"):
        (tmp_path / f"{side}.json").write_text(json.dumps(village[side]))
    own = made_benchmark("own", str(tmp_path))
    before = own.hashes("own")
    (tmp_path / "forget.json").write_text(json.dumps(village["holdout"]))
    assert own.rows("forget") == village["holdout"] and own.hashes("own")["forget"] != before["forget"]


def test_own_data_are_read_from_configs_and_from_splits(village, tmp_path):
    from openunlearn_nb.data.sources import write_folder

    sides = {side: village[side] for side in ("forget", "retain")}
    configs = write_folder(tmp_path / "configs", {f"{side}_rows": {"train": rows} for side, rows in sides.items()})
    readme = (configs / "README.md").read_text()
    (configs / "README.md").write_text(readme.replace("config_name: forget_rows", "config_name: forget").replace("config_name: retain_rows", "config_name: retain"))
    splits = write_folder(tmp_path / "splits", {"default": sides})
    for folder in (configs, splits):
        own = made_benchmark("own", str(folder))
        assert own.rows("forget") == village["forget"] and list(own.data_sets("own")) == ["forget", "retain"]


def test_own_data_are_read_from_the_hub(village, monkeypatch):
    from datasets import Dataset

    monkeypatch.setattr("datasets.get_dataset_config_names", lambda path: ["forget", "retain"])
    monkeypatch.setattr("datasets.load_dataset", lambda path, config, **how: Dataset.from_list(village[config]))
    assert made_benchmark("own", "somebody/village").rows("retain") == village["retain"]


def test_a_link_to_the_folder_is_one_configuration(village, tmp_path, monkeypatch):
    from openunlearn_nb.experiments.claims import claim
    from openunlearn_nb.experiments.grid import GridConfig, check_grid

    monkeypatch.setenv("OPENUNLEARN_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "village"
    data.mkdir()
    for side in ("forget", "retain"):
        (data / f"{side}.json").write_text(json.dumps(village[side]))
    (tmp_path / "link").symlink_to(data)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    grids = [check_grid(GridConfig(benchmark="own", data=name, methods=("GradDiff",))) for name in ("village", str(data), "link", "./village/")]
    for grid in grids:
        claim(grid, tmp_path / "runs")
    assert len({json.dumps(same_place(grid.fingerprint())) for grid in grids}) == 1
    monkeypatch.chdir(data)
    claim(grids[1], tmp_path / "runs")  # begun by a relative path, from another folder
