"""Qwen's forward pass recorded as a native program: same maths as model.py, one call a step instead of some 1,500.

The modules stay the readable definition and the other side of an equality test (tests/test_program.py). A program
serves any mix of rows, and a row's result depends on that row alone, down to the bits.

Left out: what the program can't take (`obstacle` says what), which runs by the modules.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qwenlet.cache import PagePool, Rows
from qwenlet.config import ModelConfig
from qwenlet.linear import QuantLinear, TiledLinear
from qwenlet.model import Block, Qwen, angles, inverse_frequencies, logn_table
from qwenlet.ops import cpu
from qwenlet.ops.cpu.program import Form, Program
from qwenlet.ops.packing import Tiles

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
    if cache_dtype not in CACHE_DTYPES:
        return f"the kernels keep no {str(cache_dtype).removeprefix('torch.')} cache"
    reason = shape_obstacle(model.config)
    if reason is not None:
        return reason
    for name, module in model.named_modules():
        if name.endswith(_LINEARS) and not isinstance(module, _NATIVE):
            return f"{name} is a linear of torch's"
    return None


def shape_obstacle(config: ModelConfig) -> str | None:
    """Why a model of these shapes can't be a program; None if it can."""
    if config.hidden_size % 16 or config.intermediate_size % 16:
        return f"hidden sizes {config.hidden_size} and {config.intermediate_size} are not multiples of 16"
    if max(config.hidden_size, config.intermediate_size) > _WIDEST:
        return f"rows of {max(config.hidden_size, config.intermediate_size)} are wider than {_WIDEST}"
    if config.head_dim % 16 or config.head_dim > _LARGEST_HEAD:
        return f"heads of {config.head_dim} are not a multiple of 16 up to {_LARGEST_HEAD}"
    return None


@dataclass(frozen=True)
class Sides:
    """What an adapter adds to the forward pass of its rows: floats in tiles, all of one precision.

    Attributes:
        pairs: of linears by name, A [rank, in] and B [out, rank] with the scale in it.
        head: takes the place of the head, if any.
    """

    pairs: Mapping[str, tuple[Tiles, Tiles]]
    head: Tiles | None = None


