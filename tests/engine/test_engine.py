"""The engine on the tiny golden model: exact tokens, stops without an extra step, counters, pages that come back."""

from __future__ import annotations

import asyncio
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qwenlet import sampling
from qwenlet.cache import PAGE_TOKENS, Rows
from qwenlet.checkpoint import Checkpoint, load_model
from qwenlet.config import EngineConfig, GenerationDefaults, SamplingParams
from qwenlet.engine import Chunk, Completion, Engine, replies
from qwenlet.errors import ConfigError, ContextLengthError, EngineError, RequestError
from qwenlet.model import Qwen
from qwenlet.sampling import Row, choose, choose_all

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(golden: Path) -> Qwen:
    return load_model(Checkpoint.open(golden / "tiny-qwen"), torch.float32, CPU)[0]


def engine(
    model: Qwen, *, defaults: GenerationDefaults | None = None, stop_ids: tuple[int, ...] = (), **options: object
) -> Engine:
    settings = EngineConfig(**({"max_context": 256} | options))  # type: ignore[arg-type]
    return Engine(model, None, settings, defaults or GenerationDefaults(), CPU, stop_ids)


def run(engine: Engine, prompt: list[int], **params: object) -> Completion:
    (request,) = engine.submit(prompt, SamplingParams(**params))  # type: ignore[arg-type]
    return Completion.from_chunks(engine.stream(request))


def oracle(model: Qwen, prompt: list[int], count: int, params: SamplingParams) -> list[int]:
    """Generation without engine, cache or pieces: the whole row again for every token."""
    ids, alpha = list(prompt), model.config.ntk_alpha(len(prompt))
    params = params.resolve(GenerationDefaults())
    for _ in range(count):
        with torch.no_grad():
            logits = model(torch.tensor(ids), Rows.fresh([len(ids)], [alpha]))[-1]
        ids.append(choose(logits, params, None, 0, len(ids)))
    return ids[len(prompt) :]


def test_greedy_equals_the_published_code(model: Qwen, golden: Path) -> None:
    reference = load_file(golden / "tiny-qwen" / "golden.safetensors")
    prompt, expected = reference["greedy.input_ids"][0].tolist(), reference["greedy.output_ids"][0].tolist()
    completion = run(engine(model), prompt, temperature=0, max_new_tokens=len(expected) - len(prompt))
    assert prompt + list(completion.token_ids) == expected
    assert completion.finish_reason == "length"


@pytest.mark.parametrize("chunk", [1, 7, 64, 512])
def test_pieces_pages_and_cache_change_nothing(model: Qwen, chunk: int) -> None:
    prompt = torch.randint(0, 384, (100,), generator=torch.Generator().manual_seed(1)).tolist()
    settings = SamplingParams(temperature=1.0, top_p=0.9, seed=5, max_new_tokens=40)
    completion = run(engine(model, prefill_chunk=chunk), prompt, temperature=1.0, top_p=0.9, seed=5, max_new_tokens=40)
    assert list(completion.token_ids) == oracle(model, prompt, 40, settings)


def test_the_same_seed_draws_the_same_alone_or_between_others(model: Qwen) -> None:
    alone = run(engine(model), [1, 2, 3], temperature=1.0, seed=11, max_new_tokens=30)
    shared = engine(model)
    settings = SamplingParams(temperature=1.0, seed=11, max_new_tokens=30)
    others = [shared.submit([7] * n, SamplingParams(temperature=1.0, max_new_tokens=20))[0] for n in (5, 70)]
    (mine,) = shared.submit([1, 2, 3], settings)
    assert Completion.from_chunks(shared.stream(mine)).token_ids == alone.token_ids
    for other in others:
        assert Completion.from_chunks(shared.stream(other)).completion_tokens == 20
    assert shared.stats.pages_used == 0


def test_choices_differ_and_a_drawn_seed_is_told(model: Qwen) -> None:
    shared = engine(model)
    requests = shared.submit([1, 2, 3], SamplingParams(temperature=1.0, n=3, max_new_tokens=12))
    completions = [Completion.from_chunks(shared.stream(request)) for request in requests]
    assert len({c.token_ids for c in completions}) == 3
    assert len({c.seed for c in completions}) == 1
    again = run(engine(model), [1, 2, 3], temperature=1.0, seed=completions[0].seed, max_new_tokens=12)
    assert again.token_ids == completions[0].token_ids


