"Ends that no other test reaches: pictures hold what was computed, command lines pass on what was said, toys of long runs."

import json
import math
import runpy
import sys

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from gfopt import functions, optimizer, plots
from gfopt.adapters import cli
from gfopt.experiments import (
    coco,
    demo,
    finetune_bench,
    forward_training,
    quality,
    report,
    rewards_bench,
    speed,
)
from gfopt.space import Box, Real, Space, as_space


@pytest.fixture
def ax():
    fig, ax = plt.subplots()
    yield ax
    plt.close(fig)


# ---- pictures
def test_convergence_shows_medians_of_the_regret(ax):
    runs = dict(a=[[5.0, 7.0, 3.0], [4.0, 2.0, 9.0, 0.0], [8.0, 6.0, 1.0]], b=[[2.0, 1.0]])
    assert plots.plot_convergence(runs, ax, minimum=1.0) is ax
    lines = {line.get_label(): line.get_ydata().tolist() for line in ax.lines}
    assert lines == dict(a=[4.0, 4.0, 1.0], b=[1.0, 0.0])  # of the length that all runs have
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["a", "b"] and len(ax.collections) == 2


def test_convergence_leaves_out_what_is_infinite_and_keeps_the_rest(ax):
    plots.plot_convergence(dict(a=[[9.0, 8.0], [math.inf, 6.0], [4.0, 2.0]]), ax)
    median, band = ax.lines[0].get_ydata(), ax.collections[0].get_paths()[0].vertices
    assert median.tolist() == [9.0, 6.0]  # the middle one of three is a number; the upper quartile lies between it and infinity
    assert np.nanmin(band[:, 1]) == 4.0 and np.nanmax(band[:, 1]) == 7.0
    plots.plot_convergence(dict(b=[[math.inf, 3.0]]), ax)
    assert math.isnan(ax.lines[1].get_ydata()[0]) and ax.lines[1].get_ydata()[1] == 3.0


@pytest.mark.parametrize("log", [True, False])
def test_contours_are_of_the_function_and_its_lowest_place(ax, log):
    seen = []
    plots.plot_contour(lambda x: seen.append(x) or ((x - 1) ** 2).sum(-1), -2, 2, ax, log)
    assert seen[0].shape == (161, 161, 2) and seen[0][0, -1].tolist() == [2, -2]  # the first coordinate runs to the right
    assert ax.get_xlim() == (-2, 2) and ax.get_ylim() == (-2, 2)
    low, high = ax.collections[0].get_clim()
    assert low < high and (low < -1.9 if log else low >= -2)


# ---- landscapes
def test_landscapes_are_their_formulas():
    p = [0.5, -1.5, 2.0]
    want = dict(sphere=sum(v * v for v in p), ellipsoid=sum(10 ** (3 * i) * v * v for i, v in enumerate(p)),
                rosenbrock=sum(100 * (b - a * a) ** 2 + (1 - a) ** 2 for a, b in zip(p, p[1:], strict=False)),
                rastrigin=sum(v * v + 10 - 10 * math.cos(2 * math.pi * v) for v in p),
                ackley=20 - 20 * math.exp(-0.2 * math.sqrt(sum(v * v for v in p) / 3)) + math.e
                - math.exp(sum(math.cos(2 * math.pi * v) for v in p) / 3))
    for name, y in want.items():
        assert float(functions.FUNCTIONS[name].f(torch.tensor(p).double())) == pytest.approx(y, rel=1e-12), name


def test_landscapes_have_the_minima_they_are_recorded_with():
    at = dict(branin=[[(math.pi + 5) / 15, 2.275 / 15], [(5 - math.pi) / 15, 12.275 / 15]],
              hartmann6=[[0.20169, 0.150011, 0.476874, 0.275332, 0.311652, 0.6573]], rosenbrock=[[1.0] * 3])
    for name, problem in functions.FUNCTIONS.items():
        y = problem.f(torch.tensor(at.get(name, [[0.0] * 3])).double())
        assert y.tolist() == pytest.approx([problem.minimum] * len(y), abs=1e-5), name


def test_landscapes_are_turned_and_moved_to_where_it_says():
    f = functions.shifted(functions.rotated(functions.ellipsoid, 4, seed=1), 4, seed=2, radius=2.0)
    R, x = functions.random_rotation(4, 1), torch.linspace(-1, 1, 20).double().view(5, 4)
    assert float(f(f.shift)) == 0 and f.shift.abs().max() <= 2
    assert f(x).tolist() == pytest.approx([float(functions.ellipsoid(R @ (v - f.shift))) for v in x])


def test_rotations_prefer_no_direction():
    R = torch.stack([functions.random_rotation(3, seed) for seed in range(400)])
    assert torch.allclose(R @ R.mT, torch.eye(3).double().expand(400, 3, 3), atol=1e-12)
    assert R.mean(0).abs().max() < 4 / math.sqrt(3 * 400)  # each entry has mean 0 and variance 1/3


