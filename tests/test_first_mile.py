"""A model and data of one's own, as a user would type it: fine-tuned, unlearned, evaluated, laid out in one table."""

import csv
import json
from pathlib import Path

import pytest

from openunlearn_nb.commands.cli import main
from openunlearn_nb.data.tofu import question_pairs


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> tuple[Path, Path]:
    """A tiny Qwen2 in a folder, and a folder with a dozen questions of one's own."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from openunlearn_nb.models.tiny import train_tokenizer

    folder = tmp_path_factory.mktemp("own")
    rows = question_pairs("forget01", "miniature")
    (folder / "data").mkdir()
    for side, part in (("forget", rows[:4]), ("retain", rows[4:12])):
        with open(folder / f"data/{side}.csv", "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("question", "answer"), *part])
    tokenizer = train_tokenizer([question + answer for question, answer in rows], 400)
    torch.manual_seed(0)
    config = Qwen2Config(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                         num_key_value_heads=1, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    Qwen2ForCausalLM(config).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    return folder / "base", folder / "data"


def record(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text())


@pytest.mark.parametrize("options, sentence", [
    ("--set betta=0.1", "Unknown setting of NPO 'betta'; did you mean beta"),
    ("--train-rows 200", "train_rows 200 counts what the embedded model is trained on"),
    ("--max_steps 2 --optim adamw_bnb_8bits", "Unknown optimizer"),
    ("--lr_scheduler_type linnear --max_steps 2", "Training cannot be set up so"),
])
def test_what_does_nothing_or_cannot_be_is_refused(tiny, tmp_path, capsys, options, sentence):
    model, data = tiny
    line = f"train --benchmark own --model {model} --data {data} --method NPO --output {tmp_path}/out {options}"
    assert main(line.split()) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_sweep_is_for_a_grid(tiny, tmp_path, capsys):
    model, data = tiny
    assert main(f"train --benchmark own --model {model} --data {data} --method NPO --output {tmp_path}/out --set beta=0.1,0.2".split()) == 2
    assert "beta has several values, and train makes one run; a grid takes them, such as openunlearn own" in capsys.readouterr().err


def test_precision_and_system_message_are_settings_of_every_command(tiny, tmp_path):
    model, data = tiny
    line = f"eval own --model {model} --data {data} --dtype bfloat16 --metrics forget_Q_A_Prob --output {tmp_path}"
    assert main(line.split()) == 0
    assert record(tmp_path)["config"]["dtype"] == "bfloat16"


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory) -> Path:
    """A tiny model fine-tuned on all rows and on those to keep, unlearned from the first, and all three evaluated."""
    model, data = tiny
    folder = tmp_path_factory.mktemp("runs")
    train = f"train --benchmark own --data {data} --epochs 1 --learning-rate 1e-3 --quiet --lora 0"
    own = f"own --data {data}"
    full, retain = ("full", "retain")
    assert main(f"{train} --model {model} --method Finetune --on {full},{retain} --output {folder}/taught".split()) == 0
    assert main(f"{train} --model {folder}/taught/{full} --method NPO --output {folder}/npo".split()) == 0
    for name in (f"taught/{full}", f"taught/{retain}", "npo"):
        assert main(f"eval {own} --model {folder}/{name} --metrics forget_Q_A_Prob --output {folder}/evaluations/{Path(name).name} --quiet".split()) == 0
    return folder


def test_runs_of_train_and_eval_land_in_one_table(runs, capsys):
    assert main(["table", str(runs / "evaluations"), "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)["OWN"]["base"]["own"]) == {"Finetuned", "Retain", "NPO"}


def test_a_row_can_be_named(tiny, runs, tmp_path):
    _, data = tiny
    line = f"eval own --data {data} --model {runs}/npo --metrics forget_Q_A_Prob --row NPO-again --output {tmp_path} --quiet"
    assert main(line.split()) == 0
    assert (record(tmp_path)["row"], record(tmp_path)["model"]) == ("NPO-again", "base")


def test_finetuning_of_several_goes_on_after_an_interruption(tiny, runs, capsys):
    import shutil

    model, data = tiny
    shutil.rmtree(runs / "taught/retain")
    before = (runs / "taught/full/model.safetensors").stat().st_mtime_ns
    line = (f"train --benchmark own --data {data} --epochs 1 --learning-rate 1e-3 --quiet --lora 0 --model {model} --method Finetune "
            f"--on full,retain --output {runs}/taught")
    assert main(line.split()) == 0
    assert "full: there already" in capsys.readouterr().out and (runs / "taught/retain/train.json").is_file()
    assert (runs / "taught/full/model.safetensors").stat().st_mtime_ns == before
    assert main(line.replace("--epochs 1", "--epochs 2").split()) == 2
    assert "holds a model of another epochs" in capsys.readouterr().err


def test_without_a_terminal_training_writes_a_line_every_so_often(tiny, tmp_path, capsys, monkeypatch):
    from openunlearn_nb.experiments import display

    monkeypatch.setattr(display.LogLines.__init__, "__defaults__", (0.0,))  # at once, in place of a minute
    model, data = tiny
    line = f"train --benchmark own --data {data} --model {model} --method GradDiff --max_steps 3 --lora 0 --output {tmp_path}/out"
    assert main(line.split()) == 0
    said = capsys.readouterr().err
    assert "GradDiff: 33% done, about" in said and "step 2 of 3, loss " in said
