"""CR-FM-NES: against its formulas, against a literal loop, and where the published step breaks down."""
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gfopt.functions import random_rotation
from gfopt.search.large import (
    CRFMNES,
    distance_rate,
    distance_weights,
    lengths,
    shape_gradient,
    shape_step,
    stretched_,
    sums,
    volume,
)
from gfopt.search.strategies import shares
from gfopt.space import Box, Categorical, Integer, Real, Space

SHAPE = ("m", "D", "v", "ps", "pc")


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def free(d, x0=1.0, dtype=torch.float64):
    return Box(-math.inf, math.inf, d, x0=x0, sigma0=1.0, dtype=dtype)


def run(opt, f, evaluations, target=-math.inf):
    told = 0
    while told < evaluations and opt.best[1] > target:
        z = opt.ask()
        opt.tell(z, f(z))
        told += len(z)
    return told, opt.best[1]


def rotated_cigar(d):
    R = random_rotation(d, 1)

    def f(x):
        t = x @ R.T
        return t[:, 0] ** 2 + 1e6 * (t[:, 1:] ** 2).sum(1)

    return f


# ---------------------------------------------------------------- formulas
@settings(max_examples=15, deadline=None)
@given(d=st.integers(2, 7), size=st.floats(0.05, 20), seed=st.integers(0, 999))
def test_natural_gradient_solves_the_fisher_system(d, size, seed):
    v, y, I = size * normal(d, seed=seed), 2 * normal(d, seed=seed + 1), torch.eye(d, dtype=torch.float64)
    n, vbar = float(v.norm()), v / v.norm()
    gamma, a = 1 + n * n, float(v @ y) / n
    alpha = min(1, math.sqrt(n**4 + (2 * gamma - math.sqrt(gamma)) / float((vbar**2).max())) / (2 + n * n))
    C = I + torch.outer(v, v)
    dC = [torch.outer(e, v) + torch.outer(v, e) for e in I] + [torch.diag(e) @ C + C @ torch.diag(e) for e in I]
    P = torch.stack([torch.linalg.solve(C, D) for D in dC])
    F = torch.einsum("iab,jba->ij", P, P) / 2
    F[:d, d:] *= alpha
    F[d:, :d] *= alpha
    q = torch.linalg.solve(C, y)
    score = torch.cat([(q @ v) * q - torch.linalg.solve(C, v), y * q - 1])
    dv, s = shape_gradient(y * y, a * y, a * a, 1.0, v)
    got, scale = torch.cat([dv, s]), float(score.abs().max())
    assert (F @ got - score).abs().max() <= 1e-7 * max(scale, float(F.abs().max() * got.abs().max()))


def test_natural_gradient_is_linear_in_its_sums():
    v, y, w = normal(6), normal(5, 6, seed=1), normal(5, seed=2)
    a = y @ v / v.norm()
    whole = shape_gradient(w @ y**2, (w * a) @ y, float(w @ a**2), float(w.sum()), v)
    parts = [shape_gradient(r * r, b * r, float(b * b), 1.0, v) for r, b in zip(y, a, strict=True)]
    for i in (0, 1):
        torch.testing.assert_close(whole[i], sum(k * p[i] for k, p in zip(w, parts, strict=True)))


def test_stretching_gives_the_covariance():
    v = normal(7, seed=3)
    A = stretched_(torch.eye(7, dtype=torch.float64), v)
    torch.testing.assert_close(A @ A.T, torch.eye(7, dtype=torch.float64) + torch.outer(v, v))


def test_the_step_carries_the_long_axis_and_is_limited():
    D, v, dv, s = normal(4, 8, seed=4).abs() + 0.5
    D1, v1 = shape_step(D, v, 0.05 * dv, 0.05 * s)
    torch.testing.assert_close(D1 * v1, D * v + 0.05 * D * (dv + s * v))
    D1, v1 = shape_step(D, v, 1e9 * dv, -1e9 * s)
    assert (D1 >= 0.299 * D).all() and v1.isfinite().all()


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_an_overflowing_step_is_not_taken(bad):
    D, v, dv, s = normal(4, 3, seed=5).abs() + 0.5
    for part in (dv, s):
        broken = part.clone()
        broken[1] = bad
        a, b = shape_step(D, v, broken if part is dv else dv, broken if part is s else s)
        assert torch.equal(a, D) and torch.equal(b, v)


