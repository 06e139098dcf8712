"""The whole menu of compression, on this project's model and on Hugging Face's: every trap of the field as a test named after it."""
import hashlib
import itertools
import json
import math
import random
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from compressing import VOCAB, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from gfopt.compress import evolution, export
from gfopt.compress.evolution import (
    Damages,
    evolve,
    evopress,
    generation_cost,
    search_with,
)
from gfopt.compress.export import Compressed, load_compressed, settle
from gfopt.compress.feedback import damped, layer_error, moments, round_with_feedback
from gfopt.compress.front import affordable_share, compress, dense_bytes
from gfopt.compress.genome import TECHNIQUES, GenomeSpace, make_genes
from gfopt.compress.heal import correction, heal, reconstruct
from gfopt.compress.measure import (
    count_parameters,
    decoder,
    file_bytes,
    measure_latency,
)
from gfopt.compress.rank import break_even, build, level_bytes, low_rank, split_level
from gfopt.compress.search import Divergence, Evaluator, dynamic_programming, logits_of
from gfopt.compress.techniques import dequantize, group4, quantize, store, sub_blocks
from gfopt.compress.widths import energy, members, narrowed, refit
from gfopt.lm.model import Llama, LlamaConfig, save_model

transformers = pytest.importorskip("transformers")


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


