"Soft prompts: vectors in front of a text, as a search space and behind a function."
import copy
import json
import random

import numpy as np
import pytest
import torch
from torch import nn

from gfopt import minimize
from gfopt.lm.evolution import LowRankES
from gfopt.lm.model import Llama, config, generate, row_losses
from gfopt.lm.prompts import (
    SoftPrompt,
    load_prompt,
    prompt_space,
    random_tokens,
    save_prompt,
    soft_prompt,
)
from gfopt.lm.subspace import normal_projection
from gfopt.lm.zeroth_order import ZerothOrder

IDS = torch.randint(1, 64, (2, 9), generator=torch.Generator().manual_seed(0))
FRONT = torch.randint(1, 64, (5,), generator=torch.Generator().manual_seed(1))


def llama(size="pico"): return Llama(config(size, 64), seed=0)
def with_front(ids): return torch.cat([FRONT.expand(len(ids), -1), ids], 1)
def points(problem, n, seed=1): return problem.box.uniform(n, torch.Generator().manual_seed(seed))
def vectors(k, d=64, seed=2): return torch.randn(k, d, generator=torch.Generator().manual_seed(seed)) / 4


def hugging_face(kind):
    tf = pytest.importorskip("transformers")
    shape = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    c = dict(gpt2=lambda: tf.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2),
             llama=lambda: tf.LlamaConfig(**shape, intermediate_size=48, num_key_value_heads=2),
             gemma2=lambda: tf.Gemma2Config(**shape, intermediate_size=48, num_key_value_heads=2, head_dim=8),
             opt=lambda: tf.OPTConfig(**shape, ffn_dim=48, word_embed_proj_dim=32))[kind]()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return tf.AutoModelForCausalLM.from_config(c).eval()


HF = ["gpt2", "llama", "gemma2", "opt"]


# ---------------------------------------------------------------------------- where the vectors stand

@torch.no_grad()
def test_a_prompt_of_real_tokens_is_the_text_in_front():
    model = llama()
    literal = model(with_front(IDS))[:, 5:]
    for start in (FRONT, model.model.embed_tokens.weight[FRONT]):
        assert torch.equal(SoftPrompt(model, start)(IDS), literal)
    assert not torch.allclose(literal, model(IDS), atol=1e-2)


@torch.no_grad()
@pytest.mark.parametrize("kind", HF)
def test_hugging_face_real_tokens_masks_and_positions(kind):
    model = hugging_face(kind)
    soft = SoftPrompt(model, FRONT)
    torch.testing.assert_close(soft(IDS).logits, model(with_front(IDS)).logits[:, 5:], atol=1e-6, rtol=0)
    mask = torch.ones_like(IDS)
    mask[0, 6:] = 0  # padded on the right
    positions = torch.arange(9).expand(2, -1).contiguous()
    longer = dict(input_ids=with_front(IDS), attention_mask=torch.cat([torch.ones(2, 5, dtype=torch.long), mask], 1), labels=with_front(IDS).masked_fill(torch.arange(14) < 5, -100))
    batch = dict(input_ids=IDS, attention_mask=mask, labels=IDS)
    if kind != "opt":  # counts its own from the mask
        longer["position_ids"], batch["position_ids"] = torch.arange(14).expand(2, -1), positions + 0
    got, want = soft(**batch), model(**longer)
    torch.testing.assert_close(got.logits, want.logits[:, 5:], atol=1e-6, rtol=0)
    torch.testing.assert_close(got.loss, want.loss, atol=1e-6, rtol=0)
    assert got.logits.shape == (2, 9, 64) and torch.equal(batch["attention_mask"], mask), "the caller's batch is left alone"


@torch.no_grad()
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_same_logits_as_inputs_embeds(kind):
    model, p = hugging_face(kind), vectors(4, 32)
    embeds = torch.cat([p.expand(2, -1, -1), model.get_input_embeddings()(IDS)], 1)
    torch.testing.assert_close(SoftPrompt(model, p)(IDS).logits, model(inputs_embeds=embeds).logits[:, 4:], atol=1e-6, rtol=0)


@torch.no_grad()
def test_a_prompt_of_no_tokens_changes_nothing():
    model = llama()
    assert torch.equal(SoftPrompt(model, 0)(IDS), model(IDS))
    model, mask = hugging_face("gpt2"), torch.ones_like(IDS)
    assert torch.equal(SoftPrompt(model, 0)(IDS, attention_mask=mask).logits, model(IDS, attention_mask=mask).logits)


