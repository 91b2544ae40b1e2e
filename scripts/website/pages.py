"""Rendered pages before they are published: equations as MathML, long lines that wrap, nothing from elsewhere."""

import html
import json
import re
import shutil
from collections import Counter
from pathlib import Path

CODE = re.compile(r"(<pre[^>]*><code[^>]*sourceCode[^>]*>)(.*?)(</code></pre>)", re.S)
OUTPUT = re.compile(r"<pre><code>(.*?)</code></pre>", re.S)
TABLE = re.compile(r'(<div class="(?:scroll|sd-table)">\s*)?(<table\b.*?</table>)', re.S)
REMOTE = re.compile(r'<script[^>]*src="https?://[^>]*></script>|<link[^>]*rel="stylesheet"[^>]*href="https?://[^>]*>')
NUMBER = re.compile(r"[-+−]?[\d,]*\.?\d+(e[-+]?\d+)?%?|nan|NaN|None|-?inf||True|False|-|–|—", re.I)
SHORT = 22  # signs of a cell that stands on one line on a phone too
INDENT = 4  # columns by which the rest of a wrapped line stands to the right of its beginning


def equations(page: str) -> str:
    """The page with MathML in the place of LaTeX."""
    from latex2mathml.converter import convert

    def drawn(found: re.Match) -> str:
        latex = html.unescape(found[2]).replace(r"\lVert", r"\|").replace(r"\rVert", r"\|")  # which the converter knows
        made = convert(latex, display="block" if found[1] == "display" else "inline")
        made = re.sub(r"(?<=<mtext>)[^<]*", lambda text: text[0].replace("\\_", "_"), made)  # \text{avg\_loss}
        made = made.replace(r"\|", "&#x2016;")  # after \big
        return f'<div class="equation">{made}</div>' if found[1] == "display" else made

    return re.sub(r'<span class="math (inline|display)">\\[(\[](.*?)\\[)\]]</span>', drawn, page, flags=re.S)


def lines_in(code: str) -> list[str]:
    """Highlighted code, line by line: a span over several lines is closed at each end and opened again."""
    lines, line, opened = [], "", []
    for piece in re.findall(r"<[^>]+>|\n|[^<\n]+", code):
        if piece == "\n":
            lines.append(line + "</span>" * len(opened))
            line = "".join(opened)
            continue
        line += piece
        if piece.startswith("</"):
            opened.pop()
        elif piece.startswith("<"):
            opened.append(piece)
    return [*lines, line]


def hanging(text: str) -> int:
    """The column at which a line goes on where it wraps: that of the bracket that it leaves open, else four on."""
    opened = []
    for column, sign in enumerate(text):
        if sign in "([{":
            opened.append(column + 1)
        elif sign in ")]}" and opened:
            opened.pop()
    return opened[0] if opened and opened[0] < len(text) else len(text) - len(text.lstrip()) + INDENT


def wrapping(code: str) -> str:
    """Code of which each line is an element of its own, so that what does not fit goes on below, indented."""
    made = []
    for line in lines_in(code):
        text = html.unescape(re.sub(r"<[^>]+>", "", line))
        line = re.sub(r"^ {9,}", r'<span class="indent">\g<0></span>', line)
        made.append(f'<span class="line" style="--in:{hanging(text)}">{line}</span>' if text.strip() else line)
    return "\n".join(made)


def has_columns(text: str) -> bool:
    """Whether a text is a table: in three of its lines, a gap of two blanks begins or ends in the same column."""
    gaps = [gap.span() for line in text.split("\n") for gap in re.finditer(r"(?<=\S) {2,}(?=\S)", line)]
    return any(max(Counter(columns).values()) >= 3 for columns in zip(*gaps))


def output(found: re.Match) -> str:
    """A text output: paragraphs of columns scroll, all others wrap."""
    made: list[tuple[bool, str]] = []
    for paragraph in re.split(r"\n[ \t]*\n", found[1]):
        columns = has_columns(html.unescape(paragraph))
        if made and made[-1][0] == columns:
            made[-1] = columns, f"{made[-1][1]}\n\n{paragraph}"
        else:
            made.append((columns, paragraph))
    kinds = {True: " class=columns tabindex=0", False: ""}
    return "".join(f"<pre{kinds[columns]}><code>{text}</code></pre>" for columns, text in made)


