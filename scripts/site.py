"""The site into _docs, without Quarto: nbdev's processed notebooks, rendered by smalldocs, finished, and looked at.

    python scripts/site.py             # build and check
    python scripts/site.py --check     # check what is there

The steps stand in scripts/website. With Quarto, `nbdev_docs` makes the same pages from the same notebooks.
"""

import inspect
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from fastcore import docments

ROOT = Path(__file__).resolve().parents[1]
DOCS, MADE = ROOT / "_docs", ROOT / "_proc"
QUARTOS_OWN = ("output-file is not read", "keep-md is ignored", "fig-format", "compiles no Sass")  # smalldocs says so


def signature(function: Callable, eval_str: bool = False) -> inspect.Signature:
    """`inspect.signature`; an annotation whose import is for type checkers alone stays a text."""
    try:
        return inspect.signature(function, eval_str=eval_str)
    except NameError:
        return inspect.signature(function)


docments.signature = signature  # what nbdev shows signatures by; in its workers too, which import this file


def process() -> None:
    """nbdev's notebooks for rendering: API entries, links between names and pages."""
    from nbdev.serve import proc_nbs

    shutil.rmtree(MADE, ignore_errors=True)
    proc_nbs()


def render() -> None:
    """Pages from processed notebooks."""
    from website import notebooks, pages

    shutil.rmtree(DOCS, ignore_errors=True)
    for file in MADE.rglob("*.ipynb"):
        notebooks.rework(file, ROOT / "nbs" / file.relative_to(MADE))
    done = subprocess.run(["smalldocs", "render", "--quiet", str(MADE)], capture_output=True, text=True)
    lines = [line for line in done.stderr.splitlines() if not any(words in line for words in QUARTOS_OWN)]
    print("\n".join(lines))
    if done.returncode:
        sys.exit("smalldocs failed.")
    shutil.move(MADE / "_docs", DOCS)
    pages.finish(DOCS)
    pages.add_search(DOCS, ROOT / "nbs" / "search.js")


def main() -> None:
    from website import browser, checks

    if "--check" not in sys.argv:
        process()
        render()
    found = checks.problems(DOCS) + browser.problems(DOCS)
    print("\n".join(found))
    if found:
        sys.exit(f"{len(found)} problems of the site.")
    print(f"{len(list(DOCS.rglob('*.html')))} pages, no broken link.")


if __name__ == "__main__":  # nbdev's workers import this file
    main()