# ---- more pictures
def test_bars_of_speed_show_medians_and_the_floor(ax):
    told = {"gfopt": dict(ms=[1.0, 2.0, 4.0]), "peer": dict(ms=[3.0, 5.0, 6.0]), "broken": dict(error="no")}
    row = dict(contenders=told, floor=dict(ms=0.5))
    speed.plot_speed(dict(rows=dict(es=row)), [ax], ["es"])
    assert [b.get_width() for b in ax.patches] == [2.0, 5.0] and [t.get_text() for t in ax.get_yticklabels()] == ["gfopt", "peer"]
    assert [line.get_xdata()[0] for line in ax.lines if line.get_linestyle() == "--"] == [0.5]
    ax.clear()
    speed.plot_speed(dict(rows=dict(batched=dict(contenders=dict(batched=dict(ms=[1, 1, 1]))))), [ax], ["batched"])
    assert len(ax.patches) == 1 and not [line for line in ax.lines if line.get_linestyle() == "--"]


def test_every_method_has_a_curve_in_every_dimension(ax, monkeypatch):
    monkeypatch.setattr(coco, "curve", lambda result, m, d: np.full(len(coco.GRID), 0.1 * d))
    coco.plot_ecdf(dict(settings=dict(dims=[2])), [ax])
    assert [line.get_label() for line in ax.lines] == list(coco.METHODS) and ax.get_title() == "d = 2" and ax.get_ylim() == (0, 1)
    assert all((line.get_ydata() == 0.2).all() for line in ax.lines)


# ---- an optimiser that is not finished says what it lacks
def test_what_a_method_has_not_said_is_named():
    class Empty(optimizer.Optimizer): pass
    with pytest.raises(TypeError, match="Empty does not say how it proposes"): Empty(Box(0, 1, 2)).ask(1)

    class Bare(optimizer.Generational): pass
    with pytest.raises(TypeError, match="Bare does not say how it"): Bare(Box(0, 1, 2), population=4).ask(1)


def test_states_of_others_are_refused():
    one, other = (optimizer.make_optimizer(m, Box(0, 1, 2), 0) for m in ("pso", "de"))
    with pytest.raises(ValueError, match="state_dict: of method 'ParticleSwarm'; allowed: 'DifferentialEvolution'"): other.load_state_dict(one.state_dict())
    large = optimizer.make_optimizer("pso", Box(0, 1, 2), 0, population=31)
    with pytest.raises(ValueError, match="population"): large.load_state_dict(one.state_dict())
    with pytest.raises(RuntimeError, match="nothing to recommend"): one.recommend()
    with pytest.raises(RuntimeError, match="nothing to recommend"): optimizer.make_optimizer("bo", Box(0, 1, 2), 0).recommend()
    two = optimizer.make_optimizer("bo", Box(0, 1, 2), 0)
    two.tell(two.ask(2), torch.tensor([[1.0, 2.0], [0.5, 3.0]]))
    assert two.recommend().shape == (2,)
    one.tell(torch.full((1, 2), 0.5), [math.nan])
    with pytest.raises(RuntimeError, match="nothing to recommend"): one.recommend()


def test_a_trust_region_recommends_from_the_region_of_its_best():
    opt = optimizer.make_optimizer("turbo", Box(-5, 5, 2), 0)
    f = lambda z: (z**2).sum(-1)
    first = opt.ask(1)
    opt.tell(first, f(first))
    assert torch.equal(opt.recommend(), first[0])  # of a single point that one
    told = [first]
    for _ in range(25):
        told.append(opt.ask(1))
        opt.tell(told[-1], f(told[-1]))
    z = torch.cat(told)
    assert (z == opt.recommend()).all(1).any() and f(opt.recommend()) <= f(z).quantile(0.2)


# ---- command lines
@pytest.mark.parametrize("interrupted, code", [(False, 0), (True, 130)])
def test_the_demo_command_passes_on_what_was_said(monkeypatch, capsys, tmp_path, interrupted, code):
    seen = []
    told = dict(seconds=1.0, interrupted=interrupted, acts=dict(tune={}, train={}))
    monkeypatch.setattr(demo, "demo", lambda preset, **k: seen.append((preset, k)) or told)
    monkeypatch.setattr(report, "table", lambda results: "the table")
    assert cli.main(["demo", "--preset", "cpu", "--out", str(tmp_path), "--seed", "4", "--json"]) == code
    out = capsys.readouterr().out
    assert seen[0][0] == "cpu" and seen[0][1]["seed"] == 4 and seen[0][1]["out"] == str(tmp_path)
    assert "the table" in out and ("stopped early" in out) is interrupted
    last = json.loads(out.strip().splitlines()[-1])
    assert {k: last[k] for k in ("interrupted", "acts")} == dict(interrupted=interrupted, acts=["train", "tune"])


