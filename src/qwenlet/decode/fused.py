"""A step's operations by the kernels of ops/triton: five launches a layer, none of which waits for the device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwenlet.cache import PagePool
from qwenlet.decode.inputs import BUCKETS, Inputs
from qwenlet.decode.plain import Turn
from qwenlet.decode.slots import Slots
from qwenlet.linear import QuantEmbedding, QuantLinear
from qwenlet.model import Attention, Block, FeedForward, Qwen
from qwenlet.ops.packing import Tiles
from qwenlet.ops.triton.attention import attend
from qwenlet.ops.triton.embedding import embed
from qwenlet.ops.triton.linear import Weight, linear_add, norm_linear, norm_swiglu
from qwenlet.ops.triton.sampling import SampleScratch, Settings, sample
from qwenlet.ops.triton.scratch import Scratch


class Fused:
    """The kernels, over memory that stays where it is."""

    def __init__(self, model: Qwen, pool: PagePool, slots: Slots) -> None:
        self.model, self.pool, self.slots = model, pool, slots
        device = slots.counts.device
        self._dtype = model.transformer.ln_f.weight.dtype
        self._scratch = Scratch(device)
        rows = min(len(slots.counts), BUCKETS[-1])
        self._sampling = SampleScratch(next(size for size in BUCKETS if size >= rows), model.config.vocab_size, device)

    def embed(self, ids: Tensor) -> Tensor:
        wte = self.model.transformer.wte
        if isinstance(wte, QuantEmbedding):
            return embed(ids, wte.codes, wte.scales, dtype=self._dtype)
        return embed(ids, wte.weight)

    def qkv(self, block: Block, x: Tensor) -> Tensor:
        linear = block.attn.c_attn
        return norm_linear(
            x, block.ln_1.weight, block.ln_1.eps, _weight(linear), linear.bias, scratch=self._scratch
        )  # fmt: skip

    def attend(self, attention: Attention, qkv: Tensor, turn: Turn, at: Inputs) -> Tensor:
        pages = self.pool.layer(attention.layer)
        return attend(qkv, *turn, pages, at.tables, at.positions, heads=attention.heads, scratch=self._scratch)

    def add(self, linear: nn.Module, y: Tensor, x: Tensor) -> Tensor:
        return linear_add(y, _weight(linear), x, linear.bias, scratch=self._scratch)  # type: ignore[arg-type]

    def gated(self, norm: nn.Module, mlp: FeedForward, x: Tensor) -> Tensor:
        scale, eps = norm.weight, norm.eps
        assert isinstance(scale, Tensor)
        assert isinstance(eps, float)
        up, gate = _weight(mlp.w1), _weight(mlp.w2)
        if _kind(up) == _kind(gate):
            return norm_swiglu(x, scale, eps, up, gate, scratch=self._scratch)
        parts = (norm_linear(x, scale, eps, weight, scratch=self._scratch) for weight in (up, gate))
        first, second = parts
        return first * F.silu(second)

    def logits(self, x: Tensor) -> Tensor:
        norm, head = self.model.transformer.ln_f, self.model.lm_head
        out = torch.empty(len(x), self.model.config.vocab_size, device=x.device)
        return norm_linear(x, norm.weight, norm.eps, _weight(head), head.bias, scratch=self._scratch, out=out)

    def draw(self, logits: Tensor, at: Inputs) -> Tensor:
        settings = Settings(
            at.temperature, at.top_p, at.min_p, at.top_k, at.repetition, at.presence, at.frequency, at.u, at.counted,
            self.slots.counts,
        )  # fmt: skip
        return sample(logits, settings, self._sampling)


def _weight(linear: nn.Module) -> Weight:
    if isinstance(linear, QuantLinear):
        return linear.tiles
    assert isinstance(linear.weight, Tensor), f"{type(linear).__name__} has no weight"
    return linear.weight


def _kind(weight: Weight) -> tuple[object, ...]:
    """Weights of one kind go through one launch."""
    if isinstance(weight, Tiles):
        parts = (weight.zeros, weight.minimums, weight.order)
        return weight.bits, weight.group_size, weight.weight.shape, *(part is None for part in parts)
    return weight.dtype, weight.shape
