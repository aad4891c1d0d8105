"""The engine on the tiny golden model: exact tokens, stops without an extra step, counters, pages that come back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qwenlet.cache import PAGE_TOKENS, Rows
from qwenlet.checkpoint import Checkpoint, load_model
from qwenlet.config import EngineConfig, GenerationDefaults, SamplingParams
from qwenlet.engine import Chunk, Completion, Engine
from qwenlet.errors import ConfigError, ContextLengthError, RequestError
from qwenlet.model import Qwen
from qwenlet.sampling import choose

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
    assert shared.pool.free_pages == shared.pool.pages


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


def test_closing_a_stream_cancels_and_frees(model: Qwen) -> None:
    e = engine(model)
    (request,) = e.submit([1, 2, 3], SamplingParams(temperature=0, max_new_tokens=100))
    stream = e.stream(request)
    next(stream)
    assert e.pool.free_pages < e.pool.pages
    stream.close()
    assert request.finish_reason == "cancelled"
    assert e.pool.free_pages == e.pool.pages
    assert not e.step()


def test_a_request_that_waits_for_pages_runs_when_they_are_free(model: Qwen) -> None:
    e = engine(model, max_context=2 * PAGE_TOKENS)
    (first,) = e.submit([1] * 60, SamplingParams(temperature=0, max_new_tokens=60))
    (second,) = e.submit([2] * 60, SamplingParams(temperature=0, max_new_tokens=60))
    assert Completion.from_chunks(e.stream(second)).completion_tokens == 60
    assert Completion.from_chunks(e.stream(first)).completion_tokens == 60
    assert e.pool.free_pages == e.pool.pages


def test_a_failing_request_fails_alone(model: Qwen, monkeypatch: pytest.MonkeyPatch) -> None:
    e = engine(model)
    (bad,) = e.submit([13], SamplingParams(temperature=0, max_new_tokens=5))
    (good,) = e.submit([1, 2, 3], SamplingParams(temperature=0, max_new_tokens=5))
    real = e.runner.run

    def faulty(request: object, tokens: object) -> object:
        if request is bad:
            raise MemoryError("no room for activations")
        return real(request, tokens)  # type: ignore[arg-type]

    monkeypatch.setattr(e.runner, "run", faulty)
    assert Completion.from_chunks(e.stream(good)).completion_tokens == 5
    with pytest.raises(MemoryError, match="no room"):
        list(e.stream(bad))
    assert e.pool.free_pages == e.pool.pages


def test_ctrl_c_between_two_streams_loses_nothing(model: Qwen, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interrupt lands in the neighbour's step, after its keys are stored and before its token is drawn."""
    import qwenlet.engine.engine as module

    expected = run(engine(model), [4, 5, 6], temperature=0, max_new_tokens=8).token_ids
    e = engine(model)
    (mine,) = e.submit([1, 2, 3], SamplingParams(temperature=0, max_new_tokens=8))
    (neighbour,) = e.submit([4, 5, 6], SamplingParams(temperature=0, max_new_tokens=8))
    real, struck = module.choose, []

    def interrupted(*args: object) -> int:
        if len(neighbour.reply) == 3 and not struck and e.scheduler.running[-1] is neighbour:
            struck.append(True)
            raise KeyboardInterrupt
        return real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "choose", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(e.stream(mine))
    assert struck
    assert Completion.from_chunks(e.stream(neighbour)).token_ids == expected


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
