"""Passes that need not be made: shared prefixes give the same bits, and a race does not change the winner."""
import random

import pytest
import torch
from compressing import VOCAB, tiny_model

from gfopt.compress.feedback import moments
from gfopt.compress.front import compress
from gfopt.compress.genome import TECHNIQUES, GenomeSpace
from gfopt.compress.search import (
    Divergence,
    Evaluator,
    Prefixes,
    greedy,
    logits_of,
    random_genomes,
    single_scores,
)

KINDS = ("gfopt", "llama", "qwen2", "qwen3", "mistral", "qwen2-sliding")
IDS = torch.randint(VOCAB, (6, 16), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def spaces():
    made = {k: tiny_model(k) for k in KINDS}
    return {k: (m, GenomeSpace(m, TECHNIQUES, (4, 16), moments=moments(m, IDS))) for k, m in made.items()}


def top_of(space): return tuple(g.levels[-1] for g in space.genes)


def single_moves(space):
    "The smallest and the second level of every gene, around the largest genome and around one with an attention and an MLP left out."
    top = top_of(space)
    gone = tuple("drop" if g.path in ("model.layers.0.mlp", "model.layers.2.self_attn") else v for g, v in zip(space.genes, top))
    return [space.canonical(base[:i] + (v,) + base[i + 1:]) for base in (top, gone) for i, g in enumerate(space.genes) for v in g.levels[:2]]


# shared prefixes ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
def test_every_restart_gives_the_bits_of_the_plain_pass(spaces, kind):
    m, space = spaces[kind]
    streams, depths, genomes = Prefixes(space, IDS), set(), single_moves(space)
    random.Random(0).shuffle(genomes)
    for g in genomes:
        before = streams.ran
        got = streams(g, 0, len(IDS))
        depths.add(round((1 - (streams.ran - before)) * 6))
        assert torch.equal(got, logits_of(space.library.use(g), IDS))
    assert depths == set(range(6))  # from the start, and from every sub-block
    assert not any(x._forward_pre_hooks for x in space.library.model.modules())


@pytest.mark.parametrize("kind", ["gfopt", "mistral"])
def test_searches_see_the_same_values_and_spend_the_same_with_and_without(spaces, kind):
    m, space = spaces[kind]
    d, logs, budget = Divergence(m, IDS), [], space.high // 4
    for states in (2 ** 28, 0):
        ev = Evaluator(space, d, states=states)
        scores = single_scores(ev, 0.5)
        greedy(ev, scores, budget, limit=8)
        random_genomes(ev, budget, 4, random.Random(0))
        logs.append((ev.log, ev.spent, scores, ev.computed))
    assert logs[0][:3] == logs[1][:3] and logs[1][3] == logs[1][1]
    assert logs[0][3] < 0.7 * logs[0][1]
    for g, v in list(ev.known.items())[:5]: assert v == pytest.approx(d(space.library.use(g)), rel=1e-6)


def test_an_embedding_in_other_bits_shares_nothing(spaces):
    m, space = spaces["gfopt"]
    streams, top = Prefixes(space, IDS), top_of(space)
    streams(top, 0, 6); streams(top[:-1] + (8,), 0, 6)
    assert streams.ran == 2
    m, space = spaces["mistral"]  # a head of its own comes last
    streams, top = Prefixes(space, IDS), top_of(space)
    assert space.genes[-1].path == "lm_head" and space.genes[-2].path == "model.embed_tokens"
    streams(top, 0, 6); streams(top[:-1] + (8,), 0, 6)
    assert streams.ran == pytest.approx(1 + 1 / 6)
    streams(top[:-2] + (8, 16), 0, 6)
    assert streams.ran == pytest.approx(2 + 1 / 6)


def test_the_stream_in_front_of_a_sub_block_that_is_left_out_is_known(spaces):
    m, space = spaces["gfopt"]
    streams, top = Prefixes(space, IDS), top_of(space)
    streams(space.canonical(tuple("drop" if g.path == "model.layers.0.mlp" else v for g, v in zip(space.genes, top))), 0, 6)
    assert torch.equal(streams(top, 0, 6), logits_of(space.library.use(top), IDS)) and streams.ran == pytest.approx(1 + 5 / 6)


def test_streams_of_other_rows_are_not_used(spaces):
    m, space = spaces["gfopt"]
    streams, g = Prefixes(space, IDS), top_of(space)
    for rows in ((0, 6), (0, 2), (2, 6)):
        assert torch.equal(streams(g, *rows), logits_of(space.library.use(g), IDS[rows[0]:rows[1]]))
    assert streams.ran == pytest.approx(2)
    assert torch.equal(streams(g, 2, 6), logits_of(space.library.use(g), IDS[2:])) and streams.ran == pytest.approx(2 + 4 / 6 / 6)


def test_memory_is_bounded_and_the_least_recently_used_goes_first(spaces):
    m, space = spaces["gfopt"]
    each = IDS.numel() * 32 * 4
    streams = Prefixes(space, IDS, limit=6 * each)
    for g in single_moves(space):
        streams(g, 0, 6)
        assert streams.bytes == sum(h.nbytes for h in streams.kept.values()) <= 6 * each
    assert streams.depths == [3]
    a, b, c = (streams.name(top_of(space), k, (0, 6)) for k in (1, 2, 3))
    streams.kept, streams.bytes, streams.limit = {}, 0, 2 * each
    streams.keep(a, torch.zeros(6, 16, 32)); streams.keep(c, torch.zeros(6, 16, 32))
    streams.depths = [1]
    streams(top_of(space), 0, 6)  # uses a
    streams.keep(b, torch.zeros(6, 16, 32))
    assert list(streams.kept) == [a, b]


def test_depths_are_spread_evenly_or_none(spaces):
    m, space = spaces["gfopt"]
    each = IDS.numel() * 32 * 4
    depths = lambda n: Prefixes(space, IDS, limit=int(n * each)).spaced()
    assert depths(100) == [1, 2, 3, 4, 5] and depths(8) == [2, 4] and depths(1) == [3] and depths(0.9) == []


def test_a_model_that_cannot_be_entered_gets_plain_passes(spaces):
    class Odd(torch.nn.Module):  # its layers remember the token ids: nothing in the middle says all
        def __init__(self, inner):
            super().__init__()
            self.inner, self.self_attn, self.mlp = inner, inner.self_attn, inner.mlp
            self.input_layernorm, self.post_attention_layernorm = inner.input_layernorm, inner.post_attention_layernorm
        def forward(self, x, *rest): return self.inner(x, *rest) + 0.1 * x
    m = tiny_model("gfopt")
    for i, layer in enumerate(m.model.layers): m.model.layers[i] = Odd(layer)
    space = GenomeSpace(m)
    ev, g = Evaluator(space, Divergence(m, IDS)), space.flat(4)
    top = space.flat(16)
    assert ev(top, "x") < 1e-3 and ev(g, "x") == Divergence(m, IDS)(space.library.use(g))
    ev(top[:-2] + (4,) + top[-1:], "x")
    assert ev._prefixes.depths == [] and ev.computed == ev.spent == 3


def test_an_error_in_a_pass_leaves_no_hook_behind(spaces):
    m, space = spaces["gfopt"]
    streams = Prefixes(space, IDS)
    streams(top_of(space), 0, 6)
    streams.ids = IDS + VOCAB
    with pytest.raises(IndexError): streams(space.flat(4), 0, 6)
    assert not any(x._forward_pre_hooks for x in space.library.model.modules())


def test_compress_runs_fewer_sub_blocks_than_it_counts(spaces):
    m, _ = spaces["gfopt"]
    front = compress(m, IDS, budget=0.2, techniques=("blocks", "bits"), evaluations=60, progress=False)
    assert front.evaluator.computed < 0.75 * front.evaluator.spent <= 45 + 15
