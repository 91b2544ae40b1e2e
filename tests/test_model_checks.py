"""A model that is not what its files say is an error before anything is computed with it; tokenizers fit their models; adapters lose nothing."""

import copy
import json
import shutil
import warnings

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from openunlearn_nb.models.adapters import AdapterOff, adapted_layers, merge_adapter, with_adapter
from openunlearn_nb.training.deepspeed_state import whole_model
from openunlearn_nb.internals.errors import OpenUnlearnError
from openunlearn_nb.models.forwards import sequence_nll
from openunlearn_nb.models.generation import end_ids, generate
from openunlearn_nb.models.checks import check_finite, non_finite_weights, stored_types
from openunlearn_nb.models.loading import load_model, load_tokenizer
from openunlearn_nb.models.saving import save_model
from openunlearn_nb.models.tiny import tiny_llama, train_tokenizer
from openunlearn_nb.models.tokenizers import fit_tokenizer
from openunlearn_nb.training.pairs import TrainConfig
from openunlearn_nb.models.prefixes import can_share_prefixes, respects_padding_mask
from openunlearn_nb.data.encoding import collate
from openunlearn_nb.models.scoring import score
from openunlearn_nb.training.trainer import train

IDS = torch.tensor([[5, 9, 17, 30, 8, 44]])
SMALL = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=128
)
WINDOW = SMALL | dict(num_key_value_heads=2, head_dim=8, sliding_window=6)
EXPERTS = SMALL | dict(num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2)
SHARED_EXPERT = SMALL | dict(
    num_key_value_heads=2,
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    shared_expert_intermediate_size=16,
    decoder_sparse_step=1,
)
MAMBA = dict(hidden_size=32, num_hidden_layers=2, state_size=8, time_step_rank=4)
GPT2 = dict(n_embd=32, n_layer=2, n_head=4, n_positions=128)
RWKV = dict(hidden_size=32, attention_hidden_size=32, intermediate_size=64, num_hidden_layers=2, context_length=128)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["some words to begin with"], 300)


@pytest.fixture(scope="module")
def saved(tokenizer, tmp_path_factory):
    """The folder of a small, sound model."""
    return save_model(tiny_llama(tokenizer, 32, 2), tokenizer, tmp_path_factory.mktemp("models") / "sound")


@pytest.fixture
def changed(saved, tmp_path):
    """Makes a copy of the sound model with other weights, or another config."""

    def make(weights=lambda stored: stored, **config):
        folder = shutil.copytree(saved, tmp_path / "changed")
        save_file(weights(load_file(folder / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})
        about = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(about | config))
        return str(folder)

    return make


def random_model(kind, **config):
    """A random model whose answers vary."""
    torch.manual_seed(0)
    how = dict(vocab_size=300, bos_token_id=1, eos_token_id=1, pad_token_id=0)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(kind, **how | config)
    ).eval()
    for name, p in model.named_parameters():
        if p.dim() > 1 and "conv" not in name:
            torch.nn.init.normal_(p, std=0.15)
    return model


@pytest.mark.checks(
    area="Models",
    given="weights saved out of torch.compile, DataParallel or FSDP",
    then="read under their own names, with a warning",
)
@pytest.mark.parametrize(
    "wrapped",
    [
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: name.replace("mlp.", "mlp._orig_mod."),
    ],
    ids=["compile", "parallel", "both", "inner"],
)
def test_names_of_a_wrapper_are_mended(saved, changed, tokenizer, tmp_path, wrapped):
    path = changed(lambda stored: {wrapped(name): weight for name, weight in stored.items()})
    with pytest.warns(UserWarning, match="under the names of a wrapper"):
        model = load_model(path)
    sound = load_model(str(saved)).state_dict()
    assert all(torch.equal(weight, sound[name]) for name, weight in model.state_dict().items())
    assert set(stored_types(str(save_model(model, tokenizer, tmp_path / "again")))) == set(
        stored_types(str(saved))
    )  # saved as it should be


def without(part):
    return lambda stored: {name: weight for name, weight in stored.items() if part not in name}


