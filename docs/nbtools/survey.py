"""A table of the book: what each notebook costs, says, shows, tests and proves.

Four columns are rules and fail the check: seconds, figures without a text for those who cannot
see them, formulas without a number, numbered formulas that nothing evaluates. So does a theory
notebook without an exercise whose solution is folded away.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from statistics import median

from nbformat import NotebookNode

from .check import DISPLAY, FENCE, TAG
from .notebooks import NBS, directives, notebooks, read

SECONDS = {"6_experiments": 60, "": 20}  # of processor time, by folder
THEORY = ("1_foundations", "2_search", "3_bayes", "4_lm", "5_compress")  # folders whose notebooks end with an exercise
SOLUTION = re.compile(r"^(?:> ?)?<details><summary>Solution</summary>$(?=.*^(?:> ?)?</details>\s*$)", re.M | re.S)
HEAD = ("seconds", "words", "lines", "p90", "figures", "alt", "names", "tested", "equations", "asserted")


def survey(path: Path) -> tuple[dict[str, object], list[str]]:
    "The row of one notebook, and what in it breaks a rule."
    nb = read(path)
    name = path.relative_to(NBS).with_suffix("").as_posix()
    words = sum(len(c.source.split()) for c in nb.cells if c.cell_type == "markdown")
    lines = sorted(_lines(c.source) for c in nb.cells if c.cell_type == "code") or [0]
    shown = [directives(c.source)[0] for c in nb.cells if _is_figure(c)]
    mute = sum("fig-alt" not in found for found in shown)
    names, tested = _tested_names(nb)
    numbers, bare = _formulas(nb)
    proved = {n for n in numbers if _is_asserted(nb, n)}
    seconds = nb.metadata.get("gfopt", {}).get("seconds")
    limit = SECONDS.get(name.partition("/")[0], SECONDS[""])
    row = dict(zip(HEAD, (
        "-" if seconds is None else seconds, words, int(median(lines)), lines[int(0.9 * (len(lines) - 1))],
        len(shown), len(shown) - mute, len(names), len(tested), len(numbers), len(proved),
    )))
    bad = [f"{name}: no seconds recorded: run it with docs/tools.py run"] if seconds is None else []
    bad += [f"{name}: {seconds} seconds, allowed are {limit}"] if seconds is not None and seconds > limit else []
    bad += [f"{name}: {mute} figures without `#| fig-alt:`"] if mute else []
    bad += [f"{name}: {bare} formulas without a \\tag or \\notag"] if bare else []
    bad += [f"{name}: no cell asserts equation ({n})" for n in numbers if n not in proved]
    bad += [f"{name}: no exercise with a folded solution"] if name.startswith(THEORY) and not _has_solution(nb) else []
    return {"notebook": name} | row, bad


def _has_solution(nb: NotebookNode) -> bool:
    return any(c.cell_type == "markdown" and SOLUTION.search(c.source) for c in nb.cells)


def _lines(source: str) -> int:
    return sum(bool(line.strip()) for line in directives(source)[1].splitlines())


def _is_figure(cell: NotebookNode) -> bool:
    return cell.cell_type == "code" and any("image/png" in o.get("data", {}) for o in cell.get("outputs", []))


def _exports(cell: NotebookNode) -> bool:
    return cell.cell_type == "code" and bool({"export", "exports"} & directives(cell.source)[0].keys())


def _asserts(cell: NotebookNode) -> bool:
    return cell.cell_type == "code" and re.search(r"(^|[:;])\s*assert\b|\.assert_\w+\(|raises\(", cell.source, re.M) is not None


def _tested_names(nb: NotebookNode) -> tuple[list[str], list[str]]:
    "Public functions and classes that are exported, and those named in an asserting cell."
    names = []
    for cell in filter(_exports, nb.cells):
        tree = ast.parse(directives(cell.source)[1])
        kinds = (ast.FunctionDef, ast.ClassDef)
        names += [n.name for n in tree.body if isinstance(n, kinds) and n.name[0] != "_"]
    said = "\n".join(c.source for c in nb.cells if _asserts(c) and not _exports(c))
    return names, [n for n in names if re.search(rf"\b{n}\b", said)]


def _formulas(nb: NotebookNode) -> tuple[list[str], int]:
    "The numbers of the displayed formulas in their order, and how many have neither number nor `\\notag`."
    numbers, bare = [], 0
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            for body in DISPLAY.findall(FENCE.sub("", cell.source)):
                found = TAG.findall(body)
                numbers += found
                bare += not found and r"\notag" not in body
    return numbers, bare


def _is_asserted(nb: NotebookNode, number: str) -> bool:
    r"""Whether something evaluates an equation: an assert before the next numbered one, or before the
    next export after a cell of code that cites it."""
    cited = re.compile(rf"(?<![\d.]){re.escape(number)}(?![\d.])")
    for i, cell in enumerate(nb.cells):
        if cell.cell_type == "markdown" and number in TAG.findall(cell.source):
            if any(map(_asserts, _until(nb.cells[i + 1 :], lambda c: c.cell_type == "markdown" and TAG.search(c.source)))):
                return True
        if cell.cell_type == "code" and cited.search(cell.source):
            if _asserts(cell) or any(map(_asserts, _until(nb.cells[i + 1 :], _exports))):
                return True
    return False


def _until(cells: list[NotebookNode], stop) -> Iterator[NotebookNode]:
    for cell in cells:
        if stop(cell):
            return
        yield cell


def table(rows: list[dict[str, object]]) -> str:
    "Rows as aligned text, with totals."
    width = max(len(str(r["notebook"])) for r in rows)
    lines = [" " * width + "".join(f"{h:>10}" for h in HEAD)]
    lines += [f"{r['notebook']:<{width}}" + "".join(f"{r[h]!s:>10}" for h in HEAD) for r in rows]
    sums = {h: sum(r[h] for r in rows if r[h] != "-") for h in HEAD if h not in ("lines", "p90")}
    lines += [f"{'all':<{width}}" + "".join(f"{sums.get(h, ''):>10}" for h in HEAD)]
    return "\n".join(lines)


def report() -> tuple[str, list[str]]:
    "The table of all notebooks, and every broken rule."
    found = [survey(p) for p in notebooks() if p.parent != NBS]  # the front page is no chapter
    return table([row for row, _ in found]), [b for _, bad in found for b in bad]
