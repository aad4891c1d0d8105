"""All of Qwen in one sitting.

    * RMSNorm before attention and before the feed-forward, and once at the end; rounded to the input's dtype BEFORE the
      weight multiplies, as published
    * fused query-key-value projection with a bias, the only biases in the model
    * rotary embedding over the whole head, in halves, computed in float32
    * dynamic NTK: a row whose prompt is longer than the training length turns with a larger base (one factor per row)
    * log-n attention: a query at position p >= seq_length is multiplied by log_seq_length(p + 1)
    * SwiGLU where w2 is the gate and w1 the up projection
    * untied head; logits only where they are asked for

The same block with grouped key/value heads, tied embeddings or no biases is a Qwen2 or a Llama: configuration alone.
Module names are the published checkpoint's, so loading it needs no table.

Left out: storage of keys and values (cache.py), sampling, loading, tokens as text.

Dimension letters: N tokens of all rows, H query heads, G key/value heads, D head size, C hidden, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, noop_context_fn

from qwenlet.cache import NoPast, Past, Rows
from qwenlet.config import LOGN_TABLE_LENGTH, ModelConfig
from qwenlet.linear import linear
from qwenlet.ops import replay


class Linear(nn.Linear):
    """nn.Linear without a random start: weights are assigned. (Drawing numbers on the meta device would also make torch
    import its compiler, 1.5 s of every start.)"""

    def reset_parameters(self) -> None: ...

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]; a product that training keeps where it asks for that."""
        return linear(x, self.weight, self.bias) if replay.active() else super().forward(x)


class Embedding(nn.Embedding):
    """nn.Embedding without a random start, as above."""

    def reset_parameters(self) -> None: ...


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size))
        if not self.weight.is_meta:  # where filling takes torch 3 ms for each, and changes nothing
            nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        return (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)).type_as(x) * self.weight


class Rotation:
    """cos and sin [N, 1, D/2] in float32, and the log-n factor [N, 1, 1] where a row is long enough to have one."""

    def __init__(self, config: ModelConfig, rows: Rows, extend: bool) -> None:
        device = rows.positions.device
        alphas = rows.alphas if extend else (1.0,) * len(rows.lengths)
        if len(set(alphas)) == 1:
            frequency = inverse_frequencies(config.rope_theta, config.head_dim, alphas[0], device)[None]
        else:
            of_row = torch.stack(
                [inverse_frequencies(config.rope_theta, config.head_dim, alpha, device) for alpha in alphas]
            )
            frequency = of_row.repeat_interleave(torch.tensor(rows.lengths, device=device), dim=0)
        cos, sin = angles(rows.positions, frequency)
        self.cos, self.sin = cos[:, None], sin[:, None]
        self.logn: Tensor | None = None
        if extend and config.use_logn_attn and bool((rows.positions >= config.seq_length).any()):
            factor = logn_table(config.seq_length, device)[rows.positions]
            if rows.logn is not None and not all(rows.logn):
                acts = torch.tensor(rows.logn).repeat_interleave(torch.tensor(rows.lengths)).to(device)
                factor = torch.where(acts, factor, 1.0)
            self.logn = factor[:, None, None]

    def turn(self, x: Tensor) -> Tensor:
        """Rotates x [N, heads, D] by each token's angles: pairs are (i, i + D/2)."""
        first, second = x.float().chunk(2, dim=-1)
        turned = torch.cat((first * self.cos - second * self.sin, second * self.cos + first * self.sin), dim=-1)
        return turned.type_as(x)


