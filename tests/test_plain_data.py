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
