"""The Parzen estimator: scipy as reference, loops as formulas, and what tuning throws at it (the rest is in test_conformance)."""
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import truncnorm
from searching import MIXED

from gfopt.bayes import tpe
from gfopt.bayes.tpe import (
    TPE,
    bandwidths,
    good_count,
    log_kernels,
    log_parzen,
    parzen_draw,
)
from gfopt.space import Box, Categorical, Integer, Real, Space


def told(opt, n, f, size=1):
    for _ in range(n):
        z = opt.ask(size)
        opt.tell(z, f(z))
    return opt


def bowl(z):
    return ((z - 0.3) ** 2).sum(-1)


# --- the parts -----------------------------------------------------------------------------------------------------
@given(st.integers(1, 2000))
def test_a_tenth_is_good_at_most_25(n):
    assert good_count(n) == min(math.ceil(n / 10), 25)


@pytest.mark.parametrize("centre", [-40.0, -1.5, 0.0, 0.5, 1.0, 3.0])
def test_kernels_far_outside_the_window_stay_numbers(centre):
    X, one = np.linspace(0, 1, 7)[:, None], np.ones((1, 1), bool)
    got = log_kernels(X, np.ones((7, 1), bool), np.array([[centre]]), one, np.array([0.05]), np.zeros(1, int))[:, 0]
    assert np.allclose(got, truncnorm(-centre / 0.05, (1 - centre) / 0.05, centre, 0.05).logpdf(X[:, 0]), rtol=1e-6)



