"""Swarms: the formulas literally, walls and speed limits, who listens to whom, and what peers get wrong."""
import math

import numpy as np
import pytest
import torch
from searching import MIXED, best_after, run

from gfopt.functions import rosenbrock, sphere
from gfopt.optimizer import generator
from gfopt.search.swarm import (
    CompetitiveSwarm,
    ParticleSwarm,
    constriction,
    fly,
    leaders,
    learn_from,
    limit_velocity,
    pick,
    placed,
    throw,
)
from gfopt.space import Box

BOTH = [ParticleSwarm, CompetitiveSwarm]


def rand(*shape, seed=0):
    return torch.rand(*shape, generator=generator("test", seed), dtype=torch.float64)


# the formulas -------------------------------------------------------------------------------------------------------

def wall(there, low, high):
    there = float(there)
    c = min(max(there, low), high)
    return c + (c - there) / 2


def test_fly_is_the_formula_coordinate_by_coordinate():
    (x, before, memory), leader = 10 * rand(3, 7, 4) - 5, torch.tensor([3, 3, 0, 1, 6, 6, 2])
    low, high, k = torch.full((4,), -5.0).double(), torch.full((4,), 5.0).double(), 0.3
    new = fly(x, before, memory, leader, 0.7, 2.0, 2.2, k * (high - low), low, high, generator(1), torch.empty_like(x))
    g = generator(1)
    r1, r2 = (throw(torch.empty(7, 4).double(), g) / 255 for _ in range(2))
    crossed = limited = 0
    for i in range(7):
        for j in range(4):
            v = 0.7 * (x[i, j] - before[i, j] + 2.0 * r1[i, j] * (memory[i, j] - x[i, j])
                       + 2.2 * r2[i, j] * (memory[leader[i], j] - x[i, j]))
            limited += abs(v) > 3
            there = x[i, j] + min(max(v, -3), 3)
            crossed += abs(there) > 5
            assert float(new[i, j]) == pytest.approx(wall(there, -5, 5), abs=1e-12)
    assert crossed and limited


def test_learn_from_is_the_formula_coordinate_by_coordinate():
    x, v = 10 * rand(2, 6, 3, seed=2) - 5
    low, high = torch.full((3,), -5.0).double(), torch.full((3,), 5.0).double()
    loser, winner = torch.tensor([0, 3, 5]), torch.tensor([1, 2, 4])
    new = learn_from(x, v, loser, winner, 0.5, high - low, low, high, generator(3), torch.empty(3, 3).double())
    g = generator(3)
    r1, r2, r3 = (throw(torch.empty(3, 3).double(), g) / 255 for _ in range(3))
    for i, (a, b) in enumerate(zip(loser, winner, strict=True)):
        for j in range(3):
            step = r1[i, j] * v[a, j] + r2[i, j] * (x[b, j] - x[a, j]) + 0.5 * r3[i, j] * (x[:, j].mean() - x[a, j])
            assert float(new[i, j]) == pytest.approx(wall(x[a, j] + min(max(step, -10), 10), -5, 5), abs=1e-12)


def test_portions_of_rows_leave_no_trace(monkeypatch):
    x, before, memory = rand(3, 9, 5, seed=4)
    low, high, leader = torch.zeros(5).double(), torch.ones(5).double(), torch.arange(9)
    args = (x, before, memory, leader, 0.7, 0.0, 0.0, high, low, high)  # without dice: portions draw in another order
    whole = fly(*args, generator(1), torch.empty_like(x))
    monkeypatch.setattr("gfopt.search.swarm.row_chunks", lambda n, *_, **__: [slice(i, min(i + 2, n)) for i in range(0, n, 2)])
    assert torch.equal(fly(*args, generator(1), torch.empty_like(x)), whole)


def test_dice_have_256_equal_faces_and_no_memory():
    r = throw(torch.empty(2**17 + 3), generator(5)) / 255
    counts = torch.bincount((r * 255).round().long(), minlength=256).double()
    assert len(counts) == 256
    assert ((counts - len(r) / 256) ** 2).sum() / (len(r) / 256) < 255 + 5 * math.sqrt(510)  # chi-square, 255 degrees
    assert abs(r.mean() - 1 / 2) < 4 / math.sqrt(12 * len(r)) and abs(r.var() - 257 / 255 / 12) < 1e-3
    for lag in (1, 2, 4, 8):  # eight dice share a word
        assert abs(np.corrcoef(r[:-lag], r[lag:])[0, 1]) < 4 / math.sqrt(len(r))


def test_constriction_is_the_customary_number():
    assert constriction(4.1) == pytest.approx(0.72984, abs=1e-5)


# walls, speed, and where the box lies -------------------------------------------------------------------------------

