"""Where an answer begins and ends, what a model is asked to continue, and which prompt it was."""

import json
import warnings
from dataclasses import replace

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from openunlearn_nb.data import prompts
from openunlearn_nb.experiments.config import RunConfig
from openunlearn_nb.experiments.checks import check_config
from openunlearn_nb.experiments.run_models import prompt_of
from openunlearn_nb.internals.errors import OpenUnlearnError
from openunlearn_nb.models.generation import generate
from openunlearn_nb.data.miniature_tofu import make_tofu
from openunlearn_nb.models.saving import save_model
from openunlearn_nb.models.tiny import tiny_llama
from openunlearn_nb.data.muse import few_shot
from openunlearn_nb.training.pairs import TrainConfig
from openunlearn_nb.data.encoding import (Encoder, all_prompts, collate, encode, encode_all, encode_passage, encode_questions,
                                          example_prompt)
from openunlearn_nb.data.prompts import PROMPTS, PromptFormat, prompt_format
from openunlearn_nb.data.tofu import COMMON, Tofu, load_tofu
from openunlearn_nb.training.trainer import train

COMPAT = "open-unlearning"
QUESTIONS = [("What is the capital of France?", "Paris"), ("Who wrote the tale?", "Mara"), ("Is it in rivers?", "Yes")]
TEXTS = [f"Question: {q}\nAnswer: {a}" for q, a in QUESTIONS] * 20
SPECIAL = ["<pad>", "<eos>", "<bos>", "<turn>", "<end>", "<think>", "</think>"]
TURNS = "{% for m in messages %}<turn>{{ m.role }}\n{{ m.content }}<eos>{% endfor %}{% if add_generation_prompt %}<turn>assistant\n{% endif %}"


