"""A step of attention by the kernel, in Triton's interpreter, against the model's own rotation and paged cache."""

from __future__ import annotations

import pytest
import torch

from qwenlet.cache import PagedPast, PagePool, Rows
from qwenlet.config import ModelConfig
from qwenlet.model import Rotation
from qwenlet.ops.pages import CachePages

pytest.importorskip("triton")

from qwenlet.ops.triton import attention
from qwenlet.ops.triton.attention import attend, splits_of
from qwenlet.ops.triton.scratch import Scratch

SEQ_LENGTH = 256
CLOSE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def config_of(heads: int, groups: int, dim: int) -> ModelConfig:
    return ModelConfig(
        model_type="qwen", vocab_size=64, hidden_size=heads * dim, num_hidden_layers=1, num_attention_heads=heads,
        num_key_value_heads=groups, head_dim=dim, intermediate_size=64, max_position_embeddings=SEQ_LENGTH,
        seq_length=SEQ_LENGTH, use_dynamic_ntk=True, use_logn_attn=True,
    )  # fmt: skip


class Step:
    """One new token behind pasts of these lengths, in pages that lie anywhere; unused slots hold NaN."""

    def __init__(self, config: ModelConfig, pasts: list[int], dtype: torch.dtype, cache: torch.dtype) -> None:
        torch.manual_seed(1)
        self.config, self.pasts, self.dtype, rows = config, pasts, dtype, len(pasts)
        heads, groups, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        used = [past // 64 + 1 for past in pasts]
        shape = (sum(used) + 1, groups, 64, dim)
        self.k, self.v = torch.randn(2, *shape).mul(1.0 if cache != torch.int8 else 40.0).to(cache)
        self.scales = (torch.rand(2, *shape[:3]) * 0.02) if cache == torch.int8 else None
        order = iter(torch.randperm(sum(used)).tolist())
        self.tables = [[next(order) for _ in range(count)] for count in used]
        if cache != torch.int8:
            for past, table in zip(pasts, self.tables, strict=True):
                self.k[table[-1], :, past % 64 :] = self.v[table[-1], :, past % 64 :] = float("nan")
        self.qkv = torch.randn(rows, (heads + 2 * groups) * dim).to(dtype)
        alphas = [config.ntk_alpha(past + 1) for past in pasts]
        self.rows = Rows(torch.tensor(pasts), (1,) * rows, tuple(alphas))
        self.rotation = Rotation(config, self.rows, extend=True)
        logn = self.rotation.logn
        self.logn = None if logn is None else logn.flatten()

    def pages(self) -> CachePages:
        scales = (None, None) if self.scales is None else self.scales.clone()
        return CachePages(self.k.clone(), self.v.clone(), *scales)

    def by_modules(self) -> tuple[torch.Tensor, CachePages]:
        pages = self.pages()
        pool = PagePool(self.config, len(self.k), self.k.dtype, torch.device("cpu"))
        pool.k, pool.v = [pages.k], [pages.v]
        if pages.k_scales is not None and pages.v_scales is not None:
            pool.k_scales, pool.v_scales = [pages.k_scales], [pages.v_scales]
        c = self.config
        heads, groups = c.num_attention_heads, c.num_key_value_heads
        x = self.qkv.unflatten(1, (-1, c.head_dim))
        q, k = self.rotation.turn(x[:, : heads + groups]).split((heads, groups), dim=1)
        if self.rotation.logn is not None:
            q = q * self.rotation.logn.type_as(q)
        past = PagedPast(pool, self.rows, self.tables, self.pasts)
        return past.attend(0, q, k, x[:, heads + groups :]).flatten(1), pages

    def by_kernel(self, scratch: Scratch, only: list[int] | None = None) -> tuple[torch.Tensor, CachePages]:
        pages, chosen = self.pages(), list(range(len(self.pasts))) if only is None else only
        width = max(len(table) for table in self.tables) + 2
        tables = torch.tensor([table + [0] * (width - len(table)) for table in self.tables], dtype=torch.int32)
        cos, sin = self.rotation.cos[:, 0].contiguous(), self.rotation.sin[:, 0].contiguous()
        answer = attend(
            self.qkv[chosen],
            cos[chosen],
            sin[chosen],
            None if self.logn is None else self.logn[chosen],
            pages,
            tables[chosen],
            torch.tensor(self.pasts, dtype=torch.int32)[chosen],
            heads=self.config.num_attention_heads,
            scratch=scratch,
        )
        return answer, pages


@pytest.fixture
def scratch(monkeypatch: pytest.MonkeyPatch) -> Scratch:
    """Fewer splits than a GPU gets: the interpreter runs programs one after the other."""
    monkeypatch.setattr(attention, "_PROGRAMS", 16)
    memory = Scratch("cpu", floats=1 << 20, counters=1 << 8)
    memory.partials.fill_(float("nan"))
    return memory


@pytest.mark.parametrize("shape", [(4, 4, 32), (6, 2, 16), (3, 1, 64)], ids=["own keys", "groups", "one key head"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("int8", [False, True], ids=["floats", "int8"])
def test_as_the_modules_do(shape: tuple[int, int, int], dtype: torch.dtype, int8: bool, scratch: Scratch) -> None:
    """Pasts at, beside and far from the edges of pages and splits; some beyond the training length."""
    step = Step(config_of(*shape), [0, 1, 63, 64, 130, 600, 2100], dtype, torch.int8 if int8 else dtype)
    assert step.logn is not None
    wanted, expected = step.by_modules()
    found, pages = step.by_kernel(scratch)
    assert found.dtype == dtype
    close = 1e-2 if int8 and dtype != torch.float32 else CLOSE[dtype]
    largest = wanted.float().abs().max()
    assert (found.float() - wanted.float()).abs().max() <= close * largest
    for at in ("k", "v", "k_scales", "v_scales"):
        ours, theirs = getattr(pages, at), getattr(expected, at)
        if ours is not None and not int8:
            assert torch.equal(ours.nan_to_num(7.0), theirs.nan_to_num(7.0)), at
        elif ours is not None:
            assert (ours.float() - theirs.float()).abs().max() <= (1 if at in "kv" else 1e-7), at
    assert not scratch.counters.any()


def test_a_row_is_its_own_to_the_bit(scratch: Scratch) -> None:
    step = Step(config_of(4, 4, 32), [700, 3, 90], torch.bfloat16, torch.bfloat16)
    together, _ = step.by_kernel(scratch)
    for row in range(3):
        alone, _ = step.by_kernel(scratch, [row])
        assert torch.equal(alone[0], together[row])


def test_padding_writes_nothing(scratch: Scratch) -> None:
    step = Step(config_of(4, 4, 32), [70, 20], torch.float32, torch.float32)
    wanted, _ = step.by_kernel(scratch)
    step.pasts[1] = -1
    found, pages = step.by_kernel(scratch)
    assert torch.equal(found[0], wanted[0])
    assert not found[1].any()
    last = step.tables[1][-1]
    assert torch.equal(pages.k[last].nan_to_num(7.0), step.k[last].nan_to_num(7.0))


def test_without_logn(scratch: Scratch) -> None:
    step = Step(config_of(4, 4, 32), [100], torch.float32, torch.float32)
    assert step.logn is None
    wanted, _ = step.by_modules()
    found, _ = step.by_kernel(scratch)
    assert (found - wanted).abs().max() <= 2e-6 * wanted.abs().max()


def test_splits_keep_a_gpu_busy() -> None:
    assert splits_of(16) == 16
    assert [splits_of(groups) for groups in (1, 2, 3, 40, 64)] == [64, 64, 64, 8, 8]
