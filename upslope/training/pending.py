"""A rollout in use, as tensors and JSON values, so that a checkpoint can hold it between two of its minibatches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from upslope.training.episode import Episode, action_starts
from upslope.training.rollout import Batch

FIELDS = ("behaviour_logp_A", "old_logp_A", "entropy_A", "value_A", "ref_logp_A", "advantage_A", "return_A")


def batch_to_tensors(
    episodes: Sequence[Episode], batch: Batch, metrics: Mapping[str, float]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a batch, and all its episodes (failed ones too) with the rollout's metrics."""
    tensors = {name: getattr(batch, name).clone() for name in FIELDS}
    return tensors, {"episodes": [e.record() for e in episodes], "metrics": dict(metrics)}


def batch_from_tensors(
    tensors: Mapping[str, Tensor], record: Mapping[str, Any]
) -> tuple[list[Episode], Batch, dict[str, float]]:
    """What `batch_to_tensors` took."""
    episodes = [Episode(**e) for e in record["episodes"]]
    kept = [e for e in episodes if e.total is not None]
    fields = {name: tensors[name] for name in FIELDS}
    return episodes, Batch(kept, action_starts(kept), **fields), dict(record["metrics"])
