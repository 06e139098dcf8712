"""What must agree: notebooks, stored outputs, package and README.

Every function returns a list of complaints, each naming a file and what to do.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path

import nbformat
from nbdev.clean import clean_nb
from nbformat import NotebookNode

from . import readme
from .notebooks import (
    FENCE,
    LIB,
    NBS,
    ROOT,
    SETTINGS,
    code_sha,
    default_exp,
    directives,
    notebooks,
    read,
)
from .run import KEYS

LARGEST = 500_000  # bytes of a notebook
DISPLAY = re.compile(r"\$\$(.+?)\$\$", re.S)
TAG = re.compile(r"\\tag\{([^}]+)\}")
CITED = re.compile(r"\bEqs?\. \((\d+(?:\.\d+)+\w?)\)")
MACHINE = re.compile(r"(?<![\w.~$}:/-])/(?:home|root|work|tmp|Users)/[\w.-]+")


def package() -> list[str]:
    "The package against a fresh export of all notebooks, in both directions."
    with tempfile.TemporaryDirectory() as name:
        copy = Path(name) / "copy"
        shutil.copytree(NBS, copy / NBS.name)
        shutil.copy(ROOT / "settings.ini", copy)
        command = Path(sys.executable).with_name("nbdev_export")
        done = subprocess.run([command], cwd=copy, capture_output=True, text=True)
        if done.returncode:
            return [f"nbdev_export failed:\n{done.stderr[-2000:]}"]
        new = _sources(copy / LIB.name)
    old, bad = _sources(LIB), []
    for path in sorted(old.keys() | new.keys()):
        if path not in new:
            bad.append(f"{LIB.name}/{path}: no notebook exports it, delete it")
        elif new[path] != old.get(path):
            bad.append(f"{LIB.name}/{path}: differs from its notebook, run nbdev_export")
    return bad


def _sources(folder: Path) -> dict[str, str]:
    "Module sources by path; those of packages, `__init__.py`, are written by hand."
    return {p.relative_to(folder).as_posix(): p.read_text() for p in folder.rglob("*.py") if p.name != "__init__.py"}


def version() -> list[str]:
    "One version, in settings.ini and in the package."
    line = f'__version__ = "{SETTINGS["version"]}"'
    if line in (LIB / "__init__.py").read_text():
        return []
    return [f"{LIB.name}/__init__.py: should say {line}, as settings.ini does"]


def pins() -> list[str]:
    "Every direct dependency has an exact version in constraints.txt."
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"]]
    for extra in project["optional-dependencies"].values():
        wanted += extra
    pinned = re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text(), re.M)
    plain = {re.sub(r"[-_.]+", "-", p).lower() for p in pinned}
    names = {re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", w)[0]).lower() for w in wanted}
    return [f"constraints.txt: no exact version of {n}" for n in sorted(names - plain)]


def stored(path: Path, nb: NotebookNode) -> Iterator[str]:
    "Outputs are present, fresh, clean, without errors and not too large."
    if nb.metadata.get("gfopt", {}).get("code_sha") != code_sha(nb):
        yield "stored outputs are older than the code, run docs/tools.py run on it"
    clean = read(path)
    clean_nb(clean, allowed_metadata_keys=KEYS)
    if nbformat.writes(clean) != nbformat.writes(nb):
        yield "not clean, run nbdev_clean"
    if path.stat().st_size > LARGEST:
        yield f"{path.stat().st_size} bytes, allowed are {LARGEST}"
    for cell in nb.cells:
        if any(out.output_type == "error" for out in cell.get("outputs", [])):
            yield f"stores an error in the cell {_first_line(cell)}"


def figures(nb: NotebookNode, labels: dict[str, str], name: str) -> Iterator[str]:
    "A picture has a label, unique in the book, a caption and an alternative text."
    for cell in nb.cells:
        if cell.cell_type != "code":
            continue
        found, _ = directives(cell.source)
        drawn = any("image/png" in out.get("data", {}) for out in cell.outputs)
        if not (drawn or "label" in found) or "hide" in found:
            continue
        for key in ("label", "fig-cap", "fig-alt"):
            if not found.get(key):
                yield f"a figure without `#| {key}:` in the cell {_first_line(cell)}"
        label = found.get("label", "")
        if label and labels.setdefault(label, name) != name:
            yield f"the label {label} is also in {labels[label]}"


def equations(nb: NotebookNode, tags: dict[str, str], name: str) -> Iterator[str]:
    r"A displayed formula says `\tag{N.M}`, unique in the book, or `\notag`."
    for cell in nb.cells:
        if cell.cell_type != "markdown":
            continue
        for body in DISPLAY.findall(FENCE.sub("", cell.source)):
            numbers = TAG.findall(body)
            if not numbers and r"\notag" not in body:
                yield rf"no \tag or \notag in the formula {body.strip()[:60]!r}"
            for number in numbers:
                if number in tags:
                    yield f"equation ({number}) is also in {tags[number]}"
                tags[number] = name


def machine_paths(nb: NotebookNode) -> Iterator[str]:
    "No path of one machine in a cell or in what it printed."
    for cell in nb.cells:
        texts = [cell.source]
        for out in cell.get("outputs", []):
            texts.append(out.get("text", ""))
            data = out.get("data", {})
            texts += [data[m] for m in data if m.startswith("text/")]
        for text in texts:
            if match := MACHINE.search(text):
                yield f"the path {match[0]!r} exists on one machine only"


def _first_line(cell: NotebookNode) -> str:
    body = directives(cell.get("source", ""))[1]
    return repr(body.strip().partition("\n")[0][:60])


def book() -> list[str]:
    "What every notebook, and all of them together, must keep to."
    bad, modules, labels, tags = [], {}, {}, {}
    loaded = {p: read(p) for p in notebooks()}
    for path, nb in loaded.items():
        name = path.relative_to(ROOT).as_posix()
        found = [
            *stored(path, nb),
            *figures(nb, labels, name),
            *equations(nb, tags, name),
            *machine_paths(nb),
        ]
        module = default_exp(nb)
        if module and modules.setdefault(module, name) != name:
            found.append(f"exports {module}, which {modules[module]} exports too")
        bad += [f"{name}: {text}" for text in found]
    for path, nb in loaded.items():
        cited = CITED.findall("\n".join(c.source for c in nb.cells))
        for number in sorted(set(cited) - tags.keys()):
            bad.append(f"{path.relative_to(ROOT)}: cites Eq. ({number}), which no notebook has")
    for path in [*LIB.rglob("*.py"), *readme.fronts().values()]:
        if path.exists() and (match := MACHINE.search(path.read_text())):
            bad.append(f"{path.relative_to(ROOT)}: the path {match[0]!r} exists on one machine only")
    return bad


def check() -> list[str]:
    "All complaints; none when everything agrees."
    return [*package(), *version(), *pins(), *book(), *readme.drift()]
