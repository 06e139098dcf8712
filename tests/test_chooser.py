"What the records recommend: ranks, doubt, and that nothing is recommended that was not measured."

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import rankdata

from gfopt.experiments import chooser
from gfopt.experiments.chooser import (
    Situation,
    answer,
    block_ranks,
    choose,
    compare,
    evidence,
    situations,
)
from gfopt.optimizer import METHODS

RESULTS = chooser.RESULTS
scores = st.lists(st.lists(st.integers(0, 3), min_size=2, max_size=2), min_size=3, max_size=3)  # (methods, seeds), with many ties
tables = st.dictionaries(st.sampled_from("pqrs"), scores, min_size=1, max_size=4).map(
    lambda t: {task: dict(zip("abc", v, strict=True)) for task, v in t.items()})


# ---- ranks
def test_ranks_average_ties_and_put_failures_last():
    methods, r = block_ranks({"t": dict(a=[1.0, 5.0, math.inf], b=[1.0, math.nan, math.nan], c=[0.5, 7.0, 2.0])})
    assert methods == ["a", "b", "c"]
    assert r.tolist() == [[[2.5, 2.5, 1], [1, 3, 2], [2.5, 2.5, 1]]]


@settings(max_examples=60, deadline=None)
@given(tables)
def test_each_block_is_scipys_ranking_and_the_mean_is_over_all_blocks(tasks):
    methods, r = block_ranks(tasks)
    for i, t in enumerate(tasks.values()):
        for s in range(2):
            assert np.array_equal(r[i, s], rankdata([t[m][s] for m in methods]))
    assert np.allclose(r.sum(2), 6)
    told = {c.method: c.rank for c in compare(tasks)}
    assert all(math.isclose(told[m], r[:, :, k].mean()) for k, m in enumerate(methods))


@settings(max_examples=40, deadline=None)
@given(tables)
def test_ranks_do_not_see_the_scale_of_a_task(tasks):
    again = {t: {m: [math.exp(3 * v) for v in x] for m, x in runs.items()} for t, runs in tasks.items()}
    assert compare(again) == compare(tasks)


def test_only_methods_of_every_task_and_seeds_of_every_method_count():
    methods, r = block_ranks({"t": dict(a=[1, 2, 3], b=[2, 1, 0]), "u": dict(b=[1, 1], a=[2, 2], c=[0, 0])})
    assert methods == ["a", "b"] and r.shape == (2, 2, 2)


# ---- doubt
@settings(max_examples=60, deadline=None)
@given(tables)
def test_an_interval_with_zero_is_never_behind_and_never_makes_a_winner(tasks):
    told = compare(tasks)
    assert told[0].verdict == "best" and told[0].low == told[0].high == 0
    assert all(a.rank <= b.rank for a, b in zip(told, told[1:], strict=False))
    for c in told[1:]:
        assert c.low <= c.high
        assert (c.verdict == "behind") == (c.low > 0 and 2 * len(tasks) >= chooser.ENOUGH)
    a = answer(Situation("minimise", "continuous", tasks, "x"))
    if any(c.low <= 0 for c in told[1:]):
        assert a.verdict != "best"


def test_equal_methods_are_not_told_apart():
    told = compare({"t": dict(a=[1] * 20, b=[1] * 20)})
    assert [c.verdict for c in told] == ["best", "not told apart"] and told[1].high == 0


@pytest.mark.parametrize("blocks, word", [(3, "too few runs"), (5, "too few runs"), (6, "best")])
def test_few_runs_tell_nothing_even_where_all_agree(blocks, word):
    a = answer(Situation("minimise", "continuous", {"t": dict(a=[0] * blocks, b=[1] * blocks)}, "x"))
    assert a.verdict == word and a.candidates[1].low == 1
    assert a.equals == ([] if word == "best" else ["b"])


def test_one_among_many_that_is_not_told_apart_spoils_the_win():
    tasks = {"t": dict(a=[0] * 10, b=[0, 1] * 5, c=[9] * 10)}
    assert answer(Situation("minimise", "continuous", tasks, "x")).verdict == "best"
    tasks["t"]["b"] = [0] * 9 + [1]
    a = answer(Situation("minimise", "continuous", tasks, "x"))
    assert a.verdict == "not told apart" and a.equals == ["b"] and a.runner_up.method == "b"


def test_tasks_are_drawn_whole():
    "Fifty seeds of one task say nothing about the other."
    one = {"t": dict(a=[0] * 50, b=[1] * 50)}
    two = one | {"u": dict(a=[2] * 50, b=[1] * 49 + [3])}
    assert compare(one)[1].verdict == "behind"
    told = compare(two)
    assert told[1].verdict == "not told apart" and told[1].low < -0.5 and told[1].high > 0.5


