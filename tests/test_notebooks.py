"""Every notebook runs against the exported package; notebooks, package, README agree."""

import gc
import os
import random
import sys
from importlib import import_module
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "docs"))
from nbtools import check, notebooks  # noqa: E402

EXPORTS = {"export", "exports", "exporti"}
# a notebook runs as Jupyter runs it, with Python's own filters: these are hidden from its readers, all others are errors here
pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("DeprecationWarning", "PendingDeprecationWarning", "ResourceWarning")]


def name(path: Path) -> str:
    return path.relative_to(notebooks.NBS).with_suffix("").as_posix()


@pytest.fixture
def undisturbed():
    "What a notebook may change for all that runs after it, put back."
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    environment = dict(os.environ)
    with matplotlib.rc_context():
        yield
    matplotlib.pyplot.close("all")
    gc.collect()  # files that a notebook has left open: here, not in the midst of another test
    os.environ.clear()
    os.environ.update(environment)
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)
    torch.set_rng_state(states[0])
    np.random.set_state(states[1])
    random.setstate(states[2])


@pytest.mark.parametrize("path", notebooks.notebooks(), ids=name)
def test_notebook_against_package(path, monkeypatch, undisturbed):
    "Exported cells are replaced by imports, so that the asserts test `gfopt` itself."
    from execnb.shell import CaptureShell

    monkeypatch.chdir(path.parent)
    monkeypatch.setenv("IN_TEST", "1")
    nb = notebooks.read(path)
    shell, module = CaptureShell(), notebooks.default_exp(nb)
    for cell in nb.cells:
        if cell.cell_type != "code" or notebooks.skipped(cell.source):
            continue
        found, source = notebooks.directives(cell.source)
        if EXPORTS & found.keys():
            target = import_module(f"gfopt.{found.get('export') or module}")
            public = {k: v for k, v in vars(target).items() if not k.startswith("__")}
            shell.user_ns.update(public)
        else:
            shell.run(source)
            assert not shell.exc, f"{shell.exc!r} in the cell\n{source}"


def test_check():
    "`make check` has nothing to complain about."
    complaints = check.check()
    assert not complaints, "\n" + "\n".join(complaints)
