"""The scripts in benchmarks/ for a GPU that is had for minutes: rehearsed on a CPU, cut off, short of time; and they
count what they say."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import gpu  # noqa: E402
import wheels  # noqa: E402
from blocks import Block, Record, Skipped, run_blocks  # noqa: E402
from gpu_run1 import METHODS, Bench, forward_flops, step_flops  # noqa: E402
from gpu_tables import gpu_tables, none_yet  # noqa: E402

from openunlearn_nb.internals.errors import OpenUnlearnError  # noqa: E402
from openunlearn_nb.methods.method import METHODS as DECLARED  # noqa: E402
from openunlearn_nb.evaluation.records import read_json  # noqa: E402


def call(*argv: str) -> Path:
    return gpu.main(list(argv), time.monotonic())


def later(seconds: float = 60) -> float:
    return time.monotonic() + seconds


@pytest.fixture(scope="module")
def bench():
    return Bench(gpu.parser().parse_args(["run1", "--shape", "tiny", "--output", "."]))


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    """The record of a whole run1 at a size for a CPU."""
    return call("run1", "--shape", "tiny", "--peak-tflops", "0.5", "--output", str(tmp_path_factory.mktemp("run1")))


@pytest.fixture(scope="module")
def second(tmp_path_factory):
    """The record of a whole run2, everything in this process, and its command."""
    folder = tmp_path_factory.mktemp("run2")
    command = [
        "run2",
        "--shape",
        "tiny",
        "--jobs",
        "1",
        "--methods",
        "NPO,RMU",
        "--rows",
        "4",
        "--finetune-epochs",
        "1",
        "--epochs",
        "1",
        "--work",
        str(folder / "work"),
        "--output",
        str(folder),
    ]
    return call(*command), command


def test_flops_are_torchs_own(bench):
    """torch's counter, over a forward that computes the head at the last `labelled` positions only, and over a
    backward."""
    llama, sizes = bench.fresh(), bench.sizes
    llama.set_attn_implementation("eager")
    for length, labelled in [(5, 1), (40, 12), (64, 64)]:
        with FlopCounterMode(display=False) as counter:
            out = llama(torch.arange(length)[None], logits_to_keep=labelled).logits
        forward = counter.get_total_flops()
        # the rotary frequencies, a product of 8 x 1 by 1 x length: no work of the model's
        assert forward_flops(sizes, length, labelled) == pytest.approx(forward, rel=1e-3)
        with FlopCounterMode(display=False) as counter:
            out.sum().backward()
        assert counter.get_total_flops() == pytest.approx(
            2 * forward, rel=0.02
        )  # embeddings and the first layer's rotation aside
    llama.set_attn_implementation("sdpa")


def test_a_step_that_asks_for_more_has_more_flops(bench):
    """NPO: two parts, a forward and a backward of each. IdkDPO: a third part. UNDIAL: one part, and the reference's
    forward. RMU: no head."""
    flops = {
        method: step_flops(bench, method, bench.settings(method))
        for method in ("NPO", "IdkDPO", "UNDIAL", "CEU", "RMU")
    }
    assert flops["IdkDPO"] == pytest.approx(1.5 * flops["NPO"], rel=0.1)
    assert flops["UNDIAL"] == pytest.approx(4 / 3 * flops["CEU"]) and flops["CEU"] == pytest.approx(
        flops["NPO"] / 2, rel=0.1
    )
    assert flops["RMU"] < flops["NPO"]


def test_weights_are_the_same_after_every_training(bench):
    """In fp32 and bf16; nothing of what was trained before is left."""
    first = [p.clone() for p in bench.fresh().parameters()]
    assert {p.dtype for p in bench.fresh(half=True).parameters()} == {torch.bfloat16}
    with torch.no_grad():
        for p in bench.model.parameters():
            p.add_(1)
    assert all(torch.equal(p, old) for p, old in zip(bench.fresh().parameters(), first))


@pytest.mark.filterwarnings("ignore")
def test_run1_measures_all_that_it_says(rehearsal):
    """Every block to its end; every method there is, with its memory beside the plan's; and the usual way against the
    package's."""
    blocks = read_json(rehearsal)["blocks"]
    assert {name: entry for name, entry in blocks.items() if "seconds" not in entry} == {}
    assert set(METHODS) == set(DECLARED)
    for method in METHODS:
        found = blocks[f"{method}, 4 rows"]["result"]
        assert found["steps"] == 3 and found["tokens_a_second"] > 0 and 0 < found["model_flops_utilisation"] < 1
        assert found["peak_gb"] > 0.1 and 0 < found["planned_gb"] <= found["planned_with_margin_gb"]
    assert {(rows, kept) for rows in (1, 2, 4) for kept in (True, False)} == {
        (of["result"]["rows"], of["result"]["checkpointing"]) for name, of in blocks.items() if name.startswith("NPO, ")
    }
    for method in ("NPO", "UNDIAL", "RMU"):
        both = blocks[f"the usual way: {method}"]["result"]
        assert both["usual"]["last_loss"] == pytest.approx(both["ours"]["last_loss"], rel=0.02)  # of weights in bf16
    whole = blocks["the usual way: evaluation"]["result"]
    assert whole["usual"]["tokens"]["scoring"] > 1.5 * whole["ours"]["tokens"]["scoring"]


