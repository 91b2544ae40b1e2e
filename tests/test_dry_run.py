"""`--dry-run` shows what a command would do and writes nothing; options that would do nothing are refused."""

import json

import pytest

from openunlearn_nb.commands.cli import main


def planned(capsys, line: str) -> dict:
    """The plan that a command prints as JSON."""
    assert main([*line.split(), "--dry-run", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def empty(tmp_path, monkeypatch):
    """An empty folder to work in, with an empty cache of models in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENUNLEARN_CACHE", str(tmp_path / "cache"))
    return tmp_path


def test_a_grid_says_what_decides_each_setting_and_writes_nothing(empty, capsys):
    (empty / "npo.yaml").write_text("epochs: 7\nset: {beta: 0.5}\nwarmup_ratio: 0.1\n")
    given = {file: file.read_text() for file in empty.iterdir()}
    plan = planned(capsys, "tofu --splits forget01 --methods NPO,RMU --config npo.yaml --learning-rate 1e-4 --seeds 0 1 --jobs 2")
    npo = plan["settings"]["NPO"]
    assert npo["epochs"] == {"value": 7, "from": "npo.yaml"} and npo["learning_rate"] == {"value": 1e-4, "from": "command line"}
    assert npo["beta"] == {"value": 0.5, "from": "npo.yaml"} and npo["warmup_steps"] == {"value": 0.1, "from": "npo.yaml"}
    assert npo["effective_batch"]["from"] == "TOFU's recipe for the embedded model" and npo["alpha"]["from"] == "default of NPO"
    assert plan["settings"]["Settings"]["model"] == {"value": "embedded", "from": "default"}
    rows = {f"seed{seed}/forget01/{row}" for seed in (0, 1) for row in ("Finetuned", "Retain", "NPO", "RMU")}
    assert rows < set(plan["to_make"]) and plan["seconds"] > 0 and plan["disk_bytes"] > 0
    assert {file: file.read_text() for file in empty.iterdir()} == given


def test_the_command_line_counts_before_the_file(empty, capsys):
    (empty / "npo.yaml").write_text("epochs: 7\nset: {beta: 0.5, alpha: 2}\n")
    plan = planned(capsys, "train --method NPO --output out --split forget01 --config npo.yaml --epochs 3 --set beta=0.1")
    npo = plan["settings"]["NPO"]
    assert npo["epochs"] == {"value": 3, "from": "command line"} and npo["beta"] == {"value": 0.1, "from": "command line"}
    assert npo["alpha"] == {"value": 2, "from": "npo.yaml"} and plan["to_make"] == ["NPO on forget01"]
    assert [file.name for file in empty.iterdir()] == ["npo.yaml"]


def test_an_evaluation(empty, capsys):
    plan = planned(capsys, "eval tofu --split forget01 --metrics forget_Q_A_Prob")
    assert plan["to_make"] == ["forget_Q_A_Prob on forget01"] and plan["output"] == "runs/eval-tofu"
    assert list(empty.iterdir()) == []


def test_finished_rows_are_left_out(small_grid, capsys):
    folder, _ = small_grid
    plan = planned(capsys, f"tofu --train-rows 250 --splits forget01 --methods NPO,RMU --epochs 2 --output {folder}")
    assert plan["to_make"] == ["forget01/RMU"]


def test_a_folder_that_holds_something_else_is_refused(small_grid, capsys):
    folder, _ = small_grid
    there = sorted((file, file.stat().st_mtime_ns) for file in folder.rglob("*"))
    grid = f"tofu --train-rows 250 --splits forget01 --methods NPO --epochs 2 --output {folder}"
    for line, sentence in ((f"{grid} --seed 1", "holds results of another configuration (seed 0, now 1)"),
                           (f"{grid} --seeds 0 1", "holds a grid of one seed"),
                           (f"train --method NPO --split forget01 --output {folder}", "exists and is not empty"),
                           (f"eval tofu --split forget01 --output {folder}/forget01/NPO", "holds an evaluation of another")):
        assert main([*line.split(), "--dry-run"]) == 2
        assert sentence in capsys.readouterr().err
    assert sorted((file, file.stat().st_mtime_ns) for file in folder.rglob("*")) == there


def test_the_time_of_a_small_grid_is_that_of_starting_and_loading(empty, capsys):
    line = "tofu --splits forget01 --methods NPO,RMU,GradAscent,GradDiff --jobs 2"
    assert planned(capsys, line)["seconds"] > 15
    assert main([*line.split(), "--dry-run"]) == 0 and "a rough estimate" in capsys.readouterr().out


def test_what_the_run_would_refuse_is_refused(empty, capsys):
    for line, sentence in (("tofu --methods NPOO", "Unknown method 'NPOO'"), ("eval tofu --split forget11", "Unknown split"),
                           ("train --method NPO --output x --set betta=1", "Unknown setting of NPO")):
        assert main([*line.split(), "--dry-run"]) == 2
        assert sentence in capsys.readouterr().err
    assert list(empty.iterdir()) == []


def test_fields_of_training_arguments_that_no_command_reads_are_refused(capsys):
    for name, instead in (("eval_accumulation_steps 2", "--batch-size"), ("bf16_full_eval", "--dtype"), ("save_on_each_node", "--save-each"),
                          ("hub_token x", "openunlearn train --push-to-hub")):
        with pytest.raises(SystemExit):
            main(["tofu", *f"--{name}".split()])
        assert f"is set by the command itself; give {instead}." in capsys.readouterr().err


TRAIN = "train --method NPO --output x"


@pytest.mark.parametrize("line, sentence", [
    (f"{TRAIN} --trust-remote-code", "--trust-remote-code does nothing for the embedded model"),
    ("eval tofu --device-map auto", "--device-map does nothing for the embedded model"),
    (f"{TRAIN} --epochs 3 --max_steps 10", "--epochs and --max_steps both say how long to train"),
    (f"{TRAIN} --run_name a", "--run_name is for a logger, and none is given"),
    (f"{TRAIN} --ddp_backend gloo", "--ddp_backend is for several processes"),
    ("train --method Finetune --model m --output x --on full --split forget01", "--split does nothing with --on"),
    ("eval tofu --classifier characters --metrics forget_Q_A_Prob", "--classifier judges gibberish"),
    ("eval tofu --retain-log x --metrics forget_Q_A_Prob", "--retain-log does nothing here"),
    ("eval lm --model m --tasks mmlu --split forget01", "--split says which embedded model or preset is meant"),
    ("eval lm --model m --tasks mmlu --data x", "--data says which embedded model or preset is meant"),
    ("eval lm --tasks mmlu --template-arg a=1", "which lm-eval uses only with --chat"),
    ("plan --model Llama-2-7b --whole-load", "--whole-load is about loading on several GPUs"),
    ("bench --shots 3", "--shots does nothing for TOFU"),
    ("bench --epochs 3", "bench makes --steps steps"),
    ("table x --check --json", "--check and --json print two different things"),
])
def test_an_option_that_does_nothing_is_refused(line, sentence, empty, capsys):
    assert main(line.split()) == 2
    assert sentence in capsys.readouterr().err
    assert list(empty.iterdir()) == []


@pytest.mark.parametrize("line", ["eval tofu --seed 1", "eval tofu --epochs 3", "eval lm --tasks x --max-length 9", "bench --no-reuse",
                                  "alternates --output x --batch_size 3", "train --method NPO --output x --metrics all"])
def test_a_setting_of_other_commands_is_no_option(line, capsys):
    with pytest.raises(SystemExit) as end:
        main(line.split())
    assert end.value.code == 2 and "as this command has no use for it" in capsys.readouterr().err
