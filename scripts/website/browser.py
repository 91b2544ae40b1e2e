"""The pages of the site in headless Chromium, at the widths of a screen and of a phone.

    python scripts/website/browser.py            # all pages of _docs
    python scripts/website/browser.py muse.html  # those whose path contains it

A page may not be wider than its window; a block that is wider than its place must scroll; nothing is requested from another
host, by a stylesheet either; prose has no backslash; every image has a text. Without Chromium all this is left out, and said so.
"""

import contextlib
import json
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parents[2] / "_docs"
WIDTHS = (1280, 400)
TABS = min(4, os.cpu_count() or 1)  # pages looked at at once
NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--hide-scrollbars", "--remote-debugging-port=0", "--remote-allow-origins=*")

# What costs time and shows no fault: the search with its entries, menus, the dark theme, other hosts, and the drawing itself.
UNREAD = ("*/site_libs/fuse/*", "*/bootstrap.bundle.min.js", "*/darkly.min.css", "http://*", "https://*")
UNDRAWN = """new MutationObserver((_, seen) => {
  if (!document.documentElement) return;
  document.documentElement.style.visibility = "hidden";
  seen.disconnect();
}).observe(document, {childList: true})"""

WIDE = """(() => {
  const scrolls = (e) => ["auto", "scroll"].includes(getComputedStyle(e).overflowX);
  const inBox = (e) => { for (let p = e; p && p.tagName !== "MAIN"; p = p.parentElement) if (scrolls(p)) return true; return false; };
  const spills = (e) => e.clientWidth > 1 && e.scrollWidth > e.clientWidth + 1 && getComputedStyle(e).display !== "inline" && !inBox(e);
  const named = (e) => `<${e.tagName.toLowerCase()}${e.className.baseVal === undefined && e.className ? "." + e.className.split(" ")[0] : ""}>`;
  const said = (e) => `${named(e)} ${e.scrollWidth} in ${e.clientWidth}: ${e.textContent.trim().replace(/\\s+/g, " ").slice(0, 50)}`;
  const found = [...document.querySelectorAll("main.content *")].filter((e) => !e.closest("svg, math, .visually-hidden") && spills(e));
  const deepest = found.filter((e) => !found.some((other) => other !== e && e.contains(other)));
  const page = document.documentElement.scrollWidth;
  return [...(page > innerWidth + 1 ? [`the page is ${page} wide`] : []), ...deepest.map((e) => `clipped ${said(e)}`)];
})()"""

READ = """(() => {
  const found = [];
  const walker = document.createTreeWalker(document.querySelector("main.content") || document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode, parent = node.parentElement;
    if (parent.closest("pre, code, script, style, annotation")) continue;
    const stray = (parent.closest("math") && node.data.match(/\\S*\\\\\\S*/)) || node.data.match(/\\S*\\\\[_*<>#&%$]\\S*/)
      || (!parent.closest("table") && node.data.match(/\\S*\\\\[a-zA-Z]\\S*/));
    if (stray) found.push(`a backslash in ${stray[0]}`);
  }
  for (const e of document.querySelectorAll("main.content img, main.content svg")) {
    if (e.closest("[aria-hidden=true], [role=presentation]") || e.parentElement.closest("svg")) continue;
    const text = e.getAttribute("alt") || e.getAttribute("aria-label") || (e.querySelector(":scope > title") || {}).textContent;
    if (!(text || "").trim()) found.push(`no alt text, <${e.tagName.toLowerCase()}> ${(e.getAttribute("src") || "").slice(0, 40)}`);
  }
  return found;
})()"""


