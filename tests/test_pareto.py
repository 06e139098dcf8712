"""Dominance, ranks, room, hypervolume, and NSGA-II against brute force, closed forms and pymoo's figures."""
import io
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from searching import MIXED

from gfopt.plots import plot_pareto
from gfopt.search import pareto
from gfopt.search.pareto import (
    NSGA2,
    best_first,
    bnh,
    compromise,
    crowding_distance,
    dominates,
    dtlz2,
    hypervolume,
    non_dominated_sort,
    stay_between,
    total_excess,
    zdt1,
    zdt2,
    zdt3,
)
from gfopt.space import Box, Categorical, Integer, Real, Space

few = settings(max_examples=60, deadline=None)
rows = lambda m, top=3: st.lists(st.lists(st.integers(0, top), min_size=m, max_size=m), min_size=1, max_size=9)  # noqa: E731


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def beats(a, b, ea=0.0, eb=0.0):
    if ea != eb:
        return ea < eb
    return all(p <= q for p, q in zip(a, b)) and any(p < q for p, q in zip(a, b))


def layers(y, e):
    left, out, r = set(range(len(y))), {}, 0
    while left:
        top = {i for i in left if not any(beats(y[j], y[i], e[j], e[i]) for j in left)}
        out, left, r = out | dict.fromkeys(top, r), left - top, r + 1
    return [out[i] for i in range(len(y))]


def pair(z, at=0.3):
    return torch.stack([((z - at) ** 2).sum(-1), ((z + at) ** 2).sum(-1)], -1)


def run(opt, n, f=pair, order=None):
    told = []
    for i in range(n):
        z = opt.ask()
        told.append(z)
        rows = torch.arange(len(z)) if order is None else order(i, len(z))
        y = f(z)
        opt.tell(z[rows], *([t[rows] for t in y] if isinstance(y, tuple) else [y[rows]]))
    return torch.cat(told)


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


# ---------------------------------------------------------------- dominance and ranks
@few
@given(rows(3), st.integers(0, 99))
def test_dominance_is_a_strict_order(y, seed):
    y, e = torch.tensor(y), torch.randint(3, (len(y),), generator=gen(seed))
    table = dominates(y[:, None], y, e[:, None], e)
    want = [[beats(y[i], y[j], e[i], e[j]) for j in range(len(y))] for i in range(len(y))]
    assert table.tolist() == want
    assert not table.diagonal().any() and not (table & table.T).any()
    assert not ((table.float() @ table.float() > 0) & ~table).any()  # transitive


@few
@given(rows(2), st.integers(0, 99))
def test_ranks_peel_the_onion(y, seed):
    e = torch.randint(3, (len(y),), generator=gen(seed)).double()
    assert non_dominated_sort(torch.tensor(y).double(), e).tolist() == layers(y, e.tolist())


def test_failures_are_behind_the_most_forbidden():
    y = torch.tensor([[1.0, math.nan], [9, 9], [math.inf, 0], [0, 0], [-math.inf, -math.inf]])
    assert non_dominated_sort(y, torch.tensor([0.0, 1e9, 0, 0, 0])).tolist() == [2, 1, 2, 0, 2]
    assert non_dominated_sort(torch.full((3, 2), math.nan)).tolist() == [0, 0, 0]


def test_one_loss_gives_places_in_a_race():
    y = torch.randint(20, (50, 1), generator=gen()).double()
    assert torch.equal(non_dominated_sort(y), torch.unique(y[:, 0], return_inverse=True)[1])


def test_ranks_and_room_equal_pymoo():
    pytest.importorskip("pymoo")
    from pymoo.operators.survival.rank_and_crowding.metrics import (
        calc_crowding_distance,
    )
    from pymoo.util.nds.non_dominated_sorting import NonDominatedSorting

    for m in (2, 3):
        y = torch.rand(80, m, generator=gen(m), dtype=torch.float64)
        rank, room = non_dominated_sort(y), crowding_distance(y, non_dominated_sort(y))
        for r, front in enumerate(NonDominatedSorting().do(y.numpy())):
            assert sorted(front) == (rank == r).nonzero()[:, 0].tolist()
            theirs = calc_crowding_distance(y[front].numpy()) * m  # theirs is the mean over losses
            assert len(front) < 3 or np.allclose(room[front], theirs)


