"""ZerothOrder against autograd, and everything around an evaluation that must not change."""
import copy
import io
import math
import random

import numpy as np
import pytest
import torch
from torch import nn

from gfopt.lm import population
from gfopt.lm.directions import scattered, smallest
from gfopt.lm.model import Llama, LlamaConfig, row_losses
from gfopt.lm.noise import normals, signs
from gfopt.lm.population import PopulationError
from gfopt.lm.zeroth_order import (
    ZerothOrder,
    directional,
    finite_difference,
    spsa,
    stochastic_round,
)

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


class Tiny(nn.Module):
    "Embedding tied to the head, dropout, a buffer, two layers of one shape."

    def __init__(self, dtype=torch.float32, seed=0):
        super().__init__()
        self.embed, self.head = nn.Embedding(20, 16), nn.Linear(16, 20, bias=False)
        self.a, self.b, self.norm, self.drop = nn.Linear(16, 16), nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Dropout(0.5)
        self.head.weight = self.embed.weight
        with torch.no_grad():
            for name, p in self.named_parameters():
                p.copy_(0.1 * normals(p.shape, seed=seed, tensor=name))
        self.to(dtype)

    def forward(self, ids):
        x = self.drop(self.norm(self.embed(ids)))
        return self.head(torch.tanh(self.b(torch.tanh(self.a(x)))))


IDS = torch.arange(40) % 20


