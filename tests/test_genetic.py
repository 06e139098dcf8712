"""The genetic algorithm: every operator against its formula, the class against its promises and the peers' defects."""
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from searching import best_after

from gfopt.functions import rastrigin, rosenbrock, rotated, shifted, sphere
from gfopt.optimizer import generator
from gfopt.search import genetic
from gfopt.search.genetic import (
    BLX_ALPHA,
    PLAIN,
    GeneticAlgorithm,
    arithmetic_crossover,
    at_least_a_bin,
    blx_crossover,
    boltzmann_probability,
    breeder_mutation,
    fitness_probability,
    gaussian_mutation,
    loss_to_fitness,
    polynomial_mutation,
    rank_probability,
    sbx_crossover,
    selection_probability,
    spin,
    stochastic_universal,
    survivors,
    tournament,
    uniform_crossover,
    uniform_reset,
)
from gfopt.space import Box, Categorical, Integer, Real, Space, row_chunks

LOSSES = st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=12)


def median(values):
    return sorted(values)[len(values) // 2]


def chi_square(picked, P):
    "Of indices against probabilities; the slices that cannot be hit must not have been."
    count, live = torch.bincount(picked, minlength=len(P)), P > 0
    assert (count[~live] == 0).all()
    return float(((count - len(picked) * P)[live] ** 2 / (len(picked) * P)[live]).sum())


def rand(*key, shape):
    "The very numbers an operator draws from `generator(*key)`."
    return torch.rand(shape, generator=generator(*key), dtype=torch.float64)


# the theory's formulas -------------------------------------------------------------------------------------------------

def test_roulette_follows_f_over_sum_f_by_chi_square():
    fitness = torch.tensor([3.0, 1.0, 0.0, 4.0, 2.0])
    P = selection_probability(fitness)
    assert P.tolist() == pytest.approx([0.3, 0.1, 0.0, 0.4, 0.2])
    n = 20_000
    count = torch.bincount(spin(P, n, generator(0, "wheel")), minlength=5)
    live = P > 0
    assert count[2] == 0 and ((count - n * P)[live] ** 2 / (n * P)[live]).sum() < 16.3  # 3 degrees of freedom, 1 in 1000


def test_an_offset_of_1000_flattens_roulette_but_neither_window_nor_rank_nor_boltzmann():
    y = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    assert (selection_probability((4 - y) + 1000) - 0.25).abs().max() < 1e-3
    for select in (fitness_probability, rank_probability, boltzmann_probability):
        P = select(y)
        assert P[0] > 1.5 * P[2] and torch.allclose(select(y + 1000), P) and P.sum() == pytest.approx(1)


@pytest.mark.parametrize("bad", [[1.0, -1.0], [1.0, math.nan], [math.inf, 1.0], []])
def test_roulette_refuses_what_is_no_fitness(bad):
    with pytest.raises(ValueError, match="fitness"):
        selection_probability(torch.tensor(bad))


def test_roulette_at_the_edges():
    assert selection_probability(torch.zeros(4)).tolist() == [0.25] * 4
    assert selection_probability(torch.tensor([1, 3])).tolist() == [0.25, 0.75]
    assert selection_probability(torch.full((2,), 1.5e308, dtype=torch.float64)).tolist() == [0.5, 0.5]
    assert selection_probability(torch.full((2,), 5e-324, dtype=torch.float64)).tolist() == [0.5, 0.5]


def test_the_best_loss_is_the_fittest_and_a_failure_has_no_fitness():
    y = torch.tensor([-1.0, -2.0, -3.0, math.inf])  # the case in which a peer's roulette returned only the worst
    P = selection_probability(loss_to_fitness(y))
    assert P.argmax() == 2 and P[3] == 0 and P[0] == 0


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(*[st.floats(-100, 100)] * 2), min_size=1, max_size=5), st.floats(0, 1))
def test_arithmetic_crossover_keeps_the_sum_and_the_hull(rows, a):
    x1, x2 = torch.tensor(rows, dtype=torch.float64).T
    c1, c2 = arithmetic_crossover(x1, x2, a)
    assert torch.allclose(c1 + c2, x1 + x2, atol=1e-9)
    low, high = torch.minimum(x1, x2) - 1e-9, torch.maximum(x1, x2) + 1e-9
    assert ((c1 >= low) & (c1 <= high) & (c2 >= low) & (c2 <= high)).all()