# ---------------------------------------------------------------- room
def literal_room(y):
    total = [0.0] * len(y)
    for j in range(len(y[0])):
        order = sorted(range(len(y)), key=lambda i: y[i][j])
        span = y[order[-1]][j] - y[order[0]][j]
        for p, i in enumerate(order):
            end = p in (0, len(y) - 1)
            total[i] += math.inf if end else (y[order[p + 1]][j] - y[order[p - 1]][j]) / span
    return total


def test_room_is_the_literal_formula_layer_by_layer():
    y = torch.rand(40, 3, generator=gen(), dtype=torch.float64)
    rank = torch.randint(4, (40,), generator=gen(1))
    got = crowding_distance(y, rank)
    for r in range(4):
        assert np.allclose(got[rank == r], literal_room(y[rank == r].tolist()))


def test_room_knows_no_units_and_no_order():
    y = torch.rand(30, 2, generator=gen(), dtype=torch.float64)
    room = crowding_distance(y)
    assert torch.equal(crowding_distance(y * torch.tensor([4.0, 0.25])), room)
    order = torch.randperm(30, generator=gen(1))
    assert torch.allclose(crowding_distance(y[order]), room[order])


@pytest.mark.parametrize("y", [torch.ones(5, 2), torch.full((4, 2), math.inf), torch.zeros(1, 3), torch.zeros(2, 2)])
def test_room_of_degenerate_layers_is_no_nan(y):
    assert not crowding_distance(y).isnan().any()


def test_survival_is_by_rank_then_room_then_age():
    front = torch.tensor([[0.0, 10], [1, 6], [2, 5], [4, 0]])
    assert best_first(torch.cat([front + 1, front])).tolist() == [4, 7, 6, 5, 0, 3, 2, 1]
    assert best_first(torch.ones(4, 1)).tolist() == [0, 3, 1, 2]  # equal: two hold the ends, the rest by age


# ---------------------------------------------------------------- hypervolume
def cells(y, top):
    corner = np.array(list(itertools.product(range(top), repeat=len(y[0]))))
    return int((corner[:, None] >= np.array(y)).all(-1).any(1).sum())


@pytest.mark.parametrize("m", [1, 2, 3, 4, 5])
@settings(max_examples=25, deadline=None)
@given(st.data())
def test_hypervolume_counts_cells(m, data):
    y = data.draw(rows(m, top=4))
    assert hypervolume(y, [4] * m) == cells(y, 4)


def test_hypervolume_closed_forms():
    assert hypervolume([[1, 2, 3]], [2, 4, 6]) == 1 * 2 * 3
    assert hypervolume([[3.0, 1.0], [0.0, 2.0]], [2, 2]) == 0  # beyond the reference, or on its edge
    assert hypervolume(torch.zeros(0, 2), [1, 1]) == 0
    k = torch.arange(0, 101).double() / 100  # a staircase under a straight line: exactly n(n-1)/2 cells less
    assert hypervolume(torch.stack([k, 1 - k], 1), [1, 1]) == pytest.approx(0.5 - 0.005)
    g = 40
    t = (torch.cartesian_prod(torch.arange(g), torch.arange(g)).double() + 0.5) / g * math.pi / 2
    ball = torch.stack([t[:, 0].cos() * t[:, 1].cos(), t[:, 0].cos() * t[:, 1].sin(), t[:, 0].sin()], 1)
    assert hypervolume(ball[:: 7], [1.1] * 3) == pytest.approx(1.1**3 - math.pi / 6, rel=0.1)


@few
@given(rows(3, top=5), st.lists(st.integers(0, 5), min_size=3, max_size=3), st.randoms(use_true_random=False))
def test_hypervolume_grows_only_by_what_nobody_dominates(y, new, rng):
    before, after = hypervolume(y, [6] * 3), hypervolume(y + [new], [6] * 3)
    assert (after > before) == (not any(all(p <= q for p, q in zip(v, new)) for v in y))
    shuffled = rng.sample(y, len(y))
    assert hypervolume(shuffled, [6] * 3) == before
    assert hypervolume(np.array(y) * [2, 4, 0.5] - 1, np.array([6] * 3) * [2, 4, 0.5] - 1) == before * 4