def test_weights():
    y = torch.tensor([4.0, 1.0, 1.0, 9.0, math.inf, 2.0])
    w = shares(y)
    assert w.sum() == pytest.approx(1) and w[1] == w[2] > w[5] > w[0] >= w[3] == w[4] == 0
    far = distance_weights(w, torch.tensor([1.0, 2.0, 3.0, 1.0, 1.0, 1.0]).double(), 2.0)
    assert far.sum() == pytest.approx(0, abs=1e-12) and far[2] > far[1] and far[3] == -1 / 6
    assert distance_weights(w, torch.full((6,), 1e6).double(), 5.0).isfinite().all()


@pytest.mark.parametrize("d", [1, 2, 40, 10**4, 10**7])
def test_distance_rate_is_the_root(d):
    a = distance_rate(d)
    assert (1 + a * a) * math.exp(a * a / 2) / 0.24 == pytest.approx(10 + d, rel=1e-9)


@pytest.mark.parametrize("shape", [(6, 9), (3, 200_000), (300, 2000)])
def test_sums_over_pieces_are_the_sums(shape):
    y, weight, direction = normal(*shape), normal(2, shape[0], seed=1), normal(shape[1], seed=2)
    wy, wyy = sums(y, weight)
    torch.testing.assert_close(wy, weight @ y)
    torch.testing.assert_close(wyy, weight[0] @ y**2)
    yy, a = lengths(y, direction)
    torch.testing.assert_close(yy, (y * y).sum(1))
    torch.testing.assert_close(a, y @ direction)


# ---------------------------------------------------------------- the literal loop
def literal_generation(s, z, loss, d, n):
    "One generation as the text says it, point by point; z (n, d) are the points, x0 = 0 and sigma0 = 1."
    order = np.argsort(loss)
    hat = np.zeros(n)
    hat[order] = np.maximum(0, math.log(n / 2 + 1) - np.log(np.arange(1, n + 1)))
    hat /= hat.sum()
    mueff, w = 1 / (hat**2).sum(), hat - 1 / n
    norm = np.linalg.norm(s["v"])
    vbar, gamma = s["v"] / norm, 1 + norm**2
    y = (z - s["m"]) / (s["sigma"] * s["D"])
    zeta = y + (1 / math.sqrt(gamma) - 1) * np.outer(y @ vbar, vbar)
    cs, cc = (mueff + 2) / (d + mueff + 5), (4 + mueff / d) / (d + 4 + 2 * mueff / d)
    c1 = max(0, d - 5) / 6 * 2 / ((d + 1.3) ** 2 + mueff)
    chi = math.sqrt(d) * (1 - 1 / (4 * d) + 1 / (21 * d * d))
    ps = (1 - cs) * s["ps"] + math.sqrt(cs * (2 - cs) * mueff) * w @ zeta
    if np.linalg.norm(ps) >= chi:
        phase, rate = "moving", 1.0
        w = hat * np.exp(distance_rate(d) * min(1, math.sqrt(n / d)) * np.linalg.norm(zeta, axis=1))
        w = w / w.sum() - 1 / n
    elif np.linalg.norm(ps) >= 0.1 * chi:
        phase, rate = "between", math.tanh((0.024 * n + 0.7 * d + 20) / (d + 12))
    else:
        phase, rate = "closing", 2 * math.tanh((0.025 * n + 0.75 * d + 10) / (d + 4))
    m = s["m"] + s["sigma"] * s["D"] * (w @ y)
    pc = (1 - cc) * s["pc"] + math.sqrt(cc * (2 - cc) * mueff) * s["D"] * (w @ y)
    eta = math.tanh((min(0.02 * n, 3 * math.log(d)) + 5) / (0.23 * d + 25))
    dv, sD = np.zeros(d), np.zeros(d)
    for weight, row in [*zip(eta * w, y, strict=True), (c1, pc / s["D"])]:
        a, row = vbar @ row, torch.from_numpy(row)
        one = shape_gradient(row * row, a * row, a * a, 1.0, torch.from_numpy(s["v"]))
        dv, sD = dv + weight * one[0].numpy(), sD + weight * one[1].numpy()
    assert np.abs(sD).max() < 0.7  # the limit does not act here
    v = (s["v"] + dv + sD * s["v"]) / (1 + sD)
    D = s["D"] * (1 + sD)
    D = D / np.exp(np.log(D).mean() + math.log(1 + v @ v) / (2 * d))
    sigma = s["sigma"] * math.exp(rate / (2 * d) * w @ (zeta**2).sum(1))
    return dict(m=m, sigma=sigma, D=D, v=v, ps=ps, pc=pc), phase