@pytest.mark.parametrize("method", BOTH)
def test_a_moved_box_is_as_good(method):
    "A peer clamps the velocity to the position box: solved on [-5, 5], 29.1 on [5, 15]."
    for low in (-5.0, 5.0, 995.0):
        assert best_after(method(Box(low, low + 10, 10)), lambda z, low=low: sphere(z - low - 3), 6000) < 1e-6


@pytest.mark.parametrize("max_speed", [0.05, 0.5, 1.0])
def test_velocity_is_limited_relative_to_the_range(max_speed):
    box = Box([5.0, 0.0, -1000.0], [15.0, 1.0, 1000.0])
    opt, fastest = ParticleSwarm(box, max_speed=max_speed, seed=1), torch.zeros(3).double()
    for _ in range(25):
        z = opt.ask()
        opt.tell(z, (((z - box.low) / box.width - 0.7) ** 2).sum(1))
        fastest = torch.maximum(fastest, opt.state.v.abs().amax(0))
        assert (opt.state.v < 0).any() and (opt.state.v > 0).any() or opt.g == 1
    assert (fastest <= max_speed * box.width * (1 + 1e-12)).all()
    assert (fastest > 0.5 * min(max_speed, 0.5) * box.width).all()  # and the limit is of that size in every coordinate
    assert torch.equal(limit_velocity(torch.tensor([[-9.0, 0.5]]), torch.tensor([2.0, 2.0]), 0.5), torch.tensor([[-1.0, 0.5]]))


