"The Llama against Hugging Face's, its cache, its sampling, its files; and the optimizer that pretrains it."
import json
import math

import pytest
import torch
import torch.nn.functional as F

from gfopt.lm import model as M
from gfopt.lm import pretrain as P
from gfopt.lm.text import Corpus, Domain, windows

CONFIG = M.LlamaConfig(vocab_size=61, d_model=32, n_layers=3, n_heads=4, n_kv_heads=2, d_ff=40, max_len=48)


@pytest.fixture
def model(): return M.Llama(CONFIG, seed=3)


def ids(rows, length, seed=0): return torch.randint(61, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kv", [1, 4])
def test_hugging_face_loads_the_weights_and_agrees(kv, tmp_path):
    transformers = pytest.importorskip("transformers")
    m = M.Llama(M.LlamaConfig(61, 32, 2, 4, kv, 40, 48, rope_theta=500.0))
    for i, p in enumerate(m.parameters()):
        if p.dim() == 1: p.data += 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
    M.save_model(m, tmp_path)
    hf = transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval()
    x = ids(3, 20)
    with torch.no_grad(): assert (hf(x).logits - m(x)).abs().max() < 1e-5
    own = transformers.LlamaForCausalLM(transformers.LlamaConfig(**M.hf_config(m.config)))
    missing, unexpected = own.load_state_dict(m.state_dict(), strict=False)
    assert missing == ["lm_head.weight"] and not unexpected


def test_seed_decides_and_global_state_is_left_alone(model):
    state = torch.get_rng_state()
    other = M.Llama(CONFIG, seed=3)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters()))
    assert not torch.equal(M.Llama(CONFIG, seed=4).model.embed_tokens.weight, model.model.embed_tokens.weight)
    assert not list(model.buffers())


def test_weights_begin_with_the_spread_they_should():
    m = M.Llama(M.LlamaConfig(256, 64, 8, 4, 4, 128), seed=1)
    def std(end): return float(torch.cat([p.flatten() for n, p in m.named_parameters() if n.endswith(end)]).detach().std())
    wide, deep = {"q_proj.weight": 64, "up_proj.weight": 64}, {"o_proj.weight": 64, "down_proj.weight": 128}
    assert all(std(n) == pytest.approx(d ** -0.5, rel=0.03) for n, d in wide.items())
    assert all(std(n) == pytest.approx(d ** -0.5 / 4, rel=0.03) for n, d in deep.items())  # two branches in each of eight layers
    assert std("embed_tokens.weight") == pytest.approx(0.02, rel=0.03) and all((p == 1).all() for p in m.parameters() if p.dim() == 1)


@pytest.mark.parametrize("chunks", [[12], [1] * 12, [5, 1, 6], [4, 4, 4]])
def test_cached_equals_uncached(model, chunks):
    x, cache, out, a = ids(2, 12), model.cache(), [], 0
    for n in chunks: out.append(model(x[:, a:a + n], cache)); a += n
    assert (torch.cat(out, 1) - model(x)).abs().max() < 1e-5 and cache.length == 12


def test_removed_branches_are_skipped_and_the_cache_still_fits(model):
    x = ids(2, 10)
    full = model(x)
    model.model.layers[0].self_attn = None
    model.model.layers[1].mlp = None
    del model.model.layers[2]
    assert not torch.allclose(model(x), full)
    cache = model.cache()
    parts = torch.cat([model(x[:, :6], cache), model(x[:, 6:], cache)], 1)
    assert (parts - model(x)).abs().max() < 1e-5 and list(cache.layers) == [1]


def test_heads_can_be_cut_by_whole_groups(model):
    a = model.model.layers[0].self_attn
    a.q_proj.weight = torch.nn.Parameter(a.q_proj.weight[:16].detach())  # heads 0 and 1 share key-value head 0
    a.k_proj.weight = torch.nn.Parameter(a.k_proj.weight[:8].detach())
    a.v_proj.weight = torch.nn.Parameter(a.v_proj.weight[:8].detach())
    a.o_proj.weight = torch.nn.Parameter(a.o_proj.weight[:, :16].detach())
    assert model(ids(2, 6)).shape == (2, 6, 61)


def test_the_future_is_not_seen(model):
    x, y = ids(1, 10), ids(1, 10)
    y[:, 6] = (y[:, 6] + 1) % 61
    assert torch.allclose(model(x)[:, :6], model(torch.cat([x[:, :6], y[:, 6:]], 1))[:, :6], atol=1e-6)


def test_too_long_is_refused(model):
    with pytest.raises(ValueError, match="48"): model(ids(1, 49))
    with pytest.raises(ValueError, match="n_kv_heads"): M.LlamaConfig(61, 32, 2, 4, 3, 40)
    with pytest.raises(ValueError, match="d_model"): M.LlamaConfig(61, 30, 2, 4, 2, 40)
    with pytest.raises(ValueError, match="pico"): M.config("huge", 61)
    assert M.LlamaConfig.from_dict(json.loads(json.dumps(CONFIG.to_dict()))) == CONFIG


