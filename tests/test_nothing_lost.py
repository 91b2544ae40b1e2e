"""Machines go down, disks fill up, downloads break off: a clear sentence, and nothing half-written taken for a result."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from openunlearn_nb.commands.cli import main
from openunlearn_nb.experiments.grid import plan
from openunlearn_nb.evaluation.records import read_json

GRID = ["tofu", "--train-rows", "250", "--splits", "forget01", "--methods", "NPO,PDU", "--epochs", "3", "--eval-each", "epoch",
        "--save-each", "epoch", "--seeds", "0", "1", "--quiet"]
OF_THE_DAY = ("date", "seconds", "environment", "peak_memory_gb", "model_path")  # the last: where the cache is


def openunlearn(*command: str, **env: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-m", "openunlearn_nb", *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1", **env})


def records(folder: Path) -> dict:
    """All that a grid left, timings aside."""
    found = {str(f.relative_to(folder)): read_json(f) for f in sorted(folder.rglob("*.json"))}
    return {name: {k: v for k, v in record.items() if k not in OF_THE_DAY} for name, record in found.items()}


def models(cache: Path) -> dict:
    return {f.parent.name: f.read_bytes() for f in cache.glob("*/model.safetensors")}


def kill(run: subprocess.Popen, everything: bool) -> bool:
    """SIGKILL for all processes of a run (a power cut) or its first; whether it was still running."""
    if run.poll() is not None:
        return False
    (os.killpg if everything else os.kill)(run.pid, signal.SIGKILL)
    run.communicate()
    return True


@pytest.mark.slow
def test_a_grid_killed_twenty_times(tmp_path):
    """At random moments, cold cache included; each time the same command again. In the end all records equal an uninterrupted grid's."""
    begin = time.monotonic()
    run = openunlearn(*GRID, "--output", str(tmp_path / "whole"), OPENUNLEARN_CACHE=str(tmp_path / "whole-cache"))
    assert run.wait() == 0, run.stderr.read()
    length, dice, kills, rounds = time.monotonic() - begin, random.Random(0), 0, 0
    while kills < 20 or not rounds:
        folder, cache = tmp_path / f"cut-{rounds}", tmp_path / f"cache-{rounds}"
        done = False
        while not done:
            run = openunlearn(*GRID, "--output", str(folder), OPENUNLEARN_CACHE=str(cache))
            if kills < 20:
                time.sleep(dice.uniform(2, 0.6 * length))
                kills += kill(run, everything=dice.random() < 0.7)
            out, err = run.communicate() if run.stdout and not run.stdout.closed else ("", "")
            done = run.returncode == 0
            assert run.returncode in (0, -signal.SIGKILL), err
            time.sleep(1.5)  # a worker whose parent was killed ends within a second
        assert records(folder) == records(tmp_path / "whole") and models(cache) == models(tmp_path / "whole-cache")
        rounds += 1
    print(f"{kills} kills in {rounds} grids of {length:.0f} s")
    assert not list(tmp_path.rglob("checkpoint-*"))  # checkpoints go when their run is done


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A small model in a folder, saved in one file and in shards."""
    from openunlearn_nb.data.miniature_tofu import make_tofu
    from openunlearn_nb.models.loading import quiet
    from openunlearn_nb.models.saving import save_model
    from openunlearn_nb.models.tiny import tiny_llama, train_tokenizer

    quiet()
    tokenizer = train_tokenizer([r["question"] + r["answer"] for r in make_tofu()["forget01"]], 500)
    model, folder = tiny_llama(tokenizer, hidden=32, layers=2), tmp_path_factory.mktemp("saved")
    save_model(model, tokenizer, folder / "one")
    save_model(model, tokenizer, folder / "shards")
    (folder / "shards/model.safetensors").unlink()
    model.save_pretrained(folder / "shards", max_shard_size="60KB")
    assert len(list((folder / "shards").glob("*.safetensors"))) > 1
    return folder


EVAL = ["eval", "tofu", "--split", "forget01", "--metrics", "forget_Q_A_Prob"]


def refused(capsys, *command: str) -> str:
    """The one sentence with which a command ends."""
    assert main(list(command)) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("openunlearn: ") and len(said) < 600
    return said


def test_a_checkpoint_with_a_missing_shard(saved, tmp_path, capsys):
    broken = shutil.copytree(saved / "shards", tmp_path / "model")
    assert main([*EVAL, "--model", str(broken), "--output", str(tmp_path / "whole")]) == 0
    lost = sorted(broken.glob("*.safetensors"))[1]
    lost.unlink()
    said = refused(capsys, *EVAL, "--model", str(broken), "--output", str(tmp_path / "out"))
    assert "Cannot load the model" in said and lost.name in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", [lambda data: data[:len(data) // 2], lambda data: data[:100], lambda data: b"",
                                    lambda data: b"\xff" * 8 + data[8:], lambda data: data[:20] + b"\x00\x01" + data[22:]])
def test_corrupted_weights(saved, tmp_path, capsys, damage):
    broken = shutil.copytree(saved / "one", tmp_path / "model")
    (broken / "model.safetensors").write_bytes(damage((broken / "model.safetensors").read_bytes()))
    said = refused(capsys, "train", "--model", str(broken), "--method", "NPO", "--split", "forget01", "--output", str(tmp_path / "out"))
    assert "Cannot load the model" in said and str(broken) in said and "damaged or incomplete" in said
    assert not (tmp_path / "out").exists()


HUB = r'''
import http.server, os, sys
from pathlib import Path
folder, cut = Path(sys.argv[1]), sys.argv[2] == "cut"

class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the Hub as a download asks for; `cut`: the connection breaks off in the middle of the weights."""
    def do_HEAD(self): self.answer(False)
    def do_GET(self): self.answer(True)
    def log_message(self, *args): pass
    def answer(self, body):
        name = self.path.split("?")[0].rsplit("/", 1)[-1]
        file = folder / name
        if "/resolve/" not in self.path or not file.is_file():
            self.send_response(404); self.send_header("X-Error-Code", "EntryNotFound"); self.send_header("Content-Length", "0"); self.end_headers()
            return
        data = file.read_bytes()
        begin = int(self.headers["Range"].removeprefix("bytes=").split("-")[0]) if self.headers.get("Range") else 0
        self.send_response(206 if begin else 200)
        for key, value in {"ETag": f'"{name}-{len(data)}"', "X-Repo-Commit": "0" * 40, "Content-Length": len(data) - begin, "Accept-Ranges": "bytes"}.items():
            self.send_header(key, str(value))
        self.end_headers()
        if body:
            self.wfile.write(data[begin:begin + 1000] if cut and name == "model.safetensors" else data[begin:])
            self.close_connection = True

