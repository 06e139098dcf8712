"""Importance against closed forms and brute force; pictures of a study; the page."""
import builtins
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gfopt.importance import Forest
from gfopt.space import Box, Categorical, Integer, Real, Space
from gfopt.study import Study
from gfopt.study_plots import (
    forest,
    live,
    page,
    plot_belief,
    plot_curves,
    plot_importance,
    plot_pair,
    plot_parallel,
    plot_progress,
    plot_slice,
    study_report,
    ticks,
)

SPACE = Space(lr=Real(1e-4, 1.0, log=True), depth=Integer(1, 8), act=Categorical(["relu", "gelu"]))


def loss(p):
    return (math.log10(p["lr"]) + 2) ** 2 + 0.05 * abs(p["depth"] - 5) + (p["act"] == "relu") * 0.3


@pytest.fixture(scope="module")
def study():
    s = Study(SPACE, "random")

    def f(p):
        if p["lr"] > 0.6:
            raise FloatingPointError("<diverged>")
        return dict(value=loss(p), violations=[p["depth"] - 7])

    s.optimize(f, 50, progress=False)
    return s


@pytest.fixture
def ax():
    import matplotlib.pyplot as plt

    yield plt.figure().add_subplot()
    plt.close("all")


# ---------------------------------------------------------------- importance
@settings(max_examples=15, deadline=None)
@given(st.integers(2, 40), st.integers(1, 4), st.integers(0, 10**6))
def test_boxes_fill_the_cube_and_integrals_are_exact(n, d, seed):
    rng = np.random.default_rng(seed)
    z, y = rng.random((n, d)), rng.standard_normal(n)
    f = Forest(z, y, trees=3, seed=seed)
    for t in f.trees:
        assert np.isclose(np.prod(t.high - t.low, 1).sum(), 1)
    dice = rng.random((20_000, d))
    v = f.marginal(range(d), dice)
    assert np.isclose(f.marginal([], np.zeros((1, 0)))[0], v.mean(), atol=5 * v.std() / 140 + 1e-9)
    assert np.isclose(f.variance(), v.var(), rtol=0.15, atol=1e-9)
    share = f.importance()
    assert (share >= -1e-9).all() and share.sum() < 1 + 1e-9
    if d == 1 and v.var() > 1e-9:
        assert np.isclose(share[0], 1)


def test_known_indices():
    z = np.random.default_rng(0).random((400, 3))
    for y, want in ((z @ [2.0, 1.0, 0.0], [0.8, 0.2, 0]), ((z[:, 0] - 0.5) * (z[:, 1] - 0.5), [0, 0, 0])):
        assert np.abs(Forest(z, y, trees=20).importance() - want).max() < 0.1
    # Ishigami's function, a = 7, b = 0.1: 0.3139, 0.4424, 0
    z, x = (u := np.random.default_rng(1).random((1500, 3))), (2 * u - 1) * np.pi
    y = np.sin(x[:, 0]) + 7 * np.sin(x[:, 1]) ** 2 + 0.1 * x[:, 2] ** 4 * np.sin(x[:, 0])
    assert np.abs(Forest(z, y, trees=8).importance() - [0.3139, 0.4424, 0]).max() < 0.1


def test_importance_of_shifted_scaled_and_constant_losses():
    z = np.random.default_rng(0).random((60, 3))
    y = z @ [2.0, 1.0, 0.0]
    a, b = Forest(z, y, trees=6).importance(), Forest(z, 1e3 - 5 * y, trees=6).importance()
    assert np.allclose(a, b, atol=1e-6) and not Forest(z, np.ones(60)).importance().any()
    assert np.array_equal(Forest(z, y, seed=1).importance(), Forest(z, y, seed=1).importance())
    edge = Forest(z, y, trees=6).marginal([0], [[0.0], [1.0]])
    assert edge[0] < edge[1]


@pytest.mark.parametrize("z,y", [(np.zeros((3, 2)), np.zeros(2)), (np.zeros((1, 2)), np.zeros(1)), (np.full((3, 2), 2.0), np.zeros(3)), (np.zeros((3, 2)), np.full(3, np.nan))])
def test_forest_refuses(z, y):
    with pytest.raises(ValueError, match="allowed: at least two points"):
        Forest(z, y)


# ---------------------------------------------------------------- pictures
def test_progress(study, ax):
    plot_progress(study, ax)
    dots, line, crosses = ax.lines
    good = [t for t in study.trials if t.state == "done" and t.excess == 0]
    assert dots.get_ydata().tolist() == [t.value for t in good] and dots.get_xdata().tolist() == [t.id for t in good]
    assert line.get_ydata()[-1] == study.best.value and (np.diff(line.get_ydata()[np.isfinite(line.get_ydata())]) <= 0).all()
    assert len(crosses.get_xdata()) == 50 - len(good) > 2


def test_maximize_rises(ax):
    s = Study(SPACE, "random", maximize=True)
    s.optimize(lambda p: -loss(p), 20, progress=False)
    y = plot_progress(s, ax).lines[1].get_ydata()
    assert y[-1] == s.best.value and (np.diff(y) >= 0).all()
    ax.clear()
    top = next(line for line in plot_parallel(s, ax).lines if line.get_color() == "#D55E00")
    assert np.allclose(top.get_ydata()[:-1], s.best.z) and top.get_ydata()[-1] == 0


