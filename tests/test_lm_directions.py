"""Directions: noise that replays, sees what it should, and meets a batched population as it meets a single model."""
import math

import pytest
import torch
from torch import nn

from gfopt.lm import directions
from gfopt.lm.directions import (
    MASK_PAIR,
    ROUNDING_PAIR,
    Chunk,
    DenseNoise,
    Layout,
    LowRankNoise,
    as_mask,
    make_chunks,
    scattered,
    smallest,
)
from gfopt.lm.noise import normals, signs
from gfopt.lm.population import low_rank_noise, member_weight

DRAW = {"rademacher": signs, "normal": normals}


def make(shapes=((6, 4), (5,), (3, 2, 2)), dtype=torch.float32, masks=None, eps=0.5):
    params = [nn.Parameter((0.1 * normals(s, seed=9, tensor=f"w{k}")).to(dtype)) for k, s in enumerate(shapes)]
    names = [f"w{k}" for k in range(len(shapes))]
    return Chunk(dict(eps=eps), names, params, masks or [None] * len(shapes))


# noise -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("noise", DRAW)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_layout_draws_what_each_tensor_draws_alone(noise, dtype):
    sizes = [1, 127, 128, 129, 1000]
    layout = Layout([f"t{k}" for k in range(5)], sizes)
    flat = layout.draw(noise, seed=2**63, step=7, pair=3, dtype=dtype)
    for k, z in enumerate(layout.split(flat)):
        assert torch.equal(z, DRAW[noise](sizes[k], seed=2**63, step=7, pair=3, tensor=f"t{k}", dtype=dtype))


def test_rounding_bits_are_uniform_and_of_their_own():
    layout = Layout(["a"], [1 << 16])
    bits = layout.bits(0, 0, "cpu")[: 1 << 16].double()
    assert 0 <= bits.min() and bits.max() < 65536
    assert abs(bits.mean() / 65535 - 0.5) < 4 / math.sqrt(12 * 65536)
    assert ROUNDING_PAIR != MASK_PAIR and not torch.equal(layout.bits(0, 1, "cpu")[:100], layout.bits(0, 0, "cpu")[:100])


@pytest.mark.parametrize("noise", DRAW)
def test_dense_draw_is_the_named_noise_and_is_made_again_when_the_room_was_used(noise):
    first, second = make(), make(((50, 3),))
    d = DenseNoise(noise, seed=4)
    z = [t.clone() for t in d.draw(first, 2, 1)]
    list(d.draw(second, 2, 1)), list(d.draw(first, 3, 1))
    assert all(torch.equal(a, b) for a, b in zip(z, d.draw(first, 2, 1)))
    for t, s, n in zip(z, first.shapes, first.names): assert torch.equal(t, DRAW[noise](s, seed=4, step=2, pair=1, tensor=n))


@pytest.mark.parametrize("d", [DenseNoise("normal", 3), LowRankNoise("normal", 3, rank=2, refresh=3)])
@pytest.mark.parametrize("step", [0, 2, 3, 4])
def test_replayed_z_equals_used_z_on_mask_and_refresh_steps_too(d, step):
    masks = [torch.arange(24).view(6, 4) % 3 == 0, None, None]
    chunk = make(masks=masks)
    used = [[t.clone() for t in d.draw(chunk, step, j)] for j in range(3)]
    with torch.no_grad():
        before = [p.detach().clone() for p in chunk.params]
        chunk.shift(d, step, 1, 0.5)
        assert all(torch.equal(p, b + 0.5 * z) for p, b, z in zip(chunk.params, before, used[1]))
    list(d.draw(chunk, step + 1, 0))
    totals, c = d.total(chunk, step, {0: 0.25, 2: -3.0})
    for got, a, b in zip(totals, used[0], used[2]): assert torch.allclose(c * got, 0.25 * a - 3 * b, atol=1e-5)
    for z in used: assert not z[0][~masks[0]].any() and z[0][masks[0]].all()


