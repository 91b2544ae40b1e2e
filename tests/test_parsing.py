"""The command line is built from the fields of dataclasses: quick help, settings from a file, and a sentence for a mistake."""

import subprocess
import sys
from dataclasses import fields

import pytest

from openunlearn_nb.commands.grammar import commands, leaf, parse, parser
from openunlearn_nb.data.benchmark import BENCHMARKS
from openunlearn_nb.experiments.settings import GridSettings, RunSettings
from openunlearn_nb.internals.errors import OpenUnlearnError
from openunlearn_nb.internals.files import write_json
from openunlearn_nb.internals.registry import import_file


def said(capsys, line: str) -> str:
    """What a wrong command line is answered with."""
    with pytest.raises(SystemExit) as end:
        parse(line.split())
    assert end.value.code == 2
    return capsys.readouterr().err.strip()


@pytest.mark.parametrize("line", ["--help", *(f"{name} --help" for name in commands())])
def test_help_imports_nothing_heavy(line):
    program = ("import sys\nfrom openunlearn_nb.commands.cli import main\ntry:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
               "assert not {'torch', 'transformers', 'numpy', 'pandas', 'datasets'} & set(sys.modules)\nassert len(sys.modules) < 400\n")
    done = subprocess.run([sys.executable, "-c", program, *line.split()], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_setting_is_an_option_of_some_command():
    options = {action.dest for name in commands() for action in leaf(parser(), name)._actions}
    assert {f.name for of in (RunSettings, GridSettings) for f in fields(of)} - options == {
        "quantize", "method_args", "training_args", "sweep"}  # set by --qlora, --set and names of TrainingArguments


def test_only_what_was_given_is_a_setting():
    assert parse(["tofu"]).settings == {"benchmark": "TOFU"}
    given = parse("train --method NPO --output x --epochs 3 --benchmark muse".split())
    assert given.settings == {"benchmark": "MUSE", "epochs": 3} and (given.method, given.split) == ("NPO", None)


@pytest.mark.parametrize("line", ["--methods NPO,RMU --splits forget01,forget05", "--methods NPO RMU --splits forget01 forget05",
                                  "--methods NPO, RMU --splits forget01 --splits=forget05"])
def test_lists_with_commas_or_spaces(line):
    given = parse(["tofu", *line.split()]).settings
    assert given["methods"] == ("NPO", "RMU") and given["splits"] == ("forget01", "forget05")


def test_underscores_and_the_names_of_transformers():
    given = parse("train --method NPO --output x --num_train_epochs 2 --learning_rate=1e-4 --per_device_train_batch_size 8".split()).settings
    assert (given["epochs"], given["learning_rate"], given["per_device_batch"]) == (2, 1e-4, 8)


@pytest.mark.parametrize("line, sentence", [
    ("train --methd NPO", "openunlearn train: there is no option --methd; did you mean --method?"),
    ("tofu --meth NPO", "openunlearn tofu: there is no option --meth; did you mean --methods?"),  # no abbreviation
    ("train --lr 1e-4", "openunlearn train: there is no option --lr; did you mean --learning-rate?"),  # by its initials
    ("tofuu", "openunlearn: Unknown command 'tofuu'; did you mean tofu?"),
    ("tofu --epochs three", "openunlearn tofu: --epochs: 'three' is not a whole number."),
    ("tofu --save-each step", "openunlearn tofu: --save-each: Unknown save each 'step'; valid: epoch."),
    ("tofu --output", "openunlearn tofu: --output needs a value."),
    ("train --method NPO", "openunlearn train: --output must be given."),
    ("table", "openunlearn table: folder must be given."),
    ("table a b", "openunlearn table: 'b' is one word too many."),
])
def test_a_mistake_is_answered_with_one_sentence(line, sentence, capsys):
    assert said(capsys, line) == sentence


def test_a_file_of_settings(tmp_path, capsys):
    file = tmp_path / "npo.yaml"
    file.write_text("method: NPO\noutput: out\nepochs: 7\nlearning_rate: 1e-4\nset: {beta: 0.5, alpha: 2}\ntrust_remote_code: true\n"
                    "gradient-checkpointing: false\nsystem:\n")
    given = parse(f"train --config {file} --epochs 3 --set beta=0.1".split())
    assert (given.method, given.output, given.set) == ("NPO", "out", ["beta=0.5", "alpha=2", "beta=0.1"])  # the last one counts
    assert given.settings == {"benchmark": "TOFU", "epochs": 3, "learning_rate": 1e-4, "trust_remote_code": True, "gradient_checkpointing": False,
                              "method_args": {"beta": [0.1], "alpha": [2]}}
    file.write_text("epoch: 7\n")
    assert said(capsys, f"tofu --config {file}") == "openunlearn tofu: there is no option --epoch; did you mean --epochs?"
    file.write_text("- epochs\n")
    assert "no list of names and values" in said(capsys, f"tofu --config {file}")
    assert "No such file" in said(capsys, f"tofu --config {tmp_path}/none.yaml")


def test_training_arguments_by_their_own_names(capsys):
    given = parse("train --method NPO --output x --warmup_ratio 0.1 --weight-decay=0 --max_steps 5 --bf16 --report_to tensorboard".split()).settings
    assert given["training_args"] == {"warmup_steps": [0.1], "weight_decay": [0.0], "max_steps": [5], "bf16": [True], "report_to": ["tensorboard"]}
    assert parse("tofu --max_grad_norm 0.5,1 --set beta=0.05 0.1".split()).settings["training_args"] == {"max_grad_norm": [0.5, 1.0]}
    assert said(capsys, "train --method NPO --output x --save_steps 5") == "openunlearn train: --save_steps is set by the command itself; give --save-each."
    assert said(capsys, "train --method NPO --output x --logging_steps 5") == "openunlearn train: --logging_steps is set by the command itself."
    assert said(capsys, "tofu --max_steps many") == "openunlearn tofu: --max_steps cannot be many; a whole number is needed."
    assert said(capsys, "tofu --weigth_decay 0.1") == "openunlearn tofu: there is no option --weigth_decay; did you mean --weight_decay?"
    assert said(capsys, "eval tofu --weight_decay 0.1").startswith("openunlearn eval tofu: there is no option --weight_decay")  # it trains nothing
    with pytest.raises(SystemExit) as end:
        parse(["tofu", "--help-training"])
    assert end.value.code == 0 and "--warmup_steps" in capsys.readouterr().out


def test_values_of_a_sweep():
    given = parse("tofu --set beta=0.05,0.1 0.5 retain_loss_type=NLL,KL --learning-rate 1e-4 1e-5 --epochs 3".split()).settings
    assert given["method_args"] == {"beta": [0.05, 0.1, 0.5], "retain_loss_type": ["NLL", "KL"]}
    assert given["learning_rate"] == (1e-4, 1e-5) and given["epochs"] == (3,)


@pytest.mark.parametrize("line", ["configs", "configs zero3", "table {folder}", "report {folder} --output {folder}/report.html"])
def test_commands_that_read_files_alone_import_neither_torch_nor_transformers(line, tmp_path):
    rows = {str(i): {"prob": 0.5, "avg_loss": 0.7} for i in range(2)}
    write_json(tmp_path / "forget01/Finetuned/TOFU_EVAL.json", {"forget_Q_A_Prob": {"agg_value": 0.5, "value_by_index": rows}})
    write_json(tmp_path / "forget01/Finetuned/TOFU_SUMMARY.json", {"forget_Q_A_Prob": 0.5})
    write_json(tmp_path / "forget01/Finetuned/run.json", {"benchmark": "TOFU", "model": "embedded", "split": "forget01", "row": "Finetuned"})
    program = ("import sys\nfrom openunlearn_nb.commands.cli import main\nassert main(sys.argv[1:]) == 0\n"
               "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)\n")
    words = line.format(folder=tmp_path).split()
    done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


BENCHMARK = '''
from openunlearn_nb.data.benchmark import Benchmark, benchmark

@benchmark("{name}")
class OfFile(Benchmark):
    "Nothing but a name."
'''


@pytest.fixture
def no_new_benchmarks():
    """Benchmarks that a test's file declares are gone afterwards."""
    before = dict(BENCHMARKS)
    yield
    BENCHMARKS._objects = before


@pytest.mark.parametrize("line", ["words --import {file} --data x", "words --import={file} --data x", "words --config {yaml}",
                                  "eval words --config {yaml}"])
def test_a_benchmark_of_a_file_to_import_is_a_command(line, tmp_path, no_new_benchmarks):
    """The file is named on the command line, or under `import` in a YAML file of settings."""
    import_file.cache_clear()
    file, yaml = tmp_path / "words.py", tmp_path / "words.yaml"
    file.write_text(BENCHMARK.format(name="WORDS"))
    yaml.write_text(f"import: {file}\ndata: x\n")
    given = parse(line.format(file=file, yaml=yaml).split())
    assert given.benchmark == "WORDS" and given.settings["imports"] == (str(file),) and given.settings["data"] == "x"


def test_without_its_file_a_benchmark_is_no_command(tmp_path, capsys):
    (tmp_path / "words.yaml").write_text("data: x\n")
    assert said(capsys, f"words --config {tmp_path}/words.yaml").startswith("openunlearn: Unknown command 'words'")
    with pytest.raises(OpenUnlearnError, match="Cannot read the settings"):
        parse(["words", "--config", str(tmp_path / "none.yaml")])