class QwenProgram:
    """The model's forward pass over a pool of pages.

    Args:
        capacity: most tokens of one call.
        adapters: that rows may go with, by their number.
    """

    def __init__(self, model: Qwen, pool: PagePool, capacity: int, adapters: Sequence[Sides] = ()) -> None:
        reason = obstacle(model, pool.dtype)
        assert reason is None, reason
        assert pool.tiled, "the kernels keep keys in tiles"
        config = model.config
        self._model, self._pool = model, pool
        self.native = Program(min(capacity, cpu.kernels().MAX_BATCH))
        self.capacity = self.native.capacity
        self._x = self.native.buffer(config.hidden_size)
        self._angles = Angles(config)
        self._record(model, pool, config, _Recorder(self.native, adapters))

    def _record(self, model: Qwen, pool: PagePool, config: ModelConfig, sides: _Recorder) -> None:
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
            layer = f"transformer.h.{i}"
            source = p.inputs("hidden", _form(c_attn))
            side = sides.of("hidden", (f"{layer}.attn.c_attn", qkv.flatten(1)))
            p.norm(x, block.ln_1.weight, block.ln_1.eps, [source], adapted=side.inputs)
            side.down()
            p.linear("c_attn", c_attn.tiles, c_attn.bias, source, qkv.flatten(1))
            side.up()
            p.attention(heads, pool.tiles[i], qkv, codes, code_scales, answer)
            source = p.inputs("answer", _form(c_proj))
            side = sides.of("answer", (f"{layer}.attn.c_proj", x))
            p.round(answer, [source], side.inputs)
            side.down()
            p.linear("attn.c_proj", c_proj.tiles, c_proj.bias, source, x, add=True)
            side.up()
            first, second = p.inputs("hidden", _form(w1)), p.inputs("hidden", _form(w2))
            side = sides.of("hidden", (f"{layer}.mlp.w1", up), (f"{layer}.mlp.w2", gate))
            p.norm(x, block.ln_2.weight, block.ln_2.eps, sorted({first, second}), adapted=side.inputs)
            side.down()
            p.linear("w1", w1.tiles, w1.bias, first, up, wait=False)
            p.linear("w2", w2.tiles, w2.bias, second, gate)
            side.up()
            source = p.inputs("gated", _form(down))
            side = sides.of("gated", (f"{layer}.mlp.c_proj", x))
            p.swiglu(up, gate, [source], side.inputs)
            side.down()
            p.linear("mlp.c_proj", down.tiles, down.bias, source, x, add=True)
            side.up()
        head = _native(model.lm_head)
        source = p.inputs("last", _form(head))
        norm = model.transformer.ln_f
        side = sides.of("last", ("lm_head", None))
        p.norm(x, norm.weight, norm.eps, [source], adapted=side.inputs, last_rows=True)
        side.down()
        p.linear("lm_head", head.tiles, head.bias, source, None)
        side.up()
        sides.finish()

    def forward(
        self,
        ids: Tensor,
        rows: Rows,
        tables: Sequence[Sequence[int]],
        starts: Sequence[int],
        logits_at: Tensor,
        seconds: Tensor | None = None,
        adapted: Sequence[tuple[int, int]] = (),
    ) -> Tensor:
        """Stores the tokens' keys and values; float32 logits [len(logits_at), V].

        Args:
            ids: [N] int64, N at most `capacity`.
            tables: page numbers of each row, in order, enough for its past and its new tokens.
            starts: tokens each row has stored already.
            logits_at: [M] int64, indices of the tokens whose logits are wanted; may be empty.
            seconds: [steps] float64, filled with how long each step of `native.names` took.
            adapted: an adapter's number and how many tokens go with it, for each that some do; they are the last ones,
                in this order.
        """
        self._x[: len(ids)] = self._model.transformer.wte(ids)
        cos, sin, scale = self._angles.of(rows, starts)
        logits = torch.empty(len(logits_at), self._model.config.vocab_size)
        isa = cpu.status().isa
        assert isa is not None
        self.native.run(isa, rows.lengths, starts, tables, cos, sin, scale, logits_at, logits, seconds, adapted)
        return logits

    def hidden(self, count: int) -> Tensor:
        """Last hidden states, normed, of the first `count` tokens of the latest `forward`: float32 [count, C]."""
        normed: Tensor = self._model.transformer.ln_f(self._x[:count])
        return normed.float()


class Angles:
    """cos, sin and log-n factors by position, as `Rotation` has them: made some positions at a time and kept, so that a
    decoded token costs a look, and a position's are the same bits in any company."""

    _BLOCK = 256  # positions that are made at once

    def __init__(self, config: ModelConfig) -> None:
        self._config = config
        self._tables: dict[float, tuple[Tensor, Tensor]] = {}  # by dynamic NTK factor: [positions, D/2]

    def of(self, rows: Rows, starts: Sequence[int]) -> tuple[Tensor, Tensor, Tensor | None]:
        """cos and sin [N, D/2], and the factor [N] where a row is long enough to have one; all float32."""
        ends = [start + length for start, length in zip(starts, rows.lengths, strict=True)]
        tables = [self._table(alpha, end) for alpha, end in zip(rows.alphas, ends, strict=True)]
        cos = _joined([table[0][start:end] for table, start, end in zip(tables, starts, ends, strict=True)])
        sin = _joined([table[1][start:end] for table, start, end in zip(tables, starts, ends, strict=True)])
        trained = self._config.seq_length
        if not self._config.use_logn_attn or max(ends, default=0) <= trained:
            return cos, sin, None
        factors, acts = logn_table(trained, torch.device("cpu")), rows.logn or (True,) * len(ends)
        parts = [
            # looked up, since a slice beyond the table's end would be short, and kernels read on behind it
            factors[torch.arange(start, end)] if on else torch.ones(end - start)
            for start, end, on in zip(starts, ends, acts, strict=True)
        ]
        return cos, sin, _joined(parts)

    def _table(self, alpha: float, end: int) -> tuple[Tensor, Tensor]:
        half = self._config.head_dim // 2
        cos, sin = self._tables.get(alpha, (torch.empty(0, half), torch.empty(0, half)))
        if len(cos) < end:
            frequency = inverse_frequencies(self._config.rope_theta, 2 * half, alpha, torch.device("cpu"))
            starts = range(len(cos), end, self._BLOCK)
            more = [angles(torch.arange(first, first + self._BLOCK), frequency) for first in starts]
            cos = torch.cat([cos, *(one for one, _ in more)])
            sin = torch.cat([sin, *(one for _, one in more)])
            self._tables[alpha] = cos, sin
        return cos, sin


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