def test_the_class_is_the_literal_loop():
    d, n = 9, 10
    opt = CRFMNES(free(d, 0.0), population=n, seed=3)
    f = lambda x: ((1.5 - x) ** 2 * torch.arange(1, d + 1)).sum(1) + 0.1 * x.prod(1)  # noqa: E731
    s = dict(sigma=1.0, **{k: getattr(opt.state, k).numpy() for k in SHAPE})
    phases = set()
    for _ in range(60):
        z = opt.ask()
        y = f(z)
        opt.tell(z, y)
        s, phase = literal_generation(s, z.numpy(), y.numpy(), d, n)
        phases.add(phase)
        for k in SHAPE:
            np.testing.assert_allclose(getattr(opt.state, k).numpy(), s[k], rtol=1e-6, atol=1e-8)
        assert opt.state.sigma == pytest.approx(s["sigma"], rel=1e-7)
    assert phases >= {"moving", "between"}


def test_points_come_in_mirrored_halves_with_the_right_spread():
    opt = CRFMNES(free(4), population=2000, seed=1)
    opt.state.D, opt.state.v = torch.tensor([0.5, 1, 2, 1]).double(), torch.tensor([0.0, 3, 1, 0]).double()
    x = opt.ask() - 1
    torch.testing.assert_close(x[:1000], -x[1000:])
    D = torch.diag(opt.state.D)
    C = D @ (torch.eye(4) + torch.outer(opt.state.v, opt.state.v)) @ D
    torch.testing.assert_close(x.T @ x / 2000, C, rtol=0.15, atol=0.4)


# ---------------------------------------------------------------- behaviour
@pytest.mark.parametrize("seed", range(3))
def test_a_rotated_cigar_is_solved_where_the_published_step_dies(seed):
    d = 20
    used, best = run(CRFMNES(free(d), seed=seed), rotated_cigar(d), 9000, 1e-6)
    assert best <= 1e-6 and used < 8000

    class Published(CRFMNES):
        step = staticmethod(lambda D, v, dv, s: (D * (1 + s), v + dv))

    opt = Published(free(d), seed=seed)
    with pytest.raises((ValueError, RuntimeError)):  # points of nan are refused
        run(opt, rotated_cigar(d), 30_000, 1e-6)
        raise ValueError("did not die, and is allowed to")


@pytest.mark.parametrize("f", ["ellipsoid", "discus", "moved"])
def test_separable_ill_conditioning_is_learned(f):
    d = 30
    e = 10.0 ** (6 * torch.arange(d).double() / (d - 1))
    if f == "discus":
        e = torch.ones(d).double()
        e[0] = 1e6
    at = 1000.0 if f == "moved" else 0.0
    used, best = run(CRFMNES(free(d, at + 1.0)), lambda x: (x - at) ** 2 @ e, 14_000, 1e-8)
    assert best <= 1e-8 and used <= 12_000


@pytest.mark.parametrize("d", [2, 10])
@pytest.mark.parametrize("at", ["corner", "edge", "inside"])
def test_optima_at_walls_are_found(d, at):
    target = torch.full((d,), {"corner": -1.0, "edge": 0.2, "inside": 0.3}[at]).double()
    if at == "edge":
        target[0] = 1.0
    got = [run(CRFMNES(Box(-1, 1, d), seed=s), lambda z: ((z - target) ** 2).sum(1), 400 + 100 * d)[1] for s in range(3)]
    assert sorted(got)[1] < 1e-5


def test_a_slope_ends_in_the_corner():
    got = [run(CRFMNES(Box(0, 1, 8), seed=s), lambda z: z.sum(1), 1500)[1] for s in range(3)]
    assert sorted(got)[1] < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_both_precisions(dtype):
    opt = CRFMNES(Box(-5, 5, 20, dtype=dtype), seed=2)
    assert opt.ask(1).dtype == dtype
    best = run(opt, lambda z: ((z - 1) ** 2 * 10.0 ** torch.linspace(0, 4, 20)).sum(1), 6000)[1]
    assert best < (1e-6 if dtype == torch.float32 else 1e-10)
    assert all(getattr(opt.state, k).isfinite().all() for k in SHAPE)


