"""A race ends as soon as a genome is surely worse than the best: what it spends, what it leaves behind, how often it errs."""
import math
import random
from types import SimpleNamespace

import pytest
import torch
from scipy.stats import ttest_rel

from gfopt.compress.evolution import Damages, evolve
from gfopt.compress.front import compress
from gfopt.compress.genome import GenomeSpace
from gfopt.compress.search import Divergence, Evaluator, lower_end
from gfopt.lm.model import Llama, LlamaConfig

IDS = torch.randint(48, (32, 12), generator=torch.Generator().manual_seed(5))


class Written(Divergence):
    "Rows that are written down; a genome is the name of its rows."
    def __init__(self, rows: dict): self.table, self.ids = rows, torch.zeros(len(next(iter(rows.values()))), 1)
    def by_row(self, model, start, stop, logits=None): return torch.as_tensor(self.table[model], dtype=torch.float64)[start:stop]


SPACE = SimpleNamespace(canonical=lambda g: g, bytes=lambda g: 1, cost=lambda g: 1, library=SimpleNamespace(use=lambda g: g))


def started(**rows):
    "An evaluator that knows the rival."
    ev = Evaluator(SPACE, Written(rows), states=0)
    ev("rival", "first")
    return ev


def noise(n, seed=0, width=0.1): return width * torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def real():
    m = Llama(LlamaConfig(48, 32, 3, 4, 2, 64), seed=0)
    with torch.no_grad():
        for n, p in m.named_parameters():
            if p.dim() == 2: p.normal_(0, 2.0 / p.shape[1] ** 0.5, generator=torch.Generator().manual_seed(len(n)))
    m = m.eval().requires_grad_(False)
    return m, GenomeSpace(m, ("blocks", "bits")), Divergence(m, IDS)


# the interval ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("n, looks", [(2, 1), (8, 2), (16, 2), (33, 3)])
def test_lower_end_is_that_of_the_paired_interval(n, looks):
    a, b = noise(n, 1) + 1, noise(n, 2)
    assert lower_end(a - b, looks) == pytest.approx(ttest_rel(a, b).confidence_interval(1 - 0.05 / looks).low, rel=1e-9)


def test_equal_genomes_seldom_lose():
    "Each look is wrong upwards in 1.25% of all cases; together at most 2.5%, and not much less."
    rows = {k: noise(32, k) for k in range(2000)}
    ev = started(rival=torch.zeros(32), **{str(k): r for k, r in rows.items()})
    for k in rows: ev.race(str(k), "rival", "x")
    assert 0.014 < len(ev.lost) / len(rows) < 0.03


# what it spends and leaves behind ----------------------------------------------------------------------------------
@pytest.mark.parametrize("rows, share", [([1.0] * 32, 1 / 4), ([-0.2, 1.2] * 4 + [1.0] * 24, 1 / 2), ([-1.0, 1.0] * 16, 1.0)])
def test_a_race_ends_at_the_first_look_that_decides(rows, share):
    ev = started(rival=[2.0] * 31 + [6.0], x=torch.tensor(rows) + torch.tensor([2.0] * 31 + [6.0]) + noise(32, width=0.01))
    before, told = ev.spent, []
    ev.on_evaluation = told.append
    value = ev.race("x", "rival", "race")
    assert ev.spent - before == sum(told) == share
    if share == 1: assert ev.log[-1] == ("race", "x", value, 2.0) and ev.known["x"] == value == ev.divergence("x") and not ev.lost
    else:
        n = int(32 * share)
        difference = sum(float(ev.divergence.table["x"][i]) - ev.divergence.table["rival"][i] for i in range(n)) / n
        assert ev.lost == {"x": value} and value == pytest.approx(68 / 32 + difference)
        assert "x" not in ev.known and len(ev.log) == 1
        assert ev.best(None, 1, 9) == [(68 / 32, "rival")] and ev.trajectory(None, 1) == [(1.0, 68 / 32)]


def test_fewer_than_sixteen_rows_are_no_race():
    for n, spent in ((15, 1.0), (16, 0.5), (24, round(8 / 24, 9))):
        ev = started(rival=[0.0] * n, x=1 + noise(n))
        ev.race("x", "rival", "race")
        assert ev.spent - 1 == pytest.approx(spent) and ("x" in ev.known) == (spent == 1)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_loses_at_once_and_is_no_rival(bad):
    ev = started(rival=[1.0] * 32, x=[1.0, bad] * 16, y=[2.0] * 32)
    assert ev.race("x", "rival", "race") == ev.lost["x"] == math.inf and ev.spent == 1.25
    assert ev("x", "all the same") == math.inf and not ev.lost and ev.spent == 2
    assert ev.race("y", "x", "race") == 2.0 == ev.known["y"] and ev.spent == 3


