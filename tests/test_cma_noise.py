"""Learning rates that follow the signal: the formulas, and CMA-ES in noise."""
import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gfopt.functions import ellipsoid, sphere
from gfopt.optimizer import generator
from gfopt.search import covariance as K
from gfopt.search import damping as D
from gfopt.search.cma import CMAES
from gfopt.space import Box

DOUBLE = torch.float64


@dataclasses.dataclass
class Damped(K.CMAState):
    trend_m: torch.Tensor
    trend_S: torch.Tensor
    rates: torch.Tensor


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=generator("noise", seed), dtype=DOUBLE)


def begun(d, runs=()):
    s = K.cma_start(torch.full((*runs, d), 3.0, dtype=DOUBLE), torch.full(runs, 2.0, dtype=DOUBLE))
    return Damped(**vars(s), **D.damping_start(d, runs))


def proposed(s, f=sphere, seed=0, told_noise=0.0):
    "What CMA-ES makes of one generation."
    d = s.m.shape[-1]
    n = K.default_population(d)
    zeta = noise(*s.m.shape[:-1], n, d, seed=seed)
    u = K.cma_sample(s, zeta)
    y = f(s.m[..., None, :] + s.sigma[..., None, None] * u)
    y = y + told_noise * noise(*y.shape, seed=("y", seed))
    return K.cma_update(s, dict(u=u, zeta=zeta, y=y), K.constants(n, d))


def follow(f, d, generations, runs, told_noise=0.0, damp=True):
    s, best = begun(d, (runs,)), []
    for k in range(generations):
        new = proposed(s, f, k, told_noise)
        s = D.damped(s, new) if damp else K.factorised(new)
        best.append(f(s.m))
    return torch.stack(best), s


def end(space, f, generations, noisy=True, seed=0):
    opt, g = CMAES(space, noisy=noisy, seed=seed, restarts=None), generator("told", seed)
    for _ in range(generations):
        z = opt.ask()
        opt.tell(z, f(z, g))
    return opt


# the formulas ----------------------------------------------------------------------------------------------------------

def test_five_generations_are_those_of_the_paper_written_out():
    d = 4
    s = begun(d)
    Em, ES, Vm, VS, em, eS = np.zeros(d), np.zeros(d * d), 0.0, 0.0, 1.0, 1.0
    for k in range(5):
        new = proposed(s, ellipsoid, k)
        Sigma, hat = (float(v.sigma) ** 2 * v.C.numpy() for v in (s, new))
        values, B = np.linalg.eigh(Sigma)
        root = B @ np.diag(values**-0.5) @ B.T
        dm = root @ (new.m - s.m).numpy()
        dS = (root @ (hat - Sigma) @ root).ravel() / math.sqrt(2)
        Em, Vm = 0.9 * Em + 0.1 * dm, 0.9 * Vm + 0.1 * dm @ dm
        ES, VS = 0.97 * ES + 0.03 * dS, 0.97 * VS + 0.03 * dS @ dS
        snr_m = (Em @ Em - 0.1 / 1.9 * Vm) / (Vm - Em @ Em)
        snr_S = (ES @ ES - 0.03 / 1.97 * VS) / (VS - ES @ ES)
        was = em
        em = min(1, em * math.exp(min(0.1 * em, 0.1) * np.clip(snr_m / 1.4 / em - 1, -1, 1)))
        eS = min(1, eS * math.exp(min(0.1 * eS, 0.03) * np.clip(snr_S / 1.4 / eS - 1, -1, 1)))
        m, S = s.m.numpy() + em * (new.m - s.m).numpy(), Sigma + eS * (hat - Sigma)
        size = np.linalg.det(S) ** (0.5 / d)
        s = D.damped(s, new)
        assert np.allclose(s.rates, [Vm, VS, em, eS])
        assert np.allclose(s.m, m) and np.allclose(s.trend_m, Em) and np.allclose(s.trend_S, ES)
        assert float(s.sigma) == pytest.approx(size * was / em)
        assert np.allclose(s.C, S / size**2)
        assert np.allclose((s.B * s.D**2) @ s.B.T, s.C) and s.age == 0


def test_the_constants_are_those_of_the_paper():
    assert (D.ALPHA, D.GAMMA, D.BETA_M, D.BETA_S) == (1.4, 0.1, 0.1, 0.03)


def test_the_ratio_of_noise_is_zero_and_of_signal_what_it_is():
    def seen(shift):
        E, V, steps = torch.zeros(4000, 6, dtype=DOUBLE), torch.zeros(4000, dtype=DOUBLE), noise(80, 4000, 6)
        for step in steps + shift:
            E, V, snr = D.tracked(E, V, step, 0.1)
        return float(snr.mean())
    assert abs(seen(0.0)) < 0.02
    assert seen(0.5) == pytest.approx(0.25, abs=0.05)


@given(eta=st.floats(1e-12, 1), snr=st.floats(-1e3, 1e300), beta=st.sampled_from([0.1, 0.03]))
@settings(max_examples=100, deadline=None)
def test_a_rate_stays_in_its_range_and_moves_little(eta, snr, beta):
    new = float(D.adapted(torch.tensor(eta, dtype=DOUBLE), torch.tensor(snr, dtype=DOUBLE), beta))
    assert 0 < new <= 1 and abs(math.log(new / eta)) <= min(0.1 * eta, beta) + 1e-12
    assert new >= eta or snr < 1.4 * eta


