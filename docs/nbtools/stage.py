"""Copy nbs/ into the site's sources, nbdev directives turned into MyST-NB ones."""

from __future__ import annotations

import ast
import os
import re
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from .notebooks import (
    CAPTIONS,
    FLAGS,
    INDEX,
    LIB,
    NBS,
    ROOT,
    directives,
    hidden,
    notebooks,
    read,
    relink,
)

PAGES = {ROOT / f"{name.upper()}.md": f"{name}.md" for name in ("contributing", "security", "changelog")}


def stage(docs: Path) -> None:
    "Write docs/notebooks/ and docs/index.ipynb; remove what nbs/ no longer has."
    wanted = {docs / "index.ipynb": front_page(docs)}
    for path in NBS.rglob("*"):
        if not path.is_file() or hidden(path.relative_to(NBS)) or path == INDEX:
            continue
        target = staged(docs, path)
        notebook = path.suffix == ".ipynb"
        wanted[target] = page(docs, path).encode() if notebook else path.read_bytes()
    for target, data in wanted.items():
        write_if_changed(target, data)
    for path in (docs / "notebooks").rglob("*"):
        if path.is_file() and path not in wanted:
            path.unlink()


def write_if_changed(path: Path, data: bytes) -> None:
    "Sphinx reads again only what is newer: do not touch what is the same."
    if not path.exists() or path.read_bytes() != data:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def staged(docs: Path, path: Path) -> Path:
    "Where a file of nbs/ stands among the site's sources."
    return docs / "index.ipynb" if path == INDEX else docs / "notebooks" / path.relative_to(NBS)


def page(docs: Path, path: Path) -> str:
    "A notebook as the site reads it."
    nb = read(path)
    nb.cells = cells(docs, path, nb)
    return nbformat.writes(nb)


def front_page(docs: Path) -> bytes:
    "docs/front.md, the cells of nbs/index.ipynb after its title, and the contents."
    nb, front = read(INDEX), (docs / "front.md").read_text()
    front = re.sub(r"\{\{(\w+)\}\}", lambda m: first_page(m[1]), front)
    first, *rest = cells(docs, INDEX, nb)
    first.source = re.sub(r"\A# .*\n+(> .*\n*)*", "", first.source)  # front.md has the title
    nb.cells = [markdown(front, "front"), first, *rest, markdown(contents(), "contents")]
    nb.cells = [c for c in nb.cells if c.source.strip()]
    return nbformat.writes(nb).encode()


def first_page(folder: str) -> str:
    "The first notebook of a folder; the reference while the folder is empty."
    names = [p.relative_to(NBS).with_suffix("").as_posix() for p in notebooks()]
    inside = [f"notebooks/{name}" for name in names if name.startswith(f"{folder}/")]
    return inside[0] if inside else "api/index"


def contents() -> str:
    "One table of contents for each folder of nbs/, then the reference."
    folders: dict[str, list[str]] = {}
    for path in notebooks():
        if path.parent != NBS:  # the front pages have places of their own
            name = path.relative_to(NBS).with_suffix("").as_posix()
            folders.setdefault(name.rpartition("/")[0], []).append(f"notebooks/{name}")
    trees = [(CAPTIONS.get(folder, folder or "Notebooks"), ps) for folder, ps in folders.items()]
    others = [f"notebooks/{p.stem}" for p in sorted(NBS.glob("index.*.ipynb"))]
    pages = ["symbols", "glossary", "references", "api/index"]
    trees.append(("Reference", [*pages, *others, "contributing", "security", "changelog"]))
    return "\n\n".join(
        "```{toctree}\n:hidden:\n:caption: " + caption + "\n\n" + "\n".join(pages) + "\n```"
        for caption, pages in trees
    )


def markdown(text: str, name: str) -> NotebookNode:
    return nbformat.v4.new_markdown_cell(text, id=name)


def cells(docs: Path, path: Path, nb: NotebookNode) -> list[NotebookNode]:
    "The cells a page shows, with tags, captions and links to the reference."
    keep, module = [], None
    here = staged(docs, path)

    def place(target: Path) -> str | None:
        if target in PAGES:
            target = docs / PAGES[target]
        elif target.is_relative_to(NBS) and target.is_file():
            target = staged(docs, target)
        else:
            return None
        return os.path.relpath(target, here.parent).replace(os.sep, "/")

    for cell in nb.cells:
        if cell.cell_type != "code":
            cell.source = relink(cell.source, path, place)
            keep.append(cell)
            continue
        found, cell.source = directives(cell.source)
        module = found.get("default_exp", module)
        unseen = {"hide", "default_exp"} & found.keys()
        if not (unseen or "nbdev_export(" in cell.source):
            keep += code(cell, found, f"{LIB.name}.{found.get('export') or module}")
    return keep


def code(cell: NotebookNode, found: dict[str, str], module: str) -> list[NotebookNode]:
    "A code cell, with what stands before and after it on the page."
    tags = cell.metadata.setdefault("tags", [])
    if found.get("echo") == "false":
        tags.append("remove-input")
    if found.get("code-fold") == "true" or "hide_input" in found:
        tags.append("hide-input")
    if found.get("output") == "false":
        tags.append("remove-output")
    if "fig-cap" in found or "label" in found:
        figure = {"name": found.get("label"), "caption": found.get("fig-cap")}
        alt = found.get("fig-alt") or found.get("fig-cap") or "figure"
        cell.metadata["mystnb"] = {
            "figure": {k: v for k, v in figure.items() if v},
            "image": {"alt": alt},
        }
    before, after = [], []
    for flag in sorted(FLAGS & found.keys()):
        note = f"*Runs on request only, with* `--flags {flag}`; *the output shown is stored.*"
        before.append(markdown(note, f"{cell.id}-{flag}"))
    if {"export", "exports"} & found.keys():
        tags.append("nb-export")
        if names := exported(cell.source):
            targets = "\n".join(f"({anchor(f'{module}.{n}')})=" for n in names)
            before.append(markdown(targets, f"{cell.id}-at"))
            links = " · ".join("{py:obj}`~" + f"{module}.{n}`" for n in names)
            note = "```{div} nb-api\n" + f"exported to `{module}`: {links}\n```"
            after.append(markdown(note, f"{cell.id}-api"))
    return [*before, cell, *after]


def exported(source: str) -> list[str]:
    "Public functions and classes that a cell defines."
    kinds = (ast.FunctionDef, ast.ClassDef)
    body = ast.parse(source).body
    return [n.name for n in body if isinstance(n, kinds) and n.name[0] != "_"]


def anchor(name: str) -> str:
    "The label of the notebook cell that defines a public name; labels have no capitals."
    kind = "class" if name.rpartition(".")[2][0].isupper() else "def"
    return f"nb-{kind}-" + re.sub(r"[^a-z0-9]+", "-", name.lower())
