"""The checks of docs/nbtools are able to fail, and translate what they should."""

import inspect
import json
import os
import re
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "docs"))
from nbtools import api, check, coverage, faults, notebooks, readme, run, stage, survey  # noqa: E402
from nbtools import raises as refusals  # noqa: E402

PICTURE = new_output("display_data", data={"image/png": "aaaa"})
FIGURE = '#| label: fig-a\n#| fig-cap: "c"\n#| fig-alt: "a"\nplot()'


def code(source, *outputs):
    return new_code_cell(source, outputs=list(outputs))


def book(*cells):
    return new_notebook(cells=list(cells))


def test_directives_are_read_and_removed():
    source = '#| export\n# | fig-cap: "a: b"\n#| default_exp search.genetic\nx = 1\n#| late'
    found, rest = notebooks.directives(source)
    assert found == {"export": "", "fig-cap": "a: b", "default_exp": "search.genetic"}
    assert rest == "x = 1\n#| late"


@pytest.mark.parametrize(
    "source, flags, expected",
    [
        ("x = 1", set(), False),
        ("#| eval: false\nx = 1", set(), True),
        ("#| slow\nx = 1", set(), True),
        ("#| slow\nx = 1", {"slow"}, False),
        ("#| hide\nimport nbdev; nbdev.nbdev_export()", {"slow"}, True),
    ],
)
def test_cells_passed_over(source, flags, expected):
    assert notebooks.skipped(source, flags) is expected


def test_code_sha_sees_code_only():
    one = book(code("x = 1"), new_markdown_cell("text"))
    two = book(code("x = 1"), new_markdown_cell("other"))
    three = book(code("x = 2"), new_markdown_cell("text"))
    shas = [notebooks.code_sha(nb) for nb in (one, two, three)]
    assert shas[0] == shas[1] != shas[2]


def test_links_move_with_their_page():
    source = notebooks.NBS / "2_search" / "a.ipynb"
    text = "[b](../1_foundations/b.ipynb#top) `[c](d.ipynb)` [e](https://e.org) ![f](f.png) [g](#h)"

    def place(target):
        return target.name.upper() if target.suffix == ".ipynb" else None

    moved = notebooks.relink(text, source, place)
    assert moved == "[b](B.IPYNB#top) `[c](d.ipynb)` [e](https://e.org) f [g](#h)"


def test_outputs_keep_nothing_of_the_run():
    text = f"<A at 0x7f12ab34cd> in {ROOT}{os.sep}nbs{os.sep}x.py\n 10%|#\r100%|##########\n"
    assert run.tidy(text) == f"<A> in nbs{os.sep}x.py\n100%|##########\n"


@pytest.mark.parametrize(
    "formula, complaints",
    [
        (r"$$a = b \tag{2.2.1}$$", 0),
        (r"$$a = b \notag$$", 0),
        ("$$a = b$$", 1),
        (r"$$a \tag{1.1}$$ and $$b \tag{1.1}$$", 1),
        ("`$$a$$` and\n```sh\necho $$ $$\n```\n", 0),
    ],
)
def test_formulas_are_numbered(formula, complaints):
    nb = book(new_markdown_cell(formula))
    assert len(list(check.equations(nb, {}, "nb"))) == complaints


@pytest.mark.parametrize(
    "cell, complaints",
    [
        (code(FIGURE, PICTURE), 0),
        (code("plot()", PICTURE), 3),
        (code(FIGURE.replace('#| fig-alt: "a"\n', ""), PICTURE), 1),
        (code("print(1)"), 0),
    ],
)
def test_pictures_are_described(cell, complaints):
    assert len(list(check.figures(book(cell), {}, "nb"))) == complaints


def test_figure_labels_are_unique_in_the_book():
    labels = {"fig-a": "elsewhere"}
    assert len(list(check.figures(book(code(FIGURE, PICTURE)), labels, "nb"))) == 1