def test_arithmetic_crossover_at_the_ends_returns_the_parents_bit_for_bit():
    x1, x2 = torch.randn(2, 50, 3, generator=generator(1), dtype=torch.float64)
    for a, want in ((1.0, (x1, x2)), (0.0, (x2, x1))):
        assert all(torch.equal(p, q) for p, q in zip(arithmetic_crossover(x1, x2, a), want))
    per_pair = arithmetic_crossover(x1, x2, torch.linspace(0, 1, 50).double()[:, None])[0]
    assert torch.equal(per_pair[0], x2[0]) and torch.equal(per_pair[-1], x1[-1])
    for bad in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="alpha"):
            arithmetic_crossover(x1, x2, bad)


def test_gaussian_mutation_has_the_moments_it_promises():
    x = torch.zeros(40_000, 2, dtype=torch.float64)
    eps = gaussian_mutation(x, torch.tensor([0.5, 2.0]), generator(2))
    assert torch.allclose(eps.std(0), torch.tensor([0.5, 2.0], dtype=torch.float64), rtol=0.03)
    assert abs(torch.corrcoef(eps.T)[0, 1]) < 0.03
    assert eps.mean(0).abs().max() < 4 * 2 / 200
    with pytest.raises(ValueError, match="sigma"):
        gaussian_mutation(x, -1.0, generator(2))


def test_crossing_alone_contracts_with_arithmetic_and_keeps_the_variance_with_blx_and_sbx():
    g = generator(3)
    x = torch.randn(2, 200_000, 1, generator=g, dtype=torch.float64)
    a = torch.rand(200_000, 1, generator=g, dtype=torch.float64)
    ratio = lambda pair: float(torch.cat(pair).var())  # noqa: E731
    assert ratio(arithmetic_crossover(*x, a)) == pytest.approx(2 / 3, rel=0.02)
    assert ratio(blx_crossover(*x, BLX_ALPHA, g)) == pytest.approx(1, rel=0.02)
    assert ratio(sbx_crossover(*x, 15.0, g)) == pytest.approx((1 + 256 / 252) / 2, rel=0.02)


def test_polynomial_mutation_is_scaled_by_the_width_and_never_exceeds_it():
    step = polynomial_mutation(torch.zeros(50_000, 2, dtype=torch.float64), 20.0, torch.tensor([1.0, 100.0]), generator(4))
    assert (step.abs().max(0).values <= torch.tensor([1.0, 100.0])).all()
    assert torch.allclose(step.abs().mean(0), torch.tensor([1.0, 100.0], dtype=torch.float64) / 22, rtol=0.03)


# the class, as a whole -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("selection", genetic.SELECTION)
@pytest.mark.parametrize("crossover", genetic.CROSSOVER)
def test_every_combination_of_operators_searches(selection, crossover):
    for mutation in genetic.MUTATION:
        opt = GeneticAlgorithm(Box(-5, 5, 2), selection=selection, crossover=crossover, mutation=mutation)
        assert best_after(opt, lambda z: sphere(z - 1), 1600) < 0.05


def test_the_plain_form_of_the_theory_is_available():
    opt = GeneticAlgorithm(Box(-5, 5, 2), **PLAIN)
    assert best_after(opt, lambda z: sphere(z - 1), 2000) < 0.05
    assert GeneticAlgorithm(Box(-5, 5, 2), selection="roulette", crossover="arithmetic", mutation="gaussian").ask().shape == (40, 2)


