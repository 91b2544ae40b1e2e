"""Every method on one batch: independent of padding side, of batch order, and pushing the right way."""

import copy

import pytest
import torch

from openunlearn_nb.methods import method_loss, sequence_nll
from openunlearn_nb.models import tiny_llama, train_tokenizer
from openunlearn_nb.prompts import PROMPTS, Encoder, collate, encode_all
from openunlearn_nb.tofu import Tofu, load_refusals, load_tofu

SETTINGS = {"RMU": {"module_regex": r"model\.layers\.1"}}


@pytest.fixture(scope="module")
def world():
    forget, retain = load_tofu("forget01")[:8], load_tofu("retain99")[:8]
    tokenizer = train_tokenizer([r["question"] + r["answer"] for r in forget + retain], 500)
    encoded = lambda pairs: encode_all(Encoder(tokenizer, PROMPTS["chat"]), pairs)
    parts = {
        "forget": encoded([(r["question"], r["answer"]) for r in forget]),
        "retain": encoded([(r["question"], r["answer"]) for r in retain]),
        "alternate": encoded([(r["question"], idk) for r, idk in zip(forget, load_refusals())]),
    }
    model, reference = (tiny_llama(tokenizer, hidden=32, layers=2, seed=s).double() for s in (0, 1))
    return tokenizer, parts, model, reference


def batch_of(parts, pad, order=slice(None), side="left"):
    return {name: collate(examples[order], pad, side) for name, examples in parts.items()}


def loss_and_grad(name, model, batch, reference):
    model = copy.deepcopy(model)
    loss, _ = method_loss(name, model, batch, reference, **SETTINGS.get(name, {}))
    loss.backward()
    return loss.item(), model.model.layers[0].mlp.up_proj.weight.grad


@pytest.mark.parametrize("name", Tofu.methods)
def test_padding_side_and_order_change_nothing(name, world):
    tokenizer, parts, model, reference = world
    pad = tokenizer.pad_token_id
    loss, grad = loss_and_grad(name, model, batch_of(parts, pad), reference)
    for batch in (batch_of(parts, pad, side="right"), batch_of(parts, pad, slice(None, None, -1))):
        other, other_grad = loss_and_grad(name, model, batch, reference)
        assert other == pytest.approx(loss, rel=1e-6)
        assert torch.allclose(other_grad, grad, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("name", Tofu.methods)
def test_a_step_moves_the_right_way(name, world):
    """Down the gradient, the loss falls; for all but RMU (which works on activations) the forget NLL rises."""
    tokenizer, parts, model, _ = world
    batch, model, reference = batch_of(parts, tokenizer.pad_token_id), copy.deepcopy(model), copy.deepcopy(model)
    settings = SETTINGS.get(name, {}) | ({"alpha": 0.0} if name != "RMU" else {})
    nll = lambda: sequence_nll(model, batch["forget"])[0].sum().item()
    loss, before = method_loss(name, model, batch, reference, **settings)[0], nll()
    loss.backward()
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None:
                p -= 1e-3 * p.grad / p.grad.norm().clamp(min=1e-12)
    assert method_loss(name, model, batch, reference, **settings)[0] < loss
    if name != "RMU":
        assert nll() > before


def test_cached_reference_equals_live_reference(world):
    tokenizer, parts, model, reference = world
    batch = batch_of(parts, tokenizer.pad_token_id)
    live = method_loss("IdkDPO", model, batch, reference)[0]
    for part in ("forget", "alternate"):
        batch[part]["ref_nll"] = sequence_nll(reference, batch[part])[0].detach()
    assert torch.allclose(method_loss("IdkDPO", model, batch)[0], live)


def test_kl_retain_term_by_hand(world):
    tokenizer, parts, model, reference = world
    batch = batch_of(parts, tokenizer.pad_token_id)
    part = method_loss("NPO", model, batch, reference, retain_loss_type="KL")[1]["retain"]
    kls = []
    for e in parts["retain"]:
        ids = torch.tensor([e["input_ids"]])
        p, q = (m(ids).logits[0].float().log_softmax(-1) for m in (reference, model))
        kls += [(p[t].exp() * (p[t] - q[t])).sum() for t in range(ids.shape[1] - 1) if e["labels"][t + 1] != -100]
    assert part.item() == pytest.approx(torch.stack(kls).mean().item(), rel=1e-4)
    assert method_loss("NPO", model, batch, model, retain_loss_type="KL")[1]["retain"].item() == pytest.approx(0, abs=1e-7)


def test_rmu_stops_the_forward_at_its_layer(world):
    tokenizer, parts, model, reference = world
    reached = []
    handles = [layer.register_forward_hook(lambda *_, i=i: reached.append(i)) for i, layer in enumerate(model.model.layers)]
    method_loss("RMU", model, batch_of(parts, tokenizer.pad_token_id), reference, module_regex=r"model\.layers\.0")
    for handle in handles:
        handle.remove()
    assert set(reached) == {0}
