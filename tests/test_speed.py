"""What is quick is the same as what is plain: benchmarks/plain.py against the package; and what was asked once is not asked again."""

import copy
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from plain import plain_evaluate, plainly  # noqa: E402
from speed import METHODS, distance  # noqa: E402

from openunlearn_nb.experiments.bench import least_tokens  # noqa: E402
from openunlearn_nb.commands.cli import main  # noqa: E402
from openunlearn_nb.experiments.embedded import embedded_model  # noqa: E402
from openunlearn_nb.models.loading import load_model, load_tokenizer, quiet  # noqa: E402
from openunlearn_nb.data.muse import Muse  # noqa: E402
from openunlearn_nb.training.pairs import TrainConfig  # noqa: E402
from openunlearn_nb.evaluation.evaluate import evaluate  # noqa: E402
from openunlearn_nb.evaluation.model_results import Usage  # noqa: E402
from openunlearn_nb.data.encoding import Encoder, encode_all  # noqa: E402
from openunlearn_nb.data.prompts import prompt_format  # noqa: E402
from openunlearn_nb.evaluation.records import read_json  # noqa: E402
from openunlearn_nb.internals.files import finite  # noqa: E402
from openunlearn_nb.data.tofu import Tofu  # noqa: E402
from openunlearn_nb.training.trainer import train  # noqa: E402

TOFU, MUSE = Tofu(max_rows=250), Muse(max_rows=16)


def opened(benchmark, taught: str):
    quiet()
    path = str(embedded_model(taught, benchmark))
    tokenizer = load_tokenizer(path)
    return load_model(path), Encoder(tokenizer, prompt_format(None, tokenizer), 512, 4096)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("benchmark, taught, split", [(TOFU, "full", "forget01"), pytest.param(MUSE, "News_target", "News", marks=pytest.mark.slow)])
def test_an_evaluation_is_the_plain_one(benchmark, taught, split):
    """Every metric, aggregates and per-example values, within 1e-4; texts the same; and fewer tokens through the model."""
    model, enc = opened(benchmark, taught)
    found, spent = [], []
    for way in ("plain", "ours"):
        spent.append(Usage(model))
        found.append(plain_evaluate(model, enc, benchmark, split, None, ["all"], "characters", spent[-1]) if way == "plain" else
                     evaluate(model, enc, benchmark, split, metrics="all", classifier="characters", usage=spent[-1]).entries)
        spent[-1].end()
    assert distance(*map(finite, found)) < 1e-4
    plain, ours = (sum(s.tokens.values()) for s in spent)
    least = least_tokens(enc, benchmark, split, ["all"], found[1])
    assert 0.9 * sum(least.values()) < ours < plain / 1.5


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", [*METHODS, "UNDIAL"])
def test_training_is_the_plain_one(method):
    """Losses of every step within 1e-4, of a model that moves."""
    model, enc = opened(TOFU, "full")
    forget, retain = (encode_all(enc, pairs) for pairs in (TOFU.forget_pairs("forget01"), TOFU.embedded_rows("retain99")[:40]))
    alternates = [[retain[i] for i in range(len(forget))]] * 2
    recipe, settings = TrainConfig(learning_rate=1e-3, epochs=2, effective_batch=8, batch_size=4, gradient_checkpointing=False), dict(METHODS.get(method, {}))
    if method == "RMU":
        settings["module_regex"] = r"model\.layers\.1"
    run = lambda: train(copy.deepcopy(model), enc.tokenizer.pad_token_id, method, forget, retain, recipe, settings, alternates=alternates).losses
    ours = run()
    with plainly():
        plain = run()
    assert ours == pytest.approx(plain, rel=1e-4, abs=1e-4) and len(set(ours)) == len(ours) == 6


def test_kept_rows_are_not_asked_for_again(small_grid, tmp_path, monkeypatch):
    """A second evaluation of the same model asks it nothing and finds the same; --no-reuse asks again."""
    _, grid = small_grid
    command = ["eval", "tofu", "--train-rows", str(grid.train_rows), "--split", "forget01"]
    assert main([*command, "--output", str(tmp_path / "first")]) == 0

    def never(*args, **kwargs):
        raise AssertionError("the model was asked again")

    monkeypatch.setattr("openunlearn_nb.evaluation.model_results.score", never), monkeypatch.setattr("openunlearn_nb.evaluation.model_results.generate", never)
    assert main([*command, "--output", str(tmp_path / "again")]) == 0
    assert read_json(tmp_path / "first/TOFU_EVAL.json") == read_json(tmp_path / "again/TOFU_EVAL.json")
    with pytest.raises(AssertionError, match="asked again"):
        main([*command, "--no-reuse", "--output", str(tmp_path / "anew")])


def test_bench_command(tmp_path, capsys):
    """Seconds and tokens of every phase, as a table and as a record."""
    command = ["bench", "--train-rows", "250", "--split", "forget01", "--method", "RMU", "--steps", "3", "--output", str(tmp_path / "bench.json")]
    assert main(command) == 0
    said, record = capsys.readouterr().out, read_json(tmp_path / "bench.json")
    rows = {row["phase"]: row for row in record["phases"]}
    assert "of the least" in said and "peak memory" in said and rows["3 steps of RMU"]["steps/s"] > 0
    assert rows["scoring"]["tokens"] > 0.9 * rows["scoring"]["least"] > 0 and rows["evaluation"]["seconds"] > rows["scoring"]["seconds"] > 0