@pytest.mark.parametrize("d", [DenseNoise(), LowRankNoise(rank=2)])
def test_one_direction_is_not_multiplied_before_it_is_used(d):
    chunk = make()
    z = [t.clone() for t in d.draw(chunk, 0, 0)]
    totals, c = d.total(chunk, 0, {0: 0.3})
    assert all(torch.allclose(c * t, 0.3 * a, atol=1e-7) for t, a in zip(totals, z))


def test_dense_total_does_the_roundings_of_the_kernels():
    chunk, d = make(((1000,),)), DenseNoise("normal")
    z = [normals(1000, seed=0, step=5, pair=j, tensor="w0") for j in range(3)]
    (got,), c = d.total(chunk, 5, {0: 0.1, 1: -0.7, 2: 0.3})
    t = z[0] * 0.1
    for j, v in ((1, -0.7), (2, 0.3)): t = t + (z[j] * torch.tensor(v, dtype=torch.float32))
    assert c == 1.0 and torch.allclose(got, t, rtol=0, atol=1e-6)
    d = DenseNoise()
    z = [signs(1000, seed=0, step=5, pair=j, tensor="w0") for j in range(3)]
    (got,), _ = d.total(chunk, 5, {0: 0.1, 1: -0.7, 2: 0.3})  # with signs the products are exact: the bits are decided
    assert torch.equal(got, (z[0] * torch.tensor(0.1) + z[1] * torch.tensor(-0.7)) + z[2] * torch.tensor(0.3))


# low rank ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("noise", DRAW)
@pytest.mark.parametrize("rank", [1, 3])
def test_low_rank_direction_is_the_product_of_the_population_factors(noise, rank):
    chunk = make()
    z = list(LowRankNoise(noise, 5, rank).draw(chunk, 2, 4))
    for k in (0, 2):
        U, V = low_rank_noise(chunk.shapes[k], rank=rank, seed=5, step=2, pairs=[4], tensor=f"w{k}", noise=noise)
        assert torch.allclose(z[k], (U[0] @ V[0].T / rank**0.5).view(chunk.shapes[k]), atol=1e-6)
        assert torch.linalg.matrix_rank(z[k].flatten(1)) <= rank
    assert torch.equal(z[1], DRAW[noise](5, seed=5, step=2, pair=4, tensor="w1"))


def test_v_is_kept_for_refresh_steps_and_u_is_not():
    chunk, d = make(((6, 4),)), LowRankNoise("normal", 1, rank=2, refresh=4)
    factors = [d.factors(chunk, step, [0, 1])[0] for step in range(9)]
    for step, (U, V) in enumerate(factors):
        assert torch.equal(V, factors[step - step % 4][1]) and (step == 0 or not torch.equal(U, factors[step - 1][0]))
    assert not torch.equal(factors[0][1], factors[4][1]) and not torch.equal(factors[0][1][0], factors[0][1][1])
    # one row space for four steps
    Z = torch.cat([next(iter(d.draw(chunk, step, 0))) for step in range(4)])
    assert torch.linalg.matrix_rank(Z) == 2


def test_u_and_v_never_share_a_number_after_a_refresh():
    chunk, d = make(((6, 6),)), LowRankNoise("normal", 0, rank=3, refresh=2)
    seen = torch.cat([t.flatten() for step in range(6) for t in (d.factors(chunk, step, [0])[0] if step % 2 == 0 else d.factors(chunk, step, [0])[0][:1])])
    assert len(seen.unique()) == len(seen)


def linear(draws, G, masks=None, rank=None, refresh=1, noise="rademacher"):
    chunk = make((G.shape,), torch.float64, masks)
    d = LowRankNoise(noise, 0, rank, refresh) if rank else DenseNoise(noise, 0)
    out = []
    for step in range(draws):
        z = next(iter(d.draw(chunk, step, 0)))
        out.append(((G * z).sum() * z).clone())
    return torch.stack(out)


@pytest.mark.parametrize("settings", [dict(), dict(noise="normal"), dict(rank=1), dict(rank=4, noise="normal"), dict(rank=2, refresh=1),
                                      dict(masks=[torch.arange(24).view(6, 4) % 3 != 0])])
