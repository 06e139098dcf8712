"What a step costs, nbs/6_experiments/10: the clock, the ledger of memory, the verdicts."

import json
import math
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from gfopt.experiments import forward_cost as fc
from gfopt.experiments import peers
from gfopt.lm import population
from gfopt.lm.model import row_losses


class Clock:
    "A clock that only moves when it is told to."

    now = 0.0

    def __call__(self):
        return self.now

    def spend(self, ms):
        self.now += ms / 1e3


@pytest.fixture
def toy():
    model, batch = fc.make_model(fc.TINY), fc.make_batch(64, 4, 8)
    return model, lambda input_ids, labels: row_losses(model(input_ids), labels), batch


# the clock ------------------------------------------------------------------------------------------


def test_turns_go_round_and_keep_every_block():
    clock, order = Clock(), []

    def contender(name, ms):
        return lambda: lambda: (order.append(name), clock.spend(ms))

    told = fc.turns(dict(a=contender("a", 2), b=contender("b", 7)), rounds=3, least=0.01, clock=clock)
    assert told == dict(a=pytest.approx([2] * 3), b=pytest.approx([7] * 3), errors={})
    assert "".join(order) == "aaabbb" + 3 * ("aaaaa" + "bb")


def test_turns_do_not_count_making_and_warming():
    clock, left = Clock(), iter([500, 400, 4, 4, 4, 4, 4])

    def make():
        clock.spend(1000)
        return lambda: clock.spend(next(left))

    assert fc.turns(dict(a=make), rounds=3, least=0, clock=clock)["a"] == pytest.approx([4] * 3)


def test_a_contender_that_falls_over_is_told_and_the_others_are_measured():
    clock = Clock()
    told = fc.turns(dict(bad=lambda: [][0], good=lambda: lambda: clock.spend(1)), 2, 0, clock)
    assert told["good"] == pytest.approx([1, 1]) and "bad" not in told
    assert told["errors"]["bad"].startswith("IndexError")


def test_ratios_are_taken_within_a_round():
    row = dict(ms=dict(forwards=[10, 100, 20], ours=[12, 110, 21], theirs=[14, 104, 24]))
    assert fc.over(row, "ours", "forwards") == pytest.approx(1.1)  # 1.05 by the medians
    assert fc.beyond(row, "ours", "theirs", "forwards") == pytest.approx(2 / 4)
    assert math.isnan(fc.over(row, "ours", "nobody")) and math.isnan(fc.beyond(row, "ours", "theirs", "nobody"))


def test_the_gpu_clock_waits_for_the_gpu(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waited.append(1))
    assert fc.clock_of("cuda:0")() > 0 and waited == [1]
    assert fc.clock_of("cpu")() > 0 and waited == [1]


# the contenders -------------------------------------------------------------------------------------


def test_mezo_is_algorithm_1():
    g = torch.Generator().manual_seed(0)
    params = [torch.randn(3, 4, generator=g, dtype=torch.float64), torch.randn(5, generator=g, dtype=torch.float64)]
    target = [torch.randn(p.shape, generator=g, dtype=torch.float64) for p in params]

    def loss_of(ps):
        return sum(((p - t) ** 2).sum() for p, t in zip(ps, target))

    draw = torch.Generator().manual_seed(11)
    zeta = [torch.randn(p.shape, generator=draw, dtype=torch.float64) for p in params]
    eps, lr = 1e-3, 0.05
    plus, minus = (float(loss_of([p + s * eps * z for p, z in zip(params, zeta)])) for s in (1, -1))
    want = [p - lr * (plus - minus) / (2 * eps) * z for p, z in zip(params, zeta)]
    told = fc.mezo_step(params, lambda: loss_of(params), 11, lr, eps)
    torch.testing.assert_close(params, want, rtol=1e-9, atol=1e-9)
    assert told == pytest.approx((plus + minus) / 2)


CONTENDERS = ["forward", "two forwards", "MeZO", "ZerothOrder", "ZerothOrder alone", "AdamW", "LowRankES", "population", "one-sided"]


@pytest.mark.parametrize("name", CONTENDERS)
def test_contenders_read_the_same_tokens_and_no_global_generator(name, toy):
    model, score, batch = toy
    seen, state = [], torch.get_rng_state()

    def counted(input_ids, labels):
        seen.append(input_ids.numel())
        return score(input_ids, labels)

    step = fc.stepper(name, model, counted, batch)
    step(), seen.clear(), step()  # the first step of a population checks itself
    passes = {"two forwards": 2, "MeZO": 2, "ZerothOrder": 2, "ZerothOrder alone": 0}.get(name, 1)
    assert sum(seen) == passes * batch["labels"].numel()
    assert torch.equal(state, torch.get_rng_state())


