"""Where a chooser's own order puts the right one: the mean reciprocal rank, which a choice alone does not tell."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from upslope.models.trunk import Trunk
from upslope.training.batches import lay_out_texts, micro_batches


@torch.no_grad()
def logits_of(model: Trunk, sources: Sequence[Sequence[int]], micro_tokens: int) -> np.ndarray:
    """logits_BK of what an encoder chooses from, for each source."""
    found = np.zeros((len(sources), len(model.labels)))
    for part in micro_batches([len(ids) for ids in sources], micro_tokens):
        texts = [[*sources[i], 0] for i in part]  # a choice behind each, whichever: it is not read
        batch, place_N = lay_out_texts(texts, [len(ids) - 1 for ids in texts], model.needs_source)
        last = place_N[torch.tensor([len(ids) for ids in texts]).cumsum(0) - 1]
        hidden_BD = model.hidden(batch.to(model.device))[batch.previous[last].to(model.device)]
        found[part] = (hidden_BD @ model.output_weight.to(hidden_BD.dtype).t()).float().cpu().numpy()
    return found


def reciprocal_ranks(logits_BK: np.ndarray, right_B: Sequence[int]) -> np.ndarray:
    """1 / rank of the right one, the highest logit first; what is equal to it stands half before it, half behind."""
    right_B1 = np.take_along_axis(logits_BK, np.array(right_B)[:, None], axis=1)
    before_B = (logits_BK > right_B1).sum(1) + ((logits_BK == right_B1).sum(1) - 1) / 2
    ranks: np.ndarray = 1 / (1 + before_B)
    return ranks


def of_choices(choice_B: Sequence[int], right_B: Sequence[int], count_B: Sequence[int]) -> np.ndarray:
    """1 / rank expected of a single choice, the others behind it in any order: 1, or the mean of 1/2 .. 1/K."""
    pairs = zip(choice_B, right_B, count_B, strict=True)
    return np.array([1.0 if c == r else sum(1 / n for n in range(2, k + 1)) / (k - 1) for c, r, k in pairs])
