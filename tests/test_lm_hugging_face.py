"Tiny random instances of Hugging Face's models: each member of a batched population equals the model with that member's weights, or a parameter is named."
import copy
import functools

import pytest
import torch
from torch import nn

from gfopt.lm.evolution import LowRankES
from gfopt.lm.model import row_losses
from gfopt.lm.population import (
    Population,
    PopulationError,
    member_changes,
    member_weight,
)

tf = pytest.importorskip("transformers")

P, B = 4, 2
SHAPE = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2)
GATED, GROUPED = dict(intermediate_size=48), dict(intermediate_size=48, num_key_value_heads=2)
SMALL = dict(vocab_size=64, pad_token_id=0, bos_token_id=1, eos_token_id=2)
CONFIGS = dict(
    gpt2=lambda: tf.GPT2Config(**SMALL, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    llama=lambda: tf.LlamaConfig(**SHAPE, **GROUPED), qwen2=lambda: tf.Qwen2Config(**SHAPE, **GROUPED), qwen3=lambda: tf.Qwen3Config(**SHAPE, **GROUPED, head_dim=8),
    mistral=lambda: tf.MistralConfig(**SHAPE, **GROUPED), gemma=lambda: tf.GemmaConfig(**SHAPE, **GROUPED, head_dim=8),
    gemma2=lambda: tf.Gemma2Config(**SHAPE, **GROUPED, head_dim=8), gemma3=lambda: tf.Gemma3TextConfig(**SHAPE, **GROUPED, head_dim=8),
    phi=lambda: tf.PhiConfig(**SHAPE, **GATED), phi3=lambda: tf.Phi3Config(**SHAPE, **GROUPED),
    opt=lambda: tf.OPTConfig(**SHAPE, ffn_dim=48, word_embed_proj_dim=32), gpt_neox=lambda: tf.GPTNeoXConfig(**SHAPE, **GATED),
    bert=lambda: tf.BertConfig(**SHAPE, **GATED), roberta=lambda: tf.RobertaConfig(**SHAPE, **GATED),
    t5=lambda: tf.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, pad_token_id=0, eos_token_id=2, decoder_start_token_id=0),
    mamba=lambda: tf.MambaConfig(**SMALL, hidden_size=32, num_hidden_layers=2, state_size=4),
    mixtral=lambda: tf.MixtralConfig(**SHAPE, **GROUPED, num_local_experts=4, num_experts_per_tok=2),
    qwen2_moe=lambda: tf.Qwen2MoeConfig(**SHAPE, **GROUPED, moe_intermediate_size=16, shared_expert_intermediate_size=16, num_experts=4, num_experts_per_tok=2))
MIXTURES = ("mixtral", "qwen2_moe")
SINGLE = (*MIXTURES, "gemma2")  # grouped products of experts know no float64, and Gemma 2 makes nan of a padded row there
BATCHED = [kind for kind in CONFIGS if kind not in MIXTURES]
WRITERS = [kind for kind in BATCHED if kind not in ("bert", "roberta")]


@functools.cache
def model_of(kind):
    "Weights far from their initial zeros and ones, in float64 where the model can."
    c = CONFIGS[kind]()
    cls = dict(bert=tf.AutoModelForMaskedLM, roberta=tf.AutoModelForMaskedLM, t5=tf.AutoModelForSeq2SeqLM).get(kind, tf.AutoModelForCausalLM)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = cls.from_config(c).eval()
        model = model if kind in SINGLE else model.double()
        for w in model.parameters():
            w.add_(torch.randn_like(w) * 0.1)
    return model


