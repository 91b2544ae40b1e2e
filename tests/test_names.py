"""Names that lead astray: of methods, of seeds' folders; weights below 0; rows that are both to be forgotten and to be retained."""

import json
import shutil
import warnings
from pathlib import Path

import pytest

from openunlearn_nb.commands.cli import main
from openunlearn_nb.reporting.collect import find_runs
from openunlearn_nb.experiments.config import BENCHMARKS, RunConfig
from openunlearn_nb.internals.errors import OpenUnlearnError
from openunlearn_nb.experiments.grid_config import GridConfig
from openunlearn_nb.experiments.grid import run_grid
from openunlearn_nb.experiments.seeds import run_seeds
from openunlearn_nb.models.tiny import train_tokenizer
from openunlearn_nb.internals.registry import import_file
from openunlearn_nb.methods.method import METHODS, method
from openunlearn_nb.data.encoding import Encoder
from openunlearn_nb.data.prompts import PROMPTS
from openunlearn_nb.internals.files import write_json
from openunlearn_nb.experiments.unlearning import count_overlap

BAD_NAMES = [
    "Retain",
    "finetuned",
    "Evaluated",
    "DPO",
    "../../x",
    "a/b",
    "a\\b",
    "",
    "  ",
    "a\nb",
    "a\x1b[31m",
    "a,b",
    ".hidden",
    "..",
    "x" * 101,
    " a",
]


@pytest.mark.checks(
    area="Names",
    given="a method called Retain or Finetuned, ../../x, nothing, or with slashes, commas or control characters",
    then="It is refused when it is declared.",
)
@pytest.mark.parametrize("name", BAD_NAMES)
def test_names_of_methods(name, tmp_path):
    before = dict(METHODS)
    with pytest.raises(OpenUnlearnError, match="cannot be called"):
        method(name)(lambda *_: 0)
    file = tmp_path / "own.py"
    file.write_text(
        f"from openunlearn_nb import method\n@method({name!r})\ndef loss(model, batch, ref_model, s): ...\n"
    )
    with pytest.raises(OpenUnlearnError, match="cannot be run: A method cannot be called"):
        import_file(str(file))
    with pytest.raises(OpenUnlearnError) if name != "DPO" else warnings.catch_warnings():
        METHODS.find(name)
    assert METHODS == before


def test_good_names_of_methods(monkeypatch):
    monkeypatch.setattr(METHODS, "_objects", dict(METHODS))
    for name in ("Hinge2", "NPO (beta 0.5)", "méthode", "a-b_c.d+e", "方法"):
        method(name)(lambda *_: 0)
        assert METHODS.find(name).name == name


@pytest.mark.checks(
    area="Names", given="alpha or gamma below 0", then="It is refused: the term would turn into its opposite."
)
@pytest.mark.parametrize("key", ["alpha", "gamma"])
def test_weights_below_0(key, monkeypatch):
    with pytest.raises(OpenUnlearnError, match=f"{key} must be 0 or more, not -0.5"):
        METHODS["GradDiff"].merge({key: -0.5})
    assert all(m.merge({})[key] >= 0 for m in METHODS.values())
    monkeypatch.setattr(METHODS, "_objects", dict(METHODS))
    method("Opposite", **{key: -1.0})(lambda *_: 0)  # whose own definition has it
    assert METHODS["Opposite"].merge({key: -0.5})[key] == -0.5


def run(folder: Path, seed: int | None, row: str = "NPO", date: str = "today") -> None:
    """A run of a seed as a grid leaves it."""
    write_json(
        folder / "TOFU_EVAL.json",
        {"forget_Q_A_Prob": {"agg_value": 0.5, "value_by_index": {"0": {"prob": 0.5, "avg_loss": 0.7}}}},
    )
    own = {"config": {"seed": seed}, "training": {}} if row == "NPO" else {"config": {"seed": 0}}
    write_json(folder / "run.json", {"model": "m", "split": "forget01", "row": row, "date": date, **own})


