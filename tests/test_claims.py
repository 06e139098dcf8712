"The rule that turns intervals into words, and what it is fed with."

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, ttest_1samp

from gfopt.experiments import claims

positive = st.floats(1e-6, 1e6)


# ---- effects
def test_factor_is_the_paired_geometric_mean_with_students_interval():
    a, b = np.array([1.0, 2.0, 4.0, 3.0]), np.array([3.0, 4.0, 20.0, 3.0])
    exact = ttest_1samp(np.log(b / a), 0).confidence_interval(0.95)
    assert np.allclose(claims.factor(a, b), [(3 * 2 * 5) ** 0.25, math.exp(exact.low), math.exp(exact.high)])
    assert claims.factor([2.0], [5.0]) == (pytest.approx(2.5), None, None)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(positive, positive), min_size=2, max_size=8))
def test_factor_changes_sides_with_its_arguments(pairs):
    a, b = np.array(pairs).T
    there, back = claims.factor(a, b), claims.factor(b, a)
    assert np.allclose(np.log(there), -np.log(np.array(back))[[0, 2, 1]], atol=1e-9)
    assert there[1] <= there[0] <= there[2]


@pytest.mark.parametrize("hits, n", [(0, 10), (3, 10), (20, 20), (50, 192)])
def test_wilson_agrees_with_scipy(hits, n):
    exact = binomtest(hits, n).proportion_ci(0.95, "wilson")
    assert np.allclose(claims.wilson(hits, n), [hits / n, exact.low, exact.high])


def test_resampled_is_repeatable_and_covers():
    x = np.random.default_rng(1).normal(size=200)
    assert claims.resampled(np.mean, x) == claims.resampled(np.mean, x)
    mean, low, high = claims.resampled(np.mean, x)
    assert mean == x.mean() and np.isclose(high - low, 2 * 1.96 * x.std() / 200**0.5, rtol=0.1)
    state = np.random.get_state()[1].copy()
    claims.resampled(np.mean, x)
    assert (np.random.get_state()[1] == state).all()


def test_resampled_draws_the_samples_independently():
    x = np.arange(50.0)
    assert claims.resampled(lambda a, b: (a - b).mean(), x, x)[1] < -1  # not paired


def test_censored_runs_never_help_who_did_not_arrive():
    inf = math.inf
    assert claims.median_ratio([inf, inf, 0.1], [1.0] * 3)[0] == 0
    assert claims.median_ratio([0.1] * 3, [inf] * 3) == (10, 10, 10)
    assert claims.median_ratio([0.1] * 3, [inf] * 3, cap=0.3)[0] == pytest.approx(3)
    assert claims.median_ratio([0.1, 0.2, inf], [0.4, 0.5, 0.9])[0] == pytest.approx(2.5)
    assert claims.median_ratio([0.1, 0.2, 9.0, 9.0], [1.0] * 4)[0] == 5  # the lower median, one that occurred


# ---- the rule
@pytest.mark.parametrize("told, asked, word", [
    ((2, 1.5, 3), 1, "confirmed"), ((2, 1.5, 3), 1.5, "undecided"), ((2, 1.5, 3), 3, "undecided"),
    ((2, 1.5, 3), 4, "refuted"), ((0.5, 0.4, 0.9), 1, "refuted"), ((1.2, 0.9, 1.6), 1, "undecided"),
    ((5,), 1, "one run"), ((5, None, None), 1, "one run"), ((5, 4, None), 1, "one run"),
    ((None, None, None), 1, "not measured yet"), ((0, 0, 0), 1, "refuted")])
def test_verdict(told, asked, word):
    assert claims.verdict(*told, asked=asked) == word


def test_an_equality_is_confirmed_only_where_that_is_what_was_asked():
    assert claims.verdict(1, 1, 1) == "undecided" and claims.verdict(1, 1, 1, at_least=True) == "confirmed"
    assert claims.verdict(0, 0, 0, at_least=True) == "refuted"
    assert claims.verdict(1, 0.9, 1.1, at_least=True) == "undecided"


@pytest.mark.parametrize("told", [(2, 3, 4), (5, 3, 4), (math.nan, 1, 2)])
def test_an_effect_outside_its_interval_is_an_error(told):
    with pytest.raises(ValueError, match="effect.*allowed: within its interval"):
        claims.verdict(*told)


@given(positive, positive, positive, positive)
def test_verdicts_are_antisymmetric(a, b, c, asked):
    low, mid, high = sorted((a, b, c))
    turned = {"confirmed": "refuted", "refuted": "confirmed", "undecided": "undecided"}
    assert claims.verdict(-mid, -high, -low, -asked) == turned[claims.verdict(mid, low, high, asked)]


YES, NO, OPEN, ONE, NONE = "confirmed", "refuted", "undecided", "one run", "not measured yet"