def aligned(table: str) -> str:
    """A table of pandas whose columns of words are marked, so that they begin at the left; numbers end at the right."""
    rows = [re.findall(r"<td>(.*?)</td>", row, re.S) for row in re.findall(r"<tr.*?</tr>", table, re.S)]
    columns = zip(*(row[::-1] for row in rows if row))  # from the right: an index is to the left of them
    words = [not all(NUMBER.fullmatch(cell.strip()) for cell in column) for column in columns]

    def marked(row: re.Match) -> str:
        cells = re.split(r"(?=<t[dh]\b)", row[0])
        for i, is_words in zip(range(len(cells) - 1, 0, -1), words):
            cells[i] = re.sub(r"^<(t[dh])>", r'<\1 class="words">', cells[i]) if is_words else cells[i]
        return "".join(cells)

    return re.sub(r"<tr.*?</tr>", marked, table, flags=re.S)


def with_short_cells(table: str) -> str:
    """A table of prose whose short cells are marked: on a phone they stay on one line, and the others have room."""
    def marked(cell: re.Match) -> str:
        text = html.unescape(re.sub(r"<[^>]+>", "", cell[2])).strip()
        return f'<td class="short"{cell[1]}>{cell[2]}</td>' if len(text) <= SHORT else cell[0]

    return re.sub(r"<td((?: style=[^>]*)?)>(.*?)</td>", marked, table, flags=re.S)


def table(found: re.Match) -> str:
    """A table in a box that scrolls, unless it is in one; a mean and its spread stay on one line."""
    frame, prose = (name in found[2].split(">")[0] for name in ('"dataframe"', '"caption-top table"'))
    shown = aligned(found[2]) if frame else with_short_cells(found[2]) if prose else found[2]
    boxed = f'<div class="scroll" tabindex="0">{shown.replace(" ± ", "&nbsp;±&nbsp;")}'
    return boxed if found[1] else f"{boxed}</div>"


def whole_options(page: str) -> str:
    """The page with the options of a command (`--dry-run`) in its text marked, so that no line ends at their hyphens."""
    def marked(found: re.Match) -> str:
        return re.sub(r"(?<![\w-])--\w[\w-]*", r'<span class="option">\g<0></span>', found[0])

    return re.sub(r"(?<!<pre>)<code>[^<]*--[^<]*</code>", marked, page)


def finished(page: str) -> str:
    """A page of smalldocs as the site shows it."""
    page = whole_options(REMOTE.sub("", equations(page)))
    page = CODE.sub(lambda found: found[1] + wrapping(found[2]) + found[3], page)
    return TABLE.sub(table, OUTPUT.sub(output, page))


def own_fonts(style: str) -> str:
    """A stylesheet that loads no font from elsewhere."""
    return re.sub(r"@import\s+(url\([^)]*\)|[\"'][^\"']*[\"'])[^;]*;", "", style)


def add_search(docs: Path, script: Path) -> None:
    """Put the site's own search in Fuse's place, and its entries beside it, for pages that are opened as files."""
    index, folder = docs / "search.json", docs / "site_libs" / "fuse"
    shutil.copy(script, folder / "fuse.min.js")  # it answers as Fuse does
    entries = json.loads(index.read_text(encoding="utf-8"))
    for entry in entries:
        entry["text"] = entry["text"].removeprefix("source ").replace("Open in Colab ", "")  # the text of links
    text = json.dumps(entries, ensure_ascii=False)
    index.write_text(text, encoding="utf-8")
    (folder / "entries.js").write_text(f"globalThis.siteEntries = {text};\n", encoding="utf-8")


def finish(docs: Path) -> None:
    """Rewrite every page and stylesheet of a rendered site."""
    for file in docs.rglob("*.html"):
        file.write_text(finished(file.read_text(encoding="utf-8")), encoding="utf-8")
    for file in docs.rglob("*.css"):
        file.write_text(own_fonts(file.read_text(encoding="utf-8")), encoding="utf-8")
