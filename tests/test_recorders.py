"What records the comparisons: tasks with known answers, toy runs of every row, runs that were stopped and go on."

import json
import math
import random

import numpy as np
import pytest
import torch

from gfopt.experiments import (
    bayes_methods,
    bayes_peers,
    byte_budget,
    compress_bench,
    finetune_bench,
    provenance,
    storage,
)
from gfopt.experiments.provenance import add_rows


# ---- where and with what
def test_provenance_without_git_or_a_processors_name(monkeypatch):
    assert provenance.provenance("cpu", 3)["seed"] == 3
    class Elsewhere(type(provenance.Path())):
        def read_text(self, *a): return "flags: none\n"
    monkeypatch.setattr(provenance, "Path", Elsewhere)
    monkeypatch.setenv("PATH", "")
    told = provenance.provenance("cpu", 0)
    assert told["commit"] is None and told["device"] and told["kind"] == "cpu"


def test_rows_keep_where_and_when_they_were_made(tmp_path, monkeypatch):
    out, clock, said = tmp_path / "rows.json", [0.0], []
    def work(n):
        clock[0] += 100
        return n
    plan = {k: (work, (k,)) for k in "abc"}
    where = dict(device="slow", commit="1", date="2026-01-01")
    monkeypatch.setattr(provenance, "provenance", lambda device, seed: dict(where, seed=seed, kind=device))
    monkeypatch.setattr(provenance.time, "perf_counter", lambda: clock[0])
    make = lambda settings=1, **more: add_rows(out, "toy", dict(n=settings), plan, say=said.append, **more)

    assert make(seconds=0) == dict(provenance=dict(where, seed=0, kind="cpu"), preset="toy", settings=dict(n=1), rows={}, complete=False) and not out.exists()
    first = make(seconds=100)  # at 100 s nothing more is begun
    assert first == json.loads(out.read_text()) and list(first["rows"]) == ["a"] and not first["complete"] and "goes on with b" in said[-1]
    old = json.loads(out.read_text())
    old["rows"]["a"] = {k: old["rows"]["a"][k] for k in ("result", "cpu_seconds")}  # as files were before
    out.write_text(json.dumps(old))
    where = dict(device="fast", commit="2", date="2026-02-02")
    assert make(only=("a",)) == old  # nothing to do, nothing written
    both = make(seconds=101)
    assert {k: (r["device"], r["commit"], r["date"]) for k, r in both["rows"].items()} == {
        "a": ("slow", "1", "2026-01-01"), "b": ("fast", "2", "2026-02-02"), "c": ("fast", "2", "2026-02-02")}
    assert both["complete"] and both["provenance"]["device"] == "fast" and both == json.loads(out.read_text())
    before = out.read_bytes()
    assert make() == both and out.read_bytes() == before
    assert make(2, seconds=0)["rows"] == {} and out.read_bytes() == before  # of other settings, but nothing to put in its place
    assert set(make(2, only=("c",))["rows"]) == {"c"} and json.loads(out.read_text())["settings"] == dict(n=2)