def batch_of(kind, T, mask=None):
    g = torch.Generator().manual_seed(T)
    batch = dict(input_ids=torch.randint(3, 64, (B, T), generator=g))
    if mask:
        batch["attention_mask"] = torch.ones(B, T, dtype=torch.long)
        batch["attention_mask"][0, slice(0, 3) if mask == "left" else slice(-3, None)] = 0
    if kind == "t5":
        batch["decoder_input_ids"] = torch.randint(3, 64, (B, T // 2), generator=g)
    return batch


def logits(model, batch): return model(**batch).logits


@torch.no_grad()
def together_and_alone(model, batch, call=logits, sigma=0.05, rank=1, exclude=None):
    "Outputs (P, B, ...) of a population, and the same with each member's weights written out."
    weights = {n: w for n, w in model.named_parameters() if not exclude or exclude not in n}
    changes = member_changes(weights, range(P), sigma=dict.fromkeys(weights, sigma), rank=rank, seed=3, step=2)
    with Population(weights, changes, P) as population:
        out = call(model, population.expand(batch))
    alone = []
    for p in range(P):
        saved = {n: w.data for n, w in weights.items()}
        try:
            for n, w in weights.items():
                w.data = member_weight(w, changes[n], p)
            alone.append(call(model, batch))
        finally:
            for n, w in weights.items():
                w.data = saved[n]
    return out.view(P, B, *out.shape[1:]), torch.stack(alone)


# T = 8 equals P * B, 16 is divisible by it, 4 by P, 9 by nothing
@pytest.mark.parametrize(("T", "mask"), [(9, None), (8, None), (4, None), (8, "left"), (16, "left"), (9, "right")])
@pytest.mark.parametrize("kind", BATCHED)
def test_every_member_is_the_model_with_its_weights(kind, T, mask):
    out, alone = together_and_alone(model_of(kind), batch_of(kind, T, mask), rank=1 if T != 9 else 3)
    if mask == "left" and kind in WRITERS:
        out, alone = out[:, :, 3:], alone[:, :, 3:]  # what a padded position says is nobody's business
    assert out.isfinite().all()
    assert (out - alone).abs().max() < dict(gemma2=2e-5, mamba=2e-6).get(kind, 1e-10)  # Mamba computes its scan in float32
    assert (alone[0] - alone[1]).abs().max() > 1e-2


@pytest.mark.parametrize("mask", [None, "left"])
@pytest.mark.parametrize("kind", WRITERS)
def test_cached_generation_inside_a_population(kind, mask):
    def write(model, batch):
        batch = {k: v for k, v in batch.items() if k != "decoder_input_ids"}
        return model.generate(**batch, max_new_tokens=5, min_new_tokens=5, do_sample=False)[:, -5:]
    out, alone = together_and_alone(model_of(kind), batch_of(kind, 8, mask), write, sigma=0.5 if "gemma" in kind else 0.1)
    assert torch.equal(out, alone)
    assert len({tuple(row) for row in out[:, 0].tolist()}) > 1, "members must differ, or the comparison says nothing"


@torch.no_grad()
@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma3", "gpt_neox", "mamba"])
def test_cached_logits_equal_uncached(kind):
    model, batch = model_of(kind), batch_of(kind, 8)["input_ids"]
    weights = dict(model.named_parameters())
    changes = member_changes(weights, range(P), sigma=dict.fromkeys(weights, 0.1), rank=1, seed=3, step=2)
    with Population(weights, changes, P) as population:
        ids = population.expand(batch)
        first = model(ids[:, :6], use_cache=True)
        name = "cache_params" if kind == "mamba" else "past_key_values"
        second = model(ids[:, 6:7], use_cache=True, **{name: first[name]})
        whole = model(ids[:, :7])
    torch.testing.assert_close(second.logits[:, -1], whole.logits[:, -1], atol=1e-5 if kind == "mamba" else 1e-10, rtol=0)


@pytest.mark.parametrize("kind", MIXTURES)
def test_a_mixture_of_experts_is_refused_by_name_and_goes_on_without_or_one_by_one(kind):
    model, batch = model_of(kind), batch_of(kind, 8)
    with pytest.raises(PopulationError, match=r"'model\.layers\.0\.mlp\.experts\.gate_up_proj'.*exclude=.*fallback='sequential'"):
        together_and_alone(model, batch)
    out, alone = together_and_alone(model, batch, exclude="experts")
    assert (out - alone).abs().max() < 1e-4 and (alone[0] - alone[1]).abs().max() > 1e-2
    es = LowRankES(model, population=P, sigma=0.02, lr=0.0, fallback="sequential")
    loss = lambda b: row_losses(model(**b).logits[:, :-1], b["input_ids"][:, 1:])  # noqa: E731
    with torch.no_grad():
        want = []
        for p in range(P):
            with es.member(p):
                want.append(loss(batch).double().mean())
    with pytest.warns(UserWarning, match="one member at a time"):
        losses = es.step(lambda: loss(es.expand(batch)))
    assert torch.equal(losses, torch.stack(want)) and es.sequential


@pytest.mark.parametrize("kind", ["gpt2", "t5", "roberta"])
def test_a_step_checks_itself_and_learns(kind):
    model, batch = copy.deepcopy(model_of(kind)).float(), batch_of(kind, 8, "right")
    labels = batch.get("decoder_input_ids", batch["input_ids"])
    es = LowRankES(model, population=16, sigma=0.02, lr=0.05)

    def closure():
        b = es.expand(batch | dict(target=labels))
        return row_losses(model(**{k: v for k, v in b.items() if k != "target"}).logits, b["target"])
    losses = torch.stack([es.step(closure) for _ in range(8)])
    assert losses[-1].mean() < losses[0].mean() - 0.05 and not es.sequential


class LoRA(nn.Module):
    "As in PEFT: a frozen layer and two thin factors beside it."
    def __init__(self, base, r=2, merged=False):
        super().__init__()
        self.base, self.merged, g = base.requires_grad_(False), merged, torch.Generator().manual_seed(base.out_features)
        self.lora_A = nn.Parameter(torch.randn(r, base.in_features, generator=g, dtype=torch.float64))
        self.lora_B = nn.Parameter(torch.randn(base.out_features, r, generator=g, dtype=torch.float64) * 0.1)

    def forward(self, x):
        if self.merged:  # the weight first, as when adapters are merged on the fly
            return nn.functional.linear(x, self.base.weight + 0.5 * self.lora_B @ self.lora_A, self.base.bias)
        return self.base(x) + 0.5 * nn.functional.linear(nn.functional.linear(x, self.lora_A), self.lora_B)


@pytest.mark.parametrize("merged", [False, True])
def test_lora_adapters_on_a_frozen_base(merged):
    model = copy.deepcopy(model_of("llama")).requires_grad_(False)
    for layer in model.model.layers:
        layer.self_attn.q_proj = LoRA(layer.self_attn.q_proj, merged=merged)
        layer.mlp.down_proj = LoRA(layer.mlp.down_proj, merged=merged)
    base = {n: w.clone() for n, w in model.named_parameters() if not w.requires_grad}
    es = LowRankES(model, population=P, sigma=0.1, lr=0.1)
    names = [n for g in es.param_groups for n in g["param_names"]]
    assert len(names) == 8 and all("lora_" in n for n in names)
    batch = batch_of("llama", 8)
    closure = lambda: row_losses(model(**(b := es.expand(batch))).logits[:, :-1], b["input_ids"][:, 1:])  # noqa: E731
    with es.population(), torch.no_grad():
        together = closure().view(P, B)
    for p in range(P):
        with es.member(p), torch.no_grad():
            torch.testing.assert_close(closure(), together[p], atol=1e-6, rtol=0)
    assert together.std(0).min() > 1e-3
    es.step(closure)
    assert all(torch.equal(w, base[n]) for n, w in model.named_parameters() if n in base)


def test_tied_heads_are_perturbed_once():
    c = tf.LlamaConfig(**SHAPE, **GROUPED, tie_word_embeddings=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = tf.AutoModelForCausalLM.from_config(c).double().eval()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    out, alone = together_and_alone(model, batch_of("llama", 8))
    assert (out - alone).abs().max() < 1e-10


def test_passing_rows_as_lists_is_never_silently_wrong():
    "A model that makes its ids anew hides where they come from: with T = P * B nobody can tell rows from positions."
    model, weights = model_of("llama"), dict(model_of("llama").named_parameters())
    changes = member_changes(weights, range(P), sigma=dict.fromkeys(weights, 0.05), rank=1, seed=3, step=2)
    for T in (8, 9):
        with torch.no_grad(), Population(weights, changes, P) as population:
            out = model(torch.tensor(population.expand(batch_of("llama", T)["input_ids"]).tolist())).logits
        assert out.isnan().all() if T == P * B else out.isfinite().all() and population.unsure