def test_every_population_pass_has_new_noise(toy):
    model, score, batch = toy
    losses = []
    step = fc.stepper("population", model, lambda **b: losses.append(score(**b)), batch)
    step(), step()
    assert losses[0].std() > 0 and not torch.equal(*losses)


def test_unknown_contender(toy):
    with pytest.raises(ValueError, match="Muon"):
        fc.stepper("Muon", *toy)


# the ledger -----------------------------------------------------------------------------------------

MB = 1_000_000


def test_a_storage_counts_once_and_until_its_last_view_dies():
    with fc.Peak() as m:
        a = torch.ones(MB // 4)
        views = [a[:10], a.view(-1, 2), a.t()]
        assert MB <= m.now < 1.02 * MB
        del a
        assert MB <= m.now < 1.02 * MB
        del views
        assert m.now < 0.02 * MB and MB <= m.peak < 1.03 * MB


def test_numpy_counts_once_when_torch_reads_it():
    with fc.Peak() as m:
        x = np.ones(MB // 8)
        t = torch.from_numpy(x)
        y = t + 1  # a megabyte of torch's own
        assert 2 * MB <= m.now < 2.03 * MB
        del x, t, y
        assert m.now < 0.03 * MB


def test_a_short_lived_array_between_two_operations_is_seen():
    with fc.Peak() as m:
        torch.ones(1)
        np.ones(MB // 8).sum()
        torch.ones(1)
        assert MB <= m.peak < 1.03 * MB
        np.ones(MB // 8).sum()
        torch.ones(MB // 4)
        assert m.peak < 1.05 * MB  # the array was gone when this came
        m.restart()
        torch.ones(1)
        assert m.peak < 0.03 * MB


def test_what_backward_keeps_is_counted():
    w = torch.ones(MB // 4, requires_grad=True)
    with fc.Peak() as m:
        m.meet([w])
        loss = ((w * 2).exp() * 3).sum()
        assert 2 * MB <= m.now < 2.03 * MB  # the weights and what exp saved
        loss.backward()
        del loss
        assert 2 * MB <= m.now < 2.03 * MB and m.peak >= 3 * MB  # the weights and their gradient


def test_kept_is_what_a_method_holds_between_steps():
    w = torch.nn.Parameter(torch.ones(MB // 4))

    def make():
        opt = torch.optim.AdamW([w])
        return lambda: (opt.zero_grad(), (w * w).sum().backward(), opt.step())

    told = fc.peak_memory(make, [w])
    assert 3 * MB <= told["kept"] < 3.05 * MB  # two moments and the gradient
    assert told["peak"] >= 4 * MB


def test_cuda_is_asked_about_one_step(monkeypatch):
    said = []
    for name, value in dict(memory_allocated=7, max_memory_allocated=9, reset_peak_memory_stats=None, synchronize=None).items():
        monkeypatch.setattr(torch.cuda, name, lambda name=name, value=value: said.append(name) or value)
    monkeypatch.setattr(fc, "CudaPeak", type("P", (fc.CudaPeak,), dict(now=property(lambda s: torch.cuda.memory_allocated()), peak=property(lambda s: torch.cuda.max_memory_allocated()))))
    told = fc.peak_memory(lambda: lambda: said.append("step"), [], "cuda")
    assert told == dict(peak=9, kept=0)
    assert said == ["step", "step", "memory_allocated", "step", "step", "reset_peak_memory_stats", "step", "synchronize", "max_memory_allocated", "memory_allocated"]


def test_memory_row():
    row = fc.run_memory(fc.TINY, 4, 8, ("forward", "MeZO", "AdamW", "Muon"))
    assert row["tokens"] == 32 and row["weights"] == 4 * row["parameters"] and row["layer"] == 16 * 32 * 4
    assert row["bytes"]["AdamW"]["kept"] > row["bytes"]["MeZO"]["kept"]
    assert row["bytes"]["forward"]["peak"] >= row["weights"] and "Muon" in row["errors"]


def test_what_is_made_once_and_for_all_belongs_to_no_method():
    tables = []

    def make():
        if not tables: tables.append(torch.zeros(MB // 4))  # as an import would
        return lambda: None

    assert fc.peak_memory(make, [])["kept"] < 0.01 * MB


def test_a_lean_step_needs_no_more_memory_than_inference():
    read = fc.run_memory(fc.NANO, 8, 64, ("forward", "ZerothOrder lean"))["bytes"]
    assert read["ZerothOrder lean"]["peak"] <= 1.05 * read["forward"]["peak"]


def test_a_large_embedding_and_its_head_never_exist_whole():
    shape, tile = fc._llama(64, 1, 2, 2, 176, 8192, 64), 4 * population.TILE
    model, batch = fc.make_model(shape), fc.make_batch(8192, 1, 8)
    score, there = fc._score(model, False), [list(model.parameters()), batch]

    def lean():
        opt = fc.ZerothOrder(model, lr=0.0, batched=1)
        return lambda: (opt.measure(lambda: score(**opt.expand(batch))), opt.noise.forget(room=True))
    inference = fc.peak_memory(partial(fc.stepper, "forward", model, score, batch), there)["peak"]
    assert fc.peak_memory(lean, there)["peak"] - inference < 2 * tile < 4 * 8192 * 64 / 3  # signs of all weights, a tile of one


# the bits -------------------------------------------------------------------------------------------


def test_the_hash_sees_every_bit():
    t = torch.tensor([0.0, 1.0])
    others = [torch.tensor([-0.0, 1.0]), torch.tensor([1.0, 0.0]), torch.nextafter(t, torch.tensor(2.0))]
    assert len({fc.weights_hash([t, v]) for v in (t, *others)}) == 4 and fc.weights_hash([t]) == fc.weights_hash([t.clone()])


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_a_thousand_perturbations_bit_equal(dtype):
    row = fc.run_bits(fc.TINY, dtype, 1000)
    assert row["before"] == row["after"] and row["dtype"] == dtype
    assert row["mezo"]["changed"] > 0.5 and row["mezo"]["rms"] > 0


def test_a_perturbation_that_leaves_a_trace_is_found(monkeypatch):
    def careless(self, closure, pairs):
        for p in (p for g in self.param_groups for p in g["params"]):
            p.data.add_(1e-3).sub_(1e-3)

    monkeypatch.setattr(fc.ZerothOrder, "measure", careless)
    row = fc.run_bits(fc.TINY, "bfloat16", 2)
    assert row["before"] != row["after"]


def test_weights_that_are_left_swapped_are_found(monkeypatch):
    def forgetful(self, closure, pairs):
        p = self.param_groups[0]["params"][0]
        p.data = p.data + 1

    monkeypatch.setattr(fc.ZerothOrder, "measure", forgetful)
    row = fc.run_bits(fc.TINY, "float32", 2)
    assert row["before"] != row["after"]


def test_noise_row_is_per_million(monkeypatch):
    monkeypatch.setattr(fc, "turns", lambda c, *a: {k: [2.0] for k in c} | dict(errors={}))
    assert fc.run_noise(n=500_000)["ms"] == dict(signs=[4.0], normals=[4.0], randn=[4.0])


# the rows -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", [*fc.PRESETS])
def test_presets_are_json_and_ask_for_figures_that_exist(preset):
    rows = fc.PRESETS[preset]
    assert json.loads(json.dumps(rows)).keys() == rows.keys()
    for row in rows.values():
        assert row["asked"].keys() <= fc.FIGURES.get(row["measure"], {}).keys()


def test_what_the_issue_asks():
    def asked(preset, row):
        return fc.PRESETS[preset][row]["asked"]

    assert asked("cpu", "step 256") == asked("cpu", "step 4096") == dict(step=1.10, beyond=0.4)
    assert asked("gpu", "step 2048")["step"] == 1.20 and asked("gpu", "step 16384")["step"] == 1.03
    for d in (128, 256, 512):
        row = fc.PRESETS["cpu"][f"population {d}"]
        assert row["asked"]["population"] == 1.18 and row["settings"]["shape"]["d_model"] == d
        assert (row["settings"]["rows"], row["settings"]["length"]) == (32, 128)
    assert asked("gpu", "population 1024")["population"] == 1.05
    assert asked("cpu", "memory 4096")["population"] == 1.05 and asked("gpu", "memory 2048")["layers"] == 1
    assert all(fc.PRESETS["cpu"][f"bits {t}"]["asked"] == dict(bits=0) for t in ("float64", "float32", "bfloat16", "float16"))


def test_models_have_the_size_they_are_called_by():
    with torch.device("meta"):
        shape = fc.BILLION
        d, kv = shape["d_model"], shape["d_model"] // shape["n_heads"] * shape["n_kv_heads"]
        block = 2 * d * d + 2 * d * kv + 3 * d * shape["d_ff"] + 2 * d
        assert 1e9 < shape["n_layers"] * block + shape["vocab_size"] * d + d < 1.1e9
    assert 0.9e6 < sum(p.numel() for p in fc.make_model(fc.NANO).parameters()) < 1.1e6


def test_verdicts():
    ms = {"two forwards": [10.0], "ZerothOrder": [10.9], "MeZO": [13.0]}
    told = {r["name"]: r for r in fc.cost_rows("cpu", {"step 256": dict(ms=ms)}) if r["row"] == "step 256"}
    assert told["step"]["verdict"] == "reached" and told["step"]["value"] == pytest.approx(1.09)
    assert told["beyond"]["verdict"] == "reached" and told["mezo"]["verdict"] == "" and "adamw" not in told
    ms["ZerothOrder"] = [11.3]
    told = {r["name"]: r for r in fc.cost_rows("cpu", {"step 256": dict(ms=ms)}) if r["row"] == "step 256"}
    assert told["step"]["verdict"] == told["beyond"]["verdict"] == "NOT reached"
    assert fc.told([told["step"]]).splitlines()[0] == "step 256" and "<= 1.1 NOT reached" in fc.told([told["step"]])


def test_what_was_not_measured_is_not_reached():
    for rows in ({}, {k: dict(error="out of memory") for k in fc.PRESETS["gpu"]}):
        verdicts = [r["verdict"] for r in fc.cost_rows("gpu", rows)]
        assert {*verdicts} == {"not measured yet"} and len(verdicts) >= 10


@pytest.fixture
def at_home(monkeypatch):
    "Jobs run here instead of in processes of their own; which ones did."
    ran = []

    def here(target, measure, settings, device, env, say):
        ran.append(measure)
        assert env.keys() >= {"PYTHONPATH", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"}
        return json.loads(json.dumps(fc.run_row(measure, settings, device)))

    monkeypatch.setattr(peers, "in_process", here)
    return ran


def test_the_command(at_home, tmp_path, capsys):
    fc.main(["--preset", "smoke", "--out", str(tmp_path / "cost.json")])
    result = json.loads((tmp_path / "cost.json").read_text())
    assert result["rows"].keys() == fc.PRESETS["smoke"].keys() and result["settings"]["preset"] == "smoke"
    assert not any("error" in row for row in result["rows"].values())
    said = capsys.readouterr().out
    assert "a population's pass" in said and "not measured yet" not in said


def test_the_command_takes_some_rows_and_refuses_unknown_ones(at_home, tmp_path, capsys):
    fc.main(["noise", "--preset", "smoke", "--out", str(tmp_path / "noise.json")])
    assert at_home == ["noise"] and "population" not in capsys.readouterr().out
    with pytest.raises(SystemExit):
        fc.main(["nose", "--preset", "smoke", "--out", str(tmp_path / "noise.json")])
    assert "nose" in capsys.readouterr().err


def test_a_stopped_run_goes_on(at_home, tmp_path, monkeypatch):
    out, real, rows = tmp_path / "cost.json", fc.run_noise, ["noise", "bits float16"]
    monkeypatch.setattr(fc, "run_noise", lambda **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fc.run_cost(out, "smoke", rows=rows, say=lambda line: None)
    assert at_home == ["bits", "noise"] and not out.exists() and out.with_name("cost.json.part").exists()
    monkeypatch.setattr(fc, "run_noise", real)
    fc.run_cost(out, "smoke", rows=rows, say=lambda line: None)
    assert at_home == ["bits", "noise", "noise"] and out.exists()


def test_imports_only_what_a_bare_machine_has():
    absent = ["skopt", "sklearn", "fastcore", "nbdev", "IPython", "matplotlib", "transformers", "safetensors", "tokenizers"]
    code = f"import sys; sys.modules.update(dict.fromkeys({absent})); import gfopt.experiments.forward_cost as f; print(f.run_row('noise', dict(n=1000, rounds=1, least=0)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr
