"""The package's rooms: which module may import which, and that every module has its notebook."""

import ast
import json
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from openunlearn_nb.methods.names import FINETUNE, METHOD_ALIASES, METHOD_NAMES

ROOT = Path(__file__).resolve().parents[1]
PACKAGE, NOTEBOOKS = ROOT / "openunlearn_nb", ROOT / "nbs"
ROOMS = ("internals", "data", "models", "methods", "training", "evaluation", "experiments", "reporting", "commands")  # lowest first
BY_HAND = {"__init__.py", "__main__.py", "_modidx.py"}  # written by hand, or an index


def modules() -> list[Path]:
    return [file for file in sorted(PACKAGE.rglob("*.py")) if file.name not in BY_HAND]


def imported_rooms(file: Path) -> Iterator[str]:
    """The first folder of every import of the package in a module, also of those inside functions."""
    room = file.parent.name
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            yield room
        elif isinstance(node, ast.ImportFrom) and node.level == 2:
            for module in [node.module] if node.module else [alias.name for alias in node.names]:
                yield module.split(".")[0]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("openunlearn_nb."):
            yield node.module.split(".")[1]


def test_a_room_imports_only_rooms_before_it():
    wrong = [f"{file.relative_to(PACKAGE)} imports {room}" for file in modules() for room in imported_rooms(file)
             if room in ROOMS and ROOMS.index(room) > ROOMS.index(file.parent.name)]
    assert not wrong


def test_modules_are_in_rooms():
    assert {file.parent.name for file in modules()} == set(ROOMS)


def test_every_module_has_its_notebook():
    """`nbdev_export` leaves a module behind whose notebook is gone, and a folder hides a module of its name."""
    made = {match[1] for file in NOTEBOOKS.rglob("*.ipynb") if (match := re.search(r'#\| default_exp ([\w.]+)', file.read_text(encoding="utf-8")))}
    there = {".".join(file.relative_to(PACKAGE).with_suffix("").parts) for file in modules()}
    assert there == made


def name_of(file: Path, root: Path) -> str:
    return file.relative_to(root).with_suffix("").as_posix()


def exported_cells(file: Path) -> Iterator[str]:
    for cell in json.loads(file.read_text(encoding="utf-8"))["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "code" and text.startswith("#| export"):
            yield text


@pytest.mark.parametrize("file", sorted(NOTEBOOKS.rglob("*.ipynb")), ids=lambda file: name_of(file, NOTEBOOKS))
def test_an_exported_cell_has_at_most_40_lines(file):
    assert [text.splitlines()[1] for text in exported_cells(file) if len(text.splitlines()) > 41] == []  # one is nbdev's mark


@pytest.mark.parametrize("file", sorted(NOTEBOOKS.rglob("*.ipynb")), ids=lambda file: name_of(file, NOTEBOOKS))
def test_a_run_of_a_chapter_stands_apart_from_its_imports(file):
    """The site's builder runs a chapter's cells with an import alone, to link names; a run in one would lack its data."""
    cells = json.loads(file.read_text(encoding="utf-8"))["cells"]
    texts = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    if not any("#| default_exp" in text for text in texts):
        pytest.skip("a page that exports nothing")
    bodies = [ast.parse(re.sub("(?m)^[%!].*", "pass", text)).body for text in texts if not text.startswith("#| export")]
    imports = [[isinstance(node, ast.Import | ast.ImportFrom) for node in body] for body in bodies]
    assert [ast.unparse(body[0]) for body, those in zip(bodies, imports) if any(those) and not all(those)] == []


@pytest.mark.parametrize("file", sorted(NOTEBOOKS.rglob("*.ipynb")), ids=lambda file: name_of(file, NOTEBOOKS))
def test_an_exported_line_has_at_most_120_characters(file):
    assert [line for text in exported_cells(file) for line in text.splitlines() if len(line) > 120] == []


@pytest.mark.parametrize("file", modules(), ids=lambda file: name_of(file, PACKAGE))
def test_a_module_has_at_most_300_lines(file):
    assert len(file.read_text(encoding="utf-8").splitlines()) <= 300


@pytest.mark.parametrize("room", ROOMS)
def test_half_of_the_functions_of_a_room_have_fewer_than_10_lines(room):
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in modules() if file.parent.name == room]
    functions = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    assert statistics.median(node.end_lineno - node.lineno + 1 for node in functions) < 10


