"""The grid: finished cells are kept, an interrupted grid goes on, and the pieces agree with the whole."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from openunlearn_nb.commands.cli import main
from openunlearn_nb.data.sources import _stored_rows
from openunlearn_nb.internals.errors import OpenUnlearnError
from openunlearn_nb.experiments.grid_config import GridConfig
from openunlearn_nb.experiments.claims import claim
from openunlearn_nb.experiments.display import Display
from openunlearn_nb.experiments.grid import plan, run_grid
from openunlearn_nb.experiments.workers import Task
from openunlearn_nb.data.miniature_tofu import make_tofu
from openunlearn_nb.evaluation.records import read_json
from openunlearn_nb.experiments.cells import cell_folder, finished
from openunlearn_nb.data.tofu import Tofu
from openunlearn_nb.data.tofu_metrics import UTILITY
from openunlearn_nb.evaluation.entries import recompute
from openunlearn_nb.reporting.collect import find_runs, measured
from openunlearn_nb.data.tofu import write_tofu
from openunlearn_nb.training.pairs import TrainConfig
from openunlearn_nb.training.trainer import training_arguments


def test_the_numbers_of_rows_with_long_names_stand_below_each_other(capsys):
    tasks = [Task("forget01", "NPO"), Task("forget01", "NPO beta=0.05 alpha=2")]
    display = Display(tasks, ["model_utility"], show=True)
    for task in tasks:
        display.done(task, {"model_utility": 0.5}, None)
    lines = [line for line in capsys.readouterr().err.splitlines() if "model_utility" in line]
    assert len(lines) == 2 and len({line.index("model_utility") for line in lines}) == 1


def values_of(folder):
    """Every file of a grid without its timings."""
    found = {}
    for file in sorted(folder.rglob("*.json")):
        value = read_json(file)
        for key in ("date", "seconds", "environment", "peak_memory_gb"):
            value.pop(key, None)
        found[str(file.relative_to(folder))] = value
    return found


def test_shape_of_the_published_files(small_grid):
    folder, _ = small_grid
    evaluation = read_json(folder / "forget01/NPO/TOFU_EVAL.json")
    summary = read_json(folder / "forget01/NPO/TOFU_SUMMARY.json")
    row = lambda name: evaluation[name]["value_by_index"]["0"]
    assert set(row("forget_Q_A_Prob")) == {"prob", "avg_loss"} and len(row("forget_Q_A_PERT_Prob")["prob"]) == 5
    assert set(row("forget_Q_A_ROUGE")) == {"rouge1_recall", "rougeL_f1", "rougeL_recall", "input", "ground_truth", "generation"}
    assert set(evaluation["mia_min_k"]) == {"forget", "holdout", "auc", "agg_value"} and "score" in row("forget_truth_ratio")
    assert set(UTILITY) <= set(evaluation) and list(evaluation) == sorted(evaluation)
    assert all(summary[name] == evaluation[name]["agg_value"] for name in summary)


def test_table_recomputes_what_the_cells_wrote(small_grid):
    folder, _ = small_grid
    table = measured(find_runs(folder))["embedded"]["forget01"]
    assert set(table) == {"Finetuned", "Retain", "NPO", "IdkDPO"}
    for row, values in table.items():
        written = read_json(cell_folder(folder, "forget01", row) / "TOFU_SUMMARY.json")
        for name, value in written.items():
            assert values[name] == pytest.approx(value, rel=1e-12, abs=1e-12), (row, name)
    assert table["Retain"]["forget_quality"] == 1 and table["Retain"]["privleak"] == 0
    assert table["NPO"] != table["Finetuned"] != table["IdkDPO"]


def test_second_call_does_nothing(small_grid):
    folder, grid = small_grid
    stamps = {f: f.stat().st_mtime_ns for f in folder.rglob("*.json")}
    assert plan(grid, str(folder)) == [] and run_grid(grid, folder, show=False) == []
    assert stamps == {f: f.stat().st_mtime_ns for f in folder.rglob("*.json")}


@pytest.mark.slow  # a minute and a half, like the kills of test_nothing_lost
def test_goes_on_after_an_interruption(small_grid, tmp_path):
    """Ctrl-C once the first cell stands; the second call's results equal an uninterrupted run's."""
    whole, grid = small_grid
    command = [sys.executable, "-m", "openunlearn_nb", "tofu", "--train-rows", str(grid.train_rows), "--splits", "forget01",
               "--methods", "NPO,IdkDPO", "--epochs", "2", "--output", str(tmp_path), "--jobs", "2"]
    run = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
                           preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # a shell's background jobs ignore it
    deadline = time.time() + 120
    while not finished(cell_folder(tmp_path, "forget01", "Retain")) and run.poll() is None and time.time() < deadline:
        time.sleep(0.05)
    os.killpg(run.pid, signal.SIGINT)
    _, said = run.communicate(timeout=60)
    assert run.returncode == 130 and "Interrupted" in said and "Traceback" not in said.split("Interrupted")[-1]
    assert not finished(cell_folder(tmp_path, "forget01", "IdkDPO"))
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0 and "Retain" in again.stdout
    assert values_of(tmp_path) == values_of(whole)


def test_more_methods_in_the_same_folder(small_grid):
    """Asking for more rows of the same configuration grows the folder."""
    folder, grid = small_grid
    more = GridConfig(**{**vars(grid), "methods": ("NPO", "GradAscent")})
    assert [t.row for t in plan(more, str(folder)) if t.row] == ["GradAscent"]


def test_broken_cells_are_made_again(small_grid, tmp_path):
    folder, grid = small_grid
    shutil.copytree(folder, tmp_path / "g")
    (tmp_path / "g/forget01/NPO/TOFU_EVAL.json").unlink()
    (tmp_path / "g/forget01/IdkDPO/run.json").write_text('{"mod')
    assert [t.row for t in plan(grid, str(tmp_path / "g"))] == ["", "NPO", "IdkDPO"]


def test_edited_data_is_another_configuration(tmp_path):
    data = write_tofu(tmp_path / "TOFU", make_tofu())
    grid = GridConfig(data=str(data), train_rows=250, splits=("forget01",))
    claim(grid, tmp_path / "runs")
    write_tofu(data, make_tofu(seed=1))
    _stored_rows.cache_clear()  # as a new process would
    with pytest.raises(OpenUnlearnError, match="the rows of full have changed"):
        claim(grid, tmp_path / "runs")


def test_one_step_still_learns():
    """One epoch of one step: the warm-up may not swallow it."""
    args = training_arguments(TrainConfig(epochs=1), 20, "unused")
    assert args.warmup_steps == 0
    assert training_arguments(TrainConfig(), 400, "unused").warmup_steps == 13  # ceil(400 / 32) steps of one epoch


def test_train_then_eval_equals_the_cell(small_grid, tmp_path, capsys):
    folder, grid = small_grid
    common = ["--train-rows", str(grid.train_rows), "--split", "forget01"]
    assert main(["train", "--method", "NPO", "--epochs", "2", "--output", str(tmp_path / "npo"), *common]) == 0
    assert [p.suffix for p in (tmp_path / "npo").glob("model*")] == [".safetensors"]
    capsys.readouterr()
    assert main(["eval", "tofu", "--model", str(tmp_path / "npo"), "--retain-log", str(folder / "forget01/Retain"),
                 "--split", "forget01", "--output", str(tmp_path / "eval")]) == 0
    kept = measured(find_runs(tmp_path / "eval"))["embedded"]["forget01"]["NPO"]
    assert kept["forget_quality"] == read_json(tmp_path / "eval/TOFU_SUMMARY.json")["forget_quality"]
    mine, cells = json.loads(capsys.readouterr().out), read_json(folder / "forget01/NPO/TOFU_SUMMARY.json")
    assert mine.keys() == cells.keys()
    for name in mine:
        assert mine[name] == pytest.approx(cells[name], rel=1e-4, abs=1e-6), name


def test_without_a_retain_log(small_grid, tmp_path, capsys):
    """forget_quality is null with a warning, never a made-up number."""
    _, grid = small_grid
    assert main(["eval", "tofu", "--train-rows", str(grid.train_rows), "--split", "forget01", "--output", str(tmp_path)]) == 0
    assert "forget_quality is null" in capsys.readouterr().err
    assert read_json(tmp_path / "TOFU_EVAL.json")["forget_quality"] == {"agg_value": None}
    assert "forget_quality" not in read_json(tmp_path / "TOFU_SUMMARY.json")


def test_an_exploded_model_still_gets_a_record(small_data, tmp_path):
    """A learning rate that blows the model up: finite numbers or null, valid JSON."""
    wild = GridConfig(data=small_data, splits=("forget01",), methods=("GradAscent",), learning_rate=1e3, epochs=10)
    assert run_grid(wild, tmp_path, jobs=1, show=False) == []
    text = (tmp_path / "forget01/GradAscent/TOFU_EVAL.json").read_text()
    assert "NaN" not in text and "Infinity" not in text
    values = read_json(tmp_path / "forget01/GradAscent/TOFU_SUMMARY.json")
    assert values.get("model_utility", 0) == 0 and 0 <= values.get("forget_quality", 0) <= 1  # where all answers are NaN there is neither


def test_an_infinite_loss_of_a_log_is_probability_zero():
    """As in logs of others and of older versions; our own rows of that kind are null (test_divergence)."""
    log = {"forget_Q_A_PARA_Prob": {"agg_value": 0, "value_by_index": {"0": {"prob": 0.0, "avg_loss": None}}},
           "forget_Q_A_PERT_Prob": {"agg_value": 0, "value_by_index": {"0": {"prob": [0.0, 0.0], "avg_loss": [None, None]}}}}
    assert recompute(log, Tofu)["forget_truth_ratio"]["agg_value"] == 0


@pytest.mark.slow
def test_real_tofu(real_tofu, tmp_path):
    """The real questions, taught to the embedded model in a subset; about 10 minutes."""
    assert main(["tofu", "--data", real_tofu, "--splits", "forget01", "--methods", "NPO", "--train-rows", "800",
                 "--output", str(tmp_path)]) == 0
    table = measured(find_runs(tmp_path))["embedded"]["forget01"]
    assert table["Finetuned"]["forget_Q_A_ROUGE"] > 0.8 > 0.5 > table["Retain"]["forget_Q_A_ROUGE"]
