"""A request's tokens are its own: hundreds of different requests at once, through preemptions, prefix hits, guesses,
cancels and changing company, each against a loop of thirty lines that knows no engine."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass

import pytest
import torch

from engine.tiny import CPU, END, KINDS, byte_tokenizer, random_model, small_engine
from lora.tiny import random_adapter
from qwenlet.cache import PagedPast, PagePool, Rows
from qwenlet.config import GenerationDefaults, GrammarSpec, SamplingParams
from qwenlet.engine import Completion
from qwenlet.engine.sizing import cache_dtype
from qwenlet.grammar import Grammars
from qwenlet.lora import LoadedAdapter
from qwenlet.lora.rows import Group, RowAdapters
from qwenlet.model import Qwen
from qwenlet.program import QwenProgram, obstacle
from qwenlet.sampling import TokenCounts, choose

SCHEMA = json.dumps({
    "type": "object",
    "properties": {"a": {"enum": [1, 22, "x"]}, "b": {"type": "boolean"}},
    "required": ["a", "b"],
    "additionalProperties": False,
})  # fmt: skip
GRAMMARS = Grammars(byte_tokenizer(), 271, (END,))


def adapters(model: Qwen) -> dict[str, LoadedAdapter]:
    """Three of different ranks: of all linears, of some, and one with an embedding and a head of its own."""
    made = {
        "all": random_adapter(model, 1, rank=5),
        "some": random_adapter(model, 2, rank=20, names="mlp.w"),
        "whole": random_adapter(model, 3, rank=16, whole=True),
    }
    return {name: LoadedAdapter.beside(model, name, adapter) for name, adapter in made.items()}


def oracle(
    model: Qwen, kind: str, prompt: Sequence[int], params: SamplingParams, choice: int,
    adapter: LoadedAdapter | None = None,
) -> list[int]:  # fmt: skip
    """One row alone, its prompt in one piece, then token by token; stops by hand."""
    with closing(RowAdapters(model)) as beside:
        if adapter is not None:
            beside.hook(adapter)
        return _alone(model, kind, prompt, params, choice, adapter, beside)


def _alone(
    model: Qwen, kind: str, prompt: Sequence[int], params: SamplingParams, choice: int, adapter: LoadedAdapter | None,
    beside: RowAdapters,
) -> list[int]:  # fmt: skip
    dtype = cache_dtype(model, KINDS[kind])
    native = obstacle(model, dtype) is None
    pool = PagePool(model.config, 4, dtype, CPU, tiled=native)
    program = QwenProgram(model, pool, 256, [] if adapter is None else [adapter.sides()]) if native else None
    table, alpha = pool.take(4), model.config.ntk_alpha(len(prompt))
    params = params.resolve(GenerationDefaults())
    counts = TokenCounts(prompt)
    matcher = None if params.grammar is None else GRAMMARS.compile(GrammarSpec("json_schema", SCHEMA)).matcher()
    known, stored = list(prompt), 0
    while True:
        rows, ids = Rows.single(stored, len(known) - stored, alpha), torch.tensor(known[stored:])
        last = torch.tensor([len(ids) - 1])
        groups = [] if adapter is None else [Group(adapter, 0, len(ids))]
        outputs = [] if adapter is None else [Group(adapter, 0, 1)]
        with torch.inference_mode(), beside.rows(groups, outputs):
            if program is not None:
                adapted = [(0, len(ids)) for _ in groups]
                logits = program.forward(ids, rows, [table], [stored], last, adapted=adapted)[0]
            else:
                logits = model(ids, rows, PagedPast(pool, rows, [table], [stored]), logits_at=last)[0]
        stored = len(known)
        logits = logits if matcher is None else matcher.mask(logits)
        token = choose(logits, params, counts, choice, len(known))
        known.append(token)
        counts.add(token)
        reply = known[len(prompt) :]
        if (token == END and not params.ignore_eos) or token in (params.stop_token_ids or ()):
            return reply
        if matcher is not None:
            matcher.accept(token)
        text = bytes(t for t in reply if t < 256).decode(errors="replace")
        if any(stop in text for stop in params.stop or ()) or (matcher is not None and matcher.finished):
            return reply
        if len(reply) == params.max_new_tokens:
            return reply


@dataclass
class Case:
    prompt: list[int]
    params: SamplingParams
    priority: int
    cancel_after: int | None


def cases(count: int, seed: int) -> list[Case]:
    """Prompts that share beginnings, and every kind of request between them."""
    draw = random.Random(seed)
    shared = [draw.choices(range(256), k=160) for _ in range(3)]
    made = []
    for _ in range(count):
        prompt = draw.choice(shared)[: draw.choice([0, 63, 64, 65, 128, 150])] + draw.choices(
            range(256), k=draw.randint(1, 20)
        )
        if draw.random() < 0.2:  # something to look up
            prompt += prompt[-9:] * 2
        grammar = draw.random() < 0.15
        params = SamplingParams(
            max_new_tokens=draw.randint(1, 40),
            temperature=draw.choice([0.0, 0.7, 1.0]),
            top_p=draw.choice([1.0, 0.8]),
            top_k=draw.choice([0, 0, 5]),
            repetition_penalty=draw.choice([1.0, 1.1]),
            seed=draw.randrange(1000),
            stop="e" if draw.random() < 0.15 and not grammar else None,
            stop_token_ids=draw.sample(range(256), 6) if draw.random() < 0.2 and not grammar else None,
            ignore_eos=draw.random() < 0.1 and not grammar,
            json_schema=SCHEMA if grammar else None,
            n=draw.choice([1, 1, 1, 2, 3]),
            adapter=draw.choice([None, None, None, "all", "some", "whole"]),
        )
        made.append(Case(prompt, params, draw.choice([0, 0, 0, 1, -1]), draw.choice([None] * 8 + [0, 3])))
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_every_answer_equals_the_oracles(kind: str) -> None:
    model = random_model(kind)
    engine = small_engine(model, kind, cache_tokens=14 * 64, prefill_chunk=96, mixed_chunk=40, max_requests=12)
    beside = adapters(model)
    for adapter in beside.values():
        engine.add_adapter(adapter)
    draw, left = random.Random(1), cases(75, seed=len(kind) + ord(kind[-1]))
    waiting = list(left)
    live: list[tuple[Case, list, list]] = []
    while waiting or engine.busy:
        if waiting and draw.random() < 0.5:  # they come while others run
            case = waiting.pop()
            requests = engine.submit(case.prompt, case.params, priority=case.priority)
            live.append((case, requests, [[] for _ in requests]))
        engine.step()
        for case, requests, chunks in live:
            for request, got in zip(requests, chunks, strict=True):
                while not request.outbox.empty():
                    got.append(request.outbox.get())
                if case.cancel_after is not None and request.choice == 0 and request.reply_length >= case.cancel_after:
                    engine.cancel(request)
    ends = {"stop": 0, "length": 0, "cancelled": 0}
    for case, requests, chunks in live:
        for request, got in zip(requests, chunks, strict=True):
            while not request.outbox.empty():
                got.append(request.outbox.get())
            completion = Completion.from_chunks(got)
            ends[completion.finish_reason] += 1
            expected = oracle(model, kind, case.prompt, case.params, request.choice, request.adapter)
            if completion.finish_reason == "cancelled":
                expected = expected[: completion.completion_tokens]
            assert list(completion.token_ids) == expected, (case, request.choice)
    stats = engine.stats
    assert min(ends.values()) > 3, ends
    assert stats.preemptions > 5
    assert stats.cached_tokens > 300  # of one adapter each
    assert stats.failed_steps == 0
    assert (stats.running, stats.waiting, stats.pages_used) == (0, 0, 0)
    assert engine.prefix is not None
    engine.prefix.clear()
    assert engine.pool.free_pages == engine.pool.pages


@pytest.mark.parametrize("kind", ["int4", "bf16"])
def test_guesses_change_nothing_but_the_steps(kind: str) -> None:
    """A prompt that repeats itself, greedy: the reply repeats, too, and guesses come true."""
    model = random_model(kind)
    prompt = [7, 8, 9, 10, 11, 12] * 10
    replies, steps = [], []
    for speculate in (True, False):
        engine = small_engine(model, kind, speculate=speculate)
        if engine.speculation is not None:
            engine.speculation.wanted = lambda: True  # type: ignore[method-assign]  # however slow it is here
        for settings in ({"temperature": 0.0}, {"temperature": 1.0, "top_k": 2, "seed": 3}):
            (request,) = engine.submit(prompt, SamplingParams(max_new_tokens=120, ignore_eos=True, **settings))  # type: ignore[arg-type]
            while engine.step():
                pass
            replies.append(list(request.reply))
        steps.append(engine.stats.steps)
    assert replies[:2] == replies[2:]
    assert steps[0] < steps[1]


def test_threads_and_streams_at_once() -> None:
    """The same through the engine's own thread, from eight threads that submit, read, stop reading and cancel."""
    model = random_model("int4")
    engine = small_engine(model, "int4", cache_tokens=14 * 64, prefill_chunk=96, max_requests=6)
    beside = adapters(model)
    for adapter in beside.values():
        engine.add_adapter(adapter)
    own = [random_model("int4") for _ in range(8)]  # an oracle's hooks are its model's, whoever else runs it
    wrong: list[object] = []

    def work(seed: int) -> None:
        for case in cases(6, seed):
            streams = [engine.stream(request) for request in engine.submit(case.prompt, case.params)]
            for choice, stream in enumerate(streams):
                if case.cancel_after is not None:
                    next(stream)
                    stream.close()
                    continue
                found = list(Completion.from_chunks(stream).token_ids)
                adapter = beside.get(case.params.adapter or "")
                if found != oracle(own[seed], "int4", case.prompt, case.params, choice, adapter):
                    wrong.append((case, choice, found))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not wrong
    assert engine.drain(10)
    assert engine.stats.pages_used == 0
    engine.close()
