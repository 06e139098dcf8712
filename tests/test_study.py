"""Journal, Study, minimize: failures, signs, workers, resume after kill -9."""
import concurrent.futures as cf
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from gfopt.journal import read_journal
from gfopt.space import Box, Categorical, Integer, Real, Space
from gfopt.study import Study, minimize

SPACE = Space(lr=Real(1e-4, 1.0, log=True), depth=Integer(1, 8), act=Categorical(["relu", "gelu"]))
ROOT = Path(__file__).resolve().parent.parent


def loss(p):
    return (math.log10(p["lr"]) + 2) ** 2 + 0.1 * abs(p["depth"] - 5) + (p["act"] == "relu") * 0.3


def quiet(fn, space, method="ga", budget=30, **kw):
    return minimize(fn, space, method, budget, progress=False, **kw)


# ---------------------------------------------------------------- objectives of all kinds
@pytest.mark.parametrize("method", ["ga", "random", "bo"])
def test_maximize_is_minimize_of_the_negative(method):
    a = quiet(loss, SPACE, method, 25)
    b = quiet(lambda p: -loss(p), SPACE, method, 25, maximize=True)
    assert a.x_iters == b.x_iters and np.array_equal(a.func_vals, -b.func_vals) and a.x == b.x and a.fun == -b.fun


def test_box_objective_gets_numpy_vectors():
    def f(x):
        assert isinstance(x, np.ndarray) and x.shape == (3,)
        return float(x @ x)

    r = quiet(f, [(-5, 5)] * 3, "cmaes", 300)
    assert r.fun < 1e-2 and isinstance(r.x, np.ndarray) and r.nfev == 300


def test_batched_equals_one_by_one():
    space = Box(-5, 5, 3)
    a = quiet(lambda x: float((x**2).sum()), space, "cmaes", 100)
    b = quiet(lambda z: (z**2).sum(1), space, "cmaes", 100, batched=True)
    assert np.array_equal(np.array(a.x_iters), np.array(b.x_iters)) and a.nfev == b.nfev == 100


def test_batched_objective_that_returns_too_few():
    with pytest.raises(RuntimeError, match="returned 2 losses for"):
        quiet(lambda z: z[:2, 0], Box(-1, 1, 2), "ga", 20, batched=True)


@pytest.mark.parametrize("returned,words", [
    (math.nan, "nan"), (math.inf, "inf"), ("high", "str"), (None, "NoneType"), (np.ones(3), r"shape \(3,\)"),
    (torch.ones(2, 2), r"shape \(2, 2\)"), ({}, "dict")])
def test_what_is_no_number_is_a_failure_with_its_reason(returned, words):
    study = Study(SPACE, "random")
    study.optimize(lambda p: returned if p["act"] == "relu" else loss(p), 20, progress=False)
    reasons = {t.reason for t in study.trials if t.state == "failed"}
    assert len(reasons) == 1 and __import__("re").search(words, reasons.pop())
    assert study.result().nfail == sum(t.params["act"] == "relu" for t in study.trials) > 0


def test_numbers_of_all_kinds_are_taken():
    for one in (1, 1.0, np.float32(1), np.array(1.0), np.array([1.0]), torch.tensor(1.0), torch.tensor([1.0], requires_grad=True)):
        assert quiet(lambda p, one=one: one, SPACE, "random", 3).fun == 1.0


def test_everything_failed_quotes_the_first():
    def f(p):
        raise KeyError("missing weights")

    with pytest.raises(RuntimeError, match="all 6 evaluations failed.*trial 0.*KeyError: 'missing weights'"):
        quiet(f, SPACE, "random", 6)


def test_ctrl_c_returns_the_partial_result():
    seen = []

    def f(p):
        seen.append(p)
        if len(seen) == 8:
            raise KeyboardInterrupt
        return loss(p)

    r = quiet(f, SPACE, "ga", 50)
    assert r.nfev == 7 and "interrupted" in r.message and r.success


def test_target_seconds_and_callback_stop():
    assert quiet(loss, SPACE, "random", 5000, target=1.0).nfev < 500
    assert quiet(lambda p: -loss(p), SPACE, "random", 5000, target=-1.0, maximize=True).nfev < 500
    t = time.monotonic()
    assert quiet(lambda p: time.sleep(0.02) or 1.0, SPACE, "random", 10_000, seconds=0.3).nfev < 40
    assert time.monotonic() - t < 5
    assert quiet(loss, SPACE, "random", 100, callback=lambda s, t: t.id == 4).nfev == 5