def test_the_byte_budgets_gpu_preset_stops_in_time(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(byte_budget, "add_rows", lambda *a, **k: seen.append(k))
    for preset in byte_budget.PRESETS: byte_budget.main(["--preset", preset, "--out", str(tmp_path / "a.json")])
    assert seen == [dict(device=p["device"], seconds=400 if n == "gpu" else None) for n, p in byte_budget.PRESETS.items()]
    recorded = json.loads((provenance.RESULTS / "byte_budget_cpu.json").read_text())
    assert recorded["settings"] == json.loads(json.dumps(byte_budget.PRESETS["cpu"]))  # else its rows would be made again


# ---- tuning tasks beside the peers
@pytest.mark.parametrize("f, at, value", [
    (bayes_peers.levy, [1.0] * 20, 0.0), (bayes_methods.levy, [1.0] * 20, 0.0), (bayes_peers.griewank, [0.0] * 5, 0.0),
    (bayes_peers.michalewicz, [2.202906, 1.570796, 1.284992, 1.923058, 1.720470], bayes_peers.LANDSCAPES["Michalewicz d=5"][5]),
    (bayes_peers.styblinski_tang, [-2.903534] * 5, bayes_peers.LANDSCAPES["Styblinski-Tang d=5"][5])])
def test_landscapes_have_the_minimum_that_is_said(f, at, value):
    x = torch.tensor(at, dtype=torch.float64)
    assert float(f(x)) == pytest.approx(value, abs=1e-5)
    near = x + 0.05 * torch.randn(50, len(x), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert (f(near) > value).all()


@pytest.mark.parametrize("name", bayes_peers.TASKS)
def test_every_task_has_a_default_and_nothing_below_its_minimum(name):
    task, other = bayes_peers.TASKS[name](0), bayes_peers.TASKS[name](1)
    losses = [task.f(p) for p in [task.default, *task.space.sample(3 if name == "digits network" else 20, seed=0)]]
    assert all(math.isfinite(v) and v >= task.minimum - 1e-9 for v in losses) and len(set(losses)) > 1
    assert task.f(task.default) == losses[0] == bayes_peers.TASKS[name](0).f(task.default)
    assert name == "language model table" or other.f(task.default) != losses[0]  # another seed moves it


def test_the_valleys_bottoms_are_zero():
    "Known parameters, read off the generator that made them."
    g = np.random.default_rng(8003)
    best, lr, width, depth = int(g.integers(3)), g.uniform(-4, -2), g.uniform(5, 8), int(g.integers(2, 7))
    g.permutation(3)
    p = dict(lr=10**lr, width=round(2**width), depth=depth, act=["relu", "gelu", "tanh"][best], norm=True, dropout=g.uniform(0.1, 0.4))
    assert bayes_peers.mixed_valley(3).f(p) == pytest.approx(0, abs=1e-12)
    g = np.random.default_rng(9003)
    best, lr = int(g.integers(3)), g.uniform(-4, -2)
    momentum, beta, eps, wd = g.uniform(0.5, 0.95), g.uniform(-3, -1), g.uniform(-9, -5), g.uniform(-4, -1.5)
    p = dict(lr=10 ** (lr + (0.8, 0.0, -0.5)[best]), wd=10**wd, opt=["sgd", "adam", "lion"][best], momentum=momentum, beta=10**beta, eps=10**eps)
    assert bayes_peers.conditional_valley(3).f(p) == pytest.approx(0, abs=1e-12)


def test_a_network_that_leaves_the_numbers_counts_as_nine():
    assert bayes_peers.digits_network(0).f(dict(lr=1e150, alpha=1.0, width=4, batch=8, act="relu", momentum=0.99)) == 9.0


@pytest.mark.parametrize("method", bayes_peers.SOLVERS)
def test_everybody_tries_the_default_first_and_spends_the_budget(method, monkeypatch):
    asked, known = [], bayes_peers.TASKS["conditional valley"](0)
    watched = bayes_peers.Task(known.space, known.default, lambda p: asked.append(p) or known.f(p), known.minimum)
    monkeypatch.setitem(bayes_peers.TASKS, "watched", lambda seed: watched)
    row = bayes_peers.run_one("watched", method, 0, budget=12)
    assert len(asked) == 12 and {k: asked[0][k] for k in known.default} == known.default
    assert row["regret"] == [pytest.approx(min(known.f(p) for p in asked[:10]), rel=1e-4)] and row["ms"] >= 0


def test_a_stopped_comparison_goes_on_behind_what_it_has(tmp_path, monkeypatch):
    out, run = tmp_path / "rows.json", bayes_peers.run_one
    monkeypatch.setattr(bayes_peers, "run_one", lambda *a: run(*a, budget=10))

    def stop(line):
        if "mixed" in line: raise KeyboardInterrupt
    kw = dict(seeds=1, tasks=("conditional valley", "mixed valley"), methods=("random",))
    with pytest.raises(KeyboardInterrupt): bayes_peers.run_bayes(out, say=stop, **kw)
    told = json.loads(out.read_text())["rows"]  # what was measured when it was stopped is there
    said = []
    again = bayes_peers.run_bayes(out, say=said.append, **kw | dict(methods=("random", "bo")))
    assert len(told) == 2 and len(said) == 2 and told.items() <= again["rows"].items() and len(again["rows"]) == 4
    assert {"optuna", "scikit-optimize"} <= again["peers"].keys()


def test_paired_differences_take_the_better_peer_of_each_task():
    rows = {f"{t} | {m} | {s}": dict(regret=[9.0, 10.0 ** (e + s)]) for t in bayes_peers.TASKS for s in range(3)
            for m, e in (("ours", -2), ("p", 0), ("q", -1 if t == "Branin" else 1))}
    told = bayes_peers.paired(rows, "ours", ("p", "q"))
    n = len(bayes_peers.TASKS)
    assert told["Branin"] == pytest.approx(-1) and told["mixed valley"] == pytest.approx(-2) and told["seeds"] == 3
    assert told["all"] == pytest.approx([(-2 * n + 1) / n] * 3)
    one = {k: v for k, v in rows.items() if k.endswith("| 0")}
    assert bayes_peers.paired(one, "ours", ("p",))["all"][1:] == (-math.inf, math.inf)


def test_the_peers_command_line(tmp_path, monkeypatch, capsys):
    out, seen = tmp_path / "rows.json", []
    bayes_peers.main(["--out", str(out), "--fuzz", "40"])
    assert json.loads(out.read_text())["fuzz"]["questions"] >= 40 and "none of them bad" in capsys.readouterr().out
    out.write_text(json.dumps(dict(rows={"t | bo | 0": 1, "t | random | 0": 2})))
    monkeypatch.setattr(bayes_peers, "run_bayes", lambda *a: seen.append(a))
    monkeypatch.setattr(bayes_peers, "ask_costs", lambda: "measured")
    bayes_peers.main(["--out", str(out), "--again", "bo", "--asks", "--seeds", "3"])
    assert seen == [(out, 3)] and json.loads(out.read_text()) == dict(rows={"t | random | 0": 2}, asks="measured")


def test_both_askers_answer_their_questions(monkeypatch):
    asked = []

    def once(steps, rounds, least):
        for step in steps.values(): step()
        asked.append(list(steps))
        return {k: dict(ms=[1.0, 2.0 if k == "bo" else 4.0, 5.0]) for k in steps}
    points = bayes_peers._points
    monkeypatch.setattr(bayes_peers, "_points", lambda n: points(min(n, 12)))
    monkeypatch.setattr(bayes_peers, "interleaved", once)
    told = bayes_peers.ask_costs(1)
    assert asked == [["bo", "Optuna GP"]] * 3 and told["8 at n=30"]["ratio"] == 0.5


# ---- Parzen estimators and twenty dimensions
@pytest.mark.filterwarnings("ignore:Argument ``:optuna.exceptions.ExperimentalWarning")
def test_both_sides_are_told_the_same_first_points():
    for task in bayes_methods.TASKS:
        space, loss = bayes_methods.TASKS[task](1)
        first = [loss(p) for p in space.sample(bayes_methods.START, seed=1001)]
        ours, ms = bayes_methods.run_gfopt("random", task, 1, 12)
        theirs, _ = bayes_methods.run_optuna(task, 1, 12)
        assert ours[:10] == pytest.approx(first) == theirs[:10] and len(ours) == len(theirs) == 12 and ms >= 0
        assert min(ours + theirs) > -1e-9


def test_large_tasks_are_zero_where_they_were_moved_to():
    for name, part in zip(bayes_methods.LARGE, (1, 1, 0.5)):
        s = torch.from_numpy(np.random.default_rng(2).uniform(-2, 2, 20))
        f = bayes_methods.large_task(name, 2)
        assert float(f(part * s)) == pytest.approx(0, abs=1e-6) and float(f(part * s + 0.1)) > 0.01


def test_a_table_of_bayesian_methods(tmp_path):
    out = tmp_path / "methods.json"
    bayes_methods.main(["--out", str(out), "--small", "2", "20", "--large", "2", "20", "--rivals", "random"])
    rows = json.loads(out.read_text())["rows"]
    assert set(rows) == {"small tpe", "small Optuna TPE", "small random", "large random"}
    assert {len(b) for r in rows.values() for t in r["best"].values() for b in t} == {2}
    assert all(b[1] <= b[0] for r in rows.values() for t in r["best"].values() for b in t)
    space, loss = bayes_methods.TASKS["mixed"](1)
    assert rows["small random"]["best"]["mixed"][1][0] == pytest.approx(min(loss(p) for p in space.sample(10, seed=1001)))
    assert set(rows["large random"]["best"]) == set(bayes_methods.LARGE)


def test_pairs_of_methods():
    rows = {k: dict(best=dict(a=[[1.0, x], [1.0, 10 * x]], b=[[1.0, 1.0], [1.0, 1.0]])) for k, x in (("u", 0.01), ("v", 0.1))}
    told = bayes_methods.paired(dict(rows=rows), "u", "v", 20)
    assert told["a"] == pytest.approx((-1, 0)) and told["b"] == (0, 0)
    assert told["all"] == pytest.approx((-0.5, 1.96 * np.std([-1, -1, 0, 0], ddof=1) / 2))


# ---- writing trials down
def test_a_round_is_one_trial_of_each(tmp_path):
    for name, make in storage.CONTENDERS.items():
        (folder := tmp_path / name).mkdir()
        one = make(folder)
        before = sum(p.stat().st_size for p in folder.iterdir())
        one(), one()
        getattr(one, "close", bool)()
        assert sum(p.stat().st_size for p in folder.iterdir()) > before, name
    assert sum(b'"tell"' in line for line in (tmp_path / "gfopt" / "gfopt.jsonl").read_bytes().splitlines()) == 2
    ms = storage.run_rounds(3, only=("gfopt", "floor"))
    assert list(ms) == ["gfopt", "floor"] and all(len(v) == 3 and min(v) > 0 for v in ms.values())


def test_storage_is_judged_by_its_median(tmp_path):
    told = storage.storage_row(dict(rows=dict(storage=dict(gfopt=[1, 2, 99], optuna=[10, 8, 11], floor=[1, 1, 1]))))
    assert told == dict(gfopt=2, optuna=10, floor=1, ratio=0.2, limit=storage.LIMIT, reached=True)
    out = tmp_path / "storage.json"
    storage.run_storage(out, rounds=2)
    row = json.loads(out.read_text())
    assert {k: len(v) for k, v in row["rows"]["storage"].items()} == dict(gfopt=2, optuna=2, floor=2)


# ---- fine-tuning written down
def test_replay_and_loop_of_a_toy():
    s = finetune_bench.SMALL
    told = finetune_bench.measure_replay(s)
    assert told["equal"] and len(told["train"]) == len(told["replay"]) == s["steps"] // s["block"] and told["bytes"] > told["longest"] > 0
    loop = finetune_bench.measure_loop(s)
    assert len(loop["loop"]) == len(loop["bare"]) == s["loop"] - 1


def test_a_killed_toy_ends_where_the_other_one_does():
    told = finetune_bench.measure_kills(finetune_bench.SMALL, seed=1)
    assert told["equal"] == told["kills"] == 2 and all(0 <= n <= told["steps"] for n in told["found"])


def test_two_processes_end_with_the_weights_of_one():
    told = finetune_bench.measure_workers(finetune_bench.SMALL, processes=2)
    assert told["equal"] and told["one"] == told["many"] and 4 <= told["bytes_per_member"] <= 16


def test_the_finetune_command_line_chooses_the_settings(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(finetune_bench, "record", lambda *a, **k: seen.append(a))
    finetune_bench.main(["--out", str(tmp_path / "a.json"), "--small"])
    finetune_bench.main(["--out", str(tmp_path / "a.json")])
    assert [a[1] for a in seen] == [finetune_bench.SMALL, finetune_bench.CPU]
    for name, args, _ in seen[0][2].values(): assert callable(getattr(finetune_bench, name.partition(":")[2])) and args == [finetune_bench.SMALL]


# ---- compression
@pytest.fixture(scope="module")
def toy():
    compress_bench.setting.cache_clear()
    yield compress_bench.setting("smoke")
    compress_bench.setting.cache_clear()


def test_rows_of_the_tree_are_those_of_each_model(toy):
    space, budget = compress_bench.exact_space("smoke", "drop")
    look = compress_bench.Lookup(space, compress_bench.Divergence(toy.model, toy.calibration(0)))
    rng = random.Random(0)
    genomes = list(dict.fromkeys(tuple(rng.choice(g.levels) for g in space.genes) for _ in range(8)))
    tree = compress_bench.tree_rows(space, look._use, look._divergence, genomes)
    for g in genomes:
        assert tree[g] == pytest.approx(look.rows(g), rel=1e-5, abs=1e-6)
        assert look(g) == pytest.approx(look._divergence(look._use(g)), rel=1e-5, abs=1e-7)
        assert float(look.by_row(g, 0, 1).sum() + look.by_row(g, 1, len(look.ids)).sum()) == pytest.approx(look(g) * look.ids.numel())
    assert space.low <= budget < space.high


def test_a_hunt_ends_at_the_optimum_and_only_within_the_budget(toy):
    space, budget = compress_bench.exact_space("smoke", "bits")
    look = compress_bench.Lookup(space, compress_bench.Divergence(toy.model, toy.calibration(0)))
    best, small = space.uniform(space.high), space.uniform(space.low)
    hunt = compress_bench.Hunt(space, look, budget, look(best))
    hunt(best, "x")  # reaches the loss with more bytes than allowed
    with pytest.raises(compress_bench.Found): compress_bench.Hunt(space, look, space.low, look(small))(small, "x")


def test_every_row_of_a_toy_and_a_run_that_goes_on(toy, tmp_path):
    out = tmp_path / "rows.json"
    record = lambda out, **more: add_rows(out, "smoke", compress_bench.PRESETS["smoke"], compress_bench.jobs("smoke"), **more)

    def stop(line):
        if line.startswith("exact/drop"): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): record(out, say=stop)
    first, said = json.loads(out.read_text()), []
    assert list(first["rows"]) == ["cost", "exact/drop/0"] and not first["complete"]
    told = record(out, say=said.append)
    rows = {k: v["result"] for k, v in told["rows"].items()}
    assert told["complete"] and set(rows) == set(compress_bench.jobs("smoke")) and len(said) == len(rows) - 2
    assert told["rows"]["cost"] == first["rows"]["cost"]

    for which in ("drop", "bits"):
        r = rows[f"exact/{which}/0"]
        assert r["optimum"] <= r["median"] and all(v["kl"] >= r["optimum"] - 1e-12 and v["rank"] >= 1 for v in r["single"].values())
        assert all(n is None or n <= 60 for n in r["found"].values()) and set(r["found"]) == {"evolution", "evopress", "random"}
    for which in ("bits", "drop", "joint"):
        r = rows[f"{which}/0"]
        ours = r.pop("evolution")
        assert ours["calibration"] <= min(v["calibration"] for k, v in r.items() if k in ("uniform", "additive")) + 1e-9  # it starts from them
    assert all(0 < b <= 1 and v >= -1e-9 for points in rows["fronts/0"].values() for b, v in points)
    assert rows["speed"]["int4"]["file_bytes"] < rows["speed"]["int8"]["file_bytes"] < rows["speed"]["float32"]["file_bytes"]
    assert set(rows["healing"]) == {"dense", "compressed", "refitted", "healed", "steps", "bytes"}

    other = json.loads(out.read_text()) | dict(settings="others")
    out.write_text(json.dumps(other))  # rows of other settings are not mixed with these
    assert list(record(out, say=said.append, only=("cost",))["rows"]) == ["cost"]


def test_the_compression_command_line(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(compress_bench, "add_rows", lambda *a: seen.append(a))
    compress_bench.main(["--out", str(tmp_path / "a.json"), "--preset", "smoke"])
    assert [s[:3] for s in seen] == [(tmp_path / "a.json", "smoke", compress_bench.PRESETS["smoke"])] and set(seen[0][3]) == set(compress_bench.jobs("smoke"))


def test_pairs_and_volumes_by_hand():
    kl = lambda **v: dict(result={k: dict(test=x, calibration=2 * x) for k, x in v.items()})
    rows = {"bits/0": kl(evolution=1.0, greedy=2.0, random=4.0), "bits/1": kl(evolution=2.0, greedy=2.0, random=1.0, extra=9.0)}
    told = compress_bench.paired(rows, "bits", [0, 1, 2])
    half = 12.7062 * math.log(2) * 2**0.5 / 2**0.5  # Student's at one degree of freedom, of the logarithms of 1/2 and 2
    assert told.pop("interval") == pytest.approx([math.exp(-half), math.exp(half)], rel=1e-3)
    assert told == pytest.approx(dict(seeds=2, best=1.0, low=0.5, high=2.0, greedy=0.5**0.5, random=0.5**0.5))
    assert compress_bench.paired(rows, "bits", [0])["interval"] == [0.0, math.inf]  # one seed says nothing about others
    assert compress_bench.paired(rows, "drop", [0]) is None
    volumes = compress_bench.volumes(dict(joint=[(0.1, 0.1)], a=[(0.1, 0.5)], b=[(0.5, 0.1), (0.01, 3.0)], none=[]))
    e = math.log
    assert volumes["joint"] == pytest.approx(e(10) ** 2) and volumes["a"] == pytest.approx(e(10) * e(2)) and volumes["none"] == 0
    assert volumes["union"] == pytest.approx(2 * e(10) * e(2) - e(2) ** 2)
