"What the tests of compression share: tiny random models of every family, sharp enough to tell genomes apart."
import math

import pytest
import torch

from gfopt.lm.model import Llama, LlamaConfig

VOCAB = 48


def tiny_model(kind, layers=3, types=("full_attention", "sliding_attention", "full_attention")):
    "With grouped queries; the Mistral has a head of its own, the sliding Qwen two kinds of masks."
    if kind == "gfopt": m = Llama(LlamaConfig(VOCAB, 32, layers, 4, 2, 64), seed=0)
    else:
        transformers = pytest.importorskip("transformers")
        cls = dict(llama="Llama", qwen2="Qwen2", qwen3="Qwen3", mistral="Mistral")[kind.split("-")[0]]
        more = {"llama-bias": dict(attention_bias=True, mlp_bias=True), "qwen3": dict(head_dim=16),
                "qwen2-sliding": dict(use_sliding_window=True, sliding_window=4, layer_types=list(types))}
        config = getattr(transformers, f"{cls}Config")(
            vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=64, tie_word_embeddings=kind != "mistral", bos_token_id=None, eos_token_id=None, pad_token_id=None, **more.get(kind, {}))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            m = getattr(transformers, f"{cls}ForCausalLM")(config)
    with torch.no_grad():
        for n, p in m.named_parameters():
            if p.dim() == 2: p.normal_(0, 2.0 / math.sqrt(p.shape[1]), generator=torch.Generator().manual_seed(len(n)))
            elif n.endswith("bias"): p.normal_(0, 0.3, generator=torch.Generator().manual_seed(len(n)))
    return m.eval().requires_grad_(False)