def test_noisy_reports_the_believed_point():
    g = torch.Generator().manual_seed(0)
    f = lambda x: float((x**2).sum()) + torch.randn(1, generator=g).item()  # noqa: E731
    r = quiet(f, Box(-3, 3, 2), "cmaes", 600, noisy=True)
    lucky = min(r.func_vals)
    assert (r.x**2).sum() < 1.0 and (math.isnan(r.fun) or r.fun > lucky)


def test_noisy_reports_the_mean_of_what_the_believed_point_gave():
    coin = torch.Generator().manual_seed(1)
    r = quiet(lambda p: torch.randn(1, generator=coin).item(), Space(n=Integer(0, 2)), "random", 30, noisy=True)
    own = [y for p, y in zip(r.x_iters, r.func_vals, strict=True) if p == r.x]
    assert len(own) > 5 and r.fun == pytest.approx(np.mean(own))


@pytest.mark.parametrize("maximize", [False, True])
def test_failures_are_infinitely_bad_in_the_direction_of_the_search(maximize):
    r = quiet(lambda p: math.nan if p["act"] == "relu" else loss(p), SPACE, "random", 12, maximize=maximize)
    assert 0 < r.nfail == (r.func_vals == (-math.inf if maximize else math.inf)).sum() < 12


# ---------------------------------------------------------------- bad arguments
@pytest.mark.parametrize("kw,error,words", [
    (dict(budget=0), ValueError, "budget: 0"), (dict(budget=2.5), TypeError, "budget: 2.5"),
    (dict(method="cmeas"), ValueError, "did you mean 'cmaes'"), (dict(workers=0), ValueError, "workers: 0"),
    (dict(seed="x"), TypeError, "seed: 'x'"), (dict(batched=True), ValueError, "batched"),
    (dict(seconds=-1), ValueError, "seconds"), (dict(speed=2), TypeError, "no setting 'speed'")])
def test_bad_arguments_are_named(kw, error, words):
    with pytest.raises(error, match=words):
        minimize(loss, SPACE, **{"method": "random", "budget": 3, "progress": False} | kw)


def test_a_trial_is_answered_once_and_by_its_study():
    a, b = Study(SPACE, "random"), Study(SPACE, "random")
    t = a.ask()
    with pytest.raises(ValueError, match="that this study's ask"):
        b.tell(t, 1.0)
    a.tell(t, 1.0)
    with pytest.raises(ValueError, match="told already"):
        a.fail(t, "again")


def test_fn_must_be_callable():
    with pytest.raises(TypeError, match="fn: 3"):
        minimize(3, SPACE, "random", 3)


# ---------------------------------------------------------------- auto, result, pruning, explain
def test_auto_says_what_it_chose():
    assert "bo" in quiet(loss, SPACE, "auto", 12).message
    r = quiet(lambda x: float(x @ x), Box(-1, 1, 3), "auto", 400)
    assert r.method == "cmaes" and "auto chose cmaes" in r.message


def test_result_is_drawn_by_skopt():
    import matplotlib

    matplotlib.use("Agg")
    from scipy.optimize import OptimizeResult
    from skopt.plots import plot_convergence

    r = quiet(loss, SPACE, "random", 10)
    assert isinstance(r, OptimizeResult) and {"x", "fun", "nfev", "x_iters", "func_vals", "space", "method", "seed", "success", "message"} <= r.keys()
    assert plot_convergence(r).lines


def test_median_pruning():
    study = Study(SPACE, "random")
    for i in range(8):
        t = study.ask()
        t.report(1, i)
        assert t.should_prune() == (i >= 5)
        study.fail(t, "pruned at step 1") if t.should_prune() else study.tell(t, i)
    assert study.best.value == 0 and study.trials[-1].value is None


def test_explain_names_neighbours():
    study = Study(SPACE, "random")
    study.enqueue(dict(lr=0.01, depth=5, act="gelu"))
    study.optimize(loss, 5, progress=False)
    e = study.explain(study.trials[4])
    assert e["known"] == 4 and len(e["nearest"]) == 3 and study.explain(study.trials[0])["chosen_by"] == "the user"


# ---------------------------------------------------------------- several losses, constraints
def two(p):
    return loss(p), float(p["depth"])


def limited(p):
    return dict(value=two(p), violations=[3 - p["depth"], 0.5 - loss(p)])


def nobody_beats(v, y):
    return not ((y <= v).all(1) & (y < v).any(1)).any()


