"""What every method must do, whatever its idea: parametrised over METHODS, so that a new one is born under it."""
import io
import math
import random

import numpy as np
import pytest
import torch

from gfopt.optimizer import METHODS, Generational, generator, make_optimizer
from gfopt.space import Box, Categorical, Integer, Real, Space

ALL = sorted(METHODS)
MODEL = {"bo"}  # an ask costs milliseconds: shorter runs suffice
MIXED = Space(
    lr=Real(1e-4, 1.0, log=True),
    depth=Integer(1, 8),
    act=Categorical(["relu", "gelu", "silu"]),
    beta=Real(0.5, 0.99, when={"act": ["gelu"]}),
)


def make(method, space, seed=0, **kw):
    return make_optimizer(method, space, seed, **kw)


def bowl(z, at=0.3):
    return ((z - at) ** 2).sum(-1)


def steps(opt, n, f=bowl, order=None, size=None):
    "Run `n` asks of `size`, tell in `order`; return all points asked."
    asked = []
    for i in range(n):
        z = opt.ask(size)
        asked.append(z)
        rows = torch.arange(len(z)) if order is None else order(i, len(z))
        opt.tell(z[rows], f(z[rows]))
    return torch.cat(asked)


def few(method, many):
    return min(many, 3) if method in MODEL else many


def same_tree(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_tree(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same_tree, a, b))
    return a == b


@pytest.mark.parametrize("method", ALL)
@pytest.mark.parametrize("space", [Box(-5, 5, 3), Box(5, 15, 2), MIXED, [(0, 1)]], ids=["box", "off-centre", "mixed", "1d"])
def test_asked_points_are_inside_and_canonical(method, space):
    opt = make(method, space)
    for _ in range(few(method, 6)):
        z = opt.ask()
        assert z.shape[1] == opt.space.dim and z.dtype == opt.space.dtype
        assert ((z >= opt.space.low) & (z <= opt.space.high)).all()
        assert torch.equal(opt.space.canonical(z), z)
        opt.tell(z, bowl(z))


@pytest.mark.parametrize("method", ALL)
def test_ask_in_portions_gives_the_same_points(method):
    a, b = make(method, Box(-5, 5, 3)), make(method, Box(-5, 5, 3))
    whole = a.ask(23)
    parts = torch.cat([b.ask(n) for n in (1, 7, 2, 13)])
    assert torch.equal(whole, parts)


@pytest.mark.parametrize("method", ALL)
def test_order_of_tells_within_a_batch_leaves_no_trace(method):
    a, b = make(method, Box(-5, 5, 2)), make(method, Box(-5, 5, 2))
    shuffle = lambda i, n: torch.randperm(n, generator=generator("order", i))  # noqa: E731
    n = few(method, 6)
    assert torch.equal(steps(a, n), steps(b, n, order=shuffle))
    assert same_tree(a.best, b.best)


@pytest.mark.parametrize("method", ALL)
def test_seed_decides_everything_and_global_rng_is_untouched(method):
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    a = steps(make(method, MIXED, 7), few(method, 5))
    torch.manual_seed(123), np.random.seed(5), random.seed(9)
    b = steps(make(method, MIXED, 7), few(method, 5))
    assert torch.equal(a, b)
    torch.set_rng_state(states[0])
    np.random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    c = steps(make(method, MIXED, 8), few(method, 5))
    after = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    assert torch.equal(before[0], after[0]) and before[1:] == after[1:]
    assert not torch.equal(a, c)


@pytest.mark.parametrize("method", ALL)
def test_state_dict_continues_bit_equal_also_within_a_generation(method):
    def run(opt, i0, i1):
        out = []
        for i in range(i0, i1):
            z = opt.ask(3)
            out.append(z)
            keep = torch.arange(3) if i % 4 else torch.tensor([2, 0])  # sometimes one stays pending
            opt.tell(z[keep], bowl(z[keep]))
        return out

    n = few(method, 10)
    one = make(method, MIXED)
    straight = torch.cat(run(one, 0, 2 * n))
    first = make(method, MIXED)
    part = run(first, 0, n)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = make(method, MIXED, seed=99)
    second.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(torch.cat(part + run(second, n, 2 * n)), straight)
    assert same_tree(second.state_dict(), one.state_dict())


@pytest.mark.parametrize("method", ALL)
def test_replaying_recorded_asks_equals_asking(method):
    a, b = make(method, MIXED), make(method, MIXED)
    n = few(method, 20)
    for _ in range(n):
        z = a.ask(2)
        for row in z:
            b.assume_asked(row[None])
        for opt in (a, b):
            opt.tell(z[1:], bowl(z[1:]))
            opt.tell(z[:1], bowl(z[:1]))
    assert torch.equal(a.ask(2), b.ask(2))


@pytest.mark.parametrize("method", ALL)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_failures_are_survived(method, bad):
    opt = make(method, Box(-5, 5, 2))
    for _ in range(few(method, 12)):
        z = opt.ask()
        y = bowl(z)
        y[:: 3] = bad
        opt.tell(z, y)
    z = opt.ask()
    assert torch.isfinite(z).all() and (math.isfinite(opt.best[1]) or len(z) == 1)


