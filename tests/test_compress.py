"""Compression: the traps of the field, each as a test that can fail."""
import itertools
import json
import math
import random
import struct
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from gfopt.compress.evolution import evolve
from gfopt.compress.export import Compressed, load_compressed, save_compressed
from gfopt.compress.front import Front, Point, compress
from gfopt.compress.genome import GenomeSpace, dropped
from gfopt.compress.measure import (
    count_parameters,
    file_bytes,
    measure_fresh,
    measure_latency,
)
from gfopt.compress.search import (
    Divergence,
    Evaluator,
    dynamic_programming,
    greedy,
    kl_divergence,
    random_genomes,
    single_scores,
)
from gfopt.compress.techniques import (
    Bf16Linear,
    Int4Linear,
    Int8Linear,
    dequantize,
    kernel_works,
    pack4,
    quantize,
    rounding_error,
    store,
    sub_blocks,
    unpack4,
)
from gfopt.lm.model import Llama, LlamaConfig, config, generate, save_model
from gfopt.lm.text import ByteTokenizer


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def model():
    "A pico whose logits are sharp enough to tell genomes apart, without training."
    m = Llama(config("pico", 257), seed=0)
    with torch.no_grad():
        m.model.embed_tokens.weight.mul_(10)
        for p in m.model.layers.parameters():
            if p.dim() == 2: p.mul_(1.5)
    return m.requires_grad_(False)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(256, (4, 24), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def space(model): return GenomeSpace(model)


@pytest.fixture(scope="module")
def coarse(model): return GenomeSpace(model, per="block")


def chosen(space, genome):
    genome = space.canonical(genome)
    return Compressed(space, SimpleNamespace(genome=genome, bytes=space.bytes(genome), loss=0.0, source="test"))


def mixed(space):
    "An attention gone, the rest in 4, 8 and 16 bits."
    g = tuple("keep" if "keep" in x.levels else x.levels[i % len(x.levels)] for i, x in enumerate(space.genes))
    return space.canonical(("drop",) + g[1:])


# techniques ------------------------------------------------------------------------------------------------------
@settings(max_examples=30, deadline=None)
@given(bits=st.integers(2, 8), groups=st.integers(1, 4), size=st.sampled_from([2, 16, 32]), scale=st.sampled_from([1e-6, 1.0, 1e4]), seed=st.integers(0, 99))
def test_rounding_never_errs_by_more_than_half_a_step(bits, groups, size, scale, seed):
    w = randn(3, groups * size, seed=seed) * scale
    q, s = quantize(w, bits, size)
    top = 2 ** (bits - 1) - 1
    assert q.abs().max() <= top and q.dtype == torch.int8
    step = s.float().repeat_interleave(size, 1)
    slack = 1 + 2 ** -8 * top * 2  # the scale itself is a bfloat16
    assert ((dequantize(q, s) - w).abs() <= 0.5 * step * slack + 1e-12).all()


@pytest.mark.parametrize("bits", [3, 4, 6, 8])
def test_error_follows_the_uniform_noise_formula(bits):
    w = randn(512, 512)
    q, s = quantize(w, bits, 32)
    assert abs(float((dequantize(q, s) - w).double().square().mean()) / rounding_error(s) - 1) < 0.05


@given(st.lists(st.integers(-8, 7), min_size=2, max_size=40).filter(lambda v: len(v) % 2 == 0))
def test_pack4_is_lossless(values):
    q = torch.tensor([values], dtype=torch.int8)
    assert pack4(q).shape[1] == len(values) // 2 and torch.equal(unpack4(pack4(q)), q)


@pytest.mark.parametrize("kind", [Int4Linear, Int8Linear, Bf16Linear])
@pytest.mark.parametrize("shape", [(48, 64), (30, 66), (512, 512)])
def test_forward_is_the_product_with_the_rebuilt_matrix(kind, shape):
    layer, x = kind(randn(*shape)), randn(3, 5, shape[1], seed=1)
    assert torch.equal(layer(x), F.linear(x, layer.weight))
    layer.prepare(kernel=True)
    one = x[:1, :1]
    exact = F.linear(one, layer.weight)
    assert layer(one).shape == exact.shape and (layer(one) - exact).abs().max() <= 0.01 * exact.abs().max()
    assert torch.equal(layer(x), F.linear(x, layer.weight))  # many rows stay exact


@pytest.mark.parametrize("bits,name", [(8, "_weight_int8pack_mm"), (4, "_weight_int4pack_mm_for_cpu")])
@pytest.mark.parametrize("fault", ["missing", "wrong"])
def test_a_missing_or_wrong_kernel_is_not_used(monkeypatch, bits, name, fault):
    if fault == "missing": monkeypatch.delattr(torch, name)
    else: monkeypatch.setattr(torch, name, lambda x, *a: torch.zeros(1, 64))
    kernel_works.cache_clear()
    try:
        assert not kernel_works(bits)
        layer = store(torch.nn.Linear(512, 512, bias=False), bits).prepare(kernel=True)
        x = randn(1, 512)
        assert torch.equal(layer(x), F.linear(x, layer.weight))
    finally: kernel_works.cache_clear()


def test_state_holds_integers_and_scales_only():
    state = Int4Linear(randn(8, 64)).state_dict()
    assert {k: (v.dtype, tuple(v.shape)) for k, v in state.items()} == {"q": (torch.uint8, (8, 32)), "scale": (torch.bfloat16, (8, 2))}


def test_bad_arguments_of_techniques():
    w = randn(4, 8)
    for bad in (1, 9, 2.5): pytest.raises(ValueError, quantize, w, bad)
    with pytest.raises(ValueError, match="group must divide the row length 8, got 3"): quantize(w, 4, 3)
    with pytest.raises(ValueError, match="bits must be one of"): store(torch.nn.Linear(8, 8, bias=False), 5)
    with pytest.raises(TypeError, match="model.layers"): sub_blocks(torch.nn.Linear(2, 2))


# genome ----------------------------------------------------------------------------------------------------------
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10 ** 6), share=st.floats(0.0, 1.0))
def test_genomes_weigh_what_the_model_holds_and_fill_the_budget(space, seed, share):
    rng = random.Random(seed)
    budget = int(space.low + share * (space.high - space.low))
    a = space.random(budget, rng)
    for g in (a, space.mutate(a, budget, rng), space.uniform(budget)):
        assert g == space.canonical(g)
        assert space.bytes(g) == sum(t.nbytes for t in space.library.use(g).state_dict().values()) <= budget
        ups = [u for i in range(len(g)) if (u := space.step(g, i, 1))]
        assert all(space.bytes(u) > budget or space.bytes(u) <= space.bytes(g) for u in ups)


