"""nbdev's notebooks (`_proc`) before they are rendered: definitions under their headings, figures with alt text.

nbdev shows a cell's definitions first and then the cell's source once, under whichever heading came last. Here every
definition is followed by its own lines, with a link to them in the repository. nbdev's signature is left out: the first
of these lines is the signature (of a class, nbdev shows `def Name(*args, **kwargs)`).
"""

import ast
import html
import json
import re
from collections.abc import Iterator
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SHOWN = re.compile(r"^show_doc\((\w+)\)", re.M)
OPTION = re.compile(r"(?m)^#\| ?([\w-]+): (.*)\n?")
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def repository() -> str:
    """Address under which the repository shows a file of its main branch."""
    settings = ConfigParser()
    settings.read(ROOT / "settings.ini", encoding="utf-8")
    return f"{settings['DEFAULT']['git_url']}/blob/{settings['DEFAULT']['branch']}"


def text_of(cell: dict) -> str:
    return "".join(cell["source"])


def options_of(cell: dict) -> dict[str, str]:
    """Quarto's options at the top of a cell, `#| fig-alt: ...`, as text."""
    return {key: value.strip().strip("\"'") for key, value in OPTION.findall(text_of(cell))}


def module_of(notebook: Path) -> Path | None:
    """The module that a notebook exports, from the top of the repository; None for a page that exports nothing."""
    found = re.search(r"#\| default_exp ([\w.]+)", notebook.read_text(encoding="utf-8"))
    return Path("openunlearn_nb", *found[1].split(".")).with_suffix(".py") if found else None


def lines_of_definitions(module: Path) -> dict[str, int]:
    """Name of each function and class of a module -> the line where it begins."""
    tree = ast.parse((ROOT / module).read_text(encoding="utf-8"))
    return {node.name: node.lineno for node in tree.body if isinstance(node, Definition)}


def parts_of(source: str) -> list[tuple[str | None, str]]:
    """(public name or None, its lines) of a source; constants and private helpers go with the next definition."""
    lines = source.splitlines()
    parts, begin = [], 0
    for node in ast.parse(source).body:
        if isinstance(node, Definition) and not node.name.startswith("_"):
            parts.append((node.name, "\n".join(lines[begin:node.end_lineno]).strip("\n")))
            begin = node.end_lineno
    rest = "\n".join(lines[begin:]).strip("\n")
    if not parts:
        return [(None, rest)]
    name, last = parts[-1]
    return [*parts[:-1], (name, f"{last}\n\n{rest}" if rest else last)]


def described(cell: dict) -> str:
    """The docstring as nbdev shows it, with links, without its heading and its signature."""
    text = "".join(cell["outputs"][0]["data"]["text/markdown"]) if cell.get("outputs") else ""
    return re.sub(r"^---\n+#+ [^\n]*\n+(```python\n.*?\n```\n*)?", "", text, count=1, flags=re.S)


def heading(name: str, description: str, link: str) -> dict:
    """A markdown cell: the definition's name, where its source is, and its docstring."""
    source = f"[source]({link}){{.source-link}}" if link else ""
    return {"cell_type": "markdown", "metadata": {}, "source": f"### {name}\n\n{source}\n\n{description}"}


def code(source: str) -> dict:
    return {"cell_type": "code", "metadata": {}, "outputs": [], "execution_count": None, "source": source}


def with_definitions(run: list[dict], links: dict[str, str]) -> Iterator[dict]:
    """The cells of definitions in place of a run of nbdev's: headings first, sources after, in whatever order."""
    docs = {found[1]: cell for cell in run if (found := SHOWN.search(text_of(cell)))}
    for cell in (cell for cell in run if not SHOWN.search(text_of(cell))):
        for name, source in parts_of(OPTION.sub("", text_of(cell))):
            if name in docs:
                yield heading(name, described(docs.pop(name)), links.get(name, ""))
            if source:
                yield code(source)
    yield from docs.values()


def is_definition(cell: dict) -> bool:
    return cell["cell_type"] == "code" and bool(SHOWN.search(text_of(cell)) or "Exported source" in text_of(cell))


def regrouped(cells: list[dict], links: dict[str, str]) -> list[dict]:
    """All cells of a notebook, with its runs of definitions in order."""
    done, run = [], []
    for cell in cells:
        if is_definition(cell):
            run.append(cell)
            continue
        done += [*with_definitions(run, links), cell]
        run = []
    return [*done, *with_definitions(run, links)]


def drawing(svg: str, alt: str) -> str:
    """An SVG as it may stand in a page: without the lines for an XML reader, and named for those who do not see it."""
    svg = svg[svg.index("<svg"):]
    name = f' role="img" aria-label="{html.escape(alt)}"' if alt else ""
    return re.sub(r"<metadata>.*?</metadata>", "", svg.replace("<svg", f"<svg{name}", 1), flags=re.S)


def name_figures(cell: dict) -> None:
    """Give a cell's SVG outputs the alt text of the cell."""
    alt = options_of(cell).get("fig-alt", "")
    for output in cell.get("outputs", []):
        data = output.get("data", {})
        if "image/svg+xml" in data:
            data["text/html"] = f'<div class="figure">{drawing("".join(data.pop("image/svg+xml")), alt)}</div>'
        elif "image/png" in data:
            address = "data:image/png;base64," + "".join(data.pop("image/png")).strip()
            data["text/html"] = f'<div class="figure"><img alt="{html.escape(alt)}" src="{address}"></div>'


def rework(file: Path, source: Path) -> None:
    """Rewrite a processed notebook `file`, made from the notebook `source`."""
    book = json.loads(file.read_text(encoding="utf-8"))
    module = module_of(source)
    lines = lines_of_definitions(module) if module else {}
    links = {name: f"{repository()}/{module.as_posix()}#L{line}" for name, line in lines.items()} if module else {}
    book["cells"] = regrouped(book["cells"], links)
    for cell in book["cells"]:
        name_figures(cell)
    file.write_text(json.dumps(book, ensure_ascii=False), encoding="utf-8")
