"""Two processes with ZeRO-3 on a CPU, launched as on GPUs, against one process.

DeepSpeed compiles a communication operation at its first use (about a minute, then cached)."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from launching import accelerate, run, script, torchrun

from openunlearn_nb.commands.cli import main
from openunlearn_nb.methods.method import METHODS
from openunlearn_nb.internals.launch import launch_environment
from openunlearn_nb.evaluation.records import read_json

pytest.importorskip("deepspeed", reason='needs the extra: pip install -e ".[gpu]"')
SCRIPT = str(Path(__file__).with_name("distributed_run.py"))
QUICK = ["NPO", "RMU", "Finetune", "NPO-interrupted", "NPO-sharded LoRA", "GradDiff-divided"]
SLOW = [*sorted(set(METHODS) - set(QUICK)), "NPO-KL", "RMU-sharded", "IdkDPO-sharded", "NPO-LoRA", "RMU-LoRA", "NPO-checkpointing",
        "RMU-checkpointing", "IdkDPO-checkpointing", "PDU-interrupted", "PDU-divided", "UNDIAL-divided"]  # the same machinery again
DDP = ["NPO", "RMU", "RMU-LoRA", "PDU-interrupted", "GradDiff-divided"]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Folders with what one process and what two have made."""
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    run([sys.executable, SCRIPT, str(one), *QUICK], limit=900)
    accelerate(SCRIPT, str(two), *QUICK, limit=900)
    return one, two


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A folder with what one process makes of all that slow tests compare."""
    folder = tmp_path_factory.mktemp("alone")
    run([sys.executable, SCRIPT, str(folder), *SLOW, *(set(DDP) - set(SLOW))], limit=900)
    return folder


def assert_same(one: Path, two: Path, what: str) -> None:
    """The loss of every step and every weight within 1e-4."""
    losses = [json.loads((folder / f"{what}.json").read_text()) for folder in (one, two)]
    assert len(losses[0]) == len(losses[1]) == 15
    assert losses[1] == pytest.approx(losses[0], rel=1e-4, abs=1e-4)
    weights = [load_file(folder / f"{what}.safetensors") for folder in (one, two)]
    assert weights[0].keys() == weights[1].keys()
    assert max(float((weights[0][name] - weights[1][name]).abs().max()) for name in weights[0]) < 1e-4


@pytest.mark.checks(area="Training", given="two processes under ZeRO-3 (`divided`: with 2 rows a forward, and one process with all 16 at once)",
                    then="the losses and weights of one process")
@pytest.mark.parametrize("what", QUICK)
def test_zero3_equals_one_process(both, what):
    assert_same(*both, what)


@pytest.mark.slow
def test_zero3_equals_one_process_in_all_else(alone, tmp_path):
    accelerate(SCRIPT, str(tmp_path), *SLOW, limit=900)
    for what in SLOW:
        assert_same(alone, tmp_path, what)


@pytest.mark.slow
def test_zero3_on_one_process(alone, tmp_path):
    """As on one GPU; the models of the second and third cell are loaded in shards."""
    what = ["NPO", "RMU-sharded", "IdkDPO-sharded"]
    accelerate(SCRIPT, str(tmp_path), *what, processes=1)
    for name in what:
        assert_same(alone, tmp_path, name)


def test_the_weights_really_move(both):
    """Else equal weights would show nothing."""
    one, _ = both
    npo, finetune = load_file(one / "NPO.safetensors"), load_file(one / "Finetune.safetensors")
    assert max(float((npo[name] - finetune[name]).abs().max()) for name in npo) > 1e-2


def test_an_interrupted_run_ends_like_a_whole_one(both):
    for folder in both:
        assert_same(folder, folder, "NPO")
        losses = [json.loads((folder / f"{what}.json").read_text()) for what in ("NPO", "NPO-interrupted")]
        assert losses[0] == pytest.approx(losses[1], rel=1e-6)
        assert [f.name for f in (folder / "NPO-interrupted-kept").iterdir()] == ["checkpoint-10"]


@pytest.mark.slow
@pytest.mark.parametrize("config", ["zero2", "zero3"])
def test_unlearn_trainer_under_deepspeed_goes_on_from_its_newest_whole_checkpoint(config, tmp_path):
    """As after an interruption: the saved weights are those of the whole run, bit for bit. No file is a pickle of DeepSpeed's."""
    done = accelerate(str(Path(SCRIPT).with_name("unlearn_run.py")), str(tmp_path), config=config)
    difference, files = (tmp_path / "found.txt").read_text().splitlines()
    assert float(difference) == 0 and "checkpoint-6 is not complete; it is passed over" in done.stderr
    assert files == "method.safetensors rng_state_0.pth rng_state_1.pth scheduler.pt state.safetensors trainer_state.json"


