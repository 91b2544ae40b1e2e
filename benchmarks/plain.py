"""The plain way, a baseline and nothing else: nothing of the package uses it.

What the usual implementations do, in as few lines as possible: in training a live reference model, and logits at every position of
padded rows; in evaluation a forward for each metric, rows in the order of the data set, tokenised anew each time, each wrong answer
with its question once more, and generation in batches of 32 that run until the last row is done. It gives the same numbers as the
package; benchmarks/speed.py measures both in one run.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
import torch.nn.functional as F
from transformers import Trainer

from openunlearn_nb.models.forwards import find_module
from openunlearn_nb.methods.losses import activation_mse, control_vector, dpo_loss, npo_loss, simnpo_loss, undial_loss
from openunlearn_nb.evaluation.entries import combined_entry, compute_entries
from openunlearn_nb.evaluation.metric import Context, metric_table, needed, wanted
from openunlearn_nb.evaluation.model_results import ModelResults, ScoredRow, Usage
from openunlearn_nb.methods.method import TERMS, Method, MethodLoss
from openunlearn_nb.data.encoding import collate, encode
from openunlearn_nb.models.scoring import NOTHING, TokenScores

ROWS = 32  # a batch of evaluation, as in the reference code


def every_position(model, part: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """NLL and number of each row's labels, from logits `[rows, length, vocabulary]`."""
    logits = model(input_ids=part["input_ids"], attention_mask=part["attention_mask"], use_cache=False).logits.float()
    labels = part["labels"][:, 1:]
    nll = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten(), reduction="none", ignore_index=-100).view_as(labels)
    return nll.sum(1), (labels != -100).sum(1)


def activations(model, part: dict, regex: str) -> torch.Tensor:
    """The layer's output, caught from a whole forward."""
    caught = []
    handle = find_module(model, regex).register_forward_hook(lambda module, args, output: caught.append(output))
    model(input_ids=part["input_ids"], attention_mask=part["attention_mask"], use_cache=False)
    handle.remove()
    return caught[0]


def undial_term(model, ref_model, part: dict, beta: float) -> torch.Tensor:
    """UNDIAL from both models' logits at every position."""
    def logits(of) -> torch.Tensor:
        out = of(input_ids=part["input_ids"], attention_mask=part["attention_mask"], use_cache=False).logits
        return out.float()[:, :-1].flatten(0, 1)

    labels = part["labels"][:, 1:].flatten()
    with torch.no_grad():
        goal = logits(ref_model)
    predicted, there = logits(model), labels != -100
    return undial_loss(predicted[there], goal[there], labels[there], beta)


def plain_loss(self: Method, model, batch: dict, ref_model=None, terms=TERMS) -> MethodLoss:
    """As `Method.loss`, for the six methods of the benchmarks."""
    method, s = self.name, self.settings
    counts = batch.get("counts")  # of the whole effective batch: a forward's mean has its share in the step's
    share = {term: own / counts[term] for term, own in self.counts(batch).items()} if counts else {}
    batch = {part: tensors for part, tensors in batch.items() if part != "counts"}
    nll, n = {}, {}
    if method == "UNDIAL":  # without a retain term, as published
        forget = undial_term(model, ref_model, batch["forget"], s["beta"]) * share.get("forget", 1)
        return MethodLoss(s["gamma"] * forget, {"forget": forget})
    with torch.no_grad():
        before = {part: every_position(ref_model, batch[part])[0] for part in batch if part != "retain"} if method in ("NPO", "IdkDPO") else {}
    if method == "RMU":
        mask = {part: batch[part]["labels"] != -100 for part in batch}
        h = {part: activations(model, batch[part], s["module_regex"]) for part in batch}
        with torch.no_grad():
            goal = activations(ref_model, batch["retain"], s["module_regex"])
        u = self.memory.get("control_vec", s["control_vec"])
        u = control_vector(h["forget"].shape[-1]) if u is None else u
        forget = activation_mse(h["forget"], s["steering_coeff"] * u.to(h["forget"]), mask["forget"])
        retain = activation_mse(h["retain"], goal, mask["retain"])
    else:
        for part in batch:
            nll[part], n[part] = every_position(model, batch[part])
        retain = nll["retain"].sum() / n["retain"].sum()
        forget = {"GradDiff": lambda: -nll["forget"].sum() / n["forget"].sum(), "NPO": lambda: npo_loss(nll["forget"], before["forget"], s["beta"]),
                  "SimNPO": lambda: simnpo_loss(nll["forget"], n["forget"], s["beta"], s["delta"]),
                  "IdkDPO": lambda: dpo_loss(nll["alternate"], before["alternate"], nll["forget"], before["forget"], s["beta"])}[method]()
    forget, retain = forget * share.get("forget", 1), retain * share.get("retain", 1)
    return MethodLoss(s["gamma"] * forget + s["alpha"] * retain, {"forget": forget, "retain": retain})


