"The table of trainings: recorded once, whatever interrupts it; replayed exactly."

import gzip
import json
import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from gfopt.experiments import tuning
from gfopt.experiments import tuning_table as tt
from gfopt.lm.tune import tune


@pytest.fixture(scope="module")
def small(corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("table") / "t.json.gz"
    return tt.record_table(out, "smoke", corpus=corpus, progress=False), out


@pytest.fixture(scope="module")
def table():
    return tuning.load_table()


def timeless(record):
    cut = lambda r: {k: v for k, v in r.items() if k not in ("seconds", "session")}  # noqa: E731
    return [cut(r) for r in [*record["repeats"], *record["runs"]]]


# ---- one training
def test_the_schedule_knows_no_horizon():
    assert [tt.rate(t, 600, 0.0) for t in (50, 100, 5400)] == [0.5, 1.0, 1.0]
    assert math.isclose(tt.rate(1800, 600, 0.5), 4**-0.5) and tt.rungs_of(7) == [7, 21, 63]


def test_a_training_is_repeatable_and_a_shorter_one_is_its_beginning(corpus):
    p = tt.PRESETS["smoke"]
    work, _ = tt._text(p, corpus)
    params = dict(optimizer="adamw", lr=0.01, batch_size=5, decay=0.3, beta2=0.9)  # 5 rows do not divide a rung
    torch.manual_seed(1)
    a = tt.train(work, params, p["low"])
    torch.manual_seed(2)
    heard = []
    b = tt.train(work, params, p["low"], listen=lambda t, y: heard.append([t, y]))
    assert a["losses"] == b["losses"] and a["curve"] == b["curve"] == heard and a["tokens"] == 9 * p["low"]
    at = dict(map(tuple, a["curve"]))
    assert [at[r] for r in tt.rungs_of(p["low"])] == a["losses"]  # judged at exactly as many tokens
    third = tt.train(work, params, p["low"] // 3 // 32 * 32)  # another ladder, another schedule
    assert third["losses"] != a["losses"]
    other = tt.train(work, params, p["low"], seed=1)
    assert other["losses"] != a["losses"]


def test_a_diverged_training_says_so_and_leaves_the_rest_empty(corpus, monkeypatch):
    p, measured = tt.PRESETS["smoke"], iter([3.0, 2.0, 1.0, math.nan])
    work, _ = tt._text(p, corpus)
    monkeypatch.setattr(tt, "bits_per_byte", lambda *a: next(measured))
    r = tt.train(work, tt.DEFAULT, p["low"])
    assert r["losses"] == [3.0, 1.0, None] and r["reason"].startswith("diverged: nan bits per byte at 1024") and len(r["curve"]) == 3 and r["tokens"] == 1024


def test_every_coordinate_matters(corpus):
    p = tt.PRESETS["smoke"]
    work, _ = tt._text(p, corpus)
    muon, adam = tt.DEFAULT, dict(optimizer="adamw", lr=0.02, batch_size=8, decay=0.5, beta2=0.9)
    changes = [(muon, dict(lr=0.03)), (muon, dict(batch_size=9)), (muon, dict(decay=0.6)), (muon, dict(momentum=0.6)), (adam, dict(beta2=0.99))]
    for base, change in changes:
        assert tt.train(work, base | change, p["low"])["losses"] != tt.train(work, base, p["low"])["losses"], change


# ---- the recording
def test_design_begins_with_the_default_and_any_beginning_is_even():
    jobs = tt.design(65, repeats=2)
    assert [j["seed"] for j in jobs[:4]] == [0, 1, 2, 0] and all(j["params"] == tt.DEFAULT for j in jobs[:3]) and len(jobs) == 67
    assert jobs == tt.design(200, repeats=2)[:67]  # a larger table continues a smaller one
    assert sum(j["params"]["optimizer"] == "muon" for j in jobs[3:]) == 32
    assert sum(j["params"]["lr"] < (3e-4 * 0.3) ** 0.5 for j in jobs[3:]) == 32


def test_recording_is_whole_and_the_same_bytes_for_the_same_lines(small):
    record, out = small
    assert [len(record["runs"]), len(record["repeats"])] == [8, 1] and record["runs"][0]["params"] == tt.DEFAULT
    assert json.loads(gzip.decompress(out.read_bytes())) == record and not list(out.parent.glob("*.part.jsonl"))
    for r in record["runs"]:
        assert r["seconds"] > 0 and r["session"] == 0 and len(r["losses"]) == 3
    assert record["repeats"][0]["seed"] == 1 and record["repeats"][0]["losses"] != record["runs"][0]["losses"]
    session = record["sessions"][0]
    assert {"device", "torch", "python", "commit", "seed", "date"} <= session.keys()
    before = out.read_bytes()
    lines = [json.loads(x) for x in tt._unpacked(out).splitlines()]
    tt.pack_table(lines[0], lines[1:], out)
    assert out.read_bytes() == before


@pytest.mark.parametrize("after", [1, 3, 8])
def test_killed_recording_goes_on(corpus, small, tmp_path, monkeypatch, after):
    calls, once = [], tt.train

    def mortal(*args, **kwargs):
        if len(calls) == after:
            raise SystemExit
        calls.append(1)
        return once(*args, **kwargs)

    out = tmp_path / "t.json.gz"
    monkeypatch.setattr(tt, "train", mortal)
    with pytest.raises(SystemExit):
        tt.record_table(out, "smoke", corpus=corpus, progress=False)
    part = next(tmp_path.glob("*.part.jsonl"))
    with open(part, "ab") as f:
        f.write(b'{"params": {"opt')  # and the machine died in the middle of a line
    tt.record_table(out, "smoke", corpus=corpus, progress=False, seconds=0)  # nothing but a new beginning, written behind the torn line
    assert part.exists()
    calls.clear()
    monkeypatch.setattr(tt, "train", lambda *a, **k: calls.append(1) or once(*a, **k))
    record = tt.record_table(out, "smoke", corpus=corpus, progress=False)
    assert len(calls) == 9 - after and timeless(record) == timeless(small[0]) and len(record["sessions"]) == 3


def test_an_unfinished_table_is_a_table_and_continues_from_its_file_alone(corpus, small, tmp_path):
    out = tmp_path / "t.json.gz"
    few = tt.record_table(out, "smoke", corpus=corpus, progress=False, seconds=0)
    assert few["runs"] == []
    lines = tt._unpacked(small[1]).splitlines(keepends=True)
    (tmp_path / "t.json.gz.part.jsonl").write_bytes(b"".join(lines[:6]))
    few = tt.record_table(out, "smoke", corpus=corpus, progress=False, seconds=0)
    assert len(few["runs"]) == 3
    (tmp_path / "t.json.gz.part.jsonl").unlink()
    whole = tt.record_table(out, "smoke", corpus=corpus, progress=False)
    assert timeless(whole) == timeless(small[0])


def test_another_table_is_refused(corpus, tmp_path, monkeypatch):
    out = tmp_path / "t.json.gz"
    tt.record_table(out, "smoke", corpus=corpus, progress=False, seconds=0)
    monkeypatch.setitem(tt.PRESETS, "smoke", tt.PRESETS["smoke"] | dict(low=512))
    with pytest.raises(ValueError, match="its settings are another table's"):
        tt.record_table(out, "smoke", corpus=corpus, progress=False)


# ---- the replay
def test_recorded_configurations_answer_for_themselves(table):
    assert len(table) == len(table.configs) == len(table.losses) == len(table.curves) >= 100
    assert table.default == table.configs[0] and table.tokens == table.fidelity.levels and len(table.tokens) == 3
    rows = range(0, len(table), 7)
    assert [table.nearest(table.configs[i]) for i in rows] == [*rows]
    for i in rows:
        assert [table.objective(table.configs[i], t) for t in table.tokens] == table.losses[i].tolist()
        assert table(table.configs[i]) == table.losses[i, -1]


def test_nearest_is_the_nearest_of_its_category(table):
    for p in table.space.sample(40, seed=3):
        z, Z = table.space.encode(p)[0], table.space.encode(table.configs)
        far = [float((a - z).norm()) if q["optimizer"] == p["optimizer"] else math.inf for a, q in zip(Z, table.configs)]
        assert table.nearest(p) == int(np.argmin(far))


def test_another_category_is_never_nearest():
    far = dict(optimizer="muon", lr=0.3, batch_size=32, decay=1.0, momentum=0.98)
    near = dict(optimizer="adamw", lr=3e-4, batch_size=4, decay=0.0, beta2=0.8995)
    runs = [dict(params=near, losses=[1.0, 1.0, 1.0], curve=[]), dict(params=far, losses=[2.0, 2.0, None], curve=[])]
    two = tt.TuningTable(dict(space=tt.SPACE.to_json(), default=far, runs=runs, settings=dict(low=4), eta=3))
    asked = dict(optimizer="muon", lr=3e-4, batch_size=4, decay=0.0, momentum=0.74)
    assert two.nearest(asked) == 1 and two.objective(asked, 4) == 2.0 and math.isnan(two(asked)) and two.tokens == [4, 12, 36]


def test_objective_reports_the_curve_and_continues(table, tmp_path):
    heard = []

    class Ear:
        spent, folder = 0, tmp_path

        def __call__(self, t, y):
            heard.append([t, y])

    ear = Ear()
    table.objective(table.default, table.tokens[0], ear)
    assert list(tmp_path.iterdir())
    ear.spent = table.tokens[0]
    table.objective(table.default, table.tokens[2], ear)
    assert heard == table.curves[0]
    with pytest.raises(ValueError, match="tokens: 5; allowed"):
        table.objective(table.default, 5)


@pytest.mark.parametrize("scheduler", [None, "asha", "hyperband", "sh"])
def test_any_method_replays(table, scheduler):
    study = tune(table.objective, table.space, "random", 12, default=table.default, fidelity=table.fidelity, scheduler=scheduler, progress=False)
    for t in study.trials:
        i = table.nearest(t.params)
        assert t.state == "failed" or t.value == table.losses[i, 2]
        assert t.extra["cost"] == max(t.reports) in table.tokens  # a table's training continues: every token once


@pytest.mark.parametrize("method", ["random", "ga", "pso", "cmaes", "bo", "tpe"])
def test_every_proposal_was_recorded(table, method):
    study = tune(table.objective, table.space, method, 24, default=table.default, fidelity=table.fidelity, progress=False, seed=1)
    assert all(t.params in table.configs for t in study.trials)
    if method == "bo": assert len({table.nearest(t.params) for t in study.trials}) == 24  # what is known is not asked again


def test_the_space_of_recorded_points_keeps_them_and_their_categories(table):
    z = table.space.encode(table.configs)
    assert torch.equal(table.space.canonical(z), z) and table.space.snaps
    u = torch.rand(300, table.space.dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    snapped = table.space.canonical(u)
    assert torch.equal(snapped, z[table.space.index(u)])
    plain = tt.SPACE.decode(tt.SPACE.canonical(u))
    assert [p["optimizer"] for p in table.space.decode(snapped)] == [p["optimizer"] for p in plain]


def test_a_missing_table_says_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="not in the installed package.*clone it.*python -m gfopt.experiments.tuning_table"):
        tuning.load_table(tmp_path / "none.json.gz")


# ---- the bench
def test_bench_continues_and_shares_are_of_random_search(table, tmp_path, monkeypatch):
    rivals = {k: tt.RIVALS[k] for k in ("random", "random + asha", "pso")}
    once, calls = tt.search_path, []

    def mortal(*a, **k):
        if len(calls) == 4:
            raise KeyboardInterrupt
        calls.append(1)
        return once(*a, **k)

    monkeypatch.setattr(tt, "search_path", mortal)
    with pytest.raises(KeyboardInterrupt):
        tt.run_bench(table, tmp_path / "b.json", seeds=3, targets=3, trainings=10, rivals=rivals, progress=False)
    monkeypatch.setattr(tt, "search_path", lambda *a, **k: calls.append(1) or once(*a, **k))
    r = tt.run_bench(table, tmp_path / "b.json", seeds=3, targets=3, trainings=10, rivals=rivals, progress=False)
    assert len(calls) == 9 and json.loads((tmp_path / "b.json").read_text()) == r
    last = sorted(r["paths"][f"random {s}"]["path"][-1][1] for s in range(3))
    assert r["target"] == last[1]
    share = tt.shares(r)
    assert (share["random"] <= 1).sum() >= 2  # by the definition of the target
    for s in share.values():
        assert len(s) == 3 and all(v == math.inf or 0 < v <= 1.1 for v in s)


# ---- true runs for the winners
def test_a_training_also_judges_unseen_text_and_is_the_same_training(corpus, monkeypatch):
    p = tt.PRESETS["smoke"]
    work, _ = tt._text(p, corpus)
    plain, more = (tt.train(work, tt.DEFAULT, p["low"], unseen=u) for u in (False, True))
    assert "test" not in plain and more["losses"] == plain["losses"] and more["curve"] == plain["curve"]
    other = tt.train(replace(work, valid=work.test), tt.DEFAULT, p["low"])  # the same weights, as the text they are judged on teaches nothing
    assert more["test"] == other["losses"][-1] != more["losses"][-1]
    assert tt.train_again(work, tt.DEFAULT, p["low"], 0) == dict(valid=more["losses"][-1], test=more["test"], reason=None)
    monkeypatch.setattr(tt, "bits_per_byte", lambda *a: math.nan)
    r = tt.train_again(work, tt.DEFAULT, p["low"], 0)
    assert r["valid"] is r["test"] is None and r["reason"].startswith("diverged")


@pytest.mark.parametrize("ends, middle, seed", [
    ([3, 1, 2], 2, 2),
    ([4, 1, 3, 2], 2, 3),  # of two in the middle the better
    ([5, 2, 9, 2, 2], 2, 1),  # of equals the first seed
    ([None, None, 7], 0, 0),  # two finished nothing and have the default
])
def test_the_winner_is_where_the_median_search_ends(table, monkeypatch, ends, middle, seed):
    asked = []

    def path(table, method, scheduler, s, trainings, target=None, **settings):
        asked.append((method, scheduler, s, trainings, target, settings))
        loss = lambda i: float(table.losses[i, -1])  # noqa: E731
        return [] if ends[s] is None else [[1, 9.9], [2, loss(order[ends[s]])]]

    order = [0, *np.argsort(table.losses[:, -1])[[i for i in range(10)]]]  # 1 is the best of the table, 2 the next
    monkeypatch.setattr(tt, "search_path", path)
    r = tt.search_end(table, ("ga", "asha", 100, dict(population=8)), len(ends), 30)
    assert asked == [("ga", "asha", s, 30, None, dict(population=8)) for s in range(len(ends))]  # in full, whatever they find on the way
    assert r["configuration"] == order[middle] and r["seed"] == seed and r["params"] == table.configs[order[middle]]
    assert r["promised"] == table.losses[order[middle], -1] == r["ends"][seed] and len(r["ends"]) == len(ends)
    json.dumps(r)


def test_winners_continue_and_equal_configurations_are_trained_once(corpus, small, tmp_path, monkeypatch):
    small_table, calls, once = tt.TuningTable(small[0]), [], tt.train
    rivals = {"random": tt.RIVALS["random"], "the same": tt.RIVALS["random"], "ga": tt.RIVALS["ga"]}
    ask = lambda out: tt.run_winners(small_table, out, trainings=6, seeds=3, fresh=(2, 3), rivals=rivals, corpus=corpus, say=lambda row: None)  # noqa: E731

    def mortal(work, params, low, seed, **kwargs):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append((str(params), seed))
        return once(work, params, low, seed, **kwargs)

    out = tmp_path / "w.json"
    monkeypatch.setattr(tt, "train", mortal)
    with pytest.raises(KeyboardInterrupt):
        ask(out)
    part = json.loads(out.read_text())
    assert not part["complete"] and len(part["rows"]) == 6 and len(set(calls)) == 3
    monkeypatch.setattr(tt, "search_path", lambda *a, **k: pytest.fail("searched again"))
    monkeypatch.setattr(tt, "train", lambda work, params, low, seed, **k: calls.append((str(params), seed)) or once(work, params, low, seed, **k))
    whole = ask(out)
    rows = {k: r["result"] for k, r in whole["rows"].items()}
    who = {0, *(rows[f"search {name}"]["configuration"] for name in rivals)}
    assert whole["complete"] and len(who) > 1 and whole == json.loads(out.read_text()) and whole["settings"]["corpus"] == corpus.sha256
    assert len(calls) == len(set(calls)) == 3 * len(who) == len(rows) - 3
    assert ask(out)["rows"] == whole["rows"] and len(calls) == 3 * len(who)  # nothing is left to do
    found = tt.winners(whole)
    assert [*found] == ["default", *rivals] and found["random"]["configuration"] == found["the same"]["configuration"]
    for r in found.values():
        i = r["configuration"]
        assert r["promised"] == r["replay"] == small_table.losses[i, -1]  # the table's seed makes the table's loss
        assert r["valid"].tolist() == [rows[f"{i} seed {s}"]["valid"] for s in (2, 3)] and r["test"].tolist() == [rows[f"{i} seed {s}"]["test"] for s in (2, 3)]
    rows["0 seed 2"] |= dict(valid=None, test=None)  # as a training that diverged
    assert math.isnan(tt.winners(dict(rows={k: dict(result=r) for k, r in rows.items()}))["default"]["test"][0])


def test_winners_of_another_table_are_refused(corpus, small, tmp_path, monkeypatch):
    monkeypatch.setattr(tt, "train", lambda *a, **k: pytest.fail("trained"))
    ask = lambda **other: tt.run_winners(tt.TuningTable(small[0] | other), tmp_path / "w.json", corpus=corpus)  # noqa: E731
    with pytest.raises(ValueError, match="the table's preset: 'huge'.*'smoke', 'cpu', 'gpu'"):
        ask(preset="huge")
    with pytest.raises(ValueError, match="library of another Python"):
        ask(corpus="0" * 64)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("ask, said", [
    (["--winners", "--preset", "smoke"], "the repository's table is of --preset cpu, got smoke"),
    (["--winners", "--preset", "huge"], "invalid choice: 'huge'"),
    (["--winners", "--bench"], "not allowed with argument"),
])
def test_winners_on_the_command_line_say_what_is_wrong(tmp_path, capsys, ask, said):
    with pytest.raises(SystemExit) as e:
        tt.main([*ask, "--out", str(tmp_path / "w.json")])
    assert e.value.code == 2 and said in capsys.readouterr().err and not [*tmp_path.iterdir()]


def test_winners_on_the_command_line_print_promise_and_truth(tmp_path, capsys, monkeypatch):
    made = dict(rows={"search ga": dict(result=dict(configuration=3, promised=2.5))} | {
        f"{i} seed {s}": dict(result=dict(valid=2.75 - i / 24, test=3.0 - i / 12)) for i in (0, 3) for s in (0, 5)})
    monkeypatch.setattr(tt, "run_winners", lambda table, out: made)
    tt.main(["--winners", "--out", str(tmp_path / "w.json")])
    said = capsys.readouterr().out.splitlines()
    assert said == ["default         promised 2.750, again 2.750, test 3.000", "ga              promised 2.500, again 2.625, test 2.750"]


def test_command_line_smoke(tmp_path):
    ask = [sys.executable, "-m", "gfopt.experiments.tuning_table", "--preset", "smoke", "--seconds", "0", "--out", str(tmp_path / "t.json.gz")]
    done = subprocess.run(ask, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0 and "0 of 8 configurations are in t.json.gz" in done.stdout, done.stderr