@pytest.mark.parametrize("path", ["/ho" + "me/me/x", "/tm" + "p/ipykernel_1/2.py", "/Us" + "ers/me"])
def test_paths_of_one_machine_are_found(path):
    printed = new_output("stream", name="stderr", text=f"{path}:3: UserWarning")
    assert list(check.machine_paths(book(code("x", printed))))
    assert list(check.machine_paths(book(code(f"open('{path}')"))))
    assert not list(check.machine_paths(book(code("a/tmp/b, https://e.org/home/x"))))


def test_stale_unclean_and_failed_outputs_are_found(tmp_path):
    nb = book(code("1 / 0", new_output("error", ename="E", evalue="", traceback=[])))
    nb.cells[0].execution_count = 3
    path = tmp_path / "a.ipynb"
    path.write_text(notebooks.nbformat.writes(nb))
    said = " ".join(check.stored(path, notebooks.read(path)))
    assert "older than the code" in said
    assert "not clean" in said
    assert "stores an error" in said


@pytest.fixture
def project(tmp_path, monkeypatch):
    "A project of one module and one index, exported and rendered, in place of ours."
    (tmp_path / "settings.ini").write_bytes((ROOT / "settings.ini").read_bytes())
    nbs, lib = tmp_path / "nbs", tmp_path / "gfopt"
    nbs.mkdir()
    title = new_markdown_cell("# A\n\n> b")
    module = book(title, code("#| default_exp a"), code("#| export\ndef f(): return 1"))
    figure = new_output("display_data", data={"image/png": "aaaa"})
    index = book(new_markdown_cell("# I\n\n[a](a.ipynb) [l](../LICENSE)"), code(FIGURE, figure))
    for name, nb in (("a", module), ("index", index)):
        (nbs / f"{name}.ipynb").write_text(notebooks.nbformat.writes(nb))
    export = Path(sys.executable).with_name("nbdev_export")
    subprocess.run([export], cwd=tmp_path, check=True, capture_output=True)
    for tool in (check, notebooks, readme, survey):
        for name, value in {"ROOT": tmp_path, "NBS": nbs, "LIB": lib, "INDEX": nbs / "index.ipynb"}.items():
            monkeypatch.setattr(tool, name, value, raising=False)
    monkeypatch.setattr(readme, "PICTURES", tmp_path / "docs" / "readme")
    readme.write()
    return tmp_path


def test_drift_is_found_in_both_directions(project):
    assert not check.package() and not readme.drift()
    (project / "gfopt" / "a.py").write_text("def f(): return 2")
    (project / "gfopt" / "orphan.py").write_text("")
    assert [c.partition(":")[0] for c in check.package()] == ["gfopt/a.py", "gfopt/orphan.py"]
    (project / "gfopt" / "a.py").unlink()
    assert any(c.startswith("gfopt/a.py") for c in check.package())


def test_two_notebooks_cannot_write_one_module(project):
    (project / "nbs" / "b.ipynb").write_bytes((project / "nbs" / "a.ipynb").read_bytes())
    assert any("exports a, which nbs/a.ipynb exports too" in c for c in check.book())


def test_readme_follows_the_index(project):
    text = (project / "README.md").read_text()
    assert "[a](nbs/a.ipynb) [l](LICENSE)" in text
    assert "![a](docs/readme/a.png)" in text and "*c*" in text
    (project / "docs" / "readme" / "a.png").write_bytes(b"other")
    (project / "README.md").write_text("by hand")
    assert len(readme.drift()) == 2


def test_exported_cells_carry_links_both_ways(tmp_path):
    found, source = notebooks.directives("#| export\ndef f(): pass\ndef _g(): pass")
    before, cell, after = stage.code(code(source), found, "gfopt.a.b")
    assert before.source == "(nb-def-gfopt-a-b-f)="
    assert "nb-export" in cell.metadata["tags"]
    assert stage.anchor("gfopt.a.b.F") != stage.anchor("gfopt.a.b.f")
    assert "{py:obj}`~gfopt.a.b.f`" in after.source and "_g" not in after.source