def test_mean_of_g_z_is_the_gradient_where_it_may_move(settings):  # catches a missing 1/sqrt(r)
    G = normals((6, 4), seed=8, dtype=torch.float64)
    each = linear(1500, G, **settings)
    want = G if "masks" not in settings else G * settings["masks"][0]
    z = (each.mean(0) - want) / (each.std(0) / len(each) ** 0.5 + 1e-12)
    assert z.abs().max() < 4.2


def test_kept_v_sees_the_gradient_projected_on_its_rows():  # Eq. (4.11.4)
    G, chunk = normals((6, 4), seed=8, dtype=torch.float64), make(((6, 4),), torch.float64)
    d = LowRankNoise("normal", 0, rank=2, refresh=4000)
    V = d.factors(chunk, 1, [0])[0][1][0]
    each = torch.stack([(G * (z := next(iter(d.draw(chunk, step, 0))))).sum() * z for step in range(1500)])
    t = (each.mean(0) - G @ V @ V.T / 2) / (each.std(0) / 1500**0.5)
    assert t.abs().max() < 4.2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_changes_of_members_are_the_shifted_weights(dtype):
    members = [(0, 0), (0, 1), (3, 1), (3, -1)]
    chunk, d = make(dtype=dtype), LowRankNoise("rademacher", 2, rank=2, refresh=3)
    changes = d.changes(chunk, 4, members)
    before = [p.detach().clone() for p in chunk.params]
    for k, (pair, sign) in enumerate(members):
        alone = [member_weight(p, changes[n], k).clone() for n, p in zip(chunk.names, chunk.params)]
        z = list(d.draw(chunk, 4, pair))
        for a, b, t in zip(alone, before, z):
            assert torch.allclose(a.double(), b.double() + sign * 0.5 * t.double(), atol=1e-6 if dtype != torch.bfloat16 else 2e-2)
            if not sign: assert torch.equal(a, b)


def test_chunks_that_take_turns_keep_their_signs(monkeypatch):  # weights in two groups, used in the model's order
    chunks, d = [make(), make(dtype=torch.float64)], DenseNoise(seed=3)
    calls, draw = [], Layout.signs
    monkeypatch.setattr(Layout, "signs", lambda self, **where: calls.append(where) or draw(self, **where))
    changes = [(c, n, d.changes(c, 0, [(0, 1), (1, 1)])[n]) for n in chunks[0].names for c in chunks]
    first = [change.weight(m).clone() for _, _, change in changes for m in range(2)]
    assert len(calls) == 4  # two chunks, two directions
    monkeypatch.setattr(directions, "KEPT", 0)  # no room: the same numbers, a parameter at a time
    d.forget()
    again = [change.weight(m) .clone() for _, _, change in changes for m in range(2)]
    assert len(calls) == 4 and all(torch.equal(a, b) for a, b in zip(first, again))


def test_weights_of_members_share_no_memory():  # an operation may meet several at once, a weight and its bias
    changes = DenseNoise(seed=3).changes(make(), 0, [(0, 1), (0, -1)])
    held = [c.weight(m) for c in changes.values() for m in range(2)]
    assert len({w.untyped_storage().data_ptr() for w in held}) == len(held)


def test_the_room_for_signs_is_let_go_where_it_is_asked_for():
    chunk, d = make(), DenseNoise(seed=3)
    first = [z.clone() for z in d.draw(chunk, 0, 0)]
    d.forget()
    assert d._rooms and d._plans  # kept for the next step
    d.forget(room=True)
    assert not (d._rooms or d._plans or d._kept)
    assert all(map(torch.equal, d.draw(chunk, 0, 0), first))


