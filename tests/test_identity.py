"""What a number was made from: one identity of a model, and what happens where it, the data or the retain evaluation is another."""

import json
import math
import shutil
import warnings
from dataclasses import replace

import pytest

from openunlearn_nb.evaluation import records, retain_logs
from openunlearn_nb.experiments import embedded, provenance, runs, verify
from openunlearn_nb.evaluation.cache import ResultCache, cached_texts
from openunlearn_nb.training.checkpoints import SafeCheckpoints
from openunlearn_nb.commands.cli import main
from openunlearn_nb.reporting.collect import find_runs, measured
from openunlearn_nb.internals.hashes import file_hash
from openunlearn_nb.internals.errors import OpenUnlearnError
from openunlearn_nb.experiments.grid_config import GridConfig
from openunlearn_nb.experiments.claims import claim
from openunlearn_nb.models.saving import save_model
from openunlearn_nb.models.tiny import tiny_llama, train_tokenizer
from openunlearn_nb.data.custom import Own
from openunlearn_nb.experiments.provenance import changes, difference, model_identity
from openunlearn_nb.data.tofu import Tofu
from openunlearn_nb.evaluation.entries import recompute

TOFU = Tofu
ROWS = {"forget": [("Who wrote it?", "Mara Vell wrote it."), ("Where?", "In Ostrava.")], "retain": [("When?", "In spring."), ("How?", "By hand.")]}


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """A tiny model in a folder, and data of one's own."""
    place = tmp_path_factory.mktemp("taught")
    (place / "data").mkdir()
    for side, rows in ROWS.items():
        lines = [json.dumps({"question": q, "answer": a}) for q, a in rows]
        (place / f"data/{side}.jsonl").write_text("\n".join(lines))
    tokenizer = train_tokenizer([text for rows in ROWS.values() for row in rows for text in row], 300)
    save_model(tiny_llama(tokenizer, hidden=16, layers=1), tokenizer, place / "model")
    save_model(tiny_llama(tokenizer, hidden=32, layers=1), tokenizer, place / "wider")
    return place


@pytest.fixture
def place(taught, tmp_path):
    shutil.copytree(taught, tmp_path / "here")
    return tmp_path / "here"


def another_seed(model):
    """The same folder, other weights."""
    tokenizer = train_tokenizer([text for rows in ROWS.values() for row in rows for text in row], 300)
    shutil.rmtree(model)
    save_model(tiny_llama(tokenizer, hidden=16, layers=1, seed=1), tokenizer, model)


def edit(file, **changed):
    """Change fields of a JSON file."""
    value = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(value | changed))


DECIDES = {
    "weights": lambda m: (m / "model.safetensors").write_bytes((m / "model.safetensors").read_bytes()[:-1] + b"\0"),
    "configuration": lambda m: edit(m / "config.json", rope_theta=5.0),
    "end of an answer": lambda m: edit(m / "generation_config.json", eos_token_id=2),
    "tokenizer": lambda m: edit(m / "tokenizer.json", truncation={"max_length": 3}),
    "tokenizer's configuration": lambda m: edit(m / "tokenizer_config.json", add_bos_token=True),
    "template": lambda m: (m / "chat_template.jinja").write_text("{{ messages[0].content }}"),
    "code of its own": lambda m: (m / "modeling_own.py").write_text("x = 1"),
    "adapter": lambda m: (m / "adapter_model.safetensors").write_bytes(b"x"),
    "prompt of its training": lambda m: edit(m / "train.json", prompt={"chat": False}),
}


@pytest.mark.checks(area="Identity", given="a model of which any deciding file has changed: weights, configuration, eos, tokenizer, template, code, adapter",
                    then="it is another model for grids, checkpoints, cached rows and `table --check`, which names the file")
@pytest.mark.parametrize("what", DECIDES)
def test_every_file_that_decides_is_part_of_the_identity(place, what):
    model, before = place / "model", model_identity(str(place / "model"))
    DECIDES[what](model)
    after = model_identity(str(model))
    assert after["identity"] != before["identity"] and (model / difference(before, after)).exists()