@pytest.mark.parametrize("method", ALL)
def test_everything_failing_and_constant_objectives_leave_no_nan(method):
    for value in (math.nan, 3.0):
        opt = make(method, Box(-5, 5, 2))
        for _ in range(few(method, 15)):
            z = opt.ask()
            opt.tell(z, torch.full((len(z),), value))
        assert torch.isfinite(opt.ask()).all()
        assert opt.best[1] == (math.inf if math.isnan(value) else value)


@pytest.mark.parametrize("method", ALL)
def test_foreign_points_enter_best(method):
    opt = make(method, MIXED)
    z = opt.ask()
    opt.tell(z, bowl(z))
    good = opt.space.canonical(torch.full((1, 4), 0.301, dtype=torch.float64))
    opt.tell(good, [-1.0])
    assert opt.best[1] == -1.0 and torch.equal(opt.best[0], good[0])
    assert len(opt.pending_z) == 0
    opt.ask()


@pytest.mark.parametrize("method", ALL)
def test_bad_tells_are_named(method):
    opt = make(method, Box(-5, 5, 2))
    z = opt.ask(4)
    with pytest.raises(ValueError, match="y: 3 losses for 4 points"):
        opt.tell(z, [1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="outside the space"):
        opt.tell([[9.0, 0.0]], [1.0])
    with pytest.raises(ValueError, match="shape"):
        opt.tell([[1.0, 2.0, 3.0]], [1.0])
    with pytest.raises(TypeError, match="y:"):
        opt.tell(z, ["a", "b", "c", "d"])
    for n in (0, -1):
        with pytest.raises(ValueError, match="n:"):
            opt.ask(n)
    assert len(opt.pending_z) == 4  # nothing was lost by the refusals


@pytest.mark.parametrize("method", ALL)
def test_float32(method):
    opt = make(method, Box(-5, 5, 3, dtype=torch.float32))
    steps(opt, few(method, 4))
    assert opt.ask().dtype == torch.float32 and opt.best[0].dtype == torch.float32


@pytest.mark.parametrize("method", ALL)
@pytest.mark.parametrize("at", [0.3, 1.0, -1.0], ids=["inside", "edge", "corner"])
def test_finds_the_optimum_better_than_its_start(method, at):
    "Median over seeds: far below the loss of a random point, inside, on an edge and in a corner."
    target = torch.tensor([at, 0.2 if at == 1.0 else at], dtype=torch.float64)
    f = lambda z: ((z - target) ** 2).sum(-1)  # noqa: E731
    got = []
    for seed in range(1 if method in MODEL else 3):
        opt = make(method, Box(-1, 1, 2), seed)
        told = 0
        while told < (25 if method in MODEL else 400):
            z = opt.ask()
            opt.tell(z, f(z))
            told += len(z)
        got.append(opt.best[1])
    limit = 2e-2 if method in ("random", "sobol", "auto") or method in MODEL else 1e-3
    assert sorted(got)[len(got) // 2] < limit


@pytest.mark.parametrize("method", ALL)
def test_unbounded_box(method):
    opt = make(method, Box(-math.inf, math.inf, x0=[10.0, -10.0], sigma0=1.0))
    start = bowl(torch.tensor([10.0, -10.0])).item()
    steps(opt, few(method, 12))
    assert opt.best[1] < start


GENERATIONAL = [m for m in ALL if isinstance(make(m, Box(-1, 1, 2)), Generational)]


@pytest.mark.parametrize("method", GENERATIONAL)
def test_every_generation_moves_the_state(method):
    opt = make(method, Box(-5, 5, 3))
    before = opt.own_state()["state"]
    moved = set()
    for _ in range(4):
        z = opt.ask()
        opt.tell(z, bowl(z))
        after = opt.own_state()["state"]
        moved |= {k for k in after if isinstance(after[k], torch.Tensor) and not torch.equal(after[k], before[k])}
        before = after
    tensors = {k for k, v in before.items() if isinstance(v, torch.Tensor)}
    assert moved == tensors, f"never moved: {tensors - moved}"


@pytest.mark.parametrize("method", [m for m in GENERATIONAL if m != "auto"])
def test_smallest_population(method):
    for population in (1, 2, 3, 4, 5):
        try:
            opt = make(method, Box(-5, 5, 2), population=population)
        except ValueError as e:
            assert "population" in str(e) and str(population) in str(e)
            continue
        assert torch.isfinite(steps(opt, 8)).all()


@pytest.mark.parametrize("method", GENERATIONAL)
def test_late_outcomes_of_an_old_generation_do_not_move_the_state(method):
    opt = make(method, Box(-5, 5, 2))
    z = opt.ask(opt.population + 5)
    opt.tell(z[5:], bowl(z[5:]))
    assert opt.g == 1
    before = opt.own_state()
    opt.tell(z[:5], torch.full((5,), -1.0))
    assert same_tree(before, opt.own_state()) and opt.best[1] == -1.0


@pytest.mark.parametrize("method", ALL)
def test_unknown_settings_are_refused(method):
    with pytest.raises(TypeError, match="no setting 'speed'"):
        make(method, Box(-1, 1, 2), speed=3)