@pytest.mark.filterwarnings("ignore")
def test_run2_goes_from_a_base_model_to_the_tables(second):
    """Two fine-tunings, the methods between their yardsticks, three models in fp32 and bf16; what cannot run here says
    why."""
    blocks = read_json(second[0])["blocks"]
    assert set(blocks["fine-tuning"]["result"]) >= {"full", "retain90"}
    assert set(blocks["methods"]["result"]) == {"Retain", "Finetuned", "NPO", "RMU"} and "seconds" in blocks["methods"]
    found = blocks["fp32 and bf16"]["result"]
    assert found["fp32"].keys() == found["bf16"].keys() == {"Retain", "NPO", "Finetuned"}
    assert found["bf16"]["NPO"]["forget_Q_A_Prob"] == pytest.approx(found["fp32"]["NPO"]["forget_Q_A_Prob"], rel=0.05)
    assert found["fp32"]["Finetuned"] == pytest.approx(
        {k: blocks["methods"]["result"]["Finetuned"][k] for k in found["fp32"]["Finetuned"]}, rel=0.05
    )
    assert blocks["four bits"].keys() & {"result", "skipped"} and blocks["ZeRO-3"] == {
        "skipped": "there is no GPU here"
    }


@pytest.mark.filterwarnings("ignore")
def test_a_second_call_runs_nothing_again(second):
    """But for what was skipped; and it keeps to the first one's recipe."""
    file, command = second
    before = read_json(file)["blocks"]
    made = {f: f.stat().st_mtime for name in ("run.json", "train.json") for f in file.parent.rglob(name)}
    assert call(*command) == file and read_json(file)["blocks"] == before
    assert len(made) == 7 and {f: f.stat().st_mtime for f in made} == made
    with pytest.raises(OpenUnlearnError, match="record of epochs 1, not 2"):
        call(*command, "--epochs", "2")


@pytest.mark.slow
def test_run2_side_by_side(tmp_path):
    """The fine-tunings at once and the cells in worker processes find what one process finds."""
    command = [
        "run2",
        "--shape",
        "tiny",
        "--methods",
        "NPO",
        "--rows",
        "4",
        "--finetune-epochs",
        "1",
        "--epochs",
        "1",
        "--seconds",
        "600",
    ]
    found = []
    for jobs in ("1", "2"):
        folder = tmp_path / jobs
        record = read_json(
            call(
                *command,
                "--jobs",
                jobs,
                "--only",
                "model and data;fine-tuning;methods",
                "--work",
                str(folder / "work"),
                "--output",
                str(folder),
            )
        )
        found.append(
            {
                row: {k: v for k, v in of.items() if k != "seconds"}
                for row, of in record["blocks"]["methods"]["result"].items()
            }
        )
    assert found[0].keys() == {"Retain", "Finetuned", "NPO"} and found[1] == {
        row: pytest.approx(of) for row, of in found[0].items()
    }


