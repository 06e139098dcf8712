"A population in one batch: every member's rows meet that member's weights, or the parameter is named."
import gc
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gfopt.lm import population as module
from gfopt.lm.model import Llama, config, generate
from gfopt.lm.population import (
    NOISES,
    ROWS,
    Dense,
    LowRank,
    Population,
    PopulationError,
    expand,
    low_rank_noise,
    low_rank_product,
    member_changes,
    member_weight,
)

IDS = torch.randint(1, 64, (2, 9), generator=torch.Generator().manual_seed(0))


def changes_of(parameters, P, sigma=0.05, rank=1, **settings):
    return member_changes(parameters, range(P), sigma=dict.fromkeys(parameters, sigma), rank=rank, seed=3, step=2, **settings)


@torch.no_grad()
def together_and_alone(model, batch, P, call, parameters=None, **settings):
    "Outputs (P, B, ...) of a population, and the same with each member's weights written out."
    model.eval()
    parameters = parameters or dict(model.named_parameters())
    changes = changes_of(parameters, P, **settings)
    with Population(parameters, changes, P) as population:
        out = call(model, population.expand(batch))
    alone = []
    for p in range(P):
        saved = {n: w.data for n, w in parameters.items()}
        for n, w in parameters.items():
            w.data = member_weight(w, changes[n], p)
        alone.append(call(model, batch))
        for n, w in parameters.items():
            w.data = saved[n]
    return out.view(P, -1, *out.shape[1:]), torch.stack(alone)


def assert_members(model, batch, P, call=lambda m, b: m(b), tol=1e-4, **settings):
    out, alone = together_and_alone(model, batch, P, call, **settings)
    assert (out - alone).abs().max() < tol
    assert (alone[0] - alone[1]).abs().max() > 10 * tol, "members must differ, or the comparison says nothing"


@pytest.mark.parametrize("rank", [1, 2, 5])
@pytest.mark.parametrize("noise", ["rademacher", "normal"])
def test_member_equals_model_with_its_weights(rank, noise):
    assert_members(Llama(config("pico", 64), seed=0), IDS, 6, rank=rank, noise=noise)


def test_sigma_zero_equals_plain_logits():
    model = Llama(config("pico", 64), seed=0)
    out, alone = together_and_alone(model, IDS, 4, lambda m, b: m(b), sigma=0.0)
    plain = model(expand(IDS, 4)).view_as(out)
    assert torch.equal(out, plain)


def test_batch_length_that_equals_the_rows():
    ids = torch.randint(0, 64, (2, 8), generator=torch.Generator().manual_seed(1))
    assert_members(Llama(config("pico", 64), seed=0), ids, 4)


def test_tied_weights_see_the_same_noise():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(8, 8)
            self.head = nn.Linear(8, 8, bias=False)
            self.head.weight = self.table.weight
        def forward(self, ids): return self.head(self.table(ids))
    model = Tied()
    with torch.no_grad():
        model.table.weight.copy_(torch.eye(8))
    ids = torch.arange(8).expand(1, 8)
    out, alone = together_and_alone(model, ids, 4, lambda m, b: m(b), sigma=0.3)
    W = [member_weight(torch.eye(8), changes_of(dict(model.named_parameters()), 4, sigma=0.3)["table.weight"], p) for p in range(4)]
    for p in range(4):  # lookup and head: W W^T, not W V^T
        torch.testing.assert_close(out[p, 0], W[p] @ W[p].T, atol=1e-5, rtol=0)


def test_antithetic_members_are_bitwise_opposite():
    w = {"w": torch.zeros(5, 7), "b": torch.zeros(5)}
    for noise in ("rademacher", "normal"):
        changes = changes_of(w, 6, rank=2, noise=noise)
        for name in w:
            plus, minus = (torch.stack([member_weight(w[name], changes[name], p) for p in range(s, 6, 2)]) for s in (0, 1))
            assert torch.equal(plus, -minus) and plus.abs().sum() > 0