def test_every_parameter_meets_only_known_operations(model):
    from torch.overrides import TorchFunctionMode
    names, seen = {id(p): n for n, p in model.named_parameters()}, {}
    class Watch(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            for a in (*args, *(kwargs or {}).values()):
                if id(a) in names and isinstance(a, torch.nn.Parameter): seen.setdefault(names[id(a)], set()).add(func)
            return func(*args, **(kwargs or {}))
    with torch.no_grad(), Watch(): model(ids(2, 5))
    assert set(seen) == set(names.values())
    ops = set().union(*seen.values())
    assert {f.__name__ for f in ops} <= {"linear", "embedding", "rms_norm", "__get__"}, ops
    assert len(seen["model.embed_tokens.weight"]) >= 2


def test_row_losses_and_bits_per_byte(model):
    x = ids(4, 9)
    logits, labels = model(x[:, :-1]), x[:, 1:].clone()
    want = torch.stack([F.cross_entropy(l, y) for l, y in zip(logits, labels)])
    assert torch.allclose(M.row_losses(logits, labels), want, atol=1e-6)
    labels[0, 3:] = -100
    assert torch.allclose(M.row_losses(logits, labels)[0], F.cross_entropy(logits[0, :3], labels[0, :3]), atol=1e-6)
    class Tok: token_bytes = torch.arange(61)
    batch = windows(ids(1, 200)[0], 16)
    p = model(batch["input_ids"]).double().log_softmax(-1).gather(-1, batch["labels"][..., None])
    want = -float(p.detach().sum()) / math.log(2) / int(batch["labels"].sum())
    assert all(abs(M.bits_per_byte(model, batch, Tok, rows=r) / want - 1) < 1e-6 for r in (1, 5, 16))


def test_sampling_follows_the_distribution_and_belongs_to_the_row(model):
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0]).expand(20000, 4)
    u = torch.rand(20000, generator=torch.Generator().manual_seed(0))
    share = torch.bincount(M.sample_token(logits, u, 0.7), minlength=4) / 20000
    assert (share - (logits[0] / 0.7).softmax(0)).abs().max() < 0.015
    assert set(M.sample_token(logits, u, top_k=2).tolist()) == {1, 2} and set(M.sample_token(logits, u, 0).tolist()) == {2}
    edge = torch.tensor([0.0, 1 - 2 ** -24])
    assert M.sample_token(torch.tensor([[-math.inf, 0, 0, -math.inf]] * 2), edge).tolist() == [1, 2]
    u, prompt = torch.rand(5, 8, generator=torch.Generator().manual_seed(1)), ids(5, 4)
    all_rows = M.generate(model, prompt, 8, uniforms=u)
    assert torch.equal(M.generate(model, prompt[2:3], 8, uniforms=u[2:3]), all_rows[2:3]) and all_rows.shape == (5, 8)
    greedy = M.generate(model, prompt, 3, temperature=0)
    assert torch.equal(greedy[:, 2], model(torch.cat([prompt, greedy[:, :2]], 1))[:, -1].argmax(-1))
    with pytest.raises(ValueError, match="generator"): M.generate(model, prompt, 3)


def test_files(model, tmp_path):
    M.save_model(model, tmp_path / "m")
    again = M.load_model(tmp_path / "m")
    assert again.config == model.config and torch.equal(again(ids(1, 5)), model(ids(1, 5)))
    M.save_model(model.bfloat16(), tmp_path / "m")
    assert M.load_model(tmp_path / "m").model.norm.weight.dtype == torch.bfloat16
    with pytest.raises(FileNotFoundError): M.load_model(tmp_path / "none")


TEXT = torch.randint(61, (4000,), generator=torch.Generator().manual_seed(5)) // 6


def train(**kw):
    m = M.Llama(M.LlamaConfig(61, 16, 1, 2, 2, 24), seed=0)
    return m, P.pretrain(m, TEXT, rows=4, length=16, progress=False, **kw)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_pretraining_learns_repeats_itself_and_leaves_global_state(optimizer):
    state = torch.get_rng_state()
    (a, ha), (b, hb) = (train(steps=60, optimizer=optimizer) for _ in range(2))
    assert torch.equal(state, torch.get_rng_state())
    assert [r["loss"] for r in ha] == [r["loss"] for r in hb] and all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))
    assert ha[-1]["loss"] < 0.8 * ha[0]["loss"] and ha[-1]["step"] == 60 and ha[-1]["tokens"] == 60 * 64 and len(ha) == 10
    assert all(p.grad is None for p in a.parameters()) and not a.training


