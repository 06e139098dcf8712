"""Differential evolution that sets its own numbers: L-SHADE against its formulas, its archive, its memory and its budget."""
import copy
import io
import math

import pytest
import torch
from searching import run

from gfopt.functions import rastrigin, rosenbrock, sphere
from gfopt.optimizer import generator
from gfopt.search import differential
from gfopt.search.differential import (
    LSHADE,
    DifferentialEvolution,
    binomial_crossover,
    categories_from,
    draw_controls,
    first_population,
    halfway,
    lehmer_mean,
    population_at,
    toward_best,
)
from gfopt.space import Box, Categorical, Integer, Real, Space

MIXED = Space(n=Integer(1, 40), x=Real(0, 1), c=Categorical(["a", "b", "c", "d"]),
              extra=Real(0, 1, when={"c": ["b"]}))


def generations(opt, f, evaluations):
    "The states passed through."
    used, states = 0, []
    while used < evaluations:
        z = opt.ask()
        opt.tell(z, f(z))
        used += len(z)
        states.append(opt.state)
    return states


def double(v):
    return torch.tensor(v, dtype=torch.float64)


def rows(t):
    return {tuple(r) for r in t.tolist()}


# formulas --------------------------------------------------------------------------------------------------------------

def test_the_step_towards_the_best_is_literal():
    x, p, a, b = torch.randn(4, 7, 3, generator=generator(1), dtype=torch.double)
    F = torch.rand(7, 1, generator=generator(2), dtype=torch.double)
    v = toward_best(x, p, a, b, F)
    for i in range(7):
        for j in range(3):
            f = float(F[i, 0])
            want = float(x[i, j]) + f * float(p[i, j] - x[i, j]) + f * float(a[i, j] - b[i, j])
            assert float(v[i, j]) == pytest.approx(want, abs=1e-12)
    assert torch.equal(toward_best(x, x, a, a, F), x)


def test_beyond_a_bound_is_halfway_from_the_parent_and_always_inside():
    low, high = torch.tensor([-1.0, -math.inf, 0.0]), torch.tensor([1.0, 2.0, math.inf])
    x = torch.tensor([[0.5, 1.0, 4.0]])
    assert halfway(torch.tensor([[-9.0, -9.0, -9.0]]), x, low, high).tolist() == [[-0.25, -9.0, 2.0]]
    assert halfway(torch.tensor([[9.0, 9.0, 9.0]]), x, low, high).tolist() == [[0.75, 1.5, 9.0]]
    low, high = -torch.ones(4), torch.ones(4)
    parent = 2 * torch.rand(500, 4, generator=generator(3)) - 1
    out = halfway(parent + 3 * torch.randn(500, 4, generator=generator(4)), parent, low, high)
    assert out.abs().max() <= 1


@pytest.mark.parametrize("m", [0.05, 0.5, 0.95])
def test_own_F_is_cauchy_given_positive_and_own_rate_is_cut_normal(m):
    F, C = draw_controls(torch.tensor([m]).double(), torch.tensor([m]).double(), 20_000, generator(5))
    cauchy = lambda f: 0.5 + math.atan((f - m) / 0.1) / math.pi  # noqa: E731
    normal = lambda c: 0.5 * math.erfc((m - c) / 0.1 / 2**0.5)  # noqa: E731
    for v in (0.1, 0.3, 0.5, 0.7, 0.9):
        assert float((v >= F).double().mean()) == pytest.approx((cauchy(v) - cauchy(0)) / (1 - cauchy(0)), abs=0.02)
        assert float((v >= C).double().mean()) == pytest.approx(normal(v), abs=0.02)
    assert 0 < F.min() and F.max() == 1 and 0 <= C.min() and C.max() <= 1


def test_a_rate_at_its_end_is_zero_and_pairs_stay_together():
    F, C = draw_controls(torch.tensor([0.1, 0.9]).double(), torch.tensor([-1.0, 0.8]).double(), 4000, generator(6))
    assert 0.45 < float((C == 0).double().mean()) < 0.55
    assert F[C == 0].median() < 0.3 < 0.7 < F[C > 0].median()  # index 0 gives both, index 1 gives both