def test_several_losses_give_a_front():
    with Study(SPACE, "nsga2", population=10) as study:
        r = study.optimize(two, 120, progress=False)
        y = np.array([t.value for t in study.trials])
        assert r.func_vals.shape == (120, 2) and np.array_equal(r.func_vals, y) and r.nfev == 120
        want = sorted({tuple(v) for v in y if nobody_beats(v, y)})
        front = study.front()
        assert [t.value for t in front] == want and len(want) > 3
        for t in front:  # the earliest of equals
            assert t is next(u for u in study.trials if u.value == t.value)
        assert np.array_equal(r.front.values, want) and r.front.x == [t.params for t in front]
        assert study.best in front and r.x == study.best.params and r.fun == study.best.value
        ideal, span = np.min(want, 0), np.ptp(want, axis=0)
        assert study.best is min(front, key=lambda t: (((np.array(t.value) - ideal) / span) ** 2).sum())
        assert study.explain(front[0])["best_so_far"] is None


def test_one_loss_has_a_front_of_one():
    r = quiet(loss, SPACE, "nsga2", 40, population=8)
    assert r.front is None and r.func_vals.shape == (40,) and r.fun == r.func_vals.min()
    study = Study(SPACE, "ga")
    assert study.front() == [] and Study(SPACE, "nsga2").front() == [] and Study(SPACE, "nsga2").best is None
    study.optimize(loss, 5, progress=False)
    assert study.front() == [study.best]


def test_maximize_flips_all_losses():
    a = quiet(limited, SPACE, "nsga2", 80, population=10)
    flipped = lambda p: limited(p) | dict(value=[-v for v in two(p)])  # noqa: E731
    b = quiet(flipped, SPACE, "nsga2", 80, population=10, maximize=True)
    assert a.x_iters == b.x_iters and np.array_equal(a.func_vals, -b.func_vals)
    assert np.array_equal(a.front.values, -b.front.values) and a.front.x == b.front.x and a.x == b.x
    assert b.maximize and not a.maximize


@pytest.mark.parametrize("returned", [(1.0, 2.0), [1, 2], np.array([1.0, 2.0]), torch.tensor([1.0, 2.0], requires_grad=True),
                                      (np.float32(1), torch.tensor(2.0))])
def test_losses_of_all_kinds_are_taken(returned):
    r = quiet(lambda p: returned, SPACE, "nsga2", 3, population=4)
    assert r.fun == (1.0, 2.0) and all(type(v) is float for v in r.fun)


@pytest.mark.parametrize("returned,words", [
    ((1.0, math.nan), r"\(1.0, nan\)"), ((1.0, "b"), "tuple.*'b'"), (np.ones((2, 2)), r"shape \(2, 2\)"), ([], r"list \[\]"),
    ((1.0, 2.0, 3.0), r"3 losses \(1.0, 2.0, 3.0\); allowed: 2"), (7.5, "1 losses 7.5; allowed: 2"), (None, "NoneType")])
def test_losses_that_cannot_be_used_are_failures_with_all_that_was_computed(returned, words):
    study = Study(SPACE, "nsga2", population=6)
    study.tell(study.ask(), two(study.trials[0].params))
    study.optimize(lambda p: returned if p["act"] == "relu" else two(p), 30, progress=False)
    reasons = {t.reason for t in study.trials if t.state == "failed"}
    assert len(reasons) == 1 and __import__("re").search(words, reasons.pop())
    r = study.result()
    assert np.isinf(r.func_vals).all(1).sum() == r.nfail > 0 and r.func_vals.shape == (30, 2)


def test_several_losses_told_to_a_method_for_one_are_named_and_kept(tmp_path):
    path = tmp_path / "run.jsonl"
    with pytest.raises(RuntimeError, match=r"trial 0.*allowed: one number; several with a method that takes them \(nsga2\)"):
        quiet(two, SPACE, "ga", 4, journal=path)
    told = [e["failed"] for e in read_journal(path)[1] if "tell" in e]
    assert len(told) == 4 and all(str(t.params["depth"]) in f for t, f in zip(Study(SPACE, "ga", journal=path).trials, told))