def put(name, value):
    def change(stored):
        stored[name].view(-1)[3] = value
        return stored

    return change


def as_int8(stored):
    return {name: (100 * weight).to(torch.int8) if weight.dim() > 1 else weight for name, weight in stored.items()}


@pytest.mark.checks(
    area="Models",
    given="weights that are missing, left over, of another shape, integers, NaN or infinite",
    then="an error at load that names them",
)
@pytest.mark.parametrize(
    "weights, config, told",
    [
        (without("layers.1.mlp.up_proj"), {}, r"lack 1 of the weights .* \(model.layers.1.mlp.up_proj.weight\)"),
        (dict, {"num_hidden_layers": 3}, "lack 9 of the weights"),
        (dict, {"num_hidden_layers": 1}, "hold 9 weights that its config.json has no place for"),
        (dict, {"intermediate_size": 100}, r"another shape .* \[32, 88\] in the file and \[32, 100\] by the config"),
        (
            lambda stored: {f"encoder.{name}": weight for name, weight in stored.items()},
            {},
            "lack .* and hold 20 others",
        ),
        (as_int8, {}, "stored as integers .* no quantization_config"),
        (
            put("model.layers.1.mlp.up_proj.weight", float("nan")),
            {},
            r"1 of its weights hold NaN or infinity \(model.layers.1.mlp.up_proj.weight\)",
        ),
        (put("model.norm.weight", float("inf")), {}, "NaN or infinity"),
    ],
    ids=["missing", "more layers", "fewer layers", "shape", "prefix", "int8", "nan", "inf"],
)
def test_weights_that_are_not_the_models_are_errors(changed, weights, config, told):
    with pytest.raises(OpenUnlearnError, match=told):
        load_model(changed(weights, **config))


@pytest.mark.checks(
    area="Models", given="tied weights stored twice, and buffers of older versions", then="loaded without a warning"
)
def test_what_is_no_weight_is_no_error(changed):
    def more(stored):
        embeddings = stored["model.embed_tokens.weight"]
        return stored | {
            "lm_head.weight": embeddings.clone(),
            "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        }

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_model(changed(more), torch.bfloat16)


@pytest.mark.checks(
    area="Models", given="an encoder, such as BERT", then="an error at load: it sees what comes after a token"
)
@pytest.mark.parametrize("std", [0.02, 0.2])
def test_an_encoder_is_no_language_model(tokenizer, tmp_path, std):
    config = transformers.BertConfig(**SMALL, vocab_size=len(tokenizer), initializer_range=std)
    folder = str(save_model(transformers.BertLMHeadModel(config), tokenizer, tmp_path / "bert"))
    with pytest.raises(OpenUnlearnError, match="BertLMHeadModel sees what comes after a token"):
        load_model(folder)
    config.is_decoder = True
    assert load_model(str(save_model(transformers.BertLMHeadModel(config), tokenizer, tmp_path / "decoder")))


@pytest.mark.checks(
    area="Models",
    given="an index or a config that names a .bin, or a file outside the model's folder",
    then="refused before anything is read",
)
@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "../sound/model.safetensors", "/etc/model.safetensors", "a\\model.safetensors", 7]
)
def test_an_index_leads_nowhere_else(changed, monkeypatch, name):
    path = changed()
    index = {"metadata": {}, "weight_map": {"model.norm.weight": name}}
    with open(f"{path}/model.safetensors.index.json", "w") as file:
        json.dump(index, file)
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("torch has read a file"))
    with pytest.raises(OpenUnlearnError, match="must be a \\*.safetensors in the model's own folder"):
        load_model(path)


def test_a_config_leads_nowhere_else(changed):
    with pytest.raises(OpenUnlearnError, match="its config.json names the file of weights 'adapter_model.bin'"):
        load_model(changed(transformers_weights="adapter_model.bin"))


