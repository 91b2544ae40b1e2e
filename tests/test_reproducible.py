"""A reproducible training gives the same weights, whichever instructions of the processor it uses."""

import os
import subprocess
import sys

import pytest

TRAIN = """
import hashlib, sys
from openunlearn_nb.data.encoding import encode
from openunlearn_nb.data.prompts import PROMPTS
from openunlearn_nb.data.tofu import load_tofu
from openunlearn_nb.models.tiny import tiny_llama, train_tokenizer
from openunlearn_nb.training.pairs import TrainConfig
from openunlearn_nb.training.trainer import train
import torch

rows = load_tofu("full")[:48]
tokenizer = train_tokenizer([row["question"] + row["answer"] for row in rows], 400)
examples = [encode(tokenizer, row["question"], row["answer"], PROMPTS["chat"]) for row in rows]
settings = {"RMU": {"module_regex": "model.layers.1", "trainable_params_regex": [".*"]}}
for method in sys.argv[1:]:
    model = tiny_llama(tokenizer, 32, 2)
    weights = torch.Generator().manual_seed(0)
    for p in model.parameters():
        if p.ndim > 1:
            p.data = (torch.rand(p.shape, generator=weights) - 0.5) / 15  # the initial normal draws are not portable
    config = TrainConfig(2e-3, 6, 8, 8, gradient_checkpointing=False, reproducible=True)
    model = train(model, tokenizer.pad_token_id, method, examples[:16], examples[16:], config, settings.get(method)).model
    print(method, model.dtype, hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest())
"""
METHODS = ["Finetune", "NPO", "RMU", "GradDiff", "UNDIAL"]


def weights_of(**instructions: str) -> list[str]:
    "A line for each method: its name, the dtype of the trained weights, and their hash."
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | instructions
    done = subprocess.run([sys.executable, "-c", TRAIN, *METHODS], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return [line for line in done.stdout.splitlines() if line.startswith(tuple(METHODS))]


@pytest.fixture(scope="module")
def best() -> list[str]:
    return weights_of()


def test_trained_weights_do_not_depend_on_instructions_or_threads(best):
    assert best == weights_of(ATEN_CPU_CAPABILITY="default", MKL_CBWR="COMPATIBLE", OMP_NUM_THREADS="2")


def test_trained_weights_are_fp32_and_of_each_method_others(best):
    assert [line.split()[:2] for line in best] == [[name, "torch.float32"] for name in METHODS]
    assert len({line.split()[2] for line in best}) == len(METHODS)
