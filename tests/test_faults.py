"""Bad input: one clear sentence, exit code 2, no traceback."""

import errno
import json
import os
import subprocess
import sys

import pytest

from openunlearn_nb import records, tofu
from openunlearn_nb.cli import main
from openunlearn_nb.errors import OpenUnlearnError
from openunlearn_nb.miniature import make_tofu

CASES = {  # command: what the sentence must name
    "tofu --methods NPOO": ["'NPOO'", "NPO", "SimNPO"],
    "tofu --splits forget1": ["'forget1'", "forget10", "forget01"],
    "tofu --model Llama-3.2-1B": ["'Llama-3.2-1B'", "Llama-3.2-1B-Instruct"],
    "tofu --model ./nowhere": ["./nowhere"],
    "tofu --epochs 0": ["epochs", "1 or more", "0"],
    "tofu --batch-size 0": ["batch_size", "1 or more"],
    "tofu --learning-rate nan": ["learning_rate", "above 0"],
    "tofu --jobs 0": ["--jobs", "0"],
    "train --method NPO --split forget01 --output .": ["not empty"],
    "tofu --data ./nowhere": ["./nowhere", "miniature"],
    "tofu --data miniature:x": ["'x'"],
    "train --method NPO --set betta=1 --output out": ["'betta'", "beta"],
    "train --method NPO --set beta --output out": ["beta", "NAME=VALUE"],
    "train --method NPO --set beta=0 --output out": ["beta", "above 0"],
    "train --method Finetune --on retain80 --output out": ["retain80", "retain90"],
    "train --method NPO --split forget20 --output out": ["forget20", "forget10"],
    "eval tofu --metrics forget_qality": ["forget_qality", "forget_quality"],
    "eval tofu --retain-log ./no.json": ["no.json", "No such file"],
    "eval tofu --prompt lama-2 --train-rows 250": ["lama-2", "llama-2"],
    "table ./nowhere": ["./nowhere"],
}


@pytest.mark.parametrize("command", CASES)
def test_one_sentence_and_exit_code_2(command, capsys, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    assert main(command.split()) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("openunlearn: ") and len(said) < 400
    for word in CASES[command]:
        assert word in said
    assert not (tmp_path / "out").exists()


def test_no_traceback_from_the_shell(tmp_path):
    done = subprocess.run([sys.executable, "-m", "openunlearn_nb", "table", "nowhere"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr and "nowhere" in done.stderr


def test_data_set_lacking_a_column(tmp_path):
    configs = make_tofu()
    configs["forget01_perturbed"] = [{k: v for k, v in r.items() if k != "paraphrased_answer"} for r in configs["forget01_perturbed"]]
    folder = tofu.write_tofu(tmp_path / "TOFU", configs)
    with pytest.raises(OpenUnlearnError, match="lacks the column 'paraphrased_answer'"):
        tofu.load_tofu("forget01_perturbed", str(folder))


def test_data_set_lacking_a_config(tmp_path):
    folder = tofu.write_tofu(tmp_path / "TOFU", {"full": make_tofu()["full"]})
    with pytest.raises(OpenUnlearnError, match="Cannot load config 'forget01'"):
        tofu.load_tofu("forget01", str(folder))


def test_retain_log_of_another_split_or_broken(small_grid, tmp_path):
    folder, _ = small_grid
    own = folder / "forget01/Retain"
    evaluation = records.read_json(own / "TOFU_EVAL.json")
    assert records.read_retain_log(own, evaluation)
    other = json.loads((own / "TOFU_EVAL.json").read_text())
    other["forget_truth_ratio"]["value_by_index"].popitem()
    records.write_json(tmp_path / "fewer.json", other)
    with pytest.raises(OpenUnlearnError, match="19 forget rows and this evaluation 20"):
        records.read_retain_log(tmp_path / "fewer.json", evaluation)
    other = json.loads((own / "TOFU_EVAL.json").read_text())
    other["forget_Q_A_ROUGE"]["value_by_index"]["0"]["ground_truth"] = "something else"
    records.write_json(tmp_path / "other.json", other)
    with pytest.raises(OpenUnlearnError, match="other questions"):
        records.read_retain_log(tmp_path / "other.json", evaluation)
    (tmp_path / "broken.json").write_text('{"forget_truth_ratio": ')
    with pytest.raises(OpenUnlearnError, match="not valid JSON"):
        records.read_retain_log(tmp_path / "broken.json")
    with pytest.raises(OpenUnlearnError, match="no forget_truth_ratio"):
        records.read_retain_log(own / "TOFU_SUMMARY.json" if False else records.write_json(tmp_path / "s.json", {"model_utility": 1}))


def test_folder_of_another_configuration(small_grid, capsys):
    folder, _ = small_grid
    assert main(["tofu", "--output", str(folder), "--train-rows", "250", "--seed", "1", "--epochs", "2"]) == 2
    said = capsys.readouterr().err
    assert "another configuration" in said and "seed 0" in said


def test_no_disk_space(monkeypatch, tmp_path):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(records.json, "dump", full)
    with pytest.raises(OpenUnlearnError, match="No space left on device"):
        records.write_json(tmp_path / "x.json", {})
    assert list(tmp_path.iterdir()) == []


def test_broken_record_is_named(small_grid, tmp_path):
    (tmp_path / "forget01/NPO").mkdir(parents=True)
    (tmp_path / "forget01/NPO/TOFU_EVAL.json").write_text("{}")
    (tmp_path / "forget01/NPO/run.json").write_text('{"model"')
    assert main(["table", str(tmp_path)]) == 2
