"Several processes: they equal one, survive the death of one, and say what does not agree."
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from finetuning import ROWS, tiny, tune
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from gfopt.lm.replay import replay, weights_hash
from gfopt.lm.workers import Workers, share

TESTS = Path(__file__).resolve().parent
SCRIPT = """
import json, os, signal, sys
from datetime import timedelta
from pathlib import Path
import torch
import torch.distributed as dist
from finetuning import ROWS, tiny, tune
from gfopt.lm.finetune import next_token
from gfopt.lm.replay import weights_hash
from gfopt.lm.workers import Workers

torch.set_num_threads(1)
rank, size, out, case = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
store = dist.FileStore(str(out / "store"), size)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=120))
workers, told = Workers(), {}

def attempt(name, **given):
    try:
        t = tune(workers=workers, **given)
        told[name] = dict(hash=weights_hash(t.model), stopped=t.stopped, steps=t.steps, best=t.best_step, history=t.history)
    except Exception as e:
        told[name] = dict(error=f"{type(e).__name__}: {e}")

if case == "equal":
    before = workers.sent
    attempt("es", chunk=2, journal=out / "es.jsonl" if rank == 0 else out / "nobody", evaluate=ROWS, every=2)
    told["bytes"] = workers.sent - before
    attempt("es more", chunk=2, steps=8, journal=out / "es.jsonl", evaluate=ROWS, every=2)
    attempt("mezo", method="mezo", directions=3)
    attempt("fzoo", method="fzoo", directions=3, batched=False)
    attempt("chunks", population=6, chunk=4)
    attempt("batched", method="fzoo")
    attempt("callback", chunk=2, callback=lambda e: rank == 0 and e["step"] == 2)
    attempt("own chunk")
    told["chunk"] = workers.settle(dict(chunk=None, population=8))["chunk"]
    attempt("nan", objective=lambda m, b: next_token(m, b) * float("nan"), chunk=2)
    attempt("other base", model=tiny(rank), chunk=2)
    attempt("other lr", chunk=2, lr=0.01 if rank else 0.02)
    if rank == 0: (out / "study").write_text('{"gfopt":1,"space":{}}')
    dist.barrier()
    attempt("no journal", chunk=2, journal=out / "es.jsonl", seed=5)
    def astray(event):
        if rank == 1 and event["step"] == 3:
            with torch.no_grad(): event["model"].model.norm.weight[0] += 1
    attempt("astray", chunk=2, callback=astray, steps=3)
elif case == "dies":
    def objective(model, batch):
        if rank == 1 and os.environ.get("DIES") and sum("y" in e for e in tuned_events()) == 3: os.kill(os.getpid(), signal.SIGKILL)
        return next_token(model, batch)
    def tuned_events():
        p = out / "run.jsonl"
        return [json.loads(x) for x in p.read_bytes().splitlines()[1:]] if p.exists() else []
    attempt("run", objective=objective, chunk=2, journal=out / "run.jsonl")
(out / f"{rank}.json").write_text(json.dumps(told))
"""


@given(count=st.integers(1, 70), chunk=st.integers(1, 20), size=st.integers(1, 9))
@examples(max_examples=60, deadline=None)
def test_shares_are_whole_chunks_of_everything(count, chunk, size):
    parts = [share(count, chunk, k, size) for k in range(size)]
    assert [p for part in parts for p in part] == list(range(count))
    assert all(part.start % chunk == 0 for part in parts if part)
    chunks = [-(-len(p) // chunk) for p in parts]
    assert max(chunks) - min(chunks) <= 1


def together(size, out, case, **environment):
    env = os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=os.pathsep.join([str(TESTS), str(TESTS.parent)]), GLOO_SOCKET_IFNAME="lo") | environment
    (out / "store").unlink(missing_ok=True)
    running = [subprocess.Popen([sys.executable, "-c", SCRIPT, str(k), str(size), str(out), case], env=env, stderr=subprocess.PIPE, text=True) for k in range(size)]
    return [(p.communicate(timeout=500)[1], p.returncode) for p in running]


def said(size, out): return [json.loads((out / f"{k}.json").read_text()) for k in range(size)]


@pytest.mark.parametrize("size", [2, 4])
def test_workers_equal_one(size, tmp_path):
    for text, code in together(size, tmp_path, "equal"):
        assert code == 0, text
    told = said(size, tmp_path)
    one = dict(es=tune(chunk=2, evaluate=ROWS, every=2), mezo=tune(method="mezo", directions=3), fzoo=tune(method="fzoo", directions=3, batched=False), chunks=tune(population=6, chunk=4),
               callback=tune(chunk=2, steps=2))
    one["es more"] = tune(chunk=2, steps=8, evaluate=ROWS, every=2)
    for name, want in one.items():
        for t in told:
            assert t[name].get("hash") == weights_hash(want.model), (name, t[name])
            assert t[name]["steps"] == want.steps and t[name]["best"] == want.best_step
    assert all(t["callback"]["stopped"] == "callback" for t in told)
    assert told[0]["es"]["history"] == told[1]["es"]["history"]
    assert weights_hash(replay(tiny(), tmp_path / "es.jsonl")) == told[0]["es more"]["hash"]
    assert not (tmp_path / "nobody").exists()
    assert told[0]["bytes"] <= 6 * 16 * (8 / size) + 64  # at most 16 bytes for each member and step, beside the two comparisons
    assert told[0]["chunk"] == dict([(2, 4), (4, 2)])[size]
    refused(told, "batched", "batched: True; allowed with several workers: False")
    refused(told, "nan", "none of the 8 losses is finite")
    refused(told, "other base", "model, data or settings differ between worker")
    refused(told, "other lr", "model, data or settings differ between worker")
    refused(told, "no journal", "its seed is 0, asked for is 5")
    refused(told, "astray", "the weights at the end differ between worker")


def refused(told, name, text):
    for t in told:
        assert text in t[name].get("error", ""), (name, t[name])


def test_a_death_costs_one_step(tmp_path):
    first = together(2, tmp_path, "dies", DIES="1")
    assert first[1][1] == -9
    recorded = (tmp_path / "run.jsonl").read_bytes()
    assert recorded.count(b'{"step"') == 3 and "RuntimeError" in said(1, tmp_path)[0]["run"]["error"]
    for text, code in together(2, tmp_path, "dies"):
        assert code == 0, text
    want = weights_hash(tune(chunk=2).model)
    assert [t["run"]["hash"] for t in said(2, tmp_path)] == [want, want]
    assert (tmp_path / "run.jsonl").read_bytes().startswith(recorded[:-1].rsplit(b"\n", 1)[0])


def test_without_torchrun(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(RuntimeError, match="not started by torchrun"):
        Workers()


def test_a_tensor_of_shards_is_refused():
    from gfopt.lm.finetune import finetune
    model = tiny()

    class FlatParameter(torch.nn.Parameter):  # the name is what FSDP calls its own
        pass
    model.model.norm.weight = FlatParameter(torch.ones(16))
    with pytest.raises(TypeError, match="'model.norm.weight' is a shard .FlatParameter"):
        finetune(model, torch.zeros(2, 3), "next_token")
