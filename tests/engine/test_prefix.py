"""The index of stored pages against a plain list of what was kept."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.tiny import CPU, random_model, small_engine
from qwenlet.cache import PagePool
from qwenlet.config import SamplingParams
from qwenlet.engine import Engine, Request
from qwenlet.engine.prefix import PrefixCache

CONFIG = random_model("fp32").config
A, B, C = ([letter] * 64 for letter in (1, 2, 3))


def pool(pages: int = 8) -> PagePool:
    return PagePool(CONFIG, pages, torch.float32, CPU)


def test_the_longest_known_beginning_is_found_within_the_limit() -> None:
    p = pool()
    index = PrefixCache(p)
    pages = p.take(3)
    index.keep("root", A + B + C, pages)
    assert index.find("root", A + B + C + A, 256) == pages
    assert index.find("root", A + B + A, 192) == pages[:2]
    assert index.find("root", A + B + C, 191) == pages[:2], "whole pages only"
    assert index.find("root", B + A, 128) == []
    assert index.find("another factor", A, 64) == []
    assert [p.holders(page) for page in pages] == [2 + 3, 2 + 3, 2 + 1]


def test_the_same_tokens_behind_another_beginning_are_other_pages() -> None:
    p = pool()
    index = PrefixCache(p)
    first, second = p.take(2), p.take(2)
    index.keep("root", A + C, first)
    index.keep("root", B + C, second)
    assert index.find("root", B + C, 128) == second


def test_what_two_computed_at_once_is_kept_once() -> None:
    p = pool()
    index = PrefixCache(p)
    first, second = p.take(1), p.take(2)
    index.keep("root", A, first)
    index.keep("root", A + B, second)
    assert index.find("root", A + B, 128) == [first[0], second[1]]
    p.give_back(second)
    assert p.holders(second[0]) == 0, "nobody needs it"


def test_a_page_whose_parent_was_given_up_is_not_held_twice() -> None:
    """Two requests store the same beginning at once; the index keeps the first one's page, and the second one goes on
    behind it. The first ends, its page goes, and the second is indexed again from its own beginning."""
    p = pool()
    index = PrefixCache(p)
    first, second = p.take(1), p.take(3)
    index.keep("root", A, first)
    index.keep("root", A + B, second[:2])
    p.give_back(first)
    assert index.give_up(1) == 1
    index.keep("root", A + B + C, second)
    assert index.find("root", A + B + C, 192) == second
    p.give_back(second)
    p.give_back(second)
    assert index.idle == 3, "each is held once, by the index"
    assert index.give_up(3) == 3
    assert p.free_pages == p.pages


def test_idle_pages_go_least_recently_used_first_and_from_the_end() -> None:
    p = pool()
    index = PrefixCache(p)
    long, short = p.take(2), p.take(1)
    index.keep("root", A + B, long)
    index.keep("root", C, short)
    assert index.give_up(9) == 0, "all are held"
    p.give_back(long)
    p.give_back(short)
    assert index.idle == 3
    p.give_back(index.find("root", A + B, 128))  # used again
    assert index.give_up(1) == 1
    assert index.find("root", C, 64) == []
    assert index.give_up(1) == 1
    found = index.find("root", A + B, 128)
    assert found == long[:1], "the page at the end went first"
    index.clear()
    assert p.free_pages == 7
    p.give_back(found)
    assert p.free_pages == p.pages


@settings(max_examples=60)
@given(data=st.data())
def test_it_never_finds_what_was_not_stored_nor_loses_a_page(data: st.DataObject) -> None:
    p = pool(12)
    index = PrefixCache(p)
    content: dict[int, tuple[int, ...]] = {}  # of a page: everything up to its end
    held: list[list[int]] = []
    for _ in range(data.draw(st.integers(1, 30))):
        match data.draw(st.sampled_from(["store", "drop", "give up", "clear"])):
            case "store":
                letters = data.draw(st.lists(st.integers(1, 2), min_size=1, max_size=3))
                tokens = [letter for letter in letters for _ in range(64)]
                found = index.find("root", tokens, len(tokens))
                assert all(content[page] == tuple(letters[: at + 1]) for at, page in enumerate(found))
                if p.free_pages < len(letters) - len(found):
                    p.give_back(found)
                    continue
                pages = found + p.take(len(letters) - len(found))
                content |= {page: tuple(letters[: at + 1]) for at, page in enumerate(pages)}
                index.keep("root", tokens, pages)
                held.append(pages)
            case "drop" if held:
                p.give_back(held.pop(data.draw(st.integers(0, len(held) - 1))))
            case "give up":
                idle, count = index.idle, data.draw(st.integers(0, 4))
                assert index.give_up(count) == min(idle, count)
            case "clear":
                index.clear()
        users = {page for pages in held for page in pages}
        assert p.pages - p.free_pages - index.idle == len(users)
    for pages in held:
        p.give_back(pages)
    index.clear()
    assert p.free_pages == p.pages


def test_a_page_given_back_twice_is_a_bug_that_shows() -> None:
    p = pool()
    pages = p.take(1)
    p.give_back(pages)
    with pytest.raises(AssertionError, match="given back twice"):
        p.give_back(pages)


def test_a_copy_holds_the_same_in_all_layers() -> None:
    p = PagePool(CONFIG, 3, torch.int8, CPU)
    assert p.k_scales is not None
    for table in (*p.k, *p.v):
        table.random_(-128, 128)
    for scales in (*p.k_scales, *(p.v_scales or ())):
        scales.uniform_()
    p.copy(0, 2)
    for table in (*p.k, *p.v, *p.k_scales, *(p.v_scales or ())):
        assert torch.equal(table[0], table[2])
        assert not torch.equal(table[0], table[1])


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16], ids=str)
def test_a_copy_of_a_page_of_the_kernels(dtype: torch.dtype) -> None:
    p = PagePool(CONFIG, 12, dtype, CPU, tiled=True)
    for layer in p.tiles:
        layer.memory.random_(0, 256)
    p.copy(1, 10)  # into another run
    for layer in p.tiles:
        pages = layer.plain()
        parts = [x.view(torch.uint8) for x in (pages.k, pages.v, pages.k_scales, pages.v_scales) if x is not None]
        for part in parts:
            assert torch.equal(part[1], part[10])
            assert not torch.equal(part[1], part[2])
            assert not torch.equal(part[1], part[9])


def test_memory_of_the_kernels_comes_in_runs_of_pages() -> None:
    p = PagePool(CONFIG, 20, torch.int8, CPU, tiled=True)
    p.take(1)
    assert (p.touched, p.free_touched) == (8, 7)
    p.take(8)
    assert (p.touched, p.free_touched) == (16, 7)
    p.take(11)
    assert (p.touched, p.free_touched) == (20, 0)


def test_no_page_is_lost_where_an_idle_page_goes_before_one_in_use() -> None:
    """Two computed the same beginning; the first has ended, the second goes on behind the first one's page."""
    p = pool(4)
    index = PrefixCache(p)
    first, second = p.take(1), p.take(2)
    index.keep("root", A, first)
    index.keep("root", A + B, second)
    p.give_back(first)
    assert index.give_up(1) == 1
    index.keep("root", A + B, second)
    p.give_back(second)
    assert index.find("root", A + B, 128) == second
    p.give_back(second)
    assert (index.idle, index.give_up(2), p.free_pages) == (2, 2, 4)


