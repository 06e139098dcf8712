"""Adapters against the libraries they stand in for: scikit-optimize and Optuna."""
import math
import subprocess
import sys
import threading
import warnings

import numpy as np
import pytest
import skopt
from skopt.space import Categorical, Integer, Real

from gfopt.adapters.skopt import Optimizer, dummy_minimize, gp_minimize

optuna = pytest.importorskip("optuna")
from optuna.distributions import (  # noqa: E402
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import TrialState  # noqa: E402

from gfopt.adapters.optuna import GfoptSampler, parameter  # noqa: E402

optuna.logging.set_verbosity(optuna.logging.ERROR)
DIMENSIONS = [Real(1e-4, 1.0, prior="log-uniform", name="lr"), Integer(1, 8, name="depth"), Categorical(["relu", "gelu"], name="act")]


def loss(x):
    return (math.log10(x[0]) + 2) ** 2 + 0.1 * abs(x[1] - 5) + 0.3 * (x[2] == "relu")


# ---------------------------------------------------------------- scikit-optimize
@pytest.fixture(scope="module")
def result():
    return gp_minimize(loss, DIMENSIONS, n_calls=18, n_initial_points=6, x0=[0.1, 4, "relu"], random_state=3)


def test_the_result_has_what_theirs_has(result):
    theirs = skopt.Optimizer(DIMENSIONS, n_initial_points=5).tell([[0.1, 1, "relu"], [0.2, 2, "gelu"]], [1.0, 2.0])
    assert theirs.keys() <= result.keys()
    assert result.x_iters[0] == [0.1, 4, "relu"] and len(result.x_iters) == 18 and all(x in result.space for x in result.x_iters)
    assert [loss(x) for x in result.x_iters] == result.func_vals.tolist() and result.fun == result.func_vals.min() == loss(result.x)
    assert result.fun < dummy_minimize(loss, DIMENSIONS, n_calls=18, random_state=3).fun


def test_their_plots_draw_it(result):
    import matplotlib.pyplot as plt
    from skopt.plots import plot_convergence, plot_evaluations, plot_objective

    assert plot_convergence(result).lines
    plt.close("all")
    plot_evaluations(result)
    assert len(plt.gcf().axes) >= 9
    plot_objective(result, n_points=9, n_samples=15)
    curve = next(ax for ax in plt.gcf().axes if ax.lines).lines[0].get_xydata()
    true = [np.mean([loss([lr, d, a]) for d in range(1, 9) for a in ("relu", "gelu")]) for lr in curve[:, 0]]
    assert np.corrcoef(curve[:, 1], true)[0, 1] > 0.9 and curve[:, 1].argmin() == np.argmin(true)
    plt.close("all")


def test_the_model_is_in_units_of_the_loss(result):
    X = result.space.transform(result.x_iters)
    mean, sd = result.models[-1].predict(X, return_std=True)
    assert np.abs(mean - result.func_vals).max() < 0.2 * np.ptp(result.func_vals) and (sd >= 0).all()
    assert np.array_equal(mean, result.models[-1].predict(X))


def test_ask_and_tell():
    opt = Optimizer(DIMENSIONS, n_initial_points=4, random_state=1)
    many = opt.ask(3)
    assert len({tuple(x) for x in [*many, opt.ask()]}) == 4 and len(opt._optimizer.pending_z) == 4
    r = opt.tell(many, [loss(x) for x in many])
    assert r.x_iters == many and len(opt._optimizer.pending_z) == 1
    with pytest.raises(ValueError, match="2 losses for 1 points"):
        opt.tell([many[0]], [1.0, 2.0])
    opt.tell(many[0], math.nan, fit=False)  # again, and failed
    assert opt.get_result().fun == r.fun and np.isinf(opt.get_result().func_vals[-1]) and opt.get_result(model=False).models == []
    for bad, error in (([2.0, 1, "relu"], ValueError), ([0.1, 1, "tanh"], ValueError), ([0.1, 1], ValueError)):
        with pytest.raises(error):
            opt.tell(bad, 1.0)
    assert len(opt.yi) == 4
    with pytest.raises(ValueError, match="nothing was told"):
        Optimizer(DIMENSIONS).get_result()


def test_the_told_points_are_the_asked_ones_bit_for_bit():
    "A logarithm and back is not the identity: a population would never hear of its own points."
    opt = Optimizer(DIMENSIONS, "ga", random_state=0)
    n = opt._optimizer.population
    for _ in range(n):
        opt.tell(x := opt.ask(), loss(x), fit=False)
    assert opt._optimizer.g == 1


def test_dimensions_of_all_kinds_and_numpy_values():
    opt = Optimizer([(-5.0, 10.0), (0, 15), ("a", "b", "c"), (1e-3, 1.0, "log-uniform")], "dummy", random_state=0)
    x = opt.ask()
    assert x in opt.space and opt._space.names == ["x0", "x1", "x2", "x3"]
    opt.tell([np.float64(0.5), np.int64(3), np.str_("b"), np.float32(0.5)], np.float32(1))
    with pytest.raises(ValueError, match="each name once"):
        Optimizer([Real(0, 1, name="a"), Real(0, 1, name="a")])


def test_the_seed_decides_and_a_default_is_first():
    a, b, c = (gp_minimize(loss, DIMENSIONS, n_calls=8, n_initial_points=5, random_state=s).x_iters for s in (1, 1, 2))
    assert a == b != c
    known = [[0.02, 5, "gelu"], [0.5, 1, "relu"]]
    r = gp_minimize(loss, DIMENSIONS, n_calls=5, n_initial_points=3, x0=known, y0=[loss(x) for x in known], random_state=0)
    assert r.x_iters[:2] == known and len(r.x_iters) == 7


def test_callbacks_stop_and_verbose_speaks(capsys):
    seen = []
    r = gp_minimize(loss, DIMENSIONS, n_calls=9, n_initial_points=9, callback=[lambda r: seen.append(len(r.x_iters)), lambda r: len(r.x_iters) == 4], verbose=True)
    assert len(r.x_iters) == 4 and seen == [1, 2, 3, 4] and capsys.readouterr().out.count("best") == 4


@pytest.mark.parametrize("kw,error,words", [
    (dict(base_estimator="RF"), ValueError, "base_estimator: 'RF'"), (dict(acq_func="EIps"), ValueError, "acq_func: 'EIps'"),
    (dict(space_constraint=len), TypeError, "space_constraint"), (dict(random_state="x"), TypeError, "random_state"),
    (dict(n_initial_points=0), ValueError, "n_initial_points: 0")])
def test_what_would_be_another_algorithm_is_refused(kw, error, words):
    with pytest.raises(error, match=words):
        Optimizer(DIMENSIONS, **kw)


def test_what_only_tunes_their_engine_is_named():
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        gp_minimize(loss, DIMENSIONS, n_calls=2, n_points=5, noise=1e-3)
    assert any("['n_points', 'noise']: ignored" in str(w.message) for w in seen)


# ---------------------------------------------------------------- Optuna
def objective(trial):
    lr, depth = trial.suggest_float("lr", 1e-4, 1, log=True), trial.suggest_int("depth", 1, 8)
    return loss([lr, depth, trial.suggest_categorical("act", ["relu", "gelu"])])


def study(sampler, **kw):
    return optuna.create_study(sampler=sampler, **kw)


@pytest.mark.parametrize("d", [
    FloatDistribution(1e-4, 1, log=True), FloatDistribution(-1, 2), FloatDistribution(0, 1, step=0.1), IntDistribution(1, 8), IntDistribution(8, 256, log=True),
    IntDistribution(0, 100, step=25), CategoricalDistribution(["relu", None, True, 1.5])], ids=str)
def test_distributions_there_and_back(d):
    p, there, back = parameter(d)
    values = [back(p.decode(z)) for z in np.linspace(0, 1, 401)]
    assert all(d._contains(d.to_internal_repr(v)) for v in values) and all(back(there(v)) == v for v in values)
    if p.levels:
        assert p.levels == {0.1: 11, 25: 5}.get(getattr(d, "step", None), p.levels) and (p.levels > 11 or len(set(map(repr, values))) == p.levels)
    else:
        assert np.allclose((values[0], values[-1]), (d.low, d.high), rtol=1e-12)


def test_a_value_on_the_grid_is_its_own_step():
    _, there, back = parameter(FloatDistribution(0, 1, step=0.1))
    assert [there(v) for v in (0.1, 0.3, 0.6, 0.7, 1.0)] == [1, 3, 6, 7, 10] and back(10) == 1.0


def test_an_unknown_distribution_is_refused():
    with pytest.raises(TypeError, match="allowed: Optuna's"):
        parameter(object())


@pytest.mark.parametrize("method,kw", [("ga", dict(population=6)), ("cmaes", {}), ("bo", dict(initial=4)), ("random", {})])
def test_the_method_hears_every_answer(method, kw):
    s = study(GfoptSampler(method, seed=1, **kw))
    s.optimize(objective, 15)
    sampler = s.sampler
    points = [t.params for t in s.trials]
    assert len({str(p) for p in points}) >= 10
    s.optimize(objective, 1)  # hears of the fifteenth
    assert sampler._told == set(range(15)) and sampler.optimizer.best[1] == min(t.value for t in s.trials[:15])
    if method == "ga":
        assert sampler.optimizer.g == 2  # 14 of its own points told, 6 a generation; the first trial was nobody's
    if method == "bo":
        assert len(sampler.optimizer.own_state()["y"]) == 15


def test_maximize_is_minimize_of_the_negative():
    a, b = study(GfoptSampler("ga", population=4)), study(GfoptSampler("ga", population=4), direction="maximize")
    a.optimize(objective, 14), b.optimize(lambda t: -objective(t), 14)
    assert [t.params for t in a.trials] == [t.params for t in b.trials]


def test_two_objectives():
    two = lambda t: (objective(t), t.params["depth"])  # noqa: E731
    s = study(GfoptSampler("nsga2", population=6), directions=["minimize", "maximize"])
    s.optimize(two, 15)
    y = s.sampler.optimizer.front[1]
    assert (y[:, 1] <= 0).all()
    wrong = study(GfoptSampler("ga"), directions=["minimize", "maximize"])
    with pytest.raises(ValueError, match="'ga' with 2 directions"):
        wrong.optimize(two, 3)


def test_pruned_and_failed_trials_are_failures():
    def moody(t):
        value = objective(t)
        if t.number == 3:
            t.report(-100, 1)
            raise optuna.TrialPruned
        if t.number == 4:
            raise OSError("gone")
        return -50.0 if t.number == 5 else value

    s = study(GfoptSampler("bo", initial=4))
    s.optimize(moody, 8, catch=(OSError,))
    assert [t.state for t in s.trials[3:6]] == [TrialState.PRUNED, TrialState.FAIL, TrialState.COMPLETE]
    assert s.sampler.optimizer.own_state()["y"].isinf().sum() == 2 and s.sampler.optimizer.best[1] == -50


@pytest.mark.parametrize("method,kw", [("ga", dict(population=4)), ("bo", dict(initial=4))])
def test_resume_from_a_storage_is_the_same_study(tmp_path, method, kw):
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    def run(name, *parts):
        for n in parts:  # a new sampler each time, as after a crash
            storage = JournalStorage(JournalFileBackend(str(tmp_path / name)))
            s = study(GfoptSampler(method, seed=2, **kw), storage=storage, study_name="s", load_if_exists=True)
            s.optimize(objective, n)
        return [t.params for t in s.trials]

    # the first trial is Optuna's random sampler's, and the same by its seed
    assert run("a", 14) == run("b", 3, 6, 5)


def test_foreign_trials_and_define_by_run():
    def branch(t):
        value = objective(t)
        return value + t.suggest_float("momentum", 0, 1) if t.params["act"] == "gelu" else value

    s = study(GfoptSampler("bo", initial=4))
    s.enqueue_trial(dict(lr=0.02, depth=5, act="gelu", momentum=0.5))
    s.optimize(branch, 16)
    sampler = s.sampler
    assert set(sampler.space.names) == {"act", "depth", "lr"}  # what all trials have
    assert {t.params.get("momentum") is None for t in s.trials} == {True, False}
    assert len(sampler.optimizer.own_state()["y"]) == 15 and s.trials[0].params["lr"] == 0.02
    changed = lambda t: t.suggest_float("lr", 1e-4, 1, log=True)  # noqa: E731
    s.optimize(changed, 3)
    assert sampler.space.names == ["lr"] and len(sampler.optimizer.own_state()["y"]) == 18
    constant = study(GfoptSampler("ga"))
    constant.optimize(lambda t: t.suggest_float("a", 1, 1), 3)
    assert constant.best_value == 1


def test_threads_share_a_sampler():
    s = study(GfoptSampler("ga", population=4))
    gate = threading.Barrier(3)

    def together(t):
        value = objective(t)
        if t.number < 9:
            gate.wait(60)
        return value

    s.optimize(together, 18, n_jobs=3)
    assert len(s.trials) == 18 and all(t.state == TrialState.COMPLETE for t in s.trials)
    zs = [str(t.system_attrs["gfopt:z"]["z"]) for t in s.trials if "gfopt:z" in t.system_attrs]
    assert len(zs) >= 15 and len(set(zs)) >= 12 and len(s.sampler.optimizer.pending_z) <= 3


def test_wrong_arguments_are_told_at_once():
    for kw, error in ((dict(method="cmeas"), ValueError), (dict(method="ga", speed=1), TypeError), (dict(seed="x"), TypeError)):
        with pytest.raises(error):
            GfoptSampler(**kw)


def test_without_optuna_the_error_names_the_extra():
    code = "import sys; sys.modules['optuna'] = None\ntry: import gfopt.adapters.optuna\nexcept ImportError as e: print(e)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "pip install 'gfopt[optuna]'" in said.stdout