def test_noise_is_a_function_of_its_place():
    draw = lambda **k: low_rank_noise((40, 30), **dict(rank=2, seed=0, step=0, pairs=[4], tensor="a") | k)[0]  # noqa: E731
    assert torch.equal(draw(), draw(pairs=[1, 4])[1:])
    for other in (dict(seed=1), dict(step=1), dict(pairs=[5]), dict(tensor="b")):
        assert abs((draw() * draw(**other)).mean()) < 4 / 80**0.5


@pytest.mark.parametrize("call", [
    lambda w, b, x: F.linear(x, w, b), lambda w, b, x: x @ w.t() + b, lambda w, b, x: x @ w.T + b, lambda w, b, x: b + torch.matmul(x, w.mT),
    lambda w, b, x: torch.addmm(b, x.flatten(0, 1), w.transpose(0, 1)).view(*x.shape[:2], -1), lambda w, b, x: F.linear(x, w) * b,
    lambda w, b, x: F.layer_norm(F.linear(x, w), (5,), b, b), lambda w, b, x: F.rms_norm(x @ w.t(), (5,), b), lambda w, b, x: F.linear(x, w) * (1.0 + b),
    lambda w, b, x: F.linear(x, w).add_(b), lambda w, b, x: b * F.linear(x, w), lambda w, b, x: F.linear(x, w) - b, lambda w, b, x: F.linear(x[..., 0, :], w, b),
    lambda w, b, x: F.linear(x.double(), w.double(), b.double()).float(), lambda w, b, x: w.new_zeros(w.shape[0]) + F.linear(x, w.to(w.dtype), b)])
def test_every_form_of_an_operation(call):
    class M(nn.Module):
        def __init__(self):
            super().__init__()
            g = torch.Generator().manual_seed(0)
            self.w, self.b = nn.Parameter(torch.randn(5, 4, generator=g)), nn.Parameter(torch.randn(5, generator=g))
        def forward(self, x): return call(self.w, self.b, x)
    x = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(1))
    assert_members(M(), x, 4, sigma=0.3, rank=2)


