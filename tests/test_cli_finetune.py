"gfopt finetune and gfopt replay: they do what they say, and forty wrong inputs get forty clear answers."
import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from finetuning import tiny

from gfopt.adapters.cli import main, parser
from gfopt.lm.finetune import next_token
from gfopt.lm.model import Llama, LlamaConfig, load_model, save_model
from gfopt.lm.replay import weights_hash
from gfopt.lm.text import ByteTokenizer

SHAPE = dict(d_model=16, n_layers=1, n_heads=2, n_kv_heads=2, d_ff=32, max_len=64)
OBJECTIVES = '''
from gfopt.lm.finetune import next_token
def good(model, batch): return next_token(model, batch)
def backward(model, batch): return next_token(model, batch).mean().backward()
def nan(model, batch): return next_token(model, batch) * float("nan")
def nothing(model, batch): pass
def few(model, batch): return next_token(model, batch)[:3]
def raises(model, batch): raise ValueError("my own mistake")
number = 3
'''


@pytest.fixture
def folder(tmp_path, monkeypatch):
    "A base model, two files of rows, a module of objectives and one fine-tune, in the current folder."
    monkeypatch.chdir(tmp_path)
    save_model(Llama(LlamaConfig(vocab_size=257, **SHAPE)), "base")
    save_model(Llama(LlamaConfig(vocab_size=257, **SHAPE), seed=1), "other")
    save_model(tiny(), "wordless")
    Path("rows.jsonl").write_text('{"text": "To be or not to be"}\n{"prompt": "2+2=", "completion": "4"}\n')
    Path("mine_of_this_test.py").write_text(OBJECTIVES)
    for name, text in BAD.items():
        Path(name).write_text(text) if isinstance(text, str) else Path(name).write_bytes(text)
    Path("empty").mkdir()
    return tmp_path


BAD = {"broken.jsonl": '{"text": "a"}\n{"text": \n', "list.jsonl": "[1, 2]\n", "keys.jsonl": '{"question": "a"}\n', "number.jsonl": '{"text": 7}\n', "void.jsonl": "", "mixed.jsonl": '{"text": "a"}\n{"input_ids": [1, 2]}\n',
       "long.jsonl": json.dumps(dict(prompt="a" * 200, completion="b")) + "\n", "ids.jsonl": '{"input_ids": "abc"}\n', "latin.jsonl": b'{"text": "\xe9"}\n',
       "study.jsonl": '{"gfopt":1,"space":{}}\n', "noise.jsonl": '{"gfopt":1,"kind":"finetune","noise":99}\n', "text.jsonl": "Dear diary\n", "file": "x", "blank.jsonl": '{"text": ""}\n', "blank.txt": " \n"}
RUN = "finetune --model base --data rows.jsonl --steps 3 --set population=4 batch_size=2 --quiet --out "


def run(capsys, line):
    "Exit code, what was printed, what was complained about."
    try:
        code = main(shlex.split(line))
    except SystemExit as e:
        code = e.code
    said = capsys.readouterr()
    return code, said.out, said.err


def test_finetune_and_replay(folder, capsys):
    code, out, _ = run(capsys, RUN + "tuned --evaluate rows.jsonl --every 2 --json")
    short = json.loads(out.splitlines()[-1])
    assert code == 0 and short["steps"] == 3 and short["stopped"] == "steps" and short["out"] == "tuned" and short["best_step"] in (0, 2, 3)
    assert "remember=...) measures it" in Path("tuned/report.html").read_text() and "lost" not in short
    code, out, _ = run(capsys, "replay base tuned/finetune.jsonl --out again --json --quiet")
    assert code == 0 and json.loads(out.splitlines()[-1])["weights"] == weights_hash(load_model("tuned")) == weights_hash(load_model("again")) != weights_hash(load_model("base"))
    assert ByteTokenizer().to_json() == Path("again/tokenizer.json").read_text()
    run(capsys, RUN + "tuned --evaluate rows.jsonl --every 2 --steps 5")  # goes on
    assert run(capsys, "replay base tuned/finetune.jsonl --upto 3 --out third --quiet")[0] == 0
    assert weights_hash(load_model("third")) == weights_hash(load_model("again")) != weights_hash(load_model("tuned"))
    code, out, _ = run(capsys, RUN + "kept --evaluate rows.jsonl --remember rows.jsonl --every 2 --json")
    short = json.loads(out.splitlines()[-1])
    assert code == 0 and short["gained"] == pytest.approx(-short["lost"]) and f"Gained {short['gained']:.4g}, lost" in Path("kept/report.html").read_text()
    best = run(capsys, RUN + "best --evaluate rows.jsonl --every 2 --steps 5 --best")
    assert best[0] == 0 and run(capsys, "replay base best/finetune.jsonl --upto best --out b --quiet")[0] == 0
    assert weights_hash(load_model("b")) == weights_hash(load_model("best"))


