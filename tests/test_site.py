"""The built site in a browser: pages have their tables, plots and equations, and text from models stays text."""

import csv
import html
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

HERE = Path(__file__).parent
DOCS = Path(__file__).resolve().parents[1] / "_docs"
CHROMIUM = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
pytestmark = [pytest.mark.skipif(not DOCS.is_dir(), reason="the site is not built: python scripts/site.py"),
              pytest.mark.skipif(not CHROMIUM, reason="no Chromium here (apt install chromium)")]
PAGES = {"index.html": ("table", "pre"), "results/tofu_llama2_7b.html": ("table", "img"), "results/leaderboard.html": ("table",),
         "methods/method.html": ("table", "math", "pre"), "data/custom.html": ("pre",)}


def browser(*flags: str) -> str:
    with tempfile.TemporaryDirectory() as profile:
        done = subprocess.run([CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
                               "--disable-component-update", "--disable-sync", "--hide-scrollbars", f"--user-data-dir={profile}", *flags],
                              capture_output=True, text=True, timeout=120, env={**os.environ, "HOME": profile})
    return done.stdout


@pytest.mark.parametrize("page", PAGES)
def test_a_page_has_what_it_should(page, tmp_path):
    drawn = browser("--dump-dom", f"file://{DOCS / page}")
    assert all(re.search(f"<{tag}[ >]", drawn) for tag in PAGES[page])
    for width in (1280, 400):
        shot = tmp_path / f"{width}.png"
        browser(f"--window-size={width},1400", f"--screenshot={shot}", f"file://{DOCS / page}")
        assert shot.stat().st_size > 20_000  # an empty page is smaller


def test_search_finds_what_people_ask_for(tmp_path):
    with open(HERE / "questions.csv", encoding="utf-8", newline="") as file:
        wanted = {line["question"]: set(line["pages"].split()) for line in csv.DictReader(file)}
    entries = (DOCS / "search.json").read_text(encoding="utf-8").replace("</", "<\\/")
    script = (DOCS / "site_libs/fuse/fuse.min.js").read_text(encoding="utf-8")
    ask = "const search = new Fuse(entries); document.body.textContent = JSON.stringify(questions.map((q) => search.search(q, {limit: 3}).map((r) => r.page)));"
    (tmp_path / "ask.html").write_text(f"<meta charset='utf-8'><body><script>{script}</script><script>const entries = {entries}, "
                                       f"questions = {json.dumps(list(wanted))}; {ask}</script></body>", encoding="utf-8")
    drawn = browser("--dump-dom", f"file://{tmp_path / 'ask.html'}")
    answers = json.loads(html.unescape(re.search(r"<body>(.*)</body>", drawn, re.S)[1]))
    missed = [f"{question}: {', '.join(found)}" for (question, pages), found in zip(wanted.items(), answers, strict=True) if not pages & set(found)]
    assert not missed, "\n".join(missed)


FAULTS = {"clipped <pre": '<div style="overflow: hidden"><pre style="overflow: hidden">' + "long " * 300 + "</pre></div>",
          "the page is": '<div style="width: 2000px">wide</div>', "clipped <p": '<p style="overflow: hidden">' + "long" * 300 + "</p>",
          "a backslash in avg": r"<p>avg\_loss</p>", r"a backslash in \|": r"<math><mo>\|</mo></math>", "no alt text, <svg>": "<svg></svg>",
          "no alt text, <img>": '<img src="a.png">',
          "requests https": "<style>@import url(https://example.invalid/font.css);</style>"}
SOUND = ('<div style="overflow-x: auto"><pre>' + "long " * 300 + r"</pre></div><p>text</p><code>a\_b</code>"
         '<svg role="img" aria-label="A plot"></svg><img src="a.png" alt="A plot">')


def test_the_browser_finds_each_fault(tmp_path):
    sys.path.insert(0, str(HERE.parent / "scripts" / "website"))
    import browser as looked

    for i, body in enumerate([SOUND, *FAULTS.values()]):
        (tmp_path / f"{i}.html").write_text(f'<!doctype html><meta charset="utf-8"><main class="content">{body}</main>', encoding="utf-8")
    found = looked.problems(tmp_path)
    assert not [fault for fault in found if fault.startswith("0.html")]
    for i, fault in enumerate(FAULTS, 1):
        assert any(line.startswith(f"{i}.html") and fault in line for line in found), (fault, found)
