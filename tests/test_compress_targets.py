"""Budgets of bytes, of parameters and of time: one search for every price, and predictions that the built model keeps."""
import itertools
import json
import math
import random
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from compressing import VOCAB, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gfopt.compress import front as front_module
from gfopt.compress import latency as latency_module
from gfopt.compress.export import Compressed, load_compressed
from gfopt.compress.front import compress, dense_bytes
from gfopt.compress.genome import (
    BYTES,
    PARAMETERS,
    TECHNIQUES,
    GenomeSpace,
    make_genes,
)
from gfopt.compress.latency import (
    BITS,
    LatencyModel,
    calibrate_latency,
    fit_latency,
    read_in,
    work,
)
from gfopt.compress.measure import count_parameters
from gfopt.compress.search import Evaluator, dynamic_programming, greedy
from gfopt.compress.techniques import (
    Int4Linear,
    Int8Linear,
    Stored,
    kernel_reads,
    kernel_works,
    sub_blocks,
)
from gfopt.lm.model import Llama, LlamaConfig, save_model
from gfopt.lm.text import ByteTokenizer

IDS = torch.randint(VOCAB, (4, 16), generator=torch.Generator().manual_seed(5))


class Odd:
    "A price without rhyme or reason: whole numbers that nothing orders."
    unit = "oddities"
    def __init__(self, seed): self.seed = seed
    def _draw(self, *what): return zlib.crc32(repr((self.seed, *what)).encode()) % 50
    def matrix(self, layer, level, m, n): return self._draw(level, m, n)
    def rest(self, block, tensors): return self._draw(block)


class Sizes(LatencyModel):
    "A latency model as a class of its own in the reports of pytest."
    def __repr__(self): return f"latency {self.coefficients.tolist()}"


CLOCKS = dict(kernels=Sizes([0.3, 0.02, 0.01, 0.004, 1.0, 2.0, 8.0]), calls=Sizes([1.0, 0.2, 0.1, 0.5, 0.0, 0.0, 0.0]),
              plain=Sizes([0.05, 0.03, 0.02, 0.02, 5.0, 5.0, 5.0]), free=Sizes([1.0] + [0.0] * 6))
PRICES = dict(bytes=BYTES, parameters=PARAMETERS, **CLOCKS, odd=Odd(1))


@pytest.fixture(scope="module", autouse=True)
def kernels_for_small_matrices():
    "Kernels from 1024 weights on: some of the tiny matrices are read as integers, narrower ones are not."
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stored, "smallest", 1024)
        yield


KINDS = ("gfopt", "mistral", "llama-bias")


@pytest.fixture(scope="module")
def models(): return {k: tiny_model(k, layers=2) for k in KINDS}


@pytest.fixture(scope="module")
def spaces(models): return {(k, p): GenomeSpace(models[k], TECHNIQUES, price=price) for k in KINDS for p, price in PRICES.items()}


@pytest.fixture(scope="module")
def tiny():
    "One layer, small enough for brute force in each sub-block."
    model = Llama(LlamaConfig(32, 32, 1, 2, 2, 64)).requires_grad_(False)
    return {p: GenomeSpace(model, ("blocks", "heads", "neurons", "bits"), price=price) for p, price in PRICES.items()}


def built(space, genome): return Compressed(space, SimpleNamespace(genome=space.canonical(tuple(genome)), bytes=0, loss=0.0, source="test")).model
def budget_of(space, share): return space.low + int(share * (space.high - space.low))
def draw(space, rng): return space.random(rng.randint(space.low, space.high), rng)


