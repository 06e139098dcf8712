"""The trust region: its rules as formulas, tickets of old regions, shapes of spaces (the rest is in test_conformance)."""
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from searching import MIXED

from gfopt.bayes.gp import GaussianProcess
from gfopt.bayes.trust_region import (
    LEAST,
    Remembering,
    TuRBO,
    sparse_moves,
    trust_box,
    trust_length,
)
from gfopt.optimizer import make_optimizer
from gfopt.space import Box, Categorical, Integer, Real, Space


def bowl(z):
    return ((z - 0.3) ** 2).sum(-1)


def told(opt, n, f, size=1):
    for _ in range(n):
        z = opt.ask(size)
        opt.tell(z, f(z))
    return opt


# --- box, size, moves ----------------------------------------------------------------------------------------------
@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=8), st.floats(0.01, 1.6), st.integers(0, 999))
@settings(max_examples=40, deadline=None)
def test_box_has_the_volume_of_a_cube_and_the_shape_of_the_scales(scales, length, seed):
    ell, d = np.array(scales), len(scales)
    c = np.random.default_rng(seed).random(d)
    a, b = trust_box(c, length, ell, np.full(d, -np.inf), np.full(d, np.inf))
    side = b - a
    assert np.prod(side) == pytest.approx(length**d, rel=1e-9)
    np.testing.assert_allclose(side / side[0], ell / ell[0], rtol=1e-6)
    np.testing.assert_allclose((a + b) / 2, c, atol=1e-9 * side.max())
    np.testing.assert_allclose(trust_box(c, length, 7 * ell, np.full(d, -np.inf), np.full(d, np.inf)), (a, b), rtol=1e-7, atol=1e-9)
    low, high = trust_box(c, length, ell, np.zeros(d), np.ones(d), 0.2)
    np.testing.assert_array_equal(low, np.maximum(np.minimum(a, c - 0.2), 0))
    np.testing.assert_array_equal(high, np.minimum(np.maximum(b, c + 0.2), 1))


def rule(losses, patience):
    "The paper's bookkeeping, one loss at a time, with its counters."
    length, won, lost, best = 0.8, 0, 0, losses[0] if losses else 0
    for i, y in enumerate(losses):
        if i == 0 or y < best - 1e-3 * abs(best):
            won, lost = won + 1, 0
        else:
            won, lost = 0, lost + 1
        best = min(best, y)
        if won == 3:
            length, won = min(2 * length, 1.6), 0
        elif lost == patience:
            length, lost = length / 2, 0
        if length < 2**-7:
            return 0.0
    return length


@given(st.lists(st.integers(-20, 20), max_size=60), st.integers(1, 6))
@settings(max_examples=200, deadline=None)
def test_length_is_the_rule_of_the_paper(losses, patience):
    assert trust_length([[y] for y in losses], patience) == rule(losses, patience)


def test_length_counts_batches_won_and_evaluations_lost():
    assert trust_length([[9], [8, 9, 9], [9, 7, 9]], 4) == 1.6
    assert trust_length([[1], [2, 2, 2]], 4) == 0.8 and trust_length([[1], [2, 2, 2], [2]], 4) == 0.4
    assert trust_length([[-1.0], [-1.0005]], 1) == 0.4 and trust_length([[-1.0], [-1.002]], 1) == 0.8
    assert trust_length([[math.inf], [math.inf], [1.0]], 3) == 0.8 and trust_length([[math.inf]] * 3, 3) == 0.4
    assert trust_length([[5], [4], [3], [2]], 9, initial=1) == 1.6 and trust_length([[5], [4], [3], [2]], 9, initial=2) == 0.8
    assert trust_length([[1.0]] * 200, 20, initial=20) == 0 and LEAST == 2**-7


@pytest.mark.parametrize("d", [1, 5, 8, 40])
def test_moves_share_coordinates_with_the_centre(d):
    c, rng = np.full(d, 0.5), np.random.default_rng(0)
    C = sparse_moves(c, c - 0.2, c + 0.3, 5000, rng)
    moved = C != 0.5
    p = min(1, 8 / d)
    assert moved.any(1).all() and moved.mean() == pytest.approx(p + (1 - p) / d, abs=0.01)
    assert C.min() >= 0.3 and C.max() <= 0.8 and C[moved].mean() == pytest.approx(0.55, abs=0.01)


# --- the table -----------------------------------------------------------------------------------------------------
def test_table_is_sorted_by_ticket_and_foreign_points_come_first():
    t = Remembering(Box([(-math.inf, math.inf), (0, 10), (2, math.inf)], x0=[5, 5, 3], sigma0=[1, 1, 0.5]), initial=1)
    z = torch.tensor([[7.0, 2.5, 2.0], [3.0, 10.0, 4.0], [5.0, 0.0, 3.0]], dtype=torch.float64)
    t.learn([(0, 7), None, (0, 2)], z, torch.tensor([1.0, 2.0, math.inf]))
    assert t._told["y"].tolist() == [2, math.inf, 1] and t._told["ticket"].tolist() == [[0, -1], [0, 2], [0, 7]]
    np.testing.assert_allclose(t._unit(z), [[1, 0.25, 0], [0, 1, 1], [0.5, 0, 0.5]])
    np.testing.assert_allclose(t._walls, [[-np.inf, 0, 0], [np.inf, 1, np.inf]])
    assert torch.equal(t._points(t._unit(z)), z)