def test_batched_and_workers_equal_one_by_one_with_several_losses():
    space = Box(-2, 2, 3)
    one = quiet(lambda x: [(x**2).sum(), ((x - 1) ** 2).sum()], space, "nsga2", 70, population=20)
    rows = lambda z: torch.stack([(z**2).sum(1), ((z - 1) ** 2).sum(1)], 1)  # noqa: E731
    many = quiet(rows, space, "nsga2", 70, population=20, batched=True)
    threads = quiet(lambda x: [(x**2).sum(), ((x - 1) ** 2).sum()], space, "nsga2", 70, population=20, workers=3)
    assert np.array_equal(one.x_iters, threads.x_iters) and np.array_equal(one.func_vals, threads.func_vals)
    assert np.array_equal(one.x_iters, many.x_iters) and np.allclose(one.func_vals, many.func_vals)
    limit = quiet(lambda z: dict(value=rows(z), violations=z[:, :1]), space, "nsga2", 70, population=20, batched=True)
    assert (np.array(limit.front.x)[:, 0] <= 0).all() and "violated" in limit.message


def test_target_with_several_losses():
    assert quiet(two, SPACE, "nsga2", 3000, target=(0.5, 4)).nfev < 1000
    r = quiet(lambda p: [-v for v in two(p)], SPACE, "nsga2", 3000, target=-4.5, maximize=True)
    assert r.nfev < 1000 and (r.func_vals[-1] >= -4.5).all() and not (r.func_vals[:-1] >= -4.5).all(1).any()


@pytest.mark.parametrize("cut", [1, 7, 12, 13, 24, 41])
def test_resume_of_two_losses_is_bit_equal(tmp_path, cut):
    def f(p):
        if p["depth"] == 2:
            raise MemoryError("does not fit")
        return limited(p)

    whole, path, up = tmp_path / "a.jsonl", tmp_path / "b.jsonl", cut % 2 == 1
    a = quiet(f, SPACE, "nsga2", 30, population=6, journal=whole, maximize=up)
    path.write_bytes(b"".join(whole.read_bytes().splitlines(True)[: 1 + cut]))
    b = quiet(f, SPACE, "nsga2", 30, population=6, journal=path, maximize=up)
    assert path.read_bytes() == whole.read_bytes() and np.array_equal(a.func_vals, b.func_vals)
    assert a.front.x == b.front.x and np.array_equal(a.front.values, b.front.values) and a.x == b.x
    with Study(SPACE, "nsga2", population=6, journal=path, maximize=up) as again:
        assert all(type(t.value) is tuple for t in again.front()) and [t.params for t in again.front()] == a.front.x
    event = next(e for e in read_journal(path)[1] if "value" in e)
    assert isinstance(event["value"], list) and len(event["violations"]) == 2


def test_enqueued_points_enter_the_front():
    study = Study(SPACE, "nsga2", population=6)
    study.enqueue(dict(lr=0.01, depth=5, act="gelu"))
    study.optimize(two, 12, progress=False)
    assert study.trials[0] in study.front() and study.trials[0].value[0] < 1e-20


@pytest.mark.parametrize("method", ["ga", "cmaes", "random", "bo"])
def test_violations_reach_every_method(method):
    "The free optimum is forbidden; what is reported is allowed, and the method has heard of it."
    f = lambda x: dict(value=float(x @ x), violations=[0.5 - x[0], -1.0])  # noqa: E731
    study = Study(Box(-2, 2, 2), method)
    r = study.optimize(f, 20 if method == "bo" else 200, progress=False)
    assert r.x[0] >= 0.5 and r.fun == study.best.value == min(t.value for t in study.trials if t.params[0] >= 0.5)
    assert np.isinf(r.func_vals).sum() == sum(t.excess > 0 for t in study.trials) > 0 == r.nfail
    assert study.optimizer.best[1] == r.fun and "violated constraints" in r.message


def test_nothing_allowed_says_how_near_it_came():
    with pytest.raises(RuntimeError, match=r"none of 40 evaluations was allowed; the least forbidden one \(trial \d\) violates by 2"):
        quiet(lambda p: dict(value=1.0, violations=10 - p["depth"]), Space(depth=Integer(1, 8)), "random", 40)


def test_violations_are_checked_before_the_trial_is_answered():
    study = Study(SPACE, "nsga2")
    t = study.ask()
    for bad, error in (("much", TypeError), ([1.0, math.nan], ValueError), ([[1], [2, 3]], ValueError)):
        with pytest.raises(error):
            study.tell(t, (1.0, 2.0), violations=bad)
    assert t.state == "running"
    study.tell(t, (1.0, 2.0), violations=torch.tensor([-1.0, 0.0]))
    assert t.excess == 0 and study.best is t
    r = quiet(lambda p: dict(value=1.5, violations=math.nan) if p["act"] == "relu" else 1.0, SPACE, "random", 8)
    assert 0 < r.nfail < 8
    odd = Study(SPACE, "random")
    odd.optimize(lambda p: dict(value=1.5, colour=3) if p["act"] == "relu" else 1.0, 8, progress=False)
    assert all("1.5" in t.reason and "colour" in t.reason for t in odd.trials if t.reason)


