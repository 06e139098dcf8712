"Tuning: the door `tune`, the scheduler's arithmetic, and the experiment built on them."

import concurrent.futures as cf
import itertools
import json
import math
import multiprocessing
import threading

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gfopt.bayes.multifidelity import ASHA
from gfopt.experiments import tuning
from gfopt.lm.text import ByteTokenizer
from gfopt.lm.tune import Fidelity, Pruned, Report, _leg, step_law, step_law_mean, tune
from gfopt.optimizer import settings_of
from gfopt.space import Integer, Real, Space

SPACE = Space(lr=Real(1e-4, 1.0, log=True), rows=Integer(2, 64, log=True))
DEFAULT = dict(lr=0.1, rows=16)
PAID = Fidelity("tokens", 10, 270, eta=3)
quiet = dict(progress=False)


def bowl(p):
    return (math.log10(p["lr"]) + 2) ** 2 + 0.1 * (math.log2(p["rows"]) - 3) ** 2


def training(p, tokens, report):
    "A run whose loss falls to that of the bowl; ten reports on the way."
    for i in range(1, 11):
        report(i * tokens // 10, bowl(p) + 10 / i)
    return bowl(p)


# ---- the door
def test_default_is_first_and_costs_are_recorded():
    for method in ("random", "ga", "pso", "bo"):
        study = tune(training, SPACE, method, 5, default=DEFAULT, fidelity=PAID, **quiet)
        assert study.trials[0].params == DEFAULT and study.trials[0].enqueued
        assert [t.extra["cost"] for t in study.trials] == [270] * 5
        assert len(study.trials[1].reports) == 10


def continuing(p, tokens, report):
    "The same run with a checkpoint: a number that says how far it got."
    file = report.folder / "at.json"
    begun = json.loads(file.read_text()) if file.exists() else 0
    assert begun == report.spent
    for t in range(begun + 10, tokens + 1, 10):
        report(t, bowl(p) + 100 / t)
    file.write_text(json.dumps(tokens))
    return bowl(p) + 100 / tokens


@pytest.mark.parametrize("scheduler", ["asha", "hyperband", "sh"])
def test_bad_runs_stop_on_rungs_and_their_values_stay_out(scheduler):
    seen = tune(training, SPACE, "random", 30, default=DEFAULT, fidelity=PAID, scheduler=scheduler, **quiet)
    full = tune(training, SPACE, "random", 30, default=DEFAULT, fidelity=PAID, **quiet)
    assert [t.params for t in seen.trials] == [t.params for t in full.trials]
    stopped, done = ([t for t in seen.trials if t.state == s] for s in ("failed", "done"))
    assert len(stopped) > 12 and done and len(stopped) + len(done) == 30
    for t in stopped:
        at = max(t.reports)
        assert t.value is None and at in PAID.rungs and t.reason == f"Pruned: stopped at {at} tokens with {bowl(t.params)}"
        assert t.extra["cost"] == sum(r for r in PAID.rungs if r <= at and r in t.reports)  # no checkpoint: from the start each time
    assert all(t.value == t.reports[270] for t in done) and seen.best.value == min(t.value for t in done)
    assert sum(t.extra["cost"] for t in seen.trials) < 0.7 * sum(t.extra["cost"] for t in full.trials)


@pytest.mark.parametrize("scheduler", ["asha", "hyperband", "sh"])
def test_a_checkpoint_is_continued_and_only_the_difference_is_charged(scheduler, tmp_path):
    study = tune(continuing, SPACE, "random", 20, fidelity=PAID, scheduler=scheduler, folder=tmp_path / "runs", **quiet)
    for t in study.trials:
        assert t.extra["cost"] == max(t.reports)  # every token once
        assert sorted(t.reports) == list(range(10, max(t.reports) + 1, 10))
        assert json.loads((tmp_path / "runs" / f"{t.id:05d}" / "at.json").read_text()) == max(t.reports)
    assert max(t.extra["cost"] for t in study.trials) == 270


def test_a_search_ends_with_somebody_at_the_top():
    for budget in (1, 2, 4):
        study = tune(training, SPACE, "random", budget, fidelity=PAID, scheduler="asha", **quiet)
        assert [t.state for t in study.trials].count("done") == 1 and study.best.value == study.best.reports[270]


def test_what_the_method_hears_is_a_belief_and_never_a_best():
    study = tune(continuing, SPACE, "bo", 14, fidelity=PAID, scheduler="asha", **quiet)
    heard = study._rebuilt()
    assert len(heard._y) == 14 and np.isfinite(heard._y).all()
    done = {t.id: t.value for t in study.trials if t.state == "done"}
    for t in study.trials:
        y = study._belief(t)
        assert y == done[t.id] if t.id in done else y < t.reports[study.at[t.id]]  # runs fall, and the belief knows
    assert study.best.id in done


def test_a_population_hears_every_trial_once():
    study = tune(continuing, SPACE, "ga", 12, fidelity=PAID, scheduler="asha", population=4, **quiet)
    assert study.optimizer.g == 3 and len(study._told) == 12


def test_asha_when_maximizing_makes_the_same_decisions():
    def upside_down(p, tokens, report):
        return -training(p, tokens, lambda spent, loss: report(spent, -loss))

    for scheduler in ("asha", "hyperband"):
        a = tune(training, SPACE, "random", 15, fidelity=PAID, scheduler=scheduler, **quiet)
        b = tune(upside_down, SPACE, "random", 15, fidelity=PAID, scheduler=scheduler, maximize=True, **quiet)
        assert [(t.state, t.extra["cost"]) for t in a.trials] == [(t.state, t.extra["cost"]) for t in b.trials]


def test_several_losses_climb_by_rank():
    def two(p, tokens, report):
        report(tokens, (bowl(p) + 10 / tokens, p["rows"]))
        return bowl(p) + 10 / tokens, p["rows"]

    study = tune(two, SPACE, "nsga2", 16, fidelity=PAID, scheduler="asha", population=4, **quiet)
    done = [t for t in study.trials if t.state == "done"]
    assert done and all(len(t.value) == 2 for t in done) and all(t.value is None for t in study.trials if t not in done)


def test_a_violation_never_climbs():
    def unsafe(p, tokens, report):
        return dict(value=bowl(p), violations=[1.0 if p["lr"] < 0.01 else -1.0])

    study = tune(unsafe, SPACE, "random", 20, fidelity=PAID, scheduler="asha", **quiet)
    assert {study.at[t.id] for t in study.trials if t.params["lr"] < 0.01} == {10} and study.best.params["lr"] >= 0.01


@pytest.mark.parametrize("scheduler", [None, "asha"])
def test_a_diverged_report_ends_the_run_and_the_journal_survives(tmp_path, scheduler):
    def diverges(p, tokens, report):
        report(3, 2.0)
        report(7, math.nan if p["lr"] > 0.01 else 1.0)
        return 1.0

    ask = lambda: tune(diverges, SPACE, "random", 8, default=DEFAULT, fidelity=PAID, scheduler=scheduler, journal=tmp_path / "j", **quiet)  # noqa: E731
    first = ask()
    bad = first.trials[0]
    assert "diverged: reported nan at 7 tokens" in bad.reason and bad.extra["cost"] == 7 and bad.reports == {3: 2.0}
    again = ask()  # nothing left to do: every trial comes from the journal
    assert [(t.value, t.reason, t.extra, t.reports) for t in again.trials] == [(t.value, t.reason, t.extra, t.reports) for t in first.trials]


class Killed(BaseException):
    pass


@pytest.mark.parametrize("method", ["ga", "bo", "random"])
@pytest.mark.parametrize("scheduler", ["asha", "hyperband", "sh"])
def test_killed_anywhere_the_same_search_goes_on(tmp_path, scheduler, method):
    settings = dict(default=DEFAULT, fidelity=PAID, scheduler=scheduler, **quiet) | (dict(population=4) if method == "ga" else {})
    whole = tune(continuing, SPACE, method, 9, journal=tmp_path / "w", **settings)
    calls = itertools.count(1)

    def mortal(p, tokens, report):
        if next(calls) % 3 == 0:
            raise Killed
        return continuing(p, tokens, report)

    for _ in range(40):
        try:
            study = tune(mortal, SPACE, method, 9, journal=tmp_path / "j", **settings)
            break
        except Killed:
            pass
    told = lambda s: [(t.params, t.state, t.value, t.reason, t.extra, t.reports) for t in s.trials]  # noqa: E731
    assert told(study) == told(whole)
    assert (tmp_path / "j").read_bytes() == (tmp_path / "w").read_bytes()


def test_a_torn_journal_between_leg_and_ask_is_continued(tmp_path):
    settings = dict(fidelity=PAID, scheduler="asha", **quiet)
    whole = tune(continuing, SPACE, "random", 8, journal=tmp_path / "w", **settings)
    lines = (tmp_path / "w").read_bytes().splitlines(keepends=True)
    for cut in range(1, len(lines)):
        (tmp_path / "j").write_bytes(b"".join(lines[:cut]))
        again = tune(training, SPACE, "random", 8, journal=tmp_path / "j", folder=tmp_path / f"none{cut}", **settings)
        assert [t.params for t in again.trials] == [t.params for t in whole.trials]
        assert {json.loads(x)["tell"] for x in (tmp_path / "j").read_text().splitlines() if "tell" in json.loads(x)} == {
            t.id for t in again.trials if t.state == "done"}


def test_a_larger_budget_lets_the_paused_climb(tmp_path):
    settings = dict(fidelity=PAID, scheduler="asha", journal=tmp_path / "j", **quiet)
    few = tune(continuing, SPACE, "random", 3, **settings)
    many = tune(continuing, SPACE, "random", 20, **settings)
    assert len(few.trials) == 3 and len(many.trials) == 20
    assert any(max(many.trials[i].reports) > max(few.trials[i].reports) for i in range(3)) or few.best.value == many.trials[few.best.id].value


def test_another_scheduler_is_refused(tmp_path):
    tune(training, SPACE, "random", 9, fidelity=PAID, scheduler="asha", journal=tmp_path / "j", **quiet)
    with pytest.raises(ValueError, match="allowed: the same scheduler and fidelity"):
        tune(training, SPACE, "random", 20, fidelity=PAID, scheduler="sh", journal=tmp_path / "j", **quiet)
    with pytest.raises(ValueError, match="was written with a scheduler"):
        tune(training, SPACE, "random", 20, fidelity=PAID, journal=tmp_path / "j", **quiet)


@pytest.mark.parametrize("kind", ["threads", "spawned processes"])
def test_legs_run_in_any_executor(kind):
    make = cf.ThreadPoolExecutor if kind == "threads" else lambda n: cf.ProcessPoolExecutor(n, multiprocessing.get_context("spawn"))
    with make(2) as pool:
        study = tune(continuing, SPACE, "random", 9, fidelity=PAID, scheduler="asha", executor=pool, workers=2, **quiet)
    assert len(study.trials) == 9 and all(t.extra["cost"] == max(t.reports) for t in study.trials)
    assert len(study.best.reports) == 27  # reports came home from wherever they were made


def test_one_process_climbs_at_a_time(tmp_path):
    "A second scheduler on the journal would send the same runs up twice: it is refused, and the first goes on."
    path, asked = tmp_path / "run.jsonl", []

    def objective(p, tokens, report):
        if not asked:
            asked.append(path.read_text())
            with pytest.raises(RuntimeError, match="another process climbs"):
                tune(continuing, SPACE, "random", 9, fidelity=PAID, scheduler="asha", journal=path, **quiet)
        return continuing(p, tokens, report)

    study = tune(objective, SPACE, "random", 9, fidelity=PAID, scheduler="asha", journal=path, **quiet)
    assert asked and path.read_text().startswith(asked[0]) and len(study.trials) == 9
    assert not path.with_name("run.jsonl.leases").exists()


def test_report_without_a_checkpoint_starts_at_zero(tmp_path):
    report = Report("tokens", tmp_path, 30)
    assert report.spent == 0
    (tmp_path / "weights").touch()
    assert Report("tokens", tmp_path, 30).spent == 30 and Report("tokens", None, 30).spent == 0
    report(5, 1.0)
    with pytest.raises(Pruned, match="diverged: reported inf at 6 tokens"):
        report(6, math.inf)
    with pytest.raises((TypeError, ValueError), match="spent"):
        report(-1, 1.0)
    assert report.heard == {5: 1.0} and report.last == 6


def test_cost_of_a_failed_leg():
    def dies(p, tokens, report):
        if p: report(p, 1.0)
        raise RuntimeError("out of memory")

    assert _leg(dies, 4, 10, "tokens", None, 0)["cost"] == 4 and _leg(dies, 0, 10, "tokens", None, 0)["cost"] == 10
    assert _leg(dies, 40, 10, "tokens", None, 0)["cost"] == 10


@given(st.floats(1e6, 1e12), st.floats(1e6, 1e13))
def test_step_law(N, D):
    best = step_law(N, D)
    assert math.isclose(math.log(best["lr"]), math.log(1.79) - 0.713 * math.log(N) + 0.307 * math.log(D), abs_tol=1e-9)
    assert math.isclose(math.log(best["batch"]), math.log(0.58) + 0.571 * math.log(D), abs_tol=1e-9)
    mean = step_law_mean(N, D, length=64)
    at = lambda a, b: mean([dict(lr=best["lr"] * a, batch_size=best["batch"] / 64 * b)])[0]  # noqa: E731
    assert at(1, 1) < 1e-20 and math.isclose(at(10, 1), 1.0) and math.isclose(at(0.1, 100), 1.0 + 0.3 * 4)
    assert step_law_mean(N, D, best=dict(lr=0.5))([dict(lr=0.5, other=3)]).tolist() == [0.0]


@pytest.mark.skipif("mean" not in settings_of("bo"), reason="bo takes no prior mean yet")
def test_step_law_is_a_prior_mean():
    prior = step_law_mean(1e6, 1e9, batch="rows", best=dict(lr=0.01, batch=8))
    study = tune(bowl, SPACE, "bo", 8, mean=prior, **quiet)
    assert len(study.trials) == 8 and study.best is not None


def test_resumed_equals_uninterrupted(tmp_path):
    settings = dict(default=DEFAULT, fidelity=PAID, population=4, **quiet)
    tune(training, SPACE, "ga", 7, journal=tmp_path / "j", **settings)
    both = tune(training, SPACE, "ga", 18, journal=tmp_path / "j", **settings)
    whole = tune(training, SPACE, "ga", 18, **settings)
    assert [(t.params, t.state, t.value, t.extra) for t in both.trials] == [(t.params, t.state, t.value, t.extra) for t in whole.trials]
    assert sum(t.enqueued for t in both.trials) == 1


def test_threads_are_heard():
    names = set()

    def run(p, tokens, report):
        names.add(threading.current_thread().name)
        return training(p, tokens, report)

    study = tune(run, SPACE, "random", 12, fidelity=PAID, scheduler="asha", workers=3, **quiet)
    assert len(study.trials) == 12 and any(t.state == "failed" for t in study.trials) and study.best is not None
    assert all("MainThread" != n for n in names)


def test_an_executor_gets_the_whole_run_and_full_cost():
    study = tune(training, SPACE, "random", 6, fidelity=PAID, executor=tuning._Here(), workers=2, default=DEFAULT, **quiet)
    assert [t.extra["cost"] for t in study.trials] == [270] * 6 and study.trials[0].value == bowl(DEFAULT)


def test_everything_failed_quotes_the_first():
    def broken(p, tokens, report):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="all 3 evaluations failed.*out of memory"):
        tune(broken, SPACE, "random", 3, fidelity=PAID, **quiet)