def test_the_forward_command_measures_the_parts_in_the_order_asked(monkeypatch, capsys, tmp_path):
    seen = []
    monkeypatch.setattr(forward_training, "measure", lambda *a: seen.append(a) or dict(rows={"x": 1}, complete=len(seen) > 1))
    forward_training.main(["--out", str(tmp_path / "a.json"), "--part", "c", "--part", "a"])
    forward_training.main(["--out", str(tmp_path / "a.json"), "--device", "cpu"])
    assert [a[2:] for a in seen] == [("ca", None), ("abc", "cpu")]
    assert capsys.readouterr().out == "1 runs, not complete: the same command goes on\n1 runs, complete\n"


@pytest.mark.parametrize("bench", [rewards_bench, finetune_bench])
def test_a_bench_command_runs_all_or_a_toy(bench, monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(bench, "record", lambda out, settings, jobs, **k: seen.append((settings, jobs)))
    bench.main(["--out", str(tmp_path / "a.json"), "--small"])
    bench.main(["--out", str(tmp_path / "a.json")])
    assert [s for s, _ in seen] == [bench.SMALL, bench.CPU]
    for target, args, _ in seen[0][1].values(): assert callable(getattr(bench, target.partition(":")[2])) and args


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")  # the module is run once more, as a command
@pytest.mark.parametrize("name", ["bayes_methods", "bayes_peers", "compress_bench", "finetune_bench", "forward_cost", "forward_training",
                                  "rewards_bench", "tuning", "tuning_table"])
def test_every_recorder_is_a_command(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["x", "--help"])
    with pytest.raises(SystemExit) as end: runpy.run_module(f"gfopt.experiments.{name}", run_name="__main__")
    said = capsys.readouterr().out
    assert end.value.code == 0 and f"python -m gfopt.experiments.{name}" in said and "--out" in said


# ---- spaces that cannot be
@pytest.mark.parametrize("make, error, words", [
    (lambda: Space([Real(0, 1)]), TypeError, "allowed: a dict of names"),
    (lambda: Space.from_skopt([Real(0, 1), "x"]), TypeError, "dimension 'x'; allowed: skopt.space"),
    (lambda: Box([0.0, 1.0], [1.0, 2.0, 3.0]), ValueError, r"Box high: shape \(3,\)"),
    (lambda: Box([math.nan, 0.0], 1.0), ValueError, "Box low: nan"),
    (lambda: Box(0, 1, 2, x0=3.0), ValueError, r"Box x0: \[3.0, 3.0\]; allowed: finite and within"),
    (lambda: as_space(7), TypeError, "space: 7; allowed: Space, Box")])
def test_a_space_that_cannot_be_is_refused_by_name(make, error, words):
    with pytest.raises(error, match=words): make()


def test_a_dict_of_parameters_is_a_space():
    space = as_space(dict(lr=Real(0, 1)))
    assert as_space(space) is space and space.names == ["lr"]


# ---- toys
@pytest.mark.parametrize("method", coco.METHODS)
def test_everybody_is_watched_until_the_budget_or_the_last_target(method):
    low = []
    watch = coco.run_problem(method, lambda x: low.append(float((np.asarray(x) ** 2).sum())) or low[-1], 0.0, 2, seed=1, budget=400)
    assert watch.count == len(low) <= 400 and watch.hits == sorted(watch.hits)
    assert len(watch.hits) == sum(min(low) <= t for t in coco.TARGETS) > 0
    assert watch.count == 400 or len(watch.hits) == len(coco.TARGETS)


def test_a_noisy_sphere_is_judged_by_its_true_loss():
    told = quality.run_noisy(1, 1500)
    assert set(told) == {"gfopt noisy", "gfopt", "pycma"} and all(0 < v[0] < 10 for v in told.values())  # 30 from the middle, on average
    assert told == quality.run_noisy(1, 1500)


def test_a_toy_learns_to_parse(monkeypatch, tmp_path):
    s = rewards_bench.SMALL["parse"]
    monkeypatch.setattr(rewards_bench, "base_model", lambda *a, own=rewards_bench.base_model, **k: own(*a, **k | dict(cache=False)))
    told = rewards_bench.learn_to_parse(s, 1.0, 0)
    assert len(told["curve"]) == s["steps"] + 1 and all(0 <= share <= 1 and bits > 0 for share, bits in told["curve"])
    assert len(told["samples"]) == rewards_bench.JUDGED_PROMPTS and list(told["shares"]) == ["0.8"] and 0 <= told["same"] <= 1
    assert set(rewards_bench.prompt_only(s, 0)["shares"]) == {"0.8"}
    free = rewards_bench.learn_to_parse(s, 0.0, 0)
    assert free["curve"][0] == told["curve"][0]  # the leash changes nothing before the first step
