"""CMA-ES on whole numbers and categories: the margin, the table of probabilities, and runs on mixed spaces."""
import dataclasses
import itertools
import math
from statistics import NormalDist

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gfopt.search.cma import CMAES
from gfopt.search.margin import (
    believed,
    category_step,
    cell,
    floored,
    followed,
    margin,
    mixed,
    mixed_start,
    place,
    with_margin,
)
from gfopt.space import Box, Categorical, Integer, Real, Space

INF, NORMAL = math.inf, NormalDist()


def double(*v):
    return torch.tensor(v, dtype=torch.float64)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def run(opt, f, evaluations, target=-INF):
    "Evaluations needed to get to the target; f reads canonical points (n, dim)."
    used = 0
    while used < evaluations:
        y = f(z := opt.ask())
        opt.tell(z, y)
        used += len(z)
        if float(y.min()) <= target:
            return used
    return INF


def cdf(x):
    return 0.0 if x == -INF else 1.0 if x == INF else NORMAL.cdf(x)


def leaving(m, s, low, high):
    return cdf((low - m) / s), 1 - cdf((high - m) / s)


# the margin ------------------------------------------------------------------------------------------------------------

inside = st.tuples(st.floats(0.001, 0.999), st.floats(-3, 3), st.floats(1e-3, 0.5))


@settings(max_examples=150, deadline=None)
@given(inside, st.floats(0.1, 10), st.floats(-5, 5))
def test_inside_both_ways_out_are_open(case, width, low):
    where, log_s, alpha = case
    m, s = low + where * width, width * 10**log_s
    left0, right0 = leaving(m, s, low, low + width)
    m2, s2 = margin(double(m), double(s), double(low), double(low + width), alpha)
    left, right = leaving(float(m2), float(s2), low, low + width)
    assert left >= alpha / 2 * (1 - 1e-6) and right >= alpha / 2 * (1 - 1e-6)
    assert low <= float(m2) <= low + width  # and the mean has not changed its cell
    if min(left0, right0) >= alpha / 2 * (1 + 1e-9):
        assert (float(m2), float(s2)) == (m, s)  # bit for bit
    else:  # nobody gains but those who were short
        assert left <= max(left0, alpha / 2) + 1e-9 and right <= max(right0, alpha / 2) + 1e-9


@settings(max_examples=100, deadline=None)
@given(st.floats(-3, 0), st.floats(-3, 2), st.floats(1e-3, 0.5), st.booleans())
def test_at_the_edge_the_one_way_out_is_open(m, log_s, alpha, mirrored):
    sign, s = (-1 if mirrored else 1), 10**log_s
    low, high = (-INF, 0.0) if not mirrored else (0.0, INF)
    m2, s2 = margin(double(sign * m), double(s), double(low), double(high), alpha)
    assert float(s2) == s and sum(leaving(float(m2), s, low, high)) >= alpha * (1 - 1e-6)
    assert sign * float(m2) >= m - 1e-12 and sign * float(m2) <= 1e-12  # towards the wall, not across
    if NORMAL.cdf(m / s) > alpha * (1 + 1e-6):
        assert float(m2) == sign * m


def test_a_wide_cloud_over_thin_cells_is_left_alone():
    "With 20001 levels the chance to stay in one cell is far below the margin, and that is no reason to shrink."
    mix = mixed(Space(n=Integer(-10_000, 10_000)))
    z, s = double(0.37), double(0.25)
    m2, s2 = margin(z, s, *cell(z, mix), 0.25)
    assert torch.equal(m2, z) and torch.equal(s2, s)


