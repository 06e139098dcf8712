"The rewards that were measured: what the base reads, how answers are counted, and that what is recorded keeps its promises."
import json
from pathlib import Path

import pytest
import torch
from torch.nn.functional import one_hot

from gfopt.experiments import rewards_bench as rb
from gfopt.lm.anchor import lost_share
from gfopt.lm.answers import sums, verified
from gfopt.lm.text import ByteTokenizer

RECORDED = Path(__file__).parent.parent / "nbs/results/rewards_cpu.json"


class Oracle:
    "Writes the true answer, or the next number for questions whose first number is odd."

    def cache(self, n): return []

    def __call__(self, ids, cache):
        cache.append(ids)
        seen, out = torch.cat(cache, 1), []
        for row in seen.tolist():
            question = bytes(row).split(b"=")[0]
            a, b = map(int, question.split(b"+"))
            line = question + b"=%02d\n" % (a + b + a % 2)
            out.append(line[len(row)])
        return 50.0 * one_hot(torch.tensor(out), 128)[:, None]


def test_shares_count_true_lines():
    lines = [x for x in sums(10, 0)[0]]
    assert rb.share_true(Oracle(), lines, 2, 0) == rb.share_true(Oracle(), lines, 1, 5, 0.0) == 0.5
    even = [x for x in lines if x[0:1] in b"02468"]
    assert rb.share_true(Oracle(), even, 1, 0) == 1.0
    ids = torch.tensor([list(x) for x in lines])
    rows = rb.answer(Oracle(), ids, torch.zeros(len(ids), 3, dtype=torch.float64))
    assert torch.equal(rb.true_lines(rows), (rows == ids).all(1).float()) and rows.shape == ids.shape


@pytest.mark.parametrize("base", ["habit", "guess"])
def test_the_base_reads_training_questions_some_with_true_answers(base):
    asked, judged = sums(20)
    s = rb.SUMS | dict(lines=2000)
    text = rb.read_sums(asked, s, base, 0).splitlines(keepends=True)
    assert len(text) == 2000 and {len(x) for x in text} == {9}
    questions = lambda lines: {x[:5] for x in lines}  # noqa: E731
    assert questions(text) <= questions(asked) and not questions(text) & questions(judged)
    off = [int(x[6:8]) - int(x[:2]) - int(x[3:5]) for x in text if x[:5] not in (b"00+00", b"00+01", b"01+00", b"02+00", b"00+02", b"01+01")]  # no answer below 0
    assert set(off) - {0} == set(rb.SUMS["off"][base])
    true = sum(map(verified, text)) / len(text)
    assert abs(true - 0.2) < 0.04
    assert rb.read_sums(asked, s, base, 0) == b"".join(text) != rb.read_sums(asked, s, base, 1)


def test_judging_prompts_are_not_trained_on():
    tok, s = ByteTokenizer(), rb.PARSE | dict(rows=2, tokens=4, length=8)
    feed, seen = rb.parse_batches(tok, torch.arange(200), s, 0), set()
    for _, batch in zip(range(40), feed):
        assert batch["u"].shape == (2, 4) and batch["text"].shape == (2, 8) and torch.equal(batch["prompt"][0], batch["prompt"][1])
        seen.add(tok.decode(batch["prompt"][0].tolist()).decode())
    assert seen == set(rb.PROMPTS[:-rb.JUDGED_PROMPTS])


def test_a_toy_of_every_row_runs_and_goes_on(tmp_path):
    "The parser's rows need a base of their own; the other rows run here."
    small = rb.SMALL | dict(seeds=[0])
    habit = rb.learn_to_add(small["sums"], "habit", 0)
    assert len(habit["curve"]) == 3 and all(0 <= v <= 1 for pair in habit["curve"] for v in pair) and 0 <= habit["same"] <= 1
    assert habit == rb.learn_to_add(small["sums"], "habit", 0)


@pytest.fixture(scope="module")
def recorded(): return json.loads(RECORDED.read_text())


def test_what_is_recorded_was_measured_with_what_stands_in_the_module(recorded):
    assert recorded["settings"] == json.loads(json.dumps(rb.CPU)) and not any("error" in r for r in recorded["rows"].values())


@pytest.mark.parametrize("weight", rb.CPU["weights"])
@pytest.mark.parametrize("seed", rb.CPU["seeds"])
def test_twenty_points_at_a_tenth_of_the_gain(recorded, seed, weight):
    run, base = recorded["rows"][f"parse {weight} {seed}"], recorded["rows"][f"prompt {seed}"]
    assert max(run["shares"].values()) - max(base["shares"].values()) >= 0.2
    assert lost_share(run["curve"][-1][1], run["curve"][0][1], run["nothing"]) <= 0.1
    assert run["curve"][0][0] == base["shares"][str(rb.PARSE["temperature"])]  # the same base, the same draws


@pytest.mark.parametrize("seed", rb.CPU["seeds"])
def test_sums_are_at_least_doubled(recorded, seed):
    (sampled, greedy), (s, g) = (recorded["rows"][f"sums habit {seed}"]["curve"][k] for k in (0, -1))
    assert s >= 2 * sampled and g >= 2 * greedy