@pytest.mark.checks(
    area="Models",
    given="a model in several files, which are links (as in the Hub's cache)",
    then="loaded as one file is",
)
def test_files_may_be_links(saved, tmp_path):
    blobs, folder = tmp_path / "blobs", tmp_path / "snapshot"
    load_model(str(saved)).save_pretrained(blobs, max_shard_size="60KB")
    folder.mkdir()
    for file in blobs.iterdir():
        (folder / file.name).symlink_to(file)
    assert len(list(folder.glob("*.safetensors"))) > 1
    model = load_model(str(folder))
    assert torch.equal(model.lm_head.weight, load_model(str(saved)).lm_head.weight)


@pytest.mark.checks(
    area="Models", given="a model to save whose weights are NaN or infinite", then="an error, and nothing is written"
)
def test_weights_that_are_not_finite_are_not_saved(tokenizer, tmp_path):
    model = tiny_llama(tokenizer, 32, 2)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(OpenUnlearnError, match=r"not saved .*\(model.norm.weight\)"):
        save_model(model, tokenizer, tmp_path / "model")
    assert not list(tmp_path.iterdir())
    with torch.device("meta"):
        assert non_finite_weights(tiny_llama(tokenizer, 32, 2)) == []  # what is not here is not looked at


def test_a_shards_padding_is_not_looked_at():
    """ZeRO-3's last shard may end in memory that nobody wrote."""
    layer = torch.nn.Linear(1, 1, bias=False)
    layer.weight.ds_id, layer.weight.ds_numel, layer.weight.ds_tensor = (
        0,
        3,
        torch.tensor([1.0, 2.0, 3.0, float("nan")]),
    )
    check_finite(layer, "x")
    layer.weight.ds_tensor[2] = float("inf")
    with pytest.raises(OpenUnlearnError, match="x: 1 of its weights"):
        check_finite(layer, "x")


@pytest.mark.checks(
    area="Models",
    given="a tokenizer without eos or pad",
    then="the eos of the model's config is taken, for padding too; without one, an error",
)
def test_a_tokenizer_without_eos(tokenizer):
    mute = copy.deepcopy(tokenizer)
    mute.eos_token = mute.pad_token = None
    model = tiny_llama(tokenizer, 32, 1)
    model.generation_config.eos_token_id = [999, 1]
    fitted = fit_tokenizer(mute, model)
    assert (fitted.eos_token_id, fitted.pad_token_id) == (1, 1)
    mute.eos_token = model.generation_config.eos_token_id = model.config.eos_token_id = None
    with pytest.raises(OpenUnlearnError, match="has no end-of-sequence token"):
        fit_tokenizer(mute, model)


@pytest.mark.checks(
    area="Models",
    given="a pad or eos token that was added to the tokenizer and not to the model",
    then="another token takes its place",
)
def test_tokens_beyond_the_embeddings(tokenizer):
    model = tiny_llama(tokenizer, 32, 1)
    wide = copy.deepcopy(tokenizer)
    wide.add_special_tokens({"pad_token": "[PAD]", "eos_token": "[END]"})
    assert wide.pad_token_id >= len(tokenizer)
    fitted = fit_tokenizer(wide, model)
    assert (fitted.eos_token_id, fitted.pad_token_id) == (tokenizer.eos_token_id, tokenizer.eos_token_id)


@pytest.mark.checks(
    area="Models",
    given="text with tokens that the model has no embedding for",
    then="one sentence, before the first forward",
)
def test_ids_without_an_embedding(tokenizer):
    model = tiny_llama(tokenizer, 32, 1)
    row = {"input_ids": [5, 6, len(tokenizer)], "labels": [-100, 6, len(tokenizer)]}
    for ask in (
        lambda: score(model, [row], 0),
        lambda: generate(model, tokenizer, [row["input_ids"]]),
        lambda: train(model, 0, "GradAscent", [row], []),
    ):
        with pytest.raises(
            OpenUnlearnError, match=f"the id {len(tokenizer)}, and the model has embeddings for {len(tokenizer)}"
        ):
            ask()


