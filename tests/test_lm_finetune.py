"finetune: the loop around a step, what it reads, what it leaves behind, and that no kill can change it."
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from finetuning import IDS, ROWS, SMALL, tiny, tune
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import (
    DataLoader,
    IterableDataset,
    SubsetRandomSampler,
    TensorDataset,
)

from gfopt.lm.evolution import LowRankES
from gfopt.lm.finetune import (
    batches,
    collate,
    find_objective,
    finetune,
    next_token,
    read_jsonl,
    rows_of_step,
)
from gfopt.lm.model import Llama, LlamaConfig, load_model, row_losses
from gfopt.lm.replay import decode, replay, weights_hash
from gfopt.lm.text import ByteTokenizer
from gfopt.lm.zeroth_order import ZerothOrder

ROOT = Path(__file__).resolve().parent.parent


@given(rows=st.integers(1, 40), batch=st.integers(1, 13), epochs=st.integers(1, 3), seed=st.integers(0, 2**64 - 1))
@settings(max_examples=30, deadline=None)
def test_every_epoch_is_a_permutation(rows, batch, epochs, seed):
    steps = math.ceil(epochs * rows / batch)
    read = np.concatenate([rows_of_step(t, batch, rows, seed) for t in range(steps)])
    for e in range(epochs):
        assert sorted(read[e * rows:(e + 1) * rows]) == list(range(rows))
    assert (np.concatenate([rows_of_step(t, batch, rows, seed, shuffle=False) for t in range(steps)]) == np.arange(steps * batch) % rows).all()


def test_order_depends_on_seed_and_epoch():
    def order(e, seed): return tuple(rows_of_step(e, 50, 50, seed))
    assert len({order(e, s) for e in range(3) for s in (0, 1, 2**63)}) == 9


def test_every_kind_of_data_is_the_same_batch(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({k: v[i].tolist() for k, v in ROWS.items()}) + "\n" for i in range(12)))

    class Rows:  # as datasets.Dataset: dicts of lists
        _fingerprint = "abc"
        def __len__(self): return 12
        def __getitem__(self, i): return {k: v[i].tolist() for k, v in ROWS.items()}

    want = batches(ROWS, 5, seed=3)
    for data in (path, str(path), Rows(), [Rows()[i] for i in range(12)]):
        for step in (0, 2, 7):
            got = batches(data, 5, seed=3).at(step)
            assert all(torch.equal(got[k], want.at(step)[k]) for k in ROWS)
    loader = DataLoader(TensorDataset(ROWS["input_ids"], ROWS["labels"]), batch_size=5, shuffle=True)
    assert torch.equal(batches(loader, seed=3).at(2)[1], want.at(2)["labels"])
    straight = DataLoader(TensorDataset(IDS), batch_size=5)
    assert torch.equal(batches(straight).at(1)[0], IDS[5:10]) and batches(straight).size == 5
    assert torch.equal(batches(IDS, 5, seed=3).at(2), IDS[rows_of_step(2, 5, 12, 3)])
    assert batches(lambda step: {"x": step}).at(4) == {"x": 4}


def test_fingerprints_tell_data_apart():
    other = {k: v.clone() for k, v in ROWS.items()}
    other["labels"][7, 3] += 1
    prints = [batches(d).fingerprint for d in (ROWS, other, {k: v[:-1] for k, v in ROWS.items()}, ROWS | dict(answer=["a"] * 12), ROWS | dict(answer=["b"] * 12))]
    assert len(set(prints)) == 5 and prints[0] == batches({k: v.clone() for k, v in ROWS.items()}).fingerprint


def test_collate_pads_and_keeps_text():
    b = collate([dict(input_ids=[1, 2, 3], labels=[2, 3, 4], answer="x", weight=0.5), dict(input_ids=[1], labels=[2], answer="y", weight=1.0)])
    assert b["input_ids"].tolist() == [[1, 2, 3], [1, 0, 0]] and b["labels"].tolist() == [[2, 3, 4], [2, -100, -100]]
    assert b["answer"] == ["x", "y"] and b["weight"].tolist() == [0.5, 1.0]