def test_the_literal_formula():
    for m, s, alpha in itertools.product((-0.4, 0.0, 0.1, 0.49), (0.02, 0.2, 0.5), (0.01, 0.1)):
        p = leaving(m, s, -0.5, 0.5)
        q = [max(v, alpha / 2) for v in p]
        total = sum(q) + 1 - sum(p)
        q = [v + (1 - total) / (total - 1.5 * alpha) * (v - alpha / 2) for v in q]
        left, right = (-NORMAL.inv_cdf(v) for v in q)
        want = (-0.5 + left / (left + right), 1 / (left + right))
        got = margin(double(m), double(s), double(-0.5), double(0.5), alpha)
        assert [float(v) for v in got] == pytest.approx(want, rel=1e-8, abs=1e-9)


@pytest.mark.parametrize("p", [Integer(0, 1), Integer(1, 2, log=True), Integer(-3, 4), Integer(1, 300, log=True),
                               Categorical([1, 2, 4, 8], ordered=True), Categorical(list("ab"), ordered=True)])
def test_cells_are_those_of_the_space(p):
    mix = mixed(Space(p=p))
    lows, highs = (v.tolist() for v in cell(torch.linspace(-0.2, 1.2, 4000).double(), mix))
    assert min(lows) == -INF and max(highs) == INF and len(set(lows)) == p.levels
    for low, high in {*zip(lows, highs, strict=True)}:
        a = p.decode(max(low, 0) + 1e-9)
        assert a == p.decode(min(high, 1) - 1e-9)
        assert low == -INF or p.decode(low - 1e-9) != a
        assert high == INF or p.decode(high + 1e-9) != a


def test_the_mean_follows_stretched_members_only():
    m, seen, A = double(0.3, 0.3, 0.3), double(0.5, 0.5, 0.5), double(1.0, 1.5, 1e6)
    assert followed(m, seen, A, 1.0).tolist() == pytest.approx([0.3, 0.5, 0.5])
    assert followed(m, seen, A, 0.1).tolist() == pytest.approx([0.3, 0.3 + 0.2 * 0.05 / 1.4, 0.32], rel=1e-5)


# the table -------------------------------------------------------------------------------------------------------------

def table(levels, seed=0):
    K = torch.tensor(levels)[:, None]
    q = torch.rand(len(levels), max(levels), generator=generator(seed), dtype=torch.float64) + 0.05
    q = q.where(torch.arange(max(levels)) < K, 0.0)
    return q / q.sum(1, keepdim=True)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.floats(0, 3), st.integers(0, 99))
def test_rows_sum_to_one_above_the_floor(levels, size, seed):
    q, K = table(levels, seed), torch.tensor(levels)
    push = torch.randn(q.shape, generator=generator(seed + 1), dtype=torch.float64).where(q > 0, 0.0)
    push -= (push.sum(1, keepdim=True) / K[:, None]).where(q > 0, 0.0)
    new = floored(q + size * push, K)
    assert torch.allclose(new.sum(1), torch.ones(len(K)).double(), atol=1e-13)
    for row, k in zip(new, levels, strict=True):
        assert (row[k:] == 0).all()
        assert (row[:k] >= (1 - 0.73 ** (1 / len(levels))) / max(1, k - 1) - 1e-12).all() or k == 1


def test_a_table_above_the_floor_is_unchanged():
    q = double([0.5, 0.3, 0.2], [0.6, 0.4, 0.0])
    assert torch.allclose(floored(q, torch.tensor([3, 2])), q, atol=1e-15)


@pytest.mark.parametrize("n", [1, 3, 8])
def test_even_the_surest_table_explores(n):
    sure = floored(torch.eye(4).double()[:1].repeat(n, 1), torch.full((n,), 4))
    assert float(sure[:, 0].prod()) == pytest.approx(0.73)


