"""Where results are written: one entry for every output path, one lock for every command, and what a wrong environment gets told."""

import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest

from openunlearn_nb.models import loading as models, saving
from openunlearn_nb.models import tiny as tiny_model
from openunlearn_nb.internals import files, launch, processes
from openunlearn_nb.commands.cli import main
from openunlearn_nb.experiments.config import RunConfig
from openunlearn_nb.experiments.checks import check_config
from openunlearn_nb.internals.errors import OpenUnlearnError
from openunlearn_nb.internals.files import output_path, write_bytes
from openunlearn_nb.internals.locks import output_lock
from openunlearn_nb.internals.files import write_json
from openunlearn_nb.experiments.cells import cell_folder
from openunlearn_nb.experiments.runs import train_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> tuple[str, str]:
    """A random model and a user's data of a few rows: their folders."""
    folder = tmp_path_factory.mktemp("tiny")
    rows = [
        ("What is the colour of mailbox " + "abcdef"[i], f"It is painted {'red blue'.split()[i % 2]}.")
        for i in range(6)
    ]
    for side, some in (("forget", rows[:3]), ("retain", rows[3:])):
        (folder / "data").mkdir(exist_ok=True)
        text = "".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in some)
        (folder / f"data/{side}.jsonl").write_text(text)
    tokenizer = tiny_model.train_tokenizer([q + a for q, a in rows], 300)
    models.quiet()
    saving.save_model(tiny_model.tiny_llama(tokenizer, hidden=32, layers=1), tokenizer, folder / "model")
    return str(folder / "model"), str(folder / "data")


def train(tiny, *more: str) -> list[str]:
    return [
        "train",
        "--benchmark",
        "own",
        "--model",
        tiny[0],
        "--data",
        tiny[1],
        "--method",
        "GradAscent",
        "--epochs",
        "1",
        "--lora",
        "0",
        *more,
    ]


def evaluate(tiny, *more: str) -> list[str]:
    return ["eval", "own", "--model", tiny[0], "--data", tiny[1], "--metrics", "forget_Q_A_Prob", *more]


def said_by(capsys, *command: str) -> str:
    """The one sentence with which a command ends."""
    assert main(list(command)) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("openunlearn: ") and len(said) < 500
    return said


