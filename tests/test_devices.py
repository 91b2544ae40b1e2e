"""A worker a GPU: cells are dealt over the devices, each process sees its own, and a device that fails stops no other. On a CPU, with simulated devices."""

import os
import re
import shlex
import shutil
import signal
import subprocess
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from openunlearn_nb.commands.cli import main
from openunlearn_nb.commands.grammar import parse
from openunlearn_nb.internals.registry import import_file
from openunlearn_nb.methods.method import METHODS
from openunlearn_nb.reporting.collect import find_runs, measured
from openunlearn_nb.reporting.seeds import by_seed
from openunlearn_nb.internals.errors import OpenUnlearnError
from openunlearn_nb.experiments.grid_config import GridConfig
from openunlearn_nb.experiments.grid import default_jobs, run_grid
from openunlearn_nb.internals.launch import config_file, only_device, own_device, visible_devices
from openunlearn_nb.evaluation.records import read_json
from openunlearn_nb.experiments.cells import cell_folder
from openunlearn_nb.experiments.workers import Task, run_all

TWO = ("fake0", "fake1")
DEADLY = """
import os
import signal
from pathlib import Path

from openunlearn_nb.models.forwards import sequence_nll
from openunlearn_nb import method


@method("Deadly", paper="a test")
def deadly(model, batch, ref_model, s):
    "Its process is killed at the first step of the first try."
    mark = Path("{mark}")
    if not mark.exists():
        mark.write_text(os.environ["OPENUNLEARN_DEVICE"])
        os.kill(os.getpid(), signal.SIGKILL)
    nll, n = sequence_nll(model, batch["forget"])
    return -(nll / n).mean()
"""


@pytest.fixture
def two_devices(monkeypatch):
    """Two simulated devices; a real GPU is hidden."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("OPENUNLEARN_DEVICES", ",".join(TWO))


def environment_of(task, progress):
    """Work: what the worker's environment says."""
    import torch

    return {"cuda": os.environ["CUDA_VISIBLE_DEVICES"], "own": own_device(), "visible": visible_devices(), "threads": torch.get_num_threads()}


def killed_on(device, marks, task, progress):
    """Work: the process of `device` is killed at its first task; the others have done theirs meanwhile."""
    if own_device() == device and not (marks / "killed").exists():
        (marks / "killed").write_text(task.row)
        os.kill(os.getpid(), signal.SIGKILL)
    return {"device": own_device(), "pid": os.getpid()}


def run(work, rows, jobs):
    """`{row: values or error}` of independent tasks, and what was told meanwhile."""
    ends, notes = {}, []

    def done(task, values, error):
        ends[task.row] = error or values

    def report(key, what):
        if key is None:
            notes.append(what)

    run_all([Task("cell", row) for row in rows], work, jobs, report, done)
    return ends, notes


def test_workers_are_dealt_over_the_devices_and_see_their_own_alone(two_devices):
    """Three on two devices: two share one."""
    ends, _ = run(environment_of, "abc", 3)
    assert Counter(values["own"] for values in ends.values()) == {"fake0": 2, "fake1": 1}
    for values in ends.values():
        assert values == {"cuda": values["own"], "own": values["own"], "visible": [values["own"]], "threads": 1}
    assert own_device() is None and os.environ["CUDA_VISIBLE_DEVICES"] == ""  # the parent's environment is as it was