def test_rows_are_no_longer_than_the_model_reads(tmp_path):
    (tmp_path / "d.txt").write_text("a line of text\n" * 40)
    seen = []
    def lengths(model, batch): seen.append(batch["input_ids"].shape[1]); return next_token(model, batch)
    for longest, length, want in ((16, None, 16), (512, None, 128), (512, 48, 48)):
        model = Llama(LlamaConfig(257, 16, 1, 2, 1, 32, max_len=longest), seed=0)
        finetune(model, tmp_path / "d.txt", lengths, steps=1, evaluate=tmp_path / "d.txt", tokenizer=ByteTokenizer(), length=length, progress=False, batch_size=2, population=2)
        assert set(seen) == {want}
        seen.clear()
    class Other(torch.nn.Module):  # one of Hugging Face's; a model that says nothing gets 128
        def __init__(self, n): super().__init__(); self.config, self.w = SimpleNamespace(max_position_embeddings=n), torch.nn.Parameter(torch.zeros(2))
    for n, want in ((24, 24), (4096, 128), (-1, 128), (None, 128)):
        finetune(Other(n), tmp_path / "d.txt", lambda m, b: seen.append(b["input_ids"].shape[1]) or m.w.sum().expand(2), steps=1, tokenizer=ByteTokenizer(), progress=False, batch_size=2, method="mezo")
        assert set(seen) == {want}
        seen.clear()


