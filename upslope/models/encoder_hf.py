"""Encoders in and out of Hugging Face layout: BERT, with or without a pooler, masked head and label head, strictly.

A sentence encoder's folder says in 1_Pooling/config.json that a text is the mean of its states; it has no pooler
here, and transformers has no class that makes labels of the mean: its BertModel reads the rest.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from upslope.errors import ModelError
from upslope.models.checks import check_sizes, reading
from upslope.models.encoder import Encoder, EncoderConfig
from upslope.models.hf import ACTIVATIONS as COMMON
from upslope.models.hf import read_config
from upslope.models.stack import StackConfig
from upslope.models.weights import fill, read_weights

MODEL_TYPES = ("bert",)
ACTIVATIONS = {**COMMON, "relu": "relu"}
IGNORED = ("position_ids", "cls.predictions.decoder.weight", "cls.predictions.decoder.bias")  # buffers and copies
PAIRED = "cls.seq_relationship.weight"
CLASSIFIER = "classifier.weight"
POOLING, MEAN, FIRST = "1_Pooling/config.json", "pooling_mode_mean_tokens", "pooling_mode_cls_token"
MODULES = [  # as sentence-transformers writes them
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
]


def load_encoder(folder: Path, *, dtype: torch.dtype = torch.float32) -> Encoder:
    """A BERT from its folder. Raises ModelError."""
    raw = read_config(folder)
    weights = {name: w for name, w in read_weights(folder) if not name.endswith(IGNORED)}
    bare = not any(name.startswith("bert.") for name in weights)  # stored without a head
    if bare:
        weights = {f"bert.{name}": w for name, w in weights.items()}
    pooling = _pooling(folder)
    if pooling is not None:
        weights = {name: w for name, w in weights.items() if not name.startswith("bert.pooler.")}
    with reading(folder / "config.json"):
        config = _config(raw, weights, pooling == MEAN, folder)
        check_sizes(config.stack, folder)
        check_sizes(config, folder)
        with torch.device("meta"):
            model = Encoder(config)
    fill(model, weights, _names(config), dtype, folder)
    return model


def save_encoder(model: Encoder, folder: Path) -> None:
    """Write configuration and weights as transformers reads them."""
    c = model.config
    names = _names(c)
    theirs = {names[name]: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(theirs, folder / "model.safetensors", metadata={"format": "pt"})
    back = {"gelu_tanh": "gelu_new"}
    raw: dict[str, Any] = {
        "architectures": ["BertForMaskedLM"],
        "model_type": "bert",
        "vocab_size": c.tokens,
        "hidden_size": c.stack.width,
        "num_hidden_layers": c.stack.layers,
        "num_attention_heads": c.stack.heads,
        "intermediate_size": c.stack.ffn_width,
        "max_position_embeddings": c.stack.context,
        "type_vocab_size": c.types,
        "layer_norm_eps": c.stack.norm_eps,
        "hidden_act": back.get(c.stack.activation, c.stack.activation),
        "pad_token_id": c.pad_id,
        "torch_dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
    }
    if c.paired:
        raw["architectures"] = ["BertForPreTraining"]
    if c.separator is not None:
        raw |= {"architectures": ["BertModel"], "upslope_passages": len(c.labels), "upslope_separator": c.separator}
    elif c.labels:
        raw["architectures"] = ["BertForSequenceClassification"]
        raw |= {"id2label": dict(enumerate(c.labels)), "label2id": {name: n for n, name in enumerate(c.labels)}}
    if c.mean:
        raw["architectures"] = ["BertModel"]
        (folder / POOLING).parent.mkdir(exist_ok=True)
        pooling = {"word_embedding_dimension": c.stack.width, MEAN: True}
        (folder / POOLING).write_text(json.dumps(pooling, indent=2) + "\n", encoding="utf-8")
        (folder / "modules.json").write_text(json.dumps(MODULES, indent=2) + "\n", encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")


def _pooling(folder: Path) -> str | None:
    """How a sentence encoder's folder says that texts are pooled; None for others. Raises ModelError for other ways."""
    path = folder / POOLING
    if not path.is_file():
        return None
    with reading(path):
        modes = json.loads(path.read_text(encoding="utf-8"))
        found = [name for name, value in modes.items() if name.startswith("pooling_mode_") and value is True]
    if found not in ([MEAN], [FIRST]):
        said = ", ".join(found) or "no pooling"
        raise ModelError(f"{path} asks for {said:.80}, which is not known", f"use one of {MEAN} or {FIRST}")
    return found[0]