@pytest.mark.parametrize("error, text, change", [
    (TypeError, "objective: 3", dict(objective=3)),
    (ValueError, "method: 'bayes'", dict(method="bayes")),
    (ValueError, "budget: 0", dict(budget=0)),
    (ValueError, "scheduler: 'asah'; did you mean 'asha'", dict(scheduler="asah")),
    (ValueError, "without a fidelity", dict(scheduler="asha")),
    (TypeError, "fidelity: 100", dict(fidelity=100)),
    (ValueError, "scheduler: .*allowed: an unused one", dict(fidelity=PAID, scheduler=ASHA(Fidelity("tokens", 1, 9)))),
    (ValueError, "lr: .*allowed: 0.0001 to 1", dict(default=dict(lr=5.0, rows=4))),
    (TypeError, "random has no setting 'population'", dict(population=4)),
])
def test_bad_arguments_are_named(error, text, change):
    settings = dict(objective=bowl, space=SPACE, method="random", budget=3, **quiet) | change
    with pytest.raises(error, match=text):
        tune(**settings)


def test_global_generators_are_left_alone():
    torch.manual_seed(1), np.random.seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    tune(training, SPACE, "bo", 8, fidelity=PAID, scheduler="asha", **quiet)
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == np.random.get_state()[1].tolist()