def test_the_elite_is_never_lost():
    opt, best = GeneticAlgorithm(Box(-5, 5, 5), elite=1, population=10), math.inf
    for _ in range(30):
        z = opt.ask()
        y = rastrigin(z - 1)
        opt.tell(z, y)
        best = min(best, float(y.min()))
        assert float(opt.state.y.min()) == best


# selection -------------------------------------------------------------------------------------------------------------

@settings(max_examples=60, deadline=None)
@given(LOSSES, st.integers(1, 30), st.integers(0, 99))
def test_universal_sampling_picks_floor_or_ceil_of_its_share(y, n, seed):
    P = fitness_probability(torch.tensor(y, dtype=torch.float64))
    count = torch.bincount(stochastic_universal(P, n, generator(seed)), minlength=len(y))
    assert count.sum() == n
    assert (count >= (n * P - 1e-9).floor()).all() and (count <= (n * P + 1e-9).ceil()).all()


def test_universal_sampling_is_fair_and_shuffled():
    P = torch.tensor([0.05, 0.0, 0.45, 0.3, 0.2, 0.0], dtype=torch.float64)
    picks = torch.stack([stochastic_universal(P, 7, generator("sus", s)) for s in range(4000)])
    assert torch.allclose(torch.bincount(picks.flatten(), minlength=6) / 4000, (7 * P).float(), atol=0.04)
    assert all(chi_square(picks[:, k], P) < 16.3 for k in range(7))  # any place in line is like any other


def test_universal_sampling_survives_a_sum_that_rounds_below_one():
    P = torch.full((10,), 0.1, dtype=torch.float32) * (1 - 1e-4)
    P = torch.cat([P, torch.zeros(3)])
    assert max(int(stochastic_universal(P, 1000, generator(s)).max()) for s in range(20)) == 9


@pytest.mark.parametrize("size", [1, 2, 4])
def test_tournament_follows_its_formula(size):
    y = torch.tensor([3.0, math.inf, -1.0, 0.5, 2.0], dtype=torch.float64)
    r = torch.tensor([1.0, 0.0, 4.0, 3.0, 2.0], dtype=torch.float64)
    P = ((r + 1) ** size - r**size) / 5**size
    assert P.sum() == pytest.approx(1)
    assert chi_square(tournament(y, 20_000, generator("t"), size), P) < 18.5  # 4 degrees of freedom, 1 in 1000


@pytest.mark.parametrize("name", genetic.SELECTION)
def test_a_selection_is_blind_to_offset_and_scale_and_uniform_on_a_plateau(name):
    y = torch.tensor([4.0, 1.0, 2.0, 8.0, 0.5], dtype=torch.float64)
    pick = lambda v: genetic.SELECTION[name](v, 4000, generator("s"))  # noqa: E731
    assert torch.equal(pick(y), pick(10 * y + 1000))
    for flat in (torch.full((5,), 7.0, dtype=torch.float64), torch.full((5,), math.inf, dtype=torch.float64)):
        assert chi_square(pick(flat), torch.full((5,), 0.2, dtype=torch.float64)) < 18.5


@pytest.mark.parametrize("name", genetic.SELECTION)
def test_the_better_half_has_more_children(name):
    parents = genetic.SELECTION[name](torch.arange(40.0).double(), 4000, generator(13))
    assert (parents < 20).double().mean() > 0.65 and (parents[0] != parents).any()


def test_spinning_is_the_wheel():
    assert chi_square(spin(torch.tensor([0.3, 0.0, 0.7]), 20_000, generator("w")), torch.tensor([0.3, 0.0, 0.7])) < 10.9