def angles(positions: Tensor, frequency: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin [N, D/2] float32 of positions [N], for frequencies [D/2] of all or [N, D/2] of each."""
    angle = positions.float()[:, None] * frequency
    return angle.cos(), angle.sin()


@lru_cache(maxsize=64)
def inverse_frequencies(theta: float, head_dim: int, alpha: float, device: torch.device) -> Tensor:
    """[D/2] float32: theta'^(-2i/D) with theta' = theta * alpha^(D / (D-2)), dynamic NTK as published."""
    base = theta * alpha ** (head_dim / (head_dim - 2))
    return 1.0 / (base ** (torch.arange(0, head_dim, 2, device=device).float() / head_dim))


@lru_cache(maxsize=8)
def logn_table(seq_length: int, device: torch.device) -> Tensor:
    """[32767] float32, by position: log_seq_length(position + 1), but 1 inside the training length."""
    table = [math.log(i, seq_length) if i > seq_length else 1.0 for i in range(1, LOGN_TABLE_LENGTH + 1)]
    return torch.tensor(table, device=device)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.heads, self.kv_heads, self.head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        self.c_attn = Linear(config.hidden_size, config.qkv_size, bias=config.qkv_bias)
        self.c_proj = Linear(self.heads * self.head_dim, config.hidden_size, bias=False)

    def forward(self, x: Tensor, rotation: Rotation, past: Past) -> Tensor:
        qkv = self.c_attn(x).unflatten(-1, (-1, self.head_dim))  # (N, H + 2G, D)
        # one rotation for queries and keys together: fewer, larger operations
        turned = rotation.turn(qkv[:, : self.heads + self.kv_heads])
        q, k = turned.split((self.heads, self.kv_heads), dim=1)
        if rotation.logn is not None:
            q = q * rotation.logn.type_as(q)
        v = qkv[:, self.heads + self.kv_heads :]
        return self.c_proj(past.attend(self.layer, q, k, v).flatten(1))


class FeedForward(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.w1 = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.w2 = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.c_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.w1(x) * F.silu(self.w2(x)))


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.ln_1 = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attn = Attention(config, layer)
        self.ln_2 = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = FeedForward(config)

    def forward(self, x: Tensor, rotation: Rotation, past: Past) -> Tensor:
        x = x + self.attn(self.ln_1(x), rotation, past)
        return x + self.mlp(self.ln_2(x))


Recompute = Literal["none", "products", "full"]
"""What training computes again for a block's gradient: nothing, all but the products with its weights, or all."""


def _keep_products() -> tuple[Any, Any]:
    tape = replay.Tape()
    return tape.keeping, tape.giving


class Transformer(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.wte = Embedding(config.vocab_size, config.hidden_size)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.ln_f = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.shape = config
        self.recompute: Recompute = "none"

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether training computes a block again for its gradient instead of keeping what it needs."""
        return self.recompute != "none"

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, on: bool) -> None:
        self.recompute = "full" if on else "none"

    def forward(self, x: Tensor, rows: Rows, past: Past) -> Tensor:
        """Embedded tokens x [N, C] -> last hidden states [N, C], normed."""
        rotation = Rotation(self.shape, rows, extend=not self.training)
        for block in self.h:
            if self.recompute == "none" or not self.training:
                x = block(x, rotation, past)
            else:
                contexts = _keep_products if self.recompute == "products" else noop_context_fn
                x = checkpoint(block, x, rotation, past, use_reentrant=False, context_fn=contexts)
        return self.ln_f(x)


class Qwen(nn.Module):
    """Token ids in, logits out. Build it under `torch.device("meta")` and let checkpoint.py assign the weights."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.transformer = Transformer(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.tie_weights()

    def tie_weights(self) -> None:
        """Makes head and embedding one parameter; needed again after either was assigned."""
        self.lm_head.weight = self.transformer.wte.weight

    @torch.no_grad()
    def resize_vocabulary(self, size: int) -> None:
        """Gives embedding and head `size` rows; new ones begin as the mean of the old, which no token is far from."""
        for module in (self.transformer.wte, self.lm_head):
            old = module.weight
            if len(old) == size:
                continue  # the other one of a tied pair
            new = old.new_empty(size, old.shape[1])
            new[: len(old)] = old[:size]
            new[len(old) :] = old.float().mean(0)
            module.weight = nn.Parameter(new, requires_grad=old.requires_grad)
        self.transformer.wte.num_embeddings = self.lm_head.out_features = size
        self.config = self.transformer.shape = replace(self.config, vocab_size=size)
        if self.config.tie_word_embeddings:
            self.tie_weights()

    def initial_std(self, name: str) -> float | None:
        """Spread of a parameter's random start, as published: the initializer range, and range / sqrt(2 * layers) for
        what writes to the residual stream. 0 stands for a constant 1 (norms), None for a constant 0 (biases)."""
        if name.endswith("bias"):
            return None
        if "ln_" in name:
            return 0.0
        scale = math.sqrt(2 * self.config.num_hidden_layers) if name.endswith("c_proj.weight") else 1.0
        return self.config.initializer_range / scale

    def hidden(self, ids: Tensor, rows: Rows, past: Past | None = None) -> Tensor:
        """Last hidden states, normed: ids [N] int64 -> [N, C].

        NTK and log-n act in evaluation mode only, as published.
        """
        return self.transformer(self.transformer.wte(ids), rows, NoPast(rows) if past is None else past)

    def forward(self, ids: Tensor, rows: Rows, past: Past | None = None, logits_at: Tensor | None = None) -> Tensor:
        """Logits in the model's dtype: [N, V], or [len(logits_at), V] for the tokens whose indices are given."""
        x = self.hidden(ids, rows, past)
        return self.lm_head(x if logits_at is None else x[logits_at])

    def loss(self, ids: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy in float32 of predicting labels [B, T] shifted by one; label -100 is not counted.

        ids [B, T] int64, rows of one length.
        """
        batch, length = ids.shape
        rows = Rows.fresh([length] * batch, [self.config.ntk_alpha(length)] * batch, ids.device)
        logits = self(ids.flatten(), rows).unflatten(0, (batch, length))
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100)
