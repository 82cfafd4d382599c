"""Masked-language modelling: what the stage pretrain is for an encoder.

    loss = - sum over chosen tokens of log p(token | text with them hidden) / number of chosen tokens in the batch

Of each text 15 % of the tokens are chosen (one at the least, never a special one): 80 % of these are replaced by the
mask, 10 % by a random token, 10 % left as they are. Which, is drawn from (seed, step, row, place) alone.
Devlin et al. 2019, "BERT" (arXiv 1810.04805), section 3.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from upslope.algo import token_logprobs
from upslope.algo.random import uniform
from upslope.errors import DataError
from upslope.models.encoder import Encoder
from upslope.ragged import Ragged
from upslope.text.cleaning import Account, row_numbers
from upslope.text.examples import Example, Examples
from upslope.text.tokenizer import Tokenizer

CHOSEN, MASKED, RANDOM = 0.15, 0.8, 0.9  # of all tokens; of the chosen ones, and up to where a random one
STREAM = 1 << 30  # numbers of their own: no sampled completion is counted so far
HELD_OUT = 2**31 - 1  # the step of held-out texts: they are masked once


@dataclass(frozen=True)
class Masked(Example):
    """A text as the encoder reads it: ids, trained (which places were chosen), and hidden (what stood at these)."""

    hidden: list[int]


def masked_texts(rows: Dataset, tokenizer: Tokenizer, *, text: str, max_tokens: int) -> tuple[Examples, Account]:
    """Texts as an encoder reads them; trained says which tokens may be chosen: all but the first and the special ones.

    Raises DataError for a tokenizer without a mask.
    """
    if tokenizer.inner.mask_token_id is None:
        raise DataError(f"the tokenizer of {tokenizer.source} has no mask token", "use an encoder's own tokenizer")
    account = Account(len(rows), unit="texts")
    special = set(tokenizer.inner.all_special_ids)
    made = Examples()
    for i, value in zip(row_numbers(rows), rows[text], strict=True):
        ids = tokenizer.encode_prompt(value) if isinstance(value, str) else []
        free = [place > 0 and token not in special for place, token in enumerate(ids)]
        if not any(free):
            account.drop("without text", i)
        elif len(ids) > max_tokens:
            account.drop(f"longer than {max_tokens} tokens", i)
        else:
            made.append(Example(ids, free, i))
    return made, account.close(len(made))


def hide(texts: Sequence[Example], mask_id: int, tokens: int, seed: int, step: int) -> list[Example]:
    """Choose and hide tokens of each text anew, for one step."""
    return [_hidden(text, mask_id, tokens, seed, step) for text in texts]


def _hidden(text: Example, mask_id: int, tokens: int, seed: int, step: int) -> Masked:
    places = np.arange(len(text.ids))
    chance, what, which = (uniform(seed, step, text.row, STREAM + k, places) for k in range(3))
    chance = np.where(text.trained, chance, 2.0)
    chosen = chance < CHOSEN
    chosen[int(chance.argmin())] = True
    ids = np.array(text.ids)
    ids = np.where(chosen & (what < MASKED), mask_id, ids)
    ids = np.where(chosen & (what >= MASKED) & (what < RANDOM), (which * tokens).astype(np.int64), ids)
    return Masked(ids.tolist(), chosen.tolist(), text.row, [t for t, c in zip(text.ids, chosen, strict=True) if c])


def masked_logprobs(model: Encoder, texts: Sequence[Masked]) -> Tensor:
    """logp_A of what stood at every chosen place, text by text."""
    batch = Ragged.of([text.ids for text in texts]).to(model.device)
    chosen_A = torch.nonzero(torch.tensor([c for text in texts for c in text.trained])).squeeze(1).to(model.device)
    target_A = torch.tensor([token for text in texts for token in text.hidden], device=model.device)
    hidden_AD, weight_VD = model.masked_states(model.states(batch)[chosen_A])
    return token_logprobs(hidden_AD, weight_VD, target_A)[0]
