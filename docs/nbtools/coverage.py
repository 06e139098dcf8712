"""How much of the package the tests reach: lines and branches each for themselves.

`coverage report --fail-under` knows only both together, where many lines make up for missing branches.
"""

from __future__ import annotations

import json
from pathlib import Path

FLOOR = 95  # percent
PARTS = {"lines": ("covered_lines", "num_statements"), "branches": ("covered_branches", "num_branches")}


def shares(totals: dict[str, int]) -> dict[str, float]:
    "Percent of the lines and of the branches that were reached; all of none."
    return {part: 100 * totals[hit] / totals[of] if totals[of] else 100.0 for part, (hit, of) in PARTS.items()}


def report(path: Path) -> tuple[str, list[str]]:
    "The two figures in words, and what lies below the floor."
    found = shares(json.loads(path.read_text())["totals"])
    low = [f"{part}: {share:.2f} % reached, allowed are {FLOOR} % and more" for part, share in found.items() if share < FLOOR]
    return ", ".join(f"{part} {share:.2f} %" for part, share in found.items()), low