def test_hypervolume_equals_pymoo():
    pytest.importorskip("pymoo")
    from pymoo.indicators.hv import HV

    for m, n in ((2, 200), (3, 60), (4, 20)):
        y = torch.rand(n, m, generator=gen(m), dtype=torch.float64)
        assert hypervolume(y, [0.9] * m) == pytest.approx(HV(ref_point=np.full(m, 0.9))(y.numpy()), rel=1e-12)


def test_hypervolume_refuses_a_reference_of_another_size():
    with pytest.raises(ValueError, match="reference"):
        hypervolume([[1.0, 2.0]], [3.0, 3.0, 3.0])


# ---------------------------------------------------------------- excess, compromise, wall, problems
def test_excess_adds_what_is_too_much():
    assert total_excess([1.0, -1.0], 2).tolist() == [1, 0]
    assert total_excess([[1.0, -9, 2], [-1, 0, -1]], 2).tolist() == [3, 0]
    assert total_excess([math.nan, -math.inf], 2).tolist() == [math.inf, 0]
    for bad in ([1.0, 2, 3], [[1.0, 2]], [[1.0], [2.0], [3], [4]]):
        with pytest.raises(ValueError, match="violations: shape"):
            total_excess(bad, 2)


def test_compromise_is_nearest_to_the_ideal_whatever_the_units():
    y = torch.tensor([[0.0, 10], [1, 4], [2, 3.9], [4, 0]])
    assert compromise(y) == 1 == compromise(y * torch.tensor([1000, 0.001]) + 7)
    assert compromise([[5.0, 1], [5.0, 0]]) == 1 and compromise([[3.0]]) == 0


def test_compromise_measures_straight_distance():
    assert compromise([[0.0, 2], [1, 1], [2, 0]]) == 1  # along the axes all three would be equally far


def test_beyond_a_wall_means_between_parent_and_wall():
    box = Box([0.0, -math.inf], [1.0, 2.0], x0=0.5, sigma0=1.0)
    parent = torch.tensor([[0.25, 1.0]]).double().repeat(4000, 1)
    low, high = stay_between(parent - 5, parent, box, gen()), stay_between(parent + 5, parent, box, gen())
    assert (low[:, 0] >= 0).all() and low[:, 0].max() <= 0.25 and (low[:, 1] == -4).all()  # no wall there
    assert high[:, 0].min() >= 0.25 and (high <= torch.tensor([1.0, 2.0])).all() and high[:, 1].min() >= 1
    assert low[:, 0].mean() == pytest.approx(0.125, abs=0.01) and high[:, 1].mean() == pytest.approx(1.5, abs=0.02)


def test_problems_equal_pymoos():
    pytest.importorskip("pymoo")
    from pymoo.problems import get_problem

    x = torch.rand(20, 30, generator=gen(), dtype=torch.float64)
    for f in (zdt1, zdt2, zdt3):
        assert np.allclose(f(x), get_problem(f.__name__).evaluate(x.numpy()))
    for m in (2, 3, 5):
        assert np.allclose(dtlz2(x[:, :12], m), get_problem("dtlz2", n_var=12, n_obj=m).evaluate(x[:, :12].numpy()))
    p = get_problem("bnh")
    x = torch.rand(20, 2, generator=gen(), dtype=torch.float64) * torch.tensor([5.0, 3.0])
    y, c = bnh(x)
    theirs, g = p.evaluate(x.numpy(), return_values_of=["F", "G"])
    assert np.allclose(y, theirs) and np.array_equal(c.numpy() > 0, g > 0)


# ---------------------------------------------------------------- the method: what it promises
def test_front_is_all_that_nobody_dominates_ever():
    opt = NSGA2(MIXED, population=12)
    z = run(opt, 15)
    foreign = MIXED.canonical(MIXED.uniform(30, gen(5)))
    opt.tell(foreign, pair(foreign))
    every = torch.cat([z, foreign])
    y = pair(every).double()
    want = {tuple(v.tolist()) for v in y[~dominates(y[:, None], y).any(0)]}
    fz, fy = opt.front
    assert {tuple(v) for v in fy.tolist()} == want and len(fy) == len(want) > 3
    assert torch.equal(pair(fz), fy) and fy[:, 0].diff().min() > 0


