"""nbs/index.ipynb -> README.md, with its pictures under docs/readme/."""

from __future__ import annotations

import base64
import os
import re
from pathlib import Path

from nbformat import NotebookNode

from .notebooks import INDEX, ROOT, directives, read, relink

README = ROOT / "README.md"
PICTURES = ROOT / "docs" / "readme"
HEAD = "<!-- Generated from nbs/index.ipynb by docs/tools.py: edit the notebook. -->"
ANSI = re.compile(r"\x1b\[[0-9;]*m")


def render() -> tuple[str, dict[str, bytes]]:
    "The text of README.md and the pictures it shows, by file name."
    blocks, pictures = [HEAD], {}
    for cell in read(INDEX).cells:
        if cell.cell_type == "markdown":
            blocks.append(relink(cell.source, INDEX, _beside_readme))
        elif cell.cell_type == "code":
            blocks += _code(cell, pictures)
    text = "\n\n".join(b.strip("\n") for b in blocks if b.strip())
    return re.sub(r"\n{3,}", "\n\n", text) + "\n", pictures


def _beside_readme(target: Path) -> str:
    return os.path.relpath(target, ROOT).replace(os.sep, "/")


def _code(cell: NotebookNode, pictures: dict[str, bytes]) -> list[str]:
    "A code cell and its outputs as markdown blocks."
    found, source = directives(cell.source)
    if {"hide", "default_exp"} & found.keys() or "nbdev_export(" in source:
        return []
    quiet = found.get("echo") == "false" or found.get("code-fold") == "true"
    blocks = [] if quiet or not source else [f"```python\n{source}\n```"]
    for out in cell.outputs:
        if out.output_type == "stream":
            blocks.append(_plain(out.text))
        elif out.output_type in ("display_data", "execute_result"):
            blocks += _data(out.data, found, pictures)
    return blocks


def _data(data: dict, found: dict[str, str], pictures: dict[str, bytes]) -> list[str]:
    "The richest form of an output that a README can show."
    if "image/png" in data:
        label = found.get("label", "fig-index").removeprefix("fig-")
        name = f"{label}.png" if f"{label}.png" not in pictures else f"{label}-{len(pictures)}.png"
        pictures[name] = base64.b64decode(data["image/png"])
        alt, caption = found.get("fig-alt", ""), found.get("fig-cap", "")
        blocks = [f"![{alt}]({_beside_readme(PICTURES / name)})"]
        return blocks + ([f"*{caption}*"] if caption else [])
    if "text/markdown" in data:
        return [data["text/markdown"]]
    return [_plain(data["text/plain"])] if "text/plain" in data else []


def _plain(text: str) -> str:
    text = ANSI.sub("", text).rstrip("\n")
    return f"```text\n{text}\n```" if text.strip() else ""


def drift() -> list[str]:
    "What in README.md and its pictures differs from the notebook."
    text, pictures = render()
    bad = []
    if not README.exists() or README.read_text() != text:
        bad.append("README.md: differs from nbs/index.ipynb, run docs/tools.py readme")
    stored = {p.name: p.read_bytes() for p in PICTURES.glob("*")}
    for name in sorted(stored.keys() | pictures.keys()):
        if stored.get(name) != pictures.get(name):
            bad.append(f"docs/readme/{name}: differs from nbs/index.ipynb, run docs/tools.py readme")
    return bad


def write() -> None:
    "Write README.md and its pictures; remove pictures no longer shown."
    text, pictures = render()
    README.write_text(text)
    PICTURES.mkdir(parents=True, exist_ok=True)
    for path in PICTURES.glob("*"):
        if path.name not in pictures:
            path.unlink()
    for name, data in pictures.items():
        (PICTURES / name).write_bytes(data)