# the sum and the model -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
def test_every_price_is_that_of_the_built_model(models, spaces, kind, tmp_path):
    rng = random.Random(0)
    for name, clock in CLOCKS.items():
        space = spaces[kind, name]
        for k in range(4):
            g = draw(space, rng)
            model = built(space, g)
            assert abs(space.cost(g) - 1e6 * clock(model)) <= len(g), (name, g)  # half a nanosecond for each part
            assert space.bytes(g) == sum(t.nbytes for t in space.library.use(g).state_dict().values())
            if name == "kernels" and k == 0:
                Compressed(space, SimpleNamespace(genome=g, bytes=0, loss=0.0, source="test")).save(tmp_path)
                assert np.array_equal(work(load_compressed(tmp_path)), work(model))
    assert abs(spaces[kind, "kernels"].cost(spaces[kind, "kernels"].flat(16)) - 1e6 * CLOCKS["kernels"](models[kind])) <= 99  # as float32 as the dense one


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_are_those_that_are_counted(models, spaces, kind):
    space, rng = spaces[kind, "parameters"], random.Random(1)
    for g in [draw(space, rng) for _ in range(4)] + [draw(spaces[kind, "bytes"], rng) for _ in range(4)]:
        model = built(space, g)
        literal = sum(m.out_features * m.in_features + (0 if m.bias is None else len(m.bias)) for m in model.modules() if isinstance(m, (nn.Linear, Stored)))
        literal += sum(p.numel() for n, p in model.named_parameters() if "norm" in n)
        assert space.cost(g) == spaces[kind, "bytes"].cost(g, PARAMETERS) == count_parameters(model) == literal
    for bits in (8, 16): assert count_parameters(built(spaces[kind, "bytes"], spaces[kind, "bytes"].flat(bits))) == count_parameters(models[kind])


@settings(max_examples=40, deadline=None)
@given(price=st.sampled_from(sorted(PRICES)), seed=st.integers(0, 999))
def test_costs_add_up(spaces, price, seed):
    space, rng = spaces["gfopt", price], random.Random(seed)
    g = space.canonical(tuple(rng.choice(x.levels) for x in space.genes))
    assert space.cost(g) == sum(space.group_cost(b, tuple(g[i] for i in m)) for b, m in space.groups.items())
    for i in range(len(g)):
        for by in (-1, 1):
            if moved := space.step(g, i, by):
                assert space.added(g, moved, i) == space.cost(moved) - space.cost(g)
                assert space.added(g, moved, i, BYTES) == space.bytes(moved) - space.bytes(g)
                w = next((k for k in space.groups[space.genes[i].block] if space.genes[k].path.endswith((".heads", ".neurons"))), None)
                if moved != g: assert moved[i] in space.useful(i, None if w is None else g[w])  # what is beaten is passed over


def test_heads_and_neurons_change_the_shape_and_so_the_time(spaces):
    space, clock = spaces["gfopt", "kernels"], CLOCKS["kernels"]
    up, down, q, o = (f"model.layers.0.{n}" for n in ("mlp.up_proj", "mlp.down_proj", "self_attn.q_proj", "self_attn.o_proj"))
    ns = lambda weights, bits: round(1e6 * clock.coefficients[4 + BITS.index(bits)] * weights / 1e6)
    four = 4 if kernel_works(4) else 32
    assert space.part_cost(up, 4) == ns(64 * 32, four) and space.part_cost(up, 4, "32/64") == ns(32 * 32, four)
    assert space.part_cost(up, 4, "16/64") == space.part_cost(up, 16, "16/64") == ns(16 * 32, 32)  # too small for a kernel
    assert space.part_cost(down, 4, "16/64") == ns(32 * 16, 32) and space.part_cost(q, 4, "1/2") == ns(16 * 32, 32) == space.part_cost(o, 4, "1/2")


