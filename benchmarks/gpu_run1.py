"""Speed and memory of training, scoring and generation with random weights: the blocks of `gpu.py run1`."""

import math
import re
import statistics
import warnings
from argparse import Namespace
from collections.abc import Callable
from contextlib import nullcontext
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from blocks import Block, Found, Measure, Steps, free, timed

PEAK_TFLOPS = {
    "H200": 989,
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "A100": 312,
    "L40S": 362,
    "L4": 121,
    "RTX 4090": 165,
}  # bf16, dense


class Scale(NamedTuple):
    """How large everything is."""

    config: dict  # of the Llama; empty: that of Llama-3.2-1B
    prompt: tuple[int, int]  # tokens, least and most, as long as TOFU's
    answer: tuple[int, int]
    rows: tuple[int, int, int]  # per forward, few to many; the most is also a step's
    steps: int
    scored: int  # rows
    generated: tuple[int, int]  # rows, and new tokens of each
    asked: tuple[int, int]  # rows of the evaluation: what is forgotten, and each of the other sets
    product: int  # edge of the matrices that are multiplied
    copied: int  # bytes


TINY = dict(
    vocab_size=600,
    hidden_size=64,
    intermediate_size=176,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=True,
)
SMOLLM2 = dict(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    tie_word_embeddings=True,
)
LARGE = Scale({}, (30, 60), (20, 120), (4, 8, 32), 6, 400, (64, 200), (128, 30), 8192, 2**30)
SCALES = {"Llama-3.2-1B": LARGE, "tiny": Scale(TINY, (4, 8), (4, 12), (1, 2, 4), 3, 20, (6, 8), (8, 4), 64, 2**16)}
METHODS = (
    "NPO",
    "RMU",
    "UNDIAL",
    "GradDiff",
    "SimNPO",
    "IdkDPO",
    "AltPO",
    "GradAscent",
    "SatImp",
    "WGA",
    "CEU",
    "PDU",
    "Finetune",
)


def forward_flops(sizes, length: int, labelled: int, layers: int | None = None) -> float:
    """Floating-point operations of one row's forward through `layers` (default: all): linear layers, attention over all
    pairs of positions, the head at `labelled` ones."""
    layers = sizes.layers if layers is None else layers
    linear, head = 2 * length * sizes.linear * layers / sizes.layers, 2 * labelled * sizes.hidden * sizes.vocab
    return linear + head + 4 * layers * sizes.attention * length**2


def labels_in(example: dict) -> int:
    return sum(label != -100 for label in example["labels"])


def mean_flops(sizes, examples: list[dict], layers: int | None = None, head: bool = True) -> float:
    """The mean row's. Padding, recomputation, and logits at places that nothing is asked of are no model FLOPs."""
    return statistics.mean(forward_flops(sizes, len(e["input_ids"]), labels_in(e) * head, layers) for e in examples)


def mean_length(examples: list[dict]) -> float:
    return statistics.mean(len(e["input_ids"]) for e in examples)


def random_rows(scale: Scale, vocab: int, n: int, seed: int) -> list[dict]:
    """`n` examples of random ids, as long as TOFU's; the answer is labelled."""
    import numpy as np

    draw = np.random.default_rng(seed)
    lengths = zip(
        draw.integers(scale.prompt[0], scale.prompt[1] + 1, n), draw.integers(scale.answer[0], scale.answer[1] + 1, n)
    )
    rows = []
    for prompt, answer in lengths:
        ids = draw.integers(4, vocab, prompt + answer).tolist()  # the first four are the tokenizer's special ones
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return rows


def set_weights(model, dtype) -> None:
    """The same random weights again, in `dtype`, made where the model is; nothing of an earlier training is left on
    it."""
    import torch

    torch.manual_seed(0)
    model.activation_checkpointing_disable()
    for name, p in model.named_parameters():
        p.grad = None
        p.data = torch.empty_like(p, dtype=dtype)
        torch.nn.init.ones_(p) if "norm" in name else torch.nn.init.normal_(p, std=0.02)
    model.eval()


