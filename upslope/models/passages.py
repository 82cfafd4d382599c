"""How an encoder chooses among the passages of a source: each is read by itself and compared with the text before them.

    logit_k = exp(s) cos(q, p_k),   q the pooled text, p_k the pooled passage k

The choice is an action like any other: of K passages at the most the hidden state is

    hidden = (logit_1 .. logit_K, absent_1 .. absent_K, q / |q|)       absent_k: 1 where a source has no passage k

and the projection to logits takes the first K and NEVER from each that is absent, so that sampling, likelihood, entropy
and a critic's head are what they are for every model. s begins where a logit spans from -20 to 20: Radford et al. 2021,
"CLIP" (arXiv 2103.00020), begin at 14 and end at 100.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from upslope.errors import ModelError
from upslope.ragged import Ragged

SHARP = math.log(20.0)
NEVER = -1e4  # added to the logit of a passage that is not there: its probability is 0 in every dtype


def split_sources(sources: Ragged, separator: int, most: int) -> tuple[Ragged, list[int]]:
    """(the texts and passages of all sources as sequences of their own, how many passages each source has).

    A source is its first token, a text and passages, each of these ended by the separator; every part begins with the
    source's first token. Raises ModelError for a source without a passage, with more than `most`, or with an empty one.
    """
    parts: list[list[int]] = []
    counts = []
    for b in range(len(sources)):
        ids = sources.ids_N[sources.starts[b] : sources.starts[b + 1]].tolist()
        ends = [place for place, token in enumerate(ids) if token == separator]
        if not 2 <= len(ends) <= most + 1 or ends[-1] != len(ids) - 1:
            raise ModelError(
                f"source {b} of the batch has {max(0, len(ends) - 1)} passages, not 1 to {most}", "set data.passages"
            )
        begin = 1
        for n, end in enumerate(ends):
            if end == begin:
                what = f"passage {n - 1}" if n else "text"
                raise ModelError(f"the {what} of source {b} of the batch is empty", "remove it")
            parts.append([ids[0], *ids[begin : end + 1]])
            begin = end + 1
        counts.append(len(ends) - 1)
    return Ragged.of(parts), counts


def compared(pooled_MD: Tensor, counts: Sequence[int], most: int, sharpness: Tensor) -> Tensor:
    """(B, 2 K + D): the hidden state of each source, whose text is followed by its passages in pooled_MD."""
    unit_MD = torch.nn.functional.normalize(pooled_MD, dim=-1)
    texts: list[int] = []
    passages: list[int] = []
    column: list[int] = []
    row: list[int] = []
    place = 0
    for b, count in enumerate(counts):
        texts.append(place)
        passages += range(place + 1, place + 1 + count)
        row += [b] * count
        column += range(count)
        place += count + 1
    row_T, column_T = torch.tensor(row, device=unit_MD.device), torch.tensor(column, device=unit_MD.device)
    text_BD = unit_MD[torch.tensor(texts, device=unit_MD.device)]
    logit_T = sharpness.exp() * (text_BD[row_T] * unit_MD[torch.tensor(passages, device=unit_MD.device)]).sum(-1)
    logit_BK = unit_MD.new_zeros(len(counts), most).index_put((row_T, column_T), logit_T)
    absent_BK = unit_MD.new_ones(len(counts), most).index_put((row_T, column_T), torch.zeros_like(logit_T))
    return torch.cat((logit_BK, absent_BK, text_BD), dim=1)


def weight_of(most: int, width: int) -> Tensor:
    """weight_KD of the projection from such hidden states to logits."""
    one = torch.eye(most)
    return torch.cat((one, NEVER * one, torch.zeros(most, width)), dim=1)
