"""An error on one of several processes is everybody's before it is raised: nobody waits for a process that has gone on."""

import json

import pytest

from launching import script, torchrun

FULL_QUOTA = """
import errno, json, os, sys
from openunlearn_nb.internals import processes
from openunlearn_nb.internals.errors import OpenUnlearnError
from openunlearn_nb.internals.files import write_json
from openunlearn_nb.experiments.workers import Inline, Task, run_tasks

processes.join_group()
if processes.is_main():
    replace = os.replace
    def full(source, target):
        if "first" in str(target):
            raise OSError(errno.EDQUOT, "Disk quota exceeded")
        replace(source, target)
    os.replace = full

def work(task, progress):
    write_json(os.path.join(sys.argv[1], task.split, "result.json"), {"row": task.row})
    return {"seen": sum(processes.gathered(1))}

told = []
run_tasks([Task("first", "NPO"), Task("second", "NPO")], work, Inline(lambda *_: None), lambda task, values, error: told.append((task.split, values, str(error))))
everybody = processes.gathered(told)
if processes.is_main():
    open(os.path.join(sys.argv[1], "told.json"), "w").write(json.dumps(everybody))
processes.leave_group()
"""


def test_a_full_quota_of_the_main_process_fails_the_cell_on_all(tmp_path):
    torchrun(script(tmp_path, FULL_QUOTA), str(tmp_path), limit=120)
    told = json.loads((tmp_path / "told.json").read_text())
    assert told[0] == told[1]
    (split, values, error), (next_split, next_values, _) = told[0]
    assert (split, values) == ("first", None) and "Disk quota exceeded" in error
    assert (next_split, next_values) == ("second", {"seen": 2})
    assert not (tmp_path / "first/result.json").exists() and (tmp_path / "second/result.json").exists()


ONE_ALONE = """
from openunlearn_nb.internals import processes
from openunlearn_nb.internals.errors import OpenUnlearnError
from openunlearn_nb.experiments.workers import Inline, Task, run_tasks

processes.join_group()
import openunlearn_nb.experiments.workers as workers
workers.raised_by_all = lambda: processes.raised_by_all(5)  # seconds

def work(task, progress):
    if processes.is_main():
        raise OpenUnlearnError("only the main process cannot read its file")
    return {"seen": sum(processes.gathered(1))}

run_tasks([Task("first", "NPO"), Task("second", "NPO")], work, Inline(lambda *_: None), lambda *_: None)
print("went on")
"""


def test_an_error_that_one_process_has_alone_ends_them_all(tmp_path):
    done = torchrun(script(tmp_path, ONE_ALONE), limit=120, check=False)
    assert done.returncode != 0 and "went on" not in done.stdout and "only the main process cannot read its file" in done.stderr


SAVE = """
import json, os, sys, time
from pathlib import Path
from openunlearn_nb.internals import processes
from openunlearn_nb.internals.errors import OpenUnlearnError
from openunlearn_nb.models.loading import quiet
from openunlearn_nb.models.saving import save_model
from openunlearn_nb.models.tiny import tiny_llama, train_tokenizer
from openunlearn_nb.experiments.seeds import copy_cell
from openunlearn_nb.internals.files import write_json

quiet()
processes.join_group()
tokenizer = train_tokenizer(["some words to train on"], 300)
model = tiny_llama(tokenizer, hidden=32, layers=1)
if processes.is_main():
    model.save_pretrained = lambda folder: (_ for _ in ()).throw(OSError(122, "Disk quota exceeded"))
said = []
for work in (lambda: save_model(model, tokenizer, Path(sys.argv[1]) / "model"), lambda: copy_cell(Path(sys.argv[1]) / "nowhere", Path(sys.argv[1]) / "there")):
    try:
        work()
        said.append("no error")
    except OpenUnlearnError as e:
        said.append(str(e))
time.sleep(2 * processes.rank())  # the other process comes to the next line when the main one could have written the file
if not (Path(sys.argv[1]) / "note.json").exists():
    write_json(Path(sys.argv[1]) / "note.json", {})
said.append("written")
everybody = processes.gathered(said)
if processes.is_main():
    open(os.path.join(sys.argv[1], "told.json"), "w").write(json.dumps(everybody))
processes.leave_group()
"""


def test_saving_a_model_and_copying_a_cell_fail_on_all(tmp_path):
    """And a file that is written where it is missing is written once, however far apart the processes are."""
    torchrun(script(tmp_path, SAVE), str(tmp_path), limit=120)
    told = json.loads((tmp_path / "told.json").read_text())
    assert told[0] == told[1] and "Disk quota exceeded" in told[0][0] and told[0][1].startswith("Cannot copy") and told[0][2] == "written"


def test_without_a_group_the_error_is_as_it_was():
    from openunlearn_nb.internals.processes import on_main

    with pytest.raises(ZeroDivisionError):
        on_main(lambda: 1 / 0)
