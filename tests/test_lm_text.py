"The corpus, its splits and caches, the tokenizers, and the references."
import json
import lzma
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gfopt.lm import text as T

tokenizers = pytest.importorskip("tokenizers")


SOURCES = T.library_sources()


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    "A cache of our own, and a part of the library: enough to test with in any Python, quick to parse."
    with pytest.MonkeyPatch.context() as m:
        m.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        m.setattr(T, "library_sources", lambda: [s for s in SOURCES[::2] if len(s) < 30_000])
        yield


@pytest.fixture(scope="module")
def corpus(cache): return T.load_corpus()


@pytest.fixture(scope="module")
def bpe(corpus): return T.train_bpe(corpus.code.train[:40], 400)


def splits(d): return d.train, d.valid, d.test


def test_the_library_is_large_enough():
    code = T.split_documents(SOURCES)
    assert sum(map(len, code.train)) > 3e6 and all(len(s) >= 10 for s in splits(code))


def test_corpus_is_deterministic_and_disjoint(corpus):
    again = T.load_corpus()  # the second time from the cache
    assert again.sha256 == corpus.sha256 and again == corpus
    for d in (corpus.code, corpus.prose):
        docs = [x for s in splits(d) for x in s]
        assert len(docs) == len(set(docs)) and all(len(s) >= 3 for s in splits(d))
        assert 0.8 < len(d.train) / len(docs) < 0.97
    assert corpus.summary()["code.valid"]["documents"] == len(corpus.code.valid)


def test_prose_of_a_held_out_file_is_held_out_too(corpus):
    prose = {x: name for name in ("train", "valid", "test") for x in getattr(corpus.prose, name)}
    for name in ("train", "valid", "test"):
        for source in getattr(corpus.code, name)[:12]:
            assert prose.get(T.docstrings(source), name) == name


@pytest.mark.parametrize("junk", ["", "{", "[1, 2]", "{}", '["a"]'])
def test_a_broken_docstring_cache_is_rebuilt(tmp_path, monkeypatch, junk):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    src = [b'def f():\n    """' + b"words " * 20 + b'"""\n', b"x = 1\n"]
    want = T.library_prose(src)
    file, = (tmp_path / "gfopt").glob("docstrings-*")
    file.write_text(junk)
    assert T.library_prose(src) == want and json.loads(file.read_text())[1] == ""


def test_an_unwritable_cache_only_costs_time(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert T.library_prose([b"x = 1\n"]) == [b""]


def test_write_atomic_keeps_the_old_file_on_failure(tmp_path):
    p = tmp_path / "a" / "b.bin"
    T.write_atomic(p, b"old")
    with pytest.raises(TypeError): T.write_atomic(p, None)
    assert p.read_bytes() == b"old" and len(list(p.parent.iterdir())) == 1


@settings(max_examples=25, deadline=None)
@given(st.text(min_size=0, max_size=400), st.integers(8, 60))
def test_pieces_join_to_the_text(text, size):
    data = text.encode()
    parts = T.pieces(data, size)
    assert b"".join(parts) == data and all(parts)
    for p in parts: p.decode(); assert len(p) <= 1.5 * size + 4


def test_pieces_end_where_the_text_does():
    paragraphs = "".join(f"Line {i}.\nMore of it.\n\n" for i in range(300)).encode()
    assert all(p.endswith(b"\n\n") and p.startswith(b"Line") for p in T.pieces(paragraphs, 200))
    assert all(p.endswith(b"\n") for p in T.pieces(paragraphs.replace(b"\n\n", b"\n"), 200))


def test_users_own_files(tmp_path, corpus):
    a, b = tmp_path / "a.md", tmp_path / "b.py"
    a.write_text("\n\n".join(f"Paragraph {i} tells of the number {i * i}. " * 5 for i in range(200)))
    b.write_text("\n".join(f"def f{i}(x):\n    return x + {i}\n" for i in range(600)))
    one, two = T.load_corpus([a]), T.load_corpus([str(a), b])
    assert one.code == corpus.code and one.prose == two.prose != corpus.prose and two.code != corpus.code
    assert all(splits(two.code)) and all(splits(two.prose)) and T.load_corpus([a]).sha256 == one.sha256
    assert sorted(b"".join(x for s in splits(one.prose) for x in s)) == sorted(a.read_bytes())


@pytest.mark.parametrize("content, words", [(None, "does not exist"), (b"", "empty"), (b" \n", "empty"), (b"\xff\xfe\x00", "not UTF-8"),
                                            (b"a\0b", "not UTF-8"), (b"too short", "too little")])
def test_bad_files_are_named(tmp_path, content, words):
    p = tmp_path / "mine.txt"
    if content is not None: p.write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError), match=f"(?s)mine.txt.*{words}"): T.load_corpus([p])


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="folder"): T.load_corpus([tmp_path])


