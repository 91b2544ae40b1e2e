"""Bad input: one clear sentence, exit code 2, no traceback."""

import errno
import json
import os
import shutil
import subprocess
import sys

import pytest

from openunlearn_nb.models import loading as models
from openunlearn_nb.internals import files
from openunlearn_nb.data import tofu
from openunlearn_nb.commands.cli import main
from openunlearn_nb.internals.errors import OpenUnlearnError
from openunlearn_nb.data.miniature_tofu import make_tofu
from openunlearn_nb.data.tofu import Tofu
from openunlearn_nb.evaluation.retain_logs import read_retain_log
from openunlearn_nb.internals.files import write_json

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
    "tofu --seed 99999999999": ["seed", "2^32"],
    "tofu --model Phi-1.5": ["Phi-1.5", "Finetune"],
    "tofu --retain-model x": ["retain_model", "'x'"],
    "tofu --model a/b --retain-model {x}": ["retain_model", "{retain}"],
    "train --method NPO --on retain99 --output out": ["--on", "Finetune"],
    "train --method NPO --set beta=true --output out": ["beta", "True"],
    "train --method RMU --set module_regex=[ --output out": ["module_regex", "'['"],
    "train --method NPO --set retain_loss_type=EMBED_DIFF --output out": ["EMBED_DIFF", "NLL"],
    "eval tofu --model here": ["here", "config.json"],
    "train --method NPO --set gamma=abc --output out": ["gamma", "'abc'"],
    "train --method Finetune --output out": ["embedded", "--model"],
    "train --method NPO --set retain_loss_type=kl --output out": ["kl", "KL"],
    "train --method Finetune --on retain80 --output out": ["retain80", "retain90"],
    "train --method NPO --split forget20 --output out": ["forget20", "forget10"],
    "eval tofu --metrics forget_qality": ["forget_qality", "forget_quality"],
    "eval tofu --retain-log ./no.json": ["no.json", "No such file"],
    "eval tofu --prompt lama-2 --train-rows 250 --split forget01": ["lama-2", "llama-2"],
    "table ./nowhere": ["./nowhere"],
    "muse --corpora news": ["'news'", "News"],
    "muse --methods IdkDPO": ["IdkDPO", "answer nothing", "NPO"],
    "muse --methods NPOO": ["'NPOO'", "NPO"],
    "muse --data ./nowhere/MUSE-{corpus}": ["./nowhere/MUSE-News"],
    "muse --data here/MUSE-Books --corpora News": ["MUSE-Books", "Books", "News"],
    "muse --model x/y --retain-model {retains}": ["retain_model", "{corpus}", "{retains}"],
    "tofu --data x/{corpus}": ["data", "nothing", "{corpus}"],
    "muse --max-length 0": ["max_length", "1 or more"],
    "muse --shots -1": ["shots", "0 or more"],
    "muse --model Llama-3.2-1B-Instruct": ["Llama-3.2-1B-Instruct", "MUSE", "Finetune"],
    "tofu --model Llama-2-7b": ["Llama-2-7b", "TOFU", "Finetune"],
    "eval muse --shots 11": ["10 few-shot examples", "--shots 10"],
    "eval muse --metrics forget_quality": ["forget_quality", "MUSE"],
    "eval muse --retain-log ./no.json": ["no.json", "No such file"],
    "eval muse --corpus Movies": ["Movies", "News"],
    "train --benchmark muse --method IdkDPO --output out": ["IdkDPO", "answer nothing"],
    "train --benchmark muse --method Finetune --model x/y --on full --output out": ["'full'", "News_target"],
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


def test_data_set_with_a_text_for_a_list(tmp_path):
    configs = make_tofu()
    configs["retain_perturbed"] = [r | {"perturbed_answer": "abc"} for r in configs["retain_perturbed"]]
    folder = tofu.write_tofu(tmp_path / "TOFU", configs)
    with pytest.raises(OpenUnlearnError, match="'abc' as 'perturbed_answer'; a list of texts is expected"):
        tofu.load_tofu("retain_perturbed", str(folder))


def test_pickled_weights_are_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"whatever")
    with pytest.raises(OpenUnlearnError, match="no \\*.safetensors"):
        models.load_model(str(tmp_path))


def test_empty_lists_are_refused(capsys):
    for command in (["tofu", "--splits", ""], ["tofu", "--methods", ","], ["eval", "tofu", "--metrics", ""]):
        with pytest.raises(SystemExit) as stop:
            main(command)
        assert stop.value.code == 2 and "at least one name" in capsys.readouterr().err