# --- the method ----------------------------------------------------------------------------------------------------
def test_tells_in_any_order_and_portion_leave_no_trace():
    a, b = TuRBO(Box(0, 1, 2)), TuRBO(Box(0, 1, 2))
    for i in range(4):
        za, zb = a.ask(5), b.ask(5)
        assert torch.equal(za, zb)
        a.tell(za, bowl(za))
        for k in torch.randperm(5, generator=torch.Generator().manual_seed(i)).tolist():
            b.tell(zb[k], [float(bowl(zb[k]))])
    assert a.length() == b.length() and torch.equal(a.ask(2), b.ask(2))


def test_eight_workers_are_sent_to_eight_places(monkeypatch):
    opt, seen = told(TuRBO(Box(0, 1, 3)), 12, bowl), []
    real = GaussianProcess.condition
    monkeypatch.setattr(GaussianProcess, "condition", lambda gp, X, y: seen.append((len(X), np.allclose(y, gp.predict(X)[0]))) or real(gp, X, y))
    assert torch.pdist(opt.ask(8)).min() > 1e-3
    assert seen == [(k, True) for k in range(1, 8)]  # each is conditioned on all before it, at what is believed there


def test_a_batch_is_what_was_asked_with_the_same_knowledge():
    opt = TuRBO(Box(0, 1, 2), initial=1)
    told(opt, 1, bowl)
    z = opt.ask(3)
    opt.tell(z[0], [5.0])
    late = opt.ask(1)
    opt.tell(torch.cat([z[1:], late]), [5.0, 5.0, 5.0])
    assert opt._told["ticket"][:, 2].tolist() == [0, 1, 1, 1, 2]
    assert opt.length() == 0.4  # four evaluations failed: max(4, 2)
    told(opt, 3, lambda z: torch.full((1,), -float(opt._dealt)))
    assert opt.length() == 0.8


def collapse(opt, y=1.0):
    while opt.length():
        told(opt, 1, lambda z: torch.full((1,), y))
    return opt


def test_a_collapsed_region_is_followed_by_another_that_knows_nothing_of_it():
    opt = collapse(TuRBO(Box(0, 1, 2), seed=3))
    n = len(opt._told["y"])
    assert n == 4 + 7 * 4 and opt._region == 0  # seven halvings of four failures behind four Sobol points
    design = told(opt, 4, bowl)._told["z"][n:]
    assert opt._region == 1 and opt._begun == n and opt.length() == 0.8
    assert not np.isin(design, opt._told["z"][:4]).any()  # other Sobol points
    assert len(opt.region()[0]._X) == 4
    assert opt.best[1] == bowl(torch.from_numpy(design)).min()


def test_late_losses_belong_to_the_region_they_were_asked_for():
    opt = TuRBO(Box(0, 1, 2))
    late = opt.ask(2)
    collapse(opt)
    told(opt, 6, bowl)
    before, where = opt.length(), opt.region()[1]
    opt.tell(late, [-9.0, math.nan])
    assert opt.best[1] == -9 and opt.length() == before and (opt.region()[1] == where).all()
    assert (opt._told["ticket"][opt._told["y"] < -1, 0] == 0).all()


def test_foreign_points_join_the_region_and_move_its_centre_without_counting_as_attempts():
    opt = told(TuRBO(Box(0, 1, 2)), 8, bowl)
    before = opt.length()
    gold = torch.tensor([[0.31, 0.29]], dtype=torch.float64)
    opt.tell(gold, [-1.0])
    opt.tell(torch.full((5, 2), 0.9, dtype=torch.float64), [9.0] * 5)  # five bad ones are no failures of ours
    assert opt.length() == before
    np.testing.assert_allclose(opt.region()[1], [0.31, 0.29])
    collapse(opt)
    told(opt, 1, bowl)
    opt.tell(gold - 0.1, [-2.0])
    assert opt._told["ticket"][opt._told["y"] == -2, :2].tolist() == [[1, -1]]
    warm = TuRBO(Box(0, 1, 2))
    warm.tell(torch.rand(10, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64), torch.arange(10.0))
    z = warm.ask(1)
    gp, centre, low, high = warm.region()
    assert (warm._unit(z) >= low - 1e-9).all() and (warm._unit(z) <= high + 1e-9).all()  # no Sobol points after ten


def test_points_stay_in_the_box_and_the_centre_is_the_best_believed():
    opt = told(TuRBO(Box(-4, 4, 3)), 25, bowl)
    gp, centre, low, high = opt.region()
    U = opt._unit_told(slice(None))
    assert (centre == U[gp.predict(U)[0].argmin()]).all()
    for z in opt.ask(6):
        u = opt._unit(z)
        assert (u >= low - 1e-9).all() and (u <= high + 1e-9).all()


