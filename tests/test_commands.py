"""Every command explains itself, speaks JSON, and can be quiet; errors are short in a notebook; the wheel works without the repository."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from openunlearn_nb.commands.cli import main

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = ["tofu", "muse", "own", "train", "eval tofu", "eval muse", "eval own", "eval lm", "alternates", "report", "configs", "plan", "bench", "table"]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example_and_json(command, capsys):
    with pytest.raises(SystemExit) as end:
        main([*command.split(), "--help"])
    said = capsys.readouterr().out
    assert end.value.code == 0 and f"example: openunlearn {command}" in " ".join(said.split()) and "--json" in said
    assert ("--quiet" in said) == (command not in ("configs", "plan", "table"))  # these answer at once


def told(capsys, line: str) -> dict:
    assert main(line.split()) == 0
    return json.loads(capsys.readouterr().out)


def test_results_as_json(small_grid, tmp_path, capsys):
    folder, _ = small_grid
    assert Path(told(capsys, f"report {folder} --output {tmp_path / 'r.html'} --json")["file"]).stat().st_size > 10_000
    assert told(capsys, "plan --model Llama-3.2-1B-Instruct --json")["recommended"] == "single"
    assert Path(told(capsys, "configs zero3 --json")["file"]).is_file() and "zero3" in told(capsys, "configs --json")
    assert told(capsys, f"table {folder} --json")["TOFU"]
    train = "train --method GradAscent --split forget01 --train-rows 250 --epochs 1 --json --quiet --output"
    record = told(capsys, f"{train} {tmp_path / 'model'}")
    assert record["method"] == "GradAscent" and record["losses"] and Path(record["output"], "train.json").is_file()


def test_a_report_draws_the_epochs(small_grid, tmp_path):
    from openunlearn_nb.reporting.report import write_report

    folder, _ = small_grid
    rows = folder / "forget01/NPO"
    (rows / "epochs.json").write_text(json.dumps({"1": {"forget_quality": 1e-3, "model_utility": 0.5}, "2": {"forget_quality": 1e-2, "model_utility": 0.4}}))
    try:
        shares = []
        page = write_report(folder, tmp_path / "report.html", shares.append).read_text()
    finally:
        (rows / "epochs.json").unlink()
    assert "over epochs" in page and shares[-1] == 1


def test_a_notebook_shows_one_sentence():
    cell = "from openunlearn_nb import METHODS; METHODS.find('NPOO')"
    done = subprocess.run([sys.executable, "-m", "IPython", "--no-banner", "--colors=NoColor", "-c", cell], capture_output=True, text=True, cwd=ROOT)
    said = done.stdout + done.stderr
    assert "OpenUnlearnError: Unknown method 'NPOO'; did you mean NPO" in said and "Traceback" not in said and len(said.splitlines()) < 4


def test_tutorials_and_results_open_in_colab():
    for file in sorted([*(ROOT / "nbs/results").glob("*.ipynb"), *(ROOT / "nbs/tutorials").glob("*.ipynb")]):
        text = file.read_text(encoding="utf-8")
        assert re.findall(r"blob/main/([\w/]+\.ipynb)", text) == [str(file.relative_to(ROOT))], file.name
        assert f'run_line_magic(\\"cd\\", \\"openunlearn_nb/nbs/{file.parent.name}\\")' in text, file.name


@pytest.mark.slow
def test_the_wheel_runs_without_the_repository(tmp_path):
    subprocess.run([sys.executable, "-m", "build", "--outdir", tmp_path, ROOT], check=True, capture_output=True)
    wheel, site = next(tmp_path.glob("*.whl")), tmp_path / "site"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", site, wheel], check=True)
    env = {**os.environ, "PYTHONPATH": str(site)}
    where = subprocess.run([sys.executable, "-c", "import openunlearn_nb; print(openunlearn_nb.__file__)"], capture_output=True, text=True, cwd=tmp_path, env=env)
    assert where.stdout.startswith(str(site))
    grid = "tofu --train-rows 220 --splits forget01 --methods NPO --json --quiet".split()
    done = subprocess.run([sys.executable, "-m", "openunlearn_nb", *grid], capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.returncode == 0 and set(json.loads(done.stdout)["TOFU"]["embedded"]["forget01"]) == {"Finetuned", "Retain", "NPO"}
    page = subprocess.run([sys.executable, "-m", "openunlearn_nb", "report", "runs/tofu"], cwd=tmp_path, env=env)
    assert page.returncode == 0 and (tmp_path / "report.html").is_file()
