"Tuning: the door `tune`, the scheduler's arithmetic, and the experiment built on them."

import concurrent.futures as cf
import itertools
import json
import math
import threading

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gfopt.experiments import tuning
from gfopt.lm.text import ByteTokenizer, Corpus, Domain
from gfopt.lm.tune import Fidelity, Pruned, _Charged, goes_on, tune
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


# ---- fidelity and rule
@given(st.integers(1, 50), st.integers(0, 10**6), st.integers(2, 5))
def test_rungs_are_powers_by_multiplication(low, more, eta):
    rungs = Fidelity("tokens", low, low + more, eta).rungs
    assert rungs == [r for r in (low * eta**k for k in range(25)) if r < low + more]


@pytest.mark.parametrize("bad", [dict(low=0, high=5), dict(low=6, high=5), dict(low=1, high=5, eta=1)])
def test_fidelity_refuses(bad):
    with pytest.raises(ValueError, match=r"allowed: >="):
        Fidelity("tokens", **bad)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=40, unique=True), st.integers(2, 5))
def test_rule_lets_the_best_share_pass(seen, eta):
    assert sum(goes_on(y, seen, eta) for y in seen) == max(1, len(seen) // eta)
    assert goes_on(min(seen), seen, eta)
    assert not goes_on(math.nan, [*seen, math.nan], eta)


# ---- the door
def test_default_is_first_and_costs_are_recorded():
    for method in ("random", "ga", "pso", "bo"):
        study = tune(training, SPACE, method, 5, default=DEFAULT, fidelity=PAID, **quiet)
        assert study.trials[0].params == DEFAULT and study.trials[0].enqueued
        assert [t.extra["cost"] for t in study.trials] == [270] * 5
        assert len(study.trials[1].reports) == 10


def test_asha_stops_bad_runs_and_keeps_their_values_out():
    seen = tune(training, SPACE, "random", 20, default=DEFAULT, fidelity=PAID, scheduler="asha", **quiet)
    full = tune(training, SPACE, "random", 20, default=DEFAULT, fidelity=PAID, **quiet)
    assert [t.params for t in seen.trials] == [t.params for t in full.trials]
    stopped = [t for t in seen.trials if t.state == "failed"]
    assert 5 < len(stopped) < 20 and seen.trials[0].state == "done"  # the first is never stopped
    for t in stopped:
        assert t.value is None and t.reason.startswith("Pruned") and t.extra["cost"] == max(t.reports) < 270
        assert t.extra["cost"] in (27, 54, 108)  # judged at the first report at or behind rungs 10 (and) 30, 90
    done = [t for t in seen.trials if t.state == "done"]
    assert all(t.value == bowl(t.params) and t.extra["cost"] == 270 for t in done)
    assert seen.best.value == min(t.value for t in done)


def test_a_rung_is_decided_once():
    study = _Charged(SPACE, "random", 0)
    study.fidelity, study.scheduler, study.spent = PAID, "asha", {}
    early, late = study.ask(), study.ask()
    study.hear(early, 10, 2.0)
    study.hear(late, 10, 1.0)
    study.hear(early, 20, 1.9)  # worse than a later one at rung 10, but it has passed there
    with pytest.raises(Pruned, match="stopped at 40 tokens with 1.9"):
        study.hear(late, 35, 1.0)
        study.hear(early, 40, 1.9)


def test_asha_when_maximizing_makes_the_same_decisions():
    def upside_down(p, tokens, report):
        return -training(p, tokens, lambda spent, loss: report(spent, -loss))

    a = tune(training, SPACE, "random", 15, fidelity=PAID, scheduler="asha", **quiet)
    b = tune(upside_down, SPACE, "random", 15, fidelity=PAID, scheduler="asha", maximize=True, **quiet)
    assert [(t.state, t.extra["cost"]) for t in a.trials] == [(t.state, t.extra["cost"]) for t in b.trials]


def test_a_diverged_report_ends_the_run_and_the_journal_survives(tmp_path):
    def diverges(p, tokens, report):
        report(30, math.nan if p["lr"] > 0.01 else 1.0)
        return 1.0

    ask = lambda: tune(diverges, SPACE, "random", 8, default=DEFAULT, fidelity=PAID, journal=tmp_path / "j", **quiet)  # noqa: E731
    first = ask()
    bad = first.trials[0]
    assert "diverged: reported nan at 30 tokens" in bad.reason and bad.extra["cost"] == 30
    again = ask()  # nothing left to do: every trial comes from the journal
    assert [(t.value, t.reason, t.extra, t.reports) for t in again.trials] == [(t.value, t.reason, t.extra, t.reports) for t in first.trials]


@pytest.mark.parametrize("scheduler", [None, "asha"])
def test_resumed_equals_uninterrupted(tmp_path, scheduler):
    settings = dict(default=DEFAULT, fidelity=PAID, scheduler=scheduler, population=4, **quiet)
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
    (ValueError, "executor: .*threads", dict(fidelity=PAID, scheduler="asha", executor=tuning._Here())),
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
def corpus():
    words = "def return self import for in range if else print value = ( ) :".split()
    texts = [" ".join(words[(i * k + k * k) % len(words)] for k in range(300)).encode() for i in range(1, 30)]
    domain = Domain(texts[:20], texts[20:25], texts[25:])
    return Corpus(domain, domain)


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