@pytest.mark.parametrize("noise", DRAW)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kept", [directions.KEPT, 0])
def test_rows_of_a_member_are_those_of_its_whole_weight_bit_for_bit(noise, dtype, kept, monkeypatch):  # tiles start anywhere in a block of Philox
    monkeypatch.setattr(directions, "KEPT", kept)
    shapes = ((7,), (101, 129), (130, 3), (31, 2, 5))
    chunk = make(shapes, dtype, masks=[None, torch.arange(101 * 129).view(101, 129) % 7 == 0, None, None])
    changes = DenseNoise(noise, seed=3).changes(chunk, 4, [(2, 1), (0, 0), (2, -1)])
    for (n, change), z in zip(changes.items(), DenseNoise(noise, seed=3).draw(chunk, 4, 2)):
        for m, sign in enumerate((1, 0, -1)):
            p = chunk.params[chunk.names.index(n)].detach()
            whole = change.weight(m)
            assert torch.equal(whole, torch.add(p, z, alpha=sign * 0.5).to(dtype) if sign else p)
            for step in (1, 3, 64): assert torch.equal(torch.cat([change.rows(m, i, i + step) for i in range(0, len(p), step)]), whole)


# masks -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("share", [0.1, 0.25, 1.0])
def test_smallest_takes_the_entries_of_least_magnitude(share):
    w = normals((40, 50), seed=1)
    m = smallest(share)("w", w)
    assert m.dtype == torch.bool and m.sum() == round(share * 2000)
    if share < 1: assert w[m].abs().max() < w[~m].abs().min()
    assert smallest(share)("g", torch.ones(7)).all()  # ties are taken together


def test_scattered_masks_differ_by_name_and_seed_and_have_the_share():
    w = torch.zeros(200, 100)
    a, b, c = scattered(0.3)("a", w), scattered(0.3)("b", w), scattered(0.3, seed=1)("a", w)
    assert abs(a.float().mean() - 0.3) < 4 * (0.21 / 20000) ** 0.5
    for other in (b, c): assert abs((a & other).float().mean() - 0.09) < 0.02
    assert torch.equal(a, scattered(0.3)("a", w)) and scattered(1.0)("a", w).all()


@pytest.mark.parametrize("share", [0, -0.1, 1.1, math.nan])
def test_shares_outside_are_refused(share):
    for make_mask in (smallest, scattered):
        with pytest.raises(ValueError, match="share"): make_mask(share)


@pytest.mark.parametrize("mask", [torch.ones(3, 4), torch.ones(4, 3, dtype=torch.bool), [True], None])
def test_masks_of_another_kind_are_refused_by_name(mask):
    with pytest.raises(ValueError, match="'w'"): as_mask("w", torch.zeros(3, 4), mask)


# chunks ------------------------------------------------------------------------------------------

def test_chunks_are_cut_at_groups_precisions_and_the_limit():
    p = [nn.Parameter(torch.zeros(n, dtype=t)) for n, t in ((10, torch.float32), (20, torch.float32), (30, torch.float64), (0, torch.float64), (5, torch.float64))]
    groups = [dict(params=p[:3], param_names=["a", "b", "c"]), dict(params=p[3:], param_names=["d", "e"])]
    assert [c.names for c in make_chunks(groups)] == [["a", "b"], ["c"], ["e"]]
    assert [c.names for c in make_chunks(groups, limit=20)] == [["a"], ["b"], ["c"], ["e"]]


def test_fused_kernels_are_never_asked_for_on_a_cpu():
    assert make().fused is None


def test_copies_are_let_go_and_made_anew():
    chunk = make()
    before = [p.data for p in chunk.params]
    chunk.shift(DenseNoise(), 0, 0, 0.1)
    for p, data in zip(chunk.params, before): p.data = data
    chunk.release()
    assert "copies" not in vars(chunk)
    chunk.release()  # nothing to let go of
    chunk.shift(DenseNoise(), 0, 0, 0.1)


def test_copies_are_made_once_and_only_when_a_parameter_is_perturbed():
    chunk = make()
    LowRankNoise(rank=1).changes(chunk, 0, [(0, 1)])
    assert "copies" not in vars(chunk)
    chunk.shift(DenseNoise(), 0, 0, 0.1)
    assert [p.data_ptr() for p in chunk.params] == [c.data_ptr() for c in chunk.copies]
