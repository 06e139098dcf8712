"A subspace of a model's weights as a search space."
import pytest
import torch
from torch import nn

from gfopt.lm.model import Llama, config, row_losses
from gfopt.lm.subspace import add_logit_bias, choose, hashed_projection, subspace

IDS = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(0))


def problem_of(*args, **settings):
    model = Llama(config("pico", 64), seed=0)
    add_logit_bias(model, 64)
    problem = subspace(model, *args, **settings)
    return model, problem, lambda: loss_of(model, problem.expand(IDS))


def loss_of(model, ids): return row_losses(model(ids[:, :-1]), ids[:, 1:])
def weights(model): return torch.cat([p.detach().flatten() for p in model.parameters()])


CASES = [("norm|logit_bias",), ("norm",), ("norm", "random", 7), ("q_proj",), (None, "random", 20)]


@pytest.mark.parametrize("args", CASES)
def test_losses_equal_loading_each_point(args):
    model, problem, closure = problem_of(*args)
    before = weights(model)
    Z = problem.box.uniform(5, torch.Generator().manual_seed(1))
    losses = problem.losses(closure, Z)
    assert torch.equal(weights(model), before) and losses.shape == (5,)
    chunked = problem.losses(closure, Z, chunk=2)
    want = []
    with torch.no_grad():
        for z in Z:
            problem.load(z)
            want.append(closure().mean().item())
    torch.testing.assert_close(losses, torch.tensor(want, dtype=torch.float64), atol=1e-5, rtol=0)
    torch.testing.assert_close(losses, chunked, atol=1e-5, rtol=0)
    assert losses.std() > 1e-5


@pytest.mark.parametrize("args", CASES)
def test_the_start_is_the_model_and_load_is_idempotent(args):
    model, problem, closure = problem_of(*args)
    before = weights(model)
    problem.load(problem.box.x0)
    assert torch.equal(weights(model), before)
    z = problem.box.uniform(1, torch.Generator().manual_seed(2))[0]
    problem.load(z)
    once = weights(model)
    problem.load(z)
    assert torch.equal(weights(model), once) and not torch.equal(once, before)
    assert problem.box.low.isinf().all() and (problem.box.sigma0 > 0).all()


def test_batched_only_when_vectors_are_searched():
    assert problem_of("norm|logit_bias")[1].batched and problem_of("norm", "random", 3)[1].batched and not problem_of("q_proj")[1].batched


def test_projection_is_orthogonal_and_balanced():
    h, s = hashed_projection(103, 10, seed=3)
    R = torch.zeros(103, 10)
    R[torch.arange(103), h] = s
    G = R.T @ R
    assert torch.equal(G, torch.diag(G.diagonal())) and G.diagonal().min() >= 10 and G.diagonal().max() <= 11
    assert not torch.equal(h, hashed_projection(103, 10, seed=4)[0]) and torch.equal(h, hashed_projection(103, 10, seed=3)[0])


def test_logit_bias_moves_the_logits_and_is_added_once():
    model = Llama(config("pico", 64), seed=0)
    plain = model(IDS)
    bias = add_logit_bias(model, 64)
    assert torch.equal(model(IDS), plain) and add_logit_bias(model, 64) is bias
    with torch.no_grad():
        bias[3] = 2.0
    torch.testing.assert_close(model(IDS)[..., 3], plain[..., 3] + 2)
    assert "logit_bias" in dict(model.named_parameters())


def test_a_random_walk_downhill_trains():
    model, problem, closure = problem_of("norm|logit_bias")
    best = problem.box.x0
    first = loss = problem.losses(closure, best[None])[0]
    g = torch.Generator().manual_seed(0)
    for _ in range(30):
        Z = best + problem.box.sigma0 * torch.randn(8, problem.box.dim, generator=g, dtype=torch.float64)
        y = problem.losses(closure, Z)
        if y.min() < loss:
            best, loss = Z[y.argmin()], y.min()
    problem.load(best)
    assert closure().mean() < first - 0.1


def test_flags_restored_and_no_global_randomness():
    model, problem, closure = problem_of("norm")
    state = torch.get_rng_state()
    def fails():
        raise KeyError
    with pytest.raises(KeyError):
        problem.losses(fails, problem.box.x0[None])
    problem.losses(closure, problem.box.x0.expand(2, -1))
    assert all(m.training for m in model.modules()) and torch.equal(torch.get_rng_state(), state)


def test_a_model_without_rules_goes_on_one_by_one():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(4)
            self.scale = nn.Parameter(torch.ones(4))
        def forward(self, x): return self.norm(x * self.scale.exp()).square().sum((1, 2))
    model, x = Odd(), torch.arange(24.0).view(2, 3, 4)
    problem = subspace(model)
    Z = problem.box.uniform(3, torch.Generator().manual_seed(0))
    with pytest.warns(UserWarning, match="'scale'.*one point at a time"):
        losses = problem.losses(lambda: model(problem.expand(x)), Z)
    assert losses.shape == (3,) and torch.equal(model.scale, torch.ones(4))


def test_kinds_and_mistakes():
    model = Llama(config("pico", 64), seed=0)
    assert set(choose(model, "norm")) == {n for n, _ in model.named_parameters() if "norm" in n}
    assert len(choose(model)) == len(list(model.parameters()))
    for args, message in [(("nothing",), "select"), (("norm", "pca", 3), "project"), (("norm", "random"), "dim"), (("norm", None, 3), "dim"), (("norm", "random", 10**6), "dim")]:
        with pytest.raises(ValueError, match=f"{message}: .*allowed"):
            subspace(model, *args)
    with pytest.raises(ValueError, match="Z: shape"):
        subspace(model, "norm").losses(lambda: None, torch.zeros(2, 3))


def test_projection_moves_each_weight_by_its_sign_size_and_coordinate():
    model, problem, _ = problem_of("up_proj", "random", 6, seed=4)
    ws = [p for n, p in model.named_parameters() if "up_proj" in n]
    before, z = [w.detach().double().clone() for w in ws], torch.arange(6.0, dtype=torch.float64) / 10
    problem.load(z)
    h, s = hashed_projection(sum(w.numel() for w in ws), 6, seed=4)
    at = 0
    for w, b in zip(ws, before, strict=True):
        where = slice(at, at + w.numel())
        want = b.flatten() + s[where].double() * b.square().mean().sqrt() * z[h[where]]
        torch.testing.assert_close(w.detach().flatten(), want.float(), atol=1e-6, rtol=0)
        at += w.numel()