def test_a_step_has_the_length_it_is_trusted_with_and_knows_no_order():
    q, g = table([4, 3, 4]), generator(3)
    chosen = torch.stack([torch.randint(k, (6,), generator=g) for k in (4, 3, 4)], 1)
    w, rate = torch.linspace(1, 0, 6).double() / 3, double(2.0, 0.3)
    path = 0.1 * torch.randn(3, 4, generator=g, dtype=torch.float64).where(q > 0, 0.0)
    new, path2, rate2 = category_step(q, path, rate, chosen, w)
    step = (new - q) / q.clamp(min=1e-9).sqrt()
    assert float(step.norm()) == pytest.approx(1 / 2.0) and new.sum(1).tolist() == pytest.approx([1, 1, 1])
    p = torch.tensor([2, 0, 1, 3])  # other positions, the same categories
    back = p.argsort()
    moved = chosen.clone()
    moved[:, [0, 2]] = back[chosen[:, [0, 2]]]
    rows = torch.tensor([0, 2])
    q_, path_ = q.clone(), path.clone()
    q_[rows], path_[rows] = q[rows][:, p], path[rows][:, p]
    new_, path2_, rate2_ = category_step(q_, path_, rate, moved, w)
    assert torch.allclose(new_[rows], new[rows][:, p]) and torch.allclose(path2_[rows], path2[rows][:, p])
    assert torch.allclose(rate2_, rate2)


def test_agreement_lengthens_steps_and_noise_shortens_them():
    def trust(choose):
        q, path, rate = double(*[0.25] * 4), torch.zeros(1, 4).double(), double(1.0, 0.0)
        q = q[None]
        for i in range(40):
            q, path, rate = category_step(q, path, rate, choose(i), double(0.5, 0.3, 0.2))
            q = floored(q, torch.tensor([4]))
        return float(rate[0])

    noise = generator(1)
    assert trust(lambda i: torch.tensor([[1], [1], [2]])) < 0.8
    assert trust(lambda i: torch.randint(4, (3, 1), generator=noise)) > 3.0


def test_when_all_choose_alike_from_a_sure_row_nothing_moves():
    q, path, rate = torch.ones(1, 1).double(), torch.zeros(1, 1).double(), double(1.0, 0.0)
    got = category_step(q, path, rate, torch.zeros(5, 1, dtype=torch.long), torch.ones(5).double() / 5)
    assert all(torch.equal(a, b) for a, b in zip(got, (q, path, rate), strict=True))


# a generation ----------------------------------------------------------------------------------------------------------

MANY = dict(r=Real(-5, 5), one=Integer(3, 3), two=Integer(0, 1), log=Integer(1, 500, log=True),
            size=Categorical(["s", "m", "l"], ordered=True), only=Categorical(["x"]),
            kind=Categorical(["a", "b", "c"]), only_b=Categorical(list("pqrst"), when={"kind": ["b"]}),
            n_c=Integer(-4, 4, when={"kind": ["c"]}))


def test_what_is_what():
    mix = mixed(Space(MANY))
    assert mix.numeric.tolist() == [0, 1, 2, 3, 4, 8] and mix.cells.tolist() == [2, 3, 4, 5]
    assert mix.low.tolist() == [0, 1, 0, -4] and mix.high.tolist() == [1, 500, 2, 4]
    assert mix.choices.tolist() == [5, 6, 7] and mix.levels.tolist() == [1, 3, 5]
    assert mixed(Box(-1, 1, 3)) is None and mixed(Space(a=Real(0, 1))) is None
    assert len(mixed(Space(a=Categorical(list("ab")))).numeric) == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_any_space_keeps_every_value_possible(dtype):
    space = Space(MANY).to(dtype=dtype)
    opt, mix = CMAES(space, seed=2, restarts=None), mixed(space)
    for _ in range(150):
        z = opt.ask()
        assert z.dtype == dtype and ((z >= 0) & (z <= 1)).all()
        opt.tell(z, ((z[:, [0, 2, 3, 4]] - 0.55) ** 2).sum(1).double() + (z[:, 6] - 0.5).abs())
    s = opt.state
    j, k = mix.numeric[mix.cells], mix.cells
    deviation = space.sigma0[j] * s.sigma * s.stretch[k] * s.C.diagonal()[k].sqrt()
    m = (space.x0[j] + space.sigma0[j] * s.m[k]).double()
    out = [sum(leaving(*map(float, v))) for v in zip(m, deviation, *cell(m, mix), strict=True)]
    assert min(out) >= 1 / (space.dim * opt.population) * (1 - 1e-4)
    assert torch.allclose(s.q.sum(1), torch.ones(3).double(), atol=1e-12)
    assert float(s.stretch.max()) > 1 and s.q.dtype == torch.float64
    assert opt.recommend().dtype == dtype and len(space.decode(opt.recommend())) == 1


