"""One tiny random model of every kind: what test_kinds.py and other tests go over. A new kind joins by a line here."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, GPTNeoXConfig, OPTConfig, PhiConfig, PretrainedConfig

from upslope.config import Scratch
from upslope.models.fallback import Fallback
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
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
FALLBACK = {  # classes of transformers: untied; tied, with learned positions and dropout; with a bias of the logits
    "fallback-gpt-neox": GPTNeoXConfig(**COMMON, intermediate_size=24),
    "fallback-opt": OPTConfig(**COMMON, ffn_dim=24, word_embed_proj_dim=16),
    "fallback-phi": PhiConfig(**COMMON, intermediate_size=24, resid_pdrop=0.5),
}
NAMES = (*SCRATCH, *FALLBACK)
SCALES = {
    "decoder": 8.0,
    "lstm": 8.0,
    "encdec": 6.0,
    "fallback": 8.0,
}  # so large that what is predicted is far from uniform


def tiny(name: str, seed: int = 0, scale: float | None = None) -> Trunk:
    model = fallback(FALLBACK[name], seed) if name in FALLBACK else None
    if model is None:
        model = new_model(Scratch.model_validate(SCRATCH[name]), VOCAB, seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(SCALES[name.partition("-")[0]] if scale is None else scale)
            elif name in FALLBACK and bool((parameter == 0).all()):  # a bias that is 0 would hide what becomes of it
                parameter.copy_(torch.linspace(-0.5, 0.5, len(parameter)))
    return model


def fallback(config: PretrainedConfig, seed: int) -> Fallback:
    """A random model of one of transformers' classes."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Fallback(AutoModelForCausalLM.from_config(config))