@pytest.mark.parametrize("wrong, said", [("no-such-python", "3.11 or newer"), ("", "unknown kind")])
def test_setup_says_what_to_install(tmp_path, wrong, said):
    "A folder with nothing but the project's files; the wrong Python or the wrong word."
    (tmp_path / "scripts").mkdir()
    for name in ("scripts/setup", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    kind = "demo" if wrong else "everything"
    done = subprocess.run(
        ["sh", tmp_path / "scripts" / "setup", kind],
        env={"PATH": os.environ["PATH"], "PYTHON": wrong},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert said in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / ".venv").exists()


def test_makefile_describes_every_target():
    "`make help` is the first thing a new user sees."
    said = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True).stdout
    targets = re.search(r"^\.PHONY: (.*)", (ROOT / "Makefile").read_text(), re.M)[1].split()
    assert {"demo", "test", "coverage", "help"} <= set(targets)
    for target in targets:
        assert f"make {target} " in said or target.startswith("env-")


def test_every_check_is_run_by_a_workflow():
    flows = {p.stem: yaml.safe_load(p.read_text()) for p in (ROOT / ".github" / "workflows").glob("*.yml")}
    runs = {name: {s.get("run") for job in flow["jobs"].values() for s in job["steps"]} for name, flow in flows.items()}
    assert {"bash .ci/run", "make check", "make coverage"} <= runs["tests"] and "make faults" in runs["faults"]
    assert "schedule" in flows["faults"][True]  # YAML reads the key `on` as a truth value
    assert all("timeout-minutes" in job for name in ("tests", "faults") for job in flows[name]["jobs"].values())


@pytest.mark.parametrize(
    "lines, branches, low",
    [((95, 100), (19, 20), []), ((94, 100), (20, 20), ["lines"]), ((9999, 10000), (94, 100), ["branches"]),
     ((1, 2), (1, 2), ["lines", "branches"]), ((0, 0), (0, 0), [])],
)
def test_lines_and_branches_each_have_a_floor(tmp_path, lines, branches, low):
    "Many lines do not make up for missing branches: the third case has 99.9 % of both together."
    path = tmp_path / "coverage.json"
    counts = dict(zip(("covered_lines", "num_statements", "covered_branches", "num_branches"), lines + branches))
    path.write_text(json.dumps({"totals": counts}))
    figures, complaints = coverage.report(path)
    assert [c.partition(":")[0] for c in complaints] == low
    assert figures.startswith("lines ") and ", branches " in figures
    done = subprocess.run([sys.executable, ROOT / "docs" / "tools.py", "coverage", path], capture_output=True, text=True)
    assert done.returncode == bool(low) and done.stdout.splitlines() == [figures, *complaints]


def test_every_python_that_is_promised_is_tested():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    promised = re.findall(r"Python :: (3\.\d+)", "\n".join(project["classifiers"]))
    matrix = re.search(r"python: \[(.*)\]", (ROOT / ".github/workflows/tests.yml").read_text())[1]
    assert re.findall(r"[\d.]+", matrix) == promised == ["3.11", "3.12", "3.13"]
    assert project["requires-python"] == f">={promised[0]}"


@pytest.mark.parametrize(
    "text, expected",
    [
        (r"point $\theta_i$, shape `(n, d)`", r"point :math:`\theta_i`, shape ``(n, d)``"),
        ("a *good* guess, **settings and x*y", r"a *good* guess, \*\*settings and x\*y"),
        ("``done`` and :func:`done`", "``done`` and :func:`done`"),
        ("|L| of name_ and a_b", r"\|L\| of name\_ and a_b"),
        ("r{1/2}@bits, http:// or https://e.org", r"r{1/2}\@bits, http\:// or https://e.org"),
    ],
)
def test_docstrings_become_restructured_text(text, expected):
    assert api.rest(text) == expected


KINDS = ("hinge", "huber")


def _check_range(name, x, low=None, high=None):
    if (low is not None and x < low) or (high is not None and x > high):
        span = " and ".join([f">= {low}"] * (low is not None) + [f"<= {high}"] * (high is not None))
        raise ValueError(f"{name}: {x!r}; allowed: {span}")
    return x


