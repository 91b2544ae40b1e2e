"""`--teachings N`: every repetition trains its own Finetuned and Retain, and the table shows the spread of all of it."""

import json

from openunlearn_nb.commands.cli import main
from openunlearn_nb.data.tofu import Tofu
from openunlearn_nb.reporting.collect import find_runs, measured
from openunlearn_nb.reporting.repetitions import floor_frame, runs_frame
from openunlearn_nb.reporting.seeds import by_seed


def test_each_teaching_has_a_pair_of_its_own_and_the_table_has_their_spread(small_data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Tofu, "embedded", {"epochs": 2})
    command = ["tofu", "--data", small_data, "--splits", "forget01", "--methods", "GradAscent", "--epochs", "1", "--teachings", "2", "--jobs", "1"]
    assert main([*command, "--quiet", "--output", str(tmp_path / "grid")]) == 0
    assert "seeds 0, 1: mean" in capsys.readouterr().out
    runs = by_seed(find_runs(tmp_path / "grid"))
    probabilities = {row: {measured(of)["embedded"]["forget01"][row]["forget_Q_A_Prob"] for of in runs.values()} for row in ("Finetuned", "Retain")}
    assert set(runs) == {0, 1} and all(len(values) == 2 for values in probabilities.values())
    configs = [json.loads((tmp_path / f"grid/seed{seed}/grid.json").read_text()) for seed in (0, 1)]
    assert [config.get("embedded_seed") for config in configs] == [None, 1]  # version 0.1 had no such field
    frame, floor = runs_frame(find_runs(tmp_path / "grid")), floor_frame(find_runs(tmp_path / "grid"))
    assert sorted(frame["row"] + frame["teaching"].astype(str)) == ["Finetuned0", "Finetuned1", "GradAscent0", "GradAscent1", "Retain0", "Retain1"]
    assert frame.query("row == 'GradAscent'").learning_rate.notna().all() and frame.evaluation.nunique() == 6
    assert floor[["seed_a", "seed_b"]].values.tolist() == [[0, 1]] and 0 < floor.ks_distance[0] <= 1
