import json
import math
import signal as signals
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gfopt.experiments import forward_training as ft
from gfopt.experiments.forward_tasks import scratch_task, stepper

TINY = dict(shape=dict(d_model=8, n_layers=1, n_heads=2, n_kv_heads=2, d_ff=16), length=16)
RECORDED = Path(__file__).parent.parent / "nbs/results/forward_training_cpu.json"


def row(*values): return dict(curve=[(64 * i, i, v) for i, v in enumerate(values)])


def test_forwards_of_a_row_set_are_counted_alike_for_all():
    for settings in (dict(method="zo", lr=1e-3), dict(method="zo", sides=1, directions=5, batched=True, lr=1e-3), dict(method="es", population=8, sigma=0.01, lr=1e-3), dict(method="adamw", lr=1e-3)):
        assert stepper(scratch_task(**TINY), 0, **settings)[1] / ft._forwards(settings) == 8 * TINY["length"]


def test_the_share_of_the_gap_and_the_first_crossing():
    assert ft.share(3.0, 2.5, 2.0) == 0.5 and ft.share(3.0, 3.2, 2.0) == pytest.approx(-0.2) and math.isnan(ft.share(3.0, 2.0, 3.0))
    assert ft.reached(row(3, 2, 3, 1), 2, 64) == 1 and ft.reached(row(3, 2), 1.9, 64) == math.inf


def test_mezo_is_tuned_by_its_end_and_the_others_by_forwards_to_the_target():
    p = dict(tasks=dict(t={}), tuning=[9], seeds=[0], points=2, methods={
        "MeZO": dict(budget=1, settings=[{}, {}]), "other": dict(budget=1, settings=[dict(a=0), dict(a=1)])})
    preset = dict(device="cpu", a=p)
    name = lambda m, k: f"a/t/{m}/setting {k}, seed 9"
    rows = {name("MeZO", 0): row(3, 1, 2.0), name("MeZO", 1): row(3, 2.5, 1.5)}
    assert ft.target_of(rows, p, "t") == 1.5
    jobs = ft.plan(preset, "a", rows)
    assert "a/t/MeZO/seed 0" in jobs and "a/t/other/seed 0" not in jobs
    rows |= {name("other", 0): row(3, 2.9, 1.0), name("other", 1): row(3, 1.5, 1.6)}  # sooner there, worse in the end
    assert ft.plan(preset, "a", rows)["a/t/other/seed 0"][1][2] == dict(a=1)


def test_everybody_has_as_many_settings_to_choose_from():
    for preset in (ft.CPU, ft.GPU):
        for part in "ab": assert len({len(m["settings"]) for m in preset[part]["methods"].values()}) == 1
        assert not set(preset["a"]["tuning"]) & set(preset["a"]["seeds"]) and not set(preset["b"]["tuning"]) & set(preset["b"]["seeds"])
    assert len(ft.CPU["a"]["seeds"]) == 5 and len(ft.CPU["b"]["seeds"]) == 3


def test_a_killed_recording_goes_on_where_it_stopped(tmp_path):
    out = tmp_path / "r.json"
    code = f"from gfopt.experiments.forward_training import main; main(['--preset', 'smoke', '--part', 'c', '--out', {str(out)!r}])"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL) as p:
        while not out.exists() and p.poll() is None: time.sleep(0.01)
        p.send_signal(signals.SIGKILL)
    kept = json.loads(out.read_text())["rows"]
    said = []
    result = ft.measure(out, "smoke", "c", say=lambda line, **_: said.append(line))
    assert len(said) == len(ft.CPU["c"]) - len(kept) and all(result["rows"][n] == r for n, r in kept.items())
    assert set(result["rows"]) == set(ft.plan(ft.PRESETS["smoke"], "c", {})) and not result["complete"]
    assert {"device", "torch", "commit", "seed"} <= result["provenance"].keys()
    ft.measure(out, "smoke", "c", say=lambda line, **_: said.append(line))
    assert len(said) == len(ft.CPU["c"]) - len(kept)


def test_other_settings_begin_anew_and_a_failed_run_is_tried_again(tmp_path):
    out, said = tmp_path / "r.json", []
    first = ft.measure(out, "smoke", "c", say=lambda line, **_: said.append(line))
    n = len(said)
    broken = dict(first, rows=first["rows"] | {"c/AdamW": dict(error="x")})
    out.write_text(json.dumps(broken))
    again = ft.measure(out, "smoke", "c", say=lambda line, **_: said.append(line))
    assert len(said) == n + 1 and "curve" in again["rows"]["c/AdamW"]
    out.write_text(json.dumps(dict(first, preset="cpu")))
    ft.measure(out, "smoke", "c", say=lambda line, **_: said.append(line))
    assert len(said) == 2 * n + 2


