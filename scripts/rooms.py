"""The first page of each room (`nbs/ROOM/index.ipynb`): its chapters, what each shows, and the names that it defines.

The sidebar in `_quarto.yml` gets chapters that are not in it yet, and loses those that are gone. Run by scripts/readme.py."""

import ast
import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SIDEBAR = ROOT / "_quarto.yml"
ROOMS = {  # folder: title, question, and what a reader should know before the chapters
    "data": ("Data and benchmarks", "What is forgotten, what must stay, and which questions show it?",
             "A benchmark is one object: its data sets, splits, metrics and recipes. Rows of text become token ids in one place, "
             "which knows where an answer begins. TOFU, MUSE and WMDP are here, miniatures of the first two that need no "
             "network, and benchmarks made of your own files."),
    "models": ("Models", "Which models are compared, and what do they answer?",
               "A model is loaded and checked first, so that a damaged one is not taken for one that has forgotten. Then it is "
               "run for one of three things: the likelihoods that a loss is made of, the log-probabilities of given answers, "
               "or answers of its own. Each has a chapter. The other chapters make tokenizers, small models and adapters."),
    "methods": ("Methods", "What does each method make more likely, and what less?",
                "A method is a loss over forget and retain rows, with settings whose defaults cite their source. The losses are "
                "pure functions of tensors, each tested against its equation. Begin with `Losses`; then each family of methods "
                "has a chapter, and `Method` shows how one of your own is declared. [Methods compared](../reference/methods/index.ipynb) "
                "has a page about each method, with its settings and results."),
    "training": ("Training", "How does a loss become a run?",
                 "The trainer is a `transformers.Trainer` over pairs of forget and retain rows. To train in Python, read "
                 "`Unlearning with a trainer`; the chapters before it have its arguments and its data, the ones after it show how "
                 "it works and how it resumes. The last four compute, before a run starts, how much memory it needs."),
    "evaluation": ("Evaluation", "Did it forget, does it stay forgotten, and what else was lost?",
                   "A model scores the given answers of each data set and writes its own; every metric is computed from these "
                   "two without the model. `Evaluate` is the call for a model in memory. To add a metric read `Metric`, to add "
                   "an attack `Attacks`. `Metrics`, `ROUGE`, `Membership` and `Gibberish` define the numbers of the tables; "
                   "the chapters after the catalogue show how they come about and how they are stored."),
    "experiments": ("Experiments", "How does one command become a table?",
                    "A run is one model, method and split. A grid is many runs, divided over GPUs and continued after an "
                    "interruption. Each leaves a record from which it can be repeated."),
    "reporting": ("Reporting", "Can a number be traced to what made it?",
                  "Tables, plots and reports are made from records alone, this package's or published ones."),
    "commands": ("Command line", "Which commands and options are there?",
                 "The command line reads options and calls the functions of the other rooms; it computes nothing itself. "
                 "`openunlearn COMMAND --help` prints each command's options with an example."),
    "internals": ("Internals", "What makes it fast and safe?",
                  "This is an appendix: you can use and extend the package without reading it. It has the code for several "
                  "processes, for files that are written whole or not at all, for locks, sharded weights, and errors of one "
                  "sentence."),
}


def cells(file: Path) -> list[tuple[str, str]]:
    """Kind and text of a notebook's cells."""
    return [(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(file.read_text(encoding="utf-8"))["cells"]]


def title_and_summary(file: Path) -> tuple[str, str]:
    text = cells(file)[0][1]
    summary = re.search(r"^> (.*)$", text, re.M)
    return text.splitlines()[0].removeprefix("# "), summary[1] if summary else ""


def defined(file: Path) -> list[str]:
    """Public functions and classes that a chapter exports, in its order."""
    trees = [ast.parse(text) for kind, text in cells(file) if kind == "code" and text.startswith("#| export")]
    found = [node.name for tree in trees for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    return [name for name in dict.fromkeys(found) if not name.startswith("_")]


def listed(room: str) -> list[Path]:
    """The chapters of a room, in the sidebar's order."""
    names = re.findall(rf"- {room}/(\w+)\.ipynb", SIDEBAR.read_text(encoding="utf-8"))
    return [ROOT / "nbs" / room / f"{name}.ipynb" for name in names if name != "index"]


def update_sidebar() -> None:
    lines = SIDEBAR.read_text(encoding="utf-8").splitlines()
    named = re.compile(r"- ([\w/]+\.ipynb)")
    lines = [line for line in lines if not named.search(line) or (ROOT / "nbs" / named.search(line)[1]).exists()]
    for room in ROOMS:
        for file in sorted((ROOT / "nbs" / room).glob("*.ipynb")):
            entry = f"- {room}/{file.name}"
            places = [i for i, line in enumerate(lines) if line.strip().startswith(f"- {room}/")]
            if entry not in map(str.strip, lines):
                indent = lines[places[0]].split("-")[0]
                lines.insert(places[0] if file.stem == "index" else places[-1] + 1, indent + entry)
    SIDEBAR.write_text("\n".join(lines) + "\n", encoding="utf-8")


def notebook(prefix: str, texts: list[str]) -> str:
    """A notebook of markdown cells; their ids begin with the prefix."""
    made = [{"cell_type": "markdown", "id": f"{prefix}-{i}", "metadata": {}, "source": text.splitlines(True)}
            for i, text in enumerate(texts)]
    kernel = {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}
    book = {"cells": made, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(book, indent=1, ensure_ascii=False) + "\n"


def page(room: str) -> str:
    """The notebook that is a room's first page."""
    title, question, about = ROOMS[room]
    rows = ["| chapter | what it shows | defines |", "|---|---|---|"]
    for file in listed(room):
        name, summary = title_and_summary(file)
        rows.append(f"| [{name}]({file.name}) | {summary} | {', '.join(f'`{d}`' for d in defined(file))} |")
    return notebook(room[:5], [f"# {title}\n\n> {question}", about, "\n".join(["## Chapters", "", *rows])])


def main() -> None:
    for room in ROOMS:
        (ROOT / "nbs" / room / "index.ipynb").touch()
    update_sidebar()
    for room in ROOMS:
        (ROOT / "nbs" / room / "index.ipynb").write_text(page(room), encoding="utf-8")


if __name__ == "__main__":
    main()