def test_one_job_runs_here_unless_a_device_was_chosen(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert run(environment_of, "a", 1)[0]["a"]["own"] is None
    monkeypatch.setenv("OPENUNLEARN_DEVICES", "fake1")
    assert run(environment_of, "a", 1)[0]["a"]["own"] == "fake1"


def test_devices_of_a_machine_with_gpus(monkeypatch):
    """Eight GPUs, as the driver counts them; names are those of CUDA_VISIBLE_DEVICES where it is set."""
    import torch

    gpus = 8
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_devices() == [*"01234567"] and default_jobs(GridConfig(model="Llama-3.2-1B-Instruct")) == 8 == default_jobs(GridConfig())
    monkeypatch.setenv("OPENUNLEARN_DEVICES", "6, 2")
    assert visible_devices() == ["6", "2"] and default_jobs(GridConfig()) == 2
    for wrong, why in (("2,8", "names '8', which is not among the GPUs here"), ("2,2", "names a device twice: 2,2")):
        monkeypatch.setenv("OPENUNLEARN_DEVICES", wrong)
        with pytest.raises(OpenUnlearnError, match=why):
            visible_devices()
    monkeypatch.delenv("OPENUNLEARN_DEVICES")
    gpus = 2
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-8f5c,GPU-17aa,GPU-unknown")  # CUDA ends the list where a name is unknown
    assert visible_devices() == ["GPU-8f5c", "GPU-17aa"]
    with only_device("GPU-17aa"):
        assert visible_devices() == ["GPU-17aa"]
    monkeypatch.setenv("WORLD_SIZE", "2")  # under a launcher all processes work on one cell
    assert default_jobs(GridConfig()) == 1


def test_without_gpus_as_many_jobs_as_before(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert visible_devices() == [] and default_jobs(GridConfig(model="Llama-3.2-1B-Instruct")) == 1
    assert default_jobs(GridConfig()) == min(4, len(os.sched_getaffinity(0)))


def test_amd_gpus_by_the_name_their_runtime_prefers(monkeypatch):
    import torch

    monkeypatch.setattr(torch.version, "hip", "6.2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("HIP_VISIBLE_DEVICES", "4,5")
    assert visible_devices() == ["4", "5"]
    with only_device("5"):
        assert os.environ["HIP_VISIBLE_DEVICES"] == "5"
    assert os.environ["HIP_VISIBLE_DEVICES"] == "4,5"


@pytest.mark.slow  # half a minute of two grids
def test_three_methods_on_two_devices(two_devices, small_grid, tmp_path):
    """Both are used, by cells at the same time; the results are those of one process."""
    grid = replace(small_grid[1], methods=("NPO", "IdkDPO", "GradDiff"))
    assert run_grid(grid, tmp_path / "two", show=False) == []  # two jobs by default
    records = {row: read_json(cell_folder(tmp_path / "two", "forget01", row) / "run.json") for row in ("Finetuned", "Retain", *grid.methods)}
    assert {record["environment"]["device_id"] for record in records.values()} == set(TWO)
    assert {records[method]["environment"]["device_id"] for method in grid.methods} == set(TWO)
    whole = shutil.copytree(small_grid[0], tmp_path / "whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("OPENUNLEARN_DEVICES")
        assert run_grid(grid, whole, jobs=1, show=False) == []  # GradDiff; the others are there, made without devices
    assert "device_id" not in read_json(whole / "forget01/GradDiff/run.json")["environment"]
    for row in records:
        for file in ("TOFU_EVAL.json", "TOFU_SUMMARY.json"):
            assert read_json(tmp_path / "two/forget01" / row / file) == read_json(whole / "forget01" / row / file), (row, file)


def test_a_device_that_fails_leaves_the_others_at_work(two_devices, tmp_path):
    """Its task is done by another; no task runs twice but that one, and the user is told."""
    ends, notes = run(partial(killed_on, "fake1", tmp_path), "abcdef", 2)
    lost = (tmp_path / "killed").read_text()
    assert set(ends) == set("abcdef") and all(values["device"] == "fake0" for values in ends.values())
    assert len({values["pid"] for values in ends.values()}) == 1  # the other's process is the one that it was
    assert notes == [f"{lost} cell: its process on device fake1 ended; it is tried again by itself."]


@pytest.mark.slow
def test_a_grid_whose_worker_is_killed(two_devices, small_grid, tmp_path, monkeypatch):
    """`kill -9` for the worker of one cell, once: the other cell stands, and so does that one in the end, made on the other device."""
    file, mark, folder = tmp_path / "deadly.py", tmp_path / "killed", shutil.copytree(small_grid[0], tmp_path / "grid")
    file.write_text(DEADLY.format(mark=mark))
    shutil.rmtree(folder / "forget01/NPO")
    monkeypatch.setattr(METHODS, "_objects", dict(METHODS))  # for this test only
    import_file(str(file))
    grid = replace(small_grid[1], methods=("Deadly", "NPO"), imports=(str(file),))
    assert run_grid(grid, folder, show=False) == []
    device_of = {row: read_json(cell_folder(folder, "forget01", row) / "run.json")["environment"]["device_id"] for row in grid.methods}
    assert {mark.read_text(), device_of["Deadly"]} == set(TWO) and device_of["NPO"] == device_of["Deadly"]
    assert read_json(folder / "forget01/NPO/TOFU_EVAL.json") == read_json(small_grid[0] / "forget01/NPO/TOFU_EVAL.json")


SCRIPT = config_file("slurm").read_text()
COMMANDS = re.findall(r"^(?:# )?(?:openunlearn|accelerate launch .* -m openunlearn_nb) (tofu .*)$", SCRIPT, re.M)


def test_the_batch_script_is_shell():
    assert subprocess.run(["bash", "-n", config_file("slurm")], capture_output=True).stderr == b""
    uncommented = re.sub(r"^# (?=\S+=|openunlearn|accelerate)", "", SCRIPT, flags=re.M)
    assert uncommented != SCRIPT and subprocess.run(["bash", "-n"], input=uncommented.encode(), capture_output=True).stderr == b""


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_of_the_batch_script_are_known(command, monkeypatch):
    values = {"SLURM_GPUS_ON_NODE": "8", "SEED": "1", "SPLIT": "forget05", "MODEL": "Llama-3.2-1B-Instruct", "DATA": "locuslab/TOFU"}
    line = re.sub(r"\$(\w+)", lambda found: values[found[1]], command)
    assert len(COMMANDS) == 4
    args = parse(shlex.split(line))
    assert args.settings["save_each"] == "epoch" and args.settings["data"] == "locuslab/TOFU" and args.jobs in (8, None)


def test_the_batch_script_is_found_by_its_name(capsys):
    from openunlearn_nb.internals.launch import launch_environment

    assert main(["configs", "slurm"]) == 0
    assert Path(capsys.readouterr().out.strip()).read_text() == SCRIPT
    with pytest.raises(OpenUnlearnError, match="configuration of Accelerate 'slurm'"):
        launch_environment("slurm")


def test_tables_of_an_array_job(small_grid, tmp_path, capsys):
    """A folder for each task: splits are laid out side by side, seeds as mean and spread; two evaluations of one row are refused."""
    folder, grid = small_grid
    for split in ("forget01", "forget05"):
        shutil.copytree(folder, tmp_path / "splits" / split)
    moved = tmp_path / "splits/forget05/forget01"
    for file in moved.glob("*/run.json"):
        file.write_text(file.read_text().replace('"split": "forget01"', '"split": "forget05"'))
    moved.rename(moved.with_name("forget05"))
    assert set(measured(find_runs(tmp_path / "splits"))["embedded"]) == {"forget01", "forget05"}
    for seed in (0, 1):
        there = shutil.copytree(folder, tmp_path / f"seeds/seed{seed}")
        for file in (*there.glob("*/*/run.json"), there / "grid.json"):  # a mere copy would be no other seed
            file.write_text(file.read_text().replace('"seed": 0', f'"seed": {seed}'))
    assert set(by_seed(find_runs(tmp_path / "seeds"))) == {0, 1}
    assert main(["table", str(tmp_path / "seeds")]) == 0 and "seeds 0, 1: mean" in capsys.readouterr().out
    for method in ("NPO", "IdkDPO"):
        shutil.copytree(folder, tmp_path / "methods" / method)
    assert main(["table", str(tmp_path / "methods")]) == 2 and "Two evaluations of" in capsys.readouterr().err
