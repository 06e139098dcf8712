"""CMA-ES: the covariance as pure functions over runs, its restarts, and what stands around them."""
import dataclasses
import io
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from searching import best_after, run

from gfopt.functions import ellipsoid, random_rotation, rastrigin, rosenbrock, sphere
from gfopt.optimizer import generator
from gfopt.search import cma as C
from gfopt.search import covariance as K
from gfopt.search.cma import CMAES, SepCMAES
from gfopt.space import Box, Categorical, Integer, Real, Space

DOUBLE = torch.float64


def free(d, x0=0.0, sigma0=2.0, **kw):
    return Box(-math.inf, math.inf, d, x0=x0, sigma0=sigma0, **kw)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=generator("test", seed), dtype=DOUBLE)


def started(d, runs=(), seed=0):
    "A state some generations old, so that nothing in it is trivial."
    s, c = K.cma_start(noise(*runs, d, seed=seed), torch.ones(runs, dtype=DOUBLE)), K.constants(9, d)
    for k in range(4):
        zeta = noise(*runs, 9, d, seed=(seed, k))
        u = K.cma_sample(s, zeta)
        y = ellipsoid(s.m[..., None, :] + s.sigma[..., None, None] * u)
        s = K.factorised(K.cma_update(s, dict(u=u, zeta=zeta, y=y), c))
    return s, c


# the formulas ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("d, population", [(2, 6), (10, 10), (20, 12), (40, 15), (5, 50), (1, 4), (3, 2)])
def test_constants_equal_the_reference(d, population):
    cma = pytest.importorskip("cma")
    c = K.constants(population, d)
    assert float(c.w[c.w > 0].sum()) == pytest.approx(1) and c.lazy >= 1
    if d > 1 and population > 2:  # the reference knows no smaller ones
        sp = cma.CMAEvolutionStrategy(d * [0], 1, dict(popsize=population, verbose=-9)).sp
        assert np.allclose(c.w, sp.weights) and c.mueff == pytest.approx(sp.weights.mueff)
        assert (c.c1, c.cmu) == (pytest.approx(sp.c1), pytest.approx(sp.cmu))


@pytest.mark.parametrize("d, population", [(10, 10), (2, 100), (5, 50), (1, 4)])
def test_the_rates_of_the_paths_are_those_of_the_tutorial(d, population):
    c = K.constants(population, d)
    raw = [max(0.0, math.log((population + 1) / 2) - math.log(i + 1)) for i in range(population)]
    mueff = sum(raw) ** 2 / sum(v * v for v in raw)
    cs = (mueff + 2) / (d + mueff + 5)
    damps = 1 + 2 * max(0, math.sqrt((mueff - 1) / (d + 1)) - 1) + cs  # a large population: the path may be long
    assert (c.mueff, c.cs, c.damps) == (pytest.approx(mueff), pytest.approx(cs), pytest.approx(damps))
    assert c.cc == pytest.approx((4 + mueff / d) / (d + 4 + 2 * mueff / d))


def test_a_generation_is_that_of_the_tutorial_written_out():
    d = 4
    s, c = started(d)
    zeta = noise(9, d, seed=7)
    u = K.cma_sample(s, zeta)
    y = rosenbrock(s.m + s.sigma * u)
    new = K.cma_update(s, dict(u=u, zeta=zeta, y=y), c)
    order = np.argsort(y.numpy())
    U, w, sC = u.numpy()[order], c.w.numpy(), s.C.numpy()
    mean = sum(w[i] * U[i] for i in range(9) if w[i] > 0)
    values, B = np.linalg.eigh(sC)
    root = B @ np.diag(values**-0.5) @ B.T
    ps = (1 - c.cs) * s.ps.numpy() + math.sqrt(c.cs * (2 - c.cs) * c.mueff) * root @ mean
    expected = math.sqrt(d) * (1 - 1 / (4 * d) + 1 / (21 * d * d))
    length = np.linalg.norm(ps)
    sigma = float(s.sigma) * math.exp(c.cs / c.damps * (length / expected - 1))
    h = length / math.sqrt(1 - (1 - c.cs) ** (2 * (s.generation + 1))) < (1.4 + 2 / (d + 1)) * expected
    pc = (1 - c.cc) * s.pc.numpy() + h * math.sqrt(c.cc * (2 - c.cc) * c.mueff) * mean
    cov = (1 + c.c1 * (1 - h) * c.cc * (2 - c.cc) - c.c1 - c.cmu * w.sum()) * sC + c.c1 * np.outer(pc, pc)
    for i in range(9):
        cov += c.cmu * (w[i] if w[i] >= 0 else w[i] * d / np.sum((root @ U[i]) ** 2)) * np.outer(U[i], U[i])
    assert np.allclose(new.m, s.m.numpy() + float(s.sigma) * mean) and np.allclose(new.ps, ps)
    assert float(new.sigma) == pytest.approx(sigma) and np.allclose(new.pc, pc) and np.allclose(new.C, cov)
    assert new.generation == s.generation + 1 and new.age == s.age + 1


