"The reference curve's command: a toy of every row, and what is left of it where only torch, numpy and scipy are."

import json
import subprocess
import sys

import pytest

from gfopt.experiments import small_lm
from gfopt.experiments.small_lm import FREE, PRESETS, jobs, main

BARE = """import sys
for name in ("transformers", "tokenizers", "skopt", "matplotlib"): sys.modules[name] = None
from gfopt.experiments.small_lm import main
main(["--preset", "smoke", "--out", sys.argv[1]])"""


def test_a_toy_of_every_row_without_optional_libraries_and_once(tmp_path, monkeypatch, capsys):
    out, methods = tmp_path / "rows.json", ("Muon", "AdamW", FREE)
    subprocess.run([sys.executable, "-c", BARE, str(out)], check=True, capture_output=True)
    told = json.loads(out.read_text())
    assert told["complete"] and told["preset"] == "smoke" and told["settings"] == json.loads(json.dumps(PRESETS["smoke"]))
    assert told["provenance"]["kind"] == "cpu" and list(told["rows"]) == ["references", *methods]
    rows = {k: r["result"] for k, r in told["rows"].items()}
    assert set(rows["references"]) == {"unigram", "bigram", "tokens", "xz"}
    s = PRESETS["smoke"]["scratch"]
    prices = dict(dict.fromkeys(methods, PRESETS["smoke"]["rows"] * PRESETS["smoke"]["length"]), **{FREE: s["es"]["population"] * s["rows"] * s["length"]})
    for m in methods:
        curve, end = rows[m]["curve"], rows[m]["curve"][-1]
        assert [c["seconds"] for c in curve] == sorted(c["seconds"] for c in curve) and curve[0]["steps"] == 0 < end["steps"]
        assert all(c["tokens"] == c["steps"] * prices[m] and 0 < c["bpb"] < 20 for c in curve)
        assert end["seconds"] >= PRESETS["smoke"]["each"] and rows[m]["tokens_per_second"] == end["tokens"] / end["seconds"]
        assert 0 < rows[m]["test"] < 20 and rows[m]["peak_bytes"] is None and rows[m]["wall"] > end["seconds"] and rows[m]["size"] == "pico"
    assert len({rows[m]["curve"][0]["bpb"] for m in methods}) == 1

    before = out.read_bytes()
    monkeypatch.setattr(small_lm, "from_nothing", None)  # a second command measures nothing
    monkeypatch.setattr(small_lm, "yardsticks", None)
    main(["--preset", "smoke", "--out", str(out)])
    assert out.read_bytes() == before and "4 rows, complete" in capsys.readouterr().out


def test_presets_keep_their_minutes():
    parts = {n: p["each"] * (len(p["gradients"]) + 1) for n, p in PRESETS.items()}
    assert parts["cpu"] <= 300 and parts["gpu"] <= 540 and parts["smoke"] < 5
    # on a GPU what is begun last, just before `seconds`, still ends within nine minutes, and everything is begun
    gpu = PRESETS["gpu"]
    assert gpu["seconds"] > parts["gpu"] - gpu["each"] and gpu["seconds"] + gpu["each"] <= 570 and list(jobs(gpu))[0] == "references"
    assert gpu["tokenizer"] == "bytes" and gpu["size"] == "base" and PRESETS["cpu"]["size"] == "nano"


def test_the_command_line(tmp_path, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(small_lm, "add_rows", lambda *a, **k: seen.append((*a, k)) or dict(rows={}, complete=False))
    out = tmp_path / "a.json"
    for args in ([], ["--preset", "gpu"], ["--preset", "gpu", "--device", "cpu"], ["--preset", "smoke", "--device", "cuda"]): main([*args, "--out", str(out)])
    assert [(o, preset, p["device"], k) for o, preset, p, _, k in seen] == [
        (out, "cpu", "cpu", dict(device="cpu", seconds=None)), (out, "gpu", "cuda", dict(device="cuda", seconds=400)),
        (out, "gpu", "cpu", dict(device="cpu", seconds=400)), (out, "smoke", "cuda", dict(device="cuda", seconds=None))]
    assert all(p == PRESETS[preset] | dict(device=p["device"]) and set(plan) == {"references", "Muon", "AdamW", FREE} for _, preset, p, plan, _ in seen)
    assert capsys.readouterr().out.count("the same command goes on") == 4
    for bad in (["--preset", "huge", "--out", "x"], ["--device", "tpu", "--out", "x"], []):
        with pytest.raises(SystemExit): main(bad)