def seeds_in(folder: Path) -> tuple[dict, list[str]]:
    """The seeds of the runs in a folder, by row, and what is told."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = find_runs(folder)
    return {row: sorted(r.seed for r in found if r.row == row) for row in {r.row for r in found}}, [
        str(w.message) for w in told
    ]


@pytest.fixture
def two_seeds(tmp_path) -> Path:
    for seed in (0, 1):
        write_json(tmp_path / f"seed{seed}/grid.json", {"seed": seed})
        run(tmp_path / f"seed{seed}/forget01/NPO", seed, date=f"day {seed}")
        run(
            tmp_path / f"seed{seed}/forget01/Finetuned", seed, "Finetuned"
        )  # copied from the first seed by the grid itself
    return tmp_path


def test_seeds_as_a_grid_leaves_them(two_seeds):
    assert seeds_in(two_seeds) == ({"NPO": [0, 1], "Finetuned": [0, 1]}, [])


@pytest.mark.checks(
    area="Names",
    given="a folder called seed5 whose record says seed 1",
    then="The record counts, and a warning names the contradiction.",
)
def test_the_records_seed_counts(two_seeds):
    (two_seeds / "seed1").rename(two_seeds / "seed5")
    seeds, told = seeds_in(two_seeds)
    assert seeds == {"NPO": [0, 1], "Finetuned": [0, 1]}
    assert all("called after seed 5" in one and "of seed 1" in one for one in told) and told


@pytest.mark.checks(
    area="Names", given="a seed's folder copied as another seed's", then="It is counted once, with a warning."
)
def test_a_copy_is_no_other_seed(two_seeds, capsys):
    shutil.copytree(two_seeds / "seed0", two_seeds / "seed2")
    seeds, told = seeds_in(two_seeds)
    assert seeds == {"NPO": [0, 1], "Finetuned": [0, 1]} and sum("is a copy of" in one for one in told) == 2
    assert main(["table", str(two_seeds)]) == 0
    assert "seeds 0, 1:" in capsys.readouterr().out
    run(
        two_seeds / "seed2/forget01/NPO", 0, date="another day"
    )  # not a copy, and of the same seed: which of them counts?
    with pytest.raises(OpenUnlearnError, match="Two evaluations of NPO"):
        find_runs(two_seeds)


@pytest.mark.checks(
    area="Names", given="a folder seed0.bak or seedx next to those of seeds", then="It is ignored, with a warning."
)
def test_folders_beside_seeds(two_seeds, tmp_path, capsys, monkeypatch):
    for name in ("seed0.bak", "seedx", "seed", "seed-1", "seed²"):
        shutil.copytree(two_seeds / "seed0", two_seeds / name)
    seeds, told = seeds_in(two_seeds)
    assert seeds == {"NPO": [0, 1], "Finetuned": [0, 1]}
    assert {Path(one.split()[2]).name for one in told} == {"seed0.bak", "seedx", "seed", "seed-1", "seed²"} and all(
        "is ignored" in one for one in told
    )
    assert len(find_runs(two_seeds / "seed0.bak")) == 2  # asked for by its name, it is a folder like others
    calls = []
    monkeypatch.setattr("openunlearn_nb.experiments.seeds.claim", lambda grid, output: calls.append((grid.seed, Path(output).name)))
    monkeypatch.setattr("openunlearn_nb.experiments.seeds.run_grid", lambda grid, output, *_: calls.append(Path(output).name) or [])
    with pytest.warns(UserWarning, match="is ignored"):
        run_seeds(GridConfig(train_rows=250, splits=("forget01",)), [0, 1], two_seeds, show=False)
    assert calls == [(0, "seed0"), (1, "seed1"), (0, "seed0"), "seed0", (1, "seed1"), "seed1"]
    with pytest.raises(OpenUnlearnError, match="several seeds"):
        run_grid(GridConfig(splits=("forget01",)), two_seeds)


def encoder(texts: list[str]) -> Encoder:
    return Encoder(train_tokenizer(texts, 400), PROMPTS["plain"], 128)


@pytest.mark.checks(
    area="Names",
    given="rows that are both to be forgotten and to be retained",
    then="A warning gives their number, which is also in the record.",
)
@pytest.mark.parametrize("both, told", [(0, None), (2, "2 of 3 examples"), (3, "3 of 3 examples")])
def test_rows_to_forget_and_to_keep(both, told, tmp_path, capsys):
    rows = [
        {"question": f"Where is the {thing}?", "answer": f"Behind the {place}."}
        for thing, place in zip("key boat lamp book coin ring".split(), "door mill barn shed wall gate".split())
    ]
    for side, some in (("forget", rows[:3]), ("retain", rows[3 - both : 6 - both])):
        (tmp_path / f"{side}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    command = [
        "train",
        "--benchmark",
        "own",
        "--data",
        str(tmp_path),
        "--method",
        "GradDiff",
        "--epochs",
        "1",
        "--output",
        str(tmp_path / "out"),
    ]
    from openunlearn_nb.models.loading import quiet
    from openunlearn_nb.models.saving import save_model
    from openunlearn_nb.models.tiny import tiny_llama

    quiet()
    tokenizer = encoder([row["question"] + row["answer"] for row in rows]).tokenizer
    tokenizer.chat_template = None
    model = save_model(tiny_llama(tokenizer, hidden=32, layers=1), tokenizer, tmp_path / "model")
    assert main([*command, "--model", str(model), "--lora", "0"]) == 0
    said, record = capsys.readouterr().err, json.loads((tmp_path / "out/train.json").read_text())
    assert (told is None) == ("examples to forget" not in said) and (told or "") in said
    assert record.get("forget_examples_also_to_keep") == (both or None)


@pytest.mark.parametrize(
    "benchmark, splits",
    [("TOFU", ["forget01", "forget10"]), ("MUSE", ["News", "Books", "scal_4"]), ("WMDP", ["bio", "cyber"])],
)
def test_the_benchmarks_rows_do_not_overlap(benchmark, splits):
    source = RunConfig(benchmark=benchmark).source
    enc = encoder(["a few words for a tokenizer of bytes"])
    assert BENCHMARKS[benchmark]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert [count_overlap(source.forget_examples(split, enc), source.retain_examples(split, enc)) for split in splits] == [
            0
        ] * len(splits)
