"""probe against functions whose slope, noise, curvature and best steps are known, and everything it must leave alone."""
import copy
import math
import random

import numpy as np
import pytest
import torch
from torch import nn

from gfopt.lm import noise as noises
from gfopt.lm.evolution import LowRankES
from gfopt.lm.noise import signs
from gfopt.lm.probe import (
    Report,
    effective_dimension,
    fit_slope_error,
    moved_share,
    parabola,
    probe,
    rounding_gain,
    sign_right,
    signal_and_noise,
    slope_error,
)
from gfopt.lm.zeroth_order import ZerothOrder, rng_states


def normals(shape, seed=0, **where):
    return noises.normals(shape, seed=seed, **where)


def near(a, b, factor):
    return b / factor <= a <= b * factor


def parameter(values, dtype=torch.float64):
    return nn.Parameter(torch.as_tensor(values, dtype=dtype).clone())


def bowl(d=60, seed=0):
    "A Hessian without a preferred basis, eigenvalues 1, 1/2, 1/3, ..."
    Q = torch.linalg.qr(normals((d, d), seed=seed, dtype=torch.float64))[0]
    return Q @ torch.diag(1 / torch.arange(1.0, d + 1).double()) @ Q.T


class Net(nn.Module):
    "Dropout, a buffer that training mode changes, tied weights."

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.embed, self.head = nn.Embedding(20, 16), nn.Linear(16, 20, bias=False)
        self.a, self.norm, self.drop = nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Dropout(0.5)
        self.head.weight = self.embed.weight
        with torch.no_grad():
            for name, p in self.named_parameters():
                p.copy_(0.3 * normals(p.shape, tensor=name))
        self.to(dtype)
        self.drop.eval()  # one flag differs from the others

    def forward(self, ids):
        return self.head(self.drop(torch.tanh(self.a(self.norm(self.embed(ids))))))


IDS = torch.arange(40) % 20


def loss_of(model, ids=IDS):
    return nn.functional.cross_entropy(model(ids).float(), (ids * 7) % 20)


class Rows(nn.Module):
    "A model of rows, for populations."

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.w, self.b = nn.Linear(8, 16), nn.Linear(16, 8, bias=False)
        with torch.no_grad():
            for name, p in self.named_parameters():
                p.copy_(0.3 * normals(p.shape, tensor=name))
        self.to(dtype)

    def forward(self, x):
        return self.b(torch.tanh(self.w(x)))


X = normals((4, 3, 8), seed=5)


def row_loss(model, x):
    return (model(x.to(next(model.parameters()).dtype)).float() - 1).square().mean((1, 2))


def snapshot(opt, model):
    params = [p for g in opt.param_groups for p in g["params"]]
    return dict(
        weights=[p.detach().clone() for p in params], pointers=[p.data_ptr() for p in params],
        buffers={k: b.clone() for k, b in model.named_buffers()}, flags=[m.training for m in model.modules()],
        groups=[{k: v for k, v in g.items() if k != "params"} for g in opt.param_groups], steps=opt.steps,
        attributes=sorted(vars(opt)), state={i: {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in opt.state[p].items()} for i, p in enumerate(params) if p in opt.state},
        rng=rng_states())


