"""Records what TRL's PPO computes: GAE, whitening, the clipped policy loss and value loss, from inside a real run.

    python -m venv /tmp/trl
    /tmp/trl/bin/pip install torch==2.13.0 transformers==5.17.0 trl==1.8.0 accelerate datasets
    /tmp/trl/bin/python tests/golden/record_trl_ppo.py

The formulas stand in the middle of PPOTrainer.train. A real trainer trains a tiny random model, in fp64, for one
rollout and three epochs, and whenever it calls its masked_whiten or masked_mean, the caller's variables are copied.
"""

import os
import sys
import tempfile

os.environ.update(
    HF_HUB_OFFLINE="1", TRL_EXPERIMENTAL_SILENCE="1", WANDB_DISABLED="true", TOKENIZERS_PARALLELISM="false"
)

from datasets import Dataset
from recording import Recorder
from tokenizers import Tokenizer, models
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    set_seed,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

VOCAB, EOS, PAD = 7, 1, 2
GAMMA, LAM = 0.97, 0.9


def observed(name, seen):
    """The trainer's own function, which also shows its caller's variables to `seen`."""
    function = getattr(ppo_trainer, name)

    def wrapped(*arguments, **options):
        result = function(*arguments, **options)
        caller = sys._getframe(1)
        if caller.f_code.co_name == "train":
            seen(caller.f_locals, arguments, result)
        return result

    setattr(ppo_trainer, name, wrapped)


def ragged(rows, keep):
    """The kept part of each row, end to end: kept places come first in every row."""
    return rows[keep]


def record(out: Recorder) -> None:
    passes = []

    def whitened(v, arguments, result):
        keep = ~v["padding_mask_p1"]  # a score may stand one place after the last token, where the critic counts too
        inputs = {
            "lengths": keep.sum(1),
            "reward_A": ragged(v["rewards"], keep),
            "value_A": ragged(v["values"], keep),
            "gamma": GAMMA,
            "lam": LAM,
        }
        unwhitened = {"advantage_A": ragged(v["advantages"], keep), "return_A": ragged(v["returns"], keep)}
        out.case("gae", inputs, unwhitened)
        real = ~v["padding_mask"]
        out.case("masked_whiten", {"x_A": v["advantages"][real]}, {"whitened_A": result[real]})

    def averaged(v, arguments, result):
        if arguments[0] is not v.get("pg_loss_max"):
            return
        rows = v["micro_batch_inds"]
        real, keep = ~v["padding_mask"][rows], ~v["padding_mask_p1"][rows]
        inputs = {
            "lengths": real.sum(1),
            "logp_A": v["new_logprobs"][real],
            "old_logp_A": v["mb_logprobs"][real],
            "advantage_A": v["mb_advantage"][real],
            "clip": 0.2,
            "value_A": v["vpred"][keep],
            "old_value_A": v["mb_values"][keep],
            "value_return_A": v["mb_return"][keep],
            "value_clip": 0.1,
        }
        outputs = {"policy_loss": result, "value_loss": v["vf_loss"], "value_clipped": v["vf_clipfrac"]}
        passes.append(v["pg_losses"].shape)
        out.case(f"losses/epoch {len(passes)}", inputs, outputs)

    observed("masked_whiten", whitened)
    observed("masked_mean", averaged)
    set_seed(10)
    trainer(tempfile.mkdtemp()).train()


def trainer(folder: str) -> PPOTrainer:
    raw = Tokenizer(models.WordLevel({f"t{i}": i for i in range(VOCAB)}, unk_token="t0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="t1", pad_token="t2", padding_side="left")
    shape = LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_labels=1, pad_token_id=PAD, eos_token_id=EOS, bos_token_id=None, initializer_range=0.2,
    )  # fmt: skip
    policy, critic, judge = LlamaForCausalLM, LlamaForSequenceClassification, LlamaForSequenceClassification
    rows = Dataset.from_dict({"input_ids": [[3, 4, 5]] * 8})
    settings = PPOConfig(
        output_dir=folder, use_cpu=True, bf16=False, per_device_train_batch_size=8, gradient_accumulation_steps=1,
        num_mini_batches=1, num_ppo_epochs=3, local_rollout_forward_batch_size=8, response_length=9, total_episodes=8,
        learning_rate=0.004, report_to="none", save_strategy="no", num_sample_generations=0, kl_coef=0.05,
        gradient_checkpointing=False, stop_token_id=EOS, gamma=GAMMA, lam=LAM, cliprange=0.2, cliprange_value=0.1,
        disable_tqdm=True, missing_eos_penalty=1.0,
    )  # fmt: skip
    made = policy(shape).double()
    return PPOTrainer(
        args=settings, processing_class=tokenizer, model=made, ref_model=policy(shape).double(),
        reward_model=judge(shape).double(), value_model=critic(shape).double(), train_dataset=rows, eval_dataset=rows,
    )  # fmt: skip


if __name__ == "__main__":
    recorder = Recorder("trl_ppo", "trl", "torch", "transformers", command="python tests/golden/record_trl_ppo.py")
    record(recorder)
    recorder.write()