class Base:
    def __init__(self, size):
        self.size = _check_range("size", size, 1)
        self.free = _check_range("free", size)  # neither low nor high: cannot fail

    def step(self, z):
        "What a subclass writes."
        raise TypeError(f"{type(self).__name__} does not say how it steps")


class Derived(Base):
    def __init__(self, size, kind="huber", **rest):
        super().__init__(size, **rest)
        if kind not in KINDS: raise ValueError(f"kind: {kind!r}; allowed: {', '.join(map(repr, KINDS))}")

    def step(self, z):
        if len(z) != self.size: raise ValueError(f"z: {len(z)} numbers\n for {self.size}")
        return self._next(z, "z")

    def _next(self, z, name):
        if not all(z): raise ZeroDivisionError(f"{name} has a zero, |{name}_| = 0, got {z!r}")


@dataclass
class Point:
    x: float
    y: float

    def __post_init__(self):
        for name, value in (("x", self.x), ("y", self.y)):
            if value < 0: raise ValueError(f"{name} must be >= 0, got {value!r}")


def careful(path, n=1):
    try:
        if n > 2:
            raise KeyError(f"{n} is caught below")
        open(path)
    except KeyError:
        raise
    except OSError as e:
        raise FileNotFoundError(f"path: {path} cannot be read ({e})") from e
    if n < 0:
        raise ValueError("n: negative")
    if n == 0: raise ValueError("n: negative")
    raise NotImplementedError("some day")


def many(a, b, c, d, e, f, g):
    for name, x in (("a", a), ("b", b)): _check_range(name, x, 0)
    _check_range("c", c, 1)
    _check_range("d", d, 2)
    _check_range("e", e, 3)
    _check_range("f", f, 4)
    if g is None: raise TypeError("g: None; allowed: a number")


@pytest.mark.parametrize(
    "obj, expected",
    [
        (Derived, ["ValueError: size: ...; allowed: >= 1", "ValueError: kind: ...; allowed: 'hinge', 'huber'"]),
        (Derived.step, ["ValueError: z: ... numbers for `size`", "ZeroDivisionError: z has a zero, |z_| = 0"]),
        (Base.step, []),
        (Point, ["ValueError: x, y must be >= 0"]),
        (careful, ["FileNotFoundError: path: `path` cannot be read", "ValueError: n: negative"]),
        (many, ["ValueError: a, b: ...; allowed: >= 0", "ValueError: c: ...; allowed: >= 1", "ValueError: d: ...; allowed: >= 2",
                "ValueError: e: ...; allowed: >= 3", "ValueError: also about `f`", "TypeError: also about `g`"]),
        (len, []),
    ],
)
def test_errors_are_read_from_the_source(obj, expected):
    assert [f"{kind}: {text}" for kind, text in refusals.raises(obj)] == expected


def test_errors_do_not_hang_on_what_sphinx_leaves_behind(monkeypatch):
    "With `autodoc_preserve_defaults` a function it has read reports its defaults as texts."
    seen = inspect.signature(lambda name, x, low="None", high="None": x)
    monkeypatch.setattr(_check_range, "__signature__", seen, raising=False)
    assert refusals.raises(Base) == [("ValueError", "size: ...; allowed: >= 1")]


def test_errors_of_the_package_are_in_its_reference():
    "Parameters, result and errors of one entry; what markup would take for its own is escaped."
    from gfopt.optimizer import Generational

    assert ("ValueError", "population: ...; allowed: >= 1") in refusals.raises(Generational)
    lines = ["First line."]
    api.parameters(None, "method", "test_tools.Derived.step", Derived.step, None, lines)
    assert lines[0] == "First line." and r":raises ZeroDivisionError: z has a zero, \|z\_\| = 0" in lines
    assert ":raises ValueError: z: ... numbers for ``size``" in lines


FORMULA = new_markdown_cell(r"$$a = b \tag{1.1}$$")
EXPORT = code('#| export\ndef f():\n    "Eq. (1.1)"')


