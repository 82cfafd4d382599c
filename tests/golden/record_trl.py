"""Records what TRL computes: the losses of GRPO, Bradley-Terry, DPO, IPO, KTO, SimPO and ORPO, and log-probabilities.

    python -m venv /tmp/trl
    /tmp/trl/bin/pip install torch==2.13.0 transformers==5.17.0 trl==1.16.0 accelerate datasets
    /tmp/trl/bin/python tests/golden/record_trl.py

TRL's losses are methods of trainers that begin with a model's forward pass. They are called as they are, with a
stand-in for the trainer that holds the settings they read, and one for the model that answers with the given
log-probabilities.
"""

from collections import defaultdict
from types import SimpleNamespace

import torch
from recording import LENGTHS, Draw, Recorder, padded, unpadded
from trl import DPOTrainer, GRPOTrainer, KTOTrainer, RewardTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.gkd import GKDTrainer
from trl.experimental.orpo import ORPOTrainer
from trl.trainer.utils import entropy_from_logits, selective_log_softmax

T = lambda x: torch.tensor(x, dtype=torch.float64)
MASK = T(padded([1.0] * sum(LENGTHS)))
LIMIT = 10


def trainer(**settings):
    """One process, evaluation mode, nothing but the loss; settings are the trainer's attributes."""
    alone = SimpleNamespace(
        device="cpu",
        num_processes=1,
        gather=lambda x: x,
        gather_for_metrics=lambda x: x,
        reduce=lambda x, reduction: x,
    )
    return SimpleNamespace(
        accelerator=alone,
        model=SimpleNamespace(training=False),
        aux_loss_enabled=False,
        _total_train_tokens=0,
        _metrics=defaultdict(lambda: defaultdict(list)),
        **settings,
    )


def grpo(out: Recorder, draw: Draw) -> None:
    old = draw.logps()
    cases = [
        ("clip", "grpo", "token", 0.2, 0.2, None, 0.0),
        ("clip", "dr_grpo", "token", 0.2, 0.28, None, 0.0),
        ("clip", "dapo", "token", 0.2, 0.28, None, 0.0),
        ("dual clip", "grpo", "token", 0.2, 0.2, 3.0, 0.0),
        ("sequence clip", "grpo", "sequence", 3e-4, 4e-4, None, 0.0),
        ("sequence clip", "grpo", "sequence", 0.2, 0.3, None, 0.0),
        ("cispo", "cispo", "token", 0.2, 5.0, None, 0.0),
        ("clip and k3", "grpo", "token", 0.2, 0.2, None, 0.04),
        ("clip and importance", "dapo", "token", 0.2, 0.2, None, 0.0),
    ]
    reductions = {"grpo": "sequence", "dr_grpo": "constant", "dapo": "token", "cispo": "token"}
    for scale in (0.1, 1.5):
        logp, ref = old + draw.normal(scale=scale), old + draw.normal(scale=0.3)
        advantage = draw.normal(len(LENGTHS))
        weight = draw.rng.uniform(0.2, 2.0, sum(LENGTHS)).round(4)
        for name, kind, level, low, high, delta, beta in cases:
            x = T(padded(logp)).requires_grad_()
            entropy = torch.zeros_like(x)
            stub = trainer(
                _get_per_token_logps_and_entropies=lambda *a, x=x, e=entropy, **k: (x, e, None),
                top_entropy_quantile=1.0,
                off_policy_mask_threshold=None,
                importance_sampling_level=level,
                beta=beta,
                loss_type=kind,
                epsilon_low=low,
                epsilon_high=high,
                use_vllm="importance" in name,
                vllm_importance_sampling_correction=True,
                max_completion_length=LIMIT,
                _entropy_bonus_enabled=False,
                args=SimpleNamespace(use_bias_correction_kl=False, delta=delta),
            )
            ids = MASK.long()
            loss = GRPOTrainer._compute_loss(stub, None, {
                "prompt_ids": ids, "prompt_mask": ids, "completion_ids": ids, "completion_mask": MASK,
                "advantages": T(advantage), "old_per_token_logps": T(padded(old)),
                "ref_per_token_logps": T(padded(ref)), "importance_sampling_ratio": T(padded(weight)),
                "num_items_in_batch": MASK.sum(),
            })  # fmt: skip
            (gradient,) = torch.autograd.grad(loss, x)
            inputs = {
                "lengths": LENGTHS, "logp_A": logp, "old_logp_A": old, "ref_logp_A": ref, "advantage_B": advantage,
                "weight_A": weight, "clip_low": low, "clip_high": high, "dual_clip": delta, "beta": beta,
                "limit": LIMIT, "reduction": reductions[kind],
            }  # fmt: skip
            label = f"grpo/{name}/{kind}/{high}/{scale}"
            out.case(label, inputs, {"loss": loss, "gradient_A": unpadded(gradient)})


