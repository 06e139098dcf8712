"""Evolution strategies: the formulas written out, what every cloud must obey, and the defects of others as regressions."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from searching import run

from gfopt.functions import ellipsoid, random_rotation, rosenbrock, sphere
from gfopt.optimizer import generator
from gfopt.search.strategies import (
    SNES,
    XNES,
    EvolutionStrategy,
    adam,
    centred_ranks,
    clipup,
    cloud,
    moments,
    utilities,
)
from gfopt.space import Box, Categorical, Integer, Real, Space

ALL = [EvolutionStrategy, SNES, XNES]
METHODS = [(EvolutionStrategy, {}), (EvolutionStrategy, {"optimizer": "clipup"}), (SNES, {}), (XNES, {})]
IDS = ["es", "es-clipup", "snes", "xnes"]


def median(M, f, evaluations, box, seeds=3, **settings):
    return float(np.median([run(M(box, seed=s, **settings), f, evaluations).best[1] for s in range(seeds)]))


def unbounded(d, x0=0.0, sigma0=1.0, **kw):
    return Box(-math.inf, math.inf, d, x0=x0, sigma0=sigma0, **kw)


def shift(d):
    return (2 * torch.rand(d, generator=generator("shift", d), dtype=torch.double) - 1) * 3


def tensors(opt):
    return {k: torch.as_tensor(v).clone() for k, v in vars(opt.state).items()}


# the pieces -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("n, d", [(2, 1), (7, 3), (6, 200_000), (1, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_cloud_is_mirrored_around_its_mean(n, d, dtype):
    m, width = torch.full((d,), 2.0, dtype=dtype), torch.linspace(0.5, 4, d, dtype=dtype)
    x = cloud(m, width, n, generator("cloud"))
    pairs = n // 2
    assert x.shape == (n, d) and x.dtype == dtype and torch.isfinite(x).all()
    sums = x[0 : 2 * pairs : 2] + x[1 : 2 * pairs : 2]
    assert torch.allclose(sums, 2 * m.expand(pairs, d), atol=1e-4)
    assert n < 2 or (x[0] != m).any()


def test_a_cloud_has_the_widths_it_was_asked_for_in_every_portion():
    m, width = torch.zeros(100_000), torch.ones(100_000)
    width[50_000:] = 3.0
    x = cloud(m, width, 12, generator("widths"))
    for k in range(0, 12, 2):
        assert abs(float(x[k, :50_000].std()) - 1) < 0.02 and abs(float(x[k, 50_000:].std()) - 3) < 0.06
    corr = torch.corrcoef(x[0::2])
    assert (corr - torch.eye(6)).abs().max() < 0.02  # no portion repeats another one's numbers


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 6), st.integers(0, 10**6))
def test_moments_are_the_sums_of_the_formula(n, d, seed):
    g = generator("moments", seed)
    u, x, m = torch.randn(n, generator=g).double(), torch.randn(n, d, generator=g).double(), torch.randn(d, generator=g).double()
    width = torch.rand(d, generator=g).double() + 0.1
    first, second = moments(u, x, m, width)
    zeta = (x.numpy() - m.numpy()) / width.numpy()
    assert np.allclose(first, (u.numpy()[:, None] * zeta).sum(0))
    assert np.allclose(second, (u.numpy()[:, None] * (zeta**2 - 1)).sum(0))


def test_moments_do_not_depend_on_the_portions():
    g = generator("portions")
    u, x, m = torch.randn(6, generator=g).double(), torch.randn(6, 150_000, generator=g).double(), torch.full((150_000,), 0.3).double()
    before = x.clone()
    wide = moments(u, x, m, torch.full_like(m, 0.5))
    zeta = (x - m) / 0.5
    assert torch.allclose(wide[0], u @ zeta) and torch.allclose(wide[1], u @ (zeta**2 - 1))
    assert torch.equal(x, before)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.one_of(st.floats(-1e6, 1e6), st.just(math.inf)), min_size=2, max_size=30))
def test_weights_sum_to_zero_and_know_only_the_order(ys):
    y = torch.tensor(ys, dtype=torch.double).float().double()  # float32 values: 8 y below is exact
    for weights in (centred_ranks, utilities):
        u = weights(y)
        assert abs(float(u.sum())) < 1e-12
        assert torch.equal(u, weights(8 * y)) and torch.equal(u, weights(torch.atan(y * 1e-6)))


def test_utilities_are_the_table_of_the_paper():
    y = torch.arange(10).double()
    raw = [max(0.0, math.log(6) - math.log(i)) for i in range(1, 11)]
    assert np.allclose(utilities(y), np.array(raw) / sum(raw) - 0.1)


def test_adam_is_the_formula_with_its_bias_corrections():
    a, b, averages = torch.zeros(4).double(), torch.zeros(4).double(), np.zeros((2, 4))
    for t in range(1, 9):
        g = torch.randn(4, generator=generator("adam", t)).double()
        step, a, b = adam(g, a, b, t, 0.8, 0.95)
        averages = np.array([[0.8], [0.95]]) * averages + np.array([[0.2], [0.05]]) * np.stack([g, g**2])
        literal = averages[0] / (1 - 0.8**t) / (np.sqrt(averages[1] / (1 - 0.95**t)) + 1e-8)
        assert np.allclose(step, literal) and np.allclose(torch.stack([a, b]), averages)
        assert t > 1 or torch.allclose(step, g.sign())


def test_clipup_normalises_rolls_and_clips():
    g = torch.tensor([3.0, -4.0]).double()
    first = clipup(g, torch.zeros(2).double(), 0.9)
    assert torch.allclose(first, g / 5 * 2**0.5) and torch.equal(first, clipup(2**20 * g, torch.zeros(2).double(), 0.9))
    second = clipup(g, first, 0.5)
    assert torch.allclose(second, 1.5 * first)
    v = first
    for _ in range(30):
        v = clipup(g, v, 0.9)
    assert float(v.square().mean().sqrt()) == pytest.approx(2)  # ten without the limit
    assert torch.isfinite(clipup(0 * g, 0 * g, 0.9)).all()


# whole generations against the literal formula --------------------------------------------------------------------------

def test_snes_follows_its_formula_for_many_generations():
    box = unbounded(3, x0=[1.0, -2.0, 0.5], sigma0=[0.1, 1.0, 10.0])
    opt = SNES(box, population=8)
    m, sigma = box.x0.numpy().copy(), 0.5 * box.sigma0.numpy()
    eta = (3 + math.log(3)) / (5 * math.sqrt(3))
    for _ in range(20):
        z = opt.ask()
        y = sphere(z - 1)
        zeta, order = (z.numpy() - m) / sigma, np.argsort(np.argsort(y.numpy()))
        raw = np.array([max(0, math.log(5) - math.log(i + 1)) for i in range(8)])
        u = (raw / raw.sum() - 1 / 8)[order]
        m, sigma = m + sigma * (u @ zeta), sigma * np.exp(eta / 2 * (u @ (zeta**2 - 1)))
        opt.tell(z, y)
        assert np.allclose(opt.state.m, m) and np.allclose(opt.state.sigma, sigma)


@pytest.mark.parametrize("optimizer", ["adam", "clipup"])
def test_es_follows_its_formulas_for_many_generations(optimizer):
    d, n = 12, 10
    opt = EvolutionStrategy(unbounded(d, sigma0=2.0), population=n, optimizer=optimizer, sigma=0.4, lr=0.3)
    m, a, b, scale = np.zeros(d), np.zeros(d), np.zeros(d), 1.0
    for t in range(1, 25):
        z = opt.ask()
        y = sphere(z - 3)
        zeta = (z.numpy() - m) / (0.4 * 2 * scale)
        u = np.argsort(np.argsort(y.numpy())) / (n - 1) - 0.5
        g = u @ zeta / n
        cos = g @ a / (np.linalg.norm(g) * np.linalg.norm(a)) if a.any() else 0.0
        if optimizer == "adam":
            a, b = 0.9 * a + 0.1 * g, 0.99 * b + 0.01 * g * g
            step = a / (1 - 0.9**t) / (np.sqrt(b / (1 - 0.99**t)) + 1e-8)
        else:
            a = 0.9 * a + g / math.sqrt((g**2).mean())
            step = a = a * min(1, 2 / math.sqrt((a**2).mean()))
        m = m - 0.3 * 2 * scale * step
        scale *= math.exp(0.05 * max(-3, min(3, math.sqrt(d) * cos))) * (1 - 0.1 / math.sqrt(d))
        opt.tell(z, y)
        assert np.allclose(opt.state.m, m) and opt.state.scale == pytest.approx(scale)


def test_xnes_follows_its_formulas_for_many_generations():
    d, box = 3, unbounded(3, x0=[1.0, -2.0, 0.5], sigma0=[0.1, 1.0, 10.0])
    opt = XNES(box, population=8)
    m, A = box.x0.numpy().copy(), np.diag(0.5 * box.sigma0.numpy())
    eta_sigma, eta_B = (3 + math.log(d)) / (5 * math.sqrt(d)), (9 + 3 * math.log(d)) / (5 * d * math.sqrt(d))
    for _ in range(20):
        z = opt.ask()
        y = sphere(z - 1)
        zeta, order = np.linalg.solve(A, (z.numpy() - m).T).T, np.argsort(np.argsort(y.numpy()))
        raw = np.array([max(0, math.log(5) - math.log(i + 1)) for i in range(8)])
        u = (raw / raw.sum() - 1 / 8)[order]
        G = sum(u[k] * (np.outer(zeta[k], zeta[k]) - np.eye(d)) for k in range(8))
        size = np.trace(G) / d
        e, V = np.linalg.eigh(G - size * np.eye(d))
        m, A = m + A @ (u @ zeta), A * math.exp(eta_sigma / 2 * size) @ V @ np.diag(np.exp(eta_B / 2 * e)) @ V.T
        opt.tell(z, y)
        assert np.allclose(opt.state.m, m) and np.allclose(opt.state.sigma * opt.state.B, A)
        assert abs(np.linalg.det(opt.state.B)) == pytest.approx(1)


# invariances ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("M, kw", METHODS, ids=IDS)
def test_a_scaled_and_offset_loss_is_the_same_trajectory(M, kw):
    "Strategies on raw losses (one peer's OpenES) diverge here; ranks leave not a bit different."
    def f(z):
        return (z - 1).abs().sum(1).mul(2**20).round()  # whole numbers: the affine map below is exact

    a, b = (M(Box(-5, 5, 4), **kw) for _ in range(2))
    for _ in range(25):
        za, zb = a.ask(), b.ask()
        assert torch.equal(za, zb)
        a.tell(za, f(za)), b.tell(zb, 1e6 * f(zb) + 1e3)
    assert all(torch.equal(v, tensors(b)[k]) for k, v in tensors(a).items())


@pytest.mark.parametrize("M, kw", METHODS, ids=IDS)
def test_a_huge_loss_and_a_cliff_do_not_throw_the_mean(M, kw):
    def f(z):
        return torch.where(z[:, 0] < -1, 1e300, sphere(z - 1))

    opt = run(M(Box(-5, 5, 3), **kw), f, 2000)
    assert float(sphere(opt.recommend() - 1)) < 1e-2


@pytest.mark.parametrize("M, kw", METHODS, ids=IDS)
def test_a_translated_and_scaled_box_is_the_same_search(M, kw):
    def f(z):
        return (z - 1).abs().sum(1)

    a, b = M(Box(-5, 5, 3), **kw), M(Box(123, 203, 3), **kw)  # 8 z + 163
    for _ in range(20):
        za, zb = a.ask(), b.ask()
        assert torch.allclose(8 * za + 163, zb, atol=1e-6)
        a.tell(za, f(za)), b.tell(zb, f((zb - 163) / 8))


@pytest.mark.parametrize("f, limit", [(ellipsoid, 1e-3), (rosenbrock, 1.0)])
def test_xnes_does_not_care_how_the_problem_is_turned(f, limit):
    s, R = shift(5), random_rotation(5, 3)
    plain = median(XNES, lambda z: f(z - s), 3000, unbounded(5), seeds=1)
    turned = median(XNES, lambda z: f((z - s) @ R.T), 3000, unbounded(5), seeds=1)
    assert plain < limit and turned < limit


def test_xnes_learns_the_shape_of_the_problem():
    "At the end the cloud's covariance is the inverse Hessian up to a factor."
    s, R = shift(4), random_rotation(4, 1)
    opt = run(XNES(unbounded(4)), lambda z: ellipsoid((z - s) @ R.T), 4000)
    axes = 10.0 ** (6 * torch.arange(4).double() / 3)
    white = axes.sqrt()[:, None] * (R @ opt.state.B)
    assert float(torch.linalg.cond(white)) ** 2 < 1e4 and float(torch.linalg.cond(opt.state.B)) ** 2 > 1e5


def test_xnes_shape_never_runs_out_of_numbers():
    sigma, B = XNES(Box(-1, 1, 3)).split(torch.diag(torch.tensor([1e3, 1e-200, 1.0]).double()))
    assert float(torch.linalg.cond(B)) == pytest.approx(1e10, rel=1e-3)
    assert abs(float(torch.linalg.det(B))) == pytest.approx(1) and float(sigma) == pytest.approx(1e-4 ** (1 / 3))


# the step size of the ES ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("optimizer", ["adam", "clipup"])
@pytest.mark.parametrize("d, distance, evaluations", [(1, 300.0, 1200), (2, 300.0, 2400), (10, 1000.0, 6000), (40, 100.0, 8000)])
def test_es_reaches_an_optimum_hundreds_of_widths_away(optimizer, d, distance, evaluations):
    opt = run(EvolutionStrategy(unbounded(d), optimizer=optimizer), lambda z: sphere(z - distance), evaluations)
    assert float(sphere(opt.recommend() - distance)) < 1e-4 * d * distance**2


def test_es_scale_grows_on_a_slope_and_shrinks_in_noise():
    slope = run(EvolutionStrategy(unbounded(10)), lambda z: z.sum(1), 1200)
    noise = run(EvolutionStrategy(unbounded(10)), lambda z: torch.rand(len(z), generator=generator("n", float(z[0, 0]))), 1200)
    assert slope.state.scale > 100 and noise.state.scale < 0.3


def test_es_as_published_keeps_its_width():
    opt = run(EvolutionStrategy(unbounded(5), adapt=0, decay=1), lambda z: sphere(z - 1), 200)
    assert opt.state.scale == 1.0 and opt.state.m.abs().min() > 0 and torch.allclose(opt.width(opt.state), torch.full((5,), 0.3).double())


@pytest.mark.parametrize("f, d, limit", [(sphere, 10, 1e-12), (sphere, 20, 1e-8), (rosenbrock, 10, 6.0)])
def test_es_is_good_without_settings(f, d, limit):
    s = shift(d)
    assert median(EvolutionStrategy, lambda z: f(z - s), 10_000, Box(-5, 5, d), seeds=1) < limit


@pytest.mark.parametrize("M, f, d, limit", [(SNES, sphere, 10, 1e-20), (SNES, rosenbrock, 10, 7.0), (XNES, sphere, 10, 1e-20), (XNES, rosenbrock, 10, 1e-2)])
def test_natural_gradients_are_good_without_settings(M, f, d, limit):
    s = shift(d)
    assert median(M, lambda z: f(z - s), 8000 if M is XNES else 10_000, Box(-5, 5, d), seeds=1) < limit


# walls ------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("M, kw", METHODS, ids=IDS)
@pytest.mark.parametrize("low", [-5.0, 5.0])
@pytest.mark.parametrize("corner", [0.0, 1.0], ids=["low", "high"])
def test_a_corner_is_found_and_the_mean_stays_inside(M, kw, low, corner):
    box, target = Box(low, low + 10, 4), low + 10 * corner
    opt = M(box, **kw)
    for _ in range(150):
        z = opt.ask()
        opt.tell(z, sphere(z - target))
        m = opt.state.m
        assert ((m >= box.low) & (m <= box.high)).all()
    assert opt.best[1] < 1e-4 and float(sphere(opt.recommend() - target)) < 1e-4


@pytest.mark.parametrize("kw", [{}, {"optimizer": "clipup"}], ids=["adam", "clipup"])
def test_a_slope_into_a_corner_does_not_widen_the_es_for_ever(kw):
    opt = run(EvolutionStrategy(Box(-1, 1, 3), **kw), lambda z: z.sum(1), 1000)
    assert opt.state.scale < 0.1 and torch.allclose(opt.recommend(), torch.full((3,), -1.0).double())


@pytest.mark.parametrize("M", ALL)
def test_half_open_boxes(M):
    box = Box([0.0, -math.inf], [math.inf, 3.0], x0=[5.0, 0.0], sigma0=1.0)
    opt = run(M(box), lambda z: sphere(z - torch.tensor([-1.0, 9.0]).double()), 800)
    assert torch.allclose(opt.recommend(), torch.tensor([0.0, 3.0]).double(), atol=1e-3)


# spaces, precision, edges -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("M, kw", METHODS, ids=IDS)
def test_a_mixed_space_is_searched_and_no_coordinate_freezes(M, kw):
    space = Space(n=Integer(1, 30), act=Categorical(["a", "b", "c"]), lr=Real(1e-4, 1, log=True), beta=Real(0, 1, when={"act": ["b"]}))

    def f(z):
        ps = space.decode(z)
        return torch.tensor([abs(p["n"] - 21) / 5 + (p["act"] != "b") + abs(math.log10(p["lr"]) + 2) + abs(p.get("beta", 0) - 0.7) for p in ps])

    got = [run(M(space, seed=s, **kw), f, 800) for s in range(3)]
    assert np.median([o.best[1] for o in got]) < 0.15
    opt = got[0]
    width = opt.width(opt.state) if M is EvolutionStrategy else opt.state.sigma if M is SNES else (opt.state.sigma * opt.state.B).norm(dim=1)
    assert width[0] >= 0.2 / 30 * 0.999 and width[1] >= 0.2 / 3 * 0.999


@pytest.mark.parametrize("M, kw", METHODS, ids=IDS)
def test_float32_is_searched_to_its_precision(M, kw):
    opt = run(M(unbounded(5, dtype=torch.float32), **kw), lambda z: sphere(z - 1), 2500)
    assert opt.ask().dtype == opt.recommend().dtype == torch.float32 and opt.best[1] < 1e-6
    assert all(torch.isfinite(v).all() for v in tensors(opt).values())


@pytest.mark.parametrize("M, kw", METHODS, ids=IDS)
@pytest.mark.parametrize("d", [1, 3])
def test_a_slope_without_end_leaves_every_number_finite(M, kw, d):
    opt = run(M(unbounded(d, dtype=torch.float32), **kw), lambda z: z[:, 0], 2000)
    assert all(torch.isfinite(v).all() for v in tensors(opt).values())


@pytest.mark.parametrize("M, kw", METHODS, ids=IDS)
@pytest.mark.parametrize("value", [1.0, math.nan])
def test_a_generation_without_news_moves_nothing_also_in_full_flight(M, kw, value):
    opt = run(M(Box(-5, 5, 3), **kw), sphere, 100)
    before, z = tensors(opt), opt.ask()
    opt.tell(z, torch.full((len(z),), value))
    assert all(torch.equal(v, before[k]) for k, v in tensors(opt).items() if k != "generation")


@pytest.mark.parametrize("M, kw", METHODS, ids=IDS)
@pytest.mark.parametrize("n", [2, 3, 5])
def test_small_and_odd_populations(M, kw, n):
    opt = run(M(Box(-5, 5, 2), population=n, **kw), lambda z: sphere(z - 1), 300)
    assert len(opt.ask()) == n and all(torch.isfinite(v).all() for v in tensors(opt).values()) and opt.best[1] < 1


@pytest.mark.parametrize("M", [EvolutionStrategy, SNES])
def test_learning_writes_into_no_told_and_no_former_tensor(M):
    opt = M(unbounded(300_000, dtype=torch.float32), population=4)
    opt.tell(z := opt.ask(), z[:, 0])
    before, z = tensors(opt), opt.ask()
    state, kept = opt.state, z.clone()
    opt.tell(z, z[:, 0])
    assert torch.equal(z, kept) and all(torch.equal(torch.as_tensor(getattr(state, k)), v) for k, v in before.items())


@pytest.mark.parametrize("M", ALL)
def test_the_default_population_is_even_and_grows_with_the_dimension(M):
    sizes = [len(M(Box(-1, 1, d)).ask()) for d in (1, 2, 10, 20, 100)]
    assert sizes == ([6, 8, 12, 14, 20] if M is XNES else [4, 6, 10, 12, 18])


@pytest.mark.parametrize("make, name", [
    (lambda b: EvolutionStrategy(b, optimizer="sgd"), "optimizer"), (lambda b: EvolutionStrategy(b, lr=-1), "lr"),
    (lambda b: EvolutionStrategy(b, adapt=-1), "adapt"), (lambda b: EvolutionStrategy(b, decay=0), "decay"),
    (lambda b: EvolutionStrategy(b, betas=(0.9, 1.0)), "betas"), (lambda b: SNES(b, population=1), "population"),
    (lambda b: XNES(b, rate_B=-1), "rate_B"), (lambda b: XNES(b, rate_sigma=math.nan), "rate_sigma"), (lambda b: XNES(b, sigma0=0), "sigma0")])
def test_a_bad_setting_is_refused_by_name(make, name):
    with pytest.raises(ValueError, match=name):
        make(Box(-1, 1, 2))


def test_xnes_goes_on_where_the_fast_svd_does_not_converge(monkeypatch):
    # seen in 577 dimensions on a finite, well-conditioned matrix of nearly equal axes
    opt = XNES(Box(-5, 5, 6), seed=3)
    A = torch.diag(torch.linspace(1.0, 1.1, 6, dtype=torch.float64)).rot90()
    sigma, B = opt.split(A)

    def gives_up(A):
        raise torch.linalg.LinAlgError("failed to converge")

    monkeypatch.setattr(torch.linalg, "svd", gives_up)
    other_sigma, other_B = opt.split(A)
    assert torch.allclose(sigma, other_sigma, rtol=1e-12) and torch.allclose(B, other_B, atol=1e-12)
    assert torch.allclose(other_sigma * other_B, A, atol=1e-12)
