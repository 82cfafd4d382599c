"""transformers: `generate` on one padded batch. It returns no log-probabilities here, which upslope does."""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.peers.common import Job, run


def generate(job: Job) -> tuple[float, str, dict[str, Any]]:
    torch.set_num_threads(job.threads)
    size = job.size
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[job.dtype]
    model = AutoModelForCausalLM.from_pretrained(str(job.model), dtype=dtype).eval().to(job.device)
    ids = torch.tensor([row["ids"] for row in job.rows("prompts")[: size.slots]], device=job.device)

    def sample(tokens: int) -> torch.Tensor:
        with torch.no_grad():
            out: torch.Tensor = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                pad_token_id=0,
                eos_token_id=-1,
            )
            return out.cpu()

    sample(size.warm_tokens)
    start = time.perf_counter()
    found = sample(size.completion)
    seconds = time.perf_counter() - start
    tokens = found[:, ids.shape[1] :].numel()
    assert tokens == size.slots * size.completion
    return tokens / seconds, "tokens/s", {"seconds": seconds, "tokens": tokens, "prompt_tokens": ids.shape[1]}


if __name__ == "__main__":
    run("transformers", {"generate": generate})