def answering(rows):
    """A model that gives each token of rows its log-probability."""
    nothing = torch.zeros_like(rows)
    answer = SimpleNamespace(log_probs=rows, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool())
    return lambda **_: answer


def preferences(out: Recorder, draw: Draw) -> None:
    names = ("chosen", "rejected", "ref_chosen", "ref_rejected")
    logps = {n: draw.logps() for n in names}
    rows = {n: T(padded(x)) for n, x in logps.items()}
    inputs = {"lengths": LENGTHS, **{f"{n}_logp_A": x for n, x in logps.items()}}
    mask = torch.cat([torch.zeros(2 * len(LENGTHS), 1), torch.cat([MASK, MASK])], 1).long()  # one token of prompt
    for kind, beta, smoothing in [("sigmoid", 0.1, 0.0), ("sigmoid", 2.5, 0.0), ("ipo", 0.1, 0.0), ("ipo", 0.7, 0.0)]:
        for i, length in enumerate(LENGTHS):  # a pair at a time: the mean of one is its loss
            x = torch.cat([rows["chosen"][i : i + 1], rows["rejected"][i : i + 1]]).requires_grad_()
            stub = trainer(
                ld_alpha=None, precompute_ref_logps=True, f_divergence_type="reverse_kl", loss_types=[kind],
                loss_weights=[1.0], beta=beta, label_smoothing=smoothing, use_weighting=False,
            )  # fmt: skip
            two = [i, i + len(LENGTHS)]
            batch = {
                "input_ids": mask[two], "attention_mask": mask[two], "completion_mask": mask[two],
                "ref_chosen_logps": rows["ref_chosen"][i : i + 1].sum(1),
                "ref_rejected_logps": rows["ref_rejected"][i : i + 1].sum(1),
            }  # fmt: skip
            loss = DPOTrainer._compute_loss(stub, answering(x), batch, False)
            (gradient,) = torch.autograd.grad(loss, x)
            outputs = {"loss": loss, "chosen_gradient": gradient[0, 0], "rejected_gradient": gradient[1, 0]}
            assert length == MASK[i].sum()
            out.case(f"{'dpo' if kind == 'sigmoid' else kind}/{beta}/{i}", {"beta": beta, "pair": i}, outputs)
    out.case("pairs", inputs, {})
    chosen, rejected = (T(-draw.rng.exponential(1.0, 9).round(4) - 0.01).requires_grad_() for _ in range(2))
    for beta, margin in [(2.0, 0.5), (10.0, 0.1)]:
        stub = trainer(alpha=0.0, loss_type="simpo", beta=beta, simpo_gamma=beta * margin, label_smoothing=0.0)
        loss, _, _ = CPOTrainer.cpo_loss(stub, chosen, rejected)
        grads = torch.autograd.grad(loss.sum(), (chosen, rejected))
        inputs = {"chosen_logp_B": chosen, "rejected_logp_B": rejected, "beta": beta, "margin": margin}
        outputs = {"loss_B": loss, "chosen_gradient_B": grads[0], "rejected_gradient_B": grads[1]}
        out.case(f"simpo/{beta}", inputs, outputs)
    stub = trainer(alpha=0.0, loss_type="sigmoid", beta=0.4, label_smoothing=0.2)
    loss, _, _ = CPOTrainer.cpo_loss(stub, chosen, rejected)
    inputs = {"chosen_logp_B": chosen, "rejected_logp_B": rejected, "beta": 0.4, "label_smoothing": 0.2}
    out.case("smoothed", inputs, {"loss_B": loss})
    for beta in (0.1, 1.0):
        loss = -ORPOTrainer.odds_ratio_loss(trainer(beta=beta), chosen, rejected)[0]  # computed in fp32 there
        grads = torch.autograd.grad(loss.sum(), (chosen, rejected))
        inputs = {"chosen_logp_B": chosen, "rejected_logp_B": rejected, "beta": beta}
        outputs = {"loss_B": loss, "chosen_gradient_B": grads[0], "rejected_gradient_B": grads[1]}
        out.case(f"orpo/{beta}", inputs, outputs)


