"""`python -m benchmarks [NAMES] --peers DIR`: upslope and its peers in turn, the ratios, a result file, the page."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

import torch

from benchmarks.models import prepare
from benchmarks.page import RESULTS, read_results, write_page
from benchmarks.plan import TASKS, UPSLOPE
from benchmarks.runner import Session, file_name, free_path
from benchmarks.sizes import SIZES
from benchmarks.table import markdown, missing, newest


def main() -> int:
    args = arguments()
    if args.page:
        return 0 if write_page(read_results(RESULTS)) else 1
    size = SIZES[args.size]
    model_name = args.model or next(iter(size.models))
    if model_name not in size.models:
        print(f"error: no model {model_name!r} of size {size.name}; choose {', '.join(size.models)}", file=sys.stderr)
        return 2
    folder = prepare(args.work, size, [model_name])
    session = Session(folder / model_name, size, args.peers, args.dtype, args.device, args.threads, args.repeats)
    try:
        session.measure(args.names or list(TASKS))
    except KeyboardInterrupt:
        print("stopped: what was measured so far is kept", file=sys.stderr)
    result = session.result(model_name)
    args.results.mkdir(parents=True, exist_ok=True)
    path = free_path(args.results, file_name(result))
    path.write_text(json.dumps(result, indent=1) + "\n")
    measured = newest([result])
    print(f"\n{markdown(measured)}\n")
    for line in missing([result], measured):
        print(f"not measured: {line}")
    print(f"\n{path}")
    if args.results == RESULTS:
        write_page(read_results(RESULTS))
    return 1 if any(key.startswith(f"{UPSLOPE} ") for key in session.missing) else 0


def arguments() -> argparse.Namespace:
    cores = os.cpu_count() or 1
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", help=f"what to measure; all unless given: {', '.join(TASKS)}")
    parser.add_argument("--peers", type=Path, help="the folder that benchmarks.setup made")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=cores)
    parser.add_argument("--model", help="m31 unless given, or m135; of size gpu m135, qwen2-0.5b, qwen2-1.5b")
    parser.add_argument("--size", choices=SIZES, default="full", help="gpu: for a large card; smoke: measures nothing")
    parser.add_argument("--work", type=Path, default=Path("runs") / "benchmarks", help="where models and rows are made")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", action="store_true", help="write README.md anew from the results, measure nothing")
    args = parser.parse_args()
    unknown = [name for name in args.names if name not in TASKS]
    if unknown:
        parser.error(f"nothing is called {unknown[0]!r}: choose from {', '.join(TASKS)}")
    if args.repeats < 1:
        parser.error(f"--repeats {args.repeats}: must be at least 1")
    return args


if __name__ == "__main__":
    sys.exit(main())