@contextmanager
def plainly() -> Iterator[None]:
    """In this context `train` trains the plain way; everything else about a run, its batches too, is the same."""
    with (patch.object(Method, "loss", plain_loss),
          patch("openunlearn_nb.training.trainer.MethodTrainer.training_step", Trainer.training_step),
          patch.object(Method, "needs_reference", property(lambda self: self.name in ("NPO", "IdkDPO", "RMU", "UNDIAL"))),
          patch("openunlearn_nb.training.pairs.with_ref_nll", lambda model, examples, **_: examples),
          patch("openunlearn_nb.training.pairs.collate", lambda examples, pad_id, side: collate(examples, pad_id, "right"))):
        yield


@torch.no_grad()
def plain_scores(model, examples: list[dict], pad_id: int, moments: bool) -> Iterator[TokenScores]:
    """Batches of 32 rows in their order, logits at every position."""
    for start in range(0, len(examples), ROWS):
        batch = {k: v.to(model.device) for k, v in collate(examples[start:start + ROWS], pad_id, "right").items()}
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits[:, :-1].float()
        labels = batch["labels"][:, 1:]
        logps, hits = logits.log_softmax(-1), logits.argmax(-1) == labels
        columns = [logps.gather(2, labels.clamp(min=0)[..., None])[..., 0], hits]
        if moments:
            mean = (logps.exp() * logps).sum(-1)
            columns += [mean, (logps.exp() * (logps - mean[..., None]).square()).sum(-1)]
        for i, labelled in enumerate(labels != -100):
            yield TokenScores(*(column[i][labelled].cpu().numpy() for column in columns)) if labelled.any() else NOTHING


@torch.no_grad()
def plain_generate(model, tokenizer, prompts: list[list[int]], max_new_tokens: int, batch_size: int, stop: tuple[str, ...], temperature: float = 0.0) -> list[str]:
    """Batches of 32 prompts in their order, by transformers' generate."""
    texts, device = [], model.device
    for start in range(0, len(prompts), ROWS):
        batch = collate([{"input_ids": p, "labels": p} for p in prompts[start:start + ROWS]], tokenizer.pad_token_id)
        ids = model.generate(batch["input_ids"].to(device), attention_mask=batch["attention_mask"].to(device), do_sample=False, use_cache=True,
                             max_new_tokens=max_new_tokens, stop_strings=list(stop) or None, tokenizer=tokenizer, pad_token_id=tokenizer.pad_token_id)
        texts += tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1]:], skip_special_tokens=True)
    return [text[:min((k for s in stop if (k := text.find(s)) >= 0), default=None)] for text in texts]


def plain_score(results: ModelResults, where: str, parts: set[str], moments: bool) -> None:
    """Takes the place of the package's `_score`; wrong answers are scored one column at a time, each with its question."""
    pad_id, tokenizer = results.enc.tokenizer.pad_token_id, results.enc.tokenizer
    for part in parts:
        with results.usage.during("tokenising"):
            examples = results.benchmark.scored(where, part, results.enc)
        with results.usage.during("scoring"):
            columns = [list(plain_scores(results.model, list(column), pad_id, moments)) for column in zip(*examples)]
        scored = [[ScoredRow(s, e, tokenizer) for s, e in zip(scores, row)] for scores, row in zip(zip(*columns), examples)]
        results.rows[where, part] = [{"answers": row} if part == "perturbed" else row[0] for row in scored]
    if moments:
        results.rows[where, "moments"] = results.rows[where, "answer"]


def plain_evaluate(model, enc, benchmark, split: str, retain_eval: dict | None, metrics: list[str], classifier: str, usage: Usage) -> dict[str, dict]:
    """As `compute_entries`, with results of its own for every metric."""
    table, out, context = metric_table(benchmark), {}, Context(retain_eval or {}, classifier)
    one_by_one = lambda enc, pairs: [{k: v for k, v in encode(enc.tokenizer, q, a, enc.fmt, enc.max_length).items() if k != "n"} for q, a in pairs]
    results = "openunlearn_nb.evaluation.model_results"
    with (patch("openunlearn_nb.data.benchmark.encode_all", one_by_one), patch(f"{results}.generate", side_effect=plain_generate) as generates,
          patch(f"{results}._score", side_effect=plain_score) as scores):
        for name in needed(benchmark, wanted(benchmark, metrics)):
            line = table[name]
            if line.metric.takes == "entries":
                out[name] = combined_entry(line, [out[i] for i in line.entries], context)
            else:
                out[name] = compute_entries(ModelResults(model, enc, benchmark, usage=usage), split, [name], context)[name]
    assert scores.called and generates.called, "a part of the plain way was not used; the package has changed"
    return dict(sorted(out.items()))
