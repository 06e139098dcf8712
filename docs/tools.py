"""Keep notebooks, package, README and site in step.

    python docs/tools.py run [NB ...] [--flags slow gpu] [-j 2]   execute in place, store outputs
    python docs/tools.py readme                                   nbs/index*.ipynb -> README*.md
    python docs/tools.py check                                    list what does not agree
    python docs/tools.py survey                                   a table of the book, and its broken rules
    python docs/tools.py coverage REPORT.json                     lines and branches, each against its floor
    python docs/tools.py faults [AREA ...]                        plant each known fault; the tests must see it
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from nbtools import check, coverage, faults, readme, run, survey
from nbtools.notebooks import FLAGS


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run", help="execute notebooks and store their outputs")
    running.add_argument("notebooks", nargs="*", type=Path, help="all of them by default")
    running.add_argument("--flags", nargs="*", default=[], choices=sorted(FLAGS))
    running.add_argument("-j", "--jobs", type=int, default=2)
    commands.add_parser("readme", help="write the READMEs from nbs/index*.ipynb")
    commands.add_parser("check", help="list what does not agree; exit code 1 if anything")
    commands.add_parser("survey", help="seconds, words, figures, tests and equations of each notebook")
    covering = commands.add_parser("coverage", help="exit code 1 if lines or branches are reached too seldom")
    covering.add_argument("report", type=Path, help="what `coverage json` wrote")
    planting = commands.add_parser("faults", help="plant every known fault in a copy: the tests must turn red")
    planting.add_argument("areas", nargs="*", help="names of tests/faults/*.json; all of them by default")
    args = parser.parse_args()
    if args.command == "run":
        return int(run.run(args.notebooks, set(args.flags), args.jobs) > 0)
    if args.command == "readme":
        readme.write()
        return 0
    if args.command == "faults":
        known = faults.load(args.areas)
        alive = faults.misplaced(known) or faults.survivors(known)
        print("\n".join(alive) or f"all {len(known)} faults were found")
        return int(bool(alive))
    if args.command == "coverage":
        figures, complaints = coverage.report(args.report)
        print("\n".join([figures, *complaints]))
        return int(bool(complaints))
    if args.command == "survey":
        table, complaints = survey.report()
        print(table)
        print("\n".join(complaints))
        return int(bool(complaints))
    complaints = check.check()
    print("\n".join(complaints) or "notebooks, outputs, package and README agree")
    return int(bool(complaints))


if __name__ == "__main__":
    sys.exit(main())