def test_an_objective_of_ones_own_and_every_method(folder, capsys):
    for method in ("lowrank_es", "mezo", "fzoo"):
        extra = "" if method == "lowrank_es" else " --set batch_size=1"
        code, _, err = run(capsys, f"finetune --model base --data rows.jsonl --steps 1 --quiet --method {method} --objective mine_of_this_test:good --out {method}{extra}")
        assert code == 0, err


def test_hugging_face_folder(folder, capsys):
    tf = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    letters = {c: i for i, c in enumerate("</s> abcdefghijklmnopqrstuvwxyzTo=+0123456789".replace("</s>", "\0"))}
    tok = tokenizers.Tokenizer(tokenizers.models.WordLevel(letters, unk_token=" "))
    tok.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    tf.PreTrainedTokenizerFast(tokenizer_object=tok, eos_token="\0", unk_token=" ").save_pretrained("hf")
    with torch.random.fork_rng(devices=[]):
        tf.AutoModelForCausalLM.from_config(tf.LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2)).save_pretrained("hf")
    code, _, err = run(capsys, RUN.replace("--model base", "--model hf") + "tuned")
    assert code == 0, err
    code, _, err = run(capsys, "replay hf tuned/finetune.jsonl --out again --quiet")
    assert code == 0, err
    load = tf.AutoModelForCausalLM.from_pretrained
    assert weights_hash(load("tuned")) == weights_hash(load("again")) != weights_hash(load("hf"))


def test_hugging_face_folder_with_a_tokenizer_of_this_package(folder, capsys):
    tf = pytest.importorskip("transformers")
    with torch.random.fork_rng(devices=[]):
        tf.AutoModelForCausalLM.from_config(tf.LlamaConfig(vocab_size=257, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2)).save_pretrained("hf")
    Path("hf/tokenizer.json").write_text(ByteTokenizer().to_json())
    code, _, err = run(capsys, replaced(RUN, model="hf") + "tuned")
    assert code == 0 and json.loads(Path("tuned/tokenizer.json").read_text()) == dict(kind="bytes"), err


def test_a_run_without_a_step_has_a_report_and_no_warning(folder, capsys):
    code, _, err = run(capsys, replaced(RUN, steps="0") + "none")  # warnings are errors in these tests
    assert code == 0 and Path("none/report.html").exists(), err


@pytest.mark.parametrize("command", ["finetune", "replay"])
def test_help_has_an_example_that_runs(command, folder, capsys):
    code, text, _ = run(capsys, f"{command} --help")
    example = re.sub(r"\s+", " ", text.partition("example: gfopt ")[2]).strip()
    assert code == 0 and example.startswith(command)
    if command == "replay":
        run(capsys, RUN + "tuned")
    for name in ("mine.txt", "other.txt"): Path(name).write_text("to be or not to be\n")
    code, _, err = run(capsys, example.replace("nano", "base") + " --quiet")
    assert code == 0, err


def replaced(line, **words):
    for name, value in words.items():
        line = re.sub(rf"--{name} \S+", f"--{name} {value}", line)
    return line


