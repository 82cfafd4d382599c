"""A rollout in use, as tensors and JSON values, so that a checkpoint can hold it between two of its minibatches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from upslope.training.episode import Episode, action_starts
from upslope.training.rollout import FIELDS, Batch


def batch_to_tensors(
    episodes: Sequence[Episode], batch: Batch, metrics: Mapping[str, float]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a batch, and all the rollout's episodes (also those not learned from) with its metrics."""
    tensors = {name: getattr(batch, name).clone() for name in FIELDS}
    place = {id(e): i for i, e in enumerate(episodes)}
    record = {
        "episodes": [e.record() for e in episodes],
        "learned": [place[id(e)] for e in batch.episodes],
        "metrics": dict(metrics),
    }
    return tensors, record


def batch_from_tensors(
    tensors: Mapping[str, Tensor], record: Mapping[str, Any]
) -> tuple[list[Episode], Batch, dict[str, float]]:
    """What `batch_to_tensors` took."""
    episodes = [Episode(**e) for e in record["episodes"]]
    kept = [episodes[i] for i in record["learned"]]
    fields = {name: tensors[name] for name in FIELDS}
    return episodes, Batch(kept, action_starts(kept), **fields), dict(record["metrics"])