def test_the_path_of_the_covariance_stalls_while_the_step_is_catching_up():
    s, c = started(3)
    far = dataclasses.replace(s, ps=s.ps * 100)
    u = noise(9, 3)
    told = dict(u=u, zeta=u, y=sphere(u))
    assert torch.equal(K.cma_update(far, told, c).pc, (1 - c.cc) * s.pc)
    assert float(K.cma_update(far, told, c).sigma) <= float(s.sigma) * math.e * (1 + 1e-12)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 30), st.integers(1, 8), st.integers(0, 1000), st.floats(1, 1e4))
def test_negative_weights_never_make_the_covariance_indefinite(population, d, seed, stretch):
    c, zeta = K.constants(population, d), noise(population, d, seed=seed) * stretch
    C = K.covariance_update(torch.eye(d, dtype=DOUBLE), zeta[0], zeta, zeta, c.w.flip(0), c, torch.ones((), dtype=DOUBLE))
    assert torch.equal(C, C.T) and float(torch.linalg.eigvalsh(C)[0]) > 0


def test_weights_go_to_the_ranks_and_failures_last():
    c = K.constants(5, 3)
    y = torch.tensor([[2.0, math.inf, 1.0, 3.0, math.inf], [1.0, 1.0, 0.0, 5.0, 4.0]], dtype=DOUBLE)
    w = K.member_weights(y, c)
    assert w[0].tolist() == c.w[[1, 3, 0, 2, 4]].tolist() and w[1].tolist() == c.w[[1, 2, 0, 4, 3]].tolist()


# many runs -------------------------------------------------------------------------------------------------------------

def test_leading_dimensions_count_runs():
    many, c = started(5, (3,), seed=3)
    zeta = noise(3, 9, 5, seed=11)
    u = K.cma_sample(many, zeta)
    y = rosenbrock(u)
    y[1] = 4.0  # one of the runs learns nothing in this generation
    new = K.cma_update(many, dict(u=u, zeta=zeta, y=y), c)
    for i in range(3):
        s = dataclasses.replace(many, **{k: getattr(many, k)[i] for k in ("m", "sigma", "C", "ps", "pc", "B", "D")})
        one = K.cma_update(s, dict(u=u[i], zeta=zeta[i], y=y[i]), c)
        for k in ("m", "sigma", "C", "ps", "pc"):
            assert torch.allclose(getattr(new, k)[i], getattr(one, k), rtol=1e-12, atol=1e-14), k
    assert torch.equal(new.m[1], many.m[1]) and not torch.equal(new.m[0], many.m[0])


@pytest.mark.parametrize("space", [Box(-5, 5, 6), free(6), Box(0, 1, 6, dtype=torch.float32)], ids=["box", "free", "float32"])
def test_run_i_of_many_is_the_optimiser_with_its_seed(space):
    best, _ = K.cma_runs(lambda x: rosenbrock(x - 0.2), space, 4, 30 * 9, seed=10)
    for i in (0, 3):
        opt, alone = CMAES(space, seed=10 + i), []
        for _ in range(30):
            z = opt.ask()
            alone.append(float((y := rosenbrock(z - 0.2)).min()))
            opt.tell(z, y)
        assert np.allclose(best[i], alone, rtol=1e-4 if space.dtype == torch.float32 else 1e-8)