def test_recommends_under_noise_what_is_believed_not_what_was_lucky():
    rng = np.random.default_rng(0)
    opt = told(TuRBO(Box(0, 1, 2)), 20, lambda z: 5 * bowl(z) + torch.from_numpy(0.2 * rng.standard_normal(1)))
    corner = torch.full((6, 2), 0.95, dtype=torch.float64)
    opt.tell(corner, [4.3, 4.1, 4.2, 4.4, 4.0, opt.best[1] - 0.05])  # lucky once, far away
    assert bowl(opt.recommend()) < 0.2 < bowl(opt.best[0])
    with pytest.raises(RuntimeError, match="nothing to recommend"):
        TuRBO(Box(0, 1, 2)).recommend()


def test_state_continues_across_a_restart():
    a = told(TuRBO(Box(0, 1, 1), seed=5), 3, bowl)
    collapse(a)
    late = a.ask(3)
    b = TuRBO(Box(0, 1, 1))
    b.load_state_dict(a.state_dict())
    for opt in (a, b):
        opt.tell(late, bowl(late))
    assert (b._region, b._begun) == (1, a._begun) and torch.equal(a.ask(4), b.ask(4))


def test_names_and_neighbouring_integers_stay_within_reach_of_a_tiny_region():
    space = Space(n=Integer(1, 8, log=True), a=Categorical(["x", "y", "z"]), x=Real(0, 1))
    opt = TuRBO(space)
    z = torch.cat([space.encode(dict(n=1 + i % 8, a="xyz"[i % 3], x=i / 24)) for i in range(24)])
    opt.tell(z, bowl(z))
    opt.length = lambda: LEAST
    gp, centre, low, high = opt.region()
    C = space.canonical(torch.from_numpy(np.random.default_rng(0).uniform(low, high, (4000, 3))))
    home = int(space.decode(centre)[0]["n"])
    seen = {p["n"] for p in space.decode(C)}
    assert {max(home - 1, 1), home, min(home + 1, 8)} <= seen
    assert len({p["a"] for p in space.decode(opt.ask(8))}) > 1


def test_a_discrete_space_is_tried_completely_before_anything_is_repeated():
    space = Space(a=Categorical(["x", "y", "z"]), n=Integer(1, 3))
    opt = told(TuRBO(space), 9, lambda z: z.sum(1))
    assert len(np.unique(opt._told["z"], axis=0)) == 9 and opt.ask(2).shape == (2, 2)


def test_beats_random_search_in_twenty_dimensions():
    f = lambda z: ((z - torch.linspace(-1, 1, 20, dtype=torch.float64)) ** 2).sum(-1)  # noqa: E731
    got = {m: told(make_optimizer(m, Box(-5, 5, 20), 1), 60, f).best[1] for m in ("turbo", "random")}
    assert got["turbo"] < 0.7 * got["random"]


def test_more_than_a_thousand_points_are_thinned_to_the_best_and_the_newest():
    opt = TuRBO(Box(0, 1, 1))
    z = torch.linspace(0, 1, 1100, dtype=torch.float64)[:, None]
    opt.tell(z, torch.arange(1100.0).flip(0))
    opt._fitted = (opt._unit_told(slice(None))[:0].tobytes(), None)
    rows = np.ones(1100, bool)
    U = opt._unit_told(rows)
    keep = np.union1d(np.argsort(opt._told["y"], kind="stable")[:500], np.arange(1100)[-500:])
    import gfopt.bayes.trust_region as module

    class Quick(module.GaussianProcess):
        def _maximise(self, d):
            return np.zeros(d + 2)

    real, module.GaussianProcess = module.GaussianProcess, Quick
    try:
        assert (opt._belief(rows)._X == U[keep]).all()
    finally:
        module.GaussianProcess = real


@given(st.integers(0, 10**6))
@settings(max_examples=8, deadline=None)
def test_fuzz(seed):
    rng = np.random.default_rng(seed)
    space = [MIXED, Box(-3, 5, 1), Space(a=Categorical(["only"]), b=Integer(2, 2), x=Real(0.1, 9, log=True)), Space(a=Categorical([1, 2]), b=Integer(1, 4, log=True))][seed % 4]
    opt = TuRBO(space, seed=seed, initial=int(rng.integers(1, 5)))
    for _ in range(6):
        z = opt.ask(int(rng.integers(1, 4)))
        assert torch.equal(opt.space.canonical(z), z) and torch.isfinite(z).all()
        y = [[0.0, math.nan, math.inf, 1e300, -1e300, 7.0][k] for k in rng.integers(0, 6, len(z))]
        opt.tell(z[rng.integers(0, len(z), len(z))], y)


@pytest.mark.parametrize("initial", [0, -1, 1.5, True])
def test_bad_settings_are_named(initial):
    with pytest.raises((ValueError, TypeError), match="initial: .*allowed"):
        TuRBO(Box(0, 1, 1), initial=initial)