def test_an_end_token_ends_at_once_and_is_the_last_id(model: Qwen) -> None:
    free = run(engine(model), [1, 2, 3], temperature=0, max_new_tokens=20).token_ids
    stop = free[6]
    first = free.index(stop)
    for kind in ("own", "asked"):
        e = engine(model, stop_ids=(stop,) if kind == "own" else ())
        asked = None if kind == "own" else [stop]
        completion = run(e, [1, 2, 3], temperature=0, max_new_tokens=20, stop_token_ids=asked)
        assert completion.token_ids == free[: first + 1]
        assert completion.finish_reason == "stop"
    ignored = run(engine(model, stop_ids=(stop,)), [1, 2, 3], temperature=0, max_new_tokens=20, ignore_eos=True)
    assert ignored.token_ids == free


def test_a_sequence_of_the_generation_config_ends_a_reply(model: Qwen) -> None:
    free = run(engine(model), [1, 2, 3], temperature=0, max_new_tokens=20).token_ids
    pair = tuple(free[4:6])
    first = next(i for i in range(len(free)) if free[i : i + 2] == pair)
    defaults = GenerationDefaults(stop_words_ids=(pair,))
    completion = run(engine(model, defaults=defaults), [1, 2, 3], temperature=0, max_new_tokens=20)
    assert completion.token_ids == free[: first + 2]


def test_the_last_token_of_a_length_stop_is_kept(model: Qwen) -> None:
    completion = run(engine(model), [1, 2, 3], temperature=0, max_new_tokens=1)
    assert completion.completion_tokens == 1
    assert completion.finish_reason == "length"


def test_chunks_tell_progress_and_counts(model: Qwen) -> None:
    e = engine(model, prefill_chunk=10)
    (request,) = e.submit([1] * 25, SamplingParams(temperature=0, max_new_tokens=3, logprobs=2))
    chunks: list[Chunk] = list(e.stream(request))
    assert [c.prompt_done for c in chunks] == [10, 20, 25, 25, 25]
    assert [c.completion_tokens for c in chunks] == [0, 0, 1, 2, 3]
    assert [c.finish_reason for c in chunks] == [None, None, None, None, "length"]
    assert [len(c.logprobs or ()) for c in chunks] == [0, 0, 1, 1, 1]
    timings = chunks[-1].timings
    assert (timings.prefill_tokens, timings.decode_tokens) == (25, 2)
    assert timings.time_to_first_token is not None
    assert timings.prefill_seconds is not None
    assert 0 < timings.prefill_seconds <= timings.time_to_first_token
    assert timings.decode_tokens_per_second is not None
    assert timings.decode_tokens_per_second > 0


def test_logprobs_are_of_the_chosen_tokens(model: Qwen) -> None:
    completion = run(engine(model), [1, 2, 3], temperature=0, max_new_tokens=4, logprobs=1)
    assert completion.logprobs is not None
    assert [entry.token_id for entry in completion.logprobs] == list(completion.token_ids)
    assert all(entry.top[0] == (entry.token_id, entry.logprob) for entry in completion.logprobs), "greedy takes the top"


def settled(engine: Engine) -> Engine:
    """Waits for the step that runs, and for what it ends."""
    assert engine.drain(30)
    return engine


def test_closing_a_stream_cancels_and_frees(model: Qwen) -> None:
    e = engine(model, prefix_cache=False)
    (request,) = e.submit([1, 2, 3], SamplingParams(temperature=0, max_new_tokens=250))
    stream = e.stream(request)
    next(stream)
    assert e.pool.free_pages < e.pool.pages
    stream.close()
    settled(e)
    assert request.finish_reason == "cancelled"
    assert e.pool.free_pages == e.pool.pages
    assert e.stats.finished == {"cancelled": 1}
    assert (e.stats.whole.count, e.stats.decode.count) == (1, 1)


def test_a_request_that_waits_for_pages_runs_when_they_are_free(model: Qwen) -> None:
    e = engine(model, max_context=2 * PAGE_TOKENS)
    (first,) = e.submit([1] * 60, SamplingParams(temperature=0, max_new_tokens=60))
    (second,) = e.submit([2] * 60, SamplingParams(temperature=0, max_new_tokens=60))
    assert Completion.from_chunks(e.stream(second)).completion_tokens == 60
    assert Completion.from_chunks(e.stream(first)).completion_tokens == 60
    assert e.stats.pages_used == 0


