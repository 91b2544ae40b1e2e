"""The package against the plain way (benchmarks/plain.py), both in one run, in turns, each in a process of its own.

    python benchmarks/speed.py --data TOFU --muse MUSE-News --output benchmarks/records/speed.json      # half an hour on two cores

Training: a Llama of hidden 256, 8 layers and a vocabulary of 32,000, real TOFU rows, batch 8. Evaluation: TOFU's forget10 on the
embedded model and on that Llama, MUSE's miniature and its real News on the embedded model. What both have computed is compared number
by number. Turns are added to those that the record has already: delete it, or name another, when the code has changed.
`--growth` measures time and memory against the number of rows to forget and the length of their answers instead.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path

METHODS = {"GradDiff": {}, "SimNPO": {}, "NPO": {}, "IdkDPO": {}, "RMU": {"module_regex": r"model\.layers\.2"}}
EVALUATIONS = {  # name: model, benchmark, metrics
    "TOFU, embedded, default": ("embedded", "TOFU", "default"), "TOFU, embedded, all": ("embedded", "TOFU", "all"),
    "TOFU, hidden 256, default": ("hidden 256", "TOFU", "default"), "MUSE miniature, default": ("embedded", "MUSE", "default"),
    "MUSE News, default": ("embedded", "MUSE real", "default"),
}
ROWS = 800  # of TOFU, which the models are taught: those that evaluation asks about first


def middle(data: str, epochs: int = 3):
    """The Llama of hidden 256, taught a little, so that its answers end; its folder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from openunlearn_nb.internals.hashes import content_hash
    from openunlearn_nb.models.saving import cache_dir, save_model
    from openunlearn_nb.models.tiny import train_tokenizer
    from openunlearn_nb.training.pairs import TrainConfig
    from openunlearn_nb.data.encoding import Encoder
    from openunlearn_nb.data.prompts import PROMPTS
    from openunlearn_nb.data.tofu import Tofu
    from openunlearn_nb.training.trainer import train

    benchmark = Tofu(data, ROWS)
    folder = cache_dir() / f"speed-256-{content_hash([benchmark.embedded_rows('full'), epochs])}"
    if folder.is_dir():
        return folder
    tokenizer = train_tokenizer(benchmark.tokenizer_texts(), 32000)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=32000, hidden_size=256, intermediate_size=704, num_hidden_layers=8, num_attention_heads=4, max_position_embeddings=4096,
        tie_word_embeddings=True, bos_token_id=None, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id))
    recipe = TrainConfig(1e-3, epochs, 8, 8, gradient_checkpointing=False)
    examples = benchmark.embedded_examples("full", Encoder(tokenizer, PROMPTS["chat"]))
    return save_model(train(model, tokenizer.pad_token_id, "Finetune", [], examples, recipe).model, tokenizer, folder)


def model_folder(which: str, args) -> str:
    from openunlearn_nb.experiments.embedded import embedded_model
    from openunlearn_nb.data.muse import Muse
    from openunlearn_nb.data.tofu import Tofu

    if which == "hidden 256":
        return str(middle(args.data))
    if which == "embedded MUSE":
        return str(embedded_model("News_target", Muse()))
    if which == "embedded MUSE real":
        return str(embedded_model("News_target", Muse(args.muse, Muse(args.muse).embedded_part())))
    return str(embedded_model("full", Tofu(args.data, ROWS)))


