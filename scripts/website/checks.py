"""What can be wrong with the files of the site: missing pages and anchors, things from elsewhere, paths of a machine.

What shows only in a window is looked at in browser.py."""

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parents[2]
PATHS = re.compile(r"(?:/home|/root|/tmp|/Users|/work|/private)/[\w.-]+|[A-Z]:\\\\?\w+")  # of a machine
REMOTE_STYLE = re.compile(r"""@import\s+(?:url\()?["']?(?:https?:)?//[^;)"']*|url\(\s*["']?(?:https?:)?//[^)"']*""")
LATEX = re.compile(r"\\\(.*?\\\)|\\\[.*?\\\]")


class Page(HTMLParser):
    """Ids, links and text of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.words: list[str] = []
        self.styles: list[str] = []
        self.inside: list[str] = []  # script and style elements around
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {key: value or "" for key, value in attrs}
        if tag in ("script", "style"):
            self.inside.append(tag)
        self.ids |= {given[key] for key in ("id", "name") if given.get(key)}
        self.links += [given[key] for key in ("href", "src") if given.get(key) and tag != "use"]
        loads = tag in ("script", "img", "iframe", "source") or (tag == "link" and given.get("rel") != "canonical")
        self.fetched += [given[key] for key in ("href", "src") if loads and given.get(key)]
        self.styles.append(given.get("style", ""))

    def handle_endtag(self, tag: str) -> None:
        if self.inside and tag == self.inside[-1]:
            self.inside.pop()

    def handle_data(self, data: str) -> None:
        if "style" in self.inside:
            self.styles.append(data)
        elif "script" not in self.inside:
            self.words.append(data)

    @property
    def text(self) -> str:
        return "".join(self.words)


def missing_pages(docs: Path) -> Iterator[str]:
    """Notebooks that are not in the sidebar, and entries of the sidebar without a page."""
    listed = re.findall(r"[\w/]+\.ipynb", (ROOT / "_quarto.yml").read_text(encoding="utf-8"))
    books = (file for file in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in file.parts)
    for name in sorted({file.relative_to(ROOT / "nbs").as_posix() for file in books} - set(listed)):
        yield f"{name}: not in the sidebar of _quarto.yml"
    for name in listed:
        if not (docs / name).with_suffix(".html").exists():
            yield f"{name}: no page"


def target_of(link: str, file: Path, docs: Path) -> Path:
    """The file that a link of a page leads to."""
    path = unquote(urlsplit(link).path)
    target = docs / path.lstrip("/") if path.startswith("/") else file.parent / path
    target = target if path else file
    return target / "index.html" if target.is_dir() else target


def broken_links(file: Path, page: Page, pages: dict[Path, Page], docs: Path) -> Iterator[str]:
    for link in page.links:
        parts = urlsplit(link)
        if parts.scheme or parts.netloc:
            continue
        target = target_of(link, file, docs)
        if not target.exists():
            yield f"no {link}"
        elif parts.fragment and (other := pages.get(target.resolve())) and unquote(parts.fragment) not in other.ids:
            yield f"no anchor {link}"


def faults_of_text(page: Page) -> Iterator[str]:
    for left in LATEX.findall(page.text):
        if "\\" in left[2:-2]:
            yield f"LaTeX left over, {left[:60]}"
    yield from (f"a path of a machine, {path}" for path in sorted(set(PATHS.findall(page.text))))


def from_elsewhere(page: Page) -> Iterator[str]:
    yield from (f"loads {link}" for link in page.fetched if urlsplit(link).netloc)
    yield from (f"its style loads {link}" for style in page.styles for link in REMOTE_STYLE.findall(style))


def problems(docs: Path) -> list[str]:
    """What is wrong with the site, a line each."""
    found = list(missing_pages(docs))
    pages = {file: Page(file.read_text(encoding="utf-8")) for file in sorted(docs.rglob("*.html"))}
    for file, page in pages.items():
        faults = [*broken_links(file, page, pages, docs), *from_elsewhere(page), *faults_of_text(page)]
        found += [f"{file.relative_to(docs)}: {fault}" for fault in faults]
    for file in sorted(docs.rglob("*.css")):
        style = file.read_text(encoding="utf-8")
        found += [f"{file.relative_to(docs)}: loads {link}" for link in REMOTE_STYLE.findall(style)]
    return found
