"The judge of generated code: what it accepts, what it refuses, and that it survives anything."
import ast
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gfopt.lm.model import Llama, config
from gfopt.lm.rewards import (
    leading_lines,
    parse,
    parsed_fraction,
    parses,
    validity,
    whole_lines,
    write_samples,
)
from gfopt.lm.text import ByteTokenizer

GOOD = "def area(r):\n    return 3.14 * r * r\n\nprint(area(2))\n"


@pytest.mark.parametrize("tail", ["", "x = (", "x = (1,\n", "def f(x):\n", "try:\n    f()\n", '"""a string\n', "@wraps\n", "x = \\\n"])
def test_an_open_end_is_forgiven(tail):
    assert parses(GOOD + tail)


@pytest.mark.parametrize("bad", ["x = = 1\n", "f(\ny z\n", "  indented\n", "x = 'abc\n", "return return\n", "\0\n"])
def test_an_error_is_not(bad):
    assert not parses(GOOD + bad)
    assert not parses(bad + GOOD)


@pytest.mark.parametrize("text", [
    "", "\n\n\n", "pass\n", "pass\npass\npass\n", "# a\n# b\n# c\n", '"""doc"""\n', "1\n2\n3\n", "...\n...\n", "a\nb\nc\nd\n",
    "x = 1\n" * 30, "import os\nimport sys\nimport re\n", "from a import b\nfrom c import d\n", "note: text\nto: you\n",
    "a < b\nc, d\n-e\n", "x = 1\n" + "".join(f"# filler number {i}\n" for i in range(30)) + "y = 2\n", "x = 1\ny = 2\n" + "pass\n" * 30, "def f(): pass\n", "if a:\n    pass\n"])
def test_degenerate_text_earns_nothing(text):
    assert not parses(text) and parsed_fraction(text) == 0


def test_an_open_string_cannot_swallow_the_sample():
    assert not parses(GOOD + '"""\n' + "anything = = goes\n" * 20)


def test_fraction_is_the_place_of_the_first_error():
    lines = ["a = f(1)", "b = f(2)", "c = f(3)", "d d", "e = 5"]
    assert parsed_fraction("\n".join(lines) + "\n") == 3 / 5
    assert parsed_fraction("\n".join(lines[:3]) + "\nunfini") == 1


def test_half_of_the_lines_is_enough_and_less_is_not():
    start = "a = f(1)\nb = f(2)\nx = (1,\n2,\n"  # two lines that parse, two of an open end
    assert parses(start) and not parses(start + "3,\n")


def test_the_graded_reward_is_the_fraction():
    sample = ["a = f(1)\nb = f(2)\nc = f(3)\nd d\ne = 5\n"]
    assert validity(sample).tolist() == [0] and validity(sample, graded=True).tolist() == pytest.approx([3 / 5])


def test_bytes_and_text_agree_and_a_cut_character_is_harmless():
    s = GOOD + "x = 'é'\n"
    assert parses(s) == parses(s.encode()) == parses(s.encode() + "é".encode()[:1]) is True
    assert not parses(b"\xff\xfe\n" + GOOD.encode())


@pytest.mark.parametrize("hostile", ["(" * 5_000 + "\n", "-" * 20_000 + "1\n", "x = " + "9" * 10_000 + "\n", "\0" * 100 + "\n", "a." * 5_000 + "b\n",
                                     "\\\n" * 1000, "x = '\\d'\ny = f('\\q')\n"])
def test_hostile_text_neither_raises_nor_warns(hostile):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        before = list(warnings.filters)
        parses(hostile), parsed_fraction(hostile)
        assert warnings.filters == before
        assert parses("x = '\\d'\ny = f('\\q')\n")  # a strange escape is no error


def test_nothing_is_executed(tmp_path):
    flag = tmp_path / "ran"
    assert parses(f"import pathlib\npathlib.Path({str(flag)!r}).touch()\nraise SystemExit(3)\n")
    assert not flag.exists()


@settings(max_examples=40, deadline=None)
@given(st.text(alphabet="abx =():\n'\"#,0\t[]", max_size=60))
def test_verdict_is_that_of_ast_parse(text):
    verdict, _ = parse(text)
    try: ast.parse(text); accepted = True
    except SyntaxError: accepted = False
    assert (verdict == "ok") == accepted
    lines = whole_lines(text)
    m, _ = leading_lines(lines)
    assert 0 <= parsed_fraction(text) <= 1 and m <= len(lines)
    if parses(text): assert parsed_fraction(text) >= 0.5


def test_validity_shapes_and_common_random_numbers():
    assert validity([GOOD, "", b"x = = 1\n"]).tolist() == [1, 0, 0]
    model, tok = Llama(config("pico", 257)), ByteTokenizer()
    u = torch.rand(4, 12, generator=torch.Generator().manual_seed(1))
    prompt = torch.tensor([tok.encode(b"def ")]).expand(4, -1)
    a, b = write_samples(model, tok, prompt, u), write_samples(model, tok, prompt[:2], u[:2])
    assert a[:2] == b and all(s.startswith(b"def ") for s in a)