@given(st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_kernels_are_the_formula_written_as_loops(seed):
    rng = np.random.default_rng(seed)
    d, c, n = rng.integers(1, 5), rng.integers(1, 4), rng.integers(1, 5)
    choices, h = rng.choice([0, 0, 2, 5], d), rng.uniform(0.02, 0.9, d)
    X, P = (np.where(choices > 0, (rng.integers(0, 99, (k, d)) % np.maximum(choices, 1) + 0.5) / np.maximum(choices, 1), rng.random((k, d))) for k in (c, n))
    on, alive = rng.random((c, d)) < 0.7, rng.random((n, d)) < 0.7
    got = log_kernels(X, on, P, alive, h, choices)
    assert got.shape == (c, n)
    for i in range(c):
        for k in range(n):
            want = 0.0
            for j in np.flatnonzero(on[i] & alive[k]):
                if choices[j]:
                    want += math.log(choices[j] * ((1 - h[j]) * (X[i, j] == P[k, j]) + h[j] / choices[j]))
                else:
                    want += truncnorm(-P[k, j] / h[j], (1 - P[k, j]) / h[j], P[k, j], h[j]).logpdf(X[i, j])
            assert got[i, k] == pytest.approx(want, abs=1e-8)


def test_a_mixture_is_a_density_whatever_the_weights():
    rng = np.random.default_rng(0)
    P, w, yes = rng.random((6, 2)), rng.uniform(0.1, 1, 6), np.ones((6, 2), bool)
    U = (np.stack(np.meshgrid(*[np.arange(300)] * 2), -1).reshape(-1, 2) + 0.5) / 300
    p = np.exp(log_parzen(log_kernels(U, np.ones(U.shape, bool), P, yes, np.array([0.05, 0.3]), np.zeros(2, int)), w))
    assert p.mean() == pytest.approx(1, abs=1e-4) and p.min() >= 1 / (1 + w.sum()) * 0.999  # the prior is everywhere


def test_an_empty_set_is_the_prior():
    assert (log_parzen(np.zeros((3, 0)), np.zeros(0)) == 0).all()


def test_draws_follow_the_density_they_are_drawn_from():
    rng = np.random.default_rng(1)
    P = np.array([[0.02, 0.5 / 3], [0.9, 2.5 / 3]])
    alive, h, choices = np.array([[True, True], [True, False]]), np.array([0.08, 0.4]), np.array([0, 3])
    draws = parzen_draw(P, alive, h, choices > 0, 200_000, rng)
    assert draws.min() >= 0 and draws.max() <= 1
    draws[:, 1] = (np.floor(3 * draws[:, 1]).clip(0, 2) + 0.5) / 3
    edges = np.linspace(0, 1, 11)
    for level in range(3):
        x = (edges[:-1, None] + (np.arange(50) + 0.5) / 500).reshape(-1)
        at = np.stack([x, np.full_like(x, (level + 0.5) / 3)], 1)
        p = np.exp(log_parzen(log_kernels(at, np.ones(at.shape, bool), P, alive, h, choices), np.ones(2)))
        want = p.reshape(10, 50).mean(1) / 30
        got = np.histogram(draws[draws[:, 1] == at[0, 1], 0], edges)[0] / len(draws)
        np.testing.assert_allclose(got, want, atol=0.003)


def test_widths_shrink_with_points_and_never_below_half_a_cell():
    levels, category = np.array([0, 5, 5]), np.array([False, False, True])
    few, many = bandwidths(1, levels, category), bandwidths(1000, levels, category)
    np.testing.assert_allclose(few, [0.1, 0.1, 0.5])
    np.testing.assert_allclose(many, [0.1 * 1000 ** (-1 / 7), 0.1, 1 / 1001])
    assert bandwidths(10**6, np.array([2]), np.array([False]))[0] == 0.25


def test_the_newest_25_weigh_one_and_the_oldest_next_to_nothing():
    w = tpe._fading(40)
    assert (w[-25:] == 1).all() and w[0] == 1 / 40 and (np.diff(w) >= 0).all()
    assert tpe._fading(0).shape == (0,) and (tpe._fading(25) == 1).all()


# --- the method ----------------------------------------------------------------------------------------------------
def test_only_the_order_of_losses_decides():
    a, b = TPE(Box(-1, 1, 3)), TPE(Box(-1, 1, 3))
    for _ in range(25):
        z = a.ask(2)
        assert torch.equal(z, b.ask(2))
        a.tell(z, bowl(z))
        b.tell(z, 1e6 + 1e3 * bowl(z).exp())


def test_pending_points_are_avoided_and_answers_are_never_repeated():
    opt = told(TPE(Box(0, 1, 2)), 40, bowl)
    eight = opt.ask(8)
    assert torch.pdist(eight).min() > 1e-4
    alone = TPE(Box(0, 1, 2))
    alone.load_state_dict(opt.state_dict())
    alone._pending.runs.clear()  # as if nothing were under way
    alone._dealt = opt._dealt
    assert not torch.equal(alone.ask(1), opt.ask(1))


def test_pending_points_count_as_bad():
    "A crowd under way on the best point: the next ask keeps away from it."
    opt = told(TPE(Box(0, 1, 1), candidates=200), 30, lambda z: (z[:, 0] - 0.3) ** 2)
    at = opt.best[0]
    near = [float((opt.propose([(0, 1000 + i)]) - at).abs()) for i in range(10)]
    stray = told(TPE(Box(0, 1, 1)), 30, lambda z: (z[:, 0] - 0.3) ** 2)
    for _ in range(4):
        stray.assume_asked(torch.full((1, 1), 0.9, dtype=torch.float64))
    assert np.median([float(stray.propose([(0, 1000 + i)])) for i in range(9)]) < 0.6  # nobody follows them there
    crowd = at + torch.linspace(-0.05, 0.05, 60, dtype=torch.float64)[:, None]
    for row in crowd:
        opt.assume_asked(row[None])
    far = [float((opt.propose([(0, 1000 + i)]) - at).abs()) for i in range(10)]
    assert np.median(far) > 2 * np.median(near)


def test_a_small_discrete_space_is_tried_completely_before_anything_is_repeated():
    space = Space(a=Categorical(["x", "y", "z"]), n=Integer(1, 3))
    opt = told(TPE(space, candidates=400), 9, lambda z: z.sum(1))
    assert len(torch.unique(torch.from_numpy(opt._told["z"]), dim=0)) == 9 and opt.ask(3).shape == (3, 2)


def test_a_name_that_is_better_is_found_and_the_others_are_not_forgotten():
    space = Space(a=Categorical(list("abcdef")), x=Real(0, 1))
    opt = told(TPE(space), 80, lambda z: [(p["a"] != "d") + (p["x"] - 0.7) ** 2 for p in space.decode(z)])
    names = [p["a"] for p in space.decode(torch.from_numpy(opt._told["z"]))[10:]]
    assert names.count("d") > 35 and len(set(names[10:])) > 1 and opt.best[1] < 1e-3


def test_a_parameter_that_does_not_exist_says_nothing():
    "beta exists for gelu only; points without it leave its density uniform."
    opt = TPE(MIXED)
    z = MIXED.encode([dict(lr=0.1, depth=3, act="gelu", beta=0.9), dict(lr=0.1, depth=3, act="relu")])
    assert opt._active(z).tolist() == [[True] * 4, [True] * 3 + [False]] and opt._active(torch.zeros(2, 4, dtype=torch.float64)).shape == (2, 4)
    X, on = np.array([[0.5, 0.5, 0.5, 0.1]]), np.ones((1, 4), bool)
    one = log_kernels(X, on, z[1:].numpy(), opt._active(z[1:]), np.full(4, 0.1), np.zeros(4, int))
    X[0, 3] = 0.9
    assert one == log_kernels(X, on, z[1:].numpy(), opt._active(z[1:]), np.full(4, 0.1), np.zeros(4, int))


def test_learns_the_right_branch_of_a_condition():
    space = Space(opt=Categorical(["adam", "sgd"]), momentum=Real(0, 1, when={"opt": ["sgd"]}))
    opt = told(TPE(space), 60, lambda z: [abs(p["momentum"] - 0.9) if "momentum" in p else 0.3 for p in space.decode(z)])
    assert space.decode(opt.best[0])[0]["momentum"] == pytest.approx(0.9, abs=0.03)


def test_open_coordinates_are_followed_and_half_open_ones_respected():
    opt = told(TPE(Box([(-math.inf, math.inf), (0, math.inf)], x0=[0, 1], sigma0=[0.5, 0.5])), 150, lambda z: (z[:, 0] - 6) ** 2 + z[:, 1])
    assert opt.best[1] < 0.3 and (opt._told["z"][:, 1] >= 0).all()


def test_failures_and_foreign_points_are_taken_in():
    opt = told(TPE(Box(0, 1, 2)), 60, lambda z: torch.where(z[:, 0] > 0.5, math.nan, bowl(z)))
    late = opt._told["z"][-30:, 0]
    assert (late > 0.5).mean() < 0.35 and opt.best[1] < 1e-2
    warm = TPE(Box(0, 1, 2))
    z = Box(0, 1, 2).uniform(30, torch.Generator().manual_seed(0))
    warm.tell(z, bowl(z))
    first = told(warm, 10, bowl)._told["z"][30:]
    assert bowl(torch.from_numpy(first)).median() < bowl(z).median() / 2  # no Sobol points after thirty foreign ones


@given(st.integers(0, 10**6))
@settings(max_examples=12, deadline=None)
def test_fuzz(seed):
    "Duplicates, constants, nan, one level, dimension one: nothing outside the space, nothing not finite."
    rng = np.random.default_rng(seed)
    space = [MIXED, Box(-3, 5, 1), Space(a=Categorical(["only"]), b=Integer(2, 2), x=Real(0.1, 9, log=True)), Space(a=Categorical([1, 2]), b=Integer(1, 4, log=True))][seed % 4]
    opt = TPE(space, seed=seed, initial=int(rng.integers(1, 8)), candidates=int(rng.integers(1, 9)))
    for _ in range(12):
        z = opt.ask(int(rng.integers(1, 4)))
        assert torch.equal(opt.space.canonical(z), z) and torch.isfinite(z).all()
        y = [[0.0, math.nan, math.inf, 1e300, -1e300, 7.0][k] for k in rng.integers(0, 6, len(z))]
        rows = rng.integers(0, len(z), len(z))  # some twice, some never
        opt.tell(z[rows], y)


@pytest.mark.parametrize("kw, name", [(dict(candidates=0), "candidates"), (dict(initial=0), "initial"), (dict(initial=1.5), "initial")])
def test_bad_settings_are_named(kw, name):
    with pytest.raises((ValueError, TypeError), match=f"{name}: .*allowed"):
        TPE(Box(0, 1, 1), **kw)
