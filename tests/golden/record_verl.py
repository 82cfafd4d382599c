"""Records what verl's core algorithms compute, with the gradient by the log-probabilities or values where it is a loss.

    python -m venv /tmp/verl
    /tmp/verl/bin/pip install torch==2.13.0 omegaconf hydra-core packaging ray pandas codetiming orjson wandb peft \
        tensorboard torchdata datasets pylatexenc 'tensordict>=0.8,<=0.10,!=0.9' 'transformers>=5.5.3,<5.11,!=5.6'
    /tmp/verl/bin/pip install --no-deps verl==0.9.1
    /tmp/verl/bin/python tests/golden/record_verl.py

Inputs stay inside verl's own clamps (log-ratios within 20, k3 below 10), which upslope has not.
"""

import torch
from omegaconf import OmegaConf
from recording import LENGTHS, Draw, Recorder, padded, unpadded
from verl.trainer.config import AlgoConfig
from verl.trainer.ppo import core_algos as core
from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_weights
from verl.utils import torch_functional as functional
from verl.workers.config import ActorConfig, OptimizerConfig

T = lambda x: torch.tensor(x, dtype=torch.float64)
MASK = T(padded([1.0] * sum(LENGTHS)))
MODES = {"token": "token-mean", "sequence": "seq-mean-token-mean", "constant": "seq-mean-token-sum-norm"}


def actor(reduction: str, **options):
    """A real actor config; the scale of the constant reduction is 10."""
    return ActorConfig(
        strategy="fsdp",
        rollout_n=1,
        use_dynamic_bsz=True,
        optim=OptimizerConfig(lr=1e-6),
        loss_agg_mode=MODES[reduction],
        loss_scale_factor=10,
        **options,
    )


def differentiated(loss, x):
    (gradient,) = torch.autograd.grad(loss, x)
    return unpadded(gradient)


def advantages(out: Recorder, draw: Draw) -> None:
    for gamma, lam in [(1.0, 1.0), (1.0, 0.95), (0.99, 0.9), (0.5, 0.0)]:
        reward, value = draw.normal(), draw.normal()
        inputs = {"lengths": LENGTHS, "reward_A": reward, "value_A": value, "gamma": gamma, "lam": lam}
        rows = T(padded(reward)), T(padded(value))
        white, returns = core.compute_gae_advantage_return(*rows, MASK, gamma, lam)
        outputs = {"whitened_advantage_A": unpadded(white), "return_A": unpadded(returns)}
        out.case(f"gae/gamma {gamma} lam {lam}", inputs, outputs)
        config = AlgoConfig(gamma=gamma)
        white, returns = core.compute_reinforce_plus_plus_outcome_advantage(rows[0], MASK, config=config)
        outputs = {"whitened_advantage_A": unpadded(white), "return_A": unpadded(returns)}
        out.case(f"reinforce++/gamma {gamma}/{lam}", inputs, outputs)
    groups = [4, 1, 4, 1, 1, 4, 9, 9, 2, 2, 2, 2]
    score = draw.normal(len(groups), scale=3.0)
    score[6:8] = 0.3  # a group of equal scores
    inputs = {"score_B": score, "group_B": groups}
    outcome = lambda: T(score)[:, None]  # verl writes into it
    mask, index = torch.ones(len(groups), 1, dtype=torch.float64), [str(g) for g in groups]
    for name, f, options in [
        ("grpo", core.compute_grpo_outcome_advantage, {"epsilon": 0.0}),
        ("grpo as it comes", core.compute_grpo_outcome_advantage, {}),
        ("dr-grpo", core.compute_grpo_outcome_advantage, {"norm_adv_by_std_in_grpo": False}),
        ("rloo", core.compute_rloo_outcome_advantage, {}),
    ]:
        found, _ = f(outcome(), mask, index, **options)
        found = found[:, 0].nan_to_num(0.0)  # 0 / 0 where epsilon is 0 and all scores of a group are equal
        out.case(f"group/{name}", inputs, {"advantage_B": found})


