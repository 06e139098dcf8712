"""The rule behind `method="auto"`: its corners, its reasons, and that it is never far from the recorded best."""
import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gfopt.optimizer import METHODS
from gfopt.search.auto import auto, choose
from gfopt.space import Box, Categorical, Integer, Real, Space

TABLE = Path(__file__).parents[1] / "nbs" / "results" / "auto_cpu.json"


@settings(max_examples=60, deadline=None)
@given(d=st.integers(1, 10**6), budget=st.integers(1, 10**9), noisy=st.booleans(), discrete=st.booleans())
def test_every_situation_has_a_method_and_a_reason(d, budget, noisy, discrete):
    name, why = choose(d, budget, noisy, discrete)
    assert name in METHODS and str(budget) in why and str(d) in why
    if name == "cmaes":
        assert d * d <= budget or d <= 100  # never a matrix that the budget cannot fill
    if name == "bo":
        assert budget <= 200


@pytest.mark.parametrize(
    ("d", "budget", "noisy", "discrete", "method"),
    [
        (5, 14, False, False, "snes"), (5, 15, False, False, "bo"), (5, 200, False, False, "bo"),
        (5, 201, False, False, "crfmnes"), (5, 250, False, False, "cmaes"), (5, 249, True, False, "crfmnes"),
        (5, 250, True, False, "cmaes"), (100, 999, False, False, "snes"), (100, 1000, False, False, "crfmnes"),
        (100, 100_000, False, False, "cmaes"), (24, 1000, False, True, "cmaes"), (101, 2000, False, True, "crfmnes"),
        (10**5, 10**5, False, False, "snes"), (10**5, 10**6, False, False, "crfmnes"),
    ],
)
def test_thresholds(d, budget, noisy, discrete, method):
    assert choose(d, budget, noisy, discrete)[0] == method


def test_auto_is_an_optimizer_that_says_what_it_is():
    opt = auto(Box(-1, 1, 3), seed=4, budget=400)
    assert (opt.method, opt.settings, opt.seed) == ("cmaes", {}, 4)
    assert opt.why.startswith("auto chose cmaes: 400 evaluations in 3 dimensions")
    noisy = auto([(0, 1)], budget=1000, noisy=True)
    assert (noisy.method, noisy.settings) == ("cmaes", {"noisy": True}) and "noise" in noisy.why
    mixed = Space(lr=Real(1e-4, 1, log=True), n=Integer(1, 9), act=Categorical(["a", "b"]))
    assert auto(mixed, budget=12).method == "bo" and auto(mixed, budget=5).method == "snes"
    assert auto(Box(-1, 1, 2)).ask().shape[1] == 2


def test_one_whole_number_makes_a_space_discrete():
    reals = {f"x{i}": Real(0, 1) for i in range(23)}
    assert auto(Space(reals | dict(n=Integer(1, 9))), budget=1000).method == "cmaes"
    assert auto(Space(reals | dict(n=Real(1, 9))), budget=1000).method == "crfmnes"


@pytest.mark.skipif(not TABLE.exists(), reason="the recorded table is not there")
def test_the_rule_is_near_the_best_of_the_recorded_table():
    loss = {}
    for r in json.loads(TABLE.read_text())["rows"]:
        loss.setdefault((r["case"], r["d"], r["budget"]), {})[r["method"]] = math.log10(max(np.median(r["loss"]), 1e-8))
    gaps = []
    for (case, d, n), t in loss.items():
        name = choose(d, n, "noisy" in case, case in ("mixed", "categories"))[0]
        gaps.append(t[name] - min(t.values()))
    assert np.mean(gaps) < 0.25 and np.mean(np.array(gaps) <= 1) > 0.95
