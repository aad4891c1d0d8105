"""Who runs next: order, budgets, pages, and who has to give way. No model runs here."""

from __future__ import annotations

import torch

from engine.tiny import CPU, random_model
from qwenlet.cache import PagePool
from qwenlet.config import SamplingParams
from qwenlet.engine.prefix import PrefixCache
from qwenlet.engine.request import Request
from qwenlet.engine.scheduler import Limits, Scheduler, Work
from qwenlet.engine.stop import StopTexts, StopTokens

CONFIG = random_model("fp32").config


def scheduler(
    pages: int = 8, *, requests: int = 8, prompt: int = 100, mixed: int = 30, prefix: bool = False
) -> Scheduler:
    pool = PagePool(CONFIG, pages, torch.float32, CPU)
    return Scheduler(pool, PrefixCache(pool) if prefix else None, Limits(requests, prompt, mixed), soft_pages=pages)


def request(length: int, new: int = 10, priority: int = 0) -> Request:
    params = SamplingParams(max_new_tokens=new, seed=0)
    return Request(tuple(range(length)), params, 1.0, StopTokens(()), StopTexts(()), priority=priority)


def run(s: Scheduler, steps: int = 1) -> list[list[tuple[Request, int]]]:
    """Steps as an engine would take them, each token a 7; who ran, with how many tokens."""
    seen = []
    for _ in range(steps):
        work: list[Work] = s.schedule()
        seen.append([(one.request, len(one.tokens)) for one in work])
        for one in work:
            one.request.stored += len(one.tokens)
            if one.wanted:
                one.request.known.append(7)
                if one.request.reply_length == one.request.max_new_tokens:
                    one.request.finish_reason = "length"
                    s.remove(one.request)
    return seen


def test_prompts_share_the_budget_in_order() -> None:
    s = scheduler()
    a, b = request(70), request(50)
    s.add(a)
    s.add(b)
    assert run(s, 2) == [[(a, 70), (b, 30)], [(a, 1), (b, 20)]]


def test_beside_replies_prompts_get_less() -> None:
    s = scheduler()
    a, b = request(1), request(90)
    s.add(a)
    run(s)
    s.add(b)
    assert run(s, 4) == [[(a, 1), (b, 30)]] * 3 + [[(a, 1), (b, 1)]]


def test_priority_then_arrival() -> None:
    s = scheduler(requests=1)
    late, early, urgent = request(3, 1), request(3, 1), request(3, 1, priority=-1)
    for one in (early, late, urgent):
        s.add(one)
    assert late.arrival < early.arrival
    assert [who for step in run(s, 3) for who, _ in step] == [urgent, late, early]


def test_the_one_that_comes_last_gives_its_pages_back_and_goes_on_later() -> None:
    s = scheduler(pages=2)
    a, b = request(60, 20), request(60, 20)
    s.add(a)
    s.add(b)
    steps = run(s, 60)
    assert s.preemptions == 1
    assert b.preemptions == 1
    assert (a.reply_length, b.reply_length) == (20, 20)
    assert (b, 64) in [one for step in steps for one in step] or any(
        n > 60 for step in steps for who, n in step if who is b
    )
    assert s.pool.free_pages == 2
    assert not s.running and not s.waiting  # noqa: PT018


def test_nobody_overtakes_who_waits_for_room() -> None:
    s = scheduler(pages=3)
    a, large, small = request(100, 20), request(120, 5), request(3, 1)
    for one in (a, large, small):
        s.add(one)
    order = []
    while s.running or s.waiting:
        for who, _ in run(s)[0]:
            if who not in order:
                order.append(who)
    assert order == [a, large, small]


def test_an_urgent_request_takes_the_room_of_one_that_is_not() -> None:
    s = scheduler(pages=2)
    a, urgent = request(120, 5), request(60, 1, priority=-1)
    s.add(a)
    run(s, 2)
    s.add(urgent)
    assert [who for who, _ in run(s)[0]] == [urgent]
    assert a.pages == []


def test_old_prefixes_go_before_anybody_gives_way() -> None:
    s = scheduler(pages=3, prefix=True)
    assert s.prefix is not None
    a = request(128, 1)
    s.add(a)
    work = s.schedule()
    work += s.schedule()
    s.prefix.keep(a.root, a.known[:128], a.pages[:2])
    s.remove(a)
    assert s.prefix.idle == 2
    b = request(5, 150)
    b.known = [9] * 150
    s.add(b)
    run(s, 3)
    assert s.preemptions == 0
    assert len(b.pages) == 3
    assert len(s.prefix) == 0


def test_memory_that_was_used_is_used_again_before_more_is_touched() -> None:
    s = scheduler(pages=8, prefix=True)
    s.soft_pages = 2
    assert s.prefix is not None
    for n in range(4):
        one = request(64, 1)
        one.known = [n] * 64
        s.add(one)
        s.schedule()
        s.prefix.keep(one.root, one.known, one.pages[:1])
        s.remove(one)
    assert s.pool.touched == 2
