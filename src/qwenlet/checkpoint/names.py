"""How other formats name and cut the same tensors. Tables, read both ways.

Our names are the published Qwen-1 checkpoint's, so that layout's table is the identity. Elsewhere the fused projection
`c_attn` is three tensors, which lie one after another along the rows of ours.

    ours (Qwen-1)               Qwen2, Llama                   GGUF
    attn.c_attn                 self_attn.{q,k,v}_proj         attn_{q,k,v}, or attn_qkv (architecture `qwen`)
    mlp.w2 (gate), mlp.w1 (up)  mlp.gate_proj, mlp.up_proj     ffn_gate, ffn_up
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from qwenlet.config import ModelConfig

Layout = Literal["qwen", "qwen2", "gguf"]

_OUTER: dict[Layout, dict[str, str]] = {
    "qwen": {},
    "qwen2": {
        "transformer.wte.weight": "model.embed_tokens.weight",
        "transformer.ln_f.weight": "model.norm.weight",
    },
    "gguf": {
        "transformer.wte.weight": "token_embd.weight",
        "transformer.ln_f.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    },
}
_LAYER_PREFIX: dict[Layout, str] = {"qwen": "transformer.h.{}.", "qwen2": "model.layers.{}.", "gguf": "blk.{}."}
_LAYER: dict[Layout, dict[str, tuple[str, ...]]] = {
    "qwen": {},
    "qwen2": {
        "ln_1": ("input_layernorm",),
        "attn.c_attn": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "attn.c_proj": ("self_attn.o_proj",),
        "ln_2": ("post_attention_layernorm",),
        "mlp.w1": ("mlp.up_proj",),
        "mlp.w2": ("mlp.gate_proj",),
        "mlp.c_proj": ("mlp.down_proj",),
    },
    "gguf": {
        "ln_1": ("attn_norm",),
        "attn.c_attn": ("attn_q", "attn_k", "attn_v"),
        "attn.c_proj": ("attn_output",),
        "ln_2": ("ffn_norm",),
        "mlp.w1": ("ffn_up",),
        "mlp.w2": ("ffn_gate",),
        "mlp.c_proj": ("ffn_down",),
    },
}


@dataclass(frozen=True)
class Part:
    """One foreign tensor: its name, how many rows of ours it holds, and how many heads to un-permute (0: none)."""

    name: str
    rows: int
    permuted_heads: int = 0


def parts_of(name: str, rows: int, layout: Layout, config: ModelConfig) -> tuple[Part, ...]:
    """The foreign tensors that make up ours, in the order of their rows.

    Args:
        name: one of our names, such as `transformer.h.3.attn.c_attn.weight`.
        rows: its first dimension.
    """
    if name in _OUTER[layout]:
        return (Part(_OUTER[layout][name], rows),)
    if not name.startswith("transformer.h.") or layout == "qwen":
        return (Part(name, rows),)
    _, _, layer, module = name.split(".", 3)
    module, _, kind = module.rpartition(".")  # attn.c_attn, weight
    prefix = _LAYER_PREFIX[layout].format(layer)
    if layout == "gguf" and config.model_type == "qwen" and module == "attn.c_attn":
        return (Part(f"{prefix}attn_qkv.{kind}", rows),)
    names = [f"{prefix}{source}.{kind}" for source in _LAYER[layout][module]]
    if len(names) == 1:
        return (Part(names[0], rows),)
    heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
    # llama.cpp stores the q and k rows of `llama` files in interleaved pairs; other files keep the order
    permuted = layout == "gguf" and config.model_type == "llama"
    return tuple(
        Part(part, count * config.head_dim, count if permuted and index < 2 else 0)
        for index, (part, count) in enumerate(zip(names, heads, strict=True))
    )


def unpermute(rows: Tensor, heads: int) -> Tensor:
    """From pairs (0, 1), (2, 3), ... back to halves (0, D/2), (1, D/2 + 1), ...: the order our rotation turns.

    rows [heads * D, ...] -> the same shape; 0 heads: they were not permuted.
    """
    if not heads:
        return rows
    size = rows.shape[0] // heads
    return rows.reshape(heads, size // 2, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def permute(rows: Tensor, heads: int) -> Tensor:
    """The way back from `unpermute`."""
    if not heads:
        return rows
    size = rows.shape[0] // heads
    return rows.reshape(heads, 2, size // 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def split(name: str, tensor: Tensor, layout: Layout, config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """One tensor of ours as the tensors another layout makes of it, under that layout's names."""
    parts = parts_of(name, tensor.shape[0], layout, config)
    for part, rows in zip(parts, tensor.split([part.rows for part in parts]), strict=True):
        yield part.name, permute(rows, part.permuted_heads)


def join(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
