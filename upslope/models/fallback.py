"""Any causal model of transformers that ours does not cover, by its own class: right, and slower.

    logits = scale (hidden weight^T + bias)          scale and bias where the class has them

Padding exists in here: rows are padded on the right, a shared prompt is computed once for each of its completions, and
generation computes a whole sequence anew for each token, since caches differ between classes. What a class computes is
tried on a few tokens when it is read: one whose logits are no product, that looks ahead, or that sees pads is refused.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, logging

from upslope.errors import ModelError
from upslope.models.checks import LIMITS
from upslope.models.hf import read_config
from upslope.models.runner import sum_of_words
from upslope.models.trunk import Trunk, check_context
from upslope.ragged import Ragged

CONTEXTS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")  # what configurations call it
UNBOUNDED = 1 << 20  # the context of a class that has none: a state-space model
PROBE = [[5, 3, 8, 2, 7, 1], [4, 6, 2]]
NEAR, ROUNDED = 1e-4, 0.1  # of the largest number: how near two ways to compute it must be, in fp32 and in bf16
REMARK = "this model is computed by transformers' own class, for upslope has none of its shape: right, but slower"


@dataclass(frozen=True)
class FallbackConfig:
    """What the loops ask of a shape. width counts a column of ones where the logits have a bias."""

    vocab_size: int
    width: int
    context: int


class Fallback(Trunk):
    """A transformers class behind the contract of a trunk; always in evaluation mode, so that nothing drops out."""

    config: FallbackConfig
    remark = REMARK

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = (inner,)  # for saving; its parts are registered below, none of them twice
        self.base = inner.base_model
        head, embedding = inner.get_output_embeddings(), inner.get_input_embeddings()
        tied = head.weight is embedding.weight
        self.head: nn.Module | None = None if tied else head
        self.tied_bias = getattr(head, "bias", None) if tied else None
        self.compute_dtype = torch.float32
        self.scale = 1.0
        text = inner.config.get_text_config(decoder=True)
        context = next((int(getattr(text, key)) for key in CONTEXTS if getattr(text, key, None)), UNBOUNDED)
        width = head.weight.shape[1] + (self._bias is not None)
        self.config = FallbackConfig(len(head.weight), width, context)
        self.takes_positions = "position_ids" in inspect.signature(self.base.forward).parameters
        self.eval()

    @property
    def blocks(self) -> nn.ModuleList:  # type: ignore[override]
        lists = [m for m in self.base.modules() if isinstance(m, nn.ModuleList)]
        return max(lists, key=lambda m: sum(p.numel() for p in m.parameters()), default=nn.ModuleList())

    @property
    def _bias(self) -> Tensor | None:
        return self.tied_bias if self.head is None else getattr(self.head, "bias", None)

    @property
    def output_weight(self) -> Tensor:
        """weight_VD, with the bias for a last column where there is one."""
        head: Any = self.head or self.base.get_input_embeddings()
        weight: Tensor = head.weight
        return weight if self._bias is None else torch.cat((weight, self._bias[:, None]), dim=1)

    def train(self, mode: bool = True) -> Fallback:
        """Stay as it is: a dropout would make what is trained another policy than what sampled."""
        return super().train(False)

    def lowest(self, layers: int) -> list[nn.Parameter]:
        """Every embedding and the lowest blocks."""
        embeddings = [m for m in self.base.modules() if isinstance(m, nn.Embedding)]
        return [p for module in (*embeddings, *self.blocks[:layers]) for p in module.parameters()]

    def hidden(self, batch: Ragged) -> Tensor:
        """hidden_ND, in compute_dtype. Raises ModelError beyond the context."""
        check_context(batch, self.config.context)
        if not batch.tokens:
            return self.output_weight.new_zeros(0, self.config.width, dtype=self.compute_dtype)
        children = {p: b for b, p in enumerate(batch.parent) if p >= 0 and batch.lengths[b]}
        rows = [b for b in range(len(batch)) if batch.lengths[b] and b not in children]
        row_of = {b: r for r, b in enumerate(rows)}
        whole = [torch.tensor(batch.sequence(b)) for b in rows]
        ids = nn.utils.rnn.pad_sequence(whole, batch_first=True)
        longest = ids.shape[1]
        place = [
            torch.arange(batch.lengths[b])
            + longest * row_of[children.get(b, b)]
            + (0 if b in children else batch.prefix_lengths[b])
            for b in range(len(batch))
            if batch.lengths[b]
        ]
        real = torch.arange(longest) < torch.tensor([len(w) for w in whole])[:, None]
        states = self._states(ids.to(self.device), real.to(self.device))
        hidden_ND = self.scale * states.flatten(0, 1)[torch.cat(place).to(self.device)].to(self.compute_dtype)
        ones = hidden_ND.new_full((len(hidden_ND), 1), self.scale)
        return hidden_ND if self._bias is None else torch.cat((hidden_ND, ones), dim=1)

    def _states(self, ids: Tensor, real: Tensor) -> Tensor:
        options: dict[str, Any] = {"attention_mask": real.long(), "use_cache": False}
        if self.takes_positions:
            options["position_ids"] = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
        mixed = self.compute_dtype != next(self.base.parameters()).dtype and self.compute_dtype == torch.bfloat16
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=mixed):
            return self.base(ids, **options).last_hidden_state

    @torch.no_grad()
    def probe(self, where: Path) -> None:
        """Find the scale of the logits, and raise ModelError where the class is not what this file takes it for."""
        exact = self.compute_dtype == torch.float32
        name = type(self.inner[0]).__name__
        hidden = self.hidden(Ragged.of(PROBE))
        first = hidden[: len(PROBE[0])]
        changed = self.hidden(Ragged.of([[*PROBE[0][:-1], 9], PROBE[1]]))
        alone = self.hidden(Ragged.of(PROBE[1:]))
        for what, a, b in (
            ("looks at later tokens", changed[: len(first) - 1], first[:-1]),
            ("sees the pads behind a text", alone, hidden[len(first) :]),
        ):
            if not torch.allclose(a, b, atol=float(hidden.abs().max()) * (NEAR if exact else ROUNDED)):
                raise ModelError(f"{where}: {name} {what}, so that it is no policy", "use another model")
        theirs = self.inner[0](torch.tensor(PROBE[:1], device=self.device), use_cache=False).logits[0].float()
        ours = first.float() @ self.output_weight.float().t()
        self.scale = float((ours * theirs).sum() / (ours * ours).sum())
        if not torch.allclose(self.scale * ours, theirs, atol=float(theirs.abs().max()) * (NEAR if exact else ROUNDED)):
            raise ModelError(f"{where}: the logits of {name} are no product of states and weights", "use another model")


@dataclass
class FallbackCache:
    """The tokens of each slot: all is computed anew."""

    tokens: list[list[int]]

    def move(self, source: int, target: int) -> None:
        """Let slot `target` hold what slot `source` holds."""
        self.tokens[target] = list(self.tokens[source])


class FallbackRunner:
    """Prefill and single steps without a cache of states, on a copy of the model in the dtype of products."""

    needs_source = False

    def __init__(self, model: Fallback, *, dtype: torch.dtype) -> None:
        self.config = model.config
        self.dtype = dtype
        self.device = model.device
        self.model = Fallback(copy.deepcopy(model.inner[0])).requires_grad_(False)
        for parameter in self.model.parameters():
            parameter.data = parameter.data.to(dtype)  # buffers, such as angles, stay as exact as they are
        self.model.compute_dtype, self.model.scale = dtype, model.scale
        self.output_weight = self.model.output_weight

    @torch.no_grad()
    def load(self, model: Fallback) -> None:
        """Take over the model's present weights, in place."""
        for own, theirs in zip(self.model.parameters(), model.parameters(), strict=True):
            own.copy_(theirs)
        self.output_weight = self.model.output_weight

    def checksum(self) -> str:
        """A number that changes when any weight does, as `checksum_of` makes it of a model."""
        return self.checksum_of(self.model)

    @torch.no_grad()
    def checksum_of(self, model: Fallback) -> str:
        """The checksum that this runner has when a model's present weights have reached it."""
        return sum_of_words([(n, p.detach().to(self.dtype)) for n, p in enumerate(model.parameters())])

    def new_cache(self, slots: int, capacity: int) -> FallbackCache:
        """No more than the tokens."""
        return FallbackCache([[] for _ in range(slots)])

    @torch.no_grad()
    def prefill(self, cache: FallbackCache, prompts: Ragged, slots: Sequence[Sequence[int]]) -> Tensor:
        """Note each prompt for the slots listed for it; hidden_PD of each prompt's last token."""
        for p, chosen in enumerate(slots):
            for slot in chosen:
                cache.tokens[slot] = prompts.sequence(p)
        return self.model.hidden(prompts.to(self.device))[prompts.last.to(self.device)]

    @torch.no_grad()
    def step(self, cache: FallbackCache, ids_S: Tensor) -> Tensor:
        """Append one token to each of the slots 0 to n - 1: hidden_SD."""
        for slot, token in enumerate(ids_S.tolist()):
            cache.tokens[slot].append(token)
        batch = Ragged.of(cache.tokens[: len(ids_S)])
        return self.model.hidden(batch.to(self.device))[batch.last.to(self.device)]