@pytest.mark.parametrize("verdicts, word", [
    ([YES, YES], YES), ([YES, NO], "confirmed under conditions"), ([YES, OPEN], "confirmed under conditions"),
    ([YES, ONE], "confirmed under conditions"), ([YES, NONE], "confirmed under conditions"),
    ([NO, NO], NO), ([NO, NONE], NO), ([NO, OPEN], OPEN), ([NO, ONE], OPEN), ([ONE], OPEN), ([OPEN, NONE], OPEN),
    ([NONE, NONE], NONE), ([], NONE)])
def test_overall(verdicts, word):
    assert claims.overall(verdicts) == claims.overall(verdicts[::-1]) == word


def test_a_finding_carries_its_verdict_and_source():
    f = claims.finding("c", "w", (2, 1.5, 3), "file", n=3, asked=1.2)
    assert f == dict(claim="c", what="w", effect=2, low=1.5, high=3, n=3, asked=1.2, source="file", verdict=YES)
    assert claims.finding("c", "w", None, "file")["verdict"] == NONE
    assert claims.finding("c", "w", (1, 1, 1), "file", at_least=True)["verdict"] == YES


# ---- unfinished records
def record(values):
    return {f"{t} | {m} | {s}": dict(regret=[99.0, v]) for (t, m, s), v in values.items()}


def test_regrets_take_the_last_mark_and_the_better_peer_of_each_task():
    rows = record({(t, m, s): v for s in range(3) for t, m, v in (
        ("a", "ours", 1.0), ("a", "p", 2.0), ("a", "q", 8.0), ("b", "ours", 4.0), ("b", "p", 50.0), ("b", "q", 2.0))})
    ours, theirs, tasks = claims.regrets(rows, "ours", ("p", "q"))
    assert np.allclose(ours, [2, 2, 2]) and np.allclose(theirs, [2, 2, 2]) and tasks == 2
    assert np.allclose(claims.regrets(rows, "ours", ("p",))[1], 10)


def test_regrets_below_the_floor_are_equal():
    rows = record({("a", "ours", 0): 0.0, ("a", "p", 0): 1e-12})
    assert np.allclose(claims.regrets(rows, "ours", ("p",))[:2], 1e-9)


def test_regrets_use_the_largest_block_that_everybody_has():
    values = {(t, m, s): 1.0 + s for t in "abc" for m in ("ours", "p") for s in range(5)}
    values |= {("d", m, s): 7.0 for m in ("ours", "p") for s in range(2)}  # a task that has only begun
    ours, _, tasks = claims.regrets(record(values), "ours", ("p",))
    assert tasks == 3 and np.allclose(ours, [1, 2, 3, 4, 5])
    values |= {("a", "ours", 5): 9.0}  # a seed that only one has reached
    assert len(claims.regrets(record(values), "ours", ("p",))[0]) == 5
    values |= {("e", m, s): 7.0 for m in ("ours", "p") for s in range(5)}
    del values["e", "p", 3]  # a seed that only one peer lacks is nobody's
    ours, theirs, tasks = claims.regrets(record(values), "ours", ("p",))
    assert tasks == 4 and len(ours) == len(theirs) == 4 and np.isclose(theirs[-1], (5.0**3 * 7) ** 0.25)
    assert claims.regrets(record(values | {("a", "q", 0): 1.0}), "ours", ("p", "q"))[2] == 1
    few = {k: v for k, v in values.items() if k[2] < 2 and k[0] != "e"}
    assert claims.regrets(record(few), "ours", ("p",))[2] == 4
    assert claims.regrets({}, "ours", ("p",))[2] == 0 and not len(claims.regrets({}, "ours", ("p",))[0])


def test_regrets_of_one_seed_count_only_where_nobody_has_two():
    one = {(t, m, 0): 1.0 for t in "abcdefgh" for m in ("ours", "p")}
    assert claims.regrets(record(one), "ours", ("p",))[2] == 8
    ours, _, tasks = claims.regrets(record(one | {("a", m, 1): 1.0 for m in ("ours", "p")}), "ours", ("p",))
    assert tasks == 1 and len(ours) == 2  # an interval needs pairs


def test_divergences_cope_with_what_is_missing():
    kl = lambda **v: dict(result={k: dict(test=x, calibration=0.0) for k, x in v.items()})
    rows = {"bits/0": kl(evolution=1.0, greedy=3.0, additive=2.0), "bits/1": kl(evolution=2.0, greedy=1.0, random=0.1),
            "bits/2": dict(error="killed"), "bits/3": kl(greedy=1.0), "bits/4": kl(evolution=1.0, random=1.0),
            "joint/0": kl(evolution=9.0, greedy=9.0), "exact/bits": dict(result=dict(found=dict(evolution=[1])))}
    a, b = claims.divergences(rows, "bits")
    assert a.tolist() == [1, 2] and b.tolist() == [2, 1]
    assert not len(claims.divergences({}, "bits")[0])