server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
print(server.server_port, flush=True)
server.serve_forever()
'''


def test_an_interrupted_download(saved, tmp_path):
    """A Hub that breaks off in the middle of the weights: one sentence; once it is back, the same command works."""
    command = [*EVAL, "--model", "someone/model", "--output", str(tmp_path / "out")]
    for how in ("cut", "whole"):
        hub = subprocess.Popen([sys.executable, "-c", HUB, str(saved / "one"), how], stdout=subprocess.PIPE, text=True)
        try:
            place = f"http://127.0.0.1:{hub.stdout.readline().strip()}"
            run = openunlearn(*command, HF_ENDPOINT=place, HF_HOME=str(tmp_path / "hub"), HF_HUB_OFFLINE="0", HF_HUB_DISABLE_XET="1",
                              TRANSFORMERS_OFFLINE="0", DISABLE_SAFETENSORS_CONVERSION="1", no_proxy="127.0.0.1")
            _, said = run.communicate(timeout=240)
        finally:
            hub.kill()
        if how == "cut":
            assert run.returncode == 2 and "Traceback" not in said
            assert "Cannot load the model 'someone/model'" in said.strip().splitlines()[-1]
            assert not (tmp_path / "out").exists() and not list((tmp_path / "hub").rglob("model.safetensors"))
    assert run.returncode == 0 and (tmp_path / "out/TOFU_EVAL.json").exists(), said


def can_mount() -> bool:
    return shutil.which("unshare") is not None and not subprocess.run(
        ["unshare", "-rm", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True).returncode


def on_disk(mount: str, keep: Path, *command: str) -> tuple[int, str]:
    """Exit code and words of a command that writes to a disk of its own, whose files are in `keep` afterwards."""
    disk = keep.parent / "disk"
    disk.mkdir(exist_ok=True), keep.mkdir()
    script = f'mount -t tmpfs -o {mount} none "$0" && "$@"; code=$?; cp -a "$0"/. {keep}; exit $code'
    done = subprocess.run(["unshare", "-rm", "sh", "-c", script, str(disk), sys.executable, "-m", "openunlearn_nb", *command],
                          capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert "Traceback" not in done.stderr
    return done.returncode, done.stderr


mounts = pytest.mark.skipif(not can_mount(), reason="this user may not mount a small disk")
SMALL = ["--train-rows", "250", "--split", "forget01"]


@mounts
@pytest.mark.parametrize("mount, why", [("size=4k", "No space left on device"), ("ro", "Read-only file system")])
@pytest.mark.parametrize("command", [["eval", "tofu", *SMALL, "--metrics", "forget_Q_A_Prob"],
                                     ["train", "--method", "GradAscent", *SMALL, "--epochs", "1"],
                                     ["train", "--method", "GradAscent", *SMALL, "--epochs", "2", "--save-each", "epoch"],
                                     ["alternates", *SMALL, "--repeats", "9"]])
def test_a_full_or_read_only_disk(command, mount, why, tmp_path):
    code, said = on_disk(mount, tmp_path / "kept", *command, "--output", str(tmp_path / "disk/out"))
    sentence = said.strip().splitlines()[-1]
    assert code == 2 and sentence.startswith("openunlearn: Cannot ") and why in sentence and "disk/out" in sentence
    left = [f for f in (tmp_path / "kept").rglob("*") if f.is_file() and f.stat().st_size and f.name != ".lock"]
    assert [f.name for f in left] in ([], ["TOFU_EVAL.json"]) and all(map(read_json, left))  # whole; without run.json it is not yet a run's


@pytest.mark.slow
@mounts
def test_a_grid_on_a_full_disk(small_grid, tmp_path):
    """What was written before the disk was full is whole; with room again the same command finishes it."""
    whole, grid = small_grid
    command = ["tofu", "--train-rows", str(grid.train_rows), "--splits", "forget01", "--methods", "NPO,IdkDPO", "--epochs", "2", "--quiet", "--output"]
    code, said = on_disk("size=400k", tmp_path / "kept", *command, str(tmp_path / "disk/grid"))
    assert code in (1, 2) and "No space left on device" in said
    folder = tmp_path / "kept/grid"
    for file in folder.rglob("*.json"):
        read_json(file)
    assert {task.row for task in plan(grid, str(folder))} >= {"NPO", "IdkDPO"} - {f.parent.name for f in folder.rglob("run.json")}
    assert main([*command, str(folder)]) == 0 and records(folder) == records(whole)


def test_truncated_records(small_grid, tmp_path, capsys):
    """Cut at any place, a record is named, never read as a result; the grid makes the cell anew."""
    whole, grid = small_grid
    for name in ("run.json", "TOFU_EVAL.json", "TOFU_SUMMARY.json"):
        folder = tmp_path / name
        shutil.copytree(whole, folder)
        file = folder / "forget01/NPO" / name
        for part in (0.0, 0.3, 0.99):
            data = (whole / "forget01/NPO" / name).read_bytes()
            file.write_bytes(data[:int(part * len(data))])
            assert [task.row for task in plan(grid, str(folder)) if task.row] == ["NPO"]
            if name != "TOFU_SUMMARY.json":  # tables are made from the rows' values
                assert str(file) in refused(capsys, "table", str(folder))
            assert main(["table", str(folder), "--check"]) != 0 and "NPO" in "".join(capsys.readouterr())


def test_a_damaged_training_checkpoint(tmp_path, capsys):
    """It is named, and what to do about it; not gone on from."""
    from openunlearn_nb.experiments import runs

    command = ["train", "--method", "NPO", "--split", "forget01", "--train-rows", "250", "--epochs", "2", "--save-each", "epoch",
               "--output", str(tmp_path / "out")]
    discard, runs.discard = runs.discard, lambda folder: None  # as if killed before the checkpoint was deleted
    try:
        assert main(command) == 0
    finally:
        runs.discard = discard
    shutil.rmtree(tmp_path / "out")
    checkpoint, = (tmp_path / "out.checkpoint").glob("checkpoint-*")
    for name in ("model.safetensors", "optimizer.pt", "method.safetensors", "run.json", "trainer_state.json"):
        data = (checkpoint / name).read_bytes()
        (checkpoint / name).write_bytes(data[:len(data) // 2])
        said = refused(capsys, *command)
        assert str(checkpoint) in said and "damaged" in said and "delete it" in said and not (tmp_path / "out").exists()
        (checkpoint / name).write_bytes(data)
    assert "another" in refused(capsys, *command, "--learning-rate", "0.5")
    assert main(command) == 0 and (tmp_path / "out/model.safetensors").exists() and not (tmp_path / "out.checkpoint").exists()


def test_two_grids_in_one_folder(small_grid, tmp_path, capsys):
    from openunlearn_nb.internals.locks import output_lock

    folder, grid = small_grid
    with output_lock(folder):
        said = refused(capsys, "tofu", "--train-rows", str(grid.train_rows), "--splits", "forget01", "--methods", "NPO,IdkDPO", "--epochs", "2",
                       "--output", str(folder))
    assert "Another process" in said and str(os.getpid()) in said


def test_no_refusals(tmp_path, capsys):
    """An empty file of them is said before anything is trained."""
    from openunlearn_nb.data.miniature_tofu import make_tofu
    from openunlearn_nb.data.tofu import write_tofu

    data = write_tofu(tmp_path / "TOFU", make_tofu())
    (data / "idontknow.jsonl").write_text("\n")
    said = refused(capsys, "tofu", "--data", str(data), "--splits", "forget01", "--methods", "IdkDPO", "--output", str(tmp_path / "grid"))
    assert str(data / "idontknow.jsonl") in said and not (tmp_path / "grid/forget01").exists()


def test_a_broken_cell_is_recorded_and_the_others_go_on(tmp_path, capsys, monkeypatch):
    """The others are made all the same, the exit code is 1, the table says it; made at the next call, nothing is left of the failure."""
    from openunlearn_nb.experiments import cells

    def breaks(config, method, *args, **how):
        if method == "IdkDPO":
            raise RuntimeError("no memory left")
        return whole(config, method, *args, **how)

    whole, grid = cells.unlearn, tmp_path / "grid"
    command = ["tofu", "--train-rows", "250", "--splits", "forget01", "--methods", "NPO,IdkDPO", "--epochs", "1", "--jobs", "1", "--output", str(grid)]
    with monkeypatch.context() as patch:
        patch.setattr(cells, "unlearn", breaks)
        assert main(command) == 1
    said, failed = capsys.readouterr(), read_json(grid / "forget01/IdkDPO/failed.json")
    assert "IdkDPO forget01: failed. RuntimeError: no memory left" in said.err and "measured" in said.out
    assert failed["error"] == "RuntimeError: no memory left" and "in breaks" in failed["traceback"]
    assert not (grid / "forget01/IdkDPO/run.json").exists() and (grid / "forget01/NPO/run.json").exists()
    assert main(["table", str(grid), "--check"]) == 1 and "no memory left" in "".join(capsys.readouterr())
    assert main(command) == 0 and not (grid / "forget01/IdkDPO/failed.json").exists()
    assert main(["table", str(grid), "--check"]) == 0
