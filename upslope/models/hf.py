"""Weights in and out: Hugging Face layout (config.json and safetensors) both ways, GGUF in.

Strict: a missing, extra or wrongly shaped weight, or a configuration whose numbers this decoder cannot compute, is an
error that names it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors.torch import save_file
from torch import Tensor

from upslope.errors import ModelError
from upslope.models.checks import check_numbers, reading
from upslope.models.decoder import Decoder, DecoderConfig
from upslope.models.gguf import read_gguf
from upslope.models.names import GGUF, HUGGING_FACE, Names
from upslope.models.weights import read_weights, report_differences

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
}


def load_decoder(path: Path, *, dtype: torch.dtype = torch.float32) -> Decoder:
    """A decoder from a folder in Hugging Face layout or a .gguf file. Raises ModelError."""
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(f"{path} is a file but not .gguf", "name the model's folder, or a .gguf file")
        config, weights = read_gguf(path)
        return _build(config, weights, GGUF, dtype, path)
    raw = read_config(path)
    if raw["model_type"] not in HUGGING_FACE:
        raise ModelError(
            f"{path}: architecture {raw['model_type']!r:.80} is not known", f"known: {', '.join(HUGGING_FACE)}"
        )
    config = decoder_config(raw, path)
    return _build(config, read_weights(path), HUGGING_FACE[raw["model_type"]], dtype, path)


def download(source: str) -> Path:
    """The local copy of a hub model's configuration, weights and tokenizer. Raises ModelError."""
    try:
        return Path(
            snapshot_download(source, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"])
        )
    except (RepositoryNotFoundError, LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"no model {source!r} here, and the hub does not give it: {reason[:120]}", "check the name"
        ) from None


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder. Raises ModelError where it is missing, not JSON, or names no architecture."""
    path = folder / "config.json"
    try:
        raw: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        inside = ", ".join(str(found.parent) for found in sorted(folder.glob("*/model/config.json")))
        remedy = f"name a model of that run: {inside}" if inside else "name one in Hugging Face layout, or a .gguf file"
        raise ModelError(f"the folder {folder} has no config.json", remedy) from None
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not JSON: {error}", "write the model's folder again") from None
    kind = raw.get("model_type") if isinstance(raw, dict) else None
    if not isinstance(kind, str):
        raise ModelError(f"{path}: architecture {kind!r:.80} is not known", f"known: {', '.join(HUGGING_FACE)}")
    return raw


def decoder_config(raw: Mapping[str, Any], where: Path) -> DecoderConfig:
    """Our configuration from theirs. Raises ModelError for what would change the numbers and is not known."""
    with reading(where):
        config = _our_config(raw, where)
    check_numbers(config, where)
    return config


def _our_config(raw: Mapping[str, Any], where: Path) -> DecoderConfig:
    kind = raw["model_type"]
    activation = raw.get("hidden_act", raw.get("activation_function", "gelu_new" if kind == "gpt2" else "silu"))
    if activation not in ACTIVATIONS:
        raise ModelError(f"{where}: activation {activation!r} is not known", f"known: {', '.join(ACTIVATIONS)}")
    if kind == "gpt2":
        for key in ("scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn", "add_cross_attention"):
            if raw.get(key):
                raise ModelError(f"{where}: {key} is set, which this decoder cannot compute", "use another model")
        return DecoderConfig(
            vocab_size=raw["vocab_size"],
            width=raw["n_embd"],
            layers=raw["n_layer"],
            heads=raw["n_head"],
            kv_heads=raw["n_head"],
            head_dim=raw["n_embd"] // raw["n_head"],
            ffn_width=raw.get("n_inner") or 4 * raw["n_embd"],
            context=raw["n_positions"],
            norm="layer",
            norm_eps=raw.get("layer_norm_epsilon", 1e-5),
            position="learned",
            qkv_bias=True,
            out_bias=True,
            mlp_bias=True,
            mlp="plain",
            activation=ACTIVATIONS[activation],
            tied=raw.get("tie_word_embeddings", True),
        )
    rope = {**(raw.get("rope_parameters") or {}), **(raw.get("rope_scaling") or {})}  # new and old places
    scaled = rope.get("rope_type", rope.get("type", "default")) not in ("default", None)
    if raw.get("pretraining_tp", 1) != 1 or rope.get("partial_rotary_factor", 1) not in (1, None):
        raise ModelError(f"{where}: pretraining_tp or partial rotary positions are not known", "use another model")
    heads = raw["num_attention_heads"]
    return DecoderConfig(
        vocab_size=raw["vocab_size"],
        width=raw["hidden_size"],
        layers=raw["num_hidden_layers"],
        heads=heads,
        kv_heads=raw.get("num_key_value_heads") or heads,
        head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
        ffn_width=raw["intermediate_size"],
        context=raw["max_position_embeddings"],
        norm_eps=raw.get("rms_norm_eps", 1e-6),
        rope_base=float(rope.get("rope_theta", raw.get("rope_theta", 10_000.0))),
        rope_scaling={k: v for k, v in rope.items() if k != "rope_theta"} if scaled else None,
        qkv_bias=bool(raw.get("attention_bias", kind == "qwen2")),
        out_bias=bool(raw.get("attention_bias", False)) and kind != "qwen2",
        mlp_bias=bool(raw.get("mlp_bias", False)),
        qk_norm=kind == "qwen3",
        activation=ACTIVATIONS[activation],
        tied=bool(raw.get("tie_word_embeddings", False)),
        sliding_window=_window(raw, where),
    )


def save_decoder(model: Decoder, folder: Path) -> None:
    """Write config.json and model.safetensors, as transformers (4 and 5) reads them; weights in their own dtype."""
    kind = architecture(model.config)
    names = HUGGING_FACE[kind]
    ours = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    table = names.expand(model.config.layers)
    if names.fused_qkv:
        for i in range(model.config.layers):
            for part in ("weight", "bias"):
                ours[f"blocks.{i}.qkv.{part}"] = torch.cat([ours.pop(f"blocks.{i}.{n}.{part}") for n in "qkv"])
    theirs = {}
    for name, tensor in ours.items():
        flip = names.transposed and tensor.ndim == 2 and name.startswith("blocks.")
        theirs[table[name]] = (tensor.t() if flip else tensor).contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(theirs, folder / "model.safetensors", metadata={"format": "pt"})
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    raw = _their_config(model.config, kind) | {
        "architectures": [CLASSES[kind]],
        "model_type": kind,
        "torch_dtype": dtype,
    }
    (folder / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")


def architecture(c: DecoderConfig) -> str:
    """The architecture of Hugging Face's that computes this shape. Raises ModelError where there is none."""
    if c.norm == "layer" and c.position == "learned" and c.mlp == "plain":
        return "gpt2"
    if c.norm == "rms" and c.position == "rope" and c.mlp == "gated":
        if c.qk_norm:
            return "qwen3"
        if c.qkv_bias and not c.out_bias and not c.mlp_bias:
            return "qwen2"
        if c.sliding_window is not None and not c.qkv_bias:
            return "mistral"
        return "llama"
    raise ModelError("this mixture of norm, positions and feed-forward has no Hugging Face class", "keep a known shape")


def _their_config(c: DecoderConfig, kind: str) -> dict[str, Any]:
    back = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_new" if kind == "gpt2" else "gelu_pytorch_tanh"}
    if kind == "gpt2":
        return {
            "vocab_size": c.vocab_size,
            "n_embd": c.width,
            "n_layer": c.layers,
            "n_head": c.heads,
            "n_inner": c.ffn_width,
            "n_positions": c.context,
            "layer_norm_epsilon": c.norm_eps,
            "activation_function": back[c.activation],
            "tie_word_embeddings": c.tied,
        }
    rope = {"rope_theta": c.rope_base, "rope_type": "default", **(c.rope_scaling or {})}
    raw = {
        "vocab_size": c.vocab_size,
        "hidden_size": c.width,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads,
        "head_dim": c.head_dim,
        "intermediate_size": c.ffn_width,
        "max_position_embeddings": c.context,
        "rms_norm_eps": c.norm_eps,
        "rope_theta": c.rope_base,
        "rope_scaling": c.rope_scaling,
        "rope_parameters": rope,
        "hidden_act": back[c.activation],
        "tie_word_embeddings": c.tied,
        "sliding_window": c.sliding_window,
    }
    if kind in ("llama", "qwen3"):
        raw["attention_bias"] = c.qkv_bias
    if kind == "llama":
        raw["mlp_bias"] = c.mlp_bias
    if kind.startswith("qwen"):
        raw |= {"use_sliding_window": c.sliding_window is not None, "max_window_layers": 0}
    return raw


def _window(raw: Mapping[str, Any], where: Path) -> int | None:
    window = raw.get("sliding_window")
    kind = raw["model_type"]
    if window is None or kind == "llama" or (kind.startswith("qwen") and not raw.get("use_sliding_window", False)):
        return None
    types = set(raw.get("layer_types") or [])
    if len(types) > 1 or (not types and kind.startswith("qwen") and raw.get("max_window_layers", 0) > 0):
        raise ModelError(f"{where}: only some layers have a sliding window, which is not known", "use another model")
    return None if types == {"full_attention"} else int(window)


def _build(
    config: DecoderConfig, weights: Iterator[tuple[str, Tensor]], names: Names, dtype: torch.dtype, where: Path
) -> Decoder:
    with torch.device("meta"), reading(where):
        model = Decoder(config)
    table = names.expand(config.layers)
    ours_of = {theirs: ours for ours, theirs in table.items()}
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    state: dict[str, Tensor] = {}
    extra, wrong = [], []
    for name, tensor in weights:
        ours = ours_of.get(name) or ours_of.get(f"transformer.{name}")  # GPT-2 is also stored without its prefix
        if ours is None or (ours == "head.weight" and config.tied):
            if not any(name.endswith(ignored) for ignored in names.ignored) and ours != "head.weight":
                extra.append(name)
            continue
        flip = names.transposed and tensor.ndim == 2 and ours.startswith("blocks.")
        for part, value in _split(ours, tensor.t() if flip else tensor, config).items():
            if expected.get(part) != tuple(value.shape):
                seen = "x".join(map(str, value.shape))
                wanted = "x".join(map(str, expected[part])) if part in expected else "no such weight"
                wrong.append(f"{name} is {seen}, expected {wanted}")
            state[part] = value.to(dtype).contiguous()
    missing = [table.get(name, name) for name in expected if name not in state]
    report_differences(missing, extra, wrong, where)
    model.load_state_dict(state, assign=True)
    return model


def _split(ours: str, tensor: Tensor, config: DecoderConfig) -> dict[str, Tensor]:
    """One of our weights from one of theirs, or three from a fused one."""
    if ".qkv." not in ours:
        return {ours: tensor}
    sizes = [n * config.head_dim for n in (config.heads, config.kv_heads, config.kv_heads)]
    if len(tensor) != sum(sizes):
        return {ours: tensor}
    return {ours.replace(".qkv.", f".{n}."): part for n, part in zip("qkv", tensor.split(sizes), strict=True)}