def test_losses_keep_double_precision():
    study = Study(Box(-1, 1, 1), "random")
    for i in range(3):
        study.tell(study.ask(), 1000 - 1e-9 * i)
    assert study.optimizer.best[1] == 1000 - 2e-9


# ---------------------------------------------------------------- workers
@pytest.mark.parametrize("method", ["ga", "random", "cmaes"])
@pytest.mark.parametrize("workers", [2, 5])
def test_workers_do_not_change_the_points(method, workers):
    space = Box(-5, 5, 2)
    f = lambda x: time.sleep(0.001 * (x[0] > 0)) or float(x @ x)  # noqa: E731
    a, b = quiet(f, space, method, 40), quiet(f, space, method, 40, workers=workers)
    assert np.array_equal(a.x_iters, b.x_iters) and np.array_equal(a.func_vals, b.func_vals)


def test_processes_and_asynchronous():
    with cf.ProcessPoolExecutor(2) as pool:
        a = quiet(loss, SPACE, "ga", 20, executor=pool)
        b = quiet(loss, SPACE, "ga", 20, executor=pool, workers=4, sync=False)
    assert a.x_iters == quiet(loss, SPACE, "ga", 20).x_iters and b.nfev == 20


def test_worker_exceptions_are_failures():
    def f(p):
        if p["act"] == "relu":
            raise OSError("gone")
        return loss(p)

    r = quiet(f, SPACE, "random", 20, workers=3)
    assert 0 < r.nfail < 20


# ---------------------------------------------------------------- journal
def test_journal_holds_users_sign_params_and_reason(tmp_path):
    path = tmp_path / "sub" / "run.jsonl"
    quiet(lambda p: 1 / 0 if p["act"] == "relu" else 5.0, SPACE, "random", 6, journal=path, maximize=True)
    header, events, _ = read_journal(path)
    assert header["method"] == "random" and header["maximize"] is True and header["seed"] == 0
    tells = [e for e in events if "tell" in e]
    assert {e.get("value") for e in tells} == {5.0, None} and any("ZeroDivisionError" in e.get("failed", "") for e in tells)
    assert [e["ask"] for e in events if "ask" in e] == list(range(6)) and [p.name for p in path.parent.iterdir()] == ["run.jsonl"]


@pytest.mark.parametrize("method", ["ga", "bo", "random", "cmaes"])
@pytest.mark.parametrize("cut", [3, 11, 12, 25])
def test_resume_from_any_prefix_is_bit_equal(tmp_path, method, cut):
    space = SPACE if method != "cmaes" else Box(-5, 5, 2)
    f = loss if method != "cmaes" else lambda x: float(x @ x)
    whole, path = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    a = quiet(f, space, method, 20, journal=whole)
    path.write_bytes(b"".join(whole.read_bytes().splitlines(True)[: 1 + cut]))
    b = quiet(f, space, method, 20, journal=path)
    assert path.read_bytes() == whole.read_bytes() and b.fun == a.fun and b.nfev == 20


@pytest.mark.parametrize("method", ["ga", "bo"])
@pytest.mark.parametrize("cut", range(1, 18, 2))
def test_resume_of_synchronous_workers_is_bit_equal(tmp_path, cut, method):
    whole, path = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    quiet(loss, SPACE, method, 12, journal=whole, workers=4)
    path.write_bytes(b"".join(whole.read_bytes().splitlines(True)[: 1 + cut]))
    quiet(loss, SPACE, method, 12, journal=path, workers=4)
    points = lambda p: {e["ask"]: e["z"] for e in read_journal(p)[1] if "ask" in e}  # noqa: E731
    assert points(path) == points(whole)


def test_torn_line_is_dropped_with_a_warning(tmp_path):
    path = tmp_path / "run.jsonl"
    quiet(loss, SPACE, "ga", 10, journal=path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])
    with pytest.warns(UserWarning, match="torn"):
        quiet(loss, SPACE, "ga", 10, journal=path)
    assert path.read_bytes() == whole