class Bench:
    """One model of random weights and its rows, for all blocks."""

    def __init__(self, args: Namespace, config: dict | None = None):
        from openunlearn_nb.training.sizes import SHAPES

        self.scale: Scale = SCALES[args.shape]
        self.config = config or self.scale.config or SHAPES["meta-llama/Llama-3.2-1B-Instruct"]
        self.peak: float | None = args.peak_tflops

    @cached_property
    def texts(self) -> list[tuple[str, str]]:
        from openunlearn_nb.data.miniature_tofu import make_tofu

        return [(r["question"], r["answer"]) for r in make_tofu()["forget10"]]

    @cached_property
    def tokenizer(self):
        """A small one: of the vocabulary it has names for the first ids, others are decoded to nothing."""
        from openunlearn_nb.models.tiny import train_tokenizer

        return train_tokenizer([q + a for q, a in self.texts], 500)

    @cached_property
    def model(self):
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        ids = dict(
            bos_token_id=None, eos_token_id=self.tokenizer.eos_token_id, pad_token_id=self.tokenizer.pad_token_id
        )
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            return LlamaForCausalLM(LlamaConfig(**self.config, **ids))

    def fresh(self, half: bool = False):
        """The model with its first weights, in fp32 or bf16."""
        import torch

        set_weights(self.model, torch.bfloat16 if half else torch.float32)
        return self.model

    def drop(self) -> None:
        """Free the model's memory; it is made anew when it is asked for."""
        self.__dict__.pop("model", None)
        free()

    @cached_property
    def sizes(self):
        from openunlearn_nb.training.sizes import model_sizes

        return model_sizes(self.model.config)

    @cached_property
    def parts(self) -> dict[str, list[dict]]:
        """Rows to forget, to keep, and other answers, enough that no step sees a row again."""
        n = self.scale.rows[-1] * self.scale.steps
        return {
            name: random_rows(self.scale, self.sizes.vocab, n, seed)
            for seed, name in enumerate(("forget", "retain", "alternate"))
        }

    def utilisation(self, tflops: float) -> Found:
        return {"model_tflops": tflops, "model_flops_utilisation": tflops / self.peak if self.peak else None}

    def settings(self, method: str) -> dict[str, Any]:
        """The method's, with RMU's layer in this model."""
        from openunlearn_nb.methods.method import METHODS as DECLARED

        own = {"module_regex": rf"model\.layers\.{min(7, self.sizes.layers - 1)}"} if method == "RMU" else {}
        return DECLARED[method].merge(own)


def parts_of(method: str, settings: dict) -> list[str]:
    """The parts of a batch that a method trains on."""
    from openunlearn_nb.methods.method import METHODS as DECLARED

    of = DECLARED[method](**settings)
    used = {"forget": "forget" in of.terms, "alternate": of.alternates is not None, "retain": "retain" in of.terms}
    return [name for name, there in used.items() if there]


def step_flops(bench: Bench, method: str, settings: dict) -> float:
    """Of one row of each part: a forward and a backward, which is two; and the live reference's forward, where the step
    has one."""
    from openunlearn_nb.methods.method import METHODS as DECLARED

    steers = "module_regex" in settings
    layers = int(re.findall(r"\d+", settings["module_regex"])[-1]) + 1 if steers else None  # where such a forward stops
    each = {name: mean_flops(bench.sizes, bench.parts[name], layers, not steers) for name in parts_of(method, settings)}
    reference = each["retain" if steers else "forget"] if DECLARED[method](**settings).needs_reference else 0.0
    return 3 * sum(each.values()) + reference


def planned(bench: Bench, method: str, settings: dict, recipe) -> Found:
    """`openunlearn plan`'s figure for the training: for rows as long as the longest, with the mean row's labels."""
    import torch

    from openunlearn_nb.training.memory import Plan, memory_parts
    from openunlearn_nb.training.trainer import optimizer_of

    rows = [e for name in parts_of(method, settings) for e in bench.parts[name]]
    parts = memory_parts(
        Plan(
            bench.sizes,
            method,
            "single",
            int(torch.cuda.is_available()),
            rows=recipe.batch_size,
            length=max(len(e["input_ids"]) for e in rows),
            labelled=math.ceil(statistics.mean(map(labels_in, rows))),
            checkpointing=recipe.gradient_checkpointing,
            accumulates=recipe.accumulation(1) > 1,
            optim=optimizer_of(recipe),
            settings=settings,
        )
    )
    whole = sum(parts.values())
    return {"planned_gb": (whole - parts["margin"]) / 1e9, "planned_with_margin_gb": whole / 1e9}