def test_budgets():
    assert train(token_budget=1000)[1][-1]["step"] == 16  # the first step at or past the budget
    assert 0.2 <= train(seconds=0.2)[1][-1]["seconds"] < 1.5
    assert train(steps=3, token_budget=10**6, evaluate=lambda m: 1.5)[1][-1]["bpb"] == 1.5
    for bad in ({}, dict(steps=0), dict(seconds=-1.0)):
        with pytest.raises(ValueError, match="steps, seconds or token_budget"): train(**bad)
    with pytest.raises(ValueError, match="sgd"): train(steps=1, optimizer="sgd")


def test_divergence_stops_the_run_and_shows():
    m = M.Llama(M.LlamaConfig(61, 16, 1, 2, 2, 24))
    m.model.norm.weight.data.fill_(math.nan)
    h = P.pretrain(m, TEXT, rows=2, length=8, steps=50, progress=False, evaluate=lambda m: 1 / 0)
    assert h[-1]["step"] == 5 and math.isnan(h[-1]["loss"]) and h[-1]["bpb"] is None


def test_newton_schulz_keeps_the_singular_vectors():
    G = torch.randn(30, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    inner = U.mT @ P.newton_schulz(G) @ Vh.mT
    assert (inner - inner.diagonal().diag()).abs().max() < 1e-6 and 0.6 < inner.diagonal().min() <= inner.diagonal().max() < 1.3
    assert P.newton_schulz(torch.zeros(3, 4)).abs().max() == 0


def gradients(m, seed):
    g = torch.Generator().manual_seed(seed)
    for p in m.parameters(): p.grad = torch.randn(p.shape, generator=g)
    return {n: p.grad.clone() for n, p in m.named_parameters()}


def test_adamw_is_that_of_torch():
    a, b = (M.Llama(CONFIG, seed=1) for _ in range(2))
    ours = P.Muon(a, 0.01, embed_lr=1.0, weight_decay=0.1, matrices=False)
    groups = [dict(params=[p for p in b.parameters() if (p.dim() == 2) == matrix], weight_decay=0.1 * matrix) for matrix in (False, True)]
    theirs = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95), eps=1e-8)
    for k in range(5):
        gradients(a, k), gradients(b, k)
        ours.step(), theirs.step()
    for p, q in zip(a.parameters(), b.parameters()): torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_muon_is_its_formula():
    m, name = M.Llama(CONFIG, seed=1), "model.layers.1.mlp.gate_proj.weight"  # one of three that go through together
    opt, p = P.Muon(m, 0.02, momentum=0.8, weight_decay=0.1), dict(m.named_parameters())[name]
    want, average = p.detach().clone(), torch.zeros_like(p)
    for k in range(3):
        g = gradients(m, k)[name]
        opt.step()
        average = 0.8 * average + 0.2 * g
        want = (1 - 0.02 * 0.1) * want - 0.02 * 0.2 * math.sqrt(40) * P.newton_schulz(0.2 * g + 0.8 * average)  # 40 is the longer side
        torch.testing.assert_close(p, want, rtol=1e-4, atol=1e-5)


def test_the_learning_rate_rises_and_falls_along_lines():
    assert [P.schedule(t) for t in (0, 0.025, 0.05, 0.525, 1)] == pytest.approx([0.01, 0.5, 1, 0.5, 0])
    assert [P.schedule(t, 0.2, 0.1) for t in (0.1, 0.2, 0.6, 1)] == pytest.approx([0.5, 1, 0.55, 0.1])


@pytest.fixture
def base(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    docs = [b"def f%d(x):\n    return x + %d\n" % (i, i) * 20 for i in range(30)]
    corpus = Corpus(Domain(docs[:20], docs[20:25], docs[25:]), Domain([b"a"], [b"b"], [b"c"]))
    return lambda **kw: P.base_model(corpus, "pico", None, tokenizer="bytes", progress=False, **dict(steps=2, rows=2, length=16) | kw), tmp_path / "gfopt"


def test_base_model_is_cached_by_its_settings(base):
    make, folder = base
    model, tok, history = make()
    again, tok2, history2 = make()
    assert history2 == history and tok2.vocab_size == tok.vocab_size and len(list(folder.iterdir())) == 1
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))
    make(seed=1), make(lr=0.5)
    assert len(list(folder.iterdir())) == 3


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json", "history.json", "seal.json"])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_damaged_base_model_is_rebuilt(base, file, damage):
    make, folder = base
    model, _, history = make()
    path, = folder.glob(f"base-*/{file}")
    path.unlink() if damage == "gone" else path.write_bytes(path.read_bytes()[:-3])
    again, _, new = make()
    assert new[-1]["seconds"] != history[-1]["seconds"] and len(list(folder.iterdir())) == 1
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))
    assert make()[2] == new


def test_an_interrupted_base_model_leaves_nothing(base, monkeypatch):
    make, folder = base
    def interrupted(*a, **k): raise KeyboardInterrupt
    monkeypatch.setattr(P, "save_model", interrupted)
    with pytest.raises(KeyboardInterrupt): make()
    assert list(folder.iterdir()) == []