@pytest.mark.parametrize("method", BOTH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nobody_leaves_the_box_and_the_velocity_is_the_step_made(method, dtype):
    opt = method(Box([5.0, -0.1], [15.0, 0.3], dtype=dtype), seed=2)
    for _ in range(30):
        old, z = opt.state, opt.ask()
        assert ((z >= opt.space.low) & (z <= opt.space.high)).all()
        opt.tell(z, -z.sum(1))  # the optimum is a corner: everybody is thrown at the walls
        moved = (opt.state.x != old.x).any(1)
        if opt.g > 1:
            assert torch.equal(opt.state.v[moved], (opt.state.x - old.x)[moved])
    assert opt.best[1] < -15.2


# who listens to whom ------------------------------------------------------------------------------------------------

def test_news_travels_one_seat_per_step_on_a_ring():
    y, heard = torch.ones(9), torch.zeros(9, dtype=torch.bool)
    y[4], heard[4] = 0, True
    for step in range(1, 5):
        i = leaders(y, "ring")
        heard = heard[i]
        y = y[i]
        assert heard.nonzero()[:, 0].tolist() == list(range(4 - step, 5 + step))
    assert leaders(torch.tensor([1.0, 2.0, 0.0]), "global").tolist() == [2, 2, 2]


def test_a_ring_particle_is_not_moved_by_what_a_stranger_knows():
    "Two runs whose particle 5 reports something else: particles 0 to 3 of ten do the same next."
    after = {}
    for topology in ("ring", "global"):
        out = []
        for y5 in (-100.0, 1e6):
            opt = ParticleSwarm(Box(-5, 5, 3), population=10, topology=topology)
            z = opt.ask()
            y = sphere(z)
            y[5] = y5
            opt.tell(z, y)
            out.append(opt.ask())
        after[topology] = (out[0] == out[1]).all(1).tolist()
    assert after["ring"] == [i not in (4, 5, 6) for i in range(10)] and not any(after["global"])


# the competitive swarm ----------------------------------------------------------------------------------------------

def test_losers_write_their_velocity_back_and_winners_keep_theirs():
    "A peer computes the losers' velocity and forgets it: every duel then starts from rest."
    opt, kept = CompetitiveSwarm(Box(-5, 5, 4), population=20, seed=3), 0
    z = opt.ask()
    opt.tell(z, sphere(z))
    for _ in range(6):
        old, who = opt.state, opt._block(0)["who"]
        z = opt.ask()
        opt.tell(z, sphere(z))
        stays = torch.ones(20, dtype=torch.bool).index_fill_(0, who, False)
        assert len(who) == 10 and torch.equal(opt.state.v[who], z - old.x[who]) and (opt.state.v[who] != 0).any(1).all()
        assert torch.equal(opt.state.x[stays], old.x[stays]) and torch.equal(opt.state.y[stays], old.y[stays])
        assert torch.equal(opt.state.v[stays], old.v[stays])
        kept += int((old.v[stays] != 0).any(1).sum())
    assert kept > 10  # winners with a velocity of their own did occur


def test_old_velocity_carries_a_loser_on():
    x, loser, winner = torch.zeros(2, 3).double(), torch.tensor([0]), torch.tensor([1])
    low, high, v = torch.full((3,), -9.0).double(), torch.full((3,), 9.0).double(), torch.ones(2, 3).double()
    there = learn_from(x, v, loser, winner, 0.1, high - low, low, high, generator(0), torch.empty(1, 3).double())
    assert (there > 0).all() and (there <= 1).all()  # no pull at all: inertia only


def test_the_better_of_a_pair_never_moves():
    opt = CompetitiveSwarm(Box(-5, 5, 3), population=11, seed=4)
    z = opt.ask()
    opt.tell(z, sphere(z))
    for _ in range(10):
        best = int(opt.state.y.argmin())
        who = opt._block(0)["who"]
        assert best not in who.tolist() and len(who) == 5 == len(who.unique())
        z = opt.ask()
        opt.tell(z, sphere(z))
        assert len(z) == 5


def test_the_default_population_grows_with_the_dimension():
    sizes = [CompetitiveSwarm(Box(-1, 1, d)).population for d in (1, 2, 10, 20, 40, 1000)]
    assert sizes == [22, 24, 40, 60, 100, 100]
    assert CompetitiveSwarm(Box(-1, 1, 2), population=7).population == 7
    with pytest.raises(ValueError, match="population: 1"):
        CompetitiveSwarm(Box(-1, 1, 2), population=1)


def test_in_many_dimensions_the_competitive_swarm_is_ahead():
    a, b = (best_after(m(Box(-5, 5, 300)), lambda z: sphere(z - 1), 6000) for m in (CompetitiveSwarm, ParticleSwarm))
    assert a < b / 2


# spaces and bookkeeping ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("method", BOTH)
def test_mixed_spaces_are_searched_to_the_end(method):
    "Right category and integer, and the log-uniform real nearby; positions glide, reports are canonical."
    def f(z):
        return torch.tensor([(math.log10(p["lr"]) + 2) ** 2 + (p["depth"] - 6) ** 2 + 3 * (p["act"] != "gelu")
                             + 9 * (p.get("beta", 0.9) - 0.7) ** 2 for p in MIXED.decode(z)])
    best = []
    for seed in range(3):
        opt = method(MIXED, seed=seed)
        run(opt, f, 500)
        assert not torch.equal(opt.state.x, MIXED.canonical(opt.state.x))
        best.append(MIXED.decode(opt.best[0])[0])
    assert sum(p["act"] == "gelu" and p["depth"] == 6 and abs(math.log10(p["lr"]) + 2) < 0.5 for p in best) >= 2


@pytest.mark.parametrize("method", BOTH)
def test_an_unbounded_box_has_no_walls(method):
    opt = method(Box(-math.inf, math.inf, x0=[0.0, 0.0], sigma0=1.0))
    assert best_after(opt, lambda z: sphere(z - 8), 2000) < 1e-6


def test_who_did_not_report_stays_and_failures_are_never_remembered():
    opt = ParticleSwarm(Box(-5, 5, 2), population=6, seed=2)
    z = opt.ask()
    y = sphere(z)
    y[2] = math.nan
    opt.tell(z, y)
    assert opt.state.y[2] == math.inf and opt.state.y[[0, 1, 3, 4, 5]].isfinite().all()
    assert y.argmin() != 0  # the leader rests on its memory: its two places would be one
    old, z = opt.state, opt.ask(7)  # one more than a generation: member 0 twice
    opt.tell(z[1:], sphere(z[1:]))
    assert opt.g == 2 and torch.equal(opt.state.x[1:], z[1:6]) and torch.equal(opt.state.x[0], z[6])
    assert (opt.state.y <= old.y).all()
    old, z = opt.state, opt.ask(12)
    late = torch.tensor([6, 7, 8, 9, 10, 5])  # of members 0 to 4 the second, of 5 the first report
    opt.tell(z[late], sphere(z[late]))
    assert torch.equal(opt.state.before, old.x)


def test_rows_are_replaced_without_touching_the_old():
    old, new = torch.zeros(3, 2), torch.ones(1, 2)
    assert placed(old, torch.tensor([1]), new).tolist() == [[0, 0], [1, 1], [0, 0]] and (old == 0).all()
    assert placed(old, torch.arange(3), old) is old
    a, b = torch.ones(2, 2), torch.zeros(2, 2)
    assert pick(torch.tensor([True, True]), a, b) is a and pick(torch.tensor([False, False]), a, b) is b
    assert pick(torch.tensor([False, True]), a, b).tolist() == [[0, 0], [1, 1]]


@pytest.mark.parametrize("method", BOTH)
def test_told_tensors_and_states_are_never_written_to(method):
    opt = method(Box(-5, 5, 3), population=8)
    for _ in range(5):
        state, z = opt.state, opt.ask()
        x = opt._block(0)["x"]
        before = [t.clone() for t in (state.x, state.y, x)]
        opt.tell(z, rosenbrock(z))
        opt.ask()
        assert all(torch.equal(a, b) for a, b in zip(before, (state.x, state.y, x), strict=True))
        opt.tell(opt.pending_z, rosenbrock(opt.pending_z))