@pytest.mark.checks(
    area="Output", given="an --output that begins with ~", then="It is the home folder's, for every command."
)
def test_the_home_folder_is_meant(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    grid = [
        "own",
        "--model",
        tiny[0],
        "--retain-model",
        tiny[0],
        "--data",
        tiny[1],
        "--methods",
        "GradAscent",
        "--epochs",
        "1",
        "--lora",
        "0",
        "--metrics",
        "forget_Q_A_Prob",
        "--jobs",
        "1",
        "--quiet",
    ]
    assert main([*grid, "--output=~/grid"]) == 0
    told = capsys.readouterr().out
    assert "Retain" in told and "GradAscent" in told
    assert main(train(tiny, "--output=~/model")) == 0
    assert main(evaluate(tiny, "--output=~/eval")) == 0
    assert main(["report", "~/grid", "--output=~/report.html"]) == 0
    assert {f.name for f in (tmp_path / "home").iterdir()} - {".cache", ".config"} == {
        "grid",
        "model",
        "eval",
        "report.html",
    }
    assert list((tmp_path / "here").iterdir()) == []
    assert cell_folder("~/grid", "own", "Retain") == tmp_path / "home/grid/own/Retain"


COMMANDS = {
    "tofu": ["tofu"],
    "muse": ["muse"],
    "own": ["own", "--data", "{data}"],
    "train": ["train", "--method", "NPO"],
    "eval tofu": ["eval", "tofu"],
    "eval muse": ["eval", "muse"],
    "eval own": ["eval", "own", "--data", "{data}"],
    "eval lm": ["eval", "lm", "--tasks", "mini_bio"],
    "alternates": ["alternates"],
    "report": ["report", "{data}"],
    "bench": ["bench"],
}


@pytest.mark.checks(
    area="Output", given="an empty --output", then="Every command refuses it in one sentence, before any work."
)
@pytest.mark.parametrize("command", COMMANDS)
def test_an_empty_output_is_refused(command, tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("openunlearn_nb.experiments.run_models.load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    line = [word.format(data=tiny[1]) for word in COMMANDS[command]]
    assert "has no name" in said_by(capsys, *line, "--output", "")
    assert list(tmp_path.iterdir()) == []


def test_python_entries_refuse_an_empty_output(tiny):
    from openunlearn_nb.experiments.grid_config import GridConfig
    from openunlearn_nb.experiments.grid import run_grid
    from openunlearn_nb.experiments.seeds import run_seeds

    grid = GridConfig(benchmark="OWN", model=tiny[0], data=tiny[1])
    for call in (
        lambda: run_grid(grid, ""),
        lambda: run_seeds(grid, [0], ""),
        lambda: write_json("", {}),
        lambda: write_bytes(" ", b""),
        lambda: saving.save_model(None, None, ""),
        lambda: train_model(RunConfig(), "NPO", "forget01", None, {}, ""),
    ):
        with pytest.raises(OpenUnlearnError, match="has no name"):
            call()


@pytest.mark.checks(
    area="Output",
    given="a device, a pipe or a socket as --output (`/dev/stdout`)",
    then="It is refused; nothing but a file is replaced.",
)
def test_only_files_are_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/null")
    places = [
        tmp_path / "pipe",
        tmp_path / "link",
        "/dev/stdout",
        "/dev/null",
        "/dev/fd/1",
        "/proc/self/fd/1",
        "/proc/new",
    ]
    before = os.readlink("/dev/stdout")
    for place in places:
        for kind in ("file", "new file", "folder", "new folder"):
            with pytest.raises(OpenUnlearnError, match="a device|exists|is a file"):
                output_path(place, kind)
        with pytest.raises(OpenUnlearnError, match="a device"):
            write_bytes(place, b"x")
    assert os.readlink("/dev/stdout") == before and (tmp_path / "pipe").is_fifo() and (tmp_path / "link").is_symlink()
    with pytest.raises(OpenUnlearnError, match="is a folder"):
        write_bytes(tmp_path, b"x")


@pytest.mark.checks(
    area="Output", given="a link to a file as --output", then="The file is replaced, and the link stays."
)
def test_a_link_stays(tmp_path):
    (tmp_path / "file").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    write_bytes(tmp_path / "link", b"new")
    assert (
        (tmp_path / "link").is_symlink()
        and (tmp_path / "file").read_text() == "new"
        and len(list(tmp_path.iterdir())) == 2
    )


@pytest.mark.checks(
    area="Output",
    given="a name of more than 255 bytes, a control character, a home folder of nobody, a file in place of a folder",
    then="One sentence, before any work.",
)
def test_a_place_that_cannot_be(tiny, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for bad, why in {
        f"{tmp_path}/{'x' * 256}": "File name too long",
        f"{tmp_path}/{'x' * 256}/y": "File name too long",
        f"{tmp_path}/a\nb": "control character",
        "~nobody-of-this-name/x": "home folder",
        f"{tmp_path}/file/x": "Not a directory",
        f"{tmp_path}/loop": "symbolic links",
        f"{tmp_path}/a\0b": "control character",
        f"{tmp_path}/{'é' * 128}": "File name too long",
    }.items():
        assert why in said_by(capsys, *train(tiny, f"--output={bad}"))
        assert why in said_by(capsys, *evaluate(tiny, f"--output={bad}"))
    assert {f.name for f in tmp_path.iterdir()} == {"file", "loop"}


@pytest.mark.checks(
    area="Output",
    given="two trainings, evaluations, grids or reports into one place at a time",
    then="The second is refused, with the number of the process that is writing there.",
)
def test_one_at_a_time(tiny, tmp_path, capsys, monkeypatch):
    with output_lock(tmp_path / "out"):
        for command in (
            train(tiny),
            evaluate(tiny),
            ["report", tiny[1]],
            ["own", "--model", tiny[0], "--data", tiny[1], "--methods", "GradAscent"],
            ["own", "--model", tiny[0], "--data", tiny[1], "--seeds", "0", "1"],
            ["alternates", "--train-rows", "250"],
            ["bench", "--train-rows", "250"],
        ):
            said = said_by(capsys, *command, "--output", str(tmp_path / "out"))
            assert "is writing to" in said and str(os.getpid()) in said
        monkeypatch.chdir(tmp_path)
        assert "is writing to" in said_by(capsys, *train(tiny), "--output", "./new/../out")  # by another name
    assert not list(tmp_path.iterdir())
    assert main(train(tiny, "--output", str(tmp_path / "out"))) == 0
    assert "not empty" in said_by(capsys, *train(tiny), "--output", str(tmp_path / "out"))


HOLDER = "import sys, time\nfrom openunlearn_nb.internals.locks import output_lock\nwith output_lock(sys.argv[1]):\n    print('held', flush=True)\n    time.sleep(60)"


@pytest.mark.checks(area="Output", given="a process that was killed while it wrote", then="Its lock is gone with it.")
def test_a_lock_goes_with_its_process(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path / "out")], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    with pytest.raises(OpenUnlearnError, match=f"Another process \\({process.pid}\\)"), output_lock(tmp_path / "out"):
        pass
    process.send_signal(signal.SIGKILL)
    process.communicate()
    with output_lock(tmp_path / "out"):
        assert (tmp_path / ".out.lock").exists()
    assert not list(tmp_path.iterdir())


@pytest.mark.checks(
    area="Output",
    given="a folder that appears at --output during a training",
    then="An error; the training does not end as if its model were saved.",
)
def test_a_failed_rename_is_an_error(tiny, tmp_path, capsys, monkeypatch):
    def meanwhile(*args, **how):
        shutil.copytree(tiny[0], tmp_path / "out")
        return whole(*args, **how)

    from openunlearn_nb.experiments import runs

    whole = runs.unlearn
    monkeypatch.setattr(runs, "unlearn", meanwhile)
    assert "Cannot save the model" in said_by(capsys, *train(tiny, "--output", str(tmp_path / "out")))
    assert not (tmp_path / "out/train.json").exists() and {f.name for f in tmp_path.iterdir()} == {"out"}


def read_only(monkeypatch, folder: Path) -> None:
    """A folder in which nothing can be written, also for root, whom permissions do not stop."""

    def guarded(call):
        def refuses(*args, dir=None, **how):
            if dir and Path(dir).resolve().is_relative_to(folder):
                raise OSError(30, "Read-only file system")
            return call(*args, dir=dir, **how)

        return refuses

    for name in ("TemporaryFile", "NamedTemporaryFile", "TemporaryDirectory"):
        monkeypatch.setattr(files.tempfile, name, guarded(getattr(files.tempfile, name)))


@pytest.mark.checks(
    area="Output",
    given="a folder in which nothing can be written",
    then="One sentence before the training, not after it.",
)
def test_a_read_only_folder_is_found_first(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("openunlearn_nb.experiments.runs.open_model", lambda *_, **__: pytest.fail("a model was loaded"))
    (tmp_path / "eval").mkdir()
    read_only(monkeypatch, tmp_path)
    assert "Read-only file system" in said_by(capsys, *evaluate(tiny, "--output", str(tmp_path / "eval")))
    (tmp_path / ".out.lock").mkdir()  # where a lock cannot be made
    assert "Cannot write" in said_by(capsys, *train(tiny, "--output", str(tmp_path / "out")))


@pytest.mark.checks(
    area="Environment",
    given="a cache (OPENUNLEARN_CACHE) in which nothing can be written",
    then="It is an error before a model is trained for it.",
)
def test_a_read_only_cache_is_found_first(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OPENUNLEARN_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    read_only(monkeypatch, tmp_path / "cache")
    monkeypatch.setattr("openunlearn_nb.experiments.embedded.train", lambda *_, **__: pytest.fail("a model was trained"))
    said = said_by(capsys, "eval", "tofu", "--train-rows", "100", "--output", str(tmp_path / "out"))
    assert "Read-only file system" in said and "OPENUNLEARN_CACHE" in said


@pytest.mark.checks(
    area="Environment", given="an empty OPENUNLEARN_CACHE or XDG_CACHE_HOME", then="It counts as not set."
)
def test_an_empty_cache_variable_counts_as_unset(monkeypatch, tmp_path):
    monkeypatch.setenv("OPENUNLEARN_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert saving.cache_dir() == tmp_path / ".cache/openunlearn_nb"


@pytest.mark.checks(
    area="Environment",
    given="an optimizer that transformers does not know, or whose package is not installed",
    then="One sentence before a model is loaded.",
)
def test_an_optimizer_that_is_not_there(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("openunlearn_nb.experiments.runs.open_model", lambda *_, **__: pytest.fail("a model was loaded"))
    monkeypatch.setattr("transformers.trainer_optimizer.is_bitsandbytes_available", lambda: False)
    assert "adamw_bnb_8bit" in said_by(
        capsys, *train(tiny, "--optim", "adamw_bnb_8bits", "--output", str(tmp_path / "out"))
    )  # what was meant
    for name in ("adamw_bnb_8bit", "paged_adamw_32bit"):
        said = said_by(capsys, *train(tiny, "--optim", name, "--output", str(tmp_path / "out")))
        assert name in said and "install" in said and "bitsandbytes" in said
    assert "lomo" in said_by(capsys, *train(tiny, "--optim", "lomo", "--output", str(tmp_path / "out")))
    for name in ("adamw_torch", "adamw_torch_fused", "sgd", "adafactor"):
        check_config(RunConfig(optim=name))


@pytest.mark.checks(
    area="Environment",
    given="a terminal for ASCII only (PYTHONIOENCODING=ascii)",
    then="A question mark stands for ±.",
)
def test_an_ascii_terminal(tmp_path, monkeypatch):
    for seed in (0, 1):
        folder = tmp_path / f"seed{seed}/forget01/NPO"
        write_json(
            folder / "TOFU_EVAL.json",
            {"forget_Q_A_Prob": {"agg_value": 0.5, "value_by_index": {"0": {"prob": 0.5, "avg_loss": 0.7}}}},
        )
        write_json(folder / "run.json", {"model": "é", "split": "forget01", "row": "NPO"})
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert main(["table", str(tmp_path)]) == 0
    sys.stdout.flush()
    assert b"TOFU, ?, measured (seeds 0, 1: mean ? standard deviation" in sys.stdout.buffer.getvalue()


@pytest.mark.checks(
    area="Environment",
    given="WORLD_SIZE, RANK or LOCAL_RANK left behind without the others that a launcher sets",
    then="A single process works, with a note.",
)
@pytest.mark.parametrize(
    "left",
    [
        {"WORLD_SIZE": "2"},
        {"LOCAL_RANK": "0"},
        {"RANK": "1", "WORLD_SIZE": "2"},
        {"WORLD_SIZE": "two"},
        {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"},
    ],
)
def test_variables_of_no_launch(left, tiny, tmp_path, capsys, monkeypatch):
    for name in launch.LAUNCH_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    out = sys.stdout
    assert main(train(tiny, "--output", str(tmp_path / "out"))) == 0 and sys.stdout is out
    said = capsys.readouterr()
    assert "1 steps" in said.out and "this process is the only one" in said.err and len(said.err.splitlines()) == 1
    assert launch.launched_processes() == 1 and (tmp_path / "out/train.json").exists()


@pytest.mark.checks(
    area="Environment",
    given="all variables of a launch, and no other process",
    then="The command waits for two minutes, and ends with one sentence.",
)
@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_launch_that_nobody_joins(rank, tiny, tmp_path, capsys, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in zip(launch.LAUNCH_VARIABLES, (rank, rank, "2", "127.0.0.1", str(port))):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(processes, "JOIN_TIMEOUT", timedelta(seconds=1))
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # a process that is not the first gets another
    begin = time.monotonic()
    said = said_by(capsys, *evaluate(tiny, "--output", str(tmp_path / "out")))
    assert "WORLD_SIZE is 2" in said and "unset WORLD_SIZE" in said and time.monotonic() - begin < 20