def test_only_what_was_measured_in_full_is_a_rival():
    ev = started(rival=[1.0] * 32, half=[0.0] * 32, x=[3.0] * 32)
    ev.glance("half", 0.5)
    assert ev.race("x", "half", "race") == 3.0 and ev.spent == 2.5
    class Whole:  # knows no rows
        ids = torch.zeros(32, 1)
        def __call__(self, genome): return dict(rival=1.0, x=3.0)[genome]
    ev = Evaluator(SPACE, Whole())
    ev("rival", "first")
    assert ev.race("x", "rival", "race") == 3.0 and ev.spent == 2


def test_a_genome_that_is_known_is_not_raced():
    ev = started(rival=[1.0] * 32, x=[3.0] * 32)
    ev("x", "plain")
    assert ev.race("x", "rival", "race") == 3.0 and ev.spent == 2 and not ev.lost and ev.log[-1] == ("race", "x", 3.0, 2.0)


def test_rows_that_were_read_are_paid_once():
    ev = started(rival=[1.0] * 32, weak=[9.0] * 32, x=3 + noise(32))
    assert ev.glance("x", 12 / 32) == pytest.approx(float(ev.divergence.table["x"][:12].mean()))
    ev.race("x", "rival", "race")
    assert "x" in ev.lost and ev.spent == 1 + 12 / 32  # the first look needed nothing new
    ev("weak", "plain")
    value = ev.race("x", "weak", "race")  # against a weaker one it goes the whole way
    assert ev.spent == 3 and ev.lost == {} and ev.known["x"] == value == pytest.approx(float(ev.divergence.table["x"].mean()))


# on a model --------------------------------------------------------------------------------------------------------
def test_a_race_to_the_end_is_a_plain_evaluation(real):
    m, space, d = real
    budget, out = space.high // 2, []
    for states in (2 ** 28, 0):
        ev, plain, rng = Evaluator(space, d, states=states), Evaluator(space, d, states=0), random.Random(0)
        rival = space.random(budget, rng)
        ev(rival, "x")
        for _ in range(16): ev.race(space.random(budget, rng), rival, "x")
        for g, v in ev.known.items(): assert v == pytest.approx(plain(g, "x"), rel=1e-5)
        for g, v in ev.lost.items():
            assert plain(g, "x") > ev.known[rival] and v == pytest.approx(plain(g, "x"), rel=0.5)
        assert len(ev.known) > 1 and len(ev.lost) > 1 and ev.spent == pytest.approx(sum(len(r) for r in ev._rows.values()) / 32)
        out.append((ev.log, ev.lost, ev.spent))
    assert out[0] == out[1]  # prefixes change nothing


def test_evolution_learns_from_losers_and_does_not_come_back_to_them(real, monkeypatch):
    m, space, d = real
    ev, budget, raced, learnt = Evaluator(space, d), space.high // 2, [], []
    race, fit = Evaluator.race, Damages.fit
    monkeypatch.setattr(Evaluator, "race", lambda self, g, *a: (raced.append(g), race(self, g, *a))[1])
    monkeypatch.setattr(Damages, "fit", lambda self, known: (learnt.append(dict(known)), fit(self, known))[1])
    scores = {(i, v): 0.1 * (len(g.levels) - j) for i, g in enumerate(space.genes) for j, v in enumerate(g.levels)}
    evolve(ev, budget, 15, random.Random(0), scores)
    assert len(ev.lost) > 3 and len(raced) == len(set(raced)) and 14 < ev.spent <= 15 < len(raced)
    assert set(raced) == set(ev.known) | set(ev.lost) and not set(ev.known) & set(ev.lost)
    assert all(learnt[-1][g] == v for g, v in ev.lost.items() if g != raced[-1])
    assert all(v > ev.best(None, budget)[0][0] for v in ev.lost.values())


def test_no_loser_reaches_the_front(real):
    m, space, d = real
    front = compress(m, IDS, targets=[space.high // 2, space.high // 3], techniques=("bits",), bits=(4, 16), evaluations=40, progress=False)
    assert front.evaluator.lost and front.evaluator.spent <= 40
    for p in front.points: assert p.genome not in front.evaluator.lost and p.calibration == front.evaluator.known[p.genome]