def test_of_equal_losses_the_first_asked_stays():
    opt = NSGA2(Box(-1, 1, 2), population=4)
    z = opt.ask(4)
    opt.tell(torch.full((1, 2), 0.5), [[1.0, 2.0]])  # a stranger comes after everybody who was asked
    opt.tell(z[[3, 2, 1]], [[1.0, 2.0]] * 3)
    assert torch.equal(opt.front[0], z[1:2])


def test_order_of_tells_leaves_no_trace():
    a, b = (NSGA2(MIXED, population=10) for _ in "ab")
    shuffle = lambda i, n: torch.randperm(n, generator=gen(i))  # noqa: E731
    f = lambda z: (pair(z), z[:, :2] - 0.4)  # noqa: E731
    assert torch.equal(run(a, 8, f), run(b, 8, f, shuffle)) and same(a.state_dict(), b.state_dict())


def test_state_dict_in_the_middle_of_a_generation():
    f = lambda z: (pair(z), z[:, :1] - 0.7)  # noqa: E731

    def go(opt, n):
        out = []
        for _ in range(n):
            z = opt.ask(7)
            out.append(z)
            opt.tell(z[2:], *(t[2:] for t in f(z)))
            opt.tell(z[:1], [math.nan])
        return torch.cat(out)

    straight, first, second = (NSGA2(MIXED, seed=s, population=10) for s in (0, 0, 9))
    whole, part = go(straight, 9), go(first, 4)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(torch.cat([part, go(second, 5)]), whole)
    assert same(second.state_dict(), straight.state_dict()) and same(second.best, straight.best)


def test_survivors_are_the_best_of_old_and_new():
    opt = NSGA2(Box(-1, 1, 3), population=8)
    for _ in range(6):
        old = opt.state
        z = opt.ask()
        y = pair(z)
        opt.tell(z, y)
        x, y = (torch.cat([old.x, z]), torch.cat([old.y, y])) if old.y.shape[1] else (z, y)
        first = [x[:i].eq(x[i]).all(1).sum() == 0 for i in range(len(x))]  # copies of earlier ones come last
        order = sorted(best_first(y).tolist(), key=lambda i: not first[i])[:8]
        assert torch.equal(opt.state.x, x[order]) and torch.equal(opt.state.y, y[order])


def test_parents_win_tournaments_of_two():
    N = 10
    opt = NSGA2(Box(-1, 1, 2), population=N, crossover_rate=0.0, mutation_rate=0.0)
    run(opt, 1)
    x = opt.state.x
    children = torch.cat([opt.sample(opt.state, gen(i))["x"] for i in range(400)])
    count = (children[:, None] == x).all(-1).sum(0)
    want = torch.tensor([2 * (N - i) - 1 for i in range(N)]) / N**2 * len(children)
    assert count.sum() == len(children) and ((count - want) ** 2 / want).sum() < 27.9  # 9 degrees, 1 in 1000


def test_copies_claim_no_seat():
    space = Space(a=Integer(1, 5), b=Integer(1, 5))
    opt = NSGA2(space, population=15)
    run(opt, 12)
    assert len(torch.unique(opt.state.x, dim=0)) == 15


def test_constraints_go_before_losses():
    opt = NSGA2(Box(-1, 1, 2), population=20)
    # allowed is a strip of 4%; the losses pull to its far side
    f = lambda z: (pair(z - 0.5), torch.stack([z[:, 0] + 0.9, -1 - z[:, 0]], 1))  # noqa: E731
    worst = []
    for _ in range(15):
        run(opt, 1, f)
        worst.append(opt.state.excess.max().item())
    assert worst == sorted(worst, reverse=True) and worst[-1] == 0 < worst[0]
    z, y = opt.front
    assert len(z) and (z[:, 0] <= -0.9).all() and torch.equal(pair(z - 0.5), y)