# levels ----------------------------------------------------------------------------------------------------------
def test_bytes_offer_the_whole_menu_and_parameters_no_bits(models, spaces):
    for kind in KINDS: assert spaces[kind, "bytes"].genes == make_genes(models[kind], TECHNIQUES)
    assert {g.levels for g in spaces["gfopt", "parameters"].genes if len(g.parts) == 1 and g.block} == {("r1/4@16", "r1/2@16", "r3/4@16", 16)}
    assert {g.levels for g in spaces["gfopt", "free"].genes if g.parts} == {(16,)}
    assert any({4, 8} & set(g.levels) for g in spaces["gfopt", "kernels"].genes) == any(map(kernel_works, (4, 8)))
    coarse = GenomeSpace(models["gfopt"], per="block", price=PARAMETERS)
    assert {g.levels for g in coarse.genes if g.block} == {("drop", 16)}


@pytest.mark.parametrize("price", PRICES)
def test_no_useful_level_is_beaten_and_every_useless_one_is(spaces, price):
    space = spaces["gfopt", price]
    for i, g in enumerate(space.genes):
        if len(g.parts) != 1 or g.block is None: continue
        w = next((k for k in space.groups[g.block] if space.genes[k].path.endswith((".heads", ".neurons"))), None)
        for width in space.genes[w].levels:
            pair = {v: (space.part_cost(g.parts[0], v, width), space.part_cost(g.parts[0], v, width, BYTES)) for v in g.levels}
            beats = lambda u, v: pair[u][0] <= pair[v][0] and pair[u][1] >= pair[v][1] and pair[u] != pair[v]
            assert set(space.useful(i, width)) == {v for v in g.levels if not any(beats(u, v) for u in g.levels)}


# moves -----------------------------------------------------------------------------------------------------------
@settings(max_examples=60, deadline=None)
@given(price=st.sampled_from(sorted(PRICES)), kind=st.sampled_from(KINDS[:2]), share=st.one_of(st.just(0.0), st.floats(0, 1)), seed=st.integers(0, 999))
def test_every_move_keeps_every_budget(spaces, price, kind, share, seed):
    space, budget = spaces[kind, price], budget_of(spaces[kind, price], share)
    def moves(rng):
        g = space.random(budget, rng)
        return [g, space.mutate(g, budget, rng), space.repair(tuple(rng.choice(x.levels) for x in space.genes), budget, rng, keep=3),
                space.repair(tuple(x.levels[-1] for x in space.genes), budget, rng), space.uniform(budget)]
    for g in moves(random.Random(seed)):
        assert space.cost(g) <= budget and space.canonical(g) == g
        ups = [u for i in range(len(g)) if (u := space.step(g, i, 1))]
        assert all(space.cost(u) > budget or space.bytes(u) <= space.bytes(g) for u in ups)  # Eq. (5.2.2)
    assert moves(random.Random(seed)) == moves(random.Random(seed))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10 ** 6), share=st.floats(0, 1))
def test_a_price_without_order_never_hangs_and_its_range_is_the_true_one(tiny, seed, share):
    menu = ("blocks",) * (seed % 2) + ("heads", "neurons", "bits")  # where nothing may go, single steps can get stuck
    space = GenomeSpace(tiny["bytes"].library.model, menu, bits=(8, 16), price=Odd(seed))
    every = [[space.group_cost(b, tuple(g)) for g in itertools.product(*(space.genes[i].levels for i in m))] for b, m in space.groups.items()]
    assert space.low == sum(map(min, every)) == space.cost(space.cheapest()) and space.high == sum(map(max, every))
    budget, rng = budget_of(space, share), random.Random(seed)
    for g in (space.random(budget, rng), space.mutate(space.uniform(budget), budget, rng)): assert space.cost(g) <= budget
    assert space.cost(space.random(space.low, rng)) == space.cost(space.uniform(space.low)) == space.low
    scores = {(i, v): 1.0 * j for i, g in enumerate(space.genes) for j, v in enumerate(reversed(g.levels))}
    assert space.cost(dynamic_programming(space, scores, budget)) <= budget
    ev = Evaluator(space, SimpleNamespace(ids=IDS))
    ev.known = Known(lambda g: float(sum(scores[i, v] for i, v in enumerate(g))))
    assert space.cost(greedy(ev, scores, budget)) <= budget