@torch.no_grad()
def test_what_a_prompt_replaces_is_not_read():
    model = hugging_face("llama")
    a = SoftPrompt(model, vectors(3, 32))(IDS).logits
    model.get_input_embeddings().weight[0] += 5.0  # the placeholder's row, in no text of ours
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone())
    torch.testing.assert_close(SoftPrompt(model, vectors(3, 32))(IDS).logits, a, atol=1e-6, rtol=0)


@torch.no_grad()
def test_cached_generation_puts_the_prompt_in_front_once():
    model = llama()
    want = generate(model, with_front(IDS), 12, temperature=0)
    assert torch.equal(generate(SoftPrompt(model, FRONT), IDS, 12, temperature=0), want)
    hf = hugging_face("llama")
    soft, plain = SoftPrompt(hf, FRONT), hf(with_front(IDS), use_cache=True)
    first = soft(IDS, use_cache=True)
    nxt, mask = IDS[:, :1], torch.ones(2, 10, dtype=torch.long)
    a = soft(nxt, past_key_values=first.past_key_values, attention_mask=mask, position_ids=torch.full((2, 1), 9)).logits
    b = hf(nxt, past_key_values=plain.past_key_values, attention_mask=torch.ones(2, 15, dtype=torch.long), position_ids=torch.full((2, 1), 14)).logits
    torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


def test_gradients_reach_the_prompt_and_nothing_else_needs_to_move():
    model = llama()
    soft = SoftPrompt(model, 4)
    before = copy.deepcopy(model.state_dict())
    adam, losses = torch.optim.AdamW([soft.prompt], lr=0.03), []
    for _ in range(20):
        loss = row_losses(soft(IDS[:, :-1]), IDS[:, 1:]).mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.2 and all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


# ---------------------------------------------------------------------------- as a search space

@torch.no_grad()
@pytest.mark.parametrize("dim", [None, 6])
@pytest.mark.parametrize("kind", ["ours", "gpt2", "llama"])
@pytest.mark.parametrize("k", [1, 5, 20])
def test_members_equal_loading_each_prompt(kind, dim, k):
    model = llama() if kind == "ours" else hugging_face(kind)
    problem = soft_prompt(model, k, dim)
    def closure():
        b = problem.expand(dict(input_ids=IDS, attention_mask=torch.ones_like(IDS)))
        out = problem.model(b["input_ids"]) if kind == "ours" else problem.model(**b).logits
        return row_losses(out[:, :-1], b["input_ids"][:, 1:])
    Z = points(problem, 9 if k == 5 else 4)  # nine members of two rows: as many rows as 18 = ... and T = 9
    losses, chunked = problem.losses(closure, Z), problem.losses(closure, Z, chunk=3)
    assert problem.batched and losses.std() > 1e-4
    for z, loss in zip(Z, losses, strict=True):
        problem.load(z)
        torch.testing.assert_close(closure().double().mean(), loss, atol=1e-5, rtol=0)
    torch.testing.assert_close(losses, chunked, atol=1e-5, rtol=0)


def test_as_many_rows_as_tokens():
    "Three members of three rows of nine tokens: what leads with nine is not to be guessed."
    problem, ids = soft_prompt(llama(), 4), torch.randint(1, 64, (3, 9), generator=torch.Generator().manual_seed(3))
    closure = lambda: problem.model(problem.expand(ids))[:, :, 0].mean(1)  # noqa: E731
    Z = points(problem, 3)
    losses = problem.losses(closure, Z)
    assert problem.batched
    for z, loss in zip(Z, losses, strict=True):
        problem.load(z)
        torch.testing.assert_close(closure().double().mean(), loss, atol=1e-5, rtol=0)


def test_zeroth_order_trains_a_prompt():
    soft = SoftPrompt(llama(), 4)
    zo = ZerothOrder([("prompt", soft.prompt)], lr=2e-3, eps=1e-2)
    losses = [float(zo.step(lambda: row_losses(soft(IDS[:, :-1]), IDS[:, 1:]).mean())) for _ in range(60)]
    assert losses[-1] < losses[0] - 0.01


def test_all_prompts_go_through_the_model_together():
    problem, calls = soft_prompt(llama(), 3, 5), []
    hook = problem.model.model.register_forward_pre_hook(lambda m, args: calls.append(tuple(args[0].shape)))
    problem.losses(lambda: row_losses(problem.model((b := problem.expand(IDS))[:, :-1]), b[:, 1:]), points(problem, 6))
    hook.remove()
    assert calls == [(12, 11), (2, 11), (2, 11)], "six members of two rows with three virtual tokens; then points 0 and 5 alone"


