"""`UnlearnTrainer` as TRL's users expect it: settings, evaluation, logs, checkpoints, callbacks, adapters."""

import copy
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from transformers import TrainerCallback
from transformers.trainer_utils import HPSearchBackend

from launching import run, script, torchrun

from openunlearn_nb import METHODS, UnlearnConfig, UnlearnTrainer, method, method_loss
from openunlearn_nb.internals.errors import OpenUnlearnError
from openunlearn_nb.models.loading import load_model, load_tokenizer
from openunlearn_nb.models.saving import save_model
from openunlearn_nb.models.tiny import tiny_llama, train_tokenizer

FORGET = [{"question": f"Who wrote book {i}?", "answer": f"Ada wrote book {i}, in spring."} for i in range(8)]
RETAIN = [{"prompt": f"When was {i}?", "completion": f"In the year {i}."} for i in range(8)]
TOKENIZER = train_tokenizer([" ".join(row.values()) for row in FORGET + RETAIN], 300)


def trainer(folder, method="NPO", method_args=None, data=None, **args) -> UnlearnTrainer:
    """A trainer of a tiny model, four rows a forward. `data`: what else the trainer is given, all but its arguments."""
    settings = dict(max_steps=4, per_device_train_batch_size=4, learning_rate=1e-3, report_to=[], disable_tqdm=True, use_cpu=True,
                    logging_steps=1, lr_scheduler_type="constant") | args
    given = dict(forget_dataset=FORGET, retain_dataset=RETAIN, processing_class=TOKENIZER) | (data or {})
    if not {"model", "model_init"} & set(given):
        given["model"] = tiny_llama(TOKENIZER, hidden=16, layers=2)
    return UnlearnTrainer(args=UnlearnConfig(output_dir=str(folder), method=method, method_args=method_args, **settings), **given)


def weights(model) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_defaults_are_merged_and_a_mistyped_setting_is_refused(tmp_path):
    given = {"beta": 0.05}
    made = trainer(tmp_path, method_args=given)
    assert made.method.settings == METHODS["NPO"].defaults | given and given == {"beta": 0.05} and not made.args.remove_unused_columns
    with pytest.raises(OpenUnlearnError, match="Unknown setting of NPO 'betta'; did you mean beta"):
        trainer(tmp_path, method_args={"betta": 0.1})


def test_a_batch_has_the_same_loss_before_and_after_train(tmp_path):
    made = trainer(tmp_path, learning_rate=0.0)
    batch = made.data_collator([made.train_dataset[0]])
    before = made.compute_loss(made.model, batch)
    made.train()
    assert made.compute_loss(made.model, batch) == before and made.evaluate()["eval_loss"] > 0


def test_the_callers_settings_stay_as_they_were(tmp_path):
    given = {"retain_loss_eps": 0.3, "dual_warmup_epochs": 0.0}
    made = trainer(tmp_path, method="PDU", method_args=given)
    made.train()
    assert given == {"retain_loss_eps": 0.3, "dual_warmup_epochs": 0.0} and made.method.multiplier != made.method.settings["alpha"]


def test_terms_and_own_numbers_are_logged(tmp_path):
    made = trainer(tmp_path, method="PDU", method_args={"retain_loss_eps": 0.3, "dual_warmup_epochs": 0.0}, gradient_accumulation_steps=2)
    made.train()
    entry = made.state.log_history[0]
    assert {"loss", "loss/forget", "loss/retain", "multiplier"} <= set(entry)


def test_callbacks_and_rows_to_evaluate(tmp_path):
    class Seen(TrainerCallback):
        steps = 0

        def on_step_end(self, args, state, control, **kwargs):
            self.steps += 1

    seen = Seen()
    made = trainer(tmp_path, data=dict(callbacks=[seen], eval_dataset={"forget": FORGET, "retain": RETAIN}))
    made.train()
    assert seen.steps == 4 and {"eval_forget_loss", "eval_retain_loss"} <= set(made.evaluate())


