"""What test_distributed.py runs in one process and in two: `distributed_run.py OUT WHAT...`, each WHAT a method or `evaluation`.

Every process runs it; the main one writes losses, weights and results into OUT."""

import copy
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from openunlearn_nb.data.miniature_tofu import make_tofu
from openunlearn_nb.models.loading import load_model, quiet
from openunlearn_nb.models.saving import save_model
from openunlearn_nb.models.tiny import tiny_llama, train_tokenizer
from openunlearn_nb.training.pairs import TrainConfig
from openunlearn_nb.internals.processes import is_main, join_group, leave_group, wait_for_all, world_size
from openunlearn_nb.data.encoding import Encoder, encode_all
from openunlearn_nb.data.prompts import PROMPTS
from openunlearn_nb.training.trainer import train

SETTINGS = {"RMU": {"module_regex": r"model\.layers\.1"}, "NPO-KL": {"retain_loss_type": "KL"},
            "PDU": {"retain_loss_eps": 0.3, "dual_warmup_epochs": 1}}
STEPS = 15


class PowerCut(Exception):
    pass


def cut(epoch, model):
    if epoch == 2:
        raise PowerCut


def data():
    """A tokenizer, and two hundred encoded questions with answers."""
    rows = [(r["question"], r["answer"]) for r in make_tofu()["forget10"]]
    tokenizer = train_tokenizer([q + a for q, a in rows], 600)
    return tokenizer, encode_all(Encoder(tokenizer, PROMPTS["chat"], 64), rows)


def main(out: Path, whats: list[str]) -> None:
    torch.set_num_threads(1)
    quiet()
    join_group()
    tokenizer, examples = data()
    model = tiny_llama(tokenizer, hidden=32, layers=3)
    start = save_model(model, tokenizer, out / "start")
    alternates = [examples[i:i + 40] for i in (120, 140)]
    for what in whats:
        name, _, option = what.partition("-")
        recipe = TrainConfig(learning_rate=1e-3, epochs=4, effective_batch=16, gradient_checkpointing=option == "checkpointing",
                             batch_size=(16 if world_size() == 1 else 2) if option == "divided" else 4, max_steps=STEPS, lora=4 if "LoRA" in option else None)
        settings = SETTINGS.get(what, SETTINGS.get(name, {}))
        loaded = option.startswith("sharded")  # by ZeRO-3 in shards, as the commands load it; without it, a copy of the whole model
        given = lambda: load_model(str(start), sharded=True) if loaded else copy.deepcopy(model)
        run = lambda **how: train(given(), tokenizer.pad_token_id, name, [] if name == "Finetune" else examples[:80],
                                  examples[80:120], recipe, settings, alternates=[e + e for e in alternates], **how)
        if option == "interrupted":
            try:
                run(checkpoints=out / f"{what}-kept", after_epoch=cut)
            except PowerCut:
                pass
            wait_for_all()
            trained = run(checkpoints=out / f"{what}-kept")
        else:
            trained = run()
        if is_main():
            (out / f"{what}.json").write_text(json.dumps(trained.losses))
            save_file({k: v.contiguous() for k, v in trained.model.state_dict().items() if k != "lm_head.weight"}, out / f"{what}.safetensors")
            print(what, trained.losses[:1], trained.losses[-1:], flush=True)
    leave_group()  # else gloo's threads may outlive the interpreter, which aborts the process


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