@settings(max_examples=30, deadline=None)
@given(text=st.text(max_size=80))
def test_round_trip_of_any_text(bpe, text):
    for tok in (T.ByteTokenizer(), bpe):
        data = text.encode()
        ids = tok.encode(data)
        assert tok.decode(ids) == data and tok.eos not in ids
        assert int(tok.token_bytes[torch.tensor(ids, dtype=torch.long)].sum()) == len(data)


def test_bpe_round_trips_code_and_survives_json(corpus, bpe):
    again = T.load_tokenizer(bpe.to_json())
    for d in corpus.code.valid[:3] + [b"<|endoftext|>\r\n\t x", b""]:
        assert bpe.decode(bpe.encode(d)) == d and again.encode(d) == bpe.encode(d)
    assert bpe.vocab_size == 400 == len(bpe.token_bytes) and bpe.eos == 399 and bpe.token_bytes[399] == 0
    assert T.train_bpe(corpus.code.train[:40], 400).to_json() == bpe.to_json()
    assert isinstance(T.load_tokenizer(T.ByteTokenizer().to_json()), T.ByteTokenizer)
    with pytest.raises(ValueError, match="vocab_size"): T.train_bpe([b"abc"], 100)


def test_pack_sample_windows(bpe):
    tok = T.ByteTokenizer()
    x = T.pack([b"abc", b"de"], tok)
    assert x.tolist() == [256, 97, 98, 99, 256, 100, 101, 256] and x.dtype == torch.long
    x = torch.arange(101)
    g = torch.Generator().manual_seed(0)
    state = torch.get_rng_state()
    b = T.sample_batch(x, 50, 7, g)
    assert torch.equal(b["labels"], b["input_ids"] + 1) and b["input_ids"].shape == (50, 7)
    assert b["input_ids"].min() >= 0 and b["labels"].max() <= 100 and torch.equal(state, torch.get_rng_state())
    w = T.windows(x, 10)
    assert w["input_ids"].shape == (10, 10) and w["input_ids"].flatten().tolist() == list(range(100))
    assert torch.equal(w["labels"], w["input_ids"] + 1) and len(T.windows(x, 10, 4)["labels"]) == 4
    for f in (lambda: T.windows(x, 101), lambda: T.sample_batch(x, 2, 101, g)):
        with pytest.raises(ValueError, match="length"): f()


def test_windows_are_spread_over_the_text_and_samples_reach_its_end():
    assert T.windows(torch.arange(101), 10, 4)["input_ids"][:, 0].tolist() == [0, 20, 50, 70]
    b = T.sample_batch(torch.arange(9), 200, 7, torch.Generator().manual_seed(0))
    assert set(b["input_ids"][:, 0].tolist()) == {0, 1} and b["labels"].max() == 8


def test_references_against_literal_formulas():
    train, valid = [b"abracadabra", b"abba"], [b"abc", b"a"]
    joined = b"".join(train)
    uni = -sum(math.log2((joined.count(bytes([x])) + 1) / (len(joined) + 256)) for d in valid for x in d) / 4
    assert abs(T.unigram_bpb(train, valid) - uni) < 1e-12
    pairs = [p for d in train for p in zip(b"\n" + d, d)]
    firsts = [a for a, _ in pairs]
    bi = -sum(math.log2((pairs.count((a, b)) + 1) / (firsts.count(a) + 256)) for d in valid for a, b in zip(b"\n" + d, d)) / 4
    assert abs(T.bigram_bpb(train, valid) - bi) < 1e-12
    d = [b"some text " * 50]
    assert T.xz_bpb(d) == 8 * len(lzma.compress(d[0], preset=9)) / 500 > T.xz_bpb(d, d)


def test_a_missing_library_names_the_extra(monkeypatch):
    import sys
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r"gfopt\[lm\]"): T.train_bpe([b"abc"])
