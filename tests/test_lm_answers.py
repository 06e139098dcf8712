"Counting right answers: against literal counts and a peer; hostile texts; rewards that fail; collapse."
import math
import threading
import time
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score

from gfopt.lm.answers import (
    Judge,
    accuracy,
    exact_match,
    f1,
    same_pairs,
    sums,
    verified,
)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 30), st.integers(1, 4), st.integers(0, 9999))
def test_f1_and_accuracy_are_those_of_scikit_learn(rows, classes, seed):
    rng = np.random.default_rng(seed)
    y, said = rng.integers(classes, size=rows), rng.integers(classes, size=(3, rows))
    ours = f1(torch.tensor(said), torch.tensor(y), classes + 2)
    assert np.allclose(ours, [f1_score(y, s, average="macro", zero_division=0) for s in said])
    assert np.allclose(accuracy(torch.tensor(said), torch.tensor(y)), (said == y).mean(1))


def test_shapes_of_a_population():
    said, y = torch.zeros(4, 5, 7, dtype=torch.long), torch.zeros(7, dtype=torch.long)
    assert accuracy(said, y).shape == f1(said, y, 2).shape == (4, 5) and f1(said, y, 2).min() == 1


def test_exact_match():
    assert exact_match(["a  b\n", b"a b", "ab", ""], ["a b", "a b", "a b", ""]).tolist() == [1, 1, 0, 1]
    with pytest.raises(ValueError, match="said: 1 texts for 2"): exact_match(["a"], ["a", "b"])


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**9), st.integers(0, 10**9), st.integers(-3, 3))
def test_the_verifier_knows_arithmetic(a, b, off):
    assert verified(f"{a}+{b}={max(a + b + off, 0)}\nrest") == (max(a + b + off, 0) == a + b)


@pytest.mark.parametrize("text", ["", "1+1=2", "1+1=2 \n", " 1+1=2\n", "1+1=+2\n", "-1+3=2\n", "1 + 1=2\n", "1+1=2\r\n", "1+1==2\n", "٣+٤=٧\n", b"\xff\xfe",
                                  "1+1=2+0\n", "1" * 10**5 + "+0=" + "1" * 10**5 + "\n", "\ud800", "1+1=3\n1+1=2\n", "1_0+1=11\n"])
def test_what_is_not_a_true_line(text):
    assert verified(text) is False
    assert verified("01+001=0002\n" + (text if isinstance(text, str) else "")) is True


def test_sums_are_dealt_once():
    train, judged = sums(12, held_out=0.25, seed=3)
    assert len(judged) == 36 and len(set(train + judged)) == 144 and all(map(verified, train + judged))
    assert {len(x) for x in train + judged} == {len("07+11=18\n")}
    assert sums(12, 0.25, 3) == (train, judged) != sums(12, 0.25, 4) and sums(5, 0)[1] == []
    state = torch.get_rng_state()
    sums(5)
    assert torch.equal(state, torch.get_rng_state())
    for bad in (dict(limit=1), dict(limit=5, held_out=1.0), dict(limit=5, held_out=-0.1)):
        with pytest.raises(ValueError, match="limit, held_out"): sums(**bad)


def test_failures_have_the_worst_rank():
    def reward(text):
        if text == "raise": raise KeyError(text)
        if text == "slow": time.sleep(3)
        return {"nan": math.nan, "inf": math.inf, "low": -9.0, "none": None, "tensor": torch.tensor(0.25)}.get(text, 0.5)
    judge = Judge(reward, worst=-1.0, seconds=0.3)
    assert judge(["raise", "slow", "nan", "inf", "low", "none", "tensor", "x"]).tolist() == [-1, -1, -1, -1, -1, -1, 0.25, 0.5]
    assert judge.failures == {"exception": 2, "timeout": 1, "not finite": 2} and judge.judged == 8
    assert isinstance(judge.error, TypeError)
    assert Judge(lambda t: 1 / 0)(["a"]).tolist() == [0.0]


def test_an_interrupt_is_no_failure():
    def stop(text): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): Judge(stop)(["a"])


def test_no_thread_without_a_limit_and_late_ones_are_daemons():
    names = []
    Judge(lambda t: names.append(threading.current_thread().name) or 1.0)(["a"])
    assert names == ["MainThread"]
    Judge(lambda t: names.append(threading.current_thread().daemon) or 1.0, seconds=5)(["a"])
    assert names[1] is True


def test_collapse_is_counted_and_told_once():
    assert same_pairs(list("aabb"), 4) == 1 and same_pairs(list("abab"), 4) == 0 and same_pairs(list("abab") + list("abba"), 4) == 0.5
    judge = Judge(len)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        judge(list("abcd"), members=4), judge(list("aabc"), members=4)
        assert not told
        judge(list("aabb"), members=4), judge(list("aabb"), members=4), judge(list("aabb"))
    assert judge.same == [0, 0.5, 1, 1] and [str(w.message)[:18] for w in told] == ["100% of the pairs "]
    for texts, members in ((["a"] * 3, 3), (["a"] * 5, 2), ([], 2), (["a"], 0)):
        with pytest.raises(ValueError, match="members"): same_pairs(texts, members)


def test_settings_are_named():
    for bad, kind in ((dict(reward=3), TypeError), (dict(reward=len, worst=math.nan), ValueError), (dict(reward=len, seconds=0), ValueError)):
        with pytest.raises(kind, match=list(bad)[-1]): Judge(**bad)
