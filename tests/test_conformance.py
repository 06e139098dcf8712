"""What every method must do, whatever its idea: parametrised over METHODS, so that a new one is born under it."""
import io
import math
import random
import warnings

import numpy as np
import pytest
import torch
from searching import MIXED

from gfopt.optimizer import METHODS, Generational, Optimizer, generator, make_optimizer
from gfopt.space import Box
from gfopt.study import minimize

ALL = sorted(METHODS)
MODEL = {"bo", "turbo"}  # an ask costs milliseconds: shorter runs suffice
WATCHFUL = MODEL | {"tpe"}  # a point depends on what is pending


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


# ---------------------------------------------------------------- asks and tells in every shape
@pytest.mark.parametrize("method", ALL)
def test_several_asks_of_any_size_before_tells_in_part_and_out_of_order(method):
    "Whoever asks 1, then 5, then 2 and tells them mixed loses no row and leaves nothing pending."
    opt, rounds = make(method, MIXED), few(method, 8)
    told = []
    for i in range(rounds):
        z = torch.cat([opt.ask(n) for n in (1, 5, 2)])
        order = torch.randperm(8, generator=generator("mixed", i))
        for rows in order.split(3):
            opt.tell(z[rows], bowl(z[rows]))
            told += bowl(z[rows]).tolist()
    assert len(opt.pending_z) == 0 and opt.best[1] == min(told)


@pytest.mark.parametrize("method", ALL)
def test_an_asked_tensor_may_be_written_to(method):
    "A small ask is a copy: what the caller does to it is the caller's business."
    a, b = make(method, Box(-5, 5, 2)), make(method, Box(-5, 5, 2))
    for _ in range(few(method, 4)):
        za, zb = a.ask(), b.ask()
        assert torch.equal(za, zb)
        keep = za.clone()
        za.mul_(3.0)
        a.tell(keep, bowl(keep))
        b.tell(zb, bowl(zb))


@pytest.mark.parametrize("method", [m for m in ALL if m not in WATCHFUL and m != "auto"])
def test_a_large_ask_is_matched_without_a_copy_and_refused_when_written_to(method, monkeypatch):
    monkeypatch.setattr(Optimizer, "copies_up_to", 0)
    a, b = make(method, Box(-5, 5, 2)), make(method, Box(-5, 5, 2))
    for _ in range(4):
        za, zb = a.ask(8), b.ask(8)
        a.tell(za, bowl(za))
        b.tell(zb.clone(), bowl(zb))
    assert torch.equal(a.ask(8), b.ask(8))
    z = a.ask(8)
    z += 0.01
    with pytest.raises((RuntimeError, ValueError), match="z:"):
        a.tell(z.clamp(-5, 5), bowl(z))
        a.tell(z, bowl(z))


@pytest.mark.parametrize("method", ALL)
def test_violated_points_are_never_best(method):
    opt = make(method, Box(-5, 5, 2))
    for _ in range(few(method, 10)):
        z = opt.ask()
        opt.tell(z, z[:, 0], violations=(1.0 - z[:, :1]).clamp(min=0))  # only z0 >= 1 is allowed
    assert opt.best[0] is None or opt.best[0][0] >= 1


# ---------------------------------------------------------------- where and how the problem lies
def points(method, low, high, f, n=40, **kw):
    opt, out = make(method, Box(low, high, 3), **kw), []
    while sum(map(len, out)) < few(method, n):
        z = opt.ask()
        out.append(z)
        opt.tell(z, f(z))
    return torch.cat(out)


