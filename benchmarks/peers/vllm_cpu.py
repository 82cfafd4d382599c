"""vLLM's CPU build: continuous batching, compiled, with the chosen tokens' log-probabilities."""

from __future__ import annotations

import os
import time
from typing import Any

from benchmarks.peers.common import Job, run

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")
os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}

from vllm import LLM, SamplingParams  # reads its settings from the environment when it is imported


def generate(job: Job) -> tuple[float, str, dict[str, Any]]:
    size = job.size
    dtype = {"bf16": "bfloat16", "fp32": "float32"}[job.dtype]
    begun = time.perf_counter()
    length = max(128, 2 * (size.prompt + size.completion))
    model = LLM(
        model=str(job.model), dtype=dtype, max_model_len=length, max_num_seqs=size.slots, enable_prefix_caching=False
    )
    loaded = time.perf_counter() - begun
    prompts = [{"prompt_token_ids": row["ids"]} for row in job.rows("prompts")[: size.slots]]

    def settings(tokens: int) -> Any:
        return SamplingParams(
            temperature=1.0, max_tokens=tokens, min_tokens=tokens, ignore_eos=True, detokenize=False, logprobs=0
        )

    model.generate(prompts, settings(size.warm_tokens), use_tqdm=False)
    start = time.perf_counter()
    found = model.generate(prompts, settings(size.completion), use_tqdm=False)
    seconds = time.perf_counter() - start
    tokens = sum(len(answer.outputs[0].token_ids) for answer in found)
    assert tokens == size.slots * size.completion
    return tokens / seconds, "tokens/s", {"seconds": seconds, "tokens": tokens, "load_s": loaded}


if __name__ == "__main__":
    run("vllm", {"generate": generate})
