"""Bayes: closed forms, scikit-learn, mpmath and finite differences as references; and what tuning throws at a model."""
import math

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.stats import beta
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, Matern

from gfopt.bayes import acquisition as acq
from gfopt.bayes.bayesopt import (
    BayesianOptimization,
    _bfgs,
    best_bend,
    climb,
    loss_scale,
    separated,
    standard_losses,
    yeo_johnson,
)
from gfopt.bayes.gp import (
    GaussianProcess,
    gp_posterior,
    log_marginal,
    log_prior,
    matern52,
    pair_distances,
    rbf,
    safe_cholesky,
    snap,
    squared_distance,
)
from gfopt.bayes.limits import (
    log_feasibility,
    log_hypervolume_improvement,
    not_dominated,
    open_boxes,
)
from gfopt.bayes.posterior import (
    bayes_posterior,
    gaussian_posterior,
    linear_posterior,
    linear_predictive,
    log_posterior,
)
from gfopt.experiments.bayes_peers import fuzz
from gfopt.functions import FUNCTIONS
from gfopt.search.pareto import hypervolume
from gfopt.space import Box, Categorical, Integer, Real, Space
from gfopt.study import Study

MIXED = Space(lr=Real(1e-5, 1e-1, log=True), batch=Integer(8, 256, log=True), opt=Categorical(["adam", "sgd", "lion"]),
              momentum=Real(0, 1, when={"opt": ["sgd"]}), one=Categorical(["only"]))


def central(f, x, h=1e-5):
    return np.array([(np.asarray(f(x + h * e)) - np.asarray(f(x - h * e))) / (2 * h) for e in np.eye(len(x))])


# --- Bayes' theorem ------------------------------------------------------------------------------------------------
@given(st.lists(st.tuples(st.floats(1e-3, 1e3), st.floats(0, 1e3)), min_size=1, max_size=8).filter(lambda r: any(q > 1e-3 for _, q in r)))
@settings(max_examples=50, deadline=None)
def test_posterior_is_the_formula(rows):
    p, q = np.array(rows).T
    posterior, evidence = bayes_posterior(p, q)
    p = p / p.sum()
    np.testing.assert_allclose(evidence, (p * q).sum(), rtol=1e-12)
    np.testing.assert_allclose(posterior, p * q / (p * q).sum(), rtol=1e-12, atol=np.finfo(float).tiny)  # below it there are no twelve digits


def test_posterior_survives_underflow_and_takes_any_shape():
    ll = np.array([[-1e5, -1e5 - 1], [-1e5 - 2, -np.inf]])
    posterior, evidence = bayes_posterior(torch.ones(2, 2), log_likelihood=ll)
    np.testing.assert_allclose(posterior, np.exp(ll + 1e5) / np.exp(ll + 1e5).sum(), rtol=1e-14)
    assert evidence == 0.0 and log_posterior(np.zeros((2, 2)), ll)[1] < -9e4
    posterior, _ = bayes_posterior([1e-320, 3e-320], [1e-310, 1e-310])
    np.testing.assert_allclose(posterior, [0.25, 0.75], rtol=1e-2)


@pytest.mark.parametrize("prior, likelihood", [([1, -1], [1, 1]), ([0, 0], [1, 1]), ([1, 1], [np.nan, 1]), ([1, 1], [np.inf, 1]),
                                               ([1, 1], [1, 1, 1]), ([1, 0], [0, 1]), ([], [])])
def test_posterior_refuses(prior, likelihood):
    with pytest.raises(ValueError, match="prior|likelihood"):
        bayes_posterior(prior, likelihood)


def test_posterior_wants_exactly_one_likelihood():
    for kw in ({}, dict(likelihood=[1], log_likelihood=[0])):
        with pytest.raises(TypeError, match="exactly one"):
            bayes_posterior([1], **kw)


def test_order_of_data_does_not_matter_and_beta_agrees():
    t, flips = np.linspace(0, 1, 101), [1, 0, 1, 1, 0, 1]
    one = two = np.ones(101)
    for a, b in zip(flips, flips[::-1]):
        one, two = bayes_posterior(one, t if a else 1 - t)[0], bayes_posterior(two, t if b else 1 - t)[0]
    np.testing.assert_allclose(one, two, rtol=1e-12)
    density = beta(5, 3).pdf(t)
    np.testing.assert_allclose(one, density / density.sum(), rtol=1e-12)


def test_linear_regression_equals_the_gaussian_process_it_leads_to():
    rng = np.random.default_rng(0)
    Phi, new, y, S = rng.standard_normal((6, 3)), rng.standard_normal((4, 3)), rng.standard_normal(6), np.diag([1.0, 2.0, 0.5])
    mean, variance = linear_predictive(new, *linear_posterior(Phi, y, 0.1, S))
    L = safe_cholesky(Phi @ S @ Phi.T + 0.1 * np.eye(6))[0]
    m, v = gp_posterior(L, Phi @ S @ new.T, np.diag(new @ S @ new.T), y)
    np.testing.assert_allclose([mean, variance], [m, v], rtol=1e-9)
    m, v = gaussian_posterior(0.0, 2.0, y, 0.3)
    w, C = linear_posterior(np.ones((6, 1)), y, 0.3, np.array([[2.0]]))
    np.testing.assert_allclose([m, v], [w[0], C[0, 0]], rtol=1e-12)


def test_a_measurement_pulls_a_prior_mean_by_its_precision():
    np.testing.assert_allclose(gaussian_posterior(3.0, 2.0, np.array([5.0]), 0.5), (0.4 * (3 / 2 + 5 / 0.5), 0.4), rtol=1e-14)
    np.testing.assert_allclose(gaussian_posterior(3.0, 2.0, np.array([]), 0.5), (3.0, 2.0), rtol=1e-14)


