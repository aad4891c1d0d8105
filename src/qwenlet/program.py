"""Qwen's forward pass recorded as a native program: same maths as model.py, one call a step instead of some 1,500.

The modules stay the readable definition and the other side of an equality test (tests/test_program.py). A program
serves any mix of rows, and a row's result depends on that row alone, down to the bits.

Left out: what the program can't take (`obstacle` says what), which runs by the modules.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from qwenlet.cache import PagePool, Rows
from qwenlet.config import ModelConfig
from qwenlet.linear import QuantLinear, TiledLinear
from qwenlet.model import Block, Qwen, Rotation
from qwenlet.ops import cpu
from qwenlet.ops.cpu.program import Form, Program

CACHE_DTYPES = (torch.int8, torch.bfloat16, torch.float16, torch.float32)
_LARGEST_HEAD = 256
_WIDEST = 32_768  # a row between two linears stands in a thread's scratch memory
_NATIVE = (QuantLinear, TiledLinear)
_LINEARS = ("c_attn", "c_proj", "w1", "w2", "lm_head")


def obstacle(model: Qwen, cache_dtype: torch.dtype) -> str | None:
    """Why the model's forward pass can't be a program here; None if it can."""
    status = cpu.status()
    if status.isa is None:
        return status.reason
    config = model.config
    if cache_dtype not in CACHE_DTYPES:
        return f"the kernels keep no {str(cache_dtype).removeprefix('torch.')} cache"
    if config.hidden_size % 16 or config.intermediate_size % 16:
        return f"hidden sizes {config.hidden_size} and {config.intermediate_size} are not multiples of 16"
    if max(config.hidden_size, config.intermediate_size) > _WIDEST:
        return f"rows of {max(config.hidden_size, config.intermediate_size)} are wider than {_WIDEST}"
    if config.head_dim % 16 or config.head_dim > _LARGEST_HEAD:
        return f"heads of {config.head_dim} are not a multiple of 16 up to {_LARGEST_HEAD}"
    for name, module in model.named_modules():
        if name.endswith(_LINEARS) and not isinstance(module, _NATIVE):
            return f"{name} is a linear of torch's"
    return None


class QwenProgram:
    """The model's forward pass over a pool of pages.

    Args:
        capacity: most tokens of one call.
    """

    def __init__(self, model: Qwen, pool: PagePool, capacity: int) -> None:
        reason = obstacle(model, pool.dtype)
        assert reason is None, reason
        assert pool.tiled, "the kernels keep keys in tiles"
        config = model.config
        self._model, self._pool = model, pool
        self.native = Program(min(capacity, cpu.kernels().MAX_BATCH))
        self.capacity = self.native.capacity
        self._x = self.native.buffer(config.hidden_size)
        self._record(model, pool, config)

    def _record(self, model: Qwen, pool: PagePool, config: ModelConfig) -> None:
        p, x = self.native, self._x
        heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        qkv = p.buffer(heads + 2 * kv_heads, dim)
        codes, code_scales = p.buffer(heads, 2 * dim, dtype=torch.int8), p.buffer(heads, 2)
        answer = p.buffer(heads * dim)
        up, gate = p.buffer(config.intermediate_size), p.buffer(config.intermediate_size)
        for i, block in enumerate(model.transformer.h):
            assert isinstance(block, Block)
            c_attn, c_proj = _native(block.attn.c_attn), _native(block.attn.c_proj)
            w1, w2, down = (_native(module) for module in (block.mlp.w1, block.mlp.w2, block.mlp.c_proj))
            source = p.inputs("hidden", _form(c_attn))
            p.norm(x, block.ln_1.weight, block.ln_1.eps, [source])
            p.linear("c_attn", c_attn.tiles, c_attn.bias, source, qkv.flatten(1))
            p.attention(heads, pool.layer(i), qkv, codes, code_scales, answer)
            source = p.inputs("answer", _form(c_proj))
            p.round(answer, [source])
            p.linear("attn.c_proj", c_proj.tiles, c_proj.bias, source, x, add=True)
            first, second = p.inputs("hidden", _form(w1)), p.inputs("hidden", _form(w2))
            p.norm(x, block.ln_2.weight, block.ln_2.eps, sorted({first, second}))
            p.linear("w1", w1.tiles, w1.bias, first, up, wait=False)
            p.linear("w2", w2.tiles, w2.bias, second, gate)
            source = p.inputs("gated", _form(down))
            p.swiglu(up, gate, [source])
            p.linear("mlp.c_proj", down.tiles, down.bias, source, x, add=True)
        head = _native(model.lm_head)
        source = p.inputs("last", _form(head))
        norm = model.transformer.ln_f
        p.norm(x, norm.weight, norm.eps, [source], last_rows=True)
        p.linear("lm_head", head.tiles, head.bias, source, None)

    def forward(
        self,
        ids: Tensor,
        rows: Rows,
        tables: Sequence[Sequence[int]],
        starts: Sequence[int],
        logits_at: Tensor,
        seconds: Tensor | None = None,
    ) -> Tensor:
        """Stores the tokens' keys and values; float32 logits [len(logits_at), V].

        Args:
            ids: [N] int64, N at most `capacity`.
            tables: page numbers of each row, in order, enough for its past and its new tokens.
            starts: tokens each row has stored already.
            logits_at: [M] int64, indices of the tokens whose logits are wanted; may be empty.
            seconds: [steps] float64, filled with how long each step of `native.names` took.
        """
        self._x[: len(ids)] = self._model.transformer.wte(ids)
        rotation = Rotation(self._model.config, rows, extend=True)
        scale = None if rotation.logn is None else rotation.logn.float().contiguous()
        logits = torch.empty(len(logits_at), self._model.config.vocab_size)
        isa = cpu.status().isa
        assert isa is not None
        cos, sin = rotation.cos.contiguous(), rotation.sin.contiguous()
        self.native.run(isa, rows.lengths, starts, tables, cos, sin, scale, logits_at, logits, seconds)
        return logits

    def hidden(self, count: int) -> Tensor:
        """Last hidden states, normed, of the first `count` tokens of the latest `forward`: float32 [count, C]."""
        normed: Tensor = self._model.transformer.ln_f(self._x[:count])
        return normed.float()


def _native(module: nn.Module) -> QuantLinear | TiledLinear:
    assert isinstance(module, _NATIVE), f"{type(module).__name__} has no kernels"
    return module


def _form(linear: QuantLinear | TiledLinear) -> Form:
    return Form.of(linear.tiles)