def test_many_runs_stop_at_the_target_and_survive_failures():
    f = lambda x: torch.where(x[..., 0] > 1, math.nan, sphere(x))  # noqa: E731
    best, s = K.cma_runs(f, Box(-5, 5, 3), 5, 100_000, target=1e-6)
    assert best.shape[1] < 300 and (best.amin(1) <= 1e-6).all() and torch.isfinite(s.C).all()


def test_many_runs_advance_no_global_stream():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    a, _ = K.cma_runs(sphere, Box(-5, 5, 3), 2, 50)
    torch.rand(3)
    b, _ = K.cma_runs(sphere, Box(-5, 5, 3), 2, 50)
    torch.set_rng_state(before)
    assert torch.equal(a, b)


# numbers ---------------------------------------------------------------------------------------------------------------

def test_a_rotated_ellipsoid_of_condition_1e8_is_solved():
    R, scale = random_rotation(8, seed=2), 10.0 ** torch.linspace(0, 8, 8, dtype=DOUBLE)
    best, s = K.cma_runs(lambda x: (scale * ((x - 1) @ R.T) ** 2).sum(-1), free(8), 3, 9000, target=1e-8)
    assert (best.amin(1) < 1e-8).all() and torch.equal(s.C, s.C.mT)
    assert (s.D.amax(-1) / s.D.amin(-1) > 1e3).all() and s.C.dtype == DOUBLE


def test_a_matrix_beyond_double_precision_is_floored_and_its_scale_handed_to_sigma():
    s, _ = started(3)
    for scale in (1e40, 1e-40):
        t = K.factorised(dataclasses.replace(s, C=torch.diag(torch.tensor([1.0, 1e-30, 1e-9], dtype=DOUBLE)) * scale))
        assert float(t.C.max()) == pytest.approx(1) and float(t.sigma) == pytest.approx(float(s.sigma) * scale**0.5)
        assert float(t.D.min() / t.D.max()) == pytest.approx(1e-7) and t.age == 0
        assert torch.allclose((t.B * t.D**2) @ t.B.T, t.C)


def test_one_dimension_is_enough():
    opt = CMAES(free(1, x0=3.0))
    assert opt.population == 4 and best_after(opt, lambda z: (z[:, 0] - 1.234) ** 2, 600) < 1e-12


def test_a_thousand_dimensions_do_not_overflow():
    """A tensor library's CMA-ES fills with inf at d = 1000."""
    opt = CMAES(free(1000, sigma0=0.05), seed=1)
    run(opt, lambda z: sphere(z - 1), 40 * opt.population)
    s = K.factorised(opt.state)
    assert float(sphere(0.05 * s.m - 1)) < 990  # from 1000
    assert all(torch.isfinite(getattr(s, k)).all() for k in ("m", "sigma", "C", "ps", "pc", "B", "D"))


def test_the_step_never_exceeds_the_box_nor_vanishes():
    opt = CMAES(Box(-1, 1, 3), restarts=None)
    run(opt, lambda z: -sphere(z), 1200)
    deviation = float((opt.state.sigma * opt.state.C.diagonal().sqrt()).max())
    assert deviation <= 4.0 * (1 + 1e-12) and torch.isfinite(opt.ask()).all()
    s, c = started(3)
    u = noise(9, 3)
    tiny = dataclasses.replace(s, sigma=s.sigma * 0)
    assert float(K.cma_update(tiny, dict(u=u, zeta=u, y=sphere(u)), c).sigma) > 0


def test_the_factorisation_is_lazy_and_its_age_says_so():
    opt = CMAES(free(40))
    lazy, ages = K.constants(15, 40).lazy, []
    assert lazy > 1
    for _ in range(2 * lazy):
        z = opt.ask()
        opt.tell(z, ellipsoid(z))
        ages.append(opt.state.age)
    assert ages == [*range(1, lazy), 0] * 2


# when a run is over ----------------------------------------------------------------------------------------------------

def over(**changes):
    d = 4
    s = CMAES(Box(-5, 5, d)).state
    y = changes.pop("y", torch.arange(8.0, dtype=DOUBLE))
    history = changes.pop("history", torch.linspace(9, 1, 40, dtype=DOUBLE).repeat(2, 1))
    m = changes.pop("m", torch.ones(d, dtype=DOUBLE))
    return C.stop_reason(dataclasses.replace(s, history=history, m=m, spread=1.0, generation=40, **changes), y)


