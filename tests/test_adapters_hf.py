"GFTrainer: what transformers.Trainer promises, kept without a gradient."
import subprocess
import sys

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from transformers import (  # noqa: E402
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    TrainerCallback,
    TrainingArguments,
)

from gfopt.adapters.huggingface import GFTrainer, row_objective  # noqa: E402

ROWS = [dict(input_ids=(r := [(3 * i + j) % 7 for j in range(10)]), labels=r, attention_mask=[1] * 10) for i in range(12)]
ZO, ES = dict(method="mezo", settings=dict(normalize=0.9, directions=4)), dict(method="lowrank_es", settings=dict(population=16, sigma=0.05))
RATE = dict(mezo=0.03, lowrank_es=0.1)


def gpt2(**k):
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=8, n_positions=16, n_embd=16, n_layer=1, n_head=2, bos_token_id=7, eos_token_id=7, **k))


def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
                                        num_key_value_heads=1, max_position_embeddings=16, bos_token_id=7, eos_token_id=7))


def lora():
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM", lora_dropout=0.1))


def trainer(folder, model, method=ZO, data=ROWS, callbacks=None, cls=GFTrainer, **arguments):
    arguments = dict(max_steps=12, per_device_train_batch_size=4, report_to=[], save_strategy="no", logging_steps=4, use_cpu=True, disable_tqdm=True,
                     learning_rate=RATE[method["method"]]) | arguments
    return cls(model, TrainingArguments(str(folder), **arguments), train_dataset=data, eval_dataset=data, callbacks=callbacks, **method)


def same(a, b): return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))


@pytest.mark.parametrize("make,method", [(gpt2, ZO), (llama, ES), (lora, ZO), (lora, ES)], ids=["gpt2-mezo", "llama-es", "lora-mezo", "lora-es"])
def test_loss_falls_without_a_gradient(tmp_path, make, method):
    model = make()
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    model.eval()
    t = trainer(tmp_path, model, method, max_steps=25 if make is not lora else 40, learning_rate=RATE[method["method"]] * (3 if make is lora else 1))
    before = t.evaluate()["eval_loss"]
    t.train()
    assert t.evaluate()["eval_loss"] < before - (0.02 if make is lora else 0.2)
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
    assert bool(frozen) == (make is lora) and t.state.global_step == t.forward_only.steps


@pytest.mark.parametrize("method", [ZO, ES], ids=["mezo", "es"])
def test_resume_equals_the_uninterrupted_run(tmp_path, method):
    whole = trainer(tmp_path / "a", gpt2(), method, max_steps=6, save_strategy="steps", save_steps=2)
    whole.train()
    other = gpt2()
    with torch.no_grad(): [p.add_(1) for p in other.parameters()]
    again = trainer(tmp_path / "b", other, method, max_steps=6)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))
    assert same(whole.model, again.model) and again.forward_only.steps == 6


@pytest.mark.parametrize("method", [dict(method="mezo"), dict(method="mezo", settings=dict(directions=3)), ES], ids=["one", "three", "es"])
def test_accumulation_is_the_larger_batch(tmp_path, method):
    ends = []
    for size, steps in ((12, 1), (3, 4)):
        t = trainer(tmp_path, gpt2(), method, max_steps=2, per_device_train_batch_size=size, gradient_accumulation_steps=steps, lr_scheduler_type="constant", learning_rate=0.01)
        t.train()
        ends.append(t)
    moved = max(float((p - q).detach().abs().max()) for p, q in zip(ends[0].model.parameters(), gpt2().parameters()))
    for p, q in zip(ends[0].model.parameters(), ends[1].model.parameters()): assert float((p - q).detach().abs().max()) < 0.05 * moved
    assert ends[1].forward_only.steps == 2 and ends[1].forward_only.told is None


def test_labels_count_as_in_the_usual_trainer(tmp_path):
    "Rows with few labels: the loss of gathered batches is the mean over tokens, as with gradients."
    rows = [dict(r, labels=[-100] * (8 if i % 2 else 1) + r["labels"][8 if i % 2 else 1:]) for i, r in enumerate(ROWS)]
    logged = []
    for cls, extra in ((GFTrainer, dict(method="mezo", settings=dict(lr=0.0, eps=1e-6))), (GFTrainer.__mro__[1], dict(method="mezo"))):
        if cls is not GFTrainer: extra = {}
        arguments = dict(max_steps=1, per_device_train_batch_size=3, gradient_accumulation_steps=4, logging_steps=1, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True, learning_rate=0.0)
        t = cls(gpt2(resid_pdrop=0, embd_pdrop=0, attn_pdrop=0), TrainingArguments(str(tmp_path), **arguments), train_dataset=rows, **extra)
        t.train()
        logged.append([h["loss"] for h in t.state.log_history if "loss" in h][0])
    assert abs(logged[0] - logged[1]) < 1e-3


