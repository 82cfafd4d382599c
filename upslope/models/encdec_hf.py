"""Encoder-decoders in and out of Hugging Face layout: T5 (1.0 and 1.1) and BART, strictly."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from upslope.errors import ModelError
from upslope.models.checks import check_sizes, reading
from upslope.models.encdec import EncDec, EncDecConfig
from upslope.models.hf import ACTIVATIONS as COMMON
from upslope.models.hf import read_config
from upslope.models.stack import StackConfig
from upslope.models.weights import fill, read_weights

ARCHITECTURES = {"t5": "T5ForConditionalGeneration", "bart": "BartForConditionalGeneration"}
ACTIVATIONS = {**COMMON, "relu": "relu"}
COPIES = ("embed_tokens.weight", "final_logits_bias")  # of the shared embedding; and a bias that is read by itself
BARE = ("shared.", "encoder.", "decoder.")  # a BART that was stored without its head has no "model." in front
T5_CONTEXT = 512  # what a T5 that does not say was trained on


def load_encdec(folder: Path, *, dtype: torch.dtype = torch.float32) -> EncDec:
    """A T5 or BART model from its folder. Raises ModelError."""
    raw = read_config(folder)
    weights = dict(read_weights(folder))
    kind = raw["model_type"]
    with reading(folder / "config.json"):
        if kind == "t5":
            tied = _is_tied(weights, "shared.weight", "lm_head.weight")
            config = _t5_config(raw, tied)
        elif kind == "bart":
            weights = {f"model.{n}" if n.startswith(BARE) else n: w for n, w in weights.items()}
            tied = _is_tied(weights, "model.shared.weight", "lm_head.weight")
            config = _bart_config(_generation(folder) | {k: v for k, v in raw.items() if v is not None}, tied, folder)
        else:
            raise ModelError(f"{folder}: {kind!r} is no encoder-decoder", f"known: {', '.join(ARCHITECTURES)}")
        for stack in (config.encoder, config.decoder):
            check_sizes(stack, folder)
        check_sizes(config, folder)
        with torch.device("meta"):
            model = EncDec(config)
    bias = weights.get("final_logits_bias")
    if bias is not None and bool(bias.any()):
        raise ModelError(
            f"{folder}: final_logits_bias is not 0 everywhere, which no projection here can add", "use another model"
        )
    ignored = (*COPIES, "lm_head.weight") if config.tied else COPIES
    kept = {name: tensor for name, tensor in weights.items() if not name.endswith(ignored)}
    fill(model, kept, _names(config, kind), dtype, folder)
    return model


def save_encdec(model: EncDec, folder: Path) -> None:
    """Write configuration and weights as transformers (4 and 5) reads them. Raises ModelError."""
    config = model.config
    kind = "t5" if config.decoder.position == "relative" else "bart"
    raw = _their_t5(config) if kind == "t5" else _their_bart(config)
    names = _names(config, kind)
    theirs = {names[name]: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    if kind == "t5" and config.tied and not config.scale_logits:  # to them unscaled means stored apart
        theirs["lm_head.weight"] = theirs["shared.weight"].clone()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(theirs, folder / "model.safetensors", metadata={"format": "pt"})
    forced = {"forced_bos_token_id": config.start_ids[1]} if len(config.start_ids) == 2 else {}
    special = {
        "decoder_start_token_id": config.start_ids[0],
        "pad_token_id": config.pad_id,
        "eos_token_id": config.eos_id,
        **({"bos_token_id": config.bos_id} if config.bos_id is not None else {}),
    }
    raw |= special | {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        "is_encoder_decoder": True,
        "torch_dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
    }
    for name, content in (("config.json", raw), ("generation_config.json", special | forced)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _t5_config(raw: Mapping[str, Any], tied: bool) -> EncDecConfig:
    gated, _, activation = str(raw.get("feed_forward_proj", "relu")).rpartition("-")
    if gated not in ("", "gated"):
        raise ValueError(f"feed_forward_proj is {raw['feed_forward_proj']!r}")
    encoder = StackConfig(
        width=raw["d_model"],
        layers=raw["num_layers"],
        heads=raw["num_heads"],
        head_dim=raw["d_kv"],
        ffn_width=raw["d_ff"],
        context=raw.get("n_positions", T5_CONTEXT),
        norm_eps=raw.get("layer_norm_epsilon", 1e-6),
        gated=gated == "gated",
        activation="gelu_tanh" if gated and activation == "gelu" else _activation(activation),  # their one exception
        buckets=raw.get("relative_attention_num_buckets", 32),
        max_distance=raw.get("relative_attention_max_distance", 128),
    )
    layers = raw.get("num_decoder_layers")
    pad = raw.get("pad_token_id", 0)
    return EncDecConfig(
        vocab_size=raw["vocab_size"],
        encoder=encoder,
        decoder=replace(encoder, across=True, layers=encoder.layers if layers is None else layers),
        start_ids=(raw.get("decoder_start_token_id", pad),),
        tied=tied,
        scale_logits=bool(raw.get("scale_decoder_outputs", raw.get("tie_word_embeddings", True))),
        pad_id=pad,
        eos_id=_first(raw.get("eos_token_id", 1)),
        bos_id=raw.get("bos_token_id"),
    )


def _bart_config(raw: Mapping[str, Any], tied: bool, folder: Path) -> EncDecConfig:
    for key in ("normalize_before", "add_final_layer_norm", "static_position_embeddings", "extra_pos_embeddings"):
        if raw.get(key) not in (None, False, 2):
            raise ModelError(f"{folder}: {key} is {raw[key]!r}, which is not known", "use another model")
    if raw.get("normalize_embedding") is False:
        raise ModelError(f"{folder}: normalize_embedding is false, which is not known", "use another model")

    def stack(side: str) -> StackConfig:
        heads = raw[f"{side}_attention_heads"]
        return StackConfig(
            width=raw["d_model"],
            layers=raw[f"{side}_layers"],
            heads=heads,
            head_dim=raw["d_model"] // heads,
            ffn_width=raw[f"{side}_ffn_dim"],
            context=raw["max_position_embeddings"],
            norm="layer",
            norm_eps=1e-5,
            pre_norm=False,
            embed_norm=True,
            bias=True,
            scaled=True,
            gated=False,
            activation=_activation(raw.get("activation_function", "gelu")),
            position="learned",
            position_offset=2,
            across=side == "decoder",
        )

    start, forced = raw.get("decoder_start_token_id", 2), raw.get("forced_bos_token_id")
    return EncDecConfig(
        vocab_size=raw["vocab_size"],
        encoder=stack("encoder"),
        decoder=stack("decoder"),
        start_ids=(start,) if forced is None else (start, forced),
        tied=tied,
        scale_logits=False,
        scale_embedding=bool(raw.get("scale_embedding", False)),
        pad_id=raw.get("pad_token_id", 1),
        eos_id=_first(raw.get("eos_token_id", 2)),
        bos_id=raw.get("bos_token_id", 0),
    )


def _their_t5(c: EncDecConfig) -> dict[str, Any]:
    e, d = c.encoder, c.decoder
    back = {"gelu_tanh": "gelu" if d.gated else "gelu_new"}.get(d.activation, d.activation)
    if d.gated and d.activation == "gelu":
        raise ModelError("T5 reads gated-gelu as the tanh form of gelu", "keep activation gelu_tanh")
    return {
        "vocab_size": c.vocab_size,
        "d_model": c.width,
        "d_kv": d.head_dim,
        "d_ff": d.ffn_width,
        "num_layers": e.layers,
        "num_decoder_layers": d.layers,
        "num_heads": d.heads,
        "n_positions": e.context,
        "layer_norm_epsilon": d.norm_eps,
        "relative_attention_num_buckets": d.buckets,
        "relative_attention_max_distance": d.max_distance,
        "feed_forward_proj": f"gated-{back}" if d.gated else back,
        "tie_word_embeddings": c.scale_logits,  # their word for whether logits are scaled
        "scale_decoder_outputs": c.scale_logits,
    }


def _their_bart(c: EncDecConfig) -> dict[str, Any]:
    raw: dict[str, Any] = {
        "vocab_size": c.vocab_size,
        "d_model": c.width,
        "max_position_embeddings": c.encoder.context,
        "activation_function": {"gelu_tanh": "gelu_new"}.get(c.decoder.activation, c.decoder.activation),
        "scale_embedding": c.scale_embedding,
        "tie_word_embeddings": c.tied,
    }
    for side, stack in (("encoder", c.encoder), ("decoder", c.decoder)):
        raw[f"{side}_layers"] = stack.layers
        raw[f"{side}_attention_heads"] = stack.heads
        raw[f"{side}_ffn_dim"] = stack.ffn_width
    return raw


def _is_tied(weights: Mapping[str, Tensor], embedding: str, head: str) -> bool:
    """Whether the projection is the embedding: it is not stored, or is stored twice."""
    if head not in weights:
        return True
    return embedding in weights and torch.equal(weights[head], weights[embedding])


def _generation(folder: Path) -> dict[str, Any]:
    """What generation_config.json says of the decoder's first tokens, where newer models keep it."""
    path = folder / "generation_config.json"
    if not path.is_file():
        return {}
    with reading(path):
        raw = json.loads(path.read_text(encoding="utf-8"))
        return {key: raw[key] for key in ("decoder_start_token_id", "forced_bos_token_id") if raw.get(key) is not None}