def train_child(args, method: str, mode: str, rows: int = 40, words: int | None = None) -> dict:
    """Seconds a step and peak memory of a few steps, with their losses."""
    from contextlib import nullcontext

    from plain import plainly

    from openunlearn_nb.models.loading import load_model, load_tokenizer
    from openunlearn_nb.training.pairs import TrainConfig
    from openunlearn_nb.data.encoding import Encoder, encode_all
    from openunlearn_nb.data.prompts import PROMPTS
    from openunlearn_nb.evaluation.records import peak_memory
    from openunlearn_nb.data.tofu import load_refusals, question_pairs
    from openunlearn_nb.training.trainer import train

    path = model_folder("hidden 256", args)
    model, enc = load_model(path), Encoder(load_tokenizer(path), PROMPTS["chat"])
    cut = lambda pairs: [(q, " ".join(a.split()[:words]) if words else a) for q, a in pairs]
    forget, retain = question_pairs("forget10", args.data)[:rows], question_pairs("retain90", args.data)[:400]
    refusals, ends = load_refusals(args.data), []
    alternates = encode_all(enc, [(q, refusals[i % len(refusals)]) for i, (q, _) in enumerate(forget)])
    recipe = TrainConfig(epochs=1, effective_batch=8, batch_size=8, gradient_checkpointing=False)
    begin, before = time.perf_counter(), peak_memory()["host"]
    with plainly() if mode == "plain" else nullcontext():
        losses = train(model, enc.tokenizer.pad_token_id, method, encode_all(enc, cut(forget)), encode_all(enc, cut(retain)), recipe, METHODS[method],
                       alternates=[alternates], progress=lambda share: ends.append(time.perf_counter())).losses
    steps = [b - a for a, b in zip(ends, ends[1:])]  # the first, and what is done once before it, left out
    return {"seconds": statistics.median(steps), "whole": time.perf_counter() - begin, "memory": peak_memory()["host"], "before": before, "numbers": losses}


def evaluate_child(args, name: str, mode: str, split: str = "forget10", count: int | None = None) -> dict:
    """Seconds, tokens through the model, and all numbers of an evaluation."""
    from plain import plain_evaluate

    from openunlearn_nb.experiments.bench import least_tokens
    from openunlearn_nb.models.loading import load_model, load_tokenizer
    from openunlearn_nb.data.muse import Muse
    from openunlearn_nb.evaluation.evaluate import evaluate
    from openunlearn_nb.evaluation.model_results import Usage
    from openunlearn_nb.data.encoding import Encoder
    from openunlearn_nb.data.prompts import prompt_format
    from openunlearn_nb.evaluation.records import peak_memory
    from openunlearn_nb.internals.files import finite
    from openunlearn_nb.data.tofu import Tofu

    which, of, metrics = EVALUATIONS[name]
    path = model_folder(which if of == "TOFU" else f"{which} {of}", args)
    model, tokenizer = load_model(path), load_tokenizer(path)
    benchmark = Tofu(args.data) if of == "TOFU" else Muse(args.muse) if of == "MUSE real" else Muse()
    enc = Encoder(tokenizer, prompt_format(None, tokenizer), 1024 if of == "MUSE real" else 512, 4096)
    split = split if of == "TOFU" else "News"
    spent, begin = Usage(model), time.perf_counter()
    if mode == "plain":
        found = plain_evaluate(model, enc, benchmark, split, None, [metrics], "characters", spent)
    else:
        found = evaluate(model, enc, benchmark, split, metrics=metrics, classifier="characters", usage=spent).entries
    seconds = time.perf_counter() - begin
    spent.seconds["metrics"] = seconds - sum(spent.seconds.values())
    least = least_tokens(enc, benchmark, split, [metrics], found) if mode == "ours" else None
    return {"seconds": seconds, "tokens": dict(spent.tokens), "phases": dict(spent.seconds), "memory": peak_memory()["host"], "least": least, "numbers": finite(found)}


def in_fresh_process(script: str, words: list[str], threads: int) -> dict:
    """The last line that a script prints in a process of its own, as JSON; ends with the script's errors if it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run([sys.executable, script, *words], capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


def child(args, *what: str, **more) -> dict:
    """The result of one measurement in a fresh process."""
    words = ["--data", args.data, "--muse", args.muse, "--output", args.output, "--child", json.dumps([*what, more])]
    return in_fresh_process(__file__, words, args.threads)


def distance(a, b) -> float:
    """The largest difference of two results' numbers (relative where they are above 1); infinite where texts differ."""
    if isinstance(a, dict):
        return max((distance(a[k], b[k]) for k in a), default=0.0) if a.keys() == b.keys() else float("inf")
    if isinstance(a, list):
        return max((distance(x, y) for x, y in zip(a, b)), default=0.0) if len(a) == len(b) else float("inf")
    if isinstance(a, int | float) and isinstance(b, int | float):
        return abs(a - b) / max(1.0, abs(a))
    return 0.0 if a == b else float("inf")