def test_identical_steps_are_all_signal():
    E, V = torch.zeros(3, dtype=DOUBLE), torch.tensor(0.0, dtype=DOUBLE)
    for _ in range(2000):
        E, V, snr = D.tracked(E, V, torch.ones(3, dtype=DOUBLE), 0.1)
    assert float(snr) > 1e6 and not math.isnan(float(snr))


def test_local_steps_do_not_depend_on_the_units():
    s = begun(3)
    for k in range(3):
        s = D.damped(s, proposed(s, ellipsoid, k))
    new = proposed(s, ellipsoid, 9)
    wide = [dataclasses.replace(v, m=1e3 * v.m, sigma=1e3 * v.sigma) for v in (s, new)]
    for a, b in zip(D.local_step(s, new), D.local_step(*wide)):
        assert torch.allclose(a, b)


def test_runs_beside_each_other_are_those_alone():
    both, alone = begun(3, (2,)), begun(3)
    for k in range(4):
        new = proposed(both, ellipsoid, k)
        one = dataclasses.replace(alone, **{f: getattr(new, f)[0] for f in ("m", "sigma", "C", "ps", "pc")},
                                  generation=new.generation)
        both, alone = D.damped(both, new), D.damped(alone, one)
    assert torch.allclose(both.m[0], alone.m) and torch.allclose(both.rates[0], alone.rates)


# the search ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("f, generations", [(sphere, 500), (ellipsoid, 1100)])
def test_without_noise_it_still_arrives(f, generations):
    best, s = follow(f, 5, generations, runs=4)
    assert float(best[-1].max()) < 1e-8
    assert bool((s.rates[:, 2:] > 0).all()) and bool((s.rates[:, 2:] <= 1).all())


def test_in_noise_it_comes_ten_times_closer_than_plain():
    slow, s = follow(sphere, 10, 800, runs=8, told_noise=1.0)
    plain, _ = follow(sphere, 10, 800, runs=8, told_noise=1.0, damp=False)
    assert float(slow[-1].median()) < 0.03
    assert float(plain[-1].median()) > 10 * float(slow[-1].median())
    assert float(s.rates[:, 2].max()) < 0.1


@pytest.mark.parametrize("seed", range(4))
def test_in_a_box_with_the_optimum_off_centre_it_does_not_get_lost(seed):
    off = torch.linspace(-2, 2, 10)
    told = lambda z, g: ((z - off) ** 2).sum(1) + torch.randn(len(z), generator=g)
    opt = end(Box(-5.0, 5.0, 10), told, 400, seed=seed)
    assert float(((opt.recommend() - off) ** 2).sum()) < 1
    wide = opt.state.sigma * opt.state.C.diagonal().sqrt() * 2.5
    assert float(wide.max()) <= D.ROOM * 10 + 1e-9


def test_an_open_space_has_no_limit_on_the_step():
    opt = CMAES(Box(-math.inf, math.inf, 2, x0=0.0, sigma0=1.0), noisy=True)
    assert not opt.bounded and not CMAES(Box(-math.inf, math.inf, 2, x0=0.0, sigma0=1.0)).bounded
    assert CMAES(Box(-1.0, 1.0, 2), noisy=True).bounded


@pytest.mark.parametrize("value", [3.0, math.inf])
def test_a_constant_generation_leaves_all_as_it_is(value):
    space = Box(-5.0, 5.0, 4)
    opt = end(space, lambda z, g: sphere(z), 20)
    before = {k: v.clone() for k, v in vars(opt.state).items() if isinstance(v, torch.Tensor)}
    z = opt.ask()
    opt.tell(z, torch.full((len(z),), value))
    for k, v in before.items():
        assert torch.allclose(getattr(opt.state, k), v, rtol=1e-12, atol=0), k


def test_it_never_restarts_though_nothing_gets_better():
    opt = CMAES(Box(-1.0, 1.0, 2), noisy=True, restarts="bipop")
    g = generator("coin")
    for _ in range(400):
        z = opt.ask()
        opt.tell(z, torch.randn(len(z), generator=g))
    assert opt.state.run == 0 and opt.state.generation == 400 and opt.population == len(z)
    assert all(torch.isfinite(v).all() for v in vars(opt.state).values() if isinstance(v, torch.Tensor))


def test_only_the_order_of_the_losses_counts():
    a, b = (end(Box(-5.0, 5.0, 3), lambda z, g, k=k: k * sphere(z).double() + 1000 * (k - 1), 15) for k in (1, 8))
    assert torch.equal(a.state.m, b.state.m) and torch.equal(a.state.rates, b.state.rates)


@pytest.mark.parametrize("d", [1, 2])
def test_one_dimension_and_the_smallest_population(d):
    opt = CMAES(Box(-5.0, 5.0, d), noisy=True, population=2)
    for _ in range(50):
        z = opt.ask()
        opt.tell(z, sphere(z))
    assert torch.isfinite(opt.recommend()).all()
