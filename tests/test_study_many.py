"""One journal, many processes: leases, turns, take-over, kill -9; and what a study brings along from another."""
import hashlib
import json
import multiprocessing as mp
import os
import shutil
import signal
import subprocess
import time
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gfopt.journal import Journal, read_journal, started
from gfopt.space import Box, Categorical, Integer, Real, Space
from gfopt.study import Study, minimize

SPACE = Space(lr=Real(1e-4, 1.0, log=True), depth=Integer(1, 8), act=Categorical(["relu", "gelu"]))
GUESS = dict(lr=0.01, depth=4, act="gelu")

# real processes, each with a number of its own, forked from a clean server that has torch already
PROCESS = mp.get_context("forkserver")
PROCESS.set_forkserver_preload(["gfopt.study", "gfopt.bayes.bayesopt", "gfopt.search.genetic"])


def loss(p):
    return (np.log10(p["lr"]) + 2) ** 2 + 0.1 * abs(p["depth"] - 5) + (p["act"] == "relu") * 0.3


def state(study):
    "All that a study knows, in one number."
    told = [(t.id, str(t.params), t.state, t.value, t.reason, t.extra, t.reports, t.enqueued, t.added) for t in study.trials]
    return hashlib.sha256(repr((plain(study.optimizer.state_dict()), told)).encode()).hexdigest()


def plain(x):
    if isinstance(x, torch.Tensor):
        return x.tolist()
    if isinstance(x, dict):
        return {k: plain(v) for k, v in x.items()}
    return [plain(v) for v in x] if isinstance(x, (list, tuple)) else x


