"""What one GPU does: the speed of training and evaluation at Llama-3.2-1B's shape, and SmolLM2 on the whole of TOFU.

    python benchmarks/gpu.py speed --output benchmarks/records/gpu_speed.json           # random weights, a few minutes
    python benchmarks/gpu.py smollm2 --data TOFU --output benchmarks/records/gpu_smollm2   # fine-tune, forget10 by six methods, table

`speed` trains NPO as the package does (bf16 over fp32 masters), then scores and generates in bf16. Weights do not matter to it, so
they are random and nothing is downloaded. `--shape tiny` and `--data miniature --model DIR` are for a look on a CPU.
`smollm2` goes on where it was interrupted.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

PEAK_TFLOPS = {"H200": 989, "H100": 989, "A100": 312, "L40S": 362, "L4": 121, "RTX 4090": 165}  # bf16, dense, by the makers' data sheets


def forward_flops(sizes, length: int, labelled: int) -> float:
    """Floating-point operations of one row's forward: linear layers, attention over all pairs of positions, the head at `labelled` ones."""
    linear, head = 2 * length * sizes.linear, 2 * labelled * sizes.hidden * sizes.vocab
    return linear + head + 4 * sizes.layers * sizes.attention * length ** 2


def mean_flops(sizes, examples: list[dict]) -> float:
    """The mean row's. Padding, recomputation, and logits at places that nothing is asked of are no model FLOPs."""
    of = [forward_flops(sizes, len(e["input_ids"]), sum(label != -100 for label in e["labels"])) for e in examples]
    return statistics.mean(of)


def mean_length(examples: list[dict]) -> float:
    return statistics.mean(len(e["input_ids"]) for e in examples)


def random_model(shape: str, tokenizer):
    """A Llama of Llama-3.2-1B's shape, or a tiny one, that has learnt nothing."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from openunlearn_nb.memory import SHAPES
    from openunlearn_nb.models import tiny_llama

    if shape == "tiny":
        return tiny_llama(tokenizer, hidden=64, layers=2)
    ids = dict(bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        return LlamaForCausalLM(LlamaConfig(**SHAPES["meta-llama/Llama-3.2-1B-Instruct"], **ids))


class Measure:
    """Seconds, and the most GPU memory (GB) in them; on a CPU the process's peak so far."""

    def __enter__(self):
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize(), torch.cuda.reset_peak_memory_stats()
        self.started = time.perf_counter()
        return self

    def __exit__(self, *error):
        import torch

        from openunlearn_nb.records import peak_memory

        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds, self.memory = time.perf_counter() - self.started, peak_memory()


def training(model, pad_id: int, examples: list[dict], sizes, rows: int, steps: int) -> dict:
    """NPO with its retain term: each step 32 rows to forget and 32 to keep, the reference's log-likelihoods beforehand."""
    import torch

    from openunlearn_nb.memory import Plan, memory_parts
    from openunlearn_nb.pairs import TrainConfig
    from openunlearn_nb.training import train

    recipe, half, ends = TrainConfig(batch_size=rows, max_steps=steps), len(examples) // 2, []

    def step_done(share: float) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        ends.append(time.perf_counter())

    with Measure() as whole:
        losses = train(model, pad_id, "NPO", examples[:half], examples[half:], recipe, progress=step_done).losses
    seconds = statistics.median(b - a for a, b in zip(ends, ends[1:]))  # the first step's compilation and warm-up left out
    parts = sum(mean_flops(sizes, part) for part in (examples[:half], examples[half:]))
    tokens = recipe.effective_batch * sum(mean_length(part) for part in (examples[:half], examples[half:]))
    longest = max(len(e["input_ids"]) for e in examples)
    gpus = int(torch.cuda.is_available())
    plan = Plan(sizes, "NPO", "single", gpus, rows=rows, length=longest)
    flops = 3 * recipe.effective_batch * parts / seconds  # a backward is two forwards
    return {"steps": len(losses), "first_loss": losses[0], "last_loss": losses[-1], "seconds_a_step": seconds, "tokens_a_second": tokens / seconds,
            "model_tflops": flops / 1e12, "peak_memory_gb": whole.memory, "planned_gb": sum(memory_parts(plan).values()) / 1e9}


def scoring(model, pad_id: int, examples: list[dict], sizes) -> dict:
    from openunlearn_nb.scoring import score

    score(model, examples[:8], pad_id)  # warm
    with Measure() as whole:
        score(model, examples, pad_id)
    tokens = len(examples) * mean_length(examples)
    return {"rows": len(examples), "tokens_a_second": tokens / whole.seconds, "seconds": whole.seconds, "peak_memory_gb": whole.memory,
            "model_tflops": len(examples) * mean_flops(sizes, examples) / whole.seconds / 1e12}