def policy_losses(out: Recorder, draw: Draw) -> None:
    old = draw.logps()
    for name, scale in [("near", 0.1), ("far", 1.5)]:  # ratios from 0.01 to 50, and more
        logp, advantage = old + draw.normal(scale=scale), draw.normal()
        inputs = {"lengths": LENGTHS, "logp_A": logp, "old_logp_A": old, "advantage_A": advantage, "limit": 10}
        for loss, options in [
            ("vanilla", {"clip_ratio_low": 0.2, "clip_ratio_high": 0.2, "clip_ratio_c": 3.0}),
            ("vanilla", {"clip_ratio_low": 0.2, "clip_ratio_high": 0.28, "clip_ratio_c": 10.0}),
            ("gspo", {"clip_ratio_low": 3e-4, "clip_ratio_high": 4e-4}),
            ("gspo", {"clip_ratio_low": 0.2, "clip_ratio_high": 0.3}),
            ("cispo", {"clip_ratio_low": 1.0, "clip_ratio_high": 0.3}),
            ("cispo", {"clip_ratio_low": 1.0, "clip_ratio_high": 4.0}),
        ]:
            if loss == "gspo":  # there an advantage belongs to an episode
                per_episode = draw.normal(len(LENGTHS))
                inputs = inputs | {"advantage_A": torch.tensor(per_episode).repeat_interleave(torch.tensor(LENGTHS))}
            rows = {k: T(padded(inputs[k])) for k in ("logp_A", "old_logp_A", "advantage_A")}
            for reduction, mode in MODES.items():
                new = rows["logp_A"].clone().requires_grad_()
                f = core.get_policy_loss_fn(loss)
                config = actor(reduction, **options)
                config.global_batch_info["loss_scale_factor"] = 10
                value, stats = f(rows["old_logp_A"], new, rows["advantage_A"], MASK, mode, config)
                outputs = {
                    "loss": value,
                    "gradient_A": differentiated(value, new),
                    "clipped": stats["actor/pg_clipfrac"],
                    "dual_clipped": stats["actor/pg_clipfrac_lower"],
                }
                label = f"{loss}/{name}/{options['clip_ratio_low']}-{options['clip_ratio_high']}/{reduction}"
                out.case(label, inputs | options | {"reduction": reduction}, outputs)


def kl_and_values(out: Recorder, draw: Draw) -> None:
    logp = draw.logps()
    ref = logp + draw.normal(scale=0.8)
    inputs = {"logp_A": logp, "ref_logp_A": ref}
    for kind in ("k1", "k2", "k3"):
        x = T(logp).requires_grad_()
        value = core.kl_penalty(x, T(ref), kind)
        (gradient,) = torch.autograd.grad(value.sum(), x)
        out.case(f"kl/{kind}", inputs, {"kl_A": value, "gradient_A": gradient})
    score = draw.normal()
    out.case("kl_in_reward", inputs | {"score_A": score, "coefficient": 0.3}, {
        "reward_A": core.compute_rewards(T(score), T(logp), T(ref), 0.3)
    })  # fmt: skip
    value, old, target = draw.normal(), draw.normal(scale=0.5), draw.normal()
    for clip in (0.1, 0.5, 100.0):
        x = T(padded(value)).requires_grad_()
        loss, fraction = core.compute_value_loss(x, T(padded(target)), T(padded(old)), MASK, clip)
        inputs = {"value_A": value, "old_value_A": old, "return_A": target, "clip": clip}
        outputs = {"loss": loss, "gradient_A": differentiated(loss, x), "clipped": fraction}
        out.case(f"value_loss/{clip}", inputs, outputs)
    controller = core.get_kl_controller(
        OmegaConf.create({"type": "adaptive", "kl_coef": 0.2, "target_kl": 6.0, "horizon": 10_000})
    )
    seen, path = [1.0, 5.9, 6.4, 7.9, 30.0, 0.0, 6.0], []
    for kl in seen:
        controller.update(kl, 256)
        path.append(float(controller.value))
    inputs = {"kl": seen, "episodes": 256, "target": 6.0, "horizon": 10_000, "coefficient_before": 0.2}
    out.case("adaptive_kl", inputs, {"coefficient": path})


def distributions_and_weights(out: Recorder, draw: Draw, rows: int = 10, vocab: int = 6) -> None:
    logits, action = draw.normal(rows, vocab, scale=4.0), draw.choice(vocab, rows)
    inputs = {"logits_NV": logits, "action_N": action}
    logp = functional.logprobs_from_logits(T(logits), torch.tensor(action))
    out.case("softmax", inputs, {"logp_N": logp, "entropy_N": functional.entropy_from_logits(T(logits))})
    log_ratio = draw.normal(scale=1.5)
    for cap in (1.5, 2.0, 5.0):
        for kind, bounds in [("truncate", cap), ("mask", f"{1 / cap}_{cap}")]:
            weights, stats = compute_rollout_correction_weights(T(padded(log_ratio)), MASK, "token", bounds)
            inputs = {"log_ratio_A": log_ratio, "kind": kind, "cap": cap}
            outputs = {"weight_A": unpadded(weights)}
            if kind == "mask":
                outputs["cut"] = stats["rollout_is_oob_ratio"]
            out.case(f"importance/{kind} {cap}", inputs, outputs)
    x = draw.normal(scale=3.0)
    out.case("masked_whiten", {"x_A": x}, {
        "shifted_A": unpadded(functional.masked_whiten(T(padded(x)), MASK)),
        "scaled_A": unpadded(functional.masked_whiten(T(padded(x)), MASK, shift_mean=False)),
    })  # fmt: skip


if __name__ == "__main__":
    recorder = Recorder(
        "verl", "verl", "torch", "transformers", "tensordict", command="python tests/golden/record_verl.py"
    )
    seeded = Draw(2)
    for part in (advantages, policy_losses, kl_and_values, distributions_and_weights):
        part(recorder, seeded)
    recorder.write()
