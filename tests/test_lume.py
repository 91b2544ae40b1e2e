"""LUME, a benchmark in a file of one's own (`tests/extensions/lume.py`), through grid, table and report."""

import json
from pathlib import Path

import pytest

from openunlearn_nb.commands.cli import main

FILE = Path(__file__).parent / "extensions/lume.py"
REAL = Path(__file__).resolve().parents[2] / "shared/hub/amazon-science/LUME"
WORDS = {"forget": ("Mara", "a mill", "Brem"), "retain": ("Odo", "a forge", "Alba")}


@pytest.fixture
def toy(tmp_path):
    """Six rows a side: a text to complete and a question of each of the three tasks."""
    for side, (name, place, town) in WORDS.items():
        rows = [{"id": f"{task}-{form}{i}", "task": f"Task{task}", "input": question, "output": answer}
                for i, task in enumerate((1, 2, 3))
                for form, question, answer in (("sc", f"In story {task} {name} walked to", f"{place} in {town}."),
                                               ("qa", f"Where did {name} live in story {task}?", town))]
        (tmp_path / f"{side}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def test_the_file_has_at_most_60_lines():
    assert len(FILE.read_text().splitlines()) <= 60


def test_grid_table_and_report(toy, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OPENUNLEARN_CACHE", str(tmp_path / "cache"))
    runs = str(tmp_path / "runs")
    assert main(["lume", "--import", str(FILE), "--data", str(toy), "--methods", "GradDiff", "--epochs", "1",
                 "--jobs", "1", "--quiet", "--output", runs]) == 0
    said = capsys.readouterr().out
    assert "LUME, embedded, measured" in said and all(row in said for row in ("Finetuned", "Retain", "GradDiff"))
    finetuned = json.loads((Path(runs) / "all/Finetuned/LUME_SUMMARY.json").read_text())
    assert len([name for name in finetuned if "_Task" in name]) == 12 and 0 <= finetuned["task_aggregate"] <= 1
    assert main(["table", runs, "--import", str(FILE), "--csv"]) == 0
    assert "task_aggregate" in capsys.readouterr().out
    assert main(["report", runs, "--import", str(FILE), "--output", str(tmp_path / "report.html")]) == 0
    assert "LUME" in (tmp_path / "report.html").read_text()


@pytest.mark.skipif(not REAL.is_dir(), reason="no copy of LUME")
def test_the_real_rows_are_read():
    from openunlearn_nb.data.benchmark import BENCHMARKS, made_benchmark
    from openunlearn_nb.internals.registry import import_file

    if "LUME" not in BENCHMARKS:
        import_file(str(FILE))
    lume = made_benchmark("lume", str(REAL))
    assert (len(lume.forget_rows("all")), len(lume.retain_rows("all"))) == (2732, 2734) and len(lume.data_sets("all")) == 14
