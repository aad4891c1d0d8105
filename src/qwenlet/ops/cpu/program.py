"""A forward pass as a flat list of native steps with bound addresses, run by one call. It knows shapes and bits only.

Record the steps once, in order, then `run` them for any batch of up to `capacity` tokens. Everything is float32 between
steps; a linear reads its inputs as its weights want them: rounded per row and group (to 8 bits for four-bit weights, to
15 for eight-bit ones), rounded to bfloat16, or as they are.

Dimension letters: N tokens of all sequences, H query heads, G key/value heads, D head size.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qwenlet.ops.cpu import kernels, weight_numbers
from qwenlet.ops.packing import Tiles
from qwenlet.ops.pages import TiledPages

_NORM, _SWIGLU, _ROUND, _STORE, _ATTEND = 0, 1, 2, 4, 5
_CACHE_KINDS = {torch.int8: 0, torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}


@dataclass(frozen=True)
class Form:
    """How a linear wants its inputs: columns, columns of a scale (0: floats), bits of the weight, act-order."""

    columns: int
    group_size: int
    bits: int
    order: Tensor | None = None

    @classmethod
    def of(cls, weight: Tiles) -> Form:
        columns = weight.weight.shape[1] * 32 // weight.bits
        return cls(columns, weight.group_size, weight.bits, weight.order)

    def same(self, other: Form) -> bool:
        if (self.columns, self.group_size, self.bits) != (other.columns, other.group_size, other.bits):
            return False
        if self.order is None or other.order is None:
            return self.order is other.order
        return torch.equal(self.order, other.order)


class Program:
    """Args: capacity: most tokens of a run, at most `max_batch()`."""

    def __init__(self, capacity: int) -> None:
        self._native = kernels()
        assert capacity <= self._native.MAX_BATCH, f"{capacity} tokens, the kernels take {self._native.MAX_BATCH}"
        self._program = self._native.program_new()
        self.capacity = capacity
        self.names: list[str] = []  # of the steps, for timings
        self.bytes: list[int] = []  # of weights that each step reads
        self._held: list[Tensor] = []  # what addresses point to
        self._inputs: list[tuple[str, Form, int]] = []

    def buffer(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """[capacity, *shape], kept for as long as the program lives."""
        return self._hold(torch.empty(self.capacity, *shape, dtype=dtype))

    def _hold(self, tensor: Tensor) -> Tensor:
        assert tensor.is_contiguous(), "addresses are of contiguous tensors"
        self._held.append(tensor)
        return tensor

    def _address(self, tensor: Tensor | None) -> int:
        return 0 if tensor is None else self._hold(tensor).data_ptr()

    # ------------------------------------------------------------------------------------------- recording

    def inputs(self, place: str, form: Form) -> int:
        """The number of a buffer for rounded inputs; one for all steps that name the same place and an equal form."""
        for known, other, number in self._inputs:
            if known == place and form.same(other):
                return number
        codes = scales = sums = bf16 = fp32 = None
        if form.group_size:
            groups = form.columns // form.group_size
            codes = self.buffer(form.columns * (2 if form.bits == 8 else 1), dtype=torch.int8)
            scales, sums = self.buffer(groups), self.buffer(groups, dtype=torch.int32)
        elif form.bits == 16:
            bf16 = self.buffer(form.columns, dtype=torch.bfloat16)
        else:
            fp32 = self.buffer(form.columns)
        order = None if form.order is None else form.order.to(torch.int32)
        addresses = [self._address(t) for t in (codes, scales, sums, bf16, fp32, order)]
        number = self._native.program_inputs(self._program, form.bits, form.columns, form.group_size, *addresses)
        self._inputs.append((place, form, number))
        return number

    def norm(
        self, x: Tensor, weight: Tensor, eps: float, to: Sequence[int], *, adapted: Sequence[int] = (),
        last_rows: bool = False,
    ) -> None:  # fmt: skip
        """RMSNorm of x [N, C] times weight [C], rounded into the inputs `to`, and of rows with an adapter `adapted`."""
        self._rows("norm", eps, _NORM, x, None, weight.float(), to, adapted, last_rows)

    def swiglu(self, up: Tensor, gate: Tensor, to: Sequence[int], adapted: Sequence[int] = ()) -> None:
        """up * silu(gate), both [N, I], rounded into the inputs `to`."""
        self._rows("swiglu", 0.0, _SWIGLU, up, gate, None, to, adapted)

    def round(self, x: Tensor, to: Sequence[int], adapted: Sequence[int] = ()) -> None:
        """x [N, C] rounded into the inputs `to`."""
        self._rows("round", 0.0, _ROUND, x, None, None, to, adapted)

    def round_side(self, x: Tensor, slot: int, *, last_rows: bool = False) -> None:
        """x [N, rank] of rows with an adapter, rounded into the inputs that it has in this slot."""
        self._rows("round", 0.0, _ROUND, x, None, None, (), last_rows=last_rows, slot=slot)

    def _rows(
        self, name: str, eps: float, kind: int, a: Tensor, b: Tensor | None, weight: Tensor | None, to: Sequence[int],
        adapted: Sequence[int] = (), last_rows: bool = False, slot: int = -1,
    ) -> None:  # fmt: skip
        self._step(name, 0)
        width = a.shape[1]
        addresses = [self._address(t) for t in (a, b, weight)]
        own = [-1 - number for number in adapted if number not in to]
        self._native.program_rows(self._program, eps, kind, *addresses, 0, width, width, last_rows, slot, *to, *own)

    def weight(self, weight: Tiles, bias: Tensor | None) -> int:
        """The number of a weight."""
        parts = (weight.weight, weight.scales, weight.zeros, weight.minimums, bias)
        self._held += [part for part in parts if part is not None]
        return int(self._native.program_weight(self._program, *weight_numbers(weight, bias)))

    def linear(
        self, name: str, weight: Tiles, bias: Tensor | None, source: int, y: Tensor | None, *, add: bool = False,
        wait: bool = True,
    ) -> None:  # fmt: skip
        """y = (y +) W x + b, x from the inputs `source`; y None: the run's output, for its last rows.

        Args:
            wait: False if the next step doesn't need this one's result.
        """
        parts = (weight.weight, weight.scales, weight.zeros, weight.minimums, bias)
        self._step(name, sum(part.nbytes for part in parts if part is not None))
        self._linear(self.weight(weight, bias), source, y, add, y is None, wait, -1)

    def side(
        self, name: str, slot: int, source: int, y: Tensor | None, *, add: bool, last_rows: bool = False,
        wait: bool = True,
    ) -> None:  # fmt: skip
        """The same on rows with an adapter, with the weight that it has in this slot, if any; without any such row the
        step costs nothing. Where the adapter names inputs of its own, they are read instead of `source`."""
        self._step(name, 0)
        self._linear(0, source, y, add, last_rows, wait, slot)

    def _linear(
        self, number: int, source: int, y: Tensor | None, add: bool, last_rows: bool, wait: bool, slot: int
    ) -> None:
        stride = 0 if y is None else y.shape[1]
        address = self._address(y)
        self._native.program_linear(self._program, number, source, address, stride, add, last_rows, wait, slot)

    def adapter(self, slots: Sequence[tuple[int, int]]) -> None:
        """One more adapter: its weight and that weight's inputs in each slot, -1 for none and for the step's own."""
        self._native.program_adapter(self._program, *(number for slot in slots for number in slot))

    def attention(
        self, heads: int, pages: TiledPages, qkv: Tensor, codes: Tensor, code_scales: Tensor, out: Tensor
    ) -> None:
        """Turns queries and keys of qkv [N, H + 2G, D] in place, stores keys and values, answers into out [N, H * D].

        Args:
            codes: [N, H, 2 D] int8 and code_scales: [N, H, 2]: room for the queries of an int8 cache in 15 bits.
        """
        memory = pages.memory
        self._held.append(memory)
        number = self._native.program_pages(
            self._program, _CACHE_KINDS[pages.dtype], heads, pages.kv_heads, pages.head_dim, pages.group,
            memory.shape[2], memory.stride(0), memory.stride(1), memory.data_ptr(),
        )  # fmt: skip
        addresses = [self._address(t) for t in (codes, code_scales, out)]
        stride = qkv.shape[1] * qkv.shape[2]
        for name, step in (("store", _STORE), ("attend", _ATTEND)):
            self._step(name, 0)
            self._native.program_attention(self._program, step, number, self._address(qkv), stride, *addresses)

    def _step(self, name: str, weight_bytes: int) -> None:
        self.names.append(name)
        self.bytes.append(weight_bytes)

    # ------------------------------------------------------------------------------------------- running

    def run(
        self,
        isa: str,
        lengths: Sequence[int],
        starts: Sequence[int],
        tables: Sequence[Sequence[int]],
        cos: Tensor,
        sin: Tensor,
        query_scale: Tensor | None,
        output_rows: Tensor,
        output: Tensor,
        seconds: Tensor | None = None,
        adapted: Sequence[tuple[int, int]] = (),
    ) -> None:
        """Runs the steps for the tokens whose inputs the caller has put in place.

        Args:
            lengths: new tokens of each sequence, which lie one after the other; N in all.
            starts: position of each sequence's first new token.
            tables: page numbers of each sequence, enough for its past and its new tokens.
            cos, sin: [N, D / 2] float32.
            query_scale: [N] float32 or None for ones.
            output_rows: [M] int64, tokens whose result is wanted; output: [M, V] float32, filled.
            seconds: [steps] float64, filled with how long each step took.
            adapted: an adapter's number and how many tokens go with it, for each that some do; they are the last ones,
                in this order.
        """
        tokens = sum(lengths)
        assert tokens <= self.capacity, f"{tokens} tokens, room for {self.capacity}"
        offsets = [0]
        flat: list[int] = []
        for table, start, length in zip(tables, starts, lengths, strict=True):
            assert len(table) * 64 >= start + length, f"{len(table)} pages for {start + length} tokens"
            flat += table
            offsets.append(len(flat))
        # arrays: a tensor of a few numbers takes several times as long to make, for every token
        numbers, pages = array("q", [*lengths, *starts, *offsets]), array("i", flat)
        groups = array("q", [number for group in adapted for number in group])
        count, size = len(lengths), numbers.itemsize
        at = _address(numbers)
        self._native.program_run(
            self._program, isa, torch.get_num_threads(), 0 if seconds is None else seconds.data_ptr(),
            tokens, count, at, at + count * size, _address(pages), at + 2 * count * size,
            cos.data_ptr(), sin.data_ptr(), 0 if query_scale is None else query_scale.data_ptr(),
            len(output_rows), output_rows.data_ptr(), output.data_ptr(), output.stride(0),
            len(adapted), _address(groups),
        )  # fmt: skip


def _address(numbers: array[int]) -> int:
    return numbers.buffer_info()[0]