def test_the_table_reads_what_was_drawn_not_the_middle_of_what_does_not_exist():
    "only_b exists in a third of the points; elsewhere z is exactly .5, its third category."
    space = Space(MANY)
    mix = mixed(space)
    opt = CMAES(space, seed=0, population=400, restarts=None)
    z = opt.ask()
    assert (z[:, 7] == 0.5).double().mean() > 0.5
    told = opt._block(0)
    drawn = torch.bincount((told["x"][:, 7] * 5).long(), minlength=5)
    assert drawn.max() < 120
    w = torch.ones(400).double() / 400
    s = with_margin(opt.state, told, w, mix)
    assert s.q[2].argmax() == drawn.argmax() and torch.allclose(
        (s.q[2] - 0.2).sign(), (drawn.double() / 400 - 0.2).sign())


def test_choices_are_drawn_as_probable_as_they_are():
    space = Space(a=Categorical(list("abcd")), b=Categorical(list("xy")))
    mix, opt = mixed(space), CMAES(space, seed=0)
    s = dataclasses.replace(opt.state, q=double([0.1, 0.2, 0.3, 0.4], [0.9, 0.1, 0.0, 0.0]))
    x = place(s, torch.zeros(20_000, 1).double(), generator(), mix)
    got = torch.bincount((x[:, 0] * 4).long(), minlength=4) / 20_000
    assert torch.allclose(got.double(), s.q[0], atol=0.015)
    assert float((x[:, 1] < 0.5).double().mean()) == pytest.approx(0.9, abs=0.01)
    assert [space.decode(believed(s, mix))[0][k] for k in "ab"] == ["d", "x"]


def test_beyond_the_bounds_is_the_outermost_value():
    "A mirror would fold it back onto the second one."
    space = Space(a=Integer(0, 9), r=Real(0, 1))
    opt, mix = CMAES(space, seed=0), mixed(space)
    u = double([-2.8, 0.0], [2.8, 0.0])
    assert [p["a"] for p in space.decode(place(opt.state, u, generator(), mix))] == [0, 9]


def test_a_constant_generation_moves_nothing():
    opt = CMAES(Space(MANY), seed=0)
    for y in (1.0, INF):
        before = opt.state
        opt.tell(z := opt.ask(), torch.full((len(z),), y))
        for name in (*mixed_start(opt.mixed), "m", "sigma", "C"):
            assert torch.equal(getattr(before, name), getattr(opt.state, name)), name


# runs ------------------------------------------------------------------------------------------------------------------

def collapsed(opt, z):
    "The optimiser, its distribution as narrow as if it were sure of the point z."
    s = opt.state
    m = ((double(*z) - opt.space.x0) / opt.space.sigma0)[opt.moved]
    opt._begin(opt.g, dataclasses.replace(s, m=m, sigma=double(1e-6)[0]))
    return opt


@pytest.mark.parametrize("start", [4, 0, 9])
def test_a_collapsed_integer_still_walks_three_cells(start):
    space = Space(a=Real(0, 1), n=Integer(0, 9), b=Real(0, 1))
    goal = start + 3 if start < 7 else start - 3

    def f(z): return ((10 * z[:, 1]).floor() - goal) ** 2 + 0.1 * (z[:, 0] - 0.5).abs() + 0.1 * (z[:, 2] - 0.5).abs()

    for seed in range(4):
        opt = collapsed(CMAES(space, seed=seed, restarts=None), (0.5, (start + 0.5) / 10, 0.5))
        assert run(opt, f, 1500, target=0.5) < INF
        run(opt, f, 300)
        assert space.decode(opt.recommend())[0]["n"] == goal


