"""Hundreds of requests one after another and at once: memory stays what it was."""

from __future__ import annotations

import gc
import random
from pathlib import Path

import pytest

from engine.tiny import random_model, small_engine
from qwenlet.config import SamplingParams
from qwenlet.engine import Engine

STATUS = Path("/proc/self/status")
ROUNDS, REQUESTS = 12, 40


def resident() -> int:
    gc.collect()
    return int(STATUS.read_text().split("RssAnon:")[1].split()[0]) * 1024


def serve_some(engine: Engine, seed: int) -> None:
    draw = random.Random(seed)
    requests = []
    for _ in range(REQUESTS):
        prompt = draw.choices(range(256), k=draw.randint(1, 150))
        settings = SamplingParams(
            max_new_tokens=draw.randint(1, 30), temperature=1.0, repetition_penalty=1.1, logprobs=2
        )
        requests += engine.submit(prompt, settings)
    while engine.step():
        if draw.random() < 0.2:
            engine.cancel(draw.choice(requests))
    assert all(request.finish_reason in ("stop", "length", "cancelled") for request in requests)


@pytest.mark.skipif(not STATUS.exists(), reason="reads Linux's /proc")
def test_memory_is_flat() -> None:
    """A page that is lost would end the run early; a request that stays would weigh some 10 KB: 4 MB in all."""
    engine = small_engine(random_model("int4"), "int4", cache_tokens=14 * 64, prefill_chunk=96, max_requests=8)
    for seed in range(3):  # pages, the program's buffers and the allocator's own find their size
        serve_some(engine, seed)
    before = resident()
    for seed in range(3, 3 + ROUNDS):
        serve_some(engine, seed)
    assert resident() - before < 2 * 2**20
    assert engine.stats.preemptions > 0
    assert engine.stats.pages_used == 0