@pytest.mark.parametrize("reason, changes", [
    ("", {}),
    ("flat", dict(history=torch.ones(2, 40, dtype=DOUBLE))),
    ("TolFun", dict(history=(1 + 1e-13 * torch.arange(40, dtype=DOUBLE)).repeat(2, 1), y=torch.ones(8, dtype=DOUBLE))),
    ("limit", dict(limit=40)),
    ("TolXUp", dict(sigma=torch.tensor(2e4, dtype=DOUBLE))),
    ("TolX:", dict(sigma=torch.tensor(1e-12, dtype=DOUBLE), m=torch.zeros(4, dtype=DOUBLE))),
    ("condition", dict(D=torch.tensor([1.0, 1, 1, 2e-8], dtype=DOUBLE))),
    ("no effect: a fifth", dict(m=torch.tensor([1e18, 0, 0, 0], dtype=DOUBLE))),
    ("no effect: a tenth", dict(m=torch.tensor([9e15, 0, 0, 0], dtype=DOUBLE), sigma=torch.tensor(4.0, dtype=DOUBLE))),
    ("stagnation", dict(history=torch.linspace(1, 1.1, 200, dtype=DOUBLE).repeat(2, 1))),
])
def test_every_criterion_ends_a_run_and_says_why(reason, changes):
    got = over(**changes)
    assert got.startswith(reason) and bool(got) == bool(reason)


def test_a_tolerance_follows_the_scale_of_the_losses():
    """Losses of 1e-15 are not flat: the tolerance shrinks with the first generation's range."""
    opt = CMAES(Box(-5, 5, 2), seed=1)
    run(opt, lambda z: 1e-15 * sphere(z - 1), 400)
    assert opt.best[1] < 1e-24


# restarts --------------------------------------------------------------------------------------------------------------

def test_restarts_leave_everything_before_the_first_one_as_it_is():
    a, b = CMAES(Box(-5, 5, 3), seed=4), CMAES(Box(-5, 5, 3), seed=4, restarts=None)
    while a.state.run == 0:
        za, zb = a.ask(), b.ask()
        assert torch.equal(za, zb)
        a.tell(za, rastrigin(za - 1))
        b.tell(zb, rastrigin(zb - 1))
    assert a.population == 14 and b.population == 7 and a.state.generation == 0 and len(a.ask()) == 14


def test_restarts_escape_where_one_run_is_stuck():
    def ends(kind):
        return [best_after(CMAES(Box(-5, 5, 2), seed=s, restarts=kind), lambda z: rastrigin(z - 1.2), 3500) for s in (0, 3)]

    assert min(ends(None)) > 0.5 and max(ends("ipop")) < 1e-7 and max(ends("bipop")) < 1e-7


