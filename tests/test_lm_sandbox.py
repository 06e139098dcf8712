"Programs that nobody has read: whatever they do, there is an answer, and nothing of them is left."
import glob
import os
import tempfile

import pytest

from gfopt.lm import sandbox
from gfopt.lm.sandbox import passed, run_sandboxed, walls

SHORT = dict(seconds=0.5)


def test_an_honest_program_is_data():
    r = run_sandboxed("import sys\nprint(sys.stdin.read().upper())\nprint('no', file=sys.stderr)\nraise SystemExit(3)", stdin="né\n", seconds=20)
    assert (r.status, r.code, r.stdout, r.stderr) == ("error", 3, "NÉ\n\n", "no\n") and r.seconds > 0


@pytest.mark.parametrize("code,status,word", [
    ("1 / 0", "error", "ZeroDivisionError"), ("def f(:", "error", "SyntaxError"), ("x = bytearray(10**10)", "memory", "MemoryError"),
    ("x = []\nwhile True: x.append(bytes(10**6))", "memory", "MemoryError"), ("import os; os.abort()", "killed", ""),
    ("import os; os.kill(os.getpid(), 9)\nwhile True: pass", "killed or timeout", ""), ("raise MemoryError('all mine')", "memory", ""),
    ("import sys; sys.setrecursionlimit(10**9)\ndef f(): f()\nf()", "killed or error or memory or timeout", ""),
    ("\ud800", "error", "no text"), ("x = '\0'", "error", "null byte"), ("x = 1\n" * 20_000, "error", "65536"), ("", "ok", "")])
def test_every_end_has_a_name(code, status, word):
    r = run_sandboxed(code, seconds=4 if "timeout" in status else 20)
    assert r.status in status.split(" or ") and word in r.stderr


@pytest.mark.parametrize("code", ["while True: pass", "import time; time.sleep(99)", "import signal, time\nfor s in (1, 2, 15): signal.signal(s, signal.SIG_IGN)\ntime.sleep(99)"])
def test_time_ends(code):
    r = run_sandboxed(code, **SHORT)
    assert (r.status, r.code) == ("timeout", None) and r.seconds >= 0.5


@pytest.mark.parametrize("bomb", ["import os\nwhile True: os.fork()", "import os\nos.fork()", "import subprocess; subprocess.run(['true'])",
                                  "import threading; threading.Thread(target=print).start()"])
def test_no_further_process(bomb):
    r = run_sandboxed(bomb, seconds=20)
    assert r.status == "error" and ("BlockingIOError" in r.stderr or "can't start new thread" in r.stderr)


def test_files_and_output_are_bounded():
    r = run_sandboxed("with open('a', 'wb') as f: f.write(bytes(5000))", output=1000, seconds=20)
    assert r.status == "error" and "File too large" in r.stderr
    r = run_sandboxed("while True: print('x' * 99)", output=1000, seconds=20)
    assert r.status == "error" and len(r.stdout) <= 1000 and len(r.stderr) <= 1000
    assert run_sandboxed("open('a', 'wb').write(bytes(500))", output=1000, seconds=20).status == "ok"


def test_limits_cannot_be_taken_back():
    r = run_sandboxed("import resource as r\nfor k in (r.RLIMIT_AS, r.RLIMIT_CPU, r.RLIMIT_FSIZE, r.RLIMIT_NPROC):\n"
                      "    try: r.setrlimit(k, (r.RLIM_INFINITY,) * 2)\n    except (ValueError, PermissionError, OSError): print('no')", seconds=20)
    assert r.stdout == "no\n" * 4


def test_own_folder_empty_environment_and_nothing_left(monkeypatch):
    monkeypatch.setenv("SECRET", "42")
    code = "import os\nopen('x', 'w').write('1')\nos.mkdir('d')\nos.chmod('d', 0)\nprint(os.getcwd(), os.environ.get('SECRET'), os.environ.get('HOME'), os.listdir())"
    r = run_sandboxed(code, seconds=20)
    home, *rest = r.stdout.split(maxsplit=3)
    assert r.status == "ok" and rest[:2] == ["None", "None"] and home != os.getcwd()
    assert not os.path.exists(home) and not glob.glob(tempfile.gettempdir() + "/sample-*/d")


def test_a_program_cannot_write_elsewhere(tmp_path):
    if os.geteuid(): pytest.skip("the child is the same user")
    victim = tmp_path / "file"
    victim.write_text("mine")
    os.chmod(tmp_path, 0o755)
    r = run_sandboxed(f"open({str(victim)!r}, 'w').write('yours')", seconds=20)
    assert r.status == "error" and victim.read_text() == "mine"


def test_own_modules_of_the_caller_are_not_seen(tmp_path, monkeypatch):
    (tmp_path / "evil.py").write_text("print('hello')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert "ModuleNotFoundError" in run_sandboxed("import evil", seconds=20).stderr


def test_no_network_where_the_system_has_walls():
    if "--net" not in walls(): pytest.skip("no namespaces here")
    import socket
    with socket.create_server(("127.0.0.1", 0)) as server:
        r = run_sandboxed(f"import socket; socket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 2)", seconds=20)
    assert r.status == "error" and "unreachable" in r.stderr


def test_the_group_is_killed_without_walls_too(monkeypatch):
    monkeypatch.setattr(sandbox, "walls", lambda: ())
    assert run_sandboxed("import time; time.sleep(99)", **SHORT).status == "timeout"
    assert run_sandboxed("import os; os.fork()", seconds=20).status == "error"
    assert run_sandboxed("import os; os.abort()", seconds=20).status == "killed"


def test_interrupt_kills_the_child(monkeypatch):
    killed, end = [], sandbox._end
    def wait(self, timeout=None):
        if timeout is not None: raise KeyboardInterrupt
        return real(self)
    real = sandbox.subprocess.Popen.wait
    walls()
    monkeypatch.setattr(sandbox.subprocess.Popen, "wait", wait)
    monkeypatch.setattr(sandbox, "_end", lambda child: (end(child), killed.append(child)))
    with pytest.raises(KeyboardInterrupt): run_sandboxed("import time; time.sleep(99)", seconds=50)
    assert killed and killed[0].returncode is not None


@pytest.mark.parametrize("arg", [dict(seconds=0), dict(seconds=float("nan")), dict(memory=1000), dict(output=0), dict(seconds=float("inf"))])
def test_bad_budgets_are_named(arg):
    with pytest.raises(ValueError, match=next(iter(arg))): run_sandboxed("pass", **arg)
    with pytest.raises(TypeError, match="code"): run_sandboxed(b"pass")


def test_leaving_early_or_printing_everything_does_not_pass():
    cases = [("2 3", "5"), ("4 4", "8")]
    programs = {"print(sum(map(int, input().split())))": 1, "import os; os._exit(0)": 0, "print(5); print(8)": 0, "print('5\\n')": 0.5,
                "print(sum(map(int, input().split()))); raise SystemExit(1)": 0, "while True: pass": 0}
    for code, share in programs.items(): assert passed(code, cases, seconds=20 if "while" not in code else 0.3) == share
    with pytest.raises(ValueError, match="cases"): passed("pass", [])