class Conv(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.conv = nn.Embedding(64, 8), nn.Conv1d(8, 8, 3, padding=1)
    def forward(self, ids): return self.conv(self.table(ids).mT)


def test_an_operation_without_a_thin_rule_goes_one_member_at_a_time():
    assert_members(Conv(), IDS, 4)
    model = Conv()
    assert_members(model, IDS, 4, parameters={"conv.bias": model.conv.bias}, sigma=0.3)


class Plain(nn.Module):
    "What a forward pass may do with weights w (5, 4), v (5, 4) and b (5,) and rows x (B, T, 4)."
    def __init__(self, call):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.w, self.v, self.b = (nn.Parameter(torch.randn(*s, generator=g)) for s in ((5, 4), (5, 4), (5,)))
        self.call = call
    def forward(self, x): return self.call(self.w, self.v, self.b, x)


UNTHIN = dict(
    exp=lambda w, v, b, x: x[:, :, None] * w.exp(), merged=lambda w, v, b, x: F.linear(x, w + 0.5 * v, b), scaled=lambda w, v, b, x: F.linear(x, 2 * w / w.norm(dim=1, keepdim=True), b),
    split=lambda w, v, b, x: sum(F.linear(x, part) * i for i, part in enumerate(w.split([2, 2, 1])[:2], 1)), stacked=lambda w, v, b, x: x @ torch.cat([w, v]).t(), row=lambda w, v, b, x: x @ w[2] + b[0],
    left=lambda w, v, b, x: (w @ x.mT).mT + b, einsum=lambda w, v, b, x: torch.einsum("btn,mn->btm", x, w), product=lambda w, v, b, x: x @ (w.t() @ v),
    table=lambda w, v, b, x: x + F.linear(torch.eye(x.shape[1], 4), w.t() @ v), data=lambda w, v, b, x: F.linear(x, w.data) + b.detach(), batched=lambda w, v, b, x: torch.bmm(x, w.t().expand(len(x), 4, 5)),
    rank2bias=lambda w, v, b, x: F.linear(x, w) + v.sum(1), addmm=lambda w, v, b, x: torch.addmm(b, x.flatten(0, 1), w.t(), alpha=0.5).view(*x.shape[:2], 5),
    inplace=lambda w, v, b, x: F.linear(x, w).mul_(b).add_(b), iadd=lambda w, v, b, x: _iadd(F.linear(x, w), b), conv=lambda w, v, b, x: F.conv1d(x.mT, w[:, :, None], b).mT,
    keywords=lambda w, v, b, x: F.linear(input=F.softmax(input=x, dim=-1), weight=w, bias=b), functional=lambda w, v, b, x: F.multilabel_soft_margin_loss(F.linear(x, w, b).flatten(1), torch.ones(len(x), 5 * x.shape[1]), reduction="none"), where=lambda w, v, b, x: torch.where(x[..., :1] > 0, b, F.linear(x, w)))


def _iadd(y, b):
    y += b
    y *= 2 * b
    return y


@pytest.mark.parametrize("name", list(UNTHIN))
@pytest.mark.parametrize("T", [2, 8, 12])  # 12 rows: T may be P * B
def test_every_other_form_of_an_operation(name, T):
    x = torch.randn(3, T, 4, generator=torch.Generator().manual_seed(1))
    assert_members(Plain(UNTHIN[name]), x, 4, sigma=0.3, rank=2)


def test_a_dense_change_is_made_for_one_member_at_a_time():
    model = Llama(config("pico", 64), seed=0).eval()
    weights, alive = dict(model.named_parameters()), [0, 0]

    def dense(name, w):
        def weight(p):
            alive[0] += 1
            return w.detach() + 0.05 * NOISES["rademacher"](w.shape, seed=0, step=0, pair=p, tensor=name)
        return Dense(weight)
    changes = {n: dense(n, w) for n, w in weights.items()}
    with torch.no_grad(), Population(weights, changes, 4) as population:
        out = model(population.expand(IDS)).view(4, 2, 9, -1)
    assert alive[0] == 4 * (1 + len(weights))  # each weight once for each member; the tied one twice
    for p in range(4):
        twin = Llama(config("pico", 64), seed=0).eval()
        with torch.no_grad():
            for n, w in twin.named_parameters():
                w.copy_(member_weight(weights[n], changes[n], p))
            torch.testing.assert_close(out[p], twin(IDS), atol=1e-5, rtol=1e-5)


class Tabled(nn.Module):
    "Looks up tokens and, the same for all rows, positions; a head with a bias, another tied to the tokens."

    def __init__(self):
        super().__init__()
        self.tokens, self.positions, self.head = nn.Embedding(203, 6), nn.Embedding(150, 6), nn.Linear(6, 131)

    def forward(self, ids):
        h = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))
        return torch.cat([self.head(h), F.linear(h, self.tokens.weight)], -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_weights_are_made_in_tiles(monkeypatch, dtype):
    monkeypatch.setattr(module, "TILE", 1)  # tiles of 64 rows
    torch.manual_seed(0)
    model, asked = Tabled().to(dtype), []
    weights = dict(model.named_parameters())
    made = {n: [(w.detach().float() + 0.1 * NOISES["normal"](w.shape, seed=0, pair=p, tensor=n)).to(dtype) for p in range(3)] for n, w in weights.items()}

    def rows(n, p, i, j):
        asked.append((n, p, i, j))
        return made[n][p][i:j]

    def whole(n, p):
        assert n == "head.bias"  # all others are larger than a tile
        return made[n][p]
    changes = {n: Dense(partial(whole, n), partial(rows, n)) for n in weights}
    ids = torch.tensor([[202, 0, 66, 66, 1], [63, 64, 66, 0, 65]])
    with torch.no_grad(), Population(weights, changes, 3) as population: out = model(population.expand(ids)).view(3, 2, 5, -1)
    looked = {(i, j) for n, _, i, j in asked[:12] if n == "tokens.weight"}
    assert looked == {(0, 64), (64, 128), (192, 256)} and {a[2:] for a in asked if a[0] == "positions.weight"} == {(0, 64)}
    for p in range(3):
        twin = Tabled().to(dtype)
        with torch.no_grad():
            for n, w in twin.named_parameters(): w.copy_(made[n][p])
            torch.testing.assert_close(out[p], twin(ids), **(dict(atol=1e-5, rtol=1e-5) if dtype == torch.float32 else dict(atol=0.1, rtol=0.05)))


def test_a_token_outside_the_table_is_refused_in_tiles_too(monkeypatch):
    monkeypatch.setattr(module, "TILE", 1)
    model = Tabled()
    weights = dict(model.named_parameters())
    changes = {n: Dense(lambda p, n=n: weights[n].detach(), lambda p, i, j, n=n: weights[n].detach()[i:j]) for n in weights}
    for wrong in (-1, 203):
        with torch.no_grad(), Population(weights, changes, 2) as population, pytest.raises(IndexError):
            model(population.expand(torch.tensor([[0, wrong]])))


def test_factors_of_pairs_and_of_members_are_the_same_change():
    A, B = torch.randn(3, 5, 2, generator=torch.Generator().manual_seed(0)), torch.randn(3, 4, 2, generator=torch.Generator().manual_seed(1))
    pairs, each = LowRank(A, B, antithetic=True), LowRank(torch.stack([A, -A], 1).flatten(0, 1), B.repeat_interleave(2, 0))
    w, x = torch.randn(5, 4, generator=torch.Generator().manual_seed(2)), torch.randn(6, 7, 4, generator=torch.Generator().manual_seed(3))
    for p in range(6):
        assert torch.equal(member_weight(w, pairs, p), member_weight(w, each, p))
    for bias in (None, torch.ones(5), torch.randn(6, 1, 5, generator=torch.Generator().manual_seed(4))):
        torch.testing.assert_close(low_rank_product(x, w.t(), pairs, bias), low_rank_product(x, w.t(), each, bias))
        want = torch.stack([x[p] @ member_weight(w, each, p).t() for p in range(6)]) + (0 if bias is None else bias)
        torch.testing.assert_close(low_rank_product(x, w.t(), pairs, bias), want, atol=1e-5, rtol=1e-5)


def test_all_parameters_drawn_together_are_the_parameters_drawn_alone():
    w = {"a": torch.zeros(40, 30), "b": torch.zeros(7), "c": torch.zeros(3, 2, 5), "d": torch.zeros(200, 3, dtype=torch.float64), "e": torch.zeros(1, 1)}
    for noise in ("rademacher", "normal"):
        changes = changes_of(w, 6, rank=2, noise=noise, sigma=1.0)
        where = dict(seed=3, step=2, noise=noise)
        for n in "acde":
            A, B = low_rank_noise(w[n].shape, rank=2, pairs=range(3), tensor=n, dtype=w[n].dtype, **where)
            torch.testing.assert_close(changes[n].A, A / 2**0.5, rtol=1e-6, atol=0)
            assert torch.equal(changes[n].B, B)
        alone = NOISES[noise](7, seed=3, step=2, pair=[0, 1, 2], tensor="b")
        assert torch.equal(changes["b"], torch.stack([alone, -alone], 1).flatten(0, 1))


def test_same_shape_tensors_get_different_noise():
    n = 256
    w = {f"layers.{i}.weight": torch.zeros(n, n) for i in range(6)}
    changes = changes_of(w, 2, sigma=1.0)
    z = torch.stack([torch.cat([c.A[0, :, 0], c.B[0, :, 0]]) for c in changes.values()])
    corr = torch.corrcoef(z) - torch.eye(6)
    assert corr.abs().max() < 4 / (2 * n) ** 0.5


class Experts(nn.Module):
    "Rows are sent to one of two experts by what they are."
    def __init__(self):
        super().__init__()
        self.table, self.experts = nn.Embedding(64, 8), nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        with torch.no_grad():
            for i, p in enumerate(self.parameters()):
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    def forward(self, ids):
        x = self.table(ids).flatten(0, 1)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            at = torch.where((x.sum(1) > 0) == bool(e))[0]
            out[at] = expert(x[at])
        return out.view(*ids.shape, 8)


def test_rows_picked_by_an_index_are_refused_by_name():
    model = Experts()
    with pytest.raises(PopulationError, match=r"'experts\.0\.weight' met activations of shape .*exclude=.*fallback='sequential'"):
        together_and_alone(model, IDS, 4, lambda m, b: m(b))
    assert_members(model, IDS, 4, parameters={"table.weight": model.table.weight})


class Sorted(nn.Module):
    "All rows, or as many as there are rows, but in an order that depends on what they are."
    def __init__(self, flat):
        super().__init__()
        self.table, self.layer, self.flat = nn.Embedding(64, 8), nn.Linear(8, 8), flat
    def forward(self, ids):
        x = self.table(ids).flatten(0, 1) if self.flat else self.table(ids)[:, 0]
        order = x.sum(1).argsort()
        return torch.zeros_like(x).index_copy(0, order, self.layer(x[order])).view(len(ids), -1, 8)


def test_rows_in_another_order_are_refused_or_unsure():
    model = Sorted(flat=True)
    with pytest.raises(PopulationError, match=r"'layer\.weight' met activations of shape \(72, 8\)"):
        together_and_alone(model, IDS, 4, lambda m, b: m(b))  # 4 x 2 x 9 rows, but not where they were
    assert_members(model, IDS, 4, parameters={"table.weight": model.table.weight})
    model = Sorted(flat=False)
    parameters = dict(model.named_parameters())
    with torch.no_grad(), Population(parameters, changes_of(parameters, 4), 4) as population:
        model(population.expand(IDS))
    assert ("torch.Tensor.__getitem__", "(8, 8)") in population.unsure


def test_rows_put_back_where_they_were_are_rows_again():
    w, at = {"w": torch.ones(4, 4)}, torch.tensor([5, 0, 2])
    with torch.no_grad(), Population(w, changes_of(w, 4), 4) as population:
        x = population.expand(torch.ones(2, 4))
        out = torch.zeros_like(x).index_add(0, at, 2 * x[at])
        assert (out @ w["w"]).shape == (8, 4)
    assert population.known(out) == ROWS and not population.unsure


@pytest.mark.parametrize(("call", "message"), [
    (lambda w, x: x * w.max().item(), "Tensor.item"), (lambda w, x: x if w.sum() > 0 else -x, "__bool__"), (lambda w, x: x + torch.tensor(w.tolist()), "tolist"),
    (lambda w, x: w.add_(1) + x, "changes it in place"), (lambda w, x: torch.zeros(4).add_(w) + x, "all members share in place"),
    (lambda w, x: (x * w).sum(0), None), (lambda w, x: torch.einsum("bn,n->n", x, w.exp()), "result has no rows"), (lambda w, x: F.bilinear(x[:, :3], x, w.view(1, 2, 2)), "does not work one member at a time")])
def test_what_cannot_be_followed_names_the_parameter(call, message):
    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(4))
        def forward(self, x): return call(self.w, x)
    parameters = dict((model := M()).named_parameters())
    with torch.no_grad(), Population(parameters, changes_of(parameters, 4), 4) as population:
        x = population.expand(torch.ones(3, 4))
        if message is None:  # after the parameter the model may do what it likes
            assert model(x).shape == (4,)
            return
        with pytest.raises(PopulationError, match=f"'w' met .*{message}"):
            model(x)