class Tab:
    """A tab of a running Chromium, driven over its DevTools protocol."""

    def __init__(self, address: str):
        from websocket import create_connection

        self.socket = create_connection(address, timeout=60)
        self.last = self.width = 0
        self.loaded = False
        self.requested: list[str] = []
        for name in ("Page", "Network"):
            self.do(f"{name}.enable")
        self.do("Network.setBlockedURLs", urls=UNREAD)
        self.do("Page.addScriptToEvaluateOnNewDocument", source=UNDRAWN)

    def hear(self) -> dict[str, Any]:
        """The next message; of events, notes what is requested and that a page is there."""
        message = json.loads(self.socket.recv())
        if message.get("method") == "Network.requestWillBeSent":
            self.requested.append(message["params"]["request"]["url"])
        self.loaded = self.loaded or message.get("method") == "Page.loadEventFired"
        return message

    def do(self, method: str, **params: Any) -> dict[str, Any]:
        """Give a command, and wait for its result."""
        self.last += 1
        self.socket.send(json.dumps({"id": self.last, "method": method, "params": params}))
        while (message := self.hear()).get("id") != self.last:
            pass
        return message.get("result", {})

    def resize(self, width: int) -> None:
        if width != self.width:
            self.do("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        self.width = width

    def open(self, address: str) -> None:
        """Show a page, until it is loaded."""
        self.loaded, self.requested = False, []
        self.do("Page.navigate", url=address)
        while not self.loaded:
            self.hear()

    def value(self, script: str) -> Any:
        """What an expression of JavaScript gives."""
        result = self.do("Runtime.evaluate", expression=script, returnByValue=True)
        if "exceptionDetails" in result:
            raise RuntimeError(result["exceptionDetails"])
        return result["result"].get("value")


def port_of(profile: Path, seconds: float = 30) -> str:
    """The port that Chromium writes into its profile once it listens."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(OSError, IndexError):
            return (profile / "DevToolsActivePort").read_text(encoding="utf-8").splitlines()[0]
        time.sleep(0.1)
    raise TimeoutError("Chromium does not listen.")


def new_tab(address: str) -> Tab:
    """A further tab of the Chromium that listens at `address`."""
    request = urllib.request.Request(f"{address}/json/new?about:blank", method="PUT")
    with urllib.request.urlopen(request, timeout=30) as answer:
        return Tab(json.load(answer)["webSocketDebuggerUrl"])


@contextlib.contextmanager
def chromium(program: str) -> Iterator[str]:
    """The address of a Chromium with a profile of its own, which ends with it."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        running = subprocess.Popen([program, *FLAGS, f"--user-data-dir={profile}", "about:blank"], env={**os.environ, "HOME": profile},
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            yield f"http://127.0.0.1:{port_of(Path(profile))}"
        finally:
            running.terminate()
            running.wait(30)


def faults(shown: Tab, file: Path) -> list[str]:
    """What is wrong with a page, a line each. It is opened at the width that the tab has."""
    shown.open(file.as_uri())
    found: list[str] = shown.value(READ)
    for width in sorted(WIDTHS, key=lambda width: width != shown.width):
        shown.resize(width)
        found += [f"at {width}: {fault}" for fault in shown.value(WIDE)]
    return found + [f"requests {url}" for url in shown.requested if url.startswith(("http:", "https:", "//"))]


def looked_at(files: list[Path], program: str) -> Iterator[list[str]]:
    """What is wrong with each of the files, `TABS` of them at once."""
    with chromium(program) as address, ThreadPoolExecutor(TABS) as pool:
        free: queue.SimpleQueue[Tab] = queue.SimpleQueue()
        for _ in range(TABS):
            free.put(new_tab(address))

        def look(file: Path) -> list[str]:
            shown = free.get()
            try:
                return faults(shown, file)
            finally:
                free.put(shown)

        yield from pool.map(look, files)


def problems(docs: Path, part: str = "") -> list[str]:
    """What is wrong with the pages whose path contains `part`; nothing, with a line that says so, where there is no Chromium."""
    program = next((path for name in NAMES if (path := shutil.which(name))), None)
    if not program:
        print("The pages were not looked at in a browser: there is no Chromium here.")
        return []
    files = [file for file in sorted(docs.rglob("*.html")) if part in file.relative_to(docs).as_posix()]
    return [f"{file.relative_to(docs).as_posix()}: {fault}" for file, found in zip(files, looked_at(files, program)) for fault in found]


if __name__ == "__main__":
    wrong = problems(DOCS, *sys.argv[1:2])
    print("\n".join(wrong))
    sys.exit(f"{len(wrong)} problems in the browser." if wrong else 0)
