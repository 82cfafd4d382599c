"""`python -m results [NAMES] --out FOLDER`: the runs of the plan that have no record yet, their records, the page."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from results.page import PAGES, write_pages
from results.plan import PLAN, chosen, read_plan
from results.record import RECORDS, read_records
from results.runner import Session
from upslope.errors import UpslopeError


def main() -> int:
    args = arguments()
    try:
        groups = read_plan(args.plan, smoke=args.smoke)
        jobs = chosen(groups, args.names)
        if args.list:
            print("\n".join(job.command for job in jobs))
            return 0
        records = args.records or (args.out / "records" if args.smoke else RECORDS)
        session = Session(
            args.out, records, "smoke" if args.smoke else "full", True if args.plain else None, args.at_once
        )
        if not args.page:
            session.run(jobs)
        if not args.smoke or args.pages != PAGES:
            write_pages(groups, read_records(records), args.pages)
    except UpslopeError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    if session.stopped:
        print("stopped: what was finished is recorded; the same command carries on", file=sys.stderr)
        return 130
    for name, reason in session.failed.items():
        print(f"failed: {name}: {reason}", file=sys.stderr)
    return 1 if session.failed else 0


def positive(text: str) -> int:
    """A number of at least 1; argparse tells any other as it tells every mistake."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of runs: write 1 or more")
    return int(text)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m results", description=__doc__)
    parser.add_argument("names", nargs="*", help="groups, GROUP-ARM or GROUP-ARM-SEED of the plan; all unless given")
    parser.add_argument("--out", type=Path, default=Path("runs") / "results", help="where the runs' folders are")
    parser.add_argument("--page", action="store_true", help="make the page anew from the records, run nothing")
    parser.add_argument("--list", action="store_true", help="show the commands, run nothing")
    parser.add_argument("--smoke", action="store_true", help="see that it runs: seconds a run, no page")
    parser.add_argument("--plain", action="store_true", help="lines instead of a display")
    parser.add_argument(
        "--at-once", type=positive, default=1, metavar="N", help="runs at a time, each with its part of the cores"
    )
    parser.add_argument("--plan", type=Path, default=PLAN)
    parser.add_argument("--records", type=Path, help="default: results/records; of --smoke: in the folder of the runs")
    parser.add_argument("--pages", type=Path, default=PAGES, help="the folder of results.md and results.zh.md")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
