"""One file for a metric or an attack of one's own: it appears in evaluations, tables, plots and reports by itself."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from openunlearn_nb.commands.cli import main
from openunlearn_nb.evaluation.attacks import ATTACKS
from openunlearn_nb.evaluation.metric import METRICS
from openunlearn_nb.evaluation.records import read_json
from openunlearn_nb.experiments.grid import plan, run_grid
from openunlearn_nb.internals.errors import OpenUnlearnError
from openunlearn_nb.internals.registry import import_file
from openunlearn_nb.reporting.collect import find_runs, measured
from openunlearn_nb.reporting.report import write_report
from openunlearn_nb.reporting.tables import columns_of, to_text

EXTENSIONS = Path(__file__).parent / "extensions"


@pytest.fixture
def imported():
    """The file of an extension; what it declares in a test is gone afterwards."""
    before = {registry.kind: dict(registry) for registry in (METRICS, ATTACKS)}
    yield lambda name: EXTENSIONS / name
    for registry in (METRICS, ATTACKS):
        registry._objects = before[registry.kind]
    import_file.cache_clear()


@pytest.mark.parametrize("name, lines", [("refusal_rate.py", 10), ("relearn.py", 30)])
def test_an_extension_is_short(name, lines):
    assert len((EXTENSIONS / name).read_text().splitlines()) <= lines


def test_a_metric_of_ones_own_is_in_evaluation_summary_table_plot_and_report(tmp_path, imported, capsys):
    file = str(imported("refusal_rate.py"))
    grid = ["tofu", "--splits", "forget01", "--methods", "NPO", "--train-rows", "250", "--epochs", "2", "--jobs", "2"]
    assert main([*grid, "--import", file, "--best", "refusal_rate", "--output", str(tmp_path), "--quiet"]) == 0
    shown = capsys.readouterr().out.split("as published")[0]
    assert "refusal" in shown and "rate" in shown
    folder = tmp_path / "forget01/NPO"
    entry = read_json(folder / "TOFU_EVAL.json")["refusal_rate"]
    assert len(entry["value_by_index"]) == 20 and 0 <= entry["agg_value"] <= 1
    assert read_json(folder / "TOFU_SUMMARY.json")["refusal_rate"] == entry["agg_value"]
    assert read_json(folder / "run.json")["config"]["declared_metrics"] == {"refusal_rate": METRICS.files["refusal_rate"]}
    tables = measured(find_runs(tmp_path))
    columns = columns_of("TOFU", tables)
    assert columns[-1] == "refusal_rate" and "refusal" in to_text(tables["embedded"], columns)
    assert "refusal rate" in write_report(tmp_path, tmp_path / "report.html").read_text()


def test_relearning_is_a_row_of_its_own_after_unlearning(small_grid, tmp_path, imported):
    assert import_file(str(imported("relearn.py"))) == {"attack": ("relearn",)}
    grid = replace(small_grid[1], methods=("NPO",), attacks=("relearn", "relearning"), metrics=("forget_Q_A_Prob", "exact_memorization"))
    assert run_grid(grid, tmp_path, jobs=1, show=False) == []
    rows = measured(find_runs(tmp_path))["embedded"]["forget01"]
    attacked = {f"{row} + {name}" for row in ("Retain", "NPO") for name in ("relearn", "relearning")}
    assert set(rows) == {"Finetuned", "Retain", "NPO", *attacked}
    assert rows["NPO + relearn"]["forget_Q_A_Prob"] > rows["NPO"]["forget_Q_A_Prob"]
    record = read_json(tmp_path / "forget01/NPO+relearn/run.json")
    assert record["attack"]["before"]["forget_Q_A_Prob"] == rows["NPO"]["forget_Q_A_Prob"]
    assert set(record["attack"]["robustness"]) == {"forget_Q_A_Prob", "exact_memorization"}
    assert set(record["attack"]["symmetric_robustness"]) == {"forget_Q_A_Prob", "exact_memorization"}
    of_retain = read_json(tmp_path / "forget01/Retain+relearn/run.json")["attack"]
    assert of_retain["robustness"] == of_retain["symmetric_robustness"] == {}  # it is what the others are compared with
    assert record["attack"]["declared_in"] == ATTACKS.files["relearn"]
    column = "robustness_forget_Q_A_Prob"
    assert abs(rows["NPO + relearn"][column] - record["attack"]["robustness"]["forget_Q_A_Prob"]) < 1e-9
    assert column in columns_of("TOFU", {"embedded": {"forget01": rows}}) and column not in rows["NPO"]
    report = write_report(tmp_path, tmp_path / "report.html").read_text()
    assert "NPO + relearn" in report and "robustness" in report
    assert plan(grid, str(tmp_path)) == [] and not list(tmp_path.rglob("model"))


def test_an_attack_on_a_finished_cell_trains_nothing(small_grid, tmp_path, monkeypatch):
    """The cell kept its model; what the attack leaves is the same as when it came right after the training."""
    folder, small = small_grid
    grid = replace(small, methods=("NPO",), attacks=("relearning",), metrics=("forget_Q_A_Prob",), keep_models=True)
    assert run_grid(grid, tmp_path, jobs=1, show=False) == []
    summary = tmp_path / "forget01/NPO+relearning/TOFU_SUMMARY.json"
    before = summary.read_bytes()
    shutil.rmtree(summary.parent)
    monkeypatch.setattr("openunlearn_nb.experiments.cells.unlearn", lambda *_, **__: pytest.fail("a cell was trained again"))
    assert run_grid(grid, tmp_path, jobs=1, show=False) == [] and plan(grid, str(tmp_path)) == []
    assert summary.read_bytes() == before


def test_a_finished_cell_without_its_model_is_not_attacked(small_grid):
    folder, small = small_grid
    with pytest.raises(OpenUnlearnError, match="NPO on forget01 cannot be attacked by relearning: .* --keep-models"):
        run_grid(replace(small, attacks=("relearning",)), folder, jobs=1, show=False)
    assert not list(folder.rglob("*+relearning"))