def test_the_lehmer_mean_is_weighted_by_the_gains():
    s, gain = [0.1, 0.8, 0.4, 1.0], [5.0, 0.25, 2.0, 0.5]
    w = [q / sum(gain) for q in gain]
    want = sum(a * b**2 for a, b in zip(w, s)) / sum(a * b for a, b in zip(w, s))
    got = lehmer_mean(double(s), double(gain))
    assert float(got) == pytest.approx(want, rel=1e-12)
    assert got > (double(w) * double(s)).sum()  # large values are favoured
    assert float(lehmer_mean(torch.tensor([0.3]), torch.tensor([7.0]))) == pytest.approx(0.3)


@pytest.mark.parametrize("gain", [[math.inf, 1.0], [1e308, 1e308], [1e-320, 1.0], [5e-324, 5e-324]])
def test_the_lehmer_mean_stays_a_number(gain):
    for s in ([0.3, 0.7], [0.0, 0.7], [0.7, 0.0]):
        got = lehmer_mean(double(s), double(gain))
        assert 0.3 - 1e-9 <= got <= 0.7 + 1e-9


def test_the_line_of_the_population_and_its_start():
    for t, want in ((0, 50), (100, round(50 - 46 * 0.1)), (500, 27), (1000, 4), (10**9, 4)):
        assert population_at(t, 1000, 50) == want
    assert [first_population(d, T) for d, T in ((1, 10**4), (10, 10**4), (20, 10**5), (20, 10), (10**6, 10**6))] \
        == [18, 50, 158, 10, 500]


# memory and archive ----------------------------------------------------------------------------------------------------

def test_one_generation_follows_the_paper_line_by_line():
    """The whole of `update`, written once more with loops over members."""
    opt = LSHADE(Box(-5, 5, 4), population=20, budget=500, seed=3)
    run(opt, rosenbrock, 100)
    for _ in range(6):
        old, z, block = copy.deepcopy(opt.state), opt.ask(), opt._block(0)
        y = rosenbrock(z)
        opt.tell(z, y)
        x, loss, beaten, sF, sC, gain = old.x.clone(), old.y.clone(), [], [], [], []
        for i in range(old.population):
            if y[i] <= old.y[i]:
                x[i], loss[i] = z[i], y[i]
            if y[i] < old.y[i]:
                beaten.append(old.x[i])
                sF.append(float(block["F"][i])), sC.append(float(block["rate"][i])), gain.append(float(old.y[i] - y[i]))
        MF, MC, k = old.F.clone(), old.rate.clone(), old.entry
        if gain:
            lehmer = lambda s: sum(g * v * v for g, v in zip(gain, s)) / sum(g * v for g, v in zip(gain, s))  # noqa: E731
            MF[k], MC[k], k = lehmer(sF), -1 if MC[k] < 0 or max(sC) == 0 else lehmer(sC), (k + 1) % 6
        s, N = opt.state, round(20 - 16 * min((old.evaluations + len(z)) / 500, 1))
        assert torch.allclose(s.F, MF, rtol=1e-9) and torch.allclose(s.rate, MC, rtol=1e-9)
        assert s.entry == k and s.population == N == len(s.x) == len(s.y)
        assert rows(s.x) == rows(x[loss.argsort(stable=True)[:N]]) and torch.equal(s.y.sort().values, loss.sort().values[:N])
        pool = rows(old.archive) | {tuple(b.tolist()) for b in beaten}
        assert rows(s.archive) <= pool and len(s.archive) == min(round(2.6 * N), len(old.archive) + len(beaten))


def test_the_archive_holds_beaten_parents_only_and_shrinks_with_the_population():
    opt = LSHADE(Box(-5, 5, 3), budget=800, population=30, seed=1)
    parents, filled = set(), False
    while opt.state.evaluations < 800:
        z, old = opt.ask(), opt.state
        parents |= rows(old.x)
        opt.tell(z, sphere(z))
        s = opt.state
        assert rows(s.archive) <= parents and len(s.archive) <= round(2.6 * s.population)
        filled |= len(s.archive) == round(2.6 * s.population)
    assert filled and opt.population == 4 and len(s.archive) == 10


def test_no_archive_is_possible():
    opt = LSHADE(Box(-5, 5, 3), budget=2000, archive=0.0)
    assert all(len(s.archive) == 0 for s in generations(opt, sphere, 2000)) and opt.best[1] < 1e-6


