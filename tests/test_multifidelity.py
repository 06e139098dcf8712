"Who climbs, who waits, who stops: the schedulers against their formulas."

import functools
import itertools
import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gfopt.bayes import multifidelity as mf
from gfopt.bayes.multifidelity import (
    ASHA,
    SCHEDULERS,
    Fidelity,
    Hyperband,
    Job,
    Pruned,
    SuccessiveHalving,
    believed,
    brackets,
    front_ranks,
    goes_on,
    halving,
    in_order,
    stops,
)
from gfopt.space import Real, Space
from gfopt.study import Study

LADDER = Fidelity("tokens", 1, 27)


def play(scheduler, loss, runs, workers=1, pick=min):
    "Jobs in the order given; `pick` chooses which of the running ones answers."
    jobs, out, begun = [], [], 0
    while True:
        while len(out) < workers and (job := scheduler.ask(begun if begun < runs else None)):
            begun += job.trial == begun
            jobs.append(job)
            out.append(job)
        if not out:
            return jobs
        job = pick(out)
        out.remove(job)
        scheduler.tell(*job, loss(job.trial, job.level))


# ---- the ladder
@given(st.integers(1, 50), st.integers(0, 10**6), st.integers(2, 5))
def test_rungs_are_powers_by_multiplication(low, more, eta):
    f = Fidelity("tokens", low, low + more, eta)
    assert f.rungs == [r for r in (low * eta**k for k in range(25)) if r < low + more]
    assert f.levels == [*f.rungs, low + more]


def test_no_rung_is_lost_to_a_logarithm():
    assert len(Fidelity("tokens", 1, 243).rungs) == 5 > int(math.log(243) / math.log(3))
    assert brackets(Fidelity("tokens", 1, 243))[0] == (243, 0)


@pytest.mark.parametrize("bad", [dict(low=0, high=5), dict(low=6, high=5), dict(low=1, high=5, eta=1)])
def test_fidelity_refuses(bad):
    with pytest.raises(ValueError, match=r"allowed: >="):
        Fidelity("tokens", **bad)


@given(st.integers(1, 300), st.integers(2, 5), st.integers(1, 5))
def test_halving_and_brackets_by_fractions(n, eta, K):
    from fractions import Fraction

    f = Fidelity("tokens", 2, 2 * eta**K, eta)
    assert halving(n, f) == [(max(1, math.floor(Fraction(n, eta**i))), 2 * eta**i) for i in range(K + 1)]
    assert brackets(f) == [(math.ceil(Fraction((K + 1) * eta ** (K - s), K - s + 1)), s) for s in range(K + 1)]


# ---- the order
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=25))
def test_ranks_are_longest_chains_of_domination(points):
    beats = lambda a, b: a[0] <= b[0] and a[1] <= b[1] and a != b  # noqa: E731
    depth = functools.cache(lambda p: 1 + max((depth(q) for q in set(points) if beats(q, p)), default=-1))
    assert front_ranks(points).tolist() == [depth(p) for p in points]


def test_order_leaves_failures_out_and_keeps_ties_in_time():
    assert in_order(dict(a=2.0, b=math.inf, c=1.0, d=2.0, e=math.nan)) == ["c", "a", "d"]
    assert in_order(dict(a=(1.0, 3.0), b=math.inf, c=(0.0, 4.0), d=(2.0, 5.0))) == ["a", "c", "d"]
    assert in_order({}) == in_order(dict(a=math.inf)) == []


# ---- the schedulers
losses = st.permutations(range(27))


@settings(max_examples=30)
@given(losses, st.integers(1, 5), st.randoms(use_true_random=False))
def test_successive_halving_keeps_the_best_whatever_the_order_of_answers(y, workers, rnd):
    jobs = play(SuccessiveHalving(LADDER), lambda t, level: y[t] + 8.0 / 2**level, 27, workers, rnd.choice)
    for level, n in enumerate([27, 9, 3, 1]):
        assert {j.trial for j in jobs if j.level == level} == set(np.argsort(y, kind="stable")[:n])


@settings(max_examples=30)
@given(losses, st.integers(1, 5), st.randoms(use_true_random=False))
def test_asha_promotes_only_from_the_best_share_and_never_waits(y, workers, rnd):
    s = ASHA(LADDER)
    told, ask = [dict() for _ in range(4)], s.ask
    tell = s.tell

    def checked(new=None):
        job = ask(new)
        assert job is not None or new is None  # nobody waits while a run may begin
        if job and job.level and new is not None:
            below = told[job.level - 1]
            assert sum(v < below[job.trial] for v in below.values()) < len(below) // 3
        return job

    def noted(t, level, loss):
        told[level][t] = loss
        tell(t, level, loss)

    s.ask, s.tell = checked, noted
    jobs = play(s, lambda t, level: y[t] + 8.0 / 2**level, 27, workers, rnd.choice)
    assert len(set(jobs)) == len(jobs) and int(np.argmin(y)) in [j.trial for j in jobs if j.level == 3]


def test_hyperband_begins_brackets_of_every_kind_again_and_again():
    jobs = play(Hyperband(LADDER), lambda t, level: (t * 17 % 101) + 10 / (level + 1), 2 * 49)
    first = {j.trial: j.level for j in reversed(jobs)}
    once = [s for n, s in [(27, 0), (12, 1), (6, 2), (4, 3)] for _ in range(n)]
    assert [first[t] for t in range(98)] == once + once
    assert [sum(j.level == k and first[j.trial] == s for j in jobs) for s in range(2) for k in range(s, 4)] == [54, 18, 6, 2, 24, 8, 2]


