"""Noise is a function of (seed, step, pair, tensor, element) and of nothing else."""
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gfopt.lm import noise as N
from gfopt.lm.noise import (
    box_muller,
    normals,
    philox,
    signs,
    tensor_id,
    unpack_signs,
)

DRAWS = [signs, normals]
FULL = 0xFFFFFFFF
KNOWN = [  # Random123's kat_vectors for philox4x32 with 10 rounds: counter, key, result
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((FULL,) * 4, (FULL, FULL), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
     (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]

FROZEN_SIGNS = [-1, -1, 1, 1, 1, 1, 1, 1, -1, 1, 1, -1, -1, -1, 1, 1]
FROZEN_NORMALS = [-0.5189097354567959, -1.0229255763275844, -0.6515136625610376, -0.8916084993111192]


@pytest.mark.parametrize("counter, key, want", KNOWN)
@pytest.mark.parametrize("make", [lambda v: np.array([v], np.uint64), lambda v: torch.tensor([v])], ids=["numpy", "torch"])
def test_philox_known_answers(counter, key, want, make):
    assert tuple(int(v[0]) for v in philox([make(v) for v in counter], key[0] | key[1] << 32)) == want


u32 = st.integers(0, FULL)


@settings(max_examples=30, deadline=None)
@given(st.lists(u32, min_size=1, max_size=40), u32, u32, u32, st.integers(0, 2**64 - 1))
def test_integers_identical_on_numpy_and_torch(blocks, tensor, pair, step, seed):
    a = N._words_numpy(blocks, tensor, pair, step, seed)
    b = N._words_torch(blocks, tensor, pair, step, seed, "cpu")
    assert (a.astype(np.int64) == b.numpy()).all()
    assert torch.equal(unpack_signs(a), unpack_signs(b))
    assert torch.allclose(box_muller(a, torch.float64), box_muller(b, torch.float64), rtol=1e-12, atol=1e-12)


def test_words_do_not_depend_on_the_chunk():
    a = [N._words_numpy(np.arange(1000), 1, 2, 3, 4, chunk=c) for c in (1, 7, 1000, 1 << 14)]
    b = [N._words_torch(np.arange(1000), 1, 2, 3, 4, "cpu", chunk=c).numpy() for c in (7, 1000)]
    assert all((a[0] == x).all() for x in a[1:] + b)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(DRAWS), st.integers(0, 700), st.integers(0, 700), st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
def test_slices_equal_the_whole(draw, start, count, dtype):
    start, key = min(start, 700), dict(seed=3, step=5, pair=2, tensor="x", dtype=dtype)
    count = min(count, 700 - start)
    assert torch.equal(draw((7, 100), **key).flatten()[start:start + count], draw((7, 100), **key, start=start, count=count))


@pytest.mark.parametrize("draw", DRAWS)
def test_slices_equal_the_whole_of_a_large_tensor(draw):  # long enough for vectorised and threaded loops
    whole = draw(200_003, seed=1)
    for start, count in ((0, 7), (99_991, 100_012), (199_999, 4), (131_072, 17)):
        assert torch.equal(whole[start:start + count], draw(200_003, seed=1, start=start, count=count))


@pytest.mark.parametrize("draw", DRAWS)
def test_sequence_of_pairs_equals_single_pairs(draw):
    pairs = [0, 5, FULL - 1]
    together = draw((3, 50), seed=1, step=2, pair=pairs, tensor="w")
    assert together.shape == (3, 3, 50)
    for z, pair in zip(together, pairs):
        assert torch.equal(z, draw((3, 50), seed=1, step=2, pair=pair, tensor="w"))


@pytest.mark.parametrize("draw", DRAWS)
def test_same_shape_tensors_get_different_noise(draw):
    n = 20_000
    key = dict(seed=0, step=0, pair=0, tensor="layers.0.up.weight")
    z = draw(n, **key)
    for change in (dict(tensor="layers.1.up.weight"), dict(pair=1), dict(step=1), dict(seed=1), dict(seed=1 << 32)):
        other = draw(n, **{**key, **change})
        assert abs(float((z * other).mean())) < 4 / n**0.5, change
    assert abs(float((z[:-128] * z[128:]).mean())) < 4 / n**0.5  # nor are neighbouring blocks alike


@pytest.mark.parametrize("draw, kappa", [(signs, 1), (normals, 3)])
def test_moments(draw, kappa):
    n = 1 << 19
    z = draw(n, seed=2, tensor="w").double()
    assert abs(float(z.mean())) < 4 / n**0.5
    assert abs(float(z.square().mean()) - 1) < 4 * max(kappa - 1, 1e-9)**0.5 / n**0.5
    assert abs(float(z.pow(4).mean()) - kappa) < 4 * 96**0.5 / n**0.5


def test_normals_are_normal():
    scipy_stats = pytest.importorskip("scipy.stats")
    z = normals(50_000, seed=5, dtype=torch.float64).numpy()
    assert scipy_stats.kstest(z, "norm").pvalue > 1e-3
    even, odd = z[::2], z[1::2]
    assert abs(np.corrcoef(even**2, odd**2)[0, 1]) < 4 / 25_000**0.5


def test_extreme_words_give_finite_normals():
    w = np.array([[0, 0, FULL, FULL], [0, FULL, 511, 1 << 31]], np.uint32)
    for dtype in (torch.float32, torch.float64):
        z = box_muller(w, dtype)
        assert z.isfinite().all() and z.abs().max() < 5.78
        assert torch.allclose(z, box_muller(torch.from_numpy(w.astype(np.int64)), dtype), atol=1e-5)


def test_zero_is_a_seed():
    zs = [signs(1000, seed=s) for s in (0, 1, 2**64 - 1)]
    assert not torch.equal(zs[0], zs[1]) and not torch.equal(zs[0], zs[2])
    assert torch.equal(zs[0], signs(1000, seed=0))


def test_global_rng_states_unchanged():
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    signs(1000, seed=0), normals(1000, seed=0)
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all() and before[2] == random.getstate()


def test_values_are_frozen():  # a change here is a new NOISE_VERSION
    assert N.NOISE_VERSION == 1
    assert tensor_id("model.layers.0.mlp.up_proj.weight") == 0x5BF16F49
    key = dict(seed=7, step=11, pair=13, tensor="w")
    assert signs(16, **key).tolist() == FROZEN_SIGNS
    assert normals(4, **key, dtype=torch.float64).tolist() == pytest.approx(FROZEN_NORMALS, rel=1e-12)


@pytest.mark.parametrize("wrapped", ["module.a.module.b", "_orig_mod.a.module.b", "module._orig_mod.a._fsdp_wrapped_module.module.b"])
def test_wrappers_do_not_change_the_identity(wrapped):
    assert tensor_id(wrapped) == tensor_id("a.module.b") != tensor_id("a.b")


@pytest.mark.parametrize("shape", [(), (0,), (1,), 5, (2, 0, 3)])
def test_odd_shapes(shape):
    for draw in DRAWS:
        assert draw(shape, seed=0).shape == torch.zeros(shape).shape


@pytest.mark.parametrize("bad", [dict(seed=-1), dict(seed=2**64), dict(step=2**32), dict(step=-1), dict(pair=2**32), dict(pair=[0, -1]),
                                 dict(tensor=2**32), dict(start=-1), dict(start=3, count=9), dict(seed=True), dict(seed=1.5), dict(pair=[0.5]), dict(step=2.0)])
def test_bad_arguments_are_named(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        signs(10, **{"seed": 0, **bad})


def test_integers_of_numpy_and_torch_are_integers():
    a = signs(10, seed=3, step=4, pair=5)
    for kind in (np.int64, torch.tensor): assert torch.equal(a, signs(10, seed=kind(3), step=kind(4), pair=kind(5)))
    assert torch.equal(signs(10, seed=3, pair=[1, 2]), signs(10, seed=3, pair=torch.tensor([1, 2])))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cpu_and_gpu_integers_identical():
    key = dict(seed=2**63 + 5, step=FULL, pair=FULL, tensor="w")
    assert torch.equal(signs(100_001, **key), signs(100_001, **key, device="cuda").cpu())
    assert torch.allclose(normals(100_001, **key), normals(100_001, **key, device="cuda").cpu(), atol=1e-5)