def test_without_an_improvement_nothing_is_remembered_and_a_tie_wanders():
    opt = LSHADE(Box(-5, 5, 3), population=10, budget=10**6)
    before = opt.state
    for y in (3.0, 3.0, 3.0, math.nan):
        x, z = opt.state.x, opt.ask()
        opt.tell(z, torch.full((len(z),), y))
        s = opt.state
        assert torch.equal(s.F, before.F) and torch.equal(s.rate, before.rate) and s.entry == 0 and len(s.archive) == 0
        assert torch.equal(s.x, x) == math.isnan(y)


def test_a_parent_that_failed_teaches_nothing():
    opt = LSHADE(Box(-5, 5, 2), population=8, budget=10**6)
    opt.tell(z := opt.ask(), torch.full((len(z),), math.nan))
    opt.tell(z := opt.ask(), sphere(z))  # all beat infinity
    assert opt.state.entry == 0 and len(opt.state.archive) == 0 and opt.state.y.isfinite().all()


def test_the_rate_comes_to_its_end_and_stays_there():
    opt = LSHADE(Box(-5, 5, 3), population=8, memory=1, budget=10**6)
    run(opt, sphere, 8)
    s = opt.state
    told = dict(x=s.x * 0.9, y=s.y * 0.5, k=torch.arange(8), F=torch.full((8,), 0.4).double(), rate=torch.zeros(8).double())
    end = opt.update(s, told)
    assert float(end.rate[0]) == -1 and float(end.F[0]) == pytest.approx(0.4)
    again = opt.update(end, told | dict(y=s.y * 0.2, rate=torch.ones(8).double()))
    assert float(again.rate[0]) == -1
    assert (opt.sample(again, generator(1))["rate"] == 0).all()


def test_members_differ_from_their_donors(monkeypatch):
    """x_a is never the member itself, x_b neither of the two, over population and archive."""
    import gfopt.search.differential as module

    opt = LSHADE(Box(-5, 5, 3), population=6, budget=10**6)
    run(opt, rosenbrock, 60)
    s, seen, from_archive = opt.state, [], 0
    monkeypatch.setattr(module, "toward_best", lambda x, best, a, b, F: seen.append((x, best, a, b)) or x)
    for i in range(200):
        opt.sample(s, generator(i))
    top = rows(s.x[s.y.argsort()[:2]])
    for x, best, a, b in seen:
        assert (x != a).any(1).all() and (a != b).any(1).all() and (x != b).any(1).all()
        assert rows(best) <= top
        from_archive += sum(tuple(r) in rows(s.archive) for r in b.tolist())
    m = len(s.archive)
    assert from_archive / 1200 == pytest.approx(m / (m + 4), abs=0.06)


# the budget ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("budget, population", [(500, None), (1000, 40), (333, 4), (60, 30)])
def test_the_population_falls_to_four_at_the_budget_and_goes_on(budget, population):
    opt = LSHADE(Box(-5, 5, 3), budget=budget, population=population)
    first, sizes = opt.population, []
    for s in generations(opt, rosenbrock, budget + 100):
        sizes.append(s.population)
        assert s.population == min(round(first + (4 - first) * min(s.evaluations / budget, 1)), *sizes)
        assert (s.population == 4) or s.evaluations < budget
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] == 4 and len(opt.ask()) == 4


def test_defaults():
    opt = LSHADE(Box(-5, 5, 10))
    assert opt.budget == 100_000 and opt.population == 158 and len(opt.state.F) == 6
    assert LSHADE(Box(-5, 5, 500)).budget == 10**6 and LSHADE(Box(-5, 5, 10), budget=10_000).population == 50
    for name, bad in (("budget", 0), ("population", 3), ("memory", 0), ("elite", 1.5), ("archive", -1), ("reset", 2)):
        with pytest.raises(ValueError, match=name):
            LSHADE(Box(-5, 5, 2), **{name: bad})


@pytest.mark.parametrize("space", [Box(-5, 5, 3), MIXED], ids=["box", "mixed"])
def test_saved_while_shrinking_continues_bit_for_bit(space):
    f = lambda z: ((z - 0.3) ** 2).sum(-1)  # noqa: E731
    one = LSHADE(space, budget=400, population=24, seed=5)
    run(one, f, 150)
    z = one.ask(7)
    one.tell(z[[5, 1, 2]], f(z[[5, 1, 2]]))  # within a generation, in part, out of order
    file = io.BytesIO()
    torch.save(one.state_dict(), file)
    file.seek(0)
    two = LSHADE(space, budget=400, population=24, seed=99)
    two.load_state_dict(torch.load(file, weights_only=True))
    assert 4 < two.population < 24
    for _ in range(25):
        a, b = one.ask(5), two.ask(5)
        assert torch.equal(a, b)
        one.tell(a, f(a)), two.tell(b, f(b))
    assert one.population == two.population < 20