def test_jsonl_counts_the_completion_only(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text('{"prompt": "ab", "completion": "cd", "answer": "d"}\n\n{"text": "wxyz", "answer": ""}\n')
    b = read_jsonl(path, ByteTokenizer())
    assert b["input_ids"][0].tolist() == [256, 97, 98, 99, 100] and b["labels"][0].tolist() == [-100, -100, 99, 100, 256]
    assert b["labels"][1].tolist() == [*b"wxyz", 256] and b["answer"] == ["d", ""]
    cut = read_jsonl(path, ByteTokenizer(), length=5)
    assert cut["input_ids"].shape == (2, 5)
    path.write_text('{"text": "abcdefgh"}\n')
    pieces = read_jsonl(path, ByteTokenizer(), length=4)
    assert pieces["labels"].tolist() == [[97, 98, 99, 100], [101, 102, 103, 104], [256, -100, -100, -100]] and pieces["input_ids"][1].tolist() == [100, 101, 102, 103]


def test_jsonl_with_a_tokenizer_of_hugging_face(tmp_path):
    class Tok:  # its two methods that are used
        bos_token_id, eos_token_id = None, 2
        def encode(self, text, add_special_tokens=True): return [3 + ord(c) - 97 for c in text]
    path = tmp_path / "d.jsonl"
    path.write_text('{"prompt": "ab", "completion": "cd"}\n')
    b = read_jsonl(path, Tok())
    assert b["input_ids"].tolist() == [[3, 4, 5, 6]] and b["labels"].tolist() == [[-100, 5, 6, 2]]


def test_next_token_reads_three_kinds_of_labels():
    model = tiny()
    with torch.no_grad():
        want = row_losses(model(IDS[:, :-1]), IDS[:, 1:])
        assert torch.equal(next_token(model, ROWS), want)
        for batch in (dict(input_ids=IDS), dict(input_ids=IDS, labels=IDS)):
            assert torch.allclose(next_token(model, batch), want, atol=1e-6)
        hidden = IDS.masked_fill(torch.arange(9) < 4, -100)
        assert torch.allclose(next_token(model, dict(input_ids=IDS, labels=hidden)), row_losses(model(IDS)[:, :-1], hidden[:, 1:]))


@pytest.mark.parametrize("method,extra", [("lowrank_es", {}), ("lowrank_es", dict(chunk=4, optimizer="adam")), ("mezo", dict(momentum=0.5)), ("zeroth_order", dict(directions=2)), ("fzoo", {})])
def test_it_is_the_optimiser_on_rounded_losses(method, extra):
    tuned = tune(method=method, **extra)
    model = tiny()
    opt = tuned_opt = (LowRankES(model, **dict(population=8, sigma=0.01, lr=0.01) | extra) if method == "lowrank_es" else
                       ZerothOrder(model, **(dict(lr=4e-3, sides=1, directions=4, batched=True) if method == "fzoo" else dict(lr=1e-4, directions=2)) | extra))
    for t in range(6):
        batch = batches(ROWS, 4).at(t)
        if method == "lowrank_es":
            y = opt.measure(lambda: next_token(model, opt.expand(batch))).mean(1)
            opt.update(y.float().double())
        else:
            def closure():
                y = next_token(model, opt.expand(batch))
                return y if method == "fzoo" else y.double().mean()
            y = torch.tensor(opt.measure(closure)[1])
            opt.update(y.float().tolist())
        assert torch.equal(decode([e for e in tuned.log.events if "y" in e][t]["y"]), y.float())
    assert weights_hash(model) == weights_hash(tuned.model) != weights_hash(tiny())
    assert tuned_opt is opt and tuned.steps == 6


def test_global_generators_and_modes_are_left_alone():
    model = tiny()
    model.model.layers[0].train(), model.model.norm.eval()
    flags, states = [m.training for m in model.modules()], (torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate())
    tune(model, evaluate=ROWS, every=2)
    assert flags == [m.training for m in model.modules()]
    assert torch.equal(states[0], torch.get_rng_state()) and (states[1] == np.random.get_state()[1]).all() and states[2] == random.getstate()


class Dropped(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.drop, self.modes = tiny(), torch.nn.Dropout(0.5), set()

    def forward(self, ids):
        self.modes.add(self.training)
        return self.drop(self.inner(ids))


def test_dropout_is_off():
    model = Dropped().train()
    tune(model, evaluate=ROWS, every=1, steps=2)
    assert model.modes == {False} and model.training


def test_evaluation_best_and_patience():
    seen = iter([3.0, 2.0, 2.5, 2.0, math.nan, 1.0])
    weights = {}

    def judge(model):
        value = next(seen)
        weights[value] = weights_hash(model)
        return value

    tuned = tune(steps=100, evaluate=judge, every=2, patience=3)
    assert tuned.stopped == "patience" and tuned.steps == 8 and (tuned.best_step, tuned.best_value) == (2, 2.0)
    assert [e["value"] for e in tuned.history if "eval" in e] == [3.0, 2.0, 2.5, 2.0, None]
    before = weights_hash(tuned.model)
    tuned.load_best()
    assert weights_hash(tuned.model) != before
    fresh = tune(steps=2)
    assert weights_hash(tuned.model) == weights_hash(fresh.model)


def test_evaluation_on_data_is_the_mean_over_its_rows():
    held = {k: v[:7] for k, v in ROWS.items()}
    tuned = tune(steps=3, evaluate=held, every=3)
    values = {e["eval"]: e["value"] for e in tuned.history if "eval" in e}
    with torch.no_grad():
        assert values[3] == pytest.approx(float(next_token(tuned.model, held).mean()), rel=1e-6)
        assert values[0] == pytest.approx(float(next_token(tiny(), held).mean()), rel=1e-6)


def test_what_should_stay_is_looked_at_too(tmp_path):
    "With every evaluation, on text and by next_token whatever the objective; not part of what the steps depend on."
    held = {k: v[:7] for k, v in ROWS.items()}
    twice = lambda m, b: 2 * next_token(m, b)  # noqa: E731
    tuned = tune(objective=twice, steps=3, evaluate=held, remember=held, every=2, journal=tmp_path / "j")
    looks = [e for e in tuned.history if "eval" in e]
    assert [e["eval"] for e in looks] == [0, 2, 3] and all(e["value"] == pytest.approx(2 * e["kept"], rel=1e-6) for e in looks)
    again = tune(objective=twice, steps=3, evaluate=held, remember=held, every=2, journal=tmp_path / "j")
    assert again.history == tuned.history
    without = tune(objective=twice, steps=3, evaluate=held, every=2)
    assert weights_hash(without.model) == weights_hash(tuned.model) and not any("kept" in e for e in without.history)
    values = iter([1.0, math.nan])
    by_function = tune(steps=2, evaluate=held, remember=lambda m: next(values), every=2)
    assert [e["kept"] for e in by_function.history if "eval" in e] == [1.0, None]


def test_callback_sees_every_step_and_stops():
    seen = []
    tuned = tune(steps=50, evaluate=ROWS, every=2, callback=lambda e: seen.append(e) or e["step"] == 5)
    assert [e["step"] for e in seen] == [1, 2, 3, 4, 5] and tuned.stopped == "callback" and tuned.steps == 5
    assert [e["value"] is not None for e in seen] == [False, True, False, True, False]
    assert seen[0]["y"].shape == (8,) and seen[0]["model"] is tuned.model


def test_schedule_is_recorded(tmp_path):
    def half(done): return 1.0 if done < 0.5 else 0.25
    tuned = tune(schedule=half, journal=tmp_path / "j")
    assert [e.get("lr", 1.0) for e in tuned.log.events if "y" in e] == [1, 1, 1, 0.25, 0.25, 0.25]
    assert weights_hash(replay(tiny(), tmp_path / "j")) == weights_hash(tuned.model) != weights_hash(tune().model)


@pytest.mark.parametrize("method", [*SMALL])
@pytest.mark.parametrize("cut", [0.0, 0.3, 0.7, 1.0])
def test_cut_anywhere_it_goes_on(method, cut, tmp_path):
    path, other = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    given = dict(method=method, evaluate=ROWS, every=2) | (dict(momentum=0.9) if method == "mezo" else {})
    whole = tune(journal=path, **given)
    raw = path.read_bytes()
    first = raw.index(b"\n") + 1
    other.write_bytes(raw[:int(first - 20 + cut * (len(raw) - first + 15))])
    with pytest.warns(UserWarning, match="torn") if not other.read_bytes().endswith(b"\n") else pytest.MonkeyPatch.context():
        again = tune(journal=other, **given)
    assert other.read_bytes() == raw and again.history == whole.history
    assert weights_hash(again.model) == weights_hash(whole.model) and again.best_step == whole.best_step
    assert again.best.keys() == whole.best.keys() and all(torch.equal(again.best[k], whole.best[k]) for k in whole.best)


def test_more_steps_later_are_one_run(tmp_path):
    tune(steps=3, journal=tmp_path / "j")
    more = tune(steps=6, journal=tmp_path / "j")
    assert weights_hash(more.model) == weights_hash(tune().model)
    done = tune(steps=6, journal=tmp_path / "j")
    assert done.steps == 6 and sum("end" in e for e in done.log.events) == 2
    with pytest.raises(ValueError, match="steps: 4"):
        tune(steps=4, journal=tmp_path / "j")


def test_ctrl_c_keeps_whole_steps(tmp_path):
    def press(event):
        if event["step"] == 3:
            raise KeyboardInterrupt
    tuned = tune(callback=press, journal=tmp_path / "j")
    assert tuned.stopped == "interrupted" and tuned.steps == 3
    assert weights_hash(tuned.model) == weights_hash(tune(steps=3).model)
    assert weights_hash(tune(journal=tmp_path / "j").model) == weights_hash(tune().model)


def test_ctrl_c_during_an_update_waits_for_its_end(monkeypatch):
    update = LowRankES.update

    def slow(self, losses):
        if self.steps == 2:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
        update(self, losses)

    monkeypatch.setattr(LowRankES, "update", slow)
    tuned = tune()
    assert tuned.stopped == "interrupted" and tuned.steps == 3
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    monkeypatch.undo()
    assert weights_hash(tuned.model) == weights_hash(tune(steps=3).model)


VICTIM = '''
import sys
sys.path.insert(0, sys.argv[2])
from finetuning import ROWS, tune
print("ready", flush=True)
for method in ("lowrank_es", "mezo"):
    tune(method=method, steps=30, journal=f"{sys.argv[1]}/{method}.jsonl", evaluate=ROWS, every=7)
print("done", flush=True)
'''


def test_kill_9_and_continue(tmp_path):
    rng = random.Random(0)
    environment = os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT), PYTHONWARNINGS="ignore")
    for _ in range(2):
        p = subprocess.Popen([sys.executable, "-c", VICTIM, str(tmp_path), str(ROOT / "tests")], stdout=subprocess.PIPE, text=True, env=environment)
        assert p.stdout.readline() == "ready\n"
        try:
            p.wait(rng.uniform(0.05, 0.6))
        except subprocess.TimeoutExpired:
            p.kill()
        p.wait()
        p.stdout.close()
    for method in ("lowrank_es", "mezo"):
        again = tune(method=method, steps=30, journal=tmp_path / f"{method}.jsonl", evaluate=ROWS, every=7)
        whole = tune(method=method, steps=30, evaluate=ROWS, every=7)
        assert weights_hash(again.model) == weights_hash(whole.model) and again.history == whole.history


