"The measuring instrument of nbs/6_experiments 06 to 09: it is tested without any peer."

import json
import math
import os
import time

import numpy as np
import pytest
import torch

from gfopt.experiments import coco, peers, quality, speed


class Clock:
    "A clock that only moves when it is told to."

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def spend(self, ms):
        self.now += ms / 1e3


# ---- peers


def test_interleaved_reads_known_times_in_turns():
    clock, order = Clock(), []

    def contender(name, ms):
        return lambda: (order.append(name), clock.spend(ms))

    told = peers.interleaved(
        dict(a=contender("a", 2), b=contender("b", 7)), rounds=3, least=0.01, clock=clock
    )
    assert told["a"]["ms"] == pytest.approx([2, 2, 2]) and told["a"]["calls"] == 5
    assert told["b"]["ms"] == pytest.approx([7, 7, 7]) and told["b"]["calls"] == 2
    assert "".join(order) == "aaabbb" + 3 * ("aaaaa" + "bb")


def test_interleaved_averages_lazy_work_and_reports_quartiles():
    clock, n = Clock(), 0

    def lazy():  # 1 ms, and 9 ms more every tenth time
        nonlocal n
        n += 1
        clock.spend(1 + 9 * (n % 10 == 0))

    told = peers.interleaved(dict(lazy=lazy), rounds=4, least=0.1, clock=clock)
    assert told["lazy"]["calls"] == 100
    assert told["lazy"]["ms"] == pytest.approx([1.9, 1.9, 1.9])
    slower = iter([1, 1, 1, 1, 2, 3, 4, 5])
    told = peers.interleaved(dict(s=lambda: clock.spend(next(slower))), rounds=5, least=0, clock=clock)
    assert told["s"]["ms"] == pytest.approx([2, 3, 4])


def test_warming_is_not_measured():
    clock, first = Clock(), True

    def compiles():
        nonlocal first
        clock.spend(5000 if first else 1)
        first = False

    told = peers.interleaved(dict(c=compiles), rounds=3, least=0.01, clock=clock)
    assert told["c"]["ms"] == pytest.approx([1, 1, 1]) and told["c"]["calls"] == 10


def test_a_contender_that_fails_is_reported_and_the_others_run():
    def broken():
        raise TypeError("no\nsecond line")

    told = peers.interleaved(dict(bad=broken, good=lambda: None), rounds=2, least=0)
    assert told["bad"] == {"error": "TypeError: no"} and len(told["good"]["ms"]) == 3


def test_process_time_is_what_is_measured():
    told = peers.interleaved(dict(sleeps=lambda: time.sleep(0.02)), rounds=2, least=0)
    assert told["sleeps"]["ms"][1] < 10


def test_peer_names_the_extra(monkeypatch):
    with pytest.raises(ImportError, match=r"EvoNothing.*gfopt\[bench\]"):
        peers.peer("EvoNothing")
    monkeypatch.setitem(peers.PEERS, "no_such_coco", "coco-experiment")
    with pytest.raises(ImportError, match=r"coco-experiment is only needed"):
        peers.peer("no_such_coco.core")


def test_peers_are_not_imported_with_the_modules():
    told = peers.in_process("test_peers:_loaded", env=dict(PYTHONPATH=_path()))
    assert told == []


def _loaded():
    import sys

    return [m for m in (*peers.PEERS, "skopt", "sklearn") if m in sys.modules]


def _path():
    here = os.path.dirname(__file__)
    return os.pathsep.join([here, os.path.dirname(here), os.environ.get("PYTHONPATH", "")])


def _environment():
    print("line 1")
    print("line 2")
    return dict(
        threads=torch.get_num_threads(), omp=os.environ["OMP_NUM_THREADS"],
        xla=os.environ["XLA_FLAGS"], mine=os.environ.get("MINE"), folder=os.listdir("."),
    )


