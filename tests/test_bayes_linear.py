"""Bayesian linear regression: grids, sampling, scikit-learn, scipy and the Gaussian process as references."""
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.stats import beta, betabinom, invgamma, multivariate_normal, multivariate_t
from sklearn.linear_model import BayesianRidge

from gfopt.bayes.gp import log_marginal, pair_distances, rbf
from gfopt.bayes.linear import (
    beta_posterior,
    linear_evidence,
    student_posterior,
    student_predictive,
)
from gfopt.bayes.posterior import linear_posterior, linear_predictive

counts, shapes = st.integers(0, 40), st.floats(0.2, 20)


def problem(seed, n=None, p=None):
    rng = np.random.default_rng(seed)
    n, p = n or int(rng.integers(1, 9)), p or int(rng.integers(1, 5))
    A = rng.standard_normal((p, p))
    return rng, rng.standard_normal((n, p)), rng.standard_normal(n), A @ A.T + 0.1 * np.eye(p)


# --- rates ---------------------------------------------------------------------------------------------------------
@given(counts, counts, shapes, shapes)
@settings(max_examples=40, deadline=None)
def test_rate_is_the_beta_distribution_and_its_evidence_the_beta_binomial(k, m, a, b):
    a1, b1, evidence = beta_posterior(k, m, a, b)
    assert (a1, b1) == (a + k, b + m)
    orders = math.lgamma(k + m + 1) - math.lgamma(k + 1) - math.lgamma(m + 1)  # of this sequence among all with k
    assert evidence == pytest.approx(betabinom(k + m, a, b).logpmf(k) - orders, rel=1e-8, abs=1e-8)


@given(counts, counts, counts, counts)
@settings(max_examples=30, deadline=None)
def test_rates_in_two_portions_are_rates_in_one(k, m, k2, m2):
    first, whole = beta_posterior(k, m), beta_posterior(k + k2, m + m2)
    second = beta_posterior(k2, m2, *first[:2])
    assert second[:2] == whole[:2] and first[2] + second[2] == pytest.approx(whole[2], abs=1e-9)


def test_rate_against_an_integral():
    value = quad(lambda t: beta(2, 3).pdf(t) * t**4 * (1 - t) ** 2, 0, 1)[0]
    assert beta_posterior(4, 2, 2, 3)[2] == pytest.approx(math.log(value), rel=1e-10)


@pytest.mark.parametrize("name, args", [("successes", (-1, 0)), ("failures", (0, math.nan)), ("failures", (0, math.inf)),
                                        ("a", (1, 1, 0.0)), ("b", (1, 1, 1, -2))])
def test_rates_refuse_by_name(name, args):
    with pytest.raises(ValueError, match=f"^{name}: .*allowed"):
        beta_posterior(*args)


