"""Every method's loss and gradient against plain PyTorch, written here from the equations: in fp32, at two batch sizes, padded on
either side, with the retain batch longer or shorter than the forget batch; and the reference code's arithmetic (`compat`)."""

import copy

import pytest
import torch
import torch.nn.functional as F

from openunlearn_nb.internals.errors import OpenUnlearnError
from openunlearn_nb.models.tiny import tiny_llama, train_tokenizer
from openunlearn_nb.methods.method import METHODS, method_loss
from openunlearn_nb.data.encoding import collate

TWELVE = ["GradAscent", "GradDiff", "IdkDPO", "NPO", "SimNPO", "RMU", "UNDIAL", "AltPO", "SatImp", "WGA", "CEU", "PDU"]
LAYER = {"module_regex": r"model\.layers\.1"}


@pytest.fixture(scope="module")
def models():
    tokenizer = train_tokenizer(["a few words, so that there is a vocabulary"], 300)
    model, reference = (tiny_llama(tokenizer, hidden=32, layers=3, seed=seed) for seed in (0, 1))
    for m in (model, reference):  # logits of an untrained model are all but equal: make them differ
        torch.nn.init.normal_(m.model.embed_tokens.weight, std=0.1)
    return model, reference.requires_grad_(False)


def batch_of(rows: int, side: str, longer: str) -> dict:
    rng = torch.Generator().manual_seed(rows)
    draw = lambda low, high: int(torch.randint(low, high, (), generator=rng))
    def part(answer, n):
        examples = []
        for _ in range(n):
            prompt, size = draw(3, 9), draw(*answer)
            ids = torch.randint(5, 270, (prompt + size,), generator=rng).tolist()
            examples.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
        return collate(examples, 0, side)
    short, long = (3, 8), (12, 20)
    return {"forget": part(short if longer == "retain" else long, rows), "retain": part(long if longer == "retain" else short, rows),
            "alternate": part(short, rows)}