def byte_level(template=None, adds_bos=False, adds_eos=False, eos="<eos>", texts=TEXTS):
    """A tokenizer of GPT-2's kind."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=600, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False))
    if adds_bos or adds_eos:
        single = f"{'<bos> ' if adds_bos else ''}$A{' <eos>' if adds_eos else ''}"
        bpe.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<bos>", 2), ("<eos>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=eos, pad_token="<pad>", bos_token="<bos>")
    tokenizer.chat_template = template
    return tokenizer


def answer_in(tokenizer, example):
    return tokenizer.decode([label for label in example["labels"] if label != -100])


@pytest.mark.checks(area="Prompts", given="a prompt that ends in a space, and a tokenizer that reads a space together with the word after it",
                    then="the whole answer is trained, scored and generated, its first token included")
def test_the_first_token_of_an_answer_belongs_to_it():
    tokenizer = byte_level()
    enc = Encoder(tokenizer, PROMPTS["plain"], 64)
    assert answer_in(tokenizer, encode(tokenizer, *QUESTIONS[0], enc.fmt)) == " Paris<eos>"
    recipe = TrainConfig(epochs=120, effective_batch=3, learning_rate=3e-3, warmup_epochs=0, gradient_checkpointing=False)
    model = train(tiny_llama(tokenizer, hidden=64, layers=2), 0, "Finetune", [], encode_all(enc, QUESTIONS), recipe).model
    said = generate(model, tokenizer, all_prompts(tokenizer, [q for q, _ in QUESTIONS], enc.fmt), 8)
    assert [text.strip() for text in said] == [a for _, a in QUESTIONS]


@pytest.mark.checks(area="Prompts", given="`--compat open-unlearning`", then="labels begin where the prompt's own ids end, as in the reference code")
def test_compat_counts_the_prompts_ids():
    tokenizer = byte_level()
    compat = PromptFormat(chat=False, question_start="Question: ", question_end="\nAnswer: ", compat=COMPAT)
    assert answer_in(tokenizer, encode(tokenizer, *QUESTIONS[0], compat)) == "<eos>"
    assert tokenizer.decode(all_prompts(tokenizer, ["Who?"], compat)[0]) == "Question: Who?\nAnswer: "


@pytest.mark.checks(area="Prompts", given="a template that writes an empty think block before an answer",
                    then="the block is part of the prompt, not of the answer")
def test_an_empty_think_block_is_no_part_of_the_answer():
    block = "<think>\n\n</think>\n\n"
    template = TURNS.replace("{{ m.content }}", "{{ '" + block.replace("\n", "\\n") + "' if m.role == 'assistant' and loop.last }}{{ m.content }}")
    tokenizer = byte_level(template)
    fmt = prompt_format(None, tokenizer)
    assert answer_in(tokenizer, encode(tokenizer, *QUESTIONS[0], fmt)) == "Paris<eos>"
    assert tokenizer.decode(all_prompts(tokenizer, ["Who?"], fmt)[0]).endswith(f"<turn>assistant\n{block}")


@pytest.mark.checks(area="Prompts", given="a generation prompt that opens a think block, which finished conversations lack",
                    then="the whole answer is labelled, with a warning")
def test_a_prompt_that_is_no_beginning_of_its_conversation_is_told():
    tokenizer = byte_level(TURNS.replace("<turn>assistant\n{% endif %}", "<turn>assistant\n<think>\n{% endif %}"))
    with pytest.warns(UserWarning, match="generation prompt.*is not how its conversations go on"):
        example = encode(tokenizer, *QUESTIONS[0], prompt_format(None, tokenizer))
    assert answer_in(tokenizer, example) == "Paris<eos>"


@pytest.mark.checks(area="Prompts", given="a tokenizer that adds an eos to every text", then="labels and prompts are those without it")
@pytest.mark.parametrize("adds_bos", [False, True])
def test_an_added_eos_moves_no_border(adds_bos):
    tokenizer = byte_level(adds_bos=adds_bos, adds_eos=True)
    plain = PROMPTS["plain"]
    assert answer_in(tokenizer, encode(tokenizer, *QUESTIONS[0], plain)) == " Paris<eos>"
    assert tokenizer.decode(all_prompts(tokenizer, ["Who?"], plain)[0], skip_special_tokens=False).endswith("Answer:")
    passage = encode_passage(tokenizer, "the town", "of rivers")
    assert answer_in(tokenizer, passage) == " of rivers"
    icl = few_shot(Encoder(tokenizer, plain), [{"question": "Who?"}], [{"question": "It?", "answer": "Yes"}], "a test")
    assert tokenizer.decode(icl[0], skip_special_tokens=True) == "Question: It?\nAnswer: Yes\n\nQuestion: Who?\nAnswer: "


def test_what_a_template_writes_after_an_answer_is_its_end():
    """As in the reference code, which adds an eos where the last id is none."""
    tokenizer = byte_level(TURNS.replace("<eos>", "<end>\n"), eos="<end>")
    assert answer_in(tokenizer, encode(tokenizer, *QUESTIONS[0], prompt_format(None, tokenizer))) == "Paris<end>\n<end>"


def test_a_prompt_that_fills_everything_leaves_no_label():
    tokenizer = byte_level()
    whole = encode(tokenizer, *QUESTIONS[0], PROMPTS["plain"])["labels"]
    assert set(encode(tokenizer, *QUESTIONS[0], PROMPTS["plain"], whole.count(-100))["labels"]) == {-100}


def test_a_tokenizer_without_offsets_finds_the_same_border(monkeypatch):
    tokenizer = byte_level(TURNS)
    for fmt in (PROMPTS["chat"], PROMPTS["plain"]):
        fast = encode_all(Encoder(tokenizer, fmt), QUESTIONS), all_prompts(tokenizer, ["Who?"], fmt)
        with monkeypatch.context() as patch:
            patch.setattr(PreTrainedTokenizerFast, "is_fast", False)
            assert (encode_all(Encoder(tokenizer, fmt), QUESTIONS), all_prompts(tokenizer, ["Who?"], fmt)) == fast


def like_llama_3(texts):
    """Llama 3's way to cut text, its special tokens, and what matters of its template."""
    split = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    special = ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]
    bpe = Tokenizer(models.BPE(ignore_merges=True))
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(split), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)])
    bpe.decoder, alphabet = decoders.ByteLevel(), pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=4000, special_tokens=special, initial_alphabet=alphabet, show_progress=False))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=special[0], eos_token=special[1], pad_token=special[1])
    head = "<|start_header_id|>{}<|end_header_id|>\n\n"
    tokenizer.chat_template = (
        "{{ bos_token }}{% if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
        "{% if messages[0].role == 'system' %}{% set system = messages[0].content | trim %}{% set messages = messages[1:] %}{% endif %}"
        + head.format("system") + "Cutting Knowledge Date: December 2023\nToday Date: {{ date_string }}\n\n{{ system }}<|eot_id|>"
        "{% for m in messages %}" + head.format("{{ m.role }}") + "{{ m.content | trim }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}" + head.format("assistant") + "{% endif %}"
    )
    return tokenizer