KINDS = ("gfopt", "llama", "llama-bias", "qwen2", "qwen3", "mistral")
IDS = torch.randint(VOCAB, (4, 16), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def models(): return {kind: tiny_model(kind) for kind in KINDS}


@pytest.fixture(scope="module")
def spaces(models): return {k: GenomeSpace(m, TECHNIQUES, moments=moments(m, IDS)) for k, m in models.items()}


def chosen(space, genome):
    genome = space.canonical(tuple(genome))
    return Compressed(space, SimpleNamespace(genome=genome, bytes=space.bytes(genome), loss=0.0, source="test"))


def everything(space):
    "An attention gone, narrower layers, thin factors, 4, 8 and 16 bits, all in one genome."
    g = tuple("keep" if "keep" in x.levels else x.levels[i % len(x.levels)] for i, x in enumerate(space.genes))
    return space.canonical(("drop",) + g[1:])


def state_bytes(model): return sum({t.data_ptr(): t.nbytes for t in model.state_dict().values()}.values())


def stepwise(model, ids):
    "Logits of cached reading, one token at a time."
    return torch.cat([torch.cat([read(ids[r:r + 1, t:t + 1]) for t in range(ids.shape[1])], 1) for r in range(len(ids)) for read in [decoder(model, ids.shape[1])]])


# error feedback --------------------------------------------------------------------------------------------------
@settings(max_examples=25, deadline=None)
@given(bits=st.sampled_from([3, 4, 8]), group=st.sampled_from([None, 8, 32]), n=st.sampled_from([32, 160]), seed=st.integers(0, 99))
def test_error_feedback_is_never_worse_than_rounding_to_nearest(bits, group, n, seed):
    x = randn(300, n, seed=seed) @ randn(n, n, seed=seed + 1) / n ** 0.5
    w, c = randn(6, n, seed=seed + 2), x.T @ x / 300
    q, scale = round_with_feedback(w, c, bits, group)
    top = 2 ** (bits - 1) - 1
    assert q.abs().max() <= top and q.shape == w.shape and scale.shape == (6, n // (group or n)) and scale.dtype == torch.bfloat16
    near = layer_error(w, dequantize(*quantize(w, bits, group)), c)
    got = layer_error(w, dequantize(q, scale), c)
    assert got <= near
    if bits == 4: assert got < 0.9 * near
    literal = float(((x.double() @ (w - dequantize(q, scale)).double().T) ** 2).sum() / 300)
    assert got == pytest.approx(literal, rel=1e-3)


def test_error_feedback_over_several_blocks_equals_the_formula_without_blocks():
    n = 300
    x = randn(900, n) @ randn(n, n, seed=1) / n ** 0.5
    w, c = randn(4, n, seed=2), x.T @ x / 900
    q, scale = round_with_feedback(w, c, 4, 20)
    U, v = torch.linalg.cholesky(torch.linalg.inv(damped(c)), upper=True), w.double().clone()
    for j in range(n):
        if j % 20 == 0: assert torch.equal(quantize(v[:, j:j + 20].float(), 4)[1][:, 0], scale[:, j // 20])
        s = scale[:, j // 20].double()
        r = (v[:, j] / s).round().clamp(-7, 7)
        assert (r == q[:, j]).all()
        v[:, j:] -= ((v[:, j] - s * r) / U[j, j])[:, None] * U[j, j:]


def test_silent_inputs_do_not_break_the_factorisation():
    c = torch.zeros(32, 32); c[0, 0] = 1.0
    for bits in (4, 8): assert torch.isfinite(dequantize(*round_with_feedback(randn(4, 32), c, bits, 16))).all()
    assert torch.isfinite(refit(randn(4, 32), torch.zeros(32, 32), torch.arange(8))).all()
    assert all(torch.isfinite(t).all() for t in low_rank(randn(40, 32), c, 4))


def test_moments_are_those_of_the_inputs_and_leave_no_hook(models):
    for kind in ("gfopt", "qwen3"):
        m, path, seen = models[kind], "model.layers.2.self_attn.o_proj", []
        c = moments(m, IDS, rows=3)
        hook = m.get_submodule(path).register_forward_pre_hook(lambda _, a: seen.append(a[0].flatten(0, 1)))
        logits_of(m, IDS); hook.remove()
        assert torch.allclose(c[path], seen[0].T @ seen[0] / IDS.numel(), rtol=1e-4, atol=1e-5)
        assert len(c) == 21 and not any(mod._forward_pre_hooks for mod in m.modules())


# heads and neurons -----------------------------------------------------------------------------------------------
def test_whole_kv_groups_under_grouped_queries(models):
    for kind, m in models.items():
        a, x = m.model.layers[1].self_attn, randn(50, 32)
        name, groups, size = members(a)
        assert (name, groups, size) == ("heads", 2, 2 * a.head_dim)
        small = narrowed(a, torch.tensor([1]), torch.eye(2 * size))
        d = a.head_dim
        for p, rows in (("q_proj", slice(2 * d, 4 * d)), ("k_proj", slice(d, 2 * d)), ("v_proj", slice(d, 2 * d))):
            assert torch.equal(small[p].weight, getattr(a, p).weight[rows]), (kind, p)
            assert torch.allclose(small[p](x), getattr(a, p)(x)[:, rows], atol=1e-5)  # the bias is cut with its rows
        assert torch.allclose(small["o_proj"].weight, a.o_proj.weight[:, 2 * d:], atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 99), k=st.integers(1, 15))
def test_refitting_is_the_least_squares_answer(seed, k):
    x = (randn(400, 16, seed=seed) @ randn(16, 16, seed=seed + 1)).double()
    w, c = randn(5, 16, seed=seed + 2).double(), x.T @ x / 400
    kept = torch.randperm(16, generator=torch.Generator().manual_seed(seed))[:k].sort().values
    error = lambda v: float((x @ w.T - x[:, kept] @ v.T).square().sum())
    best, got = torch.linalg.lstsq(x[:, kept], x @ w.T).solution.T, refit(w, c, kept)
    assert error(got) <= error(w[:, kept]) * 1.001 and error(got) <= error(best) * 1.5 + 0.05 * float((x @ w.T).square().sum())


def test_energy_finds_the_silent_and_ignores_mere_size():
    w, x = randn(6, 8), randn(200, 8, seed=1)
    w[:, 3] *= 100; x[:, 3] *= 1e-4  # large and never used
    s = energy(w, x.T @ x / 200)
    assert s.argmin() == 3 and energy(w, x.T @ x / 200, 4).shape == (2,)


def test_masks_give_no_speed_so_matrices_are_really_smaller(spaces, models):
    for kind, space in spaces.items():
        g = tuple(x.levels[0] if x.path.endswith((".heads", ".neurons")) else x.levels[-1] for x in space.genes)
        m = space.library.use(g)
        for layer in m.model.layers:
            assert layer.self_attn.k_proj.weight.shape[0] == layer.self_attn.head_dim and layer.mlp.up_proj.weight.shape[0] == 16
        assert count_parameters(m) < 0.6 * count_parameters(models[kind]), kind


# low rank --------------------------------------------------------------------------------------------------------
@settings(max_examples=40, deadline=None)
@given(m=st.integers(4, 70).map(lambda n: 2 * n), n=st.integers(4, 70).map(lambda n: 2 * n), share=st.sampled_from(["1/4", "1/2", "3/4"]), bits=st.sampled_from([4, 8, 16, 32]), bias=st.booleans())
def test_a_rank_above_break_even_enlarges_and_is_never_offered(m, n, share, bits, bias):
    r, b = split_level(f"r{share}@{bits}", m, n)
    assert b == bits and 0 < r < break_even(m, n) and r % 2 == 0
    layer = torch.nn.Linear(n, m, bias=bias).requires_grad_(False)
    small = build(layer, f"r{share}@{bits}")
    assert state_bytes(small) == level_bytes(f"r{share}@{bits}", m, n, bias)
    assert level_bytes(f"r{share}@32", m, n) < level_bytes(32, m, n)
    with pytest.raises(ValueError, match="enlarge"): low_rank(layer.weight, None, math.ceil(break_even(m, n)))


def test_low_rank_error_is_the_tail_of_the_whitened_spectrum():
    x = randn(400, 20) * torch.linspace(0.1, 3, 20)
    w, c = randn(30, 20, seed=1), x.T @ x / 400
    s = torch.linalg.svdvals(w.double() @ torch.linalg.cholesky(c.double()))
    for r in (1, 4, 8):
        a, b = low_rank(w, c, r)
        assert layer_error(w, a @ b, c) == pytest.approx(float((s[r:] ** 2).sum()), rel=0.01)
        p, q = low_rank(w, None, r)
        assert layer_error(w, a @ b, c) < layer_error(w, p @ q, c)


def test_unknown_levels_are_refused():
    for bad in ("r1/3@4", "r1/2@5", "half"):
        with pytest.raises(ValueError, match="level"): split_level(bad, 8, 8)


# genome ----------------------------------------------------------------------------------------------------------
@settings(max_examples=30, deadline=None)
@given(kind=st.sampled_from(KINDS), seed=st.integers(0, 10 ** 6), share=st.floats(0, 1))
def test_scales_biases_embeddings_and_norms_count_as_bytes(spaces, kind, seed, share):
    space, rng = spaces[kind], random.Random(seed)
    budget = int(space.low + share * (space.high - space.low))
    a = space.random(budget, rng)
    for g in (a, space.mutate(a, budget, rng), space.uniform(budget)):
        assert g == space.canonical(g)
        assert state_bytes(space.library.use(g)) == space.bytes(g) <= budget
        ups = [u for i in range(len(g)) if (u := space.step(g, i, 1))]
        assert all(space.bytes(u) > budget or space.bytes(u) <= space.bytes(g) for u in ups)


def test_an_infeasible_target_raises_at_once_and_never_hangs(spaces, models):
    for kind, space in spaces.items():
        for call in (space.uniform, lambda b: space.random(b, random.Random(0)), lambda b: dynamic_programming(space, {}, b)):
            with pytest.raises(ValueError, match=f"at least {space.low} bytes"): call(space.low - 1)
        with pytest.raises(ValueError, match=f"at least {space.low} bytes"): compress(models[kind], IDS, budget=space.low - 1, progress=False)


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_each_technique_alone_is_a_space(models, technique):
    m = models["gfopt"]
    space = GenomeSpace(m, (technique,), moments=moments(m, IDS))
    top = tuple(g.levels[-1] for g in space.genes)
    dense = technique != "bits"
    assert (space.high == state_bytes(m)) == dense and space.low < space.high
    if dense: assert torch.equal(space.library.use(top)(IDS), m(IDS))
    for share in (0.1, 0.5, 0.9):
        budget = int(space.low + share * (space.high - space.low))
        assert space.bytes(space.uniform(budget)) <= budget


def test_levels_made_in_another_order_are_the_same(models):
    "A level must not depend on which levels stood in the model when it was first asked for."
    m = models["gfopt"]
    c = moments(m, IDS)
    one, two = (GenomeSpace(m, TECHNIQUES, moments=c) for _ in "ab")
    rng = random.Random(1)
    genomes = [one.random(one.high // 2, rng) for _ in range(6)]
    first = [one.library.use(g)(IDS) for g in genomes]
    second = [two.library.use(g)(IDS) for g in reversed(genomes)]
    assert all(torch.equal(a, b) for a, b in zip(first, reversed(second)))


def test_the_users_model_is_left_alone(models):
    for m in models.values():
        before, heads = {k: v.clone() for k, v in m.state_dict().items()}, [layer.self_attn for layer in m.model.layers]
        space = GenomeSpace(m, TECHNIQUES, moments=moments(m, IDS))
        chosen(space, everything(space))
        assert all(torch.equal(v, before[k]) for k, v in m.state_dict().items()) and heads == [layer.self_attn for layer in m.model.layers]
        assert [getattr(a, "layer_idx", i) for i, a in enumerate(heads)] == [0, 1, 2]


def test_techniques_are_named_and_per_block_has_only_two(models):
    with pytest.raises(ValueError, match="prune"): make_genes(models["gfopt"], ("prune",))
    with pytest.raises(ValueError, match="per='linear'"): make_genes(models["gfopt"], TECHNIQUES, per="block")


# dynamic programming, evolution ----------------------------------------------------------------------------------
def test_dynamic_programming_solves_the_whole_menu_exactly():
    space = GenomeSpace(Llama(LlamaConfig(32, 32, 1, 2, 2, 32)).requires_grad_(False), TECHNIQUES, bits=(8,))
    rng = random.Random(0)
    scores = {(i, v): d for i, g in enumerate(space.genes) for v, d in zip(g.levels, sorted((rng.random() for _ in g.levels), reverse=True))}
    for i, v in scores: scores[i, v] += 3.0 * (v == "drop")  # dear enough that matrices share what there is
    total = lambda g: sum(scores[i, v] for i, v in enumerate(g) if space.audible(g, i))
    blocks = [[i for i in m] for m in space.groups.values()]
    parts = []  # the Pareto set of each group, by brute force
    for members_ in blocks:
        seen = {}
        for levels in itertools.product(*(space.genes[i].levels for i in members_)):
            g = list(x.levels[-1] for x in space.genes)
            for i, v in zip(members_, levels): g[i] = v
            g = space.canonical(tuple(g))
            cost, value = space.group_cost(space.genes[members_[0]].block, tuple(g[i] for i in members_)), sum(scores[i, g[i]] for i in members_ if space.audible(g, i))
            seen[cost] = min(seen.get(cost, math.inf), value)
        parts.append(seen)
    for share in (0.0, 0.2, 0.5, 0.9):
        budget = int(space.low + share * (space.high - space.low))
        best = min(sum(v for _, v in c) for c in itertools.product(*(p.items() for p in parts)) if sum(b for b, _ in c) <= budget)
        got = dynamic_programming(space, scores, budget, cells=10 ** 6)
        assert space.bytes(got) <= budget and total(got) <= best + 1e-9
        if share == 0.5: assert len({v for g, v in zip(space.genes, got) if len(g.parts) == 1}) > 1


class Table:
    "A divergence that is a formula, so that the truth is known."
    def __init__(self, fn): self.fn, self.ids = fn, torch.zeros(8, 1)
    def __call__(self, genome): return self.fn(genome)
    def by_row(self, genome, start, stop): return torch.full((stop - start,), self.fn(genome), dtype=torch.float64)


def known_world(monkeypatch, space, pairs=3.0):
    monkeypatch.setattr(space.library, "use", lambda g: g)
    scores = {(i, v): 0.1 * (len(g.levels) - 1 - j) * (1 + i % 5) for i, g in enumerate(space.genes) for j, v in enumerate(g.levels)}
    def truth(g):
        gone = [scores[i, v] for i, v in enumerate(g) if v == "drop"]
        return 1e-6 + sum(scores[i, v] for i, v in enumerate(g)) + pairs * sum(a * b for a, b in itertools.combinations(gone, 2))
    return scores, truth


@pytest.fixture()
def coarse(models): return GenomeSpace(models["gfopt"], per="block")


def test_evolution_finds_the_optimum_that_can_be_enumerated(monkeypatch, coarse):
    scores, truth = known_world(monkeypatch, coarse)
    budget = int(coarse.low + 0.3 * (coarse.high - coarse.low))
    best = min(truth(g) for g in map(tuple, itertools.product(*(x.levels for x in coarse.genes))) if coarse.bytes(g) <= budget)
    hits = 0
    for seed in range(8):
        ev = Evaluator(coarse, Table(truth))
        evolve(ev, budget, 40, random.Random(seed), scores)
        assert ev.spent <= 40
        hits += ev.best(None, budget)[0][0] <= best
    assert hits == 8


def test_damages_learn_what_single_scores_cannot_know(monkeypatch, coarse):
    scores, truth = known_world(monkeypatch, coarse, pairs=30.0)
    rng = random.Random(0)
    draw = lambda n: {g: truth(g) for g in (tuple(rng.choice(x.levels) for x in coarse.genes) for _ in range(n))}
    seen, fresh = draw(80), draw(50)
    d = Damages(coarse, scores)
    additive = d.features(list(fresh)).sum(1)
    error = lambda got: sum(abs(math.log(a / b)) for a, b in zip(got, fresh.values()) if b > 0.01)
    assert error(d.fit(seen).predict(list(fresh)).clip(1e-3)) < 0.7 * error(additive.clip(1e-3))
    best = min(seen, key=seen.get)
    learnt = d.learnt(best, 0.0, rng)
    assert all(abs(learnt[i, v]) < 1e-9 for i, v in enumerate(best))  # nothing changes where nothing moves
    for (i, v), y in learnt.items(): assert y == pytest.approx(d.predict([best[:i] + (v,) + best[i + 1:]])[0] - d.predict([best])[0], abs=1e-9)


def test_every_search_keeps_its_count_and_its_budget(monkeypatch, coarse):
    scores, truth = known_world(monkeypatch, coarse)
    budget = coarse.high // 2
    for go in (lambda ev: evolve(ev, budget, 12, random.Random(0), None), lambda ev: evopress(ev, budget, 12, random.Random(0)),
               *(lambda ev, m=m: search_with(ev, m, budget, 12, 0) for m in ("ga", "random", "nsga2", "bo"))):
        ev = Evaluator(coarse, Table(truth))
        go(ev)
        assert 0 < ev.spent <= 12 and all(coarse.bytes(g) <= budget for g in ev.known)


def test_the_rest_of_the_text_is_paid_for_and_nothing_twice(models):
    m = models["gfopt"]
    space = GenomeSpace(m)
    d = Divergence(m, IDS)
    ev, g = Evaluator(space, d), space.flat(4)
    a = ev.glance(g, 0.25)
    assert ev.spent == 0.25 and a == pytest.approx(Divergence(m, IDS[:1])(space.library.use(g)), rel=1e-5)
    ev.glance(g, 0.5); assert ev.spent == 0.5
    assert ev(g, "x") == pytest.approx(d(space.library.use(g)), rel=1e-6) and ev.spent == 1
    ev(g, "y"); ev.glance(g, 0.75); assert ev.spent == 1


def test_evopress_stages_cost_what_the_formula_says(monkeypatch, models):
    space = GenomeSpace(models["gfopt"])
    scores, truth = known_world(monkeypatch, space)
    table = Table(truth); table.ids = torch.zeros(16, 1)
    ev = Evaluator(space, table)
    evopress(ev, space.high // 2, 1 + generation_cost(16), random.Random(0))
    assert ev.spent <= 1 + generation_cost(16) and ev.spent > 2


def test_nan_fitness_ranks_last(models):
    m = models["gfopt"]
    space = GenomeSpace(m)
    bad = Table(lambda m: math.nan)
    bad.ids = IDS
    ev = Evaluator(space, bad)
    assert ev(space.flat(8), "x") == math.inf and ev.glance(space.flat(4), 0.5) == math.inf
    ev.known[space.flat(16)] = 1.0; ev.log.append(("x", space.flat(16), 1.0, 2))
    assert ev.best("x", space.high)[0][0] == 1.0
    scores = {(i, v): math.inf if v == 4 else 0.1 for i, g in enumerate(space.genes) for v in g.levels}
    assert all(map(math.isfinite, Damages(space, scores).fit(ev.known).learnt(space.flat(8), 0.1, random.Random(0)).values()))


# compress --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_hugging_face_models_without_edits_and_baselines_always_run(models, kind):
    m, state = models[kind], torch.get_rng_state()
    front = compress(m, IDS, budget=0.15, evaluations=90, validation=IDS.flip(0).contiguous(), progress=False)
    assert {p.source for p in front.points} == {"uniform", "additive", "greedy", "random", "evolution"} and not front.skipped
    assert front.evaluator.spent <= 90 and all(p.bytes <= front.budgets[0] for p in front.points)
    assert front.dense_bytes == dense_bytes(m) == state_bytes(m) and torch.equal(torch.get_rng_state(), state)
    found = min(p.loss for p in front.points)
    assert found <= min(p.loss for p in front.points if p.source == "uniform")


def test_finalists_are_re_scored_on_fresh_data(models):
    m, fresh = models["gfopt"], IDS.flip(1).contiguous()
    front = compress(m, IDS, budget=0.2, evaluations=60, validation=fresh, progress=False)
    check = Divergence(m, fresh)
    for p in front.points:
        assert p.loss == check(front.space.library.use(p.genome)) and p.calibration == front.evaluator.known[p.genome] != p.loss


def test_scores_are_measured_on_fewer_rows_when_there_are_many(models):
    space = GenomeSpace(models["gfopt"], TECHNIQUES)
    n = 1 + sum(len(g.levels) - 1 for g in space.genes)
    assert affordable_share(space, 10 * n, 16) == 1 and affordable_share(space, 5, 16) == 0
    share = affordable_share(space, n, 16)
    assert share in [k / 16 for k in range(1, 17)] and n * share <= n / 2


# export ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
def test_saved_reloaded_and_cached_equal_to_the_last_bit(spaces, models, tmp_path, kind):
    space = spaces[kind]
    small = chosen(space, everything(space))
    before = logits_of(small.model, IDS)
    assert torch.equal(before, logits_of(space.library.use(everything(space)), IDS))
    small.save(tmp_path)
    state = torch.get_rng_state()
    again = load_compressed(tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(logits_of(again, IDS), before)
    assert (stepwise(again, IDS) - before).abs().max() < 1e-4 * before.abs().max()
    assert file_bytes(tmp_path) >= space.bytes(small.genome) and count_parameters(again) == count_parameters(small.model)
    if kind != "gfopt":
        out = again.generate(IDS[:1], max_new_tokens=6, do_sample=False, attention_mask=torch.ones_like(IDS[:1]))[0].tolist()
        plain = IDS[0].tolist()
        for _ in range(6): plain.append(int(logits_of(again, torch.tensor([plain]))[0, -1].argmax()))
        assert out == plain


def test_a_fresh_process_gives_equal_logits_for_every_technique(spaces, tmp_path):
    want = {}
    for kind in ("gfopt", "qwen2", "mistral"):
        small = chosen(spaces[kind], everything(spaces[kind]))
        small.save(tmp_path / kind)
        want[kind] = hashlib.sha256(logits_of(small.model, IDS).numpy().tobytes()).hexdigest()
    code = ("import sys, torch, hashlib, json; from gfopt.compress.export import load_compressed; from gfopt.compress.search import logits_of\n"
            f"torch.set_num_threads({torch.get_num_threads()}); ids = torch.randint({VOCAB}, (4, 16), generator=torch.Generator().manual_seed(5))\n"
            "print(json.dumps({k: hashlib.sha256(logits_of(load_compressed(sys.argv[1] + '/' + k), ids).numpy().tobytes()).hexdigest() for k in ('gfopt', 'qwen2', 'mistral')}))")
    out = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr[-500:]
    assert json.loads(out.stdout.splitlines()[-1]) == want


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("which", [0, 1])
def test_layer_index_is_renumbered_and_cached_generation_equals_uncached(spaces, tmp_path, kind, which):
    "The attention of layer 0 gone (the cache asks layer 0 how long the text is), and a layer gone for good."
    space = spaces[kind]
    paths = ["model.layers.0.self_attn"] if which == 0 else ["model.layers.1.self_attn", "model.layers.1.mlp"]
    small = chosen(space, ("drop" if x.path in paths else x.levels[-1] for x in space.genes))
    small.save(tmp_path)
    again = load_compressed(tmp_path)
    layers = again.model.layers
    assert len(layers) == 3 - which and small.dropped == sorted(paths)
    if kind != "gfopt":
        kept = [layer.self_attn.layer_idx for layer in layers if hasattr(layer.self_attn, "layer_idx")]
        assert kept == [0, 1] and again.config.num_hidden_layers == 3 - which
    full = logits_of(again, IDS)
    assert torch.equal(full, logits_of(space.library.use(small.genome), IDS))
    assert (stepwise(again, IDS) - full).abs().max() < 1e-4 * full.abs().max()


@pytest.mark.parametrize("gone", [(0,), (1,), (2,), (0, 2), (0, 1), (1, 2), (0, 1, 2)])
@pytest.mark.parametrize("types", ["fsf", "sff", "ssf"])
def test_the_cache_keeps_whole_and_sliding_attentions_apart(tmp_path, gone, types):
    "A place in the cache is of one kind, and the configuration says which; attentions go, their layers stay."
    model = tiny_model("qwen2-sliding", layers=3, types=["sliding_attention" if t == "s" else "full_attention" for t in types])
    space = GenomeSpace(model, ("blocks", "bits"))
    small = chosen(space, ("drop" if x.path in [f"model.layers.{i}.self_attn" for i in gone] else x.levels[-1] for x in space.genes))
    small.save(tmp_path)
    again = load_compressed(tmp_path)
    full = logits_of(again, IDS)
    assert torch.equal(full, logits_of(space.library.use(small.genome), IDS)) and torch.equal(full, logits_of(small.model, IDS))
    if len(gone) < 3: assert (stepwise(again, IDS) - full).abs().max() < 1e-4 * full.abs().max()


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin", "model-00001-of-00002.safetensors"])
def test_weights_of_another_model_are_never_overwritten(spaces, tmp_path, file, monkeypatch):
    space = spaces["gfopt"]
    small = chosen(space, everything(space))
    (tmp_path / file).write_bytes(b"not ours")
    with pytest.raises(ValueError, match="another model's weights"): small.save(tmp_path)
    assert [f.name for f in tmp_path.iterdir()] == [file] and (tmp_path / file).read_bytes() == b"not ours"
    with pytest.raises(ValueError, match="another model's weights"):
        save_model(Llama(LlamaConfig(VOCAB, 32, 1, 4, 2, 64), seed=0), tmp_path / "dense")
        small.save(tmp_path / "dense")
    small.save(tmp_path / "mine")
    written = []
    def killed(path, data, real=export.write_atomic):
        real(path, data)
        if path.name == "model.safetensors": written.append(path); raise KeyboardInterrupt  # the last description is missing
    monkeypatch.setattr(export, "write_atomic", killed)
    with pytest.raises(KeyboardInterrupt): small.save(tmp_path / "torn")
    monkeypatch.undo()
    small.save(tmp_path / "torn")  # its own weights, not another's
    assert written and torch.equal(logits_of(load_compressed(tmp_path / "torn"), IDS), logits_of(small.model, IDS))
    assert torch.equal(logits_of(load_compressed(tmp_path / "mine"), IDS), logits_of(small.model, IDS))


@pytest.mark.parametrize("kind", ["gfopt", "llama"])
def test_other_than_float32_is_refused_before_anything_is_searched(kind):
    with pytest.raises(ValueError, match="model has weights in torch.bfloat16; allowed: torch.float32"):
        compress(tiny_model(kind).to(torch.bfloat16), IDS, budget=0.4)


def test_baselines_that_did_not_run_are_named_and_one_random_genome_always_does(models):
    front = compress(models["gfopt"], IDS, targets=[0.12 + 0.01 * k for k in range(12)], techniques=("blocks", "bits"), evaluations=120, progress=False)
    tried = {(s, b) for s in ("uniform", "additive", "greedy", "random") for b in front.budgets if front.evaluator.best(s, b)}
    assert front.skipped == [s for s in ("uniform", "additive", "greedy", "random") if any((s, b) not in tried for b in front.budgets)]
    assert "random" not in front.skipped
    few = compress(models["gfopt"], IDS, targets=[0.12 + 0.01 * k for k in range(20)], techniques=("blocks", "bits"), evaluations=4, progress=False)
    assert few.skipped == ["additive", "greedy", "random"] and few.evaluator.spent <= 4
    late = compress(models["gfopt"], IDS, targets=[0.12, 0.3], techniques=("blocks", "bits"), evaluations=3, progress=False)
    assert late.skipped == ["additive", "greedy", "random"] and late.evaluator.best("random", late.budgets[1])  # at one budget only


@pytest.mark.parametrize("method", ["ga", "pso", "nsga2", "bo", "random"])
def test_other_searches_begin_with_what_is_known(monkeypatch, coarse, method):
    _, truth = known_world(monkeypatch, coarse)
    budget, told = coarse.high // 2, []
    ev = Evaluator(coarse, Table(truth))
    for s in range(9): ev(coarse.random(budget, random.Random(s)), "uniform")
    best = [v for v, _ in ev.best(None, budget, 6)]
    real = evolution.make_optimizer
    def listening(*a, **k):
        opt = real(*a, **k)
        tell = opt.tell
        opt.tell = lambda z, y, **more: (told.append(y.flatten().tolist()), tell(z, y, **more))[1]
        return opt
    monkeypatch.setattr(evolution, "make_optimizer", listening)
    search_with(ev, method, budget, 12, 0)
    assert [y[-1] for y in told[:6]] == pytest.approx(best) and len(told) > 6 and 9 < ev.spent <= 21


def test_the_levels_are_made_where_the_model_is():
    "No GPU is needed to see that no tensor is made on another device than the weights."
    model = Llama(LlamaConfig(VOCAB, 32, 1, 4, 2, 64), seed=0).to("meta")
    layer, c = model.model.layers[0], {n: torch.empty(n, n, device="meta") for n in (32, 64)}
    w, some = torch.empty(32, 64, device="meta"), torch.arange(1, device="meta")
    made = [*low_rank(w, None, 4), *low_rank(w, c[64], 4), energy(w, c[64], 8), refit(w, c[64], torch.arange(8, device="meta"))]
    for block, n in ((layer.self_attn, 32), (layer.mlp, 64)): made += [m.weight for m in narrowed(block, some, c[n]).values()]
    assert {t.device.type for t in made} == {"meta"}
    space = GenomeSpace(model, ("blocks", "heads", "neurons"))
    assert {p.device.type for p in space.library.use(everything(space)).parameters()} == {"meta"}


@pytest.mark.parametrize("kind", ["gfopt", "llama", "qwen2", "qwen3", "mistral"])
@pytest.mark.parametrize("bits", [32, 16])
def test_uniform_results_open_in_from_pretrained(models, tmp_path, kind, bits):
    m = models[kind]
    space = GenomeSpace(m, ("blocks", "heads", "neurons", "bits"), bits=(bits,), moments=moments(m, IDS))
    def level(x):
        if x.path.startswith("model.layers.1.") and "drop" in x.levels: return "drop"
        return x.levels[0] if x.path.endswith(".heads") else x.levels[1] if x.path.endswith(".neurons") else x.levels[-1]
    small = chosen(space, map(level, space.genes))
    small.save(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ours = logits_of(small.model, IDS)
    assert len(theirs.model.layers) == 2 and theirs.config.num_key_value_heads == 1 and theirs.config.intermediate_size == 32
    with torch.no_grad(): assert (theirs(IDS).logits - ours).abs().max() < 1e-4 * ours.abs().max()
    assert torch.equal(logits_of(load_compressed(tmp_path), IDS), ours)
    if bits == 16: assert (tmp_path / "model.safetensors").stat().st_size < 0.6 * count_parameters(small.model) * 4 + 8192
    # a result with exceptions in the same folder must not leave a configuration behind that would be believed
    chosen(space, (x.levels[0] if x.path == "model.layers.0.self_attn.heads" else x.levels[-1] for x in space.genes)).save(tmp_path)
    assert not (tmp_path / "config.json").exists()


def test_files_of_the_first_format_still_open(models, tmp_path):
    m = models["gfopt"]
    space = GenomeSpace(m)
    small = chosen(space, space.flat(8))
    small.save(tmp_path)
    spec = json.loads((tmp_path / "compressed.json").read_text())
    old = {k: spec[k] for k in ("config", "dropped", "sha256")} | dict(format=1, stored={n: row[0] for n, row in spec["matrices"].items()})
    (tmp_path / "compressed.json").write_text(json.dumps(old))
    assert torch.equal(load_compressed(tmp_path)(IDS), small.model(IDS))


# healing ---------------------------------------------------------------------------------------------------------
TEXT = torch.randint(VOCAB, (4000,), generator=torch.Generator().manual_seed(8))


@pytest.mark.parametrize("kind", ["gfopt", "llama-bias", "qwen3"])
def test_refitting_lowers_the_divergence_on_other_text_and_keeps_every_byte(spaces, models, kind, tmp_path):
    space = spaces[kind]
    small = chosen(space, everything(space))
    ids, before = TEXT[:2048].view(64, 32), {k: v.clone() for k, v in small.model.state_dict().items()}
    fresh = Divergence(models[kind], TEXT[-1024:].view(32, 32))
    hurt = fresh(small.model)
    assert reconstruct(small.model, models[kind], ids, set(small.dropped)) >= 2 and fresh(small.model) < 0.97 * hurt
    after = small.model.state_dict()
    assert {k: (v.shape, v.dtype) for k, v in after.items()} == {k: (v.shape, v.dtype) for k, v in before.items()}
    assert {k.rsplit("_proj", 1)[0].rsplit(".", 1)[1] for k in after if not torch.equal(after[k], before[k])} <= {"o", "down"}
    small.save(tmp_path)
    assert torch.equal(logits_of(load_compressed(tmp_path), IDS), logits_of(small.model, IDS))
    assert reconstruct(small.model, models[kind], ids) == 0  # without the names of what is gone nothing is guessed


def test_streams_are_compared_where_the_next_sub_block_that_is_left_begins(monkeypatch, spaces, models):
    from gfopt.compress import heal as module
    space, asked, real = spaces["gfopt"], [], module._inputs
    small = chosen(space, ("drop" if x.path in ("model.layers.1.self_attn", "model.layers.1.mlp") else x.levels[-1] for x in space.genes))
    monkeypatch.setattr(module, "_inputs", lambda model, ids, paths: asked.append(paths) or real(model, ids, paths))
    assert reconstruct(small.model, models["gfopt"], TEXT[:512].view(16, 32), set(small.dropped)) >= 1
    layer = lambda i, norm: f"model.layers.{i}.{norm}_layernorm"
    assert asked[0] == [layer(0, "post_attention"), layer(2, "input"), layer(2, "post_attention"), "model.norm"]  # of the dense model
    assert [paths[1] for paths in asked[1:]] == [layer(0, "post_attention"), layer(1, "input"), layer(1, "post_attention"), "model.norm"]


def test_a_refit_that_does_harm_is_taken_back(monkeypatch, spaces, models):
    from gfopt.compress import heal as module
    small = chosen(spaces["gfopt"], everything(spaces["gfopt"]))
    before = logits_of(small.model, IDS)
    monkeypatch.setattr(module, "correction", lambda missing, inputs: torch.full((missing.shape[1], inputs.shape[1]), 9.0))
    assert reconstruct(small.model, models["gfopt"], TEXT[:512].view(16, 32), set(small.dropped)) == 0
    assert torch.equal(logits_of(small.model, IDS), before)


def test_the_correction_is_the_ridge_regression_and_nothing_missing_moves_nothing():
    h, w = randn(500, 10), randn(10, 6, seed=1)
    assert torch.allclose(correction(h @ w, h), w.T, atol=0.05) and not correction(torch.zeros(500, 6), h).any()


def test_healing_without_steps_is_the_refit_alone(spaces, models):
    one, two = (chosen(spaces["gfopt"], everything(spaces["gfopt"])) for _ in "ab")
    heal(one, models["gfopt"], TEXT, steps=0, length=32, progress=False)
    reconstruct(two.model, models["gfopt"], TEXT[:3999].unfold(0, 32, 32)[torch.arange(124)], set(two.dropped))
    assert torch.equal(logits_of(one.model, IDS), logits_of(two.model, IDS))


def test_latency_of_the_reloaded_model_is_measured_in_turns_for_hugging_face_too(spaces, tmp_path):
    chosen(spaces["qwen2"], everything(spaces["qwen2"])).save(tmp_path)
    got = measure_latency(dict(a=load_compressed(tmp_path), b=tiny_model("qwen2")), IDS[:1, :8], new_tokens=3, repeats=2)
    assert set(got) == {"a", "b"} and all(v > 0 for row in got.values() for v in row.values())


def test_a_bias_survives_the_integer_kernel():
    layer = torch.nn.Linear(512, 512).requires_grad_(False)
    for bits in (4, 8, 16):
        small, x = store(layer, bits), randn(3, 512)  # many rows: no kernel
        assert torch.equal(small(x), F.linear(x, small.weight, layer.bias)) and (small(x) - F.linear(x, small.weight)).abs().max() > 0.01
    for bits in (4, 8):
        small = store(layer, bits).prepare(kernel=True)
        x = randn(1, 512)
        exact = F.linear(x, small.weight, layer.bias)
        assert (small(x) - exact).abs().max() <= 0.02 * exact.abs().max() and torch.equal(small.bias, layer.bias)
    assert group4(512) == 32 and settle(tiny_model("gfopt")).config.n_layers == 3 and len(sub_blocks(tiny_model("llama"))) == 6


# the command line -------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def folder(models, tmp_path_factory):
    "A Llama as people have them: bfloat16 weights, a byte tokenizer, a text."
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers import models as kinds
    at = tmp_path_factory.mktemp("hf")
    tokenizer = Tokenizer(kinds.BPE(vocab={c: i for i, c in enumerate(sorted("abcdefghijklmnopqrstuvwxyz0123456789.,:;()[]\u0120\u010a"))}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(at / "dense")
    tiny_model("llama").to(torch.bfloat16).save_pretrained(at / "dense")
    (at / "text").write_text("the quick brown fox (of 1 farm) jumps over the lazy dog.\n" * 40)
    return at


def test_gfopt_compress_on_a_hugging_face_folder_in_bfloat16(folder, capsys):
    from gfopt.adapters.cli import main
    weights = (folder / "dense/model.safetensors").stat().st_size
    assert main(["compress", str(folder / "dense"), "--text", str(folder / "text"), "--size", "0.6", "--out", str(folder / "small"), "--evaluations", "6", "--quiet", "--json"]) == 0
    table = json.loads(capsys.readouterr().out.splitlines()[-1])["table"]
    assert (folder / "small/model.safetensors").stat().st_size < 0.6 * weights + 8192  # a share of what was there, not of float32
    assert table["after"]["file_bytes"] < table["before"]["file_bytes"] and table["after"]["bits_per_byte"] > 0
    assert (folder / "small/tokenizer.json").read_bytes() == (folder / "dense/tokenizer.json").read_bytes()
    assert logits_of(load_compressed(folder / "small"), IDS).isfinite().all()


def test_what_cannot_work_is_refused_before_the_search(folder, monkeypatch, tmp_path):
    from gfopt.compress import front
    monkeypatch.setattr(front, "compress", lambda *a, **k: pytest.fail("searched"))
    (tmp_path / "short").write_text("abc"); (tmp_path / "file").write_text("")
    (tmp_path / "bare").mkdir(); (tmp_path / "bare/config.json").write_text("{}")
    (tmp_path / "other").mkdir(); (tmp_path / "other/model.safetensors").write_bytes(b"theirs")
    (tmp_path / "small").mkdir()
    for name in ("config.json", "tokenizer.json", "compressed.json"): (tmp_path / "small" / name).write_text("{}")
    good = dict(path=str(folder / "dense"), text=str(folder / "text"), size=0.5, out=str(tmp_path / "o"))
    for change, error, text in ((dict(path=str(tmp_path / "none")), ValueError, "config.json"), (dict(path=str(tmp_path / "bare")), ValueError, "tokenizer"),
                                (dict(text=str(tmp_path / "short")), ValueError, "text must have more than 64 tokens"), (dict(size=25), ValueError, "size"),
                                (dict(out=str(tmp_path / "file")), FileExistsError, "file"), (dict(out=good["path"]), ValueError, "overwritten"),
                                (dict(out=f"{folder}/other/../dense"), ValueError, "overwritten"), (dict(out=str(tmp_path / "other")), ValueError, "overwritten"),
                                (dict(path=str(tmp_path / "small")), ValueError, "compressed already")):
        with pytest.raises(error, match=text): front.compress_folder(**good | change)
    assert not (tmp_path / "o").exists() and (tmp_path / "other/model.safetensors").read_bytes() == b"theirs"


def test_a_search_that_fails_leaves_no_empty_folder(folder, tmp_path):
    from gfopt.compress import front
    with pytest.raises(ValueError, match="budget"): front.compress_folder(str(folder / "dense"), str(folder / "text"), 0.001, str(tmp_path / "new"), progress=False)
    assert not (tmp_path / "new").exists()
    (tmp_path / "old").mkdir()
    with pytest.raises(ValueError, match="budget"): front.compress_folder(str(folder / "dense"), str(folder / "text"), 0.001, str(tmp_path / "old"), progress=False)
    assert (tmp_path / "old").exists()  # somebody else's


def test_search_choice_and_table_never_read_the_same_text(folder, tmp_path, monkeypatch):
    from gfopt.compress import front
    seen, search = {}, front.compress
    def listening(model, ids, **more):
        seen.update(search=ids["input_ids"], choice=more["validation"]["input_ids"])
        return search(model, ids, **more)
    monkeypatch.setattr(front, "compress", listening)
    monkeypatch.setattr(front, "measure_fresh", lambda paths, batch, *a, **k: seen.update(table=batch["input_ids"]) or {})
    (tmp_path / "numbers").write_text(" ".join(str(n) for n in range(100_000, 104_000)))  # no two places alike
    front.compress_folder(str(folder / "dense"), str(tmp_path / "numbers"), 0.5, str(tmp_path / "out"), evaluations=4, progress=False)
    rows = {k: {tuple(r) for r in v.tolist()} for k, v in seen.items()}
    assert set(rows) == {"search", "choice", "table"} and all(len(r) >= 4 for r in rows.values())
    assert not rows["search"] & rows["choice"] and not rows["search"] & rows["table"] and not rows["choice"] & rows["table"]


def test_every_file_of_a_tokenizer_travels_and_folders_do_not(folder, tmp_path):
    import shutil

    from gfopt.compress import front
    shutil.copytree(folder / "dense", tmp_path / "dense")
    (tmp_path / "dense/tokens").mkdir()
    for name in ("vocab.json", "merges.txt", "special_tokens_map.json"): (tmp_path / "dense" / name).write_text("{}")
    front.compress_folder(str(tmp_path / "dense"), str(folder / "text"), 0.6, str(tmp_path / "out"), evaluations=4, progress=False)
    assert {"vocab.json", "merges.txt", "special_tokens_map.json", "tokenizer.json", "latency.json"} <= {f.name for f in (tmp_path / "out").iterdir()}


def _byte_level():
    from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
    from tokenizers import models as kinds
    t = Tokenizer(kinds.BPE())
    t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    t.train_from_iterator(["abc def übrig"], trainers.BpeTrainer(vocab_size=270, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    return t, 0


def _metaspace():
    from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
    from tokenizers import models as kinds
    alphabet = [f"<0x{b:02X}>" for b in range(256)]
    t = Tokenizer(kinds.BPE(unk_token="<unk>", byte_fallback=True))
    t.pre_tokenizer, t.decoder = pre_tokenizers.Metaspace(), decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    t.train_from_iterator(["the quick brown fox and the dog"], trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>"], show_progress=False))
    t.add_tokens([])
    vocab = t.get_vocab()
    merges = json.loads(t.to_str())["model"]["merges"]
    vocab |= {a: len(vocab) + i for i, a in enumerate(alphabet)}
    t.model = kinds.BPE(vocab=vocab, merges=[tuple(m) for m in merges], unk_token="<unk>", byte_fallback=True)
    return t, 1  # the space that is written before the first word


@pytest.mark.parametrize("make", [_byte_level, _metaspace])
@pytest.mark.parametrize("text", ["abc def", "the quick brown fox and  the dog", "über 中文 café", "🙂 the\nend"])
def test_the_bytes_of_a_hugging_face_tokenizers_tokens_add_up(make, text):
    from gfopt.compress.front import bytes_of_tokens
    tokenizer, more = make()
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, additional_special_tokens=["<|end|>"])
    sizes, ids = bytes_of_tokens(theirs), theirs(text, add_special_tokens=False)["input_ids"]
    assert len(sizes) == len(theirs) and int(sizes[ids].sum()) == len(text.encode()) + more
    assert int(sizes[theirs.convert_tokens_to_ids("<|end|>")]) == 0