@pytest.mark.slow
def test_zero2_equals_one_process(alone, tmp_path):
    what = ["NPO", "RMU", "UNDIAL", "NPO-LoRA", "PDU-interrupted"]
    accelerate(SCRIPT, str(tmp_path), *what, config="zero2")
    for name in what:
        assert_same(alone, tmp_path, name)


def test_evaluation_of_two_equals_that_of_one(small_grid, tmp_path):
    """Every metric: aggregates and each row's values within 1e-6, texts the same."""
    folder, grid = small_grid
    command = ["eval", "tofu", "--train-rows", str(grid.train_rows), "--split", "forget01", "--metrics", "all", "--classifier", "characters",
               "--retain-log", str(folder / "forget01/Retain"), "--no-reuse", "--output"]
    assert main([*command, str(tmp_path / "one")]) == 0
    accelerate("-m", "openunlearn_nb", *command, str(tmp_path / "two"))
    one, two = (read_json(tmp_path / n / "TOFU_EVAL.json") for n in ("one", "two"))
    assert one.keys() == two.keys() and len(one) > 30
    compare(one, two)
    assert read_json(tmp_path / "two/run.json")["environment"]["processes"] == 2


def compare(one, two, tolerance: float = 1e-6, path: str = "") -> None:
    if isinstance(one, dict):
        assert one.keys() == two.keys(), path
        for key in one:
            compare(one[key], two[key], tolerance, f"{path}/{key}")
    elif isinstance(one, list):
        assert len(one) == len(two), path
        for i, (a, b) in enumerate(zip(one, two)):
            compare(a, b, tolerance, f"{path}/{i}")
    elif isinstance(one, float):
        assert two == pytest.approx(one, rel=tolerance, abs=tolerance), path
    else:
        assert one == two, path


def test_a_grid_of_two_processes(small_grid, tmp_path):
    """The embedded models are in the cache or taught aside; a row of the table equals one process's on the same batches."""
    _, grid = small_grid
    command = ["tofu", "--train-rows", str(grid.train_rows), "--splits", "forget01", "--methods", "NPO", "--epochs", "2", "--per-device-batch", "2",
               "--eval-each", "epoch", "--no-reuse", "--quiet", "--output"]
    assert main([*command, str(tmp_path / "one"), "--jobs", "1"]) == 0
    done = accelerate("-m", "openunlearn_nb", *command, str(tmp_path / "two"))
    assert done.stdout.count("measured") == 1  # the main process alone prints
    for row in ("Finetuned", "Retain", "NPO"):
        one, two = (read_json(tmp_path / n / "forget01" / row / "TOFU_SUMMARY.json") for n in ("one", "two"))
        assert two == pytest.approx(one, rel=1e-6 if row != "NPO" else 1e-3, abs=1e-6)
    epochs = [read_json(tmp_path / n / "forget01/NPO/epochs.json") for n in ("one", "two")]
    assert set(epochs[0]) == {"1", "2"} and all(epochs[1][e] == pytest.approx(epochs[0][e], rel=1e-3, abs=1e-6) for e in epochs[0])