def test_seeds_are_drawn_within_a_task():
    told = compare({"t": dict(a=[0] * 9 + [1] * 3, b=[1] * 9 + [0] * 3)})
    again = np.random.default_rng(5).choice([1] * 9 + [-1] * 3, (4000, 12)).mean(1)
    assert told[1].low == pytest.approx(np.quantile(again, 0.025), abs=0.1)


def test_comparing_is_repeatable_and_reads_no_global_randomness():
    tasks = {"t": dict(a=[0, 1, 0, 1, 0, 0], b=[1, 0, 1, 0, 1, 1])}
    before = np.random.get_state()[1].copy()
    assert compare(tasks) == compare(tasks) and (np.random.get_state()[1] == before).all()


# ---- the records
@pytest.fixture(scope="module")
def known():
    return situations()


def test_every_record_is_read_and_every_kind_is_known(known):
    assert {s.source for s in known} == set(chooser.READERS)
    assert all(s.kind in chooser.KINDS[s.goal] for s in known)
    for s in known:
        methods, r = block_ranks(s.tasks)
        assert len(methods) > 1 and all(set(t) == set(methods) for t in s.tasks.values()), s.source


def test_scores_are_lower_for_the_better(known):
    "Random search, or doing nothing, is never the method recommended."
    for s in known:
        a = answer(s)
        assert a.method not in ("random", "no training", "uniform"), chooser.where(s)


def test_a_situation_of_the_broad_record_is_its_rows(known):
    rows = json.loads((RESULTS / "auto_cpu.json").read_text())["rows"]
    s = next(s for s in known if s.source == "auto_cpu" and s.dims == (20,) and s.budget == 200)
    told = {c.method: c.rank for c in answer(s).candidates}
    blocks = []
    for case in ("ellipsoid", "rotated ellipsoid", "rosenbrock", "rotated rastrigin"):
        here = {r["method"]: r["loss"] for r in rows if (r["case"], r["d"], r["budget"]) == (case, 20, 200)}
        blocks += [dict(zip(here, rankdata([v[k] for v in here.values()]), strict=True)) for k in range(3)]
    assert all(math.isclose(told[m], np.mean([b[m] for b in blocks])) for m in told) and len(told) == 13


def test_solved_is_solved():
    row = lambda m, v: dict(method=m, case="ellipsoid", d=5, budget=50, loss=v)
    (s,) = chooser.of_auto(dict(rows=[row("a", [1e-12, 1e-9]), row("b", [0.0, 1e-8])]))
    assert block_ranks(s.tasks)[1].tolist() == [[[1.5, 1.5], [1.5, 1.5]]]


def test_who_arrives_is_before_who_is_merely_close():
    rows = [dict(d=100, budget=9, function="f", method=m, runs=runs)
            for m, runs in (("fast", [[3, 0.5]]), ("slow", [[8, 0.1]]), ("died", [[None, 0.9]]), ("near", [[9, 1.1]]), ("far", [[None, 7.0]]))]
    (s,) = chooser.of_large(dict(rows=rows, target=1.0))
    assert block_ranks(s.tasks)[1][0, 0].tolist() == [1, 2, 3, 4, 5]


def test_a_search_that_was_given_more_tokens_gains_nothing_by_them():
    rivals = dict(long=["random", None, 100, {}], short=["bo", None, 30, {}], halved=["bo", "asha", 30, {}])
    paths = {"long 0": dict(path=[[40, 1.0]]), "short 0": dict(path=[[20, 3.0]]), "halved 0": dict(path=[[29, 1.0]])}
    whole, partial = chooser.of_tuning(dict(rivals=rivals, paths=paths, target=2.0, full=1, seeds=1))
    assert whole.tasks["language model table"] == dict(long=[math.inf], short=[math.inf])
    assert partial.tasks["language model table"]["halved"] == [29]


def test_a_search_without_the_optimum_is_last():
    found = lambda a, b: dict(result=dict(found=dict(evolution=a, random=b)))
    (s,) = chooser.of_compression(dict(rows={"exact/drop/0": found(5, None), "exact/drop/1": dict(error="killed")}))
    assert s.kind == "optimum of blocks" and s.tasks == {"blocks": dict(evolution=[5], random=[math.inf])}


# ---- the answer
def test_the_answer_carries_its_evidence():
    a = choose(d=5, budget=200)
    assert a.method in METHODS and a.situation.source == "auto_cpu" and a.situation.budget == 200
    assert a.candidates[0].method == a.method and [c.rank for c in a.candidates] == sorted(c.rank for c in a.candidates)
    assert "auto_cpu.json" in str(a) and "4 x 3 runs" in str(a) and f"{a.candidates[0].rank:.2f}" in str(a)