def equal(a, b):
    if isinstance(a, torch.Tensor):
        a, b = (t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
        return torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return (a == b).all()
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def assert_same(before, opt, model):
    after = snapshot(opt, model)
    assert [k for k in before if not equal(before[k], after[k])] == []


# --- the formulas ----------------------------------------------------------------------------------------


def test_error_of_a_slope_is_the_formula():
    for eps, s, tau in ((1e-3, 1e-7, 4.0), (0.5, 0.1, 0.0), (2.0, 0.0, 3.0)):
        assert slope_error(eps, s, tau) == pytest.approx(((tau * eps * eps / 6) ** 2 + (s / eps) ** 2 / 2) ** 0.5)


@pytest.mark.parametrize("s, tau", [(1e-7, 3.0), (1e-3, 0.2), (1e-5, 100.0)])
def test_constants_of_the_error_are_found(s, tau):
    eps = torch.logspace(-6, 0, 9, dtype=torch.float64)
    found = []
    for seed in range(12):
        a, t = normals((2, 3), seed=seed, dtype=torch.float64)
        n = normals((9, 3), seed=seed, step=1, dtype=torch.float64) / 2**0.5
        found.append(fit_slope_error(eps, a + tau * t * eps[:, None] ** 2 / 6 + s * n / eps[:, None], floor=s / 1000))
    noise, third = (torch.tensor(v).log().mean().exp() for v in zip(*found))
    assert near(noise, s, 1.3) and near(third, tau, 1.4)
    assert all(near((3 * a / b) ** (1 / 3), (3 * s / tau) ** (1 / 3), 3) for a, b in found)


def test_a_ladder_of_equal_losses_does_not_look_exact():
    # on the low rungs both losses are the same number, and all slopes a perfect zero
    eps = 10.0 ** torch.arange(-8, 0).double()
    up, down = (((1 + v + v**3) * 2**20).round() / 2**20 for v in (0.3 * eps, -0.3 * eps))
    noise, third = fit_slope_error(eps, ((up - down) / (2 * eps))[:, None].expand(8, 2), floor=2**-20 / 12**0.5)
    assert slope_error(1e-8, noise, 0.0) > 0.3 and near(third, 6 * 0.3**3, 3)


def test_a_destroyed_model_ends_the_ladder():
    eps = 10.0 ** torch.arange(-6, 3).double()
    a, t = normals((2, 3), dtype=torch.float64)
    slopes = a + t * eps[:, None] ** 2 / 6 + 1e-7 * normals((9, 3), step=1, dtype=torch.float64) / eps[:, None]
    good = fit_slope_error(eps, slopes, 1e-9)
    slopes[-2:] = math.nan
    assert near(fit_slope_error(eps, slopes, 1e-9)[1], good[1], 3)


def test_signal_and_noise_of_a_table():
    D = 2 * normals((30_000, 1), dtype=torch.float64) + normals((30_000, 4), step=1, dtype=torch.float64)
    signal, noise = signal_and_noise(D)
    assert near(signal, 4, 1.03) and near(noise, 1, 1.03)
    assert near(float(((D[:, 0] > 0) == (D.mean(1) > 0)).double().mean()), 0.87, 1.1)
    assert signal_and_noise(torch.tensor([[1.0, -1.0], [2.0, -2.0]]))[0] == 0


def test_sign_right_at_its_ends():
    assert sign_right(1, 0) == 1 and sign_right(0, 1) == 0.5 and sign_right(1, 1) == pytest.approx(0.75)


@pytest.mark.parametrize("d, k", [(300, 300), (300, 20)])
def test_effective_dimension_counts_equal_eigenvalues(d, k):
    Q = torch.linalg.qr(normals((d, d), dtype=torch.float64))[0][:, :k]
    Z = normals((4000, d), step=1, dtype=torch.float64)
    assert near(effective_dimension((Z @ Q).square().sum(1)), k, 1.15)
    assert effective_dimension(torch.full((8,), 3.0)) == math.inf


def test_parabola():
    lr = torch.tensor([1.0, 2.0, 5.0, 12.0], dtype=torch.float64)
    assert parabola(lr, -3 * lr + 0.25 * lr**2) == pytest.approx((6.0, 12.0))
    assert parabola(lr, -lr) == (12.0, 12.0)  # as far as was tried
    assert all(map(math.isnan, parabola(lr, lr)))
    best, high = parabola(lr, torch.tensor([-1.0, -2.0, math.nan, math.nan], dtype=torch.float64))
    assert 1 <= best <= high


def test_shares_of_bf16_weights():
    w = torch.full((1000,), 0.02, dtype=torch.bfloat16)  # neighbours 2**-13 away
    w[500:] = 2.0  # 2**-6 away
    assert rounding_gain(w, 2.0**-13).tolist() == [1.0] * 500 + [0.0] * 500
    assert [moved_share(w, v) for v in (2.0**-5, 2.0**-13, 2.0**-15, 0.0)] == [1, 0.5, 0, 0]
    assert moved_share(w.float(), 2.0**-20) == 1


# --- the probe where everything is known -----------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_quadratic(seed):
    H, w = bowl(), parameter(torch.ones(60))
    opt = ZerothOrder([("w", w)], lr=0.1, seed=seed)
    r = probe(opt, lambda: w @ H @ w / 2, directions=32)
    g, tr = (H @ w.detach()).norm(), H.trace()
    assert near(r.slope, g, 1.5) and near(r.curvature, tr, 1.15) and near(r.lr_best, 0.5 / tr, 1.4) and near(r.lr_high, 2 / tr, 1.4)
    assert near(r.effective_dimension, tr**2 / (H.square().sum() - H.diag().square().sum()), 2.5)  # signs do not see the diagonal
    assert r.loss == pytest.approx(float(w.detach() @ H @ w.detach() / 2)) and r.sign_right > 0.999 and r.directions_needed < 1.001
    assert r.eps_high == pytest.approx(2.0) and r.warnings == ()  # no third derivative: as far as was tried


def test_a_learning_rate_for_every_seed():
    # slopes along the trial steps may happen to be small, and the first trial far too long
    H, found = bowl(), []
    for seed in range(12):
        w = parameter(torch.ones(60))
        mask = (normals(60, seed=seed) > 0.5)
        opt = ZerothOrder([("w", w)], lr=1e-3, seed=seed, mask=lambda n, p, mask=mask: mask)
        found.append(probe(opt, lambda w=w: w @ H @ w / 2, directions=4).lr_best * 2 * float(H.diag()[mask].sum()))
    assert all(near(v, 1, 3) for v in found) and near(float(np.median(found)), 1, 1.2)


@pytest.mark.parametrize("settings", [dict(momentum=0.9), dict(optimizer="adam")])
def test_steps_are_measured_from_moments_at_rest(settings):  # not one from those that the trial before it has left
    H, deltas = bowl(40), []
    for known in (False, True):
        w = parameter(torch.ones(40))
        opt = ZerothOrder([("w", w)], lr=1e-3, **settings)
        if known: opt.state[w].update(dict(momentum=torch.zeros_like(w)) if "momentum" in settings else dict(moves=0, exp_avg=torch.zeros_like(w), exp_avg_sq=torch.zeros_like(w)))
        r = probe(opt, lambda: w @ H @ w / 2, directions=8)
        deltas.append((r.lr_best, r.trials))
        assert not any(v.any() for s in opt.state.values() for v in s.values() if isinstance(v, torch.Tensor)) and len(opt.state) == known
    assert deltas[0] == deltas[1]


@pytest.mark.parametrize("q", [1, 4])
def test_more_directions_take_longer_steps(q):
    H, w = bowl(400), parameter(normals(400, seed=3))
    r = probe(ZerothOrder([("w", w)], lr=1e-3, directions=q), lambda: w @ H @ w / 2, directions=16)
    g, tr = H @ w.detach(), H.trace()
    best = g @ g / (tr * (g @ g) / q + (1 - 1 / q) * g @ H @ g)  # expectation of Eq. (4.5.5) for a mean of q slopes
    assert near(r.lr_best, best / 2, 2.0)


@pytest.mark.parametrize("power", [3, 4])
def test_recommended_eps_is_within_three_of_the_best(power):
    ratios = []
    for seed in range(5):
        w = parameter(torch.linspace(-1, 2, 60), torch.float32)
        def loss(x): return (x.abs() ** power).sum() / 60
        opt = ZerothOrder([("w", w)], lr=1e-6, seed=seed)
        r = probe(opt, lambda w=w: loss(w))
        Z = signs(60, seed=seed, pair=range(64), tensor="w")
        exact, fine = Z.double() @ torch.func.grad(loss)(w.detach().double()), torch.logspace(-5, 0.5, 56)
        def off(e, Z=Z, exact=exact, w=w):
            up, down = (torch.func.vmap(loss)(w.detach() + s * e * Z) for s in (1, -1))
            return float((((up - down).double() / (2 * e)) - exact).square().mean().sqrt())
        errors = [off(e) for e in fine.tolist()]
        ratios.append(r.eps_best / float(fine[np.argmin(errors)]))
        A = float(exact.square().mean().sqrt())
        assert off(r.eps_best) < 0.05 * A and off(r.eps_high / 2) < A / 3 and off(4 * r.eps_high) > A / 3
    assert all(1 / 4 < v < 4 for v in ratios) and near(math.exp(np.mean(np.log(ratios))), 1, 2.5)


def test_noise_between_batches():
    g, xi = normals(50, seed=1, dtype=torch.float64), 2 * normals((6, 50), seed=2, dtype=torch.float64)
    w = parameter(torch.zeros(50))
    r = probe(ZerothOrder([("w", w)], lr=1e-3), [lambda x=x: (g + x) @ w + 5 * w @ w for x in xi], directions=200)
    mean = g + xi.mean(0)
    S2, N2 = mean @ mean, (xi - xi.mean(0)).square().sum() / 5
    assert near(r.signal**2, S2 - N2 / 6, 1.5) and near(r.batch_noise**2, N2, 1.2)
    assert near(r.directions_needed, 1 + N2 / (S2 - N2 / 6), 1.5) and np.array(r.slopes).shape == (200, 6)
    one = probe(ZerothOrder([("w", w)], lr=1e-3), lambda: (g + xi[0]) @ w + 5 * w @ w, directions=20)
    assert math.isnan(one.batch_noise) and r.lr_best < 0.6 * one.lr_best  # the batch's step is fitted to the batch


def test_batches_from_the_global_generator_are_drawn_and_put_back():
    w, state = parameter(torch.ones(20)), torch.get_rng_state()
    def closure():
        x = torch.randn(20, dtype=torch.float64) + 1
        return x @ w + w @ w
    r = probe(ZerothOrder([("w", w)], lr=1e-3), closure, directions=20)
    assert len(r.slopes[0]) == 3 and near(r.batch_noise, 20**0.5, 2) and torch.equal(state, torch.get_rng_state())
    assert not any("Two calls" in s for s in r.warnings)


def test_a_batch_of_its_own_for_each_side_is_noticed():
    w, g = parameter(torch.ones(20)), torch.Generator().manual_seed(0)
    def closure(): return 0.1 * w.square().sum() + torch.rand((), generator=g, dtype=torch.float64)
    r = probe(ZerothOrder([("w", w)], lr=1e-3), closure)
    assert any(s.startswith("Two calls at the same weights differ") for s in r.warnings) and r.noise > 0.05


@pytest.mark.parametrize("s", [1e-4, 1e-2])
def test_noise_of_the_loss_is_measured(s):
    w, count = parameter(torch.ones(30)), iter(range(10_000))
    def closure(): return w.square().sum() + (w**3).sum() + s * float(normals(1, seed=next(count))[0])
    r = probe(ZerothOrder([("w", w)], lr=1e-3), closure)
    assert near(r.noise, s, 2)
    drowned = probe(ZerothOrder([("w", w)], lr=1e-3, eps=s / 2000), closure)
    assert near(drowned.directions_needed, 1 + (drowned.noise * 2000 / s) ** 2 / 2 / drowned.slope**2, 1.1) and drowned.directions_needed > 100
    assert any("lost in rounding" in v for v in drowned.warnings) and drowned.sign_right < 0.6


def test_one_sided_differences_suffer_from_curvature():
    H, w = bowl(), parameter(torch.ones(60))
    def loss(): return w @ H @ w / 2
    two, one = (probe(ZerothOrder([("w", w)], lr=1e-3, sides=k, directions=4), loss) for k in (2, 1))
    A = (H @ w.detach()).norm()
    assert near(one.eps_high, 2 / 3 * A / H.trace(), 2) and one.eps_high < two.eps_high


def test_groups_keep_the_ratio_of_their_steps():
    a, b = parameter(torch.ones(10)), parameter(torch.ones(10))
    opt = ZerothOrder([dict(params=[("a", a)]), dict(params=[("b", b)], eps=1e-2, lr=1e-2)], lr=1e-3)
    seen = []
    def closure():
        seen.append((float((a.detach() - 1).abs().max()), float((b.detach() - 1).abs().max())))
        return a.square().sum() + b.square().sum()
    probe(opt, closure)
    moved = [(x, y) for x, y in seen if x > 1e-12]
    assert moved and all(y / x == pytest.approx(10, rel=1e-3) for x, y in moved[:30])


# --- low precision ---------------------------------------------------------------------------------------


def test_bf16_band_begins_at_the_spacing_of_the_weights():
    w = parameter(torch.full((4096,), 0.02), torch.bfloat16)
    opt = ZerothOrder([("w", w)], lr=1e-3, eps=1e-5)
    r = probe(opt, lambda: w.float().square().sum())
    assert 2.0**-15 < r.eps_low < 2.0**-12
    assert any("lost in rounding" in s for s in r.warnings) and "bfloat16" in str(r)
    fine = probe(ZerothOrder([("w", parameter(w.detach(), torch.float32))], lr=1e-3, eps=1e-5), lambda: w.float().square().sum())
    assert fine.eps_low != fine.eps_low or fine.warnings  # its closure reads other weights


def test_bf16_share_of_moved_weights():
    w = parameter(torch.full((4096,), 1.0), torch.bfloat16)  # below 1 the neighbours are 2**-8 away
    opt = ZerothOrder([("w", w)], lr=1e-9, eps=2.0**-6)
    r = probe(opt, lambda: w.float().square().sum())
    assert r.moved < 0.05 and r.moved_nearest == 0
    long = probe(ZerothOrder([("w", w)], lr=1.0, eps=2.0**-6), lambda: w.float().square().sum())
    assert long.moved > 0.9 and long.moved_nearest == 1 and any("too long" in s for s in long.warnings)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_step_lost_in_rounding_still_gives_a_learning_rate(dtype):
    H, w = bowl().to(torch.float32), parameter(0.5 * torch.ones(60), dtype)
    r = probe(ZerothOrder([("w", w)], lr=1e-12, eps=0.05), lambda: w.float() @ H @ w.float() / 2, directions=16)
    assert near(r.lr_best, 0.5 / H.trace(), 3) and any("is short" in s for s in r.warnings)


# --- what it leaves alone --------------------------------------------------------------------------------

MAKERS = {
    "plain": lambda m: ZerothOrder(m, lr=1e-2),
    "momentum": lambda m: ZerothOrder(m, lr=1e-2, momentum=0.9, normalize=0.9),
    "adam": lambda m: ZerothOrder(m, lr=1e-2, optimizer="adam"),
    "master": lambda m: ZerothOrder(m.to(torch.bfloat16), lr=1e-2, master=True),
    "bf16": lambda m: ZerothOrder(m.to(torch.bfloat16), lr=1e-2),
}


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("steps", [0, 2])
def test_everything_is_as_before(name, steps):
    model = Net().train()
    model.drop.eval()
    opt = MAKERS[name](model)
    for _ in range(steps): opt.step(lambda: loss_of(model))
    scheduler = torch.optim.lr_scheduler.LambdaLR(opt, lambda t: 1.0) if name == "plain" else None
    before, twin = snapshot(opt, model), copy.deepcopy(model)
    report = probe(opt, lambda: loss_of(model))
    assert_same(before, opt, model)
    assert report.forwards < 130 and report.slope > 0 and scheduler is not opt
    with torch.no_grad():
        for p, q in zip(model.parameters(), twin.parameters()): assert torch.equal(p, q)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "clipup"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_everything_is_as_before_population(optimizer, dtype):
    model = Rows(dtype).train()
    es = LowRankES(model, population=16, sigma=1e-2, lr=1e-2, optimizer=optimizer)
    for _ in range(2): es.step(lambda: row_loss(model, es.expand(X)))
    before = snapshot(es, model)
    report = probe(es, lambda: row_loss(model, es.expand(X)))
    assert_same(before, es, model)
    assert report.kind == "LowRankES" and report.slope > 0 and report.lr_best > 0


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_everything_is_as_before_after_an_exception(error):
    model = Net().train()
    opt = ZerothOrder(model, lr=1e-2, momentum=0.5)
    opt.step(lambda: loss_of(model))
    total, before = probe(opt, lambda: loss_of(model)).forwards, snapshot(opt, model)
    for stop in range(0, total, 3):
        calls = iter(range(total))
        def closure(calls=calls, stop=stop):
            model.train(), model.norm.running_mean.add_(1), torch.rand(1), np.random.rand(), random.random()
            if next(calls) == stop: raise error("stop")
            return loss_of(model)
        with pytest.raises(error, match="stop"): probe(opt, closure)
        assert_same(before, opt, model)


def test_training_goes_on_as_if_nothing_had_been_probed():
    curves = []
    for look in (False, True):
        model = Net().train()
        opt = ZerothOrder(model, lr=1e-2, momentum=0.9, normalize=0.9)
        curve = []
        for step in range(6):
            if look and step in (0, 3): probe(opt, lambda model=model: loss_of(model))
            curve.append(opt.step(lambda model=model: loss_of(model)))
        curves.append(curve)
    assert curves[0] == curves[1]


def test_masters_are_not_made_early():
    # a float32 copy from before the probe would overwrite weights that were loaded after it
    model = Net(torch.bfloat16)
    opt = ZerothOrder(model, lr=1e-3, master=True)
    probe(opt, lambda: loss_of(model))
    with torch.no_grad():
        for p in model.parameters(): p.add_(1.0)
    start = [p.detach().clone() for p in model.parameters()]
    opt.step(lambda: loss_of(model))
    assert all((p - q).abs().max() < 0.5 for p, q in zip(model.parameters(), start))


def test_eval_mode_and_dropout_off():
    model = Net().train()
    flags = []
    def closure():
        flags.append(any(m.training for m in model.modules()))
        return loss_of(model)
    assert probe(model, closure).sign_right > 0.9 and not any(flags)


# --- a population ----------------------------------------------------------------------------------------


def test_population_agrees_with_members_one_by_one():
    model = Rows()
    es = LowRankES(model, population=16, sigma=1e-2, lr=1e-2)
    batched = probe(es, lambda: row_loss(model, es.expand(X)))
    es.sequential = True
    alone = probe(es, lambda: row_loss(model, es.expand(X)))
    assert np.allclose(batched.slopes, alone.slopes, rtol=1e-2, atol=1e-4) and near(alone.curvature, batched.curvature, 1.05)
    assert near(alone.lr_best, batched.lr_best, 1.2)


def test_population_slope_is_the_gradient_s_length():
    model = Rows()
    es = LowRankES(model, population=400, chunk=100, sigma=1e-3, lr=1e-2)
    r = probe(es, lambda: row_loss(model, es.expand(X)), directions=200)
    g = torch.autograd.grad(row_loss(model, X).mean(), list(model.parameters()))
    assert near(r.slope, sum(float(v.square().sum()) for v in g) ** 0.5, 1.25)


def test_pairs_with_rows_of_their_own():
    model, rows = Rows(), normals((16, 3, 8), seed=6)
    es = LowRankES(model, population=16, sigma=1e-2, lr=1e-2)
    r = probe(es, lambda: row_loss(model, es.deal(rows)))
    assert r.warnings == () and r.lr_best > 0 and r.eps_low < 1e-2 < r.eps_high
    assert r.loss == pytest.approx(float(row_loss(model, rows).mean().detach()), rel=1e-5)
    for lr, change in r.trials[:3]:  # a real step of that length, on all rows
        twin = copy.deepcopy(model)
        real = LowRankES(twin, population=16, sigma=1e-2, lr=lr)
        real.step(lambda twin=twin, real=real: row_loss(twin, real.deal(rows)))
        assert change == pytest.approx(float((row_loss(twin, rows) - row_loss(model, rows)).mean().detach()), rel=0.02)


def test_a_model_without_a_batch_goes_one_by_one():
    class Odd(Rows):
        def forward(self, x): return super().forward(x) * float(self.b.weight[0, 0])
    model = Odd()
    es = LowRankES(model, population=8, sigma=1e-2, lr=1e-2)
    r = probe(es, lambda: row_loss(model, es.expand(X)))
    assert r.slope > 0 and any("One member at a time" in s for s in r.warnings) and not es.sequential


def test_batched_zeroth_order():
    model = Rows()
    plain, batched = ZerothOrder(model, lr=1e-2, directions=4), ZerothOrder(model, lr=1e-2, directions=4, batched=True)
    a = probe(plain, lambda: row_loss(model, X).mean())
    b = probe(batched, lambda: row_loss(model, batched.expand(X)))
    assert np.allclose(a.slopes, b.slopes, rtol=1e-4) and near(b.lr_best, a.lr_best, 1.1) and b.warnings == a.warnings


# --- words -----------------------------------------------------------------------------------------------


def test_report_reads_well():
    model = Net()
    r = probe(ZerothOrder(model, lr=1e-2), lambda: loss_of(model))
    lines = str(r).splitlines()
    assert 11 <= len(lines) <= 16 and all(len(line) < 120 for line in lines) and "nan" not in str(r) and repr(r) == str(r)
    assert len({line[:18].rstrip() for line in lines[1:11]}) == 10 and all(line[17] == " " and line[18] != " " for line in lines[1:11])
    with pytest.raises(AttributeError): r.slope = 1.0
    assert "ZerothOrder(model, lr=" in probe(model, lambda: loss_of(model)).settings


def test_recommended_settings_can_be_used():
    model = Net()
    r = probe(model, lambda: loss_of(model))
    for k, grows in ((1, False), (30, True)):
        trained = copy.deepcopy(model)
        opt = ZerothOrder(trained, lr=k * r.lr_best, eps=r.eps_best)
        for _ in range(30): opt.step(lambda trained=trained: loss_of(trained))
        assert (float(loss_of(trained.eval()).detach()) > r.loss) == grows or k == 30


@pytest.mark.parametrize("eps, words", [(30.0, "beyond curvature"), (1e-12, "lost in rounding"), (1e-3, None)])
def test_warnings_about_eps(eps, words):
    model = Net()
    r = probe(ZerothOrder(model, lr=1e-3, eps=eps), lambda: loss_of(model))
    found = [s for s in r.warnings if s.startswith("eps")]
    assert (len(found) == 1 and words in found[0]) if words else not found
    assert ("outside" in str(r).split("eps ")[1].splitlines()[0]) == bool(words)


@pytest.mark.parametrize("lr, words", [(1e4, "too long"), (1e-9, "is short"), (1e-2, None)])
def test_warnings_about_lr(lr, words):
    model = Net()
    r = probe(ZerothOrder(model, lr=lr), lambda: loss_of(model))
    found = [s for s in r.warnings if s.startswith("lr")]
    assert (len(found) == 1 and words in found[0]) if words else not found


def test_a_batch_that_hides_the_slope_is_told():
    w = parameter(torch.zeros(50))
    closures = [lambda x=x: x @ w + w @ w for x in 3 * normals((20, 50), seed=4, dtype=torch.float64)]
    assert any("hides the slope" in s for s in probe(ZerothOrder([("w", w)], lr=1e-3), closures).warnings)


def test_a_flat_place_is_told():
    w = parameter(torch.zeros(20), torch.float32)
    r = probe(ZerothOrder([("w", w)], lr=1e-3), lambda: 1000 + w.square().sum())  # the minimum itself
    assert any(s.startswith("No eps is workable") for s in r.warnings) and "nothing" not in str(r).split("\n")[1]


def test_a_downward_bend_is_told():
    w = parameter(torch.ones(20))
    r = probe(ZerothOrder([("w", w)], lr=1e-3), lambda: w.sum() - w.square().sum())
    assert any("bend upwards" in s for s in r.warnings)


def broken(kind):
    w = parameter(torch.ones(4))
    return ZerothOrder([("w", w)], lr=1e-3), {"none": lambda: None, "nan": lambda: w.sum() * math.nan, "inf": lambda: w.sum() / 0, "constant": lambda: torch.tensor(2.5),
                                              "float": lambda: 2.5, "empty": lambda: torch.zeros(0), "steps": lambda: (w > 1e6).double().sum()}[kind]


@pytest.mark.parametrize("kind, words", [("none", "returned None"), ("nan", "is nan"), ("inf", "is inf"), ("constant", "does not depend"),
                                         ("float", "does not depend"), ("empty", "returned 0 losses"), ("steps", "does not depend")])
def test_a_useless_loss_is_told_in_words(kind, words):
    opt, closure = broken(kind)
    r = probe(opt, closure)
    assert isinstance(r, Report) and len(r.warnings) == 1 and words in r.warnings[0] and words in str(r) and math.isnan(r.slope)


def test_losses_that_fail_far_away():
    w = parameter(torch.ones(20))
    r = probe(ZerothOrder([("w", w)], lr=1e-3), lambda: (w.log() + w.square()).sum())  # nan where a weight is negative
    assert any("not finite" in s for s in r.warnings) and r.eps_low < 1e-3 < r.eps_high < 1.01 and r.lr_best > 0


def test_a_population_s_losses_in_a_wrong_number():
    model = Rows()
    es = LowRankES(model, population=8, sigma=1e-2, lr=1e-2)
    r = probe(es, lambda: row_loss(model, es.expand(X))[:-1])
    assert len(r.warnings) == 1 and "losses for" in r.warnings[0]


def test_rows_where_one_loss_is_wanted():
    model = Rows()
    assert any("12 numbers" in s or "4 numbers" in s for s in probe(model, lambda: row_loss(model, X)).warnings)
    assert probe(model, lambda: float(row_loss(model, X).mean())).slope > 0


def test_backward_in_the_closure_is_explained():
    model = Rows()
    def closure():
        loss = row_loss(model, X).mean()
        loss.backward()
        return loss
    with pytest.raises(RuntimeError, match="leave backward"): probe(model, closure)


@pytest.mark.parametrize("args, error, words", [
    ((nn.Linear(2, 2), 3), TypeError, "closure: 3"), ((nn.Linear(2, 2), []), TypeError, "closure"),
    ((torch.optim.SGD([torch.ones(1)], lr=1), lambda: 1), TypeError, "model_or_opt: SGD")])
def test_wrong_arguments(args, error, words):
    with pytest.raises(error, match=words): probe(*args)


@pytest.mark.parametrize("directions", [1, 0, 2.5, True])
def test_wrong_directions(directions):
    with pytest.raises(ValueError, match="directions"): probe(nn.Linear(2, 2), lambda: 1.0, directions=directions)


def test_one_seed_decides_everything():
    model = Net()
    def numbers():
        r = probe(ZerothOrder(model, lr=1e-2, seed=3), lambda: loss_of(model))
        return r.slopes, r.ladder, r.trials, r.warnings, r.settings
    assert numbers() == numbers()
