"""Every kind of architecture, tiny and random: trained three ways, scored, asked, saved and loaded again; against forwards of single rows."""

import copy

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from openunlearn_nb.models.generation import generate
from openunlearn_nb.models.loading import load_model
from openunlearn_nb.models.saving import save_model
from openunlearn_nb.models.tiny import train_tokenizer
from openunlearn_nb.training.pairs import TrainConfig
from openunlearn_nb.models.scoring import score
from openunlearn_nb.training.trainer import train

WIDTHS = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=128
)
GROUPED = WIDTHS | dict(num_key_value_heads=2)
HEADS = GROUPED | dict(head_dim=8)
WINDOWS = dict(sliding_window=6)
MAMBA = dict(hidden_size=32, num_hidden_layers=2, state_size=8, time_step_rank=4)
MAMBA2 = dict(hidden_size=32, num_hidden_layers=2, state_size=8, num_heads=8, head_dim=8, n_groups=2, chunk_size=8)
EXPERTS = GROUPED | dict(num_local_experts=4, num_experts_per_tok=2)
NEXT = HEADS | dict(
    layer_types=["linear_attention", "full_attention"],
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    shared_expert_intermediate_size=16,
)
RWKV = dict(hidden_size=32, attention_hidden_size=32, intermediate_size=64, num_hidden_layers=2, context_length=128)
JAMBA = GROUPED | dict(
    attn_layer_period=2,
    attn_layer_offset=1,
    expert_layer_period=2,
    expert_layer_offset=1,
    num_experts=4,
    num_experts_per_tok=2,
    mamba_d_state=8,
    mamba_dt_rank=4,
    use_mamba_kernels=False,
)
LAYER = r"model\.layers\.0"
CASES = {  # model type: its configuration, and a layer for RMU
    "llama": (GROUPED, LAYER),
    "qwen2": (GROUPED, LAYER),
    "qwen3": (HEADS, LAYER),
    "gemma2": (HEADS | WINDOWS | dict(query_pre_attn_scalar=8), LAYER),
    "gemma3_text": (
        HEADS | WINDOWS | dict(layer_types=["sliding_attention", "full_attention"], query_pre_attn_scalar=8),
        LAYER,
    ),
    "mistral": (GROUPED | WINDOWS, LAYER),
    "phi3": (GROUPED | dict(pad_token_id=0), LAYER),
    "gpt2": (dict(n_embd=32, n_layer=2, n_head=4, n_positions=128), r"transformer\.h\.0"),
    "gpt_neox": (WIDTHS, r"gpt_neox\.layers\.0"),
    "opt": (
        dict(
            hidden_size=32,
            ffn_dim=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=128,
            word_embed_proj_dim=32,
        ),
        r"model\.decoder\.layers\.0",
    ),
    "olmo": (GROUPED, LAYER),
    "olmo2": (GROUPED, LAYER),
    "mixtral": (EXPERTS, LAYER),
    "qwen3_next": (NEXT, LAYER),
    "jamba": (JAMBA, LAYER),
    "rwkv": (RWKV, r"rwkv\.blocks\.0"),
    "mamba": (MAMBA, r"backbone\.layers\.0"),
    "mamba2": (MAMBA2, r"backbone\.layers\.0"),
}
RECIPE = TrainConfig(epochs=2, effective_batch=4, learning_rate=3e-3, warmup_epochs=0)
TOKENIZER = train_tokenizer(["some words to begin with, and some more words to end with"] * 3, 300)
PAD = TOKENIZER.pad_token_id


def made(kind):
    """A tiny random model whose greedy answers vary."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        kind, **CASES[kind][0], vocab_size=len(TOKENIZER), bos_token_id=1, eos_token_id=1
    )
    config.pad_token_id = PAD
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, p in model.named_parameters():
        if p.dim() > 1 and "conv" not in name:
            torch.nn.init.normal_(p, std=0.15)
    return model


def examples(n, seed=0):
    """`n` rows that begin with the same ten tokens, of lengths that differ."""
    g = torch.Generator().manual_seed(seed)
    stem = torch.randint(4, len(TOKENIZER), (10,), generator=torch.Generator().manual_seed(5)).tolist()
    rows = [stem + torch.randint(4, len(TOKENIZER), (5 + 3 * i,), generator=g).tolist() for i in range(n)]
    return [{"input_ids": row, "labels": [-100] * 12 + row[12:]} for row in rows]


@pytest.fixture(params=CASES, scope="module")
def case(request):
    return request.param, made(request.param), CASES[request.param][1]


@torch.no_grad()
def logits_alone(model, ids):
    return model(torch.tensor([ids])).logits[0].float()


@pytest.mark.checks(
    area="Models",
    given="any of 18 architectures, from Llama to mixtures of experts and Mamba, scored",
    then="scores are those of single rows, to 1e-5",
)
def test_scores_are_those_of_single_rows(case):
    _, model, _ = case
    rows = examples(5)
    for row, scored in zip(rows, score(model, rows, PAD)):
        logps = logits_alone(model, row["input_ids"]).log_softmax(-1)
        wanted = [logps[t - 1, row["input_ids"][t]] for t in range(12, len(row["input_ids"]))]
        assert torch.allclose(torch.tensor(scored.logps), torch.stack(wanted), atol=1e-5)


@pytest.mark.checks(
    area="Models",
    given="any of 18 architectures, from Llama to mixtures of experts and Mamba, evaluated",
    then="answers are those of step-by-step greedy decoding",
)
def test_answers_are_those_of_step_by_step_greedy(case):
    _, model, _ = case
    prompts = [row["input_ids"] for row in examples(3)]
    said = generate(model, TOKENIZER, prompts, max_new_tokens=8)
    for prompt, text in zip(prompts, said):
        ids = list(prompt)
        for _ in range(8):
            ids.append(int(logits_alone(model, ids)[-1].argmax()))
            if ids[-1] == TOKENIZER.eos_token_id:
                break
        assert text == TOKENIZER.decode(ids[len(prompt) :], skip_special_tokens=True)


@pytest.mark.checks(
    area="Models",
    given="any of 18 architectures, from Llama to mixtures of experts and Mamba, trained",
    then="it is trained (NPO, LoRA, RMU), saved and loaded again with equal logits",
)
@pytest.mark.parametrize("method, lora", [("NPO", None), ("NPO", 4), ("RMU", None)], ids=["NPO", "LoRA", "RMU"])
def test_it_is_trained_saved_and_loaded(case, tmp_path, method, lora):
    kind, model, layer = case
    rows = examples(4, 1)
    settings = {"module_regex": layer} if method == "RMU" else {}
    before = logits_alone(model, rows[0]["input_ids"])
    recipe = TrainConfig(**(vars(RECIPE) | {"lora": lora}))
    trained, losses = train(copy.deepcopy(model), PAD, method, rows, examples(4, 2), recipe, settings)
    after = logits_alone(trained, rows[0]["input_ids"])
    assert torch.isfinite(torch.tensor(losses)).all() and not torch.allclose(before, after, atol=1e-3)
    again = load_model(str(save_model(trained, TOKENIZER, tmp_path / "model")))
    assert torch.allclose(logits_alone(again, rows[0]["input_ids"]), after, atol=1e-5)
