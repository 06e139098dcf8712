"A subspace of a model's weights as a search space."
import copy
import math
import random

import numpy as np
import pytest
import torch
from torch import nn

from gfopt import minimize
from gfopt.lm import subspace as module
from gfopt.lm.model import Llama, config, row_losses
from gfopt.lm.subspace import (
    add_logit_bias,
    add_lora,
    choose,
    full_change,
    hashed_projection,
    normal_projection,
    subspace,
)
from gfopt.optimizer import METHODS

IDS = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(0))


def llama():
    model = Llama(config("pico", 64), seed=0)
    add_logit_bias(model, 64)
    return model


def problem_of(*args, lora=None, **settings):
    model = llama()
    if lora:
        filled(add_lora(model, lora, rank=2))
    problem = subspace(model, *args, **settings)
    return model, problem, lambda: loss_of(model, problem.expand(IDS))


@torch.no_grad()
def filled(adapters):
    "B is zero at first, and a zero B hides every mistake in A."
    for i, p in enumerate(adapters.values()):
        p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) / 8)


def loss_of(model, ids): return row_losses(model(ids[:, :-1]), ids[:, 1:])
def weights(model): return torch.cat([p.detach().flatten() for p in model.parameters()])
def points(problem, n, seed=1): return problem.box.uniform(n, torch.Generator().manual_seed(seed))


def loaded_one_by_one(problem, closure, Z):
    want = []
    with torch.no_grad():
        for z in Z:
            problem.load(z)
            want.append(closure().mean().item())
    return torch.tensor(want, dtype=torch.float64)


CASES = [dict(args=("norm|logit_bias",)), dict(args=("norm",)), dict(args=("norm", "random", 7)), dict(args=("q_proj",)), dict(args=(None, "random", 20)),
         dict(args=("norm|q_proj", "normal", 6)), dict(args=("lora",), lora="q_proj|down_proj"), dict(args=("lora_B",), lora="up_proj"),
         dict(args=("lora", "normal", 9), lora="o_proj"), dict(args=("lora|norm|up_proj", "random", 9), lora="up_proj")]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_losses_equal_loading_each_point(case):
    model, problem, closure = problem_of(*case["args"], lora=case.get("lora"))
    before = weights(model)
    Z = points(problem, 5)
    losses = problem.losses(closure, Z)
    assert problem.batched and torch.equal(weights(model), before) and losses.shape == (5,) and losses.dtype == torch.float64
    chunked = problem.losses(closure, Z, chunk=2)
    torch.testing.assert_close(losses, loaded_one_by_one(problem, closure, Z), atol=1e-5, rtol=0)
    torch.testing.assert_close(losses, chunked, atol=1e-5, rtol=0)
    assert losses.std() > 1e-5


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_is_loaded_does_not_change_what_a_point_means(case):
    model, problem, closure = problem_of(*case["args"], lora=case.get("lora"))
    Z = points(problem, 4)
    losses = problem.losses(closure, Z)
    problem.load(problem.box.x0 + 3 * problem.box.sigma0)
    torch.testing.assert_close(problem.losses(closure, Z), losses, atol=1e-5, rtol=0)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_start_is_the_model_and_load_is_idempotent(case):
    model, problem, closure = problem_of(*case["args"], lora=case.get("lora"))
    before = weights(model)
    problem.load(problem.box.x0)
    assert torch.equal(weights(model), before)
    z = points(problem, 1, 2)[0]
    problem.load(z)
    once = weights(model)
    problem.load(z)
    assert torch.equal(weights(model), once) and not torch.equal(once, before)
    assert problem.box.low.isinf().all() and (problem.box.sigma0 > 0).all()