@pytest.mark.parametrize(
    "cells, proved",
    [
        ([FORMULA, code("assert f() == 1")], True),
        ([FORMULA, new_markdown_cell("then"), EXPORT, code("f()"), code("assert f()")], True),
        ([FORMULA, new_markdown_cell(r"$$c \tag{1.2}$$"), EXPORT, code("assert f()")], True),
        ([FORMULA, new_markdown_cell(r"$$c \tag{1.2}$$"), code("assert f()")], False),
        ([FORMULA, EXPORT, code("#| export\ndef g(): pass"), code("print(f())")], False),
        ([FORMULA, code("np.testing.assert_allclose(f(), 1)")], True),
    ],
)
def test_a_formula_is_proved_by_an_assert(cells, proved):
    assert survey._is_asserted(book(*cells), "1.1") is proved


def test_the_survey_counts_and_complains(project):
    path = project / "nbs" / "a.ipynb"
    nb = notebooks.read(path)
    nb.cells += [FORMULA, new_markdown_cell("$$c$$"), code("plot()", PICTURE), code("assert f() == 1")]
    nb.metadata["gfopt"] = {"seconds": 21}
    path.write_text(notebooks.nbformat.writes(nb))
    row, bad = survey.survey(path)
    unrun = nb.copy()
    unrun.metadata = {"gfopt": {}}
    path.write_text(notebooks.nbformat.writes(unrun))
    assert "a: no seconds recorded: run it with docs/tools.py run" in survey.survey(path)[1]
    assert (row["figures"], row["alt"], row["names"], row["tested"], row["equations"]) == (1, 0, 1, 1, 1)
    assert [b.partition(": ")[2] for b in bad] == [
        "21 seconds, allowed are 20",
        "1 figures without `#| fig-alt:`",
        r"1 formulas without a \tag or \notag",
    ]


@pytest.mark.parametrize(
    "text, has",
    [
        ("**Exercise.** Why?\n\n<details><summary>Solution</summary>\n\nBecause.\n\n</details>", True),
        ("> <details><summary>Solution</summary>\n>\n> Because.\n>\n> </details>", True),
        ("> **Break it yourself.** Why?", False),
        ("<details><summary>Solution</summary>\n\nnever closed", False),
        ("<details><summary>More</summary>\n\nnothing\n\n</details>", False),
    ],
)
def test_a_theory_notebook_ends_with_a_folded_solution(text, has):
    assert survey._has_solution(book(new_markdown_cell(text))) is has


def test_the_survey_of_the_book():
    "What `make check` prints: every rule of the book holds."
    table, complaints = survey.report()
    assert not complaints, "\n" + "\n".join(complaints)
    assert len(table.splitlines()) == len([p for p in notebooks.notebooks() if p.parent != notebooks.NBS]) + 2


def test_planted_faults_are_found_and_reported(tmp_path, monkeypatch):
    "One that a test sees, one that none sees, one that cannot be planted."
    for name, text in {"gfopt/__init__.py": "", "gfopt/m.py": "def f(): return 1\ndef g(): return 2\n", "tests/test_m.py": "from gfopt.m import f\ndef test(): assert f() == 1\n"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(faults, "ROOT", tmp_path)
    monkeypatch.setattr(faults, "NEEDED", ("gfopt", "tests"))
    seen = dict(area="a", where="gfopt/m.py", old="return 1", new="return 3", tests="tests/test_m.py")
    assert not faults.misplaced([seen])
    assert len(faults.misplaced([seen | {"old": "return"}, seen | {"where": "gfopt/n.py"}])) == 2
    assert [s[:2] for s in faults.survivors([seen, seen | {"old": "return 2"}])] == ["a:"]
    assert (tmp_path / "gfopt" / "m.py").read_text().startswith("def f(): return 1")


def test_every_known_fault_can_still_be_planted():
    known = faults.load([])
    assert not faults.misplaced(known), "\n".join(faults.misplaced(known))
