"The field beside ours: every number out of a file, every error and every gap shown as such."

import json
import math
import shutil
from importlib import import_module

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import ttest_1samp

from gfopt.experiments import field
from gfopt.experiments.field import (
    COMMANDS,
    LISTED,
    better,
    number_of,
    over_tasks,
    read,
    shown,
)

ROOT = field.RESULTS.parents[1]
RESULTS = ROOT / "nbs" / "results"
FAMILIES = {f: lambda folder=None, f=f: field.search_rows(f, folder) for f in LISTED} | {
    "fronts": field.front_rows, "tuning": field.tuning_rows, "training": field.training_rows, "compression": field.compression_rows}


@pytest.fixture(scope="module")
def tables():
    return {name: rows() for name, rows in FAMILIES.items()}


@pytest.fixture
def folder(tmp_path):
    "A copy of the records that may be changed."
    for name in COMMANDS:
        shutil.copy(RESULTS / f"{name}.json", tmp_path)

    def change(name, edit):
        path = tmp_path / f"{name}.json"
        record = json.loads(path.read_text())
        edit(record)
        path.write_text(json.dumps(record))
        return tmp_path
    return change


def row_of(rows, peer, compared):
    (found,) = [r for r in rows if r["peer"] == peer and r["compared"].startswith(compared)]
    return found


# ---- one scale
@settings(max_examples=40, deadline=None)
@given(st.dictionaries(st.sampled_from("abc"), st.lists(st.floats(0, 1e6), min_size=3, max_size=3), min_size=1))
def test_a_seed_enters_with_its_geometric_mean(values):
    literal = [math.prod(max(v[s], 1e-12) for v in values.values()) ** (1 / len(values)) for s in range(3)]
    assert np.allclose(over_tasks(values), literal)


def test_floors_make_solved_equal():
    assert over_tasks(dict(a=[0.0, 1e-13, 1e-12])).tolist() == pytest.approx([1e-12] * 3)
    assert over_tasks(dict(a=[0.0, 1e-5]), floor=1e-4).tolist() == pytest.approx([1e-4] * 2)


@pytest.mark.parametrize("told, word", [
    ((2, 1.5, 3), "ours"), ((0.5, 0.4, 0.9), "the peer"), ((1.2, 0.9, 1.6), "not told apart"), ((1, 1, 1), "not told apart"),
    ((5, None, None), "one run"), ("TypeError", "–"), (None, "–")])
def test_who_is_ahead(told, word):
    assert better(told) == word


@pytest.mark.parametrize("told, text", [
    (None, "–"), ("not measured yet: no row", "not measured yet"), ("TypeError: x", "did not run"), ((2.0, 1.5, 3.0), "2 [1.5, 3]"),
    ((0.99837, 0.9961, 1.0007), "0.9984 [0.9961, 1.001]"), ((2.5, 2.5, 2.5), "2.5"), ((7.0, None, None), "7"), ((25000.0, 1e3, 1e6), "2e+04 [1e+03, 1e+06]")])
def test_numbers_as_shown(told, text):
    assert number_of(told) == text


def test_spans_of_quartiles_cover_every_quotient_of_them():
    theirs, ours = [3.0, 4.0, 8.0], [1.0, 2.0, 2.5]
    mid, low, high = field.spread(theirs, ours)
    quotients = [a / b for a in theirs for b in ours]
    assert (mid, low, high) == (2, min(quotients), max(quotients))


# ---- rows
def test_every_row_has_a_factor_or_says_why_not(tables):
    for rows in tables.values():
        assert rows
        for r in rows:
            assert r["quality"] or r["cost"], r
            for v in (r["quality"], r["cost"]):
                assert v is None or isinstance(v, str) or (v[0] > 0 and (v[1] is None or v[1] <= v[0] <= v[2])), r
            assert r["command"].startswith("python ")


def test_quality_is_the_peers_loss_over_ours(tables):
    record = read("peers_quality_cpu")["rows"]
    for family, peer, algorithm, ours, theirs in (("populations", "pymoo", "DE", "gfopt de", "pymoo DE"), ("strategies", "pycma", "BIPOP", "gfopt cmaes", "pycma BIPOP")):
        logs = [np.log(np.maximum([record[k]["values"][c] for c in record[k]["values"]], 1e-12)).mean(0) for k in (theirs, ours)]
        exact = ttest_1samp(logs[0] - logs[1], 0).confidence_interval(0.95)
        r = next(r for r in tables[family] if r["peer"] == peer and r["compared"].startswith(algorithm))
        assert np.allclose(np.log(r["quality"]), [(logs[0] - logs[1]).mean(), exact.low, exact.high])


def test_the_faster_way_of_a_library_counts(tables):
    told = read("peers_speed_cpu")["rows"]["pso"]["contenders"]
    r = row_of(tables["populations"], "EvoX", "PSO")
    assert r["cost"][0] == min(told[k]["ms"][1] for k in ("EvoX", "EvoX compiled")) / told["gfopt"]["ms"][1] and "compiled" in r["told"]
    assert "compiled" not in row_of(tables["strategies"], "EvoX", "SNES")["told"]


