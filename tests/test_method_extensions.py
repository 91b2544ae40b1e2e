"""Methods of one's own, each in a file of its own, through grid and table by `--import`; and what their hooks see."""

from pathlib import Path

import pytest
import torch

from openunlearn_nb import METHODS, Method, method
from openunlearn_nb.commands.cli import main
from openunlearn_nb.evaluation.records import read_json
from openunlearn_nb.internals.errors import OpenUnlearnError
from openunlearn_nb.internals import registry
from openunlearn_nb.internals.registry import check_name, import_file
from openunlearn_nb.models.tiny import tiny_llama, train_tokenizer
from openunlearn_nb.training.pairs import TrainConfig
from openunlearn_nb.training.trainer import train

HERE = Path(__file__).parent / "extensions"
FILES = {"aim": "Aim", "gru": "GRU(NPO)", "sam": "SAM(NPO)", "task_vector": "TaskVector"}
LINES = {"aim": 10, "gru": 25, "sam": 25, "task_vector": 25}


@pytest.mark.parametrize("file", LINES)
def test_an_extension_is_short(file):
    assert len((HERE / f"{file}.py").read_text().splitlines()) <= LINES[file]


def test_methods_from_files_through_grid_and_table(tmp_path, capsys):
    imports = [word for file in FILES for word in ("--import", str(HERE / f"{file}.py"))]
    grid = "tofu --train-rows 250 --splits forget01 --epochs 1 --quiet --jobs 1 --methods".split()
    assert main([*grid, ",".join(FILES.values()), *imports, "--output", str(tmp_path)]) == 0, capsys.readouterr().err
    capsys.readouterr()
    assert main(["table", str(tmp_path)]) == 0
    table = capsys.readouterr().out
    for name in FILES.values():
        assert name in table and read_json(tmp_path / "forget01" / name / "run.json")["declared_in"]


def example(seed: int, answer: int) -> dict:
    """Three tokens of a question and `answer` of a response."""
    ids = torch.randint(5, 270, (3 + answer,), generator=torch.Generator().manual_seed(seed)).tolist()
    return {"input_ids": ids, "labels": [-100] * 3 + ids[3:]}


def moved(name: str, rows: int, **settings) -> torch.Tensor:
    """By how much two steps of 4 rows move the weights."""
    tokenizer = train_tokenizer(["a few words, so that there is a vocabulary"], 300)
    model = tiny_llama(tokenizer, hidden=16, layers=2)
    start = torch.cat([p.detach().clone().flatten() for p in model.parameters()])
    recipe = TrainConfig(learning_rate=0.1, epochs=1, effective_batch=4, batch_size=rows, warmup_epochs=0, schedule="constant",
                         weight_decay=0, optim="sgd", gradient_checkpointing=False)
    forget, retain = [example(i, 2 + 3 * i) for i in range(8)], [example(50 + i, 9 - i) for i in range(8)]
    trained = train(model, 0, name, forget, retain, recipe, settings).model
    return torch.cat([p.detach().flatten() for p in trained.parameters()]) - start


@pytest.mark.parametrize("name, settings", [("GRU(NPO)", {}), ("SAM(NPO)", {}), ("SAM(GradDiff)", {"rho": 0.1})])
def test_gradients_are_of_the_whole_step(name, settings):
    """Two forwards of 2 rows, or one of 4: the method sees the same gradients."""
    for file in ("gru", "sam"):
        import_file(str(HERE / f"{file}.py"))
    whole, cut = moved(name, 4, **settings), moved(name, 2, **settings)
    assert torch.allclose(whole, cut, atol=1e-5) and whole.norm() > 0


def test_a_wrapper_that_changes_nothing_changes_nothing():
    import_file(str(HERE / "sam.py"))
    assert torch.allclose(moved("SAM(GradDiff)", 2, rho=0.0), moved("GradDiff", 2), atol=1e-6)
    assert METHODS.find("SAM(GradDiff)")(rho=0.0).settings["alpha"] == METHODS["GradDiff"]().settings["alpha"]


def test_a_method_may_answer_with_another_model():
    """What is evaluated, after each epoch and at the end, is what `for_generation` returns; there is no one model to save."""
    seen = []

    class Wrapped(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

    @method("Other", alpha=0.0)
    class Other(Method):
        forget_loss = METHODS["GradAscent"].forget_loss

        def for_generation(self, model):
            return Wrapped(model)

    model = tiny_llama(train_tokenizer(["a few words, so that there is a vocabulary"], 300), hidden=16, layers=2)
    recipe = TrainConfig(epochs=2, effective_batch=4, batch_size=4, gradient_checkpointing=False)
    rows = [example(i, 3) for i in range(4)]
    try:
        trained = train(model, 0, "Other", rows, rows, recipe, after_epoch=lambda epoch, model: seen.append(type(model))).model
        assert isinstance(trained, Wrapped) and seen == [Wrapped]
        with pytest.raises(OpenUnlearnError, match="no one model to save"):
            train(model, 0, "Other", rows, rows, recipe, for_saving=True)
    finally:
        METHODS.remove("Other")


def test_a_notebook_that_takes_the_place_of_the_packages_object_is_warned(monkeypatch):
    """A chapter declares the same text again, and is not."""
    monkeypatch.setattr(registry, "REGISTRIES", {})
    toys = registry.Registry("toy")
    toys.add("One", check_name)

    def other(): ...

    other.__module__, other.__qualname__ = "__main__", "check_name"
    with pytest.warns(UserWarning, match="The toy One of this notebook takes the place of the package's"):
        toys.add("One", other)
    with pytest.raises(OpenUnlearnError, match="There is a toy called One already"):
        toys.add("One", main)