def test_in_process_has_one_thread_its_own_folder_and_relays_lines():
    lines = []
    told = peers.in_process(
        "test_peers:_environment", env=dict(PYTHONPATH=_path(), MINE="x"), say=lines.append
    )
    assert lines == ["line 1", "line 2"]
    assert (told["threads"], told["omp"], told["mine"]) == (1, "1", "x")
    assert "intra_op_parallelism_threads=1" in told["xla"]
    assert set(told["folder"]) <= {"err"}


@pytest.mark.parametrize(
    "target, args, says",
    [
        ("operator:truediv", [1, 0], "ZeroDivisionError"),
        ("os:_exit", [3], "ended with 3"),
        ("os:abort", [], "ended with -6"),
        ("no_such_module:f", [], "ModuleNotFoundError"),
    ],
)
def test_in_process_survives(target, args, says):
    assert says in peers.in_process(target, *args)["error"]


@pytest.fixture
def calls(monkeypatch):
    "in_process without processes: a table of functions; the names it was asked for."
    asked = []

    def here(target, *args, env=None, say=print):
        asked.append(args[0])
        if args[0] == "stop":
            raise KeyboardInterrupt
        return dict(error="boom") if args[0] == "bad" else dict(value=args[0], env=env)

    monkeypatch.setattr(peers, "in_process", here)
    return asked


def jobs(*names):
    return {n: ("x:y", (n,), dict(E=n)) for n in names}


def test_record_continues_where_it_was_stopped(calls, tmp_path):
    out, quiet = tmp_path / "r.json", lambda line: None
    with pytest.raises(KeyboardInterrupt):
        peers.record(out, dict(n=1), jobs("a", "b", "stop", "c"), say=quiet)
    assert not out.exists() and (tmp_path / "r.json.part").exists()
    done = len(calls)
    result = peers.record(out, dict(n=1), jobs("d", "a", "c", "b"), say=quiet)
    assert not {"a", "b"} & set(calls[done:]) and "d" in calls[done:]
    assert list(result["rows"]) == ["d", "a", "c", "b"]
    assert json.loads(out.read_text()) == result
    assert [f.name for f in tmp_path.iterdir()] == ["r.json"]
    assert result["rows"]["d"] == dict(value="d", env=dict(E="d"))
    assert result["provenance"]["threads"] == 1 and result["settings"] == dict(n=1)


def test_record_begins_anew_for_other_settings_and_repeats_errors(calls, tmp_path):
    out, lines = tmp_path / "r.json", []
    with pytest.raises(KeyboardInterrupt):
        peers.record(out, dict(n=1), jobs("a", "bad", "stop"), say=lines.append)
    with pytest.raises(KeyboardInterrupt):
        peers.record(out, dict(n=1), jobs("a", "bad", "stop"), say=lines.append)
    assert calls == ["a", "bad", "stop", "bad", "stop"]
    peers.record(out, dict(n=2), jobs("a", "bad"), say=lines.append)
    assert calls[5:] == ["a", "bad"]
    assert any("begins anew" in line for line in lines)
    assert any("bad: 0 s boom" in line for line in lines)


def test_record_writes_lists_of_numbers_on_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(peers, "in_process", lambda *a, **k: dict(v=[1.5, 2, None], w=[[1, 2], [3]], s=["a", "b c"]))
    result = peers.record(tmp_path / "r.json", {}, jobs("a"), say=lambda line: None)
    text = (tmp_path / "r.json").read_text()
    assert json.loads(text) == result and '"v": [1.5, 2, null]' in text and '["a", "b c"]' in text


def test_clocked_counts_and_restores():
    original = np.linalg.eigh
    with pytest.raises(RuntimeError), peers.clocked("numpy.linalg:eigh") as inside:
        np.linalg.eigh(np.eye(30))
        np.linalg.eigh(np.eye(30))
        raise RuntimeError
    assert inside["calls"] == 2 and inside["seconds"] > 0 and np.linalg.eigh is original


def test_the_command_runs_the_parts_it_is_asked_for(monkeypatch, tmp_path):
    ran = []
    for home, name in ((speed, "run_speed"), (quality, "run_quality"), (coco, "run_coco")):
        monkeypatch.setattr(home, name, lambda out, _n=name, **k: ran.append((_n, out.name, k)))
    peers.main(["quality", "--out", str(tmp_path), "--small"])
    assert ran == [("run_quality", "peers_quality_cpu.json", quality.SMALL)]
    peers.main(["--out", str(tmp_path)])
    assert [r[0] for r in ran[1:]] == ["run_speed", "run_quality", "run_coco"] and not ran[1][2]