@pytest.mark.parametrize("asked", [dict(goal="prompt"), dict(d=10**6), dict(d=5, budget=10**9), dict(d=5, budget=50, workers=2), dict(kind="mixed", noisy=True)])
def test_what_nobody_measured_is_called_that(asked):
    a = choose(**asked)
    assert (a.method, a.verdict, a.candidates, a.equals, a.runner_up) == (None, "not measured", (), [], None)
    assert str(a).endswith("not measured")


def test_the_nearest_situation_answers_up_to_half_a_decade():
    at = lambda **k: [(a.situation.dims, a.situation.budget) for a in evidence(**k) if a.situation.source == "auto_cpu"]
    assert at(d=7, budget=60) == [((5,), 50)] and at(d=15, budget=150) == [((20,), 200)]
    assert at(d=100, budget=31_000) == [((100,), 10_000)] and at(d=100, budget=32_000) == []
    assert at(d=12, budget=50, noisy=True) == [((5, 20), 50)]  # between two dimensions is inside
    assert at(d=3100, budget=50) == [((1000,), 50)] and at(d=3200, budget=50) == []


def test_the_broadest_comparison_speaks_first():
    found = evidence(d=20, budget=10_000)
    assert [a.situation.source for a in found] == ["peers_quality_cpu", "auto_cpu", "coco_cpu"]
    assert choose(d=20, budget=10_000) == found[0]


@pytest.mark.parametrize("asked, says", [
    (dict(goal="minimize"), "goal.*minimise"), (dict(kind="mixd"), "kind.*mixed"), (dict(goal="tune", kind="mixed"), "kind"),
    (dict(d=0), "d: 0"), (dict(budget=0), "budget: 0"), (dict(workers=0), "workers: 0")])
def test_wrong_questions_name_what_is_allowed(asked, says):
    with pytest.raises(ValueError, match=says):
        choose(**asked)


def test_a_folder_without_records_measured_nothing(tmp_path):
    assert situations(tmp_path) == [] and choose(d=5, budget=50, folder=tmp_path).verdict == "not measured"
    with pytest.raises(FileNotFoundError, match="folder.*allowed"):
        situations(tmp_path / "none")


def test_a_record_alone_is_enough(tmp_path):
    (tmp_path / "auto_cpu.json").write_text((RESULTS / "auto_cpu.json").read_text())
    assert {s.source for s in situations(tmp_path)} == {"auto_cpu"}
    assert choose("compress", folder=tmp_path).verdict == "not measured"


# ---- auto, and the table
def test_autos_choice_is_judged_like_everybody():
    word = dict(bo=[0] * 9, snes=[2] * 9, es=[0, 2] * 4 + [0])
    a = answer(Situation("minimise", "continuous", {"t": word}, "x", (5, 100), 50))
    assert chooser.auto_picks(a) == {"bo": ([5], "best"), "snes": ([100], "behind")}
    assert chooser.auto_says(a) == "bo (d = 5): best; snes (d = 100): behind"
    mixed = answer(Situation("minimise", "mixed", {"t": word}, "x", (24,), 1000))
    assert chooser.auto_picks(mixed) == {"cmaes": ([24], "not among them")}
    assert chooser.auto_says(answer(Situation("tune", "whole trainings", {"t": word}, "x", (5,), 50))) == ""


def test_noise_is_told_to_auto():
    asked = []
    rule, chooser.auto_rule = chooser.auto_rule, lambda *a: asked.append(a) or rule(*a)
    try:
        for noisy, kind in ((True, "continuous"), (False, "conditional")):
            chooser.auto_picks(answer(Situation("minimise", kind, {"t": dict(a=[1], b=[2])}, "x", (7,), 60, noisy)))
    finally:
        chooser.auto_rule = rule
    assert asked == [(7, 60, True, False), (7, 60, False, True)]


def test_the_table_says_what_the_answers_say(known):
    rows = chooser.decision_rows(known)
    assert len(rows) == len(known)
    for r, s in zip(rows, known, strict=True):
        a = answer(s)
        assert r["method"] == a.method and r["record"] == s.source and r["mean rank"].endswith(f" of {len(a.candidates)}")
        assert (r["not told apart from"] == "too few runs") == (a.verdict == "too few runs")
        behind = [c for c in a.candidates if c.verdict == "behind"]
        assert r["first behind"] == (f"{behind[0].method} [{behind[0].low:.2f}, {behind[0].high:.2f}]" if behind else "nobody")