def test_an_update_that_was_cut_off_is_done_by_the_next(tmp_path, monkeypatch):
    update = LowRankES.update
    monkeypatch.setattr(LowRankES, "update", lambda self, y: update(self, y) if self.steps < 3 else (_ for _ in ()).throw(OSError("power cut")))
    with pytest.raises(OSError, match="power cut"):
        tune(journal=tmp_path / "j")
    assert (tmp_path / "j").read_bytes().count(b'{"step"') == 4  # what was measured is not measured again
    monkeypatch.undo()
    assert weights_hash(tune(journal=tmp_path / "j").model) == weights_hash(tune().model)


def test_one_failed_member_is_not_fatal_and_all_failed_is():
    def one(model, batch):
        y = next_token(model, batch).clone()
        y[:4] = math.nan
        return y
    assert tune(objective=one, check=False).steps == 6

    def none(model, batch): return next_token(model, batch) * math.nan
    model = tiny()
    with pytest.raises(RuntimeError, match="step 0: none of the 8 losses is finite"):
        tune(model, objective=none)
    assert weights_hash(model) == weights_hash(tiny())
    calls = []

    def later(model, batch):
        calls.append(1)
        return next_token(model, batch) * (math.nan if len(calls) > 4 else 1)
    with pytest.raises(RuntimeError, match="step 1[0-9]: none of the 8 losses is finite, as in the 10 steps before"):
        tune(objective=later, steps=40)