def _activation(name: str) -> str:
    if name not in ACTIVATIONS:
        raise ModelError(f"activation {name!r:.80} is not known", f"known: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def _first(ids: int | list[int]) -> int:
    return ids[0] if isinstance(ids, list) else ids


def _names(c: EncDecConfig, kind: str) -> dict[str, str]:
    """Every weight's name: ours -> theirs."""
    table = dict(T5_OUTSIDE if kind == "t5" else BART_OUTSIDE)
    for side, stack in (("encoder", c.encoder), ("decoder", c.decoder)):
        around, block = (T5_AROUND, T5_BLOCK) if kind == "t5" else (BART_AROUND, BART_BLOCK)
        place = {"side": side, "last": "2" if stack.across else "1", "up": "wi_1" if stack.gated else "wi"}
        table |= {f"{side}.{ours}": theirs.format(**place) for ours, theirs in around.items()}
        for i in range(stack.layers):
            table |= {f"{side}.blocks.{i}.{o}": theirs.format(i=i, **place) for o, theirs in block.items()}
    return table


def _heads(ours: str, theirs: str, output: str, parts: tuple[str, ...]) -> dict[str, str]:
    """The four projections of an attention."""
    names = {"q": "q", "k": "k", "v": "v", "o": output}
    suffix = "_proj" if output == "out" else ""
    return {f"{ours}.{n}.{part}": f"{theirs}.{their}{suffix}.{part}" for n, their in names.items() for part in parts}


T5_OUTSIDE = {"embed.weight": "shared.weight", "head.weight": "lm_head.weight"}
T5_AROUND = {
    "relative.weight": "{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
    "norm.weight": "{side}.final_layer_norm.weight",
}
T5_BLOCK = {
    "own_norm.weight": "{side}.block.{i}.layer.0.layer_norm.weight",
    **_heads("own", "{side}.block.{i}.layer.0.SelfAttention", "o", ("weight",)),
    "across_norm.weight": "{side}.block.{i}.layer.1.layer_norm.weight",
    **_heads("across", "{side}.block.{i}.layer.1.EncDecAttention", "o", ("weight",)),
    "mlp_norm.weight": "{side}.block.{i}.layer.{last}.layer_norm.weight",
    "gate.weight": "{side}.block.{i}.layer.{last}.DenseReluDense.wi_0.weight",
    "up.weight": "{side}.block.{i}.layer.{last}.DenseReluDense.{up}.weight",
    "down.weight": "{side}.block.{i}.layer.{last}.DenseReluDense.wo.weight",
}
BOTH = ("weight", "bias")
BART_OUTSIDE = {"embed.weight": "model.shared.weight", "head.weight": "lm_head.weight"}
BART_AROUND = {
    "position.weight": "model.{side}.embed_positions.weight",
    **{f"embed_norm.{part}": f"model.{{side}}.layernorm_embedding.{part}" for part in BOTH},
}
BART_BLOCK = {
    **_heads("own", "model.{side}.layers.{i}.self_attn", "out", BOTH),
    **_heads("across", "model.{side}.layers.{i}.encoder_attn", "out", BOTH),
    **{
        f"{ours}.{part}": f"model.{{side}}.layers.{{i}}.{theirs}.{part}"
        for ours, theirs in (
            ("own_norm", "self_attn_layer_norm"),
            ("across_norm", "encoder_attn_layer_norm"),
            ("mlp_norm", "final_layer_norm"),
            ("up", "fc1"),
            ("down", "fc2"),
        )
        for part in BOTH
    },
}
