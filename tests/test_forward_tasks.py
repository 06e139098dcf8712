import math

import pytest
import torch

from gfopt.experiments import forward_tasks as ft
from gfopt.experiments.forward_training import final

BASE = dict(base=dict(size="pico", steps=4, rows=2, length=16))
TINY = dict(shape=dict(d_model=8, n_layers=1, n_heads=2, n_kv_heads=2, d_ff=16), length=16)


def walk(task="scratch", where=TINY, budget=2000, seed=0, **settings):
    return ft.train(task, where, settings, seed, budget, points=2)


@pytest.mark.parametrize("settings, forwards", [
    (dict(method="zo", lr=1e-3), 2), (dict(method="zo", lr=1e-3, directions=3), 6), (dict(method="zo", sides=1, directions=5, batched=True, lr=1e-3), 6),
    (dict(method="es", population=8, sigma=0.01, lr=1e-3), 8), (dict(method="sepcmaes", population=6, select="norm"), 6), (dict(method="adamw", lr=1e-3), 3)])
def test_the_price_of_a_step_is_what_the_model_was_shown(settings, forwards):
    task = ft.scratch_task(**TINY)
    step, price = ft.stepper(task, 0, rows=3, **settings)
    assert price == forwards * 3 * TINY["length"]
    if settings["method"] == "adamw": return  # backward is counted as two forwards
    step(0.0)  # the first step also compares a batch with single members
    seen = []
    handle = task.model.register_forward_pre_hook(lambda m, args: seen.append(args[0].numel()))
    step(0.5)
    handle.remove()
    assert sum(seen) == price


def test_one_seed_decides_everything_and_no_global_generator_is_read():
    state = torch.get_rng_state()
    a, b, c = (walk(method="zo", lr=1e-2, rows=2, seed=s) for s in (3, 3, 4))
    value = lambda r: [p[2] for p in r["curve"]]
    assert value(a) == value(b) != value(c) and torch.equal(state, torch.get_rng_state())


def test_the_learning_rate_ends_at_the_share_that_decay_leaves(monkeypatch):
    rates = []
    real = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *a, **k: (rates.append(self.param_groups[0]["lr"]), real(self, *a, **k))[1])
    walk(method="adamw", lr=0.01, decay=0.9, rows=2, budget=20 * 3 * 2 * 16)
    assert rates[0] == 0.01 and rates[10] == pytest.approx(0.0055) and len(rates) == 20


def test_training_never_sees_what_the_judge_reads():
    corpus, tok, text = ft._text("cpu")
    for domain in (corpus.code, corpus.prose): assert not set(domain.train) & set(domain.valid)
    assert bytes(text["prose", "valid"][1:len(corpus.prose.valid[0]) + 1].tolist()) == corpus.prose.valid[0]
    read = []
    task = ft.shift_task(**BASE)
    task.model.register_forward_pre_hook(lambda m, args: read.append(args[0]))
    task.judge()
    valid = bytes(b % 256 for b in text["prose", "valid"].tolist())
    assert all(bytes(b % 256 for b in row.tolist()) in valid for row in read[0])
    task = ft.verbaliser_task(**BASE)
    assert task.judge() == task.judge()


def test_the_verbaliser_knows_both_labels_and_which_is_which():
    task = ft.verbaliser_task(**BASE)
    b = task.draw(64, torch.Generator().manual_seed(0))
    assert b["labels"].float().mean() == 0.5 and (b["input_ids"][:, -1] == 256).all() and b["input_ids"].shape[1] == task.tokens
    code = [bytes(r[:-1].tolist()) for r, y in zip(b["input_ids"], b["labels"]) if y == 0 and r.max() < 257 and (r[:-1] < 256).all()]
    whole = b"".join(ft._text("cpu")[0].code.train)
    assert all(r in whole for r in code[:5])
    logits = task.model(b["input_ids"])[:, -1]
    literal = -torch.log_softmax(logits[:, [99, 112]], -1)[torch.arange(64), b["labels"]]
    assert torch.allclose(task.losses(b), literal, atol=1e-6)