def test_projection_has_the_scale_of_the_embedding():
    model = llama("nano")
    model.model.embed_tokens.weight.data *= 3
    std = model.model.embed_tokens.weight.detach().std()
    problem = soft_prompt(model, 12, 40, seed=2)
    assert problem.box.dim == 40 and torch.equal(problem.box.x0, torch.zeros(40).double()) and torch.equal(problem.box.sigma0, torch.ones(40).double())
    moved = problem.values(points(problem, 200))["prompt"] - problem.model.prompt.detach()
    assert moved.std().item() == pytest.approx(std.item(), rel=0.05) and moved.mean().abs() < 0.05 * std
    z = torch.arange(40.0)[None] / 40
    want = std * (normal_projection(12 * 128, 40, seed=2) @ z[0]).view(12, 128)
    torch.testing.assert_close(problem.values(z)["prompt"][0] - problem.model.prompt.detach(), want, atol=1e-5, rtol=1e-4)
    assert torch.equal(problem.values(torch.zeros(1, 40))["prompt"][0], problem.model.prompt.detach())


def test_without_a_projection_coordinates_are_the_prompt():
    problem = soft_prompt(llama(), FRONT, sigma0=0.5)
    std = problem.model.table().detach().std().item()
    torch.testing.assert_close(problem.box.x0.float().view(5, 64), problem.model.prompt.detach())
    assert problem.box.dim == 320 and problem.box.sigma0.unique().tolist() == pytest.approx([0.5 * std], rel=1e-5)


@pytest.mark.parametrize("method", ["ga", "pso", "cmaes", "sepcmaes", "crfmnes", "snes", "random"])
def test_methods_lower_the_loss(method):
    problem = soft_prompt(llama(), 4, 20)
    def closure():
        b = problem.expand(IDS)
        return row_losses(problem.model(b[:, :-1]), b[:, 1:])
    first = problem.losses(closure, problem.box.x0[None]).item()
    r = minimize(lambda Z: problem.losses(closure, Z), problem.box, method, 160, batched=True, progress=False)
    assert r.fun < first - 0.02


def test_evolution_trains_a_prompt_in_one_batch():
    soft = SoftPrompt(llama(), 4)
    es = LowRankES([("prompt", soft.prompt)], population=8, sigma=0.05, lr=0.05)
    losses = [es.step(lambda: row_losses(soft((b := es.expand(IDS))[:, :-1]), b[:, 1:])).mean().item() for _ in range(15)]
    assert losses[-1] < losses[0] - 0.05 and not es.sequential


@torch.no_grad()
def test_prompt_and_weights_in_one_space():
    from gfopt.lm.subspace import subspace
    problem = subspace(SoftPrompt(llama(), 3), "^prompt$|norm|embed", "normal", 5)  # the table that is looked up is searched too
    def closure():
        b = problem.expand(IDS)
        return row_losses(problem.model(b[:, :-1]), b[:, 1:])
    Z = points(problem, 3)
    losses = problem.losses(closure, Z)
    for z, loss in zip(Z, losses, strict=True):
        problem.load(z)
        torch.testing.assert_close(closure().double().mean(), loss, atol=1e-5, rtol=0)


