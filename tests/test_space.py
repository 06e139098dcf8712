"""Space and Box: coordinates, canonical rows, bad arguments."""
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gfopt.space import (
    Box,
    Categorical,
    Integer,
    Real,
    Space,
    as_space,
    space_from_json,
)

MIXED = Space(
    lr=Real(1e-5, 1e-1, log=True),
    batch=Integer(8, 256, log=True),
    opt=Categorical(["sgd", "adam", "lion"]),
    beta=Real(0.8, 0.999, when={"opt": ["adam", "lion"]}),
    nesterov=Categorical([True, False], when={"opt": ["sgd"]}),
    warm=Integer(0, 10, when={"beta": [0.8]}),
)


def unit(dim):
    return st.lists(st.floats(0, 1), min_size=dim, max_size=dim)


@settings(max_examples=200, deadline=None)
@given(unit(6))
def test_canonical_is_idempotent_and_means_the_same(row):
    z = torch.tensor([row], dtype=torch.float64)
    c = MIXED.canonical(z)
    assert torch.equal(MIXED.canonical(c), c)
    assert MIXED.decode(c) == MIXED.decode(z)
    p = MIXED.decode(c)[0]
    for j, name in enumerate(MIXED.names):
        if name not in p:
            assert c[0, j] == 0.5  # inactive: exactly one half
        elif MIXED.levels[j] == 0:
            assert c[0, j] == z[0, j]  # reals untouched


@settings(max_examples=200, deadline=None)
@given(unit(6))
def test_encode_of_decode_is_canonical_on_discrete_coordinates(row):
    c = MIXED.canonical(torch.tensor([row], dtype=torch.float64))
    back = MIXED.encode(MIXED.decode(c))
    discrete = MIXED.levels > 0
    assert torch.equal(back[:, discrete], c[:, discrete])
    assert torch.allclose(back, c, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_discrete_encode_matches_canonical_bits_in_every_dtype(dtype):
    space = MIXED.to(dtype=dtype)
    z = space.encode(space.sample(300, seed=3))
    assert z.dtype == dtype and torch.equal(space.canonical(z), z)


@pytest.mark.parametrize("p", [Integer(0, 6), Integer(3, 9, log=True), Integer(1, 2)])
def test_integer_cells_hold_their_share(p):
    z = torch.rand(40_000, generator=torch.Generator().manual_seed(1)).tolist()
    values = list(range(p.low, p.high + 1))
    share = [p.warp(v + 0.5) - p.warp(v - 0.5) for v in values]
    got = torch.bincount(torch.tensor([p.decode(v) for v in z]) - p.low, minlength=len(values))
    chi2 = sum((g - len(z) * s) ** 2 / (len(z) * s) for g, s in zip(got.tolist(), share, strict=True))
    assert math.isclose(sum(share), 1) and chi2 < len(values) + 5 * math.sqrt(2 * len(values))


def test_values_keep_their_type():
    s = Space(a=Categorical([1, True, 1.0, "1", None, [1, 2]]))
    for v in [1, True, 1.0, "1", None, [1, 2]]:
        (got,) = s.decode(s.encode([{"a": v}]))
        assert got["a"] == v and type(got["a"]) is type(v)


def test_a_number_matches_by_value_and_a_truth_does_not():
    assert Categorical([1, 2]).encode(1.0) == 0.25 and Categorical([False, True, 2]).encode(2.0) == 2.5 / 3
    for choices, value in (([1, 2], True), ([True, False], 1)):
        with pytest.raises(ValueError, match="one of"):
            Categorical(choices).encode(value)


def test_clamped_ends():
    s = Space(x=Real(1e-5, 0.1, log=True))
    assert s.decode([[1.0]])[0]["x"] == 0.1 and s.decode([[0.0]])[0]["x"] == 1e-5
    assert s.decode([[1.5]])[0]["x"] == 0.1


def test_chained_conditions():
    s = Space(a=Categorical(["x", "y"]), b=Categorical([1, 2], when={"a": ["x"]}), c=Real(0, 1, when={"b": [2]}))
    for p in s.sample(200, seed=0):
        assert ("b" in p) == (p["a"] == "x") and ("c" in p) == (p.get("b") == 2)
    with pytest.raises(ValueError, match="exists only when"):
        s.encode([{"a": "y", "b": 1}])


def test_json_round_trip():
    for s in (MIXED, Box(-1, 2, 3), Box(-math.inf, math.inf, x0=[0.0, 1.0], sigma0=2.0)):
        again = space_from_json(json.loads(json.dumps(s.to_json())))
        assert again.to_json() == s.to_json() and torch.equal(again.low, s.low) and torch.equal(again.sigma0, s.sigma0)


def test_large_integer_has_no_table_and_still_round_trips():
    s = Space(n=Integer(0, 10**6))
    z = s.encode([{"n": v} for v in (0, 1, 777_777, 10**6)])
    assert [p["n"] for p in s.decode(z)] == [0, 1, 777_777, 10**6] and torch.equal(s.canonical(z), z)


@pytest.mark.parametrize("p", [Integer(0, 10**6), Integer(5, 10**6, log=True), Integer(3, 9)])
def test_cells_reach_half_way_to_the_neighbours_with_and_without_a_table(p):
    for v in (p.low, p.low + 3, p.high):
        assert [p.decode(p.warp(v + h)) for h in (-0.49, 0.0, 0.49)] == [v] * 3
    assert p.decode(0.0) == p.low and p.decode(1.0) == p.high


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6), min_size=3, max_size=3))
def test_reflection_stays_inside(x):
    box = Box([-5, 0, -1], [5, 1, 3])
    r = box.reflect(torch.tensor([x], dtype=torch.float64))
    assert ((r >= box.low) & (r <= box.high)).all()
    point = torch.tensor(x, dtype=torch.float64)
    inside = (point >= box.low) & (point <= box.high)
    assert torch.equal(r[0][inside], point[inside])