def test_a_peer_that_crashed_is_shown_with_its_error(tables):
    errors = {k: v["error"] for k, v in read("peers_quality_cpu")["rows"].items() if "error" in v}
    assert errors
    for who, error in errors.items():
        peer, algorithm = who.split(" ", 1)
        r = next(r for rows in tables.values() for r in rows if r["peer"] == peer and r["compared"].startswith(algorithm))
        (line,) = shown([r])
        assert line["its loss over ours"] == "did not run" and line["better"] == "–" and error in line["did not run, or is missing"]


def test_a_crash_of_the_clock_is_shown_too():
    record = dict(rows=dict(ga=dict(population=1, dim=1, contenders={"gfopt": dict(ms=[1, 1, 1]), "evosax": dict(error="XlaRuntimeError: no")})))
    assert field.speed_of(record, "ga", "evosax") == ("XlaRuntimeError: no", "")
    assert field.speed_of(record, "ga", "pymoo")[0].startswith("not measured yet: no row 'ga' with pymoo")


def test_peers_that_are_ahead_are_said_to_be(tables):
    "What is known to be in the records: nobody softens it."
    ahead = {(r["peer"], k) for rows in tables.values() for r in rows for k in ("quality", "cost") if better(r[k]) == "the peer"}
    assert {("pymoo", "quality"), ("AdamW", "quality"), ("MeZO", "cost"), ("EvoPress-style search", "cost")} <= ahead


def test_a_hypervolume_is_turned_so_that_more_is_better(folder):
    def edit(record):
        for p in record["problems"].values(): p["peer"] = [2 * v for v in p["ours"]]
    rows = field.front_rows(folder("pareto_cpu", edit))
    assert all(r["quality"][0] == pytest.approx(0.5) and better(r["quality"]) == "the peer" for r in rows) and rows[-1]["compared"].startswith("NSGA-II on all 6")


def test_bbob_counts_areas_where_more_is_better(folder):
    def edit(record):
        for f in (f for k, r in record["rows"].items() if k.startswith("pycma") for f in r["functions"].values()): f["areas"] = [0.0] * 14 + [1e-3]
    r = row_of(field.search_rows("strategies", folder("coco_cpu", edit)), "pycma", "BIPOP on bbob")
    assert better(r["quality"]) == "ours" and r["cost"][0] == pytest.approx(304 / 322, rel=0.01)


@pytest.mark.parametrize("name, family, peer, compared, side, edit, by", [
    ("peers_quality_cpu", "populations", "pymoo", "GA", "quality", lambda d: [v.__setitem__(slice(None), [10 * x for x in v]) for v in d["rows"]["pymoo GA"]["values"].values()], 10),
    ("peers_speed_cpu", "populations", "pyswarms", "PSO", "cost", lambda d: d["rows"]["pso"]["contenders"]["pyswarms"].update(ms=[3 * v for v in d["rows"]["pso"]["contenders"]["pyswarms"]["ms"]]), 3),
    ("bayes_cpu", "tuning", "scikit-optimize", "skopt EI", "quality", lambda d: [r["regret"].__setitem__(-1, 2 * r["regret"][-1]) for k, r in d["rows"].items() if "skopt" in k], 2),
    ("bayes_cpu", "tuning", "scikit-optimize", "skopt EI", "cost", lambda d: [r.update(ms=5 * r["ms"]) for k, r in d["rows"].items() if "skopt" in k], 5),
    ("bayes_methods_cpu", "tuning", "optuna", "TPE", "cost", lambda d: d["rows"]["small tpe"].update(ask={k: v / 2 for k, v in d["rows"]["small tpe"]["ask"].items()}), 2),
    ("storage_cpu", "tuning", "optuna", "a finished", "cost", lambda d: d["rows"]["storage"].update(optuna=[4 * v for v in d["rows"]["storage"]["optuna"]]), 4),
    ("forward_cost_cpu", "training", "AdamW", "memory on 256", "cost", lambda d: d["rows"]["memory 256"]["bytes"]["AdamW"].update(peak=2 * d["rows"]["memory 256"]["bytes"]["AdamW"]["peak"]), 2),
    ("forward_cost_cpu", "training", "AdamW", "a step on 4,096", "cost", lambda d: d["rows"]["step 4096"]["ms"].update(AdamW=[2 * v for v in d["rows"]["step 4096"]["ms"]["AdamW"]]), 2),
    ("forward_training_cpu", "training", "AdamW", "verbaliser", "quality", lambda d: [r["curve"][-1].__setitem__(2, 3 * r["curve"][-1][2]) for k, r in d["rows"].items() if k.startswith("b/verbaliser/AdamW/seed")], 3),
    ("compress_cpu", "compression", "EvoPress-style search", "a tenth", "quality", lambda d: [r["result"]["evopress"].update(test=2 * r["result"]["evopress"]["test"]) for k, r in d["rows"].items() if k.startswith("joint/")], 2),
    ("compress_cpu", "compression", "EvoPress-style search", "known optimum of bits", "cost", lambda d: [r["result"]["found"].update(evolution=2 * r["result"]["found"]["evolution"]) for k, r in d["rows"].items() if k.startswith("exact/bits/")], 0.5)])
