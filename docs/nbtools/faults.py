"""Faults planted on purpose: the tests must find each of them.

tests/faults/*.json hold lists of {"where": a file, "old": text that stands there once, "new": what it
becomes, "tests": what must turn red}. They are planted one at a time, in a copy.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from .notebooks import ROOT
from .run import ENVIRONMENT

FAULTS = ROOT / "tests" / "faults"
NEEDED = ("gfopt", "tests", "nbs", "docs", "pyproject.toml", "settings.ini", "README.md", "README.zh.md")
SECONDS = 900  # a fault may turn a loop into an endless one: that counts as found


def load(areas: list[str]) -> list[dict[str, str]]:
    "All faults, or those of some areas (file names without .json)."
    paths = [FAULTS / f"{a}.json" for a in areas] or sorted(FAULTS.glob("*.json"))
    return [fault | {"area": p.stem} for p in paths for fault in json.loads(p.read_text())]


def misplaced(faults: list[dict[str, str]]) -> list[str]:
    "Faults that can no longer be planted: the text has changed since."
    texts = {f["where"]: (ROOT / f["where"]).read_text() for f in faults if (ROOT / f["where"]).exists()}
    found = ((f, texts.get(f["where"], "").count(f["old"])) for f in faults)
    return [f"{f['area']}: {f['old']!r} stands {n} times in {f['where']}, should once" for f, n in found if n != 1]


def survivors(faults: list[dict[str, str]]) -> list[str]:
    "Plants each fault in a copy and runs its tests; returns those that nothing noticed."
    with tempfile.TemporaryDirectory() as name:
        copy, alive = Path(name), []
        for part in NEEDED:
            source = ROOT / part
            ignore = shutil.ignore_patterns("_build", "__pycache__", ".*")
            shutil.copytree(source, copy / part, ignore=ignore) if source.is_dir() else shutil.copy(source, copy)
        for i, fault in enumerate(faults, 1):
            path = copy / fault["where"]
            text = path.read_text()
            path.write_text(text.replace(fault["old"], fault["new"]))
            killed = not _green(copy, shlex.split(fault["tests"]))
            path.write_text(text)
            label = f"{fault['area']}: {fault['where']}: {fault['old']!r} -> {fault['new']!r}"
            print(f"{i:3d}/{len(faults)}  {'killed  ' if killed else 'SURVIVED'}  {label[:150]}", flush=True)
            alive += [] if killed else [label]
    return alive


def _green(folder: Path, tests: list[str]) -> bool:
    environment = os.environ | ENVIRONMENT | {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    try:
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return False
    if done.returncode not in (0, 1, 2):  # nothing collected, or wrong words: no verdict
        raise RuntimeError(f"pytest {' '.join(tests)}: exit code {done.returncode}\n{done.stdout[-1000:]}{done.stderr[-1000:]}")
    return done.returncode == 0