def training(bench: Bench, method: str, rows: int, checkpointing: bool = False, usual: bool = False) -> Found:
    """A few steps of a method. `usual`: by benchmarks/plain.py, with weights in bf16."""
    from plain import plainly

    from openunlearn_nb.training.pairs import TrainConfig
    from openunlearn_nb.training.trainer import optimizer_of, train

    model, settings, steps = bench.fresh(half=usual), bench.settings(method), Steps()
    recipe = TrainConfig(
        effective_batch=bench.scale.rows[-1],
        batch_size=rows,
        max_steps=bench.scale.steps,
        gradient_checkpointing=checkpointing,
    )
    used = parts_of(method, settings)
    forget, retain = ([] if method == "Finetune" else bench.parts["forget"]), bench.parts["retain"]
    with Measure() as whole, plainly() if usual else nullcontext():
        losses = train(
            model,
            bench.tokenizer.pad_token_id,
            method,
            forget,
            retain,
            recipe,
            settings,
            [bench.parts["alternate"]],
            steps,
        ).losses
    a_second = recipe.effective_batch / steps.seconds
    found = {
        "method": method,
        "rows": rows,
        "checkpointing": checkpointing,
        "optimizer": optimizer_of(recipe),
        "steps": len(losses),
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "seconds_a_step": steps.seconds,
        "seconds_in_all": whole.seconds,
        "tokens_a_second": a_second * sum(mean_length(bench.parts[name]) for name in used),
        **whole.memory,
    }
    if usual:
        return found
    return (
        found
        | bench.utilisation(a_second * step_flops(bench, method, settings) / 1e12)
        | planned(bench, method, settings, recipe)
    )


def ceilings(bench: Bench) -> Found:
    """What the card does at best: a copy (bytes read and written), and matrix products."""
    import torch

    device, n = bench.model.device, bench.scale.product
    one = torch.ones(bench.scale.copied, dtype=torch.uint8, device=device)
    other = torch.empty_like(one)
    found = {"copy_gb_a_second": 2 * one.numel() / timed(lambda: other.copy_(one), 10) / 1e9}
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        a, b = (torch.randn(n, n, dtype=dtype, device=device) for _ in range(2))
        found[f"{name}_product_tflops"] = 2 * n**3 / timed(partial(torch.matmul, a, b), 10) / 1e12
    return found


def scoring(bench: Bench) -> Found:
    """Log-likelihoods of rows, by the package, in bf16."""
    from openunlearn_nb.models.scoring import score

    model, pad_id = bench.fresh(half=True), bench.tokenizer.pad_token_id
    examples = random_rows(bench.scale, bench.sizes.vocab, bench.scale.scored, 3)
    score(model, examples[:8], pad_id)  # warm
    with Measure() as whole:
        score(model, examples, pad_id)
    tokens = len(examples) * mean_length(examples)
    return {
        "rows": len(examples),
        "tokens_a_second": tokens / whole.seconds,
        "seconds": whole.seconds,
        **whole.memory,
        **bench.utilisation(len(examples) * mean_flops(bench.sizes, examples) / whole.seconds / 1e12),
    }


def generation(bench: Bench) -> Found:
    """Greedy answers, by the package, in bf16; every row runs to the limit."""
    from openunlearn_nb.models.generation import generate

    model, (rows, new) = bench.fresh(half=True), bench.scale.generated
    prompts = [e["input_ids"][: e["labels"].count(-100)] for e in random_rows(bench.scale, bench.sizes.vocab, rows, 4)]
    ends = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = bench.sizes.vocab - 1  # as good as never said
    generate(model, bench.tokenizer, prompts[:4], 4)
    with Measure() as whole:
        generate(model, bench.tokenizer, prompts, new)
    model.generation_config.eos_token_id = ends
    return {
        "rows": rows,
        "new_tokens": new,
        "tokens_a_second": rows * new / whole.seconds,
        "seconds": whole.seconds,
        **whole.memory,
    }