def test_a_number_is_what_its_file_says(tables, folder, name, family, peer, compared, side, edit, by):
    "Another number in the file is another number in the table, by as much; nothing is typed."
    at = folder(name, edit)
    before, after = (row_of(rows, peer, compared)[side] for rows in (tables[family], FAMILIES[family](at)))
    assert after[0] == pytest.approx(by * before[0], rel=1e-6)


def test_seeds_that_chose_settings_judge_nobody(tables, folder):
    def edit(record):
        for runs in record["rows"]["small Optuna TPE"]["best"].values():
            for c in runs[:6]: c[-1] = 1e9
    again = row_of(field.tuning_rows(folder("bayes_methods_cpu", edit)), "optuna", "TPE")
    assert again["quality"] == row_of(tables["tuning"], "optuna", "TPE")["quality"]


def test_a_version_is_the_one_that_was_measured(tables, folder):
    versions = read("peers_quality_cpu")["peers"]
    assert {r["peer"]: r["version"] for r in tables["populations"]} == {"EvoTorch": versions["evotorch"], "evosax": versions["evosax"], "pymoo": versions["pymoo"], "EvoX": versions["evox"], "pyswarms": versions["pyswarms"]}
    at = folder("peers_quality_cpu", lambda d: d["peers"].update(pymoo=None))
    assert shown([row_of(field.search_rows("populations", at), "pymoo", "GA")])[0]["version"] == "–"


def test_what_is_not_recorded_is_called_that(tables, folder, tmp_path):
    assert sum("LoRA" in r["peer"] for r in tables["training"]) == len(read("forward_training_cpu")["settings"]["b"]["tasks"])
    without = folder("forward_training_cpu", lambda d: d["settings"]["b"]["methods"].pop(field.LORA))
    (lora,) = [r for r in FAMILIES["training"](without) if "LoRA" in r["peer"]]
    assert shown([lora])[0]["its loss over ours"] == "not measured yet"
    at = folder("peers_quality_cpu", lambda d: d["rows"].pop("pymoo GA"))
    assert row_of(field.search_rows("populations", at), "pymoo", "GA")["quality"] == "not measured yet: no row 'pymoo GA'"
    empty = tmp_path / "empty"
    empty.mkdir()
    for name, rows in FAMILIES.items():
        told = shown(rows(empty))
        assert len(told) == len(LISTED.get(name, [])) and all(r["its loss over ours"] == r["its cost over ours"] == "not measured yet" for r in told)
    with pytest.raises(ValueError, match="name.*coco_cpu"):
        read("coco")
    with pytest.raises(ValueError, match="family.*strategies"):
        field.search_rows("strategy")


def test_an_unfinished_record_of_compression_is_read(folder):
    def edit(record):
        record["rows"] = {k: v for k, v in record["rows"].items() if k in ("bits/0", "bits/1", "exact/drop/0")} | {"bits/2": dict(error="killed")}
        record["rows"]["exact/drop/1"] = dict(result=dict(found=dict(evolution=3, evopress=None)))
    rows = field.compression_rows(folder("compress_cpu", edit))
    assert [r["compared"].split(",")[0] for r in rows] == ["4 bits on average", "known optimum of drop"]
    assert "1 of 2 seeds" in rows[1]["told"] and better(rows[1]["cost"]) == "one run"


# ---- commands
@pytest.mark.parametrize("command", sorted({*COMMANDS.values(), field.PEERS.format("quality speed")}))
def test_a_command_is_one_that_exists(command, capsys):
    words = command.split()
    if words[1] == "docs/tools.py":
        assert "#| slow" in json.dumps(json.loads((ROOT / words[3]).read_text())) and words[-2:] == ["--flags", "slow"]
        return
    with pytest.raises(SystemExit) as end:
        import_module(words[2]).main([*words[3:], "--help"])
    help_ = capsys.readouterr().out
    assert end.value.code == 0 and all(w in help_ for w in words if w.startswith("--"))


def test_every_file_has_its_command_and_names_it():
    assert all((RESULTS / f"{name}.json").exists() for name in COMMANDS)
    for name, command in COMMANDS.items():
        assert name in command or "peers" in command or "docs/tools.py" in command
        if "docs/tools.py" in command:
            assert f"{name}.json" in (ROOT / command.split()[3]).read_text()
    wanted = read("bayes_methods_cpu")["settings"]
    assert " ".join(map(str, wanted["small"])) in COMMANDS["bayes_methods_cpu"] and " ".join(map(str, wanted["large"])) in COMMANDS["bayes_methods_cpu"]
