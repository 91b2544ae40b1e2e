"""What test_distributed.py runs of `UnlearnTrainer` on two processes under DeepSpeed: `unlearn_run.py OUT`."""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from openunlearn_nb import UnlearnConfig, UnlearnTrainer
from openunlearn_nb.internals.processes import is_main, join_group, leave_group, wait_for_all
from openunlearn_nb.models.loading import quiet
from openunlearn_nb.models.tiny import tiny_llama, train_tokenizer

FORGET = [{"question": f"Who wrote book {i}?", "answer": f"Ada wrote book {i}, in spring."} for i in range(8)]
RETAIN = [{"prompt": f"When was {i}?", "completion": f"In the year {i}."} for i in range(8)]
TOKENIZER = train_tokenizer([" ".join(row.values()) for row in FORGET + RETAIN], 300)


def trained(folder: Path, resume: bool = False) -> Path:
    """Three epochs, a checkpoint after each; returns the folder of the saved model."""
    args = UnlearnConfig(output_dir=str(folder), method="NPO", num_train_epochs=3, per_device_train_batch_size=2, learning_rate=1e-2,
                         report_to=[], disable_tqdm=True, use_cpu=True, save_strategy="epoch", lr_scheduler_type="constant")
    trainer = UnlearnTrainer(model=tiny_llama(TOKENIZER, hidden=16, layers=2), args=args, forget_dataset=FORGET, retain_dataset=RETAIN,
                             processing_class=TOKENIZER)
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(str(folder / "model"))
    wait_for_all()
    return folder / "model"


def main(out: Path) -> None:
    torch.set_num_threads(1)
    quiet()
    join_group()
    whole = load_file(trained(out) / "model.safetensors")
    if is_main():
        (out / "checkpoint-6/trainer_state.json").unlink()  # the last: it is passed over
    wait_for_all()
    again = load_file(trained(out, resume=True) / "model.safetensors")
    difference = max(float((whole[name] - again[name]).abs().max()) for name in whole)
    if is_main():
        files = sorted(file.name for file in (out / "checkpoint-4").iterdir())
        (out / "found.txt").write_text(f"{difference}\n{' '.join(files)}\n")
    leave_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
