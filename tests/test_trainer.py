"""`UnlearnTrainer` as TRL's users expect it: settings, evaluation, logs, checkpoints, callbacks, adapters."""

import copy
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from openunlearn_nb import METHODS, UnlearnConfig, UnlearnTrainer, method_loss
from openunlearn_nb.internals.errors import OpenUnlearnError
from openunlearn_nb.models.tiny import tiny_llama, train_tokenizer

FORGET = [{"question": f"Who wrote book {i}?", "answer": f"Ada wrote book {i}, in spring."} for i in range(8)]
RETAIN = [{"prompt": f"When was {i}?", "completion": f"In the year {i}."} for i in range(8)]
TOKENIZER = train_tokenizer([" ".join(row.values()) for row in FORGET + RETAIN], 300)


def trainer(folder, method="NPO", model=None, callbacks=None, peft_config=None, eval_dataset=None, optimizers=(None, None), forget=FORGET, retain=RETAIN,
            method_args=None, **args) -> UnlearnTrainer:
    """A trainer of a tiny model, four rows a forward."""
    given = dict(max_steps=4, per_device_train_batch_size=4, learning_rate=1e-3, report_to=[], disable_tqdm=True, use_cpu=True,
                 logging_steps=1, lr_scheduler_type="constant") | args
    model = model or tiny_llama(TOKENIZER, hidden=16, layers=2)
    return UnlearnTrainer(model=model, args=UnlearnConfig(output_dir=str(folder), method=method, method_args=method_args, **given),
                          forget_dataset=forget, retain_dataset=retain, eval_dataset=eval_dataset, processing_class=TOKENIZER, callbacks=callbacks,
                          peft_config=peft_config, optimizers=optimizers)


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
    made = trainer(tmp_path, callbacks=[seen], eval_dataset={"forget": FORGET, "retain": RETAIN})
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
    made = trainer(tmp_path, eval_dataset=RETAIN, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
                   load_best_model_at_end=True, metric_for_best_model="eval_loss", greater_is_better=False, save_total_limit=1)
    made.train()
    best = min(entry["eval_loss"] for entry in made.state.log_history if "eval_loss" in entry)
    assert made.evaluate()["eval_loss"] == pytest.approx(best) and Path(made.state.best_model_checkpoint).exists()


@pytest.mark.parametrize("method", ["NPO", "UNDIAL"])
def test_an_adapter_by_pefts_own_config(method, tmp_path):
    from peft import LoraConfig

    made = trainer(tmp_path, method=method, peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
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
    made = trainer(tmp_path, method=method, method_args=own, model=model, max_steps=10, per_device_train_batch_size=8, learning_rate=0.05, max_grad_norm=0.0,
                   optimizers=(torch.optim.SGD([p for p in model.parameters()], lr=0.05), None))
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