def test_what_decides_nothing_is_no_part_of_the_identity(place):
    before = model_identity(str(place / "model"))
    (place / "model/README.md").write_text("words")
    edit(place / "model/train.json", date="today", prompt={"chat": True})
    now = model_identity(str(place / "model"))
    assert difference({**before, "files": before["files"] | {"train.json": now["files"]["train.json"]}}, now) is None
    edit(place / "model/train.json", date="tomorrow")
    assert model_identity(str(place / "model")) == now


@pytest.mark.checks(area="Identity", given="an adapter whose base has changed", then="the base is part of the model's identity")
def test_the_base_of_an_adapter(place):
    model, base = place / "model", place / "wider"
    edit(model / "adapter_config.json", base_model_name_or_path=str(base))
    before = model_identity(str(model))
    assert "base/model.safetensors" in before["files"]
    edit(base / "generation_config.json", eos_token_id=3)
    assert difference(before, model_identity(str(model))) == "base/generation_config.json"


@pytest.mark.checks(area="Untrusted text", given="an index of weights that names a file outside the model's folder",
                    then="the file is not read, not even for the model's identity")
def test_an_index_is_no_reason_to_read_elsewhere(place):
    (place / "secret").write_text("words")
    edit(place / "model/model.safetensors.index.json", weight_map={"x": "../secret", "y": "model.safetensors"})
    before = model_identity(str(place / "model"))
    assert {"model.safetensors", "model.safetensors.index.json"} <= before["files"].keys()
    assert not any("secret" in name for name in before["files"])
    (place / "secret").write_text("other words")
    assert model_identity(str(place / "model")) == before


@pytest.mark.checks(area="Identity", given="large weights that stay as they are, in a second process", then="they are not read again; `table --check` reads them")
def test_the_hash_of_large_weights_is_remembered(place, monkeypatch):
    monkeypatch.setenv("OPENUNLEARN_CACHE", str(place / "cache"))
    monkeypatch.setattr(provenance, "LARGE", 1000)
    path, read = str(place / "model"), []
    first = model_identity(path)
    monkeypatch.setattr(provenance, "file_hash", lambda file: read.append(file.name) or file_hash(file))
    assert model_identity(path) == first and "model.safetensors" not in read
    assert model_identity(path, anew=True) == first and "model.safetensors" in read
    another_seed(place / "model")
    assert model_identity(path) != first


@pytest.mark.checks(area="Identity", given="a grid's folder, when its model was replaced by another under the same name",
                    then="refused in one sentence that names the file; give another --output")
def test_a_replaced_model_does_not_share_a_grid(place):
    grid = GridConfig(benchmark="OWN", model=str(place / "model"), data=str(place / "data"), splits=("own",), methods=("NPO",))
    claim(grid, place / "runs")
    claim(grid, place / "runs")
    another_seed(place / "model")
    with pytest.raises(OpenUnlearnError, match="the model .*model has changed: model.safetensors"):
        claim(grid, place / "runs")


@pytest.mark.checks(area="Identity", given="a grid that was begun by version 0.1, which did not note its models",
                    then="goes on, with a note; what its records say of their models still has to agree")
def test_an_older_grid_is_compared_by_its_records(place):
    grid = GridConfig(benchmark="OWN", model=str(place / "model"), data=str(place / "data"), splits=("own",), methods=("NPO",))
    claim(grid, place / "runs")
    known = json.loads((place / "runs/grid.json").read_text())
    del known["models"]
    (place / "runs/grid.json").write_text(json.dumps(known))
    cell = place / "runs/own/Finetuned"
    cell.mkdir(parents=True)
    edit(cell / "run.json", model_path=str(place / "model"), start={"content": "0123456789abcdef"})
    with pytest.warns(UserWarning, match="earlier version"), pytest.raises(OpenUnlearnError, match="has changed: weights, config.json or tokenizer.json"):
        claim(grid, place / "runs")
    (cell / "run.json").unlink()
    with pytest.warns(UserWarning, match="earlier version"):
        claim(grid, place / "runs")
    assert "models" in json.loads((place / "runs/grid.json").read_text())


def train_until_first_checkpoint(config, output, monkeypatch):
    """Interrupt a training as soon as it has written a checkpoint."""
    class Stop(Exception):
        pass

    def stopped(*args):
        save(*args)
        raise Stop

    save = SafeCheckpoints._save_checkpoint
    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(SafeCheckpoints, "_save_checkpoint", stopped)
        runs.train_model(config, "GradAscent", "own", None, {}, output)