def events(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return read_journal(path)[1]


# ---------------------------------------------------------------- many processes
def work(path, log, budget):
    def f(p):
        with open(log, "a") as file:
            file.write(f"{os.getpid()} {p['lr']!r}\n")  # no two of its points are alike in this coordinate
        time.sleep(0.002 + 0.006 * p["lr"])
        return loss(p)

    with Study(SPACE, "cmaes", journal=path, population=10) as study:
        study.enqueue(GUESS)
        study.optimize(f, budget, progress=False)


def test_sixteen_processes_of_which_some_are_killed_lose_and_duplicate_nothing(tmp_path):
    path, log, budget, rng = tmp_path / "run.jsonl", tmp_path / "log", 120, np.random.default_rng(0)
    crew = [PROCESS.Process(target=work, args=(path, log, budget)) for _ in range(16)]
    for p in crew:
        p.start()
    victims = list(rng.choice(crew, 6, replace=False))
    marks = sorted(rng.integers(5, 100, 6))
    while victims and any(p.is_alive() for p in crew):
        if path.exists() and path.read_bytes().count(b'"tell"') >= marks[0]:
            victims.pop().kill()
            marks.pop(0)
        time.sleep(0.001)
    for p in crew:
        p.join(300)
    killed = {p.pid for p in crew if p.exitcode == -signal.SIGKILL}
    assert len(killed) >= 4 and all(p.exitcode in (0, -signal.SIGKILL) for p in crew)
    work(path, log, budget)  # what died too late for anybody to take it over
    told = [e for e in events(path) if "tell" in e]
    asked = [e for e in events(path) if "ask" in e]
    assert [e["ask"] for e in asked] == list(range(budget)) and sorted(e["tell"] for e in told) == list(range(budget))
    assert all(e["value"] == loss(asked[e["tell"]]["params"]) for e in told)
    assert [e["params"] for e in asked if e.get("enqueued")] == [GUESS]
    begun = {}
    for line in log.read_text().splitlines():
        pid, lr = line.split()
        begun.setdefault(lr, []).append(int(pid))
    assert len(begun) == budget == len({json.dumps(e["z"]) for e in asked})
    for who in begun.values():  # twice only where the first ones died over it
        assert set(who[:-1]) <= killed and len(set(who)) == len(who)
    assert len({who[-1] for who in begun.values()}) > 8 and not path.with_name("run.jsonl.leases").exists()
    assert Study(SPACE, "cmaes", journal=path, population=10).result().nfev == budget


OPS = st.lists(st.tuples(st.integers(0, 2), st.sampled_from(["ask", "ask", "tell", "tell", "fail", "back", "reopen", "add"]), st.integers(0, 9)), max_size=25)


@settings(max_examples=25, deadline=None)
@given(OPS, st.sampled_from(["ga", "random"]))
def test_every_study_of_a_journal_is_in_the_same_state(tmp_path_factory, ops, method):
    path = tmp_path_factory.mktemp("s") / "run.jsonl"
    new = lambda: Study(SPACE, method, journal=path, **(dict(population=4) if method == "ga" else {}))  # noqa: E731
    crew, hands, told = [new() for _ in range(3)], [[], [], []], {}
    for who, what, i in ops:
        study, hand = crew[who], hands[who]
        if what == "ask":
            t = study.ask()
            assert t.id not in told and not any(t.id == u.id for h in hands for u in h)
            hand.append(t)
        elif what == "add":
            study.add(GUESS | dict(depth=1 + i % 8), i)
        elif what == "reopen":
            study.close()
            crew[who], hands[who] = new(), []
        elif hand:
            t = hand.pop(i % len(hand))
            told[t.id] = what
            study.tell(t, i) if what == "tell" else study.fail(t, "no") if what == "fail" else study.give_back([t])
            if what == "back":
                del told[t.id]
    whole = new()
    assert len({state(s.refresh()) for s in crew + [whole]}) == 1
    assert {t.id for t in whole.trials if not t.added and t.state != "running"} == told.keys()
    held = {t.id for h in hands for t in h}
    assert {t.id for t in whole.unfinished()} == {t.id for t in whole.trials if t.state == "running"} - held


def ask_and_wait(path, say):
    t = Study(SPACE, "random", journal=path).ask()
    say.send((t.id, t.params))
    say.recv()


def test_a_question_is_taken_over_when_its_owner_is_dead_and_not_before(tmp_path):
    path, (here, there) = tmp_path / "run.jsonl", PROCESS.Pipe()
    other = PROCESS.Process(target=ask_and_wait, args=(path, there))
    other.start()
    assert here.poll(300)
    first, params = here.recv()
    with Study(SPACE, "random", journal=path) as study:
        assert study.ask().id == first + 1  # the owner lives
        os.kill(other.pid, signal.SIGKILL)
        other.join()
        trial = study.ask()
        assert (trial.id, trial.params) == (first, params) and study.ask().id == first + 2
        with Study(SPACE, "random", journal=path) as third:
            assert third.ask().id == first + 3  # the new owner lives
        study.tell(trial, 1.0)


def test_a_process_number_used_again_is_not_the_owner(tmp_path):
    path = tmp_path / "run.jsonl"
    study = Study(SPACE, "random", journal=path)
    study.ask()
    other = Study(SPACE, "random", journal=path)
    leases = path.with_name("run.jsonl.leases")
    pid, birth, number = leases.read_text().split()
    assert birth == started(os.getpid()) and not other.unfinished()
    for forged, free in ((f"{os.getppid()} {birth}1", True), (f"{os.getppid()} {started(os.getppid())}", False), ("", True), ("12", True)):
        leases.write_text((forged + (f" {number}" if " " in forged else "")).ljust(63) + "\n")
        assert [t.id for t in other.unfinished()] == ([0] if free else [])


def test_a_zombie_is_dead():
    child = subprocess.Popen(["sleep", "60"])
    assert started(child.pid) not in (None, started(os.getpid()))
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert started(child.pid) is None
    child.wait()
    assert started(child.pid) is None


def test_started_without_proc(monkeypatch):
    if not shutil.which("ps"): pytest.skip("no ps here")
    monkeypatch.setattr(os.path, "exists", lambda path: False)
    assert started(os.getpid()) == started(os.getpid()) and len(started(os.getpid())) < 40 and started(2**22 + 1) is None


def test_what_another_has_pending_is_conditioned_on(tmp_path):
    a, b = (Study(SPACE, "bo", journal=tmp_path / "run.jsonl", initial=4) for _ in range(2))
    one = Study(SPACE, "bo", initial=4)
    for s in (a, one):
        s.optimize(loss, 6, progress=False)
    got = [s.ask().params for s in (a, b, b, a)]
    assert got == [one.ask().params for _ in range(4)] and len({str(p) for p in got}) == 4
    assert len(a.refresh().optimizer.pending_z) == 4


def test_a_guess_is_asked_once_by_however_many(tmp_path):
    crew = [Study(SPACE, "random", journal=tmp_path / "run.jsonl") for _ in range(3)]
    for s in crew:
        s.enqueue(GUESS)
        s.enqueue(GUESS)
    assert [s.ask().enqueued for s in crew] == [True, False, False] and crew[0].ask().params != GUESS


def test_a_target_that_another_has_reached_is_reached(tmp_path):
    a, b = (Study(SPACE, "random", journal=tmp_path / "run.jsonl") for _ in range(2))
    calls = []

    def f(p):
        calls.append(p)
        if len(calls) == 4:
            a.tell(a.ask(), -5.0)
        return 1.0

    assert b.optimize(f, 50, target=-4.0, progress=False).nfev == 5 == len(calls) + 1
    assert b.optimize(f, 50, target=-4.0, progress=False).nfev == 5 and b.best.value == -5


def test_a_budget_is_filled_once(tmp_path):
    a, b = (Study(SPACE, "random", journal=tmp_path / "run.jsonl") for _ in range(2))
    inner = lambda p: b.optimize(loss, 10, progress=False) and 1.0  # noqa: E731
    assert a.optimize(inner, 10, progress=False).nfev == 10 and len(a.trials) == 10
    for s in (a, b):
        s.close()


# ---------------------------------------------------------------- interrupts, full disks, edited files
def test_ctrl_c_gives_back_and_the_same_study_goes_on(tmp_path):
    calls = []

    def f(p):
        calls.append(p)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return loss(p)

    for journal in (None, tmp_path / "run.jsonl"):
        calls.clear()
        study = Study(SPACE, "ga", journal=journal, population=5)
        assert study.optimize(f, 20, progress=False).nfev == 6
        r = study.optimize(f, 20, progress=False)
        assert r.x_iters == minimize(loss, SPACE, "ga", 20, population=5, progress=False).x_iters
        assert calls[6] == calls[7] and len(calls) == 21


def test_what_was_left_at_the_very_end_is_evaluated(tmp_path):
    calls = []

    def f(p):
        calls.append(p)
        if len(calls) in (4, 5):
            raise KeyboardInterrupt
        return loss(p)

    for journal in (None, tmp_path / "run.jsonl"):
        calls.clear()
        study = Study(SPACE, "random", journal=journal)
        assert [study.optimize(f, 4, progress=False).nfev for _ in range(2)] == [3, 3]
        if journal:
            study.close()
            study = Study(SPACE, "random", journal=journal)
        assert study.optimize(f, 4, progress=False).nfev == 4 and len(study.trials) == 4 and len(calls) == 6


def test_ctrl_c_waits_for_the_end_of_a_question(tmp_path, monkeypatch):
    study = Study(SPACE, "random", journal=tmp_path / "run.jsonl")
    ask = study.optimizer.ask

    def slow(n):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.001)
        return ask(n)

    monkeypatch.setattr(study.optimizer, "ask", slow)
    with pytest.raises(KeyboardInterrupt):
        study.ask()
    assert len(study.trials) == 1 and [e["ask"] for e in events(tmp_path / "run.jsonl")] == [0]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    study.close()
    with Study(SPACE, "random", journal=tmp_path / "run.jsonl") as again:
        assert again.ask().params == study.trials[0].params


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    study = Study(SPACE, "random", journal=tmp_path / "run.jsonl")
    t, write = study.ask(), Journal.write

    def full(self, events, sync):
        self._file.write(b'{"half": ')
        raise OSError("No space left on device")

    monkeypatch.setattr(Journal, "write", full)
    for act in (lambda: study.tell(t, 1.0), study.ask, lambda: study.add(GUESS, 1.0)):
        with pytest.raises(OSError, match="No space"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            act()
    assert t.state == "running" and len(study.trials) == 1
    monkeypatch.setattr(Journal, "write", write)
    with pytest.warns(UserWarning, match="torn"):
        study.tell(t, 1.0)
    assert study.ask().id == 1
    study.close()
    with Study(SPACE, "random", journal=tmp_path / "run.jsonl") as again:
        assert again.best.value == 1.0 and again.ask().id == 1


class Short:
    "A file that takes only the beginning."

    def write(self, text):
        return len(text) - 1


def test_a_short_write_is_an_error(tmp_path):
    journal = Journal(tmp_path / "run.jsonl", {})
    journal._file = Short()
    with pytest.raises(OSError, match="12 of 13 bytes"):
        journal.write([{"ask": 1234}], sync=False)


def test_a_journal_that_was_cut_edited_or_closed_is_refused(tmp_path):
    path = tmp_path / "run.jsonl"
    study = Study(SPACE, "random", journal=path)
    study.optimize(loss, 4, progress=False)
    lines = path.read_bytes().splitlines(True)
    path.write_bytes(b"".join(lines[:-1]))
    with pytest.raises(ValueError, match="allowed: a journal that only grows"):
        study.ask()
    for gone, words in (([3], "answer 1 has no open question"), ([1, 2], "question 1 follows 0 others")):
        path.write_bytes(b"".join(line for i, line in enumerate(lines) if i not in gone))
        with pytest.raises(ValueError, match=words):
            Study(SPACE, "random", journal=path)
    path.write_bytes(b"".join(lines + lines[-1:]))
    with pytest.raises(ValueError, match="answer 3 has no open question"):
        Study(SPACE, "random", journal=path)
    path.write_bytes(b"".join(lines))
    study.close()
    study.close()
    assert study.best.value == min(t.value for t in study.trials)
    with pytest.raises(ValueError, match="is closed"):
        study.ask()


OLD = """{"gfopt":1,"space":{"box":{"low":[0.0],"high":[1.0],"x0":[0.5],"sigma0":[0.25],"dtype":"float64"}},"method":"random","settings":{},"seed":3,"maximize":false}
{"ask":0,"z":[0.25]}
{"ask":1,"z":[0.5],"enqueued":true}
{"tell":1,"value":0.125,"cost":7,"reports":[[1,0.5],[2,0.25]]}
"""


def test_a_journal_of_the_first_format_opens(tmp_path):
    path = tmp_path / "run.jsonl"
    path.write_text(OLD)
    (tmp_path / "run.jsonl.lock").write_text("4711")  # what its dead writer left
    with Study(Box(0, 1, 1), "random", 3, path) as study:
        assert study.best.value == 0.125 and study.best.extra == dict(cost=7) and study.best.reports == {1: 0.5, 2: 0.25}
        t = study.ask()
        assert t.id == 0 and t.z.tolist() == [0.25] and study.ask().id == 2
    assert path.read_text().startswith(OLD)


# ---------------------------------------------------------------- kill -9 at random moments
LENGTH = dict(ga=40, bo=14)  # evaluations


def in_step(path, method):
    minimize(lambda p: time.sleep(0.0005) or loss(p), SPACE, method, LENGTH[method], journal=path, progress=False)


def out_of_step(path, method, log):
    study = Study(SPACE, method, journal=path)

    def note(study, trial):
        with open(log, "a") as file:
            file.write(f"{study.journal._lines} {state(study)}\n")

    study.optimize(lambda p: time.sleep(0.002 * p["lr"]) or loss(p), LENGTH[method], 4, sync=False, callback=note, progress=False)


def killed(target, path, size, rng, *args):
    "Run it until the journal has a random size and kill it; whether there is something left to do."
    p = PROCESS.Process(target=target, args=(path, *args))
    p.start()
    now = path.stat().st_size if path.exists() else 0
    mark = rng.uniform(now, max(now, size))
    while p.is_alive() and (not path.exists() or path.stat().st_size < mark):
        time.sleep(0.0003)
    time.sleep(rng.uniform(0, 0.002))
    p.kill()
    p.join()
    assert p.exitcode in (0, -signal.SIGKILL)
    return not path.exists() or path.read_bytes().count(b'"tell"') < LENGTH[args[0]]


ON_REQUEST = pytest.mark.skipif(not os.environ.get("GFOPT_SLOW"), reason="GFOPT_SLOW=1 runs it")
TIMES = [pytest.param(12, id="12"), pytest.param(50, id="50", marks=[pytest.mark.slow, ON_REQUEST])]


@pytest.mark.parametrize("times", TIMES)
def test_kill_9_in_step_is_bit_equal(tmp_path, times):
    rng, n = np.random.default_rng(times), 0
    for method in ("bo", "ga"):
        whole = tmp_path / f"{method}.jsonl"
        in_step(whole, method)
        want, run = whole.read_bytes(), 0
        while n < times * (1 if method == "ga" else 0.25):
            path, run = tmp_path / f"{method}{run}.jsonl", run + 1
            while killed(in_step, path, len(want), rng, method):
                n += 1
                left = path.read_bytes() if path.exists() else b""
                assert want.startswith(left[: left.rfind(b"\n") + 1])
            assert path.read_bytes() == want


@pytest.mark.parametrize("times", TIMES)
def test_kill_9_out_of_step_leaves_the_state_of_the_dead(tmp_path, times):
    rng, n = np.random.default_rng(times), 0
    while n < times:
        method = "bo" if n < times / 4 else "ga"
        path, log = tmp_path / f"{n}.jsonl", tmp_path / f"{n}.log"
        while killed(out_of_step, path, 130 * LENGTH[method], rng, method, log) and n < times:
            n += 1
            if not log.exists() or not (noted := [x for x in log.read_text().splitlines() if len(x.split()) == 2 and len(x.split()[1]) == 64]):
                continue
            lines, dead = noted[-1].split()
            copy = tmp_path / "copy.jsonl"
            copy.write_bytes(b"".join(path.read_bytes().splitlines(True)[: int(lines)]))
            with Study(SPACE, method, journal=copy) as again:
                assert state(again) == dead
                left = {t.id: t.params for t in again.trials if t.state == "running"}
                assert {t.id: t.params for t in [again.ask() for _ in left]} == left
            copy.unlink()
    told = [e["tell"] for e in events(path) if "tell" in e]
    assert len(set(told)) == len(told)


# ---------------------------------------------------------------- what others have found
def test_warm_start_from_a_study_and_from_its_journal(tmp_path):
    def moody(p):
        return float("nan") if p["act"] == "relu" else dict(value=loss(p), violations=[p["depth"] - 7], cost=3)

    source = Study(SPACE, "random", 5, tmp_path / "a.jsonl")
    source.optimize(moody, 12, progress=False)
    asked = source.ask()  # not answered: nothing to learn from
    told = [(t.params, t.state, t.value, t.reason, t.extra) for t in source.trials[:-1]]
    assert {t[1] for t in told} == {"done", "failed"} and asked.id == 12
    for known in (source, tmp_path / "a.jsonl"):
        for method in ("bo", "ga"):
            study = Study(SPACE, method)
            assert study.warm_start(known) == 12 and study.warm_start(known) == 0
            assert [(t.params, t.state, t.value, t.reason, t.extra) for t in study.trials] == told
            assert study.best.value == source.best.value == study.optimizer.best[1] and study.best.added
            assert (len(study.optimizer.own_state()["y"]) == 12) if method == "bo" else study.optimizer.g == 0
    source.close()


def test_warm_started_studies_resume_bit_equal_and_keep_their_budget(tmp_path):
    source = Study(SPACE, "random", 5)
    source.optimize(loss, 9, progress=False)

    def run(path, budget):
        with Study(SPACE, "bo", journal=path) as study:
            study.warm_start(source)
            study.enqueue(GUESS)
            r = study.optimize(loss, budget, progress=False)
            assert r.nfev == budget and len(r.x_iters) == len(r.func_vals) == budget + 9
            assert study.explain(study.trials[0])["chosen_by"] == "somebody else"

    run(tmp_path / "a.jsonl", 6)
    for cut in (3, 10, 14):
        path = tmp_path / f"{cut}.jsonl"
        path.write_bytes(b"".join((tmp_path / "a.jsonl").read_bytes().splitlines(True)[:cut]))
        run(path, 6)
        assert path.read_bytes() == (tmp_path / "a.jsonl").read_bytes()


@pytest.mark.parametrize("space,kw,words", [
    (Space(SPACE.parameters | dict(depth=Integer(1, 9))), {}, "its depth is .*'high': 8.*here it is .*'high': 9"),
    (Space(lr=SPACE.parameters["lr"]), {}, "its depth is .*here it is missing"),
    (Space({k: SPACE.parameters[k] for k in ("depth", "act", "lr")}), {}, "in another order"),
    (Box(0, 1, 3), {}, "its space is"), (SPACE, dict(maximize=True), "its maximize is False, here it is True")])
def test_warm_start_refuses_another_search_with_what_differs(space, kw, words):
    source = Study(SPACE, "random")
    source.optimize(loss, 2, progress=False)
    study = Study(space, "random", **kw)
    with pytest.raises(ValueError, match=words):
        study.warm_start(source)
    assert not study.trials


def test_add_checks_its_point_and_takes_what_tell_takes(tmp_path):
    study = Study(Box(-1, 1, 2), "nsga2", journal=tmp_path / "run.jsonl", maximize=True)
    study.add([0.5, 0.5], (1.0, 2.0), violations=[-1.0])
    study.add([0.5, 0.5], (1.0, 2.0))
    study.add([0.5, 0.25], (1.0, float("nan")))
    assert [t.state for t in study.trials] == ["done", "failed"] and study.best is study.trials[0]
    for bad in ([2.0, 0.0], [0.0]):
        with pytest.raises(ValueError):
            study.add(bad, (1.0, 2.0))
    study.close()
    with Study(Box(-1, 1, 2), "nsga2", journal=tmp_path / "run.jsonl", maximize=True) as again:
        assert state(again) == state(study) and again.asked == again.told == 0


def test_explain_includes_what_the_method_believes():
    study = Study(SPACE, "random")
    study.optimize(loss, 3, progress=False)
    assert "belief" not in study.explain(study.trials[0])
    study.optimizer.explain = lambda z: dict(mean=float(z[0]))
    assert study.explain(study.trials[1])["belief"] == dict(mean=float(study.trials[1].z[0]))