TILTED = torch.tensor([[0.8, 0.6, 0.0], [-0.6, 0.8, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)


@pytest.mark.parametrize("method", ALL)
def test_moved_and_stretched_problems_are_searched_alike(method):
    "Box [5, 15] or [-50, 50] with the objective moved along: the same points, moved, up to rounding."
    plain = points(method, -5, 5, bowl)
    moved = points(method, 5, 15, lambda z: bowl(z - 10))
    wide = points(method, -50, 50, lambda z: bowl(z / 10))
    n = 12 if method in MODEL | {"auto"} else len(plain)
    torch.testing.assert_close(moved[:n] - 10, plain[:n], rtol=0, atol=1e-6)
    torch.testing.assert_close(wide[:n] / 10, plain[:n], rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", [m for m in ALL if m not in WATCHFUL | {"random", "sobol", "auto"}])
@pytest.mark.parametrize("where", ["plain", "moved", "rotated"])
def test_solves_the_ellipsoid_wherever_it_lies(method, where):
    "Condition 100 in three dimensions: a thousandth of the start's loss within 3000 evaluations."
    scale, at = torch.tensor([1.0, 10.0, 100.0], dtype=torch.float64), 10.0 if where == "moved" else 0.0
    R = TILTED if where == "rotated" else torch.eye(3, dtype=torch.float64)
    f = lambda z: (scale * ((z - at - 1) @ R.T) ** 2).sum(-1)  # noqa: E731
    got = []
    for seed in range(3):
        opt, told = make(method, Box(at - 5, at + 5, 3), seed), 0
        first = None
        while told < 3000:
            z = opt.ask()
            y = f(z)
            first = y.median().item() if first is None else first
            opt.tell(z, y)
            told += len(z)
        got.append(opt.best[1] / first)
    assert sorted(got)[1] < 1e-3


@pytest.mark.parametrize("method", [m for m in GENERATIONAL if m != "auto"])
def test_only_the_order_of_losses_decides(method):
    "10 y + 1000 changes no bit; the losses are whole numbers, so that the map loses none."
    whole = lambda z: (1e6 * bowl(z)).floor()  # noqa: E731
    a = steps(make(method, Box(-5, 5, 3)), 12, whole)
    b = steps(make(method, Box(-5, 5, 3)), 12, lambda z: 10 * whole(z) + 1000)
    assert torch.equal(a, b)


# ---------------------------------------------------------------- through minimize and its journal
def through(method, budget=24, sign=1, **kw):
    f = lambda x: sign * float(((x - 1) ** 2).sum())  # noqa: E731
    return minimize(f, Box(-5, 5, 2), method, budget, progress=False, **kw)


@pytest.mark.parametrize("method", ALL)
def test_minimise_and_maximise_ask_the_same_points(method):
    budget = 15 if method in MODEL | {"auto"} else 24
    a, b = through(method, budget), through(method, budget, sign=-1, maximize=True)
    assert np.array_equal(a.x_iters, b.x_iters) and np.array_equal(a.func_vals, -b.func_vals)


@pytest.mark.parametrize("method", [m for m in ALL if m not in WATCHFUL | {"auto"}])
def test_workers_and_batches_ask_the_same_points(method):
    one = through(method)
    assert np.array_equal(one.x_iters, through(method, workers=3).x_iters)
    batch = minimize(lambda z: ((z - 1) ** 2).sum(1), Box(-5, 5, 2), method, 24, batched=True, progress=False)
    n = min(len(batch.x_iters), 24)
    assert np.array_equal(one.x_iters[:n], batch.x_iters[:n])


@pytest.mark.parametrize("method", ALL)
def test_a_journal_cut_anywhere_is_continued_to_the_same_end(method, tmp_path):
    "What kill -9 leaves: the first k lines and half of the next one."
    whole, slow = tmp_path / "whole.jsonl", method in MODEL | {"auto"}
    budget = 16 if slow else 24
    through(method, budget, journal=whole)
    lines = whole.read_bytes().splitlines(keepends=True)
    for k in (25,) if slow else (2, 15, 30):
        cut = tmp_path / f"{k}.jsonl"
        cut.write_bytes(b"".join(lines[:k]) + lines[k][: len(lines[k]) // 2])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the torn line is announced
            through(method, budget, journal=cut)
        assert cut.read_bytes() == whole.read_bytes()


# ---------------------------------------------------------------- one dimension, one GPU
@pytest.mark.parametrize("method", [m for m in ALL if m not in ("random", "sobol")])
def test_one_dimension_is_solved(method):
    opt, told = make(method, Box(-5, 5, 1)), 0
    while told < (15 if method in MODEL else 600):
        z = opt.ask()
        opt.tell(z, (z[:, 0] - 1.234) ** 2)
        told += len(z)
    assert opt.best[1] < (1e-2 if method in MODEL | {"auto"} else 1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("method", [m for m in ALL if m not in MODEL | {"auto"}])
def test_on_a_gpu(method):
    opt = make(method, Box(-5, 5, 3, device="cuda"))
    start = steps(opt, 1)
    steps(opt, 20)
    assert start.is_cuda and opt.best[0].is_cuda and opt.best[1] < bowl(start).min()