def test_an_interrupted_training_goes_on_from_the_newest_whole_checkpoint(tmp_path):
    how = dict(method="PDU", method_args={"retain_loss_eps": 0.3, "dual_warmup_epochs": 0.0}, save_strategy="epoch", max_steps=-1,
               num_train_epochs=3)
    whole = trainer(tmp_path / "whole", **how)
    whole.train()
    folder = tmp_path / "whole"
    assert {path.name for path in folder.iterdir()} == {"checkpoint-2", "checkpoint-4", "checkpoint-6"}
    (folder / "checkpoint-6/trainer_state.json").unlink()
    again = trainer(folder, **how)
    with pytest.warns(UserWarning, match="checkpoint-6 is not complete; it is passed over"):
        again.train(resume_from_checkpoint=True)
    assert torch.equal(weights(again.model), weights(whole.model)) and again.method.multiplier == whole.method.multiplier


def test_a_resume_without_an_optimizer_state_says_so(tmp_path):
    trainer(tmp_path, save_strategy="steps", save_steps=2).train()
    (tmp_path / "checkpoint-4/optimizer.pt").unlink()
    with pytest.warns(UserWarning, match="no optimizer state"):
        trainer(tmp_path, max_steps=6).train(resume_from_checkpoint=True)


def test_the_best_model_is_loaded_at_the_end(tmp_path):
    made = trainer(tmp_path, data=dict(eval_dataset=RETAIN), eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
                   load_best_model_at_end=True, metric_for_best_model="eval_loss", greater_is_better=False, save_total_limit=1)
    made.train()
    best = min(entry["eval_loss"] for entry in made.state.log_history if "eval_loss" in entry)
    assert made.evaluate()["eval_loss"] == pytest.approx(best) and Path(made.state.best_model_checkpoint).exists()