def test_files_of_any_shape(small_grid, tmp_path, capsys):
    """A table never ends in a traceback, whatever lies in the folder."""
    cell = tmp_path / "forget01/NPO"
    cell.mkdir(parents=True)
    good = {"model": "m", "split": "forget01", "row": "NPO"}
    for record, evaluation in [({}, {}), ({**good, "model": None}, {}), ({**good, "split": "forget77"}, {}),
                               (good, {"forget_Q_A_PARA_Prob": 3}), (good, {"forget_Q_A_Prob": {"value_by_index": {"x": {"prob": 1}}}})]:
        write_json(cell / "run.json", record), write_json(cell / "TOFU_EVAL.json", evaluation)
        assert main(["table", str(tmp_path)]) == 2, (record, evaluation)
        assert capsys.readouterr().err.startswith("openunlearn: ")


def test_another_row_is_no_retain_log(small_grid):
    folder, _ = small_grid
    with pytest.raises(OpenUnlearnError, match="evaluation of NPO, not of a retain model"):
        read_retain_log(folder / "forget01/NPO", Tofu)


def test_data_set_lacking_a_config(tmp_path):
    folder = tofu.write_tofu(tmp_path / "TOFU", {"full": make_tofu()["full"]})
    with pytest.raises(OpenUnlearnError, match="Cannot load config 'forget01'"):
        tofu.load_tofu("forget01", str(folder))


def test_retain_log_of_another_split_or_broken(small_grid, tmp_path, capsys):
    """Said before the model is loaded, and nothing is written."""
    folder, _ = small_grid
    evaluate = lambda log, split="forget01": (main(["eval", "tofu", "--train-rows", "250", "--split", split, "--retain-log", str(log),
                                                    "--output", str(tmp_path / "out")]), capsys.readouterr().err)
    own = folder / "forget01/Retain"
    code, said = evaluate(own, "forget05")
    assert code == 2 and "20 forget rows and the data 100" in said
    other = json.loads((own / "TOFU_EVAL.json").read_text())
    other["forget_Q_A_ROUGE"]["value_by_index"]["0"]["ground_truth"] = "something else"
    code, said = evaluate(write_json(tmp_path / "other.json", other))
    assert code == 2 and "other texts" in said
    (tmp_path / "broken.json").write_text('{"forget_truth_ratio": ')
    code, said = evaluate(tmp_path / "broken.json")
    assert code == 2 and "not valid JSON" in said
    code, said = evaluate(own / "TOFU_SUMMARY.json")
    assert code == 2 and "not a summary" in said
    assert not (tmp_path / "out").exists()


def test_published_retain_log_is_of_the_real_rows(eval_logs, real_tofu):
    """Their logs serve as our retain logs: row 54 of forget10 differs by a space, and is the same row."""
    for split, retain in (("forget01", "retain99"), ("forget10", "retain90")):
        truths = [r["answer"] for r in tofu.load_tofu(f"{split}_perturbed", real_tofu)]
        assert read_retain_log(eval_logs / f"tofu_Llama-2-7b-chat-hf_{retain}", Tofu, truths)
        with pytest.raises(OpenUnlearnError, match="another forget split"):
            read_retain_log(eval_logs / f"tofu_Llama-2-7b-chat-hf_{retain}", Tofu, truths[:-1])


def test_evaluation_folder_of_another_split(small_grid, tmp_path, capsys):
    folder, _ = small_grid
    cell = folder / "forget01/NPO"
    before = (cell / "TOFU_EVAL.json").read_text()
    assert main(["eval", "tofu", "--train-rows", "250", "--split", "forget01", "--output", str(cell)]) == 2
    assert "holds an evaluation of another" in capsys.readouterr().err and (cell / "TOFU_EVAL.json").read_text() == before


def test_two_runs_of_one_cell(small_grid, tmp_path, capsys):
    folder, _ = small_grid
    for name in "ab":
        shutil.copytree(folder, tmp_path / name)
    assert main(["table", str(tmp_path)]) == 2
    assert "Two evaluations of Finetuned on forget01 for embedded" in capsys.readouterr().err


def test_too_few_rows_to_forget(tmp_path, capsys):
    assert main(["tofu", "--train-rows", "250", "--splits", "forget10", "--output", str(tmp_path)]) == 2
    assert "150 of the 200 rows of forget10" in capsys.readouterr().err


def test_folder_of_another_configuration(small_grid, capsys):
    folder, _ = small_grid
    assert main(["tofu", "--output", str(folder), "--train-rows", "250", "--splits", "forget01", "--seed", "1", "--epochs", "2"]) == 2
    said = capsys.readouterr().err
    assert "another configuration" in said and "seed 0" in said


def test_no_disk_space(monkeypatch, tmp_path):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "replace", full)
    with pytest.raises(OpenUnlearnError, match="No space left on device"):
        write_json(tmp_path / "x.json", {})
    assert list(tmp_path.iterdir()) == []


def test_broken_record_is_named(small_grid, tmp_path):
    (tmp_path / "forget01/NPO").mkdir(parents=True)
    (tmp_path / "forget01/NPO/TOFU_EVAL.json").write_text("{}")
    (tmp_path / "forget01/NPO/run.json").write_text('{"model"')
    assert main(["table", str(tmp_path)]) == 2