def _config(raw: Mapping[str, Any], weights: Mapping[str, Any], mean: bool, folder: Path) -> EncoderConfig:
    for key in ("is_decoder", "add_cross_attention"):
        if raw.get(key):
            raise ModelError(f"{folder}: {key} is set, which an encoder is not", "use another model")
    if raw.get("position_embedding_type", "absolute") != "absolute":
        raise ModelError(
            f"{folder}: position_embedding_type is {raw['position_embedding_type']!r}", "use another model"
        )
    activation, heads = raw.get("hidden_act", "gelu"), raw["num_attention_heads"]
    if activation not in ACTIVATIONS:
        raise ModelError(f"{folder}: activation {activation!r:.80} is not known", f"known: {', '.join(ACTIVATIONS)}")
    labels: tuple[str, ...] = ()
    if CLASSIFIER in weights:
        named = raw.get("id2label") or {}
        labels = tuple(str(named.get(str(n), f"LABEL_{n}")) for n in range(len(weights[CLASSIFIER])))
    if raw.get("upslope_separator") is not None:
        labels = tuple(str(n) for n in range(int(raw["upslope_passages"])))
    stack = StackConfig(
        width=raw["hidden_size"],
        layers=raw["num_hidden_layers"],
        heads=heads,
        head_dim=raw["hidden_size"] // heads,
        ffn_width=raw["intermediate_size"],
        context=raw["max_position_embeddings"],
        norm="layer",
        norm_eps=raw.get("layer_norm_eps", 1e-12),
        pre_norm=False,
        embed_norm=True,
        bias=True,
        scaled=True,
        gated=False,
        activation=ACTIVATIONS[activation],
        position="learned",
    )
    return EncoderConfig(
        tokens=raw["vocab_size"],
        stack=stack,
        types=raw.get("type_vocab_size", 2),
        pooler="bert.pooler.dense.weight" in weights,
        mean=mean,
        masked_head="cls.predictions.bias" in weights,
        paired=PAIRED in weights,
        labels=labels,
        pad_id=raw.get("pad_token_id") or 0,
        separator=raw.get("upslope_separator"),
    )


BOTH = ("weight", "bias")
AROUND = {
    "embed": "bert.embeddings.word_embeddings",
    "types": "bert.embeddings.token_type_embeddings",
    "stack.position": "bert.embeddings.position_embeddings",
    "stack.embed_norm": "bert.embeddings.LayerNorm",
    "pooler": "bert.pooler.dense",
    "masked.dense": "cls.predictions.transform.dense",
    "masked.norm": "cls.predictions.transform.LayerNorm",
    "pair": "cls.seq_relationship",
    "label_head": "classifier",
}
BLOCK = {
    "own.q": "attention.self.query",
    "own.k": "attention.self.key",
    "own.v": "attention.self.value",
    "own.o": "attention.output.dense",
    "own_norm": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "mlp_norm": "output.LayerNorm",
}


def _names(c: EncoderConfig) -> dict[str, str]:
    """Every weight's name: ours -> theirs."""
    table = {f"{ours}.{part}": f"{theirs}.{part}" for ours, theirs in AROUND.items() for part in BOTH}
    table["masked.bias"] = "cls.predictions.bias"
    table["sharpness"] = "upslope.sharpness"
    for i in range(c.stack.layers):
        for ours, theirs in BLOCK.items():
            table |= {f"stack.blocks.{i}.{ours}.{part}": f"bert.encoder.layer.{i}.{theirs}.{part}" for part in BOTH}
    return table