# --- evidence with known noise -------------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", range(12))
def test_evidence_is_the_density_of_the_data(seed):
    rng, Phi, y, S = problem(seed)
    noise = rng.uniform(0.05, 2)
    literal = multivariate_normal(np.zeros(len(y)), Phi @ S @ Phi.T + noise * np.eye(len(y))).logpdf(y)
    assert linear_evidence(Phi, y, noise, S) == pytest.approx(literal, rel=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_evidence_is_the_score_of_one_step_forecasts(seed):
    _, Phi, y, S = problem(seed, n=6)
    score = 0.0
    for i in range(6):
        mean, v = linear_predictive(Phi[i : i + 1], *linear_posterior(Phi[:i], y[:i], 0.2, S))
        score += -((y[i] - mean[0]) ** 2 / (v[0] + 0.2) + math.log(2 * math.pi * (v[0] + 0.2))) / 2
    assert linear_evidence(Phi, y, 0.2, S) == pytest.approx(score, rel=1e-10)


def test_evidence_equals_scikit_learns_at_its_maximum():
    rng, Phi, _, _ = problem(3, n=30, p=4)
    y = Phi @ [1.0, -1.0, 0.0, 2.0] + 0.4 * rng.standard_normal(30)
    peer = BayesianRidge(fit_intercept=False, compute_score=True, tol=1e-10, alpha_1=0, alpha_2=0, lambda_1=0, lambda_2=0).fit(Phi, y)
    assert linear_evidence(Phi, y, 1 / peer.alpha_, np.eye(4) / peer.lambda_) == pytest.approx(peer.scores_[-1], rel=1e-9)


def test_features_of_a_kernel_give_the_evidence_of_its_gaussian_process():
    "A square root of the kernel matrix is a table of features."
    rng = np.random.default_rng(0)
    X, y = rng.random((8, 2)), rng.standard_normal(8)
    D = pair_distances(X, np.zeros(2, bool))
    theta = np.log([0.4, 0.7, 1.3, 0.05])
    K = np.full((8, 8), 1.3)
    K[np.tril_indices(8, -1)] = 1.3 * rbf(D @ np.exp(-2 * theta[:2]))[0]
    K = np.tril(K) + np.tril(K, -1).T
    w, V = np.linalg.eigh(K)
    Phi = V * np.sqrt(np.maximum(w, 0))
    assert linear_evidence(Phi, y, 0.05, np.eye(8)) == pytest.approx(log_marginal(theta, D, y, rbf)[0], rel=1e-9)


# --- unknown noise -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", range(8))
def test_unknown_noise_gives_the_multivariate_t(seed):
    rng, Phi, y, S = problem(seed)
    a, b = rng.uniform(0.5, 5, 2)
    m, C, a1, b1, evidence = student_posterior(Phi, y, S, a, b)
    K = np.eye(len(y)) + Phi @ S @ Phi.T
    assert evidence == pytest.approx(multivariate_t(np.zeros(len(y)), b / a * K, df=2 * a).logpdf(y), rel=1e-9)
    assert a1 == a + len(y) / 2 and b1 == pytest.approx(b + y @ np.linalg.solve(K, y) / 2, rel=1e-9)
    np.testing.assert_allclose(C, np.linalg.inv(np.linalg.inv(S) + Phi.T @ Phi), rtol=1e-7, atol=1e-10)
    np.testing.assert_allclose(m, C @ Phi.T @ y, rtol=1e-7, atol=1e-10)


def test_unknown_noise_in_two_portions():
    "Yesterday's posterior is today's prior; a prior mean that is not zero is subtracted first."
    _, Phi, y, S = problem(5, n=8, p=3)
    m, C, a, b, whole = student_posterior(Phi, y, S, 1.5, 0.7)
    m1, C1, a1, b1, first = student_posterior(Phi[:3], y[:3], S, 1.5, 0.7)
    m2, C2, a2, b2, second = student_posterior(Phi[3:], y[3:] - Phi[3:] @ m1, C1, a1, b1)
    np.testing.assert_allclose(m1 + m2, m, rtol=1e-9)
    np.testing.assert_allclose(C2, C, rtol=1e-9)
    assert (a2, b2, first + second) == pytest.approx((a, b, whole), rel=1e-10)


def test_prediction_against_sampling_and_between_function_and_measurement():
    _, Phi, y, S = problem(2, n=5, p=2)
    m, C, a, b, _ = student_posterior(Phi, y, S)
    new, rng = np.array([[1.0, -0.5], [0.0, 2.0]]), np.random.default_rng(0)
    tau2 = invgamma(a, scale=b).rvs(200_000, random_state=rng)
    theta = m[:, None] + np.sqrt(tau2) * (np.linalg.cholesky(C) @ rng.standard_normal((2, 200_000)))
    for noise in (False, True):
        f = new @ theta + noise * np.sqrt(tau2) * rng.standard_normal((2, 200_000))
        centre, scale, dof = student_predictive(new, m, C, a, b, noise)
        assert dof == 2 * a == 7.0
        from scipy.stats import t

        for q in (0.05, 0.5, 0.95):
            np.testing.assert_allclose(np.quantile(f, q, axis=1), centre + scale * t.ppf(q, dof), atol=0.03)


def test_much_data_turns_student_into_the_normal_with_that_noise():
    rng, Phi, _, _ = problem(1, n=4000, p=2)
    y = Phi @ [1.0, 2.0] + 0.5 * rng.standard_normal(4000)
    m, C, a, b, _ = student_posterior(Phi, y, np.eye(2))
    assert b / a == pytest.approx(0.25, rel=0.1)
    mean, cov = linear_posterior(Phi, y, b / a, np.eye(2) * b / a)
    np.testing.assert_allclose(mean, m, rtol=1e-9)
    np.testing.assert_allclose(cov, b / a * C, rtol=1e-9)


@pytest.mark.parametrize("name, kw", [("a", dict(a=0)), ("b", dict(b=-1)), ("b", dict(b=math.inf)), ("a", dict(a=math.nan))])
def test_student_refuses_by_name(name, kw):
    with pytest.raises(ValueError, match=f"^{name}: .*allowed"):
        student_posterior(np.ones((2, 1)), np.ones(2), np.eye(1), **kw)


def test_nothing_measured_is_the_prior():
    S = np.array([[2.0, 0.3], [0.3, 1.0]])
    m, C, a, b, evidence = student_posterior(np.zeros((0, 2)), np.zeros(0), S, 3.0, 2.0)
    np.testing.assert_allclose(C, S, rtol=1e-12)
    assert not m.any() and (a, b) == (3.0, 2.0) and evidence == pytest.approx(0, abs=1e-12)
    assert linear_evidence(np.zeros((0, 2)), np.zeros(0), 0.1, S) == pytest.approx(0, abs=1e-12)