def test_flags_dropout_schedule_seed_and_callbacks(tmp_path):
    seen = []

    class Spy(TrainerCallback):
        def on_step_end(self, args, state, control, optimizer=None, **k): seen.append((state.global_step, optimizer.param_groups[0]["lr"]))

    model, modes = gpt2(), set()
    model.transformer.drop.register_forward_hook(lambda m, a, o: modes.add(m.training))
    t = trainer(tmp_path, model, ES, callbacks=[Spy()], max_steps=4, seed=7, weight_decay=0.1)
    t.train()
    assert all(m.training for m in model.modules()) and modes == {False}
    assert [s for s, _ in seen] == [1, 2, 3, 4] and seen[0][1] > seen[1][1] > seen[2][1]
    assert t.forward_only.settings["seed"] == 7 and sorted(g["weight_decay"] for g in t.forward_only.param_groups) == [0.0, 0.1]
    named = {n for g in t.forward_only.param_groups for n in g["param_names"]}
    assert named == {n for n, _ in model.named_parameters()}


def test_saving_and_loading_is_that_of_transformers(tmp_path):
    t = trainer(tmp_path, gpt2(), ZO, max_steps=2)
    t.train()
    t.save_model(str(tmp_path / "out"))
    assert same(GPT2LMHeadModel.from_pretrained(tmp_path / "out"), t.model)


def test_saved_lora_is_the_adapter_only(tmp_path):
    t = trainer(tmp_path, lora(), ZO, max_steps=2)
    t.train()
    t.save_model(str(tmp_path / "out"))
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert "adapter_model.safetensors" in names and "model.safetensors" not in names


def test_classes_and_an_objective_of_ones_own(tmp_path):
    rows = [dict(input_ids=[i % 7] * 6, labels=i % 2) for i in range(8)]
    def make(): torch.manual_seed(0); return GPT2ForSequenceClassification(GPT2Config(vocab_size=8, n_positions=16, n_embd=16, n_layer=1, n_head=2, pad_token_id=7))
    t = trainer(tmp_path, make(), ES, data=rows, max_steps=5)
    before = t.evaluate()["eval_loss"]
    t.train()
    assert t.evaluate()["eval_loss"] < before
    wrong = lambda m, b: (m(input_ids=b["input_ids"]).logits.argmax(-1) != b["labels"]).float()
    trainer(tmp_path, make(), ES | dict(objective=wrong), data=rows, max_steps=2).train()


def test_row_objective_is_the_models_own_loss():
    model, batch = gpt2().eval(), {k: torch.tensor([r[k] for r in ROWS]) for k in ROWS[0]}
    with torch.no_grad(): assert torch.allclose(row_objective(model, batch).mean(), model(**batch).loss, atol=1e-5)
    masked = batch | dict(labels=batch["labels"].clone())
    masked["labels"][0, :] = -100
    with torch.no_grad(): assert row_objective(model, masked)[0] == 0
    with pytest.raises(ValueError, match="labels"): row_objective(model, batch | dict(labels=batch["labels"][:, :4]))


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")  # the name that transformers 4 knows
@pytest.mark.parametrize("name,bad", [("gradient_checkpointing", dict(gradient_checkpointing=True)), ("max_grad_norm", dict(max_grad_norm=0.5)), ("method", None), ("optimizers", None)])
def test_what_needs_gradients_is_refused_by_name(tmp_path, name, bad):
    extra = dict(method=dict(method="adam")) if name == "method" else dict(method=ZO | dict(optimizers=(torch.optim.SGD(gpt2().parameters(), 0.1), None))) if name == "optimizers" else {}
    if name == "method": RATE["adam"] = 0.1
    with pytest.raises(ValueError, match=name): trainer(tmp_path, gpt2(), **extra, **(bad or {}))


@pytest.mark.parametrize("name,value", [("fp16", True), ("fsdp", "full_shard"), ("deepspeed", "ds.json")])
def test_scalers_and_shards_are_refused_before_they_are_made(tmp_path, name, value):
    "On a machine that has them, Trainer would set them up first; set afterwards they stand in for that."
    args = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
    setattr(args, name, value)
    with pytest.raises(ValueError, match=f"{name}: {value!r}; GFTrainer has no gradients"): GFTrainer(gpt2(), args, train_dataset=ROWS)
    with pytest.raises(ValueError, match=f"{name}: {value!r}; GFTrainer has no gradients"): GFTrainer(model=gpt2(), args=args, train_dataset=ROWS)


def test_frozen_models_and_early_steps_are_named(tmp_path):
    with pytest.raises(ValueError, match="requires a gradient"): trainer(tmp_path, gpt2().requires_grad_(False)).train()
    t = trainer(tmp_path, gpt2())
    t.create_optimizer()
    with pytest.raises(RuntimeError, match="before a batch"): t.optimizer.step()


def test_backward_is_never_called(tmp_path, monkeypatch):
    def no(*a, **k): raise AssertionError("backward")
    monkeypatch.setattr(torch.Tensor, "backward", no)
    monkeypatch.setattr(torch.autograd, "backward", no)
    for method in (ZO, ES): trainer(tmp_path, gpt2(), method, max_steps=2).train()


def test_without_transformers_the_extra_is_named():
    code = "import sys; sys.modules['transformers'] = None\ntry: import gfopt.adapters.huggingface\nexcept ImportError as e: print(e)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "gfopt[hf]" in out.stdout, out.stderr
