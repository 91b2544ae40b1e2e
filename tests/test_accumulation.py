"""One optimizer step does not depend on how its rows are divided into forwards."""

import copy

import pytest
import torch

from openunlearn_nb.models.tiny import tiny_llama, train_tokenizer
from openunlearn_nb.methods.method import METHODS, method, method_loss
from openunlearn_nb.training.pairs import TrainConfig, collate_parts
from openunlearn_nb.training.trainer import train

SETTINGS = {"RMU": {"module_regex": r"model\.layers\.0"}, "PDU": {"retain_loss_eps": 0.3, "dual_warmup_epochs": 0.0},
            "CEU": {"ignore_first_n_answer_tokens": 2}}


def example(seed: int, answer: int) -> dict:
    """Three tokens of a question and `answer` of an answer."""
    ids = torch.randint(5, 270, (3 + answer,), generator=torch.Generator().manual_seed(seed)).tolist()
    return {"input_ids": ids, "labels": [-100] * 3 + ids[3:]}


FORGET = [example(i, n) for i, n in enumerate([2, 31, 5, 1, 17, 40, 3, 8, 26, 4, 12])]  # 11 rows: the last step has 3 of 8
RETAIN = [example(100 + i, n) for i, n in enumerate([22, 1, 9, 35, 3, 14])]
ALTERNATES = [[example(200 + i, 1 + i % 5) for i in range(11)]]


@pytest.fixture(scope="module")
def start():
    tokenizer = train_tokenizer(["a few words, so that there is a vocabulary"], 300)
    model = tiny_llama(tokenizer, hidden=16, layers=2)
    torch.manual_seed(0)
    torch.nn.init.normal_(model.model.embed_tokens.weight, std=0.3)  # logits of an untrained model are all but equal
    return model


def trained(start, method: str, rows: int, compat: str | None = None, effective: int = 8, **settings):
    """The losses of two steps of plain gradient descent with `rows` a forward, and by how much they moved the weights."""
    recipe = TrainConfig(learning_rate=0.1, epochs=1, effective_batch=effective, batch_size=rows, warmup_epochs=0, schedule="constant",
                         weight_decay=0, optim="sgd", gradient_checkpointing=False)
    forget = [] if method == "Finetune" else FORGET
    made = train(copy.deepcopy(start), 0, method, forget, RETAIN * 2 if method == "Finetune" else RETAIN, recipe,
                 SETTINGS.get(method, {}) | settings, ALTERNATES, compat=compat)
    moved = [(a - b).detach().flatten() for a, b in zip(made.model.parameters(), start.parameters())]
    return made.losses, torch.cat(moved)


def assert_same(one, other):
    (losses, moved), (other_losses, other_moved) = one, other
    assert other_losses == pytest.approx(losses, rel=1e-5, abs=1e-6)
    assert ((other_moved - moved).norm() / moved.norm()).item() < 1e-4


@pytest.mark.checks(area="Training", given="a step of 8 rows, cut into forwards of 8, 2 or 1 rows (answers of 1 to 40 tokens, a last step of 3 rows)",
                    then="the same losses and the same weights, with every method")
@pytest.mark.parametrize("name", METHODS)
def test_the_step_does_not_depend_on_the_rows_of_a_forward(name, start):
    whole = trained(start, name, 8)
    for rows in (2, 1):
        assert_same(whole, trained(start, name, rows))


@pytest.mark.checks(area="Training", given="the same, with the KL retain term, or PDU's multiplier moved after each epoch",
                    then="the same losses and the same weights")
@pytest.mark.parametrize("name, settings", [("NPO", {"retain_loss_type": "KL"}), ("PDU", {"dual_update_upon": "epoch"})])
def test_retain_terms_and_multiplier_are_of_the_effective_batch(name, settings, start):
    assert_same(trained(start, name, 8, **settings), trained(start, name, 1, **settings))


@pytest.mark.checks(area="Training", given="compat with open-unlearning", then="the mean of the forwards' means, as in the reference code: the rows of a "
                    "forward matter to means over tokens")
def test_compat_takes_the_mean_of_means(start):
    losses, moved = trained(start, "GradAscent", 1, "open-unlearning", effective=11)
    with torch.no_grad():
        each = [method_loss("GradAscent", start, collate_parts([{"forget": e}], 0, "open-unlearning")).loss.item() for e in FORGET]
    assert losses[0] == pytest.approx(sum(each) / len(each), rel=1e-5)
    whole = trained(start, "GradAscent", 11, effective=11)
    assert losses[0] != pytest.approx(whole[0][0], rel=1e-3) and torch.cosine_similarity(moved, whole[1], 0) < 0.999


@pytest.mark.checks(area="Training", given="a method of your own", then="its scalar counts as a mean over rows; one declared `mean_over=labelled_tokens`, over tokens")
def test_a_scalar_of_ones_own_is_a_mean_over_rows_unless_it_says_otherwise(start, monkeypatch):
    def longest(model, batch, ref_model, s):
        "No mean over tokens, and not of this package."
        mask = batch["forget"]["attention_mask"]
        logits = model(input_ids=batch["forget"]["input_ids"], attention_mask=mask).logits
        return logits[torch.arange(len(mask)), mask.sum(1) - 1].square().mean(-1).mean()
    monkeypatch.setattr(METHODS, "_objects", dict(METHODS))
    method("Own", alpha=0.0)(longest)
    assert_same(trained(start, "Own", 8), trained(start, "Own", 1))


@pytest.mark.checks(area="Training", given="`method_loss` of one batch, by hand",
                    then="the mean over this batch; with `counts` of several, their mean is that of all rows at once")
def test_a_batch_without_counts_is_a_whole_one(start):
    items = [{"forget": e, "retain": RETAIN[i % 6]} for i, e in enumerate(FORGET[:4])]
    whole, pieces = collate_parts(items, 0), [collate_parts([item], 0) for item in items]
    counts = {term: n / 4 for term, n in METHODS["GradDiff"]().counts(whole).items()}
    with torch.no_grad():
        loss = method_loss("GradDiff", start, whole).loss.item()
        means = [method_loss("GradDiff", start, piece).loss.item() for piece in pieces]
        weighed = [method_loss("GradDiff", start, piece | {"counts": counts}).loss.item() for piece in pieces]
    assert sum(weighed) / 4 == pytest.approx(loss, rel=1e-5) and sum(means) / 4 != pytest.approx(loss, rel=1e-2)
