"""What a device can do decides precision and budgets. The devices are faked: no GPU was at hand when these were written."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from openunlearn_nb.experiments.config import RunConfig
from openunlearn_nb.experiments.run_models import open_model
from openunlearn_nb.experiments.unlearning import unlearn
from openunlearn_nb.internals import devices
from openunlearn_nb.models import generation, scoring
from openunlearn_nb.training import trainer as training
from openunlearn_nb.internals.errors import OpenUnlearnError
from openunlearn_nb.models.generation import generate
from openunlearn_nb.data.miniature_tofu import make_tofu
from openunlearn_nb.models.loading import load_model, quiet
from openunlearn_nb.models.saving import save_model
from openunlearn_nb.models.tiny import tiny_llama, train_tokenizer
from openunlearn_nb.training.pairs import TrainConfig
from openunlearn_nb.data.encoding import Encoder, encode_all
from openunlearn_nb.data.prompts import PROMPTS
from openunlearn_nb.models.scoring import score
from openunlearn_nb.training.memory import OPTIMIZERS
from openunlearn_nb.methods.method import METHODS, Method
from openunlearn_nb.training.trainer import in_evaluation_dtype, optimizer_of, train


@pytest.fixture(scope="module")
def tiny():
    """A tokenizer, forty encoded examples and an untrained model."""
    quiet()
    rows = [(r["question"], r["answer"]) for r in make_tofu()["forget10"]][:40]
    tokenizer = train_tokenizer([q + a for q, a in rows], 500)
    return tokenizer, encode_all(Encoder(tokenizer, PROMPTS["chat"], 64), rows), tiny_llama(tokenizer, hidden=64, layers=3)


def fake_gpu(monkeypatch, capability: tuple[int, int], name: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    devices._say_fp32.cache_clear()


def test_a_gpu_without_bf16_arithmetic_computes_in_fp32_and_says_so(monkeypatch):
    fake_gpu(monkeypatch, (7, 5), "Tesla T4")
    with pytest.warns(UserWarning, match=r"Tesla T4 \(compute capability 7\.5\) has no bf16 arithmetic of its own: everything is computed in fp32"):
        assert devices.evaluation_dtype() == torch.float32


def test_a_newer_gpu_computes_in_bf16(monkeypatch):
    fake_gpu(monkeypatch, (8, 0), "NVIDIA A100")
    assert devices.device_type() == "cuda" and devices.evaluation_dtype() == torch.bfloat16


def test_an_apple_gpu_is_used_in_fp32(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert devices.device_type() == "mps" and devices.evaluation_dtype() == torch.float32


def test_training_follows_the_precision_of_the_device(monkeypatch, tmp_path):
    assert not training.training_arguments(TrainConfig(), 32, str(tmp_path)).bf16
    monkeypatch.setattr(training, "computes_in_bf16", lambda: True)
    assert training.training_arguments(TrainConfig(), 32, str(tmp_path)).bf16


def test_without_bitsandbytes_a_gpu_takes_fused_adamw(monkeypatch):
    monkeypatch.setattr(training, "device_type", lambda: "cuda")
    monkeypatch.setattr(training.importlib.util, "find_spec", lambda name: None)
    assert optimizer_of(TrainConfig()) == "adamw_torch_fused" and optimizer_of(TrainConfig(optim="adafactor")) == "adafactor"
    assert optimizer_of(TrainConfig()) in OPTIMIZERS  # `plan` knows it


def test_an_epoch_is_evaluated_in_the_precision_of_the_last(tiny, monkeypatch):
    """What `look` sees after an epoch equals the model that a training of just that epoch leaves, rounded as it is for its evaluation."""
    tokenizer, examples, model = tiny
    monkeypatch.setattr(training, "evaluation_dtype", lambda: torch.bfloat16)
    recipe = dict(learning_rate=1e-3, effective_batch=8, batch_size=8, schedule="constant", warmup_epochs=0, gradient_checkpointing=False)
    seen = {}
    def look(epoch, shown):
        seen[epoch] = [s.logps for s in score(shown, examples[:8], tokenizer.pad_token_id)], next(shown.parameters()).dtype
    run = lambda epochs, look: train(copy.deepcopy(model), tokenizer.pad_token_id, "NPO", examples[:16], examples[16:], TrainConfig(epochs=epochs, **recipe),
                                     after_epoch=look).model
    after_two = run(2, look)
    last = [s.logps for s in score(in_evaluation_dtype(run(1, None)), examples[:8], tokenizer.pad_token_id)]
    values, dtype = seen[1]
    assert dtype == torch.bfloat16 and all((a == b).all() for a, b in zip(values, last))
    assert next(after_two.parameters()).dtype == torch.float32  # the masters are back
    undisturbed = run(2, None)
    assert all(map(torch.equal, after_two.parameters(), undisturbed.parameters()))


def test_the_reference_is_kept_in_the_precision_of_evaluation(tiny, monkeypatch):
    model = tiny[2]
    monkeypatch.setattr(training, "evaluation_dtype", lambda: torch.bfloat16)
    _, reference, _ = training.with_reference(copy.deepcopy(model), METHODS["UNDIAL"](), TrainConfig())
    assert {p.dtype for p in reference.parameters()} == {torch.bfloat16} and not any(p.requires_grad for p in reference.parameters())


def test_budgets_follow_the_free_memory_of_a_gpu(tiny, monkeypatch):
    model = tiny[2]
    sizes = {}
    for free in (2e9, 8e9):
        monkeypatch.setattr(generation, "free_memory", lambda device: free)
        monkeypatch.setattr(scoring, "free_memory", lambda device: free)
        sizes[free] = generation.cache_tokens(model), scoring.batch_tokens(model, 10 ** 9)
    assert all(large == pytest.approx(4 * small, rel=1e-3) for small, large in zip(sizes[2e9], sizes[8e9]))
    each_token = 2 * 3 * 64 * 4  # keys and values, three layers, 64 numbers of four bytes
    assert generation.cache_tokens(model) * each_token == pytest.approx(4e9, rel=1e-3)


def test_a_batch_that_does_not_fit_is_cut_in_two(tiny, monkeypatch):
    """Generation and scoring give what they give with memory enough."""
    tokenizer, examples, model = tiny
    prompts = [e["input_ids"][:12] for e in examples]
    texts, scores = generate(model, tokenizer, prompts, 8), score(model, examples, tokenizer.pad_token_id)
    greedy, batch_scores, sizes = generation.greedy, scoring.batch_scores, []

    def small(work, rows):
        sizes.append(rows)
        if rows > 7:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return work()

    monkeypatch.setattr(generation, "greedy", lambda model, some, *more: small(lambda: greedy(model, some, *more), len(some)))
    monkeypatch.setattr(scoring, "batch_scores", lambda model, inputs, labels, moments: small(lambda: batch_scores(model, inputs, labels, moments), len(labels)))
    assert generate(model, tokenizer, prompts, 8) == texts
    again = score(model, examples, tokenizer.pad_token_id)
    assert max(abs(a.logps - b.logps).max() for a, b in zip(again, scores)) < 1e-5
    assert max(sizes) > 7


def test_a_single_row_that_does_not_fit_is_an_error(tiny, monkeypatch):
    tokenizer, examples, model = tiny

    def never(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(generation, "greedy", never)
    with pytest.raises(OpenUnlearnError, match="Memory ran out with a single row in the batch: CUDA out of memory"):
        generate(model, tokenizer, [e["input_ids"][:12] for e in examples], 8)


def test_a_model_that_is_spread_over_devices_gives_the_same_numbers(tiny, tmp_path):
    """Two layers lie on the disk and are fetched for their turn, by the hooks that also move what goes from one GPU to the next."""
    tokenizer, examples, model = tiny
    save_model(model, tokenizer, tmp_path / "model")
    where = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk",
             "model.norm": "cpu", "lm_head": "cpu"}
    spread = AutoModelForCausalLM.from_pretrained(tmp_path / "model", device_map=where, offload_folder=str(tmp_path / "offload"), dtype=torch.float32)
    assert any(p.device.type == "meta" for p in spread.parameters())
    prompts = [e["input_ids"][:12] for e in examples[:10]]
    assert generate(spread, tokenizer, prompts, 8) == generate(model, tokenizer, prompts, 8)
    pairs = zip(score(spread, examples, tokenizer.pad_token_id), score(model, examples, tokenizer.pad_token_id))
    assert max(abs(a.logps - b.logps).max() for a, b in pairs) < 1e-5


def test_an_attention_is_chosen_by_its_name(tiny, tmp_path):
    tokenizer, examples, model = tiny
    save_model(model, tokenizer, tmp_path / "model")
    eager = load_model(str(tmp_path / "model"), attention="eager")
    assert eager.config._attn_implementation == "eager"
    pairs = zip(score(eager, examples, tokenizer.pad_token_id), score(model, examples, tokenizer.pad_token_id))
    assert max(abs(a.logps - b.logps).max() for a, b in pairs) < 1e-5
    with pytest.raises(OpenUnlearnError, match="Cannot load the model .*eagre"):
        load_model(str(tmp_path / "model"), attention="eagre")


def test_a_training_that_does_not_fit_says_what_would(tiny, monkeypatch):
    tokenizer, examples, model = tiny

    def never(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(Method, "loss", never)
    with pytest.raises(OpenUnlearnError, match="Memory ran out in training, with 4 rows a forward: give a smaller --per-device-batch"):
        train(copy.deepcopy(model), tokenizer.pad_token_id, "NPO", examples[:16], examples[16:], TrainConfig(epochs=1))


@pytest.mark.checks(area="Models", given="--dtype on a grid", then="Unlearned rows are measured in that precision, as Finetuned and Retain are.")
def test_an_unlearned_model_is_evaluated_in_the_precision_that_was_asked_for(tiny, tmp_path):
    tokenizer, _, model = tiny
    path = str(save_model(copy.deepcopy(model), tokenizer, tmp_path / "model"))
    config, seen = RunConfig(model=path, dtype="bfloat16", epochs=2, lora=0), []
    start = open_model(config, path, for_training=True)
    unlearned, _ = unlearn(config, "GradDiff", "forget01", *start, after_epoch=lambda epoch, model: seen.append(model.dtype))
    assert {unlearned.dtype, *seen, open_model(config, path, for_training=False)[0].dtype} == {torch.bfloat16}


def test_four_bit_weights_are_read_as_they_are_stored_on_every_processor(tmp_path, monkeypatch):
    """bitsandbytes rearranges them on a CPU with AVX512-BF16, which rounds scales, and fails for layers as small as these."""
    layers = pytest.importorskip("bitsandbytes.nn.modules")
    tokenizer = train_tokenizer(["a b c"], 300)
    save_model(tiny_llama(tokenizer, hidden=32, layers=1), tokenizer, tmp_path / "m")
    ids, found = torch.tensor([[1, 2, 3, 4]]), []
    for has in (False, True):
        monkeypatch.setattr(layers, "has_avx512bf16", lambda: has)
        with torch.no_grad():
            found.append(load_model(str(tmp_path / "m"), quantize="nf4")(ids).logits)
    assert torch.equal(*found)