# ---- speed


@pytest.mark.parametrize("method", ["cmaes", "es", "snes", "pso", "ga"])
def test_our_steps_are_whole_generations(method):
    step = speed.gfopt_step(method, 12, 7, torch.float64, bounded=method == "pso",
                            **(dict(restarts=None) if method == "cmaes" else {}))
    opt = next(c.cell_contents for c in step.__closure__ if hasattr(c.cell_contents, "tell"))
    for g in range(1, 4):
        step()
        assert opt.g == g and not len(opt.pending_z)


def test_every_row_of_figures_is_measured():
    rows = {"cma 200", "cma 40", "batched", "import", *speed.FLOOR}
    assert {row for _, row, _, _ in speed.FIGURES} <= rows
    for row in ("cma", *speed.FLOOR):
        assert "gfopt" in speed._contenders(row, 8, 5)


def test_run_row_measures_ours_and_the_floor():
    before = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    try:
        told = speed.run_row("snes", 8, 50, ["gfopt"], 2, 0.0)
    finally:
        if before:
            os.sched_setaffinity(0, before)
    assert told["contenders"]["gfopt"]["ms"][1] > 0 and list(told["contenders"]) == ["gfopt"]
    parts = told["floor"]["parts"]
    assert told["floor"]["ms"] == pytest.approx(parts["normal"] + parts["write"] + 2 * parts["read"])


def test_a_peer_that_is_missing_is_in_the_row(monkeypatch):
    monkeypatch.setattr(speed, "peer", lambda m: (_ for _ in ()).throw(ImportError(f"no {m}")))
    before = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    try:
        told = speed.run_row("cma", 8, 5, ["gfopt", "pycma"], 1, 0.0)
    finally:
        if before:
            os.sched_setaffinity(0, before)
    assert told["contenders"]["pycma"] == {"error": "ImportError: no cma"}
    assert set(told["eigen"]) == {"gfopt"} and 0 <= told["eigen"]["gfopt"]["share"] < 1


def bars(**ms):
    return dict(contenders={k: dict(ms=[v - 1, v, v + 1]) for k, v in ms.items()})


def test_speed_rows_compare_with_the_right_peer():
    rows = {
        "cma 200": bars(gfopt=4, pycma=10, EvoTorch=20, evosax=1), "cma 40": bars(gfopt=1, pycma=1),
        "batched": bars(batched=3, sequential=10), "ga": bars(gfopt=2, evosax=9),
        "sbx": dict(contenders=dict(gfopt=dict(ms=[1, 1, 1]), EvoTorch=dict(error="x"))),
        "es": bars(gfopt=5, evosax=9, EvoX=20), "snes": bars(gfopt=1, EvoTorch=4),
        "pso": {"contenders": {**bars(gfopt=9, EvoX=40, pyswarms=2)["contenders"], "EvoX compiled": dict(ms=[30, 30, 30])}},
        "import": dict(extra=0.2),
    }
    for r in rows.values():
        r.update(population=7, dim=9)
    told = {(r["what"].split(",")[0], r["whom"]): r for r in speed.speed_rows(dict(rows=rows))}
    assert told["CMA-ES", "pycma"]["ratio"] == 1 and told["CMA-ES", "pycma"]["reached"]  # the later row
    assert not told["CMA-ES", "EvoTorch"]["reached"] and told["CMA-ES", "pycma"]["what"] == "CMA-ES, 7 x 9"
    assert not told["CMA-ES runs at once", "sequential"]["reached"] and told["theory's GA", "evosax"]["reached"]
    assert not told["GA", "EvoTorch"]["reached"]  # the peer crashed: nothing is claimed
    assert not told["OpenAI-ES", "evosax"]["reached"] and told["SNES", "EvoTorch"]["reached"]
    assert told["PSO", "EvoX compiled"]["ratio"] == pytest.approx(0.3)
    assert told["gfopt.minimize over import torch", "torch"]["reached"]