def test_the_reward_is_a_share_and_adamw_gets_something_smooth_instead():
    task = ft.reward_task(**BASE, tokens=6, judged=2)
    b = task.draw(4, torch.Generator().manual_seed(0))
    y = task.losses(b)
    assert y.shape == (4,) and set(y.tolist()) <= {0.0, 1.0} and 0 <= task.judge() <= 1
    draw, losses, tokens = task.smooth
    assert losses(draw(2, torch.Generator().manual_seed(0))).requires_grad and tokens == 64
    assert ft.stepper(task, 0, method="adamw", lr=1e-3, rows=2)[1] == 3 * 2 * 64


def test_adamw_learns_and_a_diverged_run_stops():
    good = walk(method="adamw", lr=0.01, rows=4, budget=25_000)
    assert final(good) < good["curve"][0][2] - 1
    bad = ft.train("scratch", TINY, dict(method="adamw", lr=30.0, rows=2), 0, 2e4, points=20)
    assert bad["steps"] * bad["price"] < 2e4 / 2
    assert final(dict(curve=[(0, 0, math.nan)])) == math.inf


def test_pace_is_the_best_of_the_two_terms_and_needs_no_dimension():
    for d in (3, 300):
        g, h = torch.full((d,), 0.1 / d**0.5, dtype=torch.float64), torch.full((d,), 2.0 / d, dtype=torch.float64)
        g2, trace, n = float(g @ g), float(h.sum()), 50
        eta = torch.linspace(0, 1, 100001, dtype=torch.float64)
        best = float((eta * g2 - eta**2 / 2 * trace * (g2 + trace / n)).max())
        assert best == pytest.approx(ft.pace(g2 / trace, n), rel=1e-3)


def test_adapters_move_and_the_base_does_not():
    task = ft.shift_task(**BASE)
    before = {n: p.detach().clone() for n, p in task.model.named_parameters()}
    step, price = ft.stepper(task, 0, method="adamw", lora=2, select="lora_", lr=1e-2, rows=2)
    step(0.0), step(0.5)
    after = dict(task.model.named_parameters())
    assert price == 3 * 2 * 64 and set(after) - set(before) and all("lora_" in n for n in set(after) - set(before))
    assert all(torch.equal(after[n], p) and after[n].grad is None for n, p in before.items())
    assert all(p.abs().max() > 0 for n, p in after.items() if n.endswith("lora_B"))


def test_what_the_base_knew_is_asked_before_and_after():
    r = ft.train("shift", BASE, dict(method="adamw", lr=1e-2, rows=8), seed=0, budget=60000, points=2)
    before, after = r["known"]
    assert before == pytest.approx(ft.shift_task(**BASE).known()) and after != before
    still = ft.train("shift", BASE, dict(method="adamw", lr=1e-12, rows=2), seed=0, budget=400, points=1)
    assert still["known"][1] == pytest.approx(before, rel=1e-6)
    assert ft.train("scratch", TINY, dict(method="adamw", lr=1e-3, rows=2), seed=0, budget=96, points=1)["known"] == []


def test_a_footprint_tells_gradients_of_all_from_gradients_of_adapters():
    foot = {k: ft.footprint("shift", BASE, dict(method="adamw", lr=1e-3, rows=2, **more)) for k, more in dict(all={}, lora=dict(lora=2, select="lora_")).items()}
    assert foot["all"]["weights"] == foot["lora"]["weights"] < foot["lora"]["peak"] < foot["all"]["peak"]
    assert foot["all"]["kept"] >= 2 * foot["all"]["weights"] > foot["lora"]["kept"]  # two moments of everything
    forward = ft.footprint("shift", BASE, dict(method="zo", lr=1e-4, rows=2))
    assert forward["peak"] < foot["all"]["peak"]