def test_damage_in_the_middle_is_refused(tmp_path):
    path = tmp_path / "run.jsonl"
    quiet(loss, SPACE, "ga", 10, journal=path)
    lines = path.read_bytes().splitlines(True)
    lines[3] = b"{broken\n"
    path.write_bytes(b"".join(lines))
    with pytest.raises(ValueError, match="line 4"):
        Study(SPACE, "ga", journal=path)
    path.write_text('{"some": "other file"}\n')
    with pytest.raises(ValueError, match="header"):
        Study(SPACE, "ga", journal=path)


@pytest.mark.parametrize("change,words", [
    (dict(seed=1), "seed"), (dict(method="random"), "method"), (dict(maximize=True), "maximize"),
    (dict(space=[(0, 1)]), "space"), (dict(space=Space(dict(reversed(SPACE.parameters.items())))), "space"), (dict(population=7), "settings")])
def test_another_search_is_refused_with_what_differs(tmp_path, change, words):
    path = tmp_path / "run.jsonl"
    Study(SPACE, "ga", journal=path).close()
    with pytest.raises(ValueError, match=f"its {words} is"):
        Study(**{"space": SPACE, "method": "ga", "journal": path} | change)


def test_enqueued_points_resume_and_are_not_asked_twice(tmp_path):
    path, guess = tmp_path / "run.jsonl", dict(lr=0.01, depth=4, act="gelu")

    def run(budget):
        with Study(SPACE, "ga", journal=path) as s:
            s.enqueue(guess)
            s.optimize(loss, budget, progress=False)
            return [t.params for t in s.trials]

    first, again = run(5), run(14)
    assert first == again[:5] and sum(p == guess for p in again) == 1
    path.unlink()
    assert run(14) == again


def test_unfinished_trials_come_back_with_their_ids(tmp_path):
    path = tmp_path / "run.jsonl"
    with Study(SPACE, "ga", journal=path) as s:
        trials = [s.ask() for _ in range(4)]
        s.tell(trials[2], 1.0)
    with Study(SPACE, "ga", journal=path) as s:
        back = [s.ask() for _ in range(4)]
        assert [t.id for t in back] == [0, 1, 3, 4] and [t.params for t in back[:2]] == [t.params for t in trials[:2]]


KILLED = """
import sys, time
from gfopt import Box, minimize
path, method = sys.argv[1:]
def f(x):
    time.sleep(0.004)
    y = float(((x - 1) ** 2).sum())
    return dict(value=[y, float(((x + 1) ** 2).sum())], violations=[float(x[0])]) if method == "nsga2" else y
minimize(f, Box(-5, 5, 3), method, 60, journal=path, progress=False)
"""


@pytest.mark.parametrize("method", ["ga", "cmaes", "bo", "nsga2"])
def test_kill_9_loses_at_most_the_evaluation_in_flight(tmp_path, method):
    rng = np.random.default_rng(0)
    whole, path = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    run = lambda p: [sys.executable, "-c", KILLED, str(p), method]  # noqa: E731
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run(run(whole), check=True, env=env)
    for _ in range(3):
        p = subprocess.Popen(run(path), env=env)
        while not path.exists() or path.stat().st_size < 300:
            assert p.poll() is None
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.1))
        p.send_signal(signal.SIGKILL)
        p.wait()
        events = [json.loads(line) for line in path.read_bytes().split(b"\n")[1:-1]]
        asked, told = (sum(k in e for e in events) for k in ("ask", "tell"))
        assert asked - told <= 1
    subprocess.run(run(path), check=True, env=env)
    assert path.read_bytes() == whole.read_bytes()


def law(rows):
    return np.array([(p["x"] - 0.4) ** 2 for p in rows])


def test_a_prior_mean_is_kept_by_its_name_and_brought_along(tmp_path):
    space, f = Space(x=Real(0, 1), k=Integer(1, 4)), lambda p: (p["x"] - 0.3) ** 2 + 0.01 * p["k"]
    whole = minimize(f, space, "bo", 9, journal=tmp_path / "a.jsonl", mean=law, progress=False)
    for budget in (4, 9):
        again = minimize(f, space, "bo", budget, journal=tmp_path / "b.jsonl", mean=law, progress=False)
    assert again.x_iters == whole.x_iters and (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    assert json.loads((tmp_path / "a.jsonl").read_text().splitlines()[0])["settings"] == {"mean": "function law"}
    for other in (dict(), dict(mean=lambda rows: law(rows))):
        with pytest.raises(ValueError, match="its settings is"):
            minimize(f, space, "bo", 12, journal=tmp_path / "b.jsonl", progress=False, **other)