@pytest.mark.parametrize("loss", [7.0, math.inf, math.nan])
def test_a_generation_without_news_moves_nothing(loss):
    opt = CRFMNES(Box(-5, 5, 6), seed=1)
    run(opt, lambda z: (z**2).sum(1), 100)
    before = opt.state
    z = opt.ask(opt.population - opt._k % opt.population)
    opt.tell(z, torch.full((len(z),), loss))
    assert opt.state.sigma == before.sigma and opt.state.generation == before.generation + 1
    assert all(torch.equal(getattr(opt.state, k), getattr(before, k)) for k in SHAPE)


def test_failures_and_endless_plateaus_leave_it_finite():
    opt = CRFMNES(Box(-5, 5, 5), seed=1)
    for g in range(400):
        z = opt.ask()
        y = (z**2).sum(1)
        y[g % len(y)] = math.nan
        opt.tell(z, torch.where(y < 3, y, math.inf) if g % 3 else y.round())
    assert opt.best[1] < 1e-8 and all(getattr(opt.state, k).isfinite().all() for k in SHAPE)


@pytest.mark.parametrize(("d", "n"), [(1, None), (1, 2), (2, 2), (3, 5), (6, 7)])
def test_small_and_odd_populations(d, n):
    opt = CRFMNES(Box(-5, 5, d), population=n, seed=0)
    best = run(opt, lambda z: ((z - 1.5) ** 2).sum(1), 800)[1]
    assert best < 1e-2 and opt.state.sigma > 0 and opt.state.m.isfinite().all()


def test_the_shape_has_no_volume_and_every_part_moves():
    opt = CRFMNES(Box(-5, 5, 7), seed=0)
    start = opt.state
    run(opt, lambda z: (z**2 * torch.arange(1, 8)).sum(1), 300)
    assert volume(opt.state.D, opt.state.v) == pytest.approx(1, abs=1e-9)
    assert all(not torch.equal(getattr(start, k), getattr(opt.state, k)) for k in SHAPE)
    C = torch.diag(opt.state.D) @ (torch.eye(7) + torch.outer(opt.state.v, opt.state.v)) @ torch.diag(opt.state.D)
    assert float(torch.linalg.det(C)) == pytest.approx(1, rel=1e-6)


def test_discrete_coordinates_stay_awake_and_no_width_exceeds_the_space():
    space = Space(a=Integer(0, 9), b=Real(0, 1), c=Categorical(["p", "q", "r"]))
    opt = CRFMNES(space, seed=0)
    for _ in range(150):
        z = opt.ask()
        opt.tell(z, (z[:, 1] - 0.3) ** 2)
        width = space.sigma0 * opt.state.sigma * opt.state.D
        assert (width <= 1 + 1e-9).all() and width[0] > 0.0199 and width[2] > 0.0666
    assert opt.best[1] < 1e-8


def test_sample_and_update_leave_what_they_are_given_alone():
    opt = CRFMNES(Box(-5, 5, 6), seed=0)
    run(opt, lambda z: (z**2).sum(1), 60)
    s = opt.state
    keep = {k: getattr(s, k).clone() for k in SHAPE}
    block = opt.sample(s, torch.Generator().manual_seed(0))
    told = block | dict(y=(block["x"] ** 2).sum(1), z=block["x"])
    copies = {k: t.clone() for k, t in told.items()}
    opt.update(s, told)
    assert all(torch.equal(told[k], copies[k]) for k in told)
    assert all(torch.equal(getattr(s, k), keep[k]) for k in SHAPE)


def test_a_hundred_thousand_dimensions_are_linear():
    d = 100_000
    opt = CRFMNES(Box(-5, 5, d, dtype=torch.float32), population=8, seed=0)
    for _ in range(3):
        z = opt.ask()
        opt.tell(z, (z - 1).square().sum(1))
    assert max(getattr(opt.state, k).numel() for k in SHAPE) == d
    first = opt.state.sigma
    assert 0.5 < first < 1.5 and opt.state.m.isfinite().all()


def test_wrong_settings_are_named():
    with pytest.raises(ValueError, match="population: 1"):
        CRFMNES(Box(-1, 1, 2), population=1)
    with pytest.raises(ValueError, match="sigma0"):
        CRFMNES(Box(-1, 1, 2), sigma0=0)