def generation(model, tokenizer, examples: list[dict], new_tokens: int) -> dict:
    from openunlearn_nb.generation import generate

    prompts = [[i for i, label in zip(e["input_ids"], e["labels"]) if label == -100] for e in examples]
    generate(model, tokenizer, prompts[:4], 4)
    with Measure() as whole:
        generate(model, tokenizer, prompts, new_tokens)
    return {"rows": len(prompts), "tokens_a_second": len(prompts) * new_tokens / whole.seconds, "seconds": whole.seconds, "peak_memory_gb": whole.memory}


def speed(args) -> dict:
    """Training, scoring and generation of a random model, as a record."""
    import torch

    from openunlearn_nb.memory import model_sizes
    from openunlearn_nb.miniature_tofu import make_tofu
    from openunlearn_nb.models import quiet, train_tokenizer
    from openunlearn_nb.prompts import PROMPTS, Encoder, encode_all
    from openunlearn_nb.records import run_record

    quiet()
    started, data = time.time(), make_tofu()
    pairs = [(r["question"], r["answer"]) for config in ("forget10", "retain90") for r in data[config]][:2 * args.examples]
    tokenizer = train_tokenizer([q + a for q, a in pairs])
    examples = encode_all(Encoder(tokenizer, PROMPTS["chat"], 512), pairs)
    model = random_model(args.shape, tokenizer)
    sizes = model_sizes(model.config)
    found = {"training": training(model, tokenizer.pad_token_id, examples, sizes, args.rows, args.steps)}
    model = model.to(torch.bfloat16).eval() if torch.cuda.is_available() else model.eval()
    found["scoring"] = scoring(model, tokenizer.pad_token_id, examples, sizes)
    model.generation_config.eos_token_id = sizes.vocab - 1  # as good as never said: every row runs to the limit
    found["generation"] = generation(model, tokenizer, examples[:64], args.new_tokens)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    peak = args.peak_tflops or next((v for name, v in PEAK_TFLOPS.items() if name in device), None)
    for phase in ("training", "scoring"):
        found[phase]["model_flops_utilisation"] = found[phase]["model_tflops"] / peak if peak else None
    return run_record(started, benchmark="gpu speed", shape=args.shape, parameters=sizes.parameters, rows=args.rows, peak_tflops=peak, **found)


def smollm2(args) -> dict:
    """Fine-tune on `full` and `retain90`, unlearn forget10 by the methods of the tables, evaluate; what came out, as a record."""
    from openunlearn_nb.cli import main
    from openunlearn_nb.records import run_record
    from openunlearn_nb.collect import find_runs, measured

    started, out = time.time(), Path(args.output)
    if not (out / "models").exists():
        check(main(["train", "--method", "Finetune", "--model", args.model, "--data", args.data, "--on", "full,retain90", "--epochs",
                    str(args.finetune_epochs), "--learning-rate", str(args.finetune_rate), "--output", str(out / "models")]))
    check(main(["tofu", "--model", f"{out}/models/full", "--retain-model", f"{out}/models/{{retain}}", "--data", args.data, "--splits", "forget10",
                "--methods", args.methods, "--epochs", str(args.epochs), "--learning-rate", str(args.rate), "--output", str(out / "records")]))
    table = next(iter(measured(find_runs(out / "records")).values()))
    return run_record(started, benchmark="SmolLM2 on TOFU", asked=vars(args), table=table)


def check(code: int) -> None:
    if code:
        sys.exit(code)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = p.add_subparsers(dest="command", required=True)
    s = commands.add_parser("speed")
    s.add_argument("--shape", choices=["Llama-3.2-1B", "tiny"], default="Llama-3.2-1B")
    s.add_argument("--rows", type=int, default=8, help="per forward")
    s.add_argument("--steps", type=int, default=20)
    s.add_argument("--examples", type=int, default=200, help="to forget, and as many to keep")
    s.add_argument("--new-tokens", type=int, default=200)
    s.add_argument("--peak-tflops", type=float, help="the device's bf16 peak, where its name is not known")
    s.add_argument("--output", required=True, help="file of the record")
    m = commands.add_parser("smollm2")
    m.add_argument("--data", default="locuslab/TOFU")
    m.add_argument("--model", default="SmolLM2-135M-Instruct")
    m.add_argument("--methods", default="GradAscent,GradDiff,IdkDPO,NPO,SimNPO,RMU")
    m.add_argument("--finetune-epochs", type=int, default=10)
    m.add_argument("--finetune-rate", type=float, default=1e-4)
    m.add_argument("--epochs", type=int, default=10)
    m.add_argument("--rate", type=float, default=5e-5)
    m.add_argument("--output", required=True, help="folder of models and records")
    return p


if __name__ == "__main__":
    from openunlearn_nb.records import write_json

    args = parser().parse_args()
    record = {"speed": speed, "smollm2": smollm2}[args.command](args)
    print(json.dumps({k: record[k] for k in ("training", "scoring", "generation", "table") if k in record}, indent=2))
    print("Record:", write_json(args.output if args.command == "speed" else Path(args.output) / "record.json", record))