FINETUNE = [  # what is changed, the exit code, what the complaint must say
    (dict(data="missing.jsonl"), "", 1, "--data missing.jsonl: no such file"), (dict(data="empty"), "", 1, "--data empty: a folder; allowed: a file"), (dict(), "--evaluate missing.jsonl", 1, "--evaluate missing.jsonl"), (dict(), "--evaluate rows.jsonl --remember missing.jsonl", 1, "--remember missing.jsonl"),
    (dict(data="broken.jsonl"), "", 1, "broken.jsonl, line 2"), (dict(data="list.jsonl"), "", 1, "list.jsonl, line 1"), (dict(data="keys.jsonl"), "", 1, "dict with question; allowed: an object with text"),
    (dict(data="number.jsonl"), "", 1, "text is 7; allowed: a string"), (dict(data="void.jsonl"), "", 1, "void.jsonl: no rows"), (dict(data="mixed.jsonl"), "", 1, "row 2 has input_ids"),
    (dict(data="long.jsonl"), "", 1, "allowed: length=64"), (dict(data="ids.jsonl"), "", 1, "input_ids is 'abc'"), (dict(data="latin.jsonl"), "", 1, "latin.jsonl: byte 10 is not UTF-8; allowed"), (dict(data="text.jsonl"), "", 1, "line 1: 'Dear diary'"),
    (dict(model="missing"), "", 1, "--model missing: no folder with a config.json; allowed"), (dict(model="empty"), "", 1, "--model empty: no folder with a config.json"), (dict(model="wordless"), "", 1, "no tokenizer.json"),
    (dict(), "--objective accuracies", 1, "objective: 'accuracies'; allowed"), (dict(), "--objective no_such_module:f", 1, "cannot be found"), (dict(), "--objective mine_of_this_test:absent", 1, "cannot be found"),
    (dict(), "--objective mine_of_this_test:number", 1, "is int; allowed: a function"), (dict(), "--objective mine_of_this_test:backward", 1, "backward"), (dict(), "--objective mine_of_this_test:nan", 1, "step 0: none of the 4 losses is finite"),
    (dict(), "--objective mine_of_this_test:nothing", 1, "objective: it returned NoneType"), (dict(), "--objective mine_of_this_test:few", 1, "allowed: (4,) for members"), (dict(), "--objective mine_of_this_test:raises", 1, "my own mistake"),
    (dict(), "--method adamw", 1, "method: 'adamw'; allowed: 'lowrank_es'"), (dict(set="momentum=1"), "", 1, "momentum: no setting of 'lowrank_es'; allowed"), (dict(set="lr"), "", 1, "--set lr: allowed: name=value"),
    (dict(set="lr=-1"), "", 1, "lr: -1"), (dict(set="population=5"), "", 1, "population: 5"), (dict(set="sigma=much"), "", 1, "sigma: 'much'"), (dict(set="journal=x"), "", 1, "--set journal: allowed"),
    (dict(steps="-3"), "", 1, "steps: -3"), (dict(steps="many"), "", 2, "invalid int value: 'many'"), (dict(), "--every 0", 1, "every: 0"), (dict(), "--patience 2", 1, "--patience: needs --evaluate FILE"), (dict(), "--loud", 2, "gfopt finetune: error: unrecognized arguments: --loud"), (dict(), "--evaluat rows.jsonl", 2, "unrecognized arguments: --evaluat"),
    (dict(), "--best", 1, "--best: needs --evaluate FILE"), (dict(), "--remember rows.jsonl", 1, "--remember: needs --evaluate FILE"), (dict(data="blank.jsonl"), "", 1, "a text without tokens"), (dict(data="blank.txt"), "", 1, "blank.txt: no rows"),
]
REPLAY = [
    ("replay other tuned/finetune.jsonl --out x", 1, "its weights are not those tuned/finetune.jsonl began with"), ("replay base missing.jsonl --out x", 1, "journal: missing.jsonl does not exist"),
    ("replay base study.jsonl --out x", 1, "is not one of finetune"), ("replay base text.jsonl --out x", 1, "text.jsonl, line 1"), ("replay base noise.jsonl --out x", 1, "noise version 99"),
    ("replay base tuned/finetune.jsonl --upto 9 --out x", 1, "upto: 9; allowed: 0 to 3"), ("replay base tuned/finetune.jsonl --upto soon --out x", 1, "upto: 'soon'"), ("replay base tuned/finetune.jsonl --upto best --out x", 1, "nothing was evaluated"),
    ("replay base tuned/finetune.jsonl", 2, "--out"), ("replay base tuned/finetune.jsonl --out file", 1, "file is a file"), ("replay base cut.jsonl --out x", 1, "cut.jsonl, line 2"), ("replay missing tuned/finetune.jsonl --out x", 1, "--model missing"),
    (RUN + "tuned --seed 4", 1, "its seed is 0, asked for is 4"), (replaced(RUN, model="other") + "tuned", 1, "its base is"), (replaced(RUN, steps="2") + "tuned", 1, "steps: 2; allowed: at least the 3"), (RUN + "file", 1, "--out file: a file"),
]


