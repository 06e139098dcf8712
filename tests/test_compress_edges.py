"What a search may end at: nothing left between embedding and head, and projections that share a kernel."

from types import SimpleNamespace

import pytest
import torch

from gfopt.compress.export import Compressed, load_compressed, ready
from gfopt.compress.genome import GenomeSpace
from gfopt.compress.heal import heal
from gfopt.compress.measure import measure_latency
from gfopt.compress.search import logits_of
from gfopt.compress.techniques import (
    Int4Linear,
    Int8Linear,
    Joined,
    join,
    kernel_works,
    sub_blocks,
)
from gfopt.lm.model import Llama, LlamaConfig, config, generate


def dense(family, vocab=257):
    if family == "gfopt": return Llama(config("pico", vocab)).requires_grad_(False)
    tf = pytest.importorskip("transformers")
    with torch.random.fork_rng(devices=[]):
        return tf.LlamaForCausalLM(tf.LlamaConfig(vocab_size=vocab, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                                                  num_attention_heads=4, num_key_value_heads=2)).eval().requires_grad_(False)


def small(model, genome):
    return Compressed(GenomeSpace(model, ("blocks", "bits"), (4, 8, 16)), SimpleNamespace(genome=genome, bytes=0, loss=0.0, source="test"))


@pytest.mark.parametrize("family", ["gfopt", "llama"])
def test_a_model_without_any_layer_is_saved_loaded_and_read(family, tmp_path):
    model = dense(family)
    space = GenomeSpace(model, ("blocks", "bits"), (4, 8, 16))
    bare = small(model, space.canonical(tuple("drop" if "drop" in g.levels else g.levels[0] for g in space.genes)))
    ids = torch.arange(6)[None]
    bare.save(tmp_path)
    again = load_compressed(tmp_path)
    assert torch.equal(logits_of(bare.model, ids), logits_of(again, ids)) and sub_blocks(again) == []
    assert measure_latency(dict(m=again), ids, 2, 1)["m"]["decode_ms"] > 0
    if family == "gfopt": heal(bare, model, torch.arange(400) % 257, steps=1, population=2, length=8, progress=False)


@pytest.fixture(scope="module")
def wide():  # matrices large enough for a kernel
    return Llama(LlamaConfig(64, 256, 2, 4, 4, 512)).requires_grad_(False)


@pytest.mark.parametrize("bits", [4, 8])
def test_joined_projections_generate_what_separate_ones_do(wide, bits):
    if not kernel_works(bits): pytest.skip(f"no kernel for {bits} bits here")
    model = small(wide, GenomeSpace(wide, ("blocks", "bits"), (4, 8, 16)).flat(bits)).model
    blocks = [b for layer in model.model.layers for b in (layer.self_attn, layer.mlp)]
    assert all(isinstance(b.project, Joined) for b in blocks)
    joined = generate(model, torch.arange(5)[None], 12, temperature=0.0)
    x = torch.randn(1, 1, 256, generator=torch.Generator().manual_seed(0))
    one = [b.project(x) for b in blocks]
    for b in blocks: vars(b).pop("project")
    assert torch.equal(generate(model, torch.arange(5)[None], 12, temperature=0.0), joined)
    assert all(torch.equal(p, q) for b, o in zip(blocks, one) for p, q in zip(b.project(x), o))


def test_a_replaced_layer_leaves_the_joint_product(wide):
    if not kernel_works(4): pytest.skip("no kernel for 4 bits here")
    mlp = small(wide, GenomeSpace(wide, ("blocks", "bits"), (4, 8, 16)).flat(4)).model.model.layers[0].mlp
    x = torch.ones(1, 1, 256)
    old = mlp.project(x)
    mlp.gate_proj = Int8Linear(2 * wide.model.layers[0].mlp.gate_proj.weight)
    new = mlp.project(x)
    assert torch.allclose(new[0], mlp.gate_proj(x)) and not torch.allclose(new[0], old[0]) and torch.equal(new[1], mlp.up_proj(x))
    assert not join(mlp) and "project" not in vars(mlp)  # two kinds are not joined


def test_joining_needs_one_kind_without_biases(wide):
    if not kernel_works(4): pytest.skip("no kernel for 4 bits here")
    mlp = small(wide, GenomeSpace(wide, ("blocks", "bits"), (4, 8, 16)).flat(4)).model.model.layers[0].mlp
    assert join(mlp)
    mlp.gate_proj = Int4Linear(wide.model.layers[0].mlp.gate_proj.weight, torch.zeros(512)).prepare()
    assert not join(mlp)
    assert not join(torch.nn.Linear(2, 2))


def test_ready_without_kernels_is_exact_and_with_them_joined(wide):
    model = small(wide, GenomeSpace(wide, ("blocks", "bits"), (4, 8, 16)).flat(8)).model
    ids = torch.arange(7)[None]
    exact = ready(model, kernel=False)(ids)
    assert not any("project" in vars(m) for m in model.modules())
    assert torch.equal(ready(model)(ids), exact)  # many rows never go through a kernel
    if kernel_works(8): assert any("project" in vars(m) for m in model.modules())