def test_an_infeasible_budget_raises_at_once_with_the_range(model, space, ids):
    for call in (lambda b: space.random(b, random.Random(0)), space.uniform, lambda b: compress(model, ids, budget=b, techniques=("blocks", "bits"), progress=False)):
        with pytest.raises(ValueError, match=f"at least {space.low} bytes.*{space.high}.*got {space.low - 1}"): call(space.low - 1)


def test_the_library_switches_pointers_and_leaves_the_users_model_alone(model):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    space = GenomeSpace(model)
    top, bottom = (tuple(g.levels[j] for g in space.genes) for j in (-1, 0))
    first = space.library.use(top).model.layers[1].mlp.down_proj
    space.library.use(bottom)
    assert space.library.use(top).model.layers[1].mlp.down_proj is first
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_silent_genes_are_one_genome(space, coarse):
    top = tuple(g.levels[-1] for g in space.genes)
    a, b = ("drop",) + top[1:], ("drop", 4) + top[2:]
    assert space.canonical(a) == space.canonical(b) != space.canonical(top)
    assert dropped(space.genes, a) == {"model.layers.0.self_attn"}
    silent = space.canonical(a)
    assert space.step(silent, 1, 1) == silent and [space.audible(silent, i) for i in (0, 1)] == [True, False] and space.audible(top, 1)
    assert coarse.canonical(("drop", 4, 8, 16, 8)) == ("drop", 4, 8, 16, 8)


