"The leash: against torch's distributions, in populations, and with what it is not allowed to change."
import copy

import pytest
import torch
from finetuning import ROWS, tune
from torch.distributions import Categorical, kl_divergence

from gfopt.lm.anchor import (
    anchored,
    base_logits,
    finetune_report,
    gained,
    kl,
    l2,
    lost_share,
    trade,
)
from gfopt.lm.evolution import LowRankES
from gfopt.lm.model import Llama, LlamaConfig, row_losses


def usual(model, batch): return row_losses(model(batch["input_ids"]), batch["labels"])


@pytest.fixture
def things():
    g = torch.Generator().manual_seed(1)
    model = Llama(LlamaConfig(40, 16, 1, 2, 2, 32))
    base = Llama(LlamaConfig(40, 16, 1, 2, 2, 32), seed=5)
    ids = torch.randint(40, (3, 7), generator=g)
    return model, base, dict(input_ids=ids, labels=torch.randint(40, (3, 7), generator=g), other=ids[:, :2])


def test_kl_is_that_of_torch_and_direction_matters():
    g = torch.Generator().manual_seed(0)
    a, b = 3 * torch.randn(4, 6, 9, generator=g), torch.randn(4, 6, 9, generator=g)
    assert torch.allclose(kl(a, b), kl_divergence(Categorical(logits=a), Categorical(logits=b)).mean(1), atol=1e-5)
    assert not torch.allclose(kl(a, b), kl(b, a), atol=0.1) and torch.allclose(l2(a, b), l2(b, a))
    assert kl(a, b).shape == l2(a, b).shape == (4,)


def test_small_differences_agree_with_the_expansion():
    g = torch.Generator().manual_seed(0)
    a, d = torch.zeros(1, 1, 50), 1e-2 * torch.randn(1, 1, 50, generator=g)  # uniform: half the variance is the divergence
    assert torch.allclose(kl(a + d, a), l2(a + d, a) / 2, rtol=2e-2)


@pytest.mark.parametrize("kind", ["kl", "l2"])
def test_members_get_their_own_distance(things, kind):
    model, base, batch = things
    f = anchored(usual, base, 2.0, kind)
    es = LowRankES(model, population=6, sigma=0.2, lr=0.1)
    with es.population(): together = f(model, es.expand(batch)).view(6, 3)
    distance = dict(kl=kl, l2=l2)[kind]
    for p in range(6):
        with es.member(p), torch.no_grad():
            alone = usual(model, batch) + 2.0 * distance(model(batch["input_ids"]), base(batch["input_ids"]))
        assert torch.allclose(together[p], alone, atol=1e-4)
    before = copy.deepcopy(base.state_dict())
    es.step(lambda: f(model, es.expand(batch)))
    assert all(torch.equal(v, before[k]) for k, v in base.state_dict().items())


def test_a_leash_pulls_back():
    base, model, ids = torch.nn.Embedding(12, 12), torch.nn.Embedding(12, 12), torch.arange(12)[None]
    with torch.no_grad(): base.weight.zero_(), model.weight.copy_(2 * torch.randn(12, 12, generator=torch.Generator().manual_seed(0)))
    start, es = float(kl(model(ids), base(ids)).detach()), LowRankES(model, population=32, sigma=0.1, lr=0.3)
    f = anchored(lambda m, b: torch.zeros(len(b["input_ids"])), base, 1.0)
    for _ in range(30): es.step(lambda: f(model, es.expand(dict(input_ids=ids))))
    assert float(kl(model(ids), base(ids)).detach()) < 0.5 * start


def test_another_entry_of_the_batch(things):
    model, base, batch = things
    with torch.no_grad():
        extra = anchored(usual, base, 1.0, ids="other")(model, batch) - usual(model, batch)
        assert torch.allclose(extra, kl(model(batch["other"]), base(batch["other"])), atol=1e-5)


def test_base_reads_each_row_once_and_in_eval_mode(things):
    _, base, batch = things
    base.train()
    anchored(usual, base, 1.0)
    assert not base.training
    seen = []
    base.register_forward_hook(lambda m, args, out: seen.append(len(args[0])))
    ids = batch["input_ids"][[2, 0, 0, 2, 1]]
    assert torch.allclose(base_logits(base, ids), base(ids).detach(), atol=1e-5) and seen == [3, 5]


def test_hugging_face_outputs(things):
    pytest.importorskip("transformers")
    from transformers import GPT2Config, GPT2LMHeadModel
    m = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=1, n_head=2)).eval()
    losses = anchored(lambda m, b: row_losses(m(b["input_ids"]).logits, b["labels"]), copy.deepcopy(m), 1.0)(m, things[2])
    assert losses.shape == (3,)


def test_wrong_arguments_are_named(things):
    model, base, batch = things
    for bad in (dict(weight=-1), dict(weight=float("nan")), dict(weight=1, kind="l1")):
        with pytest.raises(ValueError, match=list(bad)[-1]): anchored(usual, base, **bad)
    with pytest.raises(ValueError, match="ids: 'text'"): anchored(usual, base, 1.0, ids="text")(model, batch)
    with pytest.raises(ValueError, match="objective"): anchored(lambda m, b: usual(m, b).mean(), base, 1.0)(model, batch)


def test_share_and_trade():
    assert lost_share(2.0, 2.0, 4.5) == 0 and lost_share(4.5, 2.0, 4.5) == 1 and lost_share(1.9, 2.0, 4.0) < 0
    assert trade([(0.1, 2.0), (0.1, 2.0), (0.3, 3.0)], 4.0)[1:] == [dict(points=0, lost=0), dict(points=pytest.approx(20), lost=0.5)]
    with pytest.raises(ValueError, match="nothing"): lost_share(2.0, 3.0, 2.9)


def test_the_report_of_a_fine_tune_shows_gain_against_forgetting(tmp_path):
    values, kept = iter([3.0, 2.5, float("nan"), 2.0]), iter([1.0, 1.25, 1.5, 0.75])
    tuned = tune(steps=6, every=2, evaluate=lambda m: next(values), remember=lambda m: next(kept))
    assert gained(tuned) == [dict(step=0, gained=0, lost=0), dict(step=2, gained=0.5, lost=0.25), dict(step=6, gained=1.0, lost=-0.25)]
    text = finetune_report(tuned, tmp_path / "r.html").read_text()
    assert "6 steps of lowrank_es, stopped by steps. Gained 1, lost -0.25 since" in text and text.count("<img") == 1 and "&quot;population&quot;: 8" in text


@pytest.mark.parametrize("more", [{}, dict(evaluate=ROWS)], ids=["nothing", "evaluation only"])
def test_a_report_without_the_second_loss_says_what_is_missing(tmp_path, more):
    tuned = tune(steps=2, **more)
    text = finetune_report(tuned, tmp_path / "r.html").read_text()
    assert gained(tuned) == [] and "remember=...) measures it" in text