@pytest.mark.parametrize("name", [*SCHEDULERS])
@given(st.integers(1, 40), st.floats(0, 1), st.integers(1, 4))
@settings(max_examples=25)
def test_failures_never_climb_and_every_search_ends_with_an_arrival(name, runs, share, workers):
    rnd = random.Random(runs)
    bad = [rnd.random() < share for _ in range(runs)]
    s = SCHEDULERS[name](LADDER)
    jobs = play(s, lambda t, level: math.inf if bad[t] else t + 1 / (level + 1), runs, workers)
    climbed = {j.trial for j in jobs if any(k.trial == j.trial and k.level < j.level for k in jobs)}
    assert not any(bad[t] for t in climbed) and {j.trial for j in jobs} == set(range(runs))
    first = {j.trial: j.level for j in reversed(jobs)}
    assert all(bad) or any(not bad[j.trial] and j.level == 3 for j in jobs) or (name == "hyperband" and all(bad[t] or first[t] for t in range(runs)))
    assert s.running == 0 and s.ask(None) is None


@pytest.mark.parametrize("name", [*SCHEDULERS])
def test_nothing_is_drawn_and_nobody_else_is_disturbed(name):
    torch.manual_seed(3), np.random.seed(3), random.seed(3)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    a = play(SCHEDULERS[name](LADDER), lambda t, level: (t * 17 % 101) + 10 / (level + 1), 60, 3)
    torch.manual_seed(4), np.random.seed(4), random.seed(4)
    b = play(SCHEDULERS[name](LADDER), lambda t, level: (t * 17 % 101) + 10 / (level + 1), 60, 3)
    torch.manual_seed(3), np.random.seed(3), random.seed(3)
    play(SCHEDULERS[name](LADDER), lambda t, level: (t * 17 % 101) + 10 / (level + 1), 60, 3)
    assert a == b
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == np.random.get_state()[1].tolist() and before[2] == random.getstate()


def test_asha_serves_the_highest_level_first():
    s = ASHA(Fidelity("tokens", 1, 9))
    for t in range(9):
        s.ask(t)
    for t in range(9):
        s.tell(t, 0, t)
    assert [s.ask(9) for _ in range(3)] == [Job(0, 1), Job(1, 1), Job(2, 1)]
    assert [s.ask(t) for t in (9, 10)] == [Job(9, 0), Job(10, 0)]
    for t in (9, 10):
        s.tell(t, 0, -t)
    for t in (0, 1, 2):
        s.tell(t, 1, t)
    assert [s.ask(11) for _ in range(4)] == [Job(0, 2), Job(10, 1), Job(9, 1), Job(11, 0)]


def test_a_scheduler_takes_one_answer_for_each_job():
    s = ASHA(LADDER)
    assert s.ask("a") == Job("a", 0) and s.running == 1
    s.tell("a", 0, 1.0)
    for wrong in (("a", 0), ("b", 0), ("a", 1)):
        with pytest.raises(ValueError, match="allowed: one loss for each job"):
            s.tell(*wrong, 1.0)
    assert s.ask(None) == Job("a", 1)  # nothing else may begin: the best climbs


def test_a_single_level_is_plain_search():
    for name in SCHEDULERS:
        jobs = play(SCHEDULERS[name](Fidelity("tokens", 5, 5)), lambda t, level: t, 7)
        assert jobs == [Job(t, 0) for t in range(7)]


# ---- belief
def test_belief_is_the_chain_of_median_falls():
    seen = [dict(a=5.0, b=4.0, c=6.0, d=7.0, e=9.0), dict(a=4.0, b=2.0, d=math.inf, e=1.0), dict(b=1.5)]
    assert believed(seen, "c") == 6.0 - 2.0 - 0.5 and believed(seen, "a") == 4.0 - 0.5 and believed(seen, "b") == 1.5
    assert believed(seen, "d") == math.inf  # a failure is no slow start
    two = [dict(a=(5.0, 1.0), b=(4.0, 2.0)), dict(b=(3.0, 2.5))]
    assert believed(two, "a").tolist() == [4.0, 1.5]


# ---- stopping
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=40, unique=True), st.integers(2, 5))
def test_rule_lets_the_best_share_pass(seen, eta):
    assert sum(goes_on(y, seen, eta) for y in seen) == max(1, len(seen) // eta)
    assert goes_on(min(seen), seen, eta)
    assert not goes_on(math.nan, [*seen, math.nan], eta)


def test_rule_with_several_losses_stops_the_dominated():
    seen = [(1.0, 3.0), (3.0, 1.0), (2.0, 4.0), (4.0, 4.0), (math.inf, 0.0)]
    assert [goes_on(y, seen) for y in seen] == [True, True, False, False, False]


@pytest.mark.parametrize("maximize", [False, True])
def test_a_study_stops_at_rungs_once(maximize):
    study, sign = Study(Space(x=Real(0, 1)), "random", maximize=maximize), -1 if maximize else 1
    early, late = study.ask(), study.ask()
    early.report(1, sign * 2.0)
    assert not stops(early, LADDER)  # the first is never stopped
    late.report(1, sign * 1.0)
    assert not stops(late, LADDER)
    early.report(2, sign * 1.9)
    assert not stops(early, LADDER)  # worse than a later one at rung 1, but it has passed there
    late.report(4, sign * 1.0)
    early.report(5, sign * 1.9)
    assert stops(early, LADDER) and not stops(late, LADDER)  # both at rung 3, at the first report behind it
    assert not stops(study.ask(), LADDER)


def test_bayes_imports_nothing_above_it():
    from pathlib import Path

    text = Path(mf.__file__).read_text()
    assert "..lm" not in text and "..search" not in text and "gfopt.lm" not in text
    assert issubclass(Pruned, Exception) and list(itertools.chain(SCHEDULERS)) == ["asha", "hyperband", "sh"]