def test_what_never_met_rows_is_nan():
    w = {"w": torch.ones(4)}
    with torch.no_grad(), Population(w, changes_of(w, 4), 4) as population:
        population.expand(torch.ones(3, 4))
        out = w["w"].exp().sum()
    assert out.isnan()


def test_marks_of_one_population_mean_nothing_to_the_next():
    w = {"w": torch.ones(8, 8)}
    with torch.no_grad(), Population(w, changes_of(w, 4), 4) as population:
        x = population.expand(torch.ones(2, 3, 8))
    with torch.no_grad(), Population(w, changes_of(w, 2), 2) as population:
        population.expand(torch.ones(5, 8))
        y = x @ w["w"] + torch.zeros(10, 3, 8)[:8]
    assert y.isnan().all()  # shared by everybody as far as the second population can know, and never met its rows


def test_saved_results_load_without_our_classes(tmp_path):
    model = Llama(config("pico", 64), seed=0)
    parameters = dict(model.named_parameters())
    with torch.no_grad(), Population(parameters, changes_of(parameters, 4), 4) as population:
        out = model(population.expand(IDS))
    torch.save(out, tmp_path / "logits.pt")
    assert torch.equal(torch.load(tmp_path / "logits.pt", weights_only=True), out)


def test_parameters_are_left_alone():
    model = Llama(config("pico", 64), seed=0)
    parameters = dict(model.named_parameters())
    before = {n: (w.detach().clone(), w.data_ptr(), dict(w.__dict__)) for n, w in parameters.items()}
    with torch.no_grad(), Population(parameters, changes_of(parameters, 4), 4) as population:
        model(population.expand(IDS))
    assert all(torch.equal(w, before[n][0]) and w.data_ptr() == before[n][1] and w.__dict__ == before[n][2] for n, w in parameters.items())