def test_nothing_allowed_is_nothing_best():
    opt = NSGA2(Box(-1, 1, 2), population=6)
    run(opt, 3, lambda z: (pair(z), 1 + z[:, 0].abs()))
    assert opt.best == (None, math.inf) and opt.front[0].shape == (0, 2) and opt.front[1].shape == (0, 2)
    with pytest.raises(RuntimeError, match="nothing to recommend"):
        opt.recommend()
    assert opt.state.excess.isfinite().all() and opt.state.excess.diff().min() >= 0  # the least forbidden lead


def test_number_of_losses_is_learnt_once():
    opt = NSGA2(Box(-1, 1, 2), population=6)
    z = opt.ask(6)
    opt.tell(z[:2], [math.nan, math.inf])  # failures say nothing about m
    assert opt.m is None and opt.front[1].shape == (0, 0)
    opt.tell(z[2], [1.0, 2.0, 3.0])  # one point may be told without a frame
    assert opt.m == 3
    with pytest.raises(ValueError, match="2 losses for each point; allowed: 3"):
        opt.tell(z[3:5], [[1.0, 2.0], [2.0, 1.0]])
    with pytest.raises(ValueError, match="1 losses for each point; allowed: 3"):
        opt.tell(z[3], [1.0])
    with pytest.raises(ValueError, match="violations: shape"):
        opt.tell(z[3:5], [[1.0, 2, 3]] * 2, [1.0, 2, 3])
    assert len(opt.pending_z) == 3
    opt.tell(z[3:], torch.tensor([[3.0, 2, 1], [math.nan, 0, 0], [2, 2, 2]]))
    assert opt.g == 1 and opt.state.y.shape == (6, 3) and opt.state.excess.tolist() == [0, 0, 0] + [math.inf] * 3
    assert opt.front[1].tolist() == [[1, 2, 3], [2, 2, 2], [3, 2, 1]]


def test_a_whole_generation_of_failures_draws_anew():
    opt = NSGA2(Box(-1, 1, 2), population=6)
    for _ in range(2):
        z = opt.ask()
        opt.tell(z, [math.nan] * 6)
    a = opt.ask()
    assert not torch.equal(a, z) and opt.state.y.shape == (6, 0)
    opt.tell(a, pair(a))
    assert opt.state.y.shape == (6, 2) and torch.equal(opt.state.x.sort(0).values, a.sort(0).values)
    run(opt, 2)


def test_one_loss_is_an_elitist_genetic_algorithm():
    opt = NSGA2(Box(-5, 5, 4), population=30)
    best = []
    for _ in range(60):
        run(opt, 1, lambda z: (z**2).sum(1))
        best.append(opt.best[1])
    assert best == sorted(best, reverse=True) and best[-1] < 1e-2 and isinstance(best[-1], float)
    assert opt.state.y[0].item() == best[-1] and len(opt.front[1]) == 1


def test_losses_in_other_units_change_nothing():
    a, b = (NSGA2(Box(-1, 1, 3), population=10) for _ in "ab")
    assert torch.equal(run(a, 8), run(b, 8, lambda z: pair(z) * torch.tensor([8.0, 0.125])))


def test_constant_losses_keep_one_point_and_no_nan():
    opt = NSGA2(Box(-1, 1, 2), population=10)
    z = run(opt, 6, lambda z: torch.ones(len(z), 2))
    assert len(opt.front[0]) == 1 and torch.equal(opt.front[0][0], z[0]) and opt.state.x.isfinite().all()


def test_categories_are_exchanged_or_drawn_never_mixed():
    space = Space(c=Categorical(list(range(500))), r=Real(0, 1))
    opt = NSGA2(space, population=20, mutation_rate=0.0)
    first = opt.ask()
    opt.tell(first, pair(first))
    known = set(first[:, 0].tolist())
    for _ in range(5):
        z = opt.ask()
        assert set(z[:, 0].tolist()) <= known
        opt.tell(z, pair(z))


def test_integers_always_move_by_one_at_least():
    space = Space(n=Integer(1, 1000))
    opt = NSGA2(space, population=40, crossover_rate=0.0, mutation_rate=1.0, eta_mutation=1e6)
    z = opt.ask()
    opt.tell(z, pair(z))
    parents = {p["n"] for p in space.decode(opt.state.x)}
    step = [min(abs(p["n"] - q) for q in parents) for p in space.decode(opt.ask())]
    assert np.mean([s == 0 for s in step]) < 0.2