def test_one_forward_pass_for_all_points_and_chunks_of_the_size_asked_for():
    model, problem, _ = problem_of("norm|lora|q_proj", lora="up_proj")
    Z, calls = points(problem, 6), []
    def closure():
        batch = problem.expand(IDS)
        calls.append(len(batch) // len(IDS))
        return loss_of(model, batch)
    problem.losses(closure, Z)
    assert calls == [6, 1, 1], "all at once, then points 0 and 5 alone, the check of the first batch"
    calls.clear()
    problem.losses(closure, Z)
    problem.losses(closure, Z, chunk=4)
    assert [c for c in calls if c > 1] == [6, 4, 2]


def test_memory_bounds_the_default_chunk(monkeypatch):
    monkeypatch.setattr(module, "NUMBERS", 1000)
    assert problem_of("norm")[1]._chunk == 3 and problem_of("q_proj")[1]._chunk == 1000, "thick matrices are made one at a time"


# ---------------------------------------------------------------------------- every method

NEEDS = dict(sobol=dict(project="normal", dim=20), bo=dict(project="normal", dim=5))  # unbounded boxes are fine; few dimensions are what they are for


@pytest.mark.parametrize("method", [m for m in METHODS if m != "nsga2"])
def test_every_method_trains_a_language_model(method):
    "nsga2 has a test of its own: it wants several losses."
    model, problem, closure = problem_of("norm|logit_bias", **NEEDS.get(method, {}))
    first = problem.losses(closure, problem.box.x0[None]).item()
    r = minimize(lambda Z: problem.losses(closure, Z), problem.box, method=method, budget=24 if method == "bo" else 240, batched=True, seed=0, progress=False)
    problem.load(torch.as_tensor(r.x))
    got = closure().mean().item()
    assert got == pytest.approx(r.fun, abs=1e-4) and got < first - (1e-3 if method in ("random", "sobol", "bo") else 0.02)


def test_nsga2_trades_two_texts():
    model, problem, closure = problem_of("norm|logit_bias")
    other = 63 - IDS
    def both(Z): return torch.stack([problem.losses(lambda: loss_of(model, problem.expand(ids)), Z) for ids in (IDS, other)], 1)
    start = both(problem.box.x0[None])[0]
    r = minimize(both, problem.box, "nsga2", 320, batched=True, progress=False)
    front = torch.as_tensor(np.array(r.func_vals)).double()
    assert (front < start).all(1).any() and (front.min(0).values < start - 0.02).all()


def test_a_method_that_knows_ranges_stays_around_the_start():
    _, problem, _ = problem_of("norm")
    for method in ("ga", "pso", "de"):
        seen = []
        minimize(lambda Z: seen.append(Z.clone()) or Z.square().sum(1), problem.box, method, 120, batched=True, progress=False)  # noqa: B023
        far = ((torch.cat(seen) - problem.box.x0) / problem.box.sigma0).abs()
        assert far[:30].max() < 5 and far.max() < 30, "the first generation is normal around the start, later ones move a few steps"


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


# ---------------------------------------------------------------------------- projections

def test_hashed_projection_is_orthogonal_and_balanced():
    h, s = hashed_projection(103, 10, seed=3)
    R = torch.zeros(103, 10)
    R[torch.arange(103), h] = s
    G = R.T @ R
    assert torch.equal(G, torch.diag(G.diagonal())) and G.diagonal().min() >= 10 and G.diagonal().max() <= 11
    assert not torch.equal(h, hashed_projection(103, 10, seed=4)[0]) and torch.equal(h, hashed_projection(103, 10, seed=3)[0])
    assert (h != torch.arange(103) % 10).float().mean() > 0.7, "mixed, not in order"
    big, s = hashed_projection(40_000, 2)
    assert abs((big.double() - 0.5) @ s.double()) < 4 * 100, "h and s are independent"


def test_normal_projection_statistics():
    G = normal_projection(4000, 25, seed=1).double()
    assert abs(G.mean()) < 4 / (5 * 1e5**0.5) and abs(G.std() * 5 - 1) < 4 / 2e5**0.5
    z = torch.linspace(-1, 1, 25).double()
    assert abs((G @ z).square().mean() / (z.square().sum() / 25) - 1) < 4 * (2 / 4000) ** 0.5
    gram = G.T @ G / 4000 * 25
    assert (gram - torch.eye(25)).abs().max() < 5 / 4000**0.5
    assert not torch.equal(G, normal_projection(4000, 25, seed=2).double())


@pytest.mark.parametrize("project", ["random", "normal"])
def test_projection_moves_each_weight_by_its_size(project):
    model, problem, _ = problem_of("up_proj", project, 6, seed=4)
    ws = [p for n, p in model.named_parameters() if "up_proj" in n]
    N = sum(w.numel() for w in ws)
    before, z = [w.detach().double().clone() for w in ws], torch.arange(6.0, dtype=torch.float64) / 10
    problem.load(z)
    h, s = hashed_projection(N, 6, seed=4)
    moves = s.double() * z[h] if project == "random" else (normal_projection(N, 6, seed=4).double() * z).sum(1)
    at = 0
    for w, b in zip(ws, before, strict=True):
        want = b.flatten() + b.square().mean().sqrt() * moves[at:at + w.numel()]
        torch.testing.assert_close(w.detach().flatten(), want.float(), atol=1e-6, rtol=0)
        at += w.numel()


def test_scale_replaces_the_size_of_every_tensor():
    _, a, _ = problem_of("norm|q_proj", scale=0.5)
    assert torch.allclose(a.box.sigma0, torch.tensor(0.05).double())
    model, b, _ = problem_of("norm", "normal", 5, scale=0.25)
    z = torch.ones(5)
    want = 1 + 0.25 * normal_projection(320, 5)[:64].sum(1)
    torch.testing.assert_close(b.values(z[None])["model.layers.0.input_layernorm.weight"][0], want, atol=1e-5, rtol=0)


# ---------------------------------------------------------------------------- adapters

def hugging_face(kind):
    tf = pytest.importorskip("transformers")
    shape = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    c = dict(gpt2=lambda: tf.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2),
             llama=lambda: tf.LlamaConfig(**shape, intermediate_size=48, num_key_value_heads=2))[kind]()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return tf.AutoModelForCausalLM.from_config(c).eval()