@pytest.mark.checks(area="Identity", given="a training that was interrupted, when its model or its rows have changed since",
                    then="it does not go on from the checkpoint: one sentence names what differs")
@pytest.mark.parametrize("what", ["model", "training set"])
def test_a_checkpoint_of_another_model_or_other_rows(place, monkeypatch, what):
    config = runs.RunConfig(benchmark="OWN", model=str(place / "model"), data=str(place / "data"), save_each="epoch", epochs=2)
    train_until_first_checkpoint(config, place / "out", monkeypatch)
    if what == "model":
        another_seed(place / "model")
    else:
        (place / "data/forget.jsonl").write_text(json.dumps({"question": "Who wrote it?", "answer": "Somebody else."}))
    with pytest.raises(OpenUnlearnError, match=f"of a run with another {what}"):
        runs.train_model(config, "GradAscent", "own", None, {}, place / "out")


def test_a_checkpoint_is_of_the_same_data_by_another_path(place, monkeypatch):
    monkeypatch.chdir(place)
    (place / "link").symlink_to(place / "data")
    config = runs.RunConfig(benchmark="OWN", model=str(place / "model"), data="data", save_each="epoch", epochs=2)
    train_until_first_checkpoint(config, place / "out", monkeypatch)
    assert runs.train_model(replace(config, data="link"), "GradAscent", "own", None, {}, place / "out")["losses"]


@pytest.mark.checks(area="Identity", given="an eos that was corrected in generation_config.json between two evaluations", then="the answers are generated again")
def test_answers_do_not_outlive_another_end(place):
    model = tiny_llama(train_tokenizer(["words"], 300), hidden=16, layers=1)
    path, folder = str(place / "model"), place / "rows"
    before = ResultCache(folder, model_identity(path), model)
    assert cached_texts([[1]], lambda: ["long"], before) == cached_texts([[1]], lambda: ["?"], before) == ["long"]
    edit(place / "model/generation_config.json", eos_token_id=2)
    assert cached_texts([[1]], lambda: ["short"], ResultCache(folder, model_identity(path), model)) == ["short"]


@pytest.mark.checks(area="Identity", given="cached rows in which a bit has flipped", then="they are not used: the model is run again")
def test_a_flipped_bit_in_kept_rows(tmp_path):
    model = tiny_llama(train_tokenizer(["words"], 300), hidden=16, layers=1)
    rows = ResultCache(tmp_path, {"identity": "x"}, model)
    cached_texts([[1]], lambda: ["Mara"], rows)
    file = next(tmp_path.iterdir())
    file.write_bytes(file.read_bytes().replace(b"Mara", b"Lara"))
    assert cached_texts([[1]], lambda: ["anew"], rows) == ["anew"] == cached_texts([[1]], lambda: ["?"], rows)


@pytest.mark.checks(area="Identity", given="a damaged embedded model in the cache", then="it is removed and made again, with a note")
@pytest.mark.parametrize("damage", ["a flipped bit", "cut off", "a file is gone", "without checksums, cut off"])
def test_a_damaged_embedded_model_is_made_anew(tmp_path, monkeypatch, damage):
    monkeypatch.setenv("OPENUNLEARN_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "data"
    data.mkdir()
    for side, rows in ROWS.items():
        (data / f"{side}.jsonl").write_text("\n".join(json.dumps({"question": q, "answer": a}) for q, a in rows))
    make = lambda: embedded.embedded_model("full", Own(str(data)), embedded.EmbeddedConfig(hidden=16, layers=1, vocabulary=300, epochs=1))
    folder = make()
    weights, whole = folder / "model.safetensors", (folder / "model.safetensors").read_bytes()
    assert make() == folder
    if damage == "a file is gone":
        (folder / "tokenizer.json").unlink()
    else:
        weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]) if damage == "a flipped bit" else whole[:-9])
    if damage.startswith("without"):
        (folder / "checksums.json").unlink()
    with pytest.warns(UserWarning, match="damaged; it is made anew"):
        assert make() == folder
    assert weights.read_bytes() == whole and (folder / "tokenizer.json").exists()