def test_blocks_beyond_the_population_are_crossed_with_their_own_parents():
    opt = LSHADE(Box(-5, 5, 3), population=10, budget=10**6)
    for _ in range(30):
        z = opt.ask(2 * opt.population)[opt.population // 2:]  # the first half is never told
        opt.tell(z, sphere(z - 1))
        assert len(opt.state.x) == opt.population
    assert opt.best[1] < 1


# spaces and results ----------------------------------------------------------------------------------------------------

def test_categories_come_from_a_donor_or_anew():
    n = 2000
    v, donor = (torch.full((n, 4), c, dtype=torch.double) for c in (0.125, 0.875))
    out = categories_from(v, donor, MIXED, 0.2, generator(7))
    kept = (out[:, 2] == 0.875).double().mean()
    assert float(kept) == pytest.approx(0.8, abs=0.04) and (out[:, [0, 1, 3]] == 0.125).all()
    assert categories_from(v, donor, Box(0, 1, 4), 0.2, generator(7)) is v


def test_a_mixed_space_is_solved():
    def f(z):
        return torch.tensor([abs(p["n"] - 33) / 4 + (p["x"] - 0.3) ** 2 + (p["c"] != "b") + (p.get("extra", 1) - 0.7) ** 2
                             for p in MIXED.decode(z)])

    got = []
    for seed in range(3):
        opt = LSHADE(MIXED, budget=1200, seed=seed)
        run(opt, f, 1200)
        got.append(opt.best[1])
        assert torch.equal(MIXED.canonical(opt.best[0][None])[0], opt.best[0])
    assert sorted(got)[1] < 1e-3


@pytest.mark.parametrize("low, high", [(-5, 5), (5, 15)])
def test_optima_on_the_bounds_are_reached(low, high):
    t = torch.tensor([high, low, high + 3.0], dtype=torch.double)
    opt = LSHADE(Box(low, high, 3), budget=2500)
    run(opt, lambda z: sphere(z - t), 2500)
    assert opt.best[1] - 9 < 1e-3


def test_valleys_in_ten_dimensions_within_ten_thousand_evaluations():
    """Rastrigin, moved: the best peer reaches 1e-5 in the median, its ancestor stays above 1."""
    s = 3 * (2 * torch.rand(10, generator=generator(8), dtype=torch.double) - 1)
    opt, old = LSHADE(Box(-5, 5, 10), budget=10_000), DifferentialEvolution(Box(-5, 5, 10))
    for o in (opt, old):
        run(o, lambda z: rastrigin(z - s), 10_000)
    assert opt.best[1] < 1e-4 and old.best[1] > 1


def test_smallest_and_single_precision_and_one_dimension():
    for box in (Box(-1, 1, 1), Box(-1, 1, 2, dtype=torch.float32)):
        opt = LSHADE(box, population=4, budget=50)
        states = generations(opt, sphere, 200)
        assert states[-1].x.dtype == box.dtype and opt.ask().dtype == box.dtype
        assert all(torch.isfinite(s.x).all() and torch.isfinite(s.F).all() for s in states)


def test_the_crossover_rate_may_differ_per_row():
    x, v = torch.zeros(400, 50), torch.ones(400, 50)
    rate = torch.linspace(0, 1, 400)[:, None]
    t = binomial_crossover(x, v, rate, generator(9)).mean(1)
    assert (t - rate[:, 0]).abs().mean() < 0.07 and (t >= 1 / 50 - 1e-6).all()


def test_mutants_do_not_depend_on_how_many_rows_are_made_at_a_time(monkeypatch):
    opt = LSHADE(Box(-5, 5, 6), population=20, seed=2)
    generations(opt, rosenbrock, 200)
    assert len(opt.state.archive)
    monkeypatch.setattr(differential, "binomial_crossover", lambda x, v, rate, g: v + rate)
    whole = opt.sample(opt.state, generator(1))["x"]
    for step in (1, 3, 7):
        monkeypatch.setattr(differential, "row_chunks", lambda n, *a, step=step: [slice(i, min(i + step, n)) for i in range(0, n, step)])
        assert torch.equal(opt.sample(opt.state, generator(1))["x"], whole)