@pytest.mark.parametrize("words,more,code,match", FINETUNE, ids=lambda v: None if isinstance(v, int) else str(v)[:40])
def test_bad_finetune(words, more, code, match, folder, capsys):
    found, _, err = run(capsys, replaced(RUN, **words) + f"new {more}")
    assert found == code and match in err and "Traceback" not in err, err
    assert len(err.strip().splitlines()) == 1 or code == 2 or "Warning" in err, err
    assert not Path("new/model.safetensors").exists()


def test_bad_replay_and_nothing_is_lost(folder, capsys):
    assert run(capsys, RUN + "tuned")[0] == 0
    lines = Path("tuned/finetune.jsonl").read_text().splitlines(keepends=True)
    Path("cut.jsonl").write_text("".join(lines[:1] + lines[2:]))
    kept = {p: p.read_bytes() for p in Path("tuned").iterdir()}
    for line, code, match in REPLAY:
        found, _, err = run(capsys, line + " --quiet")
        assert found == code and match in err and "Traceback" not in err, (line, err)
        assert not Path("x").exists(), line
    assert {p: p.read_bytes() for p in Path("tuned").iterdir()} == kept and Path("file").read_text() == "x"


def test_forty():
    assert len(FINETUNE) + len(REPLAY) >= 40
    assert parser().prog == "gfopt" and callable(next_token)


def test_plain_text_is_cut_into_rows_and_the_evaluation_is_told(folder, capsys):
    Path("mine.txt").write_text("to be or not to be, " * 60)
    words = replaced(RUN, data="mine.txt").replace("batch_size=2", "batch_size=2 length=32") + "text --evaluate mine.txt --every 1 --json"
    code, out, err = run(capsys, words)
    assert code == 0, err
    short = json.loads(out.splitlines()[-1])
    assert f"evaluation {short['first_value']:.4f} -> {short['last_value']:.4f}" in out
    assert ("worse than at the start" in out) == (short["last_value"] > short["first_value"])
    assert "done before" not in out and "done before" in run(capsys, words)[1]


def test_a_folder_with_other_files_is_left_as_it_is(folder, capsys):
    Path("full").mkdir()
    Path("full/model.safetensors").write_bytes(b"mine")
    code, _, err = run(capsys, RUN + "full")
    assert code == 1 and "--out full: holds other files; allowed" in err and Path("full/model.safetensors").read_bytes() == b"mine"


def test_complaints_about_files_come_before_a_model_is_made(folder, capsys, monkeypatch):
    from gfopt.adapters import cli
    monkeypatch.setattr(cli, "_model", lambda where: pytest.fail("a model was made"))
    for words in (replaced(RUN, data="broken.jsonl") + "new", RUN + "new --best", RUN + "new --evaluate latin.jsonl"):
        assert run(capsys, words)[0] == 1