def test_importance_and_slice(study, ax):
    bars = plot_importance(study, ax)
    width = {t.get_text(): p.get_width() for t, p in zip(ax.get_yticklabels(), bars.patches)}
    assert max(width, key=width.get) == "lr" == ax.get_yticklabels()[-1].get_text() and width["lr"] > 0.5
    ax.clear()
    plot_slice(study, "act", ax)
    assert [t.get_text() for t in ax.get_xticklabels()] == ["relu", "gelu"]
    line = dict(np.round(ax.lines[0].get_xydata(), 6))
    assert 0.1 < line[0.25] - line[0.75] < 0.5  # the truth is 0.3
    assert len(ax.collections[0].get_offsets()) == len([t for t in study.trials if t.state == "done" and t.excess == 0])


@pytest.fixture
def filled(ax, monkeypatch):
    "What was handed to contourf: x, y, values with a row for each y."
    seen, contourf = [], ax.contourf
    monkeypatch.setattr(ax, "contourf", lambda *a, **kw: seen.append(a) or contourf(*a, **kw))
    return seen


def test_pair_marks_the_best_and_has_the_axes_right(study, ax, filled):
    plot_pair(study, "lr", "depth", ax)
    ((tx, ty, values),) = filled
    there = forest(study).marginal([0, 1], [[tx[40], ty[3]]])[0]
    assert np.isclose(values[3, 40], there) and not np.isclose(values[40, 3], there)
    x, y = ax.lines[1].get_xydata()[0]
    assert (x, y) == (float(study.best.z[0]), float(study.best.z[1])) and (ax.get_xlabel(), ax.get_ylabel()) == ("lr", "depth")
    model = forest(study)
    assert model.marginal([0, 1], [[0.05, 0.55]])[0] > model.marginal([0, 1], [[0.5, 0.55]])[0]


def test_curves(ax):
    s = Study(SPACE, "random")
    for i in range(4):
        t = s.ask()
        t.report(10, i + 1), t.report(5, i + 2)
        s.fail(t, "pruned") if i == 2 else s.tell(t, i)
    plot_curves(s, ax)
    assert ax.lines[0].get_xdata().tolist() == [5, 10] and ax.lines[0].get_color() == "#0072B2"
    assert [line.get_marker() for line in ax.lines].count("x") == 1 and len(ax.lines) == 5


def test_ticks_of_a_box_and_of_one_without_walls():
    s = Study(Box(-5, 5, 2), "random")
    assert ticks(s, 1) == ([0, 0.5, 1], ["-5", "0", "5"])
    open_ = Study(Box(-math.inf, math.inf, 2, x0=1.0, sigma0=0.5), "random")
    assert ticks(open_, 0) == ([0, 0.5, 1], ["0", "1", "2"])
    open_.optimize(lambda x: float(x @ x), 20, progress=False)
    assert forest(open_).importance().sum() > 0.2


def test_belief_is_drawn_where_it_is(study, ax, filled):
    s = Study(Box(-2, 6, 3), "random")
    t = s.ask()
    s.optimizer.explain = lambda z: dict(mean=z[2] * 10 + z[0])
    plot_belief(s, t, "x0", "x2", "mean", ax, cells=4)
    assert ax.lines[0].get_xydata()[0].tolist() == pytest.approx([(float(t.z[0]) + 2) / 8, (float(t.z[2]) + 2) / 8])
    ((tx, ty, values),) = filled
    assert np.allclose(values, (8 * ty[:, None] - 2) * 10 + 8 * tx[None] - 2)
    with pytest.raises(ValueError, match="explain"):
        plot_belief(study, study.best, "lr", "depth")


def test_wrong_names_and_empty_studies_are_told(study):
    for f in (lambda: plot_slice(study, "rate"), lambda: plot_pair(study, "lr", "lr"), lambda: plot_slice(Study(SPACE, "random"), "lr"), lambda: forest(Study(SPACE, "nsga2"))):
        with pytest.raises(ValueError, match="allowed"):
            f()


# ---------------------------------------------------------------- live and report
def test_live_redraws_one_output(monkeypatch):
    said = []

    class Handle:
        def update(self, figure):
            said.append(("update", figure))

    def display(figure, display_id):
        said.append(("new", figure))
        return Handle()

    run = lambda seconds: Study(SPACE, "random").optimize(loss, 6, callback=live(seconds), progress=False)  # noqa: E731
    monkeypatch.setattr(builtins, "display", display, raising=False)
    assert run(0).nfev == 6 and [w for w, _ in said] == ["new"] + ["update"] * 5
    said.clear()
    run(1000)
    assert len(said) == 1
    monkeypatch.delattr(builtins, "display")
    said.clear()
    run(0)
    assert not said


class Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.sources = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [v for k, v in attrs if k in ("src", "href")]


def test_the_report_is_one_file_with_everything(study, tmp_path):
    path = study_report(study, tmp_path / "r.html")
    text, parsed = path.read_text(), Page()
    parsed.feed(text)
    assert parsed.tags.count("img") == 7 and not {"script", "link", "iframe"} & set(parsed.tags)
    assert all(s.startswith("data:image/svg+xml;base64,") for s in parsed.sources) and "@import" not in text and "url(" not in text
    assert "&lt;diverged&gt;" in text and "<diverged>" not in text and "prefers-color-scheme: dark" in text
    assert text.count("<tr><td>") >= 50 and f"trial {study.best.id} with {study.best.value}" in text
    assert study_report(study, tmp_path / "s.html").read_text() == text and len(re.findall("<h2>", text)) == 4


def test_reports_of_odd_studies(tmp_path):
    s = Study(Box(-1, 1, 2), "nsga2", population=6)
    assert "nothing has succeeded" in study_report(Study(SPACE, "random"), tmp_path / "a.html").read_text()
    s.optimize(lambda x: [x[0] ** 2, (x[1] - 1) ** 2], 20, progress=False)
    assert study_report(s, tmp_path / "b.html").read_text().count("<img") == 1
    assert page("<t>", "b").count("&lt;t&gt;") == 1
