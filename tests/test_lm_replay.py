"replay: base and journal make the fine-tuned weights again, and nothing else is taken for a journal."
import json
import math
import warnings

import pytest
import torch
from finetuning import ROWS, tiny, tune
from hypothesis import given, settings
from hypothesis import strategies as st

import gfopt.lm.replay as R
from gfopt.lm.replay import (
    apply,
    check_events,
    decode,
    encode,
    make_optimizer,
    read_finetune,
    replay,
    seal,
    weights_hash,
)


@given(st.lists(st.floats(width=32), min_size=1, max_size=70))
@settings(max_examples=60, deadline=None)
def test_encode_keeps_every_bit(values):
    y = torch.tensor(values, dtype=torch.float32)
    assert torch.equal(decode(encode(y)).view(torch.int32), y.view(torch.int32))


CASES = [("lowrank_es", {}), ("lowrank_es", dict(optimizer="adam", weight_decay=0.01, chunk=4)), ("lowrank_es", dict(optimizer="clipup", noise="normal", rank=2, fitness="standardized")), ("lowrank_es", dict(select="norm", lr=0.1)),
         ("mezo", {}), ("mezo", dict(momentum=0.9, normalize=0.9, noise="normal")), ("mezo", dict(optimizer="adam", rank=2, refresh=2)), ("fzoo", {}), ("fzoo", dict(weight_decay=0.1))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method,extra", CASES)
def test_bit_equal_at_every_step(method, extra, dtype, tmp_path):
    path, hashes = tmp_path / "j", {0: weights_hash(tiny().to(dtype))}
    tune(tiny().to(dtype), method=method, journal=path, steps=4, callback=lambda e: hashes.update({e["step"]: weights_hash(e["model"])}), **extra)
    assert len(set(hashes.values())) == 5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for k in (0, 2, 4, None):
            assert weights_hash(replay(tiny().to(dtype), path, k)) == hashes[4 if k is None else k]


@pytest.mark.parametrize("method,extra", [("lowrank_es", dict(fitness="standardized")), ("mezo", {}), ("fzoo", {})])
def test_the_update_saw_no_more_than_the_file(method, extra, tmp_path):
    "In float64 an update would tell a loss from its 32-bit rounding."
    seen = []
    tuned = tune(tiny().double(), method=method, journal=tmp_path / "j", callback=lambda e: seen.append(e["y"]), **extra)
    assert all(y.dtype == torch.float32 for y in seen)
    assert weights_hash(replay(tiny().double(), tmp_path / "j")) == weights_hash(tuned.model)


def test_no_forward_pass_and_the_flags_of_the_base_do_not_matter(tmp_path):
    tuned = tune(journal=tmp_path / "j")
    base = tiny().requires_grad_(False)
    base.forward = None
    assert weights_hash(replay(base, tmp_path / "j")) == weights_hash(tuned.model)


def test_best(tmp_path):
    values = iter([3.0, 1.0, 2.0, 1.0])
    tune(journal=tmp_path / "j", evaluate=lambda m: next(values), every=2)
    assert weights_hash(replay(tiny(), tmp_path / "j", "best")) == weights_hash(tune(steps=2).model)
    tune(journal=tmp_path / "k", steps=1)
    with pytest.raises(ValueError, match="nothing was evaluated"):
        replay(tiny(), tmp_path / "k", "best")


@pytest.mark.parametrize("upto", [-1, 7, 2.0, True, "last"])
def test_upto(upto, tmp_path):
    tune(journal=tmp_path / "j")
    with pytest.raises(ValueError, match=f"upto: {upto!r}; allowed: 0 to 6"):
        replay(tiny(), tmp_path / "j", upto)


def damaged(lines, i, change):
    out = lines.copy()
    out[i] = change(out[i])
    return out


@pytest.mark.parametrize("what,line,change", [
    ("a digit of a loss", 4, lambda ls: damaged(ls, 3, lambda s: s.replace('"y":"', '"y":"A', 1)[:-1] + "}")),
    ("one character of y", 5, lambda ls: damaged(ls, 4, lambda s: s[:40] + ("B" if s[40] != "B" else "C") + s[41:])),
    ("a line too few", 4, lambda ls: ls[:3] + ls[4:]),
    ("two lines exchanged", 4, lambda ls: ls[:3] + [ls[4], ls[3]] + ls[5:]),
    ("a line twice", 5, lambda ls: ls[:4] + ls[3:]),
    ("no JSON", 3, lambda ls: damaged(ls, 2, lambda s: s[:20])),
    ("another learning rate", 2, lambda ls: damaged(ls, 0, lambda s: s.replace('"lr":0.01', '"lr":0.02'))),
    ("another seed", 2, lambda ls: damaged(ls, 0, lambda s: s.replace('"seed":0', '"seed":1'))),
])
def test_damage_is_named(what, line, change, tmp_path):
    path = tmp_path / "j"
    tune(journal=path)
    path.write_text("\n".join(change(path.read_text().splitlines())) + "\n")
    model = tiny()
    with pytest.raises(ValueError, match=f"line {line}:"):
        replay(model, path)
    assert weights_hash(model) == weights_hash(tiny())
    with pytest.raises(ValueError):
        tune(journal=path)
    path.unlink()
    tune(journal=path)  # the lock was given back


def test_lines_of_another_journal_are_not_taken(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    tune(journal=a), tune(journal=b, seed=1)
    mixed = a.read_text().splitlines()[:3] + b.read_text().splitlines()[3:]
    a.write_text("\n".join(mixed) + "\n")
    with pytest.raises(ValueError, match="line 4"):
        replay(tiny(), a)


def test_wrong_base_and_no_journal(tmp_path):
    path = tmp_path / "j"
    tune(journal=path)
    for wrong in (tiny(1), tiny().double(), tune(steps=1).model):
        before = weights_hash(wrong)
        with pytest.raises(ValueError, match="its weights are not those"):
            replay(wrong, path)
        assert weights_hash(wrong) == before
    with pytest.raises(FileNotFoundError, match="nothing-here"):
        replay(tiny(), tmp_path / "nothing-here")
    for text in ("", '{"gfopt":1,"space":{}}\n'):
        path.write_text(text)
        with pytest.raises(ValueError, match="is not one of finetune"):
            replay(tiny(), path)


def test_other_noise_is_refused(tmp_path, monkeypatch):
    tune(journal=tmp_path / "j")
    monkeypatch.setattr(R, "NOISE_VERSION", R.NOISE_VERSION + 1)
    with pytest.raises(ValueError, match="noise version"):
        replay(tiny(), tmp_path / "j")


def test_weights_that_end_elsewhere_are_told(tmp_path, monkeypatch):
    tune(journal=tmp_path / "j")
    apply_ = R.apply
    monkeypatch.setattr(R, "apply", lambda opt, y, f: apply_(opt, y * 1.5, f) if opt.steps == 3 else apply_(opt, y, f))
    replay(tiny(), tmp_path / "j")  # ranks do not care
    monkeypatch.setattr(R, "apply", lambda opt, y, f: apply_(opt, -y if opt.steps == 3 else y, f))
    with pytest.warns(UserWarning, match="step 6: the replayed weights are not bit-equal"):
        replay(tiny(), tmp_path / "j")


def test_other_threads_are_told(tmp_path):
    path = tmp_path / "j"
    tune(journal=path, steps=2)
    header, *rest = path.read_text().splitlines()
    d = json.loads(header)
    d["made"]["threads"] = 64
    path.write_text("\n".join([json.dumps(d, separators=(",", ":")), *rest]) + "\n")
    with pytest.warns(UserWarning, match="'threads': 64"):
        tune(journal=path, steps=3)
    assert json.loads(path.read_text().splitlines()[0])["made"]["threads"] == 64


def test_the_hash_sees_everything():
    def changed(f):
        model = tiny()
        with torch.no_grad():
            f(model)
        return weights_hash(model)
    w = "model.norm.weight"
    hashes = [weights_hash(tiny()), changed(lambda m: m.get_parameter(w)[3].add_(2**-20)), changed(lambda m: m.to(torch.float64)), changed(lambda m: m.register_buffer("b", torch.zeros(1))),
              changed(lambda m: setattr(m.model.layers[0].mlp.up_proj, "weight", torch.nn.Parameter(m.model.layers[0].mlp.up_proj.weight.reshape(16, 32))))]
    assert len(set(hashes)) == 5
    assert weights_hash(torch.compile(tiny(), backend="eager")) == hashes[0]


def test_the_journal_is_as_small_as_promised(tmp_path):
    for method, extra, members in (("lowrank_es", dict(population=64), 64), ("lowrank_es", dict(population=2), 2), ("mezo", dict(directions=1), 1)):
        path = tmp_path / f"{method}{members}"
        tune(method=method, journal=path, steps=3, schedule=lambda done: 1 / 3, **extra)
        assert all(len(line) + 1 <= 100 + 6 * members for line in path.read_text().splitlines()[1:4]), path.read_text()


def test_defaults_are_written_down():
    header = tune(steps=1).log.header
    assert header["settings"]["sigma"] == 0.01 and header["settings"]["betas"] == [0.9, 0.99] and header["settings"]["chunk"] is None
    assert header["noise"] == R.NOISE_VERSION and header["base"] == weights_hash(tiny())


def test_apply_wants_one_number_for_each_member():
    model = tiny()
    for method, n in (("lowrank_es", 8), ("mezo", 3)):
        opt = make_optimizer(model, method, **{dict(lowrank_es="population", mezo="directions")[method]: n})
        with pytest.raises(ValueError, match=f"y: 2 numbers; allowed: {n}"):
            apply(opt, torch.zeros(2))


def test_apply_restores_the_learning_rate():
    opt = make_optimizer(tiny(), "lowrank_es", population=4)
    apply(opt, torch.arange(4.0), 0.5)
    assert opt.param_groups[0]["lr"] == 0.01


def test_a_failed_member_is_replayed(tmp_path):
    def some(model, batch):
        from gfopt.lm.finetune import next_token
        y = next_token(model, batch).clone()
        y[4:8] = math.inf
        return y
    tuned = tune(objective=some, journal=tmp_path / "j", check=False)
    assert not decode(tuned.log.events[0]["y"]).isfinite().all()
    assert weights_hash(replay(tiny(), tmp_path / "j")) == weights_hash(tuned.model)


def test_seal_and_check():
    events, crc = [], check_events({"a": 1}, [])
    for k in range(3):
        events.append(seal(dict(step=k), crc))
        crc = int(events[-1]["crc"], 16)
    assert check_events({"a": 1}, events) == crc and check_events({"a": 1, "made": 5}, events) == crc
    with pytest.raises(ValueError, match="line 2"):
        check_events({"a": 2}, events)
    skipped = [events[0], seal(dict(step=2), int(events[0]["crc"], 16))]
    with pytest.raises(ValueError, match="line 3"):
        check_events({"a": 1}, skipped)


def test_read_only(tmp_path):
    path = tmp_path / "j"
    tuned = tune(journal=path, steps=2, evaluate=ROWS)
    before = path.read_bytes(), sorted(tmp_path.iterdir())
    log = read_finetune(path)
    assert log.events == tuned.log.events and log.text().encode() == before[0]
    assert (path.read_bytes(), sorted(tmp_path.iterdir())) == before