@settings(max_examples=60, deadline=None)
@given(LOSSES, LOSSES, st.integers(0, 12))
def test_survivors_are_the_best_of_children_and_elite(old, new, elite):
    alive = survivors(torch.tensor(old), torch.tensor(new), min(elite, len(old))).tolist()
    pool = [(v, 0, i, i) for i, v in enumerate(torch.tensor(old).tolist())]
    pool = sorted(pool)[: min(elite, len(old))] + [(v, 1, i, len(old) + i) for i, v in enumerate(torch.tensor(new).tolist())]
    assert alive == [index for *_, index in sorted(pool)][: len(new)]


# crossover and mutation ------------------------------------------------------------------------------------------------

def test_sbx_is_its_formula_number_by_number():
    x1, x2 = rand("parents", shape=(2, 20, 3)) * 10 - 5
    c1, c2 = sbx_crossover(x1, x2, 3.0, generator("sbx"))
    u, coin = rand("sbx", shape=(2, 20, 3))
    for i, j in itertools.product(range(20), range(3)):
        a, b, v = float(x1[i, j]), float(x2[i, j]), float(u[i, j])
        beta = (2 * v) ** (1 / 4) if v <= 0.5 else (1 / (2 * (1 - v))) ** (1 / 4)
        beta *= -1 if coin[i, j] < 0.5 else 1
        assert float(c1[i, j]) == pytest.approx(0.5 * ((1 + beta) * a + (1 - beta) * b), abs=1e-12)
        assert float(c2[i, j]) == pytest.approx(0.5 * ((1 - beta) * a + (1 + beta) * b), abs=1e-12)