def words_of(text: str) -> set[str]:
    """The words of a text or an identifier: `MUSE_tofuRows` has MUSE, tofu and Rows."""
    return set(re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", text))


def texts_in_code(file: Path) -> Iterator[tuple[int, str]]:
    """(line, text) of every identifier and string of a module, docstrings aside."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docstrings = {id(node.body[0].value) for node in ast.walk(tree)
                  if isinstance(node, documented) and node.body and isinstance(node.body[0], ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.lineno, node.value
        for field in ("id", "attr", "name", "arg", "module", "asname"):
            if isinstance(text := getattr(node, field, None), str):
                yield getattr(node, "lineno", 0), text


def named_outside(names: list[str], own_modules: set[str], as_spelled: list[str]) -> list[str]:
    """The places where modules other than `own_modules` (such as `data/tofu`) name one of `names`, in any usual case.

    A name that is a word of English stands in `as_spelled`, and is found in that spelling alone."""
    wanted = set(as_spelled).union(*({name, name.lower(), name.title()} for name in names))
    citation = re.compile("arXiv|_PAPER")  # a paper is called after its benchmark
    others = [file for file in modules() if name_of(file, PACKAGE) not in own_modules]
    return [f"{name_of(file, PACKAGE)}:{line} {text!r:.60}" for file in others for line, text in texts_in_code(file)
            if {*words_of(text), *re.findall(r"\w+", text)} & wanted and not citation.search(text)]


def test_no_other_module_names_a_benchmark():
    names = "tofu", "muse", "wmdp", "custom", "miniature_tofu", "miniature_muse", "tofu_metrics", "muse_metrics", "muse_rows", "catalogue"
    assert named_outside(["TOFU", "MUSE", "WMDP"], {f"data/{name}" for name in names}, ["OWN"]) == []


def test_no_other_module_names_a_method():
    """`names` is the list that tables and helps read; `losses` holds the formulas, called after their methods."""
    families = "ascent", "preference", "representation", "distillation", "weighted", "constrained"
    own = {f"methods/{name}" for name in (*families, "names", "losses", "published_settings")}
    assert named_outside([*METHOD_NAMES, *METHOD_ALIASES], own, [FINETUNE]) == []


def test_names_of_methods_need_no_torch():
    code = "import sys, openunlearn_nb.methods.names; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_a_notebook_finds_the_folder_beside_the_checkout():
    """A wrong number of `..` would skip a cell that needs published logs, without a word."""
    wrong = [f"{name_of(file, NOTEBOOKS)}: {path}" for file in NOTEBOOKS.rglob("*.ipynb") if ".ipynb_checkpoints" not in file.parts
             for path in re.findall(r"(?:\.\./)+shared", file.read_text(encoding="utf-8"))
             if (file.parent / path).resolve() != (ROOT.parent / "shared").resolve()]
    assert wrong == []


BAR = re.compile(r"\d(it/s|s/it)|[\u2588-\u258f]|<progress|widget-view")  # of tqdm, as text or as a widget, and of transformers


def is_error_or_bar(output: dict) -> bool:
    """Whether a stored output is a traceback or a progress bar: printed, displayed as text or HTML, or a widget."""
    data = {kind: value for kind, value in output.get("data", {}).items() if not kind.startswith("image/")}
    shown = [output.get("text", ""), *data, *data.values()]
    texts = [json.dumps(part) if isinstance(part, dict) else "".join(part) for part in shown]
    return output["output_type"] == "error" or any(BAR.search(text) for text in texts)


@pytest.mark.parametrize("bar", [
    {"output_type": "stream", "text": [" 40%|####      | 2/5 [00:01<00:02,  1.31it/s]"]},
    {"output_type": "display_data", "data": {"text/plain": ["Map:   0%|          | 0/5 [00:00<?, ? examples/s, 2.5s/it]"]}},
    {"output_type": "display_data", "data": {"text/plain": ["100%|\u2588\u2588\u2588\u258f| 5/5"]}},
    {"output_type": "display_data", "data": {"text/html": ["<div>\n", "<progress value='2' max='5'></progress>"]}},
    {"output_type": "display_data", "data": {"application/vnd.jupyter.widget-view+json": {"model_id": "a1"}, "text/plain": ["Map"]}},
])
def test_a_bar_is_recognised_however_it_is_stored(bar):
    assert is_error_or_bar(bar)
    assert not is_error_or_bar({"output_type": "display_data", "data": {"image/png": "5it/s", "text/html": ["<b>copy, GB/s</b>"]}})


def test_no_stored_output_is_an_error_or_a_progress_bar():
    """A cell that failed when it was run last shows its traceback to every reader."""
    wrong = []
    for file in (file for file in NOTEBOOKS.rglob("*.ipynb") if ".ipynb_checkpoints" not in file.parts):
        outputs = [output for cell in json.loads(file.read_text(encoding="utf-8"))["cells"] for output in cell.get("outputs", [])]
        if any(is_error_or_bar(output) for output in outputs):
            wrong.append(name_of(file, NOTEBOOKS))
    assert wrong == []