# --- Gaussian process ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name, peer", [("matern52", lambda ell: Matern(ell, nu=2.5)), ("rbf", RBF)])
@pytest.mark.parametrize("seed", range(3))
def test_posterior_and_evidence_equal_sklearn(name, peer, seed):
    rng = np.random.default_rng(seed)
    n, d = rng.integers(2, 40), rng.integers(1, 6)
    X, Xs, y, ell = rng.random((n, d)), rng.random((30, d)), rng.standard_normal(n), rng.uniform(0.2, 2, d)
    noise = rng.uniform(1e-3, 0.1, n)
    gp = GaussianProcess(name, lengthscale=ell, scale=1.7, noise=noise, standardise=False).fit(X, y)
    ref = GaussianProcessRegressor(ConstantKernel(1.7) * peer(ell), alpha=noise, optimizer=None).fit(X, y)
    mean, cov = ref.predict(Xs, return_cov=True)
    np.testing.assert_allclose(gp.predict(Xs)[0], mean, atol=1e-10)
    np.testing.assert_allclose(gp.predict(Xs)[1], np.diag(cov), atol=1e-10)  # a variance, not a deviation
    np.testing.assert_allclose(gp.predict(Xs, covariance=True)[1], cov, atol=1e-10)
    theta = np.append(np.log(ell), [np.log(1.7), 0])
    value, _ = log_marginal(theta, pair_distances(X, np.zeros(d, bool)), y, {"rbf": rbf, "matern52": matern52}[name], noise)
    assert abs(value - ref.log_marginal_likelihood_value_) < 1e-10 * max(1, abs(value))


def test_standardising_is_a_change_of_units_only():
    rng = np.random.default_rng(0)
    X, y, Xs = rng.random((12, 2)), rng.standard_normal(12), rng.random((5, 2))
    m, v = GaussianProcess().fit(X, y).predict(Xs)
    M, V = GaussianProcess().fit(X, 1e3 + 50 * y).predict(Xs)
    np.testing.assert_allclose(M, 1e3 + 50 * m, rtol=1e-6)
    np.testing.assert_allclose(V, 2500 * v, rtol=1e-3)