# ---- coco


def test_area_and_curve_of_known_running_times():
    assert coco.area([], 3) == 0 and coco.area([1] * 51, 3) == 1
    assert coco.area([3000] * 51, 3) == 0 and coco.area([30] * 51, 3) == pytest.approx(2 / 3)
    assert coco.area([30] * 17, 3) == pytest.approx(2 / 9)
    curve = coco.reached([3, 30, 30, 3000], 3)
    assert curve[0] == 1 and curve[19] == 1 and curve[20] == 3 and curve[59] == 3 and curve[60] == 4


def test_area_is_the_integral_of_the_curve():
    hits = np.sort(np.random.default_rng(1).integers(10, 9999, 51))
    assert np.trapezoid(coco.reached(hits, 10), coco.GRID) / 51 / 3 == pytest.approx(coco.area(hits, 10), abs=0.01)


def test_watch_records_first_hits_and_stops():
    values = iter([3e3, 101.0, 100.0, 50.0, 99.0, 1e-8])
    w = coco.Watch(lambda x: -5 + next(values), -5.0, 100)
    with pytest.raises(coco.Reached):
        for _ in range(9):
            w(None)
    assert w.count == 6 and len(w.hits) == 51 and w.hits[0] == 3
    assert w.hits[:3] == [3, 4, 6] and set(w.hits[2:]) == {6}
    w = coco.Watch(lambda x: 1e9, 0.0, 4)
    with pytest.raises(coco.Reached):
        for _ in range(9):
            w(None)
    assert w.count == 4 and w.hits == []


def test_a_method_that_gives_up_is_run_again_until_the_budget(monkeypatch):
    seeds = []

    def gives_up(f, d, seed, budget):
        seeds.append(seed)
        for _ in range(40):
            f(np.ones(d))

    monkeypatch.setitem(coco.METHODS, "quitter", gives_up)
    w = coco.run_problem("quitter", lambda x: 1e3, 0.0, 2, seed=4, budget=100)
    assert w.count == 100 and len(seeds) == len(set(seeds)) == 3


def test_ours_sees_one_generation_at_a_time():
    asked = []

    def f(x):
        asked.append(np.array(x))
        return float((x**2).sum())

    w = coco.run_problem("gfopt", f, 0.0, 2, seed=1)
    assert w.count == len(asked) and len(w.hits) == 51 and asked[0].shape == (2,)
    again = coco.run_problem("gfopt", lambda x: float((x**2).sum()), 0.0, 2, seed=1)
    assert again.hits == w.hits


def result_of(ours, theirs, dims=(2, 5)):
    def row(v):
        return dict(functions={"1": dict(areas=v, curve=[51 * len(v)] * 61), "7": dict(areas=v, curve=[0] * 61)})

    rows = {f"{m} d={d}": row([x + d / 100 for x in v]) for d in dims for m, v in (("gfopt", ours), ("pycma", theirs))}
    return dict(settings=dict(dims=list(dims)), rows=rows)


def test_coco_rows_and_difference():
    r = result_of([0.5, 0.6], [0.4, 0.6])
    rows = coco.coco_rows(r)
    assert [x["dim"] for x in rows] == [2, 5, "all"] and all(x["reached"] for x in rows)
    assert rows[0]["gfopt"] == pytest.approx(0.57) and rows[2]["pycma"] == pytest.approx(0.535)
    assert (coco.curve(r, "gfopt", 2) == 0.5).all()
    assert coco.areas(r, "pycma", 5, 7).tolist() == pytest.approx([0.45, 0.65])
    mean, low, high = coco.difference(r)
    assert mean == pytest.approx(0.05) and low < mean < high
    assert not any(x["reached"] for x in coco.coco_rows(result_of([0.3], [0.4])))