def test_settings_are_checked():
    for bad in (dict(population=1), dict(crossover_rate=1.5), dict(mutation_rate=-0.1), dict(eta=-1)):
        with pytest.raises(ValueError, match=next(iter(bad))):
            NSGA2(Box(-1, 1, 2), **bad)


# ---------------------------------------------------------------- the method: how good it is
def zdt4(x):
    y1, t = x[:, 0], x[:, 1:]
    g = 1 + 10 * t.shape[1] + (t * t - 10 * torch.cos(4 * math.pi * t)).sum(1)
    return torch.stack([y1, g * (1 - (y1 / g).sqrt())], 1)


CUBE = Box(0, 1, 30)
PEER = [  # median hypervolume of pymoo 0.6.2's NSGA2, population 100, ten seeds
    (zdt1, CUBE, [1.1, 1.1], 200, 0.8682),
    (zdt2, CUBE, [1.1, 1.1], 200, 0.5346),
    (zdt3, CUBE, [1.1, 1.1], 200, 1.3257),
    (zdt4, Box([0.0] + [-5.0] * 9, [1.0] + [5.0] * 9), [1.1, 1.1], 250, 0.8663),
    (dtlz2, Box(0, 1, 12), [1.1] * 3, 200, 0.6999),
    (bnh, Box([0.0, 0.0], [5.0, 3.0]), [140, 50], 60, 5250.9524),
]


@pytest.mark.parametrize("f,box,reference,generations,peer", PEER, ids=lambda v: getattr(v, "__name__", ""))
def test_as_good_as_the_peer(f, box, reference, generations, peer):
    "The population alone, so that equal numbers of points are compared; the front kept beside it is better still."
    opt = NSGA2(box, population=100, seed=1)
    run(opt, generations, f)
    own = hypervolume(opt.state.y[opt.state.excess == 0], reference)
    assert own >= 0.975 * peer
    if len(reference) == 2:
        assert hypervolume(opt.front[1], reference) >= max(own, 0.99 * peer)


def test_spreads_over_the_whole_front():
    opt = NSGA2(CUBE, population=40)
    run(opt, 250, zdt1)
    y1 = opt.state.y[:, 0].sort().values
    assert y1[0] < 0.01 and y1[-1] > 0.97 and y1.diff().max() < 0.12


# ---------------------------------------------------------------- the picture
def test_plot_pareto_draws_the_front_in_both_directions():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    y = np.array([[0.0, 3], [1, 1], [2, 2], [3, 0], [np.inf, np.nan]])
    for sign in (1, -1):
        ax = plot_pareto(sign * y, plt.figure().gca(), names=["a", "b"], label="x", maximize=sign == -1)
        assert sorted(map(tuple, ax.lines[1].get_xydata() * sign)) == [(0, 3), (1, 1), (3, 0)]
        assert ax.lines[2].get_drawstyle() == ("steps-post" if sign == 1 else "steps-pre")
        assert ax.get_xlabel() == "a"
        plt.close()
    ax = plot_pareto(np.random.default_rng(0).random((20, 3)), plt.figure().gca())
    assert len(ax.get_xticks()) == 3 and all(0 <= v <= 1 for line in ax.lines for v in line.get_ydata())
    plt.close()
    with pytest.raises(ValueError, match="found"):
        plot_pareto([[math.nan, 1.0]])


def test_plot_pareto_leaves_out_what_is_equal_in_one_loss_and_worse_in_the_other():
    import matplotlib.pyplot as plt

    for sign in (1, -1):
        ax = plot_pareto(sign * np.array([[0.0, 1], [0, 2], [1, 1], [1, 0], [1, 0]]), plt.figure().gca(), maximize=sign == -1)
        assert sorted(map(tuple, ax.lines[1].get_xydata() * sign)) == [(0, 1), (1, 0)]
        plt.close()


def test_everything_public_is_listed():
    assert set(pareto.__all__) >= {"NSGA2", "dominates", "non_dominated_sort", "crowding_distance", "hypervolume", "compromise"}