def test_save_and_load(tmp_path):
    tuned = tune(steps=2, journal=tmp_path / "j")
    tuned.save(tmp_path / "out", ByteTokenizer())
    assert weights_hash(load_model(tmp_path / "out")) == weights_hash(tuned.model)
    assert (tmp_path / "out" / "finetune.jsonl").read_bytes() == (tmp_path / "j").read_bytes()
    assert json.loads((tmp_path / "out" / "tokenizer.json").read_text()) == {"kind": "bytes"}
    assert weights_hash(replay(tiny(), tmp_path / "out" / "finetune.jsonl")) == weights_hash(tuned.model)


def test_hugging_face_model_and_its_files(tmp_path):
    tf = pytest.importorskip("transformers")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = tf.AutoModelForCausalLM.from_config(tf.LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=True))
    model.save_pretrained(tmp_path / "base")
    data = dict(input_ids=IDS, attention_mask=torch.ones_like(IDS), labels=IDS)
    tuned = tune(model, data, steps=3, journal=tmp_path / "j")
    tuned.save(tmp_path / "out")
    load = tf.AutoModelForCausalLM.from_pretrained
    assert weights_hash(load(tmp_path / "out")) == weights_hash(tuned.model)
    assert weights_hash(replay(load(tmp_path / "base"), tmp_path / "j")) == weights_hash(tuned.model)


