"""TRL as it is now: GRPO, SFT, the reward model and DPO, each by its own trainer."""

from __future__ import annotations

import statistics
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)

from benchmarks.peers.common import Job, Stamps, reward, run


class Stamper(TrainerCallback):
    """Notes the moment of every optimizer step."""

    def __init__(self, stamps: Stamps) -> None:
        self.stamps = stamps

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.stamps.mark()


def load(job: Job) -> tuple[Any, Any]:
    torch.set_num_threads(job.threads)
    model = AutoModelForCausalLM.from_pretrained(str(job.model), dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(str(job.model))


def grpo(job: Job) -> tuple[float, str, dict[str, Any]]:
    size, stamps = job.size, Stamps()
    model, tokenizer = load(job)
    episodes = size.grpo_prompts * size.grpo_samples
    micro = min(size.peer_micro, episodes)
    settings = GRPOConfig(
        **job.trainer_settings(),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=episodes // micro,
        num_generations=size.grpo_samples,
        max_completion_length=size.completion,
        generation_kwargs={"min_new_tokens": size.completion},
        beta=0.0,
        loss_type="grpo",
        temperature=1.0,
        max_steps=size.grpo_steps,
    )
    trainer = GRPOTrainer(
        model=model,
        args=settings,
        reward_funcs=reward,
        train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in job.rows("prompts")]),
        processing_class=tokenizer,
        callbacks=[Stamper(stamps)],
    )
    trainer.train()
    details = {"intervals": stamps.intervals, "episodes_per_s": episodes / stamps.median}
    return stamps.median, "s/step", details


class CountingTrainer(SFTTrainer):  # type: ignore[misc]
    """Counts the tokens that it learns: all but padding and the first of a text, which nothing predicts."""

    stamps: Stamps

    def training_step(self, model: Any, inputs: Any, *rest: Any, **named: Any) -> Any:
        self.stamps.amount += float((inputs["labels"][:, 1:] != -100).sum())
        return super().training_step(model, inputs, *rest, **named)


def sft(job: Job) -> tuple[float, str, dict[str, Any]]:
    size, stamps = job.size, Stamps()
    model, tokenizer = load(job)
    rows = [{"input_ids": row["ids"]} for row in job.rows("sft")]
    micro = min(size.peer_micro, size.sft_batch)
    settings = SFTConfig(
        **job.trainer_settings(),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=size.sft_batch // micro,
        packing=False,
        max_length=size.sft_high,
        max_steps=size.fit_steps,
    )
    trainer = CountingTrainer(
        model=model,
        args=settings,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[Stamper(stamps)],
    )
    trainer.stamps = stamps
    trainer.train()
    rates = [tokens / seconds for tokens, seconds in zip(stamps.amounts[1:], stamps.intervals, strict=True)]
    mean = statistics.mean(len(row["input_ids"]) for row in rows)
    details = {"intervals": stamps.intervals, "tokens": stamps.amounts[1:], "mean_length": mean}
    return statistics.median(rates), "tokens/s", details


def pair_rows(job: Job) -> list[dict[str, Any]]:
    """As many pairs as are used, so that a reference computed in advance is computed for these alone."""
    return job.rows("pairs")[: job.size.pair_batch * job.size.fit_steps]


def reward_model(job: Job) -> tuple[float, str, dict[str, Any]]:
    size, stamps = job.size, Stamps()
    _, tokenizer = load(job)
    model = AutoModelForSequenceClassification.from_pretrained(str(job.model), num_labels=1, dtype=torch.float32)
    model.config.pad_token_id = tokenizer.pad_token_id
    rows = [{side: row["prompt_ids"] + row[side] for side in ("chosen_ids", "rejected_ids")} for row in pair_rows(job)]
    settings = RewardConfig(
        **job.trainer_settings(),
        per_device_train_batch_size=size.pair_batch,
        max_length=size.sft_high,
        max_steps=size.fit_steps,
    )
    trainer = RewardTrainer(
        model=model,
        args=settings,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[Stamper(stamps)],
    )
    trainer.train()
    return size.pair_batch / stamps.median, "pairs/s", {"intervals": stamps.intervals}


def dpo(job: Job) -> tuple[float, str, dict[str, Any]]:
    """Its reference is computed before the steps, as upslope's is."""
    size, stamps = job.size, Stamps()
    model, tokenizer = load(job)
    rows = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in pair_rows(job)]
    settings = DPOConfig(
        **job.trainer_settings(),
        per_device_train_batch_size=size.pair_batch,
        max_length=size.sft_high,
        max_steps=size.fit_steps,
        precompute_ref_log_probs=True,
    )
    trainer = DPOTrainer(
        model=model,
        args=settings,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[Stamper(stamps)],
    )
    trainer.train()
    return size.pair_batch / stamps.median, "pairs/s", {"intervals": stamps.intervals}


if __name__ == "__main__":
    run("trl", {"grpo": grpo, "sft": sft, "reward": reward_model, "dpo": dpo})
