"""Read the built site in a headless browser, on a desk, in the dark and on a phone.

python docs/smoke.py docs/_build/html [FOLDER_FOR_SCREENSHOTS]
"""

from __future__ import annotations

import shutil
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

SCREENS = {
    "desktop": {"viewport": {"width": 1440, "height": 900}},
    "phone": {
        "viewport": {"width": 390, "height": 844},
        "is_mobile": True,
        "device_scale_factor": 2,
    },
}
QUIET = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
SECONDS = 60
TYPESET = "window.MathJax && MathJax.startup ? MathJax.startup.promise.then(() => true) : true"
BRIGHTNESS = """() => {
  const [r, g, b] = getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number);
  return (r + g + b) / 765;
}"""
LOOK = """() => ({
  formulas: document.querySelectorAll('span.math, div.math').length,
  typeset: document.querySelectorAll('mjx-container').length,
  wrong: [...document.querySelectorAll('mjx-merror')].map(e => e.title || e.textContent),
  wide: document.documentElement.scrollWidth - document.documentElement.clientWidth,
  broken: [...document.images].filter(i => i.complete && !i.naturalWidth).map(i => i.src),
  mute: [...document.images].filter(i => !i.alt).map(i => i.src.slice(0, 80)),
})"""


def chromium() -> str | None:
    "The browser installed on this machine, if any."
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    mac = Path("/Applications/Google Chrome.app/Contents/MacOS/Google Chrome")
    return next(filter(None, map(shutil.which, names)), str(mac) if mac.exists() else None)


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


def pages(site: Path) -> list[str]:
    "Every page of the site that a reader opens."
    found = (p.relative_to(site).as_posix() for p in site.rglob("*.html"))
    return sorted(p for p in found if not p.startswith(("_static", "_modules")))


def browse(site: Path, shots: Path | None = None, words: str = "posterior") -> list[str]:
    "Open every page; returns what is wrong. A search for `words` must find a page."
    bad: list[str] = []
    handler = partial(Quiet, directory=str(site))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    base = f"http://127.0.0.1:{server.server_port}/"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with sync_playwright() as play:
            browser = play.chromium.launch(executable_path=chromium(), args=QUIET)
            for name, settings in SCREENS.items():
                page = browser.new_context(**settings).new_page()
                page.set_default_timeout(SECONDS * 1000)
                listen(page, name, base, bad)
                for path in pages(site):
                    bad += [f"{name} {path}: {text}" for text in read(page, base + path)]
                    shoot(page, shots, name, path)
                    if name == "desktop":
                        bad += [f"dark {path}: {text}" for text in darken(page)]
                        shoot(page, shots, "dark", path)
                        page.emulate_media(color_scheme="light")
            bad += search(page, base, words)
            browser.close()
    finally:
        server.shutdown()
        server.server_close()  # the listening socket, which shutdown leaves open
    return bad


def listen(page: Page, name: str, base: str, bad: list[str]) -> None:
    "Note console errors, exceptions, requests to the outside and failed ones."

    def note(text: str) -> None:
        bad.append(f"{name} {page.url.removeprefix(base)}: {text}")

    def request(made) -> None:
        if not made.url.startswith((base, "data:", "blob:")):
            note(f"outside request to {made.url}")

    page.on("console", lambda m: note(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda e: note(str(e)))
    page.on("request", request)
    page.on("response", lambda r: note(f"{r.status} {r.url}") if r.status >= 400 else None)


def read(page: Page, url: str) -> list[str]:
    "Open a page, wait for its formulas; returns what is wrong with it."
    page.goto(url, wait_until="load")
    page.evaluate(TYPESET)
    seen, bad = page.evaluate(LOOK), []
    if seen["typeset"] < seen["formulas"]:
        bad.append(f"{seen['typeset']} of {seen['formulas']} formulas typeset")
    bad += [f"formula in error: {text}" for text in seen["wrong"]]
    bad += [f"broken image {src}" for src in seen["broken"]]
    bad += [f"image without alternative text {src}" for src in seen["mute"]]
    if seen["wide"] > 1:
        bad.append(f"{seen['wide']} px wider than the screen")
    return bad


def darken(page: Page) -> list[str]:
    "A reader whose system is dark gets a dark page."
    light = page.evaluate(BRIGHTNESS)
    page.emulate_media(color_scheme="dark")
    dark = page.evaluate(BRIGHTNESS)
    good = dark < 0.25 and light > 0.75
    return [] if good else [f"background brightness {light:.2f} in light, {dark:.2f} in dark"]


def shoot(page: Page, shots: Path | None, name: str, path: str) -> None:
    if shots:
        target = shots / f"{name}_{path.replace('/', '_')}.png"
        page.screenshot(path=str(target), full_page=True)


def search(page: Page, base: str, words: str) -> list[str]:
    "The site's own search finds something."
    page.goto(f"{base}search.html?q={words}")
    hits = page.locator("#search-results li")
    try:
        hits.first.wait_for()
    except Exception:  # playwright's timeout, told in our words
        return [f"search: nothing found for {words!r}"]
    return []


if __name__ == "__main__":
    folder = Path(sys.argv[2]) if len(sys.argv) > 2 else None
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
    complaints = browse(Path(sys.argv[1]).resolve(), folder)
    print("\n".join(complaints) or "the site reads well")
    sys.exit(bool(complaints))