def test_coco_jobs_are_one_per_method_and_dimension(monkeypatch, tmp_path):
    seen = {}
    monkeypatch.setattr(coco, "record", lambda out, settings, jobs, **k: seen.update(jobs=jobs, settings=settings, **k))
    coco.run_coco(tmp_path / "c.json", dims=(2, 20), functions=(1, 3), instances=(1,))
    assert list(seen["jobs"])[0].endswith("d=20") and len(seen["jobs"]) == 2 * len(coco.METHODS)
    assert seen["workers"] == 2
    json.dumps(seen["jobs"])


# ---- quality


@pytest.mark.parametrize("cell", ["sphere d=10", "rotated rosenbrock d=20", "rotated rastrigin d=10"])
def test_landscapes_are_moved_and_turned(cell):
    f, g, d = quality.landscape(cell, 0), quality.landscape(cell, 1), quality.CELLS[cell][1]
    assert f(f.minimum[None]).abs() < 1e-18 and not torch.allclose(f.minimum, g.minimum)
    assert f.minimum.abs().max() <= 3 and f.minimum.abs().max() > 1
    e = torch.eye(d, dtype=torch.float64)
    parts = f(f.minimum + e) + f(f.minimum)
    pair = f(f.minimum + e[0] + e[-1])
    separable = torch.isclose(pair, parts[0] + parts[-1])
    assert bool(separable) == (cell == "sphere d=10")


def test_counted_keeps_to_the_budget():
    f = quality.Counted(lambda x: x[:, 0], 4)
    f(torch.tensor([[5.0], [6.0], [7.0]]))
    f(torch.tensor([[4.0], [1.0]]))
    assert f.best == 4
    with pytest.raises(quality.Enough):
        f(torch.zeros(1, 1))


def test_quality_rows_use_the_best_of_each_side_and_the_solved_floor():
    rows = {
        "gfopt a": dict(values={"x": [4, 4, 9], "y": [1e-30] * 3}),
        "gfopt b": dict(values={"x": [1, 7, 7], "y": [1.0] * 3}),
        "P": dict(values={"x": [2, 2, 2], "y": [1e-14] * 3}), "Q": dict(error="e"),
        "ellipsoid": dict(gfopt=[90, 100, 110], pycma=[99, 99, math.inf]),
        "noisy sphere": {"gfopt noisy": [0.004], "gfopt": [0.4], "pycma": [0.5]},
    }
    result = dict(settings=dict(cells=["x", "y"]), rows=rows)
    x, y = quality.quality_rows(result)
    assert (x["ours"], x["peer"], x["ratio"], x["reached"]) == ("gfopt a", "P", 2, True)
    assert y["ratio"] == 1 and quality.medians(result)["Q"] is None
    n, noise = quality.single_rows(result)
    assert not n["reached"] and n["value"] == pytest.approx(100 / 99) and noise["reached"]


def test_all_population_methods_take_part():
    ours = {s[6:] for s in quality.SOLVERS if s.startswith("gfopt ")}
    assert {"random", "ga", "pso", "de", "snes", "cmaes"} <= ours and not {"bo", "auto", "nsga2"} & ours


def test_run_solver_gives_a_value_per_cell_and_seed():
    cells = ["sphere d=10", "rotated sphere d=10"]
    told = quality.run_solver("gfopt snes", 2, 500, cells)
    assert list(told["values"]) == cells and all(len(v) == 2 for v in told["values"].values())
    assert told["values"] == quality.run_solver("gfopt snes", 2, 500, cells)["values"]


def test_pycma_as_a_solver_and_in_the_ellipsoid():
    pytest.importorskip("cma")
    assert quality.best_found("pycma BIPOP", "sphere d=10", 0, 600) < 20
    a = quality.evaluations_to("pycma", 0, target=1.0, d=4)
    b = quality.evaluations_to("gfopt", 0, target=1.0, d=4)
    assert 20 < a < 5000 and 20 < b < 5000
    assert quality.evaluations_to("gfopt", 0, target=-1.0, d=2, budget=60) == math.inf
    assert quality.evaluations_to("gfopt", 0, target=math.inf, d=2) == 1


def test_noisy_sphere_is_judged_without_noise():
    assert 0 < quality.noisy_sphere("gfopt", 0, d=2, budget=600) < 5
