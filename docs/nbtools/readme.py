"""nbs/index*.ipynb -> README*.md, one for each language, with their pictures under docs/readme/."""

from __future__ import annotations

import base64
import os
import re
from pathlib import Path

from nbformat import NotebookNode

from .notebooks import NBS, ROOT, directives, read, relink

PICTURES = ROOT / "docs" / "readme"
HEAD = "<!-- Generated from nbs/{} by docs/tools.py: edit the notebook. -->"
ANSI = re.compile(r"\x1b\[[0-9;]*m")


def fronts() -> dict[Path, Path]:
    "The front pages: nbs/index.ipynb -> README.md, nbs/index.zh.ipynb -> README.zh.md."
    return {p: ROOT / f"README{p.stem.removeprefix('index')}.md" for p in sorted(NBS.glob("index*.ipynb"))}


def render(index: Path) -> tuple[str, dict[str, bytes]]:
    "The text of a README and the pictures it shows, by file name."
    blocks, pictures = [HEAD.format(index.name)], {}
    for cell in read(index).cells:
        if cell.cell_type == "markdown":
            blocks.append(relink(cell.source, index, _beside_readme))
        elif cell.cell_type == "code":
            blocks += _code(cell, pictures)
    text = "\n\n".join(b.strip("\n") for b in blocks if b.strip())
    return re.sub(r"\n{3,}", "\n\n", text) + "\n", pictures


def _beside_readme(target: Path) -> str:
    target = fronts().get(target, target)
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
    "What in the READMEs and their pictures differs from the notebooks."
    bad, pictures = [], {}
    for index, path in fronts().items():
        text, shown = render(index)
        pictures |= shown
        if not path.exists() or path.read_text() != text:
            bad.append(f"{path.name}: differs from nbs/{index.name}, run docs/tools.py readme")
    stored = {p.name: p.read_bytes() for p in PICTURES.glob("*")}
    for name in sorted(stored.keys() | pictures.keys()):
        if stored.get(name) != pictures.get(name):
            bad.append(f"docs/readme/{name}: differs from its notebook, run docs/tools.py readme")
    return bad


def write() -> None:
    "Write the READMEs and their pictures; remove pictures no longer shown."
    pictures = {}
    for index, path in fronts().items():
        text, shown = render(index)
        path.write_text(text)
        pictures |= shown
    PICTURES.mkdir(parents=True, exist_ok=True)
    for path in PICTURES.glob("*"):
        if path.name not in pictures:
            path.unlink()
    for name, data in pictures.items():
        (PICTURES / name).write_bytes(data)