def test_frozen_parameters_stay_and_are_known_to_the_journal(tmp_path):
    model = tiny()
    for n, p in model.named_parameters():
        p.requires_grad_("norm" in n)
    tuned = tune(model, journal=tmp_path / "j", lr=0.1)
    moved = [n for (n, p), q in zip(tuned.model.named_parameters(), tiny().parameters()) if not torch.equal(p, q)]
    assert len(moved) == 3 and all("norm" in n for n in moved)
    assert weights_hash(replay(tiny(), tmp_path / "j")) == weights_hash(model)


def test_autocast_and_compile_inside_the_objective(tmp_path):
    def half(model, batch):
        with torch.autocast("cpu", torch.bfloat16):
            return next_token(model, batch)
    tuned = tune(objective=half, journal=tmp_path / "j")
    assert weights_hash(replay(tiny(), tmp_path / "j")) == weights_hash(tuned.model) and tuned.log.events[0]["y"] != tune(steps=1).log.events[0]["y"]
    compiled = torch.compile(tiny(), backend="eager")
    a, b = tune(compiled, method="mezo"), tune(method="mezo")
    assert weights_hash(a.model) == weights_hash(b.model)
    assert [n for n in a.log.header["trained"]] == b.log.header["trained"]


def test_objectives_by_name():
    assert find_objective("next_token") is next_token is find_objective("gfopt.lm.finetune:next_token")
    for name, match in (("nothing", "next_token"), ("no.such:thing", "cannot be found"), ("json:nothing", "cannot be found"), ("math:pi", "float"), (3, "3; allowed"), (":f", "allowed")):
        with pytest.raises(ValueError, match=match):
            find_objective(name)


class Endless(IterableDataset):
    def __iter__(self): return iter([])


@pytest.mark.parametrize("change,kind,match", [
    (dict(steps=-1), ValueError, "steps: -1"), (dict(steps=2.5), ValueError, "steps: 2.5"), (dict(every=0), ValueError, "every: 0"),
    (dict(patience=0, evaluate=ROWS), ValueError, "patience: 0"), (dict(patience=2), ValueError, "patience: needs evaluate"), (dict(remember=ROWS), ValueError, "remember: needs evaluate"), (dict(batch_size=0), ValueError, "batch_size: 0"),
    (dict(method="sgd"), ValueError, "method: 'sgd'; allowed: 'lowrank_es'"), (dict(sigmaa=1.0), TypeError, "sigmaa: no setting of 'lowrank_es'; allowed: .*sigma"),
    (dict(noise=torch.nn), TypeError, "what JSON can hold"), (dict(fitness="group"), ValueError, "fitness: 'group'"), (dict(population=7), ValueError, "population: 7"), (dict(lr=-1.0), ValueError, "lr: -1.0"),
    (dict(data=dict(a=IDS, b=IDS[:3])), ValueError, "columns of one length"), (dict(data=IDS[:0]), ValueError, "data: no rows"), (dict(data=3), TypeError, "data: int"), (dict(data={}), ValueError, "data"),
    (dict(data=DataLoader(Endless())), TypeError, "data: a DataLoader with Endless"), (dict(data=DataLoader(TensorDataset(IDS), sampler=SubsetRandomSampler([1]))), TypeError, "SubsetRandomSampler"),
    (dict(objective=lambda m, b: None), TypeError, "objective: it returned NoneType"), (dict(objective=lambda m, b: torch.zeros(3)), ValueError, r"losses of shape \(3,\); allowed"),
    (dict(objective=lambda m, b: next_token(m, b).mean().backward()), RuntimeError, "backward"), (dict(objective=lambda m, b: next_token(m, b).mean().backward(), method="mezo"), RuntimeError, "backward"),
    (dict(evaluate=lambda step: {}, data=lambda step: ROWS), (TypeError, ValueError), "float"), (dict(data="no-such-file.jsonl"), FileNotFoundError, "no-such-file"),
])
def test_bad_arguments(change, kind, match):
    model = tiny()
    with pytest.raises(kind, match=match):
        tune(model, **change)
    assert weights_hash(model) == weights_hash(tiny())


