"""TRPO's update: one natural-gradient step on a whole rollout, under a hard bound on the KL it moves.

    maximise  mean over t of r_t A_t   where   mean over t of KL(old, new) <= max_kl

x = F^-1 g by conjugate gradient, where F v is the second derivative of the mean KL along v, exact over the whole
vocabulary; the step sqrt(2 max_kl / (x F x)) x is halved until the surrogate has risen and the measured KL keeps the
bound; if it never does, every parameter is put back bit for bit. Schulman et al. 2015 (arXiv 1502.05477).

Departures: the KL is a mean over action tokens, F is measured on the whole rollout, and the update is computed in
fp32 whatever the dtype of products, since a bf16 product of F with a vector is mostly rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from upslope.algo import conjugate_gradient, surrogate_loss, token_kl, token_logprobs, trust_region_step
from upslope.config import RL
from upslope.models.trunk import Trunk
from upslope.training.objective import Part, minibatch_parts
from upslope.training.rollout import Batch
from upslope.training.update import StopAsked


@dataclass(frozen=True)
class Before:
    """The policy that sampled, at the actions of each part: log-probabilities, hidden states, and its projection."""

    parts: list[Part]
    logp: list[Tensor]
    hidden: list[Tensor]
    weight_VD: Tensor
    tokens: int


def trust_region_update(rl: RL, policy: Trunk, batch: Batch, should_stop: Callable[[], bool]) -> dict[str, float]:
    """Move the policy once. Returns what came of it: the KL, the surrogate's gain, halvings, and 1 if it was given up.

    Raises StopAsked between two passes over the rollout, with the parameters as they were.
    """
    bound = rl.trust.max_kl
    assert bound is not None
    parameters = [p for p in policy.parameters() if p.requires_grad]
    saved = [p.detach().clone() for p in parameters]
    with _in_fp32(policy), sdpa_kernel(SDPBackend.MATH):  # the other attentions have no second derivative
        before = _before(rl, policy, batch)
        gradient_N = _gradient(rl, policy, batch, before, parameters)
        products = _Fisher(rl, policy, before, parameters, should_stop)
        metrics = {"trust/grad_norm": float(gradient_N.norm())}
        if not bool(torch.isfinite(gradient_N).all()):
            return metrics | {"optim/skipped": 1.0}
        direction_N = conjugate_gradient(products, -gradient_N, steps=rl.trust.cg_steps)
        step_N = trust_region_step(direction_N, products, max_kl=bound)
        for halvings in range(rl.trust.backtracks + 1):
            if should_stop():
                _set(parameters, saved)
                raise StopAsked
            _set(parameters, saved, step_N * 0.5**halvings)
            gain, kl = _measure(rl, policy, batch, before)
            if gain > 0 and kl <= bound:
                found = {"trust/kl": kl, "trust/gain": gain, "trust/halvings": float(halvings), "trust/given_up": 0.0}
                return metrics | found | {"optim/skipped": 0.0}
        _set(parameters, saved)
    found = {"trust/kl": 0.0, "trust/gain": 0.0, "trust/halvings": float(rl.trust.backtracks), "trust/given_up": 1.0}
    return metrics | found | {"optim/skipped": 0.0}


class _Fisher:
    """product(v) = F v + damping v."""

    def __init__(
        self,
        rl: RL,
        policy: Trunk,
        before: Before,
        parameters: Sequence[nn.Parameter],
        should_stop: Callable[[], bool],
    ) -> None:
        self.rl, self.policy, self.before = rl, policy, before
        self.parameters, self.should_stop = parameters, should_stop

    def __call__(self, vector_N: Tensor) -> Tensor:
        total_N = self.rl.trust.damping * vector_N
        for part, old_AD in zip(self.before.parts, self.before.hidden, strict=True):
            if self.should_stop():
                raise StopAsked
            hidden_AD = _hidden(self.policy, part)
            kl_A = token_kl(
                hidden_AD,
                self.policy.output_weight,
                old_AD,
                self.before.weight_VD,
                temperature=self.rl.temperature,
            )
            first = torch.autograd.grad(kl_A.sum() / self.before.tokens, self.parameters, create_graph=True)
            slope = torch.dot(torch.cat([g.reshape(-1) for g in first]), vector_N)
            second = torch.autograd.grad(slope, self.parameters)
            total_N += torch.cat([h.reshape(-1) for h in second])
        return total_N


def _before(rl: RL, policy: Trunk, batch: Batch) -> Before:
    parts = list(minibatch_parts(rl, batch, range(len(batch.episodes)), policy))
    weight_VD = policy.output_weight.detach().clone()
    hidden, logp = [], []
    with torch.no_grad():
        for part in parts:
            hidden.append(_hidden(policy, part))
            logp.append(_logp(rl, weight_VD, part, hidden[-1]))
    return Before(parts, logp, hidden, weight_VD, len(batch.old_logp_A))


def _hidden(policy: Trunk, part: Part) -> Tensor:
    return policy.hidden(part.ragged)[part.ragged.previous[part.action_A].to(policy.device)]


def _logp(rl: RL, weight_VD: Tensor, part: Part, hidden_AD: Tensor) -> Tensor:
    target_A = part.ragged.ids_N[part.action_A.to(part.ragged.ids_N.device)]
    return token_logprobs(hidden_AD, weight_VD, target_A, temperature=rl.temperature)[0]


def _gradient(rl: RL, policy: Trunk, batch: Batch, before: Before, parameters: Sequence[nn.Parameter]) -> Tensor:
    """The gradient of minus the surrogate, flat."""
    total_N = torch.zeros(sum(p.numel() for p in parameters), device=policy.device)
    for part, old_A in zip(before.parts, before.logp, strict=True):
        logp_A = _logp(rl, policy.output_weight, part, _hidden(policy, part))
        loss_A, _ = surrogate_loss(logp_A, old_A, batch.advantage_A[part.rows].to(logp_A.device))
        grads = torch.autograd.grad((part.weight_A * loss_A).sum(), parameters)
        total_N += torch.cat([g.reshape(-1) for g in grads])
    return total_N


@torch.no_grad()
def _measure(rl: RL, policy: Trunk, batch: Batch, before: Before) -> tuple[float, float]:
    """(how much the surrogate has risen, mean KL(old, new)) at the present parameters; a nan is no rise."""
    gain, kl = 0.0, 0.0
    for part, old_A, old_AD in zip(before.parts, before.logp, before.hidden, strict=True):
        hidden_AD = _hidden(policy, part)
        advantage_A = batch.advantage_A[part.rows].to(policy.device)
        loss_A, _ = surrogate_loss(_logp(rl, policy.output_weight, part, hidden_AD), old_A, advantage_A)
        gain -= float((part.weight_A * (loss_A + advantage_A)).sum())
        kl_A = token_kl(old_AD, before.weight_VD, hidden_AD, policy.output_weight, temperature=rl.temperature)
        kl += float(kl_A.sum()) / before.tokens
    return gain, kl


@torch.no_grad()
def _set(parameters: Sequence[nn.Parameter], saved: Sequence[Tensor], step_N: Tensor | None = None) -> None:
    """Parameters as saved, plus a step: what is saved is copied back, never recomputed."""
    place = 0
    for parameter, value in zip(parameters, saved, strict=True):
        parameter.copy_(value)
        if step_N is not None:
            parameter.add_(step_N[place : place + value.numel()].view_as(value))
        place += value.numel()


@contextmanager
def _in_fp32(policy: Trunk) -> Iterator[None]:
    dtype = policy.compute_dtype
    policy.compute_dtype = torch.float32
    try:
        yield
    finally:
        policy.compute_dtype = dtype