def test_one_sided_box():
    box = Box(0, math.inf, 2, x0=1.0, sigma0=0.5)
    z = box.reflect(torch.tensor([[-0.25, 7.0]], dtype=torch.float64))
    assert z.tolist() == [[0.25, 7.0]]
    assert (box.sample(500) >= 0).all()


BAD = [
    (lambda: Real(1, 1), ValueError, "low=1"),
    (lambda: Real(2, 1), ValueError, "low < high"),
    (lambda: Real(0, 1, log=True), ValueError, "low > 0"),
    (lambda: Real("a", 1), TypeError, "low"),
    (lambda: Real(0, math.inf), ValueError, "finite"),
    (lambda: Integer(0, 8, log=True), ValueError, "log=True"),
    (lambda: Integer(0.5, 8), ValueError, "whole"),
    (lambda: Categorical([]), ValueError, "at least one"),
    (lambda: Categorical("abc"), TypeError, "list"),
    (lambda: Categorical([1, 1]), ValueError, "once"),
    (lambda: Categorical([object()]), TypeError, "JSON"),
    (lambda: Real(0, 1, when=["opt"]), TypeError, "when"),
    (lambda: Space(), ValueError, "no parameters"),
    (lambda: Space(a=3), TypeError, "a=3"),
    (lambda: Space(a=Real(0, 1, when={"b": [1]}), b=Integer(0, 1)), ValueError, "earlier"),
    (lambda: Space(b=Integer(0, 1), a=Real(0, 1, when={"b": [7]})), ValueError, "7"),
    (lambda: MIXED.encode([{"lr": 1e-3}]), ValueError, "batch is missing"),
    (lambda: MIXED.encode([{"lr": 1, "batch": 8, "opt": "sgd", "nesterov": True}]), ValueError, "lr: value 1"),
    (lambda: MIXED.encode([{"speed": 1}]), ValueError, "speed"),
    (lambda: MIXED.decode(torch.zeros(2, 3)), ValueError, "shape"),
    (lambda: Box(-1, 1), ValueError, "dim"),
    (lambda: Box(1, -1, 2), ValueError, "low < high"),
    (lambda: Box(-math.inf, math.inf, 2), ValueError, "x0"),
    (lambda: Box([(0, 1, 2)]), TypeError, "pairs"),
    (lambda: Box(0, 1, 0), ValueError, "dim: 0"),
    (lambda: Box(0, 1, 2, sigma0=-1.0), ValueError, "sigma0"),
    (lambda: Box(0, 1, 2).encode([[0.5, 2.0]]), ValueError, "outside"),
    (lambda: as_space(7), TypeError, "space: 7"),
]


@pytest.mark.parametrize("make,error,words", BAD, ids=range(len(BAD)))
def test_bad_arguments_are_named(make, error, words):
    with pytest.raises(error, match=words):
        make()