@pytest.mark.slow
def test_the_embedded_model_is_taught_by_one(tmp_path):
    """In an empty cache, by a process of its own: the same model as without a launcher."""
    command = ["eval", "tofu", "--train-rows", "60", "--split", "forget01", "--metrics", "forget_Q_A_Prob", "--no-reuse", "--output"]
    accelerate("-m", "openunlearn_nb", *command, str(tmp_path / "two"), OPENUNLEARN_CACHE=str(tmp_path / "cache"))
    made, = (tmp_path / "cache").glob("tofu-*")
    assert main([*command, str(tmp_path / "one")]) == 0
    known = Path(os.environ["OPENUNLEARN_CACHE"]) / made.name
    assert (known / "model.safetensors").read_bytes() == (made / "model.safetensors").read_bytes()


THREE_CELLS = """
import gc, json, sys
import torch
from distributed_run import data
from openunlearn_nb.models.loading import load_model, quiet
from openunlearn_nb.models.saving import save_model
from openunlearn_nb.models.tiny import tiny_llama
from openunlearn_nb.training.pairs import TrainConfig
from openunlearn_nb.internals.processes import gathered, is_main, join_group, leave_group
from openunlearn_nb.training.trainer import train

torch.set_num_threads(1)
quiet()
join_group()
tokenizer, examples = data()
start = save_model(tiny_llama(tokenizer, hidden=512, layers=3), tokenizer, sys.argv[1] + "/start")

def living():
    "Bytes of all tensors that are alive."
    gc.collect()
    tensors = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())

found = []
for method, settings in (("NPO", {}), ("UNDIAL", {}), ("RMU", {"module_regex": r"model\\.layers\\.1"})):
    model = load_model(str(start), sharded=True)
    held = sum(p.ds_tensor.numel() + p.numel() * (not p.ds_persist) for p in model.parameters()) / sum(p.ds_numel for p in model.parameters())
    recipe = TrainConfig(learning_rate=1e-3, epochs=1, effective_batch=16, batch_size=4, max_steps=2, gradient_checkpointing=False)
    trained = train(model, tokenizer.pad_token_id, method, examples[:80], examples[80:120], recipe, settings, for_saving=method == "RMU")
    del model
    found.append({"held": held, "living": living() / sum(p.nbytes for p in trained.model.parameters())})
    del trained

def cut(epoch, model):
    raise KeyError

recipe = TrainConfig(learning_rate=1e-3, epochs=2, effective_batch=16, batch_size=4, gradient_checkpointing=False)
size = 4 * sum(p.ds_numel for p in load_model(str(start), sharded=True).parameters())
try:
    train(load_model(str(start), sharded=True), tokenizer.pad_token_id, "RMU", examples[:16], examples[80:120], recipe, settings, after_epoch=cut)
except KeyError:
    pass
found.append({"held": 0.5, "living": living() / size})
found = gathered(found)
if is_main():
    open(sys.argv[1] + "/found.json", "w").write(json.dumps(found))  # standard output is shared with libraries and the other process
leave_group()
"""


@pytest.mark.slow
def test_after_each_of_three_cells_only_the_trained_model_is_left(tmp_path):
    """ZeRO-3 loads a half of every weight on each of two processes, and a finished training gives back all but the model that it made."""
    accelerate(script(tmp_path, THREE_CELLS), str(tmp_path), PYTHONPATH=os.pathsep.join([str(Path(SCRIPT).parent), os.environ.get("PYTHONPATH", "")]))
    main, other = json.loads((tmp_path / "found.json").read_text())
    assert all(cell["held"] == pytest.approx(0.5, abs=0.01) for cell in [*main, *other])
    assert all(1 <= cell["living"] <= 1.1 for cell in [*main[:3], *other[:2]]), (main, other)
    assert other[2]["living"] < 0.1  # the third model was for saving, which the main process does
    assert main[3]["living"] < 0.1 > other[3]["living"]  # the fourth training failed