class _Recorder:
    """Records what adapters add beside the model's linears. Each linear that one of them adapts has two slots: A's
    product goes beside the linear itself, B's is added to its result."""

    def __init__(self, program: Program, adapters: Sequence[Sides]) -> None:
        self.program, self.adapters = program, adapters
        self.slots: list[list[tuple[int, int]]] = [[] for _ in adapters]
        self._buffers: dict[tuple[str, int], Tensor] = {}

    def of(self, place: str, *linears: tuple[str, Tensor | None]) -> _Side:
        """Those of linears that read one place, each with where it writes (None: the run's output)."""
        found = []
        for name, y in linears:
            pairs = [sides.pairs.get(name) for sides in self.adapters]
            if any(pair is not None for pair in pairs):
                found.append(_Slot(self, place, name, y, pairs))
        return _Side(self, found, self._head(place) if linears[0][0] == "lm_head" else None)

    def _head(self, place: str) -> int | None:
        """The slot of whole heads."""
        heads = [sides.head for sides in self.adapters]
        if not any(head is not None for head in heads):
            return None
        slot = self.new_slot()
        for number, head in enumerate(heads):
            if head is not None:
                source = self.program.inputs(place, Form.of(head))
                self.slots[number][slot] = (self.program.weight(head, None), source)
        return slot

    def new_slot(self) -> int:
        for slots in self.slots:
            slots.append((-1, -1))
        return len(self.slots[0]) - 1

    def buffer(self, name: str, width: int) -> Tensor:
        """[capacity, width], shared by the linears of one name."""
        if (name, width) not in self._buffers:
            self._buffers[name, width] = self.program.buffer(width)
        return self._buffers[name, width]

    def finish(self) -> None:
        for slots in self.slots:
            self.program.adapter(slots)


class _Slot:
    """One linear's adapters: slots of A and B, and room for what is between them."""

    def __init__(
        self, recorder: _Recorder, place: str, name: str, y: Tensor | None, pairs: Sequence[tuple[Tiles, Tiles] | None]
    ) -> None:
        p = recorder.program
        self.name, self.y = name.rpartition(".")[2], y
        self.down, self.up = recorder.new_slot(), recorder.new_slot()
        present = [(number, *pair) for number, pair in enumerate(pairs) if pair is not None]
        self.narrow = recorder.buffer(self.name, max(a.rows for _, a, _ in present))
        (form, *others) = {(f.bits, f.columns): f for f in (Form.of(a) for _, a, _ in present)}.values()
        assert not others, "adapters of one program have one precision"
        self.source = p.inputs(place, form)
        for number, a, b in present:
            recorder.slots[number][self.down] = (p.weight(a, None), -1)
            recorder.slots[number][self.up] = (p.weight(b, None), p.inputs(f"narrow {self.name}", Form.of(b)))


class _Side:
    """The steps beside some linears that read one place."""

    def __init__(self, recorder: _Recorder, slots: Sequence[_Slot], head: int | None) -> None:
        self._program, self._slots, self._head = recorder.program, slots, head
        self.inputs = [slot.source for slot in slots]
        if head is not None:
            self.inputs += [slots[head][1] for slots in recorder.slots if slots[head][0] >= 0]

    def down(self) -> None:
        for slot in self._slots:
            self._program.side(
                f"{slot.name} A", slot.down, slot.source, slot.narrow, add=False, last_rows=slot.y is None, wait=False
            )

    def up(self) -> None:
        if self._head is not None:
            self._program.side("own head", self._head, 0, None, add=False, last_rows=True)
        for slot in self._slots:
            self._program.round_side(slot.narrow, slot.up, last_rows=slot.y is None)
        for slot in self._slots:
            self._program.side(f"{slot.name} B", slot.up, 0, slot.y, add=True, last_rows=slot.y is None)


def _native(module: nn.Module) -> QuantLinear | TiledLinear:
    assert isinstance(module, _NATIVE), f"{type(module).__name__} has no kernels"
    return module


def _form(linear: QuantLinear | TiledLinear) -> Form:
    return Form.of(linear.tiles)
