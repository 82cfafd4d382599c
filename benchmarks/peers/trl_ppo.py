"""One of the last releases of TRL that had PPO: policy, value model, reference and reward model, four networks."""

from __future__ import annotations

import os
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer

from benchmarks.peers.common import Job, Stamps, run


class Stamper(TrainerCallback):
    """Notes the moment of every batch."""

    def __init__(self, stamps: Stamps) -> None:
        self.stamps = stamps

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.stamps.mark()


def ppo(job: Job) -> tuple[float, str, dict[str, Any]]:
    torch.set_num_threads(job.threads)
    size, stamps, folder = job.size, Stamps(), str(job.model)
    policy, reference = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for _ in range(2))
    scalar = AutoModelForSequenceClassification
    reward, value = (scalar.from_pretrained(folder, num_labels=1, dtype=torch.float32) for _ in range(2))
    rows = Dataset.from_list([{"input_ids": row["ids"]} for row in job.rows("prompts")])
    settings = PPOConfig(
        **job.trainer_settings(),
        per_device_train_batch_size=size.ppo_episodes,
        gradient_accumulation_steps=1,
        num_mini_batches=size.ppo_minibatches,
        num_ppo_epochs=size.ppo_epochs,
        local_rollout_forward_batch_size=size.slots,
        response_length=size.completion,
        total_episodes=size.ppo_episodes * size.ppo_steps,
        num_sample_generations=0,
        temperature=1.0,
        kl_coef=0.05,
        stop_token=None,
    )
    trainer = PPOTrainer(
        args=settings,
        processing_class=AutoTokenizer.from_pretrained(folder),
        model=policy,
        ref_model=reference,
        reward_model=reward,
        value_model=value,
        train_dataset=rows,
        eval_dataset=rows.select(range(size.ppo_episodes)),
        callbacks=[Stamper(stamps)],
    )
    trainer.train()
    assert len(stamps.moments) == size.ppo_steps
    details = {"intervals": stamps.intervals, "episodes_per_s": size.ppo_episodes / stamps.median}
    return stamps.median, "s/step", details


if __name__ == "__main__":
    run("trl-ppo", {"ppo": ppo})