def retain_log(folder, scores, **record):
    """An evaluation of TOFU in which the paraphrased answers have these probabilities, and its record."""
    paraphrased = {str(i): {"prob": s, "avg_loss": -math.log(s)} for i, s in enumerate(scores)}
    wrong = {str(i): {"prob": [0.5], "avg_loss": [-math.log(0.5)]} for i in range(len(scores))}
    log = {"forget_Q_A_PARA_Prob": {"value_by_index": paraphrased}, "forget_Q_A_PERT_Prob": {"value_by_index": wrong}}
    log["forget_truth_ratio"] = recompute(log, TOFU)["forget_truth_ratio"]
    records.write_json(folder / "TOFU_EVAL.json", log)
    records.write_json(folder / "run.json", {"model": "m", "split": "forget01", "benchmark": "TOFU", **record})
    return folder / "TOFU_EVAL.json"


@pytest.fixture
def two_yardsticks(tmp_path):
    """A run that was measured against a log elsewhere, and a Retain row of other values beside it."""
    spread = [i / 20 for i in range(1, 21)]
    elsewhere = retain_log(tmp_path / "elsewhere", spread, row="Retain")
    retain_log(tmp_path / "table/Retain", [0.9 + s / 100 for s in spread], row="Retain")
    against = {"retain_log": str(elsewhere), "measured_against": retain_logs.measured_against(elsewhere)}
    retain_log(tmp_path / "table/Mine", spread, row="Evaluated", **against)
    return tmp_path


@pytest.mark.checks(area="Identity", given="a table of a run that was measured against another retain evaluation than the Retain row next to it",
                    then="it is compared with the one that its record names")
def test_a_table_takes_the_retain_evaluation_that_a_record_names(two_yardsticks):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table = measured(find_runs(two_yardsticks / "table"))["m"]["forget01"]
    assert table["Evaluated"]["ks_distance"] == 0


@pytest.mark.checks(area="Identity", given="a table of a run whose retain evaluation has changed or is gone",
                    then="it is compared with the Retain row next to it, with a note")
@pytest.mark.parametrize("what", ["changed", "gone"])
def test_a_table_says_where_the_retain_evaluation_is_another(two_yardsticks, what):
    file = two_yardsticks / "elsewhere/TOFU_EVAL.json"
    file.unlink() if what == "gone" else retain_log(file.parent, [0.5] * 20, row="Retain")
    with pytest.warns(UserWarning, match="measured against another retain evaluation than the Retain row"):
        table = measured(find_runs(two_yardsticks / "table"))["m"]["forget01"]
    assert table["Evaluated"]["ks_distance"] > 0.5


@pytest.mark.checks(area="Identity", given="a Retain row of another prompt, other data or another family of models than the run next to it",
                    then="it is not used: forget quality and privleak stay empty, and a note gives the reason")
def test_a_table_sets_nothing_against_a_retain_row_that_does_not_fit(tmp_path):
    retain_log(tmp_path / "Retain", [0.5] * 20, row="Retain", prompt={"chat": True})
    retain_log(tmp_path / "Mine", [0.5] * 20, row="Evaluated", prompt={"chat": False})
    with pytest.warns(UserWarning, match="is not set against .* another prompt"):
        table = measured(find_runs(tmp_path))["m"]["forget01"]
    assert "forget_quality" not in table["Evaluated"] and table["Retain"]["forget_quality"] == 1


MINE = {"benchmark": "TOFU", "split": "forget01", "data": {"forget01_perturbed": "a", "retain_perturbed": "b"}, "prompt": {"chat": True},
        "architecture": {"model_type": "llama", "hidden_size": 64}}
OTHERS = {"benchmark": "OWN", "split": "forget10", "data": {"forget01_perturbed": "x"}, "prompt": {"chat": False}, "architecture": {"model_type": "gpt2"}}


@pytest.mark.checks(area="Identity", given="a retain log whose record is of another benchmark, split, data, prompt or family of models",
                    then="refused in one sentence that names what differs; a published log has no record and is taken by its rows")