def test_sbx_agrees_with_a_peer_in_distribution():
    pytest.importorskip("pymoo")
    from pymoo.operators.crossover.sbx import cross_sbx
    np = pytest.importorskip("numpy")
    X = np.stack([np.full((20_000, 1), -1.0), np.full((20_000, 1), 1.0)])
    theirs = cross_sbx(X, np.full(1, -1e9), np.full(1, 1e9), eta=np.full((20_000, 1), 15.0), prob_var=np.full((20_000, 1), 1.0),
                       prob_bin=np.full((20_000, 1), 0.5), random_state=np.random.default_rng(0))
    ours = sbx_crossover(*torch.as_tensor(X), 15.0, generator("peer"))[0]
    q = [0.01, 0.05, 0.25, 0.4, 0.6, 0.75, 0.95, 0.99]
    assert np.allclose(np.quantile(theirs[0], q), np.quantile(ours.numpy(), q), atol=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sbx_stays_finite_at_the_ends_of_its_uniforms(dtype, monkeypatch):
    top = 1 - torch.finfo(dtype).eps / 2  # the largest number torch.rand returns
    monkeypatch.setattr(genetic.torch, "rand", lambda shape, **k: torch.tensor([0.0, top, 0.5, 0.25], dtype=dtype).expand(shape))
    one = torch.ones(2, 4, dtype=dtype)
    for c in sbx_crossover(one, -one, 15.0, None):
        assert torch.isfinite(c).all()


def test_blx_is_uniform_on_the_lengthened_interval():
    x1, x2 = torch.tensor([[0.0, 3.0]]).double().expand(20_000, 2), torch.tensor([[2.0, -1.0]]).double().expand(20_000, 2)
    for c in blx_crossover(x1, x2, 0.25, generator("blx")):
        t = (c - torch.tensor([-0.5, -2.0])) / torch.tensor([3.0, 6.0])
        assert all(chi_square((10 * t[:, j]).long(), torch.full((10,), 0.1)) < 27.9 for j in (0, 1))


def test_uniform_crossover_hands_on_coordinates_by_a_fair_coin():
    x1, x2 = torch.zeros(10_000, 2), torch.ones(10_000, 2)
    c1, c2 = uniform_crossover(x1, x2, generator("u"))
    assert torch.equal(c1 + c2, x2) and (c1.mean(0) - 0.5).abs().max() < 0.02
    assert abs(float((c1[:, 0] == c1[:, 1]).double().mean()) - 0.5) < 0.02  # coordinates decide for themselves


def test_breeder_mutation_is_its_formula_and_keeps_its_range():
    s = 2 * rand("b", shape=(500, 2)) - 1
    width = torch.tensor([1.0, 100.0], dtype=torch.float64)
    step = breeder_mutation(torch.zeros(500, 2, dtype=torch.float64), 10.0, width, generator("b"))
    assert torch.allclose(step, width * s.sign() * 2 ** (-10 * s.abs()))
    assert (step.abs() <= width).all() and (step.abs() >= width / 1024).all()


def test_uniform_reset_forgets():
    low, width = torch.tensor([-2.0, 5.0]), torch.tensor([1.0, 10.0])
    a, b = (uniform_reset(torch.full((20_000, 2), v), low, width, generator("r")) for v in (0.0, 9.0))
    assert torch.equal(a, b)
    for j in (0, 1):
        assert chi_square((5 * (a[:, j] - low[j]) / width[j]).long(), torch.full((5,), 0.2)) < 18.5


@pytest.mark.parametrize("operate", [
    lambda x, g: gaussian_mutation(x, 0.1, g), lambda x, g: polynomial_mutation(x, 20.0, 1.0, g), lambda x, g: breeder_mutation(x, 16.0, 1.0, g),
    lambda x, g: uniform_reset(x, 0.0, 1.0, g), lambda x, g: sbx_crossover(x, x.flip(0), 15.0, g)[0], lambda x, g: blx_crossover(x, x.flip(0), 0.3, g)[0],
    lambda x, g: arithmetic_crossover(x, x.flip(0), 0.3)[0], lambda x, g: uniform_crossover(x, x.flip(0), g)[0]])
def test_operators_are_pure_and_keep_shape_and_precision(operate):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    for dtype in (torch.float32, torch.float64):
        x = torch.linspace(-1, 1, 12, dtype=dtype).view(4, 3)
        keep = x.clone()
        new = operate(x, generator("pure"))
        assert new.shape == x.shape and new.dtype == dtype and torch.equal(x, keep)
        assert torch.equal(new, operate(x, generator("pure"))) and not torch.equal(new, x)
    assert torch.equal(torch.get_rng_state(), before)


# the class -------------------------------------------------------------------------------------------------------------

def alive(opt, x, y=None):
    "The optimiser as if `x` were its living population."
    opt.state = opt.State(x, torch.arange(float(len(x)), dtype=torch.float64) if y is None else y)
    opt._blocks = {}
    return opt


def test_the_plain_form_never_leaves_the_hull_without_mutation():
    opt = GeneticAlgorithm(Box(-5, 5, 3), **PLAIN | dict(sigma=0.0))
    low, high = -5.0, 5.0
    for _ in range(10):
        z = opt.ask()
        assert (z >= low - 1e-12).all() and (z <= high + 1e-12).all()
        low, high = z.min(0).values, z.max(0).values
        opt.tell(z, sphere(z - 1))
    assert (high - low).max() < 1.0  # and arithmetic crossover contracts it


def test_without_an_elite_children_replace_their_parents_and_nothing_is_copied():
    opt = GeneticAlgorithm(Box(-5, 5, 3), **PLAIN)
    z = opt.ask()
    opt.tell(z, sphere(z))
    first = opt.state
    z = opt.ask()
    told = opt._block(0)["x"]
    opt.tell(z, sphere(z))
    assert opt.state.x is told and torch.equal(opt.state.y, sphere(z)) and first.x is not told


def test_a_generation_of_failures_leaves_the_parents_alone():
    for kw in ({}, PLAIN):
        opt = GeneticAlgorithm(Box(-5, 5, 2), population=6, **kw)
        z = opt.ask()
        opt.tell(z, torch.full((6,), math.nan))
        assert torch.isinf(opt.state.y).all()
        z = opt.ask()
        opt.tell(z, sphere(z))
        before, again = opt.state, opt.ask()
        opt.tell(again, torch.full((6,), math.nan))
        assert opt.state is before and not torch.equal(opt.ask(), again)  # the parents try again, with other dice


def test_a_plateau_moves_nobody():
    opt = GeneticAlgorithm(Box(-5, 5, 2))
    for _ in range(5):
        z = opt.ask()
        opt.tell(z, torch.full((40,), 3.0))
        first = opt.state.x if opt.g == 1 else first  # noqa: F821
    assert torch.equal(opt.state.x, first)


def test_both_children_of_a_pair_are_born():
    x = torch.arange(10.0, dtype=torch.float64)[:, None].expand(10, 12) / 10
    z = alive(GeneticAlgorithm(Box(-5, 5, 12), population=10, crossover="uniform", mutation_rate=0.0), x).ask()
    together = z[:5] + z[5:]  # what one child has not, the other has
    assert torch.allclose(together, together[:, :1].expand(5, 12)) and not torch.equal(z[:5], z[5:])


def test_arithmetic_children_lie_on_the_segment_of_their_parents():
    x1, x2 = rand("one", shape=(50, 6)), rand("two", shape=(50, 6))
    c1, c2 = GeneticAlgorithm(Box(0, 1, 6), crossover="arithmetic").cross(x1, x2, generator("cross"))
    a = (c1 - x2) / (x1 - x2)  # one number for each pair
    assert torch.allclose(a, a[:, :1].expand(50, 6)) and torch.allclose(c1 + c2, x1 + x2)
    assert 0 <= a.min() < 0.1 and 0.9 < a.max() <= 1


@pytest.mark.parametrize("population", [2, 3, 7])
@pytest.mark.parametrize("crossover", genetic.CROSSOVER)
def test_small_and_odd_populations(population, crossover):
    opt = GeneticAlgorithm(Box(-5, 5, 1), population=population, crossover=crossover)
    for _ in range(5):
        z = opt.ask()
        assert z.shape == (population, 1)
        opt.tell(z, sphere(z))


@pytest.mark.parametrize("kw", [{}, PLAIN, {"selection": "rank"}], ids=["default", "plain", "rank"])
def test_offset_and_scale_leave_every_point_where_it_was(kw):
    a, b = (GeneticAlgorithm(Box(-5, 5, 3), seed=4, **kw) for _ in range(2))
    for _ in range(8):
        z = a.ask()
        assert torch.allclose(z, b.ask(), atol=1e-9)
        y = (2**10 * rastrigin(z - 1)).round() / 2**10  # so that 10 y + 1000 loses nothing
        a.tell(z, y), b.tell(z, 10 * y + 1000)


def test_negating_and_maximising_is_the_same_search():
    from gfopt.study import minimize
    f = lambda x: float((x**2).sum() - x[0])  # noqa: E731
    a = minimize(f, Box(-1, 1, 2), "ga", 120, seed=3, progress=False)
    b = minimize(lambda x: -f(x), Box(-1, 1, 2), "ga", 120, seed=3, maximize=True, progress=False)
    assert all((p == q).all() for p, q in zip(a.x_iters, b.x_iters, strict=True)) and a.fun == -b.fun


def test_wide_and_narrow_chunks_are_the_same_algorithm():
    """More coordinates than fit one chunk: every pair is crossed, every child mutated, none left uninitialised."""
    d = 2**17 + 1
    assert len(row_chunks(3, 2 * d)) == 3
    space = Box(-math.inf, math.inf, d, x0=0.0, sigma0=1.0, dtype=torch.float32)
    opt = alive(GeneticAlgorithm(space, population=5, crossover="uniform", mutation="gaussian", sigma=0.25, mutation_rate=1.0),
                torch.arange(5.0)[:, None].expand(5, d) * 100)
    z = opt.ask()
    assert z.shape == (5, d) and (z >= -20).all() and (z <= 420).all()
    noise = z - 100 * (z / 100).round()
    assert abs(float(noise.mean())) < 0.01 and abs(float(noise.std()) - 1.0) < 0.01  # sigma times the width, 4 sigma0
    assert len({tuple(r) for r in noise[:, :4].tolist()}) == 5


def test_mutation_rate_is_the_chance_of_each_coordinate():
    box = Box(-5, 5, 8)
    x = torch.zeros(4000, 8, dtype=torch.float64)
    for rate, want in ((None, 1 / 8), (0.0, 0.0), (0.4, 0.4), (1.0, 1.0)):
        for mutation in genetic.MUTATION:
            hit = (GeneticAlgorithm(box, mutation=mutation, mutation_rate=rate).mutate(x, generator("rate")) != x).double()
            assert (hit.mean(0) - want).abs().max() <= 0.04 * (0 < want < 1)


def test_a_user_can_override_an_operator():
    class Clones(GeneticAlgorithm):
        def cross(self, x1, x2, generator):
            return x1, x2

    opt = alive(Clones(Box(-5, 5, 2), mutation_rate=0.0), Box(-5, 5, 2).uniform(40, generator("o")))
    mine = {tuple(r) for r in opt.state.x.tolist()}
    assert {tuple(r) for r in opt.ask().tolist()} <= mine


# mixed and conditional -------------------------------------------------------------------------------------------------

def test_categories_are_inherited_or_drawn_anew_and_never_mixed():
    space = Space(c=Categorical(list("abcdefg")), x=Real(0, 1))
    for crossover in genetic.CROSSOVER:
        opt = GeneticAlgorithm(space, population=40, crossover=crossover, mutation_rate=0.0, seed=1)
        only = torch.tensor([0.5 / 7, 6.5 / 7], dtype=torch.float64)  # a and g: a blend would give the letters between
        z = alive(opt, torch.stack([only.repeat(20), opt.ask()[:, 1]], 1)).ask()
        assert set(z[:, 0].tolist()) <= set(only.tolist())
    opt = alive(GeneticAlgorithm(space, population=40, mutation_rate=1.0, seed=1), torch.full((40, 2), 0.5, dtype=torch.float64))
    share = torch.bincount((7 * opt.ask(4000)[:, 0]).long(), minlength=7) / 4000
    assert (share - 1 / 7).abs().max() < 0.03


def test_integers_leave_their_bin_even_when_steps_are_small():
    space = Space(n=Integer(1, 5), m=Integer(1, 1000))
    opt = GeneticAlgorithm(space, population=60, mutation="gaussian", sigma=1e-6, mutation_rate=1.0, crossover="uniform", seed=3)
    centre = space.encode([{"n": 3, "m": 500}])
    children = space.decode(alive(opt, centre.repeat(60, 1)).ask())
    assert {p["n"] for p in children} == {2, 4} and {p["m"] for p in children} == {499, 501}


def test_a_silent_gene_is_inherited():
    "beta exists only when act is b; what a parent carries in silence, a child may say aloud."
    space = Space(act=Categorical(["a", "b"]), beta=Real(0, 1, when={"act": ["b"]}))
    opt = GeneticAlgorithm(space, population=20, seed=1)
    z = opt.ask()
    silent = z[:, 0] < 0.5
    assert (z[silent, 1] == 0.5).all()
    opt.tell(z, torch.arange(20.0))
    assert opt.state.x[:, 1].unique().numel() == 20


def test_a_mixed_conditional_space_is_solved():
    space = Space(lr=Real(1e-4, 1.0, log=True), depth=Integer(1, 64), act=Categorical(list("uvwxyz")), beta=Real(0, 1, when={"act": ["x"]}))

    def f(z):
        return torch.tensor([abs(math.log10(p["lr"]) + 2) + abs(p["depth"] - 33) / 8 + (abs(p["beta"] - 0.8) if p["act"] == "x" else 1 + (p["act"] != "w"))
                             for p in space.decode(z)])

    assert median([best_after(GeneticAlgorithm(space, seed=s), f, 1200) for s in range(3)]) < 0.05


# quality ---------------------------------------------------------------------------------------------------------------
# A peer's genetic algorithm after 1e4 evaluations, medians, d = 10: sphere 1e-4, Rosenbrock 7.6, Rastrigin .03; 20: 7e-3, 79, 3.0.

@pytest.mark.parametrize("f, d, limit", [
    (sphere, 10, 1e-5), (sphere, 20, 1e-3), (lambda x: rosenbrock(x + 1), 10, 15), (rastrigin, 10, 1e-2), (rastrigin, 20, 4.5)],
    ids=["sphere10", "sphere20", "rosenbrock10", "rastrigin10", "rastrigin20"])
def test_the_defaults_reach_the_peer(f, d, limit):
    assert median([best_after(GeneticAlgorithm(Box(-5, 5, d), seed=s), shifted(f, d, s), 10_000) for s in range(3)]) < limit


def test_the_defaults_on_rotated_landscapes():
    f = rotated(lambda x: rosenbrock(x + 1), 10, 0)
    assert median([best_after(GeneticAlgorithm(Box(-5, 5, 10), seed=s), shifted(f, 10, s), 10_000) for s in range(3)]) < 17


@pytest.mark.parametrize("corner", [5.0, -5.0])
def test_a_corner_is_found_precisely(corner):
    assert median([best_after(GeneticAlgorithm(Box(-5, 5, 5), seed=s), lambda z: sphere(z - corner), 6000) for s in range(3)]) < 1e-4


def test_an_optimum_far_outside_the_first_cloud_is_reached():
    box = Box(-math.inf, math.inf, 5, x0=0.0, sigma0=1.0)
    assert median([best_after(GeneticAlgorithm(box, seed=s), lambda z: sphere(z - 20), 8000) for s in range(3)]) < 1e-3


@pytest.mark.parametrize("f", [lambda z: sphere(100 * (z - 0.7)), lambda z: sphere(z - 1000.7)], ids=["scaled", "moved"])
def test_a_scaled_or_moved_box_is_the_same_problem(f):
    low = 0.0 if float(f(torch.tensor([0.7]))) < 1 else 1000.0
    assert median([best_after(GeneticAlgorithm(Box(low, low + 1, 5), seed=s), f, 4000) for s in range(3)]) < 1e-3


@pytest.mark.parametrize("setting", [dict(selection="best"), dict(crossover="two"), dict(mutation="x"), dict(population=1), dict(elite=41),
                                     dict(mutation_rate=2), dict(sigma=-1), dict(eta=-1), dict(eta_mutation=math.nan), dict(octaves=-1)])
def test_a_bad_setting_is_refused_by_name(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        GeneticAlgorithm(Box(-1, 1, 2), **setting)


def test_discrete_steps_are_a_bin_at_least_and_keep_their_direction():
    space = Space(n=Integer(1, 10), x=Real(0, 1), c=Categorical(["a", "b", "c", "d"], ordered=True))
    x = space.uniform(500, generator("bin"))
    new = x + 0.3 * torch.randn(x.shape, generator=generator("step"), dtype=x.dtype)
    got = at_least_a_bin(new, x, space)
    for (i, j), want in zip(((0, 0.1), (2, 0.25)), (new[:, 0], new[:, 2])):
        step = want - x[:, i]
        literal = [a + (b if abs(b) >= j else math.copysign(j, b)) for a, b in zip(x[:, i].tolist(), step.tolist())]
        assert torch.allclose(got[:, i], torch.tensor(literal, dtype=x.dtype))
    assert torch.equal(got[:, 1], new[:, 1]) and at_least_a_bin(new, x, Box(0, 1, 3)) is new
