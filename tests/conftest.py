"""For all tests: no windows, and the long ones first so that two workers end together."""

import os

os.environ.setdefault("MPLBACKEND", "agg")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded

LONG = ("test_site.py", "test_notebooks.py")


def pytest_collection_modifyitems(items):
    rank = {name: i for i, name in enumerate(LONG)}
    items.sort(key=lambda item: rank.get(item.path.name, len(LONG)))