def test_pruned_is_an_ordinary_exception():
    assert issubclass(Pruned, Exception)  # study and pool catch Exception


# ---- the experiment
@pytest.fixture(scope="module")
def smoke(corpus):
    return tuning.run_tuning(corpus, ByteTokenizer(), smoke=True, progress=False)


def test_act_is_fair_and_json(smoke):
    assert json.loads(json.dumps(smoke)) == smoke
    assert smoke["methods"].keys() == {"random", "ga", "pso", "bo"}
    for r in smoke["methods"].values():
        first = r["trials"][0]
        assert first["params"] == tuning.DEFAULT and first["value"] == smoke["methods"]["random"]["trials"][0]["value"]
        assert [t["tokens"] for t in r["trials"]] == [2048] * 5
        values = [t["value"] for t in r["trials"]]
        assert r["best"] == r["trials"][int(np.argmin(values))]["params"]
    for name, a in smoke["again"].items():
        assert 0 not in a["seeds"] and len(a["test"]) == len(a["valid"]) == len(a["seeds"]) == 2
        assert a["params"] == (tuning.DEFAULT if name == "default" else smoke["methods"][name]["best"])


def test_act_continues_behind_finished_steps(corpus, smoke, monkeypatch):
    kept, search = {}, tuning._search

    def step(name, fn):
        if name not in kept:
            kept[name] = json.loads(json.dumps(fn()))
        return kept[name]

    def stopped(work, method, *rest):
        if method == "pso":
            raise KeyboardInterrupt
        return search(work, method, *rest)

    run = lambda: tuning.run_tuning(corpus, ByteTokenizer(), smoke=True, progress=False, step=step)  # noqa: E731
    monkeypatch.setattr(tuning, "_search", stopped)
    with pytest.raises(KeyboardInterrupt):
        run()
    assert [*kept] == ["tune plan", "tune random", "tune ga"]
    called = []
    monkeypatch.setattr(tuning, "_search", lambda work, method, *rest: called.append(method) or search(work, method, *rest))
    result = run()
    assert called == ["pso", "bo"]
    values = lambda r: [[t["value"] for t in m["trials"]] for m in r["methods"].values()]  # noqa: E731
    assert values(result) == values(smoke) and result["again"] == smoke["again"]


