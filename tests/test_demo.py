"""The demo's machinery: steps, interruption, the report, the command line."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gfopt.experiments import demo as module
from gfopt.experiments.demo import ACTS, Steps, demo
from gfopt.experiments.report import html_table, number, table, text_table

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    return demo("smoke", out=out, progress=False), out


def test_smoke_runs_every_act_and_writes_what_it_says(finished):
    results, out = finished
    assert set(results["acts"]) == set(ACTS) and json.loads((out / "results.json").read_text()) == results
    told = results["provenance"]
    assert {"device", "cores", "python", "torch", "numpy", "gfopt", "commit", "seed", "date"} <= told.keys()
    assert results["corpus"]["sha256"] and results["corpus"]["code.train"]["bytes"] > 1_000_000
    adapted = results["acts"]["train"]["adapted"]
    assert len({r["before"]["prose"] for r in adapted.values()}) == 1


def test_report_is_self_contained(finished):
    page = (finished[1] / "report.html").read_text()
    assert page.count("<img ") == 4 and page.count(' alt="') == 4 and "<script" not in page
    assert "src=\"data:" in page and "src=\"http" not in page and "href=" not in page
    assert "prefers-color-scheme: dark" in page and 'name="viewport"' in page
    assert str(Path.home()) not in page


def test_terminal_table_names_every_method(finished):
    text = table(finished[0])
    for word in ("zeroth order", "low-rank ES", "CMA-ES", "AdamW", "random"):
        assert word in text


def test_ctrl_c_keeps_finished_steps_and_the_next_run_goes_on(finished, tmp_path, monkeypatch):
    import shutil

    shutil.copytree(finished[1] / "steps", tmp_path / "steps")
    for gone in (tmp_path / "steps").glob("*ompress*"):
        gone.unlink()
    calls = []

    def stop(*a, **k):
        calls.append(1)
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(module, "run_compression", stop)
        part = demo("smoke", out=tmp_path, progress=False)
    assert part["interrupted"] and set(part["acts"]) == {"base", "train", "tune"} and calls == [1]
    assert "stopped early" in (tmp_path / "report.html").read_text()
    for k in part["acts"]:
        assert part["acts"][k] == finished[0]["acts"][k]
    whole = demo("smoke", out=tmp_path, progress=False)
    assert not whole["interrupted"] and set(whole["acts"]) == set(ACTS)


def test_steps_survive_damage(tmp_path):
    steps = Steps(tmp_path, {"a": 1})
    assert steps("x", lambda: [1]) == [1]
    (tmp_path / "x.json").write_text("{torn")
    assert steps("x", lambda: [2]) == [2] and Steps(tmp_path, {"a": 1})("x", lambda: [3]) == [2]


@pytest.mark.parametrize("args,code,words", [
    (["demo", "--preset", "huge"], 2, "huge"), (["nothing"], 2, "nothing"), (["demo", "--seed", "x"], 2, "seed"),
    (["demo", "--preset", "smoke", "--text", "missing.txt"], 1, "missing.txt"), (["methods"], 0, "cmaes"),
    (["--help"], 0, "demo"), (["demo", "--help"], 0, "--preset")])
def test_command_line_codes(args, code, words, tmp_path):
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    p = subprocess.run([sys.executable, "-c", "import sys; from gfopt.adapters.cli import main; sys.exit(main())", *args],
                       capture_output=True, text=True, env=env, cwd=tmp_path)
    assert p.returncode == code and words in p.stdout + p.stderr and "Traceback" not in p.stderr


def test_numbers_and_tables():
    assert [number(v) for v in (0.5, 12345.6, 3, None, float("nan"), "a")] == ["0.500", "12,346", "3", "–", "–", "a"]
    rows = [{"m": "<script>", "v": 1.0}]
    assert "&lt;script&gt;" in html_table(rows) and text_table(rows).splitlines()[0].split() == ["m", "v"]
