"""A method of one's own, from a file, on the command line and in several processes."""

import subprocess
import sys

import pytest
from launching import torchrun

from openunlearn_nb.commands.cli import main
from openunlearn_nb.evaluation.records import read_json

FILE = '''
from __future__ import annotations

from dataclasses import dataclass

from openunlearn_nb.models.forwards import sequence_nll
from openunlearn_nb import method


@dataclass
class Goal:
    "A dataclass looks for its own module."
    loss: float


@method("{name}", paper="a test", target={target})
def aim(model, batch, ref_model, s):
    "Bring each answer to a loss of `target` a token."
    nll, n = sequence_nll(model, batch["forget"])
    return ((nll / n - Goal(s.target).loss) ** 2).mean()
'''
GRID = "tofu --train-rows 250 --splits forget01 --epochs 1 --quiet --jobs 2 --methods".split()


def test_a_method_from_a_file(tmp_path, capsys):
    file, output = tmp_path / "aim.py", tmp_path / "runs"
    run = lambda *more: main([*GRID, "Hit,GradAscent", "--import", str(file), "--output", str(output), *more])
    file.write_text(FILE.format(name="Hit", target=2.0))
    assert run() == 0 and "Hit" in capsys.readouterr().out
    record = read_json(output / "forget01/Hit/run.json")
    assert record["settings"]["target"] == 2.0 and record["published"] is None and record["declared_in"]
    assert read_json(output / "forget01/GradAscent/run.json")["published"]["training"]
    assert main(["table", str(output), "--check"]) == 0
    assert main([*GRID, "GradAscent", "--output", str(output)]) == 0  # the others need no file


def test_what_is_wrong_with_a_file_is_said(tmp_path, capsys):
    file = tmp_path / "mine.py"
    for text, said in ((None, "There is no Python file"), ("x = 1", "declares nothing"), (FILE.format(name="NPO", target=1.0), "There is a method called NPO already"),
                       ("1 / 0", "ZeroDivisionError")):
        if text is not None:
            file = tmp_path / f"mine{len(text)}.py"  # a file is run once a process
            file.write_text(text)
        assert main([*GRID, "NPO", "--import", str(file), "--output", str(tmp_path / "runs")]) == 2
        assert said in capsys.readouterr().err


@pytest.mark.slow
def test_a_script_without_a_guard_is_told(tmp_path):
    script = ("from openunlearn_nb import GridConfig, run_grid\n"
              "print(run_grid(GridConfig(train_rows=250, splits=('forget01',), methods=('GradAscent',), epochs=1), 'runs', jobs=2))\n")
    (tmp_path / "script.py").write_text(script)
    done = subprocess.run([sys.executable, "script.py"], capture_output=True, text=True, cwd=tmp_path)
    assert 'under if __name__ == "__main__":' in done.stderr and "Another run" not in done.stderr


@pytest.mark.slow  # half a minute of a launch
def test_a_file_to_import_reaches_every_process_of_a_launch(tmp_path):
    file = tmp_path / "aim.py"
    file.write_text(FILE.format(name="Hit", target=2.0) + f"""
import os
open({str(tmp_path)!r} + "/rank" + os.environ["RANK"], "w").close()
""")
    line = f"train --method Hit --import {file} --split forget01 --set goal=1 --output {tmp_path}/out"
    done = torchrun("-m", "openunlearn_nb", *line.split(), check=False)  # stops where Hit is known, before a model is loaded
    assert done.stderr.count("Unknown setting of Hit 'goal'") == 2
    assert sorted(place.name for place in tmp_path.glob("rank*")) == ["rank0", "rank1"]