def load_fallback(folder: Path, *, dtype: torch.dtype = torch.float32) -> Fallback:
    """Read a folder by transformers: safetensors only, no code of the folder's. Raises ModelError."""
    raw = read_config(folder)
    if raw.get("is_encoder_decoder"):
        raise ModelError(f"{folder}: this encoder-decoder is of a shape that is not known", "use another model")
    for key, value in raw.items():  # a damaged number must not lead to a day of building layers
        limit = LIMITS["layers" if "layer" in key else "vocab_size"]
        if isinstance(value, int) and not -1 <= value <= limit:
            raise ModelError(f"{folder}: {key} is {value}, beyond any model there is", "fetch it again")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        inner, found = AutoModelForCausalLM.from_pretrained(
            str(folder), dtype=dtype, trust_remote_code=False, use_safetensors=True, output_loading_info=True
        )
        model = Fallback(inner)
        model.compute_dtype = dtype
        _strict(folder, found)
        model.probe(folder)
    except ModelError:
        raise
    except Exception as error:  # transformers raises many kinds for files it cannot use
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(f"{folder} cannot be read by transformers: {lines[0][:200]}", "fetch it again") from None
    return model


def _strict(folder: Path, found: dict[str, Any]) -> None:
    """transformers draws at random what it does not find: here that is an error."""
    for what in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        names = sorted(map(str, found[what]))
        if names:
            raise ModelError(f"{folder}: {len(names)} {what.replace('_', ' ')}, the first {names[0]}", "fetch it again")


def save_fallback(model: Fallback, folder: Path) -> None:
    """Write what transformers reads."""
    logging.disable_progress_bar()
    model.inner[0].save_pretrained(str(folder))