def test_tied_head_keeps_its_words():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(8, 4), nn.Linear(4, 8, bias=False)
            self.head.weight = self.table.weight
        def forward(self, ids): return self.head(self.table(ids).cumsum(1))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Tied()
    p, ids = vectors(2, 4), torch.tensor([[1, 2, 3]])
    want = (p.sum(0) + model.table(ids).cumsum(1)) @ model.table.weight.T
    torch.testing.assert_close(SoftPrompt(model, p)(ids), want)
    problem = prompt_space(SoftPrompt(model, p))
    Z = points(problem, 3)
    losses = problem.losses(lambda: problem.model(problem.expand(ids)).square().mean((1, 2)), Z)
    want = [((z.float().view(2, 4).sum(0) + model.table(ids).cumsum(1)) @ model.table.weight.T).square().mean().item() for z in Z]
    torch.testing.assert_close(losses, torch.tensor(want).double(), atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------------------- behind a function

def test_a_black_box_sees_prompts_and_nothing_else():
    target = vectors(3, 16, 5)
    def service(prompts):
        assert prompts.shape[1:] == (3, 16) and prompts.dtype == torch.float32 and not prompts.requires_grad
        return (prompts - target).square().sum((1, 2)).double()
    start = target + 0.3 * vectors(3, 16, 6)
    space = prompt_space(start, 10)
    r = minimize(lambda Z: service(space.values(Z)["prompt"]), space.box, "cmaes", 600, batched=True, progress=False)
    A = start.square().mean().sqrt() * normal_projection(48, 10)
    least = (start - target).flatten() - A @ torch.linalg.lstsq(A, (start - target).flatten()[:, None]).solution[:, 0]
    assert r.fun == pytest.approx(least.square().sum().item(), rel=1e-3), "the best that the subspace contains"
    assert space.base["prompt"].equal(start)


# ---------------------------------------------------------------------------- contracts

def test_random_tokens_follow_their_seed():
    t = random_tokens(4000, 50)
    assert t.min() == 0 and t.max() == 49 and (torch.bincount(t).double() - 80).square().sum() / 80 < 90  # chi-square, 49 degrees
    assert torch.equal(random_tokens(7, 50), t[:7]) and not torch.equal(random_tokens(4000, 50, seed=1), t)
    assert len(random_tokens(0, 50)) == 0


def test_flags_restored_and_no_global_randomness():
    states = lambda: (torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist())  # noqa: E731
    before = states()
    problem = soft_prompt(llama(), 3, 4)
    problem.model.train()
    problem.model.model.model.norm.eval()
    flags = [m.training for m in problem.model.modules()]
    closure = lambda: row_losses(problem.model((b := problem.expand(IDS))[:, :-1]), b[:, 1:])  # noqa: E731
    problem.losses(closure, points(problem, 3))
    def fails():
        problem.model(problem.expand(IDS))
        raise KeyError
    with pytest.raises(KeyError):
        problem.losses(fails, points(problem, 3))
    assert [m.training for m in problem.model.modules()] == flags and states() == before
    plain = problem.model.model(IDS)
    assert plain.shape == (2, 9, 64) and torch.equal(plain, llama()(IDS)), "the wrapped model itself is as it was, after an exception too"


def test_the_prompt_is_a_copy():
    start = vectors(3)
    soft = SoftPrompt(llama(), start)
    with torch.no_grad():
        soft.prompt += 1
    assert torch.equal(start, vectors(3)) and soft.prompt.requires_grad
    table = soft.table().detach().clone()
    soft = SoftPrompt(soft.model, FRONT)
    with torch.no_grad():
        soft.prompt += 1
    assert torch.equal(soft.table(), table)


def test_save_and_load(tmp_path):
    model = llama()
    soft = SoftPrompt(model, vectors(3))
    save_prompt(soft, tmp_path / "p")
    again = load_prompt(model, tmp_path / "p")
    assert torch.equal(again.prompt, soft.prompt) and torch.equal(again(IDS), soft(IDS))
    c = json.loads((tmp_path / "p" / "adapter_config.json").read_text())
    assert c["num_virtual_tokens"] == 3 and c["token_dim"] == 64 and {f.name for f in (tmp_path / "p").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}


@torch.no_grad()
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_peft_reads_the_prompt(kind, tmp_path):
    peft = pytest.importorskip("peft")
    model = hugging_face(kind)
    soft = SoftPrompt(model, vectors(3, 32))
    save_prompt(soft, tmp_path)
    want = soft(IDS).logits
    with torch.random.fork_rng(devices=[]):
        other = peft.PeftModel.from_pretrained(model, tmp_path).eval()
    torch.testing.assert_close(other(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits[:, 3:], want, atol=1e-5, rtol=0)


def test_mistakes():
    model = llama()
    for start in (torch.zeros(3, 5), torch.zeros(64), -1):
        with pytest.raises(ValueError, match="start: .*allowed"):
            SoftPrompt(model, start)
    with pytest.raises(ValueError, match="embedding: .*allowed"):
        SoftPrompt(nn.Linear(3, 3), 2)
    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.unused, self.used = nn.Embedding(64, 4), nn.Embedding(64, 4)
        def forward(self, ids): return self.used(ids)
    with pytest.raises(RuntimeError, match="'unused'.*allowed"):
        SoftPrompt(Other(), 2)(IDS)
    other = Other()
    torch.testing.assert_close(SoftPrompt(other, 2, embedding="used")(IDS), other(IDS))
    with pytest.raises(ValueError, match="input_ids: 520 tokens"):
        SoftPrompt(model, 511)(IDS)
    with pytest.raises(ValueError, match="select"):
        soft_prompt(model, 0)
    with pytest.raises(ValueError, match="dim: 0"):
        soft_prompt(model, 2, 0)