def test_a_request_that_fails_while_its_token_is_drawn_fails_alone(
    model: Qwen, monkeypatch: pytest.MonkeyPatch
) -> None:
    import qwenlet.engine.replies as module

    e = engine(model)
    (bad,) = e.submit([13], SamplingParams(temperature=0, max_new_tokens=5, logprobs=1))
    (good,) = e.submit([1, 2, 3], SamplingParams(temperature=0, max_new_tokens=5))

    def faulty(*_: object) -> None:
        raise MemoryError("no room for a draw")

    monkeypatch.setattr(module, "token_logprob", faulty)
    assert Completion.from_chunks(e.stream(good)).completion_tokens == 5
    chunks = e.stream(bad)
    last = next(chunks)
    assert (last.finish_reason, last.error) == ("error", "MemoryError: no room for a draw")
    with pytest.raises(MemoryError, match="no room"):
        next(chunks)
    assert e.stats.pages_used == 0
    assert e.health.healthy


def test_a_draw_that_fails_for_one_row_hurts_no_other(model: Qwen, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are drawn side by side: what one of them can't bear must not end the step, or the engine's thread."""
    one = engine(model)
    expected = run(one, [1, 2], temperature=0, max_new_tokens=6).token_ids

    def draw_all(rows: list[Row]) -> list[int]:
        if any(row.params.presence_penalty for row in rows):
            raise ValueError("this row can't be drawn for")
        return choose_all(rows)

    monkeypatch.setattr(replies, "choose_all", draw_all)
    monkeypatch.setattr(sampling, "choose_all", draw_all)
    (bad,) = one.submit([3, 4], SamplingParams(temperature=0, max_new_tokens=6, presence_penalty=1.0))
    (good,) = one.submit([1, 2], SamplingParams(temperature=0, max_new_tokens=6))
    assert Completion.from_chunks(one.stream(good)).token_ids == expected
    with pytest.raises(ValueError, match="can't be drawn for"):
        list(one.stream(bad))
    assert one.health.healthy


def test_numbers_of_any_size_are_borne(model: Qwen) -> None:
    """Clients may send them, and kernels count in 64 bits."""
    one = engine(model)
    plain = run(one, [1, 2], temperature=1.0, seed=3, max_new_tokens=6).token_ids
    for huge in (2**31, 2**63 - 1, 2**63, 10**400):
        params = {"top_k": huge, "logprobs": huge, "stop_token_ids": [huge]}
        assert run(one, [1, 2], temperature=1.0, seed=3, max_new_tokens=6, top_k=huge).token_ids == plain
        assert len(run(one, [1, 2], temperature=1.0, seed=3, max_new_tokens=6, **params).token_ids) == 6
        with pytest.raises(RequestError):
            one.submit([1, huge], SamplingParams(max_new_tokens=1))
    for name in ("temperature", "top_p", "presence_penalty"):
        with pytest.raises(RequestError, match=name):
            SamplingParams(**{name: 10**400})  # larger than any float
    assert one.health.healthy


def test_a_failing_step_fails_its_requests_and_the_engine_goes_on(model: Qwen, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run(engine(model), [4, 5, 6], temperature=0, max_new_tokens=5).token_ids
    e = engine(model)
    real, failures = e.runner.run, iter([True] * 3)

    def faulty(work: object) -> object:
        if next(failures, False):
            raise RuntimeError("the kernel is out of order")
        return real(work)  # type: ignore[arg-type]

    monkeypatch.setattr(e.runner, "run", faulty)
    for times in (1, 2, 3):
        requests = [e.submit([4, 5, 6], SamplingParams(temperature=0, max_new_tokens=5))[0] for _ in range(2)]
        assert e.step()
        assert [request.finish_reason for request in requests] == ["error", "error"]
        assert e.health.healthy == (times < 3), "three failures in a row are no accident"
    assert "out of order" in e.health.reason
    with pytest.raises(RuntimeError, match="out of order"):
        list(e.stream(requests[0]))
    assert run(e, [4, 5, 6], temperature=0, max_new_tokens=5).token_ids == expected
    assert e.health.healthy
    assert e.stats.failed_steps == 3
    assert e.stats.pages_used == 0


def test_a_deadline_ends_a_request_that_runs_and_one_that_waits(model: Qwen) -> None:
    e = engine(model, max_requests=1)
    (runs,) = e.submit([1, 2], SamplingParams(temperature=0, max_new_tokens=250), timeout=0.05)
    (waits,) = e.submit([1, 2], SamplingParams(temperature=0, max_new_tokens=2), timeout=1e-9)
    for request, seconds in ((waits, "1e-09"), (runs, "0.05")):
        with pytest.raises(EngineError, match=f"within its {seconds} s"):
            list(e.stream(request))
    assert e.stats.pages_used == 0
    with pytest.raises(RequestError, match="timeout is 0"):
        e.submit([1], SamplingParams(), timeout=0)


def test_a_lower_number_goes_first(model: Qwen) -> None:
    e = engine(model, max_requests=1)
    submitted = [e.submit([n + 1], SamplingParams(temperature=0, max_new_tokens=2), priority=-n)[0] for n in range(3)]
    ended: list[int] = []
    while e.step():
        ended += [n for n, request in enumerate(submitted) if request.finish_reason and n not in ended]
    assert ended == [2, 1, 0]


def test_a_shut_down_engine_says_so(model: Qwen) -> None:
    e = engine(model)
    (request,) = e.submit([1, 2], SamplingParams(temperature=0, max_new_tokens=200))
    stream = e.stream(request)
    next(stream)
    assert e.alive
    assert e.health.beat_seconds is not None
    e.close()
    e.close()
    assert not e.alive
    assert [chunk.finish_reason for chunk in stream][-1] == "cancelled"
    with pytest.raises(EngineError, match="shut down"):
        e.submit([1], SamplingParams())
    assert not e.health.healthy


def test_draining_finishes_what_came_and_takes_no_more(model: Qwen) -> None:
    e = engine(model)
    (request,) = e.submit([1, 2], SamplingParams(temperature=0, max_new_tokens=20))
    assert e.drain(30)
    assert request.finish_reason == "length"
    with pytest.raises(EngineError, match="about to be"):
        e.submit([1], SamplingParams())


def test_an_engine_nobody_holds_ends_its_thread(model: Qwen) -> None:
    e = engine(model)
    run(e, [1, 2], temperature=0, max_new_tokens=2)
    thread = e._driver._thread
    assert thread is not None
    del e
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()


def test_an_event_loop_reads_while_others_run(model: Qwen) -> None:
    e = engine(model)
    expected = run(e, [4, 5, 6], temperature=0, max_new_tokens=8)

    async def read(cancel: bool) -> tuple[int, ...]:
        (request,) = e.submit([4, 5, 6], SamplingParams(temperature=0, max_new_tokens=8))
        stream = e.astream(request)
        if cancel:
            await anext(stream)
            await stream.aclose()
            return ()
        return tuple([token async for chunk in stream for token in chunk.token_ids])

    async def several() -> list[tuple[int, ...]]:
        return await asyncio.gather(*(read(n == 1) for n in range(4)))

    found = asyncio.run(several())
    assert [tokens for n, tokens in enumerate(found) if n != 1] == [expected.token_ids] * 3
    assert settled(e).stats.pages_used == 0


def test_a_consumer_that_stops_reading_stops_nobody(model: Qwen) -> None:
    e = engine(model)
    (lazy,) = e.submit([1, 2], SamplingParams(temperature=0, max_new_tokens=60))
    kept = e.stream(lazy)
    assert run(e, [4, 5, 6], temperature=0, max_new_tokens=30).completion_tokens == 30
    settled(e)
    assert len(list(kept)) == 60
    assert e.stats.pages_used == 0


def test_a_shared_beginning_is_found_and_told(model: Qwen) -> None:
    e = engine(model)
    prompt = [n % 300 for n in range(150)]
    first = run(e, prompt, temperature=0, max_new_tokens=4)
    second = run(e, [*prompt[:140], 1, 2, 3], temperature=0, max_new_tokens=4)
    again = run(e, prompt, temperature=0, max_new_tokens=4)
    assert [c.cached_tokens for c in (first, second, again)] == [0, 128, 128]
    assert again.token_ids == first.token_ids
    assert (e.stats.cached_tokens, e.stats.prompt_tokens) == (256, 443)
    # a whole page more: the reply of a chat is the next turn's prompt
    longer = run(e, [*prompt, *first.token_ids, *range(50)], temperature=0, max_new_tokens=1)
    assert longer.cached_tokens == 128


def test_another_ntk_factor_is_another_prefix(model: Qwen) -> None:
    e = engine(model, ntk="reserve", max_context=512)
    prompt = [1] * 66
    assert run(e, prompt, temperature=0, max_new_tokens=2).cached_tokens == 0
    assert run(e, prompt, temperature=0, max_new_tokens=150).cached_tokens == 0, "more room, another factor"
    assert run(e, prompt, temperature=0, max_new_tokens=2).cached_tokens == 64


def test_choices_share_the_prompts_pages(model: Qwen) -> None:
    e = engine(model, prefix_cache=False)
    requests = e.submit([1] * 100, SamplingParams(temperature=1.0, n=3, max_new_tokens=2, seed=1))
    assert e.step()
    held = e.pool.pages - e.pool.free_pages
    assert held == 2, "one prompt of two pages, three choices"
    assert e.step()
    assert [request.finish_reason for request in requests] == ["length"] * 3
    assert e.pool.free_pages == e.pool.pages


def test_logits_and_scores_take_their_turn(model: Qwen) -> None:
    e = engine(model, prefill_chunk=16)
    ids = list(range(50))
    with torch.no_grad():
        whole = model(torch.tensor(ids), Rows.fresh([50], [1.0]))
    assert torch.allclose(e.logits(ids, 1.0), whole, atol=1e-4)
    assert torch.equal(e.logits(ids, 1.0, 48), e.logits(ids, 1.0)[48:])
    assert e.stats.pages_used == 0


def test_a_prompt_longer_than_the_context_says_the_counts(model: Qwen) -> None:
    e = engine(model, max_context=128)
    with pytest.raises(ContextLengthError, match=r"200 tokens.*128") as caught:
        e.submit([1] * 200, SamplingParams())
    assert (caught.value.prompt_tokens, caught.value.context_length) == (200, 128)
    with pytest.raises(ContextLengthError, match="100 more"):
        e.submit([1] * 100, SamplingParams(max_new_tokens=100))


def test_a_default_reply_length_is_cut_to_the_room_there_is(model: Qwen) -> None:
    e = engine(model, max_context=128, defaults=GenerationDefaults(max_new_tokens=512))
    (request,) = e.submit([1] * 100, SamplingParams(temperature=0))
    assert Completion.from_chunks(e.stream(request)).completion_tokens == 28


@pytest.mark.parametrize(("prompt", "word"), [([], "empty"), ([384], "384"), ([-1], "-1")])
def test_bad_prompts_are_refused_at_once(model: Qwen, prompt: list[int], word: str) -> None:
    with pytest.raises(RequestError, match=word):
        engine(model).submit(prompt, SamplingParams())


def test_biases_become_tensors_once(model: Qwen, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not for each token of each choice, which all other requests would wait for."""
    made = []

    class Counted(sampling.Bias):
        def __init__(self, *arguments: Any) -> None:
            made.append(self)
            super().__init__(*arguments)

    monkeypatch.setattr(sampling, "Bias", Counted)
    e = engine(model, stop_ids=(9,))
    params = SamplingParams(temperature=0, n=3, max_new_tokens=8, min_new_tokens=4, logit_bias={9: 100.0, 7: 50.0})
    requests = e.submit([1, 2, 3], params)
    replies = [Completion.from_chunks(e.stream(request)).token_ids for request in requests]
    assert replies == [(7, 7, 7, 7, 9)] * 3
    assert len(made) == 2  # before the least number of tokens, and after it


def test_stop_texts_need_a_tokenizer(model: Qwen) -> None:
    with pytest.raises(RequestError, match="tokenizer"):
        engine(model).submit([1], SamplingParams(stop="x"))


def test_a_context_without_published_maths_is_refused(model: Qwen) -> None:
    with pytest.raises(ConfigError, match="32767"):
        engine(model, max_context=40_000)


def test_the_ntk_factor_comes_from_the_whole_prompt_or_from_the_reserve(model: Qwen) -> None:
    params = SamplingParams(max_new_tokens=40)
    assert engine(model).submit([1] * 30, params)[0].alpha == 1.0
    assert engine(model, ntk="reserve").submit([1] * 30, params)[0].alpha == 7.0
    assert engine(model, prefill_chunk=8).submit([1] * 70, params)[0].alpha == 7.0


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"cache_tokens": 0}, "cache_tokens"),
        ({"cache_tokens": 100}, "max_context=256"),
        ({"max_requests": 0}, "max_requests"),
        ({"mixed_chunk": -1}, "mixed_chunk"),
        ({"cache_tokens": 10**12}, r"GB are free\n  hint: cache_tokens=\d+ would fit"),
    ],
)
def test_limits_that_make_no_sense_or_dont_fit(model: Qwen, options: dict[str, int], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        engine(model, **options)


def test_more_choices_than_may_run(model: Qwen) -> None:
    with pytest.raises(RequestError, match="n is 3, but 2 requests run at once"):
        engine(model, max_requests=2).submit([1], SamplingParams(n=3))