@pytest.mark.parametrize("text,match", [("nonsense\n", "line 1: 'nonsense'"), ('{"text": "a"}\n[1]\n', "line 2"), ('{"text": 5}\n', "text is 5"), ('{"prompt": "a"}\n', "completion is None"),
                                        ("\n", "no rows"), ('{"text": "a"}\n{"input_ids": [1]}\n', "row 2 has input_ids"), ('{"prompt": "' + "a" * 200 + '", "completion": "b"}\n', "allowed: length=128"), ('{"input_ids": "ab"}\n', "input_ids")])
def test_bad_jsonl(text, match, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=match):
        read_jsonl(path, ByteTokenizer())


def test_another_run_is_refused_and_the_journal_kept(tmp_path):
    path = tmp_path / "j"
    tune(journal=path, steps=2)
    kept = path.read_bytes()
    for change, match in ((dict(lr=0.5), "settings"), (dict(seed=1), "seed"), (dict(model=tiny(1)), "base"), (dict(data=IDS), "data"), (dict(method="mezo"), "method"), (dict(batch_size=3), "batch_size")):
        with pytest.raises(ValueError, match=f"its {match} is"):
            tune(**dict(journal=path, steps=2) | change)
    with pytest.raises(ValueError, match="its [a-z]+ is"):
        tune(journal=path, steps=2, objective=lambda m, b: next_token(m, b))
    assert path.read_bytes() == kept
    other = tmp_path / "study"
    other.write_text('{"gfopt":1,"space":{}}\n')
    with pytest.raises(ValueError, match="the journal of something else"):
        tune(journal=other)


def test_the_tuned_model_is_no_base(tmp_path):
    tuned = tune(journal=tmp_path / "j", steps=2)
    with pytest.raises(ValueError, match="its base is"):
        tune(tuned.model, journal=tmp_path / "j", steps=4)


def test_loss_falls():
    one = {k: v[:4] for k, v in ROWS.items()}
    for method, extra in (("lowrank_es", dict(lr=0.02, sigma=0.02, population=32)), ("mezo", dict(lr=0.01)), ("fzoo", dict(lr=0.02))):
        values = [e["value"] for e in tune(data=one, method=method, steps=40, evaluate=one, every=40, **extra).history if "eval" in e]
        assert values[1] < values[0] - 0.02, (method, values)


class FlatParameter(torch.nn.Parameter):
    "The name of what the first FSDP keeps its shards in."


@pytest.mark.parametrize("method", [*SMALL])
@pytest.mark.parametrize("flat", [False, True], ids=["DTensor", "FlatParameter"])
def test_shards_are_refused(flat, method):
    model = tiny()
    if flat:
        model.model.norm.weight = FlatParameter(model.model.norm.weight.detach())
    else:
        model.model.norm.weight.device_mesh = "mesh"  # what a DTensor has
    before = weights_hash(model)
    with pytest.raises(TypeError, match="'model.norm.weight' is a shard .*allowed: the whole model in every process"):
        tune(model, method=method)
    assert weights_hash(model) == before


def test_one_writer_at_a_time(tmp_path):
    "Two runs would tear the chain of sums: the second is refused, and neither loses anything."
    path, seen = tmp_path / "run.jsonl", []

    def rival(info):
        if info["step"] == 3:
            with pytest.raises(RuntimeError, match="another process fine-tunes"):
                tune(journal=path)
            seen.append(path.read_text())

    done = tune(journal=path, callback=rival)
    assert seen and path.read_text().startswith(seen[0]) and done.steps == 6
    assert not path.with_name("run.jsonl.leases").exists()
    alone = tune()
    assert weights_hash(done.model) == weights_hash(alone.model)