def change_of(layer):
    "B A as the layer's weight lies in memory."
    change = layer.lora_B @ layer.lora_A
    return change.T if type(layer).__name__ == "Conv1D" else change


@pytest.mark.parametrize("kind", ["ours", "gpt2", "llama"])
@torch.no_grad()
def test_adapters_are_a_change_of_the_weights_and_nothing_at_first(kind):
    model = Llama(config("pico", 64), seed=0) if kind == "ours" else hugging_face(kind)
    logits = lambda m: m(IDS) if kind == "ours" else m(IDS).logits  # noqa: E731
    plain, literal = logits(model), copy.deepcopy(model)
    adapters = add_lora(model, "attn|mlp", rank=3)
    assert torch.equal(logits(model), plain), "B is zero"
    filled({n: p for n, p in adapters.items() if "lora_B" in n})
    for name, layer in model.named_modules():
        if hasattr(layer, "lora_A"):
            literal.get_submodule(name).weight += change_of(layer)
    torch.testing.assert_close(logits(model), logits(literal), atol=1e-4, rtol=0)
    assert (logits(model) - plain).abs().max() > 0.01
    assert set(choose(model, "lora")) == set(adapters) and all(p.requires_grad for p in adapters.values())


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("select", ["lora", "norm|ln_", None])
def test_hugging_face_subspaces(kind, select):
    model = hugging_face(kind)
    filled(add_lora(model, "attn|mlp", rank=2))
    problem = subspace(model, select, "normal", 10) if select is None else subspace(model, select)
    def closure():
        b = problem.expand(dict(input_ids=IDS, attention_mask=torch.ones_like(IDS)))
        return row_losses(model(**b).logits[:, :-1], b["input_ids"][:, 1:])
    Z = points(problem, 4)
    losses = problem.losses(closure, Z)
    assert problem.batched and losses.std() > 1e-5
    torch.testing.assert_close(losses, loaded_one_by_one(problem, closure, Z), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_peft_adapters_are_searched_in_one_batch(kind):
    peft = pytest.importorskip("peft")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = peft.get_peft_model(hugging_face(kind), peft.LoraConfig(r=2, target_modules=["c_attn"] if kind == "gpt2" else ["q_proj", "v_proj"], lora_dropout=0.1,
                                                                        fan_in_fan_out=kind == "gpt2", init_lora_weights=False))
    problem = subspace(model, "lora")
    def closure():
        ids = problem.expand(IDS)
        return row_losses(model(input_ids=ids).logits[:, :-1], ids[:, 1:])
    Z = points(problem, 4)
    losses = problem.losses(closure, Z)
    model.eval()
    assert problem.batched and losses.std() > 1e-6
    torch.testing.assert_close(losses, loaded_one_by_one(problem, closure, Z), atol=1e-5, rtol=0)


def test_size_of_an_adapter_is_that_of_its_layer():
    for rank in (1, 4):
        model = Llama(config("nano", 64), seed=0)
        A = add_lora(model, "up_proj", rank=rank)["model.layers.0.mlp.up_proj.lora_A"]
        w = model.model.layers[0].mlp.up_proj.weight
        B = torch.randn(352, rank, generator=torch.Generator().manual_seed(0))
        assert ((B @ A).std() / w.std()).item() == pytest.approx(1, abs=0.15)


def test_adapters_are_kept_and_follow_their_seed():
    a, b, c = (add_lora(Llama(config("pico", 64), seed=0), "q_proj", seed=s) for s in (0, 0, 1))
    name = "model.layers.0.self_attn.q_proj.lora_A"
    assert torch.equal(a[name], b[name]) and not torch.equal(a[name], c[name])
    assert abs((a[name] * a[name.replace("0", "1")]).mean() / a[name].square().mean()) < 4 / a[name].numel() ** 0.5
    model = Llama(config("pico", 64), seed=0)
    first, second = add_lora(model, "q_proj"), add_lora(model, "q_proj|k_proj")
    assert all(second[n] is p for n, p in first.items()) and len(second) == 2 * len(first)
    ids = IDS[:, :4]
    filled(second)
    once = model(ids)
    assert torch.equal(copy.deepcopy(model)(ids), once), "a copy uses its own adapters"


def test_attention_that_hides_its_projection_is_left_out():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    assert {n.partition(".")[0] for n in add_lora(layer)} == {"linear1", "linear2"}
    with pytest.raises(ValueError, match="select: 'x'.*allowed"):
        add_lora(layer, "x")
    with pytest.raises(ValueError, match="rank: 0; allowed"):
        add_lora(layer, rank=0)


def test_low_precision():
    model = Llama(config("pico", 64), seed=0).to(torch.bfloat16)
    filled(add_lora(model, "q_proj"))
    for select in ("norm", "lora", "up_proj"):
        problem = subspace(model, select)
        closure = lambda: loss_of(model, problem.expand(IDS))  # noqa: B023, E731
        Z = points(problem, 3)
        losses = problem.losses(closure, Z)
        assert problem.batched and all(p.dtype == torch.bfloat16 for p in model.parameters())
        torch.testing.assert_close(losses, loaded_one_by_one(problem, closure, Z), atol=0.05, rtol=0)


def test_full_change_of_both_shapes():
    g = torch.Generator().manual_seed(0)
    for shape in ((3, 5), (5, 3), (4, 2, 3)):
        w, v = torch.randn(shape, generator=g), torch.randn(6, *shape, generator=g)
        c = full_change(w, v)
        torch.testing.assert_close((w.flatten(1) + c.A @ c.B.mT).view_as(v), v, atol=1e-6, rtol=0)
        assert c.A.shape[-1] == min(shape[0], math.prod(shape[1:]))


# ---------------------------------------------------------------------------- contracts

def test_logit_bias_moves_the_logits_and_is_added_once():
    model = Llama(config("pico", 64), seed=0)
    plain = model(IDS)
    bias = add_logit_bias(model, 64)
    assert torch.equal(model(IDS), plain) and add_logit_bias(model, 64) is bias
    with torch.no_grad():
        bias[3] = 2.0
    torch.testing.assert_close(model(IDS)[..., 3], plain[..., 3] + 2)
    assert "logit_bias" in dict(model.named_parameters())


def rng_states(): return torch.get_rng_state(), torch.random.initial_seed(), random.getstate(), np.random.get_state()[1].tolist()


def test_flags_restored_and_no_global_randomness():
    before = rng_states()
    model, problem, closure = problem_of("lora|norm", lora="q_proj")
    problem_of("norm", "random", 5), problem_of("norm", "normal", 5)
    model.model.layers[0].eval()
    flags = [m.training for m in model.modules()]
    def fails():
        raise KeyError
    with pytest.raises(KeyError):
        problem.losses(fails, problem.box.x0[None])
    assert problem.expand(IDS) is IDS, "outside, there are no members, after an exception too"
    problem.losses(closure, problem.box.x0.expand(2, -1))
    after = rng_states()
    assert [m.training for m in model.modules()] == flags
    assert torch.equal(before[0], after[0]) and before[1:] == after[1:]


def test_dropout_is_off():
    class Dropped(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.drop = nn.LayerNorm(4), nn.Dropout(0.5)
        def forward(self, x): return self.drop(self.norm(x)).square().sum((1, 2))
    model, x = Dropped(), torch.arange(24.0).view(2, 3, 4).sin()
    problem = subspace(model)
    Z = points(problem, 3)
    losses = problem.losses(lambda: model(problem.expand(x)), Z)
    assert torch.equal(losses, problem.losses(lambda: model(problem.expand(x)), Z))


def test_a_model_without_rules_goes_on_one_by_one():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(4)
            self.scale = nn.Parameter(torch.ones(4))
        def forward(self, x): return self.norm(x * self.scale[0].item()).square().sum((1, 2))
    model, x = Odd(), torch.arange(24.0).view(2, 3, 4)
    problem = subspace(model)
    Z = points(problem, 3)
    closure = lambda: model(problem.expand(x))  # noqa: E731
    with pytest.warns(UserWarning, match="'scale'.*one point at a time"):
        losses = problem.losses(closure, Z)
    assert not problem.batched and torch.equal(model.scale, torch.ones(4))
    torch.testing.assert_close(losses, loaded_one_by_one(problem, closure, Z), atol=1e-4, rtol=0)


def test_rows_that_are_mixed_up_are_noticed():
    model, problem, _ = problem_of("norm")
    def closure():
        ids = problem.expand(IDS)
        return loss_of(model, ids).flip(0)
    with pytest.warns(UserWarning, match="alone"):
        problem.losses(closure, points(problem, 3))
    assert not problem.batched


def test_tied_weights_are_one_parameter():
    model = Llama(config("pico", 64), seed=0)
    problem = subspace(model, "embed", "normal", 4)
    assert list(problem.parameters) == ["model.embed_tokens.weight"]
    closure = lambda: loss_of(model, problem.expand(IDS))  # noqa: E731
    Z = points(problem, 3)
    torch.testing.assert_close(problem.losses(closure, Z), loaded_one_by_one(problem, closure, Z), atol=1e-5, rtol=0)


def test_a_failed_point_is_a_number_too():
    model, problem, closure = problem_of("norm")
    Z = problem.box.x0.repeat(3, 1)
    Z[1] = float("nan")
    losses = problem.losses(closure, Z)
    assert losses.isnan().tolist() == [False, True, False]


def test_kinds_and_mistakes():
    model = Llama(config("pico", 64), seed=0)
    assert set(choose(model, "norm")) == {n for n, _ in model.named_parameters() if "norm" in n}
    assert len(choose(model)) == len(list(model.parameters()))
    for args, message in [(("nothing",), "select"), (("norm", "pca", 3), "project"), (("norm", "random"), "dim"), (("norm", None, 3), "dim"), (("norm", "random", 10**6), "dim"),
                          (("norm", "normal", 0), "dim"), ((None, "normal", 4096), "project")]:
        with pytest.raises(ValueError, match=f"({message}): .*allowed"):
            subspace(model, *args)
    for settings in (dict(sigma0=0.0), dict(sigma0=float("nan")), dict(scale=-1.0)):
        with pytest.raises(ValueError, match=f"{next(iter(settings))}: .*allowed"):
            subspace(model, "norm", **settings)
    with pytest.raises(ValueError, match="Z: shape"):
        subspace(model, "norm").losses(lambda: None, torch.zeros(2, 3))
    with pytest.raises(ValueError, match="closure: losses of shape"):
        subspace(model, "norm").losses(lambda: torch.zeros(3, 2), subspace(model, "norm").box.x0.repeat(2, 1))
