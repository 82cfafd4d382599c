"""One optimizer step, over any number of micro-batches.

Losses arrive already divided by denominators of the whole optimizer batch, and every statistic is a share of a mean
over it: both are sums over micro-batches, so how the batch is cut changes nothing but memory and speed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from upslope.config import Optim

Micro = TypeVar("Micro")
Stats = Mapping[str, Tensor]


class StopAsked(Exception):
    """A stop was asked for inside a step; its gradients are dropped and nothing has changed."""


def never() -> bool:
    """No stop is asked for."""
    return False


def stop_if(should_stop: Callable[[], bool]) -> None:
    """Raise StopAsked where a stop was asked for: between the parts of anything that takes longer than a second."""
    if should_stop():
        raise StopAsked


def make_optimizer(
    model: nn.Module | Iterable[nn.Parameter],
    optim: Optim,
    critic: Iterable[nn.Parameter] = (),
    critic_lr: float | None = None,
) -> torch.optim.AdamW:
    """AdamW over a model's (or the given) parameters that require gradients; decay on matrices only.

    critic: which of them are the critic's own. Where critic_lr is given their rate is `critic_lr / optim.lr` times that
    of a step; each group keeps its factor as `scale`.
    """
    parameters = model.parameters() if isinstance(model, nn.Module) else model
    trained = [p for p in parameters if p.requires_grad]
    own = {id(p) for p in critic} if critic_lr else set()
    groups = [
        {
            "params": [p for p in trained if (p.ndim >= 2) == matrix and (id(p) in own) == critics],
            "weight_decay": optim.weight_decay if matrix else 0.0,
            "scale": critic_lr / optim.lr if critic_lr and critics else 1.0,
        }
        for critics in (False, True)
        for matrix in (True, False)
    ]
    betas = (optim.beta1, optim.beta2)
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=optim.lr, betas=betas, eps=optim.eps, fused=True)


def learning_rate(optim: Optim, step: int, steps: int) -> float:
    """The rate of optimizer step `step` (from 0) of `steps`: linear warm-up, then constant, linear or cosine to 0."""
    if step < optim.warmup:
        return optim.lr * (step + 1) / optim.warmup
    progress = (step - optim.warmup) / max(1, steps - optim.warmup)
    if optim.schedule == "linear":
        return optim.lr * (1.0 - progress)
    if optim.schedule == "cosine":
        return optim.lr * 0.5 * (1.0 + math.cos(math.pi * progress))
    return optim.lr


def optimizer_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    micro: Iterable[Micro],
    loss_of: Callable[[Micro], tuple[Tensor, Stats]],
    *,
    lr: float,
    clip_norm: float,
    should_stop: Callable[[], bool],
) -> dict[str, float]:
    """Accumulate gradients over micro-batches, clip their global norm, step. Returns the summed statistics.

    A loss or gradient that is not finite changes no parameter: the step is skipped and `optim/skipped` is 1.
    Raises StopAsked between micro-batches, with the parameters as they were.
    """
    optimizer.zero_grad(set_to_none=True)
    sums: dict[str, Tensor] = {}
    for part in micro:
        if should_stop():
            optimizer.zero_grad(set_to_none=True)
            raise StopAsked
        loss, stats = loss_of(part)
        loss.backward()
        for name, value in {**stats, "loss/total": loss.detach()}.items():
            sums[name] = sums[name] + value.detach() if name in sums else value.detach()
    norm = nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], clip_norm)
    sums["optim/grad_norm"] = norm
    values = torch.stack([value.double() for value in sums.values()]).tolist()  # all at once: each fetch is a wait
    metrics = dict(zip(sums, values, strict=True))
    finite = math.isfinite(metrics["optim/grad_norm"]) and math.isfinite(metrics["loss/total"])
    if finite:
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("scale", 1.0)
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return metrics | {"optim/lr": lr, "optim/skipped": 0.0 if finite else 1.0}


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as named tensors: `NAME/exp_avg` and so on, for a checkpoint."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{name}/{key}"] = value
    return tensors


def restore_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` took."""
    states: dict[str, dict[str, Any]] = {}
    for key, value in tensors.items():
        name, _, entry = key.rpartition("/")
        states.setdefault(name, {})[entry] = value
    for name, parameter in model.named_parameters():
        if name in states:
            optimizer.state[parameter] = {key: value.to(parameter.device) for key, value in states[name].items()}
