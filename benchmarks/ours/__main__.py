"""`python -m benchmarks.ours NAME --dtype bf16 --model DIR`: one measurement, one JSON line."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.ours import commands, functions, generate, growth
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
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ours", description=__doc__)
    parser.add_argument("name", choices=PROGRAMS)
    parser.add_argument("--model", type=Path, required=True, help="a model folder of the work folder")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--size", choices=SIZES, default="full")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    job = Job(args.name, args.dtype, args.device, args.threads, args.model, SIZES[args.size])
    print(json.dumps(PROGRAMS[args.name](job)))


if __name__ == "__main__":
    main()