def history_of_runs(kind, n=12, first=7, evaluations=900):
    s, rows = dataclasses.replace(CMAES(Box(-5, 5, 3)).state, population=first), []
    for k in range(n):
        s = dataclasses.replace(s, generation=min(s.limit or 10**9, max(1, evaluations // s.population)))
        factor, book = C.next_run(s, kind, first, torch.rand(2, generator=generator(kind, k)).tolist())
        s = dataclasses.replace(s, **book)
        rows.append((s.population, factor, s.limit, s.small, s.large))
    return rows


def test_ipop_doubles_the_population():
    assert [(p, f, limit) for p, f, limit, _, _ in history_of_runs("ipop", 5)] == [(7 * 2**k, 1.0, 0) for k in range(1, 6)]


def test_bipop_gives_its_two_regimes_the_same_budget():
    rows, spent = history_of_runs("bipop", 40), None
    large = [p for p, _, limit, _, _ in rows if limit == 0]
    assert large == [7 * 2**k for k in range(1, len(large) + 1)] and 3 <= len(large)
    biggest = 7
    for p, factor, limit, small, big in rows:
        if limit:  # a small run: chosen while the small ones have spent less
            assert small < big and 7 <= p <= biggest and 0.01 <= factor <= 1 and limit <= max(1, big / 2 / p)
        else:
            assert small >= big and factor == 1
            biggest = p
        spent = small + big
    assert spent > 0 and rows[0][3] > 0 and rows[0][4] == 0  # the first run counts as a small one


def test_a_small_run_may_spend_half_of_what_the_large_ones_have():
    small = [(p, limit, large) for p, _, limit, _, large in history_of_runs("bipop", 40) if limit]
    assert len(small) > 5 and all(limit == max(1, int(large / 2 / p)) for p, limit, large in small)


@pytest.mark.parametrize("kind", ["bipop", "ipop"])
def test_a_restart_begins_with_its_share_of_the_first_step(kind):
    opt = CMAES(Box(-5, 5, 2), seed=1, sigma0=0.7, restarts=kind)
    over = dataclasses.replace(opt.state, run=1, generation=100, history=torch.ones(2, 1, dtype=DOUBLE))  # a large run
    s, coins = opt.again(over), torch.rand(2, generator=generator(1, "restart", 1))
    want = 0.7 * 0.01 ** float(coins[1]) if kind == "bipop" else 0.7  # then a small one follows
    assert s.start == float(s.sigma) == pytest.approx(want) and (s.start < 0.6) == (kind == "bipop") == (s.limit > 0)


def test_a_restart_is_a_new_random_point_of_the_seed():
    def restarted(seed):
        opt = CMAES(Box(-5, 5, 2), seed=seed)
        while opt.state.run == 0:
            z = opt.ask()
            opt.tell(z, torch.full((len(z),), 1.0))
        return opt
    a, b, c = restarted(1), restarted(1), restarted(2)
    s = a.state
    assert torch.equal(s.m, b.state.m) and not torch.equal(s.m, c.state.m) and s.m.abs().max() <= 2.0
    assert torch.equal(s.C, torch.eye(2, dtype=DOUBLE)) and not s.ps.any() and not s.pc.any() and s.history.shape == (2, 0)
    assert s.generation == 0 and s.small == 6 * a.g  # what the first run has spent


def test_the_best_and_the_recommended_point_survive_a_restart():
    opt = CMAES(Box(-5, 5, 2), seed=2)
    f = lambda z: sphere(z - 1) + 1  # noqa: E731
    while opt.state.run == 0:
        z = opt.ask()
        opt.tell(z, f(z))
    assert opt.best[1] == pytest.approx(1, abs=1e-9) and torch.allclose(opt.recommend(), torch.ones(2, dtype=DOUBLE), atol=1e-4)
    z = opt.ask()
    opt.tell(z, f(z))  # the new run is somewhere else and worse
    assert torch.allclose(opt.recommend(), torch.ones(2, dtype=DOUBLE), atol=1e-4) and opt.state.run == 1


def test_the_state_travels_through_a_file_in_every_run():
    opt = CMAES(Box(-5, 5, 2), seed=3)
    while opt.state.run < 2:
        z = opt.ask()
        opt.tell(z, rastrigin(z - 1.1))
    half = opt.ask(3)
    opt.tell(half, rastrigin(half - 1.1))
    torch.save(opt.state_dict(), b := io.BytesIO())
    b.seek(0)
    again = CMAES(Box(-5, 5, 2), seed=3)
    again.load_state_dict(torch.load(b, weights_only=True))
    assert again.population == opt.population
    for _ in range(60):
        z = opt.ask()
        assert torch.equal(z, again.ask())
        opt.tell(z, rastrigin(z - 1.1))
        again.tell(z, rastrigin(z - 1.1))


@pytest.mark.parametrize("f", [lambda z: torch.full((len(z),), math.nan), lambda z: torch.ones(len(z)), lambda z: z[:, 0]], ids=["failed", "flat", "linear"])
def test_hopeless_landscapes_restart_and_stay_finite(f):
    opt = CMAES(free(2), seed=0)
    run(opt, f, 3000)
    s = opt.state
    assert s.run >= 1 and all(torch.isfinite(torch.as_tensor(getattr(s, k), dtype=DOUBLE)).all() for k in vars(s))


def test_many_failures_are_not_in_the_way():
    opt = CMAES(Box(-5, 5, 3), seed=0)
    run(opt, lambda z: torch.where(torch.rand(len(z), generator=generator(int(opt.g))) < 0.3, math.nan, sphere(z - 1)), 2500)
    assert opt.best[1] < 1e-8


@pytest.mark.parametrize("kw, wrong", [(dict(restarts="twice"), "restarts"), (dict(population=1), "population"), (dict(sigma0=-1.0), "sigma0")])
def test_settings_are_checked(kw, wrong):
    with pytest.raises(ValueError, match=wrong):
        CMAES(Box(-5, 5, 2), **kw)


def test_many_runs_need_a_generation_of_budget():
    with pytest.raises(ValueError, match="budget: 5; allowed: >= 7"):
        K.cma_runs(sphere, Box(-5, 5, 3), 2, 5)


# noise and discrete coordinates, assembled --------------------------------------------------------------------------------

MIXED = Space(lr=Real(1e-4, 1, log=True), depth=Integer(1, 8), act=Categorical(["relu", "gelu", "silu"]))


@pytest.mark.parametrize("space", [Box(-5, 5, 3), MIXED], ids=["box", "mixed"])
@pytest.mark.parametrize("noisy", [False, True])
def test_the_four_assemblies_learn_and_save(space, noisy):
    opt = CMAES(space, seed=1, noisy=noisy)
    f = lambda z: sphere(z - opt.space.canonical(torch.full_like(z, 0.3)))  # noqa: E731
    assert best_after(opt, f, 1200) < 1e-3
    again = CMAES(space, seed=1, noisy=noisy)
    again.load_state_dict(opt.state_dict())
    assert torch.equal(again.ask(), opt.ask()) and torch.equal(again.recommend(), opt.recommend())
    assert noisy == hasattr(opt.state, "trend_m") and (space is MIXED) == hasattr(opt.state, "q")


def test_under_noise_a_plateau_is_no_reason_to_restart():
    a, b = (CMAES(Box(-5, 5, 2), noisy=noisy) for noisy in (True, False))
    for opt in (a, b):
        run(opt, lambda z: torch.ones(len(z)), 400)
    assert a.state.run == 0 < b.state.run


def test_under_noise_the_rates_fall():
    g = generator("noise")
    opt = CMAES(free(5), seed=1, noisy=True)
    run(opt, lambda z: sphere(z) + torch.randn(len(z), generator=g, dtype=DOUBLE), 6000)
    assert opt.state.run == 0 and float(opt.state.rates[2]) < 0.9 and float(sphere(opt.recommend())) < 1.0


# the diagonal ----------------------------------------------------------------------------------------------------------

def test_a_generation_of_sep_cma_is_that_of_the_paper_written_out():
    opt = SepCMAES(free(3, sigma0=1.0), population=6, seed=2)
    run(opt, ellipsoid, 30)
    s, z, c = opt.state, opt.ask(), opt.c
    zeta, y = opt._block(0)["zeta"].numpy(), ellipsoid(z)
    opt.tell(z, y)
    order, new = np.argsort(y.numpy()), opt.state
    w, f = c.w.clamp(min=0).numpy(), min(5 / 3, 1 / (c.c1 + c.cmu))
    best = zeta[order]
    for j in range(3):
        spread = sum(w[i] * best[i, j] ** 2 for i in range(6))
        literal = ((1 - f * c.c1 - f * c.cmu) * float(s.C[j]) + f * c.c1 * float(new.pc[j]) ** 2
                   + f * c.cmu * float(s.C[j]) * spread)
        assert float(new.C[j]) == pytest.approx(literal)
    assert np.allclose(new.m, s.m.numpy() + s.sigma * s.C.sqrt().numpy() * (w @ best))


def test_the_diagonal_is_faster_upright_and_stuck_when_turned():
    R = random_rotation(12, seed=1)
    upright = [best_after(M(free(12), seed=0), lambda x: ellipsoid(x - 1), 3500) for M in (SepCMAES, CMAES)]
    turned = [best_after(M(free(12), seed=0), lambda x: ellipsoid((x - 1) @ R.T), 7000) for M in (SepCMAES, CMAES)]
    assert upright[0] < 1e-3 * upright[1] and turned[1] < 1e-3 * turned[0]
