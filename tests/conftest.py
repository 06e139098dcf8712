"""For all tests: no windows, and the long ones first so that two workers end together."""

import os

import pytest

os.environ.setdefault("MPLBACKEND", "agg")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded

LONG = ("test_site.py", "test_notebooks.py")


def pytest_collection_modifyitems(items):
    rank = {name: i for i, name in enumerate(LONG)}
    items.sort(key=lambda item: rank.get(item.path.name, len(LONG)))


@pytest.fixture(scope="module")
def corpus():
    "A few dozen short texts of code-like words, as both domains."
    from gfopt.lm.text import Corpus, Domain

    words = "def return self import for in range if else print value = ( ) :".split()
    texts = [" ".join(words[(i * k + k * k) % len(words)] for k in range(300)).encode() for i in range(1, 30)]
    domain = Domain(texts[:20], texts[20:25], texts[25:])
    return Corpus(domain, domain)