def counting(calls: list[str], name: str, act=lambda: {"found": 1}, seconds: float = 1.0) -> Block:
    def run():
        calls.append(name)
        return act()

    return Block(name, run, seconds)


def fails():
    raise RuntimeError("CUDA out of memory.\nTried to allocate 20 GiB")


def skips():
    raise Skipped("bitsandbytes is not installed")


def cut_off():
    raise SystemExit(143)


def test_a_cut_off_loses_the_block_in_flight_alone(tmp_path):
    """What ended before is in the file, and a second call goes on from there."""
    calls: list[str] = []
    blocks = [counting(calls, "a"), counting(calls, "b", cut_off), counting(calls, "c")]
    with pytest.raises(SystemExit):
        run_blocks(blocks, Record(tmp_path / "r.json", {}), later())
    assert read_json(tmp_path / "r.json")["blocks"].keys() == {"a"}
    run_blocks([blocks[0], counting(calls, "b"), blocks[2]], Record(tmp_path / "r.json", {}), later())
    assert calls == ["a", "b", "b", "c"] and read_json(tmp_path / "r.json")["blocks"].keys() == {"a", "b", "c"}


def test_a_killed_process_leaves_a_whole_record(tmp_path):
    """SIGTERM while a program runs beside: the record holds what was told so far, and the program has ended."""
    script = f"""
import signal, sys, time
from pathlib import Path
sys.path.insert(0, {str(BENCHMARKS)!r})
from blocks import Block, Record, run_blocks
from gpu_run2 import side_by_side

signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
here = Path(sys.argv[1])
program = ["-c", "import os, time; print(os.getpid(), flush=True); time.sleep(60)"]

def long():
    for _ in side_by_side([program], [here / "log"]):
        yield {{"program": (here / "log").read_text().strip()}}

run_blocks([Block("a", dict, 1), Block("long", long, 1)], Record(here / "r.json", {{}}), time.monotonic() + 60)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], env={**os.environ, "PYTHONPATH": str(BENCHMARKS.parent)}
    )
    told = lambda: read_json(tmp_path / "r.json")["blocks"].get("long", {}) if (tmp_path / "r.json").exists() else {}
    waited = later(120)
    while not told().get("result", {}).get("program") and time.monotonic() < waited:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 143
    blocks = read_json(tmp_path / "r.json")["blocks"]
    assert blocks["a"].keys() == {"result", "seconds"} and blocks["long"]["unfinished"] == "cut off"
    with pytest.raises(ProcessLookupError):
        os.kill(int(blocks["long"]["result"]["program"]), 0)


def test_what_goes_wrong_in_a_block_ends_it_alone(tmp_path):
    """An error is told in a line, a reason as it was given; both are tried again."""
    calls: list[str] = []
    blocks = [counting(calls, "out of memory", fails), counting(calls, "four bits", skips), counting(calls, "c")]
    for _ in range(2):
        run_blocks(blocks, Record(tmp_path / "r.json", {}), later())
    found = read_json(tmp_path / "r.json")["blocks"]
    assert found["out of memory"] == {"failed": "RuntimeError: CUDA out of memory. Tried to allocate 20 GiB"}
    assert found["four bits"] == {"skipped": "bitsandbytes is not installed"} and found["c"]["result"] == {"found": 1}
    assert calls == ["out of memory", "four bits", "c", "out of memory", "four bits"]


def test_a_block_without_time_is_skipped_and_shorter_ones_run(tmp_path):
    calls: list[str] = []
    run_blocks(
        [counting(calls, "long", seconds=600), counting(calls, "short")], Record(tmp_path / "r.json", {}), later()
    )
    found = read_json(tmp_path / "r.json")["blocks"]
    assert (
        calls == ["short"] and found["long"].keys() == {"skipped"} and "needs about 600 s" in found["long"]["skipped"]
    )


def test_a_block_that_grows_stops_when_time_is_up(tmp_path):
    """And what it has is kept."""
    ended: list[bool] = []

    def grows():
        try:
            for n in range(1000):
                time.sleep(0.02)
                yield {"n": n}
        finally:
            ended.append(True)

    run_blocks([Block("grows", grows, 0.1)], Record(tmp_path / "r.json", {}), later(0.3))
    found = read_json(tmp_path / "r.json")["blocks"]["grows"]
    assert 0 < found["result"]["n"] < 999 and "time was up" in found["unfinished"] and ended == [True]


def test_a_block_that_there_is_not_is_told(tmp_path):
    with pytest.raises(OpenUnlearnError, match="Unknown block 'NPO, 5 rows'"):
        call("run1", "--shape", "tiny", "--only", "NPO, 5 rows", "--output", str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_record_of_something_else_is_left_alone(tmp_path):
    run_blocks([counting([], "a")], Record(tmp_path / "r.json", {"shape": "tiny"}), later())
    with pytest.raises(OpenUnlearnError, match="a record of shape 'tiny', not 'large'"):
        Record(tmp_path / "r.json", {"shape": "large"})


@pytest.mark.filterwarnings("ignore")
def test_tables_show_the_records(rehearsal, second, tmp_path):
    """A row a block with its card; what was not measured, and why. Without a record, none."""
    one, two = gpu_tables(rehearsal.parent, "run1"), gpu_tables(second[0].parent, "run2")
    steps = one["Training, scoring, generation"]
    assert set(steps.index) == {"cpu"} and {f"{m}, 4 rows" for m in METHODS} <= set(steps["measured"])
    assert {"tokens/s", "utilisation", "peak GB", "planned GB"} <= set(steps.columns)
    assert list(one["Against the usual way"]["measured"]) == ["NPO", "UNDIAL", "RMU", "evaluation"]
    assert "Not measured" not in one and list(two["Not measured"]["measured"])[-1] == "ZeRO-3"
    assert (
        list(two["Methods"]["row"]) == ["Retain", "Finetuned", "NPO", "RMU"]
        and len(two["The same weights, scored in fp32 and in bf16"]) == 6
    )
    assert gpu_tables(tmp_path, "run1") == {} and "gpu.py run1" in none_yet("run1")
    broken = json.loads(rehearsal.read_text()) | {"card": "H100", "blocks": {"ceilings": {"failed": "no"}}}
    (tmp_path / "gpu_run1_H100.json").write_text(json.dumps(broken))
    assert gpu_tables(tmp_path, "run1")["Not measured"].to_dict("index") == {
        "H100": {"measured": "ceilings", "why": "failed: no"}
    }


def test_wheels_come_in_parts_that_join(tmp_path):
    """Small ones whole and in order, one that is larger than a part in pieces; what is not whole yet is told."""
    sizes = {"a-1.whl": 30, "b-1.whl": 250, "c-1.whl": 60, "d-1.whl": 90}
    (tmp_path / "all").mkdir()
    for name, size in sizes.items():
        (tmp_path / "all" / name).write_bytes(os.urandom(size))
    parts = wheels.lay({name: tmp_path / "all" / name for name in sizes}, tmp_path, 100)
    assert [[f.name for f in sorted(part.iterdir())] for part in parts] == [
        ["a-1.whl", "b-1.whl.1of3"],
        ["b-1.whl.2of3"],
        ["b-1.whl.3of3"],
        ["c-1.whl"],
        ["d-1.whl"],
    ]
    assert all(sum(f.stat().st_size for f in part.iterdir()) <= 100 for part in parts)
    whole, missing = wheels.join(parts[:2], tmp_path / "joined")
    assert [f.name for f in whole] == ["a-1.whl"] and missing == ["b-1.whl"]
    whole, missing = wheels.join(parts, tmp_path / "joined")
    assert missing == [] and {f.name: f.read_bytes() for f in whole} == {
        name: (tmp_path / "all" / name).read_bytes() for name in sizes
    }