def test_equal_replies_one_after_another_in_a_cache_of_their_length() -> None:
    engine = small_engine(random_model("fp32"), max_context=192)
    params = SamplingParams(temperature=0, max_new_tokens=184, ignore_eos=True)
    for _ in range(4):
        (request,) = engine.submit([1, 2, 3], params)
        while request.finish_reason is None:
            assert engine.step()
        assert engine.stats.pages_used == 0


@pytest.mark.parametrize("kind", ["fp32", "int4"])
def test_switched_off_log_n_attention_is_a_model_without_it(kind: str) -> None:
    """Of four readers of one text two have it taken away, side by side and after each other, in pieces: nobody takes
    over what was stored with it, or without."""
    ids = [(7 * n) % 250 for n in range(200)]
    engine = small_engine(random_model(kind), kind, prefill_chunk=64)
    without = small_engine(random_model(kind, use_logn_attn=False, use_dynamic_ntk=False), kind)
    alpha = engine.model.config.ntk_alpha(len(ids))

    def read(engine: Engine, logn: bool) -> tuple[Request, list[torch.Tensor]]:
        parts: list[torch.Tensor] = []
        return engine.read(ids, alpha, 0, lambda _, logits: parts.append(logits.cpu()), logn=logn), parts

    pairs = [(logn, read(engine, logn)) for logn in (True, False, False, True)]
    pairs.append((True, read(without, True)))
    for _, (request, _) in pairs:
        for _ in (engine if request is not pairs[-1][1][0] else without).stream(request):
            pass
    on, off, off_again, on_again, never = (torch.cat(parts) for _, (_, parts) in pairs)
    assert torch.equal(off, never)
    assert torch.equal(off, off_again)
    assert torch.equal(on, on_again)
    assert torch.equal(on[:64], off[:64])
    assert not torch.allclose(on[64:], off[64:], atol=1e-3)