def kto(out: Recorder, draw: Draw) -> None:
    logp, ref = draw.logps(), draw.logps()
    other, ref_other = draw.logps(), draw.logps()
    desirable = [True, False, False, True, True, False]
    mask = torch.cat([torch.zeros(len(LENGTHS), 1), MASK], 1).long()
    for beta, shift in [(0.1, 0.5), (1.0, 0.5), (0.3, -9.0)]:  # the last: a mean below 0, which counts as 0
        z = T(padded(other + shift)) * MASK
        x = T(padded(logp)).requires_grad_()
        stub = trainer(
            calculate_KL=True, precompute_ref_logps=True, loss_type="kto", beta=beta, desirable_weight=1.2,
            undesirable_weight=0.8, _compute_kl_logps=lambda model, batch, z=z: z.sum(1),
        )  # fmt: skip
        batch = {
            "label": torch.tensor(desirable), "input_ids": mask, "attention_mask": mask, "completion_mask": mask,
            "ref_logps": T(padded(ref)).sum(1), "ref_KL_logps": T(padded(ref_other)).sum(1),
        }  # fmt: skip
        loss = KTOTrainer._compute_loss(stub, answering(x), batch, False)
        (gradient,) = torch.autograd.grad(loss, x)
        inputs = {
            "lengths": LENGTHS, "logp_A": logp, "ref_logp_A": ref, "other_logp_A": other + shift,
            "ref_other_logp_A": ref_other, "desirable_B": desirable, "beta": beta, "desirable_weight": 1.2,
            "undesirable_weight": 0.8,
        }  # fmt: skip
        reference_point = stub._metrics["eval"]["kl"][0]
        found = {"mean": loss, "gradient_B": gradient[:, 0], "reference_point": reference_point}
        out.case(f"kto/{beta}", inputs, found)


def rewards(out: Recorder, draw: Draw) -> None:
    score, margin = draw.normal(14, scale=3.0), abs(draw.normal(7))
    for name, extra in [("plain", {}), ("margin", {"margin": T(margin)})]:
        x = T(score).requires_grad_()
        stub = trainer(args=SimpleNamespace(center_rewards_coefficient=None))
        model = lambda x=x, **_: SimpleNamespace(logits=x[:, None])
        loss = RewardTrainer.compute_loss(stub, model, dict(extra))
        (gradient,) = torch.autograd.grad(loss, x)
        inputs = {"chosen_B": score[:7], "rejected_B": score[7:], "margin_B": margin if extra else None}
        outputs = {"mean": loss, "gradient": gradient, "accuracy": stub._metrics["eval"]["accuracy"][0]}
        out.case(f"bradley_terry/{name}", inputs, outputs)


def distributions(out: Recorder, draw: Draw, rows: int = 10, vocab: int = 6) -> None:
    logits, other, action = draw.normal(rows, vocab, scale=4.0), draw.normal(rows, vocab), draw.choice(vocab, rows)
    for t in (1.0, 0.6):
        x = T(logits).requires_grad_()
        logp = selective_log_softmax(x, torch.tensor(action), temperature=t)
        divergence = GKDTrainer.generalized_jsd_loss(x, T(other), beta=1, temperature=t, reduction="none").sum(-1)
        inputs = {"logits_NV": logits, "other_NV": other, "action_N": action, "temperature": t}
        outputs = {
            "logp_N": logp,
            "entropy_N": entropy_from_logits(x / t),
            "kl_N": divergence,
            "logp_gradient_NV": torch.autograd.grad(logp.sum(), x)[0],
            "kl_gradient_NV": torch.autograd.grad(divergence.sum(), x)[0],
        }
        out.case(f"softmax/{t}", inputs, outputs)


if __name__ == "__main__":
    recorder = Recorder("trl", "trl", "torch", "transformers", command="python tests/golden/record_trl.py")
    seeded = Draw(3)
    for part in (grpo, preferences, kto, rewards, distributions):
        part(recorder, seeded)
    recorder.write()
