"""One tiny random model of every kind: what test_kinds.py and other tests go over. A new kind joins by a line here."""

from __future__ import annotations

import torch

from upslope.config import Scratch
from upslope.models.open import new_model
from upslope.models.trunk import Trunk

VOCAB = 31
SHAPE = {"width": 16, "layers": 2, "context": 64, "vocab": 300}
SCRATCH: dict[str, dict[str, object]] = {
    "decoder": SHAPE | {"kind": "decoder", "heads": 4, "kv_heads": 2},
    "decoder-untied": SHAPE | {"kind": "decoder", "heads": 4, "tied": False},
    "lstm": SHAPE | {"kind": "lstm"},
    "lstm-untied": SHAPE | {"kind": "lstm", "tied": False, "layers": 1},
    "encdec": SHAPE | {"kind": "encdec", "heads": 4},
    "encdec-untied": SHAPE | {"kind": "encdec", "heads": 2, "tied": False, "layers": 1},
    "lstm-deep": SHAPE | {"kind": "lstm", "layers": 3},
}
SCALES = {"decoder": 8.0, "lstm": 8.0, "encdec": 6.0}  # weights so large that what is predicted is far from uniform


def tiny(name: str, seed: int = 0, scale: float | None = None) -> Trunk:
    shape = Scratch.model_validate(SCRATCH[name])
    model = new_model(shape, VOCAB, seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(SCALES[shape.kind] if scale is None else scale)
    return model
