"What the tests of fine-tuning share: a model of a few thousand weights and some rows."
import torch

from gfopt.lm.finetune import finetune
from gfopt.lm.model import Llama, LlamaConfig

CONFIG = LlamaConfig(vocab_size=32, d_model=16, n_layers=1, n_heads=2, n_kv_heads=2, d_ff=32, max_len=64)
IDS = torch.randint(0, 32, (12, 9), generator=torch.Generator().manual_seed(0))
ROWS = dict(input_ids=IDS[:, :-1], labels=IDS[:, 1:])
SMALL = dict(lowrank_es=dict(population=8), mezo=dict(directions=2), fzoo=dict(directions=4))


def tiny(seed=0): return Llama(CONFIG, seed)


def tune(model=None, data=None, objective="next_token", method="lowrank_es", steps=6, **settings):
    model = tiny() if model is None else model
    return finetune(model, ROWS if data is None else data, objective, method, steps, **dict(progress=False, batch_size=4) | SMALL.get(method, {}) | settings)
