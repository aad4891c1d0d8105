"""Replies by the decode program, a step ahead of what is known: the same tokens as by the modules, whatever happens
around them. Here the program runs torch's operations on a CPU; its kernels have their own tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn

from decode.tiny import random_model
from engine.tiny import CPU, small_engine
from qwenlet.config import EngineConfig, SamplingParams
from qwenlet.decode import Launch
from qwenlet.engine import Engine, Request
from qwenlet.engine.decoding import way_to_decode
from qwenlet.errors import ConfigError
from qwenlet.model import Qwen

Submission = tuple[list[int], dict[str, Any]]

MANY: list[Submission] = [
    ([1, 2, 3], {"temperature": 0.0}),
    ([7], {"temperature": 0.0, "repetition_penalty": 1.3}),
    ([5] * 63, {"temperature": 1.0, "seed": 5, "top_p": 0.9, "repetition_penalty": 1.2}),
    ([9, 8] * 30, {"temperature": 0.8, "seed": 3, "top_k": 20, "presence_penalty": 0.3, "min_p": 0.01, "n": 2}),
    ([4] * 130, {"temperature": 1.0, "seed": 9, "logprobs": 2, "frequency_penalty": 0.2}),
    ([6, 1], {"temperature": 1.0, "seed": 1, "min_new_tokens": 12, "repetition_penalty": 1.1}),
    ([3, 3], {"temperature": 1.0, "seed": 2, "logit_bias": {65: 3.0}}),
]  # fmt: skip


@pytest.fixture(scope="module")
def model() -> Qwen:
    made = random_model(vocab_size=271)
    nn.init.normal_(made.lm_head.weight, std=0.2)  # so that nothing is a near tie
    return made


def engine(model: Qwen, decode: str, **options: object) -> Engine:
    return small_engine(model, "fp32", decode=decode, **options)


def submitted(e: Engine, many: Sequence[Submission] = MANY, length: int = 70) -> list[Request]:
    requests: list[Request] = []
    for ids, params in many:
        requests += e.submit(ids, SamplingParams(**({"max_new_tokens": length} | params)))
    return requests


def run(e: Engine, between: Callable[[int], None] = lambda step: None) -> int:
    steps = 0
    while e.step():
        steps += 1
        between(steps)
        assert steps < 5000
    return steps


def replies(requests: Sequence[Request]) -> list[list[int]]:
    assert not [request.failure for request in requests if request.failure is not None]
    return [list(request.reply) for request in requests]


@pytest.fixture(scope="module")
def expected(model: Qwen) -> list[list[int]]:
    e = engine(model, "modules")
    requests = submitted(e)
    run(e)
    return replies(requests)


def test_every_kind_of_request_gets_the_tokens_of_the_modules(model: Qwen, expected: list[list[int]]) -> None:
    e = engine(model, "torch")
    requests = submitted(e)
    run(e)
    assert replies(requests) == expected


def test_where_pages_run_out(model: Qwen, expected: list[list[int]]) -> None:
    """Requests lose their pages while a step of theirs is on its way, and come back."""
    e = engine(model, "torch", max_context=256, cache_tokens=5 * 64, max_requests=5)
    requests = submitted(e)
    run(e)
    assert e.stats.preemptions
    assert replies(requests) == expected


def test_among_newcomers_and_cancelled_ones(model: Qwen, expected: list[list[int]]) -> None:
    e = engine(model, "torch", max_requests=6)
    requests = submitted(e)
    others = submitted(e, [([30 + i] * 20, {"temperature": 1.0, "seed": i}) for i in range(3)], 60)

    def between(step: int) -> None:
        if step % 9 == 4 and step < 60:
            submitted(e, [([step], {"temperature": 1.0, "seed": step})], 7)
        if step == 25:
            for request in others:
                e.cancel(request)

    run(e, between)
    assert replies(requests) == expected


def test_a_grammar_beside_others(model: Qwen) -> None:
    found = []
    for decode in ("modules", "torch"):
        e = engine(model, decode)
        requests = submitted(
            e, [([1, 2], {"temperature": 0.0}), ([3], {"regex": "a+b", "seed": 1, "temperature": 1.0})], 9
        )
        run(e)
        found.append(replies(requests))
    assert found[0] == found[1]
    assert bytes(found[1][1]).decode().startswith("a")


def test_the_next_step_is_launched_before_a_token_is_waited_for(model: Qwen, monkeypatch: pytest.MonkeyPatch) -> None:
    e = engine(model, "torch")
    submitted(e, [([1, 2, 3], {"temperature": 0.0}), ([4, 4], {"temperature": 1.0, "seed": 1})], 20)
    events: list[str] = []
    decoder = e.runner.decoding._decoder  # type: ignore[union-attr]
    launch, tokens = decoder.launch, Launch.tokens

    def launching(rows: Any) -> Launch:
        events.append("launch")
        return launch(rows)

    def waiting(self: Launch) -> list[int]:
        events.append("wait")
        return tokens(self)

    monkeypatch.setattr(decoder, "launch", launching)
    monkeypatch.setattr(Launch, "tokens", waiting)
    run(e)
    # the prompts' step gives the first token of 20; no step computes one too many
    assert "".join(event[0] for event in events) == "l" + 18 * "lw" + "w"


def test_an_end_that_nobody_foresaw_wastes_a_row_and_no_more(model: Qwen) -> None:
    e = engine(model, "modules")
    (whole,) = submitted(e, [([1, 2, 3], {"temperature": 0.0})], 30)
    run(e)
    stop = whole.reply[10]
    e = engine(model, "torch")
    requests = submitted(
        e, [([1, 2, 3], {"temperature": 0.0, "stop_token_ids": [stop]}), ([9], {"temperature": 0.0})], 30
    )
    run(e)
    assert list(requests[0].reply) == list(whole.reply[: list(whole.reply).index(stop) + 1])
    assert requests[0].finish_reason == "stop"
    assert e.pool.free_pages + (0 if e.prefix is None else e.prefix.idle) == e.pool.pages


def test_out_of_memory_ends_the_prompt_that_asked_too_much_and_nothing_else(
    model: Qwen, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    e = engine(model, "torch")
    requests = submitted(e)
    forward, failed = e.runner._forward, []

    def once(ids: torch.Tensor, *rest: Any) -> Any:
        if int((ids == 11).sum()) > 50 and not failed:
            failed.append(len(ids))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return forward(ids, *rest)

    monkeypatch.setattr(e.runner, "_forward", once)
    large: list[Request] = []

    def between(step: int) -> None:
        if step == 20:
            large.extend(submitted(e, [([11] * 180, {})], 3))

    run(e, between)
    (victim,) = large
    assert len(failed) == 1
    assert victim.finish_reason == "error"
    assert "ran out of memory" in str(victim.failure)
    assert "Tried to allocate 2.00 GiB" in str(victim.failure)
    assert replies(requests) == expected
    assert e.health.healthy
    assert e.stats.failed_steps == 1


def test_more_requests_than_a_launch_has_rows(model: Qwen) -> None:
    many = [([i + 1], {"temperature": 1.0, "seed": i, "logprobs": 0 if i % 5 else 1}) for i in range(70)]
    found = []
    for decode in ("modules", "torch"):
        e = engine(model, decode, max_requests=70, max_context=64, cache_tokens=70 * 64)
        requests = submitted(e, many, 4)  # type: ignore[arg-type]
        run(e)
        found.append(replies(requests))
    assert found[0] == found[1]


def test_how_tokens_run_and_why(model: Qwen) -> None:
    gpu = torch.device("cuda")
    assert way_to_decode(model, EngineConfig(), torch.float32, CPU) == (None, None)
    assert way_to_decode(model, EngineConfig(attention="sdpa"), torch.float32, gpu)[0] == "modules"
    assert way_to_decode(model, EngineConfig(decode="modules"), torch.float32, gpu)[0] == "modules"
    assert way_to_decode(model, EngineConfig(decode="torch", attention="math"), torch.float32, gpu)[0] == "torch"


def test_without_triton_torch_takes_over_and_a_demand_is_refused(model: Qwen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    way, why = way_to_decode(model, EngineConfig(), torch.float32, torch.device("cuda"))
    assert way == "torch"
    assert "triton is not installed" in str(why)
    with pytest.raises(ConfigError, match="triton is not installed"):
        way_to_decode(model, EngineConfig(decode="kernels"), torch.float32, torch.device("cuda"))


def test_heads_the_kernels_do_not_know() -> None:
    way, why = way_to_decode(
        random_model(head_dim=24, hidden_size=96), EngineConfig(), torch.float32, torch.device("cuda")
    )
    assert way == "torch"
    assert "heads of 24" in str(why)


def test_a_cache_of_another_precision_than_the_kernels_read(model: Qwen) -> None:
    way, why = way_to_decode(model, EngineConfig(), torch.bfloat16, torch.device("cuda"))
    assert way == "torch"
    assert "the cache is torch.bfloat16" in str(why)
