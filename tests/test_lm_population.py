"A population in one batch: every member's rows meet that member's weights, or the parameter is named."
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gfopt.lm.model import Llama, config, generate
from gfopt.lm.population import (
    Population,
    PopulationError,
    expand,
    low_rank_noise,
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


HF = ["gpt2", "llama", "qwen2", "gemma2", "opt"]


def hugging_face(kind):
    tf = pytest.importorskip("transformers")
    shape = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    c = dict(gpt2=lambda: tf.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2),
             llama=lambda: tf.LlamaConfig(**shape, intermediate_size=48, num_key_value_heads=2),
             qwen2=lambda: tf.Qwen2Config(**shape, intermediate_size=48, num_key_value_heads=2),
             gemma2=lambda: tf.Gemma2Config(**shape, intermediate_size=48, num_key_value_heads=2, head_dim=8),
             opt=lambda: tf.OPTConfig(**shape, ffn_dim=48, word_embed_proj_dim=32),
             mamba=lambda: tf.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, state_size=4))[kind]()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return tf.AutoModelForCausalLM.from_config(c)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", HF)
def test_hugging_face_members(kind, masked):
    batch = dict(input_ids=IDS)
    if masked:
        batch["attention_mask"] = torch.ones_like(IDS)
        batch["attention_mask"][0, :3] = 0
    assert_members(hugging_face(kind), batch, 4, lambda m, b: m(**b).logits[:, 4:])


def test_hugging_face_without_a_rule_is_refused_by_name():
    model = hugging_face("mamba")
    with pytest.raises(PopulationError, match=r"mixer\.\w+"):
        together_and_alone(model, dict(input_ids=IDS), 4, lambda m, b: m(**b).logits)


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


def test_an_operation_without_a_rule_names_the_parameter():
    with pytest.raises(PopulationError, match=r"'conv\.weight'.*conv1d"):
        together_and_alone(Conv(), IDS, 4, lambda m, b: m(b))
    model = Conv()
    assert_members(model, IDS, 4, parameters={"table.weight": model.table.weight})


class Positions(nn.Module):
    "Positions of shape (1, T), as in GPT-2, or (T, d), as in many a small model."
    def __init__(self, shape):
        super().__init__()
        self.table, self.pos, self.shape = nn.Embedding(64, 8), nn.Embedding(64, 8), shape
    def forward(self, ids): return self.table(ids) + self.pos(torch.arange(ids.shape[1]).view(self.shape))


def test_positions_shared_by_all_rows():
    for T in (8, 9, 4):
        assert_members(Positions((1, -1)), torch.arange(2 * T).view(2, T), 4)


@pytest.mark.parametrize("T", [4, 8, 16])  # divisible by P, equal to P * B, a multiple of it
def test_rows_hidden_by_broadcasting_are_refused(T):
    with pytest.raises(PopulationError, match=r"'pos\.weight'"):
        together_and_alone(Positions((-1,)), torch.arange(2 * T).view(2, T), 4, lambda m, b: m(b))


def test_a_parameter_without_rows_is_refused():
    model = nn.Linear(4, 4)
    parameters = dict(model.named_parameters())
    with torch.no_grad(), Population(parameters, changes_of(parameters, 4), 4) as population:
        with pytest.raises(PopulationError, match="before expand"):
            model(torch.ones(8, 4))
        population.expand(torch.ones(2, 4))
        with pytest.raises(PopulationError, match=r"'weight' met activations of shape \(6, 4\)"):
            model(torch.ones(6, 4))
        with pytest.raises(PopulationError, match="sum"):
            model.weight.sum()
        assert model.weight.shape == (4, 4) and model.weight.dtype == torch.float32


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