def full_logits(model, part):
    positions = (part["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return model(input_ids=part["input_ids"], attention_mask=part["attention_mask"], position_ids=positions).logits


def nlls(model, part):
    """A list of token losses for every row."""
    logits = full_logits(model, part)
    return [torch.stack([-F.log_softmax(logits[i, t - 1], -1)[row[t]] for t in range(1, len(row)) if row[t] != -100])
            for i, row in enumerate(part["labels"])]


def total(row):
    return row.double().sum()  # differences of sums of hundreds of nats are wanted to six digits


def activations(model, part):
    positions = (part["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return model(input_ids=part["input_ids"], attention_mask=part["attention_mask"], position_ids=positions,
                 output_hidden_states=True).hidden_states[2]  # what layer 1 gives


def mean_nll(model, part):
    return torch.cat(nlls(model, part)).mean()


def predicting(model, part):
    """Logits and ids at every labelled token, row by row."""
    logits = full_logits(model, part)
    where = [(i, t) for i, row in enumerate(part["labels"]) for t in range(1, len(row)) if row[t] != -100]
    return torch.stack([logits[i, t - 1] for i, t in where]), torch.stack([part["labels"][i, t] for i, t in where])


def expected(name, model, ref, batch, s):
    forget, retain = batch["forget"], batch["retain"]
    kept = lambda: s["alpha"] * mean_nll(model, retain)
    if name in ("GradAscent", "GradDiff"):
        return -s["gamma"] * mean_nll(model, forget) + (kept() if s["alpha"] else 0)
    if name in ("IdkDPO", "AltPO"):
        reward = lambda part: torch.stack([-(total(a) - total(b)) for a, b in zip(nlls(model, part), nlls(ref, part))])
        margin = s["beta"] * (reward(batch["alternate"]) - reward(forget))
        return -s["gamma"] * 2 / s["beta"] * -F.softplus(-margin).mean() + kept()
    if name == "NPO":
        margin = torch.stack([total(a) - total(b) for a, b in zip(nlls(model, forget), nlls(ref, forget))])
        return s["gamma"] * -2 / s["beta"] * -F.softplus(-s["beta"] * margin).mean() + kept()
    if name == "SimNPO":
        margin = torch.stack([a.mean() - s["delta"] for a in nlls(model, forget)])
        return s["gamma"] * -2 / s["beta"] * -F.softplus(-s["beta"] * margin).mean() + kept()
    if name == "RMU":
        def far(part, goal):
            h, rows = activations(model, part), []
            for i, row in enumerate(part["labels"]):
                tokens = [t for t in range(len(row)) if row[t] != -100]
                rows.append(sum(((h[i, t] - goal(i, t)) ** 2).mean() for t in tokens) / len(tokens))
            return sum(rows) / len(rows)
        before = activations(ref, retain)
        return (s["gamma"] * far(forget, lambda i, t: s["steering_coeff"] * s["control_vec"])
                + s["alpha"] * far(retain, lambda i, t: before[i, t]))
    if name == "UNDIAL":
        (z, y), (teacher, _) = predicting(model, forget), predicting(ref, forget)
        goal = torch.softmax(teacher - s["beta"] * F.one_hot(y, z.shape[1]), -1)
        return s["gamma"] * -(goal * F.log_softmax(z, -1)).sum(-1).mean() + (kept() if s["alpha"] else 0)
    if name in ("SatImp", "WGA"):
        loss = torch.cat(nlls(model, forget))
        p = torch.exp(-loss).detach()
        weight = p ** s["beta"] if name == "WGA" else p ** s["beta1"] * (1 - p) ** s["beta2"]
        return -s["gamma"] * (weight * loss).mean() + kept()
    if name == "CEU":
        logits, terms = full_logits(model, forget), []
        for i, row in enumerate(forget["labels"]):
            for t in [t for t in range(len(row)) if row[t] != -100][s["ignore_first_n_answer_tokens"]:]:
                z = logits[i, t - 1].detach().clone()
                z[row[t]] = -torch.inf
                terms.append(-(torch.softmax(z, -1) * F.log_softmax(logits[i, t - 1], -1)).sum())
        return s["gamma"] * torch.stack(terms).mean() + (kept() if s["alpha"] else 0)
    z, _ = predicting(model, forget)  # PDU
    return s["gamma"] * ((z.max(-1).values - z.mean(-1)) ** 2).mean() + s["alpha"] * (mean_nll(model, retain) - s["retain_loss_eps"])


OTHER = {  # settings away from the defaults, so that every one of them is seen to matter
    "GradDiff": dict(gamma=0.7, alpha=1.3), "IdkDPO": dict(beta=0.3, alpha=0.5), "AltPO": dict(beta=0.05), "NPO": dict(beta=0.2, gamma=2.0),
    "SimNPO": dict(beta=2.5, delta=0.4, gamma=0.5), "RMU": dict(steering_coeff=5.0, alpha=3.0), "UNDIAL": dict(beta=3.0, alpha=0.5),
    "SatImp": dict(beta1=2.0, beta2=0.5), "WGA": dict(beta=0.5), "CEU": dict(ignore_first_n_answer_tokens=2, alpha=0.5),
    "PDU": dict(retain_loss_eps=0.3, alpha=2.0)}


def same(model, loss, goal, rel=1e-6, grad=1e-5, size=0.0):
    """`size`: of the terms, where they cancel each other and the loss is small beside them."""
    weights = list(model.parameters())
    ours, theirs = (torch.cat([torch.zeros(p.numel()) if g is None else g.flatten() for p, g in
                               zip(weights, torch.autograd.grad(x, weights, allow_unused=True))]) for x in (loss, goal))
    assert loss.item() == pytest.approx(goal.item(), rel=rel, abs=max(1e-9, rel * size))
    assert ((ours - theirs).norm() / theirs.norm()).item() < grad


@pytest.mark.parametrize("longer", ["retain", "forget"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("name", TWELVE)
def test_loss_and_gradient_equal_the_equation(name, rows, side, longer, models):
    model, reference = models
    batch = batch_of(rows, side, longer)
    for own in ({}, OTHER.get(name, {})):
        own = own | (LAYER | {"control_vec": torch.linspace(0, 1, 32)} if name == "RMU" else {})
        s = METHODS[name].merge(own)
        loss, parts = method_loss(name, model, batch, reference, **own)
        same(model, loss, expected(name, model, reference, batch, s), size=max(abs(v.item()) for v in parts.values()))
        assert set(parts) == {"forget"} | ({"retain"} if s["alpha"] else set())


@pytest.mark.parametrize("side", ["left", "right"])
def test_kl_retain_term(side, models):
    model, reference = models
    batch = batch_of(8, side, "retain")
    (z, _), (ref, _) = predicting(model, batch["retain"]), predicting(reference, batch["retain"])
    kl = (ref.softmax(-1) * (ref.log_softmax(-1) - z.log_softmax(-1))).sum(-1).mean()
    same(model, method_loss("GradDiff", model, batch, reference, retain_loss_type="KL").parts["retain"], kl)


def test_all_twelve_are_there_and_take_an_alias(models):
    model, reference = models
    batch = batch_of(1, "left", "retain")
    assert set(METHODS) == {*TWELVE, "Finetune"}
    assert method_loss("DPO", model, batch, reference).loss == method_loss("IdkDPO", model, batch, reference).loss


def plain(model, part):
    return model(input_ids=part["input_ids"], attention_mask=part["attention_mask"]).logits


@pytest.mark.parametrize("rows", [1, 8])
def test_compat_gives_the_reference_codes_numbers(rows, models):
    """Means over prompts and padding (UNDIAL, KL), a [rows, rows] quotient (RMU), a mask one position late (PDU); all else unchanged."""
    model, reference = models
    batch = batch_of(rows, "right", "retain")
    forget, retain = batch["forget"], batch["retain"]
    compat = lambda name, **own: method_loss(name, model, batch, reference, compat="open-unlearning", **own)

    teacher, labels = plain(reference, forget)[:, :-1].clone(), forget["labels"][:, 1:]
    for i in range(len(labels)):
        for t in range(labels.shape[1]):
            teacher[i, t, labels[i, t]] -= 10.0  # -100 counts from the vocabulary's end
    each = -(teacher.softmax(-1) * plain(model, forget)[:, :-1].log_softmax(-1)).sum(-1)
    same(model, compat("UNDIAL").loss, each.mean())

    ref = plain(reference, retain).log_softmax(-1)
    kl = (ref.exp() * (ref - plain(model, retain).log_softmax(-1))).sum() / retain["labels"].numel()
    same(model, compat("NPO", retain_loss_type="KL").parts["retain"], kl)

    u, mask = torch.linspace(-1, 1, 32), forget["labels"] != -100
    sums = (((activations(model, forget) - 2 * u) ** 2) * mask[..., None]).mean(2).sum(1)
    same(model, compat("RMU", **LAYER, control_vec=u).parts["forget"], (sums / mask.sum(1, keepdim=True)).mean())

    z = plain(model, forget)
    flat = (z.max(-1).values - z.mean(-1)) ** 2
    same(model, compat("PDU").parts["forget"], (flat * mask).sum() / mask.sum())

    for name in set(TWELVE) - {"UNDIAL", "RMU", "PDU"}:
        assert compat(name).loss == method_loss(name, model, batch, reference).loss


def test_padding_and_order_change_nothing(models):
    model, reference = models
    left, right = batch_of(8, "left", "retain"), batch_of(8, "right", "retain")
    turned = {name: {k: v.flip(0) for k, v in part.items()} for name, part in left.items()}
    for name in TWELVE:
        own = LAYER if name == "RMU" else {}
        losses = [method_loss(name, model, batch, reference, **own).loss.item() for batch in (left, right, turned)]
        assert losses == pytest.approx([losses[0]] * 3, rel=2e-6), name


def test_cached_reference_equals_live_reference(models):
    model, reference = models
    batch = batch_of(8, "left", "forget")
    live = method_loss("AltPO", model, batch, reference).loss
    cached = copy.deepcopy(batch)
    for part in ("forget", "alternate"):
        cached[part]["ref_nll"] = torch.stack([total(row) for row in nlls(reference, batch[part])])
    assert method_loss("AltPO", model, cached).loss.item() == pytest.approx(live.item(), rel=1e-6)


def test_rmu_stops_the_forward_at_its_layer(models):
    model, reference = models
    reached = []
    handles = [layer.register_forward_hook(lambda *_, i=i: reached.append(i)) for i, layer in enumerate(model.model.layers)]
    method_loss("RMU", model, batch_of(1, "left", "retain"), reference, module_regex=r"model\.layers\.0")
    for handle in handles:
        handle.remove()
    assert set(reached) == {0}


def other_vocabulary(model):
    return tiny_llama(train_tokenizer(["x"], 262), hidden=16, layers=1)


@pytest.mark.parametrize("spoil, settings, message", [
    (lambda b: b["forget"].update(labels=torch.full_like(b["forget"]["labels"], -100)), {}, "forget part of the batch has no labelled token"),
    (lambda b: b["retain"].update(labels=torch.full_like(b["retain"]["labels"], -100)), {}, "retain part of the batch has no labelled token"),
    (lambda b: b["forget"].update(labels=b["forget"]["labels"][:, 1:]), {}, r"labels of the forget part has the shape \[8, \d+\]"),
    (lambda b: b.pop("retain"), {}, "no 'retain' part; it has forget, alternate"),
    (lambda b: b["forget"].pop("attention_mask"), {}, "forget part of the batch has no attention_mask"),
    (lambda b: None, {"beta": 0}, "beta must be above 0, not 0"),
    (lambda b: None, {"bita": 1}, "Unknown setting of NPO 'bita'; did you mean beta"),
    (lambda b: None, {"compat": "paper"}, "Unknown compat 'paper'"),
])
def test_a_wrong_batch_or_setting_is_one_sentence(spoil, settings, message, models):
    model, reference = models
    batch = batch_of(8, "left", "retain")
    spoil(batch)
    with pytest.raises(OpenUnlearnError, match=message):
        method_loss("NPO", model, batch, reference, **settings)


def test_a_wrong_reference_or_layer_is_one_sentence(models):
    model, reference = models
    batch = batch_of(1, "left", "retain")
    for name, ref, own, message in [
        ("NPO", other_vocabulary(model), {}, "vocabulary of 26. tokens and the model one of 2"), ("UNDIAL", None, {}, "UNDIAL needs the model before"),
        ("RMU", reference, {"module_regex": "model.layers"}, "names a container"), ("RMU", reference, {"module_regex": r"model\.layers\.9"}, "matches no modules"),
        ("RMU", reference, {"module_regex": r"model\.layers\.\d"}, "matches 3 modules"), ("GradDiff", None, {"retain_loss_type": "KL"}, "KL needs the model before"),
        ("RMU", reference, LAYER | {"control_vec": torch.ones(5)}, "control_vec has 5 entries and the layer 32"),
    ]:
        with pytest.raises(OpenUnlearnError, match=message):
            method_loss(name, model, batch, ref, **own)
