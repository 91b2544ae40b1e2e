"""The scripts in benchmarks/ run, at a size for a CPU, and count what they say they count."""

import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from openunlearn_nb.memory import model_sizes
from openunlearn_nb.miniature_tofu import make_tofu
from openunlearn_nb.models import quiet, save_model, tiny_llama, train_tokenizer
from openunlearn_nb.records import read_json
from openunlearn_nb.tofu import write_tofu


@pytest.fixture(scope="module")
def gpu():
    spec = importlib.util.spec_from_file_location("gpu_benchmark", Path(__file__).parents[1] / "benchmarks/gpu.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model():
    quiet()
    tokenizer = train_tokenizer([r["question"] + r["answer"] for r in make_tofu()["forget10"]], 500)
    return tiny_llama(tokenizer, hidden=64, layers=2), tokenizer


def test_flops_are_torchs_own(gpu, model):
    """torch's counter, over a forward that computes the head at the last `labelled` positions only, and over a backward."""
    llama, sizes = model[0], model_sizes(model[0].config)
    llama.set_attn_implementation("eager")
    for length, labelled in [(5, 1), (40, 12), (64, 64)]:
        with FlopCounterMode(display=False) as counter:
            out = llama(torch.arange(length)[None], logits_to_keep=labelled).logits
        forward = counter.get_total_flops()
        # the rotary frequencies, a product of 8 x 1 by 1 x length: no work of the model's
        assert gpu.forward_flops(sizes, length, labelled) == pytest.approx(forward, rel=1e-3)
        with FlopCounterMode(display=False) as counter:
            out.sum().backward()
        assert counter.get_total_flops() == pytest.approx(2 * forward, rel=0.02)  # embeddings and the first layer's rotation aside


def test_speed(gpu, tmp_path):
    args = gpu.parser().parse_args(["speed", "--shape", "tiny", "--steps", "3", "--examples", "40", "--new-tokens", "8", "--rows", "4",
                                    "--peak-tflops", "1", "--output", str(tmp_path / "speed.json")])
    record = gpu.speed(args)
    json.dumps(record)
    assert record["training"]["steps"] == 3 and math.isfinite(record["training"]["last_loss"])
    for phase in ("training", "scoring", "generation"):
        assert record[phase]["tokens_a_second"] > 0 and record[phase]["peak_memory_gb"]["host"] > 0.1
    for phase in ("training", "scoring"):
        assert 0 < record[phase]["model_flops_utilisation"] < 10 and record["environment"]["device"]


def test_smollm2(gpu, model, tmp_path):
    """From a base model to the table, on 20 rows of each kind; called again, nothing is trained again."""
    base = save_model(*model, tmp_path / "base")
    data = {config: rows[:20] for config, rows in make_tofu().items()}
    data["full"] = data["retain90"] + data["forget10"]
    write_tofu(tmp_path / "data", data)
    args = gpu.parser().parse_args(["smollm2", "--model", str(base), "--data", str(tmp_path / "data"), "--methods", "NPO,GradDiff", "--finetune-epochs", "2",
                                    "--epochs", "1", "--output", str(tmp_path / "out")])
    record = gpu.smollm2(args)
    assert set(record["table"]["forget10"]) == {"Finetuned", "Retain", "NPO", "GradDiff"}
    assert all(0 <= row["model_utility"] <= 1 for row in record["table"]["forget10"].values())
    dates = {f: read_json(f)["date"] for f in (tmp_path / "out").rglob("run.json")}
    assert len(dates) == 4 and gpu.smollm2(args)["table"] == record["table"]
    assert {f: read_json(f)["date"] for f in dates} == dates