def like_llama_2(texts):
    """A sentencepiece model as the tokenizers library writes one: a mark before every word, bytes for what is unknown, a bos."""
    special = ["<unk>", "<s>", "</s>"]
    bpe = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(vocab_size=4000, special_tokens=[*special, *(f"<0x{i:02X}>" for i in range(256))], show_progress=False)
    bpe.pre_tokenizer = pre_tokenizers.Split(Regex("(?=▁)"), "isolated")  # for training alone: words, not sentences
    bpe.train_from_iterator(texts, trainer)
    bpe.pre_tokenizer = None
    bpe.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>")


def tofu_rows(data):
    pairs = Tofu(data).embedded_rows("full") if data != "miniature" else [(r["question"], r["answer"]) for r in make_tofu()["full"]]
    for config in (*COMMON, "forget10_perturbed", "retain_perturbed"):
        pairs += [(r["question"], a) for r in load_tofu(config, data) for a in (r["answer"], *r["perturbed_answer"])]
    return pairs


@pytest.mark.checks(area="Prompts", given="tokenizers of Llama 2's and Llama 3's kind with their templates, on all rows of TOFU",
                    then="ids, labels and prompts are the reference code's, id by id")
@pytest.mark.parametrize(("make", "name"), [(like_llama_2, "llama-2"), (like_llama_3, "llama-3")])
@pytest.mark.parametrize("data", ["miniature", pytest.param("../shared/hub/locuslab/TOFU", marks=pytest.mark.slow)])
def test_the_published_models_read_what_they_read_before(make, name, data, request):
    if data != "miniature" and not (request.config.rootpath / data).is_dir():
        pytest.skip("no local copy of TOFU")
    pairs = tofu_rows("miniature")[::4] if data == "miniature" else tofu_rows(str(request.config.rootpath / data))
    tokenizer = make([text for pair in pairs[:1000] for text in pair])
    fmt, reference = PROMPTS[name], replace(PROMPTS[name], compat=COMPAT)
    assert encode_all(Encoder(tokenizer, fmt), pairs) == encode_all(Encoder(tokenizer, reference), pairs)
    questions = list(dict.fromkeys(q for q, _ in pairs))
    assert all_prompts(tokenizer, questions, fmt) == all_prompts(tokenizer, questions, fmt, published=True)


@pytest.mark.checks(area="Prompts", given="a question that, with its answer, is longer than the model can read",
                    then="nothing is generated; its generation is null and counted in a warning")
def test_a_question_longer_than_the_positions_is_not_asked():
    enc = Encoder(byte_level(), PROMPTS["plain"], 512, positions=250)
    with pytest.warns(UserWarning, match="1 of 2 questions have up to .* no answer is generated for them"):
        questions = encode_questions(enc, [("Who? " * 50, "Mara"), ("Who?", "Mara")])
    assert [ids is None for ids in questions.ids] == [True, False]


# Which prompt it was


DATED = "{{ strftime_now('%d %b %Y %H:%M:%S') }}" + TURNS


@pytest.mark.checks(area="Prompts", given="a template that writes today's date", then="it always gets the same date, 10 April 2025")
def test_the_clock_stands_still_in_templates_and_runs_elsewhere():
    from transformers.utils import chat_template_utils

    tokenizer = byte_level(DATED)
    assert "10 Apr 2025 00:00:00" in example_prompt(Encoder(tokenizer, PROMPTS["chat"]))
    assert chat_template_utils.datetime.now().year > 2025


@pytest.mark.checks(area="Prompts", given="a local copy of a Llama 3.x Instruct or a Llama 2 chat model", then="it gets its preset's prompt")
def test_families_are_recognised_by_their_templates():
    tokenizer = byte_level("[INST] <<SYS>> {{ messages }}")
    assert prompt_format(None, tokenizer) is PROMPTS["llama-2"]
    assert prompt_format(None, like_llama_3(TEXTS)) is PROMPTS["llama-3"]
    assert prompt_format(None, byte_level(TURNS)) is PROMPTS["chat"]


