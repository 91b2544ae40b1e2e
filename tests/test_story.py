"""A model of one's own, as a user would type it: fine-tuned, unlearned with a sweep, and shown in one table and one report."""

import json
import re
from pathlib import Path

import pytest

from openunlearn_nb.commands.cli import main
from openunlearn_nb.data.tofu import question_pairs

BETAS = ("0.05", "0.1", "0.5")
ROWS = ["Finetuned", "Retain", *(f"{method} beta={beta}" for method in ("NPO", "SimNPO") for beta in BETAS)]
GRID = ("tofu --model {0}/tuned/full --retain-model {0}/tuned/{{retain}} --splits forget01 --methods NPO SimNPO --set beta=0.05,0.1,0.5 "
        "--data {1} --learning-rate 1e-3 --max_steps 5 --max_grad_norm 0.3 --output {0}/grid --jobs 1 --quiet")


def qwen2_for(texts: list[str], folder: Path) -> None:
    """A Qwen2 of two layers with a tokenizer made for some texts, saved in a folder."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from openunlearn_nb.models.tiny import train_tokenizer

    tokenizer = train_tokenizer(texts, 400)
    torch.manual_seed(0)
    config = Qwen2Config(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                         num_key_value_heads=1, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def story(tmp_path_factory, small_data) -> Path:
    """The folder of the whole story: the base model, the fine-tuned ones, and the grid."""
    folder = tmp_path_factory.mktemp("story")
    qwen2_for([question + answer for question, answer in question_pairs("forget01", "miniature")], folder / "tiny-qwen2")
    tune = (f"train --model {folder}/tiny-qwen2 --data {small_data} --method Finetune --on full,retain99 --learning-rate 3e-3 --max_steps 20 "
            f"--output {folder}/tuned --quiet")
    assert main(tune.split()) == 0
    assert main(GRID.format(folder, small_data).split()) == 0
    return folder


def run_record(story: Path, row: str) -> dict:
    return json.loads((story / "grid/forget01" / row / "run.json").read_text())


def run_summary(story: Path, row: str) -> dict:
    return json.loads((story / "grid/forget01" / row / "TOFU_SUMMARY.json").read_text())


def test_two_methods_at_three_betas_stand_in_one_table_beside_their_start_and_goal(story, capsys):
    assert main(["table", f"{story}/grid", "--json"]) == 0
    table = json.loads(capsys.readouterr().out)["TOFU"]["tiny-qwen2"]["forget01"]
    assert list(table) == ROWS
    assert table["Retain"]["forget_quality"] == 1
    assert len({table[row]["forget_truth_ratio"] for row in ROWS}) == len(ROWS)  # every training had an effect of its own


def test_a_record_says_what_was_typed(story):
    for beta in BETAS:
        record = run_record(story, f"NPO beta={beta}")
        assert record["settings"]["beta"] == float(beta)
        assert len(record["losses"]) == 5
        assert record["training"]["arguments"] == {"max_grad_norm": 0.3}


def test_the_report_shows_every_row(story, capsys):
    assert main(["report", f"{story}/grid", "--output", f"{story}/report.html"]) == 0
    page = (story / "report.html").read_text(encoding="utf-8")
    shown = re.sub("<[^>]+>", "\n", page).splitlines()
    assert {row for row in ROWS if row in shown} == set(ROWS)


def test_a_utility_of_0_is_explained_once_for_all_rows_of_one_cause(story, capsys):
    assert main(["table", f"{story}/grid"]) == 0
    notes = [line for line in capsys.readouterr().err.splitlines() if "model_utility is 0, because" in line]
    zero = {row for row in ROWS if run_summary(story, row)["model_utility"] == 0}
    assert zero and {row for row in ROWS for note in notes if re.search(rf"\b{re.escape(row)}\b", note.split(" on forget01")[0])} == zero
    assert len({note.split("because")[1] for note in notes}) == len(notes)


def test_the_same_folder_takes_no_other_configuration(story, small_data, capsys):
    assert main(GRID.format(story, small_data).replace("norm 0.3", "norm 0.5").split()) == 2
    assert "another configuration" in capsys.readouterr().err