class Known(dict):
    "Every genome is known, by a formula."
    def __init__(self, fn): super().__init__(); self.fn = fn
    def __contains__(self, key): return True
    def __missing__(self, key): return self.fn(key)


@pytest.mark.parametrize("price", ["kernels", "plain", "calls", "parameters", "odd"])
def test_dynamic_programming_is_optimal_under_every_price(tiny, price):
    space, rng = tiny[price], random.Random(0)
    scores = {(i, v): d for i, g in enumerate(space.genes) for v, d in zip(g.levels, sorted((rng.random() for _ in g.levels), reverse=True))}
    for i, v in scores: scores[i, v] += 3.0 * (v == "drop")
    total = lambda g: sum(scores[i, v] for i, v in enumerate(g) if space.audible(g, i))
    top, parts = tuple(x.levels[-1] for x in space.genes), []
    for block, members in space.groups.items():
        seen = {}
        for levels in itertools.product(*(space.genes[i].levels for i in members)):
            g = list(top)
            for i, v in zip(members, levels): g[i] = v
            g = space.canonical(tuple(g))
            cost = space.group_cost(block, tuple(g[i] for i in members))
            seen[cost] = min(seen.get(cost, math.inf), sum(scores[i, g[i]] for i in members if space.audible(g, i)))
        best = math.inf
        parts.append([(c, best := v) for c, v in sorted(seen.items()) if v < best])
    for share in (0.0, 0.2, 0.5, 0.8):
        budget = budget_of(space, share)
        optimum = min(sum(v for _, v in c) for c in itertools.product(*parts) if sum(b for b, _ in c) <= budget)
        got = dynamic_programming(space, scores, budget, cells=10 ** 6)
        assert space.cost(got) <= budget and total(got) <= optimum + 1e-9


def test_what_is_out_of_reach_names_the_unit_and_the_range(models, spaces):
    for price, unit in dict(bytes="bytes", parameters="parameters", plain="nanoseconds").items():
        space = spaces["gfopt", price]
        text = f"at least {space.low} {unit}.*{space.high}.*got {space.low - 1}"
        for call in (space.check, space.uniform, lambda b: space.repair(space.cheapest(), b, random.Random(0)), lambda b: dynamic_programming(space, {}, b)):
            with pytest.raises(ValueError, match=text): call(space.low - 1)
        with pytest.raises(TypeError, match=f"whole number of {unit}"): space.check(1.5)
    with pytest.raises(ValueError, match="nanoseconds, the smallest"):
        compress(models["gfopt"], IDS, budget=10, target="latency", latency=CLOCKS["plain"], progress=False)


# the search ------------------------------------------------------------------------------------------------------
RUN = dict(evaluations=60, seed=3, progress=False)


@pytest.fixture(scope="module")
def fronts(models):
    return {t: compress(models["gfopt"], IDS, targets=[0.4, 0.7], target=t, latency=CLOCKS["plain"], **RUN) for t in ("bytes", "parameters", "latency")}


