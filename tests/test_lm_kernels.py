"""The Triton kernels against the CPU's noise: compiled where there is CUDA, else in triton's interpreter."""
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from gfopt.lm import kernels as K
from gfopt.lm import noise as N
from gfopt.lm.noise import ROUNDING_PAIR, normals, signs, tensor_id
from gfopt.lm.zeroth_order import ZerothOrder, stochastic_round

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FULL = 0xFFFFFFFF
KNOWN = [  # Random123's kat_vectors for philox4x32 with 10 rounds: counter, key, result
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((FULL,) * 4, (FULL, FULL), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
     (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KEY = dict(seed=2**63 + 2**31 + 5, step=FULL - 1)
NAMES = ["layers.0.up.weight", "norm", "empty", "head"]
SHAPES = [(70, 61), (1,), (0, 3), (2, 4096)]  # 4270 is no multiple of 16, 8192 is two programs


@pytest.fixture
def triton(monkeypatch):
    "triton; without CUDA as an interpreter whose conversions to bfloat16 round as the hardware's (its own ones truncate)."
    if DEVICE == "cpu": monkeypatch.setenv("TRITON_INTERPRET", "1")
    triton = pytest.importorskip("triton")
    if DEVICE == "cpu":
        from triton.runtime import interpreter

        def convert(data, source, target, mode, own=interpreter._convert_float):
            kinds = {"fp32": torch.float32, "bf16": torch.bfloat16}
            if {source.name, target.name} != set(kinds): return own(data, source, target, mode)
            x = torch.from_numpy(np.ascontiguousarray(data).view(np.int16 if source.name == "bf16" else np.float32).copy())
            y = x.view(torch.bfloat16).float() if source.name == "bf16" else x.bfloat16().view(torch.int16)
            return y.numpy().view(np.uint32 if source.name == "bf16" else np.uint16)

        monkeypatch.setattr(interpreter, "_convert_float", convert)
    return triton


def tensors(dtype, shapes=SHAPES, scale=1.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(s, generator=g) * scale).to(dtype).to(DEVICE) for s in shapes]


def rounding_bits(shape, name, seed, step):
    "Half a word per element, the low half first: eight elements share a call."
    n = int(np.prod(shape))
    w = N._words_numpy(np.arange(-(-n // 8)), tensor_id(name), ROUNDING_PAIR, step, seed).astype(np.int64)
    return torch.from_numpy(np.stack([w & 0xFFFF, w >> 16], -1).reshape(-1)[:n].reshape(shape))


@pytest.mark.parametrize("counter, key, want", KNOWN)
def test_philox_known_answers(triton, counter, key, want):
    block, tensor, pair, step = counter
    w = K.philox_words(block, tensor, pair, step, key[0] | key[1] << 32, DEVICE)
    assert tuple(w.tolist()) == want


def test_cpu_and_gpu_integers_identical(triton):
    place = (np.arange(2**32 - 700, 2**32), 2**32 - 1, np.array([[0], [2**31], [FULL]]), FULL, 2**64 - 3)
    w = K.philox_words(*place, DEVICE)
    assert w.shape == (3, 700, 4) and (w.cpu().numpy() == N._words_numpy(*place)).all()
    assert K.philox_words(np.arange(0), 1, 2, 3, 4, DEVICE).shape == (0, 4)


@pytest.mark.parametrize("start, count", [(1, 1), (1000, 1026), (2499, 1), (3, 0)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_slices_equal_the_whole(triton, start, count, dtype):
    pairs = [7, 2**31 + 1]
    for normal, draw in ((False, signs), (True, normals)):
        z = K.fill(pairs, start, count, tensor_id("w"), KEY["step"], KEY["seed"], DEVICE, dtype, normal=normal)
        want = draw(2500, **KEY, tensor="w", pair=pairs, start=start, count=count, dtype=dtype)
        assert z.shape == (2, count) and z.dtype == dtype
        assert torch.allclose(z.cpu().float(), want.float(), rtol=0.01 if normal and dtype != torch.float32 else 0, atol=2e-6 * normal)
        whole = K.fill(pairs, 0, 2500, tensor_id("w"), KEY["step"], KEY["seed"], DEVICE, dtype, normal=normal)
        assert torch.equal(z, whole[:, start:start + count])


def test_noise_goes_through_the_kernels_where_there_are_any(triton, monkeypatch):
    key, place = dict(**KEY, tensor="w", pair=[0, 2**31]), (np.arange(300), 5, [[1], [FULL]], 7)
    want = signs((30, 41), **key), normals(500, **key, start=3), signs(500, **key, start=3, count=300), N.words(*place, seed=9)
    monkeypatch.setattr(N, "_kernels", lambda device: K)
    got = signs((30, 41), **key, device=DEVICE), normals(500, **key, start=3, device=DEVICE), signs(500, **key, start=3, count=300, device=DEVICE)
    assert torch.equal(got[0].cpu(), want[0]) and torch.equal(got[2].cpu(), want[2]) and torch.allclose(got[1].cpu(), want[1], atol=2e-6)
    assert (N.words(*place, seed=9, device=DEVICE).cpu().numpy() == want[3]).all()
    assert signs(7, seed=0, dtype=torch.float64, device=DEVICE).dtype == torch.float64


def test_blocks_do_not_matter(triton):
    for normal in (False, True):
        z = [K.fill([5], 100, 1500, 3, 1, 2, DEVICE, torch.float32, normal=normal, block=b) for b in (256, 1024, 4096)]
        assert torch.equal(z[0], z[1]) and torch.equal(z[0], z[2])


@pytest.mark.parametrize("noise, draw", [("rademacher", signs), ("normal", normals)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_perturb_is_one_rounded_operation(triton, dtype, noise, draw):
    params = tensors(dtype)
    before, out = [p.clone() for p in params], [torch.full_like(p, 7) for p in params]
    fused = K.FusedNoise(params, NAMES, out)
    for scale in (1e-3, -0.3):
        fused.perturb(scale, **KEY, pair=2**31 + 9, noise=noise)
        for p, o, name in zip(params, out, NAMES):
            z = draw(tuple(p.shape), **KEY, pair=2**31 + 9, tensor=name)
            want = p.cpu().float().add(z, alpha=scale)
            if noise == "rademacher": assert torch.equal(o.cpu(), want.to(dtype))
            else: assert torch.allclose(o.cpu().float(), want, rtol=torch.finfo(dtype).eps, atol=1e-6)
    assert all(torch.equal(p, b) for p, b in zip(params, before))


def test_weights_are_bit_equal_after_perturbations(triton):
    params = tensors(torch.float16, [(300,)])
    out, before = [torch.empty_like(params[0])], params[0].clone()
    fused = K.FusedNoise(params, ["w"], out)
    for step in range(20): fused.perturb(0.5, seed=0, step=step)
    assert torch.equal(params[0], before)


def test_perturbed_copies_of_masters_in_another_dtype(triton):
    params = tensors(torch.float32)
    out = [torch.empty_like(p, dtype=torch.bfloat16) for p in params]
    K.FusedNoise(params, NAMES, out).perturb(0.01, **KEY)
    for p, o, name in zip(params, out, NAMES):
        assert torch.equal(o.cpu(), (p.cpu() + 0.01 * signs(tuple(p.shape), **KEY, tensor=name)).bfloat16())


def literal_update(p, name, coefficients, pairs, decay, dtype, draw=signs):
    "What the kernel promises, in torch on the CPU: every product, sum and difference rounded once to float32."
    total = torch.zeros(p.shape)
    for c, j in zip(coefficients, pairs):
        total = total + torch.tensor(c, dtype=torch.float32) * draw(tuple(p.shape), **KEY, pair=j, tensor=name)
    x = p.cpu().float() * torch.tensor(decay, dtype=torch.float32) - total
    return x if dtype == torch.float32 else stochastic_round(x, dtype, rounding_bits(p.shape, name, **KEY))


@pytest.mark.parametrize("decay", [1.0, 0.999])
@pytest.mark.parametrize("coefficients, pairs", [([3e-4], [0]), ([1e-3, -2.7e-4, 1 / 3], [0, 1, 2**31 + 4])])
@pytest.mark.parametrize("dtype", DTYPES)
def test_update_of_signs_is_bit_equal_to_the_cpu(triton, dtype, coefficients, pairs, decay):
    params = tensors(dtype)
    want = [literal_update(p, n, coefficients, pairs, decay, dtype) for p, n in zip(params, NAMES)]
    K.FusedNoise(params, NAMES).update(coefficients, **KEY, pairs=pairs, decay=decay)
    for p, w in zip(params, want): assert torch.equal(p.cpu(), w)


@pytest.mark.parametrize("dtype", DTYPES)
def test_update_of_normals(triton, dtype):
    params = tensors(dtype)
    want = [literal_update(p, n, [0.1, 0.2], [3, 4], 0.9, torch.float32, normals) for p, n in zip(params, NAMES)]
    K.FusedNoise(params, NAMES).update([0.1, 0.2], **KEY, pairs=[3, 4], decay=0.9, noise="normal")
    for p, w in zip(params, want): assert torch.allclose(p.cpu().float(), w, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.filterwarnings("ignore:invalid value encountered in subtract:RuntimeWarning")  # inf - inf is quiet on a GPU, not in numpy
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stochastic_rounding_of_extreme_values(triton, dtype):
    info = torch.finfo(dtype)
    v = torch.tensor([0.0, -0.0, info.max, -info.max, info.smallest_normal, info.tiny / 4, torch.inf, -torch.inf, torch.nan, 1.0, -1.0, 2.0])
    w = v.repeat(200).to(dtype).to(DEVICE)
    for c in (info.tiny * info.eps / 4, 1e-3, info.eps / 2, 65504 * info.eps / 8):  # below the smallest number, ..., ties, float16's infinity
        p = w.clone()
        want = literal_update(p, "x", [c], [0], 1.0, dtype)
        K.FusedNoise([p], ["x"]).update([c], **KEY, pairs=[0])
        nan = want.isnan()
        assert torch.equal(p.cpu().isnan(), nan) and torch.equal(p.cpu()[~nan], want[~nan])


def test_nan_stays_nan(triton):
    full = float(np.array([0x7FFFFFFF], np.uint32).view(np.float32)[0])  # a GPU's nan: bits set in the half that is cut off
    for dtype in DTYPES:
        p = torch.ones(300, dtype=dtype, device=DEVICE)
        K.FusedNoise([p], ["w"]).update([full], **KEY, pairs=[0])
        assert p.isnan().all()


def test_1000_updates_of_a_quarter_ulp_move_the_mean(triton):  # one kernel call has 1000 x 64 elements instead of 1000 steps
    for dtype in (torch.bfloat16, torch.float16):
        p = torch.ones(64_000, dtype=dtype, device=DEVICE)
        ulp = torch.finfo(dtype).eps
        K.FusedNoise([p], ["w"]).update([], **KEY, pairs=[], decay=1 + ulp / 4)
        share = float((p.float() - 1).mean()) / ulp
        assert abs(share - 0.25) < 4 * (0.25 * 0.75 / 64_000) ** 0.5


def test_odd_addresses_and_sizes(triton):
    base = torch.randn(3 * 5000 + 1).to(DEVICE)
    params, shifted = [base[:4999], base[5001:5001 + 4096]], torch.empty(10_000, device=DEVICE)
    out = [shifted[1:5000], shifted[5001:5001 + 4096]]
    shifted.fill_(9)
    fused = K.FusedNoise(params, ["a", "b"], out)
    fused.perturb(0.25, **KEY)
    assert [unit for _, _, unit in fused._tables] == [1]
    for p, o, name in zip(params, out, "ab"):
        assert torch.equal(o.cpu(), p.cpu() + 0.25 * signs(p.numel(), **KEY, tensor=name))
    whole = K.FusedNoise([torch.zeros(n, device=DEVICE) for n in (32, 31, 4096)], "abc")
    whole.update([1.0], **KEY, pairs=[0])
    assert [(len(owner), unit) for _, owner, unit in whole._tables] == [(2, 16), (1, 1)]  # 31 is no multiple of 16
    assert shifted[0] == 9 and (shifted[5000] == 9) and (shifted[5001 + 4096:] == 9).all()  # nothing written beside them


def test_replaced_parameters_are_noticed(triton):
    p = torch.nn.Parameter(torch.zeros(200, device=DEVICE))
    out = torch.empty(200, device=DEVICE)
    fused = K.FusedNoise([p], ["w"], [out])
    fused.perturb(1.0, **KEY)
    p.data = torch.ones(200, device=DEVICE)
    fused.perturb(1.0, **KEY)
    assert torch.equal(out.cpu(), 1 + signs(200, **KEY, tensor="w"))
    p.data = torch.ones(20, 10, device=DEVICE).T
    with pytest.raises(ValueError, match="params"): fused.perturb(1.0, **KEY)


def test_same_shape_tensors_get_different_noise(triton):
    out = [torch.empty(20_000, device=DEVICE) for _ in range(2)]
    K.FusedNoise([torch.zeros_like(o) for o in out], ["layers.0.w", "layers.1.w"], out).perturb(1.0, **KEY)
    assert abs(float((out[0] * out[1]).mean())) < 4 / 20_000**0.5


def test_global_rng_states_unchanged(triton):
    torch.manual_seed(0)
    before, state = torch.get_rng_state(), np.random.get_state()[1].copy()
    K.FusedNoise([torch.zeros(10, device=DEVICE)], ["w"]).update([1.0], **KEY, pairs=[0])
    assert torch.equal(before, torch.get_rng_state()) and (state == np.random.get_state()[1]).all()


@pytest.mark.parametrize("error, match, params, names, out", [
    (TypeError, "params", [torch.zeros(3, dtype=torch.float64)], ["w"], None),
    (TypeError, "out", [torch.zeros(3)], ["w"], [torch.zeros(3, dtype=torch.int32)]),
    (ValueError, "contiguous", [torch.zeros(3, 4).T], ["w"], None),
    (ValueError, "out", [torch.zeros(3)], ["w"], [torch.zeros(4)]),
    (ValueError, "params", [torch.zeros(3), torch.zeros(3, dtype=torch.float16)], ["v", "w"], None),
    (ValueError, "names", [torch.zeros(3)], ["v", "w"], None),
    (ValueError, "names", [torch.zeros(3)], [2**32], None),
    (ValueError, "params", [], [], None),
])
def test_bad_tensors_are_named(triton, error, match, params, names, out):
    with pytest.raises(error, match=match): K.FusedNoise(params, names, out)


@pytest.mark.parametrize("bad", [dict(seed=-1), dict(seed=2**64), dict(step=2**32), dict(pair=-1), dict(noise="gaussian")])
def test_bad_arguments_are_named(triton, bad):
    w = torch.zeros(3, device=DEVICE)
    with pytest.raises(ValueError, match=next(iter(bad))):
        K.FusedNoise([w], ["w"], [w.clone()]).perturb(1.0, **{"seed": 0, "step": 0, **bad})


def test_perturb_without_out_and_update_without_coefficients(triton):
    fused = K.FusedNoise([torch.zeros(3, device=DEVICE)], ["w"])
    with pytest.raises(ValueError, match="out="): fused.perturb(1.0, **KEY)
    with pytest.raises(ValueError, match="coefficients"): fused.update([1.0], **KEY, pairs=[0, 1])


@pytest.mark.parametrize("directions, decay, dtype", [(1, 0.0, torch.float32), (3, 0.1, torch.float32), (1, 0.1, torch.bfloat16), (3, 0.0, torch.float16)])
def test_zeroth_order_with_kernels_equals_zeroth_order_without(triton, monkeypatch, directions, decay, dtype):
    "Signs and plain steps: bit for bit, as a journal written on one machine must be replayed on another."
    def train(with_kernels):
        monkeypatch.setattr(K, "available", lambda device: with_kernels)
        model = torch.nn.Linear(9, 31).to(DEVICE)
        g = torch.Generator().manual_seed(0)
        for p in model.parameters(): p.data = torch.randn(p.shape, generator=g).to(dtype).to(DEVICE)
        opt = ZerothOrder(model, lr=0.01, eps=0.01, directions=directions, weight_decay=decay, seed=2**33 + 1)
        losses = [float(opt.step(lambda: model(torch.ones(2, 9, dtype=dtype, device=DEVICE)).float().square().mean())) for _ in range(2)]
        return losses, [p.detach().cpu() for p in model.parameters()], calls.copy()

    calls: list[str] = []
    launch = K._launch
    monkeypatch.setattr(K, "_launch", lambda kernel, *a, **k: (calls.append(kernel), launch(kernel, *a, **k)))
    plain, fused = train(False), train(True)
    assert plain[2] == [] and {*fused[2]} == {"_perturb", "_update"}
    assert plain[0] == fused[0] and all(torch.equal(a, b) for a, b in zip(plain[1], fused[1]))


def run(code, **env):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | env
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_import_is_light_and_needs_no_triton():
    code = """if True:
        import sys
        sys.modules["triton"] = None
        import gfopt.lm.kernels as K
        assert not K.available("cpu") and "triton.language" not in sys.modules
        print(K.bandwidth() is None)"""
    assert DEVICE == "cuda" or run(code, TRITON_INTERPRET="1").split() == ["True"]


def test_no_kernels_on_a_plain_cpu(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert not K.available("cpu")
    with pytest.raises(RuntimeError, match="CUDA"): K.FusedNoise([torch.zeros(3)], ["w"])


COMPILE = """
import json, re, collections
import gfopt.lm.kernels as K
compiled = K._load()
import triton.language as tl
from triton import compile
from triton.compiler import ASTSource
from triton.backends.compiler import GPUTarget
known = dict(DTYPE=tl.bfloat16, NORMAL=False, BLOCK=4096)
common = dict(table="*i64", owner="*i32", step="i32", k0="i32", k1="i32")
kernels = {
    "_perturb": (common | dict(scale="fp32", pair="i32"), known | dict(OUT=tl.bfloat16)),
    "_update": (common | dict(coefficients="*fp32", pairs="*i32", q="i32", decay="fp32"), known)}
out = {}
for name, unit in (("_perturb", 16), ("_perturb", 1), ("_update", 16)):
    fn, (types, constants) = compiled[name], kernels[name]
    constants = constants | dict(UNIT=unit)
    source = ASTSource(fn=fn, signature={n: types.get(n, "constexpr") for n in fn.arg_names}, constexprs=constants)
    ptx = compile(source, target=GPUTarget("cuda", 90, 32), options=dict(enable_fp_fusion=False)).asm["ptx"]
    out[f"{name}{unit}"] = collections.Counter(re.findall(r"^\\s+(?:@!?%p\\d+ )?([a-z][\\w.:]+)", ptx, re.M))
print(json.dumps(out))
"""


def test_kernels_compile_for_a_gpu_that_is_not_there(tmp_path):
    "Sixteen bytes at a time, rounded by the hardware to nearest, and no multiply-add that would skip a rounding."
    pytest.importorskip("triton")
    count = json.loads(run(COMPILE, TRITON_CACHE_DIR=str(tmp_path)))
    for name, n in count.items():
        assert not [k for k in n if re.match(r"fma|mad\.rn\.f32|div", k)], name
        wide = n.get("ld.global.v4.b32", 0), n.get("st.global.v4.b32", 0)
        assert min(wide) == 4 if name.endswith("16") else max(wide) == 0, (name, wide)
    assert count["_perturb16"]["cvt.rn.bf16x2.f32"] == 16  # 32 elements per thread
    assert count["_perturb16"]["mul.hi.u32"] == 20  # ten rounds, once per thread


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs CUDA")
def test_elements_beyond_two_to_the_31():
    n = 2**31 + 5000
    out = torch.empty(n, dtype=torch.float16, device="cuda")
    K.FusedNoise([torch.zeros_like(out)], ["w"], [out]).perturb(1.0, **KEY)
    for start in (0, 2**31 - 100, n - 3000):
        want = signs(n, **KEY, tensor="w", start=start, count=3000, dtype=torch.float16)
        assert torch.equal(out[start:start + 3000].cpu(), want)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs CUDA")
def test_noise_on_cuda_uses_the_kernels_and_equals_torch(monkeypatch):
    key = dict(**KEY, tensor="w", pair=[0, 9])
    z = signs((100, 101), **key, device="cuda"), normals((100, 101), **key, device="cuda")
    monkeypatch.setattr(K, "available", lambda device: False)
    assert torch.equal(z[0], signs((100, 101), **key, device="cuda"))
    assert torch.allclose(z[1], normals((100, 101), **key, device="cuda"), atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs CUDA")
def test_bandwidth_is_near_a_copy():
    speed = K.bandwidth(1 << 26)
    assert speed["perturb"] > 0.5 * speed["copy"] and speed["update"] > 0.3 * speed["copy"]