def test_rmu_leaves_weights_that_its_loss_does_not_reach(both):
    """AdamW of one process leaves weights without a gradient alone; DeepSpeed's would decay them."""
    for folder in both:
        start, end = load_file(folder / "start/model.safetensors"), load_file(folder / "RMU.safetensors")
        after = [name for name in end if "layers.2." in name or name == "model.norm.weight"]
        assert len(after) > 5 and all((start[name] == end[name]).all() for name in after)
        assert not (start["model.layers.0.mlp.up_proj.weight"] == end["model.layers.0.mlp.up_proj.weight"]).all()


@pytest.fixture(scope="module")
def ddp(tmp_path_factory):
    """What two processes make without DeepSpeed."""
    folder = tmp_path_factory.mktemp("ddp")
    torchrun(SCRIPT, str(folder), *DDP)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("what", DDP)
def test_ddp_equals_one_process(alone, ddp, what):
    assert_same(alone, ddp, what)


def test_a_stale_lock_of_the_compiler_is_removed(both, tmp_path):
    """A launch that was killed while DeepSpeed compiled leaves a lock, for which the next one would wait without end."""
    from openunlearn_nb.internals.compile_locks import compile_locks, process_with_open

    known = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "torch_extensions"
    built = next(known.glob("*/deepspeed_shm_comm")) if known.is_dir() else None
    assert built is not None, "the fixture's launch has compiled it"
    lock = tmp_path / "deepspeed_shm_comm/lock"
    shutil.copytree(built, lock.parent)
    lock.touch()
    os.utime(lock, (0, 0))
    done = accelerate(script(tmp_path, "import os\nfrom openunlearn_nb.internals.processes import join_group, leave_group, world_size\njoin_group()\n"
                                       f"open(f'{tmp_path}/rank-{{os.environ[\"RANK\"]}}', 'w').write(str(world_size()))\nleave_group()"),
                      limit=240, TORCH_EXTENSIONS_DIR=str(tmp_path))
    assert [(tmp_path / f"rank-{rank}").read_text() for rank in (0, 1)] == ["2", "2"]  # two processes' prints run into each other
    assert "Removed the lock of deepspeed_shm_comm" in done.stderr and not lock.exists()
    assert all(process_with_open(other) for other in compile_locks())


def test_a_program_that_waits_is_ended_and_says_for_what(tmp_path):
    with pytest.raises(AssertionError, match="(?s)Not done after 2 s.*waiting for a lock"):
        run([sys.executable, "-c", "import time; print('waiting for a lock', flush=True); time.sleep(60)"], limit=2)


def test_fsdp_is_refused_in_one_sentence(tmp_path):
    done = torchrun("-m", "openunlearn_nb", "train", "--method", "GradAscent", "--split", "forget01", "--train-rows", "250", "--output", str(tmp_path / "out"),
                    check=False, ACCELERATE_USE_FSDP="true")
    assert done.returncode != 0 and "FSDP is not supported" in done.stderr and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_from_a_notebook(both, tmp_path):
    """`notebook_launcher` starts its processes so (on a machine without GPUs it starts none), with the environment from `launch_environment`."""
    code = f"""
import os, sys
sys.path.insert(0, {str(Path(SCRIPT).parent)!r})
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from pathlib import Path
from distributed_run import main
os.environ |= {launch_environment("zero3")!r} | {{"ACCELERATE_MIXED_PRECISION": "no"}}
config = LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=2, run_id="x", rdzv_backend="c10d", rdzv_endpoint="127.0.0.1:0", start_method="fork")
elastic_launch(config, main)(Path({str(tmp_path)!r}), ["NPO"])
"""
    run([sys.executable, "-c", code])
    assert_same(both[0], tmp_path, "NPO")
