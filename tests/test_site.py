"""The site builds without a warning and reads well in a real browser."""

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "docs"))
import smoke  # noqa: E402

BUILD = ["-m", "sphinx", "-b", "html", "-E", "-q", "-W", "--keep-going"]


@pytest.fixture(scope="session")
def built(tmp_path_factory, worker_id):
    "The site, built once for all workers: its folder and what Sphinx said."
    base = tmp_path_factory.getbasetemp()
    base = base if worker_id == "master" else base.parent
    site, said = base / "site" / "html", base / "site.log"
    with open(base / "site.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not said.exists():
            command = [sys.executable, *BUILD, "-d", base / "site" / "doctrees"]
            done = subprocess.run([*command, ROOT / "docs", site], capture_output=True, text=True)
            said.write_text(f"{done.stdout}{done.stderr}" if done.returncode else "")
    return site, said.read_text()


def test_builds_without_warnings(built):
    site, said = built
    assert not said, said
    assert (site / "index.html").exists()


def test_reads_well(built):
    "No console error, no outside request, formulas typeset, search works, fits a phone."
    if not smoke.chromium():
        if os.environ.get("CI", "").lower() in ("1", "true"):
            pytest.fail("no chromium: CI must read the site in a browser")
        pytest.skip("no chromium: install Debian's package `chromium` or Google Chrome")
    complaints = smoke.browse(built[0])
    assert not complaints, "\n" + "\n".join(complaints)