@pytest.mark.checks(
    area="Models",
    given="an eos of the tokenizer and others of the generation config",
    then="each of them ends an answer",
)
def test_both_eos_end_an_answer(tokenizer):
    model = random_model("llama", **SMALL, vocab_size=len(tokenizer))
    prompt = [10, 11, 12]
    said = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, 3),
        do_sample=False,
        max_new_tokens=12,
        pad_token_id=0,
        eos_token_id=None,
    )[0, 3:].tolist()
    ends = sorted(set(said), key=said.index)
    assert len(ends) > 3
    asked = copy.deepcopy(tokenizer)
    for theirs, ours, stop in [
        (ends[3], ends[2], ends[2]),
        (ends[2], ends[3], ends[2]),
        ([299, ends[2]], ends[3], ends[2]),
        (None, ends[1], ends[1]),
    ]:
        model.generation_config.eos_token_id = theirs
        model.config.eos_token_id = None
        asked.eos_token = asked.convert_ids_to_tokens(ours)
        assert ours in end_ids(model, asked)
        cut = said[: said.index(stop) + 1]
        assert generate(model, asked, [prompt], max_new_tokens=12) == asked.batch_decode(
            [cut], skip_special_tokens=True
        )


def test_ends_of_the_published_models():
    """Llama-2: one token; Llama-3-Instruct: the end of a turn, which is the tokenizer's eos, is among those of its generation config. Nothing moves there."""
    model = random_model("llama", **SMALL)
    for named, eos in ((2, 2), ([128001, 128008, 128009], 128009)):
        model.generation_config.eos_token_id = named
        before = set(named if isinstance(named, list) else [named])
        assert end_ids(model, type("Tokenizer", (), {"eos_token_id": eos})) == before


ADAPTED = {
    "gpt2": (GPT2, "transformer.h.0.attn.c_attn.weight"),
    "mixtral": (EXPERTS, "model.layers.0.mlp.experts.gate_up_proj"),
    "qwen2_moe": (SHARED_EXPERT, "model.layers.0.mlp.shared_expert.gate_proj.weight"),
    "mamba": (MAMBA, "backbone.layers.0.mixer.in_proj.weight"),
}


@pytest.mark.checks(
    area="Models",
    given="GPT-2's Conv1D layers, experts or Mamba blocks, to adapt (--lora)",
    then="adapted, and merging loses nothing",
)
@pytest.mark.parametrize("kind", ADAPTED)
def test_an_adapter_is_merged_whole(kind):
    model = random_model(kind, **ADAPTED[kind][0])
    before = model(IDS).logits
    names = adapted_layers(model, [".*"])
    assert ADAPTED[kind][1] in names and set(names) <= {name for name, _ in model.named_parameters()}
    adapted = with_adapter(copy.deepcopy(model), 4).eval()
    assert torch.allclose(adapted(IDS).logits, before, atol=1e-6)
    for name, p in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.05)
    after = adapted(IDS).logits
    assert not torch.allclose(after, before, atol=1e-2) and torch.allclose(
        AdapterOff(adapted)(input_ids=IDS).logits, before, atol=1e-6
    )
    assert torch.allclose(whole_model(adapted)(IDS).logits, after, atol=1e-5)
    merged = merge_adapter(adapted)
    assert torch.allclose(merged(IDS).logits, after, atol=1e-5)
    assert [name for name, _ in merged.named_parameters()] == [name for name, _ in model.named_parameters()]
    moved = {
        name
        for (name, p), (_, old) in zip(merged.named_parameters(), model.named_parameters())
        if not torch.equal(p, old)
    }
    assert moved == set(names)


def test_nothing_to_adapt_is_told():
    with pytest.raises(
        OpenUnlearnError, match="matches no weight of a linear layer or an expert of GPT2LMHeadModel.*--lora 0"
    ):
        with_adapter(random_model("gpt2", **GPT2), 4, [r".*ln_1\.weight"])


