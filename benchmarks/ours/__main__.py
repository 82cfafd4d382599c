"""`python -m benchmarks.ours NAMES --dtype bf16 --model DIR`: some measurements, a JSON line for each."""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.ours import ceilings, commands, decode, functions, generate, growth, packed
from benchmarks.ours.job import Job
from benchmarks.sizes import SIZES

PROGRAMS: dict[str, Callable[[Job], dict[str, Any]]] = {
    "generate": generate.generate,
    "generate-ragged": generate.ragged,
    "gemm-bound": generate.gemm_bound,
    "grpo": commands.grpo,
    "ppo-separate": commands.ppo,
    "ppo-shared": commands.ppo,
    "sft": commands.sft,
    "reward": commands.pairs,
    "dpo": commands.pairs,
    "start": commands.start,
    "logprobs": functions.logprobs,
    "gae": functions.advantages,
    "matrix": functions.matrix,
    "forward-backward": functions.forward_backward,
    "growth": growth.growth,
    "bandwidth": ceilings.bandwidth,
    "decode-few": decode.decode(decode.FEW),
    "decode-many": decode.decode(decode.MANY),
    "packed": packed.packed,
    "gap": decode.gap,
    "profile-decode": decode.profile_decode,
    "profile-training": packed.profile_training,
}


def main(argv: list[str] | None = None) -> int:
    """The exit status: 1 where a program failed, which keeps no other from running."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ours", description=__doc__)
    parser.add_argument("names", nargs="+", choices=PROGRAMS, metavar="NAME", help=", ".join(PROGRAMS))
    parser.add_argument("--model", type=Path, required=True, help="a model folder of the work folder")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--size", choices=SIZES, default="full")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    status = 0
    for name in args.names:
        job = Job(name, args.dtype, args.device, args.threads, args.model, SIZES[args.size])
        job.begin()
        try:
            print(json.dumps(PROGRAMS[name](job)), flush=True)
        except Exception as error:  # whatever it is: the next program may still run
            traceback.print_exc()
            print(json.dumps({"failed": name, "why": f"{type(error).__name__}: {error}"[:500]}), flush=True)
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
