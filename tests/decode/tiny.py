"""Small random models with torch's linears, their twins in codes, and replies written token by token."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from qwenlet.cache import PagedPast, PagePool, Rows, pages_for
from qwenlet.config import SamplingParams
from qwenlet.decode import Decoder, Row, obstacle
from qwenlet.linear import QuantLinear, replace_linear
from qwenlet.model import Qwen
from qwenlet.ops.packing import to_tiles
from qwenlet.ops.rounding import round_to_nearest
from random_qwen import random_qwen

CPU = torch.device("cpu")
GREEDY = SamplingParams(temperature=0.0)
WAYS = ["torch", "kernels"]


def check_kernels(way: str) -> None:
    """Skips where triton, whose interpreter runs the kernels here, is missing."""
    if way == "kernels" and (reason := obstacle(CPU)) is not None:
        pytest.skip(reason)


def random_model(dtype: torch.dtype = torch.float32, **changes: object) -> Qwen:
    sizes: dict[str, object] = {
        "vocab_size": 203, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16,
        "intermediate_size": 96,
    }  # fmt: skip
    return random_qwen(0.1, **(sizes | changes)).to(dtype)


def twins(bits: int, dtype: torch.dtype = torch.float32, *, sym: bool = True) -> tuple[Qwen, Qwen]:
    """A model in codes, and the same in the floats that they are worth."""
    coded, plain = random_model(dtype), random_model(dtype)
    for name, module in list(plain.named_modules()):
        if isinstance(module, nn.Linear):
            codes = round_to_nearest(module.weight, bits, 32, sym=sym)
            replace_linear(coded, name, QuantLinear(to_tiles(codes), module.bias))
            module.weight = nn.Parameter(codes.dequantize().to(dtype), requires_grad=False)
    return coded, plain


class Writer:
    """Rows side by side over pages in disorder: beginnings by the modules of `plain`, then tokens by a decoder."""

    def __init__(
        self, model: Qwen, way: str, cache: torch.dtype, rows: Sequence[Sequence[int]], plain: Qwen | None = None
    ) -> None:
        self.plain, self.rows = plain or model, rows
        self.pool = PagePool(model.config, 24, cache, CPU)
        for table in (*self.pool.k, *self.pool.v):
            table.fill_(torch.nan if table.is_floating_point() else 77)  # what was never written is never read
        spare = self.pool.take(3)
        self.tables = [self.pool.take(pages_for(len(ids) + 1)) for ids in rows]
        self.pool.give_back(spare)
        self.alphas = [model.config.ntk_alpha(len(ids)) for ids in rows]
        self.decoder = Decoder(model, self.pool, max(len(rows), 3), 6, CPU, kernels=way == "kernels")
        self.slots = []
        for alpha in self.alphas:
            slot = self.decoder.slots.take()
            assert slot is not None
            self.decoder.slots.begin(slot, alpha, True)
            self.slots.append(slot)

    @torch.inference_mode()
    def begin(self, stops: Sequence[int]) -> None:
        """Stores the first `stops` tokens of each row."""
        for ids, table, alpha, stop in zip(self.rows, self.tables, self.alphas, stops, strict=True):
            if stop:
                rows = Rows.single(0, stop, alpha)
                self.plain(torch.tensor(ids[:stop]), rows, PagedPast(self.pool, rows, [table], [0]))

    def row(self, at: int, position: int, /, **changes: object) -> Row:
        fields: dict[str, object] = {
            "reply": (at, "reply"), "slot": self.slots[at], "token": self.rows[at][position], "source": -1,
            "position": position, "pages": self.tables[at], "params": GREEDY, "u": 0.0, "counted": False,
        }  # fmt: skip
        return Row(**(fields | changes))  # type: ignore[arg-type]


@torch.inference_mode()
def by_modules(model: Qwen, cache: torch.dtype, ids: Sequence[int], *, first: int) -> Tensor:
    """Logits from position `first` on, token by token behind a beginning in one piece."""
    pool = PagePool(model.config, 8, cache, CPU)
    table, alpha, out = pool.take(pages_for(len(ids))), model.config.ntk_alpha(len(ids)), []
    for start, stop in [(0, first), *((at, at + 1) for at in range(first, len(ids)))]:
        rows = Rows.single(start, stop - start, alpha)
        if stop > start:
            out.append(model(torch.tensor(ids[start:stop]), rows, PagedPast(pool, rows, [table], [start])))
    return torch.cat(out)[first:].float()


def tokens(count: int, seed: int = 0) -> list[int]:
    return torch.randint(0, 203, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