def only(): return dict(ft.PRESETS["smoke"], a=dict(tasks={}, methods={}), b=dict(tasks={}, methods={}), c={"only": ft.PRESETS["smoke"]["c"]["AdamW"]})


def test_a_complete_file_is_left_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setitem(ft.PRESETS, "one", only())
    out, said = tmp_path / "r.json", []
    first = ft.measure(out, "one", say=lambda line, **_: said.append(line))
    assert first["complete"] and len(said) == 1
    first["provenance"]["commit"] = "another"
    out.write_text(json.dumps(first))
    assert ft.measure(out, "one", say=lambda line, **_: said.append(line)) == first == json.loads(out.read_text())
    assert len(said) == 1


@pytest.mark.skipif(not RECORDED.exists(), reason="nothing recorded here")
def test_the_recorded_file_is_the_presets_and_nothing_of_it_is_run_again(tmp_path, monkeypatch):
    recorded = json.loads(RECORDED.read_text())
    assert recorded["settings"] == json.loads(json.dumps(ft.CPU)) and recorded["complete"]
    assert {name for part in "abc" for name in ft.plan(ft.CPU, part, recorded["rows"])} == set(recorded["rows"])
    monkeypatch.setattr(ft, "provenance", lambda *_: recorded["provenance"])
    ran = []
    monkeypatch.setattr(ft, "in_process", lambda where, *args, **_: ran.append(args) or dict(curve=[(0, 0.0, 1.0)]))
    out = tmp_path / "r.json"
    for complete in (True, False):  # also a file whose last moment was lost
        out.write_text(json.dumps(dict(recorded, complete=complete)))
        assert ft.measure(out, "cpu", say=lambda *_, **__: None)["rows"] == recorded["rows"] and not ran
    out.write_text(json.dumps(dict(recorded, complete=False, rows={k: v for k, v in recorded["rows"].items() if k != "c/AdamW"})))
    assert ft.measure(out, "cpu", say=lambda *_, **__: None)["complete"] and [a[0] for a in ran] == ["scratch"]


def test_what_a_worker_process_is_told_to_run_exists(tmp_path, monkeypatch):
    monkeypatch.setitem(ft.PRESETS, "one", {**only(), "workers": 1})
    told, real = [], ft.in_process
    monkeypatch.setattr(ft, "in_process", lambda where, *args, **k: told.append(where) or real(where, *args, **k))
    result = ft.measure(tmp_path / "r.json", "one", "c", say=lambda *_, **__: None)
    assert "curve" in result["rows"]["c/only"] and result["complete"] and told == ["gfopt.experiments.forward_tasks:train"]


def test_tables_leave_out_what_is_missing():
    result = dict(settings=json.loads(json.dumps(ft.CPU)), rows={})
    assert ft.forward_rows(result) == [] and ft.gap_rows(result) == [] and ft.scratch_rows(result, dict(unigram=4.5)) == []
    result["rows"]["c/AdamW"] = dict(curve=[(0, 0.0, 8.0), (10**6, 1.0, 4.4), (2 * 10**6, 2.0, 4.0)])
    (only,) = ft.scratch_rows(result, dict(unigram=4.5, bigram=3.5))
    assert only == dict(run="AdamW", tokens=2.0, seconds=2.0, end=4.0, unigram=1.0, bigram=None)


def test_costs_are_what_each_seed_forgot_and_the_peak_of_a_step():
    runs = {f"b/shift/AdamW/seed {s}": dict(row(3, 2), known=[2.0, 2.0 + s]) for s in ft.CPU["b"]["seeds"]}
    result = dict(settings=ft.CPU, rows=runs)
    assert ft.cost_rows(result) == [dict(task="shift", method="AdamW", peak=None, lost=[0.0, 1.0, 2.0])]
    runs["b/shift/AdamW/footprint"] = dict(weights=1, peak=7, kept=2)
    assert ft.cost_rows(result)[0]["peak"] == 7
    assert [n for n in ft.plan(ft.CPU, "b", {}) if "reward" in n and "footprint" in n] == []  # sampling under the ledger takes minutes


def test_no_library_beyond_torch_numpy_and_scipy_is_asked_for():
    code = "import sys, gfopt.experiments.forward_training; print([m for m in ('skopt', 'tokenizers', 'transformers', 'pandas', 'sklearn', 'matplotlib') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