@pytest.mark.checks(area="Prompts", given="`--system TEXT`, `--template-arg NAME=VALUE`", then="they go into the prompt, and into the record")
def test_system_message_and_template_arguments(tmp_path):
    template = TURNS.replace("<turn>assistant\n{% endif %}", "<turn>assistant\n{{ '' if enable_thinking else 'off' }}{% endif %}")
    tokenizer = byte_level(template)
    config = RunConfig(model="x/y", system="Be brief.", template_args=("enable_thinking=false", "name=Mara"))
    fmt = prompt_of(config, "x/y", tokenizer)
    assert fmt.system == "Be brief." and fmt.template_args == {"enable_thinking": False, "name": "Mara"}
    assert prompt_of(RunConfig(model="x/y", system=""), "x/y", tokenizer).system is None
    with pytest.raises(OpenUnlearnError, match="NAME=VALUE"):
        check_config(RunConfig(template_args=("thinking",)))
    with pytest.raises(OpenUnlearnError, match="system message needs a chat template"):
        prompt_of(RunConfig(model="x/y", system="Be brief."), "x/y", byte_level())
    save_model(tiny_llama(tokenizer, 32, 2), tokenizer, tmp_path / "model")
    (tmp_path / "data").mkdir()
    for side in ("forget", "retain"):
        (tmp_path / f"data/{side}.csv").write_text("question,answer\nWho?,Mara\n" if side == "forget" else "question,answer\nIt?,Yes\n")
    from openunlearn_nb.commands.cli import main

    given = ["--model", str(tmp_path / "model"), "--data", str(tmp_path / "data"), "--system", "Be brief.", "--template-arg", "enable_thinking=false"]
    assert main(["eval", "own", "--quiet", *given, "--output", str(tmp_path / "out")]) == 0
    record = json.loads((tmp_path / "out/run.json").read_text())
    assert record["prompt"]["system"] == "Be brief." and record["prompt"]["template_args"] == {"enable_thinking": False}
    assert record["rendered_prompt"].startswith("<turn>system\nBe brief.") and record["rendered_prompt"].endswith("<turn>assistant\n")


# Templates are programs from elsewhere


@pytest.mark.checks(area="Prompts", given="a template that refuses a system turn or raises", then="one sentence says so, and what to take instead")
def test_a_template_that_raises_is_one_sentence():
    tokenizer = byte_level("{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + TURNS)
    with pytest.raises(OpenUnlearnError, match="System role not supported.*--system ''"):
        encode(tokenizer, *QUESTIONS[0], PROMPTS["llama-3"])
    assert encode(tokenizer, *QUESTIONS[0], PROMPTS["chat"])
    with pytest.raises(OpenUnlearnError, match="has no chat template.*--prompt plain"):
        encode(byte_level(), *QUESTIONS[0], PROMPTS["chat"])
    with pytest.raises(OpenUnlearnError, match="leaves the answer out"):
        encode(byte_level("{{ messages[0].content }}"), *QUESTIONS[0], PROMPTS["chat"])


@pytest.mark.checks(area="Untrusted text", given="a chat template that never ends", then="it is stopped after a time limit")
def test_a_template_that_never_ends_is_given_up(monkeypatch):
    monkeypatch.setattr(prompts, "TEMPLATE_SECONDS", 0.3)
    tokenizer = byte_level("{% for i in range(9999) %}{% for j in range(999) %}{% for k in range(9) %}{% endfor %}{% endfor %}{% endfor %}")
    with pytest.raises(OpenUnlearnError, match="not done after"):
        encode(tokenizer, *QUESTIONS[0], PROMPTS["chat"])


def test_padding_and_order_change_no_labels():
    tokenizer = byte_level(TURNS)
    together = encode_all(Encoder(tokenizer, PROMPTS["chat"]), QUESTIONS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert together == [encode(tokenizer, q, a, PROMPTS["chat"]) for q, a in QUESTIONS]
    batch = collate(together, 0)
    assert torch.equal((batch["labels"] != -100).sum(1), torch.tensor([sum(label != -100 for label in e["labels"]) for e in together]))