@pytest.mark.parametrize("method", ["NPO", "UNDIAL"])
def test_an_adapter_by_pefts_own_config(method, tmp_path):
    from peft import LoraConfig

    made = trainer(tmp_path, method=method, data=dict(peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"])))
    before = weights(made.model)
    made.train()
    assert not torch.equal(weights(made.model), before)
    assert all("lora" in name for name, p in made.model.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("method", ["GradDiff", "NPO", "RMU"])
def test_ten_steps_equal_a_loop_of_method_loss(method, tmp_path):
    """fp32, no dropout, one batch of all rows a step: the order of rows is no matter, and pairs are drawn alike."""
    own = {"module_regex": r"model\.layers\.1"} if method == "RMU" else {}
    start = tiny_llama(TOKENIZER, hidden=16, layers=2)
    model, reference, loop = copy.deepcopy(start), copy.deepcopy(start), copy.deepcopy(start)
    made = trainer(tmp_path, method=method, method_args=own, max_steps=10, per_device_train_batch_size=8, learning_rate=0.05, max_grad_norm=0.0,
                   data=dict(model=model, optimizers=(torch.optim.SGD(model.parameters(), lr=0.05), None)))
    data = copy.deepcopy(made.train_dataset)
    own |= made.method.memory  # RMU's control vector
    made.train()
    optimizer = torch.optim.SGD(loop.parameters(), lr=0.05)
    for epoch in range(10):
        data.set_epoch(epoch)
        batch = made.data_collator([data[i] for i in range(8)])
        optimizer.zero_grad()
        method_loss(method, loop, batch, reference, **own).loss.backward()
        optimizer.step()
    assert (weights(model) - weights(loop)).abs().max() < 1e-6 < (weights(model) - weights(start)).abs().max()


def test_tensorboard_gets_each_number_of_the_log(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    trainer(tmp_path, report_to="tensorboard").train()
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    assert {"train/loss", "train/loss/forget", "train/loss/retain"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("train/loss/forget")] == [1, 2, 3, 4]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a tiny model and its tokenizer."""
    return save_model(tiny_llama(TOKENIZER, hidden=16, layers=2), TOKENIZER, tmp_path_factory.mktemp("model") / "model")


def test_a_model_by_folder_with_its_own_tokenizer(folder, tmp_path):
    made = trainer(tmp_path, data=dict(model=str(folder), processing_class=None))
    made.train()
    made.save_model()
    assert torch.equal(weights(load_model(str(tmp_path))), weights(made.model)) and load_tokenizer(str(tmp_path)).get_vocab() == TOKENIZER.get_vocab()


def test_a_model_by_id_from_the_hubs_cache(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    stored = tmp_path / "models--someone--tiny"
    shutil.copytree(folder, stored / "snapshots" / ("0" * 40))
    (stored / "refs").mkdir()
    (stored / "refs/main").write_text("0" * 40)
    made = trainer(tmp_path / "out", data=dict(model="someone/tiny", processing_class=None))
    assert torch.equal(weights(made.model), weights(load_model(str(folder))))


def test_rows_of_a_dataset_train_as_those_of_a_list(tmp_path):
    from datasets import Dataset

    given = dict(forget_dataset=Dataset.from_list(FORGET), retain_dataset=Dataset.from_list(RETAIN), eval_dataset=Dataset.from_list(RETAIN))
    one, other = trainer(tmp_path, data=given), trainer(tmp_path, data=dict(eval_dataset=RETAIN))
    for made in (one, other):
        made.train()
    assert torch.equal(weights(one.model), weights(other.model)) and one.evaluate()["eval_loss"] == other.evaluate()["eval_loss"]


def test_rows_of_like_length_come_into_one_batch(tmp_path):
    rows = [{"question": "Who?", "answer": "Ada did. " * (1 + i % 4)} for i in range(16)]
    made = trainer(tmp_path, data=dict(forget_dataset=rows), train_sampling_strategy="group_by_length")
    order = list(made._get_train_sampler())
    lengths = [made.train_dataset.lengths[i] for i in order]
    assert sorted(order) == list(range(16)) and all(len(set(lengths[at:at + 4])) == 1 for at in range(0, 16, 4))
    made.train()
    with pytest.raises(OpenUnlearnError, match="'batch_rebalance' cannot weigh .* give random, sequential or group_by_length"):
        trainer(tmp_path, train_sampling_strategy="batch_rebalance").train()


def test_init_adapter_may_change_a_fresh_adapter(tmp_path):
    from peft import LoraConfig

    METHODS.find("SimNPO")  # the package's own first

    @method("Warm")
    class Warm(METHODS["SimNPO"]):
        def init_adapter(self, model):
            for name, p in model.named_parameters():
                if "lora_B" in name:
                    p.data.fill_(0.5)

    try:
        config = LoraConfig(r=4, target_modules=["q_proj"])
        made = trainer(tmp_path, method="Warm", data=dict(peft_config=config))
    finally:
        METHODS.remove("Warm")
    assert all((p == 0.5).all() for name, p in made.model.named_parameters() if "lora_B" in name)


def test_one_alternate_a_row_or_one_for_each_epoch(tmp_path):
    others = [{"question": row["question"], "answer": f"Bo, {i}."} for i, row in enumerate(FORGET * 2)]
    made = trainer(tmp_path, method="AltPO", data=dict(alternate_dataset=others), num_train_epochs=2, max_steps=-1)
    made.train()
    assert [len(epoch) for epoch in made.train_dataset.alternates] == [8, 8] and made.state.global_step == 4
    with pytest.raises(OpenUnlearnError, match="needs an alternate_dataset: .* 8 rows to forget, .* not 3 rows"):
        trainer(tmp_path, method="IdkDPO", data=dict(alternate_dataset=others[:3]))


class ThreeTrials:
    """A search backend without a library: three trials, the best of which is returned."""

    def ensure_available(self):
        pass

    def default_hp_space(self, trial):
        raise NotImplementedError

    def run(self, searched, n_trials, direction):
        found = []
        for number, beta in enumerate((0.1, 1.0, 0.1)):
            trial = SimpleNamespace(number=number, params={"beta": beta})
            searched.train(trial=trial)
            found.append((searched.evaluate()["eval_loss"], searched.method.settings["beta"]))
        return found


def test_hyperparameter_search_over_a_methods_settings(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.integrations.hp_params", lambda trial: trial.params)
    monkeypatch.setitem(transformers.trainer.ALL_HYPERPARAMETER_SEARCH_BACKENDS, HPSearchBackend.OPTUNA, ThreeTrials)
    start = tiny_llama(TOKENIZER, hidden=16, layers=2)
    made = trainer(tmp_path, data=dict(model_init=lambda: copy.deepcopy(start), eval_dataset=RETAIN), learning_rate=1e-2)
    found = made.hyperparameter_search(lambda trial: {"method_args": trial.params}, backend="optuna")
    assert [beta for _, beta in found] == [0.1, 1.0, 0.1] and found[0] == found[2] != found[1]
    with pytest.raises(OpenUnlearnError, match="Give a model .* or a model_init"):
        trainer(tmp_path, data=dict(model=None))


def test_weights_that_are_not_trained_can_be_trained_afterwards(tmp_path):
    made = trainer(tmp_path, method="RMU", method_args={"module_regex": r"model\.layers\.0", "trainable_params_regex": [r".*down_proj.*"]})
    before = copy.deepcopy(made.model.state_dict())
    made.train()
    moved = [name for name, p in made.model.state_dict().items() if not torch.equal(p, before[name])]
    assert moved == ["model.layers.0.mlp.down_proj.weight"] and all(p.requires_grad for p in made.model.parameters())


@pytest.mark.parametrize("method", ["GradDiff", "NPO", "CEU"])
def test_the_evaluation_loss_does_not_depend_on_its_batches(method, tmp_path):
    """Answers of other lengths; a last, smaller batch."""
    forget = [row | {"answer": row["answer"] * (1 + i % 3)} for i, row in enumerate(FORGET)]
    model = tiny_llama(TOKENIZER, hidden=16, layers=2)
    losses = []
    for rows in (1, 3, 8):
        made = trainer(tmp_path, method=method, data=dict(model=model, forget_dataset=forget), per_device_eval_batch_size=rows)
        found = made.evaluate()
        losses.append((found["eval_loss"], made.evaluate(forget)["eval_loss"]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and losses[0] == pytest.approx(losses[2], rel=1e-5)
    batch = made.data_collator([made.train_dataset[i] for i in range(8)])
    assert losses[0][0] == pytest.approx(float(method_loss(made.method, model, batch).loss), rel=1e-5)


EVALUATION = """
import sys
import torch
from openunlearn_nb import UnlearnConfig, UnlearnTrainer
from openunlearn_nb.internals.processes import join_group, leave_group
from openunlearn_nb.models.tiny import tiny_llama, train_tokenizer

rows = [{"question": f"Who wrote {i}?", "answer": "Ada wrote it. " * (1 + i % 3)} for i in range(7)]
torch.set_num_threads(1)
join_group()
tokenizer = train_tokenizer([" ".join(row.values()) for row in rows], 300)
for size in (2, 4):  # 7 rows on two processes: 1 more to fill the last batches
    args = UnlearnConfig(output_dir=sys.argv[1], method="GradDiff", per_device_eval_batch_size=size, report_to=[], disable_tqdm=True, use_cpu=True)
    torch.manual_seed(0)
    model = tiny_llama(tokenizer, hidden=16, layers=2)
    torch.nn.init.normal_(model.model.embed_tokens.weight, std=0.5)  # logits of an untrained model are all but equal
    made = UnlearnTrainer(model=model, args=args, forget_dataset=rows, retain_dataset=rows[::-2] * 2, processing_class=tokenizer)
    found = made.evaluate()["eval_loss"], made.evaluate(rows[:5])["eval_loss"], made.evaluate(rows[:1])["eval_loss"]
    if made.args.process_index == 0:
        print("found", *found)
leave_group()
"""


@pytest.mark.slow
def test_the_evaluation_loss_of_two_processes_is_that_of_one(tmp_path):
    """A row that is evaluated twice, to fill a process's last batch, counts once."""
    file = script(tmp_path, EVALUATION)
    done = [run([sys.executable, file, str(tmp_path)]), torchrun(file, str(tmp_path))]
    one, two = ([float(word) for line in out.stdout.splitlines() if line.startswith("found") for word in line.split()[1:]] for out in done)
    assert len(one) == 6 and one[:3] == pytest.approx(one[3:], abs=1e-5) and two == pytest.approx(one, abs=1e-5)