@pytest.mark.parametrize("what", OTHERS)
def test_a_retain_log_that_does_not_fit(tmp_path, what):
    file = retain_log(tmp_path, [0.5] * 20, **{"row": "Retain", **MINE, what: OTHERS[what]})
    with pytest.raises(OpenUnlearnError, match="does not fit: it is of (an)?other"):
        retain_logs.read_retain_log(file, TOFU, measured=MINE)
    (tmp_path / "run.json").unlink()
    assert retain_logs.read_retain_log(file, TOFU, measured=MINE)


@pytest.mark.checks(area="Identity", given="a retain log in another format, or with fewer quoted answers than rows", then="refused in one sentence")
@pytest.mark.parametrize("rows", [{"0": 0.5}, {"0": {"score": "high"}}, {"0": {"value": 1.0}}, {"a": {"score": 1.0}}])
def test_a_retain_log_of_another_format(tmp_path, rows):
    file = records.write_json(tmp_path / "TOFU_EVAL.json", {"forget_truth_ratio": {"value_by_index": rows}})
    with pytest.raises(OpenUnlearnError, match="not in the shape of one: forget_truth_ratio.value_by_index"):
        retain_logs.read_retain_log(file, TOFU)


def test_a_retain_log_quotes_all_rows(tmp_path):
    log = {"forget_truth_ratio": {"value_by_index": {"0": {"score": 1.0}, "1": {"score": 1.0}}},
           "forget_Q_A_ROUGE": {"value_by_index": {"0": {"ground_truth": "Mara"}}}}
    with pytest.raises(OpenUnlearnError, match="quotes 1 true answers and the data have 2"):
        retain_logs.read_retain_log(records.write_json(tmp_path / "TOFU_EVAL.json", log), TOFU, ["Mara", "Vell"])


@pytest.mark.checks(area="Identity", given="`table --check`, after the model, the retain evaluation or a result has changed",
                    then="each is named, and the exit code is 1")
def test_check_names_what_has_changed(place, capsys, monkeypatch):
    monkeypatch.setenv("OPENUNLEARN_CACHE", str(place / "cache"))
    evaluate = ["eval", "own", "--quiet", "--model", str(place / "model"), "--data", str(place / "data")]
    assert main([*evaluate, "--output", str(place / "retain")]) == 0
    assert main([*evaluate, "--retain-log", str(place / "retain"), "--output", str(place / "runs/mine")]) == 0
    assert main(["table", str(place / "runs"), "--check"]) == 0
    edit(place / "model/generation_config.json", eos_token_id=5)
    edit(place / "retain/OWN_EVAL.json", edited=1)
    edit(place / "runs/mine/OWN_SUMMARY.json", forget_Q_A_Prob=1.0)
    capsys.readouterr()
    assert main(["table", str(place / "runs"), "--check"]) == 1
    said = capsys.readouterr().out
    assert all(word in said for word in ("OWN_SUMMARY.json has changed", "(generation_config.json)", "measured against has changed"))
    shutil.rmtree(place / "retain")
    assert main(["table", str(place / "runs"), "--check"]) == 1
    assert "measured against is gone" in capsys.readouterr().out
    assert main([*evaluate[:3], "--model", str(place / "wider"), *evaluate[5:], "--output", str(place / "retain")]) == 0
    assert main([*evaluate, "--retain-log", str(place / "retain"), "--output", str(place / "runs/other")]) == 2
    assert "another family of models (hidden_size is 32, and here 16)" in capsys.readouterr().err


@pytest.mark.checks(area="Identity", given="records of version 0.1, which know their model by three kinds of files",
                    then="`table --check` compares these, and a note says so")
def test_check_of_older_records(place):
    now = model_identity(str(place / "model"))
    known = "\n".join(f"{name} {now['files'][name]}" for name in ("config.json", "model.safetensors", "tokenizer.json"))
    records.write_json(place / "runs/x/run.json", {"files": {"a.json": records.text_hash("{}")}, "model_path": str(place / "model"),
                                                   "start": {"content": records.text_hash(known)}, "config": {"benchmark": "OWN"}})
    (place / "runs/x/a.json").write_text("{}")
    with pytest.warns(UserWarning, match="1 of 1 records are of an earlier version"):
        assert verify.check_runs(place / "runs") == {"x": []}
    another_seed(place / "model")
    assert "weights, config.json or tokenizer.json" in changes(records.read_json(place / "runs/x/run.json"), place / "runs/x")[0]