def test_grouped_query_attention_is_weighed_right():
    m = Llama(LlamaConfig(64, 32, 1, 4, 2, 64))
    space = GenomeSpace(m)
    g = space.random(space.high // 2, random.Random(0))
    assert space.bytes(g) == sum(t.nbytes for t in space.library.use(g).state_dict().values())


# search ----------------------------------------------------------------------------------------------------------
def test_kl_against_torch_and_signs():
    p, q = randn(3, 5, 11), randn(3, 5, 11, seed=1)
    want = F.kl_div(q.log_softmax(-1), p.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    assert torch.allclose(kl_divergence(p.log_softmax(-1), q), want, atol=1e-6) and (want > 0).all()


@pytest.fixture(scope="module")
def solved(model, coarse, ids):
    "Every maximal genome of a budget with its true value."
    budget = coarse.high * 4 // 10
    divergence = Divergence(model, ids)
    every = {coarse.canonical(g) for g in itertools.product(*(g.levels for g in coarse.genes))}
    truth = {g: divergence(coarse.library.use(g)) for g in every if coarse.bytes(g) <= budget}
    return budget, divergence, truth


def test_exact_regret_is_zero(coarse, solved):
    budget, divergence, truth = solved
    optimum, hits, random_hits = min(truth.values()), 0, 0
    for seed in range(6):
        ev = Evaluator(coarse, divergence)
        ev.divergence = lambda m, ev=ev: divergence(m)
        scores = single_scores(ev)
        evaluate = Evaluator(coarse, divergence)
        evolve(evaluate, budget, 40, random.Random(seed), scores)
        assert evaluate.spent <= 40
        hits += evaluate.best(None, budget)[0][0] <= optimum
        evaluate = Evaluator(coarse, divergence)
        random_genomes(evaluate, budget, 10, random.Random(seed))
        random_hits += evaluate.best(None, budget)[0][0] <= optimum
    assert hits >= 5 and random_hits < 6


def test_dynamic_programming_solves_the_additive_problem(coarse, solved):
    budget, divergence, truth = solved
    scores = single_scores(Evaluator(coarse, divergence))
    additive = {g: sum(scores[i, level] for i, level in enumerate(g)) for g in truth}
    for b in (budget, budget * 3 // 4, budget // 2):
        got = dynamic_programming(coarse, scores, b)
        assert additive[got] <= min(v for g, v in additive.items() if coarse.bytes(g) <= b) + 1e-9


def test_greedy_meets_the_budget_and_its_limit(space, model, ids):
    ev = Evaluator(space, Divergence(model, ids))
    scores = single_scores(ev)
    before = ev.spent
    for b in (space.low, space.high // 4, space.high // 2):
        assert space.bytes(greedy(ev, scores, b, limit=10)) <= b
    assert ev.spent - before <= 3 * 11


def test_nan_ranks_last(coarse, solved):
    budget, divergence, truth = solved
    worst = max(truth, key=lambda g: coarse.bytes(g))
    ev = Evaluator(coarse, lambda m: math.nan if len(ev.known) % 2 else 1.0)
    random_genomes(ev, budget, 6, random.Random(0))
    values = [v for v, _ in ev.best("random", budget, 6)]
    assert values == sorted(values) and values[0] == 1.0 and values[-1] == math.inf
    broken = coarse.library.use(worst)
    saved = broken.model.norm.weight.clone()
    broken.model.norm.weight.fill_(math.nan)
    assert divergence(broken) == math.inf
    broken.model.norm.weight.copy_(saved)


def test_compress_reports_baselines_counts_and_repeats(model, ids):
    state = torch.get_rng_state(), random.getstate()
    kw = dict(budget=0.12, evaluations=150, validation=ids.flip(0).contiguous(), progress=False)
    a, b = (compress(model, ids[:2], seed=3, **kw) for _ in "ab")
    assert a.points == b.points and not a.skipped
    assert {p.source for p in a.points} == {"uniform", "additive", "greedy", "random", "evolution"}
    assert a.evaluator.spent <= 150 and all(p.bytes <= a.budgets[0] for p in a.points)
    assert compress(model, ids[:2], seed=4, **kw).evaluator.log != a.evaluator.log
    assert torch.equal(torch.get_rng_state(), state[0]) and random.getstate() == state[1]
    # finalists are judged by the validation text, not by what the search saw
    check = Divergence(model, ids.flip(0))
    p = a.pick(bytes=a.budgets[0]).point
    assert p.loss == min(q.loss for q in a.points) == check(a.space.library.use(p.genome)) != p.calibration


def test_compress_with_another_optimiser_and_few_evaluations(model, ids):
    front = compress(model, ids, targets=[0.11, 0.15], techniques=("blocks", "bits"), search="ga", per="block", evaluations=30, progress=False)
    assert front.evaluator.spent <= 30 and "ga" in {p.source for p in front.points}
    few = compress(model, ids, budget=0.12, evaluations=5, progress=False)
    assert few.skipped == ["additive", "greedy"] and few.evaluator.spent <= 5
    only = compress(model, ids, budget=0.7, techniques=("blocks",), evaluations=40, progress=False)
    assert all(set(p.genome) <= {"drop", "keep", 32} for p in only.points)


def test_bad_arguments_of_compress(model, ids):
    for kw, text in ((dict(), "either budget= or targets="), (dict(budget=1.5), "between 0 and 1"), (dict(budget=0.2, evaluations=0), "evaluations"),
                     (dict(budget=0.2, search="annealing"), "search"), (dict(budget=0.2, techniques=("prune",)), "prune"),
                     (dict(budget=0.2, bits=(3,)), "bits"), (dict(budget=0.2, per="head"), "per")):
        with pytest.raises(ValueError, match=text): compress(model, ids, progress=False, **kw)
    with pytest.raises(ValueError, match="calibration"): compress(model, ids[0], budget=0.2, progress=False)
    with pytest.raises(TypeError, match="budget"): compress(model, ids, budget="10MB", progress=False)


def test_front_picks_and_prunes():
    points = [Point(10, 3.0, 3, (), "a"), Point(20, 1.0, 1, (), "a"), Point(20, 2.0, 2, (), "b"), Point(30, 1.5, 1, (), "b")]
    front = Front(points, None, None, [30], 99, [])
    assert front.pareto() == points[:2]
    with pytest.raises(ValueError, match="bytes go from 10 to 30"): front.pick(bytes=5)
    with pytest.raises(ValueError, match="both"): front.pick(bytes=5, loss=1)


# export ----------------------------------------------------------------------------------------------------------
def test_a_fresh_process_gives_the_same_logits_bit_for_bit(space, ids, tmp_path):
    small = chosen(space, mixed(space))
    small.save(tmp_path)
    code = ("import sys, torch, hashlib; from gfopt.compress.export import load_compressed\n"
            "torch.set_num_threads(int(sys.argv[2])); m = load_compressed(sys.argv[1])\n"
            "ids = torch.randint(256, (4, 24), generator=torch.Generator().manual_seed(5))\n"
            "print(hashlib.sha256(m(ids).numpy().tobytes()).hexdigest(), 'tokenizers' in sys.modules)")
    out = subprocess.run([sys.executable, "-c", code, str(tmp_path), str(torch.get_num_threads())], capture_output=True, text=True, check=True).stdout.split()
    import hashlib
    assert out == [hashlib.sha256(small.model(ids).numpy().tobytes()).hexdigest(), "False"]


def test_file_parameters_and_genome_agree(space, model, tmp_path):
    g = mixed(space)
    small = chosen(space, g)
    small.save(tmp_path)
    data = (tmp_path / "model.safetensors").read_bytes()
    assert len(data) - 8 - struct.unpack("<Q", data[:8])[0] == space.bytes(g)
    assert file_bytes(tmp_path) == len(data) + (tmp_path / "compressed.json").stat().st_size
    attention = sum(p.numel() for p in model.model.layers[0].self_attn.parameters()) + 64
    assert count_parameters(load_compressed(tmp_path)) == sum(p.numel() for p in model.parameters()) - attention
    assert not any(k.startswith("model.layers.0.input_layernorm") for k in load_compressed(tmp_path).state_dict())


def test_saving_is_repeatable_and_two_levels_never_share(space, tmp_path, ids):
    a = chosen(space, mixed(space))
    logits = a.model(ids)
    space.library.use(tuple(g.levels[0] for g in space.genes))  # the search goes on; what was picked must not change
    assert torch.equal(a.model(ids), logits)
    a.save(tmp_path / "a"); save_compressed(load_compressed(tmp_path / "a"), tmp_path / "b")
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


@pytest.mark.parametrize("which", ["model.layers.0.self_attn", "model.layers.1.self_attn", "model.layers.0.mlp"])
def test_cached_generation_equals_uncached_after_drops(space, ids, tmp_path, which):
    g = tuple("drop" if x.path == which else x.levels[-1] if "keep" in x.levels else 8 for x in space.genes)
    chosen(space, g).save(tmp_path)
    m = load_compressed(tmp_path)
    cache = m.cache()
    steps = torch.cat([m(ids[:, t:t + 1], cache) for t in range(24)], 1)
    assert (steps - m(ids)).abs().max() < 1e-3 * m(ids).abs().max()
    with_cache, plain = generate(m, ids[:1, :6], 10, temperature=0)[0].tolist(), ids[0, :6].tolist()
    for _ in range(10): plain.append(m(torch.tensor([plain]))[0, -1].argmax().item())
    assert plain[6:] == with_cache


def test_torn_foreign_and_future_files_are_refused(space, tmp_path):
    chosen(space, mixed(space)).save(tmp_path)
    spec = json.loads((tmp_path / "compressed.json").read_text())
    for change, text in ((dict(sha256="0"), "does not match"), (dict(format=99), "format 99"), (dict(matrices={"model.embed_tokens": ["pickle", 257, 64, False]}), "unknown kind")):
        (tmp_path / "compressed.json").write_text(json.dumps(spec | change))
        with pytest.raises(ValueError, match=text): load_compressed(tmp_path)
    (tmp_path / "compressed.json").write_text(json.dumps(spec | dict(dropped=[])))
    with pytest.raises(RuntimeError, match="Missing key"): load_compressed(tmp_path)


def test_a_failed_write_keeps_the_old_file(space, tmp_path, monkeypatch):
    a = chosen(space, mixed(space))
    a.save(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    import os
    monkeypatch.setattr(os, "replace", lambda *a: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError): chosen(space, space.flat(4)).save(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before and len(list(tmp_path.iterdir())) == 2


# measure ---------------------------------------------------------------------------------------------------------
def test_latency_takes_turns():
    order = []

    class Fake:
        def __init__(self, name): self.name = name
        def cache(self, n): return None
        def __call__(self, ids, cache): order.append(self.name); return torch.zeros(1, ids.shape[1], 3)

    got = measure_latency(dict(a=Fake("a"), b=Fake("b")), torch.zeros(1, 4, dtype=torch.long), new_tokens=2, repeats=3)
    assert order == ["a"] * 3 + ["b"] * 3 + (["a"] * 3 + ["b"] * 3) * 3 and set(got) == {"a", "b"}


def test_the_table_is_that_of_the_loaded_files(space, model, ids, tmp_path):
    save_model(model, tmp_path / "dense"); chosen(space, mixed(space)).save(tmp_path / "small")
    batch = dict(input_ids=ids[:, :-1].contiguous(), labels=ids[:, 1:].contiguous())
    paths = dict(dense=tmp_path / "dense", small=tmp_path / "small")
    rows = measure_fresh(paths, batch, ByteTokenizer(), threads=1, prompt_length=8, new_tokens=2, repeats=1)
    from gfopt.lm.model import bits_per_byte
    for name, m in dict(dense=model, small=load_compressed(tmp_path / "small")).items():
        assert rows[name]["bits_per_byte"] == pytest.approx(bits_per_byte(m, batch, ByteTokenizer()), rel=1e-5)
        assert rows[name]["file_bytes"] == file_bytes(paths[name]) and rows[name]["threads"] == 1