def test_a_search_cut_short_is_no_result(corpus, monkeypatch):
    calls = itertools.count()
    once = tuning.train_once

    def interrupted(*args):
        if next(calls) == 3:
            raise KeyboardInterrupt
        return once(*args)

    monkeypatch.setattr(tuning, "train_once", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tuning.run_tuning(corpus, ByteTokenizer(), smoke=True, progress=False)


def test_a_broken_pool_falls_back_to_this_process(corpus, monkeypatch):
    class Broken(cf.ThreadPoolExecutor):
        def __init__(self, n, *args):
            super().__init__(n)

        def map(self, *args):
            raise cf.BrokenExecutor

    monkeypatch.setattr(cf, "ProcessPoolExecutor", Broken)
    work = tuning.prepare(corpus, ByteTokenizer(), smoke=True)
    pool, at_once = tuning._workers(work, 2)
    assert isinstance(pool, tuning._Here) and at_once == 1


@given(st.floats(1, 1e4), st.floats(1e-6, 1e-2), st.integers(1, 2))
def test_plan_keeps_within_its_seconds(seconds, per_token, at_once):
    plan = tuning.make_plan(seconds, per_token, at_once)
    runs = 4 * plan["trials"] + 5 * plan["seeds"]
    assert plan["trials"] in (9, 13, 17) and 4096 <= plan["tokens"] <= 131072
    assert plan["tokens"] == 4096 or runs * plan["tokens"] * per_token / at_once <= seconds


def test_verdict_is_honest():
    tell = lambda **test: tuning.verdict(dict(again={m: dict(test=v) for m, v in test.items()}))  # noqa: E731
    assert tell(default=[2.0, 2.0], random=[2.1, 2.1], ga=[2.2, 2.2]).startswith("No search improved")
    assert "Not with every seed" in tell(default=[2.0, 2.4], random=[2.1, 2.0], ga=[3.0, 3.0])
    assert "not told apart from random search" in tell(default=[3.0, 3.0], bo=[2.0, 2.1], random=[2.05, 2.12])
    assert "Nothing better than the default came from particle swarm." in tell(default=[3.0], bo=[2.0], pso=[3.0])
    assert "told apart" not in tell(default=[3.0, 3.0], bo=[2.0, 2.01], random=[2.5, 2.51])


def test_picture_and_rows(smoke):
    rows = tuning.tuning_rows(smoke)
    assert [r["trials"] for r in rows] == [0, 5, 5, 5, 5] and all(r["seen"] is None or r["seen"] > 0 for r in rows)
    failed = json.loads(json.dumps(smoke))
    failed["methods"]["ga"]["trials"][2].update(value=None, failed="returned nan")
    fig = tuning.plot_tuning(failed)
    assert fig.axes[0].get_ylabel() == "held-out bits per byte"
    fig.canvas.draw()
