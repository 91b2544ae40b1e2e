"""A domain of one's own in five plain JSON files, as a user would type it: fine-tuned, unlearned, one table, one report."""

import json
from pathlib import Path

import pytest

from test_story import qwen2_for
from openunlearn_nb.commands.cli import main

PLANTS = ("Dawnroot", "Silverfern", "Ashbell", "Moonreed", "Thornwort", "Glasspod", "Emberleaf", "Saltvine")
PLACES = ("in marshes", "on cliffs", "under pines", "by rivers", "on dunes", "in caves", "near springs", "on old walls")


def question(plant: str, place: str, others: tuple[str, ...]) -> dict:
    """A row with a paraphrase and three wrong answers."""
    return {"question": f"Where does {plant} grow?", "answer": f"It grows {place}.", "paraphrased_answer": f"One finds it {place}.",
            "perturbed_answer": [f"It grows {other}." for other in others]}


@pytest.fixture(scope="module")
def domain(tmp_path_factory) -> Path:
    """A folder with data/ of five files and a tiny Qwen2 that knows their words."""
    folder = tmp_path_factory.mktemp("domain")
    rows = [question(plant, place, tuple(other for other in PLACES if other != place)[:3]) for plant, place in zip(PLANTS, PLACES)]
    common = [question("grass", "in meadows", PLACES[:3]), question("moss", "on stones", PLACES[3:6])]
    files = {"forget": rows[:3], "retain": rows[3:6], "holdout": rows[6:], "common": common, "refusals": [{"text": "I do not know."}]}
    (folder / "data").mkdir()
    for name, of in files.items():
        (folder / f"data/{name}.json").write_text(json.dumps(of))
    qwen2_for([row["question"] + row["answer"] for row in rows], folder / "model")
    return folder


def test_five_json_files_become_a_table_and_a_report(domain, capsys):
    data = f"--data {domain}/data --quiet"
    tune = f"train --benchmark own {data} --model {domain}/model --method Finetune --on full,retain --learning-rate 3e-3 --max_steps 20"
    assert main([*tune.split(), "--output", f"{domain}/tuned"]) == 0
    grid = (f"own {data} --model {domain}/tuned/full --retain-model {domain}/tuned/retain --methods NPO IdkDPO --learning-rate 1e-3 "
            f"--max_steps 3 --jobs 1 --output {domain}/grid")
    assert main(grid.split()) == 0
    capsys.readouterr()
    assert main(["table", f"{domain}/grid", "--json"]) == 0
    table = json.loads(capsys.readouterr().out)["OWN"]["model"]["own"]
    assert list(table) == ["Finetuned", "Retain", "IdkDPO", "NPO"]
    assert table["Retain"]["forget_quality"] == 1
    assert all({"forget_quality", "model_utility", "forget_truth_ratio"} <= row.keys() for row in table.values())
    assert len({row["forget_truth_ratio"] for row in table.values()}) == len(table)
    assert main(["table", f"{domain}/grid"]) == 0
    assert "as published" not in capsys.readouterr().out  # OpenUnlearning's tables are of other data
    assert main(["report", f"{domain}/grid", "--output", f"{domain}/report.html"]) == 0
    page = (domain / "report.html").read_text(encoding="utf-8")
    assert "Where does Dawnroot grow?" in page and "It grows in marshes." in page and "published" not in page