def against(usual: Found, ours: Found, key: str) -> Found:
    """Both ways side by side."""
    return {
        "usual": usual,
        "ours": ours,
        "times_faster": usual[key] / ours[key],
        "memory": ours["peak_gb"] / usual["peak_gb"],
    }


def usual_training(bench: Bench, method: str) -> Found:
    """All logits, a live reference, weights in bf16, against the package (fp32 masters), at the same rows per
    forward."""
    rows = bench.scale.rows[1]
    return against(training(bench, method, rows, usual=True), training(bench, method, rows), "seconds_a_step")


def small_tofu(folder: Path, forget: int, others: int) -> Path:
    """A part of the miniature, as a folder: so many rows of forget10 and its holdout, and so many of each other set
    that is asked."""
    from openunlearn_nb.data.miniature_tofu import make_tofu
    from openunlearn_nb.data.tofu import write_tofu

    data = make_tofu()
    part = {name: data[name][:forget] for name in ("forget10", "forget10_perturbed", "holdout10")}
    part |= {
        name: data[name][:others]
        for name in ("retain90", "retain_perturbed", "real_authors_perturbed", "world_facts_perturbed")
    }
    return write_tofu(folder, part | {"full": part["retain90"] + part["forget10"]})


def evaluation(bench: Bench, usual: bool) -> Found:
    """TOFU's default metrics on a part of the miniature. Of random weights no answer ends early, so what the package
    saves by rows that are done is not in it."""
    from plain import plain_evaluate

    from openunlearn_nb.evaluation.evaluate import evaluate
    from openunlearn_nb.evaluation.model_results import Usage
    from openunlearn_nb.data.encoding import Encoder
    from openunlearn_nb.data.prompts import PROMPTS
    from openunlearn_nb.data.tofu import Tofu

    model, enc = bench.fresh(half=True), Encoder(bench.tokenizer, PROMPTS["chat"], 512)
    spent = Usage(model)
    with TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="No retain log")
        data = Tofu(str(small_tofu(Path(folder) / "data", *bench.scale.asked)))
        with Measure() as whole:
            if usual:
                plain_evaluate(model, enc, data, "forget10", None, ["default"], "characters", spent)
            else:
                evaluate(model, enc, data, "forget10", usage=spent)
    spent.end()
    return {"seconds": whole.seconds, "phases": dict(spent.seconds), "tokens": dict(spent.tokens), **whole.memory}


def usual_evaluation(bench: Bench) -> Found:
    """A forward for each metric, generation in batches of 32 to the limit, against the package."""
    return {"rows": list(bench.scale.asked), **against(evaluation(bench, True), evaluation(bench, False), "seconds")}


def smollm2_steps(large: Bench, args: Namespace) -> Found:
    """Steps of Finetune at SmolLM2-135M's shape, in place of the large model: what an epoch of run2 will take."""
    large.drop()
    bench = Bench(args, None if args.shape == "tiny" else SMOLLM2)
    found = training(bench, "Finetune", bench.scale.rows[-1])
    return found | {"seconds_for_an_epoch_of_4000_rows": found["seconds_a_step"] * 4000 / bench.scale.rows[-1]}


def blocks(args: Namespace) -> list[Block]:
    """Those of run1, most valuable first."""
    bench = Bench(args)
    few, some, many = bench.scale.rows

    def block(name: str, seconds: float, run: Callable[..., Found], *how) -> Block:
        return Block(name, partial(run, bench, *how), seconds)

    sweep = [(rows, kept) for rows in (many, some, few) for kept in (True, False) if (rows, kept) != (many, False)]
    return [
        block("ceilings", 10, ceilings),
        block(f"NPO, {some} rows", 10, training, "NPO", some),
        block("scoring", 4, scoring),
        block("generation", 17, generation),
        *(block(f"{m}, {many} rows", 7, training, m, many) for m in METHODS),
        *(
            block(f"NPO, {rows} rows{', checkpointing' if kept else ''}", 8, training, "NPO", rows, kept)
            for rows, kept in sweep
            if (rows, kept) != (some, False)
        ),
        *(block(f"the usual way: {m}", 15, usual_training, m) for m in ("NPO", "UNDIAL", "RMU")),
        block("SmolLM2-135M, Finetune", 8, smollm2_steps, args),
        block("the usual way: evaluation", 135, usual_evaluation),
    ]