def one_turn(args, kind: str, name: str, turn: int) -> dict:
    """Both ways, one after the other; which is first changes from turn to turn."""
    both = {mode: child(args, kind, name, mode) for mode in ("plain", "ours")[::1 if turn % 2 else -1]}
    print(f"{name}: {both['plain']['seconds']:.2f} s and {both['ours']['seconds']:.2f} s", file=sys.stderr, flush=True)
    return {"distance": distance(both["plain"].pop("numbers"), both["ours"].pop("numbers")), **both}


def compared(turns: list[dict]) -> dict:
    """Medians of the turns' ratios."""
    ratio = lambda key: statistics.median(t["plain"][key] / t["ours"][key] for t in turns)
    return {"times faster": ratio("seconds"), "memory": 1 / ratio("memory"), "distance": max(t["distance"] for t in turns), "turns": turns}


def growth(args) -> dict:
    """NPO's time and memory a step and in all, and an evaluation's, against rows to forget; a step's against words of an answer."""
    rows = {n: child(args, "train", "NPO", "ours", rows=n) for n in (40, 200, 400)}
    words = {n: child(args, "train", "NPO", "ours", rows=40, words=n) for n in (10, 20, 40, 80)}
    splits = {n: child(args, "evaluate", "TOFU, embedded, default", "ours", split=split) for n, split in ((40, "forget01"), (200, "forget05"), (400, "forget10"))}
    for found in (rows, words, splits):
        for one in found.values():
            one.pop("numbers")
    return {"training by rows": rows, "training by words": words, "evaluation by rows": splits}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", default="locuslab/TOFU")
    p.add_argument("--muse", default="muse-bench/MUSE-News")
    p.add_argument("--repeats", type=int, default=5)
    p.add_argument("--threads", type=int, default=os.cpu_count(), help="torch threads of a process (default: %(default)s)")
    p.add_argument("--only", help="names to measure, separated by semicolons")
    p.add_argument("--growth", action="store_true")
    p.add_argument("--output", required=True, help="file of the record")
    p.add_argument("--child", help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.child:
        from openunlearn_nb.models.loading import quiet

        quiet(), warnings.simplefilter("ignore")
        kind, name, mode, more = json.loads(args.child)
        print(json.dumps({"train": train_child, "evaluate": evaluate_child}[kind](args, name, mode, **more)))
        return
    from openunlearn_nb.evaluation.records import read_json, run_record
    from openunlearn_nb.internals.files import write_json

    started = time.time()
    for which in ("hidden 256", "embedded", "embedded MUSE", "embedded MUSE real"):  # taught now, not in somebody's time
        model_folder(which, args)
    record = lambda found: run_record(started, benchmark="speed", threads=args.threads, found=found)
    if args.growth:
        print("Record:", write_json(args.output, record(growth(args))))
        return
    before = read_json(args.output) if Path(args.output).exists() else {"threads": args.threads, "found": {}}
    if before["threads"] != args.threads:
        sys.exit(f"{args.output} was measured with {before['threads']} threads, not {args.threads}; give another --output.")
    found, names = before["found"], {**dict.fromkeys(METHODS, "train"), **dict.fromkeys(EVALUATIONS, "evaluate")}
    for name in args.only.split(";") if args.only else names:
        for turn in range(args.repeats):
            found[name] = compared([*found.get(name, {"turns": []})["turns"], one_turn(args, names[name], name, turn)])
            write_json(args.output, record(found))  # an hour's turns are not lost with the last one
        of = found[name]
        print(f"{name:<28} {of['times faster']:.2f} times faster, {of['memory']:.2f} of the memory, numbers within {of['distance']:.1e}")
    print("Record:", args.output)


if __name__ == "__main__":
    main()
