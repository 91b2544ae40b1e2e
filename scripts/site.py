"""The site into _docs, without Quarto: nbdev's processed notebooks, rendered by smalldocs, then looked at.

    python scripts/site.py             # build and check
    python scripts/site.py --check     # check what is there

Every notebook of the sidebar must be a page; links to pages, anchors and files must lead somewhere; no page may name a path of this machine
or load anything from elsewhere: equations become MathML, which browsers draw themselves. With Quarto, `nbdev_docs` makes the same pages.
"""

import html
import inspect
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

from fastcore import docments

ROOT = Path(__file__).resolve().parents[1]
DOCS, MADE = ROOT / "_docs", ROOT / "_proc"
PATHS = re.compile(r"(?:/home|/root|/tmp|/Users|/work|/private)/[\w.-]+|[A-Z]:\\\\?\w+")  # of a machine
REMOTE_STYLE = re.compile(r"""@import\s+(?:url\(\s*)?["']?(?:https?:)?//[^"')]*["']?\s*\)?[^;]*;""")


class Page(HTMLParser):
    """Ids, links and text of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.ids, self.links, self.fetched, self.words, self.skip = set(), [], [], [], 0
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.skip += tag in ("script", "style")
        self.ids |= {attrs[k] for k in ("id", "name") if attrs.get(k)}
        self.links += [attrs[k] for k in ("href", "src") if attrs.get(k)]
        self.fetched += [attrs[k] for k in ("href", "src") if tag in ("script", "link", "img") and attrs.get("rel") != "canonical" and attrs.get(k)]

    def handle_endtag(self, tag):
        self.skip -= tag in ("script", "style")

    def handle_data(self, data):
        if not self.skip:
            self.words.append(data)


def signature(function: Callable, eval_str: bool = False) -> inspect.Signature:
    """`inspect.signature`; an annotation whose import is for type checkers alone stays a text."""
    try:
        return inspect.signature(function, eval_str=eval_str)
    except NameError:
        return inspect.signature(function)


docments.signature = signature  # what nbdev shows signatures by; in its workers too, which import this file


def build() -> None:
    """Process the notebooks (API entries, links between them), and render them."""
    from nbdev.serve import proc_nbs

    shutil.rmtree(MADE, ignore_errors=True), shutil.rmtree(DOCS, ignore_errors=True)
    proc_nbs()
    done = subprocess.run(["smalldocs", "render", "--quiet", str(MADE)], capture_output=True, text=True)
    told = [line for line in done.stderr.splitlines() if "output-file is not read" not in line and "keep-md is ignored" not in line]  # Quarto's own
    print("\n".join(told))
    if done.returncode:
        sys.exit("smalldocs failed.")
    shutil.move(MADE / "_docs", DOCS)
    for file in DOCS.rglob("*.html"):
        file.write_text(equations(file.read_text(encoding="utf-8")), encoding="utf-8")
    for file in DOCS.rglob("*.css"):  # the reader's own fonts, which the themes name after those that they would load
        file.write_text(REMOTE_STYLE.sub("", file.read_text(encoding="utf-8")), encoding="utf-8")
    shutil.copy(ROOT / "nbs" / "search.js", DOCS / "site_libs" / "fuse" / "fuse.min.js")  # it answers as Fuse does


def equations(page: str) -> str:
    """The page with MathML in the place of LaTeX and of the scripts that would fetch a renderer."""
    from latex2mathml.converter import convert

    def drawn(found: re.Match) -> str:
        display = "display" in found[1]
        return convert(html.unescape(found[2]), display="block" if display else "inline")

    page = re.sub(r'<span class="math (inline|display)">\\[(\[](.*?)\\[)\]]</span>', drawn, page, flags=re.S)
    return re.sub(r'<script[^>]*src="https://cdn[^>]*></script>|<link[^>]*href="https://cdn[^>]*>', "", page)


def problems() -> list[str]:
    """What is wrong with the site."""
    pages = {file: Page(file.read_text(encoding="utf-8")) for file in sorted(DOCS.rglob("*.html"))}
    listed = re.findall(r"[\w/]+\.ipynb", (ROOT / "_quarto.yml").read_text(encoding="utf-8"))
    there = {str(file.relative_to(ROOT / "nbs")) for file in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in file.parts}
    found = [f"{name}: not in the sidebar of _quarto.yml" for name in sorted(there - set(listed))]
    found += [f"{name}: no page" for name in listed if not (DOCS / name).with_suffix(".html").exists()]
    for file, page in pages.items():
        name = file.relative_to(DOCS)
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (DOCS / unquote(parts.path).lstrip("/") if parts.path.startswith("/") else file.parent / unquote(parts.path)) if parts.path else file
            target = target / "index.html" if target.is_dir() else target
            if not target.exists():
                found.append(f"{name}: no {link}")
            elif parts.fragment and (other := pages.get(target.resolve())) and unquote(parts.fragment) not in other.ids:
                found.append(f"{name}: no anchor {link}")
        found += [f"{name}: loads {link}" for link in page.fetched if urlsplit(link).netloc]
        found += [f"{name}: LaTeX left over, {left[:60]}" for left in re.findall(r"\\\(.*?\\\)|\\\[.*?\\\]", "".join(page.words)) if "\\" in left[2:-2]]
        found += [f"{name}: a path of a machine, {path}" for path in sorted(set(PATHS.findall("".join(page.words))))]
    for file in sorted(DOCS.rglob("*.css")):
        found += [f"{file.relative_to(DOCS)}: loads {link}" for link in REMOTE_STYLE.findall(file.read_text(encoding="utf-8"))]
    return found


def main() -> None:
    if "--check" not in sys.argv:
        build()
    found = problems()
    print("\n".join(found))
    if found:
        sys.exit(f"{len(found)} problems of the site.")
    print(f"{len(list(DOCS.rglob('*.html')))} pages, no broken link.")


if __name__ == "__main__":  # nbdev's workers import this file
    main()
