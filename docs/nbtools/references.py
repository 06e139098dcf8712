"""What the notebooks cite: the page of references, and links to it and to numbered equations."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from docutils import nodes
from sphinx import addnodes

from .check import TAG
from .notebooks import NBS, ROOT, notebooks, read
from .stage import write_if_changed

NAME = r"[A-Z][\w'’-]*[\w'’]"
CITATION = re.compile(rf"(?<!\w)({NAME}(?:(?:, and |, | and | & ){NAME})*)(?: et al\.| and others)?,? (\(?)((?:18|19|20)\d\d)\b(\)?)")
IDENTIFIER = re.compile(r"arXiv[: ]\s*(\d{4}\.\d{4,5})|\b(10\.\d{4,9}/[^\s\"'`\\]*[^\s\"'`\\.,;)])")
EQUATION = re.compile(r"\((\d+\.\d+\.\d+\w?)\)")
ADDRESS = {"doi": "https://doi.org/", "arxiv": "https://arxiv.org/abs/"}
HEAD = """# References

Every paper and book that the notebooks cite, and where they do. A citation in a notebook leads here.
"""


@cache
def papers() -> list[dict]:
    "The entries of docs/references.toml, each with an `anchor` of its own."
    found = tomllib.loads((ROOT / "docs" / "references.toml").read_text())["papers"]
    taken: dict[str, int] = {}
    for paper in found:
        stem = re.sub(r"[^a-z]+", "-", plain(_names(paper["authors"])[0]).lower()).strip("-")
        base = f"ref-{stem}-{paper['year']}"
        taken[base] = taken.get(base, 0) + 1
        paper["anchor"] = base + (f"-{taken[base]}" if taken[base] > 1 else "")
    return found


def plain(name: str) -> str:
    "A name as a docstring in ASCII writes it."
    return name.translate(str.maketrans({"ü": "ue", "ő": "o", "á": "a", "ó": "o", "é": "e", "š": "s", "’": "'"}))


def _names(text: str) -> list[str]:
    "The names of a list of authors; acronyms of methods are none."
    found = (n.removesuffix("'s").removesuffix("’s") for n in re.split(r", and |, | and | & ", text))
    return [n for n in found if not n.isupper()]


def cited(text: str) -> Iterator[tuple[str, list[str], int]]:
    "The words of each citation `Name (year)` in a text, its names and its year."
    for match in CITATION.finditer(text):
        if names := _names(match[1]):
            yield match[0], names, int(match[3])


def means(paper: dict, names: list[str], year: int, notebook: str | None = None) -> bool:
    "Whether a citation in this notebook (anywhere: `None`) is of this paper."
    authors = [plain(n) for n in _names(paper["authors"])]
    said = [plain(n) for n in names]
    here = notebook is None or notebook in paper.get("only", [notebook])
    return here and year in (paper["year"], *paper.get("years", [])) and said[0] == authors[0] and set(said) <= set(authors)


def identifiers(text: str) -> set[str]:
    "The arXiv numbers and DOIs in a text."
    return {a or d for a, d in IDENTIFIER.findall(text)}


@cache
def sources() -> dict[str, str]:
    "Notebook -> the text of all its cells; what it printed is left out."
    return {p.relative_to(NBS).with_suffix("").as_posix(): "\n\n".join(c.source for c in read(p).cells) for p in notebooks()}


@cache
def places() -> dict[str, list[str]]:
    "Anchor of a paper -> the notebooks that cite it, in reading order."
    found: dict[str, list[str]] = {p["anchor"]: [] for p in papers()}
    for name, text in sources().items():
        said, ids = list(cited(text)), identifiers(text)
        for paper in papers():
            link = paper.get("link", "").partition(":")[2]
            if link in ids or paper.get("says", "\0") in text or any(means(paper, n, y, name) for _, n, y in said):
                found[paper["anchor"]].append(name)
    return found


def entry(paper: dict) -> str:
    "One paper as the page shows it."
    kind, _, number = paper.get("link", "").partition(":")
    names = {"doi": f"doi {number}", "arxiv": f"arXiv {number}"}
    where = ADDRESS[kind] + number if kind in ADDRESS else paper.get("link")
    link = f" [{names.get(kind, where)}]({where})." if where else ""
    by = " · ".join("{doc}`/notebooks/" + name + "`" for name in places()[paper["anchor"]] if "/" in name)
    return f"({paper['anchor']})=\n\n**{paper['authors']} ({paper['year']}).** {_ended(paper['title'])} *{paper['venue']}*.{link} Cited in {by}."


def _ended(title: str) -> str:
    return title if title[-1] in "?!" else f"{title}."


def write_page(docs: Path) -> None:
    listed = sorted(papers(), key=lambda p: (plain(p["authors"]).lower(), p["year"]))
    write_if_changed(docs / "references.md", (HEAD + "\n" + "\n\n".join(map(entry, listed)) + "\n").encode())


@cache
def equations() -> dict[str, str]:
    "Number of an equation -> the notebook that has it."
    return {n: name for name, text in sources().items() for n in TAG.findall(text)}


def equation(number: str) -> str:
    "The place of a numbered equation within its page."
    return "eq-" + number.replace(".", "-")


def mark_equations(app, doctree) -> None:
    "Give each numbered formula a place that a link can name."
    known = app.env.get_domain("std").anonlabels
    for block in doctree.findall(nodes.math_block):
        for number in TAG.findall(block.astext()):
            block["ids"].append(equation(number))
            known[equation(number)] = app.env.docname, equation(number)


def link_text(app, doctree) -> None:
    "Link every `(2.2.1)` to its formula and every `Name (year)` to its entry."
    apart = (nodes.literal, nodes.literal_block, nodes.reference, addnodes.pending_xref, nodes.title, nodes.raw, nodes.math, nodes.math_block)
    _, _, name = app.env.docname.partition("notebooks/")
    for text in list(doctree.findall(nodes.Text)):
        parent = text.parent
        if app.env.docname == "references" or any(isinstance(p, apart) for p in _above(parent)):
            continue
        spans = sorted(_spans(text.astext(), name or None))
        if spans:
            parent.replace(text, _pieces(app, text.astext(), spans))


def _above(node) -> Iterator[nodes.Node]:
    while node is not None:
        yield node
        node = node.parent


def _spans(text: str, name: str | None) -> Iterator[tuple[int, int, str]]:
    "Start, end and target of what is to be linked in a text."
    for match in EQUATION.finditer(text):
        if match[1] in equations():
            yield match.start(), match.end(), equation(match[1])
    for match in CITATION.finditer(text):
        names = _names(match[1])
        found = [p["anchor"] for p in papers() if names and means(p, names, int(match[3]), name)]
        if found:
            yield match.start(), match.end() - (bool(match[4]) and not match[2]), found[0]


def _pieces(app, text: str, spans: list[tuple[int, int, str]]) -> list[nodes.Node]:
    out, done = [], 0
    for start, end, target in spans:
        out += [nodes.Text(text[done:start])] if start > done else []
        link = addnodes.pending_xref("", nodes.inline("", text[start:end]), refdomain="std", reftype="ref", reftarget=target)
        link.attributes |= {"refexplicit": True, "refwarn": True, "refdoc": app.env.docname}
        out.append(link)
        done = end
    return out + ([nodes.Text(text[done:])] if done < len(text) else [])