@pytest.mark.parametrize("target", ["bytes", "parameters", "latency"])
def test_a_search_keeps_its_budget_and_knows_what_it_found(models, fronts, target):
    front, model = fronts[target], models["gfopt"]
    dense = dict(bytes=dense_bytes(model), parameters=count_parameters(model), latency=round(1e6 * CLOCKS["plain"](model)))[target]
    assert front.budgets == [int(0.4 * dense), int(0.7 * dense)] and front.target == target and front.dense_bytes == dense_bytes(model)
    assert {p.source for p in front.points} == {"uniform", "additive", "greedy", "random", "evolution"} and front.evaluator.spent <= 60
    size = [getattr(p, target) for p in front.points]
    assert size == sorted(size) and max(size) <= front.budgets[1] and front.budgets[0] > min(size) > 0.5 * front.budgets[0]
    for p in front.points:
        s = front.space
        assert (p.bytes, p.parameters, p.latency) == (s.bytes(p.genome), s.cost(p.genome, PARAMETERS), s.cost(p.genome, CLOCKS["plain"]))
        assert getattr(p, target) == s.cost(p.genome)
    best = front.pick(**{target: front.budgets[0]})
    assert best.point.loss == min(p.loss for p in front.points if getattr(p, target) <= front.budgets[0])
    assert count_parameters(best.model) == best.point.parameters and abs(best.point.latency - 1e6 * CLOCKS["plain"](best.model)) <= 99
    small = front.pick(loss=best.point.loss).point
    assert getattr(small, target) == min(getattr(p, target) for p in front.points if p.loss <= best.point.loss)
    for p in front.points:
        beaten = any(getattr(q, target) <= getattr(p, target) and q.loss <= p.loss and (getattr(q, target), q.loss) != (getattr(p, target), p.loss) for q in front.points)
        assert (p in front.pareto()) != beaten


def test_a_search_for_time_is_repeatable_and_another_one(models, fronts):
    again = compress(models["gfopt"], IDS, targets=[0.4, 0.7], target="latency", latency=CLOCKS["plain"], **RUN)
    assert again.points == fronts["latency"].points
    few = lambda p: sum(v == 4 or str(v).endswith("@4") for v in p.genome)
    assert not any(map(few, fronts["latency"].points)) and any(map(few, fronts["bytes"].points))  # bits take no time here


def test_other_searches_keep_a_budget_of_time(models):
    for search in ("evopress", "ga", "nsga2"):
        front = compress(models["gfopt"], IDS, budget=0.8, target="latency", latency=CLOCKS["kernels"], search=search, **RUN)
        assert search in {p.source for p in front.points} and max(p.latency for p in front.points) <= front.budgets[0]


