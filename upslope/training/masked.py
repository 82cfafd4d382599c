"""Masked-language modelling and, with data.next, next-sentence prediction: what the stage pretrain is for an encoder.

    loss = - sum over chosen tokens of log p(token | text with them hidden) / number of chosen tokens in the batch
           - sum over pairs of log p(the second follows the first, or not) / number of pairs in the batch

Of each text 15 % of the tokens are chosen (one at the least, never a special one): 80 % of these are replaced by the
mask, 10 % by a random token, 10 % left as they are. Which, is drawn from (seed, step, row, place) alone. Of a pair the
second text is the other half of the first or, once in two by such a draw, the second half of the batch's next text.
Devlin et al. 2019, "BERT" (arXiv 1810.04805), section 3.1.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

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
    """A text as the encoder reads it: ids, trained (which places were chosen), hidden (what stood at these); of a pair
    also how long its first text is, and whether the second follows it."""

    hidden: list[int]
    first: int = 0
    follows: bool | None = None

    @property
    def types(self) -> list[int]:
        """0 for a first text, 1 for a second one."""
        return [0] * self.first + [1] * (len(self.ids) - self.first) if self.first else [0] * len(self.ids)


def masked_texts(rows: Dataset, tokenizer: Tokenizer, *, text: str, max_tokens: int) -> tuple[Examples, Account]:
    """Texts as an encoder reads them; trained says which tokens may be chosen: all but the first and the special ones.

    Raises DataError for a tokenizer without a mask.
    """
    _require_mask(tokenizer)
    account = Account(len(rows), unit="texts")
    special = set(tokenizer.inner.all_special_ids)
    made = Examples()
    for i, value in zip(row_numbers(rows), rows[text], strict=True):
        ids = tokenizer.encode_prompt(value) if isinstance(value, str) else []
        free = [place > 0 and token not in special for place, token in enumerate(ids)]
        if not any(free):
            account.drop("without text", i)
        elif len(ids) > max_tokens:
            account.drop(f"longer than {max_tokens} tokens", i, value)
        else:
            made.append(Example(ids, free, i))
    return made, account.close(len(made))


def text_pairs(rows: Dataset, tokenizer: Tokenizer, *, text: str, max_tokens: int) -> tuple[Examples, Account]:
    """Texts cut at the end of the sentence that is nearest to the middle: first token, half, EOS, half, EOS.

    A half takes at most max_tokens / 2, so that any two go together. Raises DataError for a tokenizer without a mask.
    """
    _require_mask(tokenizer)
    account = Account(len(rows), unit="texts")
    made = Examples()
    special = set(tokenizer.inner.all_special_ids)
    for i, value in zip(row_numbers(rows), rows[text], strict=True):
        halves = halved(value) if isinstance(value, str) else None
        ids = [tokenizer.encode(half, special=False) for half in halves or ()]
        if not isinstance(value, str) or not value.strip():
            account.drop("without text", i)
        elif halves is None or not all(set(half) - special for half in ids):
            account.drop("of one sentence, which none follows", i, value)
        elif any(tokenizer.end_id in half for half in ids):
            account.drop("with the token that ends a text", i, value)
        elif max(map(len, ids)) + 2 > max_tokens // 2:
            account.drop(f"with a half longer than {max_tokens // 2} tokens", i, value)
        else:
            first = tokenizer.encode_prompt(value)[0]
            whole = [first, *ids[0], tokenizer.end_id, *ids[1], tokenizer.end_id]
            made.append(Example(whole, [n > 0 and token not in special for n, token in enumerate(whole)], i))
    return made, account.close(len(made))


def halved(text: str) -> tuple[str, str] | None:
    """A text as two, cut at the end of the sentence nearest to its middle; None for one sentence."""
    ends = [match.end() for match in re.finditer(r"[.!?][\"')\]]*\s+(?=\S)", text)]
    if not ends:
        return None
    cut = min(ends, key=lambda end: abs(end - len(text) / 2))
    return text[:cut].strip(), text[cut:].strip()


def hide(
    texts: Sequence[Example], mask_id: int, tokens: int, seed: int, step: int, separator: int | None = None
) -> list[Example]:
    """Choose and hide tokens of each text anew, for one step; separator: of pairs, what ends the first half of each."""
    if separator is None:
        return [_hidden(text, mask_id, tokens, seed, step) for text in texts]
    hidden: list[Example] = []
    for n, text in enumerate(texts):
        other = texts[(n + 1) % len(texts)]
        cut, behind = (t.ids.index(separator) + 1 for t in (text, other))
        follows = len(texts) == 1 or bool(
            uniform(seed, step, text.row, STREAM + 3, np.zeros(1, dtype=np.int64))[0] < 0.5
        )
        if not follows:
            ids, free = text.ids[:cut] + other.ids[behind:], text.trained[:cut] + other.trained[behind:]
            text = Example(ids, free, text.row)
        hidden.append(replace(_hidden(text, mask_id, tokens, seed, step), first=cut, follows=follows))
    return hidden


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
    return _masked_and_next(model, texts)[0]


def masked_loss(model: Encoder, texts: Sequence[Masked], chosen: int, pairs: int) -> Tensor:
    """The part of the batch's loss that some of its texts have; chosen, pairs: of the whole batch."""
    logp_A, next_B = _masked_and_next(model, texts)
    loss = -logp_A.sum() / chosen
    return loss if next_B is None else loss - next_B.sum() / pairs


@torch.no_grad()
def next_metrics(model: Encoder, texts: Sequence[Masked], parts: Sequence[Sequence[int]]) -> dict[str, float]:
    """Mean negative log-likelihood of whether second texts follow, and the share that is told right; a tie is half."""
    logp_B = torch.cat([_following(model, [texts[i] for i in part]) for part in parts])
    sure_B = logp_B.double().exp()
    return {
        "valid/next_loss": float(-logp_B.double().mean()),
        "valid/next_accuracy": float(torch.where((sure_B - 0.5).abs() < 1e-6, 0.5, (sure_B > 0.5).double()).mean()),
    }


def _following(model: Encoder, texts: Sequence[Masked]) -> Tensor:
    found = _masked_and_next(model, texts)[1]
    assert found is not None
    return found


def _masked_and_next(model: Encoder, texts: Sequence[Masked]) -> tuple[Tensor, Tensor | None]:
    """(logp_A of what was hidden, logp_B of whether each pair's second text follows; None without pairs)."""
    batch = Ragged.of([text.ids for text in texts]).to(model.device)
    chosen_A = torch.nonzero(torch.tensor([c for text in texts for c in text.trained])).squeeze(1).to(model.device)
    target_A = torch.tensor([token for text in texts for token in text.hidden], device=model.device)
    states_ND = model.states(batch, torch.tensor([t for text in texts for t in text.types]))
    hidden_AD, weight_VD = model.masked_states(states_ND[chosen_A])
    logp_A = token_logprobs(hidden_AD, weight_VD, target_A)[0]
    if texts[0].follows is None:
        return logp_A, None
    strange_B = torch.tensor([int(not text.follows) for text in texts], device=model.device)
    logp_B2 = torch.log_softmax(model.follows(states_ND, batch), dim=-1)
    return logp_A, logp_B2.gather(1, strange_B[:, None]).squeeze(1)


def _require_mask(tokenizer: Tokenizer) -> None:
    if tokenizer.inner.mask_token_id is None:
        raise DataError(f"the tokenizer of {tokenizer.source} has no mask token", "use an encoder's own tokenizer")
