"""How others name weights: one table an architecture, ours on the left. `{i}` is the number of a block."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Names:
    """outside maps our names to theirs; transposed says that their matrices are [in, out]; fused: ours split theirs."""

    outside: dict[str, str]
    blocks: dict[str, str]
    transposed: bool = False
    fused_qkv: bool = False
    ignored: tuple[str, ...] = ()  # buffers of theirs that are no weights

    def expand(self, layers: int) -> dict[str, str]:
        """Every weight's name: ours -> theirs."""
        table = dict(self.outside)
        for i in range(layers):
            table |= {f"blocks.{i}.{ours}": theirs.replace("{i}", str(i)) for ours, theirs in self.blocks.items()}
        return table


LLAMA = Names(
    outside={
        "embed.weight": "model.embed_tokens.weight",
        "norm.weight": "model.norm.weight",
        "head.weight": "lm_head.weight",
    },
    blocks={
        "attn_norm.weight": "model.layers.{i}.input_layernorm.weight",
        "q.weight": "model.layers.{i}.self_attn.q_proj.weight",
        "k.weight": "model.layers.{i}.self_attn.k_proj.weight",
        "v.weight": "model.layers.{i}.self_attn.v_proj.weight",
        "o.weight": "model.layers.{i}.self_attn.o_proj.weight",
        "q.bias": "model.layers.{i}.self_attn.q_proj.bias",
        "k.bias": "model.layers.{i}.self_attn.k_proj.bias",
        "v.bias": "model.layers.{i}.self_attn.v_proj.bias",
        "o.bias": "model.layers.{i}.self_attn.o_proj.bias",
        "q_norm.weight": "model.layers.{i}.self_attn.q_norm.weight",
        "k_norm.weight": "model.layers.{i}.self_attn.k_norm.weight",
        "mlp_norm.weight": "model.layers.{i}.post_attention_layernorm.weight",
        "gate.weight": "model.layers.{i}.mlp.gate_proj.weight",
        "up.weight": "model.layers.{i}.mlp.up_proj.weight",
        "down.weight": "model.layers.{i}.mlp.down_proj.weight",
        "gate.bias": "model.layers.{i}.mlp.gate_proj.bias",
        "up.bias": "model.layers.{i}.mlp.up_proj.bias",
        "down.bias": "model.layers.{i}.mlp.down_proj.bias",
    },
    ignored=("rotary_emb.inv_freq",),
)

GPT2 = Names(
    outside={
        "embed.weight": "transformer.wte.weight",
        "position.weight": "transformer.wpe.weight",
        "norm.weight": "transformer.ln_f.weight",
        "norm.bias": "transformer.ln_f.bias",
        "head.weight": "lm_head.weight",
    },
    blocks={
        "attn_norm.weight": "transformer.h.{i}.ln_1.weight",
        "attn_norm.bias": "transformer.h.{i}.ln_1.bias",
        "qkv.weight": "transformer.h.{i}.attn.c_attn.weight",
        "qkv.bias": "transformer.h.{i}.attn.c_attn.bias",
        "o.weight": "transformer.h.{i}.attn.c_proj.weight",
        "o.bias": "transformer.h.{i}.attn.c_proj.bias",
        "mlp_norm.weight": "transformer.h.{i}.ln_2.weight",
        "mlp_norm.bias": "transformer.h.{i}.ln_2.bias",
        "up.weight": "transformer.h.{i}.mlp.c_fc.weight",
        "up.bias": "transformer.h.{i}.mlp.c_fc.bias",
        "down.weight": "transformer.h.{i}.mlp.c_proj.weight",
        "down.bias": "transformer.h.{i}.mlp.c_proj.bias",
    },
    transposed=True,
    fused_qkv=True,
    ignored=(".attn.bias", ".attn.masked_bias"),
)

HUGGING_FACE = {"llama": LLAMA, "mistral": LLAMA, "qwen2": LLAMA, "qwen3": LLAMA, "gpt2": GPT2}

GGUF = replace(
    LLAMA,
    outside={"embed.weight": "token_embd.weight", "norm.weight": "output_norm.weight", "head.weight": "output.weight"},
    blocks={
        "attn_norm.weight": "blk.{i}.attn_norm.weight",
        "q.weight": "blk.{i}.attn_q.weight",
        "k.weight": "blk.{i}.attn_k.weight",
        "v.weight": "blk.{i}.attn_v.weight",
        "o.weight": "blk.{i}.attn_output.weight",
        "q.bias": "blk.{i}.attn_q.bias",
        "k.bias": "blk.{i}.attn_k.bias",
        "v.bias": "blk.{i}.attn_v.bias",
        "o.bias": "blk.{i}.attn_output.bias",
        "q_norm.weight": "blk.{i}.attn_q_norm.weight",
        "k_norm.weight": "blk.{i}.attn_k_norm.weight",
        "mlp_norm.weight": "blk.{i}.ffn_norm.weight",
        "gate.weight": "blk.{i}.ffn_gate.weight",
        "up.weight": "blk.{i}.ffn_up.weight",
        "down.weight": "blk.{i}.ffn_down.weight",
    },
    ignored=("rope_freqs.weight",),
)
