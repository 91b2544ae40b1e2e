"""Padding and attention in training: no padded position that may read nothing, no mask where none is needed, and no kernel of cuDNN's."""

import pytest
import torch

from openunlearn_nb.models.forwards import model_inputs
from openunlearn_nb.models.tiny import tiny_llama, train_tokenizer
from openunlearn_nb.training.pairs import TrainConfig, collate_parts
from openunlearn_nb.training.trainer import train

ROWS = [{"input_ids": [3, 4, 5], "labels": [-100, 4, 5]}, {"input_ids": [6, 7], "labels": [-100, 7]}]


def test_batches_are_padded_on_the_right():
    part = collate_parts([{"forget": row} for row in ROWS], 0)["forget"]
    assert part["input_ids"].tolist() == [[3, 4, 5], [6, 7, 0]]
    assert part["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]


@pytest.mark.parametrize("kind", [torch.long, torch.bool])
@pytest.mark.parametrize("mask, masked", [
    ([[1, 1, 1]], False), ([[1, 1, 0], [1, 0, 0]], False), ([[1, 1, 1], [0, 1, 1]], True), ([[1, 0, 1]], True),
])
def test_a_mask_is_given_where_a_token_would_read_padding(mask, masked, kind):
    mask = torch.tensor(mask, dtype=kind)
    inputs = model_inputs({"input_ids": torch.ones(mask.shape, dtype=torch.long), "attention_mask": mask})
    assert ("attention_mask" in inputs) == ("position_ids" in inputs) == masked


def test_the_reference_codes_mask_is_kept():
    """With `compat` it hides real ends of text, too."""
    part = collate_parts([{"forget": row} for row in ROWS], 5, "open-unlearning")["forget"]
    assert model_inputs(part)["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 0]]


@pytest.mark.parametrize("settings", [{}, {"gradient_checkpointing": True}])
def test_training_computes_without_cudnn_attention(monkeypatch, settings):
    """In the forward and in the backward, where checkpointing computes the forward once more; afterwards it may be used again."""
    seen = set()
    attention = torch.nn.functional.scaled_dot_product_attention

    def spy(*args, **kwargs):
        seen.add(torch.backends.cuda.cudnn_sdp_enabled())
        return attention(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    model = tiny_llama(train_tokenizer(["a b c"], 300), hidden=16, layers=1)
    config = TrainConfig(1e-3, 1, 2, 2, **{"gradient_checkpointing": False} | settings)
    train(model, 0, "GradDiff", ROWS, ROWS, config)
    assert seen == {False} and torch.backends.cuda.cudnn_sdp_enabled() == before