def peak_bytes(f):
    "The most that torch's allocator held at once while f ran, beyond what it held before."
    from torch.profiler import ProfilerActivity, profile
    f()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as p:
        f()
    events = sorted((e for e in p.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns())
    return int(torch.tensor([e.nbytes() for e in events]).cumsum(0).max())


@torch.no_grad()
@pytest.mark.parametrize("rank", [1, 4])
def test_peak_memory_is_that_of_inference(rank):
    model, P = Llama(config("nano", 257), seed=0).eval(), 16
    parameters, ids = dict(model.named_parameters()), torch.arange(64)[None]
    changes = changes_of(parameters, P, rank=rank)

    def inside():
        with Population(parameters, changes, P) as population:
            model(population.expand(ids))
    noise = sum(t.numel() * t.element_size() for c in changes.values() for t in ((c.A, c.B) if isinstance(c, LowRank) else (c,)))
    weights = sum(w.numel() * w.element_size() for w in parameters.values())
    plain = peak_bytes(lambda: model(ids.repeat(P, 1)))
    assert peak_bytes(inside) <= 1.02 * plain  # the forward pass itself: no copy of a weight, no second copy of activations
    assert noise <= 0.12 * rank * weights


class Positions(nn.Module):
    "Positions of shape (1, T), as in GPT-2, or (T, d), as in many a small model."
    def __init__(self, shape):
        super().__init__()
        self.table, self.pos, self.shape = nn.Embedding(64, 8), nn.Embedding(64, 8), shape
    def forward(self, ids): return self.table(ids) + self.pos(torch.arange(ids.shape[1]).view(self.shape))


def test_positions_shared_by_all_rows():
    for T in (8, 9, 4):
        assert_members(Positions((1, -1)), torch.arange(2 * T).view(2, T), 4)


@pytest.mark.parametrize("T", [4, 8, 16, 9])  # divisible by P, equal to P * B, a multiple of it
@pytest.mark.parametrize("shape", [(-1,), (1, -1)])
def test_rows_hidden_by_broadcasting_are_right(shape, T):
    assert_members(Positions(shape), torch.arange(2 * T).view(2, T), 4)


class Distances(nn.Module):
    "A table of distances (T, T) added to scores, as in T5: with T = P * B it looks like rows."
    def __init__(self):
        super().__init__()
        self.table, self.bias = nn.Embedding(64, 8), nn.Embedding(33, 2)
    def forward(self, ids):
        x, t = self.table(ids).view(*ids.shape, 2, 4).transpose(1, 2), torch.arange(ids.shape[1])
        bias = self.bias((t[:, None] - t).clamp(-16, 16) + 16).permute(2, 0, 1).unsqueeze(0)
        return ((x @ x.mT + bias).softmax(-1) @ x).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("T", [4, 8, 16, 9])
def test_a_table_of_distances_is_shared(T):
    assert_members(Distances(), torch.arange(2 * T).view(2, T), 4, sigma=0.3)


def test_a_parameter_without_rows_is_refused():
    model = nn.Linear(4, 4)
    parameters = dict(model.named_parameters())
    with torch.no_grad(), Population(parameters, changes_of(parameters, 4), 4) as population:
        with pytest.raises(PopulationError, match="before expand"):
            model(torch.ones(8, 4))
        population.expand(torch.ones(2, 4))
        nobodys = model(torch.ones(6, 4))
        with pytest.raises(PopulationError, match=r"'weight' met activations of shape \(6, 4\)"):
            model(population.expand(torch.ones(2, 4))[:6])
        with pytest.raises(PopulationError, match="item"):
            model.weight.sum().item()
        assert model.weight.shape == (4, 4) and model.weight.dtype == torch.float32
    assert nobodys.isnan().all()


@torch.no_grad()
def test_cached_generation_equals_uncached():
    model, P = Llama(config("pico", 64), seed=0).eval(), 4
    parameters = dict(model.named_parameters())
    changes = changes_of(parameters, P, sigma=0.2)
    u = torch.rand(2, 12, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    with Population(parameters, changes, P) as population:
        ids, us = population.expand((IDS, u))
        cached = generate(model, ids, 12, uniforms=us)
        logits, tokens = [], ids
        for t in range(12):
            logits.append(model(tokens)[:, -1])
            tokens = torch.cat([tokens, cached[:, t:t + 1]], 1)
        cache = model.cache(32)
        again = [model(ids, cache)[:, -1]] + [model(cached[:, t:t + 1], cache)[:, -1] for t in range(11)]
    torch.testing.assert_close(torch.stack(again), torch.stack(logits), atol=1e-4, rtol=0)
    assert len({tuple(r) for r in cached.view(P, 2, -1)[:, 0].tolist()}) > 1


def test_expand_repeats_member_by_member():
    batch = dict(input_ids=torch.tensor([[1], [2]]), extra=(torch.tensor([5, 6]), "kept", torch.tensor(3.0)), position_ids=torch.tensor([[0]]))
    big = expand(batch, 3)
    assert big["input_ids"].flatten().tolist() == [1, 2] * 3 and big["extra"][0].tolist() == [5, 6] * 3
    assert big["extra"][1] == "kept" and big["extra"][2] == 3 and big["position_ids"].shape == (6, 1)
    with pytest.raises(ValueError, match="a tensor of 3 rows"):
        expand(dict(input_ids=torch.zeros(2, 4), labels=torch.zeros(3, 4)), 2)
    with pytest.raises(TypeError, match="batch"):
        expand("text", 2)


def test_nothing_is_left_to_the_garbage_collector():
    # a reference cycle would keep a whole forward's activations alive until Python looks for one
    model = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 8))
    weight, W = model[1].weight, model[1].weight.detach().clone()
    changes = {"1.weight": Dense(lambda p: W + p)}

    def forward():
        with torch.no_grad(), Population({"1.weight": weight}, changes, 2) as population:
            model(population.expand(IDS % 8))

    forward()
    gc.collect()
    gc.disable()
    try:
        forward()
        assert gc.collect() == 0
    finally:
        gc.enable()