def test_pick_holds_to_several_limits(fronts, models):
    front = fronts["bytes"]
    a, b = sorted(p.latency for p in front.points)[len(front.points) // 2], front.budgets[1]
    got = front.pick(bytes=b, latency=a).point
    assert got.latency <= a and got.loss == min(p.loss for p in front.points if p.latency <= a and p.bytes <= b)
    with pytest.raises(ValueError, match=r"latency <= 3.*nanoseconds go from \d+ to \d+"): front.pick(bytes=b, latency=3)
    with pytest.raises(ValueError, match="both"): front.pick(latency=a, loss=1.0)
    with pytest.raises(ValueError, match="parameters go from"): fronts["parameters"].pick(loss=-1)
    blind = compress(models["gfopt"], IDS, budget=0.4, evaluations=2, progress=False)
    assert {p.latency for p in blind.points} == {None} and blind.points[0].parameters > 0
    with pytest.raises(ValueError, match="latency="): blind.pick(latency=a)


def test_axes_are_in_the_unit_of_the_budget(fronts):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    for target, (label, unit) in dict(bytes=("kilobytes", 1e3), parameters=("thousand parameters", 1e3), latency=("predicted milliseconds", 1e6)).items():
        ax = fronts[target].plot(plt.figure().gca())
        xs = [x for line in ax.lines for x in line.get_xdata()]
        assert ax.get_xlabel() == label and set(xs) <= {getattr(p, target) / unit for p in fronts[target].points}
    plt.close("all")


def test_wrong_targets_are_refused_before_anything_runs(monkeypatch):
    monkeypatch.setattr(front_module, "Divergence", lambda *a: pytest.fail("the dense model ran"))
    for kw, error, text in ((dict(target="speed"), ValueError, "target"), (dict(target="latency"), ValueError, "calibrate_latency"),
                            (dict(latency=0.5), TypeError, "LatencyModel, got float")):
        with pytest.raises(error, match=text): compress(None, IDS, budget=0.5, **kw)


def test_a_share_of_time_above_one_is_refused(models):
    with pytest.raises(ValueError, match="1.5; nanoseconds are whole numbers"):
        compress(models["gfopt"], IDS, budget=1.5, target="latency", latency=CLOCKS["plain"], progress=False)


# the latency model -----------------------------------------------------------------------------------------------
def test_work_counts_what_is_read_not_what_is_stored(models, spaces):
    space = spaces["gfopt", "bytes"]
    for bits in (4, 8, 16):
        model = built(space, space.flat(bits))
        layers = [m for b in sub_blocks(model) for m in model.get_submodule(b).modules() if isinstance(m, Stored)]
        fast = sum(m.in_features * m.out_features for m in layers if m._fast is not None) / 1e6
        whole = sum(m.in_features * m.out_features for m in layers) / 1e6
        assert 0 < fast < whole or bits == 16 or not kernel_works(bits)
        expected = {b: fast * (b == bits) for b in (4, 8)} | {32: whole - fast}
        assert np.allclose(work(model)[4:], [expected[b] for b in BITS]) and work(model)[:4].tolist() == [1, 2, 2, 0]
    head = {b: work(built(spaces["mistral", "bytes"], spaces["mistral", "bytes"].flat(4)[:-1] + (b,)))[4:] for b in (8, 16)}
    if kernel_works(8): assert np.allclose(head[8] - head[16], [0, VOCAB * 32 / 1e6, -VOCAB * 32 / 1e6])  # an untied head is a matrix like others
    assert read_in(16, 4096, 4096) == read_in(32, 4096, 4096) == read_in(8, 16, 32) == 32


@pytest.mark.parametrize("m, n", [(64, 72), (50, 64), (40, 40), (64, 80), (31, 48), (64, 64)])
@pytest.mark.parametrize("kind", [Int4Linear, Int8Linear])
def test_odd_shapes_are_never_given_to_a_kernel_that_misreads_them(kind, m, n):
    g = torch.Generator().manual_seed(0)
    layer, x = kind(torch.randn(m, n, generator=g)).prepare(), torch.randn(1, n, generator=g)
    exact = x @ layer.weight.T
    assert (layer(x) - exact).abs().max() <= 0.01 * exact.abs().max()
    assert (layer._fast is not None) == kernel_reads(layer.bits, m, n)
    if n % 16: assert layer._fast is None


def test_the_fit_knows_its_factors_and_refuses_nonsense():
    rng = np.random.default_rng(0)
    works, prices = np.c_[np.ones(40), rng.random((40, 6))], np.arange(1.0, 8.0)
    assert np.allclose(LatencyModel.fit(works, works @ prices).coefficients, prices)
    for bad in ([1.0] * 6, [1.0] * 6 + [-1.0], [1.0] * 6 + [math.nan]):
        with pytest.raises(ValueError, match="coefficients must be 7"): LatencyModel(bad)
    with pytest.raises(ValueError, match="times"): LatencyModel.fit(works, -works @ prices)


def test_calibration_measures_ready_models_and_checks_on_others(models, monkeypatch):
    seen = []
    def machine(named, prompt, **settings):
        assert settings == dict(new_tokens=3)
        seen.append([work(m) for m in named.values()])
        return {n: dict(decode_ms=float(w @ CLOCKS["kernels"].coefficients), prefill_ms=7.0) for n, w in zip(named, seen[-1])}
    monkeypatch.setattr(latency_module, "measure_latency", machine)
    fitted, errors = calibrate_latency(models["gfopt"], IDS[:1], new_tokens=3)
    assert len(seen[0]) == 28 and errors.shape == (6,) and np.abs(errors).max() < 1e-6
    assert np.array_equal(seen[0][-1], work(models["gfopt"])) and len({w.tobytes() for w in seen[0]}) > 15
    if kernel_works(4): assert sum(w[4] > 0 for w in seen[0]) > 5   # kernels are at work
    own = GenomeSpace(models["gfopt"], TECHNIQUES)
    for bits, w in zip((4, 8, 16), seen[0][24:27]):   # after the random ones, of which six are not fitted to: every width by itself
        assert np.array_equal(w, work(Compressed(own, SimpleNamespace(genome=own.flat(bits))).model))
    drawn, _ = calibrate_latency(models["gfopt"], IDS[:1], techniques=("blocks", "heads"), new_tokens=3)
    assert len(seen[1]) == 25   # no widths on the menu
    again, _ = calibrate_latency(models["gfopt"], IDS[:1], new_tokens=3)
    assert np.array_equal(seen[0], seen[2]) and np.array_equal(fitted.coefficients, again.coefficients)
    flat, errors = calibrate_latency(models["gfopt"], IDS[:1], which="prefill_ms", new_tokens=3)
    assert np.abs(errors).max() < 1e-6 and abs(flat(models["gfopt"]) - 7.0) < 1e-6
    with pytest.raises(ValueError, match="n: 19"): calibrate_latency(models["gfopt"], IDS[:1], n=19)
    with pytest.raises(ValueError, match="which"): fit_latency([models["gfopt"]] * 3, IDS[:1], 1, "wall")


# files -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_without_any_sub_block_can_be_saved(models, spaces, kind, tmp_path):
    space = spaces[kind, "bytes"]
    small = Compressed(space, SimpleNamespace(genome=space.cheapest(), bytes=space.low, loss=1.0, source="test", parameters=7, latency=None))
    assert len(small.dropped) == 4
    small.save(tmp_path)
    again, spec = load_compressed(tmp_path), json.loads((tmp_path / "compressed.json").read_text())
    out = [getattr(y, "logits", y) for y in (again(IDS), small.model(IDS))]
    assert torch.equal(*out) and spec["parameters"] == 7 and "latency_ns" not in spec


def test_gfopt_compress_for_time_leaves_a_log(tmp_path, capsys, monkeypatch):
    from gfopt.adapters.cli import main
    tokenizer = ByteTokenizer()
    save_model(Llama(LlamaConfig(tokenizer.vocab_size, 32, 2, 4, 2, 64), seed=0), tmp_path / "dense")
    (tmp_path / "dense/tokenizer.json").write_text(tokenizer.to_json())
    (tmp_path / "text").write_text("for i in range(10):\n    print(i)\n" * 40)
    clock, errors = CLOCKS["plain"], np.array([0.01, -0.02])
    monkeypatch.setattr(front_module, "calibrate_latency", lambda model, prompt, seed: (clock, errors))
    out = tmp_path / "small"
    assert main(["compress", str(tmp_path / "dense"), "--text", str(tmp_path / "text"), "--size", "0.6", "--target", "latency",
                 "--out", str(out), "--evaluations", "12", "--quiet", "--json"]) == 0
    table = json.loads(capsys.readouterr().out.splitlines()[-1])["table"]
    log, spec = json.loads((out / "latency.json").read_text()), json.loads((out / "compressed.json").read_text())
    assert log["table"] == table and log["fit"] == dict(coefficients=clock.coefficients.tolist(), held_out_errors=errors.tolist())
    assert log["prompt_tokens"] == 64 and log["torch"] == torch.__version__ and table["after"]["decode_ms"] > 0
    again = load_compressed(out)
    assert abs(spec["latency_ns"] - 1e6 * clock(again)) <= 99 and spec["parameters"] == count_parameters(again) == table["after"]["parameters"]
    dense = Llama(LlamaConfig(tokenizer.vocab_size, 32, 2, 4, 2, 64), seed=0)
    assert 0.4e6 * clock(dense) < spec["latency_ns"] <= 0.6e6 * clock(dense)
    with pytest.raises(ValueError, match="target"): front_module.compress_folder(str(tmp_path / "dense"), str(tmp_path / "text"), 0.5, str(out), target="speed")
