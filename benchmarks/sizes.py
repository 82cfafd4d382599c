"""How much of everything is measured: the protocol's numbers, and a few seconds' worth to see that the programs run.

Standard library only: the peers' interpreters read it too.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Shape:
    """A decoder of Llama shape with tied embeddings."""

    width: int
    layers: int
    heads: int
    kv_heads: int
    ffn_width: int
    vocab: int
    context: int = 4096
    qkv_bias: bool = False  # as Qwen2 has


@dataclass(frozen=True)
class Size:
    """The numbers of every program, so that upslope and a peer can only do the same."""

    name: str
    models: dict[str, Shape]
    tokenizer: int  # tokens of the tokenizer; a model's vocabulary may be padded beyond it
    files: int  # sources of the standard library that it is trained on
    # generation
    slots: int  # prompts, and sequences side by side
    prompt: int  # tokens, exactly
    completion: int
    warm_tokens: int
    ragged_requests: int
    ragged_low: int
    ragged_high: int
    # reinforcement learning
    grpo_prompts: int
    grpo_samples: int
    grpo_steps: int
    ppo_episodes: int
    ppo_epochs: int
    ppo_minibatches: int
    ppo_steps: int
    # fits
    rows: int
    sft_low: int
    sft_high: int
    sft_batch: int
    pair_batch: int
    fit_steps: int
    # functions alone
    logprob_tokens: int
    logprob_vocab: int
    logprob_width: int
    gae_tokens: int
    gae_episodes: int
    growth_tokens: int  # trained at once, whatever the length of a sequence
    growth_lengths: tuple[int, ...]
    matrix: int
    rounds: int  # repeats inside one process
    # a card close to its limits
    peer_micro: int  # sequences that TRL computes at once
    decode_rows: tuple[int, int]  # sequences side by side: few, many
    decode_tokens: tuple[int, int]  # of short and long completions: one, and whole rounds of the engine
    train_low: int  # tokens of a text, drawn evenly
    train_high: int
    train_tokens: int  # of one optimizer step
    train_micro: tuple[int, ...]  # tokens computed at once; the fastest counts
    copy_bytes: int


FULL = Size(
    name="full",
    models={
        "m31": Shape(512, 8, 8, 4, 1408, 16_384),
        "m135": Shape(576, 30, 9, 3, 1536, 49_152),
    },
    tokenizer=16_384,
    files=800,
    slots=64,
    prompt=64,
    completion=128,
    warm_tokens=8,
    ragged_requests=256,
    ragged_low=8,
    ragged_high=256,
    grpo_prompts=8,
    grpo_samples=8,
    grpo_steps=4,
    ppo_episodes=16,
    ppo_epochs=4,
    ppo_minibatches=4,
    ppo_steps=3,
    rows=512,
    sft_low=16,
    sft_high=256,
    sft_batch=32,
    pair_batch=16,
    fit_steps=6,
    logprob_tokens=8192,
    logprob_vocab=49_152,
    logprob_width=576,
    gae_tokens=1_000_000,
    gae_episodes=4096,
    growth_tokens=4096,
    growth_lengths=(512, 1024, 2048, 4096),
    matrix=2048,
    rounds=5,
    peer_micro=16,
    decode_rows=(8, 64),
    decode_tokens=(17, 129),
    train_low=16,
    train_high=512,
    train_tokens=8192,
    train_micro=(2048,),
    copy_bytes=1 << 28,
)

GPU = replace(
    FULL,
    name="gpu",
    models={
        "m135": FULL.models["m135"],
        "qwen2-0.5b": Shape(896, 24, 14, 2, 4864, 151_936, qkv_bias=True),
        "qwen2-1.5b": Shape(1536, 28, 12, 2, 8960, 151_936, qkv_bias=True),
    },
    tokenizer=4000,
    files=100,
    slots=256,
    grpo_prompts=32,
    ppo_episodes=64,
    ppo_steps=3,
    rows=320,
    growth_tokens=16_384,
    matrix=8192,
    rounds=3,
    peer_micro=64,
    decode_rows=(64, 512),
    train_tokens=1 << 16,
    train_micro=(1 << 15, 1 << 16),
    copy_bytes=1 << 31,
)

SMOKE = Size(
    name="smoke",
    models={
        "tiny": Shape(64, 2, 2, 1, 96, 512, context=256),
        "tiny-qwen2": Shape(64, 2, 2, 1, 96, 512, context=256, qkv_bias=True),
    },
    tokenizer=400,
    files=4,
    slots=4,
    prompt=8,
    completion=6,
    warm_tokens=2,
    ragged_requests=6,
    ragged_low=2,
    ragged_high=8,
    grpo_prompts=2,
    grpo_samples=2,
    grpo_steps=2,
    ppo_episodes=4,
    ppo_epochs=2,
    ppo_minibatches=2,
    ppo_steps=2,
    rows=48,
    sft_low=8,
    sft_high=120,
    sft_batch=32,  # a step must last longer than the log is asked for new ones
    pair_batch=16,
    fit_steps=2,
    logprob_tokens=64,
    logprob_vocab=512,
    logprob_width=16,
    gae_tokens=1000,
    gae_episodes=10,
    growth_tokens=64,
    growth_lengths=(16, 32, 64),
    matrix=64,
    rounds=2,
    peer_micro=16,
    decode_rows=(2, 6),
    decode_tokens=(2, 18),
    train_low=4,
    train_high=40,
    train_tokens=256,
    train_micro=(2048, 128),
    copy_bytes=1 << 16,
)

SIZES = {size.name: size for size in (FULL, GPU, SMOKE)}