def test_one_member_in_so_many_coordinates_leaves_the_cell():
    space = Space(n=Integer(0, 9), a=Real(0, 1), b=Real(0, 1))
    opt = collapsed(CMAES(space, seed=0, restarts=None), (0.45, 0.5, 0.5))
    z = opt.ask()
    opt.tell(z, z[:, 1])
    s = opt.state
    m, deviation = space.x0[0] + space.sigma0[0] * s.m[0], space.sigma0[0] * s.sigma * s.stretch[0] * s.C[0, 0].sqrt()
    assert sum(leaving(float(m), float(deviation), 0.4, 0.5)) == pytest.approx(1 / (3 * opt.population), rel=1e-6)


def letters(choices, word):
    space = Space({f"c{i}": Categorical(choices) for i in range(8)})
    at = torch.tensor([choices.index(c) for c in word])
    return space, lambda z: ((5 * z).floor() != at).sum(1).double()


def test_the_order_of_categories_does_not_matter():
    "The same word with the choices listed in five different orders: solved every time, in similar time."
    orders = [list("abcde"), list("edcba"), list("cabed"), list("bdace"), list("deacb")]
    needed = [[run(CMAES(space, seed=seed, restarts=None), f, 1000, 0.0) for seed in range(6)]
              for space, f in (letters(o, "badecade") for o in orders)]
    means = [sum(n) / len(n) for n in needed]
    assert max(means) < 300 and max(means) < 2.5 * min(means)


def test_without_information_no_category_is_preferred():
    "Losses that say nothing: over many runs each position of the list is on top equally often."
    space, g = Space(a=Categorical(list("abcd")), b=Categorical(list("abcd"))), generator(5)
    tops = torch.zeros(4)
    for seed in range(60):
        opt = CMAES(space, seed=seed, restarts=None)
        run(opt, lambda z: torch.rand(len(z), generator=g), 60)
        tops += torch.bincount(opt.state.q.argmax(1), minlength=4)
    assert tops.sum() == 120 and tops.min() >= 15 and tops.max() <= 48  # 30 +- 4.7


def mixed_sphere():
    space = Space({f"x{i}": Real(-5, 5) for i in range(3)} | {f"k{i}": Integer(-10, 10) for i in range(3)}
                  | dict(c=Categorical(list("abcd"))))
    goal = double(1.3, -2.1, 0.4, 3, -4, 10)

    def f(z):
        v = torch.cat([10 * z[:, :3] - 5, (21 * z[:, 3:6]).floor() - 10], 1)
        return ((v - goal) ** 2).sum(1) + 5 * ((4 * z[:, 6]).floor() != 2)

    return space, f


@pytest.mark.parametrize("restarts", [None, "bipop"])
def test_mixed_spaces_are_solved(restarts):
    space, f = mixed_sphere()
    assert all(run(CMAES(space, seed=s, restarts=restarts), f, 2500, 1e-6) < INF for s in range(4))


def test_damped_for_noise_it_still_gets_close():
    space, f = mixed_sphere()
    assert all(run(CMAES(space, seed=s, noisy=True), f, 3000, 2.5) < INF for s in range(3))


def test_a_wide_integer_is_as_easy_as_a_real():
    space = Space({f"k{i}": Integer(-10_000, 10_000) for i in range(4)})
    def f(z): return (((20_001 * z).floor() - 10_000 - double(3123, -4567, 7, 900)) ** 2).sum(1)
    assert sum(run(CMAES(space, seed=s, restarts=None), f, 1500, 0.0) < INF for s in range(4)) >= 3


def test_saved_and_continued_bit_for_bit():
    space, f = mixed_sphere()
    a, b = CMAES(space, seed=1), CMAES(space, seed=1)
    run(a, f, 300)
    b.load_state_dict(a.state_dict())
    assert torch.equal(a.ask(), b.ask())
