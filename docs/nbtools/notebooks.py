"""Where the notebooks are and what stands in their cells."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from configparser import ConfigParser
from pathlib import Path

import nbformat
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parents[2]
_parser = ConfigParser(delimiters=["="])
_parser.read(ROOT / "settings.ini")
SETTINGS = _parser["DEFAULT"]
NBS = ROOT / SETTINGS["nbs_path"]
LIB = ROOT / SETTINGS["lib_path"]
FLAGS = set(SETTINGS.get("tst_flags", "").split())  # cells with one run on request
INDEX = NBS / SETTINGS["readme_nb"]

CAPTIONS = {  # folder of nbs/ -> its caption in the site's contents
    "1_foundations": "Foundations",
    "2_search": "Search",
    "3_bayes": "Bayes",
    "4_lm": "Language models",
    "5_compress": "Compression",
    "6_experiments": "Experiments",
    "7_adapters": "Adapters",
    "8_howto": "How-to",
}

DIRECTIVE = re.compile(r"^\s*#\s*\|\s*(.+?)\s*$")
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
FENCE = re.compile(r"^(```|~~~).*?^\1[^\n]*$|`[^`\n]+`", re.M | re.S)


def notebooks() -> list[Path]:
    "Every notebook of the book, in reading order."
    found = (p for p in NBS.rglob("*.ipynb"))
    return sorted(p for p in found if not hidden(p.relative_to(NBS)))


def hidden(path: Path) -> bool:
    "Whether a part of a relative path starts with `.` or `_`: nbdev skips those."
    return any(part[0] in "._" for part in path.parts)


def read(path: Path) -> NotebookNode:
    return nbformat.read(path, as_version=4)


def directives(source: str) -> tuple[dict[str, str], str]:
    "The leading `#|` lines of a code cell as a dict, and the rest of the cell."
    found, lines = {}, source.splitlines()
    while lines and (match := DIRECTIVE.match(lines[0])):
        line = match[1]
        separator = ":" if re.match(r"[\w-]+:", line) else " "
        key, _, value = line.partition(separator)
        found[key.strip()] = value.strip().strip("\"'")
        lines.pop(0)
    return found, "\n".join(lines)


def default_exp(nb: NotebookNode) -> str | None:
    "The module a notebook is exported to, such as `search.genetic`."
    for cell in nb.cells:
        if cell.cell_type == "code":
            name = directives(cell.source)[0].get("default_exp")
            if name:
                return name
    return None


def skipped(source: str, flags: set[str] = frozenset()) -> bool:
    "Whether a code cell is left alone when a notebook runs with these flags."
    found, body = directives(source)
    unasked = (FLAGS - flags) & found.keys()
    return found.get("eval") == "false" or bool(unasked) or "nbdev_export(" in body


def code_sha(nb: NotebookNode) -> str:
    "A hash of all code: stored with the outputs, it tells when they are stale."
    source = "\0".join(c.source for c in nb.cells if c.cell_type == "code")
    return hashlib.sha256(source.encode()).hexdigest()[:12]


def relink(markdown: str, source: Path, place: Callable[[Path], str | None]) -> str:
    """Rewrite the relative links of a markdown text that stands in `source`.

    `place` gets the file a link points at and says what to write instead;
    `None` drops the link and keeps its text. Code is left alone.
    """

    def link(match: re.Match) -> str:
        bang, text, target = match.groups()
        path, hash_, anchor = target.partition("#")
        if not path or re.match(r"[a-z]+:|/", path):
            return match[0]
        new = place(Path(os.path.normpath(source.parent / path)))
        return text if new is None else f"{bang}[{text}]({new}{hash_}{anchor})"

    out, end = [], 0
    for code in FENCE.finditer(markdown):
        out += [LINK.sub(link, markdown[end : code.start()]), code[0]]
        end = code.end()
    return "".join(out) + LINK.sub(link, markdown[end:])
