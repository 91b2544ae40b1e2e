"""PISTOL, KnowUnDo and RWKU, each a benchmark in a file of one's own (`tests/extensions/`), on toy rows of their shape."""

import json
from pathlib import Path

import pytest

from openunlearn_nb.commands.cli import main

FILES = Path(__file__).parent / "extensions"
REAL = Path(__file__).resolve().parents[2] / "shared/hub"
PEOPLE = {"Mara Quell": "Brem", "Odo Vane": "Alba"}


def write(folder, **sets):
    for name, rows in sets.items():
        (folder / f"{name}.json").write_text(json.dumps(rows))


def contracts(folder):
    write(folder, pistol_sample1=[{"edge": edge, "question": f"Who signed first in contract {i} of {edge}?", "answer": f"Company {edge[0]}."}
                                  for edge in ("A_B", "A_C") for i in range(3)])


def private_and_public(folder):
    rows = [{"text": f"Where does {name} live?", "labels": f"In {town}, by the mill."} for name, town in PEOPLE.items()]
    write(folder, unlearn_train=rows[:1], unlearn_val=rows[:1], retention_train=rows[1:], retention_val=rows[1:])


def people(folder):
    write(folder, forget_target=[{"subject": name, "text": f"{name} was born in {town} and built its mill."} for name, town in PEOPLE.items()],
          **{level: [{"subject": name, "query": f"Where was {name} born ({level})?", "answer": town} for name, town in PEOPLE.items()]
             for level in ("forget_level1", "forget_level2", "forget_level3", "neighbor_level1", "neighbor_level2")})


@pytest.mark.parametrize("name, toy, split, column", [
    ("pistol", contracts, "A_C", "forget_ROUGE"),
    ("knowundo", private_and_public, None, "unlearn_success"),
    ("rwku", people, "Mara Quell", "forget_level2_ROUGE"),
])
def test_a_cell_of_the_grid_and_its_table(name, toy, split, column, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OPENUNLEARN_CACHE", str(tmp_path / "cache"))
    data, runs, file = tmp_path / "data", str(tmp_path / "runs"), str(FILES / f"{name}.py")
    data.mkdir()
    toy(data)
    assert main([name, "--import", file, "--data", str(data), *(["--splits", split] if split else []), "--methods", "GradDiff", "--epochs", "1",
                 "--jobs", "1", "--quiet", "--output", runs]) == 0
    capsys.readouterr()
    assert main(["table", runs, "--import", file, "--csv"]) == 0
    said = capsys.readouterr().out
    assert column in said and all(row in said for row in ("Retain", "Finetuned", "GradDiff"))


@pytest.mark.skipif(not REAL.is_dir(), reason="no copy of the data sets")
@pytest.mark.parametrize("name, folder, split, sizes", [
    ("PISTOL", "facebookresearch/PISTOL", "A_B", (20, 380)),
    ("KnowUnDo", "zjunlp/KnowUnDo", "all", (400, 441)),
])
def test_the_real_rows_are_read(name, folder, split, sizes):
    from openunlearn_nb.data.benchmark import BENCHMARKS, made_benchmark
    from openunlearn_nb.internals.registry import import_file

    if name not in BENCHMARKS:
        import_file(str(FILES / f"{name.lower()}.py"))
    made = made_benchmark(name, str(REAL / folder))
    assert (len(made.forget_rows(split)), len(made.retain_rows(split))) == sizes