def exact(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


def loss_of(model):
    return nn.functional.cross_entropy(exact(model(IDS)), (IDS * 7) % 20)


def weights(model):
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


def same(a, b):
    return all(torch.equal(a[k].view(torch.uint8) if a[k].dim() else a[k], b[k].view(torch.uint8) if b[k].dim() else b[k]) for k in a)


def smooth(w):
    return (w.sin() * w.cos().roll(1)).sum() + 0.1 * (w**4).sum()


W = torch.linspace(-1, 2, 12, dtype=torch.float64)


# the estimator -----------------------------------------------------------------------------------

@pytest.mark.parametrize("draw", [signs, normals])
def test_error_against_jvp_falls_fourfold_when_eps_halves(draw):
    z = draw(12, seed=1, dtype=torch.float64)
    slope = torch.func.jvp(smooth, (W,), (z,))[1]
    error = [float((directional(smooth, W, z, e) - slope).abs()) for e in (2e-2, 1e-2, 5e-3)]
    assert error[0] / error[1] == pytest.approx(4, abs=0.05) and error[1] / error[2] == pytest.approx(4, abs=0.05)


def test_finite_difference_is_the_gradient():
    assert torch.allclose(finite_difference(smooth, W, 1e-5), torch.func.grad(smooth)(W), atol=1e-8)


@pytest.mark.parametrize("draw", [signs, normals])
def test_mean_of_spsa_is_within_its_confidence_interval(draw):
    G = torch.stack([spsa(smooth, W, z, 1e-4) for z in draw(12, seed=3, pair=range(4000), dtype=torch.float64)])
    z = (G.mean(0) - torch.func.grad(smooth)(W)) / (G.std(0) / len(G) ** 0.5)
    assert z.abs().max() < 4


def linear_problem(**settings):
    p, q = nn.Parameter(torch.zeros(30, dtype=torch.float64)), nn.Parameter(torch.zeros(4, 5, dtype=torch.float64))
    g = normals(50, seed=9, dtype=torch.float64)
    opt = ZerothOrder([("p", p), ("q", q)], lr=1.0, **settings)
    return p, q, g, opt, lambda: p @ g[:30] + q.flatten() @ g[30:]


@pytest.mark.parametrize("settings", [dict(), dict(noise="normal"), dict(directions=3), dict(eps=0.1)])
def test_mean_step_is_the_gradient(settings):  # catches a missing 1/eps or 1/q
    p, q, g, opt, closure = linear_problem(**settings)
    steps = 400
    moves = []
    for _ in range(steps):
        p.data.zero_(), q.data.zero_()
        opt.step(closure)
        moves.append(-torch.cat([p.detach(), q.detach().flatten()]))
    G = torch.stack(moves)
    z = (G.mean(0) - g) / (G.std(0) / steps**0.5)
    assert z.abs().max() < 4.2 and abs(float(z.square().mean()) - 1) < 1


def test_eps_of_a_group_does_not_change_the_expected_step():
    p, q = (nn.Parameter(torch.zeros(8, dtype=torch.float64)) for _ in "pq")
    opt = ZerothOrder([dict(params=[("p", p)], eps=1e-3), dict(params=[("q", q)], eps=1e-1)], lr=1.0)
    moved = torch.zeros(2, 8, dtype=torch.float64)
    for _ in range(400):
        p.data.zero_(), q.data.zero_()
        opt.step(lambda: 2 * q.sum())
        moved -= torch.stack([p.detach(), q.detach()]) / 400
    assert moved[1].mean() == pytest.approx(2, abs=0.4)


def test_step_is_the_formula_and_uses_the_named_noise():
    model = Tiny(torch.float64).eval()
    before = {k: v.detach().clone() for k, v in model.named_parameters()}
    opt = ZerothOrder(model, lr=0.1, eps=1e-2, seed=4)
    z = {k: signs(v.shape, seed=4, step=0, pair=0, tensor=k, dtype=v.dtype) for k, v in before.items()}
    L = [float(loss_of_at(model, {k: before[k] + s * 1e-2 * z[k] for k in z})) for s in (1, -1)]
    assert opt.step(lambda: loss_of(model)) == pytest.approx(sum(L) / 2, rel=1e-12)
    for k, v in model.named_parameters():
        assert torch.allclose(v, before[k] - 0.1 * (L[0] - L[1]) / 2e-2 * z[k], rtol=0, atol=1e-10)


def loss_of_at(model, params):
    logits = torch.func.functional_call(model, params, (IDS,))
    return nn.functional.cross_entropy(logits, (IDS * 7) % 20)


@pytest.mark.parametrize("noise, draw", [("rademacher", signs), ("normal", normals)])
@pytest.mark.parametrize("limit", [1 << 24, 200])
def test_perturbed_weights_are_antithetic_and_match_the_noise(noise, draw, limit):
    model = Tiny(torch.float64)
    opt = ZerothOrder(model, lr=0.1, eps=0.5, noise=noise, seed=1)
    opt.chunks(limit)
    before, seen = weights(model), []
    for sign in (1, -1):
        with opt.perturbed(2, sign): seen.append(weights(model))
    for k, p in model.named_parameters():
        z = draw(p.shape, seed=1, pair=2, tensor=k, dtype=p.dtype)
        assert torch.equal(seen[0][k], before[k] + 0.5 * z) and torch.equal(seen[1][k], before[k] - 0.5 * z)
    assert same(before, weights(model))


def test_chunks_do_not_change_a_run():
    runs = []
    for limit in (1 << 24, 200):
        model = Tiny()
        opt = ZerothOrder(model, lr=0.05, directions=2)
        opt.chunks(limit)
        for _ in range(3): opt.step(lambda: loss_of(model))
        runs.append(weights(model))
    assert len(opt.chunks()) > 2 and same(*runs)


def test_same_shape_tensors_get_different_noise():
    model = Tiny(torch.float64)
    opt = ZerothOrder(model, lr=0.1)
    with opt.perturbed():
        a, b = model.a.weight.detach().clone(), model.b.weight.detach().clone()
    za, zb = a - model.a.weight, b - model.b.weight
    assert abs(float((za.sign() * zb.sign()).detach().mean())) < 4 / 256**0.5


# what must not change ----------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", DTYPES)
def test_thousand_perturb_restore_bit_equal(dtype):
    p = nn.Parameter(normals(300, seed=0).to(dtype))
    before, pointer = p.detach().clone(), p.data_ptr()
    opt = ZerothOrder([p], lr=1e-3)
    for k in range(1000):
        with opt.perturbed(k, (-1) ** k): assert p.data_ptr() != pointer
    assert torch.equal(before.view(torch.uint8), p.detach().view(torch.uint8)) and p.data_ptr() == pointer


@pytest.mark.parametrize("dtype", DTYPES)
def test_measure_leaves_everything_bit_equal(dtype):
    model = Tiny(dtype)
    before = weights(model)
    opt = ZerothOrder(model, lr=1e-3, eps=1e-2)
    loss, differences = opt.measure(lambda: loss_of(model))
    assert math.isfinite(loss) and differences[0] != 0 and same(before, weights(model))


def test_restored_after_an_exception():
    model = Tiny()
    model.drop.eval()
    flags, before = [m.training for m in model.modules()], weights(model)
    opt = ZerothOrder(model, lr=1e-3)
    calls = []

    def closure():
        calls.append(1)
        if len(calls) == 2: raise KeyError("mine")
        return loss_of(model)

    with pytest.raises(KeyError): opt.step(closure)
    assert same(before, weights(model)) and flags == [m.training for m in model.modules()] and opt.steps == 0


def test_dropout_off_and_training_flags_restored():
    model = Tiny().train()
    model.norm.eval()
    flags = [m.training for m in model.modules()]
    seen = []
    ZerothOrder(model, lr=1e-3).step(lambda: seen.append(any(m.training for m in model.modules())) or loss_of(model))
    assert seen == [False, False] and flags == [m.training for m in model.modules()]


def test_buffers_unchanged():
    model = Tiny().train()
    before = {k: v.clone() for k, v in model.named_buffers()}
    ZerothOrder(model, lr=1e-3).step(lambda: loss_of(model))
    assert before and all(torch.equal(v, before[k]) for k, v in model.named_buffers())


def rng_states():
    return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()


def test_global_rng_states_unchanged():
    model = Tiny()
    before = rng_states()
    opt = ZerothOrder(model, lr=1e-3, directions=2, noise="normal")
    for _ in range(3): opt.step(lambda: loss_of(model))
    assert rng_states() == before


def test_closure_that_draws_sees_the_same_numbers_on_every_side():
    seen = []
    opt = ZerothOrder([nn.Parameter(torch.zeros(4))], lr=1e-3, directions=2)
    for _ in range(2): opt.step(lambda: seen.append((float(torch.rand(())), np.random.rand(), random.random())) or 0.0)
    assert len(set(seen[:4])) == len(set(seen[4:])) == 1 and seen[0] != seen[4]


def test_tied_weights_perturbed_once():
    model = Tiny(torch.float64)
    opt = ZerothOrder(model, lr=1e-3, eps=0.1)
    assert sum(len(g["params"]) for g in opt.param_groups) == len(list(model.parameters()))
    before = model.embed.weight.detach().clone()
    with opt.perturbed():
        assert model.embed.weight is model.head.weight
        assert torch.allclose((model.head.weight - before).abs(), torch.tensor(0.1, dtype=torch.float64))


def test_two_parameters_on_one_storage_are_refused():
    a = nn.Parameter(torch.zeros(4))
    b = nn.Parameter(a.data)
    with pytest.raises(ValueError, match="storage"): ZerothOrder([("a", a), ("b", b)], lr=0.1).step(lambda: 0.0)


def test_frozen_parameters_left_out_and_noise_of_the_others_unchanged():
    noises = []
    for freeze in (False, True):
        model = Tiny(torch.float64)
        if freeze: model.a.requires_grad_(False)
        frozen = model.a.weight.detach().clone()
        opt = ZerothOrder(model, lr=1e-3, eps=0.5)
        with opt.perturbed():
            noises.append(model.b.weight.detach().clone())
            assert torch.equal(frozen, model.a.weight) == freeze
    assert torch.equal(*noises)


def test_order_and_grouping_do_not_change_the_noise():
    model, runs = Tiny(), []
    named = list(model.named_parameters())
    for params in (model, named[::-1], [dict(params=named[:2]), dict(params=named[2:])],
                   [dict(params=list(model.a.parameters())), dict(params=[p for n, p in named if not n.startswith("a.")])]):
        opt = ZerothOrder(params, lr=0.1, model=model)
        with opt.perturbed(): runs.append(weights(model))
    assert all(same(runs[0], r) for r in runs[1:])


# updates -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_thousand_quarter_ulp_updates_move_the_mean_by_250_ulp(dtype):
    p = nn.Parameter(torch.ones(4096, dtype=dtype))
    ulp = torch.finfo(dtype).eps
    opt = ZerothOrder([p], lr=1.0, eps=1.0)
    for step in range(1000):
        opt.update([-ulp / 4 if step % 2 == 0 else 0.0])
    drift = (p.detach().float() - 1) / ulp  # a walk of 500 quarter steps, each in the direction of its sign
    walk = sum(signs(4096, seed=0, step=s, tensor="param.0") for s in range(0, 1000, 2)) / 4
    slope = float((drift * walk).sum() / walk.square().sum())
    assert slope == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sign", [1, -1])
def test_quarter_ulp_roundings_move_the_mean_by_250_ulp(dtype, sign):
    ulp, x = torch.finfo(dtype).eps, sign * torch.ones(2000, dtype=dtype)
    g = torch.Generator().manual_seed(0)
    for _ in range(1000):
        x = stochastic_round(x.float() + sign * ulp / 4, dtype, torch.randint(65536, (2000,), generator=g))
    moved = sign * float(((x.double() - sign) / ulp).mean())
    # once |x| passes 2 the spacing doubles, but the mean keeps moving by what was added
    assert moved == pytest.approx(250, rel=0.02)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stochastic_round_goes_to_a_neighbour_and_keeps_exact_values(dtype):
    codes = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(dtype)
    exact = codes[codes.isfinite()].float()
    for bits in (0, 65535):
        assert torch.equal(stochastic_round(exact, dtype, torch.full(exact.shape, bits)).float(), exact)
    x = normals(5000, seed=0) * torch.logspace(-8, 3, 5000)
    low, high = (stochastic_round(x, dtype, torch.full(x.shape, b)).float() for b in (65535, 0))
    assert torch.equal(low, x.to(dtype).float()) or ((low - x) * (high - x) <= 0).all()
    inf = torch.tensor([math.inf, -math.inf])
    assert torch.equal(stochastic_round(inf, dtype, torch.zeros(2, dtype=torch.long)).float(), inf)


@pytest.mark.parametrize("settings", [dict(), dict(momentum=0.9), dict(normalize=0.9), dict(directions=3, noise="normal")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_constant_loss_moves_nothing(settings, dtype):
    model = Tiny(dtype)
    before = weights(model)
    opt = ZerothOrder(model, lr=0.1, **settings)
    for _ in range(3): assert opt.step(lambda: 2.5) == 2.5
    assert same(before, weights(model)) and opt.steps == 3 and opt.failures == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_nan_on_either_side_makes_no_update_and_is_counted(bad, side):
    model = Tiny()
    before, calls = weights(model), []
    opt = ZerothOrder(model, lr=0.1, weight_decay=0.1, normalize=0.9)
    loss = opt.step(lambda: calls.append(1) or (bad if len(calls) - 1 == side else 1.0))
    assert math.isnan(loss) and same(before, weights(model)) and (opt.failures, opt.steps) == (1, 1)
    opt.step(lambda: loss_of(model))
    assert not same(before, weights(model)) and all(v.isfinite().all() for v in weights(model).values())


def test_one_failed_pair_leaves_the_others():
    p = nn.Parameter(torch.zeros(50))
    opt, calls = ZerothOrder([("p", p)], lr=1.0, directions=2), []
    loss = opt.step(lambda: calls.append(1) or (math.nan if len(calls) == 1 else float(len(calls))))
    assert loss == 3.5 and opt.failures == 1
    assert torch.allclose(p.detach(), -(3 - 4) / 2e-3 * signs(50, seed=0, pair=1, tensor="p"))


def test_plain_signs_are_one_rounded_operation():
    p = nn.Parameter(normals(1000, seed=0))
    before = p.detach().clone()
    opt = ZerothOrder([("p", p)], lr=0.3, eps=0.1)
    opt.update([0.123])
    c = torch.tensor(0.3 * 0.123 * (1 / 0.1), dtype=torch.float64).float()
    z = signs(1000, seed=0, tensor="p")
    assert torch.equal(p.detach(), torch.where(z > 0, before - c, before + c))


@pytest.mark.parametrize("dtype", DTYPES)
def test_recorded_differences_replay_bit_equal(dtype):
    settings = dict(lr=0.05, eps=1e-2, directions=2, momentum=0.5, normalize=0.9, seed=3)
    model, twin, journal = Tiny(dtype), Tiny(dtype), []
    opt = ZerothOrder(model, **settings)
    for _ in range(5):
        opt.step(lambda: loss_of(model))
        journal.append(opt.differences)
    replay = ZerothOrder(twin, **settings)
    for d in journal: replay.update(d)
    assert same(weights(model), weights(twin))


def test_workers_that_measure_different_pairs_equal_one():
    one, model = Tiny(), Tiny()
    opt, part = ZerothOrder(one, lr=0.1, directions=4), ZerothOrder(model, lr=0.1, directions=4)
    for _ in range(3):
        opt.step(lambda: loss_of(one))
        halves = [part.measure(lambda: loss_of(model), pairs)[1] for pairs in ([2, 3], [0, 1])]
        part.update(halves[1] + halves[0])
    assert same(weights(one), weights(model))


def test_microbatches_equal_the_full_batch():
    runs = []
    for parts in (1, 4):
        model = Tiny(torch.float64)
        opt = ZerothOrder(model, lr=0.1)

        def closure():
            return sum(nn.functional.cross_entropy(model(i), (i * 7) % 20) for i in IDS.chunk(parts)) / parts

        for _ in range(3): opt.step(closure)
        runs.append(weights(model))
    assert all(torch.allclose(runs[0][k].double(), runs[1][k].double(), atol=1e-9) for k in runs[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_dict_continues_bit_equal(dtype):
    settings = dict(lr=0.05, eps=1e-2, momentum=0.9, normalize=0.9, directions=2, seed=7)
    model = Tiny(dtype)
    opt = ZerothOrder(model, **settings)
    for _ in range(3): opt.step(lambda: loss_of(model))
    file = io.BytesIO()
    torch.save([model.state_dict(), opt.state_dict()], file)
    for _ in range(3): opt.step(lambda: loss_of(model))
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    twin = Tiny(dtype, seed=5)
    twin.load_state_dict(saved[0])
    other = ZerothOrder(twin, lr=1.0)
    other.load_state_dict(saved[1])
    for _ in range(3): other.step(lambda: loss_of(twin))
    assert same(weights(model), weights(twin))


def test_state_of_another_noise_version_is_refused():
    opt = ZerothOrder([nn.Parameter(torch.zeros(3))], lr=0.1)
    d = opt.state_dict()
    d["zeroth_order"]["noise_version"] = 99
    with pytest.raises(ValueError, match="noise version 99"): opt.load_state_dict(d)


def test_zero_is_a_seed_and_exactly_n_steps_run():
    moved, calls = [], []
    for seed in (0, 1, 0):
        p = nn.Parameter(torch.zeros(200))
        opt = ZerothOrder([p], lr=0.1, seed=seed)
        for _ in range(7): opt.step(lambda: calls.append(1) or p.sum())
        assert opt.steps == 7
        moved.append(p.detach().clone())
    assert len(calls) == 3 * 7 * 2
    assert torch.equal(moved[0], moved[2]) and not torch.equal(moved[0], moved[1])


def test_steps_get_fresh_noise():
    opt, seen = ZerothOrder([nn.Parameter(torch.zeros(400))], lr=0.1), []
    for _ in range(2):
        with opt.perturbed(): seen.append(opt.param_groups[0]["params"][0].detach().sign().clone())
        opt.update([0.0])
    assert abs(float((seen[0] * seen[1]).mean())) < 4 / 20


# torch.optim -------------------------------------------------------------------------------------

def test_schedulers_act_on_lr():
    p = nn.Parameter(torch.zeros(10))
    opt = ZerothOrder([("p", p)], lr=0.5, eps=1.0)
    schedule = torch.optim.lr_scheduler.StepLR(opt, 1, gamma=0.5)
    sizes = []
    for _ in range(3):
        before = p.detach().clone()
        opt.step(lambda: p.sum() * 0 + (1.0 if p[0] > before[0] else -1.0))
        sizes.append(float((p - before).detach().abs().max()))
        schedule.step()
    assert sizes == pytest.approx([0.5, 0.25, 0.125])


def test_onecycle_needs_cycle_momentum_false():
    opt = ZerothOrder([nn.Parameter(torch.zeros(3))], lr=0.1, momentum=0.9)
    torch.optim.lr_scheduler.OneCycleLR(opt, 0.1, total_steps=5, cycle_momentum=False)
    with pytest.raises(ValueError): torch.optim.lr_scheduler.OneCycleLR(opt, 0.1, total_steps=5)


def test_groups_have_their_own_lr_and_decay():
    a, b = nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(5))
    opt = ZerothOrder([dict(params=[a], lr=0.0), dict(params=[b], weight_decay=0.5)], lr=0.1)
    opt.step(lambda: 1.0)
    assert torch.equal(a.detach(), torch.ones(5)) and torch.allclose(b.detach(), torch.full((5,), 0.95))


def test_backward_inside_the_closure_is_explained():
    model = Tiny()
    before = weights(model)
    opt = ZerothOrder(model, lr=0.1)
    with pytest.raises(RuntimeError, match="leave backward"): opt.step(lambda: loss_of(model).backward())
    assert same(before, weights(model))


def test_other_runtime_errors_pass_through():
    def closure(): raise RuntimeError("mine")
    with pytest.raises(RuntimeError, match="mine"): ZerothOrder(Tiny(), lr=0.1).step(closure)


def test_zero_grad_does_nothing():
    p = nn.Parameter(torch.zeros(3))
    p.grad = torch.ones(3)
    ZerothOrder([p], lr=0.1).zero_grad()
    assert torch.equal(p.grad, torch.ones(3))


def test_model_moved_after_construction():
    model = Tiny()
    opt = ZerothOrder(model, lr=0.1)
    opt.step(lambda: loss_of(model))
    model.to(torch.bfloat16)
    opt.step(lambda: loss_of(model))
    assert model.a.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("bad, name", [(dict(lr=-1), "lr"), (dict(eps=0), "eps"), (dict(noise="gauss"), "noise"), (dict(seed=-1), "seed"),
                                       (dict(directions=0), "directions"), (dict(momentum=1), "momentum"), (dict(normalize=1), "normalize"),
                                       (dict(weight_decay=-1), "weight_decay"), (dict(lr=math.nan), "lr"), (dict(seed=0.5), "seed")])
def test_bad_arguments_are_named(bad, name):
    with pytest.raises(ValueError, match=name): ZerothOrder([nn.Parameter(torch.zeros(3))], **{"lr": 0.1, **bad})


def test_bad_closures_are_explained():
    opt = ZerothOrder([nn.Parameter(torch.zeros(3))], lr=0.1)
    with pytest.raises(TypeError, match="closure"): opt.step()
    with pytest.raises(TypeError, match="None"): opt.step(lambda: None)
    with pytest.raises(ValueError, match=r"\(3,\)"): opt.step(lambda: torch.zeros(3))


def test_parameters_that_cannot_move_are_refused():
    with pytest.raises(TypeError, match="param.0"): ZerothOrder([torch.zeros(3, dtype=torch.long)], lr=0.1)
    with pytest.raises(ValueError, match="requires a gradient"): ZerothOrder(Tiny().requires_grad_(False), lr=0.1)


def test_it_learns():
    model = Tiny().eval()
    opt = ZerothOrder(model, lr=3e-3, momentum=0.9, normalize=0.99)
    start = loss_of(model).item()
    for _ in range(400): opt.step(lambda: loss_of(model))
    assert loss_of(model).item() < start - 0.5


# one side, normalised (FZOO) ---------------------------------------------------------------------

def test_one_sided_step_is_the_formula():
    p = nn.Parameter(W.clone())
    opt = ZerothOrder([("p", p)], lr=0.02, eps=0.05, directions=5, sides=1, seed=3)
    Z = signs(12, seed=3, pair=range(5), tensor="p", dtype=torch.float64)
    L = torch.stack([smooth(W + 0.05 * z) for z in Z])
    loss = opt.step(lambda: smooth(p))
    expected = W - 0.02 * ((L - smooth(W)) / L.std() / 5) @ Z
    assert loss == float(smooth(W)) and torch.allclose(p.detach(), expected, rtol=1e-12)


def test_one_sided_steps_do_not_depend_on_the_scale_of_the_loss_or_of_eps():
    moved = []
    for scale, eps in ((1, 0.1), (1000, 0.1), (1, 0.2)):
        p = nn.Parameter(torch.zeros(12, dtype=torch.float64))
        opt = ZerothOrder([("p", p)], lr=0.1, eps=eps, directions=4, sides=1)
        opt.step(lambda: scale * (p @ W))
        moved.append(p.detach().clone())
    assert torch.allclose(moved[0], moved[1]) and torch.allclose(moved[0], moved[2])


def test_one_sided_evaluations_are_one_more_than_the_directions():
    calls = []
    opt = ZerothOrder(Tiny(), lr=0.1, directions=4, sides=1)
    opt.step(lambda: calls.append(1) or float(len(calls)))
    assert len(calls) == 5 and opt.differences == [1, 2, 3, 4]


def test_a_failed_base_loss_moves_nothing():
    model, calls = Tiny(), []
    before, opt = weights(model), ZerothOrder(model, lr=0.1, directions=3, sides=1, weight_decay=0.1)
    loss = opt.step(lambda: calls.append(1) or (math.nan if len(calls) == 1 else float(len(calls))))
    assert math.isnan(loss) and same(before, weights(model)) and opt.failures == 3


def test_one_failed_direction_is_left_out_of_the_deviation():
    p, calls = nn.Parameter(torch.zeros(30, dtype=torch.float64)), []
    losses = [1.0, 2.0, math.inf, 4.0]
    opt = ZerothOrder([("p", p)], lr=1.0, directions=3, sides=1)
    opt.step(lambda: calls.append(1) or losses[len(calls) - 1])
    z = signs(30, seed=0, pair=[0, 2], tensor="p", dtype=torch.float64)
    std = torch.tensor([1.0, 3.0], dtype=torch.float64).std()
    assert torch.allclose(p.detach(), -(1 * z[0] + 3 * z[1]) / 2 / std) and opt.failures == 1


# Adam --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("settings", [dict(), dict(directions=3, noise="normal"), dict(directions=4, rank=1), dict(directions=4, sides=1)])
def test_adam_is_torchs_adam_of_the_estimate(settings):
    p, q = nn.Parameter(normals((4, 3), seed=1, dtype=torch.float64)), nn.Parameter(normals((4, 3), seed=1, dtype=torch.float64))
    ours = ZerothOrder([("p", p)], lr=0.01, optimizer="adam", betas=(0.8, 0.95), weight_decay=0.1, **settings)
    probe = ZerothOrder([("p", q)], lr=1.0, **settings)
    adam = torch.optim.AdamW([q], lr=0.01, betas=(0.8, 0.95), eps=1e-12, weight_decay=0.1)
    for _ in range(8):
        start = q.detach().clone()
        probe.step(lambda: smooth(q.flatten()))  # with lr=1 the move is the estimate
        q.grad = start - q.detach()
        q.data = start
        ours.step(lambda: smooth(p.flatten())), adam.step()
    assert torch.allclose(p, q, rtol=1e-9)


def test_adam_without_memory_of_the_mean_is_normalize_for_signs():
    runs = []
    for settings in (dict(optimizer="adam", betas=(0.0, 0.9)), dict(normalize=0.9)):
        p = nn.Parameter(W.clone())
        opt = ZerothOrder([("p", p)], lr=0.01, **settings)
        for _ in range(10): opt.step(lambda: smooth(p))
        runs.append(p.detach().clone())
    assert torch.allclose(*runs, rtol=1e-8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_moments_are_float32_and_as_large_as_told(dtype):
    model = Tiny(dtype)
    opt = ZerothOrder(model, lr=0.01, optimizer="adam")
    opt.step(lambda: loss_of(model))
    for p in model.parameters():
        moments = [v for v in opt.state[p].values() if isinstance(v, torch.Tensor)]
        assert len(moments) == 2 and all(m.dtype == torch.float32 and m.shape == p.shape for m in moments)


# masks -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("settings", [dict(), dict(momentum=0.9), dict(optimizer="adam"), dict(weight_decay=0.5), dict(rank=2, directions=2), dict(directions=3, sides=1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masked_entries_are_neither_perturbed_nor_updated(settings, dtype):
    model = Tiny(dtype)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    opt = ZerothOrder(model, lr=0.05, eps=0.1, mask=smallest(0.3), **settings)
    masks = {n: smallest(0.3)(n, p) for n, p in before.items()}
    with opt.perturbed():
        for n, p in model.named_parameters(): assert torch.equal(p != before[n], masks[n]) or "rank" in settings or dtype == torch.bfloat16
        for n, p in model.named_parameters(): assert torch.equal(p[~masks[n]], before[n][~masks[n]])
    for _ in range(5): opt.step(lambda: loss_of(model))
    for n, p in model.named_parameters():
        assert torch.equal(p[~masks[n]], before[n][~masks[n]]) and not torch.equal(p[masks[n]], before[n][masks[n]])


def test_masks_are_asked_for_once_and_come_back_with_the_state():
    asked, model = [], Tiny()
    opt = ZerothOrder(model, lr=0.05, mask=lambda n, p: asked.append(n) or scattered(0.5, seed=4)(n, p))
    for _ in range(2): opt.step(lambda: loss_of(model))
    assert asked == [n for n, _ in model.named_parameters()]
    file = io.BytesIO()
    torch.save([model.state_dict(), opt.state_dict()], file)
    opt.step(lambda: loss_of(model))
    file.seek(0)
    saved, twin = torch.load(file, weights_only=True), Tiny(seed=5)
    twin.load_state_dict(saved[0])
    other = ZerothOrder(twin, lr=1.0)
    other.load_state_dict(saved[1])
    other.step(lambda: loss_of(twin))
    assert same(weights(model), weights(twin))


def test_empty_parameters_are_left_alone():
    model = nn.ParameterDict(dict(a=torch.ones(3), empty=torch.zeros(0, 4)))
    for settings in (dict(mask=smallest(0.5)), dict(optimizer="adam"), dict(rank=1)):
        opt = ZerothOrder(model, lr=0.1, **settings)
        opt.step(lambda: model["a"].square().sum())
        opt.load_state_dict(opt.state_dict())
        opt.step(lambda: model["a"].square().sum())
        assert opt.steps == 2


def test_masks_of_another_shape_are_refused():
    with pytest.raises(ValueError, match="'embed.weight'"): ZerothOrder(Tiny(), lr=0.1, mask=lambda n, p: torch.ones(3, dtype=torch.bool))


# low rank ----------------------------------------------------------------------------------------

def test_low_rank_moves_stay_in_the_kept_row_space():
    p = nn.Parameter(torch.zeros(10, 8, dtype=torch.float64))
    G = normals((10, 8), seed=1, dtype=torch.float64)
    opt = ZerothOrder([("p", p)], lr=0.01, rank=2, refresh=5, noise="normal")
    for step in range(10):
        opt.step(lambda: (G * p).sum())
        assert torch.linalg.matrix_rank(p.detach()) == (2 if step < 5 else 4)


@pytest.mark.parametrize("settings", [dict(rank=2, refresh=3), dict(rank=1, directions=3, sides=1), dict(rank=2, optimizer="adam", refresh=2),
                                      dict(optimizer="adam", directions=2), dict(sides=1, directions=3), dict(master=True, momentum=0.5), dict(master=True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_variant_replays_and_continues_bit_equal(settings, dtype):
    model, twin, late, journal = Tiny(dtype), Tiny(dtype), Tiny(dtype, seed=5), []
    opt = ZerothOrder(model, lr=0.05, eps=1e-2, seed=3, **settings)
    for step in range(8):
        opt.step(lambda: loss_of(model))
        journal.append(opt.differences)
        if step == 3:
            file = io.BytesIO()
            torch.save([model.state_dict(), opt.state_dict()], file)
    replay = ZerothOrder(twin, lr=0.05, eps=1e-2, seed=3, **settings)
    for d in journal: replay.update(d)
    assert same(weights(model), weights(twin))
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    late.load_state_dict(saved[0])
    other = ZerothOrder(late, lr=1.0)
    other.load_state_dict(saved[1])
    for _ in range(4): other.step(lambda: loss_of(late))
    assert same(weights(model), weights(late))


# masters and stored weights ------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_masters_keep_updates_far_below_a_unit_in_the_last_place(dtype):
    p, q = nn.Parameter(torch.ones(500, dtype=dtype)), nn.Parameter(torch.ones(500))
    for w in (p, q):
        opt = ZerothOrder([("p", w)], lr=1.0, eps=1.0, master=True)
        for _ in range(300): opt.update([1e-4])
    assert torch.equal(p.detach(), q.detach().to(dtype)) and not torch.equal(p.detach(), torch.ones(500, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("settings", [dict(), dict(rank=1)])
def test_ten_thousand_perturbations_leave_every_bit(dtype, settings):
    p = nn.Parameter((0.02 * normals((8, 16), seed=0)).to(dtype))
    bits, pointer = p.detach().clone().view(torch.uint8), p.data_ptr()
    opt = ZerothOrder([("p", p)], lr=1e-3, **settings)
    for k in range(10_000 if not settings else 500):
        with opt.perturbed(pair=k // 2500, sign=1 - 2 * (k % 2)): pass
    assert torch.equal(p.detach().view(torch.uint8), bits) and p.data_ptr() == pointer


# adapters ----------------------------------------------------------------------------------------

class Adapted(nn.Module):
    "A frozen linear layer, in int8 with a float scale if asked for, and a low-rank adapter beside it."

    def __init__(self, inside, out, quantised, rank=2):
        super().__init__()
        w = 0.3 * normals((out, inside), seed=out)
        scale = w.abs().amax(1, keepdim=True) / 127
        self.register_buffer("weight", (w / scale).round().to(torch.int8) if quantised else w)
        self.register_buffer("scale", scale if quantised else torch.ones(()))
        self.lora_A = nn.Parameter(0.3 * normals((rank, inside), seed=1))
        self.lora_B = nn.Parameter(torch.zeros(out, rank))

    def forward(self, x):
        return nn.functional.linear(x, self.weight.float() * self.scale) + nn.functional.linear(nn.functional.linear(x, self.lora_A), self.lora_B)


@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("settings", [dict(normalize=0.9), dict(directions=8, sides=1, rank=1, batched=True)])
def test_adapters_on_a_frozen_base_learn_and_the_base_does_not_move(quantised, settings):
    net = nn.Sequential(Adapted(8, 16, quantised), nn.Tanh(), Adapted(16, 3, quantised))
    x = normals((32, 8), seed=2)
    y = (x @ normals((8, 3), seed=3)).argmax(1)
    before = {k: v.clone() for k, v in net.named_buffers()}
    opt = ZerothOrder(net, lr=0.01, eps=1e-2, **settings)
    rows = lambda: nn.functional.cross_entropy(net(opt.expand(x)), y.repeat(9 if opt._population else 1), reduction="none")  # noqa: E731
    closure = rows if "batched" in settings else lambda: rows().mean()
    start = rows().mean().item()
    for _ in range(100): opt.step(closure)
    assert rows().mean().item() < 0.8 * start
    assert set(dict(net.named_parameters())) == {n for g in opt.param_groups for n in g["param_names"]}
    assert all(torch.equal(v, before[k]) for k, v in net.named_buffers())


def test_peft_adapters_train_and_the_base_does_not_move():
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    c = transformers.LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2)
    model = peft.get_peft_model(transformers.LlamaForCausalLM(c), peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=True))
    ids = torch.arange(64).view(2, 32)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    for settings in (dict(normalize=0.9), dict(directions=4, sides=1, rank=1, batched=True)):
        opt = ZerothOrder(model, lr=3e-3, eps=1e-2, **settings)
        assert all("lora" in n for g in opt.param_groups for n in g["param_names"])
        before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
        def rows(opt=opt): return row_losses(model(b := opt.expand(ids)).logits, b)
        for _ in range(2): opt.step(rows if "batched" in settings else lambda: rows().mean())
        assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)


# the batched population ----------------------------------------------------------------------------

def llama(dtype=torch.float32):
    return Llama(LlamaConfig(40, 32, 2, 2, 1, 48), 0).to(dtype)


TEXT = torch.arange(36).view(3, 12)


def rows_of(model, ids):
    return nn.functional.cross_entropy(exact(model(ids)).transpose(1, 2), (ids * 7) % 40, reduction="none").mean(1)


@pytest.mark.parametrize("settings", [dict(sides=1, directions=5, rank=2), dict(directions=3, rank=1), dict(sides=1, directions=4, noise="normal", rank=2, refresh=2),
                                      dict(), dict(sides=1, directions=3, mask=smallest(0.4)), dict(directions=2, noise="normal", momentum=0.5)])
@pytest.mark.parametrize("size", [True, 2])
def test_batched_losses_and_steps_equal_one_by_one(settings, size):
    runs = []
    for batched in (False, size):
        model = llama(torch.float64)
        opt = ZerothOrder(model, lr=0.02, eps=0.05, batched=batched, **settings)
        def rows(opt=opt, model=model): return rows_of(model, opt.expand(TEXT))
        losses = []
        for _ in range(3): losses += [opt.step(rows if batched else lambda: rows().mean()), *opt.differences]
        runs.append((torch.tensor(losses), weights(model)))
    assert torch.allclose(runs[0][0], runs[1][0], atol=1e-9)
    assert all(torch.allclose(runs[0][1][k], runs[1][1][k], atol=1e-7) for k in runs[0][1])


def test_one_dense_member_at_a_time_needs_no_copy_of_the_weights():
    model = llama()
    opt = ZerothOrder(model, lr=0.0, batched=1)
    def rows(): return rows_of(model, opt.expand(TEXT))
    opt.measure(rows)  # the first time, both ends are compared with perturbed copies
    assert all("copies" not in vars(c) for c in opt.chunks())
    loss, (delta,) = opt.measure(rows)
    assert all("copies" not in vars(c) for c in opt.chunks())
    other = ZerothOrder(model, lr=0.0).measure(lambda: rows().mean())
    assert loss == pytest.approx(other[0], rel=1e-6) and delta == pytest.approx(other[1][0], rel=1e-2)


@pytest.mark.parametrize("settings", [dict(), dict(noise="normal"), dict(sides=1, directions=2), dict(mask=smallest(0.5))])
def test_tiles_change_nothing_but_the_memory(monkeypatch, settings):  # llama's lookup and logits share one matrix
    model, told = Llama(LlamaConfig(200, 32, 2, 2, 1, 80), 0), []
    before = weights(model)
    for tile in (1 << 40, 1):
        monkeypatch.setattr(population, "TILE", tile)
        opt = ZerothOrder(model, lr=0.0, eps=0.01, batched=1, **settings)
        told.append([opt.measure(lambda: rows_of(model, opt.expand(TEXT)))[0], *opt.measure(lambda: rows_of(model, opt.expand(TEXT)))[1]])
    assert told[0] == pytest.approx(told[1], rel=1e-5, abs=1e-6) and same(before, weights(model))


def test_the_kernels_are_called_with_what_the_cpu_computes(monkeypatch):  # where there are some
    from gfopt.lm import kernels

    class Fused:
        def __init__(self, params, names): self.params, self.names, self.out = params, names, None

        def perturb(self, scale, *, seed, step, pair, noise):
            calls.append("perturb")
            for p, n, out in zip(self.params, self.names, self.out): torch.add(p.data, signs(p.shape, seed=seed, step=step, pair=pair, tensor=n), alpha=scale, out=out)

        def update(self, coefficients, *, seed, step, pairs, decay, noise):
            calls.append("update")
            for p, n in zip(self.params, self.names):
                t = sum(signs(p.shape, seed=seed, step=step, pair=j, tensor=n) * c for c, j in zip(coefficients, pairs))
                p.data.copy_(p.data * decay - t)

    runs = []
    for fused in (False, True):
        if fused:
            monkeypatch.setattr(kernels, "available", lambda device: True)
            monkeypatch.setattr(kernels, "FusedNoise", Fused)
        for settings, n in ((dict(directions=3, weight_decay=0.1), 7), (dict(momentum=0.5), 2), (dict(mask=smallest(0.5)), 0)):
            calls, model = [], Tiny()
            opt = ZerothOrder(model, lr=0.01, eps=1e-2, seed=5, **settings)
            for _ in range(3): opt.step(lambda: loss_of(model))
            runs.append(weights(model))
            assert len(calls) == 3 * n * fused
    assert all(same(a, b) for a, b in zip(runs[:3], runs[3:]))


def test_kernels_that_only_move_weights_need_no_copies(monkeypatch):  # lean on a GPU
    from gfopt.lm import kernels

    class Fused:
        def __init__(self, params, names): self.out = None
        def update(self, *args, **known): assert self.out is None

    monkeypatch.setattr(kernels, "available", lambda device: True)
    monkeypatch.setattr(kernels, "FusedNoise", Fused)
    opt = ZerothOrder(llama(), lr=0.1, batched=1, directions=2)
    opt.update([0.1, 0.2])
    assert all(c.fused and "copies" not in vars(c) for c in opt.chunks())


@pytest.mark.parametrize("settings, cut", [(dict(), False), (dict(rank=1), True), (dict(momentum=0.9), True), (dict(mask=smallest(0.5)), True)])
def test_chunks_are_cut_only_where_noise_is_stored(monkeypatch, settings, cut):
    from gfopt.lm import kernels
    monkeypatch.setattr(kernels, "available", lambda device: True)
    opt = ZerothOrder(llama(), lr=0.1, **settings)
    assert (len(opt.chunks(limit=1)) > 1) == cut


def test_lean_members_are_the_perturbed_weights_of_masters_too():
    model = llama(torch.bfloat16)
    opt = ZerothOrder(model, lr=0.01, eps=0.01, master=True, directions=2)
    for step in range(3): opt.update([1e-3, -2e-3])  # masters are now between the weights
    for pair, sign in ((0, 1), (1, -1), (0, 0)):
        changes = {n: v for c in opt.chunks() for n, v in opt.noise.changes(c, opt.steps, [(pair, sign)]).items()}
        members = {n: changes[n].weight(0).clone() for n in changes}
        with opt.perturbed(pair, sign): assert all(torch.equal(p, members[n]) for n, p in model.named_parameters())


def test_a_comparison_leaves_no_trace_in_the_global_generators():  # resuming compares again
    def run(resume):
        model, states = llama(), []
        settings = dict(lr=0.0, rank=1, directions=3, sides=1, batched=True)
        opt = ZerothOrder(model, **settings)
        def rows():
            y = rows_of(model, opt.expand(TEXT))
            return y + 0 * torch.rand(len(y))  # draws more for more members
        torch.manual_seed(0)
        for step in range(3):
            if resume:
                state, opt = opt.state_dict(), ZerothOrder(model, **settings)
                opt.load_state_dict(state)
            opt.step(rows)
            states.append(torch.get_rng_state())
        return torch.stack(states)
    assert torch.equal(run(False), run(True))


def test_no_finite_loss_in_a_batch_is_quiet_and_moves_nothing(recwarn):
    model = llama()
    opt, before = ZerothOrder(model, lr=0.1, rank=1, directions=3, sides=1, batched=True, weight_decay=0.1), weights(model)
    assert math.isnan(opt.step(lambda: rows_of(model, opt.expand(TEXT)) * math.nan))
    assert same(before, weights(model)) and (opt.failures, opt.steps) == (3, 1)
    assert not [w for w in recwarn if w.category is UserWarning]


@pytest.mark.parametrize("settings", [dict(), dict(batched=True), dict(batched=1)])
def test_a_worker_without_a_direction_measures_nothing(settings):
    model = llama()
    opt = ZerothOrder(model, lr=0.1, **settings)
    loss, differences = opt.measure(lambda: rows_of(model, opt.expand(TEXT)).mean(), pairs=range(1, 1))
    assert math.isnan(loss) and differences == []


@pytest.mark.parametrize("settings", [dict(batched=1), dict(batched=2, directions=2), dict(batched=True, rank=1), dict(rank=2, refresh=2), dict(noise="normal"), dict(master=True),
                                      dict(mask=smallest(0.5)), dict(sides=1, directions=3)])
def test_an_interrupt_anywhere_leaves_all_as_it_was(settings):
    model = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 20), nn.Dropout(0.5)).to(torch.bfloat16 if "master" in settings else torch.float32)
    model[1].eval()
    before, flags, calls = weights(model), [m.training for m in model.modules()], []
    opt = ZerothOrder(model, lr=0.1, eps=0.1, **settings)
    def closure():
        y = model(opt.expand(IDS[:, None])).float().square().mean((1, 2))
        calls.append(1)
        if len(calls) == 2: raise KeyboardInterrupt
        return y if opt.batched else y.mean()
    with pytest.raises(KeyboardInterrupt): opt.step(closure)
    assert same(before, weights(model)) and flags == [m.training for m in model.modules()]
    assert opt.steps == 0 and opt.expand(IDS) is IDS
    opt.step(closure)
    assert opt.steps == 1 and not same(before, weights(model))


# what stays behind -----------------------------------------------------------------------------------

@pytest.mark.parametrize("settings", [dict(), dict(noise="normal"), dict(directions=3, sides=1)])
def test_no_noise_is_kept_after_a_step(settings):
    model = llama()
    opt = ZerothOrder(model, lr=0.1, **settings)
    opt.step(lambda: rows_of(model, TEXT).mean())
    assert not opt.noise._kept


def test_a_lean_step_keeps_no_room_for_noise():
    model = llama()
    opt = ZerothOrder(model, lr=0.01, batched=1)
    opt.step(lambda: rows_of(model, opt.expand(TEXT)))
    assert not (opt.noise._rooms or opt.noise._plans)


def test_a_deep_copy_goes_its_own_way():
    model = Tiny()
    opt = ZerothOrder(model, lr=0.1, eps=0.1, momentum=0.5, mask=smallest(0.5), seed=3)
    opt.step(lambda: loss_of(model))
    before = weights(model)
    twin, other = copy.deepcopy((model, opt))
    other.step(lambda: loss_of(twin))
    assert same(before, weights(model)) and not same(before, weights(twin))
    opt.step(lambda: loss_of(model))
    assert same(weights(model), weights(twin)) and opt.differences == other.differences
    extra = nn.Parameter(torch.zeros(3))
    twin.register_parameter("extra", extra)
    other.add_param_group({"params": [twin.a.weight.new_zeros(2).requires_grad_()]})
    other.step(lambda: loss_of(twin))


def test_scalars_of_any_kind_replay_and_make_a_readable_state():
    runs = []
    for kind in (list, np.array, torch.tensor):
        model = Tiny()
        opt = ZerothOrder(model, lr=0.1, directions=2)
        opt.update(kind([0.125, -0.5]))
        torch.save(opt.state_dict(), file := io.BytesIO())
        file.seek(0)
        assert torch.load(file, weights_only=True)["zeroth_order"]["differences"] == [0.125, -0.5]
        runs.append(weights(model))
    assert same(runs[0], runs[1]) and same(runs[0], runs[2])


@pytest.mark.parametrize("differences", [[], [0.1], [0.1] * 3])
def test_another_number_of_differences_is_refused(differences):
    with pytest.raises(ValueError, match="2, one for each direction"): ZerothOrder(Tiny(), lr=0.1, directions=2).update(differences)


def test_the_state_of_another_optimiser_is_refused():
    model = Tiny()
    with pytest.raises(ValueError, match="not one of ZerothOrder"): ZerothOrder(model, lr=0.1).load_state_dict(torch.optim.SGD(model.parameters(), lr=1.0).state_dict())


def test_a_set_of_parameters_has_no_order():
    with pytest.raises(TypeError, match="set"): ZerothOrder([{"params": set(Tiny().parameters())}], lr=0.1)


def test_masters_masks_and_moments_move_with_the_model(monkeypatch):
    model = nn.Linear(4, 4, bias=False).to(torch.bfloat16)
    opt = ZerothOrder(model, lr=0.1, momentum=0.5, master=True, mask=smallest(0.5))
    opt.step(lambda: model.weight.float().square().sum())
    monkeypatch.setattr(torch.__future__, "get_swap_module_params_on_conversion", lambda: True)  # the parameters stay the same objects, as on their way to a GPU
    model.to("meta")  # a device that every machine has
    chunk = opt.chunks()[0]
    assert {t.device.type for t in (*chunk.masks, *chunk.masters, *(s["momentum"] for s in opt.state.values()))} == {"meta"}


def test_batched_members_may_answer_once_each():
    seen, model = [], llama(torch.float64)
    for each in (False, True):
        opt = ZerothOrder(model, lr=0.0, rank=1, directions=3, sides=1, batched=True)
        def losses(opt=opt, each=each):
            y = rows_of(model, opt.expand(TEXT))
            return y.view(-1, 3).mean(1) if each else y
        opt.measure(losses)
        seen.append(opt.measure(losses))
    assert seen[0][0] == pytest.approx(seen[1][0]) and seen[0][1] == pytest.approx(seen[1][1])


def test_batched_leaves_weights_modes_and_generators_alone():
    model = llama()
    before, states = weights(model), rng_states()
    opt = ZerothOrder(model, lr=0.0, rank=1, directions=3, sides=1, batched=True)
    opt.measure(lambda: rows_of(model, opt.expand(TEXT)))
    assert same(before, weights(model)) and rng_states() == states and opt.expand(TEXT) is TEXT


def test_rows_that_are_mixed_up_are_noticed():
    model = llama()
    opt = ZerothOrder(model, lr=0.1, rank=1, eps=0.1, directions=3, sides=2, batched=True)
    with pytest.raises(PopulationError, match="batched=False"):
        opt.step(lambda: rows_of(model, opt.expand(TEXT)).flip(0))


def test_batched_losses_of_another_shape_are_refused():
    model = llama()
    opt = ZerothOrder(model, lr=0.1, rank=1, directions=3, sides=1, batched=True)
    with pytest.raises(ValueError, match="4 members"): opt.step(lambda: rows_of(model, opt.expand(TEXT)).mean())


@pytest.mark.parametrize("bad, name", [(dict(sides=3), "sides"), (dict(sides=1), "directions"), (dict(sides=1, directions=2, normalize=0.9), "normalize"),
                                       (dict(rank=0), "rank"), (dict(refresh=0), "refresh"), (dict(optimizer="lion"), "optimizer"), (dict(optimizer="adam", momentum=0.9), "momentum"),
                                       (dict(optimizer="adam", betas=(0.9, 1.0)), "betas"), (dict(batched=2.5), "batched"), (dict(directions=True), "directions"), (dict(eps=math.inf), "eps"), (dict(lr=math.inf), "lr"), (dict(batched=-1), "batched"), (dict(batched=True, rank=1, mask=lambda n, p: p == 0), "mask")])
def test_bad_variants_are_named(bad, name):
    with pytest.raises(ValueError, match=name): ZerothOrder([nn.Parameter(torch.zeros(3))], **{"lr": 0.1, **bad})