@pytest.mark.parametrize("kernel", [matern52, rbf])
@pytest.mark.parametrize("noise", [None, 0.1])
def test_gradient_of_the_evidence(kernel, noise):
    rng = np.random.default_rng(3)
    X, category = rng.random((15, 3)).round(1), np.array([False, True, False])
    X[4] = X[5]  # a duplicate: autograd through sqrt would be nan here
    D, y, theta = pair_distances(X, category), rng.standard_normal(15), rng.normal(-0.5, 0.3, 5)
    grad = central(lambda t: log_marginal(t, D, y, kernel, noise)[0], theta)
    np.testing.assert_allclose(log_marginal(theta, D, y, kernel, noise)[1], grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("d", [1, 10, 11, 30])
def test_gradient_of_the_prior(d):
    theta = np.random.default_rng(d).normal(0, 0.5, d + 2)
    np.testing.assert_allclose(log_prior(theta)[1], central(lambda t: log_prior(t)[0], theta), rtol=1e-5, atol=1e-8)


def test_slopes_of_the_posterior():
    rng = np.random.default_rng(1)
    X, y = rng.random((20, 4)), rng.standard_normal(20)
    gp = GaussianProcess(levels=[0, 0, 3, 0], ordered=[True, True, False, True], lengthscale=0.4, noise=0.01).fit(X, y)
    x = snap(rng.random((1, 4)), np.array([0, 0, 3, 0]))[0]
    m, v, dm, dv = gp.slopes(x)
    np.testing.assert_allclose([m, v], np.ravel(gp.predict(x)), rtol=1e-10)
    np.testing.assert_allclose(np.stack([dm, dv], 1), central(lambda x: np.ravel(gp.predict(x)), x), rtol=1e-5, atol=1e-8)
    assert dm[2] == dv[2] == 0
    at_data = gp.slopes(gp._X[0])
    assert all(np.isfinite(part).all() for part in at_data)


@pytest.mark.parametrize("mean", [None, lambda X: 3 - X.sum(1) ** 2])
def test_slopes_of_many_points_are_those_of_each(mean):
    rng = np.random.default_rng(2)
    X, Z = rng.random((15, 3)), rng.random((2, 4, 3))
    gp = GaussianProcess(lengthscale=[0.2, 0.5, 1.0], scale=1.7, noise=0.01, mean=mean).fit(X, rng.standard_normal(15) * 5)
    each = [np.array([[gp.slopes(x)[k] for x in row] for row in Z]) for k in range(4)]
    for many, single in zip(gp.slopes(Z), each, strict=True):
        np.testing.assert_allclose(many, single, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(gp.slopes(Z)[1].ravel(), gp.predict(Z.reshape(-1, 3))[1], rtol=1e-9)
    np.testing.assert_allclose(gp.slopes(Z[0, 0])[2], central(lambda x: float(gp.predict(x)[0][0]), Z[0, 0]), rtol=1e-5, atol=1e-6)


def test_categories_are_equally_far_and_integers_are_steps():
    levels, ordered = np.array([4, 3]), np.array([True, False])
    X = snap(np.array([[a, b] for a in np.linspace(0, 1, 9) for b in (0.1, 0.5, 0.9)]), levels)
    gp = GaussianProcess(levels=levels, ordered=ordered).fit(X, np.sin(9 * X[:, 0]) + (X[:, 1] > 0.6))
    inside = np.array([[0.26, 0.4], [0.49, 0.6], [0.3, 0.5]])
    assert np.ptp(gp.predict(inside)[0]) == 0
    s = squared_distance(snap(np.array([[0.1, 0.1], [0.1, 0.5], [0.1, 0.9]]), levels), X[:1], np.ones(2), ~ordered)
    assert s[1, 0] == s[2, 0] == s[0, 0] + 1


def test_edges_of_the_data():
    rng = np.random.default_rng(0)
    Xs = rng.random((9, 2))
    cases = [(rng.random((1, 2)), [3.0]), (rng.random((6, 2)), np.full(6, -2.0)), (np.zeros((5, 2)), rng.standard_normal(5)),
             (0.5 + 1e-9 * rng.random((30, 2)), rng.standard_normal(30)), (rng.random((6, 2)), np.full(6, 1e8) + 1e-9)]
    for X, y in cases:
        mean, variance = GaussianProcess().fit(X, y).predict(Xs)
        assert np.isfinite(mean).all() and np.isfinite(variance).all() and (variance >= 0).all()


def test_factor_is_more_accurate_than_an_inverse_on_a_cluster():
    X, x = 0.5 + 0.01 * np.random.default_rng(0).random((30, 2)), np.array([[0.505, 0.507]])
    K, k = (rbf(squared_distance(X, B, np.full(2, 4.0), np.zeros(2, bool)))[0] for B in (X, x))
    K = K + 1e-10 * np.eye(30)
    with mpmath.workdps(60):
        exact = float(1 - (mpmath.matrix(k).T * mpmath.lu_solve(mpmath.matrix(K), mpmath.matrix(k)))[0])
    ours = gp_posterior(safe_cholesky(K)[0], k, 1.0, np.zeros(30))[1][0]
    assert abs(ours - exact) < abs(1 - (k.T @ np.linalg.inv(K) @ k).item() - exact) and abs(ours - exact) < 1e-10


def test_jitter_rises_only_as_needed_and_is_recorded():
    assert safe_cholesky(np.eye(3))[1] == 0
    K = np.ones((4, 4)) - 1e-6 * np.diag([0, 1, 0, 0])
    L, jitter = safe_cholesky(K)
    assert math.isclose(jitter / np.mean(np.diag(K)), 1e-6, rel_tol=1e-6) or jitter > 1e-7
    with pytest.raises(ValueError, match="K must be"):
        safe_cholesky(-np.eye(2))


def test_condition_equals_a_new_fit_with_the_same_settings():
    rng = np.random.default_rng(0)
    X, y = rng.random((10, 2)), rng.standard_normal(10)
    kw = dict(lengthscale=0.3, scale=1.2, standardise=False)
    a = GaussianProcess(noise=1e-3, **kw).fit(X[:7], y[:7]).condition(X[7:], y[7:], noise=1e-3)
    b = GaussianProcess(noise=1e-3, **kw).fit(X, y)
    np.testing.assert_allclose(a.predict(X + 0.1), b.predict(X + 0.1), rtol=1e-10)


@pytest.mark.parametrize("bad", [dict(kernel="linear"), dict(noise=-1.0), dict(noise=math.inf)])
def test_gp_refuses_settings(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        GaussianProcess(**bad)


@pytest.mark.parametrize("X, y", [([[0.0]], [1, 2]), ([[0.0]], [math.nan]), ([[math.inf]], [0]), (np.zeros((0, 2)), [])])
def test_gp_refuses_data(X, y):
    with pytest.raises(ValueError, match="finite"):
        GaussianProcess().fit(X, y)


def test_length_scales_are_found():
    rng = np.random.default_rng(0)
    X = rng.random((60, 12))
    gp = GaussianProcess().fit(X, np.sin(6 * X[:, 0]) + 0.01 * rng.standard_normal(60))
    assert gp.theta[:12].argmin() == 0


# --- acquisition ---------------------------------------------------------------------------------------------------
def exact_h(u):
    with mpmath.workdps(80):
        u = mpmath.mpf(float(u))
        if u < -1e4:
            one = sum((-1) ** i * mpmath.fac2(2 * i + 1) / u ** (2 * i + 2) for i in range(12))
            return float(-u * u / 2 - mpmath.log(2 * mpmath.pi) / 2 + mpmath.log(one))
        return float(mpmath.log(mpmath.npdf(u) + u * mpmath.ncdf(u)))


def test_log_h_equals_mpmath():
    u = np.concatenate([np.linspace(-60, 8, 120) + 0.013, -(10.0 ** np.arange(1.5, 9, 0.5)), [-1, -200, -1e6, np.nextafter(-1, 0)]])
    np.testing.assert_allclose(acq.log_h(u)[0], [exact_h(v) for v in u], rtol=1e-12)


def test_log_h_slope_equals_mpmath_and_is_continuous():
    def exact(u):
        with mpmath.workdps(60):
            u = mpmath.mpf(float(u))
            return float(mpmath.ncdf(u) / (mpmath.npdf(u) + u * mpmath.ncdf(u)))
    u = np.array([-3e3, -200.5, -199.5, -50, -1.001, -0.999, 0, 3])
    np.testing.assert_allclose(acq.log_h(u)[1], [exact(v) for v in u], rtol=1e-10)


@given(st.floats(-1e3, 1e3), st.floats(0, 1e3), st.floats(-1e3, 1e3))
@settings(max_examples=60, deadline=None)
def test_acquisitions_are_finite_and_point_the_right_way(mean, sd, best):
    m, s = np.array([mean]), np.array([sd])
    for f in (acq.probability_of_improvement, acq.expected_improvement):
        value, dm, ds = f(m, s, best)
        assert np.isfinite(value).all() and value >= 0 and not dm > 0
    if sd > 1e-6:
        value, dm, ds = acq.log_expected_improvement(m, s, best)
        assert np.isfinite([value, dm, ds]).all() and dm < 0 and ds >= 0


@pytest.mark.parametrize("f", [acq.probability_of_improvement, acq.expected_improvement, acq.log_expected_improvement])
@pytest.mark.parametrize("best", [0.0, -40.0])
def test_acquisition_slopes(f, best):
    for mean, sd in np.random.default_rng(0).uniform([-1, 0.3], [1, 2], (20, 2)):
        at = lambda p: f(p[:1], p[1:], best)[0][0]
        _, dm, ds = f(np.array([mean]), np.array([sd]), best)
        np.testing.assert_allclose([dm[0], ds[0]], central(at, np.array([mean, sd]), 1e-6), rtol=2e-5, atol=1e-8)


def test_confidence_bound_is_the_formula_and_so_are_its_slopes():
    mean, sd = np.random.default_rng(1).uniform([-1, 0.3], [1, 2], (20, 2)).T
    value, dm, ds = acq.confidence_bound(mean, sd, 1.5)
    np.testing.assert_allclose(value, -(mean - 1.5 * sd), rtol=1e-12)  # minus the lower end of what is likely
    assert (dm == -1).all() and (ds == 1.5).all()


def test_thompson_is_the_minimum_of_a_joint_draw():
    gp = GaussianProcess(lengthscale=0.3, noise=1e-6).fit([[0.1], [0.9]], [0.0, 1.0])
    Xs = np.linspace(0, 1, 5)[:, None]
    assert acq.thompson(gp, Xs, np.zeros(5)) == gp.predict(Xs)[0].argmin()
    assert acq.thompson(gp, Xs, np.array([0, 0, -9.0, 0, 0])) == 2


def test_thompson_draws_with_the_covariance():
    gp = GaussianProcess(lengthscale=0.3, noise=1e-6).fit([[0.1], [0.9]], [0.0, 1.0])
    Xs, rng = np.linspace(0, 1, 7)[:, None], np.random.default_rng(2)
    mean, covariance = gp.predict(Xs, covariance=True)
    L = np.linalg.cholesky(covariance + 1e-9 * np.eye(7))
    for zeta in rng.standard_normal((40, 7)):
        draw = mean + L @ zeta
        assert draw[acq.thompson(gp, Xs, zeta)] == pytest.approx(draw.min(), abs=1e-3)


# --- the loop ------------------------------------------------------------------------------------------------------
def run(space, f, n, size=1, **kw):
    opt = BayesianOptimization(space, **kw)
    for _ in range(n):
        z = opt.ask(size)
        assert torch.equal(z, space.canonical(z)) and torch.isfinite(z).all()
        opt.tell(z, f(z))
    return opt


BRANIN = FUNCTIONS["branin"]


@pytest.mark.parametrize("seed", [0, 1])
def test_branin_is_solved(seed):
    assert run(Box(0, 1, 2), BRANIN.f, 35, seed=seed, initial=10).best[1] - BRANIN.minimum < 0.01


def test_ten_percent_failures_cost_little():
    rng = np.random.default_rng(0)
    f = lambda z: torch.where(torch.tensor(rng.random(len(z)) < 0.1), math.nan, ((z - 0.37) ** 2).sum(1))
    opt = run(Box(0, 1, 3), f, 35)
    assert opt.best[1] < 0.01 and np.isinf(opt._y).any()


def test_failures_by_chance_are_accidents_and_no_walls():
    bowl = lambda z: ((z - 0.37) ** 2).sum(1)
    for seed in range(3):
        rng = np.random.default_rng(seed)
        opt = run(Box(0, 1, 3), lambda z, rng=rng: torch.where(torch.tensor(rng.random(len(z)) < 0.1), math.nan, bowl(z)), 35, seed=seed)
        assert opt.best[1] < 1e-5 and np.isinf(opt._y).any()  # with the worst loss in its place: 1e-3, 8e-6, 5e-8


def test_failures_have_a_process_of_their_own():
    opt = run(Box(0, 1, 2), lambda z: torch.where(z[:, 0] > 0.6, math.nan, ((z - 0.3) ** 2).sum(1)), 18)
    failed = np.isinf(opt._y[:, 0])
    (losses, _), (failures, _) = opt._posterior()
    assert opt._limits == 1 and failed.any()
    np.testing.assert_array_equal(failures._t, np.where(failed, 3.0, -1.0))
    np.testing.assert_allclose(np.sort(losses._t[: (~failed).sum()]), np.sort(standard_losses(opt._y[~failed, 0])), rtol=1e-12)
    assert (losses.predict(opt._z[failed])[1] < 1e-6).all()  # nothing is to be had there
    wall = failures.predict(np.array([[0.3, 0.3], [0.95, 0.5]]))[0]
    assert wall[0] < -0.5 < 0.5 < wall[1]


def test_failures_beside_several_losses_limits_and_costs():
    def f(z):
        return torch.where((z[:, :1] > 0.7), math.nan, torch.stack([(z**2).sum(1), ((z - 1) ** 2).sum(1)], 1))

    opt = BayesianOptimization(Box(0, 1, 2), seed=1)
    for _ in range(14):
        z = opt.ask(1)
        opt.tell(z, f(z), violations=(z[:, 1:] - 0.9), cost=[1.0 + float(z[0, 0])])
    assert opt._limits == 2 and len(opt._posterior()) == 5 and torch.isfinite(opt.ask(3)).all()


def test_a_region_of_failures_is_left():
    f = lambda z: torch.where(z[:, 0] > 0.4, math.inf, ((z - 0.3) ** 2).sum(1))
    opt = run(Box(0, 1, 2), f, 25)
    assert opt.best[1] < 1e-3 and np.isinf(opt._y[-10:]).mean() <= 0.5


def test_eight_workers_get_eight_places_even_when_it_is_solved():
    for space in (Box(0, 1, 2), Box(0, 1, 6)):
        opt = run(space, lambda z: ((z - 0.5) ** 2).sum(1), 20)
        z = opt.ask(8)
        assert torch.cdist(z, z, p=math.inf)[torch.triu_indices(8, 8, 1).unbind()].min() >= 0.01


def test_small_discrete_space_is_tried_out_and_then_still_answers():
    space = Space(a=Categorical(["x", "y", "z"]), b=Integer(1, 4), c=Categorical(["one"]))
    opt = run(space, lambda z: z.sum(1), 12)
    assert len(np.unique(opt._z, axis=0)) == 12
    assert opt.ask(3).shape == (3, 3)


def test_unbounded_and_half_bounded_boxes_are_left_behind_their_start():
    f = lambda z: ((z - 7) ** 2).sum(1)
    assert run(Box(-math.inf, math.inf, 2, x0=0.0, sigma0=0.5), f, 30).best[1] < 0.1
    half = Box([0.0, -math.inf], [math.inf, 0.0], x0=[1.0, -1.0], sigma0=[1.0, 1.0])
    opt = run(half, lambda z: (z[:, 0] - 5) ** 2 + (z[:, 1]) ** 2, 25)
    assert opt.best[1] < 0.1


def test_float32_space():
    opt = run(Box(0, 1, 2, dtype=torch.float32), BRANIN.f, 14)
    assert opt.ask(1).dtype == torch.float32 and opt.recommend().dtype == torch.float32


def test_saved_after_the_refit_schedule_begins_continues_bit_equal():
    space, f = Box(0, 1, 3), lambda z: ((z - 0.3) ** 2).sum(1)
    a, b = (BayesianOptimization(space, seed=5) for _ in range(2))
    z = space.uniform(70, torch.Generator().manual_seed(0))
    a.tell(z, f(z))
    for _ in range(3):
        z = a.ask(1)
        a.tell(z, f(z))
    b.load_state_dict(a.state_dict())
    assert torch.equal(a.ask(2), b.ask(2))


def test_tells_of_a_batch_may_come_in_any_order():
    a, b = (run(Box(0, 1, 2), BRANIN.f, 10, seed=2) for _ in range(2))
    z = a.ask(4)
    assert torch.equal(z, b.ask(4))
    a.tell(z, BRANIN.f(z))
    for i in (2, 0, 3, 1):
        b.tell(z[i], BRANIN.f(z[i : i + 1]))
    assert torch.equal(a.ask(2), b.ask(2))


def test_foreign_points_are_learned():
    a, b = BayesianOptimization(Box(0, 1, 2), seed=1), BayesianOptimization(Box(0, 1, 2), seed=1)
    z = torch.rand(12, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    a.tell(z, BRANIN.f(z))
    assert not torch.equal(a.ask(1), b.ask(1))


def test_mixed_space_and_constant_and_negative_seed():
    def f(z):
        return [(math.log10(p["lr"]) + 3) ** 2 + (p["opt"] != "sgd") + (p.get("momentum", 0) - 0.9) ** 2 for p in MIXED.decode(z)]
    assert run(MIXED, f, 24, seed=-3).best[1] < 0.1
    run(MIXED, lambda z: torch.ones(len(z)), 12)


def test_recommends_the_believed_point_under_noise():
    g = torch.Generator().manual_seed(0)
    f = lambda z: ((z - 0.5) ** 2).sum(1) + 0.03 * torch.randn(len(z), generator=g, dtype=torch.float64)
    opt = run(Box(0, 1, 1), f, 30)
    assert (opt.recommend() - 0.5).abs() < 0.25 and opt.recommend().shape == (1,)


@pytest.mark.parametrize("seed", range(4))
def test_fuzzed_asks_and_tells(seed):
    rng = np.random.default_rng(seed)
    space = [Box(-3, 5, 2), MIXED, Space(a=Integer(1, 3), b=Categorical("x y".split())), Box(-math.inf, math.inf, 1, x0=0, sigma0=1)][seed]
    opt, out = BayesianOptimization(space, seed=seed, initial=3), []
    for _ in range(16):
        if rng.random() < 0.6 or not out:
            out += list(opt.ask(int(rng.integers(1, 4))))
        else:
            i = int(rng.integers(len(out)))
            z = out.pop(i) if rng.random() < 0.8 else out[i]
            opt.tell(z, [rng.choice([0.0, 1.0, math.nan, math.inf, 1e300, -1e300, 1e-300, rng.normal()])])
    Z = torch.stack(out)
    assert torch.isfinite(Z).all() and torch.equal(Z, space.canonical(Z))


@pytest.mark.parametrize("bad", [dict(initial=0), dict(kernel="cubic"), dict(seed="a")])
def test_refuses_settings(bad):
    with pytest.raises((ValueError, TypeError), match=next(iter(bad))):
        BayesianOptimization(Box(0, 1, 2), **bad)


# --- losses --------------------------------------------------------------------------------------------------------
@given(st.lists(st.one_of(st.floats(allow_nan=True, allow_infinity=True), st.sampled_from([1.0, 2.0])), min_size=1, max_size=20))
@settings(max_examples=60, deadline=None)
def test_standard_losses_are_finite_monotone_and_standard(y):
    y = np.array(y)
    for warp in (True, False):
        t = standard_losses(y, warp)
        assert np.isfinite(t).all()
        ok = np.isfinite(y)
        order = np.argsort(y[ok], kind="stable")
        assert (np.diff(t[ok][order]) >= -1e-9).all()
        assert (t == 0).all() or (abs(t.mean()) < 1e-6 and abs(t.std() - 1) < 1e-6)
        if ok.any():
            assert (t[~ok] >= t[ok].max() - 1e-12).all()


def test_yeo_johnson_equals_scipy():
    from scipy.stats import yeojohnson
    t = np.random.default_rng(0).standard_normal(30) * 3
    for lam in (-2.0, 0.0, 0.7, 2.0, 3.5):
        np.testing.assert_allclose(yeo_johnson(t, lam), yeojohnson(t, lam), rtol=1e-10)


def test_separated_starts():
    X = np.random.default_rng(0).random((200, 2))
    distance = lambda A, B: ((A[:, None] - B) ** 2).sum(-1)
    chosen = separated(X, X[:, 0], distance, count=4, least=0.04)
    assert chosen[0] == X[:, 0].argmax() and len(chosen) == 4
    assert distance(X[chosen], X[chosen])[np.triu_indices(4, 1)].min() > 0.04


@pytest.mark.parametrize("seed", range(4))
def test_climb_ends_where_lbfgsb_does_and_holds_what_may_not_move(seed):
    rng = np.random.default_rng(seed)
    A, c, X = rng.normal(size=(5, 5)), rng.uniform(-0.3, 1.3, 5), rng.random((3, 5))
    A = A @ A.T + 0.3 * np.eye(5)
    f = lambda X: (-((X - c) @ A * (X - c)).sum(1), -2 * (X - c) @ A)
    free = np.ones((3, 5), bool)
    free[1, seed] = False
    top, value = climb(f, X, np.zeros(5), np.ones(5), free, np.full(5, 0.5), rounds=30)
    assert (top >= 0).all() and (top <= 1).all() and top[1, seed] == X[1, seed]
    np.testing.assert_allclose(value, f(top)[0], rtol=1e-12)
    best = minimize(lambda x: (-f(x[None])[0][0], -f(x[None])[1][0]), X[0], jac=True, bounds=[(0, 1)] * 5, options=dict(ftol=1e-15))
    assert value.max() == pytest.approx(-best.fun, abs=2e-3) and (value >= f(X)[0]).all()


def test_climb_learns_the_curvature():
    rng = np.random.default_rng(0)
    A, s, c = rng.normal(size=(3, 4, 4)), rng.normal(size=(3, 4)), rng.normal(size=(3, 4))
    c *= np.sign((s * c).sum(1))[:, None]
    H = _bfgs(A @ A.transpose(0, 2, 1), s, c, (s * c).sum(1))
    np.testing.assert_allclose((H @ c[..., None])[..., 0], s, atol=1e-9)     # the secant equation
    np.testing.assert_allclose(H, H.transpose(0, 2, 1), atol=1e-9)
    assert (np.linalg.eigvalsh(H) > 0).all()


def test_climb_never_goes_down_on_a_needle():
    c, X = np.array([0.3, 0.7]), np.random.default_rng(0).random((6, 2))
    f = lambda X: (-np.log1p(1e4 * ((X - c) ** 2).sum(1)), -2e4 * (X - c) / (1 + 1e4 * ((X - c) ** 2).sum(1, keepdims=True)))
    before = f(X)[0]
    for rounds in range(1, 15):
        top, value = climb(f, X, np.zeros(2), np.ones(2), np.ones((6, 2), bool), np.ones(2), rounds)
        np.testing.assert_allclose(value, f(top)[0], rtol=1e-12)
        assert (value >= before).all()
        before = value
    assert (before > f(X)[0] + 1).all()


@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0])
def test_the_bend_is_the_likeliest_and_never_presses_good_losses_together(lam):
    from scipy.stats import yeojohnson_llf
    rng = np.random.default_rng(int(10 * lam))
    t = rng.standard_normal(40)
    t = np.exp(2 * (1 - lam) * t) if lam < 1 else -np.exp(t)  # the last has its tail on the good side
    t = (t - t.mean()) / t.std()
    lams = np.linspace(0, 1, 21)
    assert best_bend(t) == lams[np.argmax([yeojohnson_llf(v, t) for v in lams])] <= 1


def test_slope_of_the_loss_scale():
    y = np.array([2.3, 2.1, np.inf, 2.2, 1000.0, 2.15, 14.0])
    standard, v = loss_scale(y), np.array([1.0, 2.12, 2.5, 6.0])
    np.testing.assert_allclose(standard(v)[1], (standard(v + 1e-6)[0] - standard(v - 1e-6)[0]) / 2e-6, rtol=1e-5)
    np.testing.assert_array_equal(standard(y)[0], standard_losses(y))


# --- noise, a prior mean, what is still out ------------------------------------------------------------------------
def test_known_noise_of_some_losses_and_fitted_noise_of_the_rest():
    rng = np.random.default_rng(3)
    X, y, theta = rng.random((15, 3)), rng.standard_normal(15), rng.normal(-0.5, 0.3, 5)
    D, known = pair_distances(X, np.zeros(3, bool)), np.where(np.arange(15) < 6, np.nan, rng.random(15))
    grad = central(lambda t: log_marginal(t, D, y, matern52, known)[0], theta)
    np.testing.assert_allclose(log_marginal(theta, D, y, matern52, known)[1], grad, rtol=1e-5, atol=1e-7)
    filled = np.where(np.isnan(known), np.exp(theta[-1]), known)
    assert math.isclose(log_marginal(theta, D, y, matern52, known)[0], log_marginal(theta, D, y, matern52, filled)[0], rel_tol=1e-12)


def test_noise_told_to_a_study_reaches_the_process_as_a_variance(tmp_path):
    def belief(noise, journal=None):
        with Study([(0, 1)], "bo", initial=3, journal=journal) as study:
            for value in (1.0, 2.0, 3.0, 1.5):
                study.tell(study.ask(), value, noise=noise)
            return study.optimizer._posterior()[0][0], study.optimizer.ask(1)
    y, (gp, z) = np.array([1.0, 2.0, 3.0, 1.5]), belief(0.04, tmp_path / "a.jsonl")
    np.testing.assert_allclose(np.sort(gp._noise), np.sort(0.04 * loss_scale(y)(y)[1] ** 2), rtol=1e-10)
    assert gp._noise.min() > 5 * belief(None)[0]._noise.max()
    again = Study([(0, 1)], "bo", initial=3, journal=tmp_path / "a.jsonl")
    assert torch.equal(again.optimizer.ask(1), z)


def test_condition_grows_the_factor():
    rng = np.random.default_rng(0)
    X, y = rng.random((12, 2)), rng.standard_normal(12)
    kw = dict(lengthscale=0.3, noise=1e-3, standardise=False, mean=lambda X: X.sum(1))
    a, b = GaussianProcess(**kw).fit(X[:7], y[:7]).condition(X[7:], y[7:], noise=1e-3), GaussianProcess(**kw).fit(X, y)
    np.testing.assert_allclose(a._L, b._L, atol=1e-12)
    np.testing.assert_allclose(a.predict(X + 0.1), b.predict(X + 0.1), rtol=1e-9)


def test_a_prior_mean_is_where_the_posterior_returns_to():
    gp = GaussianProcess(lengthscale=0.1, mean=lambda X: 5 + X[:, 0], standardise=False).fit([[0.5]], [0.0])
    np.testing.assert_allclose(gp.predict([[9.0], [0.5]])[0], [14, 0], atol=1e-6)
    with pytest.raises(ValueError, match="mean"):
        GaussianProcess(mean=lambda X: np.full(len(X), np.nan)).fit([[0.5]], [0.0])


def test_a_law_leads_the_first_question_and_the_losses_correct_it():
    space = Space(lr=Real(1e-5, 1e-1, log=True), n=Integer(1, 9))
    law = lambda rows: [(math.log10(p["lr"]) + 3) ** 2 + (p["n"] - 5) ** 2 for p in rows]
    opt = BayesianOptimization(space, mean=law)
    p = space.decode(opt.ask(1))[0]
    assert abs(math.log10(p["lr"]) + 3) < 0.5 and p["n"] == 5
    z = opt.ask(8)
    assert len({tuple(r) for r in z.tolist()}) == 8
    true = lambda rows: [(math.log10(p["lr"]) + 2.5) ** 2 + 0.1 * (p["n"] - 4) ** 2 + 7 for p in rows]
    wrong = run(space, lambda z: true(space.decode(z)), 15, mean=law)
    assert wrong.best[1] < 7.05
    box = BayesianOptimization(Box(-1, 1, 2), mean=lambda x: (x**2).sum(1))
    assert (box.ask(1) ** 2).sum() < 0.2
    with pytest.raises(TypeError, match="mean"):
        BayesianOptimization(space, mean=3)


def test_two_points_without_a_parameter_are_no_distance_apart_along_it():
    space = Space(opt=Categorical(["adam", "sgd"]), momentum=Real(0, 1, when={"opt": ["sgd"]}), k=Integer(1, 5, when={"opt": ["adam"]}))
    z = space.canonical(torch.rand(200, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    adam = z[:, 0] < 0.5
    assert (z[adam, 1] == 0.5).all() and (z[~adam, 2] == 0.5).all()
    assert torch.equal(space.active(z)[:, 1], ~adam) and torch.equal(space.active(z)[:, 2], adam)
    opt = BayesianOptimization(space, initial=3)
    for _ in range(10):
        z = opt.ask(1)
        assert torch.equal(z, space.canonical(z))
        opt.tell(z, [p.get("momentum", 0.3) for p in space.decode(z)])


# --- limits, costs, fronts -----------------------------------------------------------------------------------------
def test_feasibility_equals_mpmath_and_its_slopes_differences():
    mean, sd = np.array([[-3.0, 0.5, 40.0, 2e4]]), np.array([[1.0, 2.0, 1.0, 1.0]])
    with mpmath.workdps(400):
        exact = [float(mpmath.log(mpmath.erfc(mpmath.mpf(m) / s / mpmath.sqrt(2)) / 2)) for m, s in zip(mean[0, :3], sd[0, :3])]
    value, dm, ds = log_feasibility(mean, sd)
    np.testing.assert_allclose(value[:3], exact, rtol=1e-12)
    h = 1e-6
    np.testing.assert_allclose(dm[0, :3], ((log_feasibility(mean + h, sd)[0] - log_feasibility(mean - h, sd)[0]) / 2 / h)[:3], rtol=1e-5)
    np.testing.assert_allclose(ds[0, :3], ((log_feasibility(mean, sd + h)[0] - log_feasibility(mean, sd - h)[0]) / 2 / h)[:3], rtol=1e-5)
    assert np.isfinite([value, dm[0], ds[0]]).all()


@pytest.mark.parametrize("m", [1, 2, 3])
def test_hypervolume_improvement(m):
    rng = np.random.default_rng(m)
    F, reference = rng.random((6, m)), np.ones(m)
    F = F[not_dominated(F)]
    low, high = open_boxes(F, reference)
    mean, sd = rng.random((m, 20)), rng.uniform(0.05, 0.3, (m, 20))
    sharp = np.exp(log_hypervolume_improvement(mean, np.full((m, 20), 1e-9), low, high)[0])
    added = [hypervolume(np.vstack([F, y]), reference) - hypervolume(F, reference) for y in mean.T]
    np.testing.assert_allclose(sharp, added, atol=1e-8)
    value, dm, ds = log_hypervolume_improvement(mean, sd, low, high)
    for j in range(m):
        step = 1e-6 * (np.arange(m) == j)[:, None]
        at = lambda a, b: log_hypervolume_improvement(mean + a, sd + b, low, high)[0]
        np.testing.assert_allclose(dm[j], (at(step, 0) - at(-step, 0)) / 2e-6, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(ds[j], (at(0, step) - at(0, -step)) / 2e-6, rtol=1e-5, atol=1e-7)
    if m == 1:
        np.testing.assert_allclose(value, acq.log_expected_improvement(mean[0], sd[0], F.min())[0], rtol=1e-12)


def test_the_best_allowed_point_is_on_the_limit():
    def told(z):
        return dict(value=((z - 0.5) ** 2).sum().item(), violations=[z.sum().item() - 0.9, -1.0])
    study = Study([(0, 1), (0, 1)], "bo", seed=1)
    study.optimize(lambda x: told(x), 25, progress=False)
    assert study.best.excess == 0 and study.best.value < 0.0058  # exact 0.005
    assert study.optimizer.best[1] == study.best.value and study.optimizer._limits == 2
    assert sum(t.excess > 0 for t in study.trials[10:]) <= 9


def test_nothing_allowed_yet_looks_for_what_is():
    opt = BayesianOptimization(Box(0, 1, 2), seed=0)
    for _ in range(14):
        z = opt.ask(1)
        opt.tell(z, z.sum(1), violations=0.15 - z.prod(1).sqrt() + 0.7)  # allowed in the far corner only
    assert opt.best[0] is not None


def test_cost_makes_the_search_cheaper():
    price = lambda z: 10 ** (2 * z[:, 0])
    spent = []
    for told in (False, True):
        opt, total = BayesianOptimization(Box(0, 1, 2), seed=2), 0
        for _ in range(18):
            z = opt.ask(1)
            total += price(z).item()
            opt.tell(z, (z[:, 1] - 0.3) ** 2 + 0.02 * z[:, 0], cost=price(z) if told else None)
        spent.append(total)
    assert spent[1] < spent[0]


def test_two_losses_make_a_front_and_equal_points_whatever_the_order_of_telling():
    f = lambda z: torch.stack([z[:, 0], (1 + z[:, 1]) * (1 - z[:, 0].sqrt())], 1)
    a, b = BayesianOptimization(Box(0, 1, 2), seed=1), BayesianOptimization(Box(0, 1, 2), seed=1)
    for _ in range(8):
        z = a.ask(2)
        assert torch.equal(z, b.ask(2))
        a.tell(z, f(z))
        for i in (1, 0):
            b.tell(z[i], f(z[i : i + 1]))
    z, y = a.front
    assert torch.equal(y, b.front[1]) and (y[:, 0].diff() > 0).all() and (y[:, 1].diff() < 0).all()
    points = BayesianOptimization(Box(0, 1, 2), seed=9).space.uniform(16, torch.Generator().manual_seed(0))
    assert hypervolume(y, [1.1, 2.1]) > hypervolume(f(points), [1.1, 2.1])
    a.tell(a.ask(1), [math.nan])
    with pytest.raises(ValueError, match="3 losses"):
        a.tell(a.ask(1), [[1.0, 2.0, 3.0]])


def test_a_study_with_several_losses_resumes_with_equal_points(tmp_path):
    def f(p):
        return (p["a"], (1 - p["a"]) ** 2 + p["b"])
    space = Space(a=Real(0, 1), b=Real(0, 1))
    with Study(space, "bo", journal=tmp_path / "j") as study:
        result = study.optimize(f, 12, progress=False)
        z = study.ask().z
    assert len(result.front.x) >= 2
    with Study(space, "bo", journal=tmp_path / "j") as again:
        assert torch.equal(again.ask().z, z)


def test_explain_speaks_in_units_of_the_loss():
    f = lambda z: 100 + 50 * ((z - 0.3) ** 2).sum(1)
    opt = run(Box(0, 1, 2), f, 20)
    told = opt.explain(opt.best[0])
    assert abs(told["mean"] - opt.best[1]) < 0.1 and told["interval"][0] <= told["mean"] <= told["interval"][1]
    assert told["sd"] >= 0 and set(told["length_scales"]) == {"x0", "x1"} and math.isfinite(told["acquisition"])
    assert BayesianOptimization(Box(0, 1, 2)).explain(torch.zeros(2)) == {}
    assert opt.explain(torch.tensor([1.0, 1.0]))["mean"] > told["mean"]


# --- what tuning throws at it --------------------------------------------------------------------------------------
def test_maximising_the_negative_asks_identical_points():
    f = lambda x: float(((x - 0.3) ** 2).sum())
    a, b = Study([(0, 1)] * 2, "bo", maximize=False), Study([(0, 1)] * 2, "bo", maximize=True)
    a.optimize(f, 14, progress=False)
    b.optimize(lambda x: -f(x), 14, progress=False)
    assert all(torch.equal(s.z, t.z) for s, t in zip(a.trials, b.trials, strict=True))


def test_constant_losses_duplicates_and_one_level_are_survived():
    space = Space(a=Real(0, 1), one=Categorical(["only"]), k=Integer(3, 3))
    opt = run(space, lambda z: torch.ones(len(z)), 9, initial=2)
    z = opt.ask(1)
    for _ in range(4):
        opt.tell(z, [1.0 + 0.1 * _])
    assert torch.isfinite(opt.ask(2)).all()


def test_two_thousand_absurd_answers(monkeypatch):
    monkeypatch.setattr(BayesianOptimization, "scattered", 16)
    assert fuzz(2000) >= 2000


def test_negative_noise_and_cost_are_refused_and_nothing_is_lost():
    opt = BayesianOptimization(Box(0, 1, 2))
    z = opt.ask(1)
    for name in ("noise", "cost"):
        with pytest.raises(ValueError, match=name):
            opt.tell(z, [1.0], **{name: [-1.0]})
    opt.tell(z, [1.0])
    assert opt.best[1] == 1.0 and len(opt.pending_z) == 0