@pytest.mark.checks(
    area="Models",
    given="a model that reads padding as tokens, such as RWKV",
    then="each row is trained on and answered as if it were the only one",
)
def test_a_model_that_does_not_heed_the_mask(tokenizer):
    model = random_model("rwkv", **RWKV)
    assert not respects_padding_mask(model) and not can_share_prefixes(model) and respects_padding_mask(random_model("llama", **SMALL))
    prompts = [[5, 6, 7, 8, 9], [5, 6], [11, 12]]
    assert generate(model, tokenizer, prompts, max_new_tokens=6) == [
        generate(model, tokenizer, [p], max_new_tokens=6)[0] for p in prompts
    ]
    rows = [{"input_ids": p + [20 + n], "labels": [-100] * len(p) + [20 + n]} for n, p in enumerate(prompts)]
    alone = sum(sequence_nll(model, collate([row], 0))[0] for row in rows).item() / len(rows)
    first = train(
        copy.deepcopy(model),
        0,
        "GradAscent",
        rows,
        [],
        TrainConfig(epochs=1, effective_batch=4, gradient_checkpointing=False),
    ).losses[0]
    assert first == pytest.approx(-alone, abs=1e-4)


@pytest.mark.parametrize(
    "kind, config",
    [
        ("mpt", dict(d_model=32, n_layers=2, n_heads=4, max_seq_len=128)),
        (
            "gpt_neo",
            dict(
                hidden_size=32,
                num_layers=2,
                num_heads=4,
                attention_types=[[["global", "local"], 1]],
                max_position_embeddings=128,
                window_size=6,
            ),
        ),
        ("gemma2", WINDOW | dict(query_pre_attn_scalar=8)),
    ],
)
def test_a_model_that_counts_columns_shares_no_prefix(tokenizer, kind, config):
    """A shared prefix, then padding, then the rest of a row: windows and biases that count columns would see it farther away."""
    model = random_model(kind, **config)
    stem = [*range(10, 20)]
    prompts = [stem + [30, 31], stem + [32, 33, 34, 35, 36, 37, 38, 39]]
    assert not can_share_prefixes(model)
    assert generate(model, tokenizer, prompts, max_new_tokens=8) == [
        generate(model, tokenizer, [p], max_new_tokens=8)[0] for p in prompts
    ]


@pytest.mark.checks(
    area="Models",
    given="a model whose text configuration is nested (Gemma 3 with a vision tower)",
    then="scored, generated from and trained as other models are",
)
@pytest.mark.parametrize("lora", [None, 4])
def test_a_nested_text_configuration(tokenizer, tmp_path, lora):
    torch.manual_seed(0)
    text = transformers.Gemma3TextConfig(
        **WINDOW,
        layer_types=["sliding_attention", "full_attention"],
        query_pre_attn_scalar=8,
        vocab_size=len(tokenizer),
        bos_token_id=1,
        eos_token_id=1,
        pad_token_id=0,
    )
    vision = dict(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    config = transformers.Gemma3Config(
        text_config=text.to_dict(),
        vision_config=vision,
        mm_tokens_per_image=4,
        boi_token_index=2,
        image_token_index=len(tokenizer) - 1,
        eoi_token_index=3,
    )
    model = load_model(
        str(save_model(transformers.AutoModelForCausalLM.from_config(config), tokenizer, tmp_path / "gemma"))
    )
    assert not hasattr(model.config, "hidden_size")
    rows = [{"input_ids": [9, 10, 11, 12 + n], "labels": [-100, -100, 11, 12 + n]} for n in range(4)]
    how = TrainConfig(epochs=1, effective_batch=4, learning_rate=3e-3, warmup_epochs=0, lora=lora)
    settings = {"module_regex": r"model\.language_model\.layers\.0"}
    trained = train(copy.deepcopy(model), 0, "RMU", rows, rows, how, settings).model
    assert not torch.equal(trained(IDS % 200).logits, model(IDS % 200).logits)
    assert len(score(trained, rows, 0)) == 4 and len(generate(trained, tokenizer, [[9, 10]], max_new_tokens=3)) == 1


def test_the_tokenizer_of_a_folder_without_pad(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "m")
    about = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(
        json.dumps({k: v for k, v in about.items() if k not in ("pad_token", "eos_token")})
    )
    assert load_tokenizer(str(folder)).eos_token_id is None
