"Prompts for a model one can only ask, and a server that does everything a server can do."
import itertools
import json
import math
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from gfopt.lm.blackbox import Endpoint, search_prompt, token_space


@pytest.fixture
def serve():
    "A server whose answers are dealt one after the other: (status, body, seconds of sleep)."
    servers = []

    def start(*answers):
        script, seen = itertools.chain(answers, itertools.repeat(answers[-1])), []

        class Slot(BaseHTTPRequestHandler):
            def do_POST(self):
                seen.append((json.loads(self.rfile.read(int(self.headers["Content-Length"]))), dict(self.headers)))
                status, body, nap = next(script)
                time.sleep(nap)
                try:
                    if status is None: return self.connection.close()
                    self.send_response(status)
                    self.send_header("Content-Length", str(len(body)))
                    self.end_headers()
                    self.wfile.write(body)
                except OSError: pass  # the client has gone

            def log_message(self, *args): pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Slot)
        server.daemon_threads = False  # closing waits for the answers that are still under way: no socket outlives its test
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}/", seen

    yield start
    for s in servers: s.shutdown(), s.server_close()


OK = (200, b'{"loss": 0.5}', 0)


def test_question_and_answer(serve):
    url, seen = serve(OK)
    box = Endpoint(url, headers={"X-Key": "k"})
    assert box.loss({"prompt": "é", "n": [1, None]}) == 0.5 and not box.failures
    assert seen[0][0] == {"prompt": "é", "n": [1, None]} and seen[0][1]["X-Key"] == "k" and seen[0][1]["Content-Type"] == "application/json"


@pytest.mark.parametrize("bad,kind", [((500, b"", 0), "status 500"), ((503, b"{}", 0), "status 503"), ((429, b"", 0), "status 429"), ((408, b"", 0), "status 408"),
                                      ((200, b"<html>", 0), "no JSON"), ((200, b"\xff", 0), "no JSON"), ((None, b"", 0), "connection"), ((200, b"{}", 3), "timeout")])
def test_what_may_pass_is_asked_again(serve, bad, kind):
    url, seen = serve(bad, bad, OK)
    box = Endpoint(url, pause=0.0, seconds=1.0 if kind == "timeout" else 30)
    assert box.loss({}) == 0.5 and box.failures == {kind: 2} and len(seen) == 3
    url, seen = serve(bad)
    box = Endpoint(url, pause=0.0, retries=1, seconds=0.3 if kind == "timeout" else 30)
    assert box.loss({}) == math.inf and box.failures == {kind: 2} and box.error is not None


@pytest.mark.parametrize("status", [400, 401, 404, 422])
def test_a_wrong_question_is_not_repeated(serve, status):
    url, seen = serve((status, b"", 0))
    assert Endpoint(url).loss({}) == math.inf and len(seen) == 1


@pytest.mark.parametrize("body", ["{}", "[]", "3", '{"loss": null}', '{"loss": "1"}', '{"loss": true}', '{"loss": NaN}', '{"loss": Infinity}', '{"other": 1}'])
def test_no_number_is_the_worst(serve, body):
    box = Endpoint(serve((200, body.encode(), 0))[0])
    assert box.loss({}) == math.inf and box.failures == {"no number": 1}


def test_pauses_double_and_a_huge_answer_is_cut(serve, monkeypatch):
    naps = []
    monkeypatch.setattr("gfopt.lm.blackbox.time.sleep", naps.append)
    Endpoint("http://127.0.0.1:9/", retries=3, pause=0.5, seconds=1).ask({})
    assert naps == [0.5, 1.0, 2.0]
    monkeypatch.undo()
    box = Endpoint(serve((200, b'{"loss": 1, "x": "' + b"a" * 10_000 + b'"}', 0))[0], largest=1000, retries=0)
    assert box.loss({}) == math.inf and box.failures == {"no JSON": 1}


@pytest.mark.parametrize("bad", [dict(url="file:///etc/passwd"), dict(url="ftp://x"), dict(url="http://x", seconds=0), dict(url="http://x", retries=-1), dict(url="http://x", pause=-1)])
def test_settings_are_named(bad):
    with pytest.raises(ValueError, match=list(bad)[-1]): Endpoint(**bad)


def test_a_failing_server_does_not_stop_a_search(serve):
    url, seen = serve(*[OK, (500, b"", 0), (200, b'{"loss": 0.1}', 0)] * 20)
    box = Endpoint(url, retries=0)
    best, loss, curve = search_prompt(lambda ps: [box.loss(p) for p in ps], [1, 2, 3], 3, budget=20, population=8)
    assert loss == 0.1 and len(curve) and box.failures["status 500"] and len(seen) == 20


def test_each_prompt_is_asked_once_and_never_more_than_the_budget():
    asked = []
    def losses(prompts):
        asked.extend(map(tuple, prompts))
        return [sum(p) for p in prompts]
    best, loss, curve = search_prompt(losses, [5, 1, 9], 3, budget=15, population=10, seed=1)
    assert len(asked) == len(set(asked)) == 15 and loss == min(map(sum, asked)) == sum(best) and curve[-1] == loss
    asked.clear()
    assert search_prompt(losses, [5, 1, 9], 2, budget=100, population=10)[:2] == ([1, 1], 2) and len(asked) == 9  # all there are


def test_one_seed_decides_and_pieces_keep_their_type():
    losses = lambda ps: [len("".join(p)) for p in ps]
    a, b = (search_prompt(losses, ["aaa", "bb", "c", "dddd"], 4, budget=60, population=12, seed=3) for _ in range(2))
    assert a == b
    assert all(isinstance(t, str) for t in a[0])


def test_nan_never_wins_and_all_failed_still_returns():
    best, loss, _ = search_prompt(lambda ps: [math.nan if p[0] == 0 else p[0] for p in ps], [0, 1, 2], 1, budget=3, population=4)
    assert best == [1] and loss == 1
    assert search_prompt(lambda ps: [math.nan] * len(ps), [0, 1], 2, budget=4, population=4)[1] == math.inf


def test_breeding_beats_chance_on_a_word():
    losses = lambda ps: [sum(a != b for a, b in zip(p, "gradientfree")) for p in ps]
    ga = [search_prompt(losses, list("abcdefghijklmnopqrstuvwxyz"), 12, budget=1500, population=40, seed=s)[1] for s in range(2)]
    chance = search_prompt(losses, list("abcdefghijklmnopqrstuvwxyz"), 12, budget=1500, method="random")[1]
    assert max(ga) < chance - 2


def test_wrong_arguments_are_named():
    for bad in (dict(tokens=[1], length=2), dict(tokens=[1, 1], length=2)):
        with pytest.raises(ValueError, match="tokens"): token_space(**bad)
    with pytest.raises(ValueError, match="length"): token_space([1, 2], 0)
    with pytest.raises(ValueError, match="losses: 1 numbers"): search_prompt(lambda p: [1.0], [1, 2, 3], 3, budget=5, population=6)
